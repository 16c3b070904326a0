"""What is installed here, for the records that runs and exports keep."""

import importlib.metadata
import platform

import keras_vit

PACKAGES = (
    "keras",
    "tensorflow",
    "tensorflow-cpu",
    "ai-edge-litert",
    "litert-quantizer",
    "numpy",
)


def versions():
    """The versions of Python, keras-vit and those `PACKAGES` that are installed."""
    found = {"python": platform.python_version(), "keras-vit": keras_vit.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
