"""What there is to do: a pure function of the spec, the corpus and the parts already committed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import pyarrow as pa

from eupe.store.layout import StoreSpec


@dataclass(frozen=True)
class Sample:
    """One picture of a part."""

    key: str
    sha256: str | None
    label: str | None


@dataclass(frozen=True)
class PartTask:
    """One part: the unit of work, of commit and of repair."""

    index: int
    samples: tuple[Sample, ...]


def plan_parts(spec: StoreSpec, samples: pa.Table, done: Collection[int]) -> list[PartTask]:
    """The parts still to be made, in order.

    Args:
        samples: the corpus's index; its row order is the store's.
        done: parts whose commit file exists.
    """
    return [
        PartTask(index, tuple(_samples(samples.slice(rows.start, rows.stop - rows.start))))
        for index in range(spec.num_parts)
        if index not in done
        for rows in [spec.part_rows(index)]
    ]


def _samples(rows: pa.Table) -> list[Sample]:
    return [Sample(**row) for row in rows.select(["key", "sha256", "label"]).to_pylist()]
