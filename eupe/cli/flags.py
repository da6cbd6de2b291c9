"""Flags of a verb from the dataclass of its config, so that an option is written once."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Collection, Mapping
from inspect import Parameter
from typing import Annotated, Any, TypeVar

import typer
from typer.models import OptionInfo

from eupe.common.option import OPTION, PARTS, Option, default_words, flag_name, option_types, options_of

Verb = TypeVar("Verb", bound=Callable[..., None])


def takes(
    *configs: type, from_files: bool = False, without: Collection[str] = (), after: Mapping[str, str] | None = None
) -> Callable[[Verb], Verb]:
    """Return a decorator that adds the flags of configs to those of a verb, for `typer` to read.

    The verb gets them as keyword arguments.

    Args:
        configs: dataclasses; a later one's flag replaces the flag of that name of an earlier one.
        from_files: see `flags_of`.
        without: flags that the verb does not take.
        after: flags that `--help` shows behind another one, by name; the verb's other parameters come last.
    """

    def decorate(verb: Verb) -> Verb:
        flags: dict[str, Parameter] = {}
        for config in configs:
            flags |= flags_of(config, from_files=from_files)
        own = inspect.signature(verb, eval_str=True).parameters.values()
        flags |= {each.name: each for each in own if each.kind is not Parameter.VAR_KEYWORD}
        moved = after or {}
        order = [name for name in flags if name not in moved and name not in without]
        for name, before in moved.items():
            order.insert(order.index(before) + 1, name)
        parameters = [flags[name].replace(kind=Parameter.KEYWORD_ONLY) for name in order]
        verb.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        verb.__annotations__ = {each.name: each.annotation for each in parameters}
        return verb

    return decorate


def flags_of(config: type, *, from_files: bool = False) -> dict[str, Parameter]:
    """Return the flags of a config's dataclass by field, in order; a field made from parts has theirs.

    Args:
        from_files: whether a file may give options, too: a flag that was not typed is then None, not the default.
    """
    kinds = option_types(config)
    flags: dict[str, Parameter] = {}
    for field in dataclasses.fields(config):
        if PARTS in field.metadata:
            flags |= flags_of(field.metadata[PARTS], from_files=from_files)
        elif (option := field.metadata.get(OPTION)) is not None:
            flags[field.name] = _flag(field, option, kinds[field.name], from_files and option.in_files)
    return flags


def info(config: type, name: str) -> OptionInfo:
    """Return the words and help of one flag, for a verb that takes it without its config."""
    (found,) = flags_of(config)[name].annotation.__metadata__
    assert isinstance(found, OptionInfo)
    return found


def values_of(config: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given flags that are values of a config's fields as they are; lists become tuples."""
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, option in options_of(config).items()
        if (value := given.get(name)) is not None and not option.each and option.typed is None
    }


def _flag(field: dataclasses.Field[Any], option: Option, kind: Any, from_files: bool) -> Parameter:
    """Return a flag as a parameter that `typer` reads."""
    kind = _typed(kind, option)
    default = None if from_files else _default(field, option, kind)
    name = flag_name(field.name, option)
    words = f"--{name}/--no-{name}" if kind is bool and from_files else f"--{name}"
    meaning = default_words(field.default, option) if from_files else option.unset
    help = f"{option.help} Default: {meaning}." if meaning else option.help
    shown = typer.Option(words, envvar=option.envvar, help=help)
    return Parameter(
        field.name,
        Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind | None if default is None else kind, shown],
    )


def _default(field: dataclasses.Field[Any], option: Option, kind: Any) -> Any:
    # what stands in no file has its own error: it names the number of students as well
    if field.default is dataclasses.MISSING and option.in_files:
        return Parameter.empty
    if option.each or typing.get_origin(kind) is list:
        return None
    return ",".join(field.default) if isinstance(field.default, tuple) else field.default


def _typed(kind: Any, option: Option) -> Any:
    """Return the type of a flag, without None; a list if the flag may be repeated."""
    if isinstance(kind, types.UnionType):
        (kind,) = (each for each in typing.get_args(kind) if each is not types.NoneType)
    kind = option.typed or kind
    if typing.get_origin(kind) is tuple:
        kind = list[typing.get_args(kind)[0]]  # type: ignore[misc]
    return list[kind] if option.each else kind
