"""From a trained Keras model to SavedModel and `.tflite` files that are checked against it."""

from .report import ExportReport, TensorInfo
from .saved_model import export_saved_model
from .tflite import MODES, export_tflite
from .verification import LIMITS, Comparison, Limit, Verification, verify

__all__ = [
    "LIMITS",
    "MODES",
    "Comparison",
    "ExportReport",
    "Limit",
    "TensorInfo",
    "Verification",
    "export_saved_model",
    "export_tflite",
    "verify",
]
