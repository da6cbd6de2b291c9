"""What tests of extraction share."""

from collections.abc import Iterator
from unittest import mock

import pytest


@pytest.fixture(scope="module")
def without_waiting_for_the_disk() -> Iterator[None]:
    """Files are written without being flushed to the disk."""
    with mock.patch("eupe.common.files.sync"):
        yield
