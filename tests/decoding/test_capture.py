from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from aptq.api import AptqError
from aptq.decoding import Traced, trace
from aptq.layer import PackedLinear
from aptq.transforms.hadamard import Hadamard
from tests.decoding.layers import packed_linear


def capture(function: Callable[[Tensor], Tensor], x: Tensor) -> Traced:
    run = trace(function, x)
    run.compile(x)
    return run


@pytest.fixture(scope="module")
def layers() -> list[PackedLinear]:
    """Three that read the same inputs, at different bits, and one that reads theirs; rotated."""
    shapes = {(96, 64): 3, (32, 64): 4, (40, 64): 2, (64, 96): 8}
    generator = torch.Generator().manual_seed(0)
    return [packed_linear(torch.randn(each, generator=generator), bits, Hadamard()) for each, bits in shapes.items()]


def test_products_with_packed_weights_are_the_same(layers: list[PackedLinear]) -> None:
    first, second, third, last = layers

    def function(x: Tensor) -> Tensor:
        x = torch.nn.functional.silu(x)
        return torch.cat([last(first(x)), second(x), third(x)], dim=-1)

    run = capture(function, torch.ones(1, 1, 64))
    for seed in range(3):
        x = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(run(x), function(x), rtol=1e-5, atol=1e-5)


def test_state_that_the_function_changes_in_place_is_changed_by_what_was_captured() -> None:
    def counting() -> tuple[Callable[[Tensor], Tensor], Tensor]:
        count, kept = torch.zeros(1, dtype=torch.long), torch.zeros(6, 4)

        def function(x: Tensor) -> Tensor:
            kept.index_copy_(0, count, x)
            count.add_(1)
            return kept.sum(0) * count

        return function, count

    own, _ = counting()
    function, count = counting()
    run = capture(function, torch.ones(1, 4))
    own(torch.ones(1, 4))
    for value in (2.0, -3.0, 0.5):
        x = torch.full((1, 4), value)
        torch.testing.assert_close(run(x), own(x))
    assert count == 4


def test_torch_has_its_threads_again_after_a_call() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen: list[int] = []
        run = capture(lambda x: x + 1, torch.zeros(1))
        run._run = lambda x: seen.append(torch.get_num_threads()) or x
        run(torch.zeros(1))
        assert (seen, torch.get_num_threads()) == ([1], 2)  # nothing here is worth two
        large = torch.zeros(1024, 1024)
        run = capture(lambda x: x @ large, torch.zeros(1, 1024))
        run._run = lambda x: seen.append(torch.get_num_threads()) or x
        run(torch.zeros(1))
        assert (seen, torch.get_num_threads()) == ([1, 2], 2)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda x: x[torch.nonzero(x).flatten()], "aten.nonzero"),
        (lambda x: x[x > 0], "aten.index"),
        (lambda x: x + 1 if x.sum() > 0 else x, "decides by its activations"),
        (lambda x: x * x.max().item(), "decides by its activations"),
    ],
)
def test_what_depends_on_values_is_refused(function: Callable[[Tensor], Tensor], told: str) -> None:
    with pytest.raises(AptqError, match=told):
        capture(function, torch.ones(4))


def test_entries_by_number_are_allowed() -> None:
    table = torch.arange(10.0)
    run = capture(lambda x: table[x] + 1, torch.tensor([3, 4]))
    assert run(torch.tensor([7, 1])).tolist() == [8.0, 2.0]


def test_an_error_of_the_function_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        capture(lambda x: x @ torch.ones(3, 3), torch.ones(4, 4))


def test_without_a_compiler_it_says_so() -> None:
    from torch._inductor import config  # takes seconds

    with (
        config.patch({"fx_graph_cache": False, "cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(AptqError, match="cannot be compiled"),
    ):
        capture(lambda x: (x + 1.2345).cos(), torch.zeros(7))
