"""What all teachers have in common: strict weights, eval mode, dtypes, shapes, digests."""

import dataclasses
from pathlib import Path
from typing import Any

import open_clip
import pytest
import safetensors.torch
import timm
import torch
from teacher_checks import CPU, load_state, views
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2ForImageClassification, Dinov2Model

from eupe.common.compute import compute_dtype
from eupe.errors import ConfigError, TeacherError
from eupe.models.encoder import build_encoder, save_encoder
from eupe.teachers import teacher as teacher_module
from eupe.teachers.own_forward import fill_at_random, narrow
from eupe.teachers.registry import REGISTRY
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.spec import TeacherSpec
from eupe.teachers.teacher import Teacher, file_digest, load_teacher, weights_digest

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture
def small_timm(narrow_vits: None) -> TeacherSpec:
    return narrow(REGISTRY["dinov3-s"])


@pytest.fixture
def small_hf(tmp_path: Path) -> TeacherSpec:
    Dinov2Model(Dinov2Config(**TINY, image_size=56)).save_pretrained(tmp_path / "hf")
    return resolve_teacher(f"hf:{tmp_path / 'hf'}")


def timm_state(spec: TeacherSpec) -> dict[str, Tensor]:
    model = timm.create_model(spec.model.split(".")[0])
    fill_at_random(model)
    return dict(model.state_dict())


def spoiled(state: dict[str, Tensor], name: str) -> dict[str, dict[str, Tensor]]:
    return {
        "missing": {k: v for k, v in state.items() if k != name},
        "unexpected": {**state, "surprise.weight": torch.ones(1)},
        "wrong shape": {**state, name: state[name][..., :-1]},
    }


@pytest.mark.parametrize("how", ["missing", "unexpected", "wrong shape"])
def test_timm_weights_are_strict(how: str, small_timm: TeacherSpec, tmp_path: Path) -> None:
    state = spoiled(timm_state(small_timm), "blocks.1.norm2.weight")[how]
    with pytest.raises(TeacherError, match=f"1 {how} .*(norm2|surprise)"):
        load_state(small_timm, state, tmp_path, sizes=(256,))


@pytest.mark.parametrize("how", ["missing", "unexpected", "wrong shape"])
def test_hugging_face_weights_are_strict(how: str, small_hf: TeacherSpec) -> None:
    file = Path(small_hf.model) / "model.safetensors"
    state = spoiled(safetensors.torch.load_file(file), "layernorm.weight")[how]
    safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, file)
    for weights in (file, file.parent):
        with pytest.raises(TeacherError, match=f"1 {how} .*(layernorm|surprise)"):
            load_teacher(small_hf, weights=weights, device=CPU, dtype=torch.float32, sizes=(56,))


@pytest.mark.usefixtures("narrow_vits")
@pytest.mark.parametrize("how", ["missing", "unexpected", "wrong shape"])
def test_open_clip_weights_are_strict(how: str, tmp_path: Path) -> None:
    spec = narrow(resolve_teacher("open_clip:ViT-B-32@laion2b_s34b_b79k"))
    visual = open_clip.create_model("ViT-B-32", load_weights=False).visual
    state = spoiled({f"visual.{k}": v for k, v in visual.state_dict().items()}, "visual.ln_post.bias")[how]
    if how == "unexpected":
        state["visual.surprise.weight"] = state.pop("surprise.weight")
    with pytest.raises(TeacherError, match=f"1 {how} .*(ln_post.bias|surprise)"):
        load_state(spec, state, tmp_path, sizes=(224,))


def test_tensors_of_no_use_to_the_encoder_may_be_there(tmp_path: Path) -> None:
    """A classifier, a text tower, a projection, the token of masked training."""
    config = Dinov2Config(**TINY, image_size=56, use_mask_token=False)
    Dinov2ForImageClassification(config).save_pretrained(tmp_path / "classifier")
    clip = CLIPConfig(
        vision_config={**TINY, "image_size": 64, "patch_size": 16}, text_config={**TINY, "vocab_size": 49408}
    )
    CLIPModel(clip).save_pretrained(tmp_path / "clip")
    for name in ("classifier", "clip"):
        spec = resolve_teacher(f"hf:{tmp_path / name}")
        load_teacher(spec, weights=None, device=CPU, dtype=torch.float32, sizes=(spec.native_size,))


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_files_that_are_no_weights(name: str, small_timm: TeacherSpec, tmp_path: Path) -> None:
    (tmp_path / name).write_text("<html>404</html>")
    with pytest.raises(TeacherError, match="is a web page, not weights"):
        load_teacher(small_timm, weights=tmp_path / name, device=CPU, dtype=torch.float32, sizes=(256,))


def test_pickles_with_code_are_refused(small_timm: TeacherSpec, tmp_path: Path) -> None:
    torch.save(nn.Linear(1, 1), tmp_path / "model.pth")
    with pytest.raises(TeacherError, match=r"holds Python objects as well as tensors \(torch.nn.modules.linear.Linear"):
        load_teacher(small_timm, weights=tmp_path / "model.pth", device=CPU, dtype=torch.float32, sizes=(256,))


def test_absent_weights(small_timm: TeacherSpec, tmp_path: Path) -> None:
    for path, said in ((tmp_path / "nothing.pth", "do not exist"), (tmp_path, "holds no weights")):
        with pytest.raises(TeacherError, match=said):
            load_teacher(small_timm, weights=path, device=CPU, dtype=torch.float32, sizes=(256,))


def test_every_way_to_hand_over_weights_is_the_same(small_timm: TeacherSpec, tmp_path: Path) -> None:
    state = timm_state(small_timm)
    (tmp_path / "dir").mkdir()
    torch.save(state, tmp_path / "plain.pth")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "checkpoint.pth")
    safetensors.torch.save_file(state, tmp_path / "dir" / "model.safetensors")
    paths = [tmp_path / "plain.pth", tmp_path / "checkpoint.pth", tmp_path / "dir", tmp_path / "dir/model.safetensors"]
    digests = {
        weights_digest(load_teacher(small_timm, weights=p, device=CPU, dtype=torch.float32, sizes=(256,)).module)
        for p in paths
    }
    assert len(digests) == 1


@pytest.mark.parametrize("name", ["dinov2-s", "dinov3-s", "clip-b32"])
def test_weights_that_cannot_be_fetched_are_one_sentence(name: str) -> None:
    spec = REGISTRY[name]
    with pytest.raises(TeacherError, match=r"cannot be fetched from the hub \(.+\); give .*--weights") as error:
        load_teacher(spec, weights=None, device=CPU, dtype=torch.float32, sizes=(spec.native_size,))
    assert "\n" not in str(error.value)


def test_timm_s_own_download(small_timm: TeacherSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's file has a classifier or not as timm's table says, and is loaded strictly."""
    spec = narrow(REGISTRY["siglip-b-224"])
    state = dict(timm.create_model(spec.model.split(".")[0], num_classes=0).state_dict())
    served = dict(state)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *args, **kwargs: dict(served))
    teacher = load_teacher(spec, weights=None, device=CPU, dtype=torch.float32, sizes=(224, 96))
    assert all(torch.equal(tensor, state[name]) for name, tensor in teacher.module.state_dict().items())
    served.pop("norm.weight")
    with pytest.raises(TeacherError, match=r"norm\.weight"):
        load_teacher(spec, weights=None, device=CPU, dtype=torch.float32, sizes=(224,))


@pytest.mark.usefixtures("narrow_vits")
def test_a_projection_is_downloaded_and_never_made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = narrow(REGISTRY["pe-core-t-proj"])
    state = dict(timm.create_model(spec.model.split(".")[0]).state_dict())
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *args, **kwargs: dict(state))
    module: Any = load_teacher(spec, weights=None, device=CPU, dtype=torch.float32, sizes=(384,)).module
    assert torch.equal(module.head.weight, state["head.weight"])
    without = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    with pytest.raises(TeacherError, match=r"2 missing \(head\.bias, head\.weight\)"):
        load_state(spec, without, tmp_path, sizes=(384,))


@pytest.mark.usefixtures("narrow_vits")
def test_open_clip_s_own_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = narrow(REGISTRY["clip-laion-b16"])
    model = open_clip.create_model("ViT-B-16", load_weights=False)
    torch.save(model.state_dict(), tmp_path / "hub.bin")
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda *args, **kwargs: str(tmp_path / "hub.bin"))
    teacher = load_teacher(spec, weights=None, device=CPU, dtype=torch.float32, sizes=(224,))
    want = model.visual.state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in teacher.module.state_dict().items())
    whole = load_teacher(spec, weights=tmp_path / "hub.bin", device=CPU, dtype=torch.float32, sizes=(224,))
    assert weights_digest(whole.module) == weights_digest(teacher.module)


def test_weights_of_another_model_are_refused(small_hf: TeacherSpec) -> None:
    with pytest.raises(TeacherError, match="a different model than dinov2-s: dense_dim 32 instead of 384"):
        load_teacher(REGISTRY["dinov2-s"], weights=Path(small_hf.model), device=CPU, dtype=torch.float32, sizes=(224,))


def test_teacher_is_frozen(small_hf: TeacherSpec) -> None:
    teacher = load_teacher(small_hf, weights=None, device=CPU, dtype=torch.float32, sizes=(56,))
    assert not any(part.training for part in teacher.module.modules())
    assert not any(p.requires_grad for p in teacher.module.parameters())
    assert not teacher(views(56)).dense.requires_grad


def test_part_that_stays_in_training_mode_is_an_error() -> None:
    class Stubborn(nn.Dropout):
        def train(self, mode: bool = True) -> "Stubborn":
            return super().train(True)

    with pytest.raises(TeacherError, match=r"training mode \(1\)"):
        teacher_module._frozen(nn.Sequential(nn.Linear(1, 1), Stubborn()))


def test_bf16_computes_under_autocast_and_returns_float32(small_hf: TeacherSpec) -> None:
    full, half = (
        load_teacher(small_hf, weights=None, device=CPU, dtype=dtype, sizes=(56,))
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert {p.dtype for p in half.module.parameters()} == {torch.float32}
    exact, rounded = full(views(56)).dense, half(views(56)).dense
    assert exact.dtype == rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    assert nn.functional.cosine_similarity(exact, rounded, dim=-1).min() > 0.999


def test_sizes_that_cannot_work_are_refused_before_loading(small_hf: TeacherSpec) -> None:
    with pytest.raises(TeacherError, match="--size 56 or --size 70"):
        load_teacher(small_hf, weights=Path("nowhere"), device=CPU, dtype=torch.float32, sizes=(56, 60))
    teacher = load_teacher(small_hf, weights=None, device=CPU, dtype=torch.float32, sizes=(56,))
    with pytest.raises(TeacherError, match="must divide"):
        teacher(views(60))


def test_architecture_with_a_fixed_grid_takes_one_size_at_a_time(tmp_path: Path) -> None:
    spec = resolve_teacher("timm:xcit_nano_12_p16_224.fb_in1k")
    load_state(spec, timm.create_model("xcit_nano_12_p16_224").state_dict(), tmp_path, sizes=(96, 224))
    spec = resolve_teacher("timm:cait_xxs24_224.fb_dist_in1k")
    with pytest.raises(TeacherError, match="one size at a time"):
        load_teacher(spec, weights=tmp_path, device=CPU, dtype=torch.float32, sizes=(96, 224))


def test_output_that_contradicts_the_spec_is_an_error(small_hf: TeacherSpec) -> None:
    teacher = load_teacher(small_hf, weights=None, device=CPU, dtype=torch.float32, sizes=(56,))
    wrong = dataclasses.replace(teacher, spec=dataclasses.replace(small_hf, dense_dim=33))
    with pytest.raises(TeacherError, match="but its spec says"):
        wrong(views(56))


def test_run_as_teacher_gives_the_student_s_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = build_encoder("resnet18", size=64).eval()
    save_encoder(encoder, tmp_path)
    spec = resolve_teacher(str(tmp_path))
    teacher: Teacher = load_teacher(spec, weights=None, device=CPU, dtype=torch.float32, sizes=(64, 96))
    pixels = ((views(96).float() / 255 - torch.tensor(spec.mean)) / torch.tensor(spec.std)).permute(0, 3, 1, 2)
    with torch.no_grad():
        want = encoder(pixels)
    torch.testing.assert_close(teacher(views(96)).dense, want.dense)
    torch.testing.assert_close(teacher(views(96)).summary, want.summary)


def test_words_for_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compute_dtype("fp32", CPU) == torch.float32
    assert compute_dtype("bf16", CPU) == torch.bfloat16
    assert compute_dtype("fp16", torch.device("cuda")) == torch.float16
    with pytest.raises(ConfigError, match="fp16"):
        compute_dtype("fp16", CPU)
    with pytest.raises(ConfigError, match="fp8"):
        compute_dtype("fp8", CPU)
    for capabilities, want in (({"amx_bf16": True}, torch.bfloat16), ({"avx512_f": True}, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert compute_dtype("auto", CPU) == want


def test_weights_digest_sees_names_shapes_dtypes_and_bytes() -> None:
    def digest(**tensors: Any) -> str:
        module = nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return weights_digest(module)

    base = digest(a=torch.arange(4.0), b=torch.tensor(1))
    assert base == digest(b=torch.tensor(1), a=torch.arange(4.0))
    others = [
        digest(a=torch.arange(4.0), c=torch.tensor(1)),
        digest(a=torch.arange(4.0).view(2, 2), b=torch.tensor(1)),
        digest(a=torch.arange(4.0).view(torch.int32), b=torch.tensor(1)),
        digest(a=torch.arange(4.0) + 1e-6, b=torch.tensor(1)),
        digest(a=torch.arange(4.0).to(torch.bfloat16), b=torch.tensor(1)),
    ]
    assert len({base, *others}) == 6


def test_file_digest_of_files_and_directories(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.ones(3)}, file)
    (tmp_path / "config.json").write_text("{}")
    first = file_digest(file), file_digest(tmp_path)
    assert first[0] != first[1] and first == (file_digest(file), file_digest(tmp_path))
    (tmp_path / "README.md").write_text("irrelevant")
    assert file_digest(tmp_path) == first[1]
    (tmp_path / "config.json").write_text('{"hidden_size": 1}')
    assert file_digest(tmp_path) != first[1] and file_digest(file) == first[0]
