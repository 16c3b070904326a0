"""The core's tests run on any backend: `KERAS_BACKEND=jax pytest tests/core`."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import pytest


@pytest.fixture(autouse=True)
def seed():
    keras.utils.set_random_seed(17)


@pytest.fixture
def best_precision():
    """Layers compute in float64; in float32 on JAX, where Keras makes all of float64 that.

    Returns:
        The largest difference of logits that rounding explains, as a share of the largest.
    """
    if keras.backend.backend() == "jax":
        yield 1e-5
        return
    keras.config.set_dtype_policy("float64")
    yield 1e-10
    keras.config.set_dtype_policy("float32")


def randomise(model, seed=3):
    """Gives every weight values that are neither 0 nor 1; returns the model."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        if "seed_generator" not in weight.path:
            weight.assign(rng.normal(0.1, 0.2, weight.shape) + (weight.name == "gamma"))
    return model
