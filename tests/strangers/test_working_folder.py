"""Nothing is imported from the folder that a command is typed in, which may be one that was downloaded."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from eupe.common.cluster import start_ray
from eupe.store import Store

PLANTED = ("typer", "numpy", "torch", "yaml", "rich", "PIL", "pyarrow", "ray", "eupe")
EUPE = Path(sys.executable).parent / "eupe"


def plant(folder: Path) -> Path:
    """Modules that leave a file when they are imported; returns that file's path."""
    for name in PLANTED:
        (folder / f"{name}.py").write_text(f"open({str(folder / 'executed')!r}, 'a').write({name!r})\n")
    return folder / "executed"


def test_steps_of_a_pipeline_import_nothing_of_it(tmp_path: Path, tiny_store: Store) -> None:
    executed = plant(tmp_path)
    recipe = f"out: out\nsteps:\n  s: {{store stats: {{path: {tiny_store.path}}}}}\n"
    (tmp_path / "r.yaml").write_text(recipe)
    done = subprocess.run([EUPE, "run", "r.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not executed.exists()


def test_the_process_that_looks_for_killers_imports_nothing_of_it(
    tmp_path: Path, tiny_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eupe.common.storage import StoragePath
    from eupe.corpus.views import ViewSpec
    from eupe.extract.isolate import find_crashing
    from eupe.extract.load import Sample

    executed = plant(tmp_path)
    monkeypatch.chdir(tmp_path)
    key = next(str(file.relative_to(tiny_corpus)) for file in sorted(tiny_corpus.rglob("*.png")))
    samples = [Sample(key=key, sha256=None, label=None)]
    assert find_crashing(samples, StoragePath.of(tiny_corpus), ViewSpec(policy="center"), (64,)) == {}
    assert not executed.exists()


@pytest.fixture
def own_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked: None) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    try:
        start_ray(num_cpus=1)
        yield
    finally:
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("own_ray")
def test_workers_of_ray_do_not_look_for_modules_there(tmp_path: Path) -> None:
    @ray.remote(num_cpus=0)
    def where_modules_are_looked_for() -> list[str]:
        return [os.path.realpath(path or os.curdir) for path in sys.path]

    assert str(tmp_path.resolve()) not in ray.get(where_modules_are_looked_for.remote())
    assert Path.cwd() == tmp_path
