"""The share of the weights that gets the high bits."""

import pytest

from aptq.allocators.share import check_share, room
from aptq.api import Allocation, AptqError


@pytest.mark.parametrize(
    ("ratio", "high", "low", "message"),
    [
        (1.5, 4, 2, "from 0 to 1"),
        (-0.1, 4, 2, "from 0 to 1"),
        (float("nan"), 4, 2, "from 0 to 1"),
        (1.0, 4, 4, "below"),
    ],
)
def test_what_is_no_share_is_refused(ratio: float, high: int, low: int, message: str) -> None:
    with pytest.raises(AptqError, match=message):
        check_share(ratio, high, low)


def test_a_share_that_floats_cannot_hold_has_room_for_all_of_its_weights() -> None:
    problem = Allocation(shapes={f"layer{i}": (1, 1) for i in range(100)}, options=[], costs={}, storage_bits={})
    assert 0.29 * 100 < 29 <= room(0.29, problem) < 29.001
