"""The shape of metrics.json."""

from typing import Any

import pytest

from aptq.errors import AptqError
from aptq.metrics_schema import check_metrics, measures

METRICS: dict[str, Any] = {
    "perplexity": {"c4": 40.5},
    "baseline_perplexity": {"c4": 34.2},
    "bits": {"code": 3.5, "storage": 3.8},
    "bytes": {"model": 100, "original": 400},
    "seconds": {"quantize": 1.5},
    "peak_rss_bytes": 1000,
    "peak_device_bytes": None,
    "versions": {"aptq": "0.1.0"},
}


BACKENDS: list[dict[str, Any]] = [
    {
        "backend": "cpu",
        "layers": 3,
        "options": [{"format": "integer", "bits": 4, "group_size": 64, "layers": 3}],
        "refusals": {"triton": ["it runs on a CUDA device, not on cpu"]},
    }
]


def test_metrics_may_have_samples_an_audit_and_other_measures() -> None:
    samples = [{"prompt": "a", "original": original, "quantized": "c"} for original in ("b", None)]
    audit = {"spearman": 0.9, "slope": 1.0, "plans": 5}
    check_metrics(METRICS | {"samples": samples, "audit": audit, "accuracy": {"arc": 0.3}, "perplexity": {}})
    check_metrics(METRICS | {"backends": BACKENDS})
    check_metrics(METRICS | {"memory": {"quantize": {"peak_rss_bytes": 900, "peak_device_bytes": None}}})


def test_standard_errors_are_no_measures_but_other_names_that_end_so_are() -> None:
    scores = {
        "acc": {"a": 0.5},
        "acc_stderr": {"a": 0.1},
        "baseline_acc": {"a": 0.6},
        "baseline_acc_stderr": {"a": 0.1},
    }
    check_metrics(METRICS | scores)
    assert measures(METRICS | scores) == ["perplexity", "acc"]
    assert measures(METRICS | {"lone_stderr": {"a": 0.1}}) == ["perplexity", "lone_stderr"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"bits": {"code": 3.5}}, "bits must be"),
        ({"bits": {"code": 3.5, "storage": 4, "total": 1}}, "bits must be"),
        ({"bytes": {"model": 1.5, "original": 2}}, "bytes must be"),
        ({"seconds": 3}, "seconds must be"),
        ({"perplexity": {"c4": "low"}}, "perplexity must be"),
        ({"peak_rss_bytes": None}, "peak_rss_bytes must be"),
        ({"peak_device_bytes": -1}, "peak_device_bytes must be"),
        ({"samples": [{"prompt": "a"}]}, "samples must be"),
        ({"samples": [{"prompt": "a", "original": "b", "quantized": None}]}, "samples must be"),
        ({"backends": {"cpu": 3}}, "backends must be"),
        ({"backends": [{"backend": "cpu", "layers": 3}]}, "backends must be"),
        ({"backends": [BACKENDS[0] | {"refusals": {"triton": "no"}}]}, "backends must be"),
        ({"backends": [BACKENDS[0] | {"options": [{"bits": 4}]}]}, "backends must be"),
        ({"perplexities": 3}, "perplexities must be"),
    ],
)
def test_metrics_of_another_shape_are_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(AptqError, match=told):
        check_metrics(METRICS | change)


def test_missing_metrics_are_named() -> None:
    with pytest.raises(AptqError, match=r"perplexity is missing; .*versions is missing"):
        check_metrics({})


def test_measures_are_told_from_what_else_a_run_tells() -> None:
    metrics = {**METRICS, "accuracy": {"piqa": 0.7}, "baseline_accuracy": {"piqa": 0.8}, "memory": {}, "audit": {}}
    assert measures(metrics) == ["perplexity", "accuracy"]
