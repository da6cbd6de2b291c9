"""A program for ExecuTorch, PyTorch's runtime for phones and boards, lowered to XNNPACK, with a batch size of 1."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from eupe.errors import ConfigError
from eupe.export.config import ExportConfig
from eupe.export.graph import Graph, brief_root, quiet
from eupe.export.source import ForwardFunction, Source, Written

PROGRAM_FILE = "model.pte"


def require_packages(precision: str) -> None:
    """Raise ConfigError if ExecuTorch is not installed."""
    try:
        with quiet():
            import executorch.exir
            import executorch.runtime  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"--format executorch needs ExecuTorch: pip install 'eupe[executorch]' ({error})") from error


def write(source: Source, config: ExportConfig, folder: Path) -> Written:
    """Write the program.

    Raises: ConfigError if the architecture cannot be traced or lowered; OSError.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    graph = Graph(source).eval()
    try:
        with quiet():
            traced = torch.export.export(graph, (torch.zeros(1, 3, source.size, source.size),))
            program = to_edge_transform_and_lower(traced, partitioner=[XnnpackPartitioner()]).to_executorch()
    except Exception as error:  # tracers raise many types of exceptions
        arch = source.encoder.spec.arch
        raise ConfigError(
            f"{arch} cannot be lowered for ExecuTorch ({brief_root(error)}); use --format onnx"
        ) from error
    (folder / PROGRAM_FILE).write_bytes(program.buffer)
    return Written("an ExecuTorch program (XNNPACK, one picture)", ("The batch size is always 1.",))


def reopen(source: Source, folder: Path) -> ForwardFunction:
    """Load the program as a user would; return a function that runs it."""
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(folder / PROGRAM_FILE).load_method("forward")

    def forward(pixels: Tensor) -> dict[str, Tensor]:
        answers = [[output.clone() for output in method.execute([one[None].contiguous()])] for one in pixels]
        return {name: torch.cat(parts) for name, *parts in zip(source.outputs, *answers, strict=True)}

    return forward
