"""ModelOpt's own plans, as its users get them; executed by the interpreter of the peer's own environment.

``auto_quantize`` scores layers at 2, 3, 4 and 8 bits (its symmetric integers in groups of 64, weights alone) by the
gradient of the text's loss, those of a fused layer together (``--apart``: each by itself), and chooses by itself. It
scores once; budgets are solved for one by one. What it chose is left as JSON, for our quantizer to go by. Nothing of
aptq is imported here.
"""

from __future__ import annotations

import importlib.metadata
import json
import time
import warnings
from pathlib import Path
from random import Random
from typing import Any

from scheme_options import options

_WIDTHS = (2, 3, 4, 8)
_WEIGHTS = "weight_quantizer"
_HEAD = "lm_head"


def main() -> None:
    """Write ``{"plans": {budget: {layer: bits}}, "seconds": float, "versions": {...}}``."""
    parser = options(__doc__)
    parser.add_argument("--apart", action="store_true", help="a width for each layer, not for each fused one")
    arguments = parser.parse_args()

    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.quantization.algorithms import AutoQuantizeGradientSearcher
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if arguments.apart:
        AutoQuantizeGradientSearcher.quant_grouping_rules = []  # as its documentation has users change them
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("error", message="AutoQuantize FAILED")  # or the plan would be over the budget
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    ids = _samples(arguments.calibration, tokenizer, arguments.samples, arguments.length, arguments.seed)
    batches = [{"input_ids": sample, "labels": sample} for sample in torch.tensor(ids).split(1)]
    started = time.perf_counter()
    _, found = mtq.auto_quantize(
        AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32),
        # Without the pattern, a head that stays at 16 bits would be counted among the layers that the budget is for.
        constraints={
            "effective_bits": arguments.budgets[0],
            "cost": {"excluded_module_name_patterns": [_HEAD]},
        },
        quantization_formats=[_integers(bits) for bits in _WIDTHS],
        data_loader=batches,
        forward_step=lambda model, batch: model(**batch),
        loss_func=lambda output, batch: output.loss,
        disabled_layers=[_HEAD],
        num_calib_steps=len(batches),
        num_score_steps=len(batches),
        method="gradient",
    )
    plans = {
        str(budget): _bits(mtq.get_auto_quantize_config(found, {"effective_bits": budget}))
        for budget in arguments.budgets
    }
    packages = ("nvidia-modelopt", "torch", "transformers")
    record = {
        "plans": plans,
        "seconds": time.perf_counter() - started,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    arguments.output.write_text(json.dumps(record, indent=1), encoding="utf-8")


def _integers(bits: int) -> dict[str, Any]:
    """Return the format of weights alone in groups of 64, which takes their largest magnitude and no text."""
    return {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": f"*{_WEIGHTS}", "cfg": {"num_bits": bits, "block_sizes": {-1: 64}}},
        ],
        "algorithm": {"method": "max", "skip_forward_without_activation_calib": True},
    }


def _bits(config: dict[str, Any]) -> dict[str, int]:
    """Return the bits of the layers that are quantized at all."""
    layers = [
        each for each in config["quant_cfg"] if each["quantizer_name"].endswith(f".{_WEIGHTS}") and each["enable"]
    ]
    return {each["quantizer_name"].removesuffix(f".{_WEIGHTS}"): each["cfg"]["num_bits"] for each in layers}


def _samples(path: Path, tokenizer: Any, count: int, length: int, seed: int) -> list[list[int]]:
    """Return the samples that aptq cuts with this seed: passages about as long as one, shuffled, joined and cut."""
    passages, gathered, start = [], "", ""
    with path.open(encoding="utf-8-sig") as lines:
        for line in filter(str.strip, lines):
            text = json.loads(line)["text"]
            gathered += start + text if text.strip() else ""
            start = "\n\n"
            if len(gathered) >= 4 * length:
                passages.append(gathered.strip("\n"))
                gathered = ""
    if gathered:
        passages.append(gathered.strip("\n"))
    random = Random(seed)
    tokens: list[int] = []
    for passage in sorted(passages, key=lambda _: random.random()):
        tokens += tokenizer(f"{passage}\n\n", add_special_tokens=False).input_ids
        if len(tokens) >= count * length:
            return [tokens[first : first + length] for first in range(0, count * length, length)]
    raise SystemExit(f"{path} is too short for {count} samples of {length} tokens.")


if __name__ == "__main__":
    main()
