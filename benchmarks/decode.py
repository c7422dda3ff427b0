"""Tokens per second of greedy decoding with packed layers, beside the original model and the same weights dense.

Each contestant is a process of its own, so that resident memory is its alone. All are loaded first; then they decode in
turn, a round after the other, while the others wait: whatever else the machine does meets all of them.

llama.cpp takes part with a GGUF file (``--gguf FILE``), by a python that has llama-cpp-python (``--llama PYTHON``).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import machine
from provenance import commit

RESULTS = Path(__file__).parent / "results" / "decode"
PROMPT = "The history of the steam engine begins"
CONTESTANTS = {
    "packed, backend cpu, float32": ("packed", "float32", "own"),
    "packed, backend cpu, bfloat16": ("packed", "bfloat16", "own"),
    "packed, backend cpu, int8 activations, float32": ("int8", "float32", "own"),
    "packed, captured step, float32": ("packed", "float32", "captured"),
    "packed, captured step, bfloat16": ("packed", "bfloat16", "captured"),
    "packed, captured step, int8 activations, float32": ("int8", "float32", "captured"),
    "the same weights dense, float32": ("dense", "float32", "own"),
    "the same weights dense, bfloat16": ("dense", "bfloat16", "own"),
    "original, float32": ("original", "float32", "own"),
    "original, bfloat16": ("original", "bfloat16", "own"),
    "original, captured step, float32": ("original", "float32", "captured"),
    "original, captured step, bfloat16": ("original", "bfloat16", "captured"),
}
"""Weights, dtype and step: the model's own, or that of ``aptq.Decoder``."""


def main() -> None:
    options = _options()
    if options.serve:
        _serve(options)
        return
    processes = {name: _start(options, *CONTESTANTS[name]) for name in options.contestants}
    if options.gguf:
        processes[f"llama.cpp, {options.gguf.stem}"] = _start_llama(options)
    rates: dict[str, list[float]] = {name: [] for name in processes}
    told: dict[str, dict[str, Any]] = {}
    for done in range(options.rounds + 1):
        for name, process in processes.items():
            told[name] = _ask(process, options.tokens)
            if done:  # the first round warms up
                rates[name].append(options.tokens / told[name]["seconds"])
                print(f"round {done}, {name}: {rates[name][-1]:.1f} tokens/s", flush=True)
    for process in processes.values():
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
    record = {
        "model": Path(options.original).name,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "threads": options.threads,
        "results": {
            name: {
                "tokens_per_second": statistics.median(rates[name]),
                "best": max(rates[name]),
                "rss_bytes": told[name]["rss_bytes"],
                "weight_bytes": told[name]["weight_bytes"],
                "text": told[name]["text"],
            }
            for name in processes
        },
        "machine": machine.describe(),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "commit": commit(),
        "command": _command(options),
    }
    options.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    options.output.with_suffix(".md").write_text(page(record), encoding="utf-8")
    print(page(record))


def _command(options: argparse.Namespace) -> str:
    """Return what makes the table, with names in place of paths."""
    words = ["--rounds", str(options.rounds), "--tokens", str(options.tokens), "--threads", str(options.threads)]
    words += ["--packed", "RUN/model", "--original", "MODEL"]
    if options.gguf:
        words += ["--gguf", options.gguf.name, "--llama", "PYTHON"]
    if set(options.contestants) != set(CONTESTANTS):
        words += ["--contestants", *options.contestants]
    return f"python benchmarks/decode.py {shlex.join(words)}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packed", required=True, help="native checkpoint: a run's model folder")
    parser.add_argument("--original", required=True, help="the model that it was made from")
    parser.add_argument("--tokens", type=int, default=64, help="decoded in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=machine.usable_cores())
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), metavar="NAME")
    parser.add_argument("--gguf", type=Path, help="a model for llama.cpp")
    parser.add_argument("--llama", default=sys.executable, help="python that has llama-cpp-python", metavar="PYTHON")
    parser.add_argument("--output", type=Path, default=RESULTS, help="of the table, without a suffix")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def _start(options: argparse.Namespace, kind: str, dtype: str, step: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--packed", options.packed, "--original", options.original]
    command += ["--threads", str(options.threads), "--tokens", str(options.tokens), "--serve", kind, dtype, step]
    return _started(command, options.threads)


def _start_llama(options: argparse.Namespace) -> subprocess.Popen[str]:
    script = Path(__file__).with_name("peers") / "llama_decode.py"
    return _started([options.llama, str(script), str(options.gguf), str(options.threads), PROMPT], options.threads)


def _started(command: list[str], threads: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    if _answer(process, command) != {"ready": True}:
        raise SystemExit(f"{shlex.join(command)} did not get ready.")
    return process


def _ask(process: subprocess.Popen[str], tokens: int) -> dict[str, Any]:
    assert process.stdin is not None
    process.stdin.write(f"{tokens}\n")
    process.stdin.flush()
    return _answer(process, process.args)  # type: ignore[arg-type]


def _answer(process: subprocess.Popen[str], command: Sequence[str]) -> dict[str, Any]:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            answer: dict[str, Any] = json.loads(line)
            return answer
    raise SystemExit(f"{shlex.join(command)} ended early; run it by itself to see why.")


def _serve(options: argparse.Namespace) -> None:
    """Load a contestant, then decode as many tokens as each line of the standard input asks for."""
    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(options.threads)
    kind, dtype, step = options.serve
    model = _load(kind, options, getattr(torch, dtype))
    tokenizer = AutoTokenizer.from_pretrained(options.packed)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    ways = _captured(model, ids.shape[1] + options.tokens) if step == "captured" else _own(model)
    size = sum(t.nbytes for t in {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}.values())
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        with torch.no_grad():
            seconds, tokens = decode(*ways, ids, int(line))
        answer = {"seconds": seconds, "rss_bytes": _resident(), "weight_bytes": size, "text": tokenizer.decode(tokens)}
        print(json.dumps(answer), flush=True)


def _load(kind: str, options: argparse.Namespace, dtype: Any) -> Any:
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    import aptq
    from aptq.layer import PackedLinear

    if kind == "original":
        return AutoModelForCausalLM.from_pretrained(options.original, dtype=dtype)
    if kind != "dense":
        activations = "int8" if kind == "int8" else "exact"
        return aptq.load(options.packed, backend={"name": "cpu", "activations": activations}, dtype=dtype)
    model = aptq.load(options.packed, backend="reference", dtype=dtype)
    for name, layer in [each for each in model.named_modules() if isinstance(each[1], PackedLinear)]:
        with torch.device("meta"):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        linear.weight = nn.Parameter(layer.dense().to(dtype).contiguous(), requires_grad=False)
        linear.bias = layer.bias
        model.set_submodule(name, linear)
    return model


def _captured(model: Any, length: int) -> tuple[Any, Any]:
    """Return how to begin with a prompt, and to go on with a token, by a captured step."""
    import aptq

    decoder = aptq.Decoder(model, max_length=length)
    decoder.prepare()
    return lambda ids, count: decoder.prefill(ids), decoder.step


def _own(model: Any) -> tuple[Any, Any]:
    """Return the same by the model itself with a static cache."""
    from transformers import StaticCache

    caches: list[Any] = [None]

    def begin(ids: Any, count: int) -> Any:
        caches[0] = StaticCache(config=model.config, max_cache_len=ids.shape[1] + count)
        return go_on(ids)

    def go_on(tokens: Any) -> Any:
        return model(tokens, past_key_values=caches[0], logits_to_keep=1).logits[:, -1]

    return begin, go_on


def decode(begin: Any, go_on: Any, ids: Any, count: int) -> tuple[float, list[int]]:
    """Return the seconds that ``count`` tokens took after the prompt, greedily; and the tokens."""
    logits = begin(ids, count)
    tokens = []
    started = time.perf_counter()
    for _ in range(count):
        token = logits.argmax(-1, keepdim=True)
        tokens.append(int(token))
        logits = go_on(token)
    return time.perf_counter() - started, tokens


def _resident() -> int:
    """Return this process's resident memory in bytes."""
    import psutil

    resident: int = psutil.Process().memory_info().rss
    return resident


def page(record: Mapping[str, Any]) -> str:
    """Return the table."""
    results = record["results"]
    base = {dtype: results.get(f"original, {dtype}") for dtype in ("float32", "bfloat16")}
    lines = [
        f"# Greedy decoding, {record['model']}",
        "",
        f"{record['tokens']} tokens after a short prompt, static cache, batch 1, {record['threads']} threads; medians "
        f"of {record['rounds']} rounds in turn. *Captured step*: by `aptq.Decoder`, else by the model's own forward. "
        "Resident memory holds the interpreter, torch (and its compiler, where a step is captured) and what of the "
        "model is in full precision; weights are all tensors of the model.",
        "",
        "| | tokens/s | best | x original float32 | x original bfloat16 | weights MB | resident MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, each in results.items():
        rate = each["tokens_per_second"]
        times = [f"{rate / original['tokens_per_second']:.2f}" if original else "" for original in base.values()]
        lines.append(
            f"| {name} | {rate:.1f} | {each['best']:.1f} | {' | '.join(times)} | "
            f"{each['weight_bytes'] / 1e6:.0f} | {each['rss_bytes'] / 1e6:.0f} |"
        )
    lines += [
        "",
        f"Machine: {machine.sentence(record['machine'])}. Date: {record['date']}. Commit: {record['commit']}.",
        "",
        f"```\n{record['command']}\n```",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
