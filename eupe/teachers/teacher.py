"""A loaded teacher: uint8 pictures in, float32 tokens out, whatever library it comes from.

Each adapter module has four functions: `load(spec, weights=, key=, sizes=)` returns the library's own encoder on the
CPU, `build(spec, sizes=)` returns the same with random weights, `tokens(model, spec, pixels_BCHW, layers)` runs it,
`layers(spec, weights=)` says which layers it has. Everything else that teachers have in common is here.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from eupe.common.compute import Tokens, autocast, fastest_format, normalise
from eupe.common.kinds import LayerShape
from eupe.errors import ConfigError, TeacherError
from eupe.models.checkpoints import require_readable, weights_digest
from eupe.teachers.spec import Backend, TeacherSpec
from eupe.teachers.weights import file_digest

__all__ = ["Teacher", "file_digest", "load_teacher", "require_weights", "weights_digest"]

_ADAPTERS: dict[Backend, str] = {
    "timm": "eupe.teachers.timm_adapter",
    "hf": "eupe.teachers.hf_adapter",
    "open_clip": "eupe.teachers.open_clip_adapter",
    "run": "eupe.teachers.run_adapter",
}


@dataclass(frozen=True)
class Teacher:
    """A frozen encoder on its device; its weights are float32, it computes in `dtype`."""

    spec: TeacherSpec
    module: nn.Module
    """The library's own encoder, in eval mode."""
    device: torch.device
    dtype: torch.dtype
    memory_format: torch.memory_format = torch.contiguous_format
    """Memory format of its inputs."""

    def in_fastest_format(self) -> Teacher:
        """Return the teacher with weights and inputs in the memory format that suits it; see `fastest_format`.

        The weights are laid out in place. Not for extraction: tokens differ by rounding, and stores are resumed and
        repaired byte for byte.
        """
        memory_format = fastest_format(self.module)
        return replace(self, module=self.module.to(memory_format=memory_format), memory_format=memory_format)

    @torch.inference_mode()
    def __call__(self, views_u8_BHWC: Tensor, layers: Sequence[int] = ()) -> Tokens:
        """Return the tokens of square uint8 RGB pictures [B, S, S, 3], which may be on any device.

        Args:
            layers: numbers of the layers whose maps are wanted as well; see `teacher_layers`.
        Returns: float32 tokens on the teacher's device.
        Raises: TeacherError if S is not a multiple of the patch, or the model's output does not match its spec.
        """
        grid = self.spec.grid(views_u8_BHWC.shape[1])
        pixels = normalise(
            views_u8_BHWC.to(self.device, non_blocking=True),
            self.spec.mean,
            self.spec.std,
            memory_format=self.memory_format,
        )
        tokens = self.encode(pixels, layers)
        _check_shapes(tokens, self.spec, len(views_u8_BHWC), grid)
        summary = None if tokens.summary is None else tokens.summary.float()
        maps = {number: each.float() for number, each in tokens.layers.items()}
        return Tokens(summary=summary, dense=tokens.dense.float(), layers=maps)

    def encode(self, pixels_BCHW: Tensor, layers: Sequence[int] = ()) -> Tokens:
        """Return the tokens of normalised pixels on its device, in its compute dtype: the encoder and nothing else."""
        adapter = importlib.import_module(_ADAPTERS[self.spec.backend])
        with autocast(self.dtype, self.device):
            tokens: Tokens = adapter.tokens(self.module, self.spec, pixels_BCHW, layers)
        return tokens


def teacher_layers(spec: TeacherSpec, *, weights: Path | None = None) -> list[LayerShape]:
    """Return the shapes of the maps that a teacher's layers give, first to last; layers are numbered from 1.

    A layer is a block of a ViT, whose tokens go through the final norm as the last ones do (`get_intermediate_layers`
    of DINOv2 and DINOv3), or a stage of any other model. The last layer's map is the teacher's `dense` itself.

    Args:
        weights: local weights, whose configuration is read where a library keeps it beside them.
    Raises: TeacherError for a teacher that gives its last map only.
    """
    adapter = importlib.import_module(_ADAPTERS[spec.backend])
    try:
        shapes: list[LayerShape] = adapter.layers(spec, weights=weights)
    except ConfigError as error:
        raise TeacherError(f"--layers does not work for teacher {spec.name}: {error}") from error
    return shapes


def load_teacher(
    spec: TeacherSpec,
    *,
    weights: Path | None,
    key: str | None = None,
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
) -> Teacher:
    """Build the teacher's encoder, load every weight of it, freeze it and move it to the device.

    Args:
        weights: a safetensors file, a torch state dict, or a directory in Hugging Face's layout; None for the library's
            own download.
        key: key of its tensors in a weights file of several models; see `read_checkpoint`.
        dtype: dtype of the matrix products, under autocast; the weights stay float32.
        sizes: sides in pixels of the inputs that it will get.
    Raises: TeacherError for a size that it cannot take, and for weights that are unavailable or do not fit; a teacher
        is never half loaded.
    """
    for size in sizes:
        spec.grid(size)
    adapter = importlib.import_module(_ADAPTERS[spec.backend])
    module: nn.Module = adapter.load(spec, weights=weights, key=key, sizes=sizes)
    return Teacher(spec=spec, module=_frozen(module).to(device), device=device, dtype=dtype)


def require_weights(spec: TeacherSpec, weights: Path) -> None:
    """Check local weights, and the files that their library needs beside them, before any work starts.

    Raises: TeacherError if they are missing, or are files of another kind.
    """
    require_readable(weights)
    if spec.backend == "hf":
        importlib.import_module(_ADAPTERS["hf"]).require_config(spec, weights)


def build_teacher(spec: TeacherSpec, *, size: int, seed: int = 0) -> Teacher:
    """Build the teacher's encoder with its library's random weights, in float32 on the CPU, without fetching anything.

    Raises: TeacherError for a size that it cannot take.
    """
    spec.grid(size)
    adapter = importlib.import_module(_ADAPTERS[spec.backend])
    with torch.random.fork_rng(devices=[]):  # the caller's random state must not change
        torch.manual_seed(seed)
        module: nn.Module = adapter.build(spec, sizes=(size,))
    return Teacher(spec=spec, module=_frozen(module), device=torch.device("cpu"), dtype=torch.float32)


def _frozen(module: nn.Module) -> nn.Module:
    """Return the module in eval mode, without gradients.

    Raises: TeacherError if a part of it stays in training mode, because its features would then be random.
    """
    module.eval().requires_grad_(False)
    training = [name for name, part in module.named_modules() if part.training]
    if training:
        raise TeacherError(f"{len(training)} modules of the teacher stay in training mode ({', '.join(training[:3])})")
    return module


def _check_shapes(tokens: Tokens, spec: TeacherSpec, batch: int, grid: int) -> None:
    summary = None if tokens.summary is None else tuple(tokens.summary.shape)
    want_summary = None if spec.summary == "none" else (batch, spec.summary_dim)
    want_dense = (batch, grid, grid, spec.dense_dim)
    if summary != want_summary or tuple(tokens.dense.shape) != want_dense:
        raise TeacherError(
            f"{spec.name} returned summary {summary} and dense {tuple(tokens.dense.shape)}, "
            f"but its spec says {want_summary} and {want_dense}"
        )
