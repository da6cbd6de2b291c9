"""Options: everything about one stands in its field of a config's dataclass, and nowhere else.

From it follow its flag and help (`eupe/cli/flags.py`), its range, whether another value makes another run, and whether
the keys of pipelines have it.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import KW_ONLY, MISSING, dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")

OPTION, PARTS = "option", "parts"
"""Keys in a field's metadata: its `Option`; or a dataclass of the options that the field's value is made from."""
LATE = {"AnyPath": str, "ViewSpec": object}
"""Names that configs import for the type checker alone, because `--help` must not wait for tensorstore and NumPy.

On the command line and in files, a storage path is text.
"""


@dataclass(frozen=True)
class Option:
    """An option of a config: all that its field says about it beyond type and default."""

    help: str
    """One sentence without the default: the field's documentation, and its line in `--help`."""
    _: KW_ONLY
    unset: str = ""
    """What the default means, in words, where its value does not tell: `no clipping`."""
    indifferent: str = ""
    """Reason why another value leads to the same result; empty if it leads to another one."""
    recorded_as: str = ""
    """What a run's spec has in its place, if not the option itself: `total_steps`."""
    may_differ: bool = False
    """Whether students that share a stream, or teachers that share a pass over the pictures, may differ in it."""
    each: bool = False
    """Whether the command line takes it once for each student or teacher."""
    in_files: bool = True
    """Whether it may stand in a file of options, which a flag then overrides."""
    choices: tuple[str, ...] = ()
    least: float | None = None
    above: float | None = None
    below: float | None = None
    flag: str = ""
    """The flag's name without dashes; by default the field's."""
    typed: type | None = None
    """The flag's type; by default the field's."""
    envvar: str | None = None

    def complaint(self, value: Any) -> str | None:
        """Return what is wrong with a value, as what follows the flag's name; None if nothing is."""
        if self.choices:
            return None if value in self.choices else f"{value!r} is unknown; give {', '.join(self.choices)}"
        if not isinstance(value, int | float):
            return None
        shown = f"{value:g}" if isinstance(value, float) else value
        # first, because NaN passes some comparisons
        if not math.isfinite(value):
            return f"must be a finite number, got {shown}"
        low = (self.least is None or value >= self.least) and (self.above is None or value > self.above)
        if low and (self.below is None or value < self.below):
            return None
        return f"must be {self._range()}, got {shown}"

    def _range(self) -> str:
        if self.above is not None and self.below is not None:
            return f"between {_bound(self.above)} and {_bound(self.below)}"
        bounds = {"at least": self.least, "above": self.above, "below": self.below}
        return " and ".join(f"{word} {_bound(bound)}" for word, bound in bounds.items() if bound is not None)


def _bound(number: float) -> str:
    return f"2^{math.log2(number):g}" if number > 2**31 else f"{number:g}"


def about(help: str, **said: Any) -> dict[str, Option]:
    """Return the metadata of a field without a default.

    Args:
        help: see `Option`, like the fields that `said` names.
    """
    return {OPTION: Option(help, **said)}


def option(default: T, help: str, **said: Any) -> T:
    """Return a dataclass's field with a default and metadata; see `about`."""
    return field(default=default, metadata=about(help, **said))


def options_of(config: type) -> dict[str, Option]:
    """Return the options of a config's dataclass by field, in order; those of parts are not among them."""
    return {each.name: each.metadata[OPTION] for each in dataclasses.fields(config) if OPTION in each.metadata}


def option_types(config: type) -> dict[str, Any]:
    """Return the types of a config's fields as they are typed by a user."""
    return typing.get_type_hints(config, localns=LATE)


def flag_name(name: str, option: Option) -> str:
    """Return an option's name on the command line and in files, without dashes."""
    return option.flag or name.replace("_", "-")


def default_words(default: Any, option: Option) -> str:
    """Return an option's default for `--help`; empty if there is nothing to say, as for a flag that is off."""
    if option.unset or isinstance(default, bool) or default in (MISSING, None, "", ()):
        return option.unset
    return f"{default:g}" if isinstance(default, float) else str(default)


def wrong_values(config: Any) -> list[str]:
    """Return one sentence for each value of a config that its option cannot have."""
    wrong = []
    for each in dataclasses.fields(config):
        about, value = each.metadata.get(OPTION), getattr(config, each.name)
        if about is None or value is None:
            continue
        for one in value if isinstance(value, tuple) else (value,):
            if complaint := about.complaint(one):
                # an option without a value is one choice more
                leave = ", or leave it out" if about.choices and each.default is None else ""
                wrong.append(f"--{flag_name(each.name, about)} {complaint}{leave}")
    return wrong


def indifferent(config: type) -> Mapping[str, str]:
    """Return the flags that do not change the result, without dashes, with the reason."""
    return {flag_name(name, each): each.indifferent for name, each in options_of(config).items() if each.indifferent}
