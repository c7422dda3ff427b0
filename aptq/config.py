"""Where configs come from - this package, installed plug-ins, the user - and how they become typed data."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import psutil
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from aptq.config_errors import explain_hydra_error, plain_section
from aptq.errors import AptqError
from aptq.registry import GROUPS, KINDS, TASK, installed
from aptq.typed import arguments

__all__ = ["CONF", "compose", "explain_hydra_error", "plugin_folders", "prepare_hydra", "run_id", "to_settings"]

_PACKAGED = Path(__file__).with_name("conf")
CONF = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).resolve().parents[1] / "conf"
"""The configs that come with aptq: inside the package in a wheel, beside it in a checkout or an editable install."""

VERSION_BASE = "1.3"
"""The behaviour of Hydra that the configs are written for."""

Settings = TypeVar("Settings")

_logger = logging.getLogger(__name__)


def plugin_folders() -> dict[str, Path]:
    """Return the config folders that installed plug-ins bring, by the name of their entry point, importing none.

    A plug-in announces ``name = "package.folder"`` in the entry-point group ``aptq.conf``. Folders that do not exist
    are left out with a warning, so that a broken plug-in hurts only those who use it.
    """
    folders = {}
    for point in sorted(installed("aptq.conf"), key=lambda point: point.name):
        if folder := _folder(point.value):
            folders[point.name] = folder
        else:
            _logger.warning("Plug-in %r promises configs in %r, which is no folder.", point.name, point.value)
    return folders


def _folder(dotted: str) -> Path | None:
    package, *inner = dotted.split(".")
    try:
        spec = find_spec(package)  # of a top-level package: finds it without running it
    except (ImportError, ValueError):
        return None
    places = (spec.submodule_search_locations if spec else None) or []
    return next((path for path in (Path(place, *inner) for place in places) if path.is_dir()), None)


class PluginConfigs(SearchPathPlugin):
    """Append the config folders of installed plug-ins to Hydra's search path.

    The first match wins: aptq's own configs, then plug-ins', then ``--config-dir``. Nobody replaces a name; all add.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append one ``file://`` entry for each plug-in."""
        for name, folder in plugin_folders().items():
            search_path.append(provider=f"plugin {name}", path=f"file://{folder}")


def prepare_hydra() -> None:
    """Let Hydra see plug-in configs and ``${aptq_run_id:}``; call before composing. Calling it again does nothing."""
    Plugins.instance().register(PluginConfigs)
    OmegaConf.register_new_resolver("aptq_run_id", _job_id, replace=True)


def compose(overrides: Sequence[str] = (), config_name: str = "quantize") -> DictConfig:
    """Compose a config as the command line would.

    Args:
        overrides: as on the command line: ``["quantizer=gptq", "allocator.bits=3"]``.
        config_name: the primary config: quantize, evaluate, export, benchmark or report.

    Raises:
        AptqError: an override names what does not exist; the message gives the nearest name.
    """
    prepare_hydra()
    inside = GlobalHydra.instance().is_initialized()  # a job of the command line: what it was started with stays
    try:
        with (
            nullcontext()
            if inside
            else initialize_config_dir(config_dir=str(CONF), version_base=VERSION_BASE, job_name="aptq")
        ):
            return hydra_compose(config_name=config_name, overrides=list(overrides))
    except Exception as error:
        if explanation := explain_hydra_error(error):
            raise AptqError(explanation) from error
        raise


def _job_id() -> str:
    """Return the run's id, with the job's number where it is one of a sweep."""
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        return f"{run_id()}-{HydraConfig.get().job.num}"
    return run_id()


@cache
def run_id() -> str:
    """Return the id of this run: the same in all its processes, and for as long as this one lives.

    It is the launcher's id where there is one (torchrun, SLURM), else the time at which the run began.
    """
    for variable in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"):
        if (launcher_id := os.environ.get(variable, "none")) != "none":
            return launcher_id
    began = time.time()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun without --rdzv-id calls every run "none": ask when it started
        began = psutil.Process(os.getppid()).create_time()
    return time.strftime("%Y%m%d-%H%M%S", time.localtime(began))


def to_settings(cls: type[Settings], section: Mapping[str, Any], where: str) -> Settings:
    """Turn a section of a config into its dataclass.

    Args:
        cls: dataclass of the section, such as ``ModelSettings``.
        section: the section, plain or OmegaConf's.
        where: its name, for messages: "model".

    Raises:
        AptqError: a key is unknown (with the nearest one) or missing, or a value has the wrong type.
    """
    return cls(**arguments(cls, plain_section(section, where), where))


def config_files(kind: str) -> dict[str, Path]:
    """Return the YAML files of a config group by name, from this package and from plug-ins; primaries for tasks."""
    if kind not in GROUPS:
        raise AptqError(f"There is no kind of component {kind!r}; kinds are {', '.join(KINDS)}.")
    group = "" if kind == TASK else kind
    folders = [*reversed(plugin_folders().values()), CONF]
    return {path.stem: path for folder in folders for path in sorted((folder / group).glob("*.yaml"))}
