"""Which backends multiply the layers of a loaded model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from aptq.api import LayerSpec, Option
from aptq.backends.reference import Reference
from aptq.chosen_backends import chosen_backends
from aptq.metrics_schema import check_metrics
from tests.backends.specs import FORMATS, layer_of
from tests.test_metrics_schema import METRICS


@dataclass(frozen=True)
class Narrow(Reference):
    """A backend for layers of 3 bits and few inputs."""

    priority: int = 7  # type: ignore[misc]

    def refuses(self, spec: LayerSpec) -> str | None:
        if spec.option.bits != 3:
            return f"it takes 3 bits, not {spec.option.bits}"
        return None if spec.in_features < 100 else "too many inputs"


def test_layers_are_counted_by_backend_with_the_reasons_of_those_before() -> None:
    installed = {"narrow": Narrow(), "reference": Reference()}
    layers = [
        layer_of(FORMATS["integer"], option, shape)[0]
        for option, shape in (
            (Option(4, 64, "integer"), (32, 64)),
            (Option(3, 64, "integer"), (32, 64)),
            (Option(4, 64, "integer"), (32, 64)),
            (Option(3, 32, "integer"), (32, 128)),
        )
    ]
    for layer in layers:
        layer.select_backend("auto", installed)
    unchosen, _ = layer_of(FORMATS["integer"], Option(8, 64, "integer"))
    found = chosen_backends(nn.Sequential(*layers, unchosen, nn.Linear(2, 2)))
    assert found == [
        {
            "backend": "reference",
            "layers": 3,
            "options": [
                {"format": "integer", "bits": 3, "group_size": 32, "layers": 1},
                {"format": "integer", "bits": 4, "group_size": 64, "layers": 2},
            ],
            "refusals": {"narrow": ["it takes 3 bits, not 4", "too many inputs"]},
        },
        {
            "backend": "narrow",
            "layers": 1,
            "options": [{"format": "integer", "bits": 3, "group_size": 64, "layers": 1}],
            "refusals": {},
        },
    ]
    check_metrics(METRICS | {"backends": found})


def test_a_model_without_packed_layers_has_none() -> None:
    assert chosen_backends(nn.Linear(2, 2)) == []
