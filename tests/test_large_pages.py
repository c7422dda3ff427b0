from __future__ import annotations

import gc
import mmap

import pytest
import torch

from aptq.large_pages import LargePages


def test_copies_lie_in_one_memory_and_outlive_it() -> None:
    tensors = [torch.arange(7, dtype=torch.int32), torch.randn(3, 5).half(), torch.empty(0), torch.tensor(2.5)]
    memory = LargePages(tensor.nbytes for tensor in tensors)
    copies = [memory.copy(tensor) for tensor in tensors]
    del memory
    gc.collect()
    for copy, tensor in zip(copies, tensors, strict=True):
        assert torch.equal(copy, tensor)
        assert copy.dtype == tensor.dtype
        assert copy.is_contiguous()
        assert copy.data_ptr() % 64 == 0 or copy.numel() == 0
    assert len({copy.untyped_storage().data_ptr() for copy in copies}) == 1


def test_what_is_not_contiguous_becomes_so() -> None:
    tensor = torch.randn(4, 6).T
    copy = LargePages([tensor.nbytes]).copy(tensor)
    assert torch.equal(copy, tensor)
    assert copy.is_contiguous()


def test_a_system_without_large_pages_gives_memory_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    tensor = torch.randn(9)
    assert torch.equal(LargePages([tensor.nbytes]).copy(tensor), tensor)
