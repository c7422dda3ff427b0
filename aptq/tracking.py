"""What a run tells its loggers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import Logger

from aptq.api import Callback, LayerReport

__all__ = ["LoggerCallback"]


class LoggerCallback(Callback):
    """Sends the config, the figures of each block and the final metrics to loggers.

    Figures of blocks are named ``<stage>/<figure>`` with the block's index as the step; final ones by their path in
    ``metrics.json``, as ``perplexity/wikitext2``. A logger with a method ``log_run(folder)`` is handed the folder of
    the finished run, its report written, to take what else it can show.
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
        takers = [logger for logger in self.loggers if callable(getattr(logger, "log_run", None))]
        if takers:
            from aptq.report import write_report  # draws: not every run needs it

            write_report(folder)
        for logger in takers:
            logger.log_run(folder)  # type: ignore[attr-defined]
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
