"""The settings of an export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from eupe.common.storage import AnyPath
from eupe.errors import ConfigError
from eupe.models.encoder_spec import near

TIMM, HF, ONNX, OPENVINO, EXECUTORCH = "timm", "hf", "onnx", "openvino", "executorch"
LITERT, COREML = "litert", "coreml"
FP32, FP16, INT8 = "fp32", "fp16", "int8"
PRECISIONS = (FP32, FP16, INT8)
FORMATS = {
    TIMM: (FP32,),
    HF: (FP32,),
    ONNX: PRECISIONS,
    OPENVINO: PRECISIONS,
    EXECUTORCH: (FP32,),
    LITERT: PRECISIONS,
    COREML: (FP32, FP16),
}
"""Precisions of each format."""
DYNAMIC_SIZE = (ONNX, OPENVINO)
"""Formats whose graphs can take inputs of any size."""
ALL = "all"


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The settings of one export of one run."""

    run: Path
    out: Path
    """Directory to create."""
    format: str
    size: int | None = None
    """Side of the input in pixels; None for the run's own size."""
    heads: tuple[str, ...] = ()
    """Names of the targets whose heads are exported too, or `all`."""
    precision: str = FP32
    """Precision of the graph; `FORMATS` has those of each format."""
    calibrate: AnyPath | None = None
    """Pictures that the int8 ranges are calibrated on; None for generated pictures."""
    dynamic_size: bool = False
    """Let the graph accept any size divisible by the patch size, not only `size`."""

    def __post_init__(self) -> None:
        """Raise ConfigError if a setting is invalid or does not fit the others."""
        if self.format not in FORMATS:
            known = ", ".join(FORMATS)
            raise ConfigError(f"--format {self.format} is unknown{near(self.format, list(FORMATS))}; use {known}")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"--precision {self.precision} is unknown; use {', '.join(PRECISIONS)}")
        if self.size is not None and self.size < 1:
            raise ConfigError(f"--size must be at least 1 pixel, got {self.size}")
        if self.precision not in FORMATS[self.format]:
            others = [name for name, precisions in FORMATS.items() if self.precision in precisions]
            raise ConfigError(
                f"--precision {self.precision} is only for --format {', '.join(others)}; --format {self.format} takes "
                f"{', '.join(FORMATS[self.format])}"
            )
        if self.dynamic_size and self.format not in DYNAMIC_SIZE:
            raise ConfigError(
                f"--dynamic-size is only for --format {' and '.join(DYNAMIC_SIZE)}; --format {self.format} does not "
                "support it"
            )
        if self.calibrate is not None and self.precision != INT8:
            raise ConfigError(f"--calibrate is only for --precision {INT8}; {self.precision} needs no calibration")
