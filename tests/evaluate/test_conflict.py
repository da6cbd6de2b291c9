"""Teachers against each other on stores whose kinship is planted, and by libraries' own arithmetic."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feature_stores import plant_store
from numpy.typing import NDArray
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

from eupe.errors import ConfigError, StoreError
from eupe.evaluate import conflict as module
from eupe.evaluate import verdict
from eupe.evaluate.conflict import Pair, conflict, conflict_results
from eupe.evaluate.paired import TEST, PairedStores, spread_views
from eupe.evaluate.ridge import Predicted
from eupe.evaluate.verdict import judge
from eupe.store import Store
from eupe.train.targets import open_stores

NUM, VIEWS, GRID, WIDTH = 40, 2, 4, 6
KEYS = [f"{i:03d}.png" for i in range(NUM)]
Features = dict[str, NDArray[np.float64]]
Run = Callable[..., Any]


def features(seed: int, width: int = WIDTH, grid: int = GRID) -> Features:
    generator = np.random.default_rng(seed)
    scales = generator.uniform(0.5, 3, width)
    return {
        "summary": generator.normal(size=(NUM, VIEWS, width)) * scales + 2,
        "dense": generator.normal(size=(NUM, VIEWS, grid, grid, width)) * scales - 1,
    }


def changed(given: Features, how: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> Features:
    return {kind: how(values) for kind, values in given.items()}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Return a finished store of 40 pictures, two views each; tests must not change it."""
    return plant_store(tmp_path_factory.mktemp("conflict") / "first.zarr", KEYS, features(0))


@pytest.fixture(autouse=True)
def few_pictures_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "PICTURES", NUM)


def compare(first: Store, tmp_path: Path, second: Features, **options: Any) -> Pair:
    store = plant_store(tmp_path / "second.zarr", KEYS, second, teacher="other")
    (pair,) = conflict([first.path, store.path], **options)
    return pair


def r2_of(pair: Pair, kind: str) -> list[float]:
    alike = pair.kinds[kind]
    assert alike.forward is not None and alike.backward is not None
    return [alike.forward.r2, alike.backward.r2]


class TestPlanted:
    def test_a_rotation_is_the_same_space_and_redundant(self, first: Store, tmp_path: Path) -> None:
        rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(WIDTH, WIDTH)))[0]
        pair = compare(first, tmp_path, changed(features(0), lambda x: x @ rotation), neighbours=5)
        for kind in ("summary", "dense"):
            assert pair.kinds[kind].cka == pytest.approx(1, abs=1e-3), "fp16 is all that differs"
            assert r2_of(pair, kind) == pytest.approx([1, 1], abs=1e-3)
        assert pair.mutual_neighbours is not None and pair.mutual_neighbours > 0.95
        assert pair.verdict.word == "redundant"
        assert (pair.teachers, pair.num_pictures, pair.num_views, pair.grid) == (("toy", "other"), NUM, 80, GRID)
        assert pair.kinds["dense"].samples == 80 * GRID**2

    def test_noise_has_nothing_in_common_and_may_fight(self, first: Store, tmp_path: Path) -> None:
        pair = compare(first, tmp_path, features(2))
        assert pair.kinds["dense"].cka == pytest.approx(0, abs=0.03)
        assert r2_of(pair, "dense") == pytest.approx([0, 0], abs=0.05)
        assert pair.mutual_neighbours == pytest.approx(pair.mutual_neighbours_chance, abs=0.1)
        assert pair.verdict.word == "may fight"

    def test_half_of_the_channels_are_contained(self, first: Store, tmp_path: Path) -> None:
        pair = compare(first, tmp_path, changed(features(0), lambda x: x[..., : WIDTH // 2]))
        assert r2_of(pair, "dense") == pytest.approx([1, 0.5], abs=0.05)
        assert pair.verdict.word == "contained"
        assert "second.zarr can be read off first.zarr" in pair.verdict.why

    def test_a_part_in_common_is_complementary(self, first: Store, tmp_path: Path) -> None:
        own, other = features(0), features(3)
        mixed = {kind: 0.6 * own[kind] + 0.4 * other[kind] for kind in own}
        assert compare(first, tmp_path, mixed).verdict.word == "complementary"

    def test_the_larger_grid_is_pooled(self, first: Store, tmp_path: Path) -> None:
        def pool(x: NDArray[np.float64]) -> NDArray[np.float64]:
            if x.ndim == 3:
                return x
            return x.reshape(NUM, VIEWS, 2, GRID // 2, 2, GRID // 2, WIDTH).mean(axis=(3, 5))

        pair = compare(first, tmp_path, changed(features(0), pool))
        assert pair.grid == 2
        assert pair.kinds["dense"].cka == pytest.approx(1, abs=1e-3)
        assert r2_of(pair, "dense") == pytest.approx([1, 1], abs=1e-3)


def test_numbers_are_those_of_naive_arithmetic_on_what_the_stores_hold(first: Store, tmp_path: Path) -> None:
    own, other = features(0), features(4, width=9)
    mixing = np.random.default_rng(5).normal(size=(WIDTH, 9))
    second = {kind: own[kind] @ mixing + 2 * other[kind] for kind in own}
    pair = compare(first, tmp_path, second)
    stores = open_stores([first.path, tmp_path / "second.zarr"])
    paired = PairedStores.of((stores[0], stores[1]), limit=1000)
    rows, views = np.divmod(np.arange(NUM * VIEWS), VIEWS)
    read = [store.read(store.rows([KEYS[i] for i in rows]), views.tolist()) for store in stores]
    folds = {KEYS[i]: fold for i, fold in enumerate(paired.fold_of_picture)}
    is_test = np.array([folds[KEYS[i]] == TEST for i in rows])
    assert 0 < is_test.sum() == round(0.2 * NUM) * VIEWS
    for kind in ("summary", "dense"):
        x, y = (np.asarray(getattr(each, kind), np.float64) for each in read)
        per_view = int(np.prod(x.shape[1:-1]))
        x, y, test = x.reshape(-1, WIDTH), y.reshape(-1, 9), np.repeat(is_test, per_view)
        assert pair.kinds[kind].cka == pytest.approx(gram_cka(x, y), abs=1e-6)
        for ways, (a, b) in ((0, (x, y)), (1, (y, x))):
            chosen = (pair.kinds[kind].forward, pair.kinds[kind].backward)[ways]
            assert chosen is not None
            assert chosen.r2 == pytest.approx(sklearn_r2(a, b, test, chosen.penalty), abs=1e-6)
            assert chosen.samples == (~test).sum()


def gram_cka(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Song et al. (2012), equation 5, with whole matrices."""

    def hsic(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        k, m = a @ a.T, b @ b.T
        np.fill_diagonal(k, 0)
        np.fill_diagonal(m, 0)
        n, ones = len(a), np.ones(len(a))
        terms = np.trace(k @ m) + (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
        return float(terms - 2 / (n - 2) * (ones @ k @ m @ ones)) / (n * (n - 3))

    return hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))


def sklearn_r2(x: NDArray[np.float64], y: NDArray[np.float64], test: NDArray[np.bool_], penalty: float) -> float:
    a, b = ((side - side[~test].mean(axis=0)) / side[~test].std(axis=0) for side in (x, y))
    model = Ridge(alpha=penalty * (~test).sum(), solver="cholesky").fit(a[~test], b[~test])
    return float(r2_score(b[test], model.predict(a[test]), multioutput="variance_weighted"))


class TestChoices:
    def test_a_limit_takes_a_view_of_every_picture_before_a_second_one(self, first: Store, tmp_path: Path) -> None:
        pair = compare(first, tmp_path, features(2), limit=50)
        assert (pair.num_views, pair.num_pictures) == (50, NUM)
        (few,) = conflict([first.path, tmp_path / "second.zarr"], limit=20)
        assert (few.num_views, few.num_pictures) == (20, 20)
        assert few.kinds["dense"].samples == 20 * GRID**2

    @pytest.mark.parametrize("limit", [1, 3, 7, 8, 10, 14, 99])
    def test_views_are_spread(self, limit: int) -> None:
        views = spread_views(7, 2, limit)
        assert len(views) == len({tuple(view) for view in views.tolist()}) == min(limit, 14)
        counts = np.bincount(views[:, 0], minlength=7)
        assert counts.max() - counts.min() <= 1
        assert (np.diff(views[:, 0]) >= 0).all()
        if limit == 3:
            assert views[:, 0].tolist() == [0, 2, 4]

    def test_dense_tokens_are_thinned_and_cells_are_the_same_of_both(
        self, first: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "MOST_TOKENS", 5 * NUM * VIEWS)
        pair = compare(first, tmp_path, features(0))
        assert pair.kinds["dense"].samples == 5 * NUM * VIEWS
        assert pair.kinds["dense"].cka == pytest.approx(1, abs=1e-9)

    def test_more_neighbours_are_shared_more(self, first: Store, tmp_path: Path) -> None:
        few, many = (
            compare(first, tmp_path / str(k), features(2), neighbours=k).mutual_neighbours_chance for k in (2, 20)
        )
        assert few == pytest.approx(2 / 78) and many == pytest.approx(20 / 78)

    def test_few_views_have_the_neighbours_that_there_are(self, first: Store, tmp_path: Path) -> None:
        """Asked for in so many words, more are refused before a view is read."""
        assert compare(first, tmp_path / "few", features(2), limit=10).neighbours == 9
        assert compare(first, tmp_path / "many", features(2)).neighbours == 10
        with pytest.raises(ConfigError, match="--k 10 does not fit 10 views; give 1 to 9"):
            compare(
                first,
                tmp_path / "all",
                features(2),
                limit=10,
                neighbours=10,
                on_views=lambda *told: pytest.fail("views were read"),
            )

    def test_one_kind_of_token_is_enough(self, first: Store, tmp_path: Path) -> None:
        pair = compare(first, tmp_path, {"dense": features(0)["dense"]})
        assert set(pair.kinds) == {"dense"}
        assert pair.mutual_neighbours is None and pair.verdict.word == "redundant"

    def test_every_pair_of_three(self, first: Store, tmp_path: Path) -> None:
        others = [plant_store(tmp_path / f"{i}.zarr", KEYS, features(i)).path for i in (1, 2)]
        pairs = conflict([first.path, *others])
        assert [tuple(Path(s).name for s in pair.stores) for pair in pairs] == [
            ("first.zarr", "1.zarr"),
            ("first.zarr", "2.zarr"),
            ("1.zarr", "2.zarr"),
        ]
        alone = conflict(others)[0]
        assert alone == pairs[2], "a pair's numbers do not depend on the other stores"


class TestRefusals:
    def test_other_views(self, first: Store, tmp_path: Path) -> None:
        store = plant_store(tmp_path / "s.zarr", KEYS, features(0), views_seed=1)
        with pytest.raises(ConfigError, match=r"hold different views .*seed 0 and .*seed 1"):
            conflict([first.path, store.path])

    def test_a_view_that_turns_out_to_be_another(self, first: Store, tmp_path: Path) -> None:
        store = plant_store(tmp_path / "s.zarr", KEYS, features(0), box_of_first=3)
        with pytest.raises(ConfigError, match=r"different views of 000\.png"):
            conflict([first.path, store.path])

    def test_no_picture_in_common_or_too_few(self, first: Store, tmp_path: Path) -> None:
        others = [f"other{i}.png" for i in range(NUM)]
        store = plant_store(tmp_path / "s.zarr", others, features(0))
        with pytest.raises(ConfigError, match="have no picture key in common"):
            conflict([first.path, store.path])
        few = plant_store(tmp_path / "few.zarr", [*KEYS[:9], *others[9:]], features(0))
        with pytest.raises(ConfigError, match="have 9 pictures in common; a comparison needs 10"):
            conflict([first.path, few.path])

    def test_no_kind_in_common(self, tmp_path: Path) -> None:
        stores = [
            plant_store(tmp_path / f"{kind}.zarr", KEYS, {kind: features(0)[kind]}).path
            for kind in ("summary", "dense")
        ]
        with pytest.raises(ConfigError, match="different kinds of tokens, summary and dense"):
            conflict(stores)

    def test_an_unfinished_store(self, first: Store, tmp_path: Path) -> None:
        store = plant_store(tmp_path / "s.zarr", KEYS, features(0), finish=False)
        with pytest.raises(StoreError, match="is not finished"):
            conflict([first.path, store.path])

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["first"], "needs at least two stores, got"),
            (["first", "first", "--limit", "9"], "--limit must be at least 10 views, got 9"),
            (["first", "first", "--k", "0"], "--k must be at least 1, got 0"),
            (["first", "first", "--k", "100000"], "--k 100000 does not fit "),
            (["first", "nowhere.zarr"], "nowhere.zarr does not exist"),
        ],
    )
    def test_words_that_make_no_sense(self, first: Store, words: list[str], said: str, run_eupe: Run) -> None:
        outcome = run_eupe("eval", "conflict", *(first.path if word == "first" else word for word in words))
        assert outcome.code == 2
        assert said in " ".join(outcome.err.split())
        assert "Traceback" not in outcome.err and outcome.out == ""


class TestCommandLine:
    def test_json_and_results_say_what_python_says(self, first: Store, tmp_path: Path, run_eupe: Run) -> None:
        store = plant_store(tmp_path / "s.zarr", KEYS, features(2))
        kept = tmp_path / "results.jsonl"
        words = ("eval", "conflict", first.path, store.path, "--limit", 60, "--k", 3)
        report = json.loads(run_eupe(*words, "--results", kept, "--json").out)
        pairs = conflict([first.path, store.path], limit=60, neighbours=3)
        assert report["pairs"][0]["kinds"]["dense"]["cka"] == pairs[0].kinds["dense"].cka
        (line,) = kept.read_text().splitlines()
        assert json.loads(line) == conflict_results(pairs, limit=60)[0].to_json()

    def test_says_what_is_measured_and_what_is_judged(
        self, first: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_eupe: Run
    ) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        store = plant_store(tmp_path / "s.zarr", KEYS, features(0))
        said = " ".join(run_eupe("eval", "conflict", first.path, store.path).out.split())
        assert "redundant: each can be read off the other" in said
        assert "Measured: linear CKA" in said and "Judged: redundant is R² of at least 0.9" in said


SPEC = {"name": "toy", "model": "toy", "backend": "timm"}
PAPER = ("siglip2-b-256", "pe-core-g", "clip-l14")


@pytest.mark.parametrize(
    ("cka", "forward", "backward", "samples", "pictures", "word"),
    [
        (0.2, 0.95, 0.9, 10, NUM, "redundant"),
        (0.2, 0.95, 0.9, 10, NUM - 1, "redundant"),
        (0.9, 0.95, 0.5, 10, NUM, "contained"),
        (0.9, 0.5, 0.95, 10, NUM, "contained"),
        (0.1, 0.2, 0.1, 499, NUM, "unclear"),
        (0.1, 0.2, 0.1, 500, NUM - 1, "unclear"),
        (0.1, 0.2, 0.1, 500, NUM, "may fight"),
        (0.5, 0.2, 0.1, 500, NUM, "complementary"),
        (0.1, 0.4, 0.1, 500, NUM, "complementary"),
        (None, 0.4, 0.1, 500, NUM, "unclear"),
    ],
)
def test_verdicts(cka: float | None, forward: float, backward: float, samples: int, pictures: int, word: str) -> None:
    ways = {"forward": Predicted(forward, 1.0, samples), "backward": Predicted(backward, 1.0, samples)}
    said = judge(("A", "B"), kind="dense", cka=cka, num_pictures=pictures, width=100, specs=(SPEC, SPEC), **ways)
    assert said.word == word
    if word == "contained":
        assert ("B can be read off A" if forward > backward else "A can be read off B") in said.why


@pytest.mark.parametrize(
    ("first", "second", "backend", "fight"),
    [
        (PAPER[0], PAPER[1], "timm", True),
        (PAPER[2], PAPER[1], "timm", True),
        (PAPER[0], "dinov2-s", "timm", False),
        (PAPER[0], PAPER[2], "run", False),
    ],
)
def test_two_clip_like_teachers_get_the_papers_warning(first: str, second: str, backend: str, fight: bool) -> None:
    specs = tuple({"name": name, "model": "m", "backend": backend} for name in (first, second))
    ways = dict.fromkeys(("forward", "backward"), Predicted(0.5, 1.0, 10**6))
    said = judge(("A", "B"), kind="dense", cka=0.5, num_pictures=999, width=10, specs=(specs[0], specs[1]), **ways)
    assert ("the paper found such a pair to fight" in said.why) == fight
