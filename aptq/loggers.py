"""Loggers: where the figures of a run go, beside the run folder's own files.

A logger is one of Lightning's, so any of them serves; these factories bind the two that are built in to the run folder.
``LoggerCallback`` feeds them.
"""

from __future__ import annotations

import inspect
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import Logger
from lightning.fabric.utilities.rank_zero import rank_zero_only

from aptq.api import Callback, LayerReport
from aptq.errors import AptqError
from aptq.files import write_text
from aptq.typed import nearest

__all__ = ["LoggerCallback", "csv_logger", "wandb_logger"]


def csv_logger(*, save_dir: str | Path, prefix: str = "") -> Logger:
    """Log to ``csv/version_<n>/metrics.csv`` in the run folder; a resumed run begins the next version."""
    from lightning.pytorch.loggers import CSVLogger

    return CSVLogger(save_dir, name="csv", prefix=prefix, flush_logs_every_n_steps=1)


def wandb_logger(*, save_dir: str | Path, project: str = "aptq", offline: bool = False, **options: Any) -> Logger:
    """Log to Weights & Biases; a resumed run goes on under the same id.

    Args:
        save_dir: the run folder; wandb's own files go to ``wandb/`` in it.
        project: name of the wandb project.
        offline: write files only; ``wandb sync`` sends them later.
        options: everything else that ``WandbLogger`` and ``wandb.init`` take: entity, group, tags, name, id, ...

    Raises:
        AptqError: wandb is not installed, or has no such option.
    """
    from lightning.pytorch.loggers import WandbLogger

    try:
        import wandb
    except ImportError as error:
        raise AptqError("logger=wandb needs the package wandb: pip install wandb, or choose logger=csv.") from error
    known = {*inspect.signature(WandbLogger).parameters, *inspect.signature(wandb.init).parameters}
    for key in options:
        if key not in known:
            raise AptqError(f"logger 'wandb' has no key {key!r}.{nearest(key, known)} See the arguments of wandb.init.")
    folder = Path(save_dir)

    def start() -> Logger:
        (folder / "wandb").mkdir(parents=True, exist_ok=True)
        defaults: dict[str, Any] = {
            "id": options.pop("id", None) or _remembered_id(folder / "wandb" / "run-id.txt"),
            "name": folder.name,
            "settings": {"console": "off"},  # log.txt has it, without the escape codes of the display
        }
        return WandbLogger(save_dir=folder, project=project, offline=offline, **(defaults | options))

    return _Deferred("wandb", start)


def _remembered_id(path: Path) -> str:
    if not path.exists():
        write_text(path, secrets.token_hex(4), "wandb's run id")
    return path.read_text(encoding="utf-8").strip()


class _Deferred(Logger):
    """A logger that begins with the first thing to log.

    Loggers are built before the run folder is ours: until then, nothing may be written to it or read from it.
    """

    def __init__(self, name: str, start: Callable[[], Logger]) -> None:
        self._name = name
        self._start = start

    @cached_property
    def _logger(self) -> Logger:
        return self._start()

    @property
    def name(self) -> str:
        """Name of the kind of logger."""
        return self._name

    @property
    def version(self) -> int | str | None:
        """The run's id."""
        return self._logger.version

    @property
    def experiment(self) -> Any:
        """What the logger wraps."""
        return getattr(self._logger, "experiment", None)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Pass figures on."""
        self._logger.log_metrics(metrics, step)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Pass the config on."""
        self._logger.log_hyperparams(params, *args, **kwargs)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End what has begun."""
        if "_logger" in vars(self):
            self._logger.finalize(status)
            self.experiment.finish(exit_code=0 if status == "success" else 1)  # Lightning leaves wandb's run open


class LoggerCallback(Callback):
    """Sends the config, the figures of each block and the final metrics to loggers.

    Figures of blocks are named ``<stage>/<figure>`` with the block's index as the step; final ones by their path in
    ``metrics.json``, as ``perplexity/wikitext2``.
    """

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self.loggers = tuple(loggers)
        self._status = "failed"  # until the run ends well
        self._errors: list[float] = []
        self._step = 0

    def on_run_start(self, *, folder: Path, config: Mapping[str, Any]) -> None:
        """Log the config."""
        for logger in self.loggers:
            logger.log_hyperparams(dict(config))

    def on_layer_end(self, *, stage: str, report: LayerReport) -> None:
        """Collect the errors of the block's layers."""
        self._errors.append(report.relative_error)

    def on_block_end(self, *, stage: str, index: int, metrics: Mapping[str, float]) -> None:
        """Log a block's figures, and the mean relative error of its layers."""
        figures = dict(metrics)
        if self._errors:
            figures.setdefault("relative_error", sum(self._errors) / len(self._errors))
            self._errors = []
        self._step = max(self._step, index)
        self._log({f"{stage}/{name}": value for name, value in figures.items()}, index)

    def on_stage_end(self, *, stage: str, seconds: float) -> None:
        """Log how long a stage took."""
        self._log({f"seconds/{stage}": seconds}, self._step)

    def on_run_end(self, *, folder: Path, metrics: Mapping[str, Any]) -> None:
        """Log the final metrics."""
        self._log(_numbers({key: value for key, value in metrics.items() if key != "seconds"}), self._step + 1)
        self._status = "success"

    def close(self) -> None:
        """Flush and end the loggers, as failed when the run did not come to its end."""
        for logger in self.loggers:
            logger.finalize(self._status)
        self.loggers = ()

    def _log(self, figures: dict[str, float], step: int) -> None:
        for logger in self.loggers if figures else ():
            logger.log_metrics(figures, step)


def _numbers(value: Any, prefix: str = "") -> dict[str, float]:
    """Return every number in nested mappings by its path."""
    if isinstance(value, Mapping):
        pairs = (_numbers(item, f"{prefix}/{key}" if prefix else str(key)) for key, item in value.items())
        return {path: number for part in pairs for path, number in part.items()}
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return {prefix: float(value)} if is_number else {}
