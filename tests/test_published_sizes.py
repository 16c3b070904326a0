"""Files of the published sizes: one piece, builtin operations, rank 4 at most, Keras' numbers.

In CI two blocks of a plain ViT in all modes, and of a hybrid in two; `make test-slow` takes all of
them whole.
"""

import dataclasses
import os
import pathlib

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter

import keras_vit
from keras_vit.export import export_tflite
from keras_vit.export.benchmark import describe_graph
from keras_vit.export.tflite import CPU_MODES

CLASSES = 13
IN_CI = {"Ti/16": CPU_MODES, "R+Ti/16": ("fp32", "int8_mixed")}
CASES = [(variant, 2, mode) for variant, modes in IN_CI.items() for mode in modes] + [
    pytest.param(variant, 12, mode, marks=pytest.mark.slow)
    for variant in ("Ti/16", "S/16", "B/32", "R+Ti/16")
    for mode in CPU_MODES
]
PRETRAINED = pathlib.Path(
    os.environ.get("KERAS_VIT_PRETRAINED")
    or pathlib.Path(__file__).parents[2] / "shared" / "pretrained"
)


def random_vit(variant, depth):
    """A ViT of random weights of which none is 0 or 1: about 1 if they scale, about 0 else."""
    variant = dataclasses.replace(keras_vit.VARIANTS[variant], depth=depth)
    model = keras_vit.build_vit(variant, image_size=224, num_classes=CLASSES)
    rng = np.random.default_rng(0)
    for weight in model.weights:
        scales = weight.name == "gamma"
        weight.assign(scales + rng.normal(0, 0.1 if scales else 0.05, weight.shape))
    return model


def random_images(count):
    return np.random.default_rng(1).uniform(0, 255, (count, 224, 224, 3)).astype("float32")


def outputs(path, images):
    run = Interpreter(str(path)).get_signature_runner("serving_default")
    return np.concatenate([run(images=image[None])["logits"] for image in images])


def check(model, mode, path):
    """The file of a mode is one piece for a delegate, and that of fp32 computes what Keras does."""
    export_tflite(model, path, mode=mode, calibration=random_images(2))
    graph = describe_graph(path)
    assert (graph.partitions, graph.outside, graph.custom_ops) == (1, {}, ())
    assert graph.max_rank <= 4
    if mode == "fp32":
        images = random_images(3)
        expected = model.predict(images, verbose=0)
        assert np.ptp(expected, axis=0).max() > 1e-3 * np.abs(expected).max()  # images matter
        difference = np.abs(outputs(path, images) - expected).max()
        assert difference <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(("variant", "depth", "mode"), CASES)
def test_one_piece_in_every_mode(variant, depth, mode, tmp_path):
    check(random_vit(variant, depth), mode, tmp_path / "model.tflite")


@pytest.mark.slow
@pytest.mark.skipif(
    not PRETRAINED.is_dir(), reason="no pretrained DINOv2: set KERAS_VIT_PRETRAINED to its folder"
)
@pytest.mark.parametrize("mode", CPU_MODES)
def test_one_piece_of_a_real_model(mode, tmp_path):
    model = keras_vit.from_checkpoint(
        PRETRAINED / "dinov2_vits14.safetensors",
        num_classes=CLASSES,
        num_heads=6,
        image_size=224,
        normalization="imagenet",
    )
    head = model.get_layer("head")
    head.kernel.assign(np.random.default_rng(2).normal(0, 0.05, head.kernel.shape))
    check(model, mode, tmp_path / "model.tflite")
