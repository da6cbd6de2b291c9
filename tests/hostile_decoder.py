"""Decoders that kill their process, planted from outside: an environment in which pictures that say so are deadly."""

from __future__ import annotations

import os
from pathlib import Path

MARK = b"POISON:"
PLANT = '''
import importlib.abc, importlib.util, os, signal, sys, time

MARK = b"POISON:"


class Planting(importlib.abc.MetaPathFinder):
    """Wraps `eupe.corpus.decode.decode_image` as soon as it is imported."""

    def find_spec(self, name, path, target=None):
        if name != "eupe.corpus.decode":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        real = spec.loader.exec_module

        def run(module):
            real(module)
            decode = module.decode_image

            def deadly(data):
                mark = data.find(MARK)
                word = b"" if mark < 0 else data[mark + len(MARK):].split(b";")[0]
                if word == b"segfault":
                    os.kill(os.getpid(), signal.SIGSEGV)
                if word == b"greedy":
                    os.kill(os.getpid(), signal.SIGKILL)
                while word == b"endless":
                    time.sleep(0.05)
                return decode(data)

            module.decode_image = deadly

        spec.loader.exec_module = run
        return spec


sys.meta_path.insert(0, Planting())
seconds = os.environ.get("PLANTED_PICTURE_SECONDS")
if seconds:
    class Patience(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name != "eupe.extract.load":
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            real = spec.loader.exec_module

            def run(module):
                real(module)
                module.PICTURE_SECONDS = float(seconds)

            spec.loader.exec_module = run
            return spec

    sys.meta_path.insert(0, Patience())
'''


def poison(picture: Path, how: str) -> None:
    """Append a word to a picture that decoders in a poisoned environment die of: `segfault`, `endless`, `greedy`.

    Elsewhere it is the same picture.
    """
    picture.write_bytes(picture.read_bytes() + MARK + how.encode() + b";")


def poisoned_environment(folder: Path, *, patience: float | None = None) -> dict[str, str]:
    """Variables under which every new Python process decodes so; `patience` replaces its limit for one picture."""
    planted = folder / "planted"
    planted.mkdir(exist_ok=True)
    (planted / "sitecustomize.py").write_text(PLANT)
    paths = [str(planted), os.environ.get("PYTHONPATH", "")]
    variables = {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    return variables if patience is None else {**variables, "PLANTED_PICTURE_SECONDS": str(patience)}
