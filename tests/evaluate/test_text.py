"""Text towers against the models that they are part of, and the file that their embeddings are kept in."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import safetensors.torch
import torch
from language import ARCHS, CLIP, PE, SIGLIP, shrink, whole_model
from making import SIGLIP_WORDS

from eupe.errors import ConfigError, EupeError, TeacherError
from eupe.evaluate.prompts import Classes, class_numbers, folder_classes, read_classes, read_templates
from eupe.evaluate.text import TextSource, embed_texts, load_texts, open_source, save_texts
from eupe.evaluate.text_tower import TextTower, load_tower, text_model
from eupe.teachers.registry import REGISTRY

PROMPTS = ["a photo of a Red MUG.", "two &amp; a   half", "caf\u00e9 \u4e2d \U0001f600", "", "word " * 90, "a mug."]
TEMPLATES = ("a photo of a {}.", "{}, {} and nothing else", "a drawing of a {}.")


@pytest.fixture(autouse=True)
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


@pytest.mark.parametrize("name", [CLIP, PE])
def test_a_tower_says_what_the_whole_model_says(name: str, tmp_path: Path) -> None:
    model, path = whole_model(name, tmp_path)
    wanted = model.encode_text(open_clip.get_tokenizer(ARCHS[name])(PROMPTS), normalize=True)
    tower = load_tower(REGISTRY[name], weights=path)
    got = tower(PROMPTS)
    assert got.shape == (len(PROMPTS), REGISTRY[name].summary_dim)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
    assert torch.cdist(wanted, wanted)[~torch.eye(len(PROMPTS), dtype=torch.bool)].min() > 1e-3
    assert (tower.logit_scale, tower.logit_bias) == (pytest.approx(model.logit_scale.exp().item()), 0.0)
    assert not any(part.startswith("visual") for part, _ in tower.model.named_modules())


def test_batches_do_not_change_a_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = load_tower(REGISTRY[CLIP], weights=whole_model(CLIP, tmp_path)[1])
    at_once, steps = tower(PROMPTS), []
    monkeypatch.setattr("eupe.evaluate.text_tower.BATCH", 4)
    torch.testing.assert_close(tower(PROMPTS, lambda done, of: steps.append((done, of))), at_once, rtol=0, atol=1e-6)
    assert steps == [(4, 6), (6, 6)]


def test_weights_come_in_the_shapes_that_users_have(tmp_path: Path) -> None:
    """A state dict of a training on several GPUs, a repository with another file, the names of PE-core's authors."""
    model, path = whole_model(PE, tmp_path / "a")
    wanted = load_tower(REGISTRY[PE], weights=path)(PROMPTS)
    state = model.state_dict()
    wrapped = {f"module.{name}": value for name, value in {**state, "logit_scale": state["logit_scale"][None]}.items()}
    torch.save({"epoch": 3, "state_dict": wrapped, "optimizer": {}}, tmp_path / "wrapped.pt")
    safetensors.torch.save_file({"head.weight": torch.zeros(1)}, tmp_path / "a" / "model.safetensors")
    torch.save({name.removeprefix("text."): value for name, value in state.items()}, tmp_path / "authors.pt")
    for weights in (tmp_path / "wrapped.pt", tmp_path / "a", tmp_path / "authors.pt"):
        assert torch.equal(load_tower(REGISTRY[PE], weights=weights)(PROMPTS), wanted)


def test_siglip_tokenises_as_open_clip_configures_it(tmp_path: Path) -> None:
    """Underscores are spaces, case and punctuation go, padded to 64; the tokenizer lies beside the weights."""
    model, path = whole_model(SIGLIP, tmp_path)
    words = ["a", "photo", "of", "red", "mug"]
    ids = torch.tensor([[SIGLIP_WORDS.index(word) for word in words] + [1] * (64 - len(words))])
    wanted = model.encode_text(ids, normalize=True)
    for weights in (path, tmp_path):
        tower = load_tower(REGISTRY[SIGLIP], weights=weights)
        torch.testing.assert_close(tower(["A photo, of Red_MUG!"]), wanted, rtol=0, atol=1e-6)
        assert tower.logit_bias == -3.0


def test_a_class_is_the_mean_of_its_prompts_as_open_clip_has_it(tmp_path: Path) -> None:
    model, path = whole_model(CLIP, tmp_path)
    names = ("mug", "{}", "red ball", "mug")
    tokenizer = open_clip.get_tokenizer(ARCHS[CLIP])
    said = [lambda name, template=template: template.replace("{}", name) for template in TEMPLATES]
    wanted = open_clip.build_zero_shot_classifier(model, tokenizer, names, said, num_classes_per_batch=3).T
    got = embed_texts(load_tower(REGISTRY[CLIP], weights=path), Classes(names), TEMPLATES)
    torch.testing.assert_close(got.embeddings, wanted, rtol=0, atol=1e-6)
    one = embed_texts(load_tower(REGISTRY[CLIP], weights=path), Classes(names), TEMPLATES[:1])
    assert (one.embeddings - got.embeddings).abs().max() > 1e-3


def test_every_teacher_with_a_text_space_has_its_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip's whole model has the row's image tower, its weights, and texts as wide as its summary."""
    monkeypatch.undo()
    with_text = {name: text_model(row) for name, row in REGISTRY.items()}
    assert {name for name, model in with_text.items() if model} == {
        name for name in REGISTRY if name.endswith("-proj") or (name.startswith("siglip") and "naflex" not in name)
    }
    for name in ("siglip2-naflex-b", "tipsv2-b"):
        with pytest.raises(TeacherError, match=f"open_clip does not have the text tower of {name}"):
            load_tower(REGISTRY[name])
    for name, model in with_text.items():
        if model is None:
            continue
        arch, _, tag = model.partition("@")
        config, row = open_clip.get_model_config(arch), REGISTRY[name]
        assert tag in open_clip.list_pretrained_tags_by_model(arch)
        assert config["embed_dim"] == row.summary_dim
        assert config["vision_cfg"].get("timm_model_name", "") == (row.architecture if row.backend == "timm" else "")
        vocabulary = {"siglip-": 32000, "siglip2": 256000, "metacli": 901629}.get(name[:7], 49408)
        assert config["text_cfg"]["vocab_size"] == vocabulary


def test_embeddings_are_kept_in_a_file_with_their_words(tmp_path: Path, run_eupe: Callable[..., Any]) -> None:
    _, path = whole_model(CLIP, tmp_path)
    (tmp_path / "classes.txt").write_text("n1\tred mug\nn2\tball\n")
    (tmp_path / "templates.txt").write_text("\n".join(TEMPLATES))
    out = tmp_path / "deep" / "text.safetensors"
    words = ["eval", "text", CLIP, "--classes", tmp_path / "classes.txt", "--text-weights", path, "--out", out]
    report = json.loads(run_eupe(*words, "--templates", tmp_path / "templates.txt", "--json").out)
    assert (report["teacher"], report["embeddings"], report["width"]) == (CLIP, 2, 24)
    kept = load_texts(out)
    classes = Classes(("red mug", "ball"), ("n1", "n2"))
    made = embed_texts(load_tower(REGISTRY[CLIP], weights=path), classes, TEMPLATES)
    assert (kept.teacher, kept.classes, kept.templates) == (CLIP, classes, TEMPLATES)
    assert torch.equal(kept.embeddings, made.embeddings)
    assert (kept.logit_scale, kept.logit_bias) == (made.logit_scale, made.logit_bias)
    assert kept.words_digest == made.words_digest

    assert f"teacher: {CLIP}" in run_eupe(*words).out
    assert load_texts(out).templates == ("a photo of a {}.",)
    assert load_texts(out).words_digest != made.words_digest

    out.write_bytes(b"somebody's")
    refused = run_eupe(*words)
    assert refused.code == 2 and "nothing in it shows that eupe made it" in refused.err
    assert out.read_bytes() == b"somebody's"
    assert run_eupe(*words, "--overwrite").code == 0 and load_texts(out).classes == classes


def test_the_tower_runs_once_for_all_subjects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = TextSource(weights=whole_model(CLIP, tmp_path)[1])
    first = source.embed(REGISTRY[CLIP], Classes(("mug",)))
    monkeypatch.setattr(TextTower, "__call__", None)
    assert source.embed(REGISTRY[CLIP], Classes(("mug",))) is first


@pytest.mark.parametrize(
    ("text", "folders", "numbers"),
    [
        ("b\nc\na", ["a", "b", "c"], {"a": 2, "b": 0, "c": 1}),
        ("red mug\nball\nnever seen", ["ball", "red_mug"], {"red_mug": 0, "ball": 1}),
        ("tench\ngoldfish", ["n1", "n0"], {"n0": 0, "n1": 1}),
        ("crane\ncrane", ["n1", "n0"], {"n0": 0, "n1": 1}),
        ("n7\tcrane\nn1\tcrane\nn0\tmug\n\n", ["n1", "n7"], {"n7": 0, "n1": 1}),
    ],
)
def test_classes_find_their_folders(text: str, folders: list[str], numbers: dict[str, int], tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text(text)
    assert class_numbers(read_classes(tmp_path / "classes.txt"), [*folders, *folders], data="d") == numbers


def test_folders_can_name_their_classes() -> None:
    assert folder_classes(["red_mug", "ball", "ball"]) == Classes(("ball", "red mug"), ("ball", "red_mug"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mug\nball\nsign", "3 class names and 2 folders in d, and no name matches a folder \\(mug, ball, sign agai"),
        ("n0\nmug", "1 of the 2 folders in d have no class: n1, and 1 classes have no folder \\(mug\\)"),
        ("n0\ta\nn2\tb", "1 of the 2 folders in d have no class: n1, and 1 classes have no folder \\(n2\\)"),
        ("n0\ta\nb", "in some lines, but not in 'b'"),
        ("n0\ta\nn1\t", "in some lines, but not in"),
        ("n0\ta\nn0\tb", "names folder n0 more than once"),
        (" \n\n", "holds no class names"),
        (b"\xff\xfe\x00", "class names cannot be read from"),
        (None, "class names cannot be read from"),
    ],
)
def test_classes_that_do_not_fit_are_refused(text: str | bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=said):
        class_numbers(read_classes(path), ["n0", "n1"], data="d")


def test_a_template_needs_a_place_for_the_name(tmp_path: Path) -> None:
    path = tmp_path / "templates.txt"
    path.write_text("a {} on a {}\n\n  {}  \n")
    assert read_templates(path) == ("a {} on a {}", "{}")
    path.write_text("a {}\na photo\n")
    with pytest.raises(ConfigError, match=r"template 'a photo' of .* has no \{\}"):
        read_templates(path)


def test_towers_that_cannot_be_had_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        TeacherError, match="clip-b32 is taken before the projection to the text space, that of clip-b32-proj after"
    ):
        load_tower(REGISTRY["clip-b32"])
    with pytest.raises(TeacherError, match=r"dinov2-s has no text space; only clip-.* have text towers"):
        load_tower(REGISTRY["dinov2-s"])
    with pytest.raises(TeacherError, match=r"text tower of clip-b32-proj .* cannot be fetched .* give --text-weights"):
        load_tower(REGISTRY[CLIP])
    with pytest.raises(TeacherError, match="weights nowhere do not exist"):
        load_tower(REGISTRY[CLIP], weights=Path("nowhere"))
    _, path = whole_model(SIGLIP, tmp_path / "siglip")
    for file in path.parent.glob("*.json"):
        file.unlink()
    said = r"tokenizer of siglip-b-224 \(timm/ViT-B-16-SigLIP\) cannot be loaded .*json"
    with pytest.raises(TeacherError, match=said):
        load_tower(REGISTRY[SIGLIP], weights=path)
    _, clip = whole_model(CLIP, tmp_path / "clip")
    with pytest.raises(TeacherError, match=r"do not fit the model: 2 wrong shape"):
        load_tower(REGISTRY[PE], weights=clip)
    names = ("text_model.embeddings.token_embedding.weight", "text_model.final_layer_norm.weight")
    state = {name: torch.zeros(2, 2) for name in names}
    safetensors.torch.save_file(state, tmp_path / "transformers.safetensors")
    with pytest.raises(TeacherError, match="names its weights as transformers does; give open_clip's checkpoint"):
        load_tower(REGISTRY[CLIP], weights=tmp_path / "transformers.safetensors")


def test_nothing_but_the_sentence_is_said_of_a_hub_that_is_gone(
    tmp_path: Path, run_eupe: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "c.txt").write_text("mug")
    outcome = run_eupe("eval", "text", CLIP, "--classes", tmp_path / "c.txt", "--out", tmp_path / "t.safetensors")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: the text tower of clip-b32-proj")
    assert not caplog.records
    assert not (tmp_path / "t.safetensors").exists()


def test_files_of_texts_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    _, weights = whole_model(CLIP, tmp_path)
    texts = embed_texts(load_tower(REGISTRY[CLIP], weights=weights), Classes(("mug", "ball")))
    path = tmp_path / "t.safetensors"
    save_texts(texts, path)
    assert open_source(str(path)).embed(REGISTRY[CLIP], Classes(())).classes == texts.classes

    with pytest.raises(ConfigError, match="already holds embeddings, so --templates changes nothing"):
        open_source(str(path), templates=tmp_path / "t.txt")
    with pytest.raises(ConfigError, match="is in the space of clip-b32-proj, but --space leads to that of pe-core-t"):
        open_source(str(path)).embed(REGISTRY[PE], Classes(()))
    with pytest.raises(ConfigError, match=r"--text siglip is in the space of siglip, but --space leads to that of pe"):
        open_source("siglip").embed(REGISTRY[PE], Classes(()))
    with pytest.raises(ConfigError, match="are 24 wide, but those of clip-b32-proj are 512 wide; make the file again"):
        open_source(str(path)).embed(replace(REGISTRY[CLIP], summary_dim=512), Classes(()))
    shutil.copy(weights, tmp_path / "other.safetensors")
    for damaged in ("other.safetensors", "gone.safetensors"):
        with pytest.raises(ConfigError, match=rf"{damaged} holds no text embeddings .* make it with `eupe eval text`"):
            open_source(str(tmp_path / damaged))
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({**tensors, "embeddings": tensors["embeddings"][:1]}, path, metadata=metadata)
    with pytest.raises(ConfigError, match=r"ValueError: \(1, 24\) embeddings for 2 names"):
        load_texts(path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", "t.safetensors"], "give either --classes or --captions"),
        (["--out", "t.safetensors", "--classes", "c", "--captions", "d"], "give either --classes or --captions"),
        (["--out", "t.safetensors", "--captions", "d", "--templates", "c"], "captions are embedded as they are"),
    ],
)
def test_what_is_embedded_must_be_said(words: list[str], said: str, run_eupe: Callable[..., Any]) -> None:
    outcome = run_eupe("eval", "text", CLIP, *words)
    assert outcome.code == EupeError.exit_code
    assert said in outcome.err
