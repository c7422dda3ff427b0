"""The basis that layers are stored in: as the config says or, by ``transform=auto``, as suits format and exporters."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from aptq.api import AptqError, Exporter, Format, TransformExporter, TransformFormat

_log = logging.getLogger(__name__)
_AUTO = "auto"


def chosen_transform(section: Mapping[str, Any], format: Format, exporters: Mapping[str, Exporter]) -> dict[str, Any]:
    """Return the config of the transform, empty for none.

    ``{"name": "auto", "prefer": {...}}`` is the preferred one where the format gains by it and every exporter can store
    it, and none elsewhere; any other config is what it is.

    Raises:
        AptqError: auto without a preferred transform, or with other keys.
    """
    if section.get("name") != _AUTO:
        return dict(section)
    prefer = section.get("prefer")
    if not isinstance(prefer, Mapping) or set(section) != {"name", "prefer"}:
        raise AptqError(
            f"transform=auto has one key, transform.prefer, the transform it prefers; got {dict(section)}. For one of "
            "your choice: transform=hadamard."
        )
    if not (isinstance(format, TransformFormat) and format.gains_by_transforms):
        return {}  # nothing is lost by it
    for name, exporter in exporters.items():
        if not stores_transforms(exporter):
            _log.info("transform=%s is left out: exporter=%s cannot store it.", prefer.get("name"), name)
            return {}
    return dict(prefer)


def stores_transforms(exporter: Exporter) -> bool:
    """Return whether an exporter can say which basis layers are stored in."""
    return isinstance(exporter, TransformExporter) and exporter.stores_transforms
