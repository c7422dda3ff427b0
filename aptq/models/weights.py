"""Tensors of a safetensors checkpoint, and which of them make up each tensor of a model.

The names in a file are often not the model's: a prefix is there or not, a family was renamed, a mixture of experts is
stored matrix by matrix but held in one. transformers' own rules are asked, so that a streamed tensor is the one that
``from_pretrained`` gives; what those rules do beyond renaming and gathering experts is left to ``from_pretrained``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from aptq.errors import AptqError
from aptq.models.experts import UnfusedExperts

__all__ = ["Checkpoint", "NotStreamable", "Piece", "Recipe", "parameter_dtypes", "plan_recipes", "unfuse_recipes"]

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class NotStreamable(Exception):
    """Why a checkpoint has to be loaded by transformers as a whole."""


@dataclass(frozen=True)
class Piece:
    """A stored tensor, or one entry of its first axis."""

    key: str
    index: int | None = None


@dataclass(frozen=True)
class Recipe:
    """How a model's tensor is put together: the pieces of each part concatenated along rows, the parts stacked."""

    parts: tuple[tuple[Piece, ...], ...]
    stacked: bool = False

    def expert(self, index: int) -> Recipe:
        """Return the recipe of one entry along the first axis."""
        if self.stacked:
            return Recipe((self.parts[index],))
        ((piece,),) = self.parts
        return Recipe(((Piece(piece.key, index),),))


class Checkpoint:
    """Safetensors files read tensor by tensor; nothing stays mapped between two reads.

    Raises:
        AptqError: a file is truncated or no safetensors file.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtype: torch.dtype | None = None  # of the first floating tensor
        for path in files:
            try:
                with safe_open(path, framework="pt") as file:
                    for key in file.keys():  # noqa: SIM118 - not a mapping
                        view = file.get_slice(key)
                        self._files[key] = path
                        self.shapes[key] = tuple(view.get_shape())
                        self.dtype = self.dtype or _DTYPES.get(view.get_dtype())
            except (SafetensorError, OSError) as error:
                raise AptqError(
                    f"{path.name} in {path.parent} is truncated or no safetensors file ({error}). Download it again"
                ) from error

    def shape(self, recipe: Recipe) -> tuple[int, ...]:
        """Return the shape that a recipe gives, from the headers alone.

        Raises:
            NotStreamable: the pieces do not fit each other.
        """
        shapes = {self._part_shape(part) for part in recipe.parts}
        if len(shapes) != 1:
            raise NotStreamable(f"tensors of different shapes have to be stacked: {recipe.parts[0][0].key}")
        shape = shapes.pop()
        return (len(recipe.parts), *shape) if recipe.stacked else shape

    def _part_shape(self, part: tuple[Piece, ...]) -> tuple[int, ...]:
        shapes = [self.shapes[piece.key][0 if piece.index is None else 1 :] for piece in part]
        if len(shapes) == 1:
            return shapes[0]
        if any(shape[1:] != shapes[0][1:] for shape in shapes):
            raise NotStreamable(f"tensors of different widths have to be concatenated: {part[0].key}")
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def read(self, recipes: Mapping[str, Recipe]) -> Iterator[tuple[str, Tensor]]:
        """Give every named tensor on the CPU, as stored; files are open only while this runs.

        The tensors may be views of the mapped files: copy them before the next one is asked for.
        """
        with ExitStack() as stack:
            opened: dict[Path, Any] = {}

            def get(piece: Piece) -> Tensor:
                path = self._files[piece.key]
                if path not in opened:
                    opened[path] = stack.enter_context(safe_open(path, framework="pt"))
                if piece.index is None:
                    tensor: Tensor = opened[path].get_tensor(piece.key)
                    return tensor
                entry: Tensor = opened[path].get_slice(piece.key)[piece.index : piece.index + 1]
                return entry.squeeze(0)

            for name, recipe in recipes.items():
                parts = [get(part[0]) if len(part) == 1 else torch.cat([get(p) for p in part]) for part in recipe.parts]
                yield name, torch.stack(parts) if recipe.stacked else parts[0]


def plan_recipes(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, Recipe]:
    """Return a recipe for every tensor of a model (experts still fused) that the checkpoint holds.

    Raises:
        NotStreamable: a tensor needs more than renaming and gathering experts, or its shape differs.
    """
    state = model.state_dict()
    recipes = {target: _recipe(target, found) for target, found in _gather(model, state, checkpoint.shapes).items()}
    for name, recipe in recipes.items():
        if checkpoint.shape(recipe) != tuple(state[name].shape):
            raise NotStreamable(
                f"{name} is {checkpoint.shape(recipe)} in the checkpoint and {tuple(state[name].shape)} in the model"
            )
    return recipes


def _gather(
    model: PreTrainedModel, state: Mapping[str, Tensor], keys: Iterable[str]
) -> dict[str, tuple[Any, dict[str, list[str]]]]:
    """Return, for every tensor of the model, transformers' converter (or None) and the keys by its source patterns."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError as error:
        raise NotStreamable(f"this transformers has no table of stored names ({error})") from error
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    if len(renamings) + len(converters) != len(transforms):
        raise NotStreamable("its stored names follow a rule that is neither a renaming nor a conversion")
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    prefix = model.base_model_prefix
    for key in sorted(keys, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, prefix, dict(state))
        if target not in state and key in state:
            target, pattern = key, None
        if target in state:
            converter = None if pattern is None else by_pattern[pattern]
            sources = found.setdefault(target, (converter, defaultdict(list)))[1]
            sources[pattern or ""].append(key)
    return found


def _recipe(target: str, found: tuple[Any, dict[str, list[str]]]) -> Recipe:
    converter, sources = found
    if converter is None:
        if len(sources) > 1 or len(sources[""]) > 1:
            raise NotStreamable(f"{target} is stored more than once")
        return Recipe(((Piece(sources[""][0]),),))
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in converter.operations]
    merged = steps in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])
    columns = [sources.get(pattern, []) for pattern in converter.source_patterns]
    if not merged or len(converter.target_patterns) != 1 or len({len(column) for column in columns}) != 1:
        raise NotStreamable(f"{target} is converted while loading ({', '.join(name for name, _ in steps)})")
    return Recipe(tuple(tuple(Piece(key) for key in row) for row in zip(*columns, strict=True)), stacked=True)


def unfuse_recipes(model: nn.Module, recipes: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """Return the recipes under the names that the tensors have after ``unfuse_experts``."""
    result = dict(recipes)
    for name, module in model.named_modules():
        if not isinstance(module, UnfusedExperts):
            continue
        for matrix in ("gate_up_proj", "down_proj"):
            fused = result.pop(f"{name}.{matrix}", None)
            if fused is not None:
                result |= {f"{name}.{i}.{matrix}.weight": fused.expert(i) for i in range(len(module))}
    return result


def parameter_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtype that transformers would give each floating tensor: some models keep a few in float32."""
    state = {name: tensor.dtype for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    if plan:
        try:
            from transformers.core_model_loading import build_glob_alternation
        except ImportError as error:
            raise NotStreamable(
                f"this transformers keeps some tensors in float32 by rules of its own ({error})"
            ) from error
        matcher, globs, _ = build_glob_alternation(list(plan))
        for name in state:
            match = matcher.search(name)
            if match is not None and match.lastgroup is not None:
                state[name] = plan[globs[match.lastgroup]]
    return state
