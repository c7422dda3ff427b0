"""The loss's second-order change."""

import pytest

from aptq.api import AptqError, LayerStatistics, LossChange, LossMetric, Option
from aptq.metrics.output import Output
from aptq.testing import check_metric


def test_keeps_the_contract() -> None:
    check_metric(Output())
    assert isinstance(Output(), LossMetric)


def test_is_the_change_with_channels_apart() -> None:
    option = Option(3, 64)
    change = LossChange(channels=0.25, tokens=0.5, absolute=7.0)
    layer = LayerStatistics(
        name="a", shape=(2, 2), tokens=4, trace=1.0, errors={option: 9.0}, loss_changes={option: change}
    )
    assert Output().cost(layer, option) == 0.25


@pytest.mark.parametrize(
    ("options", "message"), [({"samples": 0}, "1 or more"), ({"labels": "text"}, "use one of both, model, data")]
)
def test_options_that_cannot_be_are_refused(options: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(AptqError, match=message):
        Output(**options)
