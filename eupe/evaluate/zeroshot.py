"""Zero-shot classification: the class whose prompt is nearest to a picture; nothing is trained.

Source of the protocol: CLIP, arXiv 2103.00020, section 3.1: centre crop, cosine with the mean embedding of a class's
prompts. Students are compared in the space of the teacher whose summary their heads predict.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from eupe.common.storage import AnyPath
from eupe.corpus.choice import AS_FOUND, Choice
from eupe.evaluate.judged_pictures import centre
from eupe.evaluate.prompts import class_numbers, folder_classes
from eupe.evaluate.ranking import best_places, share_within
from eupe.evaluate.result import Result
from eupe.evaluate.splits import labelled_splits, require_several, tell_judged
from eupe.evaluate.subject import Subject, result_of
from eupe.evaluate.text import TextSource
from eupe.evaluate.text_space import choose_way, to_text_space
from eupe.store.layout import SUMMARY

TOP = 5


def zeroshot(
    subject: Subject,
    *,
    data: AnyPath,
    texts: TextSource,
    teacher: str | None = None,
    size: int | None = None,
    choice: Choice = AS_FOUND,
    on_step: Callable[[int, int], None] = lambda done, of: None,
) -> Result:
    """Measure top-1 and top-5 accuracy and mean cross-entropy on the val split, or on the whole corpus without splits.

    Top-5 is left out for five classes or fewer. The cross-entropy, in nats, is that of the softmax at the teacher's own
    temperature.

    Args:
        teacher: see `choose_way`; default: that of the texts.
    Raises: ConfigError if there is no way to a text space, or classes do not match the folders; CorpusError, RunError,
        StoreError, TeacherError.
    """
    way = choose_way(subject, teacher or texts.teacher)
    splits = labelled_splits(data, choice)
    val = splits.val
    require_several(val, str(data))
    classes = texts.classes or folder_classes(val.labels)
    numbers = class_numbers(classes, val.labels, data=str(data))
    said = texts.embed(way.teacher, classes, on_step)
    chosen = subject.size(size)
    encoded = subject.encode_views(val.pictures, kinds=[SUMMARY], size=chosen, crop=centre)
    assert encoded.summary is not None
    logits = said.logits(to_text_space(subject, way, encoded.summary))
    labels = torch.tensor([numbers[val.labels[i]] for i in encoded.picture_V.tolist()])
    places = best_places(logits, F.one_hot(labels, len(classes.names)).bool())
    scores = {"top1": share_within(places, 1)}
    if len(classes.names) > TOP:
        scores["top5"] = share_within(places, TOP)
    scores["majority"] = int(torch.bincount(labels).max()) / len(labels)
    scores["cross_entropy"] = float(F.cross_entropy(logits, labels))
    return result_of(
        subject,
        task="zeroshot",
        scores=scores,
        protocol={
            **subject.protocol(chosen),
            "teacher": way.name,
            "templates": list(said.templates),
            "prompts": said.words_digest,
            **splits.protocol,
        },
        data={
            "path": str(data),
            **choice.given(),
            "val": len(labels),
            "classes": len(classes.names),
            "folders": len(numbers),
        },
        notes=(*tell_judged(val, len(classes.names)), *splits.notes),
    )
