"""The paper's proxy and its smaller kin: what timm builds from their names."""

import resource
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from eupe.common.compute import normalise
from eupe.models.encoder import Encoder, build_encoder, load_encoder, save_encoder
from eupe.models.meta import built_on_meta
from eupe.models.timm_models import timm_spec, timm_tokens
from eupe.store import Store
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.teacher import load_teacher

PE_CORE = {
    "vit_giant_patch16_eupe": ("vit_pe_core_gigantic_patch14_448", 1536, 1.9e9),
    "vit_large_patch16_eupe": ("vit_pe_core_large_patch14_336", 1024, 304e6),
    "vit_base_patch16_eupe": ("vit_pe_core_base_patch16_224", 768, 86e6),
    "vit_small_patch16_eupe": ("vit_pe_core_small_patch16_384", 384, 21.6e6),
}
SMALL = "vit_small_patch16_eupe"
CPU = torch.device("cpu")


def views(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("arch", PE_CORE)
def test_each_has_its_size_and_the_blocks_of_a_perception_encoder(arch: str) -> None:
    pe_core, width, parameters = PE_CORE[arch]
    with built_on_meta():
        model, trunk = timm.create_model(arch, num_classes=0), timm.create_model(pe_core)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.03)
    ours, theirs = ({k: v.shape for k, v in m.state_dict().items()} for m in (model, trunk))
    assert ours.keys() - theirs.keys() <= {"reg_token", "cls_token"}
    assert {k: v for k, v in ours.items() if "block" in k} == {k: v for k, v in theirs.items() if "block" in k}
    assert ours["cls_token"] == (1, 1, width) and ours["reg_token"] == (1, 4, width)
    assert ours["patch_embed.proj.weight"] == (width, 3, 16, 16)
    assert not any("gamma" in name or "pos_embed" in name or "attn_pool" in name for name in ours)


@pytest.mark.parametrize(("arch", "size"), [*((arch, 512) for arch in PE_CORE), (SMALL, 256), (SMALL, 384)])
def test_the_spec_is_known_without_memory(arch: str, size: int) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    spec = timm_spec(arch, size)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000, "kilobytes; the giant has 7.4 GB"
    width = PE_CORE[arch][1]
    assert (spec.size, spec.patch, spec.dense_dim, spec.summary_dim, spec.prefix_tokens) == (size, 16, width, width, 5)
    assert (spec.summary, spec.dense) == ("cls", "normed")
    assert (spec.mean, spec.std) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    assert timm_spec(SMALL, None).size == 256


@pytest.mark.parametrize(("height", "width"), [(256, 256), (384, 384), (256, 384)])
def test_the_giant_s_blocks_take_any_size_with_the_right_grid(height: int, width: int) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_giant_patch16_eupe", num_classes=0, depth=1).eval()
    pixels = torch.randn(1, 3, height, width)
    with torch.no_grad():
        tokens = timm_tokens(model, pixels, summary="cls", dense="normed")
        summary = model(pixels)
        dense = model.forward_intermediates(pixels, indices=1, norm=True, intermediates_only=True)[0]
    assert tokens.dense.shape == (1, height // 16, width // 16, 1536)
    torch.testing.assert_close(tokens.dense, dense.permute(0, 2, 3, 1))
    torch.testing.assert_close(tokens.summary, summary)


def sines(arch: str, **options: Any) -> torch.Tensor:
    """[5, 3, 64] of a model with heads of 64 channels, on a grid of 5 rows and 3 columns."""
    rope = timm.create_model(arch, depth=1, dynamic_img_size=True, **options).rope
    return rope.get_embed([5, 3])[:, :64].reshape(5, 3, 64)


def test_rotary_angles_are_dinov3_s_on_the_perception_encoder_s_channels() -> None:
    ours, dinov3 = sines(SMALL), sines("vit_small_patch16_dinov3")
    by_row, by_column = dinov3[..., :16], dinov3[..., 16:32]
    torch.testing.assert_close(ours, torch.cat([by_column, by_row], dim=-1).repeat_interleave(2, dim=-1))
    pe_core = sines("vit_pe_core_small_patch16_384")
    for embed in (ours, pe_core):
        assert torch.equal(embed[..., ::2], embed[..., 1::2]), "channels 2i and 2i + 1 turn together"
        assert (embed[:, :, :32] == embed[:1, :, :32]).all(), "the first half follows the column"
        assert (embed[:, :, 32:] == embed[:, :1, 32:]).all(), "the second half follows the row"


def test_every_parameter_learns() -> None:
    encoder = Encoder(timm_spec(SMALL, 64), timm.create_model(SMALL, num_classes=0, depth=2))
    tokens = encoder(torch.randn(2, 3, 64, 64))
    assert tokens.summary is not None
    (tokens.dense.square().sum() + tokens.summary.square().sum()).backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_saved_and_loaded_it_gives_the_same_tokens_at_any_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(SMALL, size=64).eval()
    save_encoder(encoder, tmp_path)
    again = load_encoder(tmp_path).eval()
    pixels = normalise(views(96), again.spec.mean, again.spec.std)
    with torch.no_grad():
        want, got = encoder(pixels), again(pixels)
    assert again.spec == encoder.spec
    assert torch.equal(want.dense, got.dense) and torch.equal(want.summary, got.summary)


def test_it_is_trained_by_its_name_and_then_teaches(run_eupe: Any, tiny_store: Store, tmp_path: Path) -> None:
    words = ["--student", SMALL, "--targets", tiny_store.path, "--out", tmp_path / "run", "--size", 64]
    ended = run_eupe("train", *words, "--steps", 2, "--batch-size", 4, "--head-width", 16, "--holdout", 0.3)
    assert ended.code == 0, ended.err
    spec = resolve_teacher(str(tmp_path / "run"))
    assert (spec.native_size, spec.patch, spec.prefix_tokens, spec.dense_dim) == (64, 16, 5, 384)
    teacher = load_teacher(spec, weights=None, device=CPU, dtype=torch.float32, sizes=(64, 96))
    student = load_encoder(tmp_path / "run").eval()
    for size in (64, 96):
        got = teacher(views(size))
        with torch.no_grad():
            want = student(normalise(views(size), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        torch.testing.assert_close(got.dense, want.dense)
        torch.testing.assert_close(got.summary, want.summary)
