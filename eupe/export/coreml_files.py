"""A Core ML package for Apple's devices, with a batch size of 1, which no other system can run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eupe.errors import ConfigError, ConformanceError
from eupe.export.config import FP16, ExportConfig
from eupe.export.graph import Graph, brief_root, quiet
from eupe.export.source import Source, Written

PACKAGE = "model.mlpackage"
INPUT = "pixels"
NOT_RUN = (
    "This package was not run, because Core ML runs only on Apple's systems. Only the file was checked: the names and "
    "shapes of its input and outputs, that every output depends on the pixels, and that all weights are finite. To "
    "compare its outputs on a Mac, use `eupe export check`."
)


def require_packages(precision: str) -> None:
    """Raise ConfigError if coremltools is not installed."""
    try:
        with quiet():
            import coremltools  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"--format coreml needs coremltools: pip install 'eupe[coreml]' ({error})") from error


def output_names(source: Source) -> list[str]:
    """Return the outputs' names in the package, where only letters, digits and `_` may stand."""
    return ["".join(c if c.isascii() and c.isalnum() else "_" for c in name) for name in source.outputs]


def write(source: Source, config: ExportConfig, folder: Path) -> Written:
    """Write the package in the requested precision, with float32 input and outputs.

    Raises: ConfigError if the architecture cannot be converted.
    """
    import coremltools

    pixels = torch.zeros(1, 3, source.size, source.size)
    precisions = coremltools.precision
    try:
        with quiet():
            traced = torch.export.export(Graph(source).eval(), (pixels,)).run_decompositions({})
            package = coremltools.convert(
                traced,
                inputs=[coremltools.TensorType(name=INPUT, shape=tuple(pixels.shape), dtype=np.float32)],
                outputs=[coremltools.TensorType(name=name, dtype=np.float32) for name in output_names(source)],
                compute_precision=precisions.FLOAT16 if config.precision == FP16 else precisions.FLOAT32,
                minimum_deployment_target=coremltools.target.iOS16,
                skip_model_load=True,
            )
            package.save(str(folder / PACKAGE))
    except Exception as error:  # converters raise many types of exceptions
        arch = source.encoder.spec.arch
        raise ConfigError(f"{arch} cannot be converted for Core ML ({brief_root(error)}); use --format onnx") from error
    return Written(f"a Core ML package ({config.precision}, one picture)", ("The batch size is always 1.", NOT_RUN))


def check_file(source: Source, folder: Path) -> None:
    """Check the package as far as a system without Core ML can.

    Raises: ConformanceError if it has other inputs or outputs than the run's student, an output does not depend on the
        pixels, or weights are not finite.
    """
    import coremltools
    from coremltools.converters.mil.frontend.milproto import load

    with quiet():
        model = coremltools.models.MLModel(str(folder / PACKAGE), skip_model_load=True)
        spec = model.get_spec()
        program = load.load(spec, spec.specificationVersion, file_weights_dir=model.weights_dir)
    with torch.inference_mode():
        answers = source.reference(torch.zeros(1, 3, source.size, source.size))
    shapes = [tuple(answers[name].shape) for name in source.outputs]
    want = {INPUT: (1, 3, source.size, source.size), **dict(zip(output_names(source), shapes, strict=True))}
    ends = (*spec.description.input, *spec.description.output)
    got = {end.name: tuple(end.type.multiArrayType.shape) for end in ends}
    if got != want:
        raise ConformanceError(f"the Core ML package has other inputs or outputs: got {got}, expected {want}")
    operations = program.functions["main"].operations
    if cut := sorted(set(output_names(source)) - _reached(operations)):
        raise ConformanceError(f"outputs of the Core ML package do not depend on its pixels: {', '.join(cut)}")
    weights = {each.outputs[0].name: each.outputs[0].val for each in operations if each.op_type == "const"}
    numbers = {name: value for name, value in weights.items() if np.asarray(value).dtype.kind == "f"}
    if wrong := sorted(name for name, value in numbers.items() if not np.isfinite(value).all()):
        raise ConformanceError(f"weights of the Core ML package are not finite: {', '.join(wrong)}")


def _reached(operations: Sequence[Any]) -> set[str]:
    """Return the names of all values that depend on the pixels; operations are in the order of computation."""
    reached = {INPUT}
    for operation in operations:
        given = [
            each
            for value in operation.inputs.values()
            for each in (value if isinstance(value, tuple | list) else [value])
        ]
        if any(each.name in reached for each in given):
            reached |= {output.name for output in operation.outputs}
    return reached
