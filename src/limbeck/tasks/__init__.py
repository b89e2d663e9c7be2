"""What a model's outputs mean: the loss of hard labels, probabilities, metrics and how well confidence can be trusted."""

from limbeck.tasks.base import Measured, Task
from limbeck.tasks.calibration import (
    Reliability,
    adaptive_calibration_error,
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
    reliability,
)
from limbeck.tasks.classification import Classification
from limbeck.tasks.language import Language, Writing

__all__ = [
    "Classification",
    "Language",
    "Measured",
    "Reliability",
    "Task",
    "Writing",
    "adaptive_calibration_error",
    "brier_score",
    "expected_calibration_error",
    "negative_log_likelihood",
    "reliability",
]
