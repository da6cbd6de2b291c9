"""Run by every Python process that has this folder on its PYTHONPATH: plants what `tests/planting.py` asks for."""

import dataclasses
import errno
import fcntl
import importlib.util
import os
import signal
import sys
import time
from importlib.abc import MetaPathFinder
from pathlib import Path

MARK = b"POISON:"
NARROW = {"embed_dim": 64, "depth": 2, "num_heads": 4}


class Planting(MetaPathFinder):
    """Changes a module as soon as it has been imported; a library may well have asked before whether it is there."""

    def __init__(self, name, change):
        self._name = name
        self._change = change
        self._asks_others = False

    def find_spec(self, name, path, target=None):
        if name != self._name or self._asks_others:
            return None
        self._asks_others = True
        spec = importlib.util.find_spec(name)
        self._asks_others = False
        real = spec.loader.exec_module

        def run(module):
            real(module)
            self._change(module)

        spec.loader.exec_module = run
        return spec


def deadly_pictures(module):
    decode = module.decode_image

    def deadly(data):
        mark = data.find(MARK)
        word = b"" if mark < 0 else data[mark + len(MARK) :].split(b";")[0]
        if word == b"segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if word == b"greedy":
            os.kill(os.getpid(), signal.SIGKILL)
        while word == b"endless":
            time.sleep(0.05)
        return decode(data)

    module.decode_image = deadly


def little_patience(module):
    module.PICTURE_SECONDS = float(os.environ["PLANTED_PICTURE_SECONDS"])


def failing_writes(module):
    """Make planned writes of parts' objects fail in the middle, and all writes of these objects take longer."""
    write = module.write_file

    def failing(path, blocks):
        folders = path.parts[:-1]
        if "stats" in folders or not ("c" in folders or path.parent.name == "parts"):
            return write(path, blocks)
        time.sleep(float(os.environ["PLANTED_WRITE_SECONDS"]))
        return write(path, broken(blocks, getattr(errno, next_outcome("PLANTED_WRITES"), 0)))

    module.write_file = failing


def broken(blocks, number):
    for block in blocks:
        yield block
        if number:
            raise OSError(number, os.strerror(number))


def deadly_loads(module):
    load = module.load_teacher

    def deadly(*arguments, **named):
        outcome = next_outcome("PLANTED_LOADS")
        if outcome.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, outcome))
        return load(*arguments, **named)

    module.load_teacher = deadly


def narrow_rows(module):
    for name in os.environ["PLANTED_NARROW"].split():
        row = module.REGISTRY[name]
        width = NARROW["embed_dim"]
        summary = row.summary_dim if row.summary == "projected" else width
        module.REGISTRY[name] = dataclasses.replace(row, dense_dim=width, summary_dim=summary)


def narrow_timm(module):
    create = module.create_model

    def narrow(name, *arguments, **named):
        return create(name, *arguments, **{**named, **NARROW} if "siglip" in name else named)

    module.create_model = narrow


def narrow_open_clip(module):
    configs = module.factory._MODEL_CONFIGS
    vision = configs["ViT-B-16-quickgelu"]["vision_cfg"]
    vision |= {"layers": NARROW["depth"], "width": NARROW["embed_dim"], "head_width": 16}
    configs["ViT-B-16-SigLIP2-256"]["embed_dim"] = NARROW["embed_dim"]
    for arch in ("ViT-B-16-quickgelu", "ViT-B-16-SigLIP2-256"):
        configs[arch]["text_cfg"] |= {"layers": 2, "width": 32, "heads": 2}


def next_outcome(variable):
    """The first of the words in the file that a variable names, which is taken from it; empty where none is left."""
    with Path(os.environ[variable]).open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        word, _, others = file.read().partition(" ")
        file.seek(0)
        file.write(others)
        file.truncate()
    return word


sys.meta_path.insert(0, Planting("eupe.corpus.pictures", deadly_pictures))
if "PLANTED_PICTURE_SECONDS" in os.environ:
    sys.meta_path.insert(0, Planting("eupe.extract.load", little_patience))
if "PLANTED_WRITES" in os.environ:
    sys.meta_path.insert(0, Planting("eupe.common.storage", failing_writes))
if "PLANTED_LOADS" in os.environ:
    sys.meta_path.insert(0, Planting("eupe.teachers.teacher", deadly_loads))
if "PLANTED_NARROW" in os.environ:
    sys.meta_path.insert(0, Planting("eupe.teachers.registry", narrow_rows))
    sys.meta_path.insert(0, Planting("timm", narrow_timm))
    sys.meta_path.insert(0, Planting("open_clip", narrow_open_clip))
