"""Resized positions against the code that each way is of."""

import keras
import numpy as np
import pytest
from conftest import randomise
from PIL import Image
from scipy import ndimage

import keras_vit
from keras_vit.positions import resize_positions

GRID = (3, 5)
TABLE = np.random.default_rng(11).normal(size=(15, 4))  # N = 3 x 5, D = 4
SIZES = [(7, 4), (2, 9), (2, 2), (9, 11), (1, 5), (3, 6)]


@pytest.mark.parametrize("size", SIZES)
def test_linear_is_scipys_zoom(size):
    """google-research/vision_transformer, `interpolate_posembed`."""
    zoom = (size[0] / 3, size[1] / 5, 1)
    expected = ndimage.zoom(TABLE.reshape(3, 5, 4), zoom, order=1).reshape(-1, 4)
    np.testing.assert_allclose(resize_positions(TABLE, GRID, size, "linear"), expected, atol=1e-14)


@pytest.mark.parametrize("size", SIZES)
def test_antialiased_bicubic_is_pillows(size):
    """PyTorch's antialiased bicubic is made to equal Pillow's."""
    found = resize_positions(TABLE, GRID, size, "antialiased_bicubic")
    for channel in range(4):
        image = Image.fromarray(TABLE[:, channel].reshape(3, 5).astype("float32"))
        expected = np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC)).ravel()
        np.testing.assert_allclose(found[:, channel], expected, atol=2e-7)


def test_bicubic_is_opencvs():
    """OpenCV 4.13's INTER_CUBIC in float64, like PyTorch's bicubic: a = -0.75, clamped borders."""
    found = resize_positions(TABLE, GRID, (6, 10), "bicubic").reshape(6, 10, 4)
    expected = [
        [0.15664054, 0.03246931, -0.18582009],
        [-0.16122388, -0.35686525, -0.6899961],
    ]
    np.testing.assert_allclose(found[:2, :3, 0], expected, atol=1e-8)


def test_bicubic_when_the_grid_shrinks():
    """Without antialias, four old samples make a new one however far apart: here 4 of 8."""
    line = np.arange(8.0)[:, None] ** 2
    found = resize_positions(line, (8, 1), (2, 1), "bicubic")
    # Centres at 1.5 and 5.5; at half a sample, a = -0.75 gives -0.09375, 0.59375 twice, -0.09375.
    weights = np.array([-0.09375, 0.59375, 0.59375, -0.09375])
    np.testing.assert_allclose(found[:, 0], [weights @ line[0:4, 0], weights @ line[4:8, 0]])


@pytest.mark.parametrize("interpolation", ["linear", "antialiased_bicubic", "bicubic"])
def test_the_same_grid_is_left_as_it_is(interpolation):
    table = TABLE.astype("float32")
    assert resize_positions(table, GRID, GRID, interpolation) is table
    assert resize_positions(table, GRID, (2, 2), interpolation).dtype == np.float32


def test_unknown_interpolation():
    with pytest.raises(ValueError, match=r"must be one of 'linear', .*interpolation='nearest'"):
        resize_positions(TABLE, GRID, (2, 2), "nearest")


CONFIG = keras_vit.ViTConfig(hidden_dim=24, depth=2, num_heads=3, mlp_dim=40, patch_size=4)


@pytest.mark.parametrize(
    ("arguments", "placed"),
    [
        ({}, 1),
        ({"distillation_token": True, "num_registers": 2}, 2),
        ({"pooling": "gap", "class_token": False}, 0),
    ],
)
def test_resize_model(arguments, placed):
    """Only the positions of the patches change, and a round trip of a linear ramp is exact."""
    model = randomise(keras_vit.build_vit(CONFIG, image_size=(12, 20), num_classes=7, **arguments))
    model.get_layer("block_0").trainable = False
    model.get_layer("head").kernel.trainable = False
    resized = keras_vit.resize_model(model, (8, 28), interpolation="linear")
    assert resized.input_shape == (None, 8, 28, 3)
    assert resized.name == model.name
    assert not resized.get_layer("block_0").trainable
    assert resized.get_layer("block_1").trainable
    frozen = [not weight.trainable for weight in resized.weights]
    assert frozen == [not weight.trainable for weight in model.weights]
    for old, new in zip(model.weights, resized.weights, strict=True):
        before, after = map(keras.ops.convert_to_numpy, (old, new))
        if old.path == "patch_encoder/position_embedding":
            np.testing.assert_array_equal(after[0, :placed], before[0, :placed])
            expected = ndimage.zoom(
                before[0, placed:].reshape(3, 5, 24), (2 / 3, 7 / 5, 1), order=1
            )
            np.testing.assert_allclose(after[0, placed:], expected.reshape(14, 24), atol=1e-6)
        elif "seed_generator" not in old.path:
            np.testing.assert_array_equal(after, before)


def test_table_of_another_grid():
    """With the class token's position in it, as the table of 4 x 4 patches."""
    for new in ((3, 5), (5, 3)):
        with pytest.raises(ValueError, match=r"of the shape \(3 \* 5, D\).*\(16, 24\)"):
            resize_positions(np.zeros((16, 24)), (3, 5), new, "linear")


def test_resize_model_keeps_what_has_no_table():
    """sincos2d positions are those of the new grid; the dtype policy is the model's."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = keras_vit.build_vit(
            CONFIG, image_size=12, num_classes=7, position="sincos2d", normalization="imagenet"
        )
    finally:
        keras.config.set_dtype_policy(before)
    resized = keras_vit.resize_model(randomise(model), 20)
    assert resized.get_layer("block_1").compute_dtype == "bfloat16"
    assert resized.get_layer("patch_encoder").grid_size == (5, 5)
    scale = resized.get_layer("normalization").scale
    np.testing.assert_array_equal(scale, model.get_layer("normalization").scale)


@pytest.mark.parametrize("name", ["classifier", "head"])
def test_resize_model_drops_no_layer(name):
    config = keras_vit.ViTConfig(hidden_dim=24, depth=1, num_heads=3, mlp_dim=32, patch_size=4)
    vit = keras_vit.build_vit(config, image_size=8, num_classes=0)
    head = keras.layers.Dense(7, activation="softmax", name=name)
    model = keras.Model(vit.input, head(keras.layers.Dropout(0.1, name="own")(vit.output)))
    with pytest.raises(ValueError, match=rf"layers of its own, \['own', '{name}'\]"):
        keras_vit.resize_model(model, 16)


@pytest.mark.parametrize(("change", "added"), [("quantize", "kernel_scale"), ("lora", "lora_")])
def test_changed_weights_are_not_taken_for_the_model(change, added, tmp_path):
    """Nor written: int8 kernels without their scales, or without what LoRA learned."""
    model = keras_vit.build_vit(CONFIG, image_size=12, num_classes=7, gelu="tanh")
    path = tmp_path / "vit.npz"
    keras_vit.save_checkpoint(model, path, "google")
    if change == "quantize":
        model.quantize("int8")
    else:
        model.get_layer("block_0").attention.qkv.enable_lora(4)
    with pytest.raises(ValueError, match=rf"neither quantized nor with LoRA.*qkv/{added}"):
        keras_vit.resize_model(model, 16)
    for family, name in (("timm", "new.safetensors"), ("google", "new.npz")):
        with pytest.raises(ValueError, match=rf"no place for what the model has.*{added}"):
            keras_vit.save_checkpoint(model, tmp_path / name, family)
    with pytest.raises(ValueError, match=rf"does not fit the model.\n  missing.*{added}"):
        keras_vit.load_weights(model, path)
    assert [file.name for file in tmp_path.iterdir()] == ["vit.npz"]


def test_resize_model_errors():
    model = keras_vit.build_vit(CONFIG, image_size=12, num_classes=7)
    with pytest.raises(ValueError, match=r"divisible by `patch_size`.*image_size=\(10, 10\)"):
        keras_vit.resize_model(model, 10)
    with pytest.raises(ValueError, match=r"`interpolation` must be one of.*'area'"):
        keras_vit.resize_model(model, 16, interpolation="area")
    other = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match=r"must be one that `keras_vit.build_vit` made"):
        keras_vit.resize_model(other, 16)
