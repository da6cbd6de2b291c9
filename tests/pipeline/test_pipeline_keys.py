"""A step's key changes exactly when its result would; what is done stays done."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from making import make_corpus
from planning import VERBS, plan, pretend_done, write_files

from eupe.corpus.index import index_folder, write_index
from eupe.pipeline.inputs import Inputs
from eupe.pipeline.planned_steps import INDIFFERENT
from eupe.pipeline.show import step_words
from eupe.pipeline.steps import GIVEN, TAKES

RECIPE = """
out: out
let: {weights: weights.bin, photos: photos, steps: 3, seed: 0, k: 5}
steps:
  expert:
    extract: {teacher: "timm:test_vit", weights: ${weights}, corpus: ${photos}, seed: ${seed}}
  other: {extract: {teacher: "timm:test_vit2", corpus: ${photos}}}
  proxy: {train: {targets: [expert, other], student: test_vit, steps: ${steps}}}
  proxy-features: {extract: {teacher: proxy, corpus: ${photos}}}
  student: {train: {targets: proxy-features, student: test_vit}}
  direct: {train: {targets: other, student: test_vit}}
  agreement: {eval agreement: {run: student, k: ${k}}}
  page: {viz: {items: [expert, direct], images: ${photos}, out: page.html}}
"""
ALL = {"expert", "other", "proxy", "proxy-features", "student", "direct", "agreement", "page"}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("setting", "redone"),
    [
        ({"seed": 1}, {"expert", "proxy", "proxy-features", "student", "agreement", "page"}),
        ({"steps": 4}, {"proxy", "proxy-features", "student", "agreement"}),
        ({"k": 6}, {"agreement"}),
        ({}, set()),
    ],
)
def test_one_changed_line_redoes_what_depends_on_it_and_going_back_is_a_hit(
    setting: dict[str, int], redone: set[str]
) -> None:
    assert {name for name, one in plan(RECIPE).items() if one.state == "to do"} == ALL
    pretend_done(plan(RECIPE))
    assert {name for name, one in plan(RECIPE).items() if one.state != "done"} == set()
    changed = plan(RECIPE, setting)
    assert {name for name, one in changed.items() if one.state != "done"} == redone
    pretend_done(changed)
    assert all(one.state == "done" for one in plan(RECIPE).values())
    assert all(one.state == "done" for one in plan(RECIPE, setting).values())


def test_what_a_step_is_for_is_shown_and_decides_nothing() -> None:
    said = RECIPE.replace("  agreement: {eval", "  agreement: {why: 'is it like its\n    target?', eval")
    planned, before = plan(said), plan(RECIPE)
    assert {name: one.key for name, one in planned.items()} == {name: one.key for name, one in before.items()}
    line = before["agreement"].line()
    assert step_words(planned["agreement"]) == f"# agreement: is it like its target?\n$ {line}"
    assert step_words(before["agreement"]) == f"# agreement\n$ {line}"


def test_outputs_are_named_by_step_and_key_and_found_by_the_steps_that_need_them() -> None:
    planned = plan(RECIPE)
    expert, proxy = planned["expert"], planned["proxy"]
    assert str(expert.output) == f"out/expert-{expert.key[:8]}.zarr"
    assert str(proxy.output) == f"out/proxy-{proxy.key[:8]}"
    assert str(planned["page"].output) == f"out/page-{planned['page'].key[:8]}.html"
    assert planned["agreement"].output is None
    assert str(proxy.report) == f"out/reports/proxy-{proxy.key[:8]}.json"
    assert " ".join(proxy.command()) == (
        f"train --targets {expert.output} --targets {planned['other'].output} --student test_vit --steps 3 "
        f"--out {proxy.output} --json"
    )
    assert " ".join(planned["page"].command()) == (
        f"viz {expert.output} {planned['direct'].output} --images photos --out {planned['page'].output} --json"
    )
    assert " ".join(planned["agreement"].command()) == f"eval agreement {planned['student'].output} --k 5 --json"


def test_evaluations_share_a_folder_of_features_unless_they_name_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = """
out: out
steps:
  knn: {eval knn: {subjects: dinov2, data: photos}}
  linear: {eval linear: {subjects: dinov2, data: photos, features: mine, features-gb: 3}}
  zeroshot: {eval zeroshot: {subjects: dinov2, data: photos}}
  page: {viz: {items: dinov2, images: photos, out: page.html}}
"""
    Path("mine").mkdir()
    monkeypatch.setattr(Inputs, "content", lambda inputs, words: pytest.fail("read") if words == "mine" else None)
    words = {name: " ".join(one.words) for name, one in plan(recipe).items()}
    assert words["knn"].endswith("--data photos --features out/features")
    assert words["zeroshot"].endswith("--data photos --features out/features")
    assert words["linear"].endswith("--data photos --features mine --features-gb 3")
    assert "--features" not in words["page"]


def one_step(verb: str, options: dict[str, object]) -> str:
    return json.dumps({"out": "out", "steps": {"step": {verb: options}}})


def required(verb: str) -> dict[str, object]:
    given = {"extract": {"teacher": "timm:test_vit"}, "train": {"targets": "photos"}, "viz": {"items": "photos"}}
    return {
        **{option.name: "photos" for option in VERBS[verb].options.values() if option.required},
        **given.get(verb, {}),
    }


OPTIONS = [
    (verb.name, option.name)
    for verb in VERBS.values()
    for option in verb.options.values()
    if not option.required and not (option.name in GIVEN and verb.name in (GIVEN[option.name] or (verb.name,)))
]


@pytest.mark.parametrize(("verb", "option"), OPTIONS)
def test_an_option_changes_the_key_unless_the_table_says_why_not(verb: str, option: str) -> None:
    given_to = {key: verbs or (verb,) for key, verbs in GIVEN.items()}
    wanted = {key: value for key, value in required(verb).items() if verb not in given_to.get(key, ())}
    value = True if VERBS[verb].options[option].flag else "photos/a" if option in TAKES else "1"
    without, given = (plan(one_step(verb, options))["step"] for options in (wanted, {**wanted, option: value}))
    indifferent = option in INDIFFERENT[""] or option in INDIFFERENT.get(verb, {})
    assert (without.key == given.key) == indifferent


def test_every_option_in_the_table_is_one_of_the_command_line() -> None:
    for verb, options in INDIFFERENT.items():
        known = VERBS[verb].options if verb else {name for v in VERBS.values() for name in v.options}
        assert options.keys() <= set(known)


def test_weights_count_by_their_bytes_wherever_they_lie(here: Path) -> None:
    before = plan(RECIPE)
    shutil.copy("weights.bin", "elsewhere.bin")
    assert plan(RECIPE, {"weights": "elsewhere.bin"})["expert"].key == before["expert"].key
    Path("weights.bin").write_bytes(b"others")
    after = plan(RECIPE)
    assert {name for name in ALL if before[name].key != after[name].key} == ALL - {"other", "direct"}
    Path("model").mkdir()
    for content in (b"1", b"2"):
        (here / "model/model.safetensors").write_bytes(content)
        after |= {content.decode(): plan(RECIPE, {"weights": "model"})["expert"]}
    assert after["1"].key != after["2"].key
    normalised = {after["expert"].key}
    for text in ("{}", '{"image_mean": [0, 0, 0]}'):
        (here / "preprocessor_config.json").write_text(text)
        normalised.add(plan(RECIPE)["expert"].key)
    assert len(normalised) == 3, "what lies beside the weights says how pixels are normalised"


def test_more_pictures_extend_the_stores_and_redo_what_comes_after(here: Path) -> None:
    before = plan(RECIPE)
    pretend_done(before)
    (here / "photos/c.png").write_bytes(b"new")
    for one in before.values():
        if one.output is not None and one.output.suffix == ".zarr":
            (one.output / "zarr.json").touch()
    after = plan(RECIPE)
    for name in ("expert", "other"):
        assert after[name].output == before[name].output
        assert after[name].state == "to go on"
    for name in ALL - {"expert", "other"}:
        assert (after[name].key == before[name].key, after[name].state) == (False, "to do")


def test_pictures_count_by_names_sizes_and_times_and_an_index_by_its_pictures(here: Path) -> None:
    before = plan(RECIPE)["expert"].content
    os.utime(here / "photos/a/1.png", ns=(1, 1))
    assert plan(RECIPE)["expert"].content != before

    corpus = make_corpus(here / "pictures", count=3)
    write_index(index_folder(corpus), here / "i.parquet")
    settings = {"photos": "i.parquet"}
    indexed = plan(RECIPE, settings)["expert"].content
    rewritten = pq.read_table(here / "i.parquet")
    pq.write_table(rewritten, here / "i.parquet", compression="zstd")
    assert plan(RECIPE, settings)["expert"].content == indexed
    (corpus / "class0/0000.png").write_bytes((corpus / "class1/0001.png").read_bytes())
    write_index(index_folder(corpus), here / "i.parquet")
    assert plan(RECIPE, settings)["expert"].content != indexed


def test_a_step_that_was_begun_goes_on_and_one_whose_output_is_gone_is_done_again() -> None:
    planned = plan(RECIPE)
    pretend_done(planned)
    proxy = planned["proxy"]
    proxy.report.unlink()
    assert plan(RECIPE)["proxy"].state == "to do"
    assert proxy.output is not None
    (proxy.output / "config.json").touch()
    begun = plan(RECIPE)["proxy"]
    assert begun.state == "to go on"
    assert begun.command()[-2:] == ["--resume", "--json"]
    pretend_done(planned)
    shutil.rmtree(proxy.output)
    states = {name: one.state for name, one in plan(RECIPE).items()}
    assert states.pop("proxy") == "to do"
    assert set(states.values()) == {"done"}


def test_named_values_keep_their_types_and_stand_inside_braces_and_words() -> None:
    text = """
out: ${root}/out
let: {root: deep, size: 32, sizes: [32, 64], flag: true, views: "rrc:${size}"}
steps:
  a: {extract: {teacher: "timm:test_vit", corpus: photos, size: ${sizes}, pixels: ${flag}, views: ${views}}}
"""
    words = " ".join(plan(text)["a"].command())
    assert "--size 32 --size 64 --pixels --views rrc:32 --out deep/out/a-" in words
    words = " ".join(plan(text, {"sizes": 16, "flag": False, "out": "other"})["a"].command())
    assert "--size 16 --views rrc:32 --out other/a-" in words


def test_a_name_is_a_step_where_that_step_makes_what_is_wanted_else_what_it_was() -> None:
    text = """
out: out
steps:
  dinov2: {extract: {teacher: dinov2, corpus: photos}}
  digits: {extract: {teacher: dinov2, corpus: photos, seed: 1}}
  page: {viz: {items: [dinov2, siglip2-b-256], images: photos, out: p.html}}
"""
    planned = plan(text)
    assert planned["digits"].step.needs == ()
    assert planned["digits"].words[1:3] == ("--teacher", "dinov2")
    assert planned["page"].words[1:3] == (str(planned["dinov2"].output), "siglip2-b-256")


def test_truth_beside_pictures_counts_for_an_evaluation() -> None:
    """Masks, annotations and questions are no pictures of a corpus, but what is judged by."""
    recipe = """
out: out
steps:
  segment: {eval segment: {subjects: pixels, data: set}}
  knn: {eval knn: {subjects: pixels, data: photos}}
"""
    for name in ("set/images/train/1.png", "set/masks/train/1.png", "set/classes.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(name.encode())
    pretend_done(plan(recipe))
    assert all(one.state == "done" for one in plan(recipe).values())
    Path("set/classes.txt").write_text("another")
    assert {name for name, one in plan(recipe).items() if one.state != "done"} == {"segment"}
