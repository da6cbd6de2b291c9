"""A model's own files decide its normalisation, as its library reads them, and `verify` finds out who ignores them."""

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from huggingface_hub import constants
from teacher_checks import CPU, views
from timm.models import save_for_hf
from transformers import (
    AutoImageProcessor,
    CLIPImageProcessor,
    Dinov2Config,
    Dinov2Model,
    VJEPA2Config,
    VJEPA2Model,
    VJEPA2VideoProcessor,
)

from eupe.errors import TeacherError
from eupe.models.checkpoints import weights_digest
from eupe.models.encoder import build_encoder, save_encoder
from eupe.teachers import hf_adapter, preprocess
from eupe.teachers.library_check import compare
from eupe.teachers.own_forward import built_narrow, fill_at_random, narrow, save_own
from eupe.teachers.registry import REGISTRY
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.teacher import load_teacher, require_weights

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
SIZE = 56
PLAIN: dict[str, Any] = {
    "image_processor_type": "BitImageProcessor",
    "image_mean": list(MEAN),
    "image_std": list(STD),
    "size": {"shortest_edge": SIZE},
    "crop_size": {"height": SIZE, "width": SIZE},
}


def dinov2(folder: Path, **settings: Any) -> Path:
    """A tiny model of transformers, with a processor file where there are settings."""
    config = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=SIZE, patch_size=14)
    torch.manual_seed(0)
    Dinov2Model(config).save_pretrained(folder)
    if settings:
        (folder / "preprocessor_config.json").write_text(json.dumps({**PLAIN, **settings}))
    return folder


def nested(folder: Path) -> Path:
    """The same, whose processor is saved as transformers 5 saves that of a model of two towers."""
    dinov2(folder)
    whole = {"processor_class": "CLIPProcessor", "image_processor": PLAIN}
    (folder / "processor_config.json").write_text(json.dumps(whole))
    return folder


def timm_folder(folder: Path, **changes: Any) -> Path:
    """A tiny model as timm saves one for the hub."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=5)
    fill_at_random(model)
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": MEAN, "std": STD, **changes}
    save_for_hf(model, folder, safe_serialization=True)
    return folder


def open_clip_folder(folder: Path, **changes: Any) -> Path:
    """Narrow weights of ViT-B-16-quickgelu as open_clip lays out a repository."""
    folder.mkdir(exist_ok=True)
    whole = open_clip.create_model("ViT-B-16-quickgelu", load_weights=False)
    fill_at_random(whole)
    save_own(whole, folder).rename(folder / "open_clip_model.safetensors")
    plain = {
        "model_cfg": open_clip.get_model_config("ViT-B-16-quickgelu"),
        "preprocess_cfg": {"mean": MEAN, "std": STD},
    }
    (folder / "open_clip_config.json").write_text(json.dumps({**plain, **changes}))
    return folder


@pytest.fixture
def clip_folder(tmp_path: Path) -> Iterator[Path]:
    with built_narrow(REGISTRY["clip-b16"]):
        yield open_clip_folder(tmp_path / "clip")


LIBRARIES: dict[str, Callable[[Path], tuple[str, Path | None]]] = {
    "timm": lambda folder: ("timm:test_vit", timm_folder(folder)),
    "transformers": lambda folder: (f"hf:{dinov2(folder, do_normalize=True)}", None),
    "transformers 5": lambda folder: (f"hf:{nested(folder)}", None),
    "beside --weights": lambda folder: (f"hf:{dinov2(folder / 'base')}", dinov2(folder / "tuned", do_normalize=True)),
}


def test_a_model_of_videos_has_a_processor_of_videos(tmp_path: Path, run_eupe: Callable[..., Any]) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "crop_size": 64}
    predictor = {"pred_hidden_size": 24, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
    VJEPA2Model(VJEPA2Config(**sizes, **predictor)).save_pretrained(tmp_path)
    VJEPA2VideoProcessor(crop_size=64, image_mean=list(MEAN), image_std=list(STD)).save_pretrained(tmp_path)
    (tmp_path / "video_preprocessor_config.json").stat()
    spec = resolve_teacher(f"hf:{tmp_path}")
    assert (spec.mean, spec.std, spec.native_size) == (MEAN, STD, 64)
    assert run_eupe("teachers", "verify", f"hf:{tmp_path}").code == 0
    with pytest.raises(TeacherError, match=r"cannot take inputs of 64, 96 px, .* use --size 64"):
        load_teacher(spec, weights=None, device=CPU, dtype=torch.float32, sizes=(64, 96))


def ignore_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapters take the tables' word, as if there were no files."""
    monkeypatch.setattr(preprocess, "normalisation_beside", lambda spec, weights: None)
    monkeypatch.setattr(hf_adapter, "of_processor", lambda source: None)


@pytest.mark.parametrize("library", LIBRARIES)
def test_verify_fails_where_the_own_files_are_ignored(
    library: str, tmp_path: Path, run_eupe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, weights = LIBRARIES[library](tmp_path)
    words = [name] if weights is None else [name, "--weights", weights]
    spec = resolve_teacher(name, weights)
    assert (spec.mean, spec.std) == (MEAN, STD)
    assert run_eupe("teachers", "verify", *words).code == 0
    ignore_files(monkeypatch)
    assert run_eupe("teachers", "verify", *words).code == 1


def test_verify_fails_where_open_clips_file_is_ignored(clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = narrow(REGISTRY["clip-b16"])
    spec = preprocess.as_given(row, clip_folder)
    assert (spec.mean, spec.std) == (MEAN, STD) and "open_clip_config.json beside the weights" in spec.note
    assert compare(spec, clip_folder).agrees
    assert not compare(row, clip_folder).agrees
    (file,) = clip_folder.glob("*.safetensors")
    assert preprocess.as_given(row, file) == spec, "a file's neighbours count as a directory's"


def by_the_library(source: Path, pixels: Any) -> Any:
    processor = AutoImageProcessor.from_pretrained(source)
    prepared = processor(list(pixels), do_resize=False, do_center_crop=False, return_tensors="np")
    return torch.from_numpy(np.array(prepared["pixel_values"]))


READ = {
    "scalar": {"image_mean": 0.5, "image_std": 0.25},
    "of one": {"image_mean": [0.5], "image_std": [0.25]},
    "no std": {"image_std": None},
    "rescaled to [-1, 1]": {"rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1], "image_std": [1, 1, 1]},
    "not rescaled": {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [64.0] * 3},
    "not normalised": {"do_normalize": False},
    "neither": {"do_normalize": False, "do_rescale": False},
    "size as a list": {"crop_size": None, "size": [SIZE, SIZE]},
    "crop as a number": {"crop_size": SIZE},
    "longest edge": {"crop_size": None, "size": {"longest_edge": SIZE}},
    "old name": {"image_processor_type": None, "feature_extractor_type": "CLIPFeatureExtractor"},
}


@pytest.mark.parametrize("settings", READ.values(), ids=READ)
def test_odd_processor_files_are_read_as_the_library_reads_them(settings: dict[str, Any], tmp_path: Path) -> None:
    plain = {name: value for name, value in {**PLAIN, **settings}.items() if value is not None}
    dinov2(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(plain))
    spec = resolve_teacher(f"hf:{tmp_path}")
    teacher = load_teacher(spec, weights=None, device=CPU, dtype=torch.float32, sizes=(SIZE,))
    with torch.no_grad():
        want = teacher.module(by_the_library(tmp_path, views(SIZE).numpy())).last_hidden_state
    torch.testing.assert_close(teacher(views(SIZE)).summary, want[:, 0], rtol=1e-3, atol=1e-4)
    assert spec.native_size == SIZE


REFUSED = {
    "null": ({"image_mean": None, "image_std": None}, "mean None"),
    "two": ({"image_mean": [0.5, 0.5]}, r"mean \(0.5, 0.5\)"),
    "a word": ({"image_mean": "0.5"}, "mean '0.5'"),
    "no spread": ({"image_std": [0, 0, 0]}, r"std \(0, 0, 0\)"),
    "blue first": ({"image_processor_type": "MobileViTImageProcessor", "do_normalize": None}, "than subtract a mean"),
    "offset": ({"image_processor_type": "EfficientNetImageProcessor", "rescale_offset": True}, "than subtract a mean"),
    "unknown": ({"image_processor_type": "FooProcessor", "do_rescale": False}, "AutoImageProcessor"),
}


@pytest.mark.parametrize(("settings", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_followed_is_refused(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    dinov2(tmp_path, **settings)
    with pytest.raises(TeacherError, match=said) as error:
        resolve_teacher(f"hf:{tmp_path}")
    assert "\n" not in str(error.value)


def test_a_class_that_the_library_does_not_know_is_read_where_it_says_all(tmp_path: Path) -> None:
    spec = resolve_teacher(f"hf:{dinov2(tmp_path, image_processor_type='FooProcessor')}")
    assert (spec.mean, spec.std) == (MEAN, STD)


def test_settings_where_the_library_does_not_look(tmp_path: Path) -> None:
    dinov2(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"video_processor": PLAIN}))
    with pytest.raises(TeacherError, match="image_mean under 'video_processor'"):
        resolve_teacher(f"hf:{tmp_path}")
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    assert resolve_teacher(f"hf:{tmp_path}").mean == hf_adapter.IMAGENET[0]


def test_the_nested_processor_goes_first_and_is_noted(tmp_path: Path) -> None:
    nested(tmp_path)
    CLIPImageProcessor(image_mean=[0.9] * 3).save_pretrained(tmp_path)
    spec = resolve_teacher(f"hf:{tmp_path}")
    assert spec.mean == tuple(AutoImageProcessor.from_pretrained(tmp_path).image_mean) == MEAN
    assert "mean and std are those of processor_config.json" in spec.note


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("patch_size", [14, 14], ""),
        ("image_size", [SIZE, SIZE], ""),
        ("patch_size", [14, 7], r"patch_size \[14, 7\]"),
        ("num_channels", 1, "1 channels"),
    ],
)
def test_odd_model_configurations(name: str, value: Any, said: str, tmp_path: Path) -> None:
    dinov2(tmp_path)
    plain = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**plain, name: value}))
    with pytest.raises(TeacherError, match=said) if said else nullcontext():
        spec = resolve_teacher(f"hf:{tmp_path}")
        assert (spec.patch, spec.native_size) == (14, SIZE)


SHAPES: dict[str, Any] = {
    "whole": lambda plain: plain,
    "old": lambda plain: {"architecture": plain["architecture"], **plain["pretrained_cfg"]},
    "of transformers": lambda plain: {"model_type": "timm_wrapper", **plain},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_timms_folder_in_all_its_forms(shape: Callable[[Any], Any], tmp_path: Path) -> None:
    file = timm_folder(tmp_path) / "config.json"
    file.write_text(json.dumps(shape(json.loads(file.read_text()))))
    want = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path}"))
    spec = resolve_teacher("timm:test_vit", tmp_path / "model.safetensors")
    assert (spec.mean, spec.std) == (tuple(want["mean"]), tuple(want["std"])) == (MEAN, STD)


def test_a_commit_of_a_repository_is_what_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, configuration and processor, where the hub's cache holds two commits."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--me--dinov2"
    for commit, mean in (("a" * 40, 0.1), ("b" * 40, 0.4)):
        folder = dinov2(repository / "snapshots" / commit, image_mean=[mean] * 3)
        if mean == 0.1:
            model = Dinov2Model.from_pretrained(folder)
            model.layernorm.weight.data.mul_(2)
            model.save_pretrained(folder)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("b" * 40)
    loaded = {}
    for name, mean in (("", 0.4), (f"@{'a' * 40}", 0.1), (f"@{'b' * 40}", 0.4)):
        spec = resolve_teacher(f"hf:me/dinov2{name}")
        assert spec.mean == (mean,) * 3
        teacher = load_teacher(spec, weights=None, device=CPU, dtype=torch.float32, sizes=(SIZE,))
        loaded[name] = weights_digest(teacher.module)
        assert compare(spec).agrees
    assert loaded[""] == loaded[f"@{'b' * 40}"] != loaded[f"@{'a' * 40}"]
    with pytest.raises(TeacherError, match=f"configuration of me/dinov2@{'c' * 40} cannot be fetched"):
        resolve_teacher(f"hf:me/dinov2@{'c' * 40}")
    odd = dinov2(tmp_path / "dir@x", image_mean=[0.2] * 3)
    assert resolve_teacher(f"hf:{odd}").mean == (0.2,) * 3


def test_timms_defaults_where_its_folder_is_silent(tmp_path: Path) -> None:
    file = timm_folder(tmp_path) / "config.json"
    plain = json.loads(file.read_text())
    del plain["pretrained_cfg"]["mean"], plain["pretrained_cfg"]["std"]
    file.write_text(json.dumps(plain))
    want = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path}"))
    spec = resolve_teacher("timm:test_vit", tmp_path)
    assert (spec.mean, spec.std) == (tuple(want["mean"]), tuple(want["std"]))


def test_files_of_another_model_are_refused(tmp_path: Path) -> None:
    folder = timm_folder(tmp_path / "timm")
    with pytest.raises(TeacherError, match="of test_vit, but the teacher timm:test_vit2 is test_vit2"):
        resolve_teacher("timm:test_vit2", folder)
    plain = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**plain, "model_args": {"act_layer": "quick_gelu"}}))
    with pytest.raises(TeacherError, match=r"act_layer=quick_gelu.*timm:local-dir:"):
        resolve_teacher("timm:test_vit", folder)
    (tmp_path / "oc").mkdir()
    other = {"model_cfg": {**(open_clip.get_model_config("ViT-B-16") or {})}, "preprocess_cfg": {}}
    (tmp_path / "oc" / "open_clip_config.json").write_text(json.dumps(other))
    with pytest.raises(TeacherError, match="quick_gelu False instead of True"):
        resolve_teacher("clip-b16", tmp_path / "oc")


def test_a_row_takes_the_word_of_any_librarys_file(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PLAIN))
    for name in ("dinov2-s", "clip-b16", "eupe-t"):
        spec = resolve_teacher(name, tmp_path)
        assert (spec.mean, spec.std) == (MEAN, STD) and "preprocessor_config.json beside the weights" in spec.note
    assert resolve_teacher("radio-v4-h", tmp_path) is REGISTRY["radio-v4-h"], "timm's RADIO is normalised outside"
    run = tmp_path / "run"
    save_encoder(build_encoder("test_vit", size=96), run)
    spec = json.loads((run / "student.json").read_text())
    (run / "student.json").write_text(json.dumps({**spec, "mean": MEAN, "std": STD}))
    assert resolve_teacher("timm:test_vit", run / "student.safetensors").mean == MEAN


def test_what_agrees_leaves_the_spec_as_it_is(tmp_path: Path) -> None:
    """Settings that agree with the spec leave it unchanged, so that it still matches stores that were made before."""
    row = REGISTRY["dinov2-s"]
    settings = {**PLAIN, "image_mean": list(row.mean), "image_std": list(row.std)}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert resolve_teacher("dinov2-s", tmp_path) is row
    spec = resolve_teacher(f"hf:{dinov2(tmp_path / 'hf', do_resize=True)}")
    assert spec.note == f"{hf_adapter.FAMILIES['dinov2'].note}; licence: see the repository"


@pytest.mark.parametrize("has_peft", [False, True])
def test_an_adapter_is_refused_alone_and_beside_a_model(
    has_peft: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.utils.import_utils.is_peft_available", lambda: has_peft)
    whole = dinov2(tmp_path / "whole", do_resize=True)
    alone = tmp_path / "alone"
    alone.mkdir()
    for folder in (whole, alone):
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
        (folder / "adapter_model.safetensors").write_bytes(b"")
        with pytest.raises(TeacherError, match=r"holds an adapter.*merge it first"):
            resolve_teacher(f"hf:{folder}")
    with pytest.raises(TeacherError, match=r"holds an adapter.*merge it first"):
        require_weights(REGISTRY["dinov2-s"], whole)
