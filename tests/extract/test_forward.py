"""Batches through a teacher: pieces that fit, the batch that pays, the cosine to float32."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from making import TINY_SIZE, TINY_TEACHER
from torch import Tensor

from eupe.common.compute import Tokens
from eupe.errors import TeacherError
from eupe.extract.calibrate import LARGEST_BATCH, cosine_to_fp32, fastest_batch
from eupe.extract.worker import Forward
from eupe.store import Store
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.teacher import Teacher, load_teacher


class Cramped:
    """A device with room for so many views at once, and what each forward pass takes."""

    device = torch.device("cpu")
    spec = resolve_teacher(TINY_TEACHER)

    def __init__(self, teacher: Any = None, *, room: int = 10**6, pass_s: float = 0.0, view_s: float = 0.0) -> None:
        self.teacher, self.room, self.pass_s, self.view_s = teacher, room, pass_s, view_s
        self.batches: list[int] = []
        self.clock_s = 0.0

    def __call__(self, pixels: Tensor, layers: Sequence[int] = ()) -> Tokens:
        self.batches.append(len(pixels))
        if len(pixels) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.clock_s += self.pass_s + self.view_s * len(pixels)
        if self.teacher is None:
            return Tokens(summary=None, dense=torch.zeros(len(pixels), 1, 1, 1))
        tokens: Tokens = self.teacher(pixels)
        return tokens


@dataclass(frozen=True)
class Broken:
    """Overflows in all arithmetic but float32."""

    dtype: torch.dtype = torch.float16

    def __call__(self, pixels: Tensor, layers: Sequence[int] = ()) -> Tokens:
        value = 1.0 if self.dtype == torch.float32 else float("nan")
        return Tokens(summary=None, dense=torch.full((len(pixels), 1, 1, 4), value))


@pytest.fixture(scope="module")
def teacher(tiny_weights: Path) -> Teacher:
    spec = resolve_teacher(TINY_TEACHER)
    options = {"device": torch.device("cpu"), "dtype": torch.float32, "sizes": (TINY_SIZE,)}
    return load_teacher(spec, weights=tiny_weights, **options)  # type: ignore[arg-type]


def views(count: int) -> list[dict[int, Any]]:
    rng = np.random.default_rng(0)
    return [{TINY_SIZE: rng.integers(0, 256, (TINY_SIZE, TINY_SIZE, 3), np.uint8)} for _ in range(count)]


def test_out_of_memory_halves_the_batch_and_loses_nothing(teacher: Teacher, tiny_store: Store) -> None:
    cramped = Cramped(teacher, room=3)
    forward = Forward(cramped, tiny_store.spec, batch_size=16, cores=2)  # type: ignore[arg-type]
    asked = views(13)
    ours = forward.begin(asked).wait()
    assert forward.batch_size == 2
    theirs = Forward(teacher, tiny_store.spec, batch_size=16, cores=2).begin(asked).wait()
    assert [other.start for other in theirs] == [0, 0]
    for other in theirs:
        mine = [fp16_tokens for fp16_tokens in ours if fp16_tokens.path == other.path]
        assert [fp16_tokens.start for fp16_tokens in mine] == list(range(0, 13, 2))
        tokens = torch.cat([fp16_tokens.tokens for fp16_tokens in mine])
        assert tokens.shape == other.tokens.shape
        assert torch.allclose(tokens.float(), other.tokens.float(), atol=2e-2)
    tried = len(cramped.batches)
    forward.begin(asked[:4]).wait()
    assert cramped.batches[tried:] == [2, 2], "what did not fit once is not tried again"


def test_on_a_cpu_every_batch_has_one_core(teacher: Teacher, tiny_store: Store) -> None:
    """And as many are under way as there are cores."""

    def counting(pixels: Tensor) -> Tokens:
        threads.append((threading.get_ident(), torch.get_num_threads()))
        time.sleep(0.1)
        return teacher(pixels)

    threads: list[tuple[int, int]] = []
    before, cores = torch.get_num_threads(), 3
    forward = Forward(Cramped(counting), tiny_store.spec, batch_size=4, cores=cores)  # type: ignore[arg-type]
    for pending in [forward.begin(views(2)) for _ in range(2 * cores)]:
        pending.wait()
    assert {number for _, number in threads} == {1} and len({thread for thread, _ in threads}) == cores
    assert forward.batches_at_once == cores
    with ThreadPoolExecutor(1) as another:
        assert torch.get_num_threads() == another.submit(torch.get_num_threads).result() == before, "others keep theirs"


def test_no_room_for_one_view_is_a_sentence(tiny_store: Store) -> None:
    forward = Forward(Cramped(room=0), tiny_store.spec, batch_size=4, cores=2)  # type: ignore[arg-type]
    with pytest.raises(TeacherError, match="runs out of memory on cpu with a single view of 64 px"):
        forward.begin(views(2)).wait()


def test_other_errors_are_not_taken_for_too_little_memory(tiny_store: Store) -> None:
    def broken(pixels: Tensor) -> Tokens:
        raise RuntimeError("device-side assert triggered")

    cramped = Cramped(broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        Forward(cramped, tiny_store.spec, batch_size=4, cores=2).begin(views(2)).wait()  # type: ignore[arg-type]
    assert cramped.batches == [2]


@pytest.mark.parametrize(
    ("device", "chosen"),
    [
        (Cramped(view_s=0.001), 8),
        (Cramped(pass_s=0.020, view_s=0.001), 256),  # 1.08 times the rate of 128, and 512 only 1.04 times that of 256
        (Cramped(pass_s=0.020, view_s=0.001, room=32), 32),
        (Cramped(pass_s=0.020), LARGEST_BATCH),
        (Cramped(room=4), 8),  # to be halved when it is used
        (Cramped(pass_s=0.050, view_s=0.010), 32),  # 64 views, though 1.07 times as fast, take more than half a second
        (Cramped(view_s=0.2), 8),  # which is not even tried
    ],
)
def test_the_batch_is_the_one_that_pays_and_fits_found_soon(
    device: Cramped, chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: device.clock_s)
    assert fastest_batch(device, (64,)) == chosen  # type: ignore[arg-type]
    assert device.clock_s < 3


def test_the_cosine_to_fp32_is_that_of_the_arithmetic(teacher: Teacher) -> None:
    pixels = torch.from_numpy(np.stack([view[TINY_SIZE] for view in views(4)]))
    assert cosine_to_fp32(teacher, pixels) == pytest.approx({"summary": 1.0, "dense": 1.0}, abs=1e-6)
    assert cosine_to_fp32(teacher, pixels[:0]) == {}
    assert cosine_to_fp32(Broken(), pixels[:1])["dense"] == -1, "NaN is near nothing"  # type: ignore[arg-type]
    rough = cosine_to_fp32(replace(teacher, dtype=torch.bfloat16), pixels, (2, 5))
    assert rough.keys() == {"summary", "dense", "dense-2", "dense-5"}
    assert all(0.98 < cosine < 1 - 1e-6 for cosine in rough.values())
