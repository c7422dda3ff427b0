"""AutoRound's own plans, as its users get them; executed by the interpreter of the peer's own environment.

AutoScheme scores every layer at 2, 3, 4 and 8 bits and chooses by itself; nothing is tuned (``iters=0``). What it chose
is left as JSON, for our quantizer to go by. Nothing of aptq is imported here.
"""

from __future__ import annotations

import importlib.metadata
import json
import time

from scheme_options import options

_SCHEMES = ("W2A16G64", "W3A16G64", "W4A16G64", "W8A16G64")


def main() -> None:
    """Write ``{"plans": {budget: {layer: bits}}, "seconds": float, "versions": {...}}``."""
    arguments = options(__doc__).parse_args()

    import torch
    from auto_round import AutoRound, AutoScheme
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(arguments.threads)
    started, plans = time.perf_counter(), {}
    for budget in arguments.budgets:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
        scheme = AutoScheme(
            avg_bits=budget,
            options=_SCHEMES,
            ignore_scale_zp_bits=True,
            dataset=str(arguments.calibration),
            nsamples=arguments.samples,
            seqlen=arguments.length,
        )
        rounding = AutoRound(
            model,
            AutoTokenizer.from_pretrained(arguments.model),
            scheme=scheme,
            iters=0,
            sym=False,
            dataset=str(arguments.calibration),
            nsamples=arguments.samples,
            seqlen=arguments.length,
            seed=arguments.seed,
        )
        rounding.post_init()  # chooses; what would follow rounds to nearest
        plans[str(budget)] = {
            name: int(layer["bits"]) for name, layer in rounding.layer_config.items() if int(layer["bits"]) < 16
        }
    packages = ("auto-round", "torch", "transformers")
    record = {
        "plans": plans,
        "seconds": time.perf_counter() - started,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    arguments.output.write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
