"""The rows of a paper run: each the config of an ordinary run, in a folder of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from aptq import registry, run_folder
from aptq.config import compose
from aptq.errors import AptqError
from aptq.paper.content import TEXTS
from aptq.typed import convert

_COMPONENTS = ("hessian", "metric", "allocator", "format", "quantizer")
_METHOD = (*_COMPONENTS, "measure_bits")
"""What a row decides; everything else is the same for all of them."""


def rows_of(config: DictConfig) -> dict[str, DictConfig]:
    """Return the config of every row by name, checked as far as it can be before the first one runs.

    A row's overrides (``rows.NAME``) are composed as on the command line, and what they make of hessian, metric,
    allocator, format, quantizer and ``measure_bits`` is put into the config of the paper run. The first row judges the
    original model too, where ``baseline`` is set.

    Raises:
        AptqError: a row says something else, or names what does not exist; the paper run sets what is the rows' affair;
            or nothing would be judged on C4 and WikiText-2.
    """
    shared: dict[str, Any] = OmegaConf.to_container(config)  # type: ignore[assignment]
    overrides = convert(shared.pop("rows", {}), dict[str, list[str]], "rows")
    if not overrides:
        raise AptqError("rows is empty; a paper run needs one at least: '+rows.aptq_75=[\"experiment=aptq_75\"]'.")
    _check_shared(shared)
    rows = {}
    for number, (name, words) in enumerate(overrides.items()):
        method = _method(name, words)
        baseline = shared["baseline"] and number == 0
        run = {**shared["run"], "dir": f"{config.run.dir}/{name}"}
        own = {"task": "quantize", "name": name, "baseline": baseline, "run": run}
        rows[name] = OmegaConf.create({**shared, **method, **own})
        for kind in _COMPONENTS:
            registry.build(kind, rows[name][kind])
    return rows


def _method(name: str, words: list[str]) -> dict[str, Any]:
    """Return what a row's overrides decide."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise AptqError(f"rows: {name!r} is to be the name of a folder; use letters, digits, '_', '-' and '.'.")
    for word in words:
        key = re.split(r"[.=@]", word.lstrip("+~"), maxsplit=1)[0]
        if key not in ("experiment", *_METHOD):
            raise AptqError(
                f"rows.{name}: {word!r} is not a row's to say; it may choose an experiment and set "
                f"{', '.join(_METHOD)}. What holds for all rows is said once, outside of rows."
            )
    composed = compose(words)
    if composed.task != "quantize":
        raise AptqError(f"rows.{name}: {' '.join(words)} is no run that quantizes a model.")
    return {key: OmegaConf.to_container(composed[key]) if key in _COMPONENTS else composed[key] for key in _METHOD}


def _check_shared(shared: Mapping[str, Any]) -> None:
    """Refuse what the rows would ignore, and what would leave the tables empty."""
    for key in (*_METHOD, "plan"):
        if shared.get(key) is not None:
            raise AptqError(f"{key} is set for the whole paper run, but each row has its own. Set it in rows.NAME.")
    if (shared.get("evaluator") or {}).get("name") != "perplexity":
        raise AptqError("A paper run is about perplexity: leave evaluator=perplexity as it is.")
    data = shared["data"]
    texts = data.get("evaluation_path") if data["source"] == "text" else data.get("evaluation_hub")
    missing = [name for name in TEXTS if not isinstance(texts, Mapping) or name not in texts]
    if missing:
        raise AptqError(
            f"The paper's tables have no text named {' and '.join(missing)} to judge by. Use data=c4, or data=text "
            f"with 'data.evaluation_path={{{', '.join(f'{name}: FILE' for name in TEXTS)}}}'."
        )


def unfinished(rows: Mapping[str, DictConfig]) -> dict[str, DictConfig]:
    """Return the rows that have to be run: all that have not finished, and every one with ``overwrite``.

    Raises:
        AptqError: a row is finished, under another config than it has now.
    """
    return {name: row for name, row in rows.items() if row.overwrite or not _is_finished(name, row)}


def _is_finished(name: str, row: DictConfig) -> bool:
    folder = Path(row.run.dir)
    if not run_folder.is_finished(folder):
        return False
    old = run_folder.read_config(folder) or {}
    changed = run_folder.differences(old, run_folder.plain(OmegaConf.to_container(row, resolve=True)))
    if changed:
        told = "\n".join(f"  {key}: {before!r} -> {after!r}" for key, (before, after) in changed.items())
        raise AptqError(
            f"The row {name} in {folder} was finished with another config:\n{told}\nGo on with the old values, do all "
            "rows anew with overwrite=true, or choose another folder with name=..."
        )
    return True
