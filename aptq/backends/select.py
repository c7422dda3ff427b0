"""Choose the backend of a layer, keeping the reasons of those that refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aptq import registry
from aptq.api import ActivationBackend, AptqError, Backend, LayerSpec


@dataclass(frozen=True, eq=False, kw_only=True)
class Choice:
    """The backend of a layer."""

    name: str
    backend: Backend
    refusals: Mapping[str, str]  # by name, why those that were asked before did not take it


def installed_backends() -> tuple[dict[str, Backend], dict[str, str]]:
    """Return every installed backend by name, and why the others could not be made."""
    backends: dict[str, Backend] = {}
    broken: dict[str, str] = {}
    for name in registry.available("backend"):
        try:
            backends[name] = registry.build("backend", {"name": name})
        except AptqError as error:
            broken[name] = str(error)
    return backends, broken


def choose_backend(
    spec: LayerSpec, backend: str | Mapping[str, Any] = "auto", installed: Mapping[str, Backend] | None = None
) -> Choice:
    """Return the backend for a layer, and why others refused it.

    Args:
        spec: what the layer needs.
        backend: one backend's name, or a mapping with its name and options; or "auto" for the first that accepts,
            highest priority first.
        installed: backends to choose from; default: all that are installed.

    Raises:
        AptqError: when the named backend refuses or is not installed, or when every backend refuses.
    """
    refusals: dict[str, str] = {}
    if installed is None:
        installed, refusals = installed_backends()
    config = {"name": backend} if isinstance(backend, str) else backend
    name = str(config.get("name"))
    if name != "auto" and (name not in installed or len(config) > 1):
        # Of one that is unknown or broken, the registry says which it is, and what to do.
        installed = {**installed, name: registry.build("backend", config)}
    ranked = sorted(installed.items(), key=lambda item: (-item[1].priority, item[0]))
    for candidate, ready in ranked:
        reason = _ignores_activations(ready, spec) or ready.refuses(spec)
        if reason is not None:
            refusals[candidate] = reason
        elif name in ("auto", candidate):
            return Choice(name=candidate, backend=ready, refusals=refusals)
    raise AptqError(_message(spec, name, refusals))


def _ignores_activations(backend: Backend, spec: LayerSpec) -> str | None:
    """Return the refusal of a backend that would take inputs as they are where they have to be quantized."""
    takes = isinstance(backend, ActivationBackend) and backend.quantizes_activations
    return None if spec.activation is None or takes else "cannot quantize a layer's inputs"


def _message(spec: LayerSpec, name: str, refusals: Mapping[str, str]) -> str:
    """Say what was asked, and every refusal."""
    layer = (
        f"a layer [{spec.out_features}, {spec.in_features}] of format {spec.format_name}, {spec.option.bits} bits, "
        f"group size {spec.option.group_size}, {spec.dtype} on {spec.device}"
        f"{'' if spec.activation is None else f', inputs quantized by {spec.activation}'}"
    )
    others = "; ".join(f"{other}: {why}" for other, why in refusals.items() if other != name)
    if name == "auto":
        return f"No backend can run {layer}. Refusals: {others or 'none, no backend is installed'}."
    also = f" Others refuse too: {others}." if others else ""
    return f"Backend {name} cannot run {layer}: {refusals[name]}.{also} Use backend=auto to take the best that can."
