"""Peers' own plans, each chosen in the peer's own environment, as plans that aptq goes by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from environments import Environment, clean_environment
from measured import run_measured


@dataclass(frozen=True)
class Peer:
    """Who chooses, and how it is asked to."""

    name: str  # of what it leaves
    environment: Environment
    options: Sequence[str] = ()  # of its script

    @property
    def script(self) -> Path:
        """What runs in its environment."""
        return Path(__file__).resolve().parent / "peers" / f"{self.environment.name}_scheme.py"


_MODELOPT = Environment(
    "modelopt",
    # The last transformers that this release allows; requests it imports and does not ask for.
    ["nvidia-modelopt==0.47.0", "transformers==5.14.1", "requests==2.32.5"],
)
AUTOROUND = Peer("autoround", Environment("autoround", ["auto-round==0.16.1"]))
MODELOPT = Peer("modelopt", _MODELOPT)
MODELOPT_APART = Peer("modelopt_apart", _MODELOPT, ["--apart"])
"""A width for each layer, which those that it fuses need not share: nothing but its scores."""


def plans(
    peer: Peer,
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
    """Have a peer choose, and write a plan for each budget of code bits into ``folder``.

    A folder that holds what the peer chose is not filled again: a plan is the same whatever else a row does.

    Args:
        peer: whose plans.
        model: folder of a model.
        calibration: jsonl with texts; the peer's script cuts ``samples`` of ``length`` tokens from it.
        budgets: average bits of codes.
        samples: how many.
        length: in tokens.
        seed: of the samples.
        threads: of torch.
        peers: where environments are kept.
        folder: for plans and log.
    """
    record = folder / f"{peer.name}.json"
    if not record.exists():
        options = {"model": model, "calibration": calibration, "samples": samples, "length": length, "seed": seed}
        options |= {"threads": threads, "output": record}
        command = [str(peer.environment.interpreter(peers)), str(peer.script), *peer.options]
        command += [*(f"--{name}={value}" for name, value in options.items()), "--budgets", *map(str, budgets)]
        run_measured(command, log=folder / f"{peer.name}.txt", env=clean_environment(threads, isolated=True))
    chosen = json.loads(record.read_text(encoding="utf-8"))["plans"]
    return {budget: _write(folder / f"{peer.name}_{budget}.json", chosen[str(budget)]) for budget in budgets}


def _write(path: Path, bits: dict[str, int]) -> Path:
    layers = {name: {"bits": width, "format": "integer", "group_size": 64} for name, width in bits.items()}
    path.write_text(json.dumps({"version": 1, "layers": layers}), encoding="utf-8")
    return path
