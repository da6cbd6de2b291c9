"""The file of a recipe: YAML, substitution of named values, and the form of steps; verbs are checked elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from eupe.common.reading import parse_yaml
from eupe.errors import ConfigError

SHIPPED = resources.files("eupe") / "recipes"
TOP = ("about", "out", "let", "steps")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
WHY = "why"
"""Key of a step beside its verb: a line that says what the step is for."""
NUM_IMAGES = "num-images"
"""Named value with the number of pictures, for a corpus that cannot be counted here."""

_WRITTEN = re.compile(r"\$\{([^{}\n]*)\}")
_OPEN, _CLOSE = "\ue000", "\ue001"
"""Replacements of `${` and `}` while YAML parses the text: the braces would end a value inside `{...}`."""
_HELD = re.compile(f"{_OPEN}([^{_CLOSE}]*){_CLOSE}")


@dataclass(frozen=True)
class RawStep:
    """A step as it is written, with named values filled in."""

    name: str
    verb: str
    options: Mapping[str, Any]
    why: str = ""
    """What the step is for, in a line."""

    def where(self, option: str | None = None) -> str:
        """Return the path of keys to the step, or to one of its options."""
        words = ["steps", self.name, self.verb, option]
        return ".".join(word for word in words if word)


@dataclass(frozen=True)
class Recipe:
    """A whole pipeline as it is written."""

    path: str
    about: str
    out: Path
    num_images: int | None
    steps: tuple[RawStep, ...]


@dataclass
class Problems:
    """The mistakes in a recipe, each with the path of keys to its place."""

    found: list[str] = field(default_factory=list)

    def add(self, where: str, words: str) -> None:
        self.found.append(f"{where}: {words}")

    def require_none(self, recipe: str) -> None:
        """Raise ConfigError with all mistakes, one per line, if there are any."""
        if self.found:
            count = "1 mistake" if len(self.found) == 1 else f"{len(self.found)} mistakes"
            raise ConfigError("\n  ".join([f"{recipe} has {count}, so nothing was run:", *self.found]))


def shipped_names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(file.name.removesuffix(".yaml") for file in SHIPPED.iterdir() if file.name.endswith(".yaml"))


def read_recipe(name: str) -> str:
    """Return the text of a file, or of a shipped recipe if there is no such file.

    Raises: ConfigError if there is neither, or it cannot be read.
    """
    path = Path(name)
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
        if name in shipped_names():
            return (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {name} cannot be read: {error}") from error
    raise ConfigError(f"there is no recipe {name}; give a file, or one of {', '.join(shipped_names())}")


def parse_settings(words: list[str]) -> dict[str, Any]:
    """Parse the words of `--set NAME=VALUE`; each value is YAML.

    Raises: ConfigError if one is not of that form.
    """
    settings = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set takes NAME=VALUE, got {word}")
        try:
            settings[name] = parse_yaml(value)
        except ValueError as error:
            raise ConfigError(f"--set {word}: the value is not YAML ({error})") from error
    return settings


def parse_recipe(path: str, text: str, settings: Mapping[str, Any], problems: Problems) -> Recipe:
    """Parse a recipe as far as possible, and add all mistakes to `problems`.

    Args:
        settings: named values that replace those of `let`; `out` replaces the directory.
    Raises: ConfigError if it is not YAML, or not a mapping.
    """
    plain = _load(path, text)
    for key in plain.keys() - set(TOP):
        problems.add(str(key), f"is not a key of a recipe; the keys are {', '.join(TOP)}")
    values = _named_values(plain.get("let"), settings, problems)
    out = settings.get("out", _put_in(plain.get("out"), "out", values, problems))
    if not isinstance(out, str) or not out or "://" in out:
        problems.add("out", f"must be a local directory, got {out!r}")
    count = values.get(NUM_IMAGES)
    if count is not None and (type(count) is not int or count < 1):
        problems.add(f"let.{NUM_IMAGES}", f"must be a whole number above 0, got {count!r}")
        count = None
    steps = plain.get("steps")
    if not isinstance(steps, dict) or not steps:
        problems.add("steps", "must be a mapping of names to verbs with their options")
        steps = {}
    raw = [_step(name, body, values, problems) for name, body in steps.items()]
    about = " ".join(str(plain.get("about") or "").split())
    return Recipe(path, about, Path(str(out)), count, tuple(step for step in raw if step is not None))


def _load(path: str, text: str) -> dict[str, Any]:
    held = _WRITTEN.sub(lambda match: f"{_OPEN}{match[1]}{_CLOSE}", text)
    try:
        plain = parse_yaml(held, _Strict)
    except ValueError as error:
        raise ConfigError(f"{path} is not YAML: {_as_written(str(error))}") from error
    if not isinstance(plain, dict):
        raise ConfigError(f"{path} is not a recipe: it must be a mapping with {', '.join(TOP)}")
    return plain


class _Strict(yaml.SafeLoader):
    """A YAML loader that refuses a key given twice; plain YAML would silently take the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if isinstance(key, str) and keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _named_values(let: Any, settings: Mapping[str, Any], problems: Problems) -> dict[str, Any]:
    if let is not None and not isinstance(let, dict):
        problems.add("let", "must be a mapping of names to values")
        let = None
    values: dict[str, Any] = {}
    for name, value in (let or {}).items():
        values[str(name)] = settings.get(name, _put_in(value, f"let.{name}", values, problems))
        if values[str(name)] is None:
            problems.add(f"let.{name}", f"has no default value; give --set {name}=...")
            values[str(name)] = f"${{{name}}}"  # so that its uses are not reported, too
    for name in settings.keys() - values.keys() - {"out", NUM_IMAGES}:
        problems.add(f"--set {name}", f"is not among the recipe's named values: {', '.join(['out', *values])}")
    if NUM_IMAGES in settings:
        values[NUM_IMAGES] = settings[NUM_IMAGES]
    return values


def _step(name: Any, body: Any, values: Mapping[str, Any], problems: Problems) -> RawStep | None:
    where = f"steps.{_as_written(str(name))}"
    if not isinstance(name, str) or not NAME.fullmatch(name):
        problems.add(where, "a step's name may contain only letters, digits, '-', '_' and '.'")
        return None
    verbs = {key: value for key, value in body.items() if key != WHY} if isinstance(body, dict) else {}
    if len(verbs) != 1:
        problems.add(where, "must be one verb with its options: {VERB: {OPTION: VALUE, ...}}")
        return None
    ((verb, options),) = verbs.items()
    if not isinstance(options, dict | None):
        problems.add(f"{where}.{verb}", "must be a mapping of options to values")
        return None
    filled = {str(k): _put_in(v, f"{where}.{verb}.{k}", values, problems) for k, v in (options or {}).items()}
    why = _put_in(body.get(WHY, ""), f"{where}.{WHY}", values, problems)
    return RawStep(name, str(verb), filled, " ".join(str(why).split()))


def _put_in(value: Any, where: str, values: Mapping[str, Any], problems: Problems) -> Any:
    """Replace `${name}` in a value by the named values; a value that is only `${name}` keeps the named value's type."""
    if isinstance(value, list):
        return [_put_in(item, f"{where}.{i}", values, problems) for i, item in enumerate(value)]
    if not isinstance(value, str):
        return value
    names = _HELD.findall(value)
    if unknown := [name for name in names if name not in values]:
        problems.add(where, f"${{{unknown[0]}}} has no value here; define it under `let`, above its use")
        return _as_written(value)
    if whole := _HELD.fullmatch(value):
        return values[whole[1]]
    return _HELD.sub(lambda match: str(values[match[1]]), value)


def _as_written(text: str) -> str:
    return _HELD.sub(lambda match: f"${{{match[1]}}}", text)
