"""The conformance checks: the built-ins pass, and each broken promise is caught."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from aptq.api import Allocation, Block, Curvature, LayerStatistics, Option, QuantizedWeight, Rounded
from aptq.config import compose
from aptq.formats.float import Float
from aptq.formats.integer import Integer, IntegerGrid
from aptq.hessians.input import Input
from aptq.quantizers.nearest import Nearest
from aptq.registry import available, build
from aptq.testing import (
    check_allocator,
    check_backend,
    check_evaluator,
    check_format,
    check_hessian,
    check_metric,
    check_quantizer,
)
from tests.backends.specs import spec_of

BUDGETS = {"uniform": 4.0, "ratio": 3.5}
SHAPES = ((64, 128), (5, 33))
TAKEN = {
    "torch_int4": {"format": Integer(), "bits": [4], "shapes": SHAPES},
    "torch_int8": {"format": Integer(symmetric=True), "bits": [8], "shapes": SHAPES, "group_sizes": (32, -1)},
    "bitsandbytes": {"format": Float(), "bits": [4], "shapes": SHAPES},
}
"""What backends take that do not take integers of 3 and 4 bits under any activations."""

WIDTHS = {"binary": (1, 2)}
"""Of formats that have not all of 2 to 4 bits."""


def _built_ins(kind: str) -> list[str]:
    return [name for name, point in available(kind).items() if point.dist and point.dist.name == "aptq"]


@pytest.mark.parametrize("name", _built_ins("format"))
def test_built_in_formats_pass(name: str) -> None:
    bits = WIDTHS.get(name, (2, 3, 4))
    check_format(build("format", OmegaConf.to_container(compose([f"format={name}"]).format)), bits=bits)


@pytest.mark.parametrize("name", _built_ins("quantizer"))
def test_built_in_quantizers_pass(name: str) -> None:
    check_quantizer(build("quantizer", {"name": name}), bits=[3])


@pytest.mark.parametrize("name", _built_ins("backend"))
def test_built_in_backends_pass(name: str) -> None:
    backend, device = build("backend", {"name": name}), "cpu"
    taken = TAKEN.get(name, {"format": Integer(), "bits": [3, 4]})
    refusal = backend.refuses(spec_of(taken["format"], Option(4, 32), (64, 128))) or ""
    if "CUDA device" in refusal:
        if not torch.cuda.is_available():
            pytest.skip("gpu: no CUDA device here")
        device = "cuda"
    if "not installed" in refusal:
        pytest.skip(refusal)
    check_backend(backend, **taken, device=device)


@pytest.mark.parametrize("name", _built_ins("hessian"))
def test_built_in_estimators_pass(name: str) -> None:
    check_hessian(build("hessian", {"name": name}))


@pytest.mark.parametrize("name", _built_ins("metric"))
def test_built_in_metrics_pass(name: str) -> None:
    check_metric(build("metric", {"name": name}))


@pytest.mark.parametrize("name", _built_ins("allocator"))
def test_built_in_allocators_pass(name: str) -> None:
    check_allocator(build("allocator", {"name": name}), average_bits=BUDGETS.get(name))


# ------------------------------------------------------------------------------------------------ broken promises


class _Broken:
    """A format that is ``Integer`` but for what a subclass breaks."""

    def __init__(self) -> None:
        self.inner = Integer(group_size=16)
        self.group_size = 16

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)


class _AcceptsAll(_Broken):
    def check(self, option: Option, shape: tuple[int, int]) -> None: ...


class _Forgets(_Broken):
    def unpack(self, tensors: Mapping[str, Tensor], option: Option, shape: tuple[int, int]) -> QuantizedWeight:
        whole = self.inner.unpack(tensors, option, shape)
        return QuantizedWeight(codes=whole.codes.clone().clamp(max=2), parameters=whole.parameters)


class _Remembers(_Broken):
    """Keeps the scales in memory instead of storing them."""

    kept: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Remembers:
        return type(self)()

    def pack(self, quantized: QuantizedWeight, option: Option) -> dict[str, Tensor]:
        tensors = self.inner.pack(quantized, option)
        self.kept = tensors.pop("scales")
        return tensors

    def packed_layout(self, option: Option, shape: tuple[int, int]) -> dict[str, Any]:
        layout = self.inner.packed_layout(option, shape)
        del layout["scales"]
        return layout

    def unpack(self, tensors: Mapping[str, Tensor], option: Option, shape: tuple[int, int]) -> QuantizedWeight:
        forgotten = torch.ones(option.num_groups(shape[1]), shape[0], dtype=torch.float16)
        scales = forgotten if self.kept is None else self.kept
        return self.inner.unpack({**tensors, "scales": scales}, option, shape)


class _Understates(_Broken):
    def packed_layout(self, option: Option, shape: tuple[int, int]) -> dict[str, Any]:
        layout = self.inner.packed_layout(option, shape)
        return {**layout, "scales": ((1, 1), torch.float16)}


class _Rescales(_Broken):
    def dequantize(self, quantized: QuantizedWeight, option: Option) -> Tensor:
        return self.inner.dequantize(quantized, option) * 1.0001


class _Overwrites(_Broken):
    def fit(self, weight: Tensor, option: Option, importance: Tensor | None = None) -> IntegerGrid:
        grid = self.inner.fit(weight, option, importance)
        weight.zero_()
        return grid


@dataclass(frozen=True, eq=False)
class _UnorderedGrid(IntegerGrid):
    def permuted(self, order: Tensor) -> IntegerGrid:
        return replace(super().permuted(order), group=self.group)


class _Unordered(_Broken):
    def fit(self, weight: Tensor, option: Option, importance: Tensor | None = None) -> IntegerGrid:
        return _UnorderedGrid(**vars(self.inner.fit(weight, option, importance)))


@pytest.mark.parametrize(
    ("format", "told"),
    [
        (_AcceptsAll(), "accepts 0 bits"),
        (_Forgets(), r"after pack\(\) and unpack\(\)"),
        (_Remembers(), r"after pack\(\) and unpack\(\)"),
        (_Understates(), r"packed_layout\(\) says \(1, 1\)"),
        (_Rescales(), r"dequantize\(\) against what round\(\) gave"),
        (_Overwrites(), r"fit\(\) changed the weight"),
        (_Unordered(), r"permuted\(\) grid"),
    ],
)
def test_a_broken_format_is_caught(format: Any, told: str) -> None:
    with pytest.raises(AssertionError, match=told):
        check_format(format, bits=[3])


def test_widths_that_no_option_serves_are_told() -> None:
    with pytest.raises(AssertionError, match="9 bits with none of"):
        check_format(Integer(), bits=[9])


class _ChangesWeight(Nearest):
    def quantize(self, weight: Tensor, *rest: Any) -> Rounded:
        quantized = super().quantize(weight, *rest)
        weight.mul_(0.5)
        return quantized


class _UsesUpFactors(Nearest):
    def quantize(self, weight: Tensor, factors: Any, *rest: Any) -> Rounded:
        shrunk = weight / (1 + getattr(factors, "used", 0))
        object.__setattr__(factors, "used", 1)
        return super().quantize(shrunk, factors, *rest)


class _ChangesCurvature(Nearest):
    def prepare(self, curvature: Curvature) -> Any:
        curvature.column.add_(1)
        return super().prepare(curvature)


@pytest.mark.parametrize(
    ("quantizer", "told"),
    [
        (_ChangesWeight(), r"quantize\(\) changed the weight"),
        (_UsesUpFactors(), "factors .*used"),
        (_ChangesCurvature(), r"prepare\(\) changed the curvature"),
    ],
)
def test_a_broken_quantizer_is_caught(quantizer: Any, told: str) -> None:
    with pytest.raises(AssertionError, match=told):
        check_quantizer(quantizer, bits=[4])


class _Backend:
    priority = 1

    def __init__(self, reason: str | None = None, error: float = 0.0) -> None:
        self.reason, self.error = reason, error

    def refuses(self, spec: Any) -> str | None:
        return self.reason

    def prepack(self, tensors: Mapping[str, Tensor], spec: Any) -> dict[str, Tensor]:
        shape = (spec.out_features, spec.in_features)
        return {"weight": spec.format.dequantize(spec.format.unpack(tensors, spec.option, shape), spec.option)}

    def matmul(self, x: Tensor, tensors: Mapping[str, Tensor], spec: Any) -> Tensor:
        return (x.float() @ tensors["weight"].T * (1 + self.error)).to(x.dtype)


def test_backends_are_measured() -> None:
    check_backend(_Backend(), bits=[4])
    with pytest.raises(AssertionError, match=r"matmul\(\) of x .* is off by"):
        check_backend(_Backend(error=0.01), bits=[4])
    with pytest.raises(AssertionError, match="refuses every layer.*no such device"):
        check_backend(_Backend(reason="no such device"), bits=[4])


class _LeavesHooks:
    def observe(self, block: Block) -> Any:
        for layer in block.layers.values():
            layer.module.register_forward_pre_hook(lambda module, args: None)
        return Input().observe(block)


class _ChangesOutput:
    @contextmanager
    def observe(self, block: Block) -> Iterator[Any]:
        with Input().observe(block) as observer:

            class Changed:
                sums = observer.sums

                def __call__(self, inputs: Any) -> Tensor:
                    return observer(inputs) * 1.001

            yield Changed()


class _AveragesBatches:
    """Normalises in each batch, so that the split decides the result."""

    @contextmanager
    def observe(self, block: Block) -> Iterator[Any]:
        with Input().observe(block) as observer:

            class Averaging:
                batches = 0

                def __call__(self, inputs: Any) -> Tensor:
                    self.batches += 1
                    return observer(inputs)

                def sums(self) -> Any:
                    shared = observer.sums()
                    for total in {id(each): each for each in shared.values()}.values():
                        total.column.div_(self.batches)
                    return shared

            yield Averaging()


class _GivesHalfTheDrift(Input):
    @contextmanager
    def watch(self, block: Block) -> Iterator[Any]:
        with super().watch(block) as observer:

            class Halving:
                def curvature_sum(self, *arguments: Any) -> Any:
                    total = observer.curvature_sum(*arguments)
                    return total if total.drift is None else replace(total, drift=total.drift / 2)

            yield Halving()


@pytest.mark.parametrize(
    ("estimator", "told"),
    [
        (_LeavesHooks(), "leaves hooks"),
        (_ChangesOutput(), "output under observation"),
        (_AveragesBatches(), "samples one by one"),
        (_GivesHalfTheDrift(), "drift of 2 x instead of x"),
    ],
)
def test_a_broken_estimator_is_caught(estimator: Any, told: str) -> None:
    with pytest.raises(AssertionError, match=told):
        check_hessian(estimator)


@dataclass(frozen=True)
class _Metric:
    sign: float = 1.0
    needs_errors: bool = False

    def cost(self, layer: LayerStatistics, option: Option) -> float:
        return self.sign * layer.trace


def test_metrics_are_checked() -> None:
    check_metric(_Metric())
    with pytest.raises(AssertionError, match="twice the curvature"):
        check_metric(_Metric(sign=-1.0))
    with pytest.raises(AssertionError, match="no finite number"):
        check_metric(_Metric(sign=float("nan")))


class _Allocator:
    needs_costs = True

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def bit_options(self) -> tuple[int, ...]:
        return (2, 4)

    def allocate(self, problem: Allocation) -> dict[str, Option]:
        plan = dict.fromkeys(problem.shapes, problem.options[0])
        name = next(iter(plan))
        if self.fault == "misses":
            del plan[name]
        elif self.fault == "invents":
            plan[name] = Option(bits=3, group_size=64)
        elif self.fault == "changes":
            problem.costs[name].clear()  # type: ignore[attr-defined]
        elif self.fault == "overspends":
            plan = dict.fromkeys(plan, problem.options[1])
        return plan


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("misses", "leaves out"),
        ("invents", "none of"),
        ("changes", "changed the problem"),
        ("overspends", "3.0 are allowed"),
    ],
)
def test_a_broken_allocator_is_caught(fault: str, told: str) -> None:
    check_allocator(_Allocator(), average_bits=3.0)
    with pytest.raises(AssertionError, match=told):
        check_allocator(_Allocator(fault), average_bits=3.0)


class _Evaluator:
    def __init__(self, value: float = 1.0, *, trains: bool = False) -> None:
        self.value, self.trains = value, trains

    def evaluate(self, model: Any, texts: Any, progress: Any) -> dict[str, dict[str, float]]:
        model.train(self.trains)
        for text in texts:
            progress(text.name, 1.0)
        return {"loss": {text.name: self.value for text in texts}}


class _TaskEvaluator(_Evaluator):
    tasks, needs_texts = ("t", "u"), False

    def __init__(self, value: float = 1.0, *, trains: bool = False, errors: str = "acc", told: str = "u") -> None:
        super().__init__(value, trains=trains)
        self.errors, self.told = errors, told

    def check(self) -> None:
        pass

    def evaluate(self, model: Any, texts: Any, progress: Any) -> dict[str, dict[str, float]]:
        raise AssertionError("it needs no texts")

    def evaluate_tasks(self, model: Any, tokenizer: Any, progress: Any) -> dict[str, dict[str, float]]:
        tokenizer.special_tokens_map["pad"] = self.value
        for name in ("t", self.told):
            progress(name, 1.0)
        return {"acc": {"t": self.value}, f"{self.errors}_stderr": {"t": 0.1}}


class _Tokenizer(list[str]):
    def __init__(self, **special: float) -> None:
        super().__init__()
        self.special_tokens_map = special


class _Model(torch.nn.Linear):
    class config:
        vocab_size = 10


def test_evaluators_with_tasks_are_checked() -> None:
    model: Any = _Model(2, 2).eval()
    tokenizer: Any = _Tokenizer(pad=1.0)
    check_evaluator(_TaskEvaluator(), model, tokenizer=tokenizer)
    with pytest.raises(AssertionError, match="checked with a tokenizer"):
        check_evaluator(_TaskEvaluator(), model)
    for evaluator, told in (
        (_TaskEvaluator(2.0), "changes the tokenizer"),
        (_TaskEvaluator(float("inf")), "acc of t is inf"),
        (_TaskEvaluator(errors="other"), "other has no figures of"),
        (_TaskEvaluator(told="strange"), "progress of u"),
    ):
        with pytest.raises(AssertionError, match=told):
            check_evaluator(evaluator, model, tokenizer=_Tokenizer(pad=1.0))  # type: ignore[arg-type]


def test_evaluators_are_checked() -> None:
    model: Any = _Model(2, 2).eval()
    check_evaluator(_Evaluator(), model)
    with pytest.raises(AssertionError, match="loss of a is nan"):
        check_evaluator(_Evaluator(float("nan")), model)
    with pytest.raises(AssertionError, match="another state"):
        check_evaluator(_Evaluator(trains=True), model)
