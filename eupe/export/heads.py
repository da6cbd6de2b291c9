"""The heads of a run as plain layers that output the teachers' own features; denormalisation is in the last layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eupe.errors import ConfigError
from eupe.export.config import ALL
from eupe.models.encoder_spec import near
from eupe.train.predict import KindPredictor, TargetPredictor

HEADS_FILE = "heads.safetensors"


def chosen(predictors: Sequence[TargetPredictor], names: Sequence[str]) -> list[TargetPredictor]:
    """Return the targets that `--heads` names, in the run's order.

    Raises: ConfigError for a name that no target has.
    """
    known = [predictor.name for predictor in predictors]
    if unknown := [name for name in names if name not in (ALL, *known)]:
        there = ", ".join([ALL, *known])
        raise ConfigError(f"--heads {unknown[0]} is not a target of the run{near(unknown[0], known)}; give {there}")
    return [predictor for predictor in predictors if ALL in names or predictor.name in names]


def folded(predictor: KindPredictor) -> nn.Sequential:
    """Return Linear, LayerNorm, GELU and a last Linear, with a bias, that outputs the teacher's own features.

    Denormalisation y = scale * R^T (gain * W x) + centre is one affine map of x. It is folded into the last layer, in
    float64.
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


def save_heads(heads: Mapping[str, nn.Module], folder: Path) -> None:
    """Write `NAME.LAYER.weight` and `.bias` of every head to one file; write no file if there are no heads."""
    tensors = {f"{name}.{tensor}": value for name, head in heads.items() for tensor, value in head.state_dict().items()}
    if tensors:
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / HEADS_FILE)


def say_again(folder: Path, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Apply the heads of a directory to the model's tokens, with the same twelve lines of code as in its card.

    Args:
        tokens: the model's tokens by kind.
    Returns: outputs by `TARGET.KIND`; empty if the directory has no heads.
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
