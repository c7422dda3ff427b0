"""What one rounded layer at a time does to the model's predictions."""

from __future__ import annotations

from dataclasses import dataclass

from aptq.api import AptqError, LayerStatistics, Option


@dataclass(frozen=True)
class Divergence:
    """Score a layer at an option by the measured divergence of the predictions when it alone is rounded, in nats.

    ``KL(p || p')`` per token, ``p`` the full-precision model's prediction and ``p'`` that of the model with this one
    layer (or group of layers that must share an option) rounded by the run's quantizer and format. Nothing is
    approximated but that costs of several layers add up, and the price is a run through the rest of the model for every
    layer and option.

    Options: ``samples`` of the calibration text; ``last_tokens``, how many predictions of each are compared, from its
    end (null: all), which saves most of the time that goes into the head.

    Source: the score of NVIDIA ModelOpt's ``auto_quantize`` (``method="kl_div"``); for layers of CNNs, ZeroQ (CVPR
    2020), section 3.2.
    """

    samples: int = 2
    last_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "last_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise AptqError(f"metric.{name}={value} is not allowed; use 1 or more.")

    @property
    def needs_errors(self) -> bool:
        """Every layer is rounded at every option."""
        return True

    def cost(self, layer: LayerStatistics, option: Option) -> float:
        """Return the divergence, in nats per token."""
        return layer.divergences[option]
