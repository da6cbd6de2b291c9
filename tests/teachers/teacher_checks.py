"""Shared by the teacher tests: libraries' models made small, with weights that leave no part of them idle."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from eupe.common.compute import Tokens
from eupe.teachers.spec import TeacherSpec
from eupe.teachers.teacher import Teacher, load_teacher

CPU = torch.device("cpu")


def views(size: int, batch: int = 2) -> Tensor:
    return torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def by_hand(views_BHWC: Tensor, spec: TeacherSpec) -> Tensor:
    """Normalised pixels, by the textbook."""
    pixels = views_BHWC.double() / 255
    return ((pixels - torch.tensor(spec.mean)) / torch.tensor(spec.std)).permute(0, 3, 1, 2).float()


def assert_same_tokens(got: Tokens, dense_BND: Tensor, summary_BD: Tensor | None) -> None:
    """Cosine within 1e-4 of 1 for every token, and equal magnitude: kernels differ in rounding only."""
    _assert_same(got.dense.flatten(1, 2), dense_BND)
    if summary_BD is None:
        assert got.summary is None
        return
    assert got.summary is not None
    _assert_same(got.summary, summary_BD)


def _assert_same(got: Tensor, want: Tensor) -> None:
    assert got.dtype == torch.float32 and got.shape == want.shape
    assert nn.functional.cosine_similarity(got, want, dim=-1).min() >= 0.9999
    torch.testing.assert_close(got.norm(dim=-1), want.norm(dim=-1), rtol=1e-3, atol=1e-4)
    assert want.flatten(0, -2).std(dim=0).max() > 1e-3, "a constant output proves nothing"


def load_state(spec: TeacherSpec, state: dict[str, Tensor], directory: Path, *, sizes: tuple[int, ...]) -> Teacher:
    """Save tensors, load them as the teacher's weights."""
    path = directory / "weights.safetensors"
    safetensors.torch.save_file({k: v.contiguous().clone() for k, v in state.items()}, path)
    return load_teacher(spec, weights=path, device=CPU, dtype=torch.float32, sizes=sizes)


def clip_in_hugging_face_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    swaps = {
        "visual.class_embedding": "embeddings.class_embedding",
        "visual.conv1": "embeddings.patch_embedding",
        "visual.positional_embedding": "embeddings.position_embedding.weight",
        "visual.ln_pre": "pre_layrnorm",
        "visual.ln_post": "post_layernorm",
        "visual.transformer.resblocks": "encoder.layers",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "attn.out_proj": "self_attn.out_proj",
    }
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for old, new in swaps.items():
            name = name.replace(old, new)
        if "attn.in_proj_" in name:
            for part, piece in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True):
                out[name.replace("attn.in_proj_", f"self_attn.{part}.")] = piece
        elif name != "visual.proj":
            out[name] = tensor
    return out
