"""The Plan: which option every layer gets, as a JSON file that a person can edit and run again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from aptq.api import Option
from aptq.errors import AptqError
from aptq.files import write_text

_VERSION = 1
_KEYS = ("version", "layers", "budget", "predicted_cost", "fused_groups")
_LAYER_KEYS = ("bits", "format", "group_size")
_OPTIONAL_LAYER_KEYS = ("cost",)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An option for every layer and where it came from.

    ``budget`` records the allocator's config, or the plan that was given, and the averages ``code_bits`` and
    ``storage_bits`` in bits per weight; ``predicted_cost`` is the sum of the metric's costs, or None when no metric
    ran; the layers of a fused group hold the same option.
    """

    layers: Mapping[str, Option]
    budget: Mapping[str, Any] = field(default_factory=dict)
    predicted_cost: float | None = None
    fused_groups: list[list[str]] = field(default_factory=list)
    layer_costs: Mapping[str, float] = field(default_factory=dict)  # the metric's cost of each layer; may be empty


def write_plan(path: Path, plan: Plan) -> None:
    """Write a plan as JSON, one line a layer."""
    lines = [f"    {json.dumps(name)}: {json.dumps(_entry(plan, name), allow_nan=False)}" for name in plan.layers]
    rest = {"budget": dict(plan.budget), "predicted_cost": plan.predicted_cost, "fused_groups": plan.fused_groups}
    entries = [f'  "{key}": {json.dumps(value, allow_nan=False)}' for key, value in rest.items()]
    head = [f'  "version": {_VERSION}', '  "layers": {\n' + ",\n".join(lines) + "\n  }"]
    write_text(path, "{\n" + ",\n".join(head + entries) + "\n}\n", "the plan")


def _entry(plan: Plan, name: str) -> dict[str, Any]:
    option = plan.layers[name]
    entry = {"bits": option.bits, "format": option.format, "group_size": option.group_size}
    return {**entry, "cost": plan.layer_costs[name]} if name in plan.layer_costs else entry


def read_plan(path: Path) -> Plan:
    """Read a plan that ``write_plan`` or a person wrote.

    Raises:
        AptqError: the file is missing, no JSON, of another version, or a layer's entry is wrong; says where and how.
    """
    data = _read_object(path)
    _known_keys(data, _KEYS, f"The plan {path}")
    if data.get("version") != _VERSION:
        raise AptqError(f"The plan {path} has version {data.get('version')!r}; this aptq reads version {_VERSION}.")
    layers = data.get("layers")
    if not isinstance(layers, dict) or not layers:
        raise AptqError(f'The plan {path} names no layers: "layers" must map layer names to {", ".join(_LAYER_KEYS)}.')
    options = {name: _read_layer(path, name, entry) for name, entry in layers.items()}
    budget, cost, groups = data.get("budget") or {}, data.get("predicted_cost"), data.get("fused_groups") or []
    if not isinstance(budget, dict) or not (cost is None or _is_number(cost)):
        raise AptqError(f'In the plan {path}, "budget" must be an object and "predicted_cost" a number or null.')
    if not isinstance(groups, list) or not all(isinstance(group, list) for group in groups):
        raise AptqError(f'In the plan {path}, "fused_groups" must be a list of lists of layer names.')
    costs = {name: entry["cost"] for name, entry in layers.items() if "cost" in entry}
    if not all(map(_is_number, costs.values())):
        raise AptqError(f'In the plan {path}, a layer\'s "cost" must be a number; leave it out where there is none.')
    return Plan(
        layers=options,
        budget=budget,
        predicted_cost=cost,
        fused_groups=groups,
        layer_costs=costs,
    )


def option_labels(options: Iterable[Option]) -> dict[Option, str]:
    """Return short names of options: their bits, and format and group size where those are not the same for all."""
    among = set(options)
    formats = len({option.format for option in among}) > 1
    groups = len({option.group_size for option in among}) > 1

    def label(option: Option) -> str:
        group = f", groups of {option.group_size}" if option.group_size > 0 else ", whole rows"
        return f"{option.bits} bits" + (f" {option.format}" if formats else "") + (group if groups else "")

    return {option: label(option) for option in sorted(among)}


def check_plan(plan: Plan, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Hold a plan against the layers of a model.

    Raises:
        AptqError: it names a layer that the model lacks, leaves one out, or splits one of its fused groups.
    """
    unknown = [name for name in plan.layers if name not in shapes]
    if unknown:
        near = get_close_matches(unknown[0], shapes, n=3)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise AptqError(f"The plan names {len(unknown)} layer(s) that the model has not: {_some(unknown)}.{hint}")
    missing = [name for name in shapes if name not in plan.layers]
    if missing:
        raise AptqError(
            f"The plan has no entry for {len(missing)} layer(s) of the model: {_some(missing)}. Add them to the plan, "
            "or keep them in full precision with model.skip=[...]."
        )
    for group in plan.fused_groups:
        strange = [name for name in group if name not in plan.layers]
        if strange:
            raise AptqError(f"A fused group of the plan names layers without an entry: {_some(strange)}.")
        if len({plan.layers[name] for name in group}) > 1:
            told = ", ".join(f"{name}: {_tell(plan.layers[name])}" for name in group)
            raise AptqError(
                f"The plan splits a fused group, whose layers are stored as one ({told}). Give them the same bits, "
                'format and group_size, or take the group out of "fused_groups" if no target needs it.'
            )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AptqError(f"There is no plan at {path}. A finished run has one: runs/<name>/<id>/plan.json.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise AptqError(f"The plan {path} cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        raise AptqError(
            f"The plan {path} is no JSON: {error.msg} in line {error.lineno}, column {error.colno}."
        ) from error
    if not isinstance(data, dict):
        raise AptqError(f"The plan {path} holds a {type(data).__name__}; it must be an object with {', '.join(_KEYS)}.")
    return data


def _read_layer(path: Path, name: str, entry: Any) -> Option:
    where = f"The plan {path}, layer {name!r}"
    if not isinstance(entry, dict):
        raise AptqError(f"{where}: got {entry!r}; it must be an object with {', '.join(_LAYER_KEYS)}.")
    _known_keys(entry, (*_LAYER_KEYS, *_OPTIONAL_LAYER_KEYS), where)
    missing = [key for key in _LAYER_KEYS if key not in entry]
    if missing:
        raise AptqError(f"{where}: {', '.join(missing)} missing.")
    bits, group_size, format_name = entry["bits"], entry["group_size"], entry["format"]
    if not _is_int(bits) or bits < 1:
        raise AptqError(f"{where}: bits is {bits!r}; it must be a whole number from 1 up.")
    if not _is_int(group_size) or (group_size < 1 and group_size != -1):
        raise AptqError(
            f"{where}: group_size is {group_size!r}; it must be a whole number from 1 up, or -1 for one group a row."
        )
    if not isinstance(format_name, str):
        raise AptqError(f"{where}: format is {format_name!r}; it must be the name of a format.")
    return Option(bits, group_size, format_name)


def _known_keys(data: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in data:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise AptqError(f"{where}: unknown key {key!r}.{hint} Known: {', '.join(known)}.")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _tell(option: Option) -> str:
    return f"{option.bits} bits, {option.format}, group_size {option.group_size}"
