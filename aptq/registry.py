"""Find and build components by the names that installed packages give them.

A component is reached through an entry point in the group of its kind (``aptq.formats``, ``aptq.quantizers``, ...).
Built-ins are registered in this package's own pyproject.toml, exactly as a plug-in's are, so nothing here knows any.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal, cast

from aptq.config_errors import plain_section
from aptq.errors import AptqError
from aptq.typed import arguments, convert, keys_of, nearest

__all__ = ["GROUPS", "KINDS", "TASK", "Description", "available", "build", "describe", "installed", "load", "origin"]

CONTRACTS: Mapping[str, str] = {
    "hessian": "HessianEstimator",
    "metric": "SensitivityMetric",
    "allocator": "Allocator",
    "format": "Format",
    "quantizer": "Quantizer",
    "activation": "ActivationQuantizer",
    "transform": "Transform",
    "backend": "Backend",
    "exporter": "Exporter",
    "evaluator": "Evaluator",
    "callback": "Callback",
}
"""The protocols of ``aptq.api``, by name: who only asks what there is does not wait for torch."""

KINDS = (*CONTRACTS, "logger")

TASK = "task"
"""What a plug-in adds to the command line: ``run(config, on_open)``, for a primary config whose ``task`` names it.

``config`` is the composed config, and ``on_open(folder)`` begins the log in a run folder once that is ours.
"""

GROUPS = (*KINDS, TASK)
"""All that entry points can add."""

Status = Literal["installed", "ok", "error"]


@dataclass(frozen=True, kw_only=True)
class Description:
    """One installed component: where it comes from and, when asked for, whether it works."""

    kind: str
    name: str
    distribution: str
    version: str
    target: str
    status: Status
    problem: str = ""


def available(kind: str) -> dict[str, EntryPoint]:
    """Return the entry points of a kind by name, importing none of them.

    Of two with one name only the first is here; ``load`` refuses such a name.
    """
    found: dict[str, EntryPoint] = {}
    for point in _points(kind):
        found.setdefault(point.name, point)
    return found


def load(kind: str, name: str) -> Any:
    """Import the component that is registered under a name.

    Raises:
        AptqError: nobody registers the name, two distributions do, or its module cannot be imported.
    """
    points = [point for point in _points(kind) if point.name == name]
    if not points:
        known = sorted(available(kind))
        raise AptqError(f"Unknown {kind} {name!r}.{nearest(name, known)} Installed: {', '.join(known) or 'none'}.")
    if len(points) > 1:
        raise AptqError(
            f"{kind} {name!r} is registered more than once: by {' and by '.join(map(origin, points))}. "
            "Uninstall one of them, or rename it in its package."
        )
    try:
        return points[0].load()
    except Exception as error:
        raise AptqError(
            f"{kind} {name!r} from {origin(points[0])} cannot be imported: {type(error).__name__}: {error}. "
            "Repair or uninstall that package, or choose another name."
        ) from error


def build(kind: str, config: Mapping[str, Any], **runtime: Any) -> Any:
    """Build the component that ``config["name"]`` names.

    Args:
        kind: config group, such as "format".
        config: the name and the component's options, as in its YAML file.
        runtime: what the program itself passes, never part of a config.

    Raises:
        AptqError: no such component, an unknown key, a value of the wrong type or that the component refuses, or an
            object that does not have what its kind needs.
    """
    options: dict[str, Any] = plain_section(config, f"The config of the {kind}")
    if not isinstance(name := options.pop("name", None), str):
        raise AptqError(
            f"The config of the {kind} names none (name={name!r}). Installed: {', '.join(sorted(available(kind)))}."
        )
    target = load(kind, name)
    where = f"{kind} {name!r}"
    parts = _parts(target, options, where)
    taken = arguments(target, options, where, given={**runtime, **parts})
    try:
        component = target(**taken, **parts, **runtime)
    except AptqError:
        raise
    except ValueError as error:
        raise AptqError(f"{where} refuses its options: {error}") from error
    except Exception as error:
        error.add_note(f"This happened in {where} from {origin(available(kind)[name])}.")
        raise
    if problem := _broken_contract(kind, component):
        raise AptqError(f"{where} from {origin(available(kind)[name])} is no {kind}: {problem}.")
    return component


def _parts(target: Any, options: dict[str, Any], where: str) -> dict[str, Any]:
    """Take out the options that are components themselves (``Format``, ``Mapping[str, Format]``); return them built."""
    parts: dict[str, Any] = {}
    for key in keys_of(target)[0].values():
        for kind in CONTRACTS:
            contract = _contract(kind)
            if key.name not in options or key.annotation not in (contract, Mapping[str, contract]):  # type: ignore[valid-type]
                continue
            section, told = options.pop(key.name), f"{where}: {key.name}"
            if key.annotation is contract:
                parts[key.name] = build(kind, convert(section, Mapping[str, Any], told))
            else:
                sections = convert(section, Mapping[str, Mapping[str, Any]], told)
                parts[key.name] = {name: build(kind, each) for name, each in sections.items()}
    return parts


def origin(point: EntryPoint) -> str:
    """Name the distribution, its version and the object of an entry point: "aptq 0.1.0 (aptq.x:X)"."""
    return f"{point.dist.name} {point.dist.version} ({point.value})" if point.dist else point.value


def describe(*, check: bool = False) -> list[Description]:
    """List all installed components, in the order of ``KINDS`` and by name, and the tasks of plug-ins.

    Args:
        check: import each and see that it has what its kind needs; failures are in ``problem``, never raised.
    """
    return [_describe(kind, point, check) for kind in GROUPS for point in sorted(_points(kind), key=lambda p: p.name)]


def _describe(kind: str, point: EntryPoint, check: bool) -> Description:
    problem = ""
    try:
        if [other.name for other in _points(kind)].count(point.name) > 1 or check:
            problem = _broken_contract(kind, load(kind, point.name))
    except AptqError as error:
        problem = str(error)
    return Description(
        kind=kind,
        name=point.name,
        distribution=point.dist.name if point.dist else "unknown",
        version=point.dist.version if point.dist else "unknown",
        target=point.value,
        status="error" if problem else "ok" if check else "installed",
        problem=problem,
    )


def _points(kind: str) -> list[EntryPoint]:
    if kind not in GROUPS:
        raise AptqError(f"There is no kind of component {kind!r}.{nearest(kind, KINDS)} Kinds: {', '.join(KINDS)}.")
    return installed(f"aptq.{kind}s")


def installed(group: str) -> list[EntryPoint]:
    """Return the entry points of a group."""
    return list(_read(tuple((place, _changed(place)) for place in sys.path)).select(group=group))


@lru_cache(maxsize=1)
def _read(places: tuple[tuple[str, int], ...]) -> Any:
    """Read what all packages register, again only where a folder of them changed: it opens the files of every one."""
    return entry_points()


def _changed(place: str) -> int:
    try:
        return Path(place).stat().st_mtime_ns
    except OSError:
        return 0


def _broken_contract(kind: str, component: Any) -> str:
    """Say what a component, or the class of one, lacks of its kind's protocol; "" when it lacks nothing."""
    if kind not in CONTRACTS or (inspect.isroutine(component) and not inspect.isclass(component)):
        return ""
    contract = _contract(kind)
    fields = getattr(component, "__dataclass_fields__", {})
    missing = [name for name in _members(contract) if not hasattr(component, name) and name not in fields]
    if missing:
        return f"it has no {' and no '.join(map(repr, missing))} (see aptq.api.{contract.__name__})"
    plain = [
        name
        for name in _members(contract)
        if inspect.isfunction(getattr(contract, name, None)) and not callable(getattr(component, name))
    ]
    if plain:
        return f"{' and '.join(map(repr, plain))} cannot be called (see aptq.api.{contract.__name__})"
    hooks = [name for name in dir(component) if name.startswith("on_")] if kind == "callback" else []
    for name in hooks:
        if name not in (known := list(_members(contract))):
            return f"there is no event {name!r}.{nearest(name, known)} Events: {', '.join(known)}"
    return ""


def _contract(kind: str) -> type:
    return cast(type, getattr(import_module("aptq.api"), CONTRACTS[kind]))


def _members(contract: type) -> Iterator[str]:
    yield from (name for name in inspect.get_annotations(contract) if not name.startswith("_"))
    yield from (name for name in vars(contract) if not name.startswith("_"))
