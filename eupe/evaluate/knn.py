"""k-nearest-neighbour accuracy of summaries: from a store, or from a run on a labelled folder.

Each picture is classified by the summaries of all *other* pictures. Source of the protocol (k = 10, L2, majority vote):
EUPE, arXiv 2603.22387, evaluation; deviation: leave-one-picture-out instead of separate training and test sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from torch import Tensor

from eupe.corpus.decode import decode_image
from eupe.corpus.index import Corpus, open_corpus
from eupe.corpus.pictures import Inside, insides, read_picture
from eupe.corpus.views import ViewSpec, draw_view, render_view
from eupe.device import autocast, compute_dtype, pick_device
from eupe.encoder import CARD_FILE, Encoder, build_encoder, load_encoder, normalise
from eupe.errors import ConfigError, CorpusError
from eupe.evaluate.run import read_card
from eupe.place import Place, Where
from eupe.store import Store, open_store
from eupe.store.layout import SUMMARY

Metric = Literal["l2", "cosine"]
BATCH = 64


@dataclass(frozen=True)
class KnnReport:
    """Accuracies of one set of summaries."""

    source: str
    accuracy: float
    majority: float
    """Share of the commonest label: what guessing it would score."""
    untrained: float | None
    """For a run: the same student before its first step."""
    num_queries: int
    num_labels: int
    k: int


def knn(path: Where, *, corpus: Where | None = None, k: int = 10, metric: Metric = "l2") -> KnnReport:
    """k-NN accuracy of a store's summaries, or of a run's student on the pictures of `corpus`.

    Raises: StoreError, RunError, CorpusError; ConfigError if there are no labels, no summaries, or `k` is too large.
    """
    if metric not in ("l2", "cosine"):
        raise ConfigError(f"--metric {metric} is unknown; give l2 or cosine")
    run = Path(str(path))
    if (run / CARD_FILE).exists():
        if corpus is None:
            raise ConfigError(f"{path} is a run: give the labelled folder to judge it on with --corpus")
        encoder = load_encoder(run)
        labelled = _labelled(open_corpus(corpus))
        trained = embed(encoder, labelled)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(read_card(run).config["seed"])
            fresh = embed(build_encoder(encoder.card.arch, size=encoder.card.size), labelled)
        labels, keys = labelled.samples["label"].to_pylist(), labelled.samples["key"].to_pylist()
        return _report(str(path), trained, labels, keys, k, metric, untrained=fresh)
    if corpus is not None:
        raise ConfigError(f"{path} is no training run, and a store brings its own labels; leave --corpus out")
    summaries, labels, keys = stored_summaries(open_store(path))
    return _report(str(path), summaries, labels, keys, k, metric)


def _labelled(corpus: Corpus) -> Corpus:
    samples = corpus.samples.filter(pc.is_valid(corpus.samples["label"]))
    if not samples.num_rows:
        raise ConfigError(f"no picture of {corpus.root} has a label; put the pictures in one folder per class")
    return Corpus(corpus.root, samples)


def stored_summaries(store: Store) -> tuple[Tensor, list[str], list[str]]:
    """Summaries [N, D] of all labelled views of a store, with their labels and keys.

    Raises: ConfigError if the store has no summaries or no labels.
    """
    if SUMMARY not in store.spec.tokens:
        raise ConfigError(f"{store.path} holds no summaries; extract it with --tokens summary,dense")
    samples = store.valid.filter(pc.is_valid(store.valid["label"]))
    if not samples.num_rows:
        raise ConfigError(f"no sample of {store.path} has a label; its corpus has no class folders")
    k = store.spec.num_views
    rows, views = np.repeat(samples["row"].to_numpy(), k), np.tile(np.arange(k), samples.num_rows)
    batches = [
        store.read_summaries(rows[i : i + 4096].tolist(), views[i : i + 4096].tolist())
        for i in range(0, len(rows), 4096)
    ]
    summaries = torch.from_numpy(np.concatenate(batches)).float()
    labels = np.repeat(np.array(samples["label"].to_pylist(), dtype=object), k).tolist()
    keys = np.repeat(np.array(samples["key"].to_pylist(), dtype=object), k).tolist()
    return summaries, labels, keys


@torch.inference_mode()
def embed(encoder: Encoder, corpus: Corpus) -> Tensor:
    """Summaries [N, D] of the centre view of every picture, at the encoder's own size.

    Raises: CorpusError naming the first picture that cannot be read.
    """
    device = pick_device()
    encoder = encoder.to(device).eval()
    dtype = compute_dtype("auto", device)
    size = encoder.card.size
    keys: list[str] = corpus.samples["key"].to_pylist()
    places = insides(corpus.samples)
    out = []
    for start in range(0, len(keys), BATCH):
        batch = slice(start, start + BATCH)
        pictures = zip(keys[batch], places[batch], strict=True)
        views = np.stack([_centre_view(corpus.root, key, inside, size) for key, inside in pictures])
        pixels = normalise(torch.from_numpy(views).to(device), encoder.card.mean, encoder.card.std)
        with autocast(dtype, device):
            summary = encoder(pixels).summary
        assert summary is not None
        out.append(summary.float().cpu())
    return torch.cat(out)


def _centre_view(
    root: Place, key: str, inside: Inside | None, size: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    try:
        image = decode_image(read_picture(root, key, inside))
    except CorpusError as error:
        raise CorpusError(f"picture {key} of {root} cannot be read: {error}") from error
    return render_view(image, draw_view(ViewSpec(), key, 0, image.width, image.height), size)


def _report(
    source: str,
    summaries: Tensor,
    labels: Sequence[str],
    keys: Sequence[str],
    k: int,
    metric: Metric,
    *,
    untrained: Tensor | None = None,
) -> KnnReport:
    names, codes = np.unique(np.array(labels), return_inverse=True)
    groups = np.unique(np.array(keys), return_inverse=True)[1]
    most = int(np.unique(groups, return_counts=True)[1].max())
    if k < 1 or k > len(codes) - most:
        raise ConfigError(f"--k {k} does not fit {len(codes)} labelled views; give 1 to {len(codes) - most}")
    y, g = torch.from_numpy(codes), torch.from_numpy(groups)
    return KnnReport(
        source=source,
        accuracy=accuracy(summaries, y, g, k=k, metric=metric),
        majority=float(np.bincount(codes).max() / len(codes)),
        untrained=None if untrained is None else accuracy(untrained, y, g, k=k, metric=metric),
        num_queries=len(codes),
        num_labels=len(names),
        k=k,
    )


def accuracy(features_ND: Tensor, labels_N: Tensor, groups_N: Tensor, *, k: int, metric: Metric) -> float:
    """Share of rows whose k nearest rows of *other* groups vote for their label.

    A tie goes to the label whose votes rank nearer.
    """
    features = features_ND.double()
    if metric == "cosine":
        features = F.normalize(features, dim=1)
    correct = 0
    votes_for = F.one_hot(labels_N).double()
    nearness = torch.arange(k, 0, -1, dtype=torch.float64) / (2 * k * k)
    for start in range(0, len(features), 1024):
        rows = slice(start, start + 1024)
        distance = torch.cdist(features[rows], features)
        distance[groups_N[rows, None] == groups_N[None, :]] = torch.inf
        near = distance.topk(k, largest=False).indices
        votes = (votes_for[near] * (1 + nearness[None, :, None])).sum(dim=1)
        correct += int((votes.argmax(dim=1) == labels_N[rows]).sum())
    return correct / len(features)
