import pickle

import pytest

from eupe import errors
from eupe.errors import EupeError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, EupeError)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_survives_the_way_through_ray(kind: type[EupeError]) -> None:
    sent = kind("store/x.zarr lacks part 3; run the same command again")
    received = pickle.loads(pickle.dumps(sent))
    assert type(received) is kind
    assert str(received) == str(sent)
    assert received.exit_code in (1, 2)


def test_gaps_and_full_disks_leave_with_1_and_mistakes_with_2() -> None:
    codes = {kind.__name__: kind.exit_code for kind in KINDS}
    assert {name for name, code in codes.items() if code == 1} == {
        "StorageError",
        "OutageError",
        "IncompleteError",
        "TrainingError",
        "DriftError",
        "ConformanceError",
        "StepError",
    }
