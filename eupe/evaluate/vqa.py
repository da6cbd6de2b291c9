"""A probe of what features say about a picture, asked in words. It is no language model and no VQA benchmark.

Per kind of question (colour, count, position, text, ...) one logistic regression, on frozen features, over the answers
of the training split. A picture is its summary and its dense tokens pooled to 4x4, standardised. A question is the
words at their places ("mug" in fifth place), and the classifier sees every feature times every such word:

    logits = sum over the words at their places of W[place, word] (x, 1)

so questions share what they have in common: "what colour is the mug" and "what colour is the ball" all but one of
their matrices, and "is the mug left of the ball" adds up what was learnt of mugs in third place and of balls in
seventh. One classifier for each question would be simpler still, but has too few pictures of each pair of things; bags
of words without places cannot tell what is left of what. The products are never formed: the penalised problem has the
same solution over a Cholesky factor of their Gram matrix, which has as many columns as there are questions.

Shapes: P pictures, F features, N questions that are learnt from, M that are judged, V words at places.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eupe.errors import ConfigError, StoreError
from eupe.evaluate.layouts import Question, question_set, question_words
from eupe.evaluate.linear import TUNING_SHARE, choose_penalty, fit_logistic
from eupe.evaluate.pictures import Pictures, whole
from eupe.evaluate.result import Result
from eupe.evaluate.seen import MEMORY_SHARE, Seen, free_bytes
from eupe.evaluate.subject import StoreSubject, Subject, result_of
from eupe.store.layout import DENSE, SUMMARY
from eupe.train.targets import is_held_out

SIZE = 224
GRID = 4
PENALTIES = tuple(10.0**power for power in range(-5, 1))
JITTER = 1e-10
"""Added to the diagonal of the Gram matrix, which questions that resemble each other leave singular."""
POOLED = 256
"""Pictures whose dense tokens are pooled at a time."""


def vqa(
    subject: Subject,
    *,
    data: Path,
    penalties: tuple[float, ...] = PENALTIES,
    size: int | None = None,
    on_step: Callable[[int, int], None] = lambda done, of: None,
) -> Result:
    """Accuracy of the probe by kind of question and their mean, beside the commonest answer to the same question.

    Raises: ConfigError if a penalty is not above 0, or the questions are too many for the memory or too few to choose a
        penalty; CorpusError, RunError, TeacherError; StoreError for a store of several views of each picture.
    """
    if not penalties or min(penalties) <= 0:
        raise ConfigError(f"--penalty must be above 0, got {', '.join(f'{p:g}' for p in penalties)}")
    pictures, questions = question_set(data)
    kinds = sorted({each.kind for each in questions})
    _require_room(max(Counter(each.kind for each in questions).values()))
    chosen = subject.size(size if isinstance(subject, StoreSubject) else size or SIZE)
    learnt_from = sorted({each.picture for each in questions if each.split == "train"})
    features = standardised(_features(subject, pictures, chosen), learnt_from)
    right: dict[str, float] = {}
    commonest: dict[str, float] = {}
    for number, kind in enumerate(kinds, start=1):
        train, val = ([q for q in questions if q.kind == kind and q.split == split] for split in ("train", "val"))
        tuning = torch.tensor([is_held_out(pictures.keys[q.picture], TUNING_SHARE) for q in train])
        right[kind] = _share(answers(features, train, val, tuning, penalties), val)
        commonest[kind] = _share(commonest_answers(train, val), val)
        on_step(number, len(kinds))
    return result_of(
        subject,
        task="vqa",
        scores={
            "accuracy": float(np.mean(list(right.values()))),
            "majority": float(np.mean(list(commonest.values()))),
            **right,
            **{f"{kind}_majority": share for kind, share in commonest.items()},
        },
        protocol={
            **subject.protocol(chosen),
            "probe": "logistic regression on features times the question's words",
            "grid": GRID,
            "penalties": list(penalties),
        },
        data={
            "path": str(data),
            "pictures": len(pictures),
            **{split: dict(Counter(q.kind for q in questions if q.split == split)) for split in ("train", "val")},
        },
    )


def answers(
    features_PF: Tensor,
    train: Sequence[Question],
    val: Sequence[Question],
    tuning_N: Tensor,
    penalties: tuple[float, ...],
) -> list[str]:
    """What the probe says to each question of `val`, having learnt from `train`.

    Args:
        features_PF: float64, standardised.
        tuning_N: bool, the questions of `train` that the penalty is chosen on.
    """
    known = sorted({each.answer for each in train})
    codes = torch.tensor([known.index(each.answer) for each in train])
    learnt_ND, judged_MD = feature_map(features_PF, train, val)
    penalty = choose_penalty(learnt_ND, codes, tuning_N, len(known), penalties)
    fitted = fit_logistic(learnt_ND, codes, penalty=penalty, num_labels=len(known))
    said = fitted.logits(judged_MD.to(fitted.weight_CD)).argmax(dim=1)
    return [known[i] for i in said.tolist()]


def feature_map(features_PF: Tensor, train: Sequence[Question], val: Sequence[Question]) -> tuple[Tensor, Tensor]:
    """Coordinates of questions about pictures, [N, N] and [M, N], whose products are those of (x, 1) times words.

    A picture's features have unit length on average, a question's words together, too.
    """
    words_NV, words_MV = _words(train, val)
    about_N, about_M = (torch.tensor([each.picture for each in part]) for part in (train, val))
    scaled = features_PF / features_PF.shape[1] ** 0.5
    gram_NN = (scaled[about_N] @ scaled[about_N].T + 1) * (words_NV @ words_NV.T)
    gram_MN = (scaled[about_M] @ scaled[about_N].T + 1) * (words_MV @ words_NV.T)
    gram_NN.diagonal().add_(JITTER * gram_NN.diagonal().mean())
    factor = torch.linalg.cholesky(gram_NN)
    return factor, torch.linalg.solve_triangular(factor, gram_MN.T, upper=False).T


def _words(train: Sequence[Question], val: Sequence[Question]) -> tuple[Tensor, Tensor]:
    """Words at their places as float64 of unit length, [N, V] and [M, V]."""
    said = [[set(enumerate(question_words(each.question))) for each in part] for part in (train, val)]
    places = {word: i for i, word in enumerate(sorted(set().union(*said[0], *said[1])))}
    made = []
    for part in said:
        rows = torch.zeros(len(part), len(places), dtype=torch.float64)
        for row, words in zip(rows, part, strict=True):
            row[[places[word] for word in words]] = 1
        made.append(F.normalize(rows, dim=1))
    return made[0], made[1]


def commonest_answers(train: Sequence[Question], val: Sequence[Question]) -> list[str]:
    """The commonest answer to the same question, or to any of the kind where it was never asked; of equals the first
    in alphabetical order."""
    of_question: dict[str, Counter[str]] = {}
    for each in train:
        of_question.setdefault(each.question, Counter())[each.answer] += 1
    of_kind = Counter(each.answer for each in train)

    def commonest(counts: Counter[str]) -> str:
        return min(counts, key=lambda answer: (-counts[answer], answer))

    return [commonest(of_question.get(each.question, of_kind)) for each in val]


def standardised(features_PF: Tensor, learnt_from: Sequence[int]) -> Tensor:
    """Mean 0 and variance 1 over the pictures that are learnt from; a feature that never changes there is 0."""
    known = features_PF[list(learnt_from)]
    mean, std = known.mean(dim=0), known.std(dim=0, correction=0)
    return torch.where(std > 0, (features_PF - mean) / torch.where(std > 0, std, 1.0), 0.0)


def _features(subject: Subject, pictures: Pictures, size: int) -> Tensor:
    """Summary and pooled dense tokens side by side, float64 [P, F]."""
    seen = subject.look(pictures, kinds=[SUMMARY, DENSE], size=size, cut=whole)
    if len(seen) != len(pictures):
        raise StoreError(f"{subject.name} holds several views of each picture; extract one with --views squash")
    assert seen.summary is not None
    return torch.cat([seen.summary.double(), _pooled(seen)], dim=1)


def _pooled(seen: Seen) -> Tensor:
    """Means over 4x4 regions, float64 [P, 16 D]."""
    assert seen.dense is not None
    parts = (seen.dense[start : start + POOLED].float() for start in range(0, len(seen), POOLED))
    pooled = [F.adaptive_avg_pool2d(part.permute(0, 3, 1, 2), GRID).flatten(1) for part in parts]
    return torch.cat(pooled).double()


def _share(said: Sequence[str], val: Sequence[Question]) -> float:
    return float(np.mean([word == each.answer for word, each in zip(said, val, strict=True)]))


def _require_room(num_questions: int) -> None:
    """Raises: ConfigError if the Gram matrix of so many questions, thrice, does not fit the memory that is free."""
    wanted, free = 3 * 8 * num_questions**2, free_bytes()
    if wanted > MEMORY_SHARE * free:
        raise ConfigError(
            f"{num_questions} questions of one kind take {wanted / 1e9:.1f} GB, more than half of the "
            f"{free / 1e9:.1f} GB of memory that are free; ask fewer"
        )
