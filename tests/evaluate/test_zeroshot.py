"""Zero-shot accuracy against the libraries' own models, and through heads against arithmetic by hand."""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from language import ARCHS, CLIP, CLIP_SIZE, PE, SIGLIP, shrink, whole_model
from making import make_corpus, make_store, tiny_config
from safetensors.torch import load_file, save_file
from torch import Tensor

from eupe.corpus.views import ViewSpec, draw_view, render_view
from eupe.errors import ConfigError, RunError
from eupe.evaluate.judged_pictures import centre
from eupe.evaluate.prompts import Classes
from eupe.evaluate.splits import labelled_splits
from eupe.evaluate.subject import Subject, open_subjects
from eupe.evaluate.text import TextSource, embed_texts, save_texts
from eupe.evaluate.text_space import choose_way, to_text_space, ways_to_text
from eupe.evaluate.text_tower import load_tower
from eupe.evaluate.zeroshot import zeroshot
from eupe.models.encoder import load_encoder
from eupe.store.layout import SUMMARY
from eupe.teachers.registry import REGISTRY
from eupe.train.loop import train

NAMES = ("red mug", "blue ball", "photo of a mug")
MANY = (*NAMES, "mug", "ball", "a red red ball", "of a photo")


@dataclass(frozen=True)
class Chain:
    """A teacher's store, a proxy of it, the proxy's store, and students of the proxy alone and of both stores."""

    weights: Path
    teacher_store: Path
    proxy: Path
    proxy_store: Path
    student: Path
    of_both: Path


@pytest.fixture(scope="module", autouse=True)
def small_models() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        yield


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> Chain:
    folder = tmp_path_factory.mktemp("chain")
    weights = whole_model(CLIP, folder)[1]
    views, sizes = ViewSpec(policy="rrc", num_views=2), (CLIP_SIZE,)
    teacher = make_store(folder / "t.zarr", tiny_corpus, weights, teacher=CLIP, views=views, sizes=sizes).path

    def forward_backward(name: str, target: Any, **options: Any) -> Path:
        config = tiny_config(target, folder / name, steps=8, head_width=16, lr=3e-3, seed=1, **options)
        train(config)
        return config.out

    proxy = forward_backward("proxy", teacher)
    of_proxy = make_store(
        folder / "p.zarr", tiny_corpus, proxy / "student.safetensors", teacher=str(proxy), views=views, sizes=sizes
    ).path
    return Chain(
        weights,
        Path(str(teacher)),
        proxy,
        Path(str(of_proxy)),
        student := forward_backward("student", of_proxy, normalise="phi-s"),
        side_by_side(folder / "both", student, proxy),
    )


def side_by_side(folder: Path, first: Path, second: Path) -> Path:
    """A finished run with the heads of two: as if it had learnt from the targets of both."""
    shutil.copytree(first, folder)
    for file in ("heads.safetensors", "norms.safetensors"):
        renamed = {name.replace("0.", "1.", 1): value for name, value in load_file(second / file).items()}
        save_file({**load_file(first / file), **renamed}, folder / file)
    specs = [json.loads((run / "config.json").read_text()) for run in (first, second)]
    specs[0]["targets"] += specs[1]["targets"]
    (folder / "config.json").write_text(json.dumps(specs[0]))
    return folder


def subject_of(word: object, weights: Path | None = None, *, untrained: bool = False) -> Subject:
    given = {} if weights is None else {str(word): weights}
    return open_subjects([str(word)], given, untrained=untrained)[-1]


def pixels(corpus: Path, size: int, name: str) -> tuple[Tensor, list[str]]:
    """Centre views of all pictures, normalised by hand, and their folders."""
    val = labelled_splits(corpus).val
    images = [val.pictures.image(i) for i in range(len(val.pictures))]
    views = [render_view(image, draw_view(ViewSpec(), "", 0, *image.size), size) for image in images]
    mean, std = (np.array(values) for values in (REGISTRY[name].mean, REGISTRY[name].std))
    normalised = (np.stack(views).astype(np.float64) / 255 - mean) / std
    return torch.from_numpy(normalised).permute(0, 3, 1, 2).float(), list(val.labels)


@pytest.mark.parametrize("name", [CLIP, PE, SIGLIP])
def test_probabilities_are_those_of_the_library_s_own_model(name: str, tmp_path: Path) -> None:
    model, path = whole_model(name, tmp_path / "model")
    corpus = make_corpus(tmp_path / "pictures", count=9)
    images, labels = pixels(corpus, REGISTRY[name].native_size, name)
    tokenizer = (
        open_clip.get_tokenizer(ARCHS[name]) if name != SIGLIP else load_tower(REGISTRY[name], weights=path).tokenize
    )
    prompts = [f"a photo of a {each}." for each in MANY]
    said, seen = model.encode_text(tokenizer(prompts), normalize=True), model.encode_image(images, normalize=True)
    bias = 0.0 if model.logit_bias is None else model.logit_bias
    wanted = (model.logit_scale.exp() * seen @ said.T + bias).double()

    subject, source = (
        subject_of(name, path),
        TextSource(Classes(MANY, ("class0", "class1", "class2", *"abcd")), weights=path),
    )
    way = choose_way(subject, None)
    assert (way.name, way.heads) == (name, ())
    summaries = subject.encode_views(
        labelled_splits(corpus).val.pictures, kinds=[SUMMARY], size=subject.size(None), crop=centre
    )
    assert summaries.summary is not None
    assert source.classes is not None
    logits = source.embed(way.teacher, source.classes).logits(to_text_space(subject, way, summaries.summary))
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits.softmax(dim=1), wanted.softmax(dim=1), rtol=0, atol=1e-5)
    assert wanted.softmax(dim=1).std(dim=0).max() > 1e-4

    scores = zeroshot(subject, data=corpus, texts=source).scores
    truth = [["class0", "class1", "class2"].index(label) for label in labels]
    ranks = [
        sorted(range(7), key=lambda c, row=row: (-row[c], c)).index(t)
        for row, t in zip(logits.tolist(), truth, strict=True)
    ]
    assert scores["top1"] == sum(rank < 1 for rank in ranks) / 9
    assert scores["top5"] == sum(rank < 5 for rank in ranks) / 9
    assert scores["majority"] == pytest.approx(1 / 3)
    chances = [row[t] for row, t in zip(wanted.softmax(dim=1).tolist(), truth, strict=True)]
    assert scores["cross_entropy"] == pytest.approx(-sum(map(math.log, chances)) / 9, abs=1e-4)


def test_a_head_leads_into_the_teacher_s_own_space(chain: Chain, tiny_corpus: Path) -> None:
    """Proxy to teacher, and student to proxy to teacher, by hand: head, gain, and the normalisation undone."""
    images, _ = pixels(tiny_corpus, 64, CLIP)
    for run, hops in ((chain.proxy, [chain.proxy]), (chain.student, [chain.student, chain.proxy])):
        subject = subject_of(run)
        way = choose_way(subject, None)
        assert way.heads == tuple((hop, 0) for hop in hops)
        encoder = load_encoder(run).eval()
        with torch.inference_mode():
            summary = encoder(images).summary
        assert summary is not None
        wanted = summary.double().numpy()
        for hop in hops:
            wanted = by_hand(wanted, hop)
        got = to_text_space(subject, way, summary).numpy()
        wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
        assert np.abs(got - wanted).max() < 1e-5
    assert choose_way(subject_of(chain.proxy), CLIP).name == CLIP
    assert choose_way(subject_of(chain.student), CLIP).name == f"proxy,{CLIP}"


def by_hand(tokens_ND: np.ndarray[Any, Any], run: Path) -> np.ndarray[Any, Any]:
    """The first target's summary as its teacher would have said it."""
    heads, norms = (
        {name: value.double().numpy() for name, value in load_file(run / file).items()}
        for file in ("heads.safetensors", "norms.safetensors")
    )
    hidden = tokens_ND @ heads["0.summary.0.weight"].T
    hidden = (hidden - hidden.mean(1, keepdims=True)) / np.sqrt(hidden.var(1, keepdims=True) + 1e-5)
    hidden = hidden * heads["0.summary.1.weight"] + heads["0.summary.1.bias"]
    hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    said = norms["0.summary.gain"] * (hidden @ heads["0.summary.3.weight"].T)
    if "0.summary.rotation" in norms:
        said = said @ norms["0.summary.rotation"]
    made: np.ndarray[Any, Any] = said * norms["0.summary.scale"] + norms["0.summary.centre"]
    return made


def test_students_come_near_to_what_their_teacher_says(chain: Chain, tiny_corpus: Path) -> None:
    """Undoing the normalisation is most of it: the teacher's mean is far from zero."""
    val = labelled_splits(tiny_corpus).val

    def embedded(word: object, weights: Path | None = None) -> Tensor:
        subject = subject_of(word, weights)
        seen = subject.encode_views(val.pictures, kinds=[SUMMARY], size=subject.size(None), crop=centre)
        assert seen.summary is not None
        return to_text_space(subject, choose_way(subject, CLIP), seen.summary)

    teacher = embedded(CLIP, chain.weights)
    for run in (chain.proxy, chain.student):
        assert (embedded(run) * teacher).sum(dim=1).mean() > 0.8


def test_a_store_is_judged_as_what_made_it(chain: Chain, tiny_corpus: Path, tmp_path: Path) -> None:
    source = TextSource(Classes(NAMES, ("class0", "class1", "class2")), weights=chain.weights)
    made = make_store(
        tmp_path / "s.zarr", tiny_corpus, chain.weights, teacher=CLIP, views=ViewSpec(), sizes=(CLIP_SIZE,)
    )
    of_proxy = make_store(
        tmp_path / "p.zarr",
        tiny_corpus,
        chain.proxy / "student.safetensors",
        teacher=str(chain.proxy),
        views=ViewSpec(),
        sizes=(CLIP_SIZE,),
    )
    for store, word, weights in ((made, CLIP, chain.weights), (of_proxy, chain.proxy, None)):
        stored = zeroshot(subject_of(store.path), data=tiny_corpus, texts=source)
        run = zeroshot(subject_of(word, weights), data=tiny_corpus, texts=source, size=CLIP_SIZE)
        assert stored.scores == pytest.approx(run.scores, abs=2e-3)
        assert stored.protocol["teacher"] == run.protocol["teacher"]
    two_views = zeroshot(subject_of(chain.teacher_store), data=tiny_corpus, texts=source)
    assert two_views.data["val"] == 48


def test_a_proxy_that_was_trained_anew_since_leads_nowhere(chain: Chain, tiny_corpus: Path) -> None:
    texts = TextSource(Classes(NAMES, ("class0", "class1", "class2")), weights=chain.weights)
    weights = chain.proxy / "student.safetensors"
    whole = weights.read_bytes()
    changed = load_file(weights)
    next(iter(changed.values())).mul_(1.001)
    try:
        save_file(changed, weights, metadata={"format": "pt"})
        for word in (chain.student, chain.proxy_store):
            with pytest.raises(RunError, match=f"proxy was retrained after {re.escape(str(word))} learned from it"):
                zeroshot(subject_of(word), data=tiny_corpus, texts=texts)
        zeroshot(subject_of(chain.proxy), data=tiny_corpus, texts=texts)
    finally:
        weights.write_bytes(whole)


def test_the_way_is_the_one_that_is_asked_for(chain: Chain) -> None:
    subject = subject_of(chain.of_both)
    assert [way.name for way in ways_to_text(subject)[0]] == [f"proxy,{CLIP}", CLIP]
    assert choose_way(subject, f"proxy,{CLIP}").heads == ((chain.of_both, 0), (chain.proxy, 0))
    assert choose_way(subject, CLIP).heads == ((chain.of_both, 1),)
    with pytest.raises(ConfigError, match=rf"several text spaces; choose with --space among proxy,{CLIP}, {CLIP}$"):
        choose_way(subject, None)
    with pytest.raises(ConfigError, match="does not lead to the text space of siglip, only to proxy"):
        choose_way(subject, "siglip")


def test_what_leads_nowhere_is_told_why(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="pixels leads to no text space: raw pixels do not come from a teacher"):
        choose_way(subject_of("pixels"), None)
    with pytest.raises(
        ConfigError, match=r"the summary of clip-b16 is taken before the projection .* that of clip-b16-proj after"
    ):
        choose_way(subject_of("clip-b16"), CLIP)
    run = tmp_path / "run"
    run.mkdir()
    for file in ("student.json", "student.safetensors", "report.json"):
        (run / file).symlink_to(chain.student / file)
    spec = json.loads((chain.student / "config.json").read_text())
    (target,) = spec["targets"]
    for changed, said in (
        ({"teacher": "clip-b16"}, "that of clip-b16-proj after it"),
        ({"teacher": "dinov2-s"}, "dinov2-s has no text space"),
        ({"teacher": "hf:somewhere/else"}, "hf:somewhere/else has no text space"),
        ({"teacher": "runs/gone"}, "there is no run runs/gone any more"),
        ({"teacher": str(run)}, "is its own teacher"),
        ({"summary_dim": 0}, "has no head for the summary of proxy"),
    ):
        (run / "config.json").write_text(json.dumps({**spec, "targets": [{**target, **changed}]}))
        with pytest.raises(ConfigError, match=said):
            choose_way(subject_of(run), None)
    (run / "report.json").unlink()
    with pytest.raises(RunError, match="is not finished"):
        choose_way(subject_of(run), None)


def test_zero_shot_on_the_command_line(chain: Chain, tmp_path: Path, run_eupe: Callable[..., Any]) -> None:
    """Cached embeddings judge as the tower does; classes come from a file, or from the folders; val is judged."""
    data = tmp_path / "data"
    for split, count in (("train", 3), ("val", 9)):
        make_corpus(data / split, count=count)
    (tmp_path / "classes.txt").write_text("\n".join(NAMES))
    words = ["eval", "zeroshot", chain.student, CLIP, "--data", data, "--weights", f"{CLIP}={chain.weights}", "--json"]
    words += ["--results", tmp_path / "all.jsonl"]

    def judged(*more: object) -> list[dict[str, Any]]:
        return list(json.loads(run_eupe(*words, *more).out)["results"])

    with_tower = judged("--classes", tmp_path / "classes.txt", "--text-weights", chain.weights)
    assert [result["data"]["val"] for result in with_tower] == [9, 9]
    assert [result["protocol"]["teacher"] for result in with_tower] == [f"proxy,{CLIP}", CLIP]
    assert "top5" not in with_tower[0]["scores"]
    tower = load_tower(REGISTRY[CLIP], weights=chain.weights)
    save_texts(embed_texts(tower, Classes(NAMES)), tmp_path / "t.safetensors")
    assert judged("--text", tmp_path / "t.safetensors") == with_tower

    (tmp_path / "templates.txt").write_text("{}\nof a {} {}\n")
    others = [
        judged("--text-weights", chain.weights),
        judged("--text", CLIP, "--text-weights", chain.weights, "--templates", tmp_path / "templates.txt"),
        judged("--text", tmp_path / "t.safetensors", "--size", 64),
    ]
    found = [[result["scores"]["cross_entropy"] for result in results] for results in (with_tower, *others)]
    assert len({tuple(scores) for scores in found}) == 4
    assert others[0][0]["data"]["classes"] == 3
    assert len((tmp_path / "all.jsonl").read_text().splitlines()) == 10


def test_an_untrained_student_has_untrained_heads(chain: Chain, tiny_corpus: Path) -> None:
    source = TextSource(Classes(NAMES, ("class0", "class1", "class2")), weights=chain.weights)
    trained, untrained = (subject_of(chain.student, untrained=fresh) for fresh in (False, True))
    way = choose_way(untrained, None)
    summary = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    drawn = to_text_space(untrained, way, summary)
    assert (drawn - to_text_space(trained, way, summary)).abs().max() > 1e-3
    assert torch.equal(drawn, to_text_space(untrained, way, summary))
    assert zeroshot(untrained, data=tiny_corpus, texts=source).name == f"{chain.student}, untrained"


def test_one_class_is_refused_and_integers_are_in_order(
    chain: Chain, tmp_path: Path, tiny_corpus: Path, run_eupe: Callable[..., Any]
) -> None:
    """Name i of a list is class i: each folder's own picture, embedded, stands in for the text of its name."""
    with pytest.raises(ConfigError, match="are of one class, class0, so there is nothing to tell apart"):
        zeroshot(subject_of(CLIP, chain.weights), data=make_corpus(tmp_path / "one", classes=1), texts=TextSource())
    pictures = sorted(tiny_corpus.rglob("*.png"))[:12]
    for i, path in enumerate(pictures):
        (tmp_path / "d" / str(i)).mkdir(parents=True)
        shutil.copy(path, tmp_path / "d" / str(i))
    subject = subject_of(CLIP, chain.weights)
    tower = load_tower(REGISTRY[CLIP], weights=chain.weights)
    texts = embed_texts(tower, Classes(tuple(f"name{i}" for i in range(12))))
    views = labelled_splits(tmp_path / "d").val.pictures
    order = [int(key.split("/")[0]) for key in views.keys]
    seen = subject.encode_views(views, kinds=[SUMMARY], size=CLIP_SIZE, crop=centre).summary
    assert seen is not None
    perfect = torch.nn.functional.normalize(seen, dim=1)[torch.tensor(order).argsort()]
    save_texts(replace(texts, embeddings=perfect), tmp_path / "t.safetensors")
    words = ["eval", "zeroshot", CLIP, "--weights", f"{CLIP}={chain.weights}", "--data", tmp_path / "d"]
    outcome = run_eupe(*words, "--text", tmp_path / "t.safetensors", "--size", CLIP_SIZE)
    assert outcome.code == 0 and "1.0000" in outcome.out, outcome
    assert "judged: 12 pictures among 12 names; 12 classes (0, 1, 2, 3, 4, and 7 more)" in outcome.out


def test_a_way_chooses_among_heads_on_the_command_line(
    chain: Chain, tmp_path: Path, tiny_corpus: Path, run_eupe: Callable[..., Any]
) -> None:
    tower = load_tower(REGISTRY[CLIP], weights=chain.weights)
    classes = Classes(NAMES, ("class0", "class1", "class2"))
    save_texts(embed_texts(tower, classes), tmp_path / "t.safetensors")
    words = ["eval", "zeroshot", chain.of_both, "--data", tiny_corpus, "--text", tmp_path / "t.safetensors", "--json"]
    found = [json.loads(run_eupe(*words, "--space", way).out)["results"][0] for way in (CLIP, f"proxy,{CLIP}")]
    assert found[0]["scores"]["cross_entropy"] != found[1]["scores"]["cross_entropy"]
    assert json.loads(run_eupe(*words).out)["results"][0]["protocol"]["teacher"] == CLIP
    refused = run_eupe("eval", "zeroshot", "pixels", "--data", tiny_corpus)
    assert refused.code == 2
    assert refused.err.startswith("error: pixels leads to no text space")


def test_the_text_tower_has_the_weights_that_are_given(
    chain: Chain, tmp_path: Path, tiny_corpus: Path, run_eupe: Callable[..., Any]
) -> None:
    _, others = whole_model(CLIP, tmp_path / "others", seed=5)
    words = ["eval", "zeroshot", CLIP, "--data", tiny_corpus, "--weights", f"{CLIP}={chain.weights}", "--json"]
    found = [
        json.loads(run_eupe(*words, "--text-weights", path).out)["results"][0]["scores"]["cross_entropy"]
        for path in (chain.weights, others, chain.weights)
    ]
    assert found[0] == found[2] != found[1]


def test_retrieval_takes_a_size_and_a_way_on_the_command_line(
    chain: Chain, tmp_path: Path, run_eupe: Callable[..., Any]
) -> None:
    keys = [path.name for path in sorted(make_corpus(tmp_path / "made", count=12, classes=1).rglob("*.png"))]
    next(path for path in (tmp_path / "made").iterdir() if path.is_dir()).rename(tmp_path / "val2017")
    images = [{"id": i, "file_name": key} for i, key in enumerate(keys)]
    captions = [{"id": i, "image_id": i, "caption": f"{MANY[i % 7]} {MANY[i // 7]}"} for i in range(len(keys))]
    (tmp_path / "captions_val2017.json").write_text(json.dumps({"images": images, "annotations": captions}))
    words = ["eval", "retrieval", chain.of_both, "--data", tmp_path, "--text-weights", chain.weights, "--json"]

    def judged(*more: object) -> Any:
        outcome = run_eupe(*words, *more)
        assert outcome.code == 0, outcome.err
        return json.loads(outcome.out)["results"][0]

    plain, larger, around = (judged("--space", CLIP, *m) for m in ([], ["--size", 48], ["--space", f"proxy,{CLIP}"]))
    assert [one["protocol"]["size"] for one in (plain, larger, around)] == [CLIP_SIZE, 48, CLIP_SIZE]
    assert [one["protocol"]["teacher"] for one in (plain, around)] == [CLIP, f"proxy,{CLIP}"]
    assert plain["scores"] != larger["scores"] and plain["scores"] != around["scores"]
