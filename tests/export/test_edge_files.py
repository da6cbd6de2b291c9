"""ExecuTorch programs, run by its own runtime; not where the package is not installed."""

from pathlib import Path
from typing import Any

import pytest
from exporting import CONVNEXT, SHALLOW_VIT, Exports, code_of, least_cosine, photograph, tokens_of

pytest.importorskip("executorch")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("arch", [CONVNEXT, SHALLOW_VIT])
def test_a_program_gives_the_run_s_tokens(arch: str, tmp_path: Path) -> None:
    exports = Exports(tmp_path, "executorch", rotated=True)
    path = photograph(tmp_path / "p.png")
    names: dict[str, Any] = {"DIR": str(exports.out(arch)), "PICTURE": str(path)}
    exec(code_of(exports.out(arch) / "README.md"), names)
    _, summary, dense = tokens_of(exports.run(arch), path)
    assert least_cosine(names["summary"], summary) > 0.99999
    assert least_cosine(names["dense"], dense) > 0.99999
    assert [said.shape[-1] for said in names["teachers"]] == [20, 12, 12]
    assert sorted(file.name for file in exports.out(arch).iterdir()) == ["README.md", "export.json", "model.pte"]
