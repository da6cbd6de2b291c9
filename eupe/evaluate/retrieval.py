"""Retrieval between pictures and their captions by cosine; nothing is trained.

Source of the protocol: CLIP, arXiv 2103.00020: recall at 1, 5 and 10 in both directions. A picture is a hit if any of
its captions is among the first k of all captions; a caption is a hit if its picture is among the first k of all
pictures. Pictures are centre crops.
Shapes: Q queries, M candidates, D width of the space.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from eupe.errors import ConfigError
from eupe.evaluate.judged_pictures import centre
from eupe.evaluate.layouts import caption_split
from eupe.evaluate.prompts import AS_IT_IS, Classes
from eupe.evaluate.ranking import best_places, share_within
from eupe.evaluate.result import Result
from eupe.evaluate.subject import Subject, require_one_view, result_of
from eupe.evaluate.text import TextSource
from eupe.evaluate.text_space import choose_way, to_text_space
from eupe.store.layout import SUMMARY

RECALLS = (1, 5, 10)
ROWS = 256
"""Number of queries whose similarities to all candidates are in memory at a time."""


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
    """Measure recall at 1, 5 and 10, from pictures to captions and back; the first score is the mean of the six.

    Args:
        texts: source of the captions' embeddings, with templates `AS_IT_IS`.
        teacher: see `choose_way`; default: that of the texts.
        limit: use only the first pictures, with their captions.
    Raises: ConfigError if there is no way to a text space, or a caption is not in the file of texts; CorpusError,
        RunError, TeacherError; StoreError for a store with several views of each picture.
    """
    if texts.templates != AS_IT_IS:
        raise ConfigError(
            f"{texts.path} holds class names in templates, not captions; embed captions with `eupe eval text "
            f"{texts.teacher} --captions {data}`"
        )
    way = choose_way(subject, teacher or texts.teacher)
    split = caption_split(data, limit=limit)
    said = texts.embed(way.teacher, Classes(tuple(dict.fromkeys(split.captions))), on_step)
    captions = said.rows(split.captions, path=texts.path).double()
    chosen = subject.size(size)
    encoded = subject.encode_views(split.pictures, kinds=[SUMMARY], size=chosen, crop=centre)
    require_one_view(subject, encoded, split.pictures, views="center")
    assert encoded.summary is not None
    pictures = to_text_space(subject, way, encoded.summary)
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
    """Return the place of each query's best candidate of the same picture, [Q].

    Args:
        whose_Q, whose_M: picture that each query and candidate belongs to.
    """
    parts = []
    for start in range(0, len(queries_QD), ROWS):
        rows = slice(start, start + ROWS)
        own_QM = whose_Q[rows, None] == whose_M[None]
        parts.append(best_places(queries_QD[rows] @ candidates_MD.T, own_QM))
    return torch.cat(parts)
