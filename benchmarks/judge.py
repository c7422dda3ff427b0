"""The one judge of all contestants: puts their dense weights into the same model and measures its perplexity."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from aptq.data import evaluation_texts
from aptq.evaluators.perplexity import Perplexity
from aptq.settings import DataSettings


def most_values_in_a_group(weight: Tensor, group_size: int) -> int:
    """Return the largest number of different values that any group of a weight ``[out, in]`` holds."""
    most = 0
    for group in weight.split(group_size, dim=1):
        ordered = group.sort(dim=1).values
        most = max(most, 1 + int((ordered[:, 1:] != ordered[:, :-1]).sum(dim=1).max()))
    return most


def check(dense: dict[str, Tensor], expected: set[str], bits: int, group_size: int) -> None:
    """Raise ``ValueError`` unless exactly the expected layers were quantized and every group has its few values."""
    if set(dense) != expected:
        missing, extra = sorted(expected - set(dense)), sorted(set(dense) - expected)
        raise ValueError(f"The result has other layers than the model: {missing[:3]} missing, {extra[:3]} too many.")
    for name, weight in dense.items():
        found = most_values_in_a_group(weight, group_size)
        if found > 2**bits:
            raise ValueError(f"{name}: a group holds {found} values, {bits} bits allow {2**bits}: not quantized so.")


def quantizable(model: PreTrainedModel) -> set[str]:
    """Return the names of the weights that every contestant quantizes: all linear layers but the head."""
    head = model.get_output_embeddings()
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }


def main() -> None:
    """Read the list of results, judge each, write ``{result: {text: perplexity}}``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="full-precision folder")
    parser.add_argument("--evaluation", required=True, help="JSON: {name: file}")
    parser.add_argument("--sequences", type=int, required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--results", type=Path, required=True, help="JSON file: [{key, bits, file}]")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    evaluator = Perplexity(sequence_length=arguments.length, num_sequences=arguments.sequences)
    data = DataSettings(source="text", evaluation_path=json.loads(arguments.evaluation))
    texts = evaluation_texts(data, tokenizer, evaluator.max_tokens)

    def judged() -> dict[str, float]:
        return evaluator.evaluate(model, texts, lambda name, share: None)["perplexity"]

    perplexities = {"full": judged()}
    expected = quantizable(model)
    for result in json.loads(arguments.results.read_text(encoding="utf-8")):
        dense = load_file(result["file"])
        check(dense, expected, result["bits"], arguments.group_size)
        model.load_state_dict(dense, strict=False)
        perplexities[result["key"]] = judged()
    arguments.output.write_text(json.dumps(perplexities, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
