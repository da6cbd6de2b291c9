"""What every test shares: real weights and pictures, tiny stores, the command line, no hub.

Fixtures import what is heavy: of the processes of a test run, the one that hands out the tests needs no PyTorch.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import pytest
import typer.main
from filelock import FileLock
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

from demo.assets import prepare_assets
from eupe.cli import app, main
from scenes.__main__ import app as scenes_app

if TYPE_CHECKING:
    from browser import Browser
    from object_store import S3Server

    from eupe.store import Store

ROOT = Path(__file__).parents[1]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A background shell has it ignored, and children inherit that: tests send it to themselves and to their children.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Typer builds the whole command line again for each command; a user's process does it once.
typer.main.get_command = cache(typer.main.get_command)

FIRST = (
    "test_at_scale_is_run.py",
    "test_rendered.py",
    "test_distributed.py",
    "test_mutations.py",
    "test_files_of_a_step.py",
    "test_real_weights.py",
)
"""The longest, and few but long tests; while the first makes what all pages presuppose, no other page waits for it."""

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, then those with many tests: few small ones are left for the end of a run."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    if unseen := [path.name for path in slow if "slow" not in path.read_text()]:
        raise pytest.UsageError(f"`make test-slow` reads only files that say slow, which {', '.join(unseen)} does not")
    tests = Counter(item.path for item in items)

    def place(item: pytest.Item) -> tuple[bool, bool, int]:
        return item.path not in slow, item.path.name not in FIRST, 0 if item.path in slow else -tests[item.path]

    items.sort(key=place)


class _ByFile(LoadFileScheduling):
    """Hands whole files to the processes, as `--dist loadfile` does, but pages of the documents one by one."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid if nodeid.startswith("tests/docs/test_commands_are_run.py") else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadFileScheduling | None:
    if config.option.dist != "loadfile":
        return None
    config.option.loadscopereorder = False  # which would put the longest last: pages are one test each
    return _ByFile(config, log)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that all processes of a test run share; what is missing there is made under a lock."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def assets() -> Path:
    """Real weights, photographs and digits, fetched once into the checkout's `assets/` by one of the processes.

    Other things may lie there, too: `make demo` leaves its scenes.
    """
    folder = ROOT / "assets"
    with FileLock(ROOT / ".assets.lock"):
        prepare_assets(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures in 3 class folders. Not to be changed."""
    from making import make_corpus

    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def many_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """128 pictures: four parts of the tiny teacher's features at 16 views each. Not to be changed."""
    from making import make_corpus

    return make_corpus(tmp_path_factory.mktemp("many"), count=128)


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the tiny teacher."""
    from making import TINY_TEACHER, random_weights

    return random_weights(TINY_TEACHER.removeprefix("timm:"), tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_weights: Path) -> Store:
    """A finished store of the tiny corpus, two random crops each. Not to be changed."""
    from making import make_store

    return make_store(tmp_path_factory.mktemp("store") / "tiny.zarr", tiny_corpus, tiny_weights)


@pytest.fixture(scope="session")
def warm_python() -> Iterator[str]:
    """Yield a Python to use as `sys.executable`: eupe's commands and Ray's processes start with libraries imported."""
    from warm import warm_programs

    with warm_programs(os.environ) as programs:
        yield str(programs / "python")


@pytest.fixture(scope="module")
def forked(warm_python: str) -> Iterator[None]:
    """Fork the processes that a module's tests start, so that they need not import PyTorch themselves."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "executable", warm_python)
        yield


@pytest.fixture(scope="module")
def ray_address(warm_python: str) -> Iterator[str]:
    """Yield the address of a Ray of two CPUs, whose workers start with their libraries imported.

    It ends with its module: a cluster that `ray start` made beside a running Ray once did not answer.
    """
    from shared_ray import running_ray

    # A process that has started a Ray itself uses a token from then on, and cannot before: so this Ray does as it does.
    with running_ray(warm_python, {"RAY_AUTH_MODE": "disabled", **os.environ}) as address:
        yield address


@pytest.fixture(scope="module")
def joined(forked: None, ray_address: str) -> Iterator[None]:
    """Have the commands of a module's tests join one Ray; they would start one each."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_ADDRESS", ray_address)
        yield


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    from browser import Browser

    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    from object_store import S3Server

    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """An S3 server on this machine with an empty bucket; `s3://` URLs lead to it."""
    for name, value in s3_server.variables.items():
        monkeypatch.setenv(name, value)
    s3_server.begin()
    return s3_server


@dataclass(frozen=True)
class Outcome:
    """The exit code of a command, and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def run_eupe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """The command line in this process."""
    return _in_this_process(app, monkeypatch, capsys)


@pytest.fixture
def run_scenes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`python -m scenes` in this process."""
    return _in_this_process(scenes_app, monkeypatch, capsys)


def _in_this_process(
    command: typer.Typer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    def run(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["eupe", *map(str, words)])
        try:
            main(command)
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run
