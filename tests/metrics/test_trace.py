"""The paper's metric."""

from aptq.api import LayerStatistics, Option
from aptq.metrics.trace import Trace
from aptq.testing import check_metric


def test_keeps_the_contract() -> None:
    check_metric(Trace())


def test_is_the_trace_per_weight_whatever_the_bits() -> None:
    layer = LayerStatistics(name="a", shape=(4, 8), tokens=1, trace=64.0)
    assert Trace().cost(layer, Option(2, 64)) == Trace().cost(layer, Option(4, 64)) == 2.0
