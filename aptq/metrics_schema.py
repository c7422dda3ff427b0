"""The shape of ``metrics.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from aptq.api import STANDARD_ERROR
from aptq.errors import AptqError


def check_metrics(metrics: Mapping[str, Any]) -> None:
    """Hold metrics against the schema of ``metrics.json``.

    ``perplexity`` and ``baseline_perplexity`` map text names to figures (null: not finite), and other evaluators add
    mappings of their own, by text or task: ``acc``, its standard errors as ``acc_stderr``, the original's as
    ``baseline_acc`` and ``baseline_acc_stderr``. Optional are ``samples``, ``audit``, ``memory`` and ``backends`` (of
    ``aptq.chosen_backends``).

    Raises:
        AptqError: names every key that is missing or holds the wrong kind of value.
    """
    faults = [f"{key} is missing" for key in _SCHEMA if key not in metrics]
    for key, value in metrics.items():
        kind, fits = _SCHEMA.get(key) or _OPTIONAL.get(key) or _MEASURE
        if not fits(value):
            faults.append(f"{key} must be {kind}, got {value!r:.80}")
    if faults:
        raise AptqError(f"These are no metrics of a run: {'; '.join(faults)}.")


def measures(metrics: Mapping[str, Any]) -> list[str]:
    """Return the keys that are measures of the quantized model: figures by text or task, perplexity and others.

    Standard errors are none themselves.
    """
    others = {*_SCHEMA, *_OPTIONAL} - {"perplexity"}
    return [
        key
        for key, value in metrics.items()
        if isinstance(value, Mapping)
        and key not in others
        and not key.startswith("baseline_")
        and not (key.endswith(STANDARD_ERROR) and key.removesuffix(STANDARD_ERROR) in metrics)
    ]


Scored = dict[str, tuple[float | None, float | None]]
"""Figures by text or task, each with its standard error; None: not finite, or not known."""


def scored(metrics: Mapping[str, Any], measure: str, original: bool = False) -> Scored:
    """Return the figures of a measure, of the quantized model or of the original one; empty where it was not judged."""
    key = f"baseline_{measure}" if original else measure
    errors = metrics.get(f"{key}{STANDARD_ERROR}", {})
    return {name: (value, errors.get(name)) for name, value in metrics.get(key, {}).items()}


def finite(value: Any) -> Any:
    """Return a value as JSON can hold it: figures that are not finite as None."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and value - value != 0 else value


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _object(value: Any, fits: Callable[[Any], bool], *keys: str) -> bool:
    """Say whether a value is a mapping to values that fit, with exactly these keys where any are given."""
    return isinstance(value, Mapping) and all(map(fits, value.values())) and (not keys or set(value) == set(keys))


def _list(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(fits, value))


def _is_measure(value: Any) -> bool:
    return _object(value, lambda item: item is None or _number(item))


def _is_samples(value: Any) -> bool:
    keys = ("prompt", "original", "quantized")
    return _list(
        value,
        lambda item: (
            _object(item, lambda text: text is None or _text(text), *keys)
            and None not in (item["prompt"], item["quantized"])
        ),  # the original is not there where there is no baseline
    )


def _is_option(value: Any) -> bool:
    return _object(value, lambda item: _number(item) or _text(item), "format", "bits", "group_size", "layers")


def _is_backends(value: Any) -> bool:
    rules: dict[str, Callable[[Any], bool]] = {
        "backend": _text,
        "layers": _count,
        "options": lambda options: _list(options, _is_option),
        "refusals": lambda refusals: _object(refusals, lambda reasons: _list(reasons, _text)),
    }
    return _list(
        value,
        lambda item: _object(item, lambda _: True, *rules) and all(fits(item[key]) for key, fits in rules.items()),
    )


def _is_memory(value: Any) -> bool:
    keys = ("peak_rss_bytes", "peak_device_bytes")
    return isinstance(value, Mapping) and all(
        _object(each, lambda peak: peak is None or _count(peak), *keys) for each in value.values()
    )


_Rule = tuple[str, Callable[[Any], bool]]
_MEASURE: _Rule = ("an object of numbers by text or task", _is_measure)
_SCHEMA: dict[str, _Rule] = {
    "perplexity": _MEASURE,
    "baseline_perplexity": _MEASURE,
    "bits": ('{"code": number, "storage": number}', lambda value: _object(value, _number, "code", "storage")),
    "bytes": ('{"model": int, "original": int}', lambda value: _object(value, _count, "model", "original")),
    "seconds": ("an object of numbers by stage", lambda value: _object(value, _number)),
    "peak_rss_bytes": ("a whole number", _count),
    "peak_device_bytes": ("a whole number or null", lambda value: value is None or _count(value)),
    "versions": ("an object", lambda value: isinstance(value, Mapping)),
}
_OPTIONAL: dict[str, _Rule] = {
    "audit": ('{"spearman", "slope", "plans"}', lambda value: isinstance(value, Mapping)),
    "backends": ('a list of {"backend", "layers", "options", "refusals"}', _is_backends),
    "memory": ('{"peak_rss_bytes", "peak_device_bytes"} by stage', _is_memory),
    "samples": ('a list of {"prompt", "original", "quantized"}', _is_samples),
}
