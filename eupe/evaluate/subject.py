"""Subjects of evaluations: a store's features as they are, a run's student, a teacher, or raw pixels for comparison.

Shapes: V views, h w cells of the dense grid, D width of a dense token, Ds width of a summary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from eupe.common.compute import Tokens, compute_dtype, dtype_name, pick_device
from eupe.common.kinds import STUDENT_FILE
from eupe.common.storage import StoragePath
from eupe.corpus.index import Corpus
from eupe.corpus.views import ViewParams
from eupe.errors import ConfigError, RunError, StoreError, TeacherError
from eupe.evaluate.encode import EncodedViews, encode_views, require_finite, room_for
from eupe.evaluate.feature_cache import FeatureCache
from eupe.evaluate.feature_key import CROPS, encoder_digest, views_key
from eupe.evaluate.judged_pictures import CropFunction, Pictures
from eupe.evaluate.open_run import is_run, read_run_spec
from eupe.evaluate.result import Result
from eupe.store import Store, open_store
from eupe.store.layout import DENSE, SUMMARY
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.spec import TeacherSpec
from eupe.teachers.teacher import Teacher, build_teacher, load_teacher, teacher_layers

PIXELS = "pixels"
PIXEL_PATCH = 16
PIXEL_SHADES = 4
"""A patch of raw pixels is reduced to 4x4 colours, a view to 16x16 for its summary."""
STORE_READ = 256


@dataclass(frozen=True)
class StoreSubject:
    """The cached features of a store: no model is run, and views are the stored ones."""

    name: str
    store: Store
    kind: str = "store"
    untrained: bool = False

    @property
    def patch(self) -> int:
        return int(self.store.spec.teacher["patch"])

    def size(self, wanted: int | None, *, usual: int | None = None) -> int:
        """Return the wanted size, or else the store's largest; `usual` has no effect.

        Raises: ConfigError if the store lacks the wanted size.
        """
        sizes = self.store.spec.sizes
        if wanted is not None and wanted not in sizes:
            raise ConfigError(
                f"{self.store.path} has no features at {wanted} px, only at {', '.join(map(str, sizes))}; leave --size "
                "out, or extract again"
            )
        return max(sizes) if wanted is None else wanted

    def protocol(self, size: int) -> dict[str, object]:
        """Return what decides the features, apart from the pictures."""
        return {"size": size, "views": self.store.spec.views["policy"], "num_views": self.store.spec.num_views}

    def require(self, kind: str) -> None:
        """Raise ConfigError if the store has no tokens of a kind."""
        if kind not in self.store.spec.tokens:
            raise ConfigError(f"{self.store.path} holds no {kind} tokens; extract it with --tokens summary,dense")

    def encode_views(
        self, pictures: Pictures, *, kinds: Sequence[str], size: int, crop: CropFunction, scratch: Path | None = None
    ) -> EncodedViews:
        """Read all stored views of the pictures, which are found by the hash of their content.

        Args:
            scratch: see `room_for`.
        Raises: StoreError naming a picture that the store has no features of; PartCorruptError.
        """
        for kind in kinds:
            self.require(kind)
        rows = [self._rows.get(pictures.sha256(i)) for i in range(len(pictures))]
        missing = [i for i, row in enumerate(rows) if row is None]
        if missing:
            raise StoreError(
                f"{self.store.path} has features of {len(pictures) - len(missing)} of the {len(pictures)} pictures of "
                f"{pictures.root}, but not of {pictures.keys[missing[0]]}; extract the rest into it, "
                "or evaluate its teacher"
            )
        found = [row for row in rows if row is not None]
        return self._read(np.arange(len(pictures)), found, kinds=kinds, size=size, scratch=scratch)

    def labelled(self) -> Corpus:
        """Return the store's own samples that have features.

        Raises: ConfigError if the store holds no summaries, or no sample has a label.
        """
        self.require(SUMMARY)
        samples = self.store.valid
        if samples["label"].null_count == len(samples):
            raise ConfigError(
                f"no sample of {self.store.path} has a label; its corpus has no class folders, so give --data"
            )
        return Corpus(self.store.path, samples)

    def summaries(self, keys: Sequence[str], *, size: int) -> EncodedViews:
        """Read the summaries of all views of some of the store's own samples."""
        rows = [self.places[key][0] for key in keys]
        return self._read(np.arange(len(rows)), rows, kinds=[SUMMARY], size=size, scratch=None)

    @cached_property
    def places(self) -> dict[str, tuple[int, str | None]]:
        """Return row and hash of every sample that has features, by key."""
        valid = self.store.valid.select(["key", "row", "sha256"]).to_pylist()
        return {sample["key"]: (sample["row"], sample["sha256"]) for sample in valid}

    @cached_property
    def _rows(self) -> dict[str, int]:
        valid = self.store.valid
        return dict(zip(valid["sha256"].to_pylist(), valid["row"].to_pylist(), strict=True))

    def _read(
        self, places: NDArray[np.int64], rows: Sequence[int], *, kinds: Sequence[str], size: int, scratch: Path | None
    ) -> EncodedViews:
        k, spec = self.store.spec.num_views, self.store.spec
        picture_V, rows_V = np.repeat(places, k), np.repeat(np.array(rows), k)
        numbers_V = np.tile(np.arange(k), len(rows))
        dense = None
        if DENSE in kinds:
            grid = dict(zip(spec.sizes, spec.grids, strict=True))[size]
            shape = (len(rows_V), grid, grid, spec.teacher["dense_dim"])
            dense = room_for(shape, scratch, of=str(self.store.path))
        params: list[ViewParams] = []
        summaries: list[Tensor] = []
        # a bounded read at a time, since the dense tokens of all views may not fit in memory
        for i in range(0, len(rows_V), STORE_READ):
            part = slice(i, i + STORE_READ)
            features = self.store.read(rows_V[part].tolist(), numbers_V[part].tolist(), size=size)
            params += features.params
            if SUMMARY in kinds:
                assert features.summary is not None
                summaries.append(require_finite(torch.from_numpy(features.summary).float(), str(self.store.path)))
            if dense is not None:
                assert features.dense is not None
                dense[part].copy_(torch.from_numpy(features.dense))
                require_finite(dense[part], str(self.store.path))
        return EncodedViews(picture_V, params, size, torch.cat(summaries) if summaries else None, dense)


@dataclass(frozen=True)
class EncoderSubject:
    """A run's student or a teacher, which is loaded when it is first used."""

    name: str
    spec: TeacherSpec
    weights: Path | None = None
    untrained: bool = False
    weights_key: str | None = None
    """Key of its tensors in a weights file of several models."""
    features: FeatureCache | None = field(default=None, repr=False, compare=False)
    """Tokens that are kept between evaluations; None to keep none."""
    layers: tuple[int, ...] = ()
    """Numbers of the layers whose maps are judged, side by side on the finest of their grids; none for the last map."""

    @property
    def kind(self) -> str:
        return "run" if self.spec.backend == "run" else "teacher"

    @property
    def patch(self) -> int:
        return self.spec.patch

    def size(self, wanted: int | None, *, usual: int | None = None) -> int:
        """Return the wanted size, or else the task's usual one, as whole patches; without both, the encoder's own."""
        asked = wanted or usual
        return self.spec.native_size if asked is None else max(1, asked // self.patch) * self.patch

    def protocol(self, size: int) -> dict[str, object]:
        """Return what decides the features, apart from the pictures."""
        said: dict[str, object] = {"size": size, "dtype": dtype_name(compute_dtype("auto", pick_device()))}
        return said | ({"layers": list(self.layers)} if self.layers else {})

    def require(self, kind: str) -> None:
        """Raise ConfigError if the encoder has no tokens of a kind."""
        if kind == SUMMARY and self.spec.summary == "none":
            raise ConfigError(f"{self.name} has no summary; evaluate its dense tokens")

    def encode_views(
        self, pictures: Pictures, *, kinds: Sequence[str], size: int, crop: CropFunction, scratch: Path | None = None
    ) -> EncodedViews:
        """Run the encoder once on the views that `crop` makes of every picture, unless their tokens are kept.

        Args:
            scratch: see `room_for`.
        Raises: CorpusError if a picture cannot be read; TeacherError, RunError if the encoder cannot be loaded.
        """
        for kind in kinds:
            self.require(kind)

        def run() -> EncodedViews:
            return encode_views(
                pictures,
                lambda views: self.encode(views, size=size),
                kinds=kinds,
                size=size,
                crop=crop,
                cells=self._cells(size),
                scratch=scratch,
                of=self.name,
            )

        if self.features is None or crop not in CROPS:
            return run()
        encoder = self._digest(size)
        return self.features.encoded_views(
            lambda: views_key(encoder, pictures, size=size, crop=crop),
            kinds,
            run,
            lambda shape: room_for(shape, scratch, of=self.name),
        )

    def encode(self, views_u8_VSSC: NDArray[np.uint8], *, size: int) -> Tokens:
        """Encode views, uint8 [B, S, S, 3]; the tokens stay on the encoder's device.

        Raises: TeacherError, RunError if the encoder cannot be loaded.
        """
        tokens = self._teacher(size)(torch.from_numpy(views_u8_VSSC), self.layers)
        if not self.layers:
            return tokens
        return replace(tokens, dense=side_by_side([tokens.layers[number] for number in self.layers]))

    def _cells(self, size: int) -> tuple[int, int]:
        """Return the cells along one side of the map that is judged, and its channels.

        Raises: ConfigError for a layer that the encoder lacks.
        """
        if not self.layers:
            return self.spec.grid(size), self.spec.dense_dim
        shapes = teacher_layers(self.spec, weights=self.weights)
        if lacking := sorted(set(self.layers) - set(range(1, len(shapes) + 1))):
            raise ConfigError(f"{self.name} has layers 1 to {len(shapes)}, not {lacking[0]}; give others with --layers")
        chosen = [shapes[number - 1] for number in self.layers]
        return size // min(shape.patch for shape in chosen), sum(shape.dim for shape in chosen)

    def _digest(self, size: int) -> str:
        if size not in self._digests:
            of = f" layers {self.layers}" if self.layers else ""
            self._digests[size] = encoder_digest(self._teacher(size)) + of
        return self._digests[size]

    @cached_property
    def _digests(self) -> dict[int, str]:
        """Return the digests of the encoders so far, by size; `_digest` fills it."""
        return {}

    def _teacher(self, size: int) -> Teacher:
        if size not in self._teachers:
            self._teachers[size] = self._loaded(size)
        return self._teachers[size]

    @cached_property
    def _teachers(self) -> dict[int, Teacher]:
        """Return the encoders loaded so far, by size; `_teacher` fills it."""
        return {}

    def _loaded(self, size: int) -> Teacher:
        device = pick_device()
        dtype = compute_dtype("auto", device)
        if not self.untrained:
            loaded = load_teacher(
                self.spec, weights=self.weights, key=self.weights_key, device=device, dtype=dtype, sizes=(size,)
            )
            return loaded.in_fastest_format()
        seed = read_run_spec(Path(self.spec.model)).config["seed"] if self.kind == "run" else 0
        teacher = build_teacher(self.spec, size=size, seed=seed)
        return Teacher(self.spec, teacher.module.to(device), device, dtype).in_fastest_format()


@dataclass(frozen=True)
class PixelSubject:
    """A baseline without an encoder: the colours of each patch, reduced to 4x4."""

    name: str = PIXELS
    kind: str = PIXELS
    untrained: bool = False
    patch: int = PIXEL_PATCH

    def size(self, wanted: int | None, *, usual: int | None = None) -> int:
        """Return the wanted size, or else the task's usual one or 224, as whole patches."""
        return max(1, (wanted or usual or 224) // PIXEL_PATCH) * PIXEL_PATCH

    def protocol(self, size: int) -> dict[str, object]:
        """Return what decides the features, apart from the pictures."""
        return {"size": size, "shades": PIXEL_SHADES}

    def require(self, kind: str) -> None:
        """Accept any kind of token: pixels have both."""

    def encode_views(
        self, pictures: Pictures, *, kinds: Sequence[str], size: int, crop: CropFunction, scratch: Path | None = None
    ) -> EncodedViews:
        """Compute tokens of the views that `crop` makes of every picture.

        Raises: CorpusError if a picture cannot be read.
        """
        cells = (size // PIXEL_PATCH, 3 * PIXEL_SHADES**2)
        return encode_views(
            pictures,
            lambda views: self.encode(views, size=size),
            kinds=kinds,
            size=size,
            crop=crop,
            cells=cells,
            scratch=scratch,
            of=self.name,
        )

    def encode(self, views_u8_VSSC: NDArray[np.uint8], *, size: int) -> Tokens:
        """Return the colours of patches as dense tokens, and of whole views as summaries; views: uint8 [B, S, S, 3]."""
        pixels = torch.from_numpy(views_u8_VSSC).permute(0, 3, 1, 2).float() / 255
        grid = size // PIXEL_PATCH
        colours = F.adaptive_avg_pool2d(pixels, grid * PIXEL_SHADES)
        patches = F.unfold(colours, PIXEL_SHADES, stride=PIXEL_SHADES).transpose(1, 2)
        summary = F.adaptive_avg_pool2d(pixels, PIXEL_PATCH).flatten(1)
        return Tokens(summary=summary, dense=patches.reshape(len(pixels), grid, grid, -1))


Subject = StoreSubject | EncoderSubject | PixelSubject


def side_by_side(maps_BhwD: Sequence[Tensor]) -> Tensor:
    """Return several maps as one [B, h, w, sum of D] on the finest of their grids; coarser ones are interpolated.

    Source: the linear probes of DINOv2 (arXiv 2304.07193) on the concatenated tokens of several layers.
    """
    side = max(each.shape[1] for each in maps_BhwD)
    alike = [
        each
        if each.shape[1] == side
        else F.interpolate(each.permute(0, 3, 1, 2), size=(side, side), mode="bilinear").permute(0, 2, 3, 1)
        for each in maps_BhwD
    ]
    return torch.cat(alike, dim=-1)


def require_one_view(subject: Subject, encoded: EncodedViews, pictures: Pictures, *, views: str) -> None:
    """Raise StoreError if a store holds several views of each picture; the message names the `--views` to use."""
    if len(encoded) != len(pictures):
        raise StoreError(f"{subject.name} holds several views of each picture; extract one with --views {views}")


def result_of(
    subject: Subject,
    *,
    task: str,
    scores: dict[str, float],
    protocol: dict[str, Any],
    data: dict[str, Any],
    lower_is_better: bool = False,
    notes: Sequence[str] = (),
) -> Result:
    """Build the result of a subject."""
    return Result(
        task=task,
        subject=subject.name,
        kind=subject.kind,
        untrained=subject.untrained,
        scores=scores,
        lower_is_better=lower_is_better,
        protocol=protocol,
        data=data,
        notes=list(notes),
    )


def open_subjects(
    words: Sequence[str],
    weights: Mapping[str, Path],
    *,
    keys: Mapping[str, str] | None = None,
    untrained: bool = False,
    features: FeatureCache | None = None,
    layers: tuple[int, ...] = (),
) -> list[Subject]:
    """Open each word as a store, a run, a teacher or `pixels`; no weights are loaded yet.

    Args:
        weights: local weights to use instead of the hub's, by the teacher's word.
        keys: key of a teacher's tensors in a weights file of several models, by the same word.
        untrained: add the same with random weights after every run and teacher.
        features: tokens of runs and teachers that are kept between evaluations.
        layers: see `EncoderSubject.layers`.
    Raises: ConfigError if there is no word, one is none of these, weights are not for a teacher, or layers are asked of
        a store; StoreError or
        RunError if a store or run is damaged or unfinished.
    """
    if not words:
        raise ConfigError("name at least one store, training run or teacher")
    if homeless := sorted(set(keys or {}) - set(weights)):
        raise ConfigError(f"--weights-key is given for {homeless[0]}, which has no --weights")
    opened: list[Subject] = []
    for word in words:
        subject = _open(word, weights.get(word), (keys or {}).get(word), features)
        if layers and isinstance(subject, StoreSubject):
            raise ConfigError(f"--layers chooses among the maps of an encoder, and {word} is a store; give its teacher")
        if layers and isinstance(subject, EncoderSubject):
            subject = replace(subject, layers=layers)
        opened.append(subject)
        if untrained and isinstance(subject, EncoderSubject):
            opened.append(replace(subject, untrained=True))
    teachers = {subject.name for subject in opened if subject.kind == "teacher"}
    if misplaced := sorted(set(weights) - teachers):
        raise ConfigError(f"weights are given for {misplaced[0]}, which is not a teacher among {', '.join(words)}")
    return opened


def _open(word: str, weights: Path | None, key: str | None, features: FeatureCache | None) -> Subject:
    path, place = Path(word), StoragePath.of(word)
    if word == PIXELS:
        return PixelSubject()
    if not place.is_local or place.exists("zarr.json"):  # only stores can be in a bucket
        store = open_store(place)
        store.require_finished()
        return StoreSubject(word, store)
    if is_run(path) and not (path / STUDENT_FILE).is_file():
        raise RunError(f"run {path} has no student yet; finish it with `eupe train ... --resume`")
    try:
        return EncoderSubject(word, resolve_teacher(word, weights), weights, weights_key=key, features=features)
    except TeacherError as error:
        if "/" in word and not path.exists():
            raise ConfigError(str(error)) from error
        raise ConfigError(f"{word} is not a store (no zarr.json), a run or a teacher: {error}") from error
