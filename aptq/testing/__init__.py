"""Conformance checks for authors of components: plain functions that raise ``AssertionError`` with the reason.

Call them from your tests with an instance of your component::

    from aptq.testing import check_format

    def test_format() -> None:
        check_format(Ternary(), bits=[2])

A component that passes keeps the promises of ``aptq.api`` that the rest of the program relies on. All weights and
inputs are made here, from seeds; nothing is downloaded. The other side of a contract (a format to try a quantizer
with) is the built-in one unless you pass your own.
"""

from __future__ import annotations

from aptq.testing.activations import check_activation
from aptq.testing.allocation import check_allocator, check_metric
from aptq.testing.evaluators import check_evaluator
from aptq.testing.formats import check_format
from aptq.testing.models import check_hessian
from aptq.testing.transforms import check_transform
from aptq.testing.weights import check_backend, check_quantizer

__all__ = [
    "check_activation",
    "check_allocator",
    "check_backend",
    "check_evaluator",
    "check_format",
    "check_hessian",
    "check_metric",
    "check_quantizer",
    "check_transform",
]
