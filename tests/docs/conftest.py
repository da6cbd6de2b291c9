"""What the walks share."""

from __future__ import annotations

from pathlib import Path

import pytest
from presupposed import make_presupposed


@pytest.fixture(scope="session")
def presupposed(tmp_path_factory: pytest.TempPathFactory, assets: Path) -> Path:
    """What pages presuppose, all of it. Not to be changed."""
    return make_presupposed(tmp_path_factory.mktemp("pages") / "presupposed", assets)
