"""The teacher, weights and pictures that a store was made with, recovered from what the store records."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from eupe.common.compute import compute_dtype, pick_device
from eupe.common.storage import AnyPath, StoragePath
from eupe.corpus.index import some_keys
from eupe.corpus.pictures import read_picture
from eupe.corpus.sources import corpus_root
from eupe.errors import ConfigError, CorpusError, SpecMismatchError, TeacherError
from eupe.extract.load import Sample
from eupe.store import Store
from eupe.store.layout import differences
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.spec import TeacherSpec
from eupe.teachers.weights import own_weights


def stored_teacher(store: Store, given: str | None, weights: Path | None = None) -> TeacherSpec:
    """Return the spec of the teacher that made a store.

    Args:
        given: the teacher's current name or folder; None for the one recorded in the store.
        weights: local weights; a teacher that is given gets mean and std from their own files.
    Raises: TeacherError if the teacher was in a folder that is gone.
    """
    spec = TeacherSpec.from_json(store.spec.teacher) if given is None else resolve_teacher(given, weights)
    place = spec.place
    if place.exists():
        return spec.at(place.absolute())
    if place.is_absolute():
        raise TeacherError(
            f"the teacher that made {store.path} is no longer at {place}; give its new location with --teacher"
        )
    return spec


def weights_file(teacher: TeacherSpec, given: Path | None) -> Path | None:
    """Return the local weights of a teacher; None if its library fetches them.

    Raises: TeacherError if the weights do not exist.
    """
    weights = own_weights(teacher) if given is None else given.absolute()
    if weights is not None and not weights.exists():
        raise TeacherError(f"weights {weights} do not exist")
    return weights


def require_same_teacher(store: Store, teacher: TeacherSpec, weights_sha256: str) -> None:
    """Raise TeacherError for other weights than the store was made with, SpecMismatchError for another teacher."""
    stored = store.spec.teacher
    beside = {"architecture": teacher.architecture, "weights_sha256": weights_sha256, "dtype": stored["dtype"]}
    asked = replace(store.spec, teacher={**teacher.to_json(), **beside})
    different = differences(store.spec, asked)
    if different and stored["weights_sha256"] != weights_sha256:
        raise TeacherError(
            f"{store.path} was made with weights of {stored['name']} whose SHA-256 is "
            f"{stored['weights_sha256']}, but these have {weights_sha256}; give the original file with --weights, and "
            "the same --weights-key"
        )
    if different:
        raise SpecMismatchError(
            f"{store.path} was made by a different teacher than {teacher.name} ({'; '.join(different)}); give the "
            "original teacher with --teacher"
        )


def require_dtype(store: Store) -> None:
    """Raise ConfigError if this machine cannot compute in the dtype that the store was computed in."""
    dtype = store.spec.teacher["dtype"]
    try:
        compute_dtype(dtype, pick_device())
    except ConfigError as error:
        raise ConfigError(
            f"{store.path} was computed in {dtype}, which this machine does not support; use one with a GPU"
        ) from error


def stored_pictures(store: Store, given: AnyPath | None) -> StoragePath:
    """Return the folder of the pictures.

    Args:
        given: the corpus's current place; None for the one recorded in the store.
    Raises: CorpusError if there is no such folder.
    """
    root = store.corpus_root() if given is None else corpus_root(given)
    if root.is_local and not root.local.is_dir():
        raise CorpusError(f"the pictures of {store.path} are not in {root}; give their folder with --corpus")
    return root


def require_unchanged(root: StoragePath, samples: Iterable[Sample]) -> None:
    """Raise CorpusError, naming the pictures, if some are gone or have changed since they were indexed."""
    with ThreadPoolExecutor() as pool:
        changed = [key for key in pool.map(lambda sample: _changed(root, sample), samples) if key is not None]
    if changed:
        raise CorpusError(
            f"{len(changed)} pictures in {root} are gone or have changed since they were indexed "
            f"({some_keys(changed)}); restore them, or give the folder that holds them with --corpus"
        )


def _changed(root: StoragePath, sample: Sample) -> str | None:
    """Return the picture's key if it is not the one that was indexed, otherwise None."""
    if sample.sha256 is None:  # it could not be read when it was indexed, and may be anything now
        return None
    try:
        data = read_picture(root, sample.key, sample.inside)
    except CorpusError:
        return sample.key
    return None if hashlib.sha256(data).hexdigest() == sample.sha256 else sample.key
