"""Who is judged: a store's features as they are, a run's student, a teacher, or raw pixels for comparison.

Shapes: V views, h w cells of the dense grid, D width of a dense token, Ds width of a summary.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from eupe.ahead import map_ahead
from eupe.corpus.views import ViewParams, render_view
from eupe.device import compute_dtype, dtype_name, pick_device
from eupe.encoder import CARD_FILE, Encoder, Tokens, build_encoder, load_card
from eupe.errors import ConfigError, RunError, StoreError, TeacherError
from eupe.evaluate.pictures import Cut, Pictures
from eupe.evaluate.result import Result
from eupe.evaluate.run import is_run, read_card
from eupe.place import Place
from eupe.store import Store, open_store
from eupe.store.layout import DENSE, SUMMARY
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.spec import TeacherSpec
from eupe.teachers.teacher import Teacher, load_teacher

Encode = Callable[[NDArray[np.uint8]], Tokens]
"""From views, uint8 [B, S, S, 3]."""

BATCH = 16
PIXELS = "pixels"
PIXEL_PATCH = 16
PIXEL_SHADES = 4
"""A patch of raw pixels is reduced to 4x4 colours, a view to 16x16 for its summary."""
STORE_READ = 256
MEMORY_SHARE = 0.5
"""Of the memory that is free, what features may take."""


@dataclass(frozen=True)
class Seen:
    """What a subject says of views of some pictures."""

    picture_V: NDArray[np.int64]
    """Whose view each is: its place among the pictures."""
    params: list[ViewParams]
    size: int
    """Side in pixels of what the encoder saw."""
    summary: Tensor | None = None
    """float32 [V, Ds]"""
    dense: Tensor | None = None
    """float16 [V, h, w, D]"""

    def __len__(self) -> int:
        return len(self.params)


@dataclass(frozen=True)
class StoreSubject:
    """Features that were cached: no model is run, and views are those that were stored."""

    name: str
    store: Store
    kind: str = "store"
    untrained: bool = False

    @property
    def patch(self) -> int:
        return int(self.store.spec.teacher["patch"])

    def size(self, wanted: int | None) -> int:
        """The size that is asked for, or the finest.

        Raises: ConfigError if the store lacks it.
        """
        sizes = self.store.spec.sizes
        if wanted is not None and wanted not in sizes:
            raise ConfigError(
                f"{self.store.path} has no features at {wanted} px, only at {', '.join(map(str, sizes))}; leave --size "
                "out, or extract again"
            )
        return max(sizes) if wanted is None else wanted

    def protocol(self, size: int) -> dict[str, object]:
        """What decides features, beside the pictures."""
        return {"size": size, "views": self.store.spec.views["policy"], "num_views": self.store.spec.num_views}

    def require(self, kind: str) -> None:
        """Raises: ConfigError if the store has no such tokens."""
        if kind not in self.store.spec.tokens:
            raise ConfigError(f"{self.store.path} holds no {kind} tokens; extract it with --tokens summary,dense")

    def look(self, pictures: Pictures, *, kind: str, size: int, cut: Cut) -> Seen:
        """All stored views of the pictures, which are found by their content.

        Raises: StoreError naming a picture that the store has no features of; PartCorruptError.
        """
        self.require(kind)
        rows = [self._rows.get(pictures.sha256(i)) for i in range(len(pictures))]
        missing = [i for i, row in enumerate(rows) if row is None]
        if missing:
            raise StoreError(
                f"{self.store.path} has features of {len(pictures) - len(missing)} of the {len(pictures)} pictures of "
                f"{pictures.root}, not of {pictures.keys[missing[0]]}; extract them into it, or judge its teacher"
            )
        found = [row for row in rows if row is not None]
        return self._read(np.arange(len(pictures)), found, kind=kind, size=size)

    def labelled(self, *, size: int) -> tuple[Seen, list[str], list[str]]:
        """Summaries of all its own pictures that have a label, with label and key of each picture.

        Raises: ConfigError if there are none.
        """
        self.require(SUMMARY)
        samples = self.store.valid.select(["row", "label", "key"]).to_pylist()
        samples = [sample for sample in samples if sample["label"] is not None]
        if not samples:
            raise ConfigError(
                f"no sample of {self.store.path} has a label; its corpus has no class folders, so give --data"
            )
        rows = [sample["row"] for sample in samples]
        seen = self._read(np.arange(len(rows)), rows, kind=SUMMARY, size=size)
        return seen, [sample["label"] for sample in samples], [sample["key"] for sample in samples]

    @cached_property
    def _rows(self) -> dict[str, int]:
        valid = self.store.valid
        return dict(zip(valid["sha256"].to_pylist(), valid["row"].to_pylist(), strict=True))

    def _read(self, places: NDArray[np.int64], rows: Sequence[int], *, kind: str, size: int) -> Seen:
        k, spec = self.store.spec.num_views, self.store.spec
        picture_V, rows_V = np.repeat(places, k), np.repeat(np.array(rows), k)
        numbers_V = np.tile(np.arange(k), len(rows))
        if kind == DENSE:
            grid = dict(zip(spec.sizes, spec.grids, strict=True))[size]
            _require_room(len(rows_V), grid, spec.teacher["dense_dim"], of=str(self.store.path))
        params: list[ViewParams] = []
        kept: list[Tensor] = []
        for i in range(0, len(rows_V), STORE_READ):
            part = slice(i, i + STORE_READ)
            features = self.store.read(rows_V[part].tolist(), numbers_V[part].tolist(), size=size)
            params += features.params
            values = features.dense if kind == DENSE else features.summary
            assert values is not None
            kept.append(torch.from_numpy(values).to(torch.float16 if kind == DENSE else torch.float32))
        tokens = torch.cat(kept)
        return Seen(picture_V, params, size, **{kind: tokens})


@dataclass(frozen=True)
class EncoderSubject:
    """A run's student or a teacher, loaded and run."""

    name: str
    spec: TeacherSpec
    weights: Path | None = None
    untrained: bool = False

    @property
    def kind(self) -> str:
        return "run" if self.spec.backend == "run" else "teacher"

    @property
    def patch(self) -> int:
        return self.spec.patch

    def size(self, wanted: int | None) -> int:
        """What the patch leaves of the size asked for; without one, the encoder's own."""
        return self.spec.native_size if wanted is None else max(1, wanted // self.patch) * self.patch

    def protocol(self, size: int) -> dict[str, object]:
        """What decides features, beside the pictures."""
        return {"size": size, "dtype": dtype_name(compute_dtype("auto", pick_device()))}

    def require(self, kind: str) -> None:
        """Raises: ConfigError if the encoder has no such tokens."""
        if kind == SUMMARY and self.spec.summary == "none":
            raise ConfigError(f"{self.name} has no summary; judge its dense tokens")

    def look(self, pictures: Pictures, *, kind: str, size: int, cut: Cut) -> Seen:
        """Run the encoder on the views that `cut` makes of every picture.

        Raises: CorpusError for a picture that cannot be read; TeacherError, RunError if it cannot be loaded.
        """
        self.require(kind)
        _require_room(len(pictures), self.spec.grid(size), self.spec.dense_dim if kind == DENSE else 0, of=self.name)
        if size not in self._teachers:
            self._teachers[size] = self._loaded(size)
        teacher = self._teachers[size]
        return _look(pictures, lambda views: teacher(torch.from_numpy(views)), kind=kind, size=size, cut=cut)

    @cached_property
    def _teachers(self) -> dict[int, Teacher]:
        """What is loaded, by size."""
        return {}

    def _loaded(self, size: int) -> Teacher:
        device = pick_device()
        dtype = compute_dtype("auto", device)
        if self.untrained and self.kind == "run":
            encoder = _as_before_training(Path(self.spec.model))
            return Teacher(self.spec, encoder.eval().requires_grad_(False).to(device), device, dtype)
        teacher = load_teacher(self.spec, weights=self.weights, device=device, dtype=dtype, sizes=(size,))
        if self.untrained:
            draw_anew(teacher.module)
        return teacher


@dataclass(frozen=True)
class PixelSubject:
    """No encoder at all: colours, reduced to some 4x4 of each patch."""

    name: str = PIXELS
    kind: str = PIXELS
    untrained: bool = False
    patch: int = PIXEL_PATCH

    def size(self, wanted: int | None) -> int:
        """What the patch leaves of the size asked for."""
        return max(1, (wanted or 224) // PIXEL_PATCH) * PIXEL_PATCH

    def protocol(self, size: int) -> dict[str, object]:
        """What decides features, beside the pictures."""
        return {"size": size, "shades": PIXEL_SHADES}

    def require(self, kind: str) -> None:
        """It has both kinds."""

    def look(self, pictures: Pictures, *, kind: str, size: int, cut: Cut) -> Seen:
        """Raises: CorpusError for a picture that cannot be read."""
        return _look(pictures, _pixel_tokens, kind=kind, size=size, cut=cut)


Subject = StoreSubject | EncoderSubject | PixelSubject


def result_of(
    subject: Subject,
    *,
    task: str,
    scores: dict[str, float],
    protocol: dict[str, Any],
    data: dict[str, Any],
    lower_is_better: bool = False,
) -> Result:
    """What a subject scored."""
    return Result(
        task=task,
        subject=subject.name,
        kind=subject.kind,
        untrained=subject.untrained,
        scores=scores,
        lower_is_better=lower_is_better,
        protocol=protocol,
        data=data,
    )


def open_subjects(words: Sequence[str], weights: Mapping[str, Path], *, untrained: bool = False) -> list[Subject]:
    """Each word as a store, a run, a teacher or `pixels`; no weights are loaded yet.

    Args:
        weights: local weights in place of the hub's, by the teacher's word.
        untrained: after every run and teacher, the same with random weights.
    Raises: ConfigError for none, one that is nothing of these, or weights for no teacher; StoreError, RunError for one
        that is damaged or unfinished.
    """
    if not words:
        raise ConfigError("nothing to judge: name at least one store, training run or teacher")
    opened: list[Subject] = []
    for word in words:
        subject = _open(word, weights.get(word))
        opened.append(subject)
        if untrained and isinstance(subject, EncoderSubject):
            opened.append(dataclasses.replace(subject, untrained=True))
    teachers = {subject.name for subject in opened if subject.kind == "teacher"}
    if misplaced := sorted(set(weights) - teachers):
        raise ConfigError(f"weights are given for {misplaced[0]}, which is no teacher among {', '.join(words)}")
    return opened


def _open(word: str, weights: Path | None) -> Subject:
    path, place = Path(word), Place.of(word)
    if word == PIXELS:
        return PixelSubject()
    if not place.is_local or place.exists("zarr.json"):
        return StoreSubject(word, open_store(place))
    if is_run(path) and not (path / CARD_FILE).is_file():
        raise RunError(f"run {path} has no student yet; finish it with `eupe train ... --resume`")
    try:
        return EncoderSubject(word, resolve_teacher(word), weights)
    except TeacherError as error:
        raise ConfigError(f"{word} is no store (no zarr.json), run or teacher: {error}") from error


def _look(pictures: Pictures, encode: Encode, *, kind: str, size: int, cut: Cut) -> Seen:
    places: list[int] = []
    params: list[ViewParams] = []
    kept: list[Tensor] = []
    waiting: list[NDArray[np.uint8]] = []

    def flush() -> None:
        tokens = encode(np.stack(waiting))
        values = tokens.dense if kind == DENSE else tokens.summary
        assert values is not None
        kept.append(values.to("cpu", torch.float16 if kind == DENSE else torch.float32))
        waiting.clear()

    for i, drawn, views in _rendered(pictures, size, cut):
        for how, view in zip(drawn, views, strict=True):
            places.append(i)
            params.append(how)
            waiting.append(view)
            if len(waiting) == BATCH:
                flush()
    if waiting:
        flush()
    return Seen(np.array(places), params, size, **{kind: torch.cat(kept)})


def _rendered(
    pictures: Pictures, size: int, cut: Cut
) -> Iterator[tuple[int, list[ViewParams], list[NDArray[np.uint8]]]]:
    def render(i: int) -> tuple[int, list[ViewParams], list[NDArray[np.uint8]]]:
        image = pictures.image(i)
        drawn = cut(image.width, image.height)
        return i, drawn, [render_view(image, how, size) for how in drawn]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from map_ahead(pool, render, range(len(pictures)), ahead=2 * BATCH)


def _pixel_tokens(views_u8_VSSC: NDArray[np.uint8]) -> Tokens:
    pixels = torch.from_numpy(views_u8_VSSC).permute(0, 3, 1, 2).float() / 255
    grid = pixels.shape[-1] // PIXEL_PATCH
    colours = F.adaptive_avg_pool2d(pixels, grid * PIXEL_SHADES)
    dense = F.unfold(colours, PIXEL_SHADES, stride=PIXEL_SHADES).transpose(1, 2).reshape(len(pixels), grid, grid, -1)
    return Tokens(summary=F.adaptive_avg_pool2d(pixels, PIXEL_PATCH).flatten(1), dense=dense)


def _as_before_training(run: Path) -> Encoder:
    """The student before its first step, if it was not initialised from another."""
    card = load_card(run)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(read_card(run).config["seed"])
        return build_encoder(card.arch, size=card.size)


def draw_anew(module: nn.Module) -> None:
    """Random weights, seed 0: as torch initialises its layers; vectors that belong to none are 1, tables small."""
    own = {id(p) for part in module.modules() if hasattr(part, "reset_parameters") for p in part.parameters(False)}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for part in module.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()  # type: ignore[operator]
        for parameter in module.parameters():
            if id(parameter) in own:
                continue
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.02)


def _require_room(num_views: int, grid: int, width: int, *, of: str) -> None:
    """Raises: ConfigError if the dense tokens of so many views do not fit the memory that is free."""
    wanted = num_views * grid * grid * width * 2
    free = free_bytes()
    if wanted > MEMORY_SHARE * free:
        raise ConfigError(
            f"the dense tokens of {num_views} views of {of} take {wanted / 1e9:.1f} GB, more than half of the "
            f"{free / 1e9:.1f} GB of memory that are free; give a smaller --size, or --limit"
        )


def free_bytes() -> int:
    """Memory of this machine that is free."""
    try:
        words = Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()
        return int(words[0]) * 1024
    except (OSError, IndexError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
