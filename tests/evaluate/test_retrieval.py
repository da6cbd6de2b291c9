"""Recalls against loops over the library's own embeddings, and COCO's layout gone wrong."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from language import ARCHS, CLIP, CLIP_SIZE, shrink, whole_model
from making import make_corpus, make_store, picture
from PIL import Image

from eupe.corpus.views import ViewSpec, draw_view, render_view
from eupe.errors import ConfigError, CorpusError, StoreError
from eupe.evaluate import retrieval as module
from eupe.evaluate.layouts import caption_split
from eupe.evaluate.prompts import AS_IT_IS, Classes
from eupe.evaluate.ranking import best_places, share_within
from eupe.evaluate.retrieval import retrieval
from eupe.evaluate.subject import Subject, open_subjects
from eupe.evaluate.text import TextSource, embed_texts, load_texts, save_texts
from eupe.evaluate.text_tower import load_tower
from eupe.teachers.registry import REGISTRY

WORDS = ("mug", "ball", "sign", "tree", "cat", "dog", "red", "blue", "two", "of", "and", "left")


@pytest.fixture(scope="module", autouse=True)
def small_models() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        yield


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Twelve pictures with one to three captions each, listed in no order; two captions are the same."""
    generator = np.random.default_rng(0)
    images, annotations = [], []
    (tmp_path / "val2017").mkdir()
    for i in range(12):
        picture(i).save(tmp_path / "val2017" / f"{i:03d}.png")
        images.append({"id": 100 - i, "file_name": f"{i:03d}.png", "width": 5})
        for _ in range(1 + i % 3):
            annotations.append({"image_id": 100 - i, "caption": " ".join(generator.choice(WORDS, 4)) + "\n"})
    annotations[3]["caption"] = annotations[0]["caption"]
    order = generator.permutation(len(annotations))
    listed = [{**annotations[j], "id": int(j)} for j in order]
    (tmp_path / "captions_val2017.json").write_text(json.dumps({"images": images, "annotations": listed}))
    return tmp_path


def subject_of(word: object, weights: Path | None = None) -> Subject:
    return open_subjects([str(word)], {} if weights is None else {str(word): weights})[0]


def test_places_are_counted_as_a_loop_counts_them() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        similarity = torch.randint(0, 4, (5, 9), generator=generator).double()
        own = torch.rand(5, 9, generator=generator) < 0.3
        own[:, 4] |= ~own.any(dim=1)
        wanted = []
        for row, mine in zip(similarity.tolist(), own.tolist(), strict=True):
            ranking = sorted(range(9), key=lambda c, row=row: (-row[c], c))
            wanted.append(next(place for place, c in enumerate(ranking) if mine[c]))
        assert best_places(similarity, own).tolist() == wanted
    assert share_within(torch.tensor([0, 1, 4, 5]), 5) == 0.75


def test_equal_embeddings_find_by_order_alone() -> None:
    assert best_places(torch.ones(4, 4), torch.eye(4).bool()).tolist() == [0, 1, 2, 3]


def test_recalls_are_those_of_the_library_s_own_model(
    coco: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, weights = whole_model(CLIP, tmp_path_factory.mktemp("w"))
    plain = json.loads((coco / "captions_val2017.json").read_text())
    names = {image["id"]: image["file_name"] for image in plain["images"]}
    order = [image["id"] for image in plain["images"]]
    captions = sorted(plain["annotations"], key=lambda each: order.index(each["image_id"]))
    owners = [order.index(each["image_id"]) for each in captions]
    tokens = open_clip.get_tokenizer(ARCHS[CLIP])([each["caption"] for each in captions])
    texts = model.encode_text(tokens, normalize=True).double().numpy()
    views = []
    for i in order:
        image = Image.open(coco / "val2017" / names[i]).convert("RGB")
        views.append(render_view(image, draw_view(ViewSpec(), "", 0, *image.size), CLIP_SIZE))
    normalised = (np.stack(views) / 255 - REGISTRY[CLIP].mean) / REGISTRY[CLIP].std
    images = model.encode_image(torch.from_numpy(normalised).permute(0, 3, 1, 2).float(), normalize=True)
    similarity = images.double().numpy() @ texts.T

    wanted: dict[str, float] = {}
    for k in (1, 5, 10):
        found = [any(owners[c] == i for c in np.argsort(-row, kind="stable")[:k]) for i, row in enumerate(similarity)]
        wanted[f"i2t_{k}"] = float(np.mean(found))
        found = [owners[c] in np.argsort(-column, kind="stable")[:k] for c, column in enumerate(similarity.T)]
        wanted[f"t2i_{k}"] = float(np.mean(found))
    source = TextSource(templates=AS_IT_IS, weights=weights)
    result = retrieval(subject_of(CLIP, weights), data=coco, texts=source)
    assert {name: result.scores[name] for name in wanted} == pytest.approx(wanted)
    assert result.scores["mean_recall"] == pytest.approx(np.mean(list(wanted.values())))
    assert next(iter(result.scores)) == "mean_recall"
    assert (result.data["pictures"], result.data["captions"]) == (12, 24)
    assert len(set(wanted.values())) > 3
    monkeypatch.setattr(module, "ROWS", 5)
    assert retrieval(subject_of(CLIP, weights), data=coco, texts=source).scores == result.scores
    fewer = retrieval(subject_of(CLIP, weights), data=coco, texts=source, limit=6)
    assert (fewer.data["pictures"], fewer.data["captions"]) == (6, 12)


def test_captions_are_cached_by_the_command_line(
    coco: Path, tmp_path_factory: pytest.TempPathFactory, run_eupe: Callable[..., Any]
) -> None:
    folder = tmp_path_factory.mktemp("w")
    _, weights = whole_model(CLIP, folder)
    out = folder / "c.safetensors"
    run_eupe("eval", "text", CLIP, "--captions", coco, "--text-weights", weights, "--out", out)
    assert load_texts(out).templates == AS_IT_IS
    assert len(load_texts(out).classes.names) == 23
    words = ["eval", "retrieval", CLIP, "--weights", f"{CLIP}={weights}", "--data", coco, "--json"]
    cached = json.loads(run_eupe(*words, "--text", out).out)["results"]
    assert cached == json.loads(run_eupe(*words, "--text-weights", weights).out)["results"]
    assert json.loads(run_eupe(*words, "--text", out, "--limit", 3).out)["results"][0]["data"]["pictures"] == 3
    table = run_eupe(*words[:-1], "--text", out).out.splitlines()
    assert table[-1].split()[0] == CLIP
    assert table[-1].split()[1:] == [f"{score:.4f}" for score in cached[0]["scores"].values()]

    tower = load_tower(REGISTRY[CLIP], weights=weights)
    few = load_texts(out).classes.names[:-1]
    save_texts(embed_texts(tower, Classes(few), AS_IT_IS), out)
    outcome = run_eupe(*words, "--text", out)
    assert (outcome.code, outcome.out) == (2, "")
    assert "(1 of 24 are missing)" in " ".join(outcome.err.split())
    save_texts(embed_texts(tower, Classes(few)), out)
    assert "holds class names in templates, not captions" in " ".join(run_eupe(*words, "--text", out).err.split())


def test_a_store_is_searched_if_it_has_one_view_of_each_picture(
    coco: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("w")
    _, weights = whole_model(CLIP, folder)
    source = TextSource(templates=AS_IT_IS, weights=weights)
    made = [
        make_store(folder / f"{i}.zarr", coco / "val2017", weights, teacher=CLIP, views=views, sizes=(CLIP_SIZE,))
        for i, views in enumerate((ViewSpec(), ViewSpec(policy="rrc", num_views=2)))
    ]
    stored = retrieval(subject_of(made[0].path), data=coco, texts=source)
    assert stored.scores == retrieval(subject_of(CLIP, weights), data=coco, texts=source).scores
    with pytest.raises(StoreError, match="holds several views of each picture; extract one with --views center"):
        retrieval(subject_of(made[1].path), data=coco, texts=source)
    with pytest.raises(ConfigError, match="pixels leads to no text space"):
        retrieval(subject_of("pixels"), data=coco, texts=source)


def test_annotations_are_found_in_their_folder(coco: Path) -> None:
    (coco / "annotations").mkdir()
    (coco / "captions_val2017.json").rename(coco / "annotations" / "captions_val2017.json")
    split = caption_split(coco)
    assert split.pictures.keys[0] == "val2017/000.png"
    assert split.picture_of.tolist() == sorted(split.picture_of.tolist())
    assert len(split.captions) == len(split.picture_of) == 24


def edited(plain: dict[str, Any], change: str) -> Any:
    images, annotations = plain["images"], plain["annotations"]
    match change:
        case "twice":
            images[3]["id"] = images[2]["id"]
        case "caption twice":
            annotations[3]["id"] = annotations[2]["id"]
        case "homeless":
            annotations[5]["image_id"] = 7
        case "silent":
            plain["annotations"] = [each for each in annotations if each["image_id"] != images[4]["id"]]
        case "gone":
            images[1]["file_name"] = "gone.png"
        case "empty":
            plain["images"], plain["annotations"] = [], []
        case "no name":
            del images[0]["file_name"]
        case "no words":
            annotations[0]["caption"] = " "
        case "numbers":
            annotations[0]["caption"] = 5
        case "odd id":
            images[0]["id"] = [1]
        case "list":
            return [plain]
    return plain


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("twice", "has picture 98 more than once"),
        ("caption twice", r"has caption \d+ more than once"),
        ("homeless", "belongs to picture 7, which is not listed"),
        ("silent", r"has no caption for 004.png \(1 of 12 pictures have none\)"),
        ("gone", r"names 1 files that are missing; the first is .*gone.png"),
        ("empty", "lists no pictures"),
        ("no name", "is not a list of COCO captions: KeyError: 'file_name'"),
        ("no words", "is not a list of COCO captions: ValueError: an empty string"),
        ("numbers", "is not a list of COCO captions: TypeError: 5 is not a string"),
        ("odd id", "is not a list of COCO captions: TypeError"),
        ("list", "is not a list of COCO captions: TypeError"),
    ],
)
def test_lists_of_captions_gone_wrong_are_refused(change: str, said: str, coco: Path) -> None:
    path = coco / "captions_val2017.json"
    path.write_text(json.dumps(edited(json.loads(path.read_text()), change)))
    with pytest.raises(CorpusError, match=said):
        caption_split(coco)


def test_a_folder_that_is_not_coco_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CorpusError, match=r"holds no captions in COCO's layout: .*annotations/captions_val2017\.json are"
    ):
        caption_split(make_corpus(tmp_path, count=1))
    (tmp_path / "captions_val2017.json").write_text("{")
    with pytest.raises(CorpusError, match="is not a list of COCO captions: JSONDecodeError"):
        caption_split(tmp_path)
