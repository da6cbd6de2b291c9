"""eupe/models/encoder.py against timm's own forward passes."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from eupe.common.compute import normalise
from eupe.common.kinds import STUDENT_FILE, WEIGHTS_FILE
from eupe.errors import ConfigError, RunError, StorageError, TeacherError
from eupe.models import encoder as encoder_module
from eupe.models.checkpoints import load_state_dict_strictly
from eupe.models.encoder import Encoder, build_encoder, check_student, load_encoder, save_encoder
from eupe.models.encoder_spec import EncoderSpec
from eupe.models.meta import built_on_meta
from eupe.models.timm_models import remembered, timm_spec, timm_tokens

STUDENTS = {
    # arch: (size, patch, dense width, summary width, prefix, summary kind, dense kind)
    "vit_tiny_patch16_dinov3_qkvb": (64, 16, 192, 192, 5, "cls", "normed"),
    "vit_small_patch16_224": (64, 16, 384, 384, 1, "cls", "normed"),
    "vit_base_patch16_siglip_224": (64, 16, 768, 768, 0, "attention_pool", "normed"),
    "deit_tiny_patch16_224": (64, 16, 192, 192, 1, "cls", "normed"),
    "eva02_tiny_patch14_224": (56, 14, 192, 192, 1, "pooled", "raw"),
    "convnext_atto": (64, 32, 320, 320, 0, "pooled", "normed"),
    "resnet18": (64, 32, 512, 512, 0, "pooled", "raw"),
    "tf_efficientnet_lite0": (64, 32, 320, 1280, 0, "pooled", "last_stage"),
    "swin_tiny_patch4_window7_224": (224, 32, 768, 768, 0, "pooled", "normed"),
    "mobilenetv3_small_100": (64, 32, 576, 1024, 0, "pooled", "raw"),
    "regnety_002": (64, 32, 368, 368, 0, "pooled", "raw"),
}


def pixels(size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def built(arch: str) -> Encoder:
    torch.manual_seed(0)
    return build_encoder(arch, size=STUDENTS[arch][0]).eval()


def library_tokens(model: nn.Module, x: Tensor, arch: str) -> tuple[Tensor, Tensor]:
    """Dense [B, N, D] and summary, by other paths through timm than the code under test takes."""
    with torch.no_grad():
        dense = STUDENTS[arch][6]
        if arch.startswith("convnext"):
            norm = model.head.norm
            dense_map = model.forward_features(x).permute(0, 2, 3, 1)
            tokens = nn.functional.layer_norm(dense_map, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        elif arch.startswith("swin"):
            tokens = model.norm(model.layers(model.patch_embed(x)))
        else:
            norm_last = {"norm": True} if dense == "normed" else {}
            tokens = model.forward_intermediates(x, indices=1, intermediates_only=True, **norm_last)[0].permute(
                0, 2, 3, 1
            )
        if STUDENTS[arch][5] == "cls":
            return tokens.flatten(1, 2), model.forward_features(x)[:, 0]
        return tokens.flatten(1, 2), model(x)


@pytest.mark.parametrize("arch", STUDENTS)
def test_tokens_are_the_library_s_own(arch: str) -> None:
    size, patch, dense_dim, summary_dim, *_ = STUDENTS[arch]
    encoder, x = built(arch), pixels(size)
    with torch.no_grad():
        tokens = encoder(x)
    dense, summary = library_tokens(encoder.model, x, arch)
    assert tokens.dense.shape == (2, size // patch, size // patch, dense_dim)
    assert tokens.summary is not None and tokens.summary.shape == (2, summary_dim)
    torch.testing.assert_close(tokens.dense.flatten(1, 2), dense)
    torch.testing.assert_close(tokens.summary, summary)


@pytest.mark.parametrize("arch", STUDENTS)
def test_spec_is_known_without_building(arch: str) -> None:
    size, patch, dense_dim, summary_dim, prefix, summary, dense = STUDENTS[arch]
    spec = timm_spec(arch, size)
    config = timm.get_pretrained_cfg(arch)
    assert (spec.arch, spec.size, spec.patch, spec.prefix_tokens) == (arch, size, patch, prefix)
    assert (spec.dense_dim, spec.summary_dim, spec.summary, spec.dense) == (dense_dim, summary_dim, summary, dense)
    assert (spec.mean, spec.std) == (config.mean, config.std)
    assert EncoderSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize("arch", STUDENTS)
def test_other_sizes_that_the_patch_divides_work(arch: str) -> None:
    size, patch, *_ = STUDENTS[arch]
    with torch.no_grad():
        tokens = built(arch)(pixels(size + 2 * patch, batch=1))
    assert tokens.dense.shape[1:3] == (size // patch + 2, size // patch + 2)


@pytest.mark.parametrize("arch", ["vit_small_patch16_224", "vit_tiny_patch16_dinov3_qkvb", "convnext_atto"])
def test_every_parameter_learns(arch: str) -> None:
    """A parameter that no output depends on would be decayed for nothing and stall distributed training."""
    encoder = built(arch)
    tokens = encoder(pixels(STUDENTS[arch][0]))
    (tokens.dense.square().sum() + tokens.summary.square().sum()).backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


def test_dense_grid_reads_row_by_row() -> None:
    """A bright patch in row 1, column 3 must change cell [1, 3] of a patch-local model most."""
    encoder = built("resnet18")
    dark = torch.zeros(1, 3, 256, 256)
    bright = dark.clone()
    bright[:, :, 32:64, 96:128] = 5.0
    with torch.no_grad():
        change = (encoder(bright).dense - encoder(dark).dense).abs().sum(-1)[0]
    assert divmod(int(change.argmax()), 8) == (1, 3)


@pytest.mark.parametrize(
    ("arch", "summary", "dense"),
    [
        ("resnet18", "cls", "raw"),
        ("resnet18", "attention_pool", "raw"),
        ("resnet18", "pooled", "normed"),
        ("vit_small_patch16_224", "cls", "raw"),
        ("vit_small_patch16_224", "cls", "last_stage"),
        ("vit_small_patch16_224", "attention_pool", "normed"),
        ("vit_base_patch16_siglip_224", "cls", "normed"),
        ("mixer_s32_224", "mean", "raw"),
    ],
)
def test_what_a_model_lacks_is_refused(arch: str, summary: str, dense: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(arch, num_classes=0)
        with pytest.raises(ConfigError):
            timm_tokens(model, torch.zeros(1, 3, 224, 224), summary=summary, dense=dense)


@pytest.mark.parametrize("arch", ["vit_small_patch16_224", "convnext_atto", "vit_tiny_patch16_dinov3_qkvb", "resnet18"])
def test_what_is_built_on_meta_is_what_is_built_with_draws_and_memory(arch: str) -> None:
    with built_on_meta():
        ours = timm.create_model(arch)
        assert torch.ones(2, device="cpu").add_(1).tolist() == [2, 2], "values that are there are worked on"
    theirs = timm.create_model(arch)
    ours, theirs = ({n: (v.shape, v.dtype) for n, v in m.state_dict(keep_vars=True).items()} for m in (ours, theirs))
    assert ours == theirs


def test_an_architecture_is_asked_about_once_and_a_directory_each_time() -> None:
    asked = []

    @remembered
    def ask(arch: str, size: int) -> int:
        asked.append((arch, size))
        return size

    questions = [("test_vit", 64), ("test_vit", 96), ("local-dir:x", 64)]
    assert [ask(*question) for question in 2 * questions] == [64, 96, 64, 64, 96, 64]
    assert asked == [*questions, questions[-1]]


def test_unknown_architecture_names_near_ones() -> None:
    with pytest.raises(ConfigError, match=r"did you mean .*vit_small_patch16_224"):
        timm_spec("vit_smal_patch16_224", 224)
    with pytest.raises(ConfigError, match="no weights"):
        timm_spec("resnet18.nonsense", 224)


@pytest.mark.parametrize("size", [250, 8])
def test_size_that_the_patch_does_not_divide_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match="must divide"):
        build_encoder("vit_small_patch16_224", size=size)


@pytest.mark.parametrize(("arch", "size"), [("levit_128s", 256), ("mixer_s32_224", 224), ("hiera_tiny_224", 224)])
def test_tokens_without_a_known_prefix_are_laid_out_as_the_last_stage_has_them(arch: str, size: int) -> None:
    """The map of the last stage, row by row and after the final norm if there is one, is what timm's features are."""
    torch.manual_seed(0)
    encoder = build_encoder(arch, size=size).eval()
    with torch.no_grad():
        tokens, features = encoder(pixels(size)), encoder.model.forward_features(pixels(size))
        norm = encoder.model.norm if arch.startswith("mixer") else nn.Identity()
        torch.testing.assert_close(norm(tokens.dense.flatten(1, 2)), features)
        torch.testing.assert_close(tokens.summary, encoder.model.forward_head(features, pre_logits=True))
    assert encoder.spec.dense == "last_stage"
    check_student(arch, [size], views=2)
    with pytest.raises(ConfigError, match="neither patch tokens with a known prefix nor a feature map"):
        timm_tokens(encoder.model, pixels(size), summary="pooled", dense="raw")


@pytest.mark.parametrize(
    ("arch", "size", "words"),
    [
        pytest.param(
            "jx_nest_tiny",
            64,
            r"timm's model does not take it \(AssertionError: .*\); use its own size, 224",
            marks=pytest.mark.filterwarnings("ignore:Mapping deprecated"),
        ),
        ("deit_tiny_patch16_224", 250, "its patch is 16 pixels and must divide the size; use 240 or 256"),
        (
            "crossvit_tiny_240",
            64,
            ".* must divide the size; the nearest sizes and its own do not work either; use another",
        ),
        ("inception_v3", 96, "it gives a 1x1 map, not the 3x3 .*; the nearest sizes and its own do not work"),
    ],
)
def test_sizes_that_are_advised_work(arch: str, size: int, words: str) -> None:
    with pytest.raises(ConfigError, match=f"size {size} does not work for {arch}: {words}") as refused:
        timm_spec(arch, size)
    for advised in re.findall(r"(\d+)(?= or \d+$|$)", str(refused.value)):
        assert timm_spec(arch, int(advised)).size == int(advised)
        check_student(arch, [int(advised)], views=2)


@pytest.mark.parametrize(
    ("arch", "sizes", "views", "words"),
    [
        (
            "test_efficientnet",
            [32],
            1,
            "test_efficientnet cannot be trained on one view of 32 px at a time, .* two views",
        ),
        ("efficientvit_m0", [64], 1, "cannot be trained on one view of 64 px at a time"),
        ("test_vit_relpos", [64, 80], 8, "built for 64 px does not also take 80 px .*; give one --size"),
    ],
)
def test_what_cannot_be_trained_is_told_before_it_is_built(arch: str, sizes: list[int], views: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_student(arch, sizes, views=views)
    check_student(arch, sizes[:1], views=max(2, views))


@pytest.mark.parametrize("arch", ["inception_next_atto", "test_byobnet"])
def test_odd_families_train_as_the_trial_promises(arch: str) -> None:
    """InceptionNeXt's head has a norm deeper in it, of another width than the map."""
    check_student(arch, [64], views=2)
    encoder = build_encoder(arch, size=64).train()
    tokens = encoder(pixels(64))
    assert tokens.summary is not None
    torch.autograd.backward([tokens.summary.sum(), tokens.dense.sum()])
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(pixels(64)).summary, encoder.model(pixels(64)))


def test_same_seed_same_student() -> None:
    first, second = built("resnet18"), built("resnet18")
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_save_and_load_give_the_same_tokens(tmp_path: Path) -> None:
    encoder = built("vit_tiny_patch16_dinov3_qkvb")
    save_encoder(encoder, tmp_path)
    state = torch.get_rng_state()
    again = load_encoder(tmp_path).eval()
    assert torch.equal(torch.get_rng_state(), state), "loading must not disturb the generator"
    assert again.spec == encoder.spec
    with torch.no_grad():
        assert torch.equal(again(pixels(64)).dense, encoder(pixels(64)).dense)
    assert sorted(p.name for p in tmp_path.iterdir()) == [STUDENT_FILE, WEIGHTS_FILE]


def test_failed_save_leaves_the_old_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_encoder(built("resnet18"), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full_disk(tensors: dict[str, Tensor], path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(encoder_module.safetensors.torch, "save_file", full_disk)
    torch.manual_seed(9)
    with pytest.raises(StorageError, match="No space left"):
        save_encoder(build_encoder("resnet18", size=64), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_unusable_runs_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=tmp_path.name):
        load_encoder(tmp_path)
    save_encoder(built("resnet18"), tmp_path)
    weights = (tmp_path / WEIGHTS_FILE).read_bytes()
    (tmp_path / WEIGHTS_FILE).write_bytes(weights[:1000])
    with pytest.raises(RunError, match=tmp_path.name):
        load_encoder(tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes(weights)
    spec = json.loads((tmp_path / STUDENT_FILE).read_text())
    (tmp_path / STUDENT_FILE).write_text(json.dumps(spec | {"arch": "resnet34"}))
    with pytest.raises(RunError, match="cannot be rebuilt"):
        load_encoder(tmp_path)
    (tmp_path / STUDENT_FILE).write_text(json.dumps(spec | {"dense": "smooth"}))
    with pytest.raises(RunError, match="smooth"):
        load_encoder(tmp_path)


def test_weights_load_whole_or_not_at_all() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    other = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)).state_dict()
    bad = {
        "0.weight": other["0.weight"],
        "0.bias": other["0.bias"][:2],
        "1.weight": other["1.weight"],
        "x": torch.ones(1),
    }
    with pytest.raises(
        TeacherError, match=r"somewhere.*1 missing \(1.bias\), 1 unexpected \(x\), 1 wrong shape \(0.bias"
    ):
        load_state_dict_strictly(model, bad, source="somewhere")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    load_state_dict_strictly(model, other, source="somewhere")
    assert all(torch.equal(v, other[k]) for k, v in model.state_dict().items())


def test_normalise_is_the_textbook_formula() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    views = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    want = ((views.numpy().astype(np.float64) / 255 - mean) / std).transpose(0, 3, 1, 2)
    got = normalise(views, mean, std)
    assert got.dtype == torch.float32 and got.is_contiguous()
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-5, atol=1e-6)


def test_colleagues_can_read_a_student(tmp_path: Path) -> None:
    save_encoder(built("resnet18"), tmp_path)
    (tmp_path / "plain").touch()
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1


def test_saved_weights_are_plain_safetensors(tmp_path: Path) -> None:
    encoder = built("resnet18")
    save_encoder(encoder, tmp_path)
    plain = timm.create_model("resnet18", num_classes=0)
    plain.load_state_dict(safetensors.torch.load_file(tmp_path / WEIGHTS_FILE), strict=True)
