"""AutoRound's own plans, chosen in an environment of its own, as plans that aptq goes by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from environments import Environment, clean_environment
from measured import run_measured

_ENVIRONMENT = Environment("autoround", ["auto-round==0.16.1"])
_SCRIPT = Path(__file__).resolve().parent / "peers" / "autoround_scheme.py"


def plans(
    *,
    model: str,
    calibration: Path,
    budgets: Sequence[float],
    samples: int,
    length: int,
    seed: int,
    threads: int,
    peers: Path,
    folder: Path,
) -> dict[float, Path]:
    """Have AutoScheme choose, and write a plan for each budget of code bits into ``folder``.

    Args:
        model: folder of a model.
        calibration: jsonl with texts; AutoRound cuts ``samples`` of ``length`` tokens from it by itself.
        budgets: average bits of codes.
        samples: how many.
        length: in tokens.
        seed: AutoRound's.
        threads: of torch.
        peers: where environments are kept.
        folder: for plans and log.
    """
    python = _ENVIRONMENT.interpreter(peers)
    record = folder / "autoround.json"
    options = {"model": model, "calibration": calibration, "samples": samples, "length": length, "seed": seed}
    options |= {"threads": threads, "output": record}
    command = [str(python), str(_SCRIPT), *(f"--{name}={value}" for name, value in options.items())]
    command += ["--budgets", *map(str, budgets)]
    run_measured(command, log=folder / "autoround.txt", env=clean_environment(threads, isolated=True))
    chosen = json.loads(record.read_text(encoding="utf-8"))["plans"]
    return {budget: _write(folder / f"autoround_{budget}.json", chosen[str(budget)]) for budget in budgets}


def _write(path: Path, bits: dict[str, int]) -> Path:
    layers = {name: {"bits": width, "format": "integer", "group_size": 64} for name, width in bits.items()}
    path.write_text(json.dumps({"version": 1, "layers": layers}), encoding="utf-8")
    return path
