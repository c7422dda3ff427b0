"""The command line: Hydra composes the config, a task runs, errors that the user can mend are one message."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console
from rich.logging import RichHandler

from aptq import registry
from aptq.config import CONF, VERSION_BASE, explain_hydra_error, prepare_hydra
from aptq.errors import AptqError

_log = logging.getLogger("aptq")


def main() -> None:
    """Run ``aptq ...``; exit with 2 where the user has something to mend."""
    if sys.argv[1:2] == ["plugins"]:
        from aptq import plugins_command

        sys.exit(plugins_command.main(sys.argv[2:]))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing, and we can say it better
    prepare_hydra()
    app = hydra.main(config_path=str(CONF), config_name="quantize", version_base=VERSION_BASE)(_run)
    try:
        app()
    except KeyboardInterrupt:
        _fail("Interrupted. A run goes on where it stopped when the same command is given with its run.dir.", code=130)
    except Exception as error:
        message = str(error) if isinstance(error, AptqError) else explain_hydra_error(error)
        if message is None:
            raise
        _fail(message)


def _fail(message: str, code: int = 2) -> None:
    Console(stderr=True, soft_wrap=True).print(f"[bold red]aptq:[/] {_escaped(message)}", highlight=False)
    sys.exit(code)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _import_all() -> None:
    """Import what every task but the report needs: only once a config is composed, since it takes seconds.

    The garbage collector would go through a million new objects again and again, and finds nothing: it is off
    meanwhile, and never looks at them later. Once a process: later jobs of a sweep have garbage that must be found.
    """
    if "aptq.experiment" in sys.modules:
        return
    gc.disable()
    try:
        importlib.import_module("aptq.experiment")
    finally:
        gc.freeze()
        gc.enable()


def _run(config: DictConfig) -> None:
    if config.task != "report":
        _import_all()
    import transformers

    logging.captureWarnings(True)
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", datefmt="[%X]", handlers=[_console_handler()], force=True
    )
    for noisy in ("httpx", "urllib3", "filelock", "fsspec", "matplotlib", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # ours tells more
    tasks: dict[str, Callable[[DictConfig], Any]] = {
        "quantize": _quantize,
        "evaluate": _evaluate,
        "export": _export,
        "report": _report,
        "paper": _paper,
        "benchmark": _benchmark,
    }
    try:
        if config.task in tasks:
            tasks[config.task](config)
        else:
            registry.load(registry.TASK, config.task)(config, _log_to)
        return
    except AptqError as error:  # here, since Hydra would first print the command line again
        message = str(error)
        _log.error("aptq: %s", message)
        _log.debug("raised here", exc_info=True)
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        sys.exit(2)
    # Hydra keeps what a job raised until the sweep is over, and goes on. An error of its own holds on to no model.
    raise AptqError(f"A job of the sweep failed, {' '.join(HydraConfig.get().overrides.task)}: {message}")


def _console_handler() -> logging.Handler:
    # What is for the log file alone (tracebacks of mistakes) is not shown, though the logger is open to it by then.
    console = Console(stderr=True)
    return RichHandler(logging.INFO, console=console, show_path=False, show_level=False, markup=False)


def _log_to(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / "log.txt", encoding="utf-8")
    handler.setLevel(logging.DEBUG)
    _log.setLevel(logging.DEBUG)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)


def _close_logs() -> None:
    """Write no more into the folders of runs that are over."""
    for handler in [each for each in logging.getLogger().handlers if isinstance(each, logging.FileHandler)]:
        logging.getLogger().removeHandler(handler)
        handler.close()


def _quantize(config: DictConfig) -> bool:
    """Quantize; say whether this process is the first rank, which writes."""
    from aptq.experiment import build_experiment
    from aptq.pipeline import quantize_model
    from aptq.report import write_report
    from aptq.tables import print_summary

    _refuse_unsafe_sweep(config)
    experiment = build_experiment(config)
    first = experiment.fabric.global_rank == 0
    run = quantize_model(experiment, on_open=_log_to if first else None)
    if first:
        page = write_report(run.folder)
        print_summary(run, page)
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            _compare_sweep(run.folder.parent)
    return first


def _compare_sweep(folder: Path) -> None:
    """Write the comparison of a sweep's runs, anew after each: the last one to finish has them all."""
    from aptq.comparison import write_comparison
    from aptq.run_folder import finished_runs

    runs = finished_runs(folder)
    if len(runs) > 1:
        page = write_comparison(runs, folder)
        Console().print(f"Compared   [bold]{_escaped(str(page))}[/]", soft_wrap=True, highlight=False)


def _paper(config: DictConfig) -> None:
    from aptq.paper import write_paper
    from aptq.paper.rows import rows_of, unfinished

    _refuse_unsafe_sweep(config)
    rows = rows_of(config)
    first = True
    for name, row in unfinished(rows).items():
        _log.info("paper: row %s, %s", name, row.run.dir)
        first = _quantize(row)
        _close_logs()
    if first:
        page = write_paper(Path(config.run.dir), {name: Path(row.run.dir) for name, row in rows.items()})
        Console().print(f"Wrote [bold]{_escaped(str(page))}[/]")


def _evaluate(config: DictConfig) -> None:
    from aptq.experiment import evaluate
    from aptq.tables import print_measures

    print_measures(evaluate(config), config.model.path)
    if config.output is not None:
        Console().print(f"Wrote [bold]{_escaped(str(config.output))}[/]")


def _export(config: DictConfig) -> None:
    from aptq.experiment import export

    folder = export(config)
    Console().print(f"Wrote [bold]{_escaped(str(folder))}[/]")


def _benchmark(config: DictConfig) -> None:
    from aptq.experiment import benchmark
    from aptq.tables import print_benchmark

    print_benchmark(benchmark(config, on_open=_log_to), Path(config.run.dir))


def _report(config: DictConfig) -> None:
    from aptq.comparison import write_comparison
    from aptq.report import write_report

    runs = config.run.split(",") if isinstance(config.run, str) else [str(each) for each in config.run]
    folders = [Path(each.strip()) for each in runs]
    page = write_report(folders[0]) if len(folders) == 1 else write_comparison(folders, Path(config.output))
    Console().print(f"Wrote [bold]{_escaped(str(page))}[/]")


def _refuse_unsafe_sweep(config: DictConfig) -> None:
    """Lightning starts other processes with this command line: each of them would begin all of its runs again."""
    several = config.fabric.devices not in (1, "1") or config.fabric.num_nodes != 1
    launched = any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"))
    many_runs = HydraConfig.get().mode == RunMode.MULTIRUN or config.task == "paper"
    if many_runs and several and not launched:
        raise AptqError(
            f"Several runs with fabric.devices={config.fabric.devices} have to be started by torchrun, since each "
            "process would begin all of them again. Use: torchrun --nproc-per-node N -m aptq ..., or fabric.devices=1."
        )
