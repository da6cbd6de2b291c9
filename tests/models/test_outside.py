"""eupe/models/outside.py against the libraries' own forward passes, and every way in which a student can be wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
import transformers
from torch import Tensor, nn

from eupe.common.kinds import STUDENT_FILE, TRUST_VARIABLE
from eupe.errors import ConfigError, RunError
from eupe.models.encoder import Encoder, build_encoder, check_student, encoder_spec, load_encoder, save_encoder
from eupe.models.outside import IMAGENET, is_factory, is_outside

VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
CNN = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
CONFIGS = {
    # class: (options, pixels per cell, width, prefix tokens, summary)
    "ViTConfig": ({**VIT, "image_size": 64, "patch_size": 16}, 16, 32, 1, "cls"),
    "Dinov2WithRegistersConfig": ({**VIT, "image_size": 56, "patch_size": 8}, 8, 32, 5, "cls"),
    "SiglipVisionConfig": ({**VIT, "image_size": 64, "patch_size": 16}, 16, 32, 0, "mean"),
    "ResNetConfig": (CNN, 32, 32, 0, "mean"),
    "RTDetrResNetConfig": ({**CNN, "out_features": ["stage2", "stage3", "stage4"]}, 32, 32, 0, "mean"),
}
NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.last = nn.Conv2d(width, 12, 8, 8)

    def forward(self, x):
        return self.last(self.stem(x))

class Pair(Net):
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    def forward(self, x):
        map = super().forward(x)
        return map.amax(dim=(2, 3)), map

class Noisy(Net):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5)

class Mixing(Net):
    def forward(self, x):
        return super().forward(x) - x.mean()

class Growing(Net):
    def forward(self, x):
        map = super().forward(x)
        return map if x.shape[-1] == 64 else map.repeat(1, 2, 1, 1)

class Upright(Net):
    def forward(self, x):
        return super().forward(x).permute(0, 2, 3, 1)

class Scores(Net):
    def forward(self, x):
        return super().forward(x).mean(dim=(2, 3))

class Squashed(Net):
    mean, std = (0.5, 0.5), (0.5, 0.5)

class Modules:
    made = staticmethod(Net)

number = 3

def with_an_argument(width):
    return Net(width)

def of_another_kind():
    return [1, 2]
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's module on PYTHONPATH; a fresh one for each test."""
    (file := tmp_path / "own_nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_nets", raising=False)
    return file


def pictures(side: int = 64) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def tokens(encoder: Encoder, x: Tensor) -> tuple[Tensor, Tensor]:
    answer = encoder.eval()(x)
    assert answer.summary is not None
    return answer.summary, answer.dense


def test_whose_name_it_is() -> None:
    assert is_outside("torchvision:resnet18") and is_outside("hf:some/where") and is_outside("a.b:c")
    assert is_factory("a.b:C.d") and not is_factory("torchvision:resnet18") and not is_factory("hf:where")
    assert not any(map(is_outside, ("resnet18", "resnet18.a1_in1k", "local-dir:folder", "hf-hub:timm/resnet18")))


@pytest.mark.parametrize(
    ("name", "head"),
    [  # the layers behind the map, which have to say what the whole model says
        ("resnet18", lambda m, dense: m.fc(dense.mean(dim=(1, 2)))),
        ("mobilenet_v3_small", lambda m, dense: m.classifier(dense.mean(dim=(1, 2)))),
        ("convnext_tiny", lambda m, dense: m.classifier(dense.mean(dim=(1, 2))[:, :, None, None])),
        ("swin_t", lambda m, dense: m.head(dense.mean(dim=(1, 2)))),
    ],
)
def test_torchvision_s_last_map_is_what_its_classifier_reads(
    name: str, head: Callable[[nn.Module, Tensor], Tensor]
) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(f"torchvision:{name}", size=64)
    whole = torchvision.models.get_model(name, weights=None).eval()
    whole.load_state_dict(encoder.model.state_dict(), strict=False)
    summary, dense = tokens(encoder, pictures())
    with torch.inference_mode():
        torch.testing.assert_close(head(whole, dense), whole(pictures()))
    torch.testing.assert_close(summary, dense.mean(dim=(1, 2)))
    assert (encoder.spec.patch, encoder.spec.mean, encoder.spec.std) == (32, *IMAGENET)


def test_torchvision_s_vit_has_its_class_token_and_its_patches() -> None:
    encoder = build_encoder("torchvision:vit_b_32", size=64)
    whole = torchvision.models.vit_b_32(image_size=64).eval()
    whole.load_state_dict(encoder.model.state_dict(), strict=False)
    summary, dense = tokens(encoder, pictures())
    with torch.inference_mode():
        torch.testing.assert_close(whole.heads(summary), whole(pictures()))
    assert dense.shape == (2, 2, 2, 768) and encoder.spec.summary == "cls"


def saved(folder: Path, kind: str, options: dict[str, object]) -> Path:
    getattr(transformers, kind)(**options).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", CONFIGS)
def test_transformers_tokens_are_the_library_s(kind: str, tmp_path: Path) -> None:
    options, patch, width, prefix, summary_kind = CONFIGS[kind]
    name = f"hf:{saved(tmp_path / 'model', kind, options)}"
    encoder = build_encoder(name, size=64)
    spec = encoder.spec
    assert (spec.patch, spec.dense_dim, spec.prefix_tokens, spec.summary) == (patch, width, prefix, summary_kind)
    summary, dense = tokens(encoder, pictures())
    options = {"interpolate_pos_encoding": True} if kind.startswith("Dino") else {}
    with torch.inference_mode():
        answer = encoder.model(pixel_values=pictures(), **options)
    library = answer.feature_maps[-1] if "feature_maps" in answer else answer.last_hidden_state
    if library.ndim == 4:
        library = library.flatten(2).mT
    torch.testing.assert_close(dense.flatten(1, 2), library[:, prefix:])
    torch.testing.assert_close(summary, library[:, 0] if prefix else library.mean(dim=1))


def test_transformers_files_decide_the_normalisation_and_a_run_needs_them_no_more(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "ResNetConfig", CNN)
    said = {"image_processor_type": "ConvNextImageProcessor", "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    encoder = build_encoder(f"hf:{folder}", size=64)
    assert (encoder.spec.mean, encoder.spec.std) == ((0.1, 0.2, 0.3), (0.4, 0.4, 0.4))
    save_encoder(encoder, tmp_path / "run")
    for file in folder.iterdir():
        file.unlink()
    again = load_encoder(tmp_path / "run")
    assert again.spec == encoder.spec
    torch.testing.assert_close(tokens(again, pictures()), tokens(encoder, pictures()), rtol=0, atol=0)


def test_a_function_s_module_is_taken_as_it_answers(nets: Path) -> None:
    plain, pair = (build_encoder(f"own_nets:{name}", size=64) for name in ("Modules.made", "Pair"))
    summary, dense = tokens(plain, pictures())
    with torch.inference_mode():
        torch.testing.assert_close(dense.permute(0, 3, 1, 2), plain.model(pictures()))
    assert plain.spec.summary == "mean" and plain.spec.mean == IMAGENET[0] and plain.spec.patch == 16
    summary, dense = tokens(pair, pictures())
    torch.testing.assert_close(summary, dense.amax(dim=(1, 2)))
    assert pair.spec.summary == "own" and pair.spec.std == (0.25, 0.25, 0.25)
    check_student("own_nets:Pair", [64, 96], views=2)


@pytest.mark.parametrize(
    ("student", "size", "words"),
    [
        ("own_nets:Noisy", 64, "two outputs for the same picture in evaluation mode"),
        ("own_nets:Mixing", 64, "another output when it is alone than in a batch"),
        ("own_nets:Upright", 64, r"gives \[4, 4, 12\] for a picture of 64 px, which is not a map"),
        ("own_nets:Scores", 64, r"returns a tensor \[2, 12\] of float32; give a map"),
        ("own_nets:Squashed", 64, r"says mean \(0.5, 0.5\) and std"),
        ("own_nets:Net", 72, "4 cells along 72 px and 9 along 144 px, so its cells do not tile the picture"),
        ("own_nets:Net", 110, r"gives \[12, 6, 6\] for a picture of 110 px, which is not a map"),
        ("own_nets:Net", 8, "does not take pictures of 8 px .RuntimeError"),
        ("own_nets:with_an_argument", 64, "failed .TypeError: .*must return a torch.nn.Module when"),
        ("own_nets:of_another_kind", 64, "returned a list of 2, not a torch.nn.Module"),
        ("own_nets:number", 64, "number is no function, but a int"),
        ("own_nets:Nets", 64, "own_nets has no 'Nets'; did you mean Net"),
        ("no_such_nets:Net", 64, "no_such_nets cannot be imported .ModuleNotFoundError.*PYTHONPATH"),
        ("torchvision:resnet19", 64, "torchvision has no classifier 'resnet19'; did you mean resnet1"),
        ("hf:nowhere", 64, "has no configuration that Transformers reads"),
    ],
)
def test_what_is_wrong_with_a_student_is_said_in_a_sentence(student: str, size: int, words: str, nets: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        encoder_spec(student, size)


def test_sizes_and_views_are_tried_before_anything_is_trained(nets: Path) -> None:
    with pytest.raises(ConfigError, match="own_nets:Growing is 24 wide at 96 px, and 12 at 64; give one --size"):
        check_student("own_nets:Growing", [64, 96], views=2)
    cnn = f"hf:{saved(nets.parent / 'model', 'ResNetConfig', CNN)}"
    with pytest.raises(ConfigError, match="cannot be trained on one view of 32 px at a time"):
        check_student(cnn, [32], views=1)


@pytest.mark.parametrize("kind", ["ViTConfig", "Dinov2WithRegistersConfig"])
def test_positions_of_another_size_are_resampled_and_stay_the_library_s(kind: str, tmp_path: Path) -> None:
    """Pretrained weights then fit at every size."""
    folder = saved(tmp_path / "model", kind, {**CONFIGS[kind][0], "image_size": 112})
    encoder = build_encoder(f"hf:{folder}", size=64)
    cells = 112 // encoder.spec.patch
    assert encoder.model.state_dict()["embeddings.position_embeddings"].shape[1] == cells**2 + 1
    assert tokens(encoder, pictures())[1].shape[1:3] == (64 // encoder.spec.patch,) * 2


def test_clip_is_no_model_of_pictures_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not take pictures alone: its input is input_ids"):
        encoder_spec(f"hf:{saved(tmp_path / 'clip', 'CLIPConfig', {})}", 64)


def test_a_run_s_word_runs_no_code_without_trust(nets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = build_encoder("own_nets:Net", size=64)
    save_encoder(encoder, run := nets.parent / "run")
    with pytest.raises(ConfigError, match="is built by own_nets:Net, which is code"):
        load_encoder(run)
    monkeypatch.setenv(TRUST_VARIABLE, "1")
    torch.testing.assert_close(tokens(load_encoder(run), pictures()), tokens(encoder, pictures()), rtol=0, atol=0)


def test_a_source_that_changed_is_refused_if_it_answers_otherwise(nets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRUST_VARIABLE, "1")
    save_encoder(build_encoder("own_nets:Net", size=64), run := nets.parent / "run")
    digest = json.loads((run / STUDENT_FILE).read_text())["origin"]["digest"]
    nets.write_text(f"# a remark\n{NETS}")
    monkeypatch.delitem(sys.modules, "own_nets")
    now = load_encoder(run).spec.origin
    assert now is not None and now["digest"] != digest
    nets.write_text(NETS.replace("nn.ReLU()", "nn.GELU()"))
    monkeypatch.delitem(sys.modules, "own_nets")
    with pytest.raises(RunError, match=r"gives other outputs than .* \(the source of own_nets has changed\); install"):
        load_encoder(run)
