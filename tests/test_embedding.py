"""A packed embedding by itself, and the head that is tied to it."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from aptq.api import AptqError, Option
from aptq.calibration.embedding import TableCoding, round_table
from aptq.embedding import PackedEmbedding
from aptq.formats.float import Float
from aptq.formats.integer import Integer
from aptq.layer import PackedLinear, dense_weights
from aptq.quantizers.nearest import Nearest

FORMAT = Integer(group_size=32)


def make(
    option: Option, shape: tuple[int, int] = (75, 72), dtype: torch.dtype | None = None, scale: float | None = None
) -> tuple[PackedEmbedding, Tensor]:
    """Return an embedding of a random table, and the table that it stands for."""
    table = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    coding = TableCoding(format=FORMAT, option=option, config={"name": "integer"}, quantizer=Nearest())
    how = {"format": FORMAT, "format_name": "integer", "option": option, "dtype": dtype}
    embedding = PackedEmbedding(*shape, scale=scale, **how)  # type: ignore[arg-type]
    embedding.load_state_dict(round_table(table, coding, None, torch.device("cpu")))
    return embedding, embedding.stored()


def tied(embedding: PackedEmbedding, backend: str = "auto", *, bias: bool = False) -> PackedLinear:
    head = PackedLinear(
        embedding.embedding_dim,
        embedding.num_embeddings,
        bias=bias,
        format=FORMAT,
        format_name="integer",
        option=embedding.option,
        dtype=embedding.dtype,
        holder=embedding,
    )
    head.select_backend(backend)
    return head


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(64, 64), (75, 72), (33, 7), (1, 32), (300, 96)], ids=str)
@pytest.mark.parametrize("group_size", [32, -1])
def test_rows_are_those_of_the_dequantized_table(bits: int, shape: tuple[int, int], group_size: int) -> None:
    embedding, table = make(Option(bits, group_size), shape)
    ids = torch.randint(shape[0], (3, 5), generator=torch.Generator().manual_seed(1))
    assert torch.equal(embedding(ids), table[ids])
    assert torch.equal(embedding(torch.arange(shape[0])), table)
    assert embedding(ids[:0]).shape == (0, 5, shape[1])
    assert torch.equal(embedding(ids[0, 0]), table[ids[0, 0]])


def test_eight_bits_are_near_and_two_are_not() -> None:
    original = torch.randn(75, 72, generator=torch.Generator().manual_seed(0))
    errors = [float((make(Option(bits, 32))[1] - original).norm() / original.norm()) for bits in (8, 4, 2)]
    assert errors[0] < 0.006 < errors[1] < 0.12 < errors[2] < 0.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_come_in_the_dtype_of_the_model_and_scaled_as_its_own_would(dtype: torch.dtype) -> None:
    embedding, table = make(Option(8, 32), dtype=dtype, scale=24.1)
    ids = torch.tensor([[3, 3, 74]])
    expected = table[ids].to(dtype) * torch.tensor(24.1).to(dtype)
    assert embedding(ids).dtype == dtype
    assert torch.equal(embedding(ids), expected)
    assert "scale=24.1" in repr(embedding)


def test_an_embedding_holds_the_packed_tensors_and_nothing_else() -> None:
    embedding, _ = make(Option(5, 32), (96, 64))
    codes, scales, zeros = 96 * 64 * 5 // 8, 96 * 2 * 2, 96 * 2 * 5 // 8
    held = [*embedding.parameters(), *embedding.buffers()]
    assert sum(each.numel() * each.element_size() for each in held) == codes + scales + zeros
    embedding(torch.tensor([1, 2]))
    assert len([*embedding.parameters(), *embedding.buffers()]) == len(held)


@pytest.mark.parametrize("wrong", [75, -76])
def test_a_token_that_is_none_is_an_error(wrong: int) -> None:
    embedding, _ = make(Option(4, 32))
    with pytest.raises((IndexError, RuntimeError)):
        embedding(torch.tensor([wrong]))


def test_formats_that_cannot_unpack_rows_are_refused() -> None:
    with pytest.raises(AptqError, match="cannot unpack single rows"):
        PackedEmbedding(8, 32, format=Float(), format_name="float", option=Option(4, 32))


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_a_tied_head_multiplies_by_the_same_tensors(backend: str, bits: int) -> None:
    embedding, table = make(Option(bits, 32))
    head = tied(embedding, backend, bias=True)
    nn.init.normal_(head.bias)
    x = torch.randn(2, 3, 72)
    torch.testing.assert_close(head(x), nn.functional.linear(x, table, head.bias), rtol=1e-4, atol=1e-4)
    assert all(head.packed()[name] is tensor for name, tensor in embedding.packed().items())
    assert list(head.state_dict()) == ["bias"]
    assert not list(head.buffers())
    with dense_weights(head):
        torch.testing.assert_close(head(x), nn.functional.linear(x, table, head.bias), rtol=1e-4, atol=1e-4)


def test_the_tie_outlives_casts_copies_and_files() -> None:
    embedding, table = make(Option(8, 32))
    for order in (("embedding", "head"), ("head", "embedding")):
        parts = {"embedding": embedding, "head": tied(embedding)}
        model = nn.ModuleDict({name: parts[name] for name in order})
        copied = copy.deepcopy(model).to(torch.bfloat16)
        file = io.BytesIO()
        torch.save(copied, file)
        file.seek(0)
        for each in (copied, torch.load(file, weights_only=False)):
            assert each["head"].holder is each["embedding"]
            assert each["embedding"] is not embedding
            assert each["embedding"].scales.dtype == torch.float16
            assert each["embedding"](torch.tensor([4])).dtype == torch.bfloat16
            x = torch.randn(3, 72).to(torch.bfloat16)
            assert each["head"](x).dtype == torch.bfloat16
            torch.testing.assert_close(each["head"](x).float(), x.float() @ table.T, rtol=0.05, atol=0.1)
        assert list(model.state_dict()) == [f"embedding.{name}" for name in embedding.packed_names]


def test_a_tied_head_follows_the_embedding_to_another_device() -> None:
    """Here to ``meta``, where shapes are all there is."""
    embedding, _ = make(Option(8, 32))
    head = tied(embedding, "reference")
    embedding.to("meta")
    assert head(torch.empty(2, 72, device="meta")).shape == (2, 75)
    assert head.choice is not None
    assert head._spec.device.type == "meta"


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_embedding_and_tied_head_trace_as_one_graph() -> None:
    embedding, _ = make(Option(3, 32))
    model = nn.Sequential(embedding, tied(embedding))
    ids = torch.tensor([[1, 2, 70]])
    with torch.no_grad():
        assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(ids), model(ids))
