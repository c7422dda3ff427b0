"""Text in, token samples out: what a model is calibrated on and what it is judged by."""

from aptq.data.samples import calibration_samples, check_length, evaluation_texts
from aptq.data.sources import check_data

__all__ = ["calibration_samples", "check_data", "check_length", "evaluation_texts"]
