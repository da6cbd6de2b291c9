"""The heads of a run as plain layers that speak as its teachers do: denormalisation is folded into the last of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eupe.encoder import near
from eupe.errors import ConfigError
from eupe.export.config import ALL
from eupe.train.predict import KindPredictor, TargetPredictor

HEADS_FILE = "heads.safetensors"


def chosen(predictors: Sequence[TargetPredictor], names: Sequence[str]) -> list[TargetPredictor]:
    """The targets that `--heads` names, in the run's order.

    Raises: ConfigError for a name that no target has.
    """
    known = [predictor.name for predictor in predictors]
    if unknown := [name for name in names if name not in (ALL, *known)]:
        there = ", ".join([ALL, *known])
        raise ConfigError(f"--heads {unknown[0]} names no target of the run{near(unknown[0], known)}; give {there}")
    return [predictor for predictor in predictors if ALL in names or predictor.name in names]


def folded(predictor: KindPredictor) -> nn.Sequential:
    """Linear, LayerNorm, GELU, and a linear that gives the teacher's own features, bias and all.

    y = scale * R^T (gain * W x) + centre is one linear map of x; it is folded in float64.
    """
    first, norm, activation, last = predictor.head
    assert isinstance(last, nn.Linear)
    spread = torch.diag(predictor.scale.double())
    if predictor.rotation is not None:
        spread = spread @ predictor.rotation.double().T
    said = nn.Linear(last.in_features, last.out_features)
    with torch.no_grad():
        said.weight.copy_(spread @ (predictor.gain.double() * last.weight.double()))
        said.bias.copy_(predictor.centre)
    return nn.Sequential(first, norm, activation, said).eval()


def save_heads(heads: Mapping[str, nn.Sequential], folder: Path) -> None:
    """`NAME.LAYER.weight` and `.bias` of every head; nothing where there are none."""
    tensors = {f"{name}.{tensor}": value for name, head in heads.items() for tensor, value in head.state_dict().items()}
    if tensors:
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / HEADS_FILE)


def say_again(folder: Path, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the heads of a directory make of the model's tokens, by the twelve lines that its card has.

    Args:
        tokens: by kind.
    Returns: by `TARGET.KIND`; nothing where the directory has no heads.
    """
    if not (folder / HEADS_FILE).exists():
        return {}
    heads = load_file(folder / HEADS_FILE)

    def said(name: str, token: Tensor) -> Tensor:
        hidden = F.linear(token, heads[f"{name}.0.weight"])
        hidden = F.layer_norm(hidden, hidden.shape[-1:], heads[f"{name}.1.weight"], heads[f"{name}.1.bias"])
        return F.linear(F.gelu(hidden), heads[f"{name}.3.weight"], heads[f"{name}.3.bias"])

    names = sorted({name.rsplit(".", 2)[0] for name in heads})
    return {name: said(name, tokens[name.rpartition(".")[2]]) for name in names}
