"""Checkpoints: damaged ones are refused by name, old ones go by the policy, half ones are never seen."""

import random
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eupe.common.files import UNFINISHED
from eupe.errors import RunError, StorageError
from eupe.train.checkpoint import (
    CHECKSUM,
    DTYPE,
    FOLDER,
    Trainables,
    checksum,
    load_checkpoint,
    save_checkpoint,
    save_tensors,
    steps_kept,
)
from eupe.train.model import Ema


class Student(nn.Module):
    """A model with the parts of a distiller that a checkpoint needs."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, width)
        self.heads = nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, 2))


def trainables(*, width: int = 4, seed: int = 0, steps: int = 0) -> Trainables:
    torch.manual_seed(seed)
    student = Student(width)
    optimizer = torch.optim.AdamW(student.parameters())
    ema = Ema(student, 0.9)
    for _ in range(steps):
        student.heads(student.encoder(torch.randn(5, 3))).square().mean().backward()
        optimizer.step()
        ema.update()
    return Trainables(student, optimizer, ema)  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A checkpoint of a run in `tmp_path`."""
    save_checkpoint(tmp_path, trainables(steps=3).tensors(), step=3, keep=2, keep_every=None, dtype="fp32")
    return tmp_path / FOLDER / "00000003.safetensors"


def refusal(path: Path, state: Trainables | None = None) -> str:
    with pytest.raises(RunError) as refused:
        load_checkpoint(path.parents[1], state or trainables(), step=3, dtype="fp32")
    assert str(path) in str(refused.value)
    return str(refused.value)


def rewrite(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as a checkpoint whose checksum is right."""
    save_file(tensors, path, metadata={"step": "3", DTYPE: "fp32", CHECKSUM: checksum(tensors, 3)})


def test_a_checkpoint_restores_model_optimiser_and_average_to_the_bit(path: Path) -> None:
    state = trainables(seed=1)
    load_checkpoint(path.parents[1], state, step=3, dtype="fp32")
    ours, theirs = state.tensors(), trainables(steps=3).tensors()
    assert ours.keys() == theirs.keys() and any(name.startswith("optimizer.") for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)


def test_any_flipped_bit_of_the_tensors_is_noticed_and_nothing_is_loaded(path: Path) -> None:
    whole = path.read_bytes()
    begins = 8 + int.from_bytes(whole[:8], "little")
    state = trainables(seed=1)
    before = {name: value.clone() for name, value in state.tensors().items()}
    chosen = random.Random(0)
    for place in [begins, len(whole) - 1, *(chosen.randrange(begins, len(whole)) for _ in range(30))]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << chosen.randrange(8)
        path.write_bytes(damaged)
        assert "checksum" in refusal(path, state)
    assert all(torch.equal(state.tensors()[name], value) for name, value in before.items())


def test_colleagues_can_read_a_checkpoint(path: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.99])
def test_a_file_cut_short_is_refused(path: Path, share: float) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert "remove it to resume from the previous one" in refusal(path)


def test_a_run_does_not_go_on_in_another_arithmetic(path: Path) -> None:
    """`--dtype auto` may be another one on another machine."""
    state = trainables(seed=1)
    before = {name: value.clone() for name, value in state.tensors().items()}
    with pytest.raises(RunError, match="has been trained in fp32 so far, but --dtype auto is bf16 here"):
        load_checkpoint(path.parents[1], state, step=3, dtype="bf16")
    assert all(torch.equal(state.tensors()[name], value) for name, value in before.items())


def test_a_missing_file_is_refused(path: Path) -> None:
    path.unlink()
    refusal(path)


def test_another_model_is_refused_with_the_tensor_that_differs(path: Path) -> None:
    words = refusal(path, trainables(width=5))
    assert "encoder.bias has shape (4,), not (5,)" in words or "encoder.weight has shape (4, 3), not (5, 3)" in words


@pytest.mark.parametrize("name", ["encoder.weight", "heads.0.running_var", "optimizer.1.exp_avg", "ema.encoder.bias"])
def test_a_missing_tensor_and_an_unknown_one_are_named(path: Path, name: str) -> None:
    tensors = load_file(path)
    rewrite(path, {key: value for key, value in tensors.items() if key != name})
    assert f"1 tensors are missing or unknown ({name})" in refusal(path)
    rewrite(path, {**tensors, f"{name}.more": torch.zeros(1)})
    assert f"1 tensors are missing or unknown ({name}.more)" in refusal(path)


def test_a_file_without_a_checksum_is_refused(path: Path) -> None:
    save_file(load_file(path), path, metadata={"step": "3"})
    assert "checksum" in refusal(path)


@pytest.mark.parametrize(
    ("keep", "keep_every", "kept"),
    [(1, None, [9]), (3, None, [7, 8, 9]), (2, 4, [4, 8, 9]), (1, 3, [3, 6, 9]), (20, None, [*range(1, 10)])],
)
def test_the_newest_checkpoints_stay_and_those_of_multiples(
    tmp_path: Path, keep: int, keep_every: int | None, kept: list[int]
) -> None:
    for step in range(1, 10):
        save_checkpoint(tmp_path, {"x": torch.zeros(1)}, step=step, keep=keep, keep_every=keep_every, dtype="fp32")
    assert steps_kept(tmp_path) == kept
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == [f"{i:08d}.safetensors" for i in kept]


def test_what_killed_writers_left_is_no_checkpoint_and_goes_with_the_next_one(path: Path) -> None:
    left = [path.with_name(f"00000004.safetensors.123{UNFINISHED}"), path.with_name(".00000004.safetensors.123.tmp")]
    for leftover in left:  # as this version calls it, and as the first did
        leftover.write_bytes(b"half")
    assert steps_kept(path.parents[1]) == [3]
    save_checkpoint(path.parents[1], {"x": torch.zeros(1)}, step=5, keep=2, keep_every=None, dtype="fp32")
    assert not any(leftover.exists() for leftover in left) and steps_kept(path.parents[1]) == [3, 5]


def test_a_checkpoint_that_cannot_be_written_leaves_those_that_were_there(path: Path) -> None:
    (path.parent / "00000004.safetensors").mkdir()
    with pytest.raises(StorageError, match=r"00000004\.safetensors cannot be written"):
        save_checkpoint(path.parents[1], {"x": torch.zeros(1)}, step=4, keep=1, keep_every=None, dtype="fp32")
    load_checkpoint(path.parents[1], trainables(), step=3, dtype="fp32")
    assert not list(path.parent.glob(f"*{UNFINISHED}"))


def test_the_checksum_is_of_step_names_types_shapes_and_bytes_in_any_order() -> None:
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(7, dtype=torch.int64)}
    shuffled = dict(reversed(tensors.items()))
    assert list(shuffled) != list(tensors)
    crc = zlib.crc32(b"3")
    for name, dtype, shape in (("a", "torch.int64", "()"), ("b", "torch.float32", "(2, 3)")):
        crc = zlib.crc32(f"{name} {dtype} {shape}".encode() + tensors[name].numpy().tobytes(), crc)
    assert checksum(tensors, 3) == checksum(shuffled, 3) == f"{crc:08x}"
    others = [
        {**tensors, "b": tensors["b"].reshape(3, 2)},
        {**tensors, "b": tensors["b"].view(torch.int32)},
        {"b": tensors["b"], "c": tensors["a"]},
        {**tensors, "a": tensors["a"] + 1},
        {"b": tensors["b"]},
    ]
    assert len({checksum(tensors, 3), checksum(tensors, 4), *(checksum(other, 3) for other in others)}) == 7


def test_views_and_transposes_are_kept_as_they_read(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    save_tensors({"t": whole.T, "v": whole[:, 1]}, tmp_path / "x.safetensors", step=1)
    kept = load_file(tmp_path / "x.safetensors")
    assert torch.equal(kept["t"], whole.T) and torch.equal(kept["v"], whole[:, 1])


KILLS = 12
KILLED_WHILE_IT_WRITES = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from eupe.train.checkpoint import FOLDER, save_checkpoint, steps_kept

def write(run):
    for step in range(1, 10**8):
        tensors = {"x": torch.full((1 << 20,), float(step)), "y": torch.full((3,), float(step))}
        save_checkpoint(run, tensors, step=step, keep=2, keep_every=None, dtype="fp32")

torch.set_num_threads(1)
chosen = random.Random(0)
for i in range(int(sys.argv[2])):
    run = Path(sys.argv[1]) / str(i)
    run.mkdir()
    if (child := os.fork()) == 0:
        write(run)
    while not steps_kept(run):
        time.sleep(0.001)
    time.sleep(chosen.random() * 0.1)
    while not list((run / FOLDER).glob("*.__lock")):
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


@pytest.mark.slow
def test_a_writer_killed_at_any_moment_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    words = [sys.executable, "-c", KILLED_WHILE_IT_WRITES, str(tmp_path), str(KILLS)]
    done = subprocess.run(words, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    runs = [tmp_path / str(i) for i in range(KILLS)]
    assert any(list((run / FOLDER).glob("*.__lock")) for run in runs), "no kill came while one was being written"
    for run in runs:
        steps = steps_kept(run)
        assert 1 <= len(steps) <= 3
        for step in steps:
            path = run / FOLDER / f"{step:08d}.safetensors"
            kept = load_file(path)
            assert all((value == step).all() for value in kept.values())
            with safe_open(path, "pt") as file:
                assert file.metadata() == {"step": str(step), DTYPE: "fp32", CHECKSUM: checksum(kept, step)}


def test_layers_that_share_weights_are_saved_whole(tmp_path: Path) -> None:
    """CoaT's parallel blocks share their MLPs, and a safetensors file cannot hold one tensor under two names."""
    shared = torch.arange(6.0).reshape(2, 3)
    tensors = {"a": shared, "b": shared, "row": shared[1], "c": torch.ones(2)}

    save_tensors(tensors, tmp_path / "x.safetensors", step=1)

    saved = load_file(tmp_path / "x.safetensors")
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], value) for name, value in tensors.items())
