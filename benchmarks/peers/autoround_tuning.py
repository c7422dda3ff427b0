"""AutoRound's rounding, tuned by signed gradient descent block by block; executed by the peer's own interpreter.

Two subcommands: ``quantize`` is the job that is measured, ``dump`` turns the checkpoint it saved into plain weights
for the common judge. Nothing of aptq is imported here.
"""

from __future__ import annotations

import argparse
import shutil
import time

from job_options import commands, write_record

START = time.perf_counter()


def quantize(arguments: argparse.Namespace) -> None:
    """Tune on given token ids, with AutoRound's defaults but for what the job says, and save in its own format."""
    import torch
    from auto_round import AutoRound
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(arguments.threads)
    seconds = {"import": time.perf_counter() - START}

    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    tokens = load_file(arguments.tokens)["input_ids"]
    samples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens.split(1)]
    seconds["load"] = time.perf_counter() - start

    start = time.perf_counter()
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(arguments.model),
        bits=arguments.bits,
        group_size=arguments.group_size,
        sym=False,
        iters=arguments.steps,
        lr=arguments.rate,
        dataset=samples,
        nsamples=tokens.shape[0],
        seqlen=tokens.shape[1],
        seed=arguments.seed,
    )
    # As its users do: layers are packed as soon as their block is tuned, so saving is part of this.
    _, folder = rounding.quantize_and_save(str(arguments.output.with_name("saved")), format="auto_round")
    seconds["quantize"] = time.perf_counter() - start
    shutil.move(folder, arguments.output)

    write_record(arguments.record, seconds, ("auto-round", "torch", "transformers"))


def dump(arguments: argparse.Namespace) -> None:
    """Load the saved checkpoint with its own loader and save what its layers make of unit inputs: their weights."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, device_map="cpu")
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "qweight")}
    if not layers:
        raise SystemExit(f"AutoRound's loader gave no packed layers of {arguments.model}: it cannot be judged here.")
    with torch.no_grad():
        dense = {
            f"{name}.weight": layer(torch.eye(layer.infeatures)).float().T.contiguous()
            for name, layer in layers.items()
        }
    save_file(dense, arguments.output)


def main() -> None:
    """Parse the command line and run one of the two subcommands."""
    parser, job = commands(__doc__, quantize, dump)
    job.add_argument("--steps", type=int, default=200, help="of descent in each block (default: AutoRound's own, 200)")
    job.add_argument("--rate", type=float, help="of learning (default: AutoRound's own)")
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
