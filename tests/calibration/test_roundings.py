"""Rounded layers on disk."""

from pathlib import Path

import torch
from lightning.fabric import Fabric
from torch import nn

from aptq.api import Block, Option
from aptq.calibration.roundings import Roundings


def test_what_was_saved_is_loaded_until_it_is_removed(tmp_path: Path) -> None:
    roundings = Roundings(tmp_path / "kept", Fabric(accelerator="cpu", devices=1))
    block = Block(index=3, name="model.layers.3", module=nn.Identity(), layers={})
    packed = {
        "model.layers.3.mlp.up_proj": {
            Option(bits, size): {"qweight": torch.arange(bits), "scales": torch.ones(2) * bits}
            for bits, size in ((2, 64), (3, -1))
        }
    }
    assert not roundings.has(3)
    roundings.save(block, packed)
    assert roundings.has(3)
    found = roundings.load(block)
    assert found.keys() == packed.keys()
    for option, tensors in packed["model.layers.3.mlp.up_proj"].items():
        for key, tensor in tensors.items():
            assert torch.equal(found["model.layers.3.mlp.up_proj"][option][key], tensor)
    roundings.remove()
    assert not roundings.has(3)
