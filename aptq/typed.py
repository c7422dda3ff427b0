"""From plain config sections to typed arguments: names are checked, values are checked, errors are readable.

This stands between YAML and the dataclasses of components and settings. It knows what annotations mean
(``int``, ``float | None``, ``list[str]``, ``tuple[int, ...]``, ``Literal["a", "b"]``, nested dataclasses, ...) and
nothing about what is configured.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from aptq.errors import AptqError

__all__ = ["REQUIRED", "Key", "arguments", "convert", "keys_of", "nearest"]

REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Key:
    """One key that a component or a settings class takes; ``default`` is ``REQUIRED`` where there is none."""

    name: str
    annotation: Any
    default: Any = REQUIRED

    def __str__(self) -> str:
        """Return the key as in a list of keys: ``group_size=128`` or ``path (required)``."""
        return f"{self.name} (required)" if self.default is REQUIRED else f"{self.name}={_shown(self.default)}"


def keys_of(target: Callable[..., Any]) -> tuple[dict[str, Key], bool]:
    """Return the keys that a dataclass or callable takes by name, and whether it takes any other name too."""
    if dataclasses.is_dataclass(target):
        hints = get_type_hints(target)  # its fields' wherever they are declared, base classes included
    else:
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    parameters = inspect.signature(target).parameters.values()
    factories = {
        field.name: field.default_factory
        for field in (dataclasses.fields(target) if dataclasses.is_dataclass(target) else ())
        if field.default_factory is not dataclasses.MISSING
    }
    keys = {
        each.name: Key(
            each.name,
            hints.get(each.name, Any),
            factories[each.name]() if each.name in factories else each.default,
        )
        for each in parameters
        if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
    }
    return keys, any(each.kind is each.VAR_KEYWORD for each in parameters)


def arguments(
    target: Callable[..., Any], section: Mapping[str, Any], where: str, given: Iterable[str] = ()
) -> dict[str, Any]:
    """Check a section of a config against what a dataclass or callable takes.

    Args:
        target: the dataclass or callable that the section is for.
        section: plain values by key.
        where: whose section it is, for messages: "format 'integer'".
        given: names that the caller passes itself: no keys of the section.

    Returns:
        Keyword arguments, converted to the annotated types.

    Raises:
        AptqError: a key is unknown or missing, or a value has the wrong type.
    """
    keys, open_ended = keys_of(target)
    keys = {name: key for name, key in keys.items() if name not in set(given)}
    listing = f"Its keys: {', '.join(map(str, keys.values())) or 'none'}."
    result = {}
    for name, value in section.items():
        if name in keys:
            result[name] = convert(value, keys[name].annotation, f"{where}: {name}")
        elif open_ended and name not in given:
            result[name] = value
        else:
            raise AptqError(f"{where} has no key {name!r}.{nearest(name, keys)} {listing}")
    missing = [name for name, key in keys.items() if key.default is REQUIRED and name not in result]
    if missing:
        raise AptqError(f"{where} needs a value for {' and '.join(map(repr, missing))}. {listing}")
    return result


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest known name, or nothing when none is close."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def convert(value: Any, annotation: Any, where: str) -> Any:
    """Return a plain value as the annotated type; whole numbers pass as floats, lists as tuples, text as paths.

    Raises:
        AptqError: the value is none of what the annotation allows; the message begins with ``where``.
    """
    try:
        return _convert(value, annotation)
    except _Mismatch as mismatch:
        problem = "is missing" if value == "???" else f"cannot be {_shown(value)} ({type(value).__name__})"
        inside = f" (at {mismatch})" if str(mismatch) else ""
        raise AptqError(f"{where} {problem}{inside}. It has to be {_spoken(annotation)}.") from None


class _Mismatch(Exception):
    """A value does not fit; the text says where inside it."""


def _convert(value: Any, annotation: Any) -> Any:
    origin = get_origin(annotation)
    if annotation is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, get_args(annotation))
    if origin is Literal:
        return _accept(value, any(value == each and type(value) is type(each) for each in get_args(annotation)))
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type) and isinstance(value, Mapping):
        return annotation(**arguments(annotation, value, annotation.__name__))
    kind = origin or annotation
    if kind in (list, tuple, Sequence):
        return _convert_items(value, kind, get_args(annotation))
    if kind in (dict, Mapping):
        return _convert_mapping(value, get_args(annotation) or (Any, Any))
    return _convert_scalar(value, kind)


def _convert_scalar(value: Any, kind: Any) -> Any:
    number = isinstance(value, int) and not isinstance(value, bool)
    if kind is int:
        return _accept(value, number)
    if kind is float:
        return float(_accept(value, number or isinstance(value, float)))
    if kind is str:  # a name or a revision of digits only reaches us as a number
        return str(_accept(value, number or isinstance(value, str)))
    if kind is Path:
        return Path(_accept(value, isinstance(value, str | Path)))
    if kind in (None, type(None)):
        return _accept(value, value is None)
    return _accept(value, isinstance(kind, type) and isinstance(value, kind))


def _convert_union(value: Any, members: tuple[Any, ...]) -> Any:
    exact = [each for each in members if isinstance(each, type) and type(value) is each]
    for member in (*exact, *members):
        try:
            return _convert(value, member)
        except _Mismatch:
            continue
    raise _Mismatch


def _convert_items(value: Any, kind: Any, inner: tuple[Any, ...]) -> Any:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise _Mismatch
    if kind is tuple and inner and inner[-1] is not Ellipsis:
        _accept(value, len(value) == len(inner))
        annotations: Sequence[Any] = inner
    else:
        annotations = [inner[0] if inner else Any] * len(value)
    items = []
    for index, (item, annotation) in enumerate(zip(value, annotations, strict=True)):
        try:
            items.append(_convert(item, annotation))
        except _Mismatch:
            raise _Mismatch(f"[{index}]") from None
    return list(items) if kind is list else tuple(items)


def _convert_mapping(value: Any, inner: tuple[Any, ...]) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise _Mismatch
    result = {}
    for name, item in value.items():
        try:
            result[_convert(name, inner[0])] = _convert(item, inner[1])
        except _Mismatch:
            raise _Mismatch(f"key {name!r}") from None
    return result


def _accept(value: Any, accepted: bool) -> Any:
    if not accepted:
        raise _Mismatch
    return value


def _shown(value: Any) -> str:
    """Write a value as YAML would have it, where that is short."""
    return (
        {True: "true", False: "false", None: "null"}[value]
        if value is None or value is True or value is False
        else repr(value)
    )


def _spoken(annotation: Any) -> str:
    """Say an annotation in the words of a config's author."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_spoken(each) for each in inner)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, inner))
    if (origin or annotation) in (list, tuple, Sequence):
        return "a list" + (
            f" of: {', '.join(_spoken(each) for each in inner if each is not Ellipsis)}" if inner else ""
        )
    if (origin or annotation) in (dict, Mapping):
        return "a mapping" + (f" to: {_spoken(inner[1])}" if inner and inner[1] is not Any else "")
    words = {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
        type(None): "null",
        Path: "a path",
    }
    return words.get(annotation, getattr(annotation, "__name__", str(annotation)))
