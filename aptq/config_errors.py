"""The edge to OmegaConf: plain values out of configs, and one clear sentence for what Hydra raises over them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from aptq.errors import AptqError
from aptq.typed import nearest

__all__ = ["explain_hydra_error", "plain_section"]


def explain_hydra_error(error: BaseException) -> str | None:
    """Say in one message what is wrong with a config, with the nearest names; None when it is no such error.

    ``quantizer=gptqq`` -> "Unknown quantizer 'gptqq'. Did you mean 'gptq'? Known: gptq, nearest."
    """
    chain = list(_causes(error))
    for each in chain:  # an error of ours inside a resolver
        if isinstance(each, AptqError):
            return str(each)
    for each in chain:
        if isinstance(each, MissingConfigException):
            return _missing_config(each)
        if isinstance(each, OverrideParseException):
            return _unreadable(each)
        if isinstance(each, MissingMandatoryValue):
            return f"{each.full_key or each.key} has no value. Give one: {each.full_key or each.key}=..."
        if isinstance(each, InterpolationKeyError | InterpolationResolutionError):
            name = each.full_key or "A value"
            return f"{name} in the config refers to something else, and that fails: {_first_line(each)}."
        if isinstance(each, ConfigKeyError | ConfigAttributeError) and isinstance(each.parent_node, DictConfig):
            return _unknown_key(each)
    if isinstance(error, ConfigCompositionException):
        return _composition(error)
    if isinstance(error, ValueError) and str(error).startswith("Config group override"):  # quantizer=3
        return (
            "A config group (model, data, format, quantizer, ...) is set to a name, and a number or null came instead."
        )
    if isinstance(error, HydraException | OmegaConfBaseException):
        return " ".join(str(error).split())
    return None


def plain_section(section: Any, where: str) -> dict[str, Any]:
    """Return a section of a config as plain values, references resolved.

    Raises:
        AptqError: it is no mapping, a value is missing, or a reference leads nowhere.
    """
    try:
        plain = (
            OmegaConf.to_container(section, resolve=True, throw_on_missing=True)
            if OmegaConf.is_config(section)
            else section
        )
    except OmegaConfBaseException as error:
        raise AptqError(explain_hydra_error(error) or f"{where} cannot be read: {error}") from error
    if not isinstance(plain, Mapping):
        raise AptqError(f"{where} has to be a mapping of keys to values, but {plain!r} came.")
    return {str(key): value for key, value in plain.items()}


def _causes(error: BaseException) -> Iterator[BaseException]:
    following: BaseException | None = error
    while following is not None:
        yield following
        following = following.__cause__


def _missing_config(error: MissingConfigException) -> str:
    missing = str(error.missing_cfg_file or "")
    group, _, name = missing.rpartition("/")
    if not group:
        return (
            f"There is no primary config {missing!r}. Choose one of those that come with aptq "
            "(quantize, evaluate, export, benchmark, report) or of an installed plug-in (aptq plugins), or give its "
            "folder with --config-dir."
        )
    known = sorted(str(option) for option in error.options or ())
    hint = nearest(name, known)
    return f"Unknown {group} {name!r}.{hint} Known: {', '.join(known) or 'none'}."


def _unreadable(error: OverrideParseException) -> str:
    reason = re.sub(r"^Error parsing override '.*?'", "", _first_line(error, lines=2), flags=re.DOTALL).strip()
    return (
        f"Cannot read {error.override!r}: {reason}. Overrides are written key=value; "
        "put quotes around a value with spaces, commas, brackets or equal signs: 'key=\"value\"'."
    )


def _unknown_key(error: ConfigKeyError | ConfigAttributeError) -> str:
    parent = error.parent_node
    assert isinstance(parent, DictConfig)
    key, full_key = str(error.key), str(error.full_key or error.key)
    section = full_key.rpartition(".")[0]
    if not section:
        keys = sorted(str(name) for name in parent if name != "hydra")
        return f"There is no section or option {key!r}.{nearest(key, keys)} There are: {', '.join(keys)}."
    if not len(parent):
        return f"{section} is a single value and has no {key!r}; write {section}=... instead."
    keys = [str(name) for name in parent]
    chosen = parent._get_node("name") if "name" in parent and "." not in section else None
    owner = f"{section} {chosen}" if chosen is not None and OmegaConf.is_missing(parent, "name") is False else section
    return f"{owner} has no key {key!r}.{nearest(key, keys)} Its keys: {', '.join(_listed(parent, keys))}."


def _listed(parent: DictConfig, keys: Iterable[str]) -> list[str]:
    return [key if OmegaConf.is_dict(parent._get_node(key)) else f"{key}={parent._get_node(key)}" for key in keys]


def _composition(error: ConfigCompositionException) -> str:
    text = " ".join(str(error).split())
    if causes := [" ".join(str(each).split()) for each in _causes(error) if each is not error]:
        return f"{text}: {causes[0]}" if text else causes[0]
    if match := re.search(r"Multiple values for (\S+?)\.", text):
        return f"{match[1]} is chosen twice. Write {match[1]}=... without a plus sign."
    return text


def _first_line(error: BaseException, lines: int = 1) -> str:
    return " ".join(line.strip() for line in str(error).splitlines()[:lines] if "https://" not in line).rstrip(".")
