"""`timm:hf-hub:OWNER/NAME`: repositories of other authors in timm's layout, from a hub's cache that is made here."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants
from making import hub_snapshot
from safetensors.torch import save_file
from teacher_checks import CPU, assert_same_tokens, views
from timm.layers import SwiGLUPacked
from torch import nn

from eupe.errors import TeacherError
from eupe.teachers.own_forward import built_narrow, fill_at_random, narrow
from eupe.teachers.registry import REGISTRY
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.teacher import load_teacher

ON_THE_CARD = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
PIXELS = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
H_OPTIMUS = {"mean": [0.707223, 0.578729, 0.703617], "std": [0.211883, 0.230117, 0.177517]}
CONFIGS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "virchow2": (
        "vit_huge_patch14_224",
        {"img_size": 224, "init_values": 1e-5, "num_classes": 0, "reg_tokens": 4, "mlp_ratio": 5.3375,
         "global_pool": "", "dynamic_img_size": True},
        PIXELS,
        ON_THE_CARD,
    ),
    "uni2-h": (
        "vit_giant_patch14_224",
        {"img_size": 224, "patch_size": 14, "depth": 24, "num_heads": 24, "init_values": 1e-5, "embed_dim": 1536,
         "mlp_ratio": 5.33334, "num_classes": 0, "no_embed_class": True, "reg_tokens": 8, "dynamic_img_size": True},
        PIXELS,
        ON_THE_CARD,
    ),
    "h-optimus-0": ("vit_giant_patch14_reg4_dinov2", {"img_size": 224, "init_values": 1e-5}, H_OPTIMUS, {}),
}  # fmt: skip
"""Architecture, model_args and pixels of a repository's config.json, and what its model card adds in Python."""


def publish(folder: Path, model: nn.Module, arch: str, options: dict[str, Any], **config: Any) -> None:
    plain = {"architecture": arch, "num_classes": 0, "model_args": options}
    pretrained = {"input_size": [3, 224, 224], "fixed_input_size": False, "num_classes": 0, "classifier": "head"}
    (folder / "config.json").write_text(json.dumps({**plain, "pretrained_cfg": {**pretrained, **config}}))
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def narrow_giants() -> Iterator[None]:
    with built_narrow(REGISTRY["virchow2"]):
        yield


def published_row(hub: Path, name: str) -> Any:
    """Put a row's repository into the hub, with random weights, and return the model as its card builds it."""
    arch, options, pixels, card = CONFIGS[name]
    model = timm.create_model(arch, **{**options, **card}).eval()
    fill_at_random(model)
    publish(hub_snapshot(hub, REGISTRY[name].hub_repository or ""), model, arch, options, **pixels)
    return model


@pytest.mark.usefixtures("narrow_giants")
@pytest.mark.parametrize("name", CONFIGS)
def test_pathology_s_models_from_the_hub(name: str, hub: Path) -> None:
    model = published_row(hub, name)
    spec = narrow(REGISTRY[name])
    pictures = views(224)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(CONFIGS[name][2], model=model))
    to_pixels = transform.transforms[-1]
    with torch.no_grad():
        tokens = model.forward_features(to_pixels(pictures.permute(0, 3, 1, 2) / 255))
    assert tokens.shape[1] == spec.prefix_tokens + 256
    dense, summary = tokens[:, spec.prefix_tokens :], tokens[:, 0]
    if name == "virchow2":
        summary = torch.cat([summary, dense.mean(1)], dim=-1)
    for weights in (None, hub):
        if weights is not None:  # as downloaded to a folder
            (weights,) = hub.glob("models--*/snapshots/*")
        teacher = load_teacher(spec, weights=weights, device=CPU, dtype=torch.float32, sizes=(224, 112))
        assert_same_tokens(teacher(pictures), dense, summary)


def test_another_name_of_a_row_is_the_row(run_eupe: Callable[..., Any]) -> None:
    spec = resolve_teacher("timm:hf-hub:paige-ai/Virchow2@abc")
    assert (spec.summary, spec.summary_dim, spec.hub_repository) == ("cls_mean", 2560, "paige-ai/Virchow2@abc")
    outcome = run_eupe("teachers", "timm:hf-hub:paige-ai/Virchow2")
    assert json.loads(outcome.out)["normalised_by"] == "paige-ai/Virchow2/config.json"


@pytest.mark.usefixtures("narrow_giants")
def test_a_config_that_contradicts_the_card_is_refused(hub: Path) -> None:
    published_row(hub, "virchow2")
    (file,) = hub.glob("models--*/snapshots/*/config.json")
    plain = json.loads(file.read_text())
    for place, key, value, said in (
        ("model_args", "reg_tokens", 0, "reg_tokens 0 instead of 4"),
        ("pretrained_cfg", "mean", [0.5, 0.5, 0.5], r"mean .*0\.5, 0\.5, 0\.5"),
    ):
        file.write_text(json.dumps({**plain, place: {**plain[place], key: value}}))
        with pytest.raises(TeacherError, match=f"another model than virchow2: {said}"):
            load_teacher(narrow(REGISTRY["virchow2"]), weights=None, device=CPU, dtype=torch.float32, sizes=(224,))


def test_any_repository_in_timm_s_layout(hub: Path, run_eupe: Callable[..., Any]) -> None:
    model = timm.create_model("test_vit", reg_tokens=3, num_classes=0)
    fill_at_random(model)
    folder = hub_snapshot(hub, "somebody/vit")
    pixels = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "input_size": [3, 160, 160]}
    publish(folder, model, "test_vit", {"reg_tokens": 3, "img_size": 160}, **pixels)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    spec = resolve_teacher("timm:hf-hub:somebody/vit")
    assert (spec.prefix_tokens, spec.mean, spec.licence) == (4, (0.1, 0.2, 0.3), "mit")
    outcome = run_eupe("teachers", "verify", "timm:hf-hub:somebody/vit", "--json")
    assert outcome.code == 0, outcome.err
    (row,) = json.loads(outcome.out)["teachers"]
    assert row["agrees"] and row["weights"] == "hf-hub:somebody/vit"


def test_arguments_that_do_not_fit_the_weights_are_said(hub: Path) -> None:
    """As of a repository whose packed SwiGLU stands on a model card that eupe does not know."""
    model = timm.create_model("test_vit", mlp_ratio=4, **ON_THE_CARD)
    publish(
        hub_snapshot(hub, "somebody/swiglu"),
        model,
        "test_vit",
        {"mlp_ratio": 4, "img_size": 160},
        input_size=[3, 160, 160],
    )
    spec = resolve_teacher("timm:hf-hub:somebody/swiglu")
    with pytest.raises(TeacherError, match=r"wrong shape .*mlp\.fc2\.weight"):
        load_teacher(spec, weights=None, device=CPU, dtype=torch.float32, sizes=(spec.native_size,))


def test_mistakes_with_repositories(hub: Path, run_eupe: Callable[..., Any]) -> None:
    (hub_snapshot(hub, "somebody/bert") / "config.json").write_text('{"model_type": "bert"}')
    (hub_snapshot(hub, "somebody/empty") / "config.json").write_text('{"architecture": "test_vit"}')
    for words, said in (
        (["timm:hf-hub:nobody/nothing"], "config.json of nobody/nothing cannot be fetched from the hub"),
        (["timm:hf-hub:somebody/bert"], "give hf:somebody/bert"),
        (["verify", "timm:hf-hub:somebody/empty"], "has neither model.safetensors nor pytorch_model.bin"),
    ):
        outcome = run_eupe("teachers", *words)
        assert outcome.code == 2 and "Traceback" not in outcome.err
        assert said in " ".join(outcome.err.split())
