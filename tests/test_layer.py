from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from aptq.activations.block_scaled import BlockScaled
from aptq.api import AptqError, Curvature, LayerSpec, Option
from aptq.backends.reference import Reference
from aptq.formats.integer import Integer
from aptq.layer import PackedLinear, dense_weights
from aptq.quantizers.nearest import Nearest
from aptq.transforms.hadamard import Hadamard

FORMAT = Integer()


@dataclass(frozen=True)
class Doubling:
    """A backend that prepares a dense tensor in the dtype of the activations, for float32 and bfloat16 only."""

    priority: int = 5

    def refuses(self, spec: LayerSpec) -> str | None:
        return "no half precision" if spec.dtype == torch.float16 else None

    def prepack(self, tensors: Mapping[str, Tensor], spec: LayerSpec) -> dict[str, Tensor]:
        quantized = spec.format.unpack(tensors, spec.option, (spec.out_features, spec.in_features))
        return {"dense": 2 * spec.format.dequantize(quantized, spec.option).to(spec.dtype), "scales": tensors["scales"]}

    def matmul(self, x: Tensor, tensors: Mapping[str, Tensor], spec: LayerSpec) -> Tensor:
        return x @ tensors["dense"].T


INSTALLED = {"reference": Reference(), "doubling": Doubling()}


def make(
    option: Option,
    shape: tuple[int, int] = (48, 80),
    *,
    bias: bool = True,
    backend: str = "reference",
    activation: BlockScaled | None = None,
    transform: Hadamard | None = None,
) -> tuple[PackedLinear, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    nearest = Nearest()
    factors = nearest.prepare(Curvature(column=torch.eye(shape[1])[None], tokens=1))
    quantized = nearest.quantize(weight, factors, FORMAT, option).weight
    layer = PackedLinear(
        shape[1],
        shape[0],
        bias=bias,
        format=FORMAT,
        format_name="integer",
        option=option,
        activation=activation,
        transform=transform,
    )
    state = dict(FORMAT.pack(quantized, option))
    if bias:
        state["bias"] = torch.randn(shape[0], generator=generator)
    layer.load_state_dict(state)
    layer.select_backend(backend, INSTALLED)
    return layer, FORMAT.dequantize(quantized, option)


@pytest.mark.parametrize("option", [Option(2, 32), Option(3, -1), Option(4, 64), Option(8, 32)], ids=str)
def test_forward_multiplies_by_the_dequantized_weight(option: Option) -> None:
    layer, dense = make(option)
    x = torch.randn(2, 3, 80)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, dense, layer.bias), rtol=1e-6, atol=1e-5)
    assert torch.equal(layer.dense(), dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("leading", [(), (5,), (2, 1, 3), (0,)])
def test_forward_keeps_leading_shape_and_dtype(leading: tuple[int, ...], dtype: torch.dtype) -> None:
    layer, _ = make(Option(4, 64))
    y = layer(torch.randn(*leading, 80, dtype=dtype))
    assert y.shape == (*leading, 48)
    assert y.dtype == dtype


def test_state_dict_is_the_checkpoint_whatever_the_backend_prepared() -> None:
    layer, _ = make(Option(3, 32))
    prepared, _ = make(Option(3, 32), backend="doubling")
    assert list(prepared.state_dict()) == list(layer.state_dict())
    assert all(torch.equal(prepared.state_dict()[name], tensor) for name, tensor in layer.state_dict().items())
    x = torch.randn(4, 80)
    torch.testing.assert_close(prepared(x) - prepared.bias, 2 * (layer(x) - layer.bias), rtol=1e-4, atol=1e-4)


def test_the_reference_backend_adds_no_memory() -> None:
    layer, _ = make(Option(4, 64), bias=False)
    packed = FORMAT.packed_layout(Option(4, 64), (48, 80))
    assert {name: (tuple(buffer.shape), buffer.dtype) for name, buffer in layer.named_buffers()} == packed
    assert not list(layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casting_the_layer_leaves_the_packed_tensors_alone(dtype: torch.dtype) -> None:
    layer, _ = make(Option(4, 64))
    before = copy.deepcopy(layer.packed())
    layer.to(dtype)
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.packed().items())
    assert [tensor.dtype for tensor in layer.packed().values()] == [tensor.dtype for tensor in before.values()]
    assert layer.bias is not None
    assert layer.bias.dtype == dtype


def test_casting_the_layer_chooses_the_backend_again() -> None:
    layer, _ = make(Option(4, 64), backend="auto")
    assert "backend=Doubling" in repr(layer)
    layer.bfloat16()
    assert layer(torch.ones(1, 80, dtype=torch.bfloat16)).dtype == torch.bfloat16
    layer.half()
    assert "backend=Reference" in repr(layer)
    assert not [name for name, _ in layer.named_buffers() if name not in layer.packed_names]


def test_a_layer_on_the_meta_device_takes_no_memory() -> None:
    with torch.device("meta"):
        layer = PackedLinear(
            1 << 20, 1 << 20, bias=True, format=FORMAT, format_name="any", option=Option(4, 64), dtype=torch.bfloat16
        )
    assert {buffer.device.type for buffer in layer.buffers()} == {"meta"}
    assert layer.bias is not None
    assert layer.bias.dtype == torch.bfloat16


def test_repr_tells_how_the_layer_is_stored() -> None:
    layer, _ = make(Option(3, 32))
    for part in ("in_features=80", "out_features=48", "bits=3", "group_size=32", "format=integer", "backend=Reference"):
        assert part in repr(layer)


def test_forward_before_a_backend_is_chosen_says_what_to_do() -> None:
    layer = PackedLinear(32, 8, bias=False, format=FORMAT, format_name="integer", option=Option(4, 32))
    with pytest.raises(AptqError, match="select_backend"):
        layer(torch.ones(1, 32))


def test_an_option_outside_the_format_is_refused() -> None:
    with pytest.raises(AptqError, match="bits=9"):
        PackedLinear(32, 8, bias=False, format=FORMAT, format_name="integer", option=Option(9, 32))


def test_gradients_reach_the_input() -> None:
    layer, dense = make(Option(4, 64), bias=False)
    x = torch.randn(3, 80, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, dense.sum(0).expand(3, -1), rtol=1e-5, atol=1e-5)


def test_dense_weights_give_the_same_and_go_again() -> None:
    option = Option(3, 32)
    layer = PackedLinear(64, 24, bias=True, format=Integer(), format_name="integer", option=option)
    weight, format = torch.randn(24, 64), Integer()
    grid = format.fit(weight[None], option)
    packed = format.pack(grid.finish(grid.round(weight.T[None], slice(None))[0]), option)
    layer.load_state_dict({**packed, "bias": torch.randn(24)})
    layer.select_backend("reference")
    x = torch.randn(2, 5, 64)
    expected = layer(x)
    with dense_weights(nn.Sequential(layer)):
        assert "forward" in vars(layer)
        assert torch.allclose(layer(x), expected, atol=1e-5)
    assert "forward" not in vars(layer)


def test_inputs_are_quantized_where_that_is_asked_for() -> None:
    activation = BlockScaled(bits=3, group_size=16)
    layer, dense = make(Option(4, 64), activation=activation)
    x = torch.randn(2, 3, 80, requires_grad=True)
    expected = nn.functional.linear(activation.quantize(x), dense, layer.bias)
    assert not torch.allclose(layer(x), nn.functional.linear(x, dense, layer.bias), atol=1e-2)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    with dense_weights(nn.Sequential(layer)):
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, dense.sum(0).expand(2, 3, -1), rtol=1e-5, atol=1e-5)
    assert "activation=BlockScaled(bits=3" in repr(layer)


@pytest.mark.parametrize("activation", [None, BlockScaled(bits=3, group_size=16)], ids=["plain", "quantized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_come_in_the_basis_that_the_weight_is_stored_in(
    dtype: torch.dtype, activation: BlockScaled | None
) -> None:
    transform = Hadamard(seed=2)
    layer, stored = make(Option(4, 64), activation=activation, transform=transform)
    layer.to(dtype)
    x = torch.randn(2, 3, 80).to(dtype)
    turned = transform.apply(x)
    given = turned if activation is None else activation.quantize(turned)
    expected = nn.functional.linear(given, stored.to(dtype), layer.bias)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 0.1}
    torch.testing.assert_close(layer(x), expected, **close)
    with dense_weights(nn.Sequential(layer)):
        torch.testing.assert_close(layer(x), expected, **close)
    assert torch.equal(layer.stored(), stored)
    torch.testing.assert_close(transform.apply(layer.dense()), stored)
    assert "transform=Hadamard(seed=2)" in repr(layer)


def test_a_width_that_cannot_be_transformed_is_refused() -> None:
    with pytest.raises(AptqError, match="odd factor 4099"):
        make(Option(4, 64), shape=(2, 4099), transform=Hadamard())


def test_a_backend_that_knows_nothing_of_quantized_inputs_is_never_given_them() -> None:
    activation = BlockScaled()
    layer, _ = make(Option(4, 64), backend="auto", activation=activation)
    assert "backend=Reference" in repr(layer)
    with pytest.raises(
        AptqError, match=r"doubling cannot run .*inputs quantized by .*cannot quantize a layer's inputs"
    ):
        layer.select_backend("doubling", INSTALLED)
