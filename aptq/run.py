"""The run folder: one experiment on record, from its config to its report, and what a killed run goes on from."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, fields
from pathlib import Path
from typing import IO, Any, Literal

from torch import Tensor

from aptq import run_folder
from aptq.api import Allocation, LayerReport, Option
from aptq.block_store import BlockStore
from aptq.errors import AptqError
from aptq.files import clean_leftovers, disk_errors, write_json, write_text
from aptq.metrics_schema import check_metrics, finite
from aptq.plan import Plan, read_plan, write_plan
from aptq.settings import RunSettings

_LOGGER = logging.getLogger(__name__)
_COLUMNS = tuple(field.name for field in fields(LayerReport))
_PARSERS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "float | None": lambda text: float(text) if text else None,
}


class Run:
    """One run folder. Rank 0 holds it under a lock and writes; other ranks only read.

    Use it as a context manager, or call ``close``: the lock lives until then.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        *,
        role: Literal["writer", "follower", "reader"],
        resumed: bool = False,
        lock: IO[str] | None = None,
    ) -> None:
        self.folder = folder
        self.config = dict(config)
        self.resumed = resumed
        self._role = role
        self._lock = lock
        self._blocks = BlockStore(folder / run_folder.BLOCKS)

    @classmethod
    def open(cls, settings: RunSettings, config: Mapping[str, Any], *, rank: int = 0) -> Run:
        """Start a run, or go on with one that was killed under the same config.

        Keys that cannot change a result (``run``, ``logger``, ``callback``, ``name``, the number of devices) may
        differ; those that change only what follows the blocks (``evaluator``, ``backend``, evaluation texts) may too,
        and the new values are written down. Other ranks than 0 call this once rank 0 is through.

        Raises:
            AptqError: the run is finished, was started with another config, is at work elsewhere, or the folder holds
                something else. Nothing was changed then.
        """
        folder = Path(settings.dir)
        config = run_folder.plain(config)
        if rank != 0:
            return cls(folder, config, role="follower")
        if folder.exists() and not folder.is_dir():
            raise AptqError(f"run.dir={folder} is a file; it must be a folder, or a name that is free.")
        with disk_errors(folder, "the run folder"):
            folder.mkdir(parents=True, exist_ok=True)
            run_folder.refuse_foreign(folder)
            lock = run_folder.lock(folder)
        try:
            resumed = _take_up(folder, config, settings.overwrite)
        except BaseException:
            lock.close()
            raise
        run = cls(folder, config, role="writer", resumed=resumed, lock=lock)
        run._blocks.clean()
        return run

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Open a run to read its results."""
        config = run_folder.read_config(folder) if folder.is_dir() else None
        if config is None:
            raise AptqError(f"{folder} is no run folder: it has no {run_folder.CONFIG}. Give one as runs/<name>/<id>.")
        return cls(folder, config, role="reader")

    def __enter__(self) -> Run:
        """Return the run itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Give the folder free."""
        self.close()

    def close(self) -> None:
        """Give the folder free for other processes."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @property
    def model_folder(self) -> Path:
        """Where the packed checkpoint goes."""
        return self.folder / run_folder.MODEL

    @property
    def finished(self) -> bool:
        """Whether the packed checkpoint and the metrics are both there."""
        return run_folder.is_finished(self.folder)

    def save_plan(self, plan: Plan) -> None:
        """Write ``plan.json``."""
        if self._writes():
            write_plan(self.folder / "plan.json", plan)

    def save_front(self, front: Mapping[str, Plan]) -> None:
        """Write the plans of other budgets, ``plans/<budget>.json``, where the allocator gives them."""
        if self._writes() and front:
            (folder := self.folder / run_folder.PLANS).mkdir(exist_ok=True)
            for budget, plan in front.items():
                write_plan(folder / f"{budget}.json", plan)

    def plan(self) -> Plan | None:
        """Return the plan, or None when the run has not come to it."""
        path = self.folder / "plan.json"
        return read_plan(path) if path.exists() else None

    def save_sensitivity(self, problem: Allocation) -> None:
        """Write ``sensitivity.csv``, one row a layer and option, where there are costs."""
        if self._writes() and problem.costs:
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(("layer", "bits", "group_size", "format", "stored_bits", "cost"))
            for name, costs in problem.costs.items():
                for option, cost in costs.items():
                    stored = problem.storage_bits[name][option]
                    writer.writerow((name, *astuple(option), stored, cost))
            write_text(self.folder / "sensitivity.csv", text.getvalue(), "the table of costs")

    def sensitivity(self) -> dict[str, dict[Option, tuple[int, float]]]:
        """Read ``sensitivity.csv``: stored bits and cost of each layer at each option; empty where there is none."""
        path = self.folder / "sensitivity.csv"
        if not path.exists():
            return {}
        found: dict[str, dict[Option, tuple[int, float]]] = {}
        with path.open(encoding="utf-8", newline="") as file:
            try:
                for row in csv.DictReader(file):
                    option = Option(int(row["bits"]), int(row["group_size"]), row["format"])
                    found.setdefault(row["layer"], {})[option] = int(row["stored_bits"]), float(row["cost"])
            except (KeyError, TypeError, ValueError) as error:
                raise AptqError(f"{path} is damaged: {error!r}.") from error
        return found

    def save_audit(self, audit: Mapping[str, Any] | None) -> None:
        """Write ``audit.json``, where there was an audit."""
        if self._writes() and audit is not None:
            write_json(self.folder / "audit.json", finite(audit), "the audit")

    def audit(self) -> dict[str, Any] | None:
        """Read ``audit.json``; None where there was no audit."""
        path = self.folder / "audit.json"
        found: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        return found

    def block_done(self, index: int) -> bool:
        """Say whether a block is on disk and whole. A damaged one is not, and a warning tells so."""
        return self._blocks.done(index)

    def save_block(self, index: int, tensors: Mapping[str, Tensor], reports: Sequence[LayerReport]) -> None:
        """Write a finished block: packed tensors, named ``layer.tensor``, and the reports of its layers."""
        if self._writes():
            self._blocks.save(index, tensors, list(reports))

    def load_block(self, index: int) -> tuple[dict[str, Tensor], list[LayerReport]]:
        """Return what ``save_block`` wrote, on the CPU."""
        return self._blocks.load(index)

    def packed(self, layer_name: str) -> dict[str, Tensor]:
        """Read one layer's packed tensors from its block, under the names that the format gave them."""
        return self._blocks.packed(layer_name)

    def write_layers_csv(self, reports: Sequence[LayerReport]) -> None:
        """Write ``layers.csv``, one row a layer."""
        if not self._writes():
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(report) for report in reports)
        write_text(self.folder / "layers.csv", text.getvalue(), "the table of layers")

    def layers(self) -> list[LayerReport]:
        """Read ``layers.csv``; empty when the run has not come to it."""
        path = self.folder / "layers.csv"
        if not path.exists():
            return []
        with path.open(encoding="utf-8", newline="") as file:
            try:
                return [_parse_report(row) for row in csv.DictReader(file)]
            except (KeyError, TypeError, ValueError) as error:
                raise AptqError(f"{path} is damaged: {error!r}. Its columns must be {', '.join(_COLUMNS)}.") from error

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Check and write ``metrics.json``; figures that are not finite are written as null."""
        check_metrics(metrics)
        if self._writes():
            write_json(self.folder / run_folder.METRICS, finite(metrics), "the metrics")

    def metrics(self) -> dict[str, Any]:
        """Read ``metrics.json``."""
        path = self.folder / run_folder.METRICS
        try:
            metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise AptqError(f"The run in {self.folder} is not finished: it has no {run_folder.METRICS}.") from None
        except ValueError as error:
            raise AptqError(f"{path} is damaged: {error}") from error
        check_metrics(metrics)
        return metrics

    def finish(self, keep_blocks: bool = False) -> None:
        """Remove the blocks, which the results have replaced, unless they are to be kept."""
        if not self._writes():
            return
        if not self.finished:
            raise RuntimeError(f"finish was called before {self.folder} had its model and metrics")
        if not keep_blocks:
            self._blocks.remove()

    def _writes(self) -> bool:
        if self._role == "reader":
            raise RuntimeError(f"{self.folder} was opened to read")
        return self._role == "writer"


def _take_up(folder: Path, config: Mapping[str, Any], overwrite: bool) -> bool:
    """Bring a locked folder into the state in which a run begins; say whether it goes on with an old one."""
    clean_leftovers(folder)
    if overwrite:
        run_folder.clear(folder)
    old = run_folder.read_config(folder)
    if old is None:
        run_folder.write_config(folder, config)
        return False
    if run_folder.is_finished(folder):
        raise AptqError(
            f"The run in {folder} is finished. See it with aptq -cn report run={folder}; do it again with "
            "overwrite=true, which clears it, or start another with name=... or run.dir=..."
        )
    if run_folder.check_config(folder, old, config):
        _LOGGER.info("going on in %s with other settings for what follows the blocks", folder)
        run_folder.write_config(folder, config)
    return True


def _parse_report(row: Mapping[str, str]) -> LayerReport:
    return LayerReport(**{field.name: _PARSERS[str(field.type)](row[field.name]) for field in fields(LayerReport)})
