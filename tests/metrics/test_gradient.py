"""The loss's change along its gradient."""

import pytest

from aptq.api import AptqError, LayerStatistics, LossChange, LossMetric, Option
from aptq.metrics.gradient import Gradient
from aptq.testing import check_metric


@pytest.mark.parametrize("form", ["absolute", "squared"])
def test_keeps_the_contract(form: str) -> None:
    check_metric(Gradient(form=form))
    assert isinstance(Gradient(form=form), LossMetric)


@pytest.mark.parametrize(("form", "expected"), [("absolute", 7.0), ("squared", 0.5)])
def test_forms(form: str, expected: float) -> None:
    option = Option(3, 64)
    change = LossChange(channels=0.25, tokens=0.5, absolute=7.0)
    layer = LayerStatistics(
        name="a", shape=(2, 2), tokens=4, trace=1.0, errors={option: 9.0}, loss_changes={option: change}
    )
    assert Gradient(form=form).cost(layer, option) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "cubic"}, "use one of absolute, squared"),
        ({"samples": 0}, "1 or more"),
        ({"labels": "text"}, "use one of both, model, data"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(AptqError, match=message):
        Gradient(**options)
