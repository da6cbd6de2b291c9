"""What a store of many parts costs: so many steps for each part, however many parts there are."""

from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pytest
from store_cases import make_case, make_spec, write_store

from eupe.common.storage import StoragePath
from eupe.corpus import index as index_module
from eupe.corpus.index import Corpus, open_corpus
from eupe.extract.parts import plan_parts, plan_work_units
from eupe.store import Store, open_store
from eupe.store.catalogue import describe
from eupe.store.verify import verify


class Name(str):
    """A name that counts how often a set or dictionary looked at it."""

    hashed: ClassVar[Counter[str]] = Counter()

    def __hash__(self) -> int:
        Name.hashed[str(self)] += 1
        return super().__hash__()


class Once(list[int]):
    """Parts that may be gone through, and not searched."""

    def __contains__(self, part: object) -> bool:
        raise AssertionError("a list was searched for a part")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Store]:
    """Return two stores, of 4 and of 16 parts."""
    made = []
    for num_parts in (4, 16):
        spec = make_spec(num_samples=num_parts, num_views=1, samples_per_part=1, tokens=("summary",), grids={32: 2})
        path = tmp_path_factory.mktemp("parts") / "s.zarr"
        write_store(make_case(spec), path)
        made.append(open_store(path))
    return made


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Calls of `StoragePath`, by name."""
    calls: Counter[str] = Counter()
    for method in ("list", "exists", "read"):
        real = getattr(StoragePath, method)

        def counting(place: StoragePath, *words: str, method: str = method, real: Any = real) -> Any:
            calls[method] += 1
            answer = real(place, *words)
            return [Name(name) for name in answer] if method == "list" else answer

        monkeypatch.setattr(StoragePath, method, counting)
    return calls


@pytest.mark.parametrize("look", [verify, lambda path: describe(open_store(path))], ids=["verify", "ls"])
def test_a_part_costs_no_more_where_there_are_many(look: Any, stores: list[Store], counted: Counter[str]) -> None:
    costs = []
    for store in stores:
        counted.clear()
        Name.hashed.clear()
        look(store.path)
        parts = store.spec.num_parts
        most_hashed = max(Name.hashed.values(), default=0)
        costs.append((counted["list"], most_hashed, counted["exists"] / parts, counted["read"] / parts))
    small, large = costs
    assert large[:2] == small[:2] and large[0] <= 4 and large[1] <= 4
    assert large[2] <= small[2] + 1 and large[3] <= small[3] + 1, costs


@pytest.mark.parametrize("segments", [[600], [1] * 200])
def test_planning_goes_through_the_committed_parts_once(segments: list[int]) -> None:
    """And finds a part's samples without going through the segments."""
    spec = make_spec(segments=segments, samples_per_part=4)
    keys = [f"{i:04d}" for i in range(sum(segments))]
    samples = pa.table({"key": keys, "sha256": keys, "label": keys})
    done = Once(range(spec.num_parts - 2))
    left = [spec.num_parts - 2, spec.num_parts - 1]
    assert [task.index for task in plan_parts(spec, samples, done)] == left
    units = list(plan_work_units([spec, spec], samples, [done, done]))
    assert {task.index for unit in units for _, task in unit.tasks} == {
        spec.num_parts - 2,
        spec.num_parts - 1,
    }

    class Counting(list[int]):
        seen = 0

        def __iter__(self) -> Any:
            for value in super().__iter__():
                Counting.seen += 1
                yield value

    counting = make_spec(segments=segments, samples_per_part=4)
    counting.corpus["segments"] = Counting(segments)  # type: ignore[index]
    for part in range(counting.num_parts):
        assert counting.part_samples(part) == spec.part_samples(part)
    assert Counting.seen <= 4 * len(segments)


def test_keys_of_a_store_are_made_into_a_list_once(stores: list[Store], monkeypatch: pytest.MonkeyPatch) -> None:
    lists = 0
    real = Store.keys.fget

    def counting(store: Store) -> list[str]:
        nonlocal lists
        lists += 1
        assert real is not None
        return real(store)

    monkeypatch.setattr("eupe.store.reader.VIEWS_PER_READ", 2)
    monkeypatch.setattr(Store, "keys", property(counting))
    assert len(list(stores[1].items())) == 16
    assert lists <= 2


def test_an_earlier_index_is_asked_only_for_rows_near_those_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces asked for in order look at each row of the earlier index about once, whatever the order of its rows."""
    names = [f"{i:03d}.png" for i in range(40)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    first = open_corpus(tmp_path)
    looked_at = 0
    real = index_module.pc.is_in

    def counting(values: Any, value_set: Any) -> Any:
        nonlocal looked_at
        looked_at += len(values)
        return real(values, value_set)

    monkeypatch.setattr(index_module, "ROWS_AT_ONCE", 4)
    monkeypatch.setattr(index_module.pc, "is_in", counting)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read again"))
    for shuffled in (False, True):
        samples = first.samples.take([(7 * i) % 40 for i in range(40)]) if shuffled else first.samples
        again = open_corpus(tmp_path, previous=Corpus(first.root, samples))
        assert again.samples.equals(first.samples)
        assert looked_at <= 40
        looked_at = 0
