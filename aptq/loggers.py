"""Loggers: where the figures of a run go, beside the run folder's own files.

A logger is one of Lightning's, so any of them serves; these factories bind the two that are built in to the run folder.
``aptq.tracking.LoggerCallback`` feeds them.
"""

from __future__ import annotations

import inspect
import secrets
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import Logger
from lightning.fabric.utilities.rank_zero import rank_zero_only

from aptq.errors import AptqError
from aptq.files import write_text
from aptq.typed import nearest
from aptq.wandb_run import log_run

__all__ = ["csv_logger", "wandb_logger"]


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

    return _WandbLogger(start)


def _remembered_id(path: Path) -> str:
    if not path.exists():
        write_text(path, secrets.token_hex(4), "wandb's run id")
    return path.read_text(encoding="utf-8").strip()


class _WandbLogger(Logger):
    """wandb's, which begins with the first thing to log, and takes pictures, tables and files too.

    Loggers are built before the run folder is ours: until then, nothing may be written to it or read from it.
    """

    def __init__(self, start: Callable[[], Logger]) -> None:
        self._start = start

    @cached_property
    def _logger(self) -> Logger:
        return self._start()

    @property
    def name(self) -> str:
        """Name of the kind of logger."""
        return "wandb"

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
    def log_run(self, folder: Path) -> None:
        """Pass a finished run's pictures, tables and files on."""
        log_run(self.experiment, folder)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End what has begun."""
        if "_logger" in vars(self):
            self._logger.finalize(status)
            self.experiment.finish(exit_code=0 if status == "success" else 1)  # Lightning leaves wandb's run open
