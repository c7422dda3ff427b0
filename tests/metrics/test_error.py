"""The quadratic error of real rounding."""

from aptq.api import LayerStatistics, Option
from aptq.metrics.error import Error
from aptq.testing import check_metric


def test_keeps_the_contract() -> None:
    check_metric(Error())


def test_is_what_was_measured_at_the_option() -> None:
    errors = {Option(2, 64): 9.0, Option(4, 64): 1.0}
    layer = LayerStatistics(name="a", shape=(4, 8), tokens=1, trace=64.0, errors=errors)
    assert [Error().cost(layer, option) for option in errors] == [9.0, 1.0]
    assert Error().needs_errors
