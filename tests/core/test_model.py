"""build_vit: sizes, names, initialisation, training behaviour, errors."""

import dataclasses
import re

import keras
import numpy as np
import pytest
from conftest import randomise

import keras_vit
from keras_vit import VARIANTS, ViTConfig, build_vit
from keras_vit.layers import drawing_by
from keras_vit.model import check_whole

CONFIG = ViTConfig(hidden_dim=32, depth=2, num_heads=2, mlp_dim=48, patch_size=4)

# 224 pixels, 1000 classes: google-research/vision_transformer, models_test.py; timm has the same.
PARAMETERS = {
    "Ti/16": 5_717_416,
    "S/16": 22_050_664,
    "S/32": 22_878_952,
    "B/8": 86_576_872,
    "B/16": 86_567_656,
    "B/32": 88_224_232,
    "L/16": 304_326_632,
    "L/32": 306_535_400,
    "H/14": 632_045_800,
    "R+Ti/16": 6_337_704,
    "R26+S/32": 36_431_912,
    "R50+B/16": 98_659_112,
    "R50+L/32": 328_994_856,
}


@pytest.fixture
def no_initialisation(monkeypatch):
    """Weights start at zero: counting them needs no random numbers."""
    zeros = keras.initializers.Zeros()
    for initializer in ("RandomNormal", "RandomUniform", "GlorotUniform", "LecunNormal"):
        cls = getattr(keras.initializers, initializer)
        monkeypatch.setattr(cls, "__call__", lambda self, shape, dtype=None: zeros(shape, dtype))


@pytest.mark.usefixtures("no_initialisation")
@pytest.mark.parametrize("variant", PARAMETERS)
def test_parameters_of_variants(variant):
    assert build_vit(variant).count_params() == PARAMETERS[variant]


@pytest.mark.usefixtures("no_initialisation")
def test_parameters_without_class_token_or_head():
    assert build_vit("B/16", class_token=False, pooling="gap").count_params() == 86_566_120
    assert build_vit("B/16", num_classes=0).count_params() == 85_798_656


def parameters(config):
    """The parameters at 224 pixels and 1000 classes, in closed form."""
    d, mlp, p = config.hidden_dim, config.mlp_dim, config.patch_size
    block = 4 * d * (d + 1) + d * mlp + mlp + mlp * d + d + 4 * d
    embedding = p * p * 3 * d + d + d + ((224 // p) ** 2 + 1) * d
    return embedding + config.depth * block + 2 * d + (d + 1) * 1000


def test_closed_form_agrees_with_golden_numbers():
    assert parameters(VARIANTS["B/16"]) == PARAMETERS["B/16"]


# In millions, rounded down; g/14 and G/14 as timm counts them: 1012.6 and 1844.4.
@pytest.mark.parametrize(
    ("variant", "millions"),
    [
        ("g/14", 1_012),
        ("G/14", 1_844),
        ("S/8", 22),
        ("S/14", 22),
        ("B/14", 86),
        ("L/14", 304),
        ("H/16", 632),
    ],
)
def test_variants_without_golden_number(variant, millions):
    assert parameters(VARIANTS[variant]) // 1_000_000 == millions


def test_every_variant_is_tested():
    untested = {"g/14", "G/14", "S/8", "S/14", "B/14", "L/14", "H/16"}
    assert set(VARIANTS) == set(PARAMETERS) | untested
    for name, config in VARIANTS.items():
        if config.stem_units is None:
            assert name.endswith(f"/{config.patch_size}")


def test_variant_table_is_frozen():
    with pytest.raises(TypeError):
        VARIANTS["X/1"] = CONFIG
    with pytest.raises(dataclasses.FrozenInstanceError):
        CONFIG.depth = 3


def test_weight_names_and_shapes():
    """The names are what checkpoints are mapped to: changing one breaks every loader."""
    model = build_vit(
        CONFIG,
        image_size=(8, 12),
        num_classes=7,
        num_registers=3,
        layer_scale=0.1,
        qk_norm=True,
        pooling="map",
        representation_size=11,
    )
    block = {
        "norm1/gamma": (32,),
        "norm1/beta": (32,),
        "attention/qkv/kernel": (32, 96),
        "attention/qkv/bias": (96,),
        "attention/query_norm/gamma": (16,),
        "attention/query_norm/beta": (16,),
        "attention/key_norm/gamma": (16,),
        "attention/key_norm/beta": (16,),
        "attention/proj/kernel": (32, 32),
        "attention/proj/bias": (32,),
        "layer_scale1/gamma": (32,),
        "norm2/gamma": (32,),
        "norm2/beta": (32,),
        "feed_forward/fc1/kernel": (32, 48),
        "feed_forward/fc1/bias": (48,),
        "feed_forward/fc2/kernel": (48, 32),
        "feed_forward/fc2/bias": (32,),
        "layer_scale2/gamma": (32,),
    }
    assert {weight.path: tuple(weight.shape) for weight in model.weights} == {
        "patch_encoder/projection/kernel": (48, 32),
        "patch_encoder/projection/bias": (32,),
        "patch_encoder/class_token": (1, 1, 32),
        "patch_encoder/registers": (1, 3, 32),
        "patch_encoder/position_embedding": (1, 7, 32),
        **{f"block_{i}/{name}": shape for i in range(2) for name, shape in block.items()},
        "encoder_norm/gamma": (32,),
        "encoder_norm/beta": (32,),
        "pooling/probe": (1, 1, 32),
        "pooling/query/kernel": (32, 32),
        "pooling/query/bias": (32,),
        "pooling/key_value/kernel": (32, 64),
        "pooling/key_value/bias": (64,),
        "pooling/proj/kernel": (32, 32),
        "pooling/proj/bias": (32,),
        "pooling/norm/gamma": (32,),
        "pooling/norm/beta": (32,),
        "pooling/feed_forward/fc1/kernel": (32, 48),
        "pooling/feed_forward/fc1/bias": (48,),
        "pooling/feed_forward/fc2/kernel": (48, 32),
        "pooling/feed_forward/fc2/bias": (32,),
        "pre_logits/kernel": (32, 11),
        "pre_logits/bias": (11,),
        "head/kernel": (11, 7),
        "head/bias": (7,),
    }


def test_weight_names_of_the_stem():
    config = ViTConfig(32, 1, 2, 48, 1, stem_units=(1, 2), stem_width=32)
    stem = build_vit(config, image_size=32).get_layer("stem")
    norm = {"gamma", "beta"}
    expected = {"conv_root": {"kernel"}, "gn_root": norm}
    for unit in ("block1_unit1", "block2_unit1", "block2_unit2"):
        for i in "123":
            expected |= {f"{unit}/conv{i}": {"kernel"}, f"{unit}/gn{i}": norm}
        if unit != "block2_unit2":
            expected |= {f"{unit}/conv_proj": {"kernel"}, f"{unit}/gn_proj": norm}
    paths = {f"stem/{layer}/{name}" for layer, names in expected.items() for name in names}
    assert {weight.path for weight in stem.weights} == paths


# Standard deviations of the initial weights of a B/16-wide model (vision_transformer's
# models_vit.py): uniform in +-a has a / sqrt(3); glorot a = sqrt(6 / (in + out)) gives
# sqrt(2 / (in + out)).
@pytest.mark.parametrize(
    ("weight", "std"),
    [
        ("patch_encoder/projection/kernel", (1 / 768) ** 0.5),
        ("patch_encoder/position_embedding", 0.02),
        ("patch_encoder/registers", 0.02),
        ("block_0/attention/qkv/kernel", (2 / (768 + 768)) ** 0.5),
        ("block_0/attention/proj/kernel", (2 / (768 + 768)) ** 0.5),
        ("block_0/feed_forward/fc1/kernel", (2 / (768 + 3072)) ** 0.5),
        ("block_0/feed_forward/fc1/bias", 1e-6),
        ("block_0/feed_forward/fc2/kernel", (2 / (768 + 3072)) ** 0.5),
        ("block_0/feed_forward/fc2/bias", 1e-6),
        ("pooling/probe", (2 / (1 + 768)) ** 0.5),
        ("pooling/query/kernel", (2 / (768 + 768)) ** 0.5),
        ("pooling/key_value/kernel", (2 / (768 + 768)) ** 0.5),
    ],
)
def test_initial_standard_deviation(weight, std):
    values = base_model_weights()[weight]
    assert abs(values.std() / std - 1) < 4 / np.sqrt(2 * values.size)
    assert abs(values.mean()) < 5 * std / np.sqrt(values.size)


@pytest.mark.parametrize(
    ("weight", "value"),
    [
        ("patch_encoder/projection/bias", 0),
        ("patch_encoder/class_token", 0),
        ("block_0/attention/qkv/bias", 0),
        ("block_0/attention/proj/bias", 0),
        ("block_0/layer_scale1/gamma", np.float32(1e-4)),
        ("block_0/norm1/gamma", 1),
        ("block_0/norm1/beta", 0),
        ("head/kernel", 0),
        ("head/bias", 0),
    ],
)
def test_initial_constant(weight, value):
    np.testing.assert_array_equal(base_model_weights()[weight], value)


def base_model_weights(cache={}):  # noqa: B006  built once
    if not cache:
        config = dataclasses.replace(VARIANTS["B/16"], depth=1)
        model = build_vit(config, pooling="map", num_registers=8, layer_scale=1e-4)
        cache |= {w.path: keras.ops.convert_to_numpy(w) for w in model.weights}
    return cache


def test_initial_stem():
    config = ViTConfig(32, 1, 2, 48, 1, stem_units=(1,), stem_width=64)
    weights = {
        w.path: keras.ops.convert_to_numpy(w) for w in build_vit(config, image_size=32).weights
    }
    kernel = weights["stem/conv_root/kernel"]
    assert abs(kernel.std() / (1 / (7 * 7 * 3)) ** 0.5 - 1) < 0.05
    np.testing.assert_array_equal(weights["stem/block1_unit1/gn3/gamma"], 0)
    np.testing.assert_array_equal(weights["stem/block1_unit1/gn2/gamma"], 1)


def test_output_shapes():
    model = build_vit(CONFIG, image_size=(8, 12), num_classes=7, channels=2)
    assert model.input_shape == (None, 8, 12, 2)
    assert model.output_shape == (None, 7)
    for batch in (1, 3):
        assert model(np.zeros((batch, 8, 12, 2), "float32")).shape == (batch, 7)
    assert build_vit(CONFIG, image_size=8, num_classes=0).output_shape == (None, 32)


def test_patch_size_replaces_the_variants():
    model = build_vit(CONFIG, image_size=12, patch_size=6)
    assert model.get_layer("patches").compute_output_shape((None, 12, 12, 3)) == (None, 4, 108)


def test_names():
    assert build_vit("Ti/16", image_size=32).name == "vit_Ti16"
    assert build_vit("R+Ti/16", image_size=32).name == "vit_R_Ti16"
    assert build_vit("Ti/16", image_size=32, patch_size=8).name == "vit_Ti8"
    assert build_vit(VARIANTS["Ti/16"], image_size=32).name == "vit_Ti16"
    assert build_vit(CONFIG, image_size=8).name == "vit"
    assert build_vit(CONFIG, image_size=8, name="mine").name == "mine"


def test_uint8_images_are_taken_when_normalised():
    model = build_vit(CONFIG, image_size=8, num_classes=0, normalization="imagenet")
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype("uint8")
    np.testing.assert_array_equal(
        model.predict(images, verbose=0), model.predict(images.astype("float32"), verbose=0)
    )


@pytest.mark.parametrize("stem_units", [None, (1, 1)])
def test_mixed_bfloat16(stem_units):
    """Pixels and logits are float32, tokens bfloat16, and the result is near float32's."""
    size = 8 if stem_units is None else 64
    config = dataclasses.replace(CONFIG, stem_units=stem_units, stem_width=32)
    arguments = {"image_size": size, "num_classes": 7, "normalization": "imagenet"}
    model = randomise(build_vit(config, **arguments))
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        mixed = build_vit(config, **arguments)
    finally:
        keras.config.set_dtype_policy(before)
    mixed.set_weights(model.get_weights())
    assert {keras.backend.standardize_dtype(w.dtype) for w in mixed.weights} == {"float32"}
    compute = {layer.name: layer.compute_dtype for layer in mixed.layers}
    assert compute["normalization"] == compute["head"] == "float32"
    assert compute["patch_encoder"] == compute["block_1"] == "bfloat16"
    assert mixed.get_layer("block_1").attention.qkv.compute_dtype == "bfloat16"
    images = np.random.default_rng(0).uniform(0, 255, (3, size, size, 3)).astype("float32")
    expected, logits = model.predict(images, verbose=0), mixed.predict(images, verbose=0)
    assert logits.dtype == np.float32
    error = np.abs(logits - expected).max() / np.abs(expected).max()
    assert 1e-5 < error < 0.05


def test_drop_path_grows_linearly():
    config = dataclasses.replace(CONFIG, depth=5)
    model = build_vit(config, image_size=8, drop_path=0.2)
    rates = [model.get_layer(f"block_{i}").drop_path.rate for i in range(5)]
    np.testing.assert_allclose(rates, [0, 0.05, 0.1, 0.15, 0.2])


@pytest.mark.parametrize("distillation_token", [False, True])
def test_skip_unread_tokens_gives_the_same_outputs_and_gradients(distillation_token):
    """On every backend, the gradients are those that one step of plain SGD takes off."""
    arguments = {"distillation_token": distillation_token, "num_registers": 3, "num_classes": 7}
    x = np.random.default_rng(0).normal(size=(5, 8, 12, 3)).astype("float32")
    y = np.arange(5)
    outputs, weights = [], []
    for function in (lambda model: model, keras_vit.skip_unread_tokens):
        whole = randomise(build_vit(CONFIG, image_size=(8, 12), **arguments))
        model = function(whole)
        assert [w.path for w in model.weights] == [w.path for w in whole.weights]
        outputs.append(model.predict(x, verbose=0))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        jit_compile = keras.backend.backend() == "jax"
        model.compile(keras.optimizers.SGD(1.0), loss, jit_compile=jit_compile)
        model.train_on_batch(x, y)
        weights.append(whole.get_weights())
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-5)
    for expected, weight in zip(*weights, strict=True):
        np.testing.assert_allclose(weight, expected, rtol=1e-4, atol=1e-5)
    (block,) = [layer for layer in model.get_config()["layers"] if layer["name"] == "block_1"]
    assert block["inbound_nodes"][0]["kwargs"]["queries"] == 1 + distillation_token


@pytest.mark.parametrize("pooling", ["mean", "gap", "token+gap", "map"])
def test_skip_unread_tokens_leaves_other_poolings_alone(pooling):
    model = build_vit(CONFIG, image_size=8, pooling=pooling)
    assert keras_vit.skip_unread_tokens(model) is model


def test_skip_unread_tokens_with_layers_of_ones_own():
    """They may follow the output, but not read the tokens that would be left out."""
    vit = randomise(build_vit(CONFIG, image_size=8, num_classes=7))
    x = np.random.default_rng(0).normal(size=(3, 8, 8, 3)).astype("float32")
    model = keras.Model(vit.input, keras.layers.Softmax()(vit.output))
    fast = keras_vit.skip_unread_tokens(model)
    np.testing.assert_allclose(fast(x), model(x), rtol=1e-5)
    mean = keras.layers.GlobalAveragePooling1D(name="mean")
    for name in ("block_1", "encoder_norm"):
        tokens = vit.get_layer(name).output
        with pytest.raises(ValueError, match=r"read by the model's own pooling.*'mean' reads them"):
            keras_vit.skip_unread_tokens(keras.Model(vit.input, [vit.output, mean(tokens)]))
        with pytest.raises(ValueError, match=r"whose 'output' reads them"):
            keras_vit.skip_unread_tokens(keras.Model(vit.input, [vit.output, tokens]))


def test_skip_unread_tokens_of_a_quantized_model():
    vit = randomise(build_vit(CONFIG, image_size=8, num_classes=7))
    x = np.random.default_rng(0).normal(size=(3, 8, 8, 3)).astype("float32")
    fast = keras_vit.skip_unread_tokens(vit)
    vit.quantize("int8")
    np.testing.assert_allclose(fast(x), vit(x), rtol=1e-3, atol=1e-3)


def test_check_whole_knows_all_layers():
    hybrid = keras_vit.ViTConfig(24, 1, 3, 40, 1, stem_units=(1,), stem_width=32)
    for arguments in (
        {"distillation_token": True, "norm_after_pooling": True, "normalization": "imagenet"},
        {"pooling": "map", "representation_size": 11},
    ):
        check_whole(build_vit(hybrid, image_size=8, num_classes=7, **arguments))


@pytest.mark.parametrize("normalization", ["imagenet", "minus_one_one"])
def test_normalization_is_along_the_last_axis(normalization):
    """Whatever `image_data_format` says, with as many rows as channels, too."""
    x = np.random.default_rng(0).uniform(0, 255, (2, 3, 6, 3)).astype("float32")
    config = dataclasses.replace(CONFIG, patch_size=3)
    model = randomise(build_vit(config, image_size=(3, 6), normalization=normalization))
    expected = keras.ops.convert_to_numpy(model(x))
    before = keras.config.image_data_format()
    keras.config.set_image_data_format("channels_first")
    try:
        found = keras.ops.convert_to_numpy(model(x))
    finally:
        keras.config.set_image_data_format(before)
    np.testing.assert_array_equal(found, expected)


def test_skip_unread_tokens_error():
    inputs = keras.Input((8, 8, 3))
    with pytest.raises(ValueError, match=r"must be one that `keras_vit.build_vit` made"):
        keras_vit.skip_unread_tokens(keras.Model(inputs, keras.layers.Flatten()(inputs)))


def dropouts(layer, prefix=""):
    """(path, Dropout) of every Dropout within a layer."""
    for name, value in vars(layer).items():
        if isinstance(value, keras.layers.Dropout):
            yield prefix + name, value
        elif isinstance(value, keras.layers.Layer):
            yield from dropouts(value, f"{prefix}{name}/")


def test_dropout_stands_where_the_paper_puts_it():
    model = build_vit(
        CONFIG, image_size=8, pooling="map", dropout=0.3, attention_dropout=0.4, drop_path=0.2
    )
    rates = {
        f"{layer.name}/{path}": sublayer.rate
        for layer in model.layers
        for path, sublayer in dropouts(layer)
    }
    assert rates == {
        "patch_encoder/dropout": 0.3,
        **{f"block_{i}/attention/dropout": 0.3 for i in range(2)},
        **{f"block_{i}/attention/attention_dropout": 0.4 for i in range(2)},
        **{f"block_{i}/feed_forward/dropout": 0.3 for i in range(2)},
        "block_0/drop_path": 0,
        "block_1/drop_path": 0.2,
        "pooling/feed_forward/dropout": 0,
    }


def test_dropout_is_applied_where_it_stands():
    """In the order of the paper's equations; the first block's rate of DropPath is 0."""
    shapes = []

    def draw(_, shape):
        shapes.append(tuple(int(size) for size in shape))
        return keras.ops.full(shape, 0.9)

    config = keras_vit.ViTConfig(hidden_dim=10, depth=2, num_heads=5, mlp_dim=14, patch_size=4)
    rates = {"dropout": 0.3, "attention_dropout": 0.4, "drop_path": 0.2}
    model = build_vit(config, image_size=(8, 12), **rates)
    with drawing_by(draw):
        model(np.zeros((3, 8, 12, 3), "float32"), training=True)
    tokens, path = (3, 7, 10), (3, 1, 1)
    block_0 = [(3, 5, 7, 7), tokens, (3, 7, 14), tokens]
    block_1 = [(3, 5, 7, 7), tokens, path, (3, 7, 14), tokens, path]
    assert shapes == [tokens, *block_0, *block_1]


def test_training_reduces_the_loss():
    """Gradients reach every weight, and fit works, with each kind of weight in the model."""
    model = build_vit(
        CONFIG,
        image_size=8,
        num_classes=3,
        pooling="map",
        num_registers=1,
        layer_scale=0.1,
        qk_norm=True,
        dropout=0.1,
        drop_path=0.1,
        representation_size=11,
    )
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 48)
    images = rng.normal(size=(48, 8, 8, 3)) + labels[:, None, None, None]
    model.compile(
        keras.optimizers.Adam(1e-2),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=keras.backend.backend() == "jax",
    )
    before = {w.path: keras.ops.convert_to_numpy(w) for w in model.trainable_weights}
    losses = model.fit(images, labels, batch_size=16, epochs=8, verbose=0).history["loss"]
    assert losses[-1] < 0.5 * losses[0]
    same = [
        w.path
        for w in model.trainable_weights
        if np.array_equal(keras.ops.convert_to_numpy(w), before[w.path])
    ]
    assert same == []


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"variant": "B/17"}, ValueError, r"`variant` must be one of Ti/16, .*'B/17'"),
        ({"variant": 16}, TypeError, r"must be a name or a ViTConfig.*variant=16 of type int"),
        ({"image_size": 9}, ValueError, r"images must be divisible .* image_size=\(9, 9\)"),
        ({"image_size": (8, 10)}, ValueError, r"divisible by `patch_size`.* 8 x 10"),
        ({"image_size": (8, 8, 3)}, ValueError, r"int or \(height, width\).*\(8, 8, 3\)"),
        ({"image_size": 8.0}, ValueError, r"`image_size` must be a positive int.*image_size=8.0"),
        ({"image_size": 0}, ValueError, r"`image_size` must be a positive int.*image_size=0"),
        ({"num_classes": -1}, ValueError, r"`num_classes` must be a positive int.*-1"),
        ({"num_classes": 2.0}, ValueError, r"`num_classes` must be a positive int.*2.0"),
        ({"patch_size": 0}, ValueError, r"`patch_size` must be a positive int.*patch_size=0"),
        ({"channels": 0}, ValueError, r"`channels` must be a positive int.*channels=0"),
        ({"pooling": "cls"}, ValueError, r"`pooling` must be one of 'token', .*'cls'"),
        ({"class_token": False}, ValueError, r"needs a class token.*class_token=False"),
        (
            {"pooling": "token+gap", "class_token": False},
            ValueError,
            r'pooling="token\+gap" needs a class token.*class_token=False',
        ),
        (
            {"pooling": "gap", "distillation_token": True},
            ValueError,
            r"distillation token needs pooling=.token.*pooling='gap'",
        ),
        (
            {"representation_size": 5, "distillation_token": True},
            ValueError,
            r"distillation token needs .*representation_size=5",
        ),
        ({"num_registers": -1}, ValueError, r"`num_registers` must be an int of at least 0.*-1"),
        ({"layer_norm_epsilon": -1.0}, ValueError, r"finite number from 0 on.*epsilon=-1.0"),
        ({"position": "rope"}, ValueError, r"`position` must be one of.*'rope'"),
        ({"representation_size": 0}, ValueError, r"`representation_size` must be a positive"),
        ({"dropout": 1.0}, ValueError, r"`dropout` must be in \[0, 1\).*dropout=1.0"),
        ({"attention_dropout": -0.1}, ValueError, r"`attention_dropout` must be in.*-0.1"),
        ({"drop_path": 1}, ValueError, r"`drop_path` must be in.*drop_path=1"),
        ({"gelu": "relu"}, ValueError, r"`gelu` must be one of 'erf', 'tanh'.*'relu'"),
        ({"normalization": "clip"}, ValueError, r"`normalization` must be one of.*'clip'"),
        ({"normalization": 0.5}, ValueError, r"or \(mean, std\). Received: normalization=0.5"),
        ({"normalization": (127.5, 127.5)}, ValueError, r"numbers in \[0, 1\].*127.5"),
        ({"normalization": ((0.1, 0.2), 0.5)}, ValueError, r"each of 3 channels.*0.2"),
        ({"normalization": (float("nan"), 0.5)}, ValueError, r"numbers in \[0, 1\].*nan"),
        ({"normalization": (0.5, 0.0)}, ValueError, r"must not be 0.*\(0.5, 0.0\)"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_errors(arguments, error, match):
    with pytest.raises(error, match=match):
        build_vit(**{"variant": CONFIG, "image_size": 8, **arguments})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hidden_dim": 33}, r"divisible by `num_heads`.*hidden_dim=33, num_heads=2"),
        ({"depth": 0}, r"`depth` must be a positive int.*depth=0"),
        ({"mlp_dim": 1.5}, r"`mlp_dim` must be a positive int.*1.5"),
        ({"head_dim": 0}, r"`head_dim` must be a positive int.*head_dim=0"),
        ({"num_heads": True}, r"`num_heads` must be a positive int.*True"),
        ({"stem_units": 3}, r"`stem_units` must be None or a tuple of positive ints.*=3"),
        ({"stem_units": (3,), "stem_width": 40}, r"`stem_width` must be a multiple of 32.*=40"),
        ({"stem_units": (3, 0)}, r"`stem_units` must be a positive int.*0"),
    ],
)
def test_config_errors(change, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(CONFIG, **change)


def test_sincos2d_needs_a_width_of_fours():
    config = dataclasses.replace(CONFIG, hidden_dim=34)
    with pytest.raises(ValueError, match=r"multiple of 4 and at least 8.*hidden_dim=34"):
        build_vit(config, image_size=8, position="sincos2d")


def test_hybrid_whose_stem_is_not_divisible():
    config = ViTConfig(32, 1, 2, 48, 2, stem_units=(), stem_width=32)
    match = r"stem must be divisible.*image_size=\(20, 20\), patches of 2 on 5 x 5"
    with pytest.raises(ValueError, match=match):
        build_vit(config, image_size=20)


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", keras_vit.__version__)
