"""GPTQ's Hessian keeps the contract; ``test_input_observer.py`` looks at its values."""

from aptq.hessians.input import Input
from aptq.testing import check_hessian


def test_keeps_the_contract() -> None:
    check_hessian(Input())
