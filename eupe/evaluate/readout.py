"""A small readout, trained on frozen features, that looks where a question points.

Every word has a query of its own: softmax attention over the dense tokens returns what the word finds, and where. One
hidden layer maps three inputs to the answers of a question's kind: what its words brought, with weights for each
position in the question; the summary; and which words are seen in the picture at all:

    score of word v at token t = query_v . (key(x_t) + where(place_t))
    brought by v = the mean of (value(x_t), place_t) over t, weighted by softmax over t of the scores
    seen of v = log of the mean over t of exp(score) + rarity_v, a logit

A few hundred pictures are too few to learn from answers alone where to look. So words also learn to find themselves,
first as the only task, then together with the answers. The labels: a word is seen in a training picture if a question
about that picture uses it, and not seen otherwise.

Shapes: P pictures, T tokens of each, C components, B pictures of a batch, N questions, L positions of words in a
question, V words, K width of a query, R width of what a word brings, H width of the hidden layer, A answers of all
kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eupe.common.compute import pick_device
from eupe.errors import ConfigError, TrainingError
from eupe.evaluate.components import PLACE, Features
from eupe.evaluate.dense_probe import drawn
from eupe.train.trainer import learning_rate

WIDTH, HIDDEN = 64, 128
IMPOSSIBLE = -1e9
"""Logit of answers that belong to another kind of question."""
FINDING_SCALE = 1 / 12
"""Weight of the finding loss, in nats per picture, relative to the answer loss, in nats per question."""


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """The settings for training a readout."""

    steps: int = 600
    finding: float = 1 / 3
    """Share of the steps, at the start, in which words only learn to find themselves."""
    lr: float = 2e-3
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 1e-2
    dropout: float = 0.3
    """Dropout of components (each in all tokens of a picture), of the hidden layer and of the summary."""
    batch_size: int = 32
    """Pictures per batch, each with all its questions."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"--steps must be at least 1, got {self.steps}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"--dropout must be at least 0 and below 1, got {self.dropout:g}")


@dataclass(frozen=True)
class Asked:
    """Questions as numbers, without their answers."""

    picture_N: Tensor
    kind_N: Tensor
    words_NL: Tensor
    """Numbers of the words; -1 for an unknown word, and as padding after the last."""

    def pick(self, places: Tensor) -> Asked:
        """Return the questions at some places."""
        return Asked(self.picture_N[places], self.kind_N[places], self.words_NL[places])

    def __len__(self) -> int:
        return len(self.picture_N)


class Readout(nn.Module):
    """A module from tokens, summaries and questions to logits over all answers, and over words that may be seen."""

    def __init__(
        self, features: Features, *, num_words: int, num_places: int, answers_of_kind: Tensor, dropout: float
    ) -> None:
        """Set up the layers.

        Args:
            answers_of_kind: bool [kinds, A]; which answers occur for each kind of question.
        """
        super().__init__()
        width, summary_width = features.tokens_PTC.shape[-1], features.summary_PC.shape[-1]
        self.key = nn.Linear(width, WIDTH)
        self.where = nn.Linear(PLACE, WIDTH, bias=False)
        self.query_VK = nn.Parameter(torch.randn(num_words, WIDTH) / WIDTH**0.5)
        self.rarity_V = nn.Parameter(torch.zeros(num_words))
        self.value = nn.Linear(width, WIDTH)
        self.mixed = nn.Parameter(torch.randn(num_places, WIDTH + PLACE, HIDDEN) / (2 * WIDTH**0.5))
        self.of_kind = nn.Embedding(len(answers_of_kind), HIDDEN)
        self.summary = nn.Linear(summary_width, HIDDEN)
        self.seen = nn.Linear(num_words, HIDDEN)
        self.out = nn.Linear(HIDDEN, answers_of_kind.shape[1])
        self.drop = nn.Dropout(dropout)
        self.answers_of_kind = nn.Buffer(answers_of_kind)
        nn.init.zeros_(self.of_kind.weight)

    def forward(self, tokens_BTC: Tensor, summary_BC: Tensor, place_T5: Tensor, asked: Asked) -> tuple[Tensor, Tensor]:
        """Return answer logits [N, A] and seen-word logits [B, V]; `asked.picture_N` are places in the batch."""
        # one mask for all tokens of a picture: a component is dropped in all of them, or in none
        tokens = tokens_BTC * self.drop(torch.ones_like(tokens_BTC[:, :1]))
        scores_BVT = self.query_VK @ (self.key(tokens) + self.where(place_T5)).transpose(1, 2)
        seen_BV = scores_BVT.logsumexp(dim=2) - np.log(scores_BVT.shape[2]) + self.rarity_V
        look_BVT = scores_BVT.softmax(dim=2)
        # `value` is linear, so applied to the mean token it gives the mean value, at V products instead of T
        brought_BVR = torch.cat([self.value(look_BVT @ tokens), look_BVT @ place_T5], dim=2)
        known_NL = asked.words_NL >= 0
        said_NLR = brought_BVR[asked.picture_N[:, None], asked.words_NL.clamp(min=0)] * known_NL[:, :, None]
        of_picture_BH = self.summary(self.drop(summary_BC)) + self.seen(seen_BV.sigmoid())
        hidden_NH = torch.einsum("nlr,lrh->nh", said_NLR, self.mixed)
        hidden_NH = hidden_NH + self.of_kind(asked.kind_N) + of_picture_BH[asked.picture_N]
        logits_NA = self.out(self.drop(F.gelu(hidden_NH)))
        return logits_NA.masked_fill(~self.answers_of_kind[asked.kind_N], IMPOSSIBLE), seen_BV


def fit(
    features: Features,
    asked: Asked,
    answers_N: Tensor,
    answers_of_kind: Tensor,
    how: Fitting,
    *,
    num_words: int,
    on_step: Callable[[int], None] = lambda done: None,
) -> Readout:
    """Train a readout with AdamW on batches of pictures, drawn without replacement epoch by epoch.

    The result is deterministic on a CPU.

    Raises: TrainingError if the loss is not finite.
    """
    device = pick_device()
    # weights are drawn on the CPU, dropout on the device; the caller's random state stays as it was on both
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(how.seed)
        readout = Readout(
            features,
            num_words=num_words,
            num_places=asked.words_NL.shape[1],
            answers_of_kind=answers_of_kind,
            dropout=how.dropout,
        ).to(device)
        optimizer = torch.optim.AdamW(readout.parameters(), lr=how.lr, weight_decay=how.weight_decay)
        said_PV = _words_by_picture(asked, len(features.tokens_PTC), num_words)
        for step, pictures in enumerate(_drawn(_pictures(asked), how)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(
                    step, peak=how.lr, warmup_steps=round(how.warmup * how.steps), total_steps=how.steps
                )
            places, questions = _about(asked, pictures)
            logits, seen = _read(readout, features, pictures, questions)
            loss = finding_loss(seen, said_PV[pictures].to(device))
            if step >= how.finding * how.steps:
                loss = loss + F.cross_entropy(logits, answers_N[places].to(device))
            if not torch.isfinite(loss):
                raise TrainingError(f"the readout's loss is {loss.item()} at step {step}; its features may be damaged")
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            on_step(step + 1)
    return readout.eval()


def finding_loss(seen_BV: Tensor, said_BV: Tensor) -> Tensor:
    """Return the weighted finding loss: binary cross-entropy summed over words, averaged over pictures.

    Args:
        seen_BV: logits.
        said_BV: 1 for words that are asked about a picture, else 0.
    """
    each_BV = F.binary_cross_entropy_with_logits(seen_BV, said_BV, reduction="none")
    return FINDING_SCALE * each_BV.sum(dim=1).mean()


@torch.inference_mode()
def read(readout: Readout, features: Features, asked: Asked, *, batch_size: int) -> Tensor:
    """Return the answer logits of all questions, float32 [N, A], on the CPU."""
    logits_NA = torch.empty(len(asked), readout.answers_of_kind.shape[1])
    for pictures in torch.split(_pictures(asked), batch_size):
        places, questions = _about(asked, pictures)
        logits_NA[places] = _read(readout, features, pictures, questions)[0].cpu()
    return logits_NA


def _read(readout: Readout, features: Features, pictures: Tensor, questions: Asked) -> tuple[Tensor, Tensor]:
    device = readout.query_VK.device
    tokens, summary = (part[pictures].to(device) for part in (features.tokens_PTC, features.summary_PC))
    moved = Asked(*(part.to(device) for part in (questions.picture_N, questions.kind_N, questions.words_NL)))
    logits, seen = readout(tokens, summary, features.place_T5.to(device), moved)
    return logits, seen


def _pictures(asked: Asked) -> Tensor:
    return torch.tensor(sorted(set(asked.picture_N.tolist())))


def _about(asked: Asked, pictures: Tensor) -> tuple[Tensor, Asked]:
    """Return the places of the questions about these pictures, and the questions with `picture_N` within `pictures`."""
    matches = asked.picture_N[:, None] == pictures
    places, among = matches.nonzero(as_tuple=True)
    picked = asked.pick(places)
    return places, Asked(among, picked.kind_N, picked.words_NL)


def _words_by_picture(asked: Asked, num_pictures: int, num_words: int) -> Tensor:
    """Return which words are asked about each picture: float32 [P, V], 1 or 0."""
    said = torch.zeros(num_pictures, num_words)
    known = asked.words_NL >= 0
    said[asked.picture_N[:, None].expand_as(known)[known], asked.words_NL[known]] = 1
    return said


def _drawn(pictures: Tensor, how: Fitting) -> Iterator[Tensor]:
    for places in drawn(len(pictures), min(how.batch_size, len(pictures)), how.steps, seed=how.seed):
        yield pictures[torch.from_numpy(places)]
