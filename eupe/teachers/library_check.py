"""Comparison of the adapters with the libraries' own forward passes, on pictures that pipelines often get wrong."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn

from eupe.common.kinds import HF_HUB
from eupe.corpus.awkward import awkward_pictures
from eupe.corpus.pictures import decode_image
from eupe.corpus.views import ViewSpec, draw_view, render_view
from eupe.errors import ConformanceError, EupeError, StorageError
from eupe.models.hub import brief
from eupe.models.meta import built_on_meta
from eupe.teachers.own_forward import OwnModel, built_narrow, fill_at_random, narrow, own_model, save_own
from eupe.teachers.registry import REGISTRY
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.spec import TeacherSpec
from eupe.teachers.teacher import Teacher, load_teacher

LEAST = 0.9999
"""Cosine that every token must reach: kernels differ in rounding only."""
BATCH_SIZE = 4
FULL_IN_REGISTRY = 30_000_000
"""Number of parameters up to which a row is built in full when the whole registry is verified."""
FULL_BY_NAME = 1_000_000_000
"""The same limit when a single row is verified; memory is three times 4 bytes per parameter."""

Progress = Callable[[int, int], None]
"""Callback with (done, total)."""


@dataclass(frozen=True)
class Cosine:
    """The least and mean cosine between two ways to compute one kind of token."""

    least: float
    mean: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The result of comparing one teacher's adapter with its library."""

    teacher: str
    weights: str
    """`random weights`, or the source of the weights."""
    build: str
    """`full`, `narrow` (the row's architecture with two blocks of 64 channels or the like), or `none` on failure."""
    size: int
    num_pictures: int
    cosines: dict[str, Cosine]
    """Cosines between adapter and library, by kind of token."""
    rounding: dict[str, Cosine] = field(default_factory=dict)
    """Cosines between the adapter in the requested dtype and in float32, by kind of token."""
    failure: str | None = None
    """Error that prevented the comparison."""

    @property
    def agrees(self) -> bool:
        return self.failure is None and all(cosine.least >= LEAST for cosine in self.cosines.values())


def verify_teachers(
    name: str | None,
    weights: Path | None = None,
    *,
    key: str | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Progress = lambda done, of: None,
) -> list[Comparison]:
    """Compare one teacher, or every row of the registry; a row that raises counts as failed, and the others continue.

    Args:
        name: the one teacher; None for the whole registry.
        weights: local weights of the one teacher; without them its library makes random ones, except that `hf:` names
            and runs bring their own.
        key: key of its tensors in a weights file of several models.
        dtype: dtype whose tokens are also compared with those in float32.
    Raises: StorageError if the temporary folder cannot be written; for the one teacher, TeacherError as
        `resolve_teacher` and `load_teacher` do.
    """
    specs = list(REGISTRY.values()) if name is None else [resolve_teacher(name, weights)]
    full_up_to = FULL_IN_REGISTRY if name is None else FULL_BY_NAME
    comparisons = []
    for i, spec in enumerate(specs):
        progress(i, len(specs))
        try:
            found = compare(spec, weights, key=key, full_up_to=full_up_to, dtype=dtype)
        except StorageError:  # the disk failed, not the teacher
            raise
        except Exception as error:
            if name is not None and isinstance(error, EupeError):
                raise
            found = _failed(spec, weights, error)
        comparisons.append(found)
        progress(i + 1, len(specs))
    return comparisons


def require_agreement(comparisons: list[Comparison]) -> None:
    """Raise ConformanceError that names the teachers whose adapter gives other tokens than the library."""
    wrong = [comparison.teacher for comparison in comparisons if not comparison.agrees]
    if wrong:
        raise ConformanceError(
            f"{len(wrong)} of {len(comparisons)} teachers give different tokens than their library's own forward pass "
            f"(a cosine below {LEAST:g}), or none at all: {', '.join(wrong)}"
        )


def compare(
    spec: TeacherSpec,
    weights: Path | None = None,
    *,
    key: str | None = None,
    full_up_to: int = FULL_BY_NAME,
    dtype: torch.dtype = torch.float32,
) -> Comparison:
    """Compare one teacher with its library at its native size, in float32 on the CPU.

    If `dtype` is another one, its tokens in `dtype` are also compared with its own in float32.

    Args:
        full_up_to: number of parameters above which a registry row with random weights is built narrow.
    """
    is_place = spec.is_local_dir or spec.name.startswith(("hf:", f"timm:{HF_HUB}"))
    brings_its_own = spec.backend == "run" or is_place
    if weights is not None or brings_its_own:
        teacher = _loaded(spec, weights, key)
        own, build, source = own_model(spec, weights, key), "full", str(weights or spec.model)
    else:
        is_narrow = spec.name in REGISTRY and _num_parameters(spec) > full_up_to
        own, teacher = random_pair(spec, is_narrow=is_narrow, sizes=(spec.native_size,))
        build, source = "narrow" if is_narrow else "full", "random weights"
    views = awkward_views(spec.native_size)
    return Comparison(
        teacher=spec.name,
        weights=source,
        build=build,
        size=spec.native_size,
        num_pictures=len(views),
        cosines=_cosines(teacher, own, views),
        rounding={} if dtype == torch.float32 else _rounding(teacher, dtype, views),
    )


def _failed(spec: TeacherSpec, weights: Path | None, error: Exception) -> Comparison:
    return Comparison(
        teacher=spec.name,
        weights=str(weights or "random weights"),
        build="none",
        size=spec.native_size,
        num_pictures=0,
        cosines={},
        failure=f"{type(error).__name__}: {brief(error)}",
    )


def random_pair(spec: TeacherSpec, *, is_narrow: bool, sizes: tuple[int, ...]) -> tuple[OwnModel, Teacher]:
    """Return the library's model with random weights, and the teacher that loaded them from a file.

    Raises: StorageError if the file cannot be written to a temporary folder.
    """
    with built_narrow(spec) if is_narrow else nullcontext():
        own = own_model(spec)
        fill_at_random(own.module)
        with _saved(own.module) as saved:
            return own, _loaded(narrow(spec) if is_narrow else spec, saved, sizes=sizes)


@contextmanager
def _saved(module: nn.Module) -> Iterator[Path]:
    """Save the weights in a temporary folder and yield their path; the folder is removed afterwards.

    Raises: StorageError if the folder cannot be made or written to.
    """
    place = "any place"
    with ExitStack() as stack:
        try:
            place = tempfile.gettempdir()
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            saved = save_own(module, Path(folder))
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"random weights cannot be written to a temporary folder in {place} ({brief(error)}); "
                "free some space there, or set TMPDIR to another folder"
            ) from error
        yield saved


def awkward_views(size: int) -> NDArray[np.uint8]:
    """Return the centre views of the awkward pictures, uint8 [B, S, S, 3]."""
    images = [(name, decode_image(data)) for name, data in awkward_pictures().items()]
    drawn = [(image, draw_view(ViewSpec(), name, 0, image.width, image.height)) for name, image in images]
    return np.stack([render_view(image, params, size) for image, params in drawn])


def _loaded(spec: TeacherSpec, weights: Path | None, key: str | None = None, *, sizes: tuple[int, ...] = ()) -> Teacher:
    device, sizes = torch.device("cpu"), sizes or (spec.native_size,)
    return load_teacher(spec, weights=weights, key=key, device=device, dtype=torch.float32, sizes=sizes)


def _num_parameters(spec: TeacherSpec) -> int:
    """Count the parameters on the meta device, which needs no memory."""
    with built_on_meta():
        return sum(parameter.numel() for parameter in own_model(spec).module.parameters())


@torch.inference_mode()
def _cosines(teacher: Teacher, own: OwnModel, views: NDArray[np.uint8]) -> dict[str, Cosine]:
    found: dict[str, list[Tensor]] = {}
    for start in range(0, len(views), BATCH_SIZE):
        batch = views[start : start + BATCH_SIZE]
        tokens = teacher(torch.from_numpy(batch))
        dense, summary = own.forward(own.prepare(batch))
        found.setdefault("dense", []).append(_cosine(tokens.dense.flatten(1, 2), dense))
        if tokens.summary is not None and summary is not None:
            found.setdefault("summary", []).append(_cosine(tokens.summary, summary))
    return _summed_up(found)


@torch.inference_mode()
def _rounding(teacher: Teacher, dtype: torch.dtype, views: NDArray[np.uint8]) -> dict[str, Cosine]:
    """Compare the teacher's tokens in `dtype` with its own in float32."""
    rounded = dataclasses.replace(teacher, dtype=dtype)
    found: dict[str, list[Tensor]] = {}
    for start in range(0, len(views), BATCH_SIZE):
        batch = torch.from_numpy(views[start : start + BATCH_SIZE])
        got, want = rounded(batch), teacher(batch)
        found.setdefault("dense", []).append(_cosine(got.dense, want.dense))
        if got.summary is not None and want.summary is not None:
            found.setdefault("summary", []).append(_cosine(got.summary, want.summary))
    return _summed_up(found)


def _summed_up(found: dict[str, list[Tensor]]) -> dict[str, Cosine]:
    joined = {kind: torch.cat(parts) for kind, parts in sorted(found.items(), reverse=True)}
    return {kind: Cosine(float(values.min()), float(values.mean())) for kind, values in joined.items()}


def _cosine(got: Tensor, want: Tensor) -> Tensor:
    """Return the cosines in float64, so that equal tokens give 1; NaN if either token is NaN."""
    values: Any = torch.nn.functional.cosine_similarity(got.double(), want.double(), dim=-1)
    return torch.as_tensor(values).flatten()
