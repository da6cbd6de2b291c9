"""Ten kinds of timm's models, each trained for a step, exported to ONNX and compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.students import Row, made_store, table, tried

TEN = {
    "byobnet": "test_byobnet",
    "convnext": "test_convnext",
    "efficientnet": "test_efficientnet",
    "levit": "levit_128s",
    "mambaout": "test_mambaout",
    "mobilenetv3": "mobilenetv3_small_050",
    "nfnet": "test_nfnet",
    "resnet": "test_resnet",
    "starnet": "starnet_s050",
    "vision_transformer": "test_vit",
}
TO_ONNX = ("levit", "mambaout", "starnet")


@pytest.mark.slow
def test_ten_kinds_of_students_train_and_agree_after_export(tmp_path: Path) -> None:
    store = made_store(tmp_path)
    # other tests export the commoner kinds to ONNX, which takes long
    rows = [
        tried(file, [arch], store, tmp_path, format="onnx" if file in TO_ONNX else "timm") for file, arch in TEN.items()
    ]
    assert [row for row in rows if row.cosine is None or row.cosine < 0.9999] == []


def test_the_table_says_what_was_refused_and_counts_the_rest() -> None:
    rows = [Row("b", "net", 2_000_000, 64, 0.99999), Row("a", "odd", 1_000_000, said="it gives no map")]
    lines = table(rows).splitlines()
    assert lines[2:4] == ["| a | odd | 1.0M |  | it gives no map |", "| b | net | 2.0M | 64 | 0.999990 |"]
    assert lines[-1] == "1 of 2 train a step and agree after export (least cosine 0.9999 or more)."
    lines = table([*rows, Row("c", "giant", 10**9, said="not tried"), Row("d", "off", 9, 64, 0.9998)]).splitlines()
    assert lines[-1].startswith("1 of 3 train") and lines[-1].endswith("1 too large to be tried.")
