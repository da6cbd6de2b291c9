"""Finished runs without any training, whose every tensor matters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from shallow import register_shallow
from torch import Tensor, nn

from eupe.common.compute import normalise
from eupe.corpus.awkward import picture
from eupe.export.config import ExportConfig
from eupe.export.job import export
from eupe.export.sample_pictures import varied_pictures
from eupe.models.encoder import Encoder, build_encoder, load_encoder, save_encoder
from eupe.teachers.library_check import compare
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.teacher import load_teacher
from eupe.train.model import TargetHeads
from eupe.train.normalise import Normaliser
from eupe.train.predict import norm_tensors
from eupe.train.run_spec import RunSpec, target_names

SIZE = 64
VIT, CONVNEXT = "vit_tiny_patch16_dinov3_qkvb", "test_convnext"
HEAD_WIDTH = 24
SHALLOW_VIT = register_shallow("shallow_dinov3", VIT, depth=2)
SHALLOW_TEST_VIT = register_shallow("shallow_test_vit", "test_vit", depth=2)
SHALLOW_TEST_VIT3 = register_shallow("shallow_test_vit3", "test_vit3", depth=2)


@dataclass(frozen=True)
class Exports:
    """Runs of several architectures and their exports, each made when it is first asked for. Not to be changed."""

    folder: Path
    format: str
    heads: tuple[str, ...] = ("all",)
    rotated: bool = False

    def run(self, arch: str) -> Path:
        run = self.folder / arch
        return run if run.exists() else finished_run(run, arch, rotated=self.rotated)

    def out(self, arch: str) -> Path:
        out = self.folder / f"{arch}-{self.format}"
        if not out.exists():
            export(ExportConfig(run=self.run(arch), out=out, format=self.format, heads=self.heads))
        return out


def some_slow(*fast: Any, slow: Sequence[Any]) -> list[Any]:
    """Parameters of a test, some of which take longer."""
    many = (each if isinstance(each, tuple) else (each,) for each in slow)
    return [*fast, *(pytest.param(*each, marks=pytest.mark.slow) for each in many)]


def target(teacher: str, *, licence: str = "apache-2.0", summary: int = 20, dense: int = 12) -> dict[str, Any]:
    spec = {"path": f"{teacher}.zarr", "fingerprint": "f" * 8, "teacher": teacher, "licence": licence}
    return {**spec, "summary_dim": summary, "dense_dim": dense}


DINO, LITE = target("dinov2-s"), target("efficientnet-lite0", licence="mit", summary=0)


def fill(module: nn.Module, seed: int = 0) -> None:
    """Draw everything anew: what libraries start from, zeros, ones and tiny layer scales, would hide a lost tensor."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 3:
                parameter.copy_(0.5 * noise)
            elif parameter.ndim > 1:
                parameter.copy_(1.4 * noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.2 * noise + (0.7 if name.endswith("weight") or "gamma" in name else 0.0))


def settle(model: Any, size: int) -> None:
    """Give batch norms statistics of their own activations, without which pictures would hardly differ at the end."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for module in norms:
        module.momentum = 1.0
    if norms:
        with torch.no_grad():
            model.train()(torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(2)))


def finished_run(
    folder: Path,
    arch: str = VIT,
    *,
    size: int = SIZE,
    targets: Sequence[Mapping[str, Any]] = (DINO, LITE),
    rotated: bool = False,
    seed: int = 0,
) -> Path:
    """The files of a finished run."""
    with torch.random.fork_rng(devices=[]):
        encoder = build_encoder(arch, size=size)
        widths = (encoder.spec.summary_dim, encoder.spec.dense_dim)
        heads = nn.ModuleList(TargetHeads(widths, (t["summary_dim"], t["dense_dim"]), HEAD_WIDTH) for t in targets)
    fill(encoder.model, seed)
    settle(encoder.model, size)
    fill(heads, seed + 1)
    save_encoder(encoder, folder)
    save_file(heads.state_dict(), folder / "heads.safetensors")
    kinds = [[kind for kind in ("summary", "dense") if t[f"{kind}_dim"]] for t in targets]
    norms = [
        {kind: norm(t[f"{kind}_dim"], seed + i, rotated=rotated) for kind in has}
        for i, (t, has) in enumerate(zip(targets, kinds, strict=True))
    ]
    gains = [dict.fromkeys(has, 0.3 + i) for i, has in enumerate(kinds)]
    save_file(norm_tensors(norms, gains), folder / "norms.safetensors")
    config = {"student": arch, "size": [size], "head_width": HEAD_WIDTH, "lr": 0.001, "batch_size": 32, "seed": 0}
    spec = RunSpec(
        config=config, targets=tuple(map(dict, targets)), pictures=("d" * 8,), total_steps=1234, versions={"torch": "9"}
    )
    (folder / "config.json").write_text(json.dumps(spec.to_json()))
    validation = {
        name: {kind: {"raw": 0.81, "mean_raw": 0.7, "normalised": 0.5} for kind in has}
        for name, has in zip(target_names(targets), kinds, strict=True)
    }
    (folder / "report.json").write_text(json.dumps({"validation": validation}))
    return folder


def norm(width: int, seed: int, *, rotated: bool) -> Normaliser:
    """Return a normaliser of features that are neither centred nor all of one scale."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3, width, generator=generator)
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q.contiguous() if rotated else None
    return Normaliser(mean=rows[0], centre=rows[1], scale=rows[2].abs() + 0.1, rotation=rotation)


def photograph(path: Path, width: int = 150) -> Path:
    """A picture that is 110 pixels high."""
    picture(5, width=width, height=110).save(path)
    return path


def centre_view(path: Path, size: int) -> Tensor:
    """uint8 [1, S, S, 3], by plain Pillow."""
    image = Image.open(path).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    view = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(view).copy())[None]


@torch.inference_mode()
def tokens_of(run: Path, path: Path, size: int = SIZE) -> tuple[Encoder, Tensor, Tensor]:
    """The run's encoder, and its summary and dense tokens of a picture's centre view."""
    encoder = load_encoder(run).eval()
    tokens = encoder(normalise(centre_view(path, size), encoder.spec.mean, encoder.spec.std))
    assert tokens.summary is not None
    return encoder, tokens.summary, tokens.dense


def least_cosine(got: Any, want: Tensor) -> float:
    got = torch.as_tensor(np.asarray(got))
    assert got.shape == want.shape
    return float(torch.nn.functional.cosine_similarity(got.double(), want.double(), dim=-1).min())


def assert_teaches(name: str, run: Path) -> None:
    """Check that an export, used as a teacher, gives its run's tokens, and that its library agrees."""
    spec, student = resolve_teacher(name), load_encoder(run).eval()
    assert (spec.native_size, spec.mean, spec.std) == (SIZE, student.spec.mean, student.spec.std)
    teacher = load_teacher(spec, weights=None, device=torch.device("cpu"), dtype=torch.float32, sizes=(SIZE,))
    views = torch.from_numpy(varied_pictures(SIZE, SIZE, seed=7))
    with torch.inference_mode():
        got, want = teacher(views), student(normalise(views, student.spec.mean, student.spec.std))
    assert least_cosine(got.summary, want.summary) > 0.99999
    assert least_cosine(got.dense, want.dense) > 0.99999
    found = compare(spec)
    assert found.agrees, found


def said_in_a_loop(out: Path, pictures: Sequence[Path]) -> list[dict[str, Any]]:
    """Return what the card's code gives for each picture when all of it after the loading runs in a loop."""
    once, blank, each = code_of(out / "README.md").rpartition("\n\n")
    body = "".join(f"    {line}\n" for line in each.splitlines())
    loop = f"{once}{blank}for PICTURE in PICTURES:\n{body}    said_of.append((summary, dense, teachers))\n"
    names: dict[str, Any] = {"DIR": str(out), "PICTURES": list(map(str, pictures)), "said_of": [], "teachers": None}
    exec(loop, names)
    return [dict(zip(("summary", "dense", "teachers"), each, strict=True)) for each in names["said_of"]]


def code_of(card: Path) -> str:
    """The Python code in an export's README."""
    _, _, rest = card.read_text().partition("```python\n")
    return rest.partition("```")[0]
