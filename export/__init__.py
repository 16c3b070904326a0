"""From a trained Keras model to SavedModel and `.tflite` files that are checked against it."""

from .benchmark import Benchmark, GraphFacts, benchmark, describe_graph
from .report import ExportReport, TensorInfo
from .saved_model import export_saved_model
from .tflite import CPU_MODES, MODES, NPU_MODES, export_tflite
from .verification import LIMITS, Comparison, Limit, Verification, verify

__all__ = [
    "CPU_MODES",
    "LIMITS",
    "MODES",
    "NPU_MODES",
    "Benchmark",
    "Comparison",
    "ExportReport",
    "GraphFacts",
    "Limit",
    "TensorInfo",
    "Verification",
    "benchmark",
    "describe_graph",
    "export_saved_model",
    "export_tflite",
    "verify",
]
