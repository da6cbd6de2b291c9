"""Real features for measurements: two teachers with real weights over crops of real photographs, saved as .npy.

python -m benchmarks.features --out FOLDER
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from demo.assets import prepare_assets
from eupe.common.compute import pick_device
from eupe.corpus.index import index_folder
from eupe.corpus.views import ViewSpec
from eupe.extract.load import PartTask
from eupe.extract.parts import samples_of, store_spec
from eupe.extract.worker import PartExtractor
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.teacher import file_digest, load_teacher

ASSETS = Path(__file__).parents[1] / "assets"
VIEWS = ViewSpec(policy="rrc", num_views=16)


@dataclass(frozen=True)
class Source:
    """A teacher with real weights, and its input size in pixels."""

    teacher: str
    weights: str
    size: int


SOURCES = {
    "dinov2-s": Source("dinov2-s", "weights/dinov2-small", 224),
    "efficientnet_lite0": Source("timm:tf_efficientnet_lite0", "weights/efficientnet_lite0/model.safetensors", 224),
}


def make_features(name: str, folder: Path) -> tuple[Path, Path]:
    """Write dense [V, h, w, D] and summary [V, Ds] features of all views, float16, and return their paths.

    The files are NAME.dense.npy and NAME.summary.npy; existing ones are kept.
    """
    dense_file, summary_file = folder / f"{name}.dense.npy", folder / f"{name}.summary.npy"
    if dense_file.exists() and summary_file.exists():
        return dense_file, summary_file
    prepare_assets(ASSETS)
    source, corpus = SOURCES[name], index_folder(ASSETS / "photos")
    weights = ASSETS / source.weights
    teacher, device = resolve_teacher(source.teacher), pick_device()
    spec = store_spec(
        teacher,
        corpus,
        views=VIEWS,
        sizes=(source.size,),
        tokens=("summary", "dense"),
        weights_sha256=file_digest(weights),
        dtype="bf16",
    )
    loaded = load_teacher(teacher, weights=weights, device=device, dtype=torch.bfloat16, sizes=spec.sizes)
    extractor = PartExtractor(loaded, spec, corpus_root=corpus.root, views=VIEWS, batch_size=16)
    features = extractor.compute(PartTask(0, tuple(samples_of(corpus.samples)))).features
    folder.mkdir(parents=True, exist_ok=True)
    for file, kind in ((dense_file, "dense"), (summary_file, "summary")):
        values = features[f"{source.size}/{kind}"]
        np.save(file, values.reshape(-1, *values.shape[2:]))
    return dense_file, summary_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    folder = parser.parse_args().out
    for name in SOURCES:
        for file in make_features(name, folder):
            print(file, np.load(file, mmap_mode="r").shape)


if __name__ == "__main__":
    main()
