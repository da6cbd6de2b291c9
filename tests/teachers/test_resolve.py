"""From what a user types to a spec, and what they read when it is wrong."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    BertConfig,
    CLIPVisionConfig,
    Dinov2Config,
    PreTrainedConfig,
    Siglip2Config,
    SiglipConfig,
)

from eupe.errors import RunError, TeacherError
from eupe.models.encoder import build_encoder, save_encoder
from eupe.teachers.registry import ALIASES, REGISTRY, UNCARRIED
from eupe.teachers.resolve import resolve_teacher

IMAGENET_MEAN = (0.485, 0.456, 0.406)


def directory_of(config: PreTrainedConfig, path: Path, preprocessor: str | None = None) -> str:
    config.save_pretrained(path)
    if preprocessor is not None:
        (path / "preprocessor_config.json").write_text(preprocessor)
    return f"hf:{path}"


def test_names_and_aliases() -> None:
    assert resolve_teacher("dinov2") is REGISTRY["dinov2-s"]
    assert all(resolve_teacher(name) is row for name, row in REGISTRY.items())
    assert all(resolve_teacher(alias) is REGISTRY[name] for alias, name in ALIASES.items())


@pytest.mark.parametrize(
    ("typed", "hint"),
    [("dinov3-h", "dinov3-h+"), ("pe-core-gg", "pe-core-g"), ("siglp2-b-256", "siglip2-b-256")],
)
def test_unknown_names_list_near_ones(typed: str, hint: str) -> None:
    with pytest.raises(TeacherError) as error:
        resolve_teacher(typed)
    assert hint in str(error.value) and "`eupe teachers`" in str(error.value)


@pytest.mark.parametrize("name", UNCARRIED)
def test_what_no_library_carries_is_said_in_a_sentence(name: str) -> None:
    page = (Path(__file__).parents[2] / "docs/teachers.md").read_text()
    assert name not in {*REGISTRY, *ALIASES} and f"`{name}`" in page
    for typed in (name, name.upper().replace("-", "_")):
        with pytest.raises(TeacherError, match=r"there is no teacher .*: .* would make it possible") as error:
            resolve_teacher(typed)
        assert "\n" not in str(error.value)


def test_extract_says_it_before_any_work(tmp_path: Path, run_eupe: Callable[..., Any]) -> None:
    words = ["--teacher", "depth-anything-3", "--corpus", tmp_path, "--out", tmp_path / "store.zarr"]
    outcome = run_eupe("extract", *words)
    assert outcome.code == 2 and "in none of timm, transformers and open_clip" in " ".join(outcome.err.split())
    assert not (tmp_path / "store.zarr").exists()


def test_name_like_nothing_points_to_the_list() -> None:
    with pytest.raises(TeacherError, match="`eupe teachers` lists them all"):
        resolve_teacher("zzzzzz")


def test_timm() -> None:
    spec = resolve_teacher("timm:vit_tiny_patch16_224.augreg_in21k")
    assert (spec.backend, spec.model) == ("timm", "vit_tiny_patch16_224.augreg_in21k")
    assert (spec.patch, spec.dense_dim, spec.summary_dim, spec.prefix_tokens) == (16, 192, 192, 1)
    assert (spec.summary, spec.dense, spec.native_size, spec.mean) == ("cls", "normed", 224, (0.5, 0.5, 0.5))
    assert spec.licence == "apache-2.0"


def test_open_clip_native_and_trunk() -> None:
    native = resolve_teacher("open_clip:ViT-B-32@laion2b_s34b_b79k")
    assert (native.dense_dim, native.patch, native.summary, native.prefix_tokens) == (768, 32, "cls", 1)
    trunk = resolve_teacher("open_clip:ViT-B-16-SigLIP@webli")
    assert (trunk.dense_dim, trunk.summary, trunk.prefix_tokens, trunk.mean) == (768, "attention_pool", 0, (0.5,) * 3)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("timm:vit_tny_patch16_224", "did you mean vit_tiny_patch16_224"),
        ("timm:vit_tiny_patch16_224.nonsense", "vit_tiny_patch16_224.augreg_in21k"),
        ("timm:vit_large_patch14_clip_224.openai", "use timm:vit_large_patch14_clip_quickgelu_224.openai"),
        ("open_clip:ViT-L-14@openai", "use open_clip:ViT-L-14-quickgelu@openai"),
        ("open_clip:ViT-B-16@dfn2b", "use open_clip:ViT-B-16-quickgelu@dfn2b"),
        ("open_clip:ViT-L-15", "ViT-L-14"),
        ("open_clip:ViT-L-14@nonsense", "it has openai"),
        ("open_clip:RN50-quickgelu@openai", "class token"),
        ("open_clip:coca_ViT-B-32@laion2b_s13b_b90k", "class token"),
        ("hf:nobody/nothing", "--weights DIR"),
        ("timm:", "`eupe teachers`"),
    ],
)
def test_refusals_say_what_to_do(typed: str, said: str) -> None:
    with pytest.raises(TeacherError) as error:
        resolve_teacher(typed)
    assert said in str(error.value)


def test_hugging_face_directory(tmp_path: Path) -> None:
    spec = resolve_teacher(directory_of(Dinov2Config(hidden_size=48, image_size=518), tmp_path))
    assert (spec.backend, spec.model) == ("hf", str(tmp_path))
    assert (spec.patch, spec.dense_dim, spec.prefix_tokens, spec.native_size) == (14, 48, 1, 518)
    assert (spec.summary, spec.dense, spec.mean) == ("cls", "normed", IMAGENET_MEAN)


def test_preprocessor_decides_normalisation_and_size(tmp_path: Path) -> None:
    name = directory_of(
        Dinov2Config(image_size=518),
        tmp_path,
        '{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "crop_size": {"height": 224, "width": 224}}',
    )
    spec = resolve_teacher(name)
    assert (spec.mean, spec.std, spec.native_size) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 224)


def test_preprocessor_that_does_not_normalise(tmp_path: Path) -> None:
    spec = resolve_teacher(directory_of(Dinov2Config(), tmp_path, '{"do_normalize": false}'))
    assert (spec.mean, spec.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def test_unreadable_preprocessor(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"preprocessor_config.json cannot be read as JSON"):
        resolve_teacher(directory_of(Dinov2Config(), tmp_path, "{"))


def test_vision_tower_of_a_two_tower_model(tmp_path: Path) -> None:
    spec = resolve_teacher(directory_of(SiglipConfig(vision_config={"hidden_size": 96}), tmp_path / "siglip"))
    assert (spec.dense_dim, spec.prefix_tokens, spec.summary, spec.mean) == (96, 0, "attention_pool", (0.5,) * 3)
    spec = resolve_teacher(directory_of(CLIPVisionConfig(hidden_size=96), tmp_path / "clip"))
    assert (spec.dense_dim, spec.prefix_tokens, spec.summary) == (96, 1, "cls")


def test_naflex_and_other_types_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="NaFlex"):
        resolve_teacher(directory_of(Siglip2Config(), tmp_path / "naflex"))
    with pytest.raises(TeacherError, match=r"'bert'; supported are .*dinov2"):
        resolve_teacher(directory_of(BertConfig(), tmp_path / "bert"))


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_run_is_a_teacher(tmp_path: Path, slash: str) -> None:
    encoder = build_encoder("resnet18", size=96)
    save_encoder(encoder, tmp_path)
    spec = resolve_teacher(f"{tmp_path}{slash}")
    assert (spec.backend, spec.name, spec.native_size, spec.patch) == ("run", str(tmp_path), 96, 32)
    assert (spec.dense_dim, spec.summary_dim, spec.summary, spec.dense) == (512, 512, "pooled", "raw")


def test_directories_that_are_no_runs(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=f"hf:{tmp_path}"):
        resolve_teacher(str(tmp_path))
    (tmp_path / "student.json").write_text("{")
    with pytest.raises(RunError, match=tmp_path.name):
        resolve_teacher(str(tmp_path))


def test_registry_names_need_no_torch() -> None:
    code = (
        "import sys; from eupe.teachers.resolve import resolve_teacher; resolve_teacher('pe-core-g'); "
        "print([m for m in ('torch', 'timm', 'transformers', 'open_clip') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_adapters_import_their_libraries_late() -> None:
    code = (
        "import sys, eupe.teachers.teacher, eupe.teachers.hf_adapter, eupe.teachers.open_clip_adapter; "
        "print([m for m in ('transformers', 'open_clip') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_specs_are_plain_json() -> None:
    assert all(json.loads(json.dumps(row.to_json()))["name"] == row.name for row in REGISTRY.values())
