"""What the tests of training, evaluation, export and the command share."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import pytest


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """What `keras-vit train` makes of digits by default. Tests must not change the folder."""
    from keras_vit.training import train

    return train("digits", tmp_path_factory.mktemp("runs") / "digits")
