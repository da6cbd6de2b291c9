from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eupe.corpus.index import index_folder
from eupe.corpus.views import ViewSpec
from eupe.errors import ConfigError
from eupe.extract.parts import plan_parts, store_spec
from eupe.store.layout import StoreSpec, arrays, differences
from eupe.teachers.resolve import resolve_teacher

indexed = lru_cache(index_folder)


@lru_cache
def spec_of(
    corpus: Path, *, tokens: tuple[str, ...] = ("summary", "dense"), teacher: str = "timm:test_vit"
) -> StoreSpec:
    return store_spec(
        resolve_teacher(teacher),
        indexed(corpus),
        views=ViewSpec(),
        sizes=(),
        tokens=tokens,
        weights_sha256="w",
        dtype="fp32",
    )


@given(per_part=st.integers(1, 30), done=st.sets(st.integers(0, 23)))
def test_every_sample_is_in_exactly_one_part_done_or_to_do(tiny_corpus: Path, per_part: int, done: set[int]) -> None:
    samples = indexed(tiny_corpus).samples
    spec = replace(spec_of(tiny_corpus), samples_per_part=per_part)
    tasks = plan_parts(spec, samples, done)
    keys = samples["key"].to_pylist()
    planned = [sample.key for task in tasks for sample in task.samples]
    skipped = [key for part in sorted(done) if part < spec.num_parts for key in keys[spec.part_rows(part)]]
    assert sorted(planned + skipped) == keys
    assert [task.index for task in tasks] == [i for i in range(spec.num_parts) if i not in done]
    for task in tasks:
        assert [sample.key for sample in task.samples] == keys[spec.part_rows(task.index)]


def test_the_native_size_is_the_default(tiny_corpus: Path) -> None:
    assert spec_of(tiny_corpus).sizes == (160,)
    assert spec_of(tiny_corpus).grids == (10,)


def test_a_teacher_without_a_summary_stores_dense_alone(tiny_corpus: Path) -> None:
    assert spec_of(tiny_corpus, teacher="sam-b").tokens == ("dense",)


def test_tokens_decide_which_arrays_there_are(tiny_corpus: Path) -> None:
    def paths(tokens: tuple[str, ...]) -> set[str]:
        return {array.path for array in arrays(spec_of(tiny_corpus, tokens=tokens))} - {"boxes", "flips", "digests"}

    assert paths(("summary", "dense")) == {"160/summary", "160/dense"}
    assert paths(("summary",)) == {"160/summary"}
    assert paths(("dense",)) == {"160/dense"}
    with pytest.raises(ConfigError, match="no summary"):
        spec_of(tiny_corpus, tokens=("summary",), teacher="sam-b")


def test_the_same_weights_under_another_activation_are_another_store(tiny_corpus: Path) -> None:
    plain, quick, tagged = (
        spec_of(tiny_corpus, teacher=name)
        for name in ("open_clip:ViT-B-32", "open_clip:ViT-B-32-quickgelu", "open_clip:ViT-B-32@laion2b_s34b_b79k")
    )
    assert differences(plain, quick) == [
        "teacher.architecture: stored ViT-B-32, requested ViT-B-32-quickgelu",
    ]
    assert differences(plain, tagged) == []
