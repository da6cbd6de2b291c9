"""An option stands in one place: its field says everything, and everything else follows."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import typer

from eupe.cli import app
from eupe.cli.flags import flags_of, info, takes, values_of
from eupe.common.option import OPTION, PARTS, Option, about, indifferent, option, options_of
from eupe.corpus.choice import Choice
from eupe.errors import ConfigError
from eupe.extract.config import ExtractConfig, ViewOptions, require_in_range
from eupe.store.layout import KINDS
from eupe.train.config import TrainConfig

CONFIGS = (TrainConfig, ExtractConfig, ViewOptions, Choice)
FIELDS = [(config, each) for config in CONFIGS for each in dataclasses.fields(config)]
VERBS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize(("config", "each"), FIELDS, ids=[f"{c.__name__}.{each.name}" for c, each in FIELDS])
def test_every_field_is_an_option_with_its_help_or_made_from_options(config: type, each: Any) -> None:
    """A field without metadata would have no flag, and would count neither for a run nor for a pipeline."""
    assert (OPTION in each.metadata) != (PARTS in each.metadata)
    if (said := each.metadata.get(OPTION)) is not None:
        assert said.help.endswith("."), "a sentence"
        assert "Default: " not in said.help or said.each, "the default is added to it"
        assert said.may_differ or not said.each
        assert not (said.indifferent and said.recorded_as), "what changes nothing is not recorded"
        assert all(word in said.help for word in said.choices if word != each.default)


@dataclass(frozen=True, kw_only=True)
class More(TrainConfig):
    hertz: tuple[float, ...] = option((), "How often.", least=1, unset="never")
    loud: bool = option(False, "Be loud.", indifferent="what is heard")
    words: int = option(7, "How many words.", below=9)


def command_of(*configs: type, **how: Any) -> tuple[Any, dict[str, Any]]:
    """A command with the configs' flags, and where it leaves what it was given."""
    found: dict[str, Any] = {}
    small = typer.Typer()

    @small.command()
    @takes(*configs, **how)
    def verb(own: int = 0, **given: Any) -> None:
        found.update(given, own=own)

    return typer.main.get_command(small), found


def test_a_field_more_is_a_flag_more_with_its_default_in_the_help() -> None:
    before, _ = command_of(TrainConfig, from_files=True)
    after, found = command_of(More, from_files=True)
    flags = {each.name: each for each in after.params}
    new = [name for name in flags if name not in {each.name for each in before.params}]
    assert new == ["hertz", "loud", "words"]
    assert [flags[name].help for name in new] == [
        "How often. Default: never.",
        "Be loud.",
        "How many words. Default: 7.",
    ]
    assert (flags["loud"].opts, flags["loud"].secondary_opts) == (["--loud"], ["--no-loud"])
    after.main(["--hertz", "2", "--hertz", "3", "--no-loud", "--own", "5"], standalone_mode=False)
    assert (found["hertz"], found["loud"], found["words"], found["own"]) == ([2.0, 3.0], False, None, 5)
    assert values_of(More, {name: found[name] for name in new}) == {"hertz": (2.0, 3.0), "loud": False}
    assert indifferent(More) == {**indifferent(TrainConfig), "loud": "what is heard"}
    with pytest.raises(ConfigError, match=r"--hertz must be at least 1, got 0\.5; --words must be below 9, got 9"):
        More(targets=("s",), student="x", out=Path("r"), hertz=(2.0, 0.5), words=9)


@dataclass(frozen=True, kw_only=True)
class Plain:
    where: str = field(metadata=about("Where."))
    speed: float = option(2.5, "How fast.", flag="mph", envvar="MPH")
    loud: bool = option(False, "Be loud.")


@dataclass(frozen=True, kw_only=True)
class Instead:
    speed: float = option(4.0, "How slow.")
    last: int = option(1, "The last.")


def test_flags_that_no_file_gives_have_the_fields_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    command, found = command_of(Plain)
    flags = {each.name: each for each in command.params}
    assert (flags["where"].required, flags["speed"].opts, flags["loud"].secondary_opts) == (True, ["--mph"], [])
    assert flags["speed"].help == "How fast.", "typer says the default itself"
    command.main(["--where", "x"], standalone_mode=False)
    assert found == {"where": "x", "speed": 2.5, "loud": False, "own": 0}
    monkeypatch.setenv("MPH", "9")
    command.main(["--where", "x"], standalone_mode=False)
    assert found["speed"] == 9


def test_flags_are_replaced_left_out_and_moved() -> None:
    command, _ = command_of(Plain, Instead, without=("loud",), after={"last": "where"})
    flags = {each.name: each for each in command.params}
    assert list(flags)[:4] == ["where", "last", "speed", "own"]
    assert (flags["speed"].help, flags["speed"].opts) == ("How slow.", ["--speed"])


@pytest.mark.parametrize(("verb", "config"), [("train", TrainConfig), ("extract", ExtractConfig)])
def test_a_verb_has_every_option_of_its_config(verb: str, config: type) -> None:
    own = {"train": {"recipe", "config"}, "extract": set()}[verb]
    assert {each.name for each in VERBS[verb].params} - own - {"as_json"} - {"help"} == flags_of(config).keys()


def test_verbs_that_share_an_option_share_its_help() -> None:
    for verb, config in (("index", ExtractConfig), ("plan", ExtractConfig), ("index", Choice), ("plan", Choice)):
        shared = {
            each.name: each.help for each in VERBS[verb].params if each.name in ("include", "exclude", "image_key")
        }
        assert all(shared[name] == info(config, name).help for name in options_of(config).keys() & shared.keys())


@pytest.mark.parametrize(
    ("said", "value", "words"),
    [
        (Option("", least=1), 0, "must be at least 1, got 0"),
        (Option("", above=0), 0.0, "must be above 0, got 0"),
        (Option("", least=0, below=1), 1.0, "must be at least 0 and below 1, got 1"),
        (Option("", above=0, below=1), 1.0, "must be between 0 and 1, got 1"),
        (Option("", least=0, below=2**63), 2**63, "must be at least 0 and below 2^63, got 9223372036854775808"),
        (Option(""), float("nan"), "must be a finite number, got nan"),
        (Option("", below=1), float("-inf"), "must be a finite number, got -inf"),
        (Option("", choices=("a", "b")), "c", "'c' is unknown; give a, b"),
        (Option("", choices=("a", "b")), "b", None),
        (Option("", least=1), 1, None),
        (Option("", least=0, below=2**63), 2**63 - 1, None),
        (Option(""), Path("x"), None),
    ],
)
def test_values_out_of_range_are_said(said: Option, value: Any, words: str | None) -> None:
    assert said.complaint(value) == words


def test_extractions_that_cannot_be_are_refused_with_all_that_is_wrong() -> None:
    config = ExtractConfig(teacher="t", corpus="c", batch_size=0, workers=0, gpus_per_worker=-1.0, limit=0)
    with pytest.raises(ConfigError) as refusal:
        require_in_range(config)
    assert str(refusal.value).split("; ") == [
        "--batch-size must be at least 1, got 0",
        "--workers must be at least 1, got 0",
        "--gpus-per-worker must be at least 0, got -1",
        "--limit must be at least 1, got 0",
    ]


def test_an_extraction_takes_both_kinds_of_tokens_and_the_centre_by_default() -> None:
    config = ExtractConfig(teacher="t", corpus="c")
    assert config.tokens == KINDS
    assert config.views == ViewOptions().spec()
