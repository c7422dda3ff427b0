"""What the name of a layer tells."""

import pytest

from aptq.names import place


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.mlp.up_proj", (3, "mlp.up_proj")),
        ("transformer.h.11.attn.c_attn", (11, "attn.c_attn")),
        ("model.layers.0.mlp.experts.7.w1", (0, "mlp.experts.*.w1")),
        ("lm_head", (None, "lm_head")),
    ],
)
def test_depth_and_kind_are_read_from_names(name: str, expected: tuple[int | None, str]) -> None:
    assert place(name) == expected
