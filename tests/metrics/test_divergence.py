"""Measured divergence of one layer at a time."""

import pytest

from aptq.api import AptqError, DivergenceMetric, LayerStatistics, LossMetric, Option
from aptq.metrics.divergence import Divergence
from aptq.metrics.output import Output
from aptq.testing import check_metric


def test_keeps_the_contract() -> None:
    check_metric(Divergence())
    assert isinstance(Divergence(), DivergenceMetric)
    assert not isinstance(Divergence(), LossMetric)
    assert not isinstance(Output(), DivergenceMetric)


def test_is_what_was_measured() -> None:
    option = Option(3, 64)
    layer = LayerStatistics(name="a", shape=(2, 2), tokens=4, trace=1.0, divergences={option: 0.25})
    assert Divergence().cost(layer, option) == 0.25


@pytest.mark.parametrize("options", [{"samples": 0}, {"last_tokens": 0}])
def test_options_that_cannot_be_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(AptqError, match="1 or more"):
        Divergence(**options)
