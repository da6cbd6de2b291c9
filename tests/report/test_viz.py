"""The page of PCA maps: what it shows of each kind of item, and in a browser."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import Browser, needs_browser
from making import TINY_SIZE, TINY_STUDENT, TINY_TEACHER, TWO_CROPS, make_corpus, make_store, picture, random_weights
from numpy.typing import NDArray
from PIL import Image
from sklearn.decomposition import PCA
from typed import parsed

from eupe.common.compute import normalise
from eupe.corpus.index import index_folder
from eupe.corpus.pictures import decode_image
from eupe.corpus.views import NEUTRAL, ViewParams, ViewSpec, render_view
from eupe.errors import ConfigError, CorpusError, EupeError, RunError, StorageError
from eupe.evaluate.judged_pictures import centre
from eupe.evaluate.subject import EncoderSubject, open_subjects
from eupe.models.encoder import load_encoder
from eupe.models.pca import find_foreground, fit_pca
from eupe.report.feature_maps import MIN_TOKENS, SHOWN_PX, Picture, choose_pictures
from eupe.report.png_figure import BLANK, plan_figure
from eupe.report.training_curves import read_history
from eupe.report.viz_page import VizReport, write_maps
from eupe.store import Features, open_store
from eupe.train.config import TrainConfig
from eupe.train.loop import train
from eupe.train.targets import is_held_out

Pixels = NDArray[np.uint8]

HOSTILE = "<img src=x onerror=alert(1)>&\"'${names}.png"
HOLDOUT = 0.25


@dataclasses.dataclass(frozen=True)
class World:
    """The files that the pages are made of; tests must not change them."""

    corpus: Path
    weights: Path
    store: Path
    other: Path
    run: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Pictures with a hostile name among them, two stores of the same crops, and a student of the first."""
    folder = tmp_path_factory.mktemp("viz")
    corpus = make_corpus(folder / "pictures", count=23)
    (corpus / "<b>bold").mkdir()
    picture(99).save(corpus / "<b>bold" / HOSTILE)
    weights = random_weights(TINY_TEACHER.removeprefix("timm:"), folder / "teacher.safetensors")
    store = make_store(folder / "first.zarr", corpus, weights).path
    other = make_store(folder / "second.zarr", corpus, weights, sizes=(TINY_SIZE // 2, 2 * TINY_SIZE)).path
    run = folder / "run"
    config = TrainConfig(
        targets=(store,),
        student=TINY_STUDENT,
        out=run,
        steps=4,
        batch_size=4,
        head_width=16,
        holdout=HOLDOUT,
        log_every=1,
        validate_every=2,
    )
    train(config)
    return World(corpus, weights, store, other, run)


@dataclasses.dataclass(frozen=True)
class Page:
    """A page that was written, as a parser sees it."""

    report: VizReport
    path: Path
    text: str
    images: list[dict[str, str]]
    """Attributes of every `img` element, in order."""
    titles: list[str]
    """Text of each picture's row heading."""

    @property
    def models(self) -> int:
        return len(self.report.models)

    @property
    def keys(self) -> list[str]:
        return [title.split("|")[0] for title in self.titles]

    def maps(self, model: int) -> list[Pixels]:
        """A model's maps, decoded, one per picture."""
        return [_decoded(image["src"]) for image in self.images[1 + model :: 1 + self.models]]

    def views(self) -> list[Pixels]:
        return [_decoded(image["src"]) for image in self.images[:: 1 + self.models]]


def _decoded(uri: str) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2]))))


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.images: list[dict[str, str]] = []
        self.tags: set[str] = set()
        self.titles: list[str] = []
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag in ("article", "h3"):
            self._open.append(tag)
            if self._open == ["article", "h3"]:
                self.titles.append("")
        if tag == "img":
            self.images.append({name: value or "" for name, value in attrs})

    def handle_endtag(self, tag: str) -> None:
        if tag in ("article", "h3"):
            self._open.remove(tag)

    def handle_data(self, data: str) -> None:
        if self._open == ["article", "h3"]:
            self.titles[-1] += f"{data}|"


def make_page(world: World, out: Path, *items: Path | str, limit: int = 8, **options: Any) -> Page:
    report = write_maps([str(item) for item in items], images=world.corpus, out=out, limit=limit, **options)
    text = out.read_text()
    parser = _Parser()
    parser.feed(text)
    return Page(report, out, text, parser.images, parser.titles)


@pytest.fixture(scope="module")
def page(world: World, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """Every picture, by both stores, the run, and the teacher run anew."""
    out = tmp_path_factory.mktemp("page") / "page.html"
    items = (world.store, world.other, world.run, TINY_TEACHER)
    return make_page(world, out, *items, limit=24, weights={TINY_TEACHER: world.weights})


class TestChoice:
    @pytest.mark.parametrize("limit", [1, 3, 5, 9])
    def test_held_out_first_then_each_label_in_turn(self, limit: int) -> None:
        made = [("a", 0), ("a", 1), ("a", 0), ("a", 0), ("b", 0), ("b", 0), ("c", 1), ("c", 1), ("d", 0)]
        pictures = [Picture(f"{i}", label, None, bool(held)) for i, (label, held) in enumerate(made)]
        keys = [picture.key for picture in choose_pictures(pictures, limit)]
        # held out: a, c, then c again; after them b and d, not seen yet, then a and b again, then a
        assert keys == ["1", "6", "7", "4", "8", "0", "5", "2", "3"][:limit]

    def test_without_labels_the_first_pictures(self) -> None:
        pictures = [Picture(key, None, None, False) for key in "abcd"]
        assert choose_pictures(pictures, 3) == pictures[:3]


class TestHistory:
    def test_curves_and_outcome_are_those_of_the_log(self, world: World) -> None:
        history = read_history(world.run)
        lines = [json.loads(line) for line in (world.run / "metrics.jsonl").read_text().splitlines()]
        totals = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        curves = {series.name: series for series in history.losses}
        name = next(name for name in curves if name.endswith("/dense"))
        assert curves["total"].points == totals and len(totals) == 4
        expected = [(line["step"], line["losses"][name]) for line in lines if "losses" in line]
        assert curves[name].points == expected
        assert curves[name].dashed and curves[name].colour == 0
        assert curves["total"].colour is None
        assert [len(series.points) for series in history.cosines] == [2, 2]
        last = {f"{row.target}/{row.tokens}": row.normalised for row in history.outcome}
        assert {series.name: series.points[-1][1] for series in history.cosines} == last
        assert {row.tokens for row in history.outcome} == {"summary", "dense"}

    def test_no_log_is_no_curves(self, tmp_path: Path) -> None:
        history = read_history(tmp_path)
        assert not history.losses and not history.cosines and not history.outcome

    @pytest.mark.parametrize("name,text", [("metrics.jsonl", '{"step": 1, "lo'), ("report.json", "[]x")])
    def test_a_damaged_log_is_one_sentence(self, tmp_path: Path, name: str, text: str) -> None:
        (tmp_path / name).write_text(text)
        with pytest.raises(RunError, match=re.escape(str(tmp_path))):
            read_history(tmp_path)


class TestPage:
    def test_a_row_per_picture_and_a_column_per_item(self, page: Page) -> None:
        assert page.report.models == ("first.zarr", "second.zarr", "run", TINY_TEACHER)
        assert len(page.report.pictures) == len(page.titles) == 24 and list(page.report.pictures) == page.keys
        assert not page.report.notes
        assert len(page.images) == 24 * 5
        assert page.report.num_bytes == page.path.stat().st_size
        assert all(image["alt"] for image in page.images)
        for words in ("4×4 cells", "8×8 cells", "64 px", "128 px", "64 channels", 'class="kind run"'):
            assert words in page.text
        assert page.text.count('<svg class="chart"') == 2
        assert "raw − mean feature" in page.text

    def test_pixels_are_a_column_like_others(self, world: World, tmp_path: Path) -> None:
        page = make_page(world, tmp_path / "page.html", "pixels", world.store, limit=2)
        assert page.report.models == ("pixels", "first.zarr")
        assert "14×14 cells" in page.text and "48 channels" in page.text

    def test_store_columns_are_the_stored_features_of_view_0(self, world: World, page: Page) -> None:
        for model, (path, size) in enumerate([(world.store, TINY_SIZE), (world.other, 2 * TINY_SIZE)]):
            dense = _view_0(path, page.keys, size=size).dense
            assert dense is not None
            np.testing.assert_array_equal(np.stack(page.maps(model)), fit_pca(dense).rgb(dense))

    def test_all_see_the_view_of_the_store(self, world: World, page: Page) -> None:
        """The picture shown is the stored crop; the student's map is made of that crop at its own size."""
        stored = _view_0(world.store, page.keys, size=TINY_SIZE)
        images = [decode_image((world.corpus / key).read_bytes()) for key in page.keys]
        assert stored.flips.any()

        def rendered(size: int) -> Pixels:
            return np.stack([render_view(image, p, size) for image, p in zip(images, stored.params, strict=True)])

        difference = np.stack(page.views()).astype(int) - rendered(SHOWN_PX)
        assert np.abs(difference).mean() < 3  # JPEG
        encoder = load_encoder(world.run).eval()
        pixels = normalise(torch.from_numpy(rendered(encoder.spec.size)), encoder.spec.mean, encoder.spec.std)
        with torch.inference_mode():
            dense = encoder(pixels).dense.numpy()
        _assert_same_maps(page.maps(2), fit_pca(dense).rgb(dense))

    def test_models_are_drawn_at_another_size_and_with_random_weights(self, world: World, tmp_path: Path) -> None:
        options = {"limit": 3, "size": 3 * TINY_SIZE // 2 + 3, "untrained": True}
        page = make_page(world, tmp_path / "page.html", world.run, "pixels", **options)
        assert page.report.models == ("run", "run, untrained", "pixels")
        assert page.text.count('<svg class="chart"') == 2  # random weights have no history
        images = [decode_image((world.corpus / key).read_bytes()) for key in page.keys]
        size = 3 * TINY_SIZE // 2
        views = np.stack([render_view(image, centre(*image.size)[0], size) for image in images])
        for model, subject in enumerate(open_subjects([str(world.run)], {}, untrained=True)):
            assert isinstance(subject, EncoderSubject)
            dense = subject.encode(views, size=size).dense.numpy()
            _assert_same_maps(page.maps(model), fit_pca(dense).rgb(dense))
        assert np.abs(np.stack(page.maps(0)).astype(int) - np.stack(page.maps(1))).mean() > 5

    def test_recoloured_views_are_shown_as_the_teacher_saw_them(self, world: World, tmp_path: Path) -> None:
        store = tmp_path / "recoloured.zarr"
        make_store(store, world.corpus, world.weights, views=dataclasses.replace(TWO_CROPS, photometric="eupe"))
        page = make_page(world, tmp_path / "page.html", store, limit=6)
        params = _view_0(store, page.keys, size=TINY_SIZE).params
        images = [decode_image((world.corpus / key).read_bytes()) for key in page.keys]
        shown = np.stack(page.views()).astype(int)

        def distance(views: list[ViewParams]) -> float:
            rendered = [render_view(image, view, SHOWN_PX) for image, view in zip(images, views, strict=True)]
            return float(np.abs(shown - np.stack(rendered)).mean())

        assert distance(params) < 3  # JPEG
        assert distance([view._replace(photometric=NEUTRAL) for view in params]) > 10

    def test_a_teacher_says_what_its_store_says(self, page: Page, world: World, tmp_path: Path) -> None:
        """Compared on a page of its own: the centre view, at the teacher's native size."""
        weights = {TINY_TEACHER: world.weights}
        alone = make_page(world, tmp_path / "teacher.html", TINY_TEACHER, limit=24, weights=weights)
        assert alone.report.num_held_out == 0 and "held out" not in alone.text.split("<article>", 1)[1]
        native = int(re.findall(r"<span>(\d+) px</span>", alone.text)[0])
        centre = tmp_path / "centre.zarr"
        make_store(centre, world.corpus, world.weights, views=ViewSpec(), sizes=(native,))
        stored = make_page(world, tmp_path / "store.html", centre, limit=24)
        assert stored.titles == alone.titles
        _assert_same_maps(alone.maps(0), np.stack(stored.maps(0)))

    def test_held_out_pictures_come_first_and_are_tagged(self, page: Page, world: World) -> None:
        tagged = ["|held out|" in title for title in page.titles]
        samples = index_folder(world.corpus).samples.select(["key", "sha256"]).to_pylist()
        content = {sample["key"]: sample["sha256"] for sample in samples}
        expected = [is_held_out(content[title.split("|")[0]], HOLDOUT) for title in page.titles]
        assert tagged == expected == sorted(expected, reverse=True)
        assert 0 < sum(tagged) == page.report.num_held_out < 24

    def test_identical_pictures_get_identical_maps(self, world: World, tmp_path: Path) -> None:
        corpus = tmp_path / "pictures"
        for name in ("one.png", "other.png"):
            corpus.mkdir(exist_ok=True)
            picture(5).save(corpus / name)
        picture(6).save(corpus / "third.png")
        twins = dataclasses.replace(world, corpus=corpus)
        made = make_page(twins, tmp_path / "page.html", TINY_TEACHER, weights={TINY_TEACHER: world.weights})
        first, second, third = made.maps(0)
        np.testing.assert_array_equal(first, second)
        assert (first != third).any()

    def test_is_one_file_without_links_and_its_script_is_named_by_its_hash(self, page: Page) -> None:
        parser = _Parser()
        parser.feed(page.text)
        assert not parser.tags & {"link", "iframe", "object", "a", "base", "form"}
        assert not re.search(r"https?:|url\((?!#)|@import|(src|href)=[\"'](?!data:)", page.text)
        assert all(image["src"].startswith("data:image/") for image in page.images)
        assert "$" not in page.text.replace("${names}", "")
        (script,) = re.findall(r"<script>(.*?)</script>", page.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
        assert f'content="{policy}"' in page.text
        assert not re.search(r"fetch|XMLHttpRequest|import\b|eval|innerHTML", script)

    def test_its_size_is_told(self, page: Page) -> None:
        (told,) = re.findall(r"features take ([\d.]+) MB", page.text)
        assert float(told) * 1e6 == pytest.approx(page.report.num_bytes, rel=0.1)

    def test_hostile_names_are_text(self, page: Page) -> None:
        assert any(title.startswith(f"<b>bold/{HOSTILE}|<b>bold|") for title in page.titles)
        assert "<img src=x" not in page.text and "<b>bold" not in page.text
        assert {tuple(sorted(image)) for image in page.images} == {("alt", "src"), ("alt", "class", "src")}

    def test_the_same_inputs_give_the_same_bytes(self, world: World, tmp_path: Path) -> None:
        pages = [make_page(world, tmp_path / f"{i}.html", world.store, world.run, limit=3) for i in range(2)]
        assert pages[0].text == pages[1].text
        assert len(pages[0].report.pictures) == 3
        assert sorted(path.name for path in tmp_path.iterdir()) == ["0.html", "1.html"]


def test_commands_of_the_docs_can_be_typed() -> None:
    page = (Path(__file__).parents[2] / "docs" / "viz.md").read_text()
    commands = [parsed(line) for line in page.splitlines() if line.startswith("eupe viz ")]
    assert len(commands) == 3 and commands[-1]["foreground"] and commands[-1]["cell"] == 320


class TestForeground:
    def test_only_the_foreground_is_in_the_colours_of_its_own_components(self, world: World, tmp_path: Path) -> None:
        page = make_page(world, tmp_path / "page.html", world.other, foreground=True)
        dense = _view_0(world.other, page.keys, size=2 * TINY_SIZE).dense
        assert dense is not None
        mask, maps = find_foreground(dense), np.stack(page.maps(0))
        np.testing.assert_array_equal(maps[..., 3], mask * 255)
        oracle = PCA(3, svd_solver="full").fit(dense[mask].astype(float))
        scores, colours = oracle.transform(dense[mask].astype(float)), maps[mask].astype(int)
        for component in range(3):  # of either sign
            steps = np.diff(colours[scores[:, component].argsort(), component])
            assert (steps >= 0).all() or (steps <= 0).all()
        shares = "+".join(f"{100 * share:.0f}" for share in oracle.explained_variance_ratio_)
        assert f"{mask.mean():.0%} foreground" in page.text and f"{shares}% of its variance" in page.text
        assert "Only the <b>foreground</b> is in colour" in page.text and not page.report.notes

    def test_where_there_is_none_all_tokens_are_in_colour_and_the_page_says_why(
        self, world: World, tmp_path: Path
    ) -> None:
        """A map of 16 tokens: no cut leaves as many on both sides."""
        page, plain = (
            make_page(world, tmp_path / f"{foreground}.html", world.store, limit=1, foreground=foreground)
            for foreground in (True, False)
        )
        np.testing.assert_array_equal(page.maps(0), plain.maps(0))
        (note,) = page.report.notes
        words = "no foreground: its first component sets . of 16 tokens apart, fewer than"
        assert re.fullmatch(rf"first\.zarr: {words} {MIN_TOKENS}", note)
        assert f'<p class="note">{note.removeprefix("first.zarr: ")}</p>' in page.text
        assert "foreground" not in plain.text

    def test_the_foreground_is_asked_for_on_the_command_line(
        self, world: World, tmp_path: Path, run_eupe: Callable[..., Any]
    ) -> None:
        words = ("viz", world.other, "--images", world.corpus, "--limit", 2, "--out")
        assert run_eupe(*words, tmp_path / "plain.html").code == 0
        assert run_eupe(*words, tmp_path / "fore.html", "--foreground").code == 0
        plain, fore = ((tmp_path / f"{name}.html").read_text() for name in ("plain", "fore"))
        legend = "Only the <b>foreground</b> is in colour"
        assert legend in fore and legend not in plain


class TestFigure:
    def test_the_command_line_takes_the_side_of_its_cells(
        self, world: World, tmp_path: Path, run_eupe: Callable[..., Any]
    ) -> None:
        words = ("viz", world.other, "--images", world.corpus, "--limit", 2, "--out")
        for side in (None, 48, 96):
            out = tmp_path / f"{side}.png"
            assert run_eupe(*words, out, *([] if side is None else ["--cell", side])).code == 0
            assert Image.open(out).size == plan_figure(2, 2, side).size
        assert Image.open(tmp_path / "48.png").size != Image.open(tmp_path / "96.png").size

    @pytest.mark.parametrize("foreground", [False, True])
    def test_its_cells_are_the_views_and_maps_of_the_page(self, world: World, tmp_path: Path, foreground: bool) -> None:
        items, side = (world.store, world.other), 48
        page = make_page(world, tmp_path / "page.html", *items, limit=3, foreground=foreground)
        report = write_maps(
            [str(item) for item in items],
            images=world.corpus,
            out=tmp_path / "figure.png",
            limit=3,
            foreground=foreground,
            cell_px=side,
        )
        assert dataclasses.replace(page.report, out=report.out, num_bytes=report.num_bytes) == report
        drawn = Image.open(tmp_path / "figure.png")
        layout = plan_figure(3, 3, side)
        assert (drawn.mode, drawn.size) == ("RGB", layout.size)
        columns = [page.views(), page.maps(0), page.maps(1)]
        for row, column in itertools.product(range(3), range(3)):
            left, top = layout.corner(row, column)
            cell = np.asarray(drawn.crop((left, top, left + side, top + side))).astype(int)
            shown = Image.fromarray(columns[column][row])
            if column:
                assert np.abs(cell - _on_blank(shown.resize((side, side), Image.Resampling.BICUBIC))).max() <= 2
            else:
                assert np.abs(cell - np.asarray(shown.resize((side, side), Image.Resampling.BOX))).mean() < 12
        assert (np.asarray(drawn)[-layout.gap :] == 255).all() and (np.asarray(drawn)[:, : layout.gap] == 255).all()


def _view_0(path: Path, keys: list[str], *, size: int) -> Features:
    store = open_store(path)
    row_of = {sample["key"]: sample["row"] for sample in store.samples.to_pylist()}
    return store.read([row_of[key] for key in keys], [0] * len(keys), size=size)


def _on_blank(image: Image.Image) -> NDArray[np.float64]:
    pixels = np.asarray(image.convert("RGBA")).astype(float)
    alpha = pixels[..., 3:] / 255
    return pixels[..., :3] * alpha + np.array(BLANK) * (1 - alpha)


def _assert_same_maps(got: list[Pixels], expected: Pixels) -> None:
    """Features that differ by rounding (bf16, or fp16 in a store) agree but for a shade or two."""
    difference = np.abs(np.stack(got).astype(int) - expected.astype(int))
    assert difference.mean() < 4


class TestErrors:
    @pytest.fixture
    def out(self, tmp_path: Path) -> Iterator[Path]:
        """Yield the path of a page; check afterwards that the test wrote no page."""
        path = tmp_path / "page.html"
        yield path
        assert not path.is_file() and not list(tmp_path.glob(".page*"))

    def _refused(self, kind: type[EupeError], words: str, items: list[Any], images: Path, out: Path) -> None:
        with pytest.raises(kind, match=words) as refused:
            write_maps([str(item) for item in items], images=images, out=out)
        assert "\n" not in str(refused.value)

    def test_no_item(self, world: World, out: Path) -> None:
        self._refused(ConfigError, "at least one store", [], world.corpus, out)

    def test_what_is_none_of_the_three(self, world: World, out: Path) -> None:
        self._refused(ConfigError, "dino2 is not a store.*dinov2", ["dino2"], world.corpus, out)
        self._refused(ConfigError, "is not a store", [world.corpus], world.corpus, out)

    def test_an_unfinished_run(self, world: World, out: Path, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        shutil.copy(world.run / "config.json", tmp_path / "run")
        self._refused(RunError, "no student yet.*--resume", [tmp_path / "run"], world.corpus, out)

    def test_no_picture_in_common(self, world: World, out: Path, tmp_path: Path) -> None:
        stranger = make_corpus(tmp_path / "stranger", count=1, classes=1)
        (stranger / "class0" / "0000.png").rename(stranger / "stranger.png")
        self._refused(ConfigError, r"no features of any of the 1 pictures.*stranger\.png", [world.store], stranger, out)

    def test_another_picture_under_the_same_key(self, world: World, out: Path, tmp_path: Path) -> None:
        changed = tmp_path / "changed" / "class0" / "0000.png"
        changed.parent.mkdir(parents=True)
        picture(77).save(changed)
        self._refused(CorpusError, "class0/0000.png is not the file", [world.store], changed.parents[1], out)

    def test_a_picture_that_cannot_be_read(self, world: World, out: Path, tmp_path: Path) -> None:
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
        self._refused(CorpusError, r"bad\.png .*cannot be read", [world.run], tmp_path / "broken", out)

    def test_stores_of_different_crops(self, world: World, out: Path, tmp_path: Path) -> None:
        views = ViewSpec(policy="rrc", num_views=2, seed=1)
        other = make_store(tmp_path / "other.zarr", world.corpus, world.weights, views=views).path
        self._refused(ConfigError, "different views of .*--seed", [world.store, other], world.corpus, out)

    def test_weights_for_what_is_no_teacher(self, world: World, out: Path) -> None:
        store = str(world.store)
        with pytest.raises(ConfigError, match="not a teacher among"):
            write_maps([store], images=world.corpus, out=out, weights={store: world.weights})

    def test_limit(self, world: World, out: Path) -> None:
        with pytest.raises(ConfigError, match="--limit"):
            write_maps([str(world.store)], images=world.corpus, out=out, limit=0)

    def test_a_name_that_is_neither_a_page_nor_a_figure(self, world: World, tmp_path: Path) -> None:
        for name in ("maps.pdf", "maps", "maps.jpg"):
            with pytest.raises(ConfigError, match=r"must end in \.html for a page or in \.png"):
                write_maps([str(world.store)], images=world.corpus, out=tmp_path / name)

    def test_cells_of_a_page_have_no_size(self, world: World, out: Path) -> None:
        with pytest.raises(ConfigError, match="--cell is for figures"):
            write_maps([str(world.store)], images=world.corpus, out=out, cell_px=64)

    def test_cells_too_small_and_figures_too_big_to_be_drawn(self, world: World, tmp_path: Path) -> None:
        for cell_px, words in ((31, "at least 32 px, got 31"), (10_000, "more than 200,000,000")):
            with pytest.raises(ConfigError, match=words):
                write_maps([str(world.store)], images=world.corpus, out=tmp_path / "f.png", limit=2, cell_px=cell_px)
        assert not list(tmp_path.iterdir())

    def test_a_place_that_cannot_be_written(self, world: World, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("kept")
        (tmp_path / "folder.html").mkdir()
        with pytest.raises(ConfigError, match="is a folder; name a file in it"):
            write_maps([str(world.store)], images=world.corpus, out=tmp_path / "folder.html", limit=1)
        for place in (tmp_path / "file" / "page.html", Path("/proc/page.html")):
            with pytest.raises(StorageError, match="cannot be written"):
                write_maps([str(world.store)], images=world.corpus, out=place, limit=1)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.html"]


@needs_browser
@pytest.mark.parametrize("width", [1280, 700, 500])
def test_a_browser_shows_every_image(page: Page, browser: Browser, width: int) -> None:
    """Even where every script may run, so that a hostile name has its chance."""
    browser.open(page.path, width=width, any_script=True)
    images = "[...document.images]"
    assert browser.run(f"{images}.filter(image => image.naturalWidth && image.width > 60).length") == 24 * 5
    assert browser.run("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    browser.click("document.querySelector('label[for=cells]')")
    assert browser.run(f"{images}.filter(i => getComputedStyle(i).imageRendering === 'pixelated').length") == 24 * 4
    assert not browser.complaints()
