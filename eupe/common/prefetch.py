"""Work that a pool does ahead of its use, in a bounded queue."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(
    pool: Executor,
    work: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    ahead: int,
    patience: float | None = None,
) -> Iterator[Result]:
    """Return an iterator over a pool's results, in order; at most `ahead` items are started before they are used.

    Args:
        ahead: number of items to start at once; each result that is used starts one more.
        patience: seconds to wait for one result; None to wait without limit.
    Raises (while iterating): whatever `work` raises; TimeoutError.
    """
    waiting = iter(items)
    # here, not in the generator: that would start nothing before the first `next`
    begun = deque(pool.submit(work, item) for item in islice(waiting, max(ahead, 1)))
    return _in_order(begun, (pool.submit(work, item) for item in waiting), patience)


def _in_order(
    begun: deque[Future[Result]], coming: Iterator[Future[Result]], patience: float | None
) -> Iterator[Result]:
    try:
        while begun:
            result = begun.popleft().result(patience)
            begun.extend(islice(coming, 1))
            yield result
    finally:
        for future in begun:
            future.cancel()
