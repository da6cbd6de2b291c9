"""Pictures, the features that models of any kind have of them, and these features as colours and as cosines.

Shapes: P pictures, S pixels along a side, h w cells, N = h*w cells of one map, D channels, K channels kept, C = 3
colours, or 4 where background is transparent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from eupe.common.storage import StoragePath
from eupe.corpus.index import Corpus
from eupe.corpus.pictures import Inside, insides
from eupe.corpus.views import ViewParams, render_view
from eupe.errors import ConfigError, CorpusError
from eupe.evaluate.encode import BATCH, encoded
from eupe.evaluate.judged_pictures import Pictures, centre
from eupe.evaluate.open_run import not_learned
from eupe.evaluate.subject import EncoderSubject, PixelSubject, StoreSubject, Subject
from eupe.models.encoder_spec import load_encoder_spec
from eupe.models.pca import Maps, find_foreground, fit_pca, leading_directions
from eupe.store import Features

SHOWN_PX = 320
"""Side of the views on the page."""
MIN_TOKENS = 16
"""Fewer tokens than this are outliers, not the foreground or the background of pictures."""
MAX_TEXT_BYTES = 4_000_000
"""Most bytes of features in one page, as base64."""
MAX_KEPT = 128
MIN_KEPT = 32
"""Fewer channels than this would say little about the model."""


@dataclass(frozen=True)
class Picture:
    """A picture that may be shown."""

    key: str
    label: str | None
    sha256: str | None
    held_out: bool
    inside: Inside | None = None
    """Position of its bytes in a tar or table; None if it is a separate file."""


@dataclass(frozen=True)
class View:
    """The part of a picture that all models see."""

    picture: Picture
    image: Image.Image
    params: ViewParams

    def cell(self, side_px: int) -> PictureCell:
        """Return the first cell of the picture's row."""
        return PictureCell(self.picture.key, self.picture.label, self.picture.held_out, self.render(side_px))

    def render(self, size: int) -> NDArray[np.uint8]:
        """Return the view as `size` x `size` pixels, uint8 [S, S, 3]."""
        return render_view(self.image, self.params, size)


@dataclass(frozen=True)
class PictureCell:
    """The first cell of a row."""

    key: str
    label: str | None
    held_out: bool
    pixels: NDArray[np.uint8]
    """[S, S, 3]: the view that all models saw."""


@dataclass(frozen=True)
class Colours:
    """A model's maps of all pictures."""

    maps_PhwC: NDArray[np.uint8]
    explained: tuple[float, float, float]
    """Shares of variance that red, green and blue show, of the tokens in colour."""
    foreground: float | None
    """Share of the tokens that are in colour; None if all are."""
    note: str
    """Reason why there is no foreground although it was requested; else empty."""

    @property
    def shares(self) -> str:
        """Return the explained shares in words, in percent."""
        return "+".join(f"{100 * share:.0f}" for share in self.explained)


@dataclass(frozen=True)
class ModelColumn:
    """A column: a model, and its features of every picture."""

    name: str
    kind: str
    """store, run, teacher or pixels."""
    about: str
    """Teacher of a store or architecture of a run; else empty."""
    size: int
    dense_PhwD: NDArray[np.float32]
    colours: Colours

    @property
    def grid(self) -> int:
        """Return the number of cells along a side."""
        return int(self.dense_PhwD.shape[1])

    @property
    def dim(self) -> int:
        """Return the number of channels of a token."""
        return int(self.dense_PhwD.shape[-1])


Stored = Sequence[tuple[StoreSubject, Features]]
"""Each store, with its features of the chosen pictures."""


@dataclass(frozen=True)
class Embedding:
    """A model's features, reduced to K channels of 8 bits, with the errors that this causes in their cosines."""

    codes_PNK: NDArray[np.int8]
    largest_error: float
    """Largest difference of the codes' cosines from the features', over all pairs of patches of a picture."""
    mean_error: float
    """Mean of these differences."""

    @property
    def num_channels(self) -> int:
        """Return the number of channels kept."""
        return int(self.codes_PNK.shape[-1])


def choose_pictures(pictures: Sequence[Picture], limit: int) -> list[Picture]:
    """Choose held-out pictures first, then the others; within each group, one of each label in turn."""
    held_out_first = sorted(pictures, key=lambda picture: not picture.held_out)
    seen: Counter[str | None] = Counter()
    ranked = []
    for picture in held_out_first:
        ranked.append((not picture.held_out, seen[picture.label], picture))
        seen[picture.label] += 1
    return [picture for *_, picture in sorted(ranked, key=lambda rank: rank[:2])][:limit]


def list_pictures(corpus: Corpus, stores: Sequence[StoreSubject], runs: Sequence[Path]) -> list[Picture]:
    """Return the pictures that every store has features of; those that no run was trained on are held out.

    Raises: ConfigError if there is none.
    """
    rows = corpus.samples.select(["key", "label", "sha256"]).to_pylist()
    for row, inside in zip(rows, insides(corpus.samples), strict=True):
        row["inside"] = inside
    for subject in stores:
        found = [row for row in rows if row["key"] in subject.places]
        if not found:
            raise ConfigError(
                f"store {subject.store.path} has no features of any of the {len(rows)} pictures of {corpus.root} "
                f"that could be shown (one is {rows[0]['key']}; the store has {next(iter(subject.places), 'none')}); "
                "give --images the pictures that every store was extracted from"
            )
        rows = found
    return [Picture(**row, held_out=held) for row, held in zip(rows, not_learned(rows, runs), strict=True)]


def open_views(root: StoragePath, pictures: Sequence[Picture], cached: Stored = ()) -> list[View]:
    """Return view 0 of each picture in the stores, which must agree on it; without stores, the centre crop.

    Raises: ConfigError if two stores hold different views; CorpusError naming a picture that cannot be read.
    """
    opened = Pictures(root, tuple(picture.key for picture in pictures), tuple(picture.inside for picture in pictures))
    images = [opened.image(i) for i in range(len(pictures))]
    if cached:
        _require_same_views(pictures, cached)
        drawn = cached[0][1].params
    else:
        drawn = [centre(*image.size)[0] for image in images]
    return [View(*view) for view in zip(pictures, images, drawn, strict=True)]


def _require_same_views(pictures: Sequence[Picture], cached: Stored) -> None:
    first, expected = cached[0]
    for other, got in cached[1:]:
        if (i := expected.first_difference(got)) is not None:
            raise ConfigError(
                f"{first.store.path} and {other.store.path} hold different views of {pictures[i].key}, so they cannot "
                "be compared; extract both with the same --views, --photometric and --seed"
            )


def stored(subject: StoreSubject, pictures: Sequence[Picture], *, size: int | None = None) -> Features:
    """Read view 0 of each picture at the given size, or else the store's largest.

    Raises: ConfigError if the store lacks the size; CorpusError if a picture is not the one that the store's teacher
        saw; PartCorruptError.
    """
    for picture in pictures:
        if subject.places[picture.key][1] != picture.sha256:
            raise CorpusError(
                f"picture {picture.key} is not the file whose features {subject.store.path} holds; "
                "give --images the pictures that it was extracted from, or extract again"
            )
    rows = [subject.places[picture.key][0] for picture in pictures]
    return subject.store.read(rows, [0] * len(rows), size=subject.size(size))


def dense_of(
    subject: EncoderSubject | PixelSubject, views: Sequence[View], *, size: int | None = None
) -> NDArray[np.float32]:
    """Return dense tokens [P, h, w, D] at the given size, or else the subject's own.

    Raises: TeacherError, RunError if the subject cannot be loaded.
    """
    size = subject.size(size)
    parts = (views[i : i + BATCH] for i in range(0, len(views), BATCH))
    tokens = [
        encoded(
            partial(subject.encode, size=size),
            np.stack([view.render(size) for view in part]),
            of=subject.name,
        ).dense.cpu()
        for part in parts
    ]
    dense: NDArray[np.float32] = torch.cat(tokens).float().numpy()
    return dense


def run_of(subject: Subject) -> Path | None:
    """Return the subject's training run, if it is one, trained or not."""
    return Path(subject.spec.model) if isinstance(subject, EncoderSubject) and subject.kind == "run" else None


def with_short_names(subjects: Sequence[Subject]) -> list[Subject]:
    """Replace the path of each store and run by its last part, if that is unambiguous; say which are untrained."""
    short = [Path(each.name).name if isinstance(each, StoreSubject) or run_of(each) else each.name for each in subjects]
    unique = Counter((name, each.untrained) for each, name in zip(subjects, short, strict=True))
    named = []
    for each, name in zip(subjects, short, strict=True):
        chosen = name if unique[name, each.untrained] == 1 else each.name
        named.append(replace(each, name=f"{chosen}, untrained" if each.untrained else chosen))
    return named


def model_column(
    subject: Subject,
    views: Sequence[View],
    cached: Features | None = None,
    *,
    size: int | None = None,
    foreground: bool = False,
) -> ModelColumn:
    """Build a model's column: its features at the given size, or else its own, and their colours.

    Raises: ConfigError if features are not all finite.
    """
    about = ""
    if isinstance(subject, StoreSubject):
        assert cached is not None and cached.dense is not None
        dense = cached.dense.astype(np.float32)
        about = str(subject.store.spec.teacher["name"])
    else:
        dense = dense_of(subject, views, size=size)
        if run := run_of(subject):
            about = load_encoder_spec(run).arch
    if not np.isfinite(dense).all():
        raise ConfigError(f"{subject.name} gives features that are not finite, which have no colours; leave it out")
    colours = colour_maps(dense, foreground=foreground)
    return ModelColumn(subject.name, subject.kind, about, subject.size(size), dense, colours)


def colour_maps(dense_PhwD: Maps, *, foreground: bool) -> Colours:
    """Show three principal components as red, green and blue, fitted to all tokens or to the foreground only.

    Args:
        foreground: make the background transparent; if it cannot be found, all tokens are in colour and the note says
            why.
    """
    mask_Phw = find_foreground(dense_PhwD) if foreground else None
    note = "" if mask_Phw is None else _complaint(mask_Phw)
    chosen = dense_PhwD if mask_Phw is None or note else dense_PhwD[mask_Phw][None, None]
    pca = fit_pca(chosen)
    red, green, blue = map(float, pca.explained_C)
    maps_Phw3 = pca.rgb(dense_PhwD)
    if mask_Phw is None or note:
        return Colours(maps_Phw3, (red, green, blue), None, note)
    alpha_Phw1 = np.where(mask_Phw, 255, 0).astype(np.uint8)[..., None]
    return Colours(np.concatenate([maps_Phw3, alpha_Phw1], axis=-1), (red, green, blue), float(mask_Phw.mean()), note)


def _complaint(mask_Phw: NDArray[np.bool_]) -> str:
    """Return why a mask is not a usable foreground; empty if it is."""
    if not mask_Phw.any():
        return "no foreground: all its tokens are alike"
    apart = int(min(mask_Phw.sum(), (~mask_Phw).sum()))
    if apart >= MIN_TOKENS:
        return ""
    return f"no foreground: its first component sets {apart} of {mask_Phw.size} tokens apart, fewer than {MIN_TOKENS}"


def channels_to_keep(num_tokens: int) -> int | None:
    """Return how many channels of each token to keep so that all tokens fit in a page; None if too few to be useful."""
    fitting = MAX_TEXT_BYTES * 3 // 4 // num_tokens  # base64 takes 4 bytes for 3
    return min(fitting, MAX_KEPT) if fitting >= MIN_KEPT else None


def embed(dense_PhwD: Maps, kept: int) -> Embedding:
    """Reduce features so that their cosines change little.

    Tokens are scaled to length 1 and projected onto the `kept` directions along which they are largest, which preserves
    their inner products best. The mean is not subtracted, as it would change the cosines. Each token is then rounded to
    8 bits at its own scale, which cosines do not depend on.
    """
    num_pictures, dim = dense_PhwD.shape[0], dense_PhwD.shape[-1]
    unit_PND = _unit(dense_PhwD.reshape(num_pictures, -1, dim).astype(np.float64))
    _, directions_DK = leading_directions(unit_PND.reshape(-1, dim), min(kept, dim))
    reduced_PNK = unit_PND @ directions_DK
    largest_PN1 = np.abs(reduced_PNK).max(axis=-1, keepdims=True)
    codes_PNK = np.round(reduced_PNK / np.where(largest_PN1 > 0, largest_PN1, 1.0) * 127).astype(np.int8)
    errors = [_cosine_errors(*pair) for pair in zip(codes_PNK, unit_PND, strict=True)]
    largest, means = zip(*errors, strict=True)
    return Embedding(codes_PNK, max(largest), sum(means) / num_pictures)


def _cosine_errors(codes_NK: NDArray[np.int8], unit_ND: NDArray[np.float64]) -> tuple[float, float]:
    """Return the largest and the mean difference of cosines in one picture."""
    rounded_NK = _unit(codes_NK.astype(np.float64))
    errors_NN = np.abs(rounded_NK @ rounded_NK.T - unit_ND @ unit_ND.T)
    return float(errors_NN.max()), float(errors_NN.mean())


def _unit(tokens: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scale tokens to length 1; a token of zeros stays zero, and its cosine with any other is 0."""
    lengths = np.linalg.norm(tokens, axis=-1, keepdims=True)
    return tokens / np.where(lengths > 0, lengths, 1.0)
