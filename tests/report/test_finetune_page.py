"""The page of a fine-tuning, as a reader and a browser meet it."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import numpy as np
import planted
import pytest
from exporting import finished_run
from PIL import Image
from sklearn.metrics import confusion_matrix

from eupe.finetune.config import FinetuneConfig
from eupe.finetune.job import finetune
from eupe.finetune.tasks import open_task
from eupe.report.finetune_page import mistakes, shares_of, write_finetune_page

HOSTILE = "<script>alert(1)<script>"


def page_of(data: Path, folder: Path, task: str) -> str:
    run = finished_run(folder / "run", "test_vit")
    config = FinetuneConfig(
        subject=str(run), data=str(data), out=folder / "out", task=task, epochs=1, batch_size=4, from_scratch=True
    )
    opened = open_task(config)
    return write_finetune_page(finetune(config, opened), opened).read_text()


def test_a_page_shows_table_curves_confusion_and_the_worst_pictures(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in (HOSTILE.replace("/", ""), "b"):
            for number in range(4):
                place = tmp_path / "data" / split / name / f"{number}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(random.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(place)
    page = page_of(tmp_path / "data", tmp_path, "classify")
    assert HOSTILE not in page
    assert HOSTILE in unescape(page)
    assert "<script" not in page
    assert page.count('<svg class="chart"') == 1
    shares = [float(each) for each in re.findall(r'opacity: ([\d.]+)"', page)]
    assert len(shares) == 2 * 4, "a matrix of two classes for each start"
    assert all(sum(shares[i : i + 2]) == pytest.approx(1) for i in range(0, 8, 2))
    worst = page.count("data:image/jpeg")
    assert 1 <= worst <= 16, "random pictures are got wrong"
    assert "random weights" in page and "linear probe" in page


@pytest.mark.parametrize("task", ["segment", "depth"])
def test_dense_tasks_show_picture_truth_and_answer(task: str, tmp_path: Path) -> None:
    data = (planted.masks if task == "segment" else planted.depth_pairs)(tmp_path / "data")
    page = page_of(data, tmp_path, task)
    pictures = page.count("data:image/jpeg")
    assert pictures == 2 * 3, "three judged pictures for each start"
    assert page.count("data:image/png") == 2 * pictures
    assert ("taken for" in page) == (task == "segment")


def test_mistakes_are_counted_as_scikit_learn_does() -> None:
    random = np.random.default_rng(1)
    true, said = random.integers(0, 4, 200), random.integers(0, 4, 200)
    counts = confusion_matrix(true, said)
    assert np.allclose(shares_of(counts), confusion_matrix(true, said, normalize="true"))
    found = mistakes(counts, "abcd")
    assert found[0].count == max(((true == i) & (said == j)).sum() for i in range(4) for j in range(4) if i != j)
    assert [each.count for each in found] == sorted((each.count for each in found), reverse=True)
    assert len(found) == 12
