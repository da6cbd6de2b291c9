"""eupe/train/init.py against timm's own loading, and against runs that were really trained."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from making import TINY_SIZE, TINY_STUDENT
from safetensors.torch import load_file, save_file
from timm.models import eva, vision_transformer
from torch import Tensor, nn

from eupe.errors import RunError, TeacherError
from eupe.evaluate.open_run import open_run
from eupe.models.encoder import Encoder, build_encoder, save_encoder
from eupe.models.timm_models import timm_spec
from eupe.store import Store
from eupe.train.config import TrainConfig
from eupe.train.init import InitReport, init_from_run, init_from_weights
from eupe.train.loop import train
from eupe.train.model import TargetHeads

WIDTH = 16
KINDS = ("summary", "dense")


def shallow(arch: str, size: int, *, depth: int = 2) -> Encoder:
    model = timm.create_model(arch, num_classes=0, depth=depth, img_size=size, dynamic_img_size=True)
    return Encoder(timm_spec(arch, size), model)


def noise(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """Every tensor of a model drawn anew, and written to a file."""
    generator = torch.Generator().manual_seed(7)
    state = {name: torch.randn(value.shape, generator=generator) for name, value in model.state_dict().items()}
    save_file(state, path)
    return state


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def test_a_proxy_starts_from_a_perception_encoder_s_blocks(tmp_path: Path) -> None:
    trunk = timm.create_model("vit_pe_core_large_patch14_336", depth=2, img_size=56)
    state = noise(trunk, tmp_path / "pe.safetensors")
    proxy = shallow("vit_large_patch16_eupe", 64)
    before = copied(proxy.model)
    report = init_from_weights(tmp_path / "pe.safetensors", proxy)
    after = proxy.model.state_dict()
    for name in [*(name for name in after if "blocks" in name), "norm.weight", "norm_pre.bias", "cls_token"]:
        assert torch.equal(after[name], state[name]), name
    as_timm = eva.checkpoint_filter_fn(state, proxy.model)["patch_embed.proj.weight"]
    assert torch.equal(after["patch_embed.proj.weight"], as_timm)
    assert torch.equal(after["reg_token"], before["reg_token"])
    assert report.fresh == ("reg_token",) and report.num_tensors == len(after) - 1
    total = sum(value.numel() for value in after.values())
    assert report.share == pytest.approx(1 - 4 * 1024 / total)
    assert {name.split(".")[0] for name in report.unused} == {"pos_embed", "attn_pool", "head"}
    line = str(report)
    assert "pe.safetensors" in line and "1 fresh: reg_token" in line and line.endswith(", ...") and "\n" not in line


def test_a_dinov3_starts_from_itself_whole(tmp_path: Path) -> None:
    encoder = shallow("vit_small_patch16_dinov3", 64)
    state = noise(encoder.model, tmp_path / "dinov3.safetensors")
    report = init_from_weights(tmp_path / "dinov3.safetensors", encoder)
    assert same(dict(encoder.model.state_dict()), state)
    assert report == InitReport(
        source=str(tmp_path / "dinov3.safetensors"), num_tensors=len(state), share=1.0, fresh=(), unused=()
    )
    assert str(report).endswith("dinov3.safetensors")


@pytest.mark.parametrize(
    ("source", "arch", "sides", "tokens"),
    [
        ("vit_small_patch16_224", "vit_small_patch32_224", (64, 256), 65),
        ("vit_small_patch14_reg4_dinov2", "vit_small_patch14_reg4_dinov2", (56, 84), 36),
    ],
)
def test_patches_and_positions_are_resampled_as_timm_does(
    source: str, arch: str, sides: tuple[int, int], tokens: int, tmp_path: Path
) -> None:
    """The first model has a position for its class token; the second has none."""
    state = noise(shallow(source, sides[0]).model, tmp_path / "vit.safetensors")
    encoder = shallow(arch, sides[1])
    report = init_from_weights(tmp_path / "vit.safetensors", encoder)
    assert report.share == 1.0
    want = vision_transformer.checkpoint_filter_fn(dict(state), encoder.model)
    assert want["pos_embed"].shape == (1, tokens, 384) != state["pos_embed"].shape
    assert same(dict(encoder.model.state_dict()), want)


def test_a_cnn_has_its_statistics_too(tmp_path: Path) -> None:
    torch.manual_seed(3)
    source = timm.create_model("resnet18", num_classes=10)
    source(torch.randn(2, 3, 64, 64))
    save_file(source.state_dict(), tmp_path / "cnn.safetensors")
    encoder = build_encoder("resnet18", size=64)
    report = init_from_weights(tmp_path / "cnn.safetensors", encoder)
    assert same(dict(encoder.model.state_dict()), {k: v for k, v in source.state_dict().items() if "fc" not in k})
    assert (report.share, report.fresh, report.unused) == (1.0, (), ("fc.bias", "fc.weight"))


def test_weights_that_fill_less_than_half_are_refused_and_change_nothing(tmp_path: Path) -> None:
    encoder = shallow("vit_small_patch16_eupe", 64, depth=3)
    path = tmp_path / "w.safetensors"
    state = noise(encoder.model, path)
    before = copied(encoder.model)
    save_file({name: value for name, value in state.items() if "blocks.2" not in name}, path)
    report = init_from_weights(path, encoder)
    last = {name for name in before if "blocks.2" in name}
    total = sum(value.numel() for value in before.values())
    assert set(report.fresh) == last
    assert report.share == pytest.approx(1 - sum(before[name].numel() for name in last) / total)
    before = copied(encoder.model)
    save_file({name: value * 2 for name, value in state.items() if "blocks" not in name}, path)
    with pytest.raises(TeacherError, match=r"w.safetensors fill \d.*% of vit_small.* missing \(blocks.0"):
        init_from_weights(path, encoder)
    noise(timm.create_model("vit_tiny_patch16_224", depth=2), path)
    with pytest.raises(TeacherError, match=r"fill 0.0% .*unexpected \(head.bias, .*wrong shape \(blocks.0.*for \(384"):
        init_from_weights(path, encoder)
    path.write_bytes(b"no tensors")
    with pytest.raises(TeacherError, match=r"w.safetensors is not a weights file"):
        init_from_weights(path, encoder)
    with pytest.raises(TeacherError, match="none"):
        init_from_weights(tmp_path / "none", encoder)
    assert same(copied(encoder.model), before)


@pytest.fixture(scope="module")
def run(tiny_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run of one target. Not to be changed."""
    out = tmp_path_factory.mktemp("init") / "run"
    config = TrainConfig(targets=(tiny_store.path,), student=TINY_STUDENT, out=out, steps=2, batch_size=4)
    train(dataclasses.replace(config, head_width=WIDTH, holdout=0.3, dtype="fp32"))
    return out


def targets_of(run: Path) -> list[dict[str, Any]]:
    targets: list[dict[str, Any]] = json.loads((run / "config.json").read_text())["targets"]
    return targets


def new_student(
    targets: list[dict[str, Any]], *, arch: str = TINY_STUDENT, size: int = TINY_SIZE, head_width: int = WIDTH
) -> tuple[Encoder, nn.ModuleList]:
    torch.manual_seed(11)
    encoder = build_encoder(arch, size=size)
    widths = (encoder.spec.summary_dim, encoder.spec.dense_dim)
    return encoder, nn.ModuleList(TargetHeads(widths, (t["summary_dim"], t["dense_dim"]), head_width) for t in targets)


def test_a_student_goes_on_where_a_run_ended(run: Path) -> None:
    encoder, heads = new_student(targets_of(run))
    report = init_from_run(run, encoder, heads, targets=targets_of(run))
    assert same(dict(encoder.model.state_dict()), load_file(run / "student.safetensors"))
    assert same(dict(heads.state_dict()), load_file(run / "heads.safetensors"))
    num = len(encoder.model.state_dict()) + len(heads.state_dict())
    assert report == InitReport(source=str(run), num_tensors=num, share=1.0, fresh=(), unused=())
    trained = open_run(run).distiller
    pixels = torch.randn(2, 3, TINY_SIZE, TINY_SIZE)
    with torch.no_grad():
        ours, theirs = heads[0](encoder.eval()(pixels)), trained.heads[0](trained.encoder(pixels))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_another_input_size_resamples_a_table_of_positions_as_timm_does(run: Path) -> None:
    encoder, heads = new_student(targets_of(run), size=96)
    init_from_run(run, encoder, heads, targets=targets_of(run))
    state = load_file(run / "student.safetensors")
    want = vision_transformer.checkpoint_filter_fn(dict(state), encoder.model)
    assert want["pos_embed"].shape != state["pos_embed"].shape
    assert same(dict(encoder.model.state_dict()), want)


def finished(folder: Path, encoder: Encoder, heads: nn.ModuleList, targets: list[dict[str, Any]]) -> Path:
    """The files of a finished run, without the training."""
    save_encoder(encoder, folder)
    save_file(heads.state_dict(), folder / "heads.safetensors")
    spec = {"config": {}, "targets": targets, "mix": [], "pictures": [], "total_steps": 1}
    (folder / "config.json").write_text(json.dumps(spec))
    (folder / "report.json").write_text("{}")
    return folder


def test_another_input_size_leaves_a_rotary_student_as_it_is(tmp_path: Path) -> None:
    arch = "vit_tiny_patch16_dinov3_qkvb"
    encoder, heads = new_student([], arch=arch)
    noise(encoder.model, tmp_path / "noise")
    encoder.model.load_state_dict(load_file(tmp_path / "noise"))
    run = finished(tmp_path / "run", encoder, heads, [])
    other, no_heads = new_student([], arch=arch, size=96)
    assert init_from_run(run, other, no_heads, targets=[]).share == 1.0
    assert same(dict(other.model.state_dict()), dict(encoder.model.state_dict()))


def target(teacher: str, summary: int = 8, dense: int = 6) -> dict[str, Any]:
    return {"teacher": teacher, "licence": "MIT", "summary_dim": summary, "dense_dim": dense}


@pytest.mark.parametrize(
    ("old", "new", "sources"),
    [
        (["a"], ["a", "a", "a"], {0: 0, 1: 0, 2: 0}),
        (["a", "b", "a"], ["b", "a", "a"], {0: 1, 1: 0, 2: 2}),
        (["a", "a", "b"], ["a"], {0: 0}),
        (["a"], ["b", "a"], {1: 0}),
    ],
)
def test_heads_go_to_the_targets_of_their_teachers(
    old: list[str], new: list[str], sources: dict[int, int], tmp_path: Path
) -> None:
    olds, news = [target(name) for name in old], [target(name) for name in new]
    encoder, theirs = new_student(olds)
    run = finished(tmp_path / "run", encoder, theirs, olds)
    fresh, ours = new_student(news)
    for parameter in ours.parameters():
        nn.init.constant_(parameter, 5.0)
    before = [copied(pair) for pair in ours]
    report = init_from_run(run, fresh, ours, targets=news)
    for i, pair in enumerate(ours):
        assert same(copied(pair), copied(theirs[sources[i]]) if i in sources else before[i])
    assert report.fresh == tuple(f"heads.{i}.{kind}" for i in range(len(new)) if i not in sources for kind in KINDS)
    assert report.unused == tuple(
        f"heads.{j}.{kind}" for j in range(len(old)) if j not in sources.values() for kind in sorted(KINDS)
    )
    sizes = [sum(p.numel() for p in module.parameters()) for module in (fresh.model, *ours)]
    assert report.share == pytest.approx((sizes[0] + sum(sizes[1 + i] for i in sources)) / sum(sizes))


def test_heads_of_other_widths_start_fresh(run: Path) -> None:
    known = targets_of(run)
    wider = [{**known[0], "summary_dim": known[0]["summary_dim"] + 1}]
    encoder, heads = new_student(wider)
    report = init_from_run(run, encoder, heads, targets=wider)
    assert (report.fresh, report.unused) == (("heads.0.summary",), ("heads.0.summary",))
    trained = load_file(run / "heads.safetensors")
    assert torch.equal(heads[0].dense[0].weight, trained["0.dense.0.weight"])
    encoder, heads = new_student(known, head_width=WIDTH + 1)
    assert init_from_run(run, encoder, heads, targets=known).fresh == ("heads.0.summary", "heads.0.dense")
    no_summary = [{**known[0], "summary_dim": 0}]
    encoder, heads = new_student(no_summary)
    report = init_from_run(run, encoder, heads, targets=no_summary)
    assert (report.fresh, report.unused) == ((), ("heads.0.summary",))


def test_runs_that_cannot_be_started_from_are_refused_and_change_nothing(run: Path, tmp_path: Path) -> None:
    known = targets_of(run)
    other, heads = new_student(known, arch="vit_tiny_patch16_224")
    before = copied(other), copied(heads)
    with pytest.raises(RunError, match=f"arch: got {TINY_STUDENT}, expected vit_tiny_patch16_224"):
        init_from_run(run, other, heads, targets=known)
    assert same(copied(other), before[0]) and same(copied(heads), before[1])
    with pytest.raises(RunError, match="is not a training run"):
        init_from_run(tmp_path, other, heads, targets=known)
    encoder, heads = new_student(known)
    before = copied(encoder), copied(heads)
    broken = shutil.copytree(run, tmp_path / "broken")
    (broken / "report.json").unlink()
    with pytest.raises(RunError, match=r"not finished.*--resume"):
        init_from_run(broken, encoder, heads, targets=known)
    (broken / "report.json").write_text("{}")
    for name in ("heads.safetensors", "student.safetensors"):
        whole = (broken / name).read_bytes()
        (broken / name).write_bytes(whole[:-100])
        with pytest.raises(RunError, match=name):
            init_from_run(broken, encoder, heads, targets=known)
        (broken / name).write_bytes(whole)
    state = load_file(broken / "student.safetensors")
    save_file({k: v for k, v in state.items() if k != "cls_token"}, broken / "student.safetensors")
    with pytest.raises(RunError, match=r"1 missing \(cls_token\)"):
        init_from_run(broken, encoder, heads, targets=known)
    assert same(copied(encoder), before[0]) and same(copied(heads), before[1])
