"""Each option makes another run exactly when its field says so, and students differ only in those that may."""

from __future__ import annotations

import typing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from making import TINY_STUDENT, TINY_TEACHER, make_store

from eupe.common.option import option_types, options_of
from eupe.errors import ConfigError
from eupe.train.config import TrainConfig
from eupe.train.loop import _require_one_stream
from eupe.train.run_spec import resolve
from eupe.train.stream import open_corpora

OPTIONS = options_of(TrainConfig)
EACH = pytest.mark.parametrize("name", [field.name for field in fields(TrainConfig)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_weights: Path) -> Path:
    """Two stores of one teacher at two sizes, and a file of weights."""
    folder = tmp_path_factory.mktemp("identity")
    for name, precision in (("store", "fp16"), ("other", "int8")):
        make_store(folder / f"{name}.zarr", tiny_corpus, tiny_weights, sizes=(64, 96), precision=precision)
    (folder / "weights").write_bytes(b"weights")
    return folder


@pytest.fixture
def config(folder: Path) -> TrainConfig:
    return TrainConfig(
        targets=(folder / "store.zarr",), student=TINY_STUDENT, out=folder / "run", steps=3, batch_size=8, holdout=0.3
    )


def with_and_without(name: str, config: TrainConfig, corpus: Path) -> tuple[TrainConfig, TrainConfig]:
    """A config in which an option has an effect, if it can have one, and the same with another value."""
    folder = config.out.parent
    needed: dict[str, dict[str, Any]] = {
        "drop": {"targets": (folder / "store.zarr", folder / "other.zarr")},
        "epochs": {"steps": None},
        "shard": {"num_workers": 2},
        "bank_size": {"bank": 1.0},
        "bank_temperature": {"bank": 1.0},
        "pretrained": {"student": "making:own_net"},
        "sync_batch_norm": {"num_workers": 2, "student": "test_resnet"},
    }
    special: dict[str, Any] = {
        "targets": (folder / "other.zarr",),
        "student": "test_vit2",
        "out": folder / "elsewhere",
        "init": folder / "weights",
        "mix": (f"0.4:{folder / 'other.zarr'}",),
        "corpus": corpus,
        "size": (32,),
        "target_size": (96,),
        "weight": (f"{TINY_TEACHER}/dense=2",),
        "dtype": "bf16",
        "layers": ("last=3",),
    }
    config = replace(config, **needed.get(name, {}))
    return config, replace(config, **{name: special.get(name, another(name, config))})


def another(name: str, config: TrainConfig) -> Any:
    """A value made up from the field: it differs, and is in range."""
    option, now, kind = OPTIONS[name], getattr(config, name), option_types(TrainConfig)[name]
    kind = next(iter(typing.get_args(kind)), kind)
    if isinstance(now, bool):
        return not now
    made_up = option.choices or ((2, 1, 0.5) if kind in (int, float) else (f"another {name}",))
    return kind(next(value for value in made_up if value != now and not option.complaint(value)))


@EACH
def test_an_option_makes_another_run_unless_its_field_says_why_not(
    name: str, config: TrainConfig, tiny_corpus: Path
) -> None:
    before, after = with_and_without(name, config, tiny_corpus)
    assert getattr(before, name) != getattr(after, name)
    specs = [resolve(each, open_corpora(each)) for each in (before, after)]
    differences = specs[0].differences(specs[1])
    assert bool(differences) != bool(OPTIONS[name].indifferent)
    assert (name in specs[0].config) == (not OPTIONS[name].indifferent and not OPTIONS[name].recorded_as) or (
        name in ("init", "pretrained")
    ), "an option is recorded itself, or as something else"


@EACH
def test_students_of_one_stream_differ_in_what_belongs_to_a_student(
    name: str, config: TrainConfig, tiny_corpus: Path
) -> None:
    before, after = with_and_without(name, config, tiny_corpus)
    configs = [before, after if name == "out" else replace(after, out=after.out.with_name("elsewhere"))]
    if OPTIONS[name].may_differ:
        _require_one_stream(configs)
    else:
        with pytest.raises(ConfigError, match=f"cannot differ in {name}:"):
            _require_one_stream(configs)
