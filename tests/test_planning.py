"""From measured layers to a plan."""

import pytest

from aptq.api import Option
from aptq.planning import with_unseen

LOW, HIGH = Option(2, 64), Option(4, 64)


def test_experts_that_saw_nothing_cost_what_others_of_their_kind_do(caplog: pytest.LogCaptureFixture) -> None:
    costs = {
        "model.layers.0.mlp.experts.0.up_proj": {LOW: 3.0, HIGH: 1.0},
        "model.layers.0.mlp.experts.1.up_proj": {LOW: 0.0, HIGH: 0.0},
        "model.layers.1.mlp.experts.0.up_proj": {LOW: 5.0, HIGH: 0.0},
        "model.layers.0.self_attn.q_proj": {LOW: 9.0, HIGH: 8.0},
    }
    found = with_unseen(costs)
    assert found["model.layers.0.mlp.experts.1.up_proj"] == {LOW: 4.0, HIGH: 0.5}
    assert {name: each for name, each in found.items() if "experts.1" not in name} == {
        name: each for name, each in costs.items() if "experts.1" not in name
    }
    assert "1 layers were fed no token" in caplog.text


def test_a_kind_that_saw_nothing_at_all_stays_as_it_is() -> None:
    assert with_unseen({"a": {LOW: 0.0}}) == {"a": {LOW: 0.0}}
    assert with_unseen({"a": {LOW: 1.0}}) == {"a": {LOW: 1.0}}
