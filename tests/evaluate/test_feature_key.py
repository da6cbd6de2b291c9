"""What counts as the same tokens: everything that may change one bit of them, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from making import picture, random_weights

from eupe.common.storage import StoragePath
from eupe.evaluate import feature_key
from eupe.evaluate.feature_key import encoder_digest, views_key
from eupe.evaluate.judged_pictures import Pictures, centre, whole, windows
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.teacher import Teacher, build_teacher, load_teacher

Change = Callable[[Teacher, pytest.MonkeyPatch], Teacher]


def teacher(weights: Path, *, dtype: torch.dtype = torch.float32) -> Teacher:
    spec = resolve_teacher("timm:test_vit")
    return load_teacher(spec, weights=weights, device=torch.device("cpu"), dtype=dtype, sizes=(64,))


def of_spec(**fields: Any) -> Change:
    return lambda one, patch: replace(one, spec=replace(one.spec, **fields))


def of_module(path: str, name: str, value: Any) -> Change:
    def change(one: Teacher, patch: pytest.MonkeyPatch) -> Teacher:
        assert getattr(one.module.get_submodule(path), name) != value
        setattr(one.module.get_submodule(path), name, value)
        return one

    return change


def of_weight(one: Teacher, patch: pytest.MonkeyPatch) -> Teacher:
    with torch.no_grad():
        one.module.get_parameter("norm.bias")[3] += 1e-7
    return one


def of_key(name: str, value: Any) -> Change:
    def change(one: Teacher, patch: pytest.MonkeyPatch) -> Teacher:
        patch.setattr(feature_key, name, value)
        return one

    return change


def of_threads(one: Teacher, patch: pytest.MonkeyPatch) -> Teacher:
    patch.setattr(torch, "get_num_threads", lambda: 1000)
    return one


def of_version(one: Teacher, patch: pytest.MonkeyPatch) -> Teacher:
    installed = feature_key.version
    patch.setattr(feature_key, "version", lambda name: "0.0" if name == "timm" else installed(name))
    return one


DECISIVE: dict[str, Change] = {
    "mean": of_spec(mean=(0.5, 0.5, 0.4)),
    "std": of_spec(std=(0.5, 0.5, 0.4)),
    "summary": of_spec(summary="mean"),
    "weight": of_weight,
    "heads": of_module("blocks.0.attn", "num_heads", 1),
    "epsilon": of_module("norm", "eps", 0.5),
    "activation": of_module("blocks.0.mlp", "act", torch.nn.ReLU()),
    "dtype": lambda one, patch: replace(one, dtype=torch.bfloat16),
    "version": of_version,
    "revision": of_key("REVISION", 1000),
    "batch": of_key("BATCH", 1),
    "processor": of_key("cpu_name", lambda: "another"),
    "threads": of_threads,
}
DESCRIPTIVE: dict[str, Change] = {
    "name": of_spec(name="another", model="elsewhere", note="said", licence="other", native_size=999),
    "loaded again": lambda one, patch: one,
}


@pytest.mark.parametrize("what", [*DECISIVE, *DESCRIPTIVE])
def test_an_encoder_is_another_where_its_tokens_may_be(
    what: str, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = encoder_digest(teacher(tiny_weights))
    changed = {**DECISIVE, **DESCRIPTIVE}[what](teacher(tiny_weights), monkeypatch)
    assert (encoder_digest(changed) != before) == (what in DECISIVE)


def test_weights_and_seeds_are_others(tmp_path: Path, tiny_weights: Path) -> None:
    spec = resolve_teacher("timm:test_vit")
    other = teacher(random_weights("test_vit", tmp_path / "w.safetensors", seed=1))
    drawn = [build_teacher(spec, size=64, seed=seed) for seed in (2, 3, 3)]
    first, second, third, fourth, fifth = map(encoder_digest, (teacher(tiny_weights), other, *drawn))
    assert fourth == fifth and len({first, second, third, fourth}) == 4


def test_a_configuration_of_hugging_face_counts_but_not_where_it_is_from(tmp_path: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    digests = []
    for folder, more in (("a", {}), ("b", {}), ("c", {"layer_norm_eps": 0.1})):
        torch.manual_seed(0)
        Dinov2Model(Dinov2Config(**sizes, **more)).save_pretrained(tmp_path / folder)
        spec = resolve_teacher(f"hf:{tmp_path / folder}")
        loaded = load_teacher(spec, weights=None, device=torch.device("cpu"), dtype=torch.float32, sizes=(28,))
        digests.append(encoder_digest(loaded))
    assert digests[0] == digests[1] != digests[2]


def test_views_are_others_with_another_picture_order_size_or_crop(tmp_path: Path) -> None:
    for i in range(3):
        picture(i, 80, 64).save(tmp_path / f"{i}.png")

    def key(*names: str, size: int = 64, crop: Any = centre, encoder: str = "a") -> str:
        return views_key(encoder, Pictures(StoragePath.of(tmp_path), names), size=size, crop=crop)

    names = ("0.png", "1.png", "2.png")
    first = key(*names)
    others = [key(*names[::-1]), key(*names[:2]), key(*names, names[2]), key(*names, size=32)]
    others += [key(*names, crop=whole), key(*names, crop=windows), key(*names, encoder="b")]
    assert len({first, *others}) == 1 + len(others)
    (tmp_path / "moved.png").write_bytes((tmp_path / "1.png").read_bytes())
    assert key("0.png", "moved.png", "2.png") == first, "names and places do not count"
    (tmp_path / "1.png").write_bytes((tmp_path / "2.png").read_bytes())
    assert key(*names) != first


def test_a_picture_is_known_by_what_was_decoded_last(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "0.png")
    pictures = Pictures(StoragePath.of(tmp_path), ("0.png",))
    before = pictures.sha256(0)
    picture(1).save(tmp_path / "0.png")
    assert pictures.sha256(0) == before
    pictures.image(0)
    assert pictures.sha256(0) == Pictures(pictures.root, pictures.keys).sha256(0) != before
