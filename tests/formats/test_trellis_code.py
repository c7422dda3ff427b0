"""The trellis: states, and the best run of codes against all there are."""

from itertools import product

import pytest
import torch

from aptq.formats import trellis_code
from aptq.formats.trellis_code import BITS, STATE_BITS, best_codes, best_scale, states_of, values_of_states, viterbi

LLOYD_MAX = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499, 6: 0.0006442}
"""Least mean squared error of scalar quantizers of normally distributed values (Max 1960; Jayant and Noll 1984)."""


@pytest.mark.parametrize(("bits", "state_bits"), [(1, 10), (3, 10), (4, 10), (4, 12), (5, 12)])
def test_a_state_is_the_last_bits_of_the_codes(bits: int, state_bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (2, 17), dtype=torch.uint8)
    found = states_of(codes, bits, state_bits)
    for row, states in zip(codes.tolist(), found.tolist(), strict=True):
        bits_so_far = ""
        for code, state in zip(row, states, strict=True):
            bits_so_far += format(code, f"0{bits}b")
            assert state == int(bits_so_far[-state_bits:], 2)


def test_one_output_is_a_run_of_one() -> None:
    assert states_of(torch.tensor([[3], [1]], dtype=torch.uint8), 2, 10).tolist() == [[3], [1]]
    values = torch.tensor([[0.3]])
    allowed = values_of_states(2, 10)[:4]
    assert best_codes(values, torch.ones(1, 1), values_of_states(2, 10), 2).item() == int(
        (allowed - 0.3).abs().argmin()
    )


@pytest.mark.parametrize(("bits", "rows"), [(1, 8), (2, 5), (3, 3)])
def test_the_best_run_of_codes_is_the_best_of_all(bits: int, rows: int) -> None:
    torch.manual_seed(bits)
    values, scales = torch.randn(4, rows, dtype=torch.float64), torch.rand(4, rows, dtype=torch.float64) + 0.5
    table = values_of_states(bits, 10)
    every = torch.tensor(list(product(range(1 << bits), repeat=rows)), dtype=torch.uint8)
    stands_for = table.double()[states_of(every, bits, 10)]
    for column in range(4):
        least = (values[column] - scales[column] * stands_for).square().sum(1).min()
        for codes in (
            viterbi(values, scales, table, bits)[column],
            best_codes(values.float(), scales.float(), table, bits)[column],
        ):
            found = (
                (values[column] - scales[column] * table.double()[states_of(codes[None], bits, 10)[0]]).square().sum()
            )
            assert float(found) == pytest.approx(float(least), rel=1e-5)


@pytest.mark.parametrize("state_bits", STATE_BITS)
@pytest.mark.parametrize("bits", BITS)
def test_kernel_and_operators_of_torch_lose_the_same(bits: int, state_bits: int) -> None:
    torch.manual_seed(0)
    values, scales, table = torch.randn(3, 61), torch.rand(3, 61) + 0.5, values_of_states(bits, state_bits)
    losses = [
        (values - scales * table[states_of(codes, bits, state_bits)]).square().sum(1)
        for codes in (best_codes(values, scales, table, bits), viterbi(values, scales, table, bits))
    ]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_normal_values_lose_less_than_by_any_scalar_quantizer(bits: int) -> None:
    values = torch.randn(6, 500, generator=torch.Generator().manual_seed(1))
    scales = torch.full_like(values, best_scale(bits, 10))
    table = values_of_states(bits, 10)
    found = scales * table[states_of(best_codes(values, scales, table, bits), bits, 10)]
    assert float((values - found).square().mean()) < 0.83 * LLOYD_MAX[bits]


def test_without_a_compiler_it_goes_on_by_operators_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    values, scales = torch.randn(2, 20), torch.ones(2, 20)
    table = values_of_states(2, 10)
    expected = best_codes(values, scales, table, 2)

    monkeypatch.setattr(trellis_code, "kernels_for", lambda user: None)
    found = best_codes(values, scales, table, 2)
    assert (found == expected).float().mean() > 0.9
