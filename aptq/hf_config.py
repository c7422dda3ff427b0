"""What ``config.json`` says of a native checkpoint: format, and the option of every packed layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from aptq.api import AptqError, Option, StoredEmbedding

METHOD = "aptq"
"""The ``quant_method`` of checkpoints."""

_VERSION = 1  # of the checkpoint; raised when an older aptq could not read it


class AptqConfig(QuantizationConfigMixin):
    """``quantization_config`` of a native checkpoint.

    Args:
        format: name and options of the format, as in the config group ``format``.
        layers: ``{layer: {"bits": int, "group_size": int}}`` for every packed layer, by its name in the model; and
            "format" where ``format`` is several (``aptq.api.FormatSet``).
        version: of the checkpoint's layout.
        provenance: how the checkpoint was made; free-form, JSON.
        activation: name and options of what quantizes the packed layers' inputs; none by default.
        transform: name and options of the basis that the layers are stored in; the model's own by default.
        embedding: the input embedding, where it is packed: ``{"name", "bits", "group_size", "format"}`` with the name
            and options of its format, and perhaps the "scale" of its rows and the name of the "head" tied to it.
        backend: what multiplies the packed layers, a name or a mapping with name and options; never stored.

    Raises:
        AptqError: when the entry is malformed or was written by a newer release.
    """

    quant_method: str  # type: ignore[assignment]  # transformers takes plain strings for registered methods

    def __init__(
        self,
        format: Mapping[str, Any],
        layers: Mapping[str, Mapping[str, Any]],
        *,
        version: int = _VERSION,
        provenance: Mapping[str, Any] | None = None,
        activation: Mapping[str, Any] | None = None,
        transform: Mapping[str, Any] | None = None,
        embedding: Mapping[str, Any] | None = None,
        backend: str | Mapping[str, Any] = "auto",
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if quant_method != METHOD:
            raise AptqError(f"quant_method is {quant_method!r}, not {METHOD!r}: this is no checkpoint of aptq.")
        if not isinstance(version, int) or not 1 <= version <= _VERSION:
            raise AptqError(
                f"The checkpoint has version {version!r}; this aptq reads versions 1 to {_VERSION}. Upgrade aptq."
            )
        if unknown:
            raise AptqError(f"quantization_config has keys that aptq does not know: {', '.join(sorted(unknown))}.")
        for key, section in {"format": format, "activation": activation, "transform": transform}.items():
            if section is None and key != "format":
                continue
            if not isinstance(section, Mapping) or not isinstance(section.get("name"), str):
                raise AptqError(f"quantization_config.{key} must be a mapping with a name; got {section!r}.")
        self.quant_method = quant_method
        self.version = version
        self.format = dict(format)
        self.layers = {name: dict(option) for name, option in layers.items()}
        self.provenance = dict(provenance or {})
        self.activation = None if activation is None else dict(activation)
        self.transform = None if transform is None else dict(transform)
        self.embedding = None if embedding is None else dict(embedding)
        self.backend = backend
        self.options()
        self.stored_embedding()

    def options(self) -> dict[str, Option]:
        """Return the option of every packed layer."""
        options = {}
        for name, entry in self.layers.items():
            full = {"format": self.format["name"], **entry}
            if {key: type(value) for key, value in full.items()} != {"bits": int, "group_size": int, "format": str}:
                raise AptqError(
                    f"quantization_config.layers[{name!r}] must be {{'bits': int, 'group_size': int}}, with 'format' "
                    f"where there are several; got {entry!r}."
                )
            options[name] = Option(**full)
        return options

    def stored_embedding(self) -> StoredEmbedding | None:
        """Return how the input embedding is packed, if it is."""
        if self.embedding is None:
            return None
        entry: dict[str, Any] = {"scale": None, "head": None, **self.embedding}
        kinds: dict[str, tuple[type, ...]] = {"name": (str,), "bits": (int,), "group_size": (int,), "format": (dict,)}
        kinds |= {"scale": (float, type(None)), "head": (str, type(None))}
        fits = entry.keys() == kinds.keys() and all(isinstance(entry[key], kind) for key, kind in kinds.items())
        if not fits or not isinstance(entry["format"].get("name"), str):
            raise AptqError(
                "quantization_config.embedding must have name, bits, group_size and format, a mapping with a name, and "
                f"perhaps scale and head; got {self.embedding!r}."
            )
        return StoredEmbedding(
            name=entry["name"],
            option=Option(entry["bits"], entry["group_size"], entry["format"]["name"]),
            format_config=entry["format"],
            scale=entry["scale"],
            head=entry["head"],
        )

    @classmethod
    def from_plan(
        cls,
        plan: Mapping[str, Option],
        format_config: Mapping[str, Any],
        provenance: Mapping[str, Any],
        activation_config: Mapping[str, Any] | None = None,
        transform_config: Mapping[str, Any] | None = None,
        embedding: StoredEmbedding | None = None,
    ) -> AptqConfig:
        """Make the entry for a finished quantization."""
        only = ("", format_config["name"])
        layers = {
            name: {"bits": option.bits, "group_size": option.group_size}
            | ({} if option.format in only else {"format": option.format})
            for name, option in plan.items()
        }
        return cls(
            format_config,
            layers,
            provenance=provenance,
            activation=activation_config,
            transform=transform_config,
            embedding=None if embedding is None else _embedding_entry(embedding),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what ``config.json`` stores."""
        optional = ("activation", "transform", "embedding")
        left_out = {"backend", *(name for name in optional if getattr(self, name) is None)}
        return copy.deepcopy({name: value for name, value in vars(self).items() if name not in left_out})


def _embedding_entry(embedding: StoredEmbedding) -> dict[str, Any]:
    entry = {
        "name": embedding.name,
        "bits": embedding.option.bits,
        "group_size": embedding.option.group_size,
        "format": dict(embedding.format_config),
        "scale": embedding.scale,
        "head": embedding.head,
    }
    return {key: value for key, value in entry.items() if value is not None}
