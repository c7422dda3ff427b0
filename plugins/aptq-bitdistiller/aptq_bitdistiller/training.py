"""Training a student with Lightning: the module, the steps, and what is told of them."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback as LightningCallback
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from aptq.api import AptqError, Callback
from aptq_bitdistiller.loss import confidence, cross_entropy, divergence, masked_mean
from aptq_bitdistiller.student import StudentLinear, teaching
from aptq_bitdistiller.text import Text, order

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STAGE = "distil"
LOSSES = ("cakld", "forward", "reverse", "cross_entropy")
_MASTER = ".master"


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How a student is trained."""

    loss: str = "cakld"
    gamma: float | None = None  # of cakld; None: the teacher's confidence on the text
    gamma_samples: int = 32  # that its confidence is measured on, at most
    steps: int = 100
    batch_size: int = 4
    accumulate: int = 1  # batches in a step
    learning_rate: float = 3e-4
    warmup: float = 0.1  # share of the steps in which the learning rate rises to it; it then falls as a cosine, to 0
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    checkpoint_every: int = 50  # steps

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise AptqError(f"training.loss={self.loss!r} is not known; use one of {', '.join(LOSSES)}.")
        if self.gamma is not None and not 0 <= self.gamma <= 1:
            raise AptqError(f"training.gamma={self.gamma} is not allowed; use 0 to 1, or null to measure it.")
        for key in ("gamma_samples", "steps", "batch_size", "accumulate", "checkpoint_every"):
            if getattr(self, key) < 1:
                raise AptqError(f"training.{key}={getattr(self, key)} is not allowed; use 1 or more.")
        if not self.learning_rate > 0 or not 0 <= self.warmup < 1 or self.weight_decay < 0 or self.gradient_clip < 0:
            raise AptqError(
                f"training.learning_rate={self.learning_rate}, warmup={self.warmup}, weight_decay={self.weight_decay} "
                f"and gradient_clip={self.gradient_clip} are not allowed; use a learning rate above 0, a warmup from 0 "
                "to below 1, and the others from 0 up (no clipping)."
            )

    def share_of_reverse(self) -> float | None:
        """Return gamma where the loss fixes it, None where it is to be measured or there is no divergence."""
        fixed = {"forward": 0.0, "reverse": 1.0}
        return fixed.get(self.loss, self.gamma)


def mean_confidence(model: PreTrainedModel, text: Text, settings: TrainingSettings) -> float:
    """Return gamma: the mean probability that a model gives to the text's own tokens, prompts left out.

    Source: BitDistiller, section 3.2; the mean is over tokens. The published code takes the mean of the *largest*
    probabilities instead, over about ten batches with their padding.
    """
    kept = text.written()[: settings.gamma_samples]
    total, count = 0.0, int(kept.sum())
    if not count:
        raise AptqError("The teacher wrote no token behind the prompts; raise text.length, or set training.gamma.")
    for tokens, mask in zip(
        text.tokens[: settings.gamma_samples].split(settings.batch_size), kept.split(settings.batch_size), strict=True
    ):
        ids = tokens.to(model.device)
        with torch.no_grad():
            found = confidence(logits_of(model, ids), ids[:, 1:]).cpu()
        total += float(found[mask].double().sum())
    return total / count


def logits_of(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Return the logits of all predictions that have a target, ``[batch, length - 1, vocabulary]``, in float32.

    What fills a sample up lies behind its end, where no prediction that counts can see it: there is nothing to mask.
    """
    output = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    logits: Tensor = output.logits[:, :-1].float()
    return logits


class Distillation(LightningModule):
    """Teacher and student in one model, and the text they read.

    Which samples a step takes is a function of its number, so that a run that goes on takes those that it would have
    taken. A checkpoint has the trained weights, the optimizer's state and the history, and no more.

    Args:
        model: with its student layers.
        students: these layers, by name.
        text: to train on.
        settings: see there.
        gamma: the share of the reverse divergence; unused by ``cross_entropy``.
        seed: of the order of samples.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        students: Mapping[str, StudentLinear],
        text: Text,
        settings: TrainingSettings,
        gamma: float,
        seed: int,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # a checkpoint has the trained weights alone
        self.model, self.students = model, students
        self.text, self.settings, self.gamma = text, settings, gamma
        self.history: list[dict[str, float]] = []
        total = settings.steps * settings.accumulate * settings.batch_size
        self._order = list(islice(order(len(text.tokens), seed), total))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the mean loss of the predictions of one batch."""
        at = self.global_step * self.settings.accumulate + batch_idx % self.settings.accumulate
        chosen = self._order[at * self.settings.batch_size : (at + 1) * self.settings.batch_size]
        tokens = self.text.tokens[chosen].to(self.device)
        counts = self.text.predicted()[chosen].to(self.device)
        if self.settings.loss == "cross_entropy":
            return masked_mean(cross_entropy(logits_of(self.model, tokens), tokens[:, 1:]), counts)
        with torch.no_grad(), teaching(self.students):
            teacher = logits_of(self.model, tokens)
        return masked_mean(divergence(logits_of(self.model, tokens), teacher, self.gamma), counts)

    def configure_optimizers(self) -> Any:
        """Return AdamW on the trained weights, its rate rising, then falling as a cosine."""
        masters = [layer.master for layer in self.students.values()]
        optimizer = torch.optim.AdamW(
            masters, lr=self.settings.learning_rate, betas=(0.9, 0.98), weight_decay=self.settings.weight_decay
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0, as a share of the highest."""
        warm = round(self.settings.warmup * self.settings.steps)
        if step < warm:
            return (step + 1) / (warm + 1)
        done = (step - warm) / max(1, self.settings.steps - warm)
        return 0.5 * (1 + float(torch.cos(torch.tensor(done * torch.pi))))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]  # torch overloads it
        """Return the trained weights; all else is in the model and the run that the student began as."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        return {name: tensor for name, tensor in state.items() if name.endswith(_MASTER)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the history."""
        checkpoint["history"] = self.history

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the history."""
        self.history = list(checkpoint["history"])


class _Steps:
    """Stands for the batches of all steps, which are chosen by their number; says that it can go on anywhere."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._count))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class _Report(LightningCallback):
    """Tells the callbacks of aptq, its loggers among them, about every step."""

    def __init__(self, callbacks: Callback) -> None:
        self._callbacks = callbacks
        self._losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        """Report a step once its last batch is done; stop where the loss is no number."""
        assert isinstance(pl_module, Distillation)
        accumulate = pl_module.settings.accumulate
        self._losses.append(float(outputs["loss"]) * accumulate)  # Lightning has divided it
        if len(self._losses) < accumulate:
            return
        loss, self._losses = sum(self._losses) / accumulate, []
        step = trainer.global_step
        if not loss - loss == 0:
            raise AptqError(
                f"The loss of step {step} is {loss}: training has diverged. Lower training.learning_rate; with "
                "overwrite=true it starts anew."
            )
        rate = pl_module.settings.learning_rate * pl_module.rate(step - 1)
        figures = {"loss": loss, "learning_rate": rate}
        pl_module.history.append({"step": float(step), **figures})
        self._callbacks.on_advance(stage=STAGE, done=step, detail=f"loss {loss:.4f}")
        self._callbacks.on_block_end(stage=STAGE, index=step, metrics=figures)


def train(module: Distillation, folder: Path, fabric: Mapping[str, Any], callbacks: Callback) -> None:
    """Train a student; one that was interrupted goes on after its last checkpoint.

    Args:
        module: what to train.
        folder: of the checkpoints.
        fabric: accelerator, devices and precision, as in the config.
        callbacks: told about the steps.

    Raises:
        AptqError: training has diverged, or the devices cannot be had.
    """
    settings = module.settings
    saved = ModelCheckpoint(
        dirpath=folder, filename="{step}", every_n_train_steps=settings.checkpoint_every, save_on_train_epoch_end=False
    )
    try:
        trainer = Trainer(
            **fabric,
            max_steps=settings.steps,
            accumulate_grad_batches=settings.accumulate,
            gradient_clip_val=settings.gradient_clip or None,
            callbacks=[_Report(callbacks), saved],  # a step is in the history before it is saved
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
    except (ValueError, RuntimeError, TypeError) as error:
        raise AptqError(f"fabric={dict(fabric)} cannot be had here: {error}") from error
    handler = signal.getsignal(signal.SIGINT)
    with warnings.catch_warnings():
        # That dropout is off is meant so: the student is compared with its teacher, not regularized.
        warnings.filterwarnings("ignore", message="Found .* in eval mode")
        warnings.filterwarnings("ignore", message="Checkpoint directory .* not empty")  # what to go on from
        warnings.filterwarnings("ignore", message=".*treespec", category=FutureWarning)  # of Lightning itself
        try:
            trainer.fit(
                module,
                train_dataloaders=_Steps(settings.steps * settings.accumulate),
                ckpt_path=latest_checkpoint(folder),
                weights_only=True,
            )
        except SystemExit as stopped:  # what Lightning makes of Ctrl+C, which it turns off
            signal.signal(signal.SIGINT, handler)
            raise KeyboardInterrupt from stopped


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint of the most steps in a folder, None where there is none."""
    found = sorted(folder.glob("step=*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    return found[-1] if found else None
