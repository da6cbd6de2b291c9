"""Trained weights through the adapters against the libraries' own forward passes."""

from pathlib import Path

import safetensors.torch
import timm
import torch
from teacher_checks import CPU, assert_same_tokens, by_hand
from torch import Tensor
from transformers import Dinov2Model

from eupe.teachers.registry import REGISTRY
from eupe.teachers.teacher import load_teacher


def pictures(size: int) -> Tensor:
    """Two pictures of noise on a gradient, so that tokens differ from place to place."""
    ramp = torch.linspace(0, 200, size)
    image = (ramp[:, None] * torch.tensor([1.0, 0.5, 0.0])[:, None, None]).permute(1, 2, 0) + ramp[None, :, None] / 4
    noise = torch.rand(size, size, 3, generator=torch.Generator().manual_seed(3)) * 40
    picture = (image + noise).clamp(0, 255).to(torch.uint8)
    return torch.stack([picture, picture.flip(0)])


def test_dinov2_s(assets: Path) -> None:
    spec, weights = REGISTRY["dinov2-s"], assets / "weights" / "dinov2-small"
    teacher = load_teacher(spec, weights=weights, device=CPU, dtype=torch.float32, sizes=(224,))
    own = Dinov2Model.from_pretrained(weights).eval()
    with torch.no_grad():
        output = own(by_hand(pictures(224), spec))
    assert_same_tokens(teacher(pictures(224)), output.last_hidden_state[:, 1:], output.pooler_output)


def test_efficientnet_lite0(assets: Path) -> None:
    spec, weights = REGISTRY["efficientnet-lite0"], assets / "weights" / "efficientnet_lite0" / "model.safetensors"
    teacher = load_teacher(spec, weights=weights, device=CPU, dtype=torch.float32, sizes=(224,))
    own = timm.create_model("tf_efficientnet_lite0").eval()
    own.load_state_dict(safetensors.torch.load_file(weights), strict=True)
    with torch.no_grad():
        pixels = by_hand(pictures(224), spec)
        last_stage = own.blocks(own.bn1(own.conv_stem(pixels)))
        logits = own(pixels)
        tokens = teacher(pictures(224))
        assert_same_tokens(
            tokens, last_stage.flatten(2).mT, own.forward_head(own.forward_features(pixels), pre_logits=True)
        )
        torch.testing.assert_close(own.classifier(tokens.summary), logits, rtol=1e-3, atol=1e-3)
