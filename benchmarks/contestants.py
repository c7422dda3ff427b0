"""Who takes part: how each contestant is started, what it tells of its stages, and how its weights are read back."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from environments import Environment
from peer_plans import AUTOROUND

PEERS = Path(__file__).resolve().parent / "peers"


@dataclass(frozen=True)
class Job:
    """One quantization that every contestant does alike."""

    model: Path  # float32 safetensors folder
    calibration: Path  # the text that the token ids are from
    tokens: Path  # safetensors, input_ids [samples, length]
    samples: int
    length: int
    seed: int
    bits: int
    group_size: int
    threads: int


@dataclass(frozen=True)
class Stages:
    """What a contestant says of itself: seconds by stage, and the versions that matter."""

    seconds: Mapping[str, float]
    versions: Mapping[str, str]

    @property
    def quantize(self) -> float:
        """Seconds of calibrating and rounding alone: no imports, loading or saving."""
        return self.seconds["quantize"]


class Contestant(Protocol):
    """A system that quantizes."""

    name: str
    isolated: bool  # whether it runs in an environment of its own

    def prepare(self, cache: Path) -> None:
        """Make its environment."""

    def quantize(self, job: Job, folder: Path) -> list[str]:
        """Return the command that does the job and leaves its checkpoint and record in ``folder``."""

    def stages(self, folder: Path) -> Stages:
        """Read the record that the job left."""

    def checkpoint(self, folder: Path) -> Path:
        """Return where the job left the model."""

    def dump(self, folder: Path, output: Path) -> list[str]:
        """Return the command that writes the checkpoint's dense weights."""


@dataclass
class Peer:
    """Somebody else's quantizer, with its defaults: a script in ``peers/`` that an environment of its own runs."""

    name: str
    environment: Environment
    script: str  # with the subcommands ``quantize`` and ``dump``
    options: Sequence[str] = ()  # of ``quantize``
    unreadable: Sequence[int] = ()  # widths whose checkpoint its own loader cannot read back on a CPU
    isolated: bool = True
    python: Path | None = None

    def prepare(self, cache: Path) -> None:
        """Make its virtual environment, or find it in the cache."""
        self.python = self.environment.interpreter(cache)

    def quantize(self, job: Job, folder: Path) -> list[str]:
        """Return the command of its script's ``quantize``."""
        options = {
            "model": job.model,
            "tokens": job.tokens,
            "bits": job.bits,
            "group-size": job.group_size,
            "seed": job.seed,
            "threads": job.threads,
            "output": folder / "model",
            "record": folder / "record.json",
        }
        told = (f"--{name}={value}" for name, value in options.items())
        return [*self._command(), "quantize", *told, *self.options]

    def stages(self, folder: Path) -> Stages:
        """Read what the script wrote."""
        return Stages(**json.loads((folder / "record.json").read_text(encoding="utf-8")))

    def checkpoint(self, folder: Path) -> Path:
        """Return the folder that its own format was saved in."""
        return folder / "model"

    def dump(self, folder: Path, output: Path) -> list[str]:
        """Return the command of its script's ``dump``."""
        return [*self._command(), "dump", f"--model={self.checkpoint(folder)}", f"--output={output}"]

    def _command(self) -> list[str]:
        if self.python is None:
            raise RuntimeError("prepare() comes first: it makes the environment")
        return [str(self.python), str(PEERS / self.script)]


def peers() -> list[Peer]:
    """Return llm-compressor's GPTQ, and AutoRound's rounding by its default recipe and by its light one."""
    compressor, rounds = Environment("llmcompressor", ["llmcompressor==0.14.0.1"]), AUTOROUND.environment
    light, awq = ["--steps=50", "--rate=0.005"], [4]  # asymmetric codes of 4 bits are saved in AWQ's layout
    return [
        Peer("llm-compressor", compressor, "llmcompressor_gptq.py"),
        Peer("auto-round", rounds, "autoround_tuning.py", unreadable=awq),
        Peer("auto-round-light", rounds, "autoround_tuning.py", light, unreadable=awq),
    ]


@dataclass
class Aptq:
    """aptq through its public command line, as a user runs it, without the evaluation."""

    name: str = "aptq"
    isolated: bool = False
    overrides: Sequence[str] = ()

    def prepare(self, cache: Path) -> None:
        """Nothing to do: aptq is in the environment that runs the benchmark."""

    def quantize(self, job: Job, folder: Path) -> list[str]:
        """Return the command line."""
        return aptq_command(
            folder,
            {
                "model.path": job.model,
                "data.path": job.calibration,
                "data.num_samples": job.samples,
                "data.sequence_length": job.length,
                "data.seed": job.seed,
                "allocator.bits": job.bits,
                "format.group_size": job.group_size,
            },
            ["data=text", *self.overrides],
        )

    def stages(self, folder: Path) -> Stages:
        """Read ``metrics.json`` of the run."""
        metrics = json.loads((folder / "run" / "metrics.json").read_text(encoding="utf-8"))
        return Stages(metrics["seconds"], metrics["versions"])

    def checkpoint(self, folder: Path) -> Path:
        """Return the native checkpoint."""
        return folder / "run" / "model"

    def dump(self, folder: Path, output: Path) -> list[str]:
        """Return the command that loads the checkpoint with transformers and dequantizes it."""
        script = str(PEERS / "aptq_dump.py")
        return [sys.executable, script, f"--model={self.checkpoint(folder)}", f"--output={output}"]


def aptq_command(folder: Path, settings: Mapping[str, Any], choices: Sequence[str]) -> list[str]:
    """Return the command line of a uniform, asymmetric GPTQ run on the CPU, into ``folder / "run"``.

    In the model's own basis, as peers' GPTQ: the judge counts the values in a group of the dense weights.

    Args:
        folder: the job's own.
        settings: values by key; quoted for Hydra's grammar here.
        choices: further overrides, passed on as they are.
    """
    components = ["hessian=input", "quantizer=gptq", "allocator=uniform", "format=integer", "transform=none"]
    fixed = ["fabric=cpu", *components, "evaluator=none"]
    values = {"run.dir": folder / "run", "cache_dir": folder / "cache", "format.symmetric": False, **settings}
    return [
        *(sys.executable, "-m", "aptq", *fixed),
        *(f"{key}={hydra_value(value)}" for key, value in values.items()),
        *choices,
    ]


def hydra_value(value: object) -> str:
    """Return a value in Hydra's override grammar: paths quoted, numbers and booleans bare."""
    if isinstance(value, Path | str):
        escaped = str(value).replace("\\", "\\\\").replace("'", "\\'")
        return f"'{escaped}'"
    return str(value).lower()
