"""The probe against scikit-learn on the products themselves, and on pictures of which it must know the answers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from making import make_store
from PIL import Image
from sklearn.linear_model import LogisticRegression

from eupe.corpus.views import ViewSpec
from eupe.errors import ConfigError, CorpusError, StoreError
from eupe.evaluate import vqa as module
from eupe.evaluate.layouts import Question, question_set, question_words
from eupe.evaluate.linear import fit_logistic
from eupe.evaluate.pictures import whole
from eupe.evaluate.subject import Subject, open_subjects
from eupe.evaluate.vqa import answers, commonest_answers, feature_map, standardised, vqa
from eupe.train.targets import is_held_out

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


def asked(seed: int, count: int) -> list[Question]:
    """Questions of two words that matter, about twenty pictures."""
    generator = np.random.default_rng(seed)
    draw = generator.choice
    return [
        Question(
            int(draw(20)),
            "train",
            "k",
            f"Is the {draw(['mug', 'ball'])} {draw(['big', 'red'])}?",
            str(draw(["x", "y", "z"])),
        )
        for _ in range(count)
    ]


def products(
    features: torch.Tensor, questions: list[Question], vocabulary: list[tuple[int, str]]
) -> np.ndarray[Any, Any]:
    """(x, 1) times every word at its place, one row a question."""
    rows = []
    for each in questions:
        words = list(enumerate(question_words(each.question)))
        said = np.array([word in words for word in vocabulary]) / np.sqrt(len(words))
        seen = np.append(features[each.picture].numpy() / np.sqrt(features.shape[1]), 1.0)
        rows.append(np.kron(seen, said))
    return np.array(rows)


def test_the_probe_is_logistic_regression_on_features_times_words() -> None:
    """The factor of the Gram matrix gives what the products themselves give, in scikit-learn."""
    features = torch.randn(20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    train, val = asked(0, 80), asked(1, 40)
    vocabulary = sorted({word for each in train for word in enumerate(question_words(each.question))})
    learnt, judged = feature_map(features, train, val)
    plain_train, plain_val = (products(features, part, vocabulary) for part in (train, val))
    assert np.abs((learnt @ learnt.T).numpy() - plain_train @ plain_train.T).max() < 1e-8
    assert np.abs((judged @ learnt.T).numpy() - plain_val @ plain_train.T).max() < 1e-8
    for penalty in (1e-3, 1e-1):
        codes = torch.tensor(["xyz".index(each.answer) for each in train])
        ours = fit_logistic(learnt, codes, penalty=penalty, num_labels=3).logits(judged).softmax(dim=1)
        theirs = LogisticRegression(C=1 / (penalty * 80), tol=1e-10, max_iter=10000).fit(plain_train, codes)
        assert np.abs(ours.numpy() - theirs.predict_proba(plain_val)).max() < 1e-4
        said = answers(features, train, val, torch.zeros(80, dtype=torch.bool), (penalty,))
        assert said == ["xyz"[i] for i in theirs.predict(plain_val)]


def test_the_same_features_answer_each_question_by_itself(scenes: Path) -> None:
    """Colours are known left and right, far beyond the commonest answer, which is no better than guessing."""
    result = vqa(subject_of("pixels"), data=scenes, size=64)
    assert result.scores["colour"] == 1.0
    assert 0.2 < result.scores["colour_majority"] < 0.6
    assert result.scores["accuracy"] == pytest.approx((result.scores["colour"] + result.scores["count"]) / 2)
    assert result.scores["majority"] == pytest.approx(
        (result.scores["colour_majority"] + result.scores["count_majority"]) / 2
    )
    assert (result.data["pictures"], result.data["train"]) == (90, {"colour": 120, "count": 60})
    assert "probe" in result.protocol


def test_without_the_question_a_probe_cannot_know_which_is_meant(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "question_words", lambda question: ["same"])
    blind = vqa(subject_of("pixels"), data=scenes, size=64, penalties=(1e-2,))
    assert blind.scores["colour"] < 0.9


def test_words_count_by_their_places() -> None:
    """What is left of what is no matter of which words are said."""
    assert question_words("Is the mug, left of the BALL?") == ["is", "the", "mug", "left", "of", "the", "ball"]
    there, back = (Question(0, "train", "k", f"is {a} left of {b}", "x") for a, b in (("mug", "ball"), ("ball", "mug")))
    learnt, _ = feature_map(torch.ones(1, 3, dtype=torch.float64), [there, back], [there])
    assert (learnt[0] @ learnt[1] / (learnt[0] @ learnt[0])).item() == pytest.approx(3 / 5)


def test_the_commonest_answer_is_that_to_the_same_question() -> None:
    def question(text: str, answer: str) -> Question:
        return Question(0, "train", "k", text, answer)

    train = [question("a", "2"), question("a", "1"), question("b", "3"), question("b", "3"), question("b", "1")]
    assert commonest_answers(train, [question(text, "?") for text in ("a", "b", "c")]) == ["1", "3", "1"]


def test_features_are_the_summary_and_sixteen_means(scenes: Path) -> None:
    pictures, _ = question_set(scenes)
    subject = subject_of("pixels")
    got = module._features(subject, pictures, 64)
    summary = subject.look(pictures, kinds=["summary"], size=64, cut=whole).summary
    dense = subject.look(pictures, kinds=["dense"], size=64, cut=whole).dense
    assert summary is not None and dense is not None
    assert got.shape == (90, summary.shape[1] + 16 * dense.shape[-1])
    assert torch.equal(got[:, : summary.shape[1]], summary.double())
    channel_first = dense.permute(0, 3, 1, 2).flatten(1)
    torch.testing.assert_close(got[:, summary.shape[1] :], channel_first.double())


def test_pictures_that_are_judged_do_not_scale_the_features() -> None:
    features = torch.tensor([[0.0, 5.0, 1.0], [2.0, 5.0, 1.0], [9.0, 6.0, 1.0]], dtype=torch.float64)
    wanted = torch.tensor([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [8.0, 0.0, 0.0]], dtype=torch.float64)
    assert torch.equal(standardised(features, [0, 1]), wanted)


def test_the_probe_on_the_command_line(scenes: Path, run_eupe: Callable[..., Any]) -> None:
    words = ["eval", "vqa", "pixels", "--data", scenes]
    best, strict = (
        json.loads(run_eupe(*words, "--size", 64, "--json", *more).out)["results"][0]
        for more in ([], ["--penalty", 1e4])
    )
    assert strict["protocol"]["penalties"] == [1e4]
    assert strict["scores"]["colour"] < best["scores"]["colour"] == 1.0
    (usual,) = json.loads(run_eupe(*words, "--json", "--penalty", 1e4).out)["results"]
    assert usual["protocol"]["size"] == 224
    help_text = " ".join(run_eupe("eval", "vqa", "--help").out.split())
    assert "A probe, no language model" in help_text


def test_the_penalty_is_chosen_by_pictures_that_are_kept_aside(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, questions = question_set(scenes)
    kept: list[list[bool]] = []

    def choose(features: Any, codes: Any, tuning: torch.Tensor, num_labels: int, penalties: Any) -> float:
        kept.append(tuning.tolist())
        return 1e-3

    monkeypatch.setattr(module, "choose_penalty", choose)
    vqa(subject_of("pixels"), data=scenes, size=64)
    train = [q for q in questions if q.split == "train" and q.kind == "colour"]
    assert kept[0] == [is_held_out(pictures.keys[q.picture], 0.1) for q in train]
    assert any(kept[0])


def test_stores_need_one_view_of_each_picture(tmp_path: Path, scenes: Path, tiny_weights: Path) -> None:
    one, two = (
        make_store(tmp_path / f"{views.policy}.zarr", scenes / "images", tiny_weights, views=views)
        for views in (ViewSpec(policy="squash"), ViewSpec(policy="rrc", num_views=2))
    )
    assert vqa(subject_of(one.path), data=scenes, penalties=(1e-2,)).scores["colour"] > 0.5
    with pytest.raises(StoreError, match="holds several views of each picture; extract one with --views squash"):
        vqa(subject_of(two.path), data=scenes)


def first(**changes: Any) -> dict[str, Any]:
    return {"image": "0.png", "split": "train", "kind": "colour", "question": "What?", "answer": "red", **changes}


@pytest.mark.parametrize(
    ("questions", "said"),
    [
        ([], "is no list of questions, or an empty one"),
        ({"a": 1}, "is no list of questions, or an empty one"),
        ([first(), 5], "question 1 of .* cannot be used: TypeError"),
        ([first(image=None)], "question 0 of .* cannot be used: TypeError: None is no string"),
        ([{"image": "0.png"}], "question 0 of .* cannot be used: KeyError: 'split'"),
        ([first(split="test")], "split 'test' is neither train nor val"),
        ([first(question="?!")], r"'\?!' has no words"),
        ([first(answer=True)], "TypeError: True is no string"),
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
    with pytest.raises(ConfigError, match="--penalty must be above 0, got 0"):
        vqa(subject_of("pixels"), data=scenes, penalties=(0.0,))
    with pytest.raises(ConfigError, match="sam-b has no summary"):
        vqa(subject_of("sam-b"), data=scenes)
    monkeypatch.setattr(module, "free_bytes", lambda: 1e5)
    with pytest.raises(ConfigError, match=r"180 questions of one kind take 0.0 GB, more than half of the"):
        vqa(subject_of("pixels"), data=scenes)
