"""HAWQ-V2's metric."""

import pytest
import torch

from aptq.api import Curvature, LayerStatistics, Option
from aptq.metrics.trace_error import TraceError
from aptq.testing import check_metric


def test_keeps_the_contract() -> None:
    check_metric(TraceError())


def test_is_the_quadratic_form_where_the_curvature_is_round() -> None:
    generator = torch.Generator().manual_seed(0)
    difference, option = torch.randn(6, 8, generator=generator), Option(3, 64)
    curvature = Curvature(column=3 * torch.eye(8)[None], tokens=1)
    layer = LayerStatistics(
        name="a",
        shape=(6, 8),
        tokens=1,
        trace=curvature.trace(6),
        distances={option: difference.square().sum().item()},
    )
    assert TraceError().cost(layer, option) == pytest.approx(curvature.quadratic(difference), rel=1e-5)
