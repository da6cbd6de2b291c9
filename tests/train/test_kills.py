"""Runs that are killed without warning, again and again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from making import TINY_STUDENT
from safetensors.torch import load_file
from warm import LIBRARIES

from eupe.store import Store

KILLS = 12
KILLED_AGAIN_AND_AGAIN = """
import importlib, os, random, signal, sys, time
from dataclasses import replace
from pathlib import Path
import torch
from eupe.train.config import TrainConfig
from eupe.train.loop import train

store, student, whole, broken, kills, *libraries = sys.argv[1:]
for library in libraries:  # once, and not in each child
    importlib.import_module(library)
config = TrainConfig(
    targets=(store,), student=student, out=Path(whole), steps=120, batch_size=8, head_width=32, holdout=0.3,
    dtype="fp32", ema=0.9, checkpoint_every=4, log_every=1, validate_every=30,
)

def started(config):
    if (child := os.fork()) == 0:
        torch.set_num_threads(1)
        train(config)
        os._exit(0)
    return child

assert os.waitstatus_to_exitcode(os.waitpid(started(config), 0)[1]) == 0
config = replace(config, out=Path(broken))
metrics = config.out / "metrics.jsonl"
chosen = random.Random(0)
lines = lambda: metrics.read_text().count("loss\\": ") if metrics.exists() else 0
for place in sorted(chosen.sample(range(2, 118), int(kills))):
    child = started(replace(config, resume=(config.out / "config.json").exists()))
    while lines() < place:
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.0005)
    time.sleep(chosen.random() * 0.03)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
assert os.waitstatus_to_exitcode(os.waitpid(started(replace(config, resume=True)), 0)[1]) == 0
"""


@pytest.mark.slow
def test_a_run_that_is_killed_twelve_times_equals_the_uninterrupted_one_bit_for_bit(
    tiny_store: Store, tmp_path: Path
) -> None:
    runs = [tmp_path / "whole", tmp_path / "broken"]
    words = [tiny_store.path, TINY_STUDENT, *runs, KILLS, *LIBRARIES]
    done = subprocess.run([sys.executable, "-c", KILLED_AGAIN_AND_AGAIN, *map(str, words)], stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    for name in ("student.safetensors", "heads.safetensors", "checkpoints/00000120.safetensors"):
        ours, theirs = (load_file(run / name) for run in runs)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    logs = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    losses = [[line["loss"] for line in log if "loss" in line] for log in logs]
    assert len(losses[0]) == 120 and losses[0] == losses[1]
