"""What is released: a source distribution, and the wheel built from it, which goes from pictures to an export."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import eupe

ROOT = Path(__file__).parents[1]
SOURCES = ("eupe", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source distribution and the wheel, built without the folders that earlier builds left in the checkout."""
    checkout, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("built")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, checkout / name)
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, checkout], check=True)
    (source,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return source, wheel


def test_the_changelog_begins_with_this_version() -> None:
    first = next(line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## "))
    assert first.split()[1] == eupe.__version__


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    source, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        wheel_files = {name for name in archive.namelist() if ".dist-info/" not in name}
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "eupe").rglob("*") if path.is_file()}
    assert wheel_files == {name for name in ours if "__pycache__" not in name}
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {*wheel_files, "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"} <= names
    assert not [name for name in names if name.startswith(("tests", "demo", "benchmarks", "scenes"))]


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_the_installed_wheel_goes_from_pictures_to_an_export(
    built: tuple[Path, Path], tmp_path: Path, tiny_corpus: Path, tiny_weights: Path
) -> None:
    site = tmp_path / "site"
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, built[1]]
    subprocess.run(words, check=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}

    def run(words: str) -> str:
        command = [sys.executable, "-m", "eupe", *words.split()]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("--version").strip() == eupe.__version__
    corpus = f"--corpus {tiny_corpus} --size 64 --views rrc:2"
    run(f"extract --teacher timm:test_vit --weights {tiny_weights} {corpus} --out s.zarr")
    steps = "--batch-size 8 --steps 2 --head-width 16 --holdout 0.3"
    run(f"train --targets s.zarr --student test_vit {steps} --out run")
    run(f"viz s.zarr run --images {tiny_corpus} --out page.html --limit 2")
    run("run desk --dry-run")
    exported = json.loads(run("export run --format timm --out exported --json"))
    assert exported["format"] == "timm"
    where = "import eupe, sys; sys.stdout.write(eupe.__file__)"
    words = [sys.executable, "-c", where]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert Path(done.stdout) == site / "eupe" / "__init__.py", "the commands above ran what was installed"
