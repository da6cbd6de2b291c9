"""`eupe teachers verify`: it agrees where the adapters are right, and says so where they are broken."""

import dataclasses
import json
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from eupe.common.compute import Tokens
from eupe.errors import ConformanceError
from eupe.models.encoder import build_encoder, save_encoder
from eupe.teachers import hf_adapter, library_check, open_clip_adapter, timm_adapter
from eupe.teachers.library_check import Comparison, Cosine, awkward_views, compare, random_pair, require_agreement
from eupe.teachers.own_forward import fill_at_random
from eupe.teachers.registry import REGISTRY

Run = Callable[..., Any]
NEVER_FULL = 0
"""Every row is built narrow."""


def verified(run_eupe: Run, *words: object) -> tuple[int, dict[str, Any]]:
    outcome = run_eupe("teachers", "verify", *words, "--json")
    assert len(outcome.out.splitlines()) == 1, outcome.err
    return outcome.code, json.loads(outcome.out)


ONE_OF_EACH_KIND = [
    *("dinov2-s", "dinov2-reg-b", "eupe-convnext-t", "pe-core-g", "pe-lang-g", "clip-l14", "siglip2-b-256"),
    *("radio-v4-h", "eva02-clip-b16-proj", "vjepa2-g-384"),
]


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_one_row_of_each_kind_agrees(name: str) -> None:
    found = compare(REGISTRY[name], full_up_to=NEVER_FULL)
    assert found.agrees and (found.build, found.weights) == ("narrow", "random weights")
    assert found.size == REGISTRY[name].native_size
    assert set(found.cosines) == ({"dense"} if REGISTRY[name].summary == "none" else {"summary", "dense"})


def test_the_whole_registry_from_the_command_line(run_eupe: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: REGISTRY[name] for name in ("efficientnet-lite0", "clip-b32")}
    monkeypatch.setattr(library_check, "REGISTRY", few)
    code, report = verified(run_eupe)
    assert code == 0
    assert {row["teacher"]: row["build"] for row in report["teachers"]} == {
        "efficientnet-lite0": "full",
        "clip-b32": "narrow",
    }
    words = " ".join(run_eupe("teachers", "verify").out.split())
    assert "random weights" in words and "2 teachers (1 full, 1 narrow) on 8 awkward pictures each" in words


def test_awkward_pictures_are_distinct_views() -> None:
    views = awkward_views(32)
    assert views.shape == (8, 32, 32, 3)
    assert len({view.tobytes() for view in views}) == 8


@pytest.mark.parametrize(
    ("name", "folder"),
    [("dinov2-s", "dinov2-small"), ("efficientnet-lite0", "efficientnet_lite0")],
)
def test_real_weights(name: str, folder: str, assets: Path, run_eupe: Run) -> None:
    weights = assets / "weights" / folder
    code, report = verified(run_eupe, name, "--weights", weights)
    (row,) = report["teachers"]
    assert code == 0 and row["agrees"]
    assert (row["weights"], row["build"]) == (str(weights), "full")


def test_bf16_against_fp32(assets: Path, run_eupe: Run) -> None:
    """The bounds are what the real weights gave (least 0.9931 and 0.9855), with room for other kernels."""
    weights = assets / "weights" / "efficientnet_lite0" / "model.safetensors"
    code, report = verified(run_eupe, "efficientnet-lite0", "--weights", weights, "--dtype", "bf16")
    (row,) = report["teachers"]
    assert code == 0 and all(cosine["least"] > 0.9999999 for cosine in row["cosines"].values())
    for kind, least in (("summary", 0.985), ("dense", 0.97)):
        assert least < row["rounding"][kind]["least"] < row["rounding"][kind]["mean"] < 0.999995


def test_a_run_and_a_hugging_face_directory_bring_their_own_weights(tmp_path: Path, run_eupe: Run) -> None:
    torch.manual_seed(0)
    save_encoder(build_encoder("vit_tiny_patch16_dinov3_qkvb", size=64), tmp_path / "run")
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56)
    Dinov2Model(config).save_pretrained(tmp_path / "hf")
    for name in (str(tmp_path / "run"), f"hf:{tmp_path / 'hf'}"):
        code, report = verified(run_eupe, name)
        assert code == 0
        assert report["teachers"][0]["weights"] == name.removeprefix("hf:")


OTHER_KINDS = ["test_vit", "test_resnet", "test_convnext", "test_nfnet", "mobilenetv3_small_050"]


@pytest.mark.parametrize("name", [f"timm:{arch}" for arch in OTHER_KINDS])
def test_any_timm_architecture(name: str) -> None:
    found = compare(library_check.resolve_teacher(name))
    assert found.agrees and (found.build, found.weights) == ("full", "random weights")


def test_local_weights_decide_the_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Library and adapter read them apart: where the adapter reads others, they differ."""
    model = timm.create_model("test_vit", num_classes=0)
    fill_at_random(model)
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    spec = library_check.resolve_teacher("timm:test_vit")
    assert compare(spec, path).agrees
    other = {name: tensor.flip(0) for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(timm_adapter, "read_checkpoint", lambda path, **options: other)
    assert not compare(spec, path).agrees


def with_raw_patches(tokens: Callable[..., Tokens]) -> Callable[..., Tokens]:
    """Patch tokens ahead of the last norm: what a wrong `global_pool`, or no norm, gives."""

    def broken(model: Any, spec: Any, pixels: Tensor, layers: object = ()) -> Tokens:
        right = tokens(model, spec, pixels)
        raw, prefixless = model.forward_intermediates(pixels, indices=1, norm=False)[1][0], right.summary
        return Tokens(summary=prefixless, dense=raw.permute(0, 2, 3, 1))

    return broken


def with_summary_of_the_first_register(tokens: Callable[..., Tokens]) -> Callable[..., Tokens]:
    def broken(model: Any, spec: Any, pixels: Tensor, layers: object = ()) -> Tokens:
        return Tokens(summary=model.forward_features(pixels)[:, 1], dense=tokens(model, spec, pixels).dense)

    return broken


def with_registers_among_the_patches(tokens: Callable[..., Tokens]) -> Callable[..., Tokens]:
    """One prefix token too few is dropped, and the last patch instead."""

    def broken(model: Any, spec: Any, pixels: Tensor, layers: object = ()) -> Tokens:
        right = tokens(model, spec, pixels)
        shifted = model.forward_features(pixels)[:, spec.prefix_tokens - 1 : -1]
        return Tokens(summary=right.summary, dense=shifted.reshape(right.dense.shape))

    return broken


def with_a_transposed_map(tokens: Callable[..., Tokens]) -> Callable[..., Tokens]:
    def broken(model: Any, spec: Any, pixels: Tensor, layers: object = ()) -> Tokens:
        right = tokens(model, spec, pixels)
        return Tokens(summary=right.summary, dense=right.dense.transpose(1, 2))

    return broken


@pytest.mark.parametrize(
    ("breaking", "kind"),
    [
        (with_raw_patches, "dense"),
        (with_summary_of_the_first_register, "summary"),
        (with_registers_among_the_patches, "dense"),
        (with_a_transposed_map, "dense"),
    ],
)
def test_a_broken_adapter_leaves_with_1(
    breaking: Callable[..., Any], kind: str, run_eupe: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timm_adapter, "tokens", breaking(timm_adapter.tokens))
    monkeypatch.setattr(library_check, "FULL_BY_NAME", NEVER_FULL)
    code, report = verified(run_eupe, "eupe-t")
    assert code == 1
    (row,) = report["teachers"]
    assert not row["agrees"]
    assert {word for word, cosine in row["cosines"].items() if cosine["least"] < 0.9999} == {kind}
    outcome = run_eupe("teachers", "verify", "eupe-t")
    assert outcome.code == 1 and "1 of 1 teachers give different tokens" in " ".join(outcome.err.split())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("dinov2-s", {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}),
        ("dinov3-sat-l", {"std": (0.229, 0.224, 0.225)}),
        ("clip-b32", {"mean": (0.485, 0.456, 0.406)}),
        ("siglip-b-224", {"mean": (0.485, 0.456, 0.406)}),
    ],
)
def test_a_spec_with_another_normalisation_is_found_out(name: str, change: dict[str, Any]) -> None:
    wrong = dataclasses.replace(REGISTRY[name], **change)
    assert not compare(wrong, full_up_to=NEVER_FULL).agrees


def test_broken_hugging_face_and_open_clip_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    for adapter, name in ((hf_adapter, "dinov2-reg-s"), (open_clip_adapter, "clip-b16")):
        monkeypatch.setattr(adapter, "tokens", with_a_transposed_map(adapter.tokens))
        assert not compare(REGISTRY[name], full_up_to=NEVER_FULL).agrees


def test_nothing_comparable_is_no_agreement() -> None:
    made = Comparison(
        teacher="x",
        weights="random weights",
        build="full",
        size=64,
        num_pictures=8,
        cosines={"dense": Cosine(1.0, 1.0)},
    )
    require_agreement([made])
    broken = dataclasses.replace(made, cosines={"dense": Cosine(float("nan"), float("nan"))})
    with pytest.raises(ConformanceError, match=r"1 of 2 .*: x"):
        require_agreement([made, broken])


def test_mistakes(run_eupe: Run, tmp_path: Path) -> None:
    for words, said in (
        (["--weights", tmp_path], "give its NAME"),
        (["dinov22"], "dinov2-s"),
        (["timm:cait_xxs24_224"], "no second forward path"),
        (["dinov3-s", "--weights", tmp_path / "no.pth"], "do not exist"),
    ):
        outcome = run_eupe("teachers", "verify", *words)
        assert outcome.code == 2
        assert said in " ".join(outcome.err.split())


def test_one_that_raises_is_a_failed_row_and_the_others_go_on(run_eupe: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_check, "REGISTRY", {name: REGISTRY[name] for name in ("eupe-t", "dinov2-s")})
    monkeypatch.setattr(library_check, "FULL_IN_REGISTRY", NEVER_FULL)
    monkeypatch.setattr(timm_adapter, "tokens", lambda model, spec, pixels, layers: {}["rope"])
    code, report = verified(run_eupe)
    assert code == 1
    assert {row["teacher"]: (row["agrees"], row["failure"]) for row in report["teachers"]} == {
        "eupe-t": (False, "KeyError: 'rope'"),
        "dinov2-s": (True, None),
    }
    outcome = run_eupe("teachers", "verify", "timm:test_vit")
    assert outcome.code == 1
    assert "timm:test_vit failed: KeyError: 'rope'" in " ".join(outcome.out.split())
    assert "or none at all: timm:test_vit" in " ".join(outcome.err.split())


def test_a_spec_that_promises_other_shapes_is_a_failed_row_of_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = dataclasses.replace(REGISTRY["eupe-t"], summary_dim=191)
    monkeypatch.setattr(library_check, "REGISTRY", {"eupe-t": wrong})
    (found,) = library_check.verify_teachers(None)
    assert found.failure is not None and "but its spec says" in found.failure


def test_a_temporary_folder_that_refuses_is_one_sentence(
    run_eupe: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library_check, "REGISTRY", {"eupe-t": REGISTRY["eupe-t"]})

    def assert_one_sentence() -> None:
        for words in (["timm:test_vit"], []):
            outcome = run_eupe("teachers", "verify", *words)
            assert (outcome.code, outcome.out) == (1, "") and "Traceback" not in outcome.err
            assert f"temporary folder in {tempfile.tempdir}" in outcome.err and "set TMPDIR" in outcome.err

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    assert_one_sentence()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        assert_one_sentence()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_no_temporary_folder_anywhere(run_eupe: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_place() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", no_place)
    outcome = run_eupe("teachers", "verify", "timm:test_vit")
    assert outcome.code == 1 and "No usable temporary directory" in outcome.err


def test_fp32_has_no_rounding_and_an_unknown_arithmetic_is_refused(run_eupe: Run) -> None:
    assert verified(run_eupe, "timm:test_vit")[1]["teachers"][0]["rounding"] == {}
    words = run_eupe("teachers", "verify", "timm:test_vit", "--dtype", "bf16").out.split()
    assert words.count("bf16") > 2
    outcome = run_eupe("teachers", "verify", "timm:test_vit", "--dtype", "int8")
    assert outcome.code == 2 and "--dtype int8 is unknown" in outcome.err


def test_a_model_of_open_clip_is_made_without_its_warnings(caplog: pytest.LogCaptureFixture) -> None:
    random_pair(REGISTRY["clip-b32"], is_narrow=True, sizes=(224,))
    assert not caplog.records
