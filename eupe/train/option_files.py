"""Options of `eupe train` from a file: a recipe's presets, a run's own options, or a file that a user wrote.

A file is YAML: the flags without their dashes, each with its value, or a list of values if the flag may be repeated.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from eupe.common.files import write_file
from eupe.common.option import flag_name, option_types, options_of
from eupe.common.reading import from_plain, parse_yaml
from eupe.errors import ConfigError
from eupe.models.encoder_spec import near
from eupe.models.outside import require_trust
from eupe.train.config import TrainConfig
from eupe.train.run_spec import RunSpec

OPTIONS_FILE = "options.yaml"
RECIPES = ("stage1", "stage2", "stage3")

Options = dict[str, Any]
"""Values of fields of TrainConfig, by name."""


def train_configs(
    *,
    recipe: str | None,
    config: Path | None,
    flags: Mapping[str, Any],
    students: Sequence[str],
    inits: Sequence[Path],
    outs: Sequence[Path],
    resume: bool,
) -> list[TrainConfig]:
    """Return one config for each `--out`.

    Raises: ConfigError if the numbers of `--out`, `--student` and `--init` do not fit, or an option cannot work.
    """
    options = train_options(recipe=recipe, config=config, flags=flags, init=bool(inits))
    if not outs:
        raise ConfigError("give the run's directory with --out")
    for option, given in (("--student", students), ("--init", inits)):
        if given and len(given) != len(outs):
            raise ConfigError(
                f"{option} was given {len(given)} times, but --out {len(outs)} times; give one for each student"
            )
    if len(outs) > 1 and not students and not inits:
        raise ConfigError(f"--out was given {len(outs)} times; give a --student for each")
    own: list[Options] = [{} for _ in outs]
    for name, given in (("student", students), ("init", inits)):
        for each, value in zip(own, given, strict=bool(given)):
            each[name] = value
    return [
        TrainConfig(**{"targets": (), **options, **each, "out": out, "resume": resume})
        for each, out in zip(own, outs, strict=True)
    ]


def configs_given(*, recipe: str | None, config: Path | None, given: Mapping[str, Any]) -> list[TrainConfig]:
    """Return one config for each `--out` of a command line.

    Args:
        given: every flag by name of its field; None or an empty list for one that was not given.
    Raises: as `train_configs`; ConfigError for a function that builds the student if a file names it, unless trusted.
    """
    options = options_of(TrainConfig)
    configs = train_configs(
        recipe=recipe,
        config=config,
        flags={name: given[name] for name, option in options.items() if option.in_files and not option.each},
        students=given["student"] or [],
        inits=given["init"] or [],
        outs=given["out"] or [],
        resume=given["resume"],
    )
    if not given["student"]:
        for each in configs:
            require_trust(each.student, f"--config {config}")
    return configs


def train_options(*, recipe: str | None, config: Path | None, flags: Mapping[str, Any], init: bool = False) -> Options:
    """Return the requested options: flags override the file's options, which override the recipe's.

    Args:
        flags: by name; None or an empty list for one that was not given.
        init: whether `--init` was given.
    Raises: ConfigError for an unknown recipe, for stage 3 without `--init`, or naming every option of a file that is
        unknown or has an impossible value.
    """
    options: Options = {}
    if recipe is not None:
        if recipe not in RECIPES:
            raise ConfigError(f"--recipe {recipe!r} is unknown; give {', '.join(RECIPES)}")
        _override(options, read_options(_stage(recipe)))
    if config is not None:
        _override(options, read_options(config))
    given = {name: value for name, value in flags.items() if value is not None and value != []}
    _override(options, from_plain(given))
    if recipe == "stage3" and not init and options.get("init") is None:
        raise ConfigError("--recipe stage3 continues from a student of stage 2; give its run with --init")
    return options


@contextmanager
def origins_told(*, recipe: str | None, config: Path | None, flags: Mapping[str, Any]) -> Iterator[None]:
    """Add to a ConfigError the source, file or recipe, of each option in it that the user did not type.

    Args: those of `train_options`.
    Raises: ConfigError.
    """
    try:
        yield
    except ConfigError as error:
        sources = {f"--config {config}": config} if config is not None else {}
        if recipe is not None and recipe in RECIPES:
            sources[f"--recipe {recipe}"] = _stage(recipe)
        said: dict[str, str] = {}
        for source, file in sources.items():
            for name in read_options(file):
                word = f"--{name.replace('_', '-')}"
                if flags.get(name) in (None, []) and re.search(rf"{word}(?![\w-])", str(error)):
                    said.setdefault(word, f"{word} is from {source}")
        if not said:
            raise
        raise ConfigError(f"{error} ({'; '.join(said.values())})") from error


def _stage(recipe: str) -> Path:
    return Path(str(files("eupe") / "recipes" / "stages" / f"{recipe}.yaml"))


def read_options(path: Path) -> Options:
    """Read a file's options, converted to the types of TrainConfig.

    Raises: ConfigError if the file is missing or is not YAML, or an option is unknown or has an impossible value.
    """
    try:
        plain = parse_yaml(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"--config {path} does not exist; a run stores its own options in {OPTIONS_FILE}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {path} cannot be read as YAML: {error}") from error
    if not isinstance(plain, dict):
        raise ConfigError(f"--config {path} must contain options, such as `batch-size: 128`")
    kinds = option_types(TrainConfig)
    known = {flag_name(name, option): name for name, option in options_of(TrainConfig).items() if option.in_files}
    options, wrong = {}, []
    for key, value in plain.items():
        if key not in known:
            wrong.append(f"{key} is not an option{near(str(key), list(known))}")
            continue
        try:
            options[known[key]] = _typed(kinds[known[key]], value)
        except (TypeError, ValueError, OverflowError):
            wrong.append(f"{key} cannot be {value!r}")
    if wrong:
        raise ConfigError(f"--config {path}: {'; '.join(wrong)}")
    return options


def write_options(config: TrainConfig, spec: RunSpec, path: Path) -> None:
    """Write every option of a run, as it was resolved, to a file for `--config`."""
    resolved = {name: getattr(config, name) for name, option in options_of(TrainConfig).items() if option.in_files}
    resolved |= {name: spec.config[name] for name in ("student", "size")}
    resolved |= {"steps": spec.total_steps, "epochs": None}
    plain = {name.replace("_", "-"): _plain(value) for name, value in resolved.items() if value is not None}
    write_file(path, yaml.safe_dump(plain, sort_keys=False))


def _override(options: Options, stronger: Options) -> None:
    """Override options; a duration given as `steps` also replaces one given as `epochs`, and the reverse."""
    if stronger.keys() & {"steps", "epochs"}:
        options.pop("steps", None)
        options.pop("epochs", None)
    options.update(stronger)


def _typed(kind: Any, value: Any) -> Any:
    """Convert a value from YAML to a field's type.

    Raises: TypeError, ValueError if it does not fit.
    """
    if isinstance(kind, types.UnionType):
        return None if value is None else _typed(typing.get_args(kind)[0], value)
    if typing.get_origin(kind) is tuple:
        (item, _) = typing.get_args(kind)
        return tuple(_typed(item, each) for each in (value if isinstance(value, list) else [value]))
    # a bool is an int in Python: without this test, `true` would pass as the number 1
    if kind is bool or isinstance(value, bool):
        if kind is not bool or not isinstance(value, bool):
            raise TypeError
        return value
    if value is None or isinstance(value, list | dict):
        raise TypeError
    if kind is int and int(value) != float(value):
        raise ValueError
    return kind(value)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, bool | int | float) else str(value)
