"""The readout against a loop over its formulas, and on planted features that only looking in the right place reads."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from eupe.errors import ConfigError, TrainingError
from eupe.evaluate import readout as module
from eupe.evaluate.components import Features, as_features, places_of
from eupe.evaluate.layouts import Question, question_words
from eupe.evaluate.readout import Asked, Fitting, Readout, finding_loss, fit, read
from eupe.evaluate.vqa import answers

THINGS = ("mug", "ball", "tree", "car", "lamp")
COLOURS = ("red", "green", "blue")
GRID, NOISE = 4, 0.3
QUICK = Fitting(steps=240, dropout=0.1)


@dataclass(frozen=True)
class Planted:
    """Things at tokens of their own, each with a colour; the summary is the mean over tokens."""

    features: Features
    dense: torch.Tensor
    train: list[Question]
    val: list[Question]
    place: dict[tuple[int, str], int]

    def answered(self, kind: str, how: Fitting = QUICK) -> float:
        """Share of right answers to all questions of a kind."""
        _, said = answers(self.features, self.train, self.val, torch.zeros(len(self.train), dtype=torch.bool), [how])
        right = [word == each.answer for word, each in zip(said, self.val, strict=True) if each.kind == kind]
        return float(np.mean(right))


@pytest.fixture(scope="module")
def planted() -> Planted:
    generator = np.random.default_rng(0)
    directions = {word: generator.standard_normal(24) for word in (*THINGS, *COLOURS)}
    dense = NOISE * generator.standard_normal((240, GRID * GRID, 24))
    asked: dict[str, list[Question]] = {"train": [], "val": []}
    place: dict[tuple[int, str], int] = {}
    for i in range(240):
        split = "val" if i % 3 == 0 else "train"
        things = [str(thing) for thing in generator.permutation(THINGS)[: generator.integers(2, 4)]]
        for token, thing in zip(generator.permutation(GRID * GRID), things, strict=False):
            colour = str(generator.choice(COLOURS))
            dense[i, token] += directions[thing] + directions[colour]
            asked[split].append(Question(i, split, "colour", f"What colour is the {thing}?", colour))  # type: ignore[arg-type]
            place[i, thing] = int(token)
        one, other = things[:2]
        left, right = (place[i, thing] % GRID for thing in (one, other))
        if left != right:
            words = f"Is the {one} left of the {other}?"
            asked[split].append(Question(i, split, "position", words, "yes" if left < right else "no"))  # type: ignore[arg-type]
        asked[split].append(Question(i, split, "count", "How many are there?", str(len(things))))  # type: ignore[arg-type]
    maps = torch.from_numpy(dense).reshape(240, GRID, GRID, 24)
    learnt_from = [i for i in range(240) if i % 3]
    features = as_features(maps.mean(dim=(1, 2)), maps, learnt_from)
    return Planted(features, maps, asked["train"], asked["val"], place)


def pooled(planted: Planted, kind: str) -> float:
    """Return the accuracy of a linear rule on the mean over tokens times the question's words at their places."""
    vocabulary = sorted({w for each in planted.train for w in enumerate(question_words(each.question))})

    def rows(questions: list[Question]) -> Any:
        said = [set(enumerate(question_words(each.question))) for each in questions]
        words = np.array([[word in each for word in vocabulary] for each in said], dtype=float)
        means = np.array([[*planted.dense[each.picture].mean(dim=(0, 1)).tolist(), 0.1] for each in questions])
        return np.einsum("nv,nd->nvd", words, means / means.std()).reshape(len(questions), -1)

    train, val = ([each for each in part if each.kind == kind] for part in (planted.train, planted.val))
    scores = [
        LogisticRegression(C=c, max_iter=300)
        .fit(rows(train), [each.answer for each in train])
        .score(rows(val), [each.answer for each in val])
        for c in (0.01, 1.0)
    ]
    return float(max(scores))


def test_it_reads_what_pooled_features_cannot_bind(planted: Planted) -> None:
    """The mean over tokens does not tell which thing has which colour, or which is further left; the readout does."""
    assert planted.answered("colour") > 0.9 > 0.75 > pooled(planted, "colour")
    assert planted.answered("position") > 0.75 > 0.65 > pooled(planted, "position")
    assert planted.answered("count") > 0.65


def test_words_come_to_look_at_what_they_name(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words look at their things on pictures that the readout never saw, although nothing tells where a thing is."""
    kept: list[tuple[Readout, Asked]] = []

    def remember(readout: Readout, features: Features, asked: Asked, *, batch_size: int) -> torch.Tensor:
        kept.append((readout, asked))
        return read(readout, features, asked, batch_size=batch_size)

    monkeypatch.setattr("eupe.evaluate.vqa.read", remember)
    planted.answered("colour")
    readout, asked = kept[0]
    scores = readout.query_VK @ (readout.key(planted.features.tokens_PTC) + readout.where(planted.features.place_T5)).mT
    colours = [(words, each) for words, each in zip(asked.words_NL, planted.val, strict=True) if each.kind == "colour"]
    hits = [
        int(scores[each.picture, words[4]].argmax()) == planted.place[each.picture, question_words(each.question)[4]]
        for words, each in colours
    ]
    assert np.mean(hits) > 0.9


def tiny() -> tuple[Features, Asked, torch.Tensor]:
    """Random numbers about three pictures."""
    generator = torch.Generator().manual_seed(1)
    features = Features(
        torch.randn(3, 6, 7, generator=generator), torch.randn(3, 4, generator=generator), places_of(2, 3)
    )
    words = torch.tensor([[0, 1, 2], [1, 2, -1], [2, -1, 0], [3, 3, 3]])
    asked = Asked(torch.tensor([0, 0, 2, 1]), torch.tensor([0, 1, 1, 0]), words)
    return features, asked, torch.tensor([[True, True, False], [False, False, True]])


def test_the_readout_is_its_formulas_word_by_word() -> None:
    features, asked, of_kind = tiny()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        readout = Readout(features, num_words=4, num_places=3, answers_of_kind=of_kind, dropout=0.5).eval()
        torch.nn.init.normal_(readout.of_kind.weight)
        torch.nn.init.normal_(readout.rarity_V)
    got = read(readout, features, asked, batch_size=2)
    for n in range(4):
        picture, kind = int(asked.picture_N[n]), int(asked.kind_N[n])
        tokens, places = features.tokens_PTC[picture], features.place_T5
        keys = [readout.key(x) + readout.where(place) for x, place in zip(tokens, places, strict=True)]
        hidden = readout.of_kind.weight[kind] + readout.summary(features.summary_PC[picture])
        seen = []
        for v in range(4):
            exps = torch.stack([torch.exp(readout.query_VK[v] @ key) for key in keys])
            odds = exps.mean() * torch.exp(readout.rarity_V[v])
            seen.append(odds / (1 + odds))
            for place_in_question in range(3):
                if asked.words_NL[n, place_in_question] == v:
                    found = torch.cat(
                        [
                            sum(e * readout.value(x) for e, x in zip(exps, tokens, strict=True)),
                            sum(e * place for e, place in zip(exps, places, strict=True)),
                        ]
                    )
                    hidden = hidden + found / exps.sum() @ readout.mixed[place_in_question]
        logits = readout.out(torch.nn.functional.gelu(hidden + readout.seen(torch.stack(seen))))
        assert torch.allclose(got[n][of_kind[kind]], logits[of_kind[kind]], atol=1e-4)
        assert (got[n][~of_kind[kind]] == module.IMPOSSIBLE).all()


def test_the_loss_of_finding_is_cross_entropy_over_words() -> None:
    logits, said = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.eye(5)[:, :4]
    wanted = sum(log_loss(said[:, v], logits[:, v].sigmoid(), labels=[0, 1]) for v in range(4))
    assert finding_loss(logits, said).item() == pytest.approx(wanted / 12, rel=1e-5)


def test_answers_are_the_same_each_time_and_leave_the_generator_alone(planted: Planted) -> None:
    known, how = torch.zeros(len(planted.train), dtype=torch.bool), Fitting(steps=12)
    said = []
    with torch.random.fork_rng():
        for seed, elsewhere in ((0, 1), (0, 2), (1, 1)):
            torch.manual_seed(elsewhere)
            state = torch.random.get_rng_state()
            fitting = [replace(how, seed=seed)]
            said.append(answers(planted.features, planted.train, planted.val, known, fitting)[1])
            assert torch.equal(torch.random.get_rng_state(), state)
    assert said[0] == said[1] != said[2]


def test_what_is_judged_teaches_nothing(planted: Planted) -> None:
    """Neither answers nor other questions and pictures of val change what is said to one of its questions."""
    known, how = torch.zeros(len(planted.train), dtype=torch.bool), [Fitting(steps=12)]
    _, said = answers(planted.features, planted.train, planted.val, known, how)
    blank = [replace(each, answer="?") for each in planted.val]
    assert answers(planted.features, planted.train, blank, known, how)[1] == said
    last = planted.val[-1].picture
    tokens = planted.features.tokens_PTC.clone()
    tokens[[each.picture for each in planted.val if each.picture != last]] = 9.0
    changed = replace(planted.features, tokens_PTC=tokens)
    about = [(each, word) for each, word in zip(planted.val, said, strict=True) if each.picture == last]
    alone = answers(changed, planted.train, [each for each, _ in about], known, how)[1]
    assert len(alone) > 1 and alone == [word for _, word in about]


def test_all_pictures_are_drawn_before_one_is_drawn_again() -> None:
    drawn = torch.cat(list(module._drawn(torch.arange(3, 13), Fitting(steps=5, batch_size=4)))).tolist()
    assert Counter(drawn) == dict.fromkeys(range(3, 13), 2)
    assert sorted(drawn[:10]) == list(range(3, 13)) != drawn[:10]


def test_words_are_found_before_questions_are_answered() -> None:
    """Answers teach the queries nothing in the first steps, whose share is `finding` (a third by default)."""
    features, asked, of_kind = tiny()
    codes = torch.tensor([0, 2, 2, 1])
    others = torch.tensor([1, 2, 2, 0])

    def fitted(steps: int, answers_N: torch.Tensor, finding: float) -> torch.Tensor:
        how = Fitting(steps=steps, finding=finding, batch_size=3, warmup=0)
        return fit(features, asked, answers_N, of_kind, how, num_words=4).query_VK

    assert torch.equal(fitted(3, codes, 1.0), fitted(3, others, 1.0))
    assert not torch.equal(fitted(3, codes, 1 / 3), fitted(3, others, 1 / 3))


def test_readouts_that_cannot_be_fitted_are_refused() -> None:
    features, asked, of_kind = tiny()
    damaged = replace(features, tokens_PTC=features.tokens_PTC * torch.inf)
    with pytest.raises(TrainingError, match="the readout's loss is nan at step 0; its features may be damaged"):
        fit(damaged, asked, torch.tensor([0, 2, 2, 1]), of_kind, Fitting(steps=2), num_words=4)
    with pytest.raises(ConfigError, match="--steps must be at least 1, got 0"):
        Fitting(steps=0)
    with pytest.raises(ConfigError, match="--dropout must be at least 0 and below 1, got 1"):
        Fitting(dropout=1.0)
