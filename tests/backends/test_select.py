from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
from torch import Tensor

from aptq.api import AptqError, LayerSpec, Option
from aptq.backends.reference import Reference
from aptq.backends.select import choose_backend, installed_backends
from aptq.formats.integer import Integer
from tests.backends.specs import spec_of

SPEC = spec_of(Integer(), Option(4, 32), (8, 32))


@dataclass(frozen=True)
class Stub:
    priority: int
    reason: str | None = None

    def refuses(self, spec: LayerSpec) -> str | None:
        return self.reason

    def prepack(self, tensors: Mapping[str, Tensor], spec: LayerSpec) -> dict[str, Tensor]:
        return dict(tensors)

    def matmul(self, x: Tensor, tensors: Mapping[str, Tensor], spec: LayerSpec) -> Tensor:
        return x


def test_auto_takes_the_highest_priority_that_accepts_and_keeps_refusals() -> None:
    installed = {"slow": Stub(1), "fast": Stub(9, "needs a GPU"), "good": Stub(5)}
    choice = choose_backend(SPEC, "auto", installed)
    assert choice.name == "good"
    assert choice.backend is installed["good"]
    assert choice.refusals == {"fast": "needs a GPU"}


def test_a_named_backend_is_taken_over_better_ones() -> None:
    installed = {"slow": Stub(1), "good": Stub(5)}
    assert choose_backend(SPEC, "slow", installed).backend is installed["slow"]


def test_a_named_backend_that_refuses_tells_its_reason_and_the_others() -> None:
    installed = {"slow": Stub(1), "fast": Stub(9, "needs a GPU"), "odd": Stub(0, "needs 3 bits")}
    with pytest.raises(AptqError, match=r"fast cannot run .*4 bits.*needs a GPU.*odd: needs 3 bits.*backend=auto"):
        choose_backend(SPEC, "fast", installed)


def test_when_all_refuse_every_reason_is_told() -> None:
    with pytest.raises(AptqError, match=r"fast: needs a GPU; odd: needs 3 bits"):
        choose_backend(SPEC, "auto", {"fast": Stub(9, "needs a GPU"), "odd": Stub(0, "needs 3 bits")})


def test_an_unknown_backend_is_answered_with_what_is_installed() -> None:
    with pytest.raises(AptqError, match=r"(?s)refrence.*reference"):
        choose_backend(SPEC, "refrence")


def test_the_reference_backend_is_installed() -> None:
    backends, _ = installed_backends()
    assert isinstance(backends["reference"], Reference)
    assert isinstance(choose_backend(SPEC, "reference").backend, Reference)
