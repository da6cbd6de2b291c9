"""Who may be judged, what they say of views, and what is kept of it."""

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from making import make_corpus, make_store, picture, random_weights
from planted import ade20k, depth_pairs, spair

from eupe.common.compute import Tokens
from eupe.common.storage import StoragePath
from eupe.corpus.views import render_view
from eupe.errors import ConfigError, CorpusError, RunError, StorageError, StoreError
from eupe.evaluate import encode as encode_module
from eupe.evaluate.judged_pictures import Pictures, centre, windows
from eupe.evaluate.result import Result, keep_results, newest, read_results, require_place
from eupe.evaluate.subject import PixelSubject, open_subjects
from eupe.store import Store
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.teacher import load_teacher


def some_pictures(folder: Path, count: int = 5, *, width: int = 80) -> Pictures:
    folder.mkdir(exist_ok=True)
    for i in range(count):
        picture(i, width, 64).save(folder / f"{i}.png")
    return Pictures(StoragePath.of(folder), tuple(f"{i}.png" for i in range(count)))


def test_an_encoder_sees_each_view_in_turn(tmp_path: Path, tiny_weights: Path) -> None:
    """Tokens equal those of the teacher's own call on views rendered one by one."""
    pictures = some_pictures(tmp_path / "p", count=9, width=150)
    (subject,) = open_subjects(["timm:test_vit"], {"timm:test_vit": tiny_weights})
    encoded = {
        kind: subject.encode_views(pictures, kinds=[kind], size=64, crop=windows) for kind in ("summary", "dense")
    }
    spec = resolve_teacher("timm:test_vit")
    teacher = load_teacher(spec, weights=tiny_weights, device=torch.device("cpu"), dtype=torch.float32, sizes=(64,))
    assert len(encoded["dense"]) == 9 * len(windows(150, 64)) > 16, "more than one batch"
    for v in (0, 1, 8, len(encoded["dense"]) - 1):
        image = pictures.image(int(encoded["dense"].picture_V[v]))
        view = render_view(image, encoded["dense"].params[v], 64)
        tokens = teacher(torch.from_numpy(view[None].copy()))
        for kind, expected in (("summary", tokens.summary), ("dense", tokens.dense)):
            got = getattr(encoded[kind], kind)[v].float().flatten()
            assert torch.nn.functional.cosine_similarity(got, expected[0].flatten(), dim=0) > 0.999


def test_pixels_are_the_colours_of_the_patches(tmp_path: Path) -> None:
    pictures = some_pictures(tmp_path / "p", count=2)
    encoded = PixelSubject().encode_views(pictures, kinds=["dense"], size=32, crop=centre)
    view = render_view(pictures.image(1), encoded.params[1], 32).astype(float) / 255
    assert encoded.dense is not None and encoded.dense.shape == (2, 2, 2, 48)
    quarter = view[16:20, 4:8].mean(axis=(0, 1))
    patch = encoded.dense[1, 1, 0].float().numpy().reshape(3, 4, 4)
    assert np.abs(patch[:, 0, 1] - quarter).max() < 1e-3
    summary = PixelSubject().encode_views(pictures, kinds=["summary"], size=32, crop=centre).summary
    assert summary is not None
    assert np.abs(summary[1].numpy().reshape(3, 16, 16)[:, 3, 5] - view[6:8, 10:12].mean(axis=(0, 1))).max() < 1e-5


def test_an_untrained_teacher_is_its_library_s_own_initialisation(tmp_path: Path) -> None:
    import timm

    weights = random_weights("test_vit", tmp_path / "w.safetensors", seed=7)
    trained, untrained = open_subjects(["timm:test_vit"], {"timm:test_vit": weights}, untrained=True)
    assert (untrained.name, untrained.untrained, trained.untrained) == (trained.name, True, False)
    views = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    own = [subject.encode(views, size=64).dense for subject in (trained, untrained)]  # type: ignore[union-attr]
    assert not torch.allclose(*own, atol=1e-2)
    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False, num_classes=0).eval()
    mean, std = (torch.tensor(model.default_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        expected = model.forward_features((torch.from_numpy(views).permute(0, 3, 1, 2) / 255 - mean) / std)
    got = own[1].flatten(1, 2)
    assert torch.nn.functional.cosine_similarity(got, expected[:, -got.shape[1] :], dim=-1).min() > 0.999


def test_no_weights_are_looked_for_where_only_the_untrained_encoder_is_asked(tmp_path: Path) -> None:
    _, untrained = open_subjects(["dinov2-s"], {}, untrained=True)
    views = np.zeros((1, 28, 28, 3), dtype=np.uint8)
    assert untrained.encode(views, size=28).dense.shape == (1, 2, 2, 384)  # type: ignore[union-attr]


def test_both_kinds_of_token_come_of_one_pass(tmp_path: Path, tiny_weights: Path) -> None:
    pictures = some_pictures(tmp_path / "p", count=3)
    (subject,) = open_subjects(["timm:test_vit"], {"timm:test_vit": tiny_weights})
    encoded = subject.encode_views(pictures, kinds=["summary", "dense"], size=64, crop=centre)
    for kind in ("summary", "dense"):
        alone = subject.encode_views(pictures, kinds=[kind], size=64, crop=centre)
        other = {"summary": alone.dense, "dense": alone.summary}[kind]
        assert torch.equal(getattr(encoded, kind), getattr(alone, kind)) and other is None


def test_what_is_nobody_gets_a_sentence(tmp_path: Path, tiny_store: Store) -> None:
    with pytest.raises(ConfigError, match="name at least one store, training run or teacher"):
        open_subjects([], {})
    with pytest.raises(ConfigError, match="no-such is not a store"):
        open_subjects(["no-such"], {})
    with pytest.raises(ConfigError, match="weights are given for dinov2"):
        open_subjects([str(tiny_store.path)], {"dinov2": tmp_path})
    (tmp_path / "config.json").write_text(
        json.dumps({"config": {}, "targets": [], "mix": [], "pictures": [], "total_steps": 1})
    )
    with pytest.raises(RunError, match="has no student yet"):
        open_subjects([str(tmp_path)], {})


def test_tokens_that_would_not_fit_are_refused_before_any_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_weights: Path
) -> None:
    """Windows are counted, not pictures."""
    pictures = some_pictures(tmp_path / "p", count=9, width=150)
    views = 9 * len(windows(150, 64))
    room = views * 4 * 4 * 64 * 2
    (subject,) = open_subjects(["timm:test_vit"], {"timm:test_vit": tiny_weights})
    monkeypatch.setattr(encode_module, "free_bytes", lambda: room / encode_module.MEMORY_SHARE)
    assert len(subject.encode_views(pictures, kinds=["dense"], size=64, crop=windows)) == views > 9
    monkeypatch.setattr(encode_module, "free_bytes", lambda: room / encode_module.MEMORY_SHARE - 1)
    (subject,) = open_subjects(["timm:test_vit"], {"timm:test_vit": tmp_path / "not-looked-at"})
    with pytest.raises(ConfigError, match=rf"dense tokens of {views} views of timm:test_vit take .* --scratch"):
        subject.encode_views(pictures, kinds=["dense"], size=64, crop=windows)


def test_scratch_holds_what_memory_would_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_weights: Path
) -> None:
    pictures = some_pictures(tmp_path / "p", count=9, width=150)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (subject,) = open_subjects(["timm:test_vit"], {"timm:test_vit": tiny_weights})
    expected = subject.encode_views(pictures, kinds=["dense"], size=64, crop=windows).dense
    monkeypatch.setattr(encode_module, "free_bytes", lambda: 0)
    held = subject.encode_views(pictures, kinds=["dense"], size=64, crop=windows, scratch=scratch).dense
    assert held is not None and expected is not None and torch.equal(held, expected)
    assert any(str(scratch) in line for line in Path("/proc/self/maps").read_text().splitlines())
    assert not list(scratch.iterdir()), "the file has no name, so it is gone with the process"
    with pytest.raises(ConfigError, match=r"--scratch .*nowhere is not a folder"):
        subject.encode_views(pictures, kinds=["dense"], size=64, crop=windows, scratch=tmp_path / "nowhere")


def test_a_full_disk_is_found_out_before_the_first_step(tmp_path: Path, tiny_weights: Path) -> None:
    with pytest.raises(StorageError, match=r"take 1000000\.0 GB, but --scratch .* has .* GB"):
        encode_module.room_for((10**9, 10, 10, 5000), tmp_path, of="x")


def test_tokens_that_are_no_numbers_in_fp16_are_refused(tmp_path: Path, tiny_weights: Path) -> None:
    pictures = some_pictures(tmp_path / "p", count=2)

    def encode(views: Any) -> Tokens:
        return Tokens(summary=None, dense=torch.full((len(views), 2, 2, 3), 70_000.0))

    with pytest.raises(ConfigError, match="x gives tokens that are not finite, or too large for fp16"):
        encode_module.encode_views(
            pictures, encode, kinds=["dense"], size=32, crop=centre, cells=(2, 3), scratch=None, of="x"
        )


def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    pictures = some_pictures(tmp_path / "p")
    (tmp_path / "p" / "3.png").write_bytes(b"\x89PNG")
    with pytest.raises(CorpusError, match=r"picture 3\.png of"):
        PixelSubject().encode_views(pictures, kinds=["summary"], size=32, crop=centre)


def result(**changes: Any) -> Result:
    plain = {"task": "knn", "subject": "x", "kind": "teacher", "scores": {"accuracy": 0.5}, "protocol": {}, "data": {}}
    return Result(**{**plain, **changes})


def test_results_are_appended_to_their_run_and_read_again(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "all.jsonl"
    run.mkdir()
    mine = result(subject=str(run), kind="run", scores={"accuracy": 0.25})
    keep_results([mine, result()], other)
    keep_results([mine])
    assert read_results(run) == [mine, mine]
    assert read_results(other) == [mine, result()]
    assert read_results(tmp_path) == []
    better = result(subject=str(run), kind="run", scores={"accuracy": 0.75})
    assert newest([mine, result(), better]) == [better, result()]
    assert newest([mine, result(subject=str(run), kind="run", untrained=True)])[1].name == f"{run}, untrained"
    other.write_text("{}\n")
    with pytest.raises(RunError, match="holds no valid result"):
        read_results(other)
    with pytest.raises(StorageError, match="cannot be appended"):
        keep_results([mine], tmp_path / "no" / "where.jsonl")


def test_a_table_has_a_row_for_each_subject_and_json_tells_all(
    tmp_path: Path, tiny_weights: Path, run_eupe: Callable[..., Any]
) -> None:
    corpus = make_corpus(tmp_path / "c", count=12)
    words = ["eval", "knn", "pixels", "timm:test_vit", "--data", corpus, "--k", 3, "--size", 32]
    words += ["--weights", f"timm:test_vit={tiny_weights}", "--untrained", "--results", tmp_path / "r.jsonl"]
    outcome = run_eupe(*words)
    *table, judged = outcome.out.splitlines()
    rows = [line.split("  ")[0].strip() for line in table]
    assert rows == ["subject", "pixels", "timm:test_vit", "timm:test_vit, untrained"]
    assert judged.startswith("judged: 12 pictures, each by all the others (leave one out); 3 classes")
    told = json.loads(run_eupe(*words, "--json").out)["results"]
    assert [Result.from_json(plain) for plain in told] == read_results(tmp_path / "r.jsonl")[3:]
    assert (run_eupe(*words, "--weights", "dinov2").err).startswith("error: --weights takes TEACHER=PATH")


def test_a_run_keeps_what_it_scored(tmp_path: Path, run_eupe: Callable[..., Any]) -> None:
    from eupe.models.encoder import build_encoder, save_encoder

    run = tmp_path / "run"
    save_encoder(build_encoder("test_vit", size=32), run)
    (run / "config.json").write_text(
        json.dumps({"config": {"seed": 0}, "targets": [], "mix": [], "pictures": [], "total_steps": 1})
    )
    data = ade20k(tmp_path / "data", train=2, val=1)
    outcome = run_eupe("eval", "segment", run, "pixels", "--data", data, "--size", 32, "--steps", 2, "--json")
    assert outcome.code == 0, outcome.err
    (kept,) = read_results(run)
    assert kept.to_json() == json.loads(outcome.out)["results"][0]


def test_tokens_are_the_same_in_the_batches_that_a_device_has_room_for(tmp_path: Path) -> None:
    def encode(views: Any, most: int = 3) -> Tokens:
        if len(views) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return PixelSubject().encode(views, size=32)

    views = np.random.default_rng(0).integers(0, 256, (13, 32, 32, 3), dtype=np.uint8)
    got, expected = encode_module.encoded(encode, views, of="x"), PixelSubject().encode(views, size=32)
    assert got.summary is not None and expected.summary is not None
    assert torch.equal(got.summary, expected.summary) and torch.equal(got.dense, expected.dense)
    with pytest.raises(ConfigError, match="too little memory for x and one view of 32 px; give a smaller --size"):
        encode_module.encoded(lambda some: encode(some, most=0), views, of="x")
    with pytest.raises(RuntimeError, match="something else"):
        encode_module.encoded(lambda some: exec('raise RuntimeError("something else")'), views, of="x")  # type: ignore[arg-type,return-value]


def test_a_task_that_runs_out_of_memory_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_eupe: Callable[..., Any]
) -> None:
    def exhausted(*words: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")

    def bare(*words: object, **options: object) -> None:
        raise MemoryError

    monkeypatch.setattr("eupe.evaluate.knn.accuracy", bare)
    words = ("eval", "knn", "pixels", "--data", make_corpus(tmp_path, count=12), "--k", 1)
    assert "to judge pixels in this way (MemoryError)" in run_eupe(*words).err
    monkeypatch.setattr("eupe.evaluate.knn.accuracy", exhausted)
    outcome = run_eupe(*words)
    assert outcome.code == 2
    start = "error: there is not enough memory to judge pixels in this way (CUDA out of memory. Tried"
    assert outcome.err.startswith(start)


@pytest.mark.parametrize(("groups", "expected"), [({}, 8_000), ({"": (6_000, 1_000, 500)}, 5_500)])
def test_memory_that_is_free_heeds_the_control_group(
    tmp_path: Path, groups: dict[str, tuple[int, int, int]], expected: int
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 8 kB\n".replace("8 kB", "8000 kB"))
    (tmp_path / "proc/self/cgroup").write_text("0::/job/step\n")
    for group in ("job/step", "job", ""):
        folder = tmp_path / "sys/fs/cgroup" / group
        folder.mkdir(parents=True, exist_ok=True)
        limit, used, cached = (1000 * each for each in groups.get(group, (0, 0, 0)))
        (folder / "memory.max").write_text(f"{limit or 'max'}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(
            f"anon 3\ninactive_file {cached - cached // 4}\nactive_file {cached // 4}\n"
        )
    kilo = 1024 if not groups else 1000
    assert encode_module.free_bytes(tmp_path) == expected * kilo


def test_a_student_that_says_no_numbers_is_not_judged(tmp_path: Path, run_eupe: Callable[..., Any]) -> None:
    """Nearest to no number would be the picture itself."""
    from eupe.models.encoder import build_encoder, save_encoder

    encoder = build_encoder("test_vit", size=32)
    encoder.model.norm.weight.data[0] = torch.nan
    save_encoder(encoder, tmp_path / "run")
    plain = {"config": {"seed": 0}, "targets": [], "mix": [], "pictures": [], "total_steps": 1}
    (tmp_path / "run" / "config.json").write_text(json.dumps(plain))
    corpus = make_corpus(tmp_path / "c", count=12)
    outcome = run_eupe("eval", "knn", tmp_path / "run", "--data", corpus, "--k", 1, "--size", 32)
    assert outcome.code == 2 and "gives tokens that are not finite" in outcome.err


def test_a_store_that_is_being_made_is_not_judged(tmp_path: Path, tiny_corpus: Path, tiny_weights: Path) -> None:
    store = make_store(tmp_path / "s.zarr", tiny_corpus, tiny_weights)
    next((tmp_path / "s.zarr" / "parts").iterdir()).unlink()
    with pytest.raises(StoreError, match="is not finished: 1 of"):
        open_subjects([str(store.path)], {})


@pytest.mark.parametrize("place", [".", "nowhere/results.jsonl"])
def test_results_need_a_place_before_anything_is_judged(
    tmp_path: Path, run_eupe: Callable[..., Any], place: str
) -> None:
    where = tmp_path / place
    words = {
        "knn": ["pixels", "--data", tmp_path / "not-looked-at"],
        "latency": ["timm:test_vit"],
        "conflict": ["a", "b"],
        "agreement": ["a"],
    }
    for task, more in words.items():
        outcome = run_eupe("eval", task, *more, "--results", where)
        assert outcome.code == 2 and outcome.err.startswith(f"error: --results {where} ")


def test_a_colleague_s_run_is_judged_into_a_file_of_one_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permissions say nothing to root, so they are told here."""
    run = tmp_path / "run"
    run.mkdir()
    own = result(subject=str(run), kind="run")
    monkeypatch.setattr("eupe.evaluate.result.os.access", lambda place, mode: str(place) != str(run))
    keep_results([own], tmp_path / "mine.jsonl")
    assert read_results(tmp_path / "mine.jsonl") == [own] and not list(run.iterdir())
    with pytest.raises(ConfigError, match=r"run .*run is not writable, .* give --results"):
        require_place(None, [str(run)])
    require_place(tmp_path / "mine.jsonl", [str(run)])


def test_what_cannot_be_kept_in_one_place_is_kept_in_the_other(tmp_path: Path) -> None:
    own = result(subject=str(tmp_path / "run"), kind="run")
    (tmp_path / "run" / "evaluations.jsonl").mkdir(parents=True)
    with pytest.raises(StorageError, match="run/evaluations"):
        keep_results([own, result()], tmp_path / "mine.jsonl")
    assert read_results(tmp_path / "mine.jsonl") == [own, result()]


def test_results_may_go_into_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    keep_results([result()], tmp_path / "pipe")
    assert Result.from_json(json.loads(os.read(reader, 10_000))) == result()
    os.close(reader)


def test_a_line_for_which_the_disk_has_no_room_is_taken_back(tmp_path: Path) -> None:
    place = tmp_path / "results.jsonl"
    keep_results([result()], place)
    first = place.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(first) + 50, hard))
    try:
        with pytest.raises(StorageError, match=r"cannot be appended to .* no room for more than 50 of"):
            keep_results([result()], place)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert place.read_bytes() == first
    place.write_bytes(first.rstrip(b"\n"))
    keep_results([result()], place)
    assert read_results(place) == [result(), result()], "a line of its own, whatever the file ends in"


@pytest.mark.parametrize(("task", "plant"), [("segment", ade20k), ("depth", depth_pairs), ("correspond", spair)])
def test_with_scratch_there_is_room_where_memory_has_none(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_eupe: Callable[..., Any],
    task: str,
    plant: Callable[[Path], Path],
) -> None:
    words = ["eval", task, "pixels", "--data", plant(tmp_path / "data"), "--size", 32, "--json"]
    words += [] if task == "correspond" else ["--steps", 2]
    expected = run_eupe(*words).out
    monkeypatch.setattr(encode_module, "free_bytes", lambda: 0)
    refused = run_eupe(*words)
    assert refused.code == 2 and "give --scratch a folder" in refused.err
    assert run_eupe(*words, "--scratch", tmp_path).out == expected
