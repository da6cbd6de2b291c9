"""`--layers` of the dense tasks: maps side by side on the finest grid, kept and compared apart from the last map."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from making import picture, random_weights
from numpy.typing import NDArray
from planted import ade20k, depth_pairs, spair
from safetensors.torch import load_file

from eupe.common.compute import normalise
from eupe.common.storage import StoragePath
from eupe.errors import ConfigError
from eupe.evaluate.feature_cache import open_features
from eupe.evaluate.judged_pictures import Pictures, centre
from eupe.evaluate.subject import EncoderSubject, open_subjects
from eupe.store import Store

ARCH = "mobilenetv4_conv_small"
SIDE = 64


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_weights(ARCH, tmp_path_factory.mktemp("weights") / "w.safetensors")


def enlarged(map_hwD: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    """Bilinear interpolation, cell centre by cell centre, edges repeated: a naive loop."""
    h = len(map_hwD)
    out = np.empty((side, side, map_hwD.shape[2]))
    places = [min(max((i + 0.5) * h / side - 0.5, 0), h - 1) for i in range(side)]
    for y, v in enumerate(places):
        for x, u in enumerate(places):
            top, left = int(v), int(u)
            down, right = min(top + 1, h - 1), min(left + 1, h - 1)
            a, b = v - top, u - left
            upper = map_hwD[top, left] * (1 - b) + map_hwD[top, right] * b
            lower = map_hwD[down, left] * (1 - b) + map_hwD[down, right] * b
            out[y, x] = upper * (1 - a) + lower * a
    return out


@torch.inference_mode()
def test_several_layers_lie_side_by_side_on_the_finest_grid(weights: Path) -> None:
    subject = open_subjects([f"timm:{ARCH}"], {f"timm:{ARCH}": weights}, layers=(3, 5))[0]
    assert isinstance(subject, EncoderSubject)
    views = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)
    model = timm.create_model(ARCH, num_classes=0).eval()
    model.load_state_dict(load_file(weights))
    seen: list[torch.Tensor] = []
    for stage in (2, 4):
        part = model.get_submodule(model.feature_info[stage]["module"])
        part.register_forward_hook(lambda _, __, map_BDhw: seen.append(map_BDhw))
    model(normalise(torch.from_numpy(views), subject.spec.mean, subject.spec.std))

    dense = subject.encode(views, size=SIDE).dense

    fine, coarse = (each.permute(0, 2, 3, 1).double().numpy() for each in seen)
    wanted = np.stack([np.concatenate([a, enlarged(b, 8)], axis=-1) for a, b in zip(fine, coarse, strict=True)])
    assert dense.shape == (2, 8, 8, 64 + 960)
    np.testing.assert_allclose(dense.numpy(), wanted, rtol=1e-3, atol=1e-4)


def test_kept_tokens_of_layers_are_not_those_of_the_last_map(weights: Path, tmp_path: Path) -> None:
    picture(0, SIDE, SIDE).save(tmp_path / "0.png")
    pictures = Pictures(StoragePath.of(tmp_path), ("0.png",))
    shapes = []
    for layers in ((), (3,), (3, 4), (3,)):
        cache = open_features(tmp_path / "kept", on_note=print)
        given = {f"timm:{ARCH}": weights}
        (subject,) = open_subjects([f"timm:{ARCH}"], given, features=cache, layers=layers)
        encoded = subject.encode_views(pictures, kinds=["dense"], size=SIDE, crop=centre)
        assert encoded.dense is not None
        shapes.append(tuple(encoded.dense.shape[1:]))
    assert shapes == [(2, 2, 960), (8, 8, 64), (8, 8, 160), (8, 8, 64)]


def test_each_dense_task_takes_it_and_says_it(
    weights: Path, tmp_path: Path, run_eupe: Callable[..., Any], tiny_store: Store
) -> None:
    data = {"segment": ade20k, "depth": depth_pairs, "correspond": spair}
    name = f"timm:{ARCH}"
    for task, make in data.items():
        words = ["eval", task, name, "--data", make(tmp_path / task), "--weights", f"{name}={weights}", "--size", SIDE]
        words += [] if task == "correspond" else ["--steps", 3]
        plain, chosen = (run_eupe(*words, *layers, "--json") for layers in ((), ("--layers", "3,4")))
        results = [json.loads(outcome.out)["results"][0] for outcome in (plain, chosen)]
        assert [result["protocol"].get("layers") for result in results] == [None, [3, 4]]
        assert task != "depth" or results[0]["scores"] != results[1]["scores"]
    for subject, said in ((tiny_store.path, "is a store; give its teacher"), (name, "has layers 1 to 5, not 9")):
        outcome = run_eupe("eval", "segment", subject, "--data", tmp_path / "segment", "--layers", "9", "--size", SIDE)
        assert outcome.code == 2 and said in " ".join(outcome.err.split())


def test_baselines_have_no_layers(weights: Path) -> None:
    pixels, _ = open_subjects(["pixels", f"timm:{ARCH}"], {f"timm:{ARCH}": weights}, layers=(3,))
    assert "layers" not in pixels.protocol(SIDE)
    with pytest.raises(ConfigError, match="layers 1 to 5, not 6"):
        (subject,) = open_subjects([f"timm:{ARCH}"], {f"timm:{ARCH}": weights}, layers=(6,))
        assert isinstance(subject, EncoderSubject)
        subject._cells(SIDE)
