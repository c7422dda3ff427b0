"""What the loss makes of the errors at a layer's outputs."""

from __future__ import annotations

from dataclasses import dataclass

from aptq.api import LayerStatistics, Option
from aptq.metrics.backward import check_run


@dataclass(frozen=True)
class Output:
    """Score a layer at an option by ``sum_tj (g_tj dy_tj)^2 / 2`` per token: what rounding it costs, in nats.

    ``dy = dW x`` is the error at the layer's outputs after rounding it with the run's quantizer and format, ``g`` the
    gradient of the model's loss there. With ``labels="model"`` (next tokens drawn from the prediction) it is the
    Fisher information, with tokens and output channels taken to be independent: the second-order estimate of the
    divergence between the predictions before and after. With "data" (the next tokens of the text) it is the empirical
    Fisher information, in which tokens that the model finds hard weigh more. With "both" it is their mean: one more run
    backwards, and half the noise. Costs of all layers are in one unit and add up.

    Options: ``samples`` of the calibration text that are run backwards; ``labels``; ``seed`` of what is drawn.

    Source: the score of NVIDIA ModelOpt's ``auto_quantize`` (``method="gradient"``), there with labels of the data.
    """

    samples: int = 8
    labels: str = "both"
    seed: int = 0

    def __post_init__(self) -> None:
        check_run(self.samples, self.labels)

    @property
    def needs_errors(self) -> bool:
        """Every layer is rounded at every option."""
        return True

    @property
    def needs_absolute(self) -> bool:
        """Outputs are what counts, not weights."""
        return False

    def cost(self, layer: LayerStatistics, option: Option) -> float:
        """Return the expected change of the loss, in nats per token."""
        return layer.loss_changes[option].channels
