"""What a run is asked for: recipes, files, flags."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from making import TINY_STUDENT

from eupe.errors import ConfigError
from eupe.models.timm_models import timm_spec
from eupe.store import Store
from eupe.train.config import TrainConfig
from eupe.train.loop import train
from eupe.train.option_files import OPTIONS_FILE, RECIPES, read_options, train_configs, train_options

PAPER: dict[str, dict[str, Any]] = {
    "stage1": {"head_width": 1536, "student": "vit_giant_patch16_eupe"},
    "stage2": {
        "head_width": 3072,
        "size": (256,),
        "batch_size": 8192,
        "steps": 390_000,
        "target_size": (256,),
        "lr": 2e-5,
        "lr_scaling": "sqrt",
        "weight_decay": 1e-4,
    },
    "stage3": {
        "head_width": 3072,
        "size": (256, 384, 512),
        "target_size": (256, 384, 512),
        "batch_size": 4096,
        "steps": 100_000,
        "lr": 1e-5,
        "lr_scaling": "sqrt",
        "weight_decay": 1e-4,
    },
}
"""EUPE, arXiv 2603.22387: what it says of its stages."""


def asked(**given: Any) -> list[TrainConfig]:
    plain: dict[str, Any] = {"recipe": None, "config": None, "flags": {"targets": ["s.zarr"]}, "students": ["x"]}
    return train_configs(**{**plain, "inits": [], "outs": [Path("run")], "resume": False, **given})


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_has_the_papers_numbers_and_flags_override_them(recipe: str) -> None:
    init = {"inits": [Path("before")]} if recipe == "stage3" else {}
    students = {} if recipe == "stage2" else {"students": []}
    (config,) = asked(recipe=recipe, **{**students, **init})
    for name, value in PAPER[recipe].items():
        assert getattr(config, name) == value
    assert config.normalise == "standard" and config.dtype == "bf16"
    assert (config.clip, config.rope_rescale) == (3.0, 2.0), "of the released configurations"
    flags = {"targets": ["s.zarr"], "batch_size": 64, "lr": 0.5, "size": [128], "epochs": 2.0}
    (config,) = asked(recipe=recipe, flags=flags, **{**students, **init})
    assert (config.batch_size, config.lr, config.size, config.epochs, config.steps) == (64, 0.5, (128,), 2.0, None)


def test_the_proxy_of_stage_1_takes_its_size() -> None:
    options = train_options(recipe="stage1", config=None, flags={})
    assert timm_spec(options["student"], options["size"][0]).dense_dim == 1536


def test_the_third_stage_goes_on_from_a_run() -> None:
    with pytest.raises(ConfigError, match="--recipe stage3 continues from a student of stage 2"):
        asked(recipe="stage3")


def test_a_file_overrides_the_recipe_and_flags_override_both(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("batch-size: 32\nlr: 3.0e-4\nweight: [a=2, b=3]\nepochs: 5\nrecompute: true\n")
    options = train_options(recipe="stage2", config=file, flags={"lr": 1e-3, "seed": None, "weight": []})
    assert options["batch_size"] == 32 and options["lr"] == 1e-3 and options["head_width"] == 3072
    assert options["weight"] == ("a=2", "b=3") and options["recompute"] is True
    assert options["epochs"] == 5 and "steps" not in options and "seed" not in options


def test_every_option_may_stand_in_a_file(tmp_path: Path) -> None:
    values: dict[str, Any] = {"targets": ["a", "b"], "init": "r", "corpus": "c", "epochs": 2, "clip": 1, "ema": 0.9}
    values |= {
        "keep_every": 4,
        "wandb": "p",
        "ray_address": "auto",
        "mix": ["0.1:c,d"],
        "weight": "a=1",
        "size": [32, 64],
    }
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    plain = {name: values.get(name, default) for name, default in defaults.items() if name not in ("out", "resume")}
    file = tmp_path / "all.yaml"
    file.write_text(yaml.safe_dump({k.replace("_", "-"): list(v) if v == () else v for k, v in plain.items()}))
    options = read_options(file)
    assert options.keys() == plain.keys()
    assert options["weight"] == ("a=1",) and options["size"] == (32, 64) and options["clip"] == 1.0
    TrainConfig(**{**options, "out": tmp_path, "steps": None})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch-sise: 3", "batch-sise is not an option; did you mean batch-size?"),
        ("batch-size: many\nlr: [1]\nout: x", "batch-size cannot be 'many'; lr cannot be .*; out is not an option"),
        ("steps: .inf", "steps cannot be inf"),
        ("batch-size: 1.5", "batch-size cannot be 1.5"),
        ("batch-size: true", "batch-size cannot be True"),
        ("recompute: 1", "recompute cannot be 1"),
        ("lr: {a: 1}", "lr cannot be"),
        ("seed:", "seed cannot be None"),
        ("- a", "must contain options"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_a_file_with_mistakes_names_all_of_them(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "o.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_options(file)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"recipe": "stage9"}, "'stage9' is unknown; give stage1, stage2, stage3"),
        ({"config": Path("nowhere.yaml")}, "--config nowhere.yaml does not exist"),
        ({"outs": []}, "give the run's directory with --out"),
        ({"students": ["a", "b"]}, "--student was given 2 times, but --out 1 times"),
        ({"students": [], "outs": [Path("a"), Path("b")]}, "give a --student for each"),
        ({"students": []}, "give --student, or a run to start from with --init"),
        ({"flags": {}}, "at least one store with --targets"),
        ({"flags": {"targets": ["s"], "num_workers": 3}}, r"--batch-size 128 .* workers x microbatches \(3 x 1\)"),
        ({"flags": {"targets": ["s"], "shard": True}}, "--shard spreads the model over workers"),
        ({"flags": {"targets": ["s"], "seed": -1}}, "--seed must be at least 0"),
        ({"flags": {"targets": ["s"], "seed": 2**64}}, "--seed must be at least 0 and below"),
        ({"flags": {"targets": ["s"], "lr": float("nan")}}, "--lr must be a finite number, got nan"),
        ({"flags": {"targets": ["s"], "epochs": float("inf")}}, "--epochs must be a finite number"),
        ({"flags": {"targets": ["s"], "weight_decay": -1.0}}, "--weight-decay must be at least 0"),
        ({"flags": {"targets": ["s"], "drop": 0.5}}, "--drop never drops the only target"),
        ({"flags": {"targets": ["s"], "ema": 1.0}}, "--ema must be between 0 and 1"),
        (
            {"flags": {"targets": ["s"], "normalise": "z", "views": "y", "photometric": "x"}},
            "--normalise.*--views.*--phot",
        ),
    ],
)
def test_what_cannot_be_asked_for_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        asked(**given)


def test_a_runs_own_options_make_the_same_run_again(tiny_store: Store, tmp_path: Path) -> None:
    flags = {"targets": [str(tiny_store.path)], "epochs": 1.0, "batch_size": 4, "head_width": 16, "holdout": 0.3}
    (config,) = asked(flags={**flags, "weight": ["timm:test_vit=2"]}, students=[TINY_STUDENT], outs=[tmp_path / "a"])
    train(config)
    options = tmp_path / "a" / OPTIONS_FILE
    (again,) = asked(flags={}, config=options, students=[], outs=[tmp_path / "a"])
    assert train(again).cached
    (copy,) = asked(flags={}, config=options, students=[], outs=[tmp_path / "b"])
    assert not train(copy).cached
    ours, theirs = ((tmp_path / run / "student.safetensors").read_bytes() for run in "ab")
    assert ours == theirs
