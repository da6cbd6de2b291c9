"""What of labelled pictures is taken is the user's choice, and stands in the result."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from containers import make_tar
from PIL import Image


def flat(red: int, seed: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (24, 24), (red, seed, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("kind", ["table", "tar"])
def test_labels_and_pictures_are_chosen_for_a_task(tmp_path: Path, run_eupe: Any, kind: str) -> None:
    """Colours tell the one label and not the other, in one picture of each sample and not in the other."""
    grey = flat(9, 9)
    if kind == "table":
        columns = {"left": [flat(255 * (i % 2), i) for i in range(8)], "right": [grey] * 8}
        path = tmp_path / "x.parquet"
        pq.write_table(
            pa.table({**columns, "label": [(i // 2) % 2 for i in range(8)], "hue": [i % 2 for i in range(8)]}), path
        )
        choice, names = (
            ("--image-column", "left", "--label-column", "hue"),
            {"image_column": "left", "label_column": "hue"},
        )
    else:
        members = {}
        for i in range(8):
            notes = json.dumps({"label": (i // 2) % 2, "hue": i % 2}).encode()
            members |= {f"{i}.png": flat(255 * (i % 2), i), f"{i}.jpg": grey, f"{i}.json": notes}
        path = make_tar(tmp_path / "x.tar", members)
        choice, names = ("--image-key", "png", "--label-column", "hue"), {"image_key": "png", "label_column": "hue"}
    command = ("eval", "knn", "pixels", "--data", path, "--k", 1, "--size", 16, "--json")
    refused = run_eupe(*command)
    assert refused.code == 2 and choice[0] in refused.err
    outcome = run_eupe(*command, *choice)
    assert outcome.code == 0, outcome.err
    (result,) = json.loads(outcome.out)["results"]
    assert result["scores"]["accuracy"] == 1 and names.items() <= result["data"].items()
    outcome = run_eupe(*command, *choice[:2])
    assert json.loads(outcome.out)["results"][0]["scores"]["accuracy"] < 1
    nothing = run_eupe("eval", "knn", "pixels", *choice)
    assert nothing.code == 2
