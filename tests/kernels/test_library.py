"""Kernels for those who can do without."""

import pytest
import torch

from aptq.errors import AptqError
from aptq.kernels.cpu import kernels_for, library
from aptq.transforms.hadamard import Hadamard


def test_where_they_cannot_be_built_the_log_says_why_and_who_does_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.randn(3, 96)
    expected = Hadamard().apply(x)

    def refuse(architecture: str, folder: str) -> None:
        raise AptqError("no C++ compiler is on the PATH")

    monkeypatch.setattr(library, "load_kernels", refuse)
    kernels_for.cache_clear()
    try:
        torch.testing.assert_close(Hadamard().apply(x), expected)
        Hadamard().apply(x)
    finally:
        kernels_for.cache_clear()
    assert caplog.text.count("transform=hadamard does without its kernel, and is slower: no C++ compiler") == 1
