"""The command: a run in, a run out that everything of aptq accepts."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import aptq
from aptq.api import AptqError
from aptq.experiment import evaluate, export
from aptq.report import write_report
from aptq.run import Run
from aptq_bitdistiller import task, training
from aptq_bitdistiller.task import distil
from aptq_bitdistiller.training import latest_checkpoint


@pytest.fixture
def overrides(make_run: Callable[..., Path], tmp_path: Path) -> Callable[..., list[str]]:
    """Return ``make(*more)``: overrides of a short training, the output in ``tmp_path``."""

    def make(*more: str, run: Path | None = None) -> list[str]:
        return [
            f"run={run or make_run()}",
            f"output={tmp_path / 'new'}",
            f"cache_dir={tmp_path / 'cache'}",
            "fabric=cpu",
            "callback=none",
            "text.samples=8",
            "text.length=32",
            "text.prompt_length=8",
            "training.steps=12",
            "training.batch_size=2",
            "training.learning_rate=3e-3",
            "training.checkpoint_every=4",
            *more,
        ]

    return make


@pytest.mark.parametrize("loss", ["cakld", "cross_entropy"])
def test_the_result_is_a_run_that_loads_is_judged_and_exported(
    loss: str, overrides: Callable[..., list[str]], make_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = distil(overrides(f"training.loss={loss}", "training.steps=30"))
    before, metrics = Run.read(make_run()).metrics(), run.metrics()
    assert metrics["perplexity_before"] == before["perplexity"]
    assert metrics["bits"] == before["bits"]
    assert run.plan() == Run.read(make_run()).plan()
    rows = (run.folder / "losses.csv").read_text().splitlines()
    losses = [float(row.split(",")[1]) for row in rows[1:]]
    assert len(losses) == 30
    if loss == "cakld":
        assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert (run.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((run.folder / "csv").rglob("metrics.csv"))

    model = aptq.load(run.model_folder, backend="reference")
    assert model.config.quantization_config.provenance["distillation"]["loss"] == loss
    assert bool(model(torch.arange(9)[None]).logits.isfinite().all())
    judged = evaluate([f"model.path={run.model_folder}", "evaluator.num_sequences=4", "evaluator.sequence_length=64"])
    assert judged["perplexity"] == pytest.approx(metrics["perplexity"], rel=1e-5)
    folder = export([f"run={run.folder}", f"output={tmp_path / 'exported'}"])
    exported, written = (json.loads((each / "config.json").read_text()) for each in (folder, run.model_folder))
    assert exported["quantization_config"] == written["quantization_config"]
    assert write_report(run.folder).exists()


def test_an_interrupted_run_goes_on_and_ends_as_if_it_had_not_been(
    overrides: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["training.accumulate=2"]
    whole = distil(overrides(*more))
    expected = {name: tensor.clone() for name, tensor in aptq.load(whole.model_folder).state_dict().items()}
    history = (whole.folder / "losses.csv").read_text()
    shutil.rmtree(whole.folder)

    step = training.Distillation.training_step

    def killed(self: Any, *arguments: Any) -> Any:
        if self.global_step == 6:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(training.Distillation, "training_step", killed)
    before = signal.getsignal(signal.SIGINT)  # ignored where the tests run in the background of a shell
    with pytest.raises(KeyboardInterrupt):
        distil(overrides(*more))
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    found = latest_checkpoint(tmp_path / "new" / "checkpoints")
    assert found is not None
    assert found.stem == "step=4"
    state = torch.load(found, weights_only=True)
    assert all(name.endswith(".master") for name in state["state_dict"])

    resumed = distil(overrides(*more))
    tensors = aptq.load(resumed.model_folder).state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in expected.items())
    assert (resumed.folder / "losses.csv").read_text() == history
    assert not (resumed.folder / "checkpoints").exists()


def test_gamma_is_measured_or_given(overrides: Callable[..., list[str]], make_run: Callable[..., Path]) -> None:
    """And a run that was not judged needs no judging."""
    gammas = []
    for more in (["text.generate=false"], ["training.gamma=0.25"]):
        run = distil(overrides("training.steps=1", "overwrite=true", *more, run=make_run("evaluator=none")))
        gammas.append(aptq.load(run.model_folder).config.quantization_config.provenance["distillation"]["gamma"])
    assert 0 < gammas[0] < 1
    assert gammas[1] == 0.25


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["training.loss=kl"], "use one of cakld, forward, reverse, cross_entropy"),
        (["training.gamma=2"], "training.gamma=2"),
        (["training.steps=0"], "training.steps=0"),
        (["training.learning_rate=-1"], "training.learning_rate=-1"),
        (["training.stesp=3"], "stesp"),
        (["text.length=500"], "128 positions"),
        (["fabric.devices=2"], "one device"),
        (["fabric.precision=bf16-true"], "use one of 32-true, 16-mixed, bf16-mixed"),
        (["run=nowhere"], "no run folder"),
        (["run=???"], "run has no value"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(
    more: list[str], message: str, overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    with pytest.raises(AptqError, match=message):
        distil(overrides(*more))
    assert not (tmp_path / "new").exists()


def test_a_training_that_diverges_says_so(overrides: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "masked_mean", lambda values, mask: values.mean() * float("nan"))
    with pytest.raises(AptqError, match=r"loss of step 1 is nan.*Lower training.learning_rate"):
        distil(overrides())


def test_other_settings_than_those_it_began_with_are_refused_and_overwriting_starts_anew(
    overrides: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(task, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            distil(overrides("training.steps=4"))
    assert latest_checkpoint(tmp_path / "new" / "checkpoints") is not None
    with pytest.raises(AptqError, match=r"training.steps: 4 -> 2"):
        distil(overrides("training.steps=2"))
    run = distil(overrides("training.steps=2", "overwrite=true"))
    assert len((run.folder / "losses.csv").read_text().splitlines()) == 3
    with pytest.raises(AptqError, match="is finished"):
        distil(overrides("training.steps=2"))


def test_the_command_trains_and_helps(overrides: Callable[..., list[str]], tmp_path: Path) -> None:
    words = [sys.executable, "-m", "aptq", "-cn", "bitdistiller"]
    helped = subprocess.run([*words, "--help"], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert "run=runs/two training.steps=500" in helped
    assert "gamma: null" in helped
    done = subprocess.run([*words, *overrides("training.steps=2")], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "perplexity on" in done.stdout
    assert (tmp_path / "new" / "log.txt").exists()


def test_a_run_with_a_packed_embedding_is_refused(
    overrides: Callable[..., list[str]], make_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = make_run("model.quantize_embeddings=8", "evaluator=none")
    with pytest.raises(AptqError, match="has a packed embedding"):
        distil(overrides(run=run))
    assert not (tmp_path / "new").exists()
