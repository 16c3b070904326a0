"""What the tests of training, evaluation, export and the command share."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import pytest

LOGICAL_CPUS = 4

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    # Before TensorFlow starts: replicas for the tests of distributed training.
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * LOGICAL_CPUS,
    )


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """What `keras-vit train` makes of digits by default. Tests must not change the folder."""
    from keras_vit.training import train

    return train("digits", tmp_path_factory.mktemp("runs") / "digits")
