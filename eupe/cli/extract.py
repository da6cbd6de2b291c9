"""`eupe extract`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eupe.cli.console import err, escaped, finish, out
from eupe.cli.flags import takes, values_of
from eupe.cli.index import _print_notes
from eupe.cli.options import Json
from eupe.cli.teachers import NEAR_FP32
from eupe.corpus.choice import Choice
from eupe.errors import ConfigError, IncompleteError
from eupe.extract.config import ExtractConfig, ViewOptions, parse_layers

if TYPE_CHECKING:
    from eupe.common.progress import Reporter
    from eupe.extract.dispatch import Status
    from eupe.extract.job import ExtractReport


@takes(ExtractConfig, after={"seed": "shuffle"})
def extract(as_json: Json = False, **given: Any) -> None:
    """Run teachers once over a corpus and cache their features."""
    from eupe.common.progress import report_progress
    from eupe.extract.job import extract_together

    configs = configs_given(given)
    with report_progress(err, "views", quiet=as_json) as progress:
        reports = extract_together(configs, on_status=lambda s: _show_status(progress, s))
    if as_json and len(reports) > 1:
        print(json.dumps({"stores": [dataclasses.asdict(report) for report in reports]}))
    for report in reports:
        if not as_json:
            _print_report(report)
        elif len(reports) == 1:
            finish(dataclasses.asdict(report), as_json)
        _warn_of_values(report)
        if not as_json:
            what = "nothing to do: the store holds all of this already" if report.cached else "done"
            out.print(f"{what}; train from it with: eupe train --targets {report.store} --student ARCH --out runs/NAME")
    require_finite_features(reports)


def configs_given(given: Mapping[str, Any]) -> list[ExtractConfig]:
    """Return one config for each teacher.

    Args:
        given: flags by name of the field, as `eupe extract` and `eupe plan` get them.
    Raises: ConfigError if views are invalid, or unless an option was given once per teacher, or not at all.
    """
    shared = ExtractConfig(
        **{"teacher": "", "corpus": "", **values_of(ExtractConfig, given)},
        views=ViewOptions(**values_of(ViewOptions, given)).spec(),
        choice=Choice(**values_of(Choice, given)),
        tokens=tuple(given["tokens"].split(",")),
    )
    shared = dataclasses.replace(shared, sizes=tuple(sorted(set(shared.sizes))))
    return _of_each(shared, given["teacher"], given["out"], given["weights"], given["weights_key"], given["layers"])


def _print_report(report: ExtractReport) -> None:
    from eupe.corpus.left_out import told

    facts = dataclasses.asdict(report)
    notes = facts.pop("notes")
    finish(facts | {"left_out": told(report.left_out)}, False)
    _print_notes(notes)
    if report.failures:
        kinds = "; ".join(f"{count} x {reason}" for reason, count in report.failures.items())
        mend = "; once they can be read, the same command with --retry-failed computes them"
        err.print(
            f"{report.num_failed} pictures have no features: {escaped(kinds)}. `eupe store info {report.store} "
            f"--json` names them{mend if report.num_failed > report.num_not_finite else ''}",
            soft_wrap=True,
        )


def _warn_of_values(report: ExtractReport) -> None:
    _warn_of_rounding(report)
    warn_of_clipping(report.store, report.clipped_values, report.clipped_arrays)


def warn_of_clipping(store: str, count: int, arrays: Sequence[str]) -> None:
    """Warn on standard error that values were too large for a store, and explain what that means."""
    if count:
        of = " and ".join(arrays) or "maps that were pooled afterwards"  # then no norm tells which array has them
        err.print(
            f"[yellow]warning:[/] {escaped(store)}: {count:,} values of {of} are beyond 65,504, the "
            "largest value of fp16, and stored as that, in every precision and with every --dtype; a student learns "
            "the smaller value. A few such tokens do little harm; many (see `eupe store stats`) mean a damaged "
            "checkpoint or another normalisation of the pictures",
            soft_wrap=True,
        )


def require_finite_features(reports: Sequence[ExtractReport]) -> None:
    """Raise IncompleteError if pictures have no features because the teacher's output is not finite."""
    from eupe.store import open_store
    from eupe.store.writer import what_to_do

    if bad := [report for report in reports if report.num_not_finite]:
        stores = ", ".join(f"{report.num_not_finite} in {report.store}" for report in bad)
        raise IncompleteError(
            f"the teacher's features are not finite (NaN, or beyond the range of its dtype) for some pictures: "
            f"{stores}; these have no features there, `eupe store info --json` names them; "
            f"{what_to_do(open_store(bad[0].store).spec)}"
        )


def _warn_of_rounding(report: ExtractReport) -> None:
    cosines = report.forward.get("cosine_to_fp32", {})
    if rough := {kind: cosine for kind, cosine in cosines.items() if cosine < NEAR_FP32}:
        words = ", ".join(f"{kind} {cosine:.4f}" for kind, cosine in rough.items())
        err.print(
            f"[yellow]warning:[/] {escaped(report.store)}: this teacher's tokens differ from those in fp32 (least "
            f"cosine over a few pictures: {words}); --dtype fp32 is exact, but slower",
            soft_wrap=True,
        )


def _of_each(
    shared: ExtractConfig,
    teachers: list[str],
    places: list[str] | None,
    weights: list[str] | None,
    weights_key: list[str] | None,
    layers: list[str] | None,
) -> list[ExtractConfig]:
    """Return one configuration per teacher.

    Raises: ConfigError unless an option was given once per teacher, or not at all.
    """
    outs = _one_each("--out", places, teachers)
    files = [None if file in (None, "hub") else Path(file) for file in _one_each("--weights", weights, teachers)]
    keys = [None if key in (None, "auto") else key for key in _one_each("--weights-key", weights_key, teachers)]
    numbers = [() if each is None else parse_layers(each) for each in _one_each("--layers", layers, teachers)]
    return [
        dataclasses.replace(shared, teacher=name, out=place, weights=file, weights_key=key, layers=chosen)
        for name, place, file, key, chosen in zip(teachers, outs, files, keys, numbers, strict=True)
    ]


def _one_each(option: str, given: list[str] | None, teachers: list[str]) -> list[str | None]:
    """Return an option's values, one per teacher; None for each if it was not given.

    Raises: ConfigError unless it was given once per teacher, or not at all.
    """
    if not given:
        return [None] * len(teachers)
    if len(given) != len(teachers):
        raise ConfigError(f"{option} was given {len(given)} times for {len(teachers)} teachers; give it once for each")
    return list(given)


def _show_status(progress: Reporter, status: Status) -> None:
    nodes = [
        f"{node.host}: {node.workers} workers, {node.views_per_s:.1f} views/s, {node.failed} failed"
        for node in status.nodes
    ]
    lines = nodes if len(nodes) > 1 else []
    progress.update(status.stage, status.done, status.total, failed=status.failed, lines=lines)
