"""llm-compressor's GPTQ, as its users run it; executed by the interpreter of the peer's own environment.

Two subcommands: ``quantize`` is the job that is measured, ``dump`` turns the checkpoint it saved into plain weights
for the common judge. Nothing of aptq is imported here.
"""

from __future__ import annotations

import argparse
import time

from job_options import commands, write_record

START = time.perf_counter()


def quantize(arguments: argparse.Namespace) -> None:
    """Quantize with static activation order on given token ids and save the compressed checkpoint."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(arguments.threads)
    seconds = {"import": time.perf_counter() - START}

    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    tokens = load_file(arguments.tokens)["input_ids"]
    samples = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()})
    seconds["load"] = time.perf_counter() - start

    start = time.perf_counter()
    weights = {
        "num_bits": arguments.bits,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": arguments.group_size,
    }
    recipe = GPTQModifier(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
        ignore=["lm_head"],
    )
    oneshot(
        model=model,
        dataset=samples,
        recipe=recipe,
        max_seq_length=tokens.shape[1],
        num_calibration_samples=tokens.shape[0],
    )
    seconds["quantize"] = time.perf_counter() - start

    start = time.perf_counter()
    model.save_pretrained(arguments.output, save_compressed=True)
    seconds["save"] = time.perf_counter() - start

    write_record(arguments.record, seconds, ("llmcompressor", "compressed-tensors", "torch", "transformers"))


def dump(arguments: argparse.Namespace) -> None:
    """Load the saved checkpoint with its own loader and save the dense float32 weights of every quantized layer."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import CompressedTensorsConfig

    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    dense = {
        f"{name}.weight": module.weight.detach().float().contiguous()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    save_file(dense, arguments.output)


def main() -> None:
    """Parse the command line and run one of the two subcommands."""
    parser, _ = commands(__doc__, quantize, dump)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
