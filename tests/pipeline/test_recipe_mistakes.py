"""Every mistake in a recipe is told with the path of keys that leads there, all at once, and nothing is run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from planning import problems_of, write_files

from eupe.errors import ConfigError

Run = Callable[..., Any]

STORE = "a: {extract: {teacher: dinov2, corpus: photos}}"
RUN = "b: {train: {targets: a, student: test_vit}}"


def recipe(*steps: str, let: str = "{}") -> str:
    return "\n  ".join([f"out: o\nlet: {let}\nsteps:", *steps])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("out: o", ["steps: must be a mapping"]),
        ("out: o\nstpes: {}", ["stpes: is not a key of a recipe", "steps: must be"]),
        (f"steps:\n  {STORE}", ["out: must be a local directory, got None"]),
        (f"out: s3://b/o\nsteps:\n  {STORE}", ["out: must be a local directory, got 's3://b/o'"]),
        (recipe("a/b: {train: {}}"), ["steps.a/b: a step's name may contain only letters"]),
        (recipe("a: train"), ["steps.a: must be one verb with its options"]),
        (recipe("a: {train: {}, viz: {}}"), ["steps.a: must be one verb with its options"]),
        (recipe("a: {train: [1]}"), ["steps.a.train: must be a mapping of options"]),
        (recipe("a: {extrct: {}}"), ["steps.a.extrct: is not a verb for a step; did you mean extract, export?"]),
        (recipe("a: {store repair: {path: x}}"), ["steps.a.store repair: is not a verb for a step"]),
        (recipe("a: {run: {recipe: x}}"), ["steps.a.run: is not a verb for a step"]),
        (
            recipe("a: {extract: {}}"),
            ["steps.a.extract.teacher: is missing", "steps.a.extract.corpus: is missing"],
        ),
        (
            recipe(STORE, "b: {train: {targets: a, student: test_vit, stpes: 3}}"),
            ["steps.b.train.stpes: is not an option of eupe train; did you mean steps"],
        ),
        (
            recipe(STORE, "b: {train: {targets: a, student: test_vit, batch_size: 3}}"),
            ["steps.b.train.batch_size: is not an option of eupe train; did you mean batch-size"],
        ),
        (
            recipe(STORE, "b: {train: {targets: a, student: test_vit, steps: many, lr: fast}}"),
            ["steps.b.train.steps: ", "steps.b.train.lr: "],
        ),
        (
            recipe("a: {extract: {teacher: dinov2, corpus: photos, views: [center, squash]}}"),
            ["steps.a.extract.views: takes one value, got a list of 2"],
        ),
        (
            recipe("a: {extract: {teacher: dinov2, corpus: {x: y}, shuffle: maybe}}"),
            ["steps.a.extract.corpus: takes text or a number", "steps.a.extract.shuffle: is a flag"],
        ),
        (
            recipe("a: {extract: {teacher: [dinov2, clip-b-32], corpus: photos}}"),
            ["steps.a.extract.teacher: takes one teacher per step"],
        ),
        (
            recipe("a: {extract: {teacher: dinov2, corpus: p, out: x, json: true}}"),
            ["steps.a.extract.out: is set by the pipeline", "steps.a.extract.json: is set by the pipeline"],
        ),
        (recipe("a: {viz: {items: dinov2, images: p}}"), ["steps.a.viz.out: is missing"]),
        (recipe("a: {extract: {teacher: dinov22, corpus: p}}"), ["there is no earlier step 'dinov22'", "dinov2-s"]),
        (recipe(RUN), ["steps.b.train.targets: there is no earlier step 'a'; there is no file or folder a, either"]),
        (recipe(STORE, "b: {train: {targets: aa, student: v}}"), ["no earlier step 'aa'; did you mean a?"]),
        (recipe(RUN, STORE), ["steps.b.train.targets: 'a' is a later step; put it above this one"]),
        (
            recipe("b: {train: {targets: a, student: v}}", "a: {extract: {teacher: b, corpus: p}}"),
            ["steps.b.train.targets: 'a' itself needs this step: b -> a -> b"],
        ),
        (recipe("b: {train: {targets: b, student: v}}"), ["steps.b.train.targets: 'b' is this step itself"]),
        (recipe(STORE, "e: {eval agreement: {run: a}}"), ["step 'a' makes a store, but this option takes a run"]),
        (recipe(STORE, RUN, "e: {store stats: {path: b}}"), ["step 'b' makes a run, but this option takes a store"]),
        (
            recipe(STORE, RUN, "e: {eval agreement: {run: b}}", "f: {eval knn: {subjects: e}}"),
            ["step 'e' makes a report, but this option takes a store or a run"],
        ),
        (
            recipe("a: {extract: {teacher: dinov2, corpus: '${photo}'}}", let="{photos: p}"),
            ["steps.a.extract.corpus: ${photo} has no value here"],
        ),
        (recipe(STORE, let="{a: '${b}', b: 1}"), ["let.a: ${b} has no value here"]),
        (recipe(STORE, let="{corpus: null}"), ["let.corpus: has no default value; give --set corpus=..."]),
        (recipe(STORE, let="{num-images: some}"), ["let.num-images: must be a whole number above 0"]),
    ],
)
def test_each_mistake_is_told_with_its_place(
    text: str, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = problems_of(text)
    for words in said:
        assert any(words in problem for problem in found), found
    assert len(found) <= max(len(said), 1)


def test_a_setting_that_the_recipe_does_not_know_is_a_mistake() -> None:
    assert problems_of(recipe(STORE, let="{photos: p}"), {"photo": 1}) == [
        "--set photo: is not among the recipe's named values: out, photos"
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("out: [", "is not YAML"),
        ("- a", "is not a recipe"),
        (recipe(STORE, STORE), "'a' is given twice"),
        (recipe("a: {extract: {teacher: dinov2, teacher: clip, corpus: '${photos}'}}"), "'teacher' is given twice"),
    ],
)
def test_what_is_no_recipe_at_all_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        problems_of(text)


def test_all_mistakes_come_together_with_exit_code_2_and_nothing_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_eupe: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    steps = (STORE, "b: {train: {targets: c, student: test_vit, steps: x}}", "d: {viz: {}}")
    (tmp_path / "r.yaml").write_text(recipe(*steps))
    for more in ([], ["--dry-run"]):
        outcome = run_eupe("run", "r.yaml", *more)
        assert outcome.code == 2
        assert outcome.out == "" and "Traceback" not in outcome.err
        assert "r.yaml has 5 mistakes, so nothing was run" in outcome.err
        for where in ("b.train.targets", "b.train.steps", "d.viz.items", "d.viz.images", "d.viz.out"):
            assert f"  steps.{where}: " in outcome.err
    assert not (tmp_path / "o").exists()


def test_weights_to_start_from_that_are_not_there_are_shown_and_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_eupe: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    student = "b: {train: {targets: a, student: test_vit, init: weights/none.bin, steps: 2}}"
    (tmp_path / "r.yaml").write_text(recipe(STORE, student))
    shown, run = run_eupe("run", "r.yaml", "--dry-run"), run_eupe("run", "r.yaml")
    assert shown.code == 0 and "needed by b: weights weights/none.bin do not exist" in " ".join(shown.out.split())
    assert run.code == 2 and "steps.b.train: weights weights/none.bin do not exist" in " ".join(run.err.split())
    assert not (tmp_path / "o").exists()


def test_what_teachers_and_students_refuse_is_told_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_eupe: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = "x: {extract: {teacher: dinov2, corpus: photos, size: 100}}"
    unknown = "b: {train: {targets: a, student: vit_tinny}}"
    after = "c: {extract: {teacher: b, corpus: photos}}"
    tagged = "d: {train: {targets: a, student: test_vit.nonsense}}"
    (tmp_path / "r.yaml").write_text(recipe(STORE, wrong, unknown, after, tagged))
    outcome = run_eupe("run", "r.yaml")
    assert outcome.code == 2
    assert "r.yaml has 3 mistakes" in outcome.err
    assert "steps.d.train: timm has no weights 'test_vit.nonsense'" in " ".join(outcome.err.split())
    assert "steps.x.extract: size 100 does not work for teacher dinov2-s" in " ".join(outcome.err.split())
    assert "steps.b.train: " in outcome.err and "vit_tinny" in outcome.err
    (tmp_path / "r.yaml").write_text(recipe(STORE))
    outcome = run_eupe("run", "r.yaml")
    assert outcome.code == 2
    assert "steps.a.extract: corpus photos does not exist" in outcome.err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("word", ["x", "=1", "a=[1"])
def test_a_setting_that_cannot_be_read_is_one_sentence(word: str, run_eupe: Run) -> None:
    outcome = run_eupe("run", "desk", "--set", word, "--dry-run")
    assert outcome.code == 2
    assert f"--set {word}" in outcome.err or "--set takes NAME=VALUE" in outcome.err
