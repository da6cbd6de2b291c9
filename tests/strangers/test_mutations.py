"""Two thousand mutations of a stranger's store, index and tar: no traceback, no hang, no memory, nothing accepted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MUTATIONS = 2000
SECONDS = 20


@pytest.mark.timeout(600)
def test_every_mutation_is_refused_in_a_sentence_or_read_as_what_it_was(tmp_path: Path) -> None:
    words = [sys.executable, str(HERE / "mutate.py"), str(tmp_path), "0", str(MUTATIONS)]
    paths = [str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    assert sum(found["counts"].values()) == MUTATIONS
    assert found["slowest"] < SECONDS
    assert found["grown_kib"] < 2**20
    kinds = {kind.rsplit(":", 1)[0] for kind in found["counts"]}
    assert len(kinds) == 19
    assert sum(count for kind, count in found["counts"].items() if kind.endswith("refused")) > MUTATIONS / 2
