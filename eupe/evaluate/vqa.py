"""A probe of what features say about a picture, by questions in words. It is not a language model or a VQA benchmark.

One small readout (`readout.py`) for all kinds of question (colour, count, position, text, ...) is trained on the frozen
features and the questions of the training split. Its vocabulary is the words of that split, as numbers without any
pretraining. The dropout is chosen on a tenth of the training pictures; then the readout is trained on all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eupe.errors import ConfigError
from eupe.evaluate.components import COMPONENTS, Features, as_features
from eupe.evaluate.encode import MEMORY_SHARE, free_bytes
from eupe.evaluate.judged_pictures import Pictures, whole
from eupe.evaluate.layouts import Question, question_set, question_words
from eupe.evaluate.linear import TUNING_SHARE
from eupe.evaluate.readout import Asked, Fitting, fit, read
from eupe.evaluate.result import Result
from eupe.evaluate.subject import Subject, require_one_view, result_of
from eupe.store.layout import DENSE, SUMMARY
from eupe.train.targets import is_held_out

SIZE = 224
FITTING = Fitting()
DROPOUTS = (0.3, 0.5)


def vqa(
    subject: Subject,
    *,
    data: Path,
    fitting: Fitting = FITTING,
    dropouts: tuple[float, ...] = DROPOUTS,
    size: int | None = None,
    on_step: Callable[[int, int], None] = lambda done, of: None,
) -> Result:
    """Measure the probe's accuracy by kind of question, and the mean over kinds.

    The baseline (`majority`) is the commonest answer to the same question.

    Args:
        dropouts: candidates in place of the fitting's dropout; the best on the tuning share is used.
    Raises: ConfigError if a dropout is out of range, the features do not fit in memory, or there are too few pictures
        to choose a dropout on; CorpusError, RunError, TeacherError, TrainingError; StoreError for a store with several
        views of each picture.
    """
    fittings = [replace(fitting, dropout=dropout) for dropout in dropouts]
    pictures, questions = question_set(data)
    train, val = ([each for each in questions if each.split == split] for split in ("train", "val"))
    tuning = torch.tensor([is_held_out(pictures.keys[each.picture], TUNING_SHARE) for each in train])
    _require_tuning(tuning, dropouts)
    chosen = subject.size(size, usual=SIZE)
    features = _features(subject, pictures, chosen, sorted({each.picture for each in train}))
    best, said = answers(features, train, val, tuning, fittings, on_step=on_step)
    right = _by_kind(said, val)
    commonest = _by_kind(commonest_answers(train, val), val)
    return result_of(
        subject,
        task="vqa",
        scores={
            "accuracy": float(np.mean(list(right.values()))),
            "majority": float(np.mean(list(commonest.values()))),
            **right,
            **{f"{kind}_majority": share for kind, share in commonest.items()},
            "dropout": best.dropout,
        },
        protocol={
            **subject.protocol(chosen),
            "probe": "a readout that looks where the question's words point",
            "components": COMPONENTS,
            **{name: value for name, value in asdict(fitting).items() if name != "dropout"},
            "dropouts": list(dropouts),
        },
        data={
            "path": str(data),
            "pictures": len(pictures),
            "train": dict(Counter(each.kind for each in train)),
            "val": dict(Counter(each.kind for each in val)),
        },
    )


def answers(
    features: Features,
    train: Sequence[Question],
    val: Sequence[Question],
    tuning_N: Tensor,
    fittings: Sequence[Fitting],
    *,
    on_step: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[Fitting, list[str]]:
    """Choose a fitting, train on `train` with it, and answer each question of `val`.

    Args:
        tuning_N: bool; questions of `train` that the fitting is chosen on.
    Returns: the chosen fitting, and the answers.
    """
    words, places = _vocabulary(train)
    kinds = sorted({each.kind for each in train})
    known = sorted({(each.kind, each.answer) for each in train})
    of_kind = torch.tensor([[kind == each for each, _ in known] for kind in kinds])
    codes_N = torch.tensor([known.index((each.kind, each.answer)) for each in train])
    asked, judged = (_asked(part, kinds, words, places) for part in (train, val))
    total = sum(each.steps for each in fittings) * (len(fittings) > 1) + fittings[0].steps
    done = 0

    def fitted(part: Tensor, how: Fitting, judge: Asked) -> Tensor:
        nonlocal done
        before = done
        readout = fit(
            features,
            asked.pick(part),
            codes_N[part],
            of_kind,
            how,
            num_words=len(words),
            on_step=lambda step: on_step(before + step, total),
        )
        done += how.steps
        return read(readout, features, judge, batch_size=how.batch_size)

    best = fittings[0]
    if len(fittings) > 1:
        learnt, kept = (~tuning_N).nonzero()[:, 0], tuning_N.nonzero()[:, 0]
        wrong = [
            _unlikeliness(fitted(learnt, each, asked.pick(kept)), codes_N[kept], asked.kind_N[kept])
            for each in fittings
        ]
        best = fittings[int(np.argmin(wrong))]
    logits_MA = fitted(torch.arange(len(train)), best, judged)
    return best, [known[i][1] for i in logits_MA.argmax(dim=1).tolist()]


def _unlikeliness(logits_NA: Tensor, codes_N: Tensor, kind_N: Tensor) -> float:
    """Return the cross-entropy, averaged within each kind, then over kinds.

    With few pictures, accuracies would be too noisy to choose by.
    """
    losses = F.cross_entropy(logits_NA, codes_N, reduction="none")
    return float(torch.stack([losses[kind_N == kind].mean() for kind in set(kind_N.tolist())]).mean())


def _vocabulary(train: Sequence[Question]) -> tuple[Mapping[str, int], int]:
    """Return the numbers of the questions' words, and the number of words in the longest question."""
    said = [question_words(each.question) for each in train]
    return {word: i for i, word in enumerate(sorted({w for each in said for w in each}))}, max(map(len, said))


def _asked(questions: Sequence[Question], kinds: Sequence[str], words: Mapping[str, int], places: int) -> Asked:
    words_NL = torch.full((len(questions), places), -1)
    for row, each in zip(words_NL, questions, strict=True):
        said = question_words(each.question)[:places]
        row[: len(said)] = torch.tensor([words.get(word, -1) for word in said])
    return Asked(
        torch.tensor([each.picture for each in questions]),
        torch.tensor([kinds.index(each.kind) for each in questions]),
        words_NL,
    )


def commonest_answers(train: Sequence[Question], val: Sequence[Question]) -> list[str]:
    """Return the commonest training answer to each question of `val`, or to its kind if it was never asked.

    Ties go to the first in alphabetical order.
    """
    of_question: dict[tuple[str, str], Counter[str]] = {}
    of_kind: dict[str, Counter[str]] = {}
    for each in train:
        of_question.setdefault((each.kind, each.question), Counter())[each.answer] += 1
        of_kind.setdefault(each.kind, Counter())[each.answer] += 1

    def commonest(counts: Counter[str]) -> str:
        return min(counts, key=lambda answer: (-counts[answer], answer))

    return [commonest(of_question.get((each.kind, each.question), of_kind[each.kind])) for each in val]


def _features(subject: Subject, pictures: Pictures, size: int, learnt_from: Sequence[int]) -> Features:
    encoded = subject.encode_views(pictures, kinds=[SUMMARY, DENSE], size=size, crop=whole)
    summary, dense = encoded.summary, encoded.dense
    assert summary is not None and dense is not None
    require_one_view(subject, encoded, pictures, views="squash")
    _require_room(dense)
    return as_features(summary, dense, learnt_from)


def _by_kind(said: Sequence[str], val: Sequence[Question]) -> dict[str, float]:
    """Return the share of right answers, by kind of question."""
    right: dict[str, list[bool]] = {kind: [] for kind in sorted({each.kind for each in val})}
    for word, each in zip(said, val, strict=True):
        right[each.kind].append(word == each.answer)
    return {kind: float(np.mean(each)) for kind, each in right.items()}


def _require_tuning(tuning_N: Tensor, dropouts: Sequence[float]) -> None:
    """Raise ConfigError if there is no dropout to choose, or there are no pictures to choose it on."""
    if not dropouts:
        raise ConfigError("there is no --dropout to train with; give at least one")
    if len(dropouts) > 1 and (not tuning_N.any() or tuning_N.all()):
        raise ConfigError("there are too few pictures to choose a dropout on; give one --dropout")


def _require_room(dense_PhwD: Tensor) -> None:
    """Raise ConfigError if the tokens' components do not fit in the free memory twice."""
    tokens, width = dense_PhwD[..., 0].numel(), min(COMPONENTS, dense_PhwD.shape[-1])
    # float32, twice: `components` holds its parts while it concatenates them
    wanted, free = 2 * 4 * tokens * width, free_bytes()
    if wanted > MEMORY_SHARE * free:
        raise ConfigError(
            f"the features of {len(dense_PhwD)} pictures take {wanted / 1e9:.1f} GB to be read out, more than "
            f"{MEMORY_SHARE:.0%} of the {free / 1e9:.1f} GB of free memory; give a smaller --size, or ask "
            "about fewer pictures"
        )
