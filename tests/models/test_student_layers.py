"""Maps of earlier layers are those of the library itself, and asking for them changes nothing else."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from making import OwnPyramid
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, ResNetConfig, ResNetModel

from eupe.errors import ConfigError
from eupe.models.encoder import Encoder, build_encoder, encoder_layers

SIDE = 64
STAGED = ["mobilenetv4_conv_small", "repvit_m0_9", "convnext_atto", "efficientnet_lite0", "test_byobnet"]


def pixels(batch: int = 2, side: int = SIDE) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


def built(arch: str, size: int = SIDE) -> Encoder:
    torch.manual_seed(0)
    return build_encoder(arch, size=size).eval()


def assert_described(encoder: Encoder, maps: dict[int, Tensor], size: int = SIDE) -> None:
    """Each map has the shape that is known without building the student."""
    for number, shape in enumerate(encoder_layers(encoder.spec.arch, size), 1):
        assert tuple(maps[number].shape[1:]) == (size // shape.patch, size // shape.patch, shape.dim)
    assert number == len(maps)


@torch.inference_mode()
@pytest.mark.parametrize("arch", STAGED)
def test_stages_are_what_timms_table_of_stages_names(arch: str) -> None:
    encoder = built(arch)
    seen: list[Tensor] = []
    for stage in encoder.model.feature_info:  # type: ignore[union-attr]
        part = encoder.model.get_submodule(stage["module"])  # type: ignore[index]
        part.register_forward_hook(lambda _, __, map_BDhw: seen.append(map_BDhw))
    encoder(pixels())
    wanted = seen[:]
    numbers = range(1, len(wanted) + 1)

    tokens, alone = encoder(pixels(), numbers), encoder(pixels())

    assert len(numbers) == len(encoder.model.feature_info)  # type: ignore[arg-type]
    for number, map_BDhw in zip(numbers, wanted, strict=True):
        torch.testing.assert_close(tokens.layers[number], map_BDhw.permute(0, 2, 3, 1))
    assert torch.equal(tokens.dense, alone.dense) and torch.equal(tokens.summary, alone.summary)
    assert not alone.layers
    assert_described(encoder, dict(tokens.layers))


@torch.inference_mode()
@pytest.mark.parametrize("arch", ["test_vit", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_blocks_are_those_of_timms_intermediate_layers(arch: str) -> None:
    """The final norm follows each of them, as in `get_intermediate_layers` of DINOv2 and DINOv3."""
    size = 56 if "14" in arch else SIDE
    encoder = built(arch, size)
    depth = len(encoder.model.blocks)
    prefix, states = encoder.spec.prefix_tokens, []
    if hasattr(encoder.model, "get_intermediate_layers"):
        oracle = encoder.model.get_intermediate_layers(pixels(side=size), n=range(depth), norm=True, reshape=True)
    else:
        for block in encoder.model.blocks:
            block.register_forward_hook(lambda _, __, state: states.append(state))
        encoder(pixels(side=size))
        grid = (size // encoder.spec.patch, size // encoder.spec.patch)
        oracle = [encoder.model.norm(each)[:, prefix:].unflatten(1, grid).permute(0, 3, 1, 2) for each in states]

    tokens = encoder(pixels(side=size), range(depth, 0, -1))  # in any order

    for number in range(1, depth + 1):
        torch.testing.assert_close(tokens.layers[number], oracle[number - 1].permute(0, 2, 3, 1))
    torch.testing.assert_close(tokens.layers[depth], tokens.dense)
    assert_described(encoder, dict(tokens.layers), size)


@torch.inference_mode()
def test_a_function_may_return_several_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = built("making:OwnPyramid")
    assert isinstance(encoder.model, OwnPyramid)
    fine, coarse = encoder.model(pixels())

    tokens = encoder(pixels(), [1, 2])

    assert torch.equal(tokens.layers[1], fine.permute(0, 2, 3, 1))
    assert torch.equal(tokens.dense, coarse.permute(0, 2, 3, 1)) and torch.equal(tokens.layers[2], tokens.dense)
    assert_described(encoder, dict(tokens.layers))


def keep(found: list[Tensor], _: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
    """Hook that keeps what a layer gives."""
    found.append(output[0] if isinstance(output, tuple) else output)


@torch.inference_mode()
def test_layers_of_transformers_are_its_hidden_states(tmp_path: Path) -> None:
    small = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    vit = Dinov2Model(Dinov2Config(**small, num_hidden_layers=3, image_size=56))
    resnet = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"))
    for model, size in ((vit, 56), (resnet, SIDE)):
        model.save_pretrained(tmp_path / model.config.model_type)
        encoder = built(f"hf:{tmp_path / model.config.model_type}", size)
        found: list[Tensor] = []
        layers = model.encoder.layer if model is vit else model.encoder.stages
        own = encoder.model.encoder.layer if model is vit else encoder.model.encoder.stages  # type: ignore[union-attr]
        for layer in own:
            layer.register_forward_hook(partial(keep, found))

        tokens = encoder(pixels(side=size), range(1, len(layers) + 1))

        for number, state in enumerate(found[: len(layers)], 1):
            if model is vit:
                state = state[:, 1:].unflatten(1, (4, 4)).movedim(-1, 1)
            torch.testing.assert_close(tokens.layers[number], state.permute(0, 2, 3, 1))
        assert_described(encoder, dict(tokens.layers), size)


class OneMap(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(3, 8, 16, 16)


def test_what_gives_one_map_only_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    assert sys.modules[__name__]
    for arch, said in (
        (f"{__name__}:OneMap", "gives its last map only, no layers"),
        ("torchvision:resnet18", "gives its last map only, no layers"),
    ):
        with pytest.raises(ConfigError, match=said):
            encoder_layers(arch, 224)


def test_the_list_of_students_shows_their_layers(run_eupe: Callable[..., Any]) -> None:
    said = json.loads(run_eupe("students", "mobilenetv4_conv_small", "--json").out)
    (said,) = said if isinstance(said, list) else [said]
    assert [(each["layer"], each["stride"]) for each in said["layers"]] == [(1, 2), (2, 4), (3, 8), (4, 16), (5, 32)]
    assert [each["dim"] for each in said["layers"]] == [32, 32, 64, 96, 960]
