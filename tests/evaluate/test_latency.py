"""What an encoder costs: FLOPs against counts by hand, passes as they were asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from eupe.errors import ConfigError
from eupe.evaluate import latency as module
from eupe.evaluate.latency import WARMUP, Timing, count_flops, latency, quartiles, time_passes
from eupe.evaluate.subject import open_subjects
from eupe.models.encoder import build_encoder, save_encoder
from eupe.store import Store
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.teacher import build_teacher

Run = Callable[..., Any]


class Attention(nn.Module):
    """Attention with 3 heads of 4 channels each, by PyTorch's fused function."""

    def forward(self, x_BND: Tensor) -> Tensor:
        heads = x_BND.unflatten(2, (3, 4)).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)


@pytest.mark.parametrize(
    ("module", "shape", "multiply_adds"),
    [
        (nn.Linear(5, 7), (2, 3, 5), 2 * 3 * 5 * 7),
        (nn.Conv2d(3, 8, kernel_size=3, stride=2, padding=1), (2, 3, 10, 10), 2 * 5 * 5 * 8 * 3 * 9),
        (nn.Conv2d(8, 8, kernel_size=3, padding=1, groups=8), (1, 8, 6, 6), 6 * 6 * 8 * 9),
        (Attention(), (2, 11, 12), 2 * 3 * 2 * 11 * 11 * 4),
        (nn.Sequential(nn.LayerNorm(5), nn.GELU()), (2, 3, 5), 0),
    ],
)
def test_a_multiply_add_is_two_flops(module: nn.Module, shape: tuple[int, ...], multiply_adds: int) -> None:
    assert count_flops(module, torch.zeros(shape)) == 2 * multiply_adds


def test_torchs_own_attention_layer_is_counted() -> None:
    """open_clip's towers use this layer, which takes a fused path in evaluation mode by default."""
    attention = nn.MultiheadAttention(12, 3, batch_first=True).eval().requires_grad_(False)
    flops = count_flops(lambda x: attention(x, x, x, need_weights=False), torch.zeros(2, 11, 12))
    assert flops == 2 * (2 * 11 * 12 * 36 + 2 * 3 * 2 * 11 * 11 * 4 + 2 * 11 * 12 * 12)


@pytest.mark.parametrize("size", [32, 64])
def test_a_vit_costs_what_its_blocks_do(size: int) -> None:
    """Patches, then in each block queries, keys, values, attention, projection and the MLP's two layers."""
    spec = resolve_teacher("timm:vit_tiny_patch16_224")
    teacher = build_teacher(spec, size=size)
    tokens, width, depth = (size // 16) ** 2 + 1, 192, 12
    block = (
        tokens * width * 3 * width + 2 * tokens * tokens * width + tokens * width**2 + 2 * tokens * width * 4 * width
    )
    patches = (tokens - 1) * 3 * 16 * 16 * width
    assert count_flops(teacher.encode, torch.zeros(1, 3, size, size)) == 2 * (patches + depth * block)


def test_each_size_has_a_result_and_weights_are_not_needed(tmp_path: Path, run_eupe: Run) -> None:
    kept = tmp_path / "results.jsonl"
    words = ("eval", "latency", "timm:test_vit", "--size", 32, "--size", 70, "--repeats", 3, "--batch-size", 2)
    report = json.loads(run_eupe(*words, "--threads", 1, "--results", kept, "--json").out)
    small, large = report["results"]
    assert [r["protocol"]["asked_size"] for r in report["results"]] == [32, 70]
    assert [r["protocol"]["size"] for r in report["results"]] == [32, 64]
    protocol = small["protocol"]
    assert (protocol["batch_size"], protocol["threads"], protocol["repeats"]) == (2, 1, 3)
    assert (protocol["dtype"], protocol["device"]) == ("fp32", "cpu")
    model = timm.create_model("test_vit", num_classes=0)
    assert small["scores"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert small["scores"]["gflops"] == 2 * small["scores"]["gmacs"] < large["scores"]["gflops"]
    assert 0 < small["scores"]["ms_p25"] <= small["scores"]["ms"] <= small["scores"]["ms_p75"]
    assert small["lower_is_better"]
    assert [json.loads(line) for line in kept.read_text().splitlines()] == report["results"]
    readable = run_eupe(*words)
    assert readable.code == 0 and "a multiply-add (MAC) is two FLOPs" in " ".join(readable.out.split())


def test_a_run_is_timed_and_keeps_the_result(tmp_path: Path, run_eupe: Run) -> None:
    run = tmp_path / "run"
    save_encoder(build_encoder("test_vit", size=64), run)
    (run / "config.json").write_text(
        '{"config": {"seed": 3}, "targets": [], "mix": [], "pictures": [], "total_steps": 1}'
    )
    assert run_eupe("eval", "latency", run, "--size", 64, "--repeats", 1).code == 0
    (line,) = (run / "evaluations.jsonl").read_text().splitlines()
    kept = json.loads(line)
    assert (kept["task"], kept["subject"], kept["kind"]) == ("latency", str(run), "run")
    encoder = build_encoder("test_vit", size=64).requires_grad_(False)
    assert kept["scores"]["parameters"] == sum(parameter.numel() for parameter in encoder.parameters())
    assert kept["scores"]["gflops"] == count_flops(encoder, torch.zeros(1, 3, 64, 64)) / 1e9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dinov2-s", "clip-b32", "siglip-b-224", "efficientnet-lite0", "convnext-t"])
def test_teachers_of_every_library_are_built_without_weights(name: str) -> None:
    spec = resolve_teacher(name)
    teacher = build_teacher(spec, size=spec.native_size)
    views = torch.zeros(1, spec.native_size, spec.native_size, 3, dtype=torch.uint8)
    assert teacher(views).dense.shape[-1] == spec.dense_dim
    assert not any(parameter.requires_grad for parameter in teacher.module.parameters())


def test_building_leaves_torchs_generator_as_it_was() -> None:
    before = torch.get_rng_state()
    build_teacher(resolve_teacher("timm:test_vit"), size=32)
    assert torch.equal(before, torch.get_rng_state())


def test_passes_are_those_asked_for_after_some_to_warm_up() -> None:
    shapes = []
    seconds = time_passes(lambda pixels: shapes.append(tuple(pixels.shape)), torch.zeros(3, 3, 8, 8), 5)
    assert len(seconds) == 5 and min(seconds) >= 0
    assert shapes == [(3, 3, 8, 8)] * (5 + WARMUP)


def test_the_time_is_that_of_one_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "time_passes", lambda forward, pixels, repeats: [0.1, 0.2, 0.4])
    subject = open_subjects(["timm:test_vit"], {})[0]
    alone, four = (latency(subject, sizes=[32], timing=Timing(batch_size=b))[0].scores["ms"] for b in (1, 4))
    assert (alone, four) == (pytest.approx(200), pytest.approx(50))


def test_quartiles() -> None:
    assert quartiles([3, 1, 2, 5, 4]) == (2, 3, 4)
    assert quartiles([7]) == (7, 7, 7)


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    (result,) = latency(open_subjects(["timm:test_vit"], {})[0], sizes=[32], timing=Timing(repeats=1, threads=1))
    assert result.protocol["threads"] == 1
    assert torch.get_num_threads() == before


def test_what_has_no_cost_is_refused(tiny_store: Store) -> None:
    store, pixels, vit = open_subjects([str(tiny_store.path), "pixels", "timm:test_vit"], {})
    with pytest.raises(ConfigError, match="is a store, which has no model to time; give its teacher, timm:test_vit"):
        latency(store)
    with pytest.raises(ConfigError, match="pixels is not an encoder"):
        latency(pixels)
    with pytest.raises(ConfigError, match="--size must be at least 1 px, got 0"):
        latency(vit, sizes=[0])
    with pytest.raises(ConfigError, match="--batch-size and --repeats must be at least 1, got 0 and 30"):
        Timing(batch_size=0)
    cores = os.cpu_count() or 1
    with pytest.raises(ConfigError, match=f"--threads must be between 1 and the {cores} cores"):
        Timing(threads=cores + 1)
