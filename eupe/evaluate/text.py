"""Texts about pictures as unit vectors: class names in templates, or captions; embedded once and kept in a file.

Source of the averaging: CLIP, arXiv 2103.00020, section 3.1.4: the prompts of a class are embedded and normalised to
unit length, then averaged, and the mean is normalised again.
Shapes: C classes or captions, T templates, N pictures, D width of the space.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from eupe.common.outputs import require_out
from eupe.common.reading import parse_json
from eupe.common.storage import StoragePath
from eupe.errors import ConfigError
from eupe.evaluate.layouts import caption_split
from eupe.evaluate.prompts import AS_IT_IS, SLOT, TEMPLATES, Classes, read_classes, read_templates
from eupe.evaluate.text_tower import TextTower, load_tower
from eupe.models.checkpoints import read_metadata
from eupe.teachers.registry import ALIASES
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.spec import TeacherSpec

METADATA = "eupe.text"
EMBEDDINGS, SCALE, BIAS = "embeddings", "logit_scale", "logit_bias"


@dataclass(frozen=True)
class Texts:
    """Embedded class names or captions."""

    teacher: str
    """Teacher whose text space it is."""
    classes: Classes
    templates: tuple[str, ...]
    embeddings: Tensor
    """float32 [C, D], unit length."""
    logit_scale: float
    logit_bias: float

    def logits(self, images_ND: Tensor) -> Tensor:
        """Return logits [N, C] in the dtype of the given unit vectors: cosines at the teacher's own temperature."""
        return images_ND @ self.embeddings.to(images_ND).T * self.logit_scale + self.logit_bias

    def rows(self, names: Sequence[str], *, path: str) -> Tensor:
        """Return the embeddings of names, which may repeat, [len(names), D].

        Args:
            path: file that the embeddings are from, for the message.
        Raises: ConfigError naming the first name without an embedding.
        """
        places = {name: i for i, name in enumerate(self.classes.names)}
        if missing := [name for name in names if name not in places]:
            raise ConfigError(
                f"{path} has no embedding for {missing[0]!r} ({len(missing)} of {len(names)} are missing)"
            )
        return self.embeddings[[places[name] for name in names]]

    @property
    def words_digest(self) -> str:
        """Return a shortened sha256 of all names and templates."""
        return hashlib.sha256(json.dumps([self.classes.names, self.templates]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class TextSource:
    """The source of embeddings: a file, or the text tower of the teacher that a caller needs, run once."""

    classes: Classes | None = None
    """None to use the folders' names."""
    templates: tuple[str, ...] = TEMPLATES
    teacher: str | None = None
    """Teacher whose space was requested, if one was."""
    weights: Path | None = None
    """Weights of the text tower; None for the hub's."""
    cached: Texts | None = None
    """Contents of the file, if there is one."""
    path: str = ""
    """Path of the file."""
    _made: dict[tuple[str, Classes], Texts] = field(default_factory=dict, repr=False, compare=False)

    def embed(
        self, spec: TeacherSpec, classes: Classes, on_step: Callable[[int, int], None] = lambda done, of: None
    ) -> Texts:
        """Return the embeddings of classes in a teacher's space.

        Raises: ConfigError if another teacher's space was requested, or the file's embeddings are of another width;
            TeacherError if the teacher has no text tower.
        """
        if self.teacher is not None and ALIASES.get(self.teacher, self.teacher) != spec.name:
            raise ConfigError(
                f"--text {self.path or self.teacher} is in the space of {self.teacher}, but --space leads to that "
                f"of {spec.name}; leave one of them out"
            )
        if self.cached is not None:
            if self.cached.embeddings.shape[1] != spec.summary_dim:
                raise ConfigError(
                    f"the embeddings in {self.path} are {self.cached.embeddings.shape[1]} wide, but those of "
                    f"{spec.name} are {spec.summary_dim} wide; make the file again with `eupe eval text {spec.name}`"
                )
            return self.cached
        key = (spec.name, classes)
        if key not in self._made:
            tower = load_tower(spec, weights=self.weights)
            self._made[key] = embed_texts(tower, classes, self.templates, on_step)
        return self._made[key]


def open_source(
    word: str | None,
    *,
    classes: Path | None = None,
    templates: Path | None = None,
    weights: Path | None = None,
    usual: tuple[str, ...] = TEMPLATES,
) -> TextSource:
    """Open the source of embeddings that `--text` and the options beside it request.

    Args:
        word: a file that `eupe eval text` made, or a teacher's name; None for the teacher that subjects lead to.
        usual: templates if no file gives any.
    Raises: ConfigError if a file cannot be used, or an option has no effect beside a file of embeddings.
    """
    if word is not None and (Path(word).is_file() or Path(word).suffix == ".safetensors"):
        given = {"--classes": classes, "--templates": templates, "--text-weights": weights}
        if decided := [option for option, value in given.items() if value is not None]:
            raise ConfigError(f"{word} already holds embeddings, so {decided[0]} changes nothing; leave it out")
        texts = load_texts(Path(word))
        return TextSource(texts.classes, texts.templates, texts.teacher, cached=texts, path=word)
    return TextSource(
        None if classes is None else read_classes(classes),
        usual if templates is None else read_templates(templates),
        word,
        weights,
    )


def cache_texts(
    tower: str,
    out: Path,
    *,
    classes: Path | None = None,
    captions: Path | None = None,
    templates: Path | None = None,
    weights: Path | None = None,
    overwrite: bool = False,
    on_step: Callable[[int, int], None] = lambda done, of: None,
) -> Texts:
    """Embed class names, or COCO's captions as they are, and write them to a file.

    Args:
        tower: teacher whose text space to use.
        overwrite: replace what is there, whoever made it.
    Raises: ConfigError unless either `classes` or `captions` is given, or if `out` may not be written over;
        CorpusError, TeacherError, StorageError.
    """
    if (classes is None) == (captions is None):
        raise ConfigError("give either --classes or --captions, the texts to embed")
    if captions is not None and templates is not None:
        raise ConfigError("captions are embedded as they are; leave --templates out")
    # `out` is checked before the slow work
    sources = [each for each in (classes, captions, templates, weights) if each is not None]
    place = require_out(out, lambda found: METADATA in read_metadata(found.local), sources=sources, overwrite=overwrite)
    if captions is not None:
        said, usual = Classes(tuple(dict.fromkeys(caption_split(captions).captions))), AS_IT_IS
    else:
        assert classes is not None
        said, usual = read_classes(classes), TEMPLATES
    chosen = usual if templates is None else read_templates(templates)
    texts = embed_texts(load_tower(resolve_teacher(tower), weights=weights), said, chosen, on_step)
    save_texts(texts, place.local)
    return texts


def embed_texts(
    tower: TextTower,
    classes: Classes,
    templates: tuple[str, ...] = TEMPLATES,
    on_step: Callable[[int, int], None] = lambda done, of: None,
) -> Texts:
    """Embed all names in all templates, and average over the templates."""
    prompts = [template.replace(SLOT, name) for name in classes.names for template in templates]
    each_CTD = tower(prompts, on_step).reshape(len(classes.names), len(templates), -1)
    mean = F.normalize(each_CTD.mean(dim=1), dim=1)
    return Texts(tower.teacher, classes, templates, mean, tower.logit_scale, tower.logit_bias)


def save_texts(texts: Texts, path: Path) -> None:
    """Write texts as one safetensors file, whole or not at all.

    Raises: StorageError.
    """
    plain = {
        "teacher": texts.teacher,
        "names": texts.classes.names,
        "folders": texts.classes.folders,
        "templates": texts.templates,
    }
    tensors = {
        EMBEDDINGS: texts.embeddings.contiguous(),
        SCALE: torch.tensor(texts.logit_scale, dtype=torch.float64),
        BIAS: torch.tensor(texts.logit_bias, dtype=torch.float64),
    }
    StoragePath.of(path.parent).write(
        path.name, safetensors.torch.save(tensors, metadata={METADATA: json.dumps(plain)})
    )


def load_texts(path: Path) -> Texts:
    """Read the texts that `save_texts` wrote.

    Raises: ConfigError if the file cannot be read, or holds no embedded texts.
    """
    try:
        plain: dict[str, Any] = parse_json(read_metadata(path)[METADATA])
        tensors = safetensors.torch.load_file(path)
        folders = plain["folders"]
        classes = Classes(tuple(plain["names"]), None if folders is None else tuple(folders))
        embeddings = tensors[EMBEDDINGS]
        if embeddings.ndim != 2 or len(embeddings) != len(classes.names):
            raise ValueError(f"{tuple(embeddings.shape)} embeddings for {len(classes.names)} names")
        scale, bias = (float(tensors[name]) for name in (SCALE, BIAS))
        return Texts(plain["teacher"], classes, tuple(plain["templates"]), embeddings.float(), scale, bias)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} holds no text embeddings ({type(error).__name__}: {error}); make it with `eupe eval text`"
        ) from error
