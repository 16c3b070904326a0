"""From a trained Keras model to SavedModel and `.tflite` files that are checked against it."""

from .report import (
    LIMITS,
    ExportReport,
    Limit,
    TensorInfo,
    Verification,
    verify,
)
from .saved_model import export_saved_model
from .tflite import MODES, export_tflite

__all__ = [
    "LIMITS",
    "MODES",
    "ExportReport",
    "Limit",
    "TensorInfo",
    "Verification",
    "export_saved_model",
    "export_tflite",
    "verify",
]
