"""The change of the loss along its gradient by the weights."""

from __future__ import annotations

from dataclasses import dataclass

from aptq.api import AptqError, LayerStatistics, Option
from aptq.metrics.backward import check_run

_FORMS = ("absolute", "squared")


@dataclass(frozen=True)
class Gradient:
    """Score a layer at an option by the loss's gradient ``G`` and the weight difference ``D`` after rounding.

    ``form="absolute"``: ``sum |G * D|`` over the weights and samples, first order and without cancellation (AutoRound's
    DeltaLoss, its part of the weights). ``form="squared"``: ``sum_t (G_t . D)^2 / 2`` with each token's own gradient
    ``G_t``, the Fisher form. Nats per token, both; only the second one is an estimate of a change.

    Options: ``samples`` of the calibration text that are run backwards; ``labels``, the next tokens of the text
    ("data"), drawn from the prediction ("model"), or the mean over one loss of each ("both"); ``seed`` of what is
    drawn.

    Source: AutoRound's AutoScheme (``auto_round/auto_scheme/delta_loss.py``).
    """

    form: str = "absolute"
    samples: int = 8
    labels: str = "data"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.form not in _FORMS:
            raise AptqError(f"metric.form={self.form!r} is not known; use one of {', '.join(_FORMS)}.")
        check_run(self.samples, self.labels)

    @property
    def needs_errors(self) -> bool:
        """Every layer is rounded at every option."""
        return True

    @property
    def needs_absolute(self) -> bool:
        """The absolute form is just that."""
        return self.form == "absolute"

    def cost(self, layer: LayerStatistics, option: Option) -> float:
        """Return the score, in nats per token."""
        change = layer.loss_changes[option]
        if self.form == "squared":
            return change.tokens
        if change.absolute is None:
            raise ValueError(f"{layer.name} was scored without absolute changes")
        return change.absolute
