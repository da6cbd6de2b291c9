"""Retrieval between pictures and their captions by cosine, nothing trained.

Source of the protocol: recall at 1, 5 and 10 both ways, as in CLIP, arXiv 2103.00020: a picture has found a caption if
any of its own is among the first k of all captions, a caption its picture among the first k of all pictures. Pictures
are centre crops.
Shapes: N pictures, M captions, D width of the space.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from eupe.errors import ConfigError
from eupe.evaluate.layouts import caption_split
from eupe.evaluate.pictures import centre
from eupe.evaluate.prompts import AS_IT_IS, Classes
from eupe.evaluate.ranking import best_places, share_within
from eupe.evaluate.result import Result
from eupe.evaluate.subject import Subject, require_one_view, result_of
from eupe.evaluate.text import TextSource
from eupe.evaluate.text_space import choose_way, to_text_space
from eupe.store.layout import SUMMARY

RECALLS = (1, 5, 10)
ROWS = 256
"""Of queries, whose similarities with all candidates are in memory at a time."""


def retrieval(
    subject: Subject,
    *,
    data: Path,
    texts: TextSource,
    teacher: str | None = None,
    size: int | None = None,
    limit: int | None = None,
    on_step: Callable[[int, int], None] = lambda done, of: None,
) -> Result:
    """Recall at 1, 5 and 10, pictures to captions and captions to pictures; the mean of the six comes first.

    Args:
        texts: of templates `AS_IT_IS`.
        teacher: see `choose_way`; where not given, that of the texts.
        limit: only the first pictures, with their captions.
    Raises: ConfigError if there is no way to a text space, or a caption is not in the file of texts; CorpusError,
        RunError, TeacherError; StoreError for a store of several views of each picture.
    """
    if texts.templates != AS_IT_IS:
        raise ConfigError(
            f"{texts.path} holds names in templates, not captions; embed them with `eupe eval text {texts.teacher} "
            f"--captions {data}`"
        )
    way = choose_way(subject, teacher or texts.teacher)
    split = caption_split(data, limit=limit)
    said = texts.embed(way.teacher, Classes(tuple(dict.fromkeys(split.captions))), on_step)
    captions = said.rows(split.captions, path=texts.path).double()
    chosen = subject.size(size)
    seen = subject.look(split.pictures, kinds=[SUMMARY], size=chosen, cut=centre)
    require_one_view(subject, seen, split.pictures, views="center")
    assert seen.summary is not None
    pictures = to_text_space(subject, way, seen.summary)
    owner = torch.from_numpy(split.picture_of)
    to_text = _places(pictures, captions, torch.arange(len(pictures)), owner)
    to_picture = _places(captions, pictures, owner, torch.arange(len(pictures)))
    recalls = {
        f"{direction}_{k}": share_within(places, k)
        for direction, places in (("i2t", to_text), ("t2i", to_picture))
        for k in RECALLS
    }
    return result_of(
        subject,
        task="retrieval",
        scores={"mean_recall": sum(recalls.values()) / len(recalls), **recalls},
        protocol={**subject.protocol(chosen), "teacher": way.name},
        data={"path": str(data), "pictures": len(pictures), "captions": len(captions)},
    )


def _places(queries_QD: Tensor, candidates_MD: Tensor, whose_Q: Tensor, whose_M: Tensor) -> Tensor:
    """Place of the best candidate that belongs to the same picture, [Q]."""
    parts = []
    for start in range(0, len(queries_QD), ROWS):
        rows = slice(start, start + ROWS)
        own_QM = whose_Q[rows, None] == whose_M[None]
        parts.append(best_places(queries_QD[rows] @ candidates_MD.T, own_QM))
    return torch.cat(parts)
