"""Each option makes another store exactly when its field says so."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from making import TINY_TEACHER, TWO_CROPS

from eupe.common.option import options_of
from eupe.corpus.index import open_corpus
from eupe.extract.config import ExtractConfig
from eupe.extract.job import picked, wanted_spec
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.teacher import file_digest

OPTIONS = options_of(ExtractConfig)
MEASURED = {"weights_key": "in a file of several models", "choice": "in tars and tables", "fidelity": "by measurement"}
"""What decides a store in ways that this corpus and these weights do not show; other tests do."""


def identity(config: ExtractConfig) -> dict[str, Any]:
    assert config.weights is not None
    corpus = picked(config, open_corpus(config.corpus))
    digest = file_digest(config.weights)
    teacher = resolve_teacher(config.teacher, config.weights)
    return wanted_spec(config, teacher, corpus, weights_sha256=digest, dtype=config.dtype).identity()


@pytest.mark.parametrize("name", [field.name for field in fields(ExtractConfig) if field.name not in MEASURED])
def test_an_option_makes_another_store_unless_its_field_says_why_not(
    name: str, tmp_path: Path, tiny_corpus: Path, tiny_weights: Path
) -> None:
    (tmp_path / "weights").write_bytes(b"others")
    # all pictures are the same set in any order
    limit = 6 if name == "shuffle" else None
    config = ExtractConfig(teacher=TINY_TEACHER, corpus=tiny_corpus, weights=tiny_weights, limit=limit)
    special: dict[str, Any] = {
        "teacher": "timm:test_vit2",
        "corpus": tiny_corpus / "class0",
        "out": tmp_path / "s.zarr",
        "weights": tmp_path / "weights",
        "sizes": (64,),
        "views": TWO_CROPS,
        "tokens": ("dense",),
        "layers": (2,),
        "precision": "int8",
        "dtype": "bf16",
        "include": ("class0/*",),
        "exclude": ("class0/*",),
        "ray_address": "auto",
    }
    now = getattr(config, name)
    changed = replace(config, **{name: special.get(name, not now if isinstance(now, bool) else 2)})
    indifferent = name in OPTIONS and bool(OPTIONS[name].indifferent)
    assert (identity(changed) == identity(config)) == indifferent
