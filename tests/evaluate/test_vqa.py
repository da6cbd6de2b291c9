"""The probe on pictures of which it must know the answers, what it may learn from, and what it refuses."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from making import make_store
from PIL import Image

from eupe.corpus.views import ViewSpec
from eupe.errors import ConfigError, CorpusError, StoreError
from eupe.evaluate import vqa as module
from eupe.evaluate.components import Features, as_features
from eupe.evaluate.judged_pictures import whole
from eupe.evaluate.layouts import Question, question_set, question_words
from eupe.evaluate.readout import Fitting, fit
from eupe.evaluate.subject import Subject, open_subjects
from eupe.evaluate.vqa import commonest_answers, vqa
from eupe.train.targets import is_held_out

QUICK = Fitting(steps=150)
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
PLACES = {"left": 0, "right": 32}


def make_scenes(folder: Path, count: int = 90) -> Path:
    """Two squares of a colour each, the left and the right; every third picture is judged."""
    generator = np.random.default_rng(0)
    questions: list[dict[str, Any]] = []
    (folder / "images").mkdir(parents=True)
    for i in range(count):
        canvas = np.full((64, 64, 3), 90, dtype=np.uint8) + generator.integers(0, 25, (64, 64, 3), dtype=np.uint8)
        drawn = {place: str(generator.choice(list(COLOURS))) for place in PLACES}
        for place, x in PLACES.items():
            canvas[20:44, x + 4 : x + 28] = COLOURS[drawn[place]]
        Image.fromarray(canvas).save(folder / "images" / f"{i:03d}.png")
        common = {"image": f"images/{i:03d}.png", "split": "val" if i % 3 == 0 else "train"}
        for place, colour in drawn.items():
            question = f"What colour is the {place} square?"
            questions.append({**common, "kind": "colour", "question": question, "answer": colour})
        same = int(drawn["left"] == drawn["right"])
        questions.append({**common, "kind": "count", "question": "How many pairs are there?", "answer": same})
    (folder / "questions.json").write_text(json.dumps(questions))
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("scenes"))


def subject_of(word: object) -> Subject:
    return open_subjects([str(word)], {})[0]


def test_the_same_features_answer_each_question_by_itself(scenes: Path) -> None:
    """Colours are known left and right, far beyond the commonest answer, which is no better than guessing."""
    result = vqa(subject_of("pixels"), data=scenes, size=64, dropouts=(0.5,))
    assert result.scores["colour"] > 0.9
    assert 0.2 < result.scores["colour_majority"] < 0.6
    assert result.scores["accuracy"] == pytest.approx((result.scores["colour"] + result.scores["count"]) / 2)
    assert result.scores["majority"] == pytest.approx(
        (result.scores["colour_majority"] + result.scores["count_majority"]) / 2
    )
    assert (result.data["pictures"], result.data["train"]) == (90, {"colour": 120, "count": 60})
    assert "probe" in result.protocol


def test_without_the_question_a_probe_cannot_know_which_is_meant(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "question_words", lambda question: ["same"])
    blind = vqa(subject_of("pixels"), data=scenes, size=64, dropouts=(0.5,))
    assert blind.scores["colour"] < 0.8


def test_the_commonest_answer_is_that_to_the_same_question() -> None:
    def question(text: str, answer: str) -> Question:
        return Question(0, "train", "k", text, answer)

    train = [question("a", "2"), question("a", "1"), question("b", "3"), question("b", "3"), question("b", "1")]
    assert commonest_answers(train, [question(text, "?") for text in ("a", "b", "c")]) == ["1", "3", "1"]


def test_words_are_numbers_at_their_places() -> None:
    """Words and places come from train alone; val's new words, and those past train's longest question, are unknown."""
    assert question_words("Is the mug, left of the BALL?") == ["is", "the", "mug", "left", "of", "the", "ball"]

    def question(text: str) -> Question:
        return Question(0, "train", "k", text, "x")

    words, places = module._vocabulary([question("The ball?"), question("Is it the mug?")])
    assert (words, places) == ({"ball": 0, "is": 1, "it": 2, "mug": 3, "the": 4}, 4)
    asked = module._asked([question("is the CAR it, the mug"), question("ball")], ["j", "k"], words, places)
    assert asked.words_NL.tolist() == [[1, 4, -1, 2], [0, -1, -1, -1]]
    assert asked.kind_N.tolist() == [1, 1]


def test_features_are_components_of_pictures_that_are_learnt_from(scenes: Path) -> None:
    pictures, _ = question_set(scenes)
    subject = subject_of("pixels")
    summary = subject.encode_views(pictures, kinds=["summary"], size=64, crop=whole).summary
    dense = subject.encode_views(pictures, kinds=["dense"], size=64, crop=whole).dense
    assert summary is not None and dense is not None
    got, wanted = module._features(subject, pictures, 64, range(30)), as_features(summary, dense, range(30))
    assert torch.equal(got.tokens_PTC, wanted.tokens_PTC)
    assert torch.equal(got.summary_PC, wanted.summary_PC)
    assert got.tokens_PTC.shape[:2] == (90, 16)


def test_pictures_that_are_judged_do_not_decide_features(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learnt_from: list[list[int]] = []

    def remember(summary: torch.Tensor, dense: torch.Tensor, those: list[int]) -> Features:
        learnt_from.append(list(those))
        return as_features(summary, dense, those)

    monkeypatch.setattr(module, "as_features", remember)
    vqa(subject_of("pixels"), data=scenes, size=64, fitting=Fitting(steps=1), dropouts=(0.3,))
    assert learnt_from == [[i for i in range(90) if i % 3]]


def test_the_readout_on_the_command_line(scenes: Path, run_eupe: Callable[..., Any]) -> None:
    words = ["eval", "vqa", "pixels", "--data", scenes, "--json"]
    long, short, dropped = (
        json.loads(run_eupe(*words, *more).out)["results"][0]
        for more in (
            ["--size", 64, "--steps", 120],
            ["--size", 64, "--steps", 3, "--dropout", 0.1, "--dropout", 0.2],
            ["--steps", 3, "--dropout", 0.9],
        )
    )
    assert (long["protocol"]["dropouts"], long["protocol"]["steps"]) == ([0.3, 0.5], 120)
    assert short["scores"]["colour"] < long["scores"]["colour"]
    assert short["scores"]["dropout"] in (0.1, 0.2)
    assert (dropped["scores"]["dropout"], dropped["protocol"]["size"]) == (0.9, 224)
    assert "dropout" not in dropped["protocol"]
    help_text = " ".join(run_eupe("eval", "vqa", "--help").out.split())
    assert "It is a probe, not a language model." in help_text


def test_the_dropout_is_chosen_by_pictures_that_are_kept_aside(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learnt without them, the least unlikely there wins; then all are learnt from."""
    pictures, questions = question_set(scenes)
    learnt: list[tuple[float, set[int]]] = []

    def remember(features: Any, asked: Any, codes: Any, of_kind: Any, how: Fitting, **more: Any) -> Any:
        learnt.append((how.dropout, set(asked.picture_N.tolist())))
        return fit(features, asked, codes, of_kind, how, **more)

    monkeypatch.setattr(module, "fit", remember)
    monkeypatch.setattr(module, "_unlikeliness", lambda logits, codes, kinds: (0.7, 0.2, 0.4)[len(learnt) - 1])
    steps: list[tuple[int, int]] = []
    result = vqa(
        subject_of("pixels"),
        data=scenes,
        size=64,
        fitting=Fitting(steps=2),
        dropouts=(0.1, 0.2, 0.3),
        on_step=lambda done, of: steps.append((done, of)),
    )
    train = {q.picture for q in questions if q.split == "train"}
    kept = {i for i in train if is_held_out(pictures.keys[i], 0.1)}
    assert kept and kept < train
    assert learnt == [(0.1, train - kept), (0.2, train - kept), (0.3, train - kept), (0.2, train)]
    assert result.scores["dropout"] == 0.2
    assert steps == [(done, 8) for done in range(1, 9)]


def test_a_dropout_is_chosen_by_cross_entropy_evenly_over_kinds() -> None:
    logits = torch.tensor([[2.0, 0.0, -1e9], [0.0, 1.0, -1e9], [1.0, 1.0, -1e9], [-1e9, -1e9, 3.0]])
    codes, kinds = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 0, 0, 1])
    first = [math.log1p(math.exp(-2)), math.log1p(math.exp(1)), math.log(2)]
    assert module._unlikeliness(logits, codes, kinds) == pytest.approx(sum(first) / 3 / 2)


def test_stores_need_one_view_of_each_picture(tmp_path: Path, scenes: Path, tiny_weights: Path) -> None:
    one, two = (
        make_store(tmp_path / f"{views.policy}.zarr", scenes / "images", tiny_weights, views=views)
        for views in (ViewSpec(policy="squash"), ViewSpec(policy="rrc", num_views=2))
    )
    assert vqa(subject_of(one.path), data=scenes, fitting=QUICK, dropouts=(0.1,)).scores["colour"] > 0.5
    with pytest.raises(StoreError, match="holds several views of each picture; extract one with --views squash"):
        vqa(subject_of(two.path), data=scenes, dropouts=(0.1,))


def first(**changes: Any) -> dict[str, Any]:
    return {"image": "0.png", "split": "train", "kind": "colour", "question": "What?", "answer": "red", **changes}


@pytest.mark.parametrize(
    ("questions", "said"),
    [
        ([], "is not a list of questions, or is empty"),
        ({"a": 1}, "is not a list of questions, or is empty"),
        ([first(), 5], "question 1 of .* cannot be used: TypeError"),
        ([first(image=None)], "question 0 of .* cannot be used: TypeError: None is not a string"),
        ([{"image": "0.png"}], "question 0 of .* cannot be used: KeyError: 'split'"),
        ([first(split="test")], "split 'test' is neither train nor val"),
        ([first(question="?!")], r"'\?!' has no words"),
        ([first(answer=True)], "TypeError: True is not a string"),
        ([first(answer=" ")], "an empty string"),
        ([first(), first(split="val")], "asks about 0.png in both splits"),
        ([first()], "has no colour questions in the val split"),
        ([first(), first(image="1.png", split="val"), first(kind="text")], "has no text questions in the val split"),
        ([first(), first(image="gone.png", split="val")], "names 1 files that are missing; the first is .*gone.png"),
    ],
)
def test_lists_of_questions_gone_wrong_are_refused(questions: Any, said: str, tmp_path: Path) -> None:
    for name in ("0.png", "1.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    with pytest.raises(CorpusError, match=said):
        question_set(tmp_path)


def test_what_cannot_be_probed_is_refused(tmp_path: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CorpusError, match=r"questions.json cannot be read"):
        vqa(subject_of("pixels"), data=tmp_path)
    with pytest.raises(ConfigError, match=r"--dropout must be at least 0 and below 1, got -0.1"):
        vqa(subject_of("pixels"), data=scenes, dropouts=(0.3, -0.1))
    with pytest.raises(ConfigError, match="there is no --dropout to train with"):
        vqa(subject_of("pixels"), data=scenes, dropouts=())
    with pytest.raises(ConfigError, match="sam-b has no summary"):
        vqa(subject_of("sam-b"), data=scenes)
    monkeypatch.setattr(module, "free_bytes", lambda: 1e5)
    with pytest.raises(ConfigError, match=r"the features of 90 pictures take 0.0 GB to be read out, more than 75%"):
        vqa(subject_of("pixels"), data=scenes, size=64)
    monkeypatch.undo()
    few = make_scenes(tmp_path / "few", 6)
    with pytest.raises(ConfigError, match="there are too few pictures to choose a dropout on; give one --dropout"):
        vqa(subject_of("pixels"), data=few, size=64)
    assert vqa(subject_of("pixels"), data=few, size=64, fitting=Fitting(steps=2), dropouts=(0.3,)).data["pictures"] == 6
