"""What every script here is told that has a peer choose bits: the same options, whoever the peer is."""

from __future__ import annotations

import argparse
from pathlib import Path


def options(description: str | None) -> argparse.ArgumentParser:
    """Return the options of the command line, for a peer to add its own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", type=Path, required=True, help="jsonl with texts")
    parser.add_argument("--budgets", type=float, nargs="+", required=True, help="average bits of codes")
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    return parser
