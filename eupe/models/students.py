"""What can be a student, and what is known of it without training: size, strides, weights and their licences."""

from __future__ import annotations

from dataclasses import dataclass

import timm
import torch

from eupe.common.kinds import LayerShape
from eupe.errors import ConfigError
from eupe.models.encoder import build_encoder, encoder_layers, on_paper
from eupe.models.encoder_spec import EncoderSpec
from eupe.models.outside import OWN_SIDE, is_outside
from eupe.models.timm_models import timm_config, timm_spec

KNOWN = (
    "mobilenetv4_conv_small",
    "mobilenetv4_conv_medium",
    "mobilenetv3_small_100",
    "tf_efficientnet_lite0",
    "efficientnet_b0",
    "repvit_m0_9",
    "fastvit_t8",
    "edgenext_x_small",
    "convnext_atto",
    "convnext_tiny",
    "resnet18",
    "regnety_004",
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "vit_tiny_patch16_dinov3_qkvb",
    "vit_small_patch16_dinov3",
)
"""Students for the list: small, common on devices or in the paper, each of which timm has."""


@dataclass(frozen=True)
class StudentFacts:
    """Facts about a student at one size."""

    spec: EncoderSpec
    num_parameters: int
    sizes: str
    """The input sizes that it takes, in words."""
    weights: dict[str, str]
    """Licences by the names of pretrained weights; `--student NAME` of one of these starts from them."""
    layers: list[LayerShape]
    """Shapes of the maps of its layers, first to last; empty if it gives its last map only."""

    @property
    def strides(self) -> str:
        """Return the pixels per cell of its layers' maps, each stride once, in words."""
        return " ".join(dict.fromkeys(str(layer.patch) for layer in self.layers)) or str(self.spec.patch)


def student_facts(name: str, size: int | None = None) -> StudentFacts:
    """Return what is known of a student.

    Args:
        size: side of its input in pixels; None for its own.
    Raises: ConfigError if there is no such student, or it does not take the size.
    """
    if is_outside(name):
        with torch.random.fork_rng(devices=[]):
            encoder = build_encoder(name, size=size or OWN_SIDE)
        count = sum(parameter.numel() for parameter in encoder.model.parameters())
        return StudentFacts(
            encoder.spec,
            count,
            f"{encoder.spec.size}; others are tried when training begins",
            {},
            _layers(encoder.spec),
        )
    spec = timm_spec(name, size)
    count = sum(parameter.numel() for parameter in on_paper(name).parameters())
    return StudentFacts(spec, count, _sizes(name, spec), _weights(name), _layers(spec))


def _layers(spec: EncoderSpec) -> list[LayerShape]:
    try:
        return encoder_layers(spec.arch, spec.size)
    except ConfigError:
        return []


def _sizes(name: str, spec: EncoderSpec) -> str:
    try:
        timm_spec(name, spec.size + spec.patch)
    except ConfigError:
        return str(spec.size)
    return f"multiples of {spec.patch}"


def _weights(name: str) -> dict[str, str]:
    """Return the licences of an architecture's pretrained weights, by the names that start from them."""
    names = timm.list_pretrained(f"{name.split('.')[0]}.*") if "." not in name else [name]
    configs = {each: timm_config(each) for each in names}
    return {each: config.license or "unknown" for each, config in configs.items() if config and config.has_weights}
