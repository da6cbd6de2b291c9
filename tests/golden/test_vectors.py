"""Trained teachers say today what they said when they were released: whatever the libraries have become since."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from make_vectors import WEIGHTS, vectors
from safetensors.numpy import load_file

HERE = Path(__file__).parent


@pytest.mark.parametrize("name", WEIGHTS)
def test_real_teachers_give_their_golden_vectors(name: str, assets: Path) -> None:
    want, got = load_file(HERE / "vectors" / f"{name}.safetensors"), vectors(name, assets)
    assert want.keys() == got.keys() == {"summary", "dense"}
    for kind in want:
        a, b = got[kind].astype(float), want[kind].astype(float)
        lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        assert ((a * b).sum(-1) / lengths).min() >= 0.9999
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-2 * np.abs(b).max())


def test_golden_vectors_are_never_made_again(assets: Path) -> None:
    before = {path: path.read_bytes() for path in (HERE / "vectors").iterdir()}
    command = [sys.executable, "-m", "tests.golden.make_vectors"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parents[1], check=False)
    assert done.returncode == 1 and "not made again" in done.stderr
    assert {path: path.read_bytes() for path in (HERE / "vectors").iterdir()} == before
