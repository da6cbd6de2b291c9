"""Makes the folder `work1`: what somebody who used commit d285f6e has on disk. It is never made again.

A pipeline that has run to its end, an extraction and a training run that were killed on their way, a training run that
has finished, and indexes of a folder, a tar and a table. Later versions go on with all of it (`test_work.py`).

git worktree add /tmp/then d285f6e && cp tests/golden/make_work.py /tmp/then/tests/golden
cd /tmp/then && PYTHONPATH=. python tests/golden/make_work.py
"""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

WORK = Path(__file__).parent / "work1"
MTIME = 1_790_000_000
"""Of every picture and file of weights, in seconds: whoever copies the folder sets it again, as `cp -p` would."""
STORE = "--teacher timm:test_efficientnet --weights weights.safetensors --corpus photos --views rrc:32 --size 256"
EXACT = "--dtype fp32 --batch-size 8"
TRAIN = "--student test_efficientnet --size 64 --batch-size 8 --head-width 16 --holdout 0.3 --dtype fp32"
HALF_STORE = f"extract {STORE} {EXACT} --out half.zarr"
RUN = f"train --targets whole.zarr {TRAIN} --steps 4 --checkpoint-every 2 --keep 1 --out finished-run"
HALF_RUN = f"train --targets whole.zarr {TRAIN} --steps 6 --checkpoint-every 2 --keep 1"
RECIPE = """out: out
steps:
  expert:
    extract: {teacher: "timm:test_efficientnet", weights: weights.safetensors, corpus: photos, views: "rrc:2",
              size: 64, dtype: fp32, batch-size: 8}
  proxy:
    train: {targets: expert, student: test_efficientnet, size: 64, batch-size: 8, steps: 3, head-width: 16, holdout: 0.3,
            dtype: fp32}
  proxy-features:
    extract: {teacher: proxy, corpus: photos, views: "rrc:2", size: 64, dtype: fp32, batch-size: 8}
  student:
    train: {targets: proxy-features, student: test_efficientnet, size: 64, batch-size: 8, steps: 3, head-width: 16,
            holdout: 0.3, dtype: fp32}
  agreement: {eval agreement: {run: student}}
  knn: {eval knn: {subjects: expert, k: 3}}
  whole: {store verify: {path: proxy-features}}
"""  # noqa: E501 (as it was run)


def picture(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((60, 48), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return buffer.getvalue()


def make_inputs() -> None:
    for i in range(12):
        file = WORK / "photos" / f"class{i % 3}" / f"{i:04d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(i))
    with tarfile.open(WORK / "photos.tar", "w") as tar:
        for i in range(4):
            for suffix, data in (("jpg", picture(i)), ("cls", str(i % 2).encode()), ("txt", b"a caption")):
                member = tarfile.TarInfo(f"{i:04d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        tar.addfile(tarfile.TarInfo("0009.txt"))  # a sample without a picture
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": picture(i), "path": f"{i}.jpg"} for i in range(4)]
    table = pa.table({"image": pa.array([*rows, None], image), "label": pa.array([0, 1, 0, 1, None])})
    pq.write_table(table, WORK / "photos-table.parquet")
    torch.manual_seed(0)
    weights = timm.create_model("test_efficientnet", num_classes=0).state_dict()
    for name, tensor in weights.items():
        if tensor.is_floating_point():
            weights[name] = tensor.bfloat16().float()
    for norm in ("blocks.4.0.bn3", "bn2"):  # most channels are zero, so that stores are small
        weights[f"{norm}.weight"][8:] = 0
    save_file(weights, WORK / "weights.safetensors")
    (WORK / "recipe.yaml").write_text(RECIPE)
    set_times(WORK)


def set_times(folder: Path) -> None:
    """Set the time of all that commands read."""
    for file in [*folder.glob("photos/**/*.jpg"), folder / "photos.tar", folder / "photos-table.parquet"]:
        os.utime(file, (MTIME, MTIME))
    os.utime(folder / "weights.safetensors", (MTIME, MTIME))


def begin(words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "eupe", *words.split()], cwd=WORK, start_new_session=True)


def run(words: str) -> None:
    assert begin(words).wait() == 0, words


def kill(words: str, *, once: str) -> None:
    """Run a command until a file is there."""
    process = begin(words)
    while not list(WORK.glob(once)):
        assert process.poll() is None, words
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> None:
    if (WORK / "photos").exists():
        sys.exit(f"{WORK} is there already; it is never made again")
    make_inputs()
    for name, corpus in (("folder", "photos"), ("tar", "photos.tar"), ("table", "photos-table.parquet")):
        run(f"index --corpus {corpus} --out index-of-{name}.parquet")
    run(HALF_STORE.replace("half.zarr", "whole.zarr"))
    kill(HALF_STORE, once="half.zarr/parts/00000.parquet")
    run(RUN)
    run(f"{HALF_RUN} --out expected-run")
    for folder in ("checkpoints", "tensorboard"):
        shutil.rmtree(WORK / "expected-run" / folder)
    kill(f"{HALF_RUN} --out half-run", once="half-run/checkpoints/00000002.safetensors")
    run("run recipe.yaml")


if __name__ == "__main__":
    main()
