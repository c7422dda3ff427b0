"""Greedy decoding by llama.cpp, in an environment that has llama-cpp-python; speaks with ``decode.py``.

Once the model is loaded, every line of the standard input asks for so many tokens after the prompt.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

from llama_cpp import Llama


def main() -> None:
    """Load ``sys.argv[1]``, a GGUF file, for ``sys.argv[2]`` threads; decode after the prompt ``sys.argv[3]``."""
    path, threads, prompt = sys.argv[1:]
    model = Llama(path, n_ctx=512, n_threads=int(threads), n_threads_batch=int(threads), verbose=False)
    given = model.tokenize(prompt.encode(), add_bos=False)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        model.reset()
        model.eval(given)
        tokens = []
        started = time.perf_counter()
        for _ in range(int(line)):
            tokens.append(model.sample(temp=0.0))
            model.eval(tokens[-1:])
        answer = {
            "seconds": time.perf_counter() - started,
            "rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "weight_bytes": Path(path).stat().st_size,
            "text": model.detokenize(tokens).decode(errors="replace"),
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
