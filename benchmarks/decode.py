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
    "packed, backend cpu, float32": ("packed", "float32"),
    "packed, backend cpu, bfloat16": ("packed", "bfloat16"),
    "packed, backend cpu, int8 activations, float32": ("int8", "float32"),
    "the same weights dense, float32": ("dense", "float32"),
    "the same weights dense, bfloat16": ("dense", "bfloat16"),
    "original, float32": ("original", "float32"),
    "original, bfloat16": ("original", "bfloat16"),
}


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
        "compiled": options.compile,
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
    words += [*(["--compile"] if options.compile else []), "--packed", "RUN/model", "--original", "MODEL"]
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
    parser.add_argument("--compile", action="store_true", help="decode with torch.compile, all contestants alike")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), metavar="NAME")
    parser.add_argument("--gguf", type=Path, help="a model for llama.cpp")
    parser.add_argument("--llama", default=sys.executable, help="python that has llama-cpp-python", metavar="PYTHON")
    parser.add_argument("--output", type=Path, default=RESULTS, help="of the table, without a suffix")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def _start(options: argparse.Namespace, kind: str, dtype: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--packed", options.packed, "--original", options.original]
    command += ["--threads", str(options.threads), "--serve", kind, dtype, *(["--compile"] if options.compile else [])]
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
    kind, dtype = options.serve
    model = _load(kind, options, getattr(torch, dtype))
    step = torch.compile(model.forward, fullgraph=True, dynamic=False) if options.compile else model
    tokenizer = AutoTokenizer.from_pretrained(options.packed)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    size = sum(t.nbytes for t in {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}.values())
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        with torch.inference_mode():
            seconds, tokens = decode(model, step, ids, int(line))
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


def decode(model: Any, step: Any, ids: Any, count: int) -> tuple[float, list[int]]:
    """Return the seconds that ``count`` tokens took after the prompt, greedily, with a static cache; and the tokens.

    ``step`` is the model as it takes a token.
    """
    import torch
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + count)
    position = torch.arange(ids.shape[1])
    logits = model(ids, past_key_values=cache, cache_position=position).logits
    tokens = []
    started = time.perf_counter()
    for index in range(count):
        token = logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(int(token))
        position = torch.tensor([ids.shape[1] + index])
        logits = step(token, past_key_values=cache, cache_position=position).logits
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
        f"{record['tokens']} tokens after a short prompt, static cache, batch 1, {record['threads']} threads, "
        f"{'all compiled (torch.compile)' if record['compiled'] else 'nothing compiled'}; medians of "
        f"{record['rounds']} rounds in turn. Resident memory holds the interpreter, torch and the full-precision "
        "embeddings too; weights are all tensors of the model.",
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
