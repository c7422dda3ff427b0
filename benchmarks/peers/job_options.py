"""What every script here is told and tells that quantizes by itself: the same two subcommands and record."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

Subcommand = Callable[[argparse.Namespace], None]


def commands(
    description: str | None, quantize: Subcommand, dump: Subcommand
) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """Return the parser of the command line, which sets ``run``, and that of ``quantize`` for a peer to add its own.

    Args:
        description: of the script.
        quantize: the job that is measured.
        dump: what turns the saved checkpoint into plain weights for the common judge.
    """
    parser = argparse.ArgumentParser(description=description)
    subcommands = parser.add_subparsers(required=True)
    job = subcommands.add_parser("quantize")
    job.add_argument("--model", required=True, help="folder of the full-precision model")
    job.add_argument("--tokens", required=True, help="safetensors file with input_ids [samples, length]")
    job.add_argument("--bits", type=int, required=True)
    job.add_argument("--group-size", type=int, required=True)
    job.add_argument("--seed", type=int, required=True, help="of what the peer draws; the samples are given")
    job.add_argument("--threads", type=int, required=True)
    job.add_argument("--output", type=Path, required=True, help="folder of the compressed checkpoint")
    job.add_argument("--record", type=Path, required=True, help="JSON file for stage times and versions")
    job.set_defaults(run=quantize)
    judged = subcommands.add_parser("dump")
    judged.add_argument("--model", required=True, help="folder of the compressed checkpoint")
    judged.add_argument("--output", required=True, help="safetensors file of dense weights")
    judged.set_defaults(run=dump)
    return parser, job


def write_record(path: Path, seconds: Mapping[str, float], packages: Sequence[str]) -> None:
    """Write the seconds of each stage, and which versions of packages took them."""
    record = {"seconds": seconds, "versions": {name: importlib.metadata.version(name) for name in packages}}
    path.write_text(json.dumps(record, indent=2), encoding="utf-8")
