"""The paper's metric."""

from aptq.allocators.ratio import Ratio
from aptq.api import Allocation, LayerStatistics, Option
from aptq.metrics.trace import Trace
from aptq.testing import check_metric


def test_keeps_the_contract() -> None:
    check_metric(Trace())


def test_a_bit_more_quarters_the_cost() -> None:
    layer = LayerStatistics(name="a", shape=(4, 8), tokens=1, trace=64.0)
    assert [Trace().cost(layer, Option(bits, 64)) for bits in (2, 3, 4)] == [4.0, 1.0, 0.25]


def test_the_ratio_ranks_by_the_average_trace() -> None:
    shapes = {"large": (8, 8), "sharp": (4, 4), "flat": (4, 4)}
    traces = {"large": 64.0, "sharp": 32.0, "flat": 8.0}  # 1, 2 and 0.5 a weight
    options = [Option(2, 64), Option(4, 64)]
    layers = {
        name: LayerStatistics(name=name, shape=shape, tokens=1, trace=traces[name]) for name, shape in shapes.items()
    }
    problem = Allocation(
        shapes=shapes,
        options=options,
        costs={name: {option: Trace().cost(layer, option) for option in options} for name, layer in layers.items()},
        storage_bits={name: {option: option.bits * 64 for option in options} for name in shapes},
    )
    plans = [Ratio(ratio=share).allocate(problem) for share in (0.2, 0.85)]
    assert [{name for name, option in plan.items() if option.bits == 4} for plan in plans] == [
        {"sharp"},
        {"sharp", "large"},
    ]
