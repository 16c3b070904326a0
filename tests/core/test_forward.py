"""The forward pass against an independent float64 NumPy forward: equal to 1e-10."""

import dataclasses

import keras
import numpy as np
import pytest
from conftest import randomise
from reference import vit_forward

import keras_vit

# Head widths of 16: their square root is exact, and on TensorFlow a Python float goes through
# float32 on its way to a float64 tensor.
CONFIG = keras_vit.ViTConfig(hidden_dim=48, depth=3, num_heads=3, mlp_dim=80, patch_size=4)
IMAGE_SIZE = (12, 20)  # 3 x 5 patches


def compare(config, image_size, model_arguments, reference_arguments, tolerance):
    channels = model_arguments.get("channels", 3)
    model = randomise(
        keras_vit.build_vit(config, image_size=image_size, **{"num_classes": 7, **model_arguments})
    )
    images = np.random.default_rng(5).normal(size=(2, *image_size, channels))
    weights = {weight.path: keras.ops.convert_to_numpy(weight) for weight in model.weights}
    expected = vit_forward(
        weights,
        images,
        patch_size=config.patch_size,
        num_heads=config.num_heads,
        **reference_arguments,
    )
    logits = keras.ops.convert_to_numpy(model(images))
    assert logits.shape == expected.shape
    error = np.abs(logits - expected).max() / np.abs(expected).max()
    assert error < tolerance


# Arguments that `build_vit` and the reference share.
SHARED = [
    {"pooling": "token"},
    {"pooling": "mean"},
    {"pooling": "gap"},
    {"pooling": "map"},
    {"pooling": "mean", "class_token": False},
    {"pooling": "gap", "class_token": False},
    {"pooling": "map", "class_token": False},
    {"position": "sincos2d"},
    {"position": "sincos2d", "pooling": "gap", "class_token": False},
    {"num_registers": 2},
    {"num_registers": 2, "pooling": "gap"},
    {"num_registers": 2, "pooling": "mean"},
    {"num_registers": 2, "pooling": "map", "class_token": False, "position": "sincos2d"},
    {"pooling": "token+gap"},
    {"pooling": "token+gap", "num_registers": 2},
    {"distillation_token": True},
    {"distillation_token": True, "num_registers": 2},
    {"distillation_token": True, "position": "sincos2d"},
    {"pooling": "gap", "class_token": False, "num_registers": 2, "position": "sincos2d"},
    {"gelu": "tanh"},
    {"gelu": "tanh", "pooling": "map"},
    {"layer_norm_epsilon": 1e-3},
    {"layer_norm_epsilon": 1e-12},
    {"layer_norm_epsilon": 1e-3, "pooling": "map"},
]
# Arguments that the reference sees in the weights.
IN_WEIGHTS = [
    {"layer_scale": 0.1},
    {"qk_norm": True},
    {"qk_norm": True, "layer_norm_epsilon": 1e-3, "layer_scale": 0.1},
    {"representation_size": 11},
    {"patch_norm": True},
    {"patch_norm": True, "layer_norm_epsilon": 1e-3},
    {"qkv_bias": False},
    {"qkv_bias": False, "qk_norm": True},
    {"norm_after_pooling": True},
    {"norm_after_pooling": True, "layer_norm_epsilon": 1e-3},
    {"num_classes": 0},
    {"num_classes": 0, "representation_size": 11},
    {"channels": 1},
    {"channels": 5},
]


def name(arguments):
    return " ".join(f"{key}={value}" for key, value in arguments.items())


@pytest.mark.parametrize("arguments", SHARED, ids=name)
def test_shared_arguments(arguments, best_precision):
    compare(CONFIG, IMAGE_SIZE, arguments, arguments, best_precision)


@pytest.mark.parametrize("arguments", IN_WEIGHTS, ids=name)
def test_arguments_seen_in_the_weights(arguments, best_precision):
    seen = {"layer_norm_epsilon": arguments.get("layer_norm_epsilon", 1e-6)}
    compare(CONFIG, IMAGE_SIZE, arguments, seen, best_precision)


@pytest.mark.parametrize("arguments", [{"pooling": "gap"}, {"distillation_token": True}], ids=name)
def test_norm_after_pooling(arguments, best_precision):
    seen = {"norm_after_pooling": True, **arguments}
    compare(CONFIG, IMAGE_SIZE, seen, arguments, best_precision)


def test_features_with_a_distillation_token(best_precision):
    arguments = {"distillation_token": True}
    compare(CONFIG, IMAGE_SIZE, {"num_classes": 0, **arguments}, arguments, best_precision)


@pytest.mark.parametrize("arguments", [{}, {"qk_norm": True}, {"qkv_bias": False}], ids=name)
def test_head_dim(arguments, best_precision):
    config = dataclasses.replace(CONFIG, head_dim=4)
    compare(config, IMAGE_SIZE, arguments, {}, best_precision)


@pytest.mark.parametrize("image_size", [(8, 8), (4, 28), (28, 4)])
def test_image_sizes(image_size, best_precision):
    arguments = {"position": "sincos2d"}
    compare(CONFIG, image_size, arguments, arguments, best_precision)


@pytest.mark.parametrize(
    ("units", "patch_size", "image_size"),
    [((), 2, (24, 40)), ((1,), 3, (24, 36)), ((2, 1, 2), 1, (48, 80)), ((1, 1), 1, (30, 42))],
)
def test_hybrids(units, patch_size, image_size, best_precision):
    config = keras_vit.ViTConfig(48, 2, 3, 80, patch_size, stem_units=units, stem_width=32)
    compare(config, image_size, {}, {"stem_units": units}, best_precision)


@pytest.mark.parametrize(
    ("normalization", "mean", "std"),
    [
        ("minus_one_one", 0.5, 0.5),
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        (((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
        ((0.3, 0.7), 0.3, 0.7),
    ],
)
def test_normalization_of_pixels(normalization, mean, std, best_precision, tmp_path):
    model = randomise(
        keras_vit.build_vit(CONFIG, image_size=8, num_classes=7, normalization=normalization)
    )
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype("uint8")
    weights = {weight.path: keras.ops.convert_to_numpy(weight) for weight in model.weights}
    expected = vit_forward(
        weights,
        images,
        patch_size=4,
        num_heads=3,
        normalization=(np.broadcast_to(mean, 3), np.broadcast_to(std, 3)),
    )
    model.save(tmp_path / "vit.keras")
    for vit in (model, keras.saving.load_model(tmp_path / "vit.keras")):
        error = np.abs(vit.predict(images, verbose=0) - expected).max() / np.abs(expected).max()
        assert error < best_precision
