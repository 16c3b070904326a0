"""The layers alone, as parts of anyone's model."""

import keras
import numpy as np
import pytest
from conftest import randomise

from keras_vit import (
    AttentionPooling,
    FeedForward,
    MultiHeadSelfAttention,
    PatchEncoder,
    Patches,
    ResNetStem,
    TokenPooling,
    TransformerBlock,
    layers,
)
from keras_vit.hybrid import BottleneckUnit, StandardizedConv2D
from keras_vit.layers import LayerScale
from keras_vit.positions import sincos2d


def numpy(tensor):
    return keras.ops.convert_to_numpy(tensor)


def normal(*shape):
    return np.random.default_rng(1).normal(size=shape).astype("float32")


# Every argument differs from its default, and every size from every other.
LAYERS = [
    (Patches(3), (2, 6, 9, 5), (2, 6, 45)),
    (
        PatchEncoder(
            20,
            class_token=False,
            num_registers=2,
            position="sincos2d",
            grid_size=(2, 3),
            dropout=0.1,
        ),
        (4, 6, 45),
        (4, 8, 20),
    ),
    (
        PatchEncoder(
            20, distillation_token=True, patch_norm=True, dropout=0.1, layer_norm_epsilon=1e-3
        ),
        (3, 4, 45),
        (3, 6, 20),
    ),
    (
        MultiHeadSelfAttention(
            5,
            head_dim=6,
            dropout=0.1,
            attention_dropout=0.2,
            qkv_bias=False,
            qk_norm=True,
            layer_norm_epsilon=1e-3,
        ),
        (2, 7, 20),
        (2, 7, 20),
    ),
    (FeedForward(13, dropout=0.1, gelu="tanh"), (2, 7, 20), (2, 7, 20)),
    (LayerScale(0.3), (2, 7, 20), (2, 7, 20)),
    (
        TransformerBlock(
            5,
            13,
            dropout=0.1,
            attention_dropout=0.2,
            drop_path=0.3,
            layer_scale=0.4,
            qk_norm=True,
            gelu="tanh",
            layer_norm_epsilon=1e-3,
        ),
        (2, 7, 20),
        (2, 7, 20),
    ),
    (TokenPooling("gap", num_prefix_tokens=3), (2, 7, 20), (2, 20)),
    (AttentionPooling(5, 13, gelu="tanh", layer_norm_epsilon=1e-3), (2, 7, 20), (2, 20)),
    (StandardizedConv2D(6, 3, strides=2, padding="same"), (2, 7, 9, 5), (2, 4, 5, 6)),
    (BottleneckUnit(32, strides=2), (2, 7, 9, 64), (2, 4, 5, 128)),
    (ResNetStem((1, 1), width=32), (2, 24, 40, 5), (2, 3, 5, 256)),
]


@pytest.mark.parametrize(
    ("layer", "input_shape", "output_shape"), LAYERS, ids=lambda x: getattr(x, "name", "")
)
def test_layer(layer, input_shape, output_shape):
    """Shapes, config round trip with the same outputs, and use in a functional model."""
    x = normal(*input_shape)
    layer(x)
    randomise(layer)
    outputs = numpy(layer(x))
    assert outputs.shape == output_shape
    assert layer.compute_output_shape(input_shape) == output_shape

    copy = type(layer).from_config(layer.get_config())
    assert copy.get_config() == layer.get_config()
    copy.build(input_shape)
    assert [w.path for w in copy.weights] == [w.path for w in layer.weights]
    copy.set_weights(layer.get_weights())
    np.testing.assert_array_equal(numpy(copy(x)), outputs)

    inputs = keras.Input(input_shape[1:])
    model = keras.Model(inputs, layer(inputs))
    assert model.output_shape == (None, *output_shape[1:])
    np.testing.assert_allclose(model.predict(x, verbose=0), outputs, rtol=2e-5, atol=2e-5)


def test_layer_takes_a_dtype():
    block = TransformerBlock(2, 12, qk_norm=True, layer_scale=1.0, dtype="float16")
    assert numpy(block(normal(1, 3, 8))).dtype == np.float16
    assert {keras.backend.standardize_dtype(w.dtype) for w in block.weights} == {"float16"}


def test_feed_forward_of_any_rank():
    layer = FeedForward(13)
    x = normal(2, 3, 7, 20)
    expected = numpy(layer(x.reshape(1, 42, 20)))
    for shape in ((2, 3, 7), (42,), (6, 7)):
        outputs = numpy(layer(x.reshape(*shape, 20)))
        np.testing.assert_allclose(outputs, expected.reshape(*shape, 20), rtol=1e-5, atol=1e-6)


def test_patches_are_in_the_order_of_a_convolution():
    """Patches times a flattened kernel is a convolution of stride P."""
    images, kernel = normal(2, 6, 9, 5), normal(3, 3, 5, 7)
    convolved = numpy(keras.ops.conv(images, kernel, strides=3))
    projected = numpy(Patches(3)(images)) @ kernel.reshape(45, 7)
    np.testing.assert_allclose(projected.reshape(2, 2, 3, 7), convolved, rtol=1e-4, atol=1e-4)


def test_sincos2d_values():
    table = sincos2d((2, 3), 12)
    assert table.shape == (6, 12)
    omega = np.array([1, 1e-2, 1e-4])  # 1 / 10000 ** (i / 2)
    y, x = 1, 2
    row = np.concatenate(
        [np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega)]
    )
    np.testing.assert_allclose(table[y * 3 + x], row, rtol=1e-12)


def test_drop_path_drops_whole_branches_per_image():
    """An image's output is x, x + f(x) / keep, and so on: never a mixture within an image."""
    block = TransformerBlock(2, 12, drop_path=0.5)
    x = np.repeat(normal(1, 3, 8), 256, axis=0)
    block(x)
    randomise(block)
    attention = numpy(block.attention(block.norm1(x[:1])))
    outputs = numpy(block(x, training=True))

    def mlp(z):
        return numpy(block.feed_forward(block.norm2(z)))

    expected = []
    for keep_attention in (0, 1):
        z = x[:1] + 2 * keep_attention * attention
        expected += [z, z + 2 * mlp(z)]
    distance = np.stack([np.abs(outputs - e).max(axis=(1, 2)) for e in expected])
    assert distance.min(axis=0).max() < 1e-3
    counts = np.bincount(distance.argmin(axis=0), minlength=4)
    assert counts.sum() == 256
    assert counts.min() > 40  # 64 each on average
    np.testing.assert_array_equal(numpy(block(x))[0], numpy(block(x))[1])


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_few_queries_are_the_first_rows_of_all(qkv_bias):
    block = TransformerBlock(
        5, 13, head_dim=4, layer_scale=0.4, qkv_bias=qkv_bias, qk_norm=True, drop_path=0.3
    )
    x = normal(2, 7, 11)
    block(x)
    randomise(block)
    few = numpy(block(x, queries=3))
    assert few.shape == (2, 3, 11)
    np.testing.assert_allclose(few, numpy(block(x))[:, :3], rtol=1e-5, atol=1e-6)
    inputs = keras.Input((7, 11))
    assert block(inputs, queries=3).shape == (None, 3, 11)
    assert block.attention(inputs, queries=3).shape == (None, 3, 11)


@pytest.fixture
def gpu(monkeypatch):
    """Lets JAX on a CPU pass for JAX on a GPU."""
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    monkeypatch.setattr(keras.distribution, "list_devices", lambda: ["gpu:0"])


@pytest.fixture
def flash_attention(monkeypatch):
    """Takes the way that is for a GPU; Keras computes it here without cuDNN, as no test can."""
    calls = []
    ours = layers.flash_attention
    monkeypatch.setattr(layers, "can_use_flash_attention", lambda q: True)
    monkeypatch.setattr(layers, "flash_attention", lambda *x: calls.append(x) or ours(*x))
    return calls


def sgd_step(layer, x):
    """The outputs, and the weights after one step of plain SGD, which tell the gradients."""
    model = keras.Sequential([keras.Input(x.shape[1:]), layer])
    outputs = model.predict(x, verbose=0).astype("float32")
    before = model.get_weights()
    model.compile(keras.optimizers.SGD(1.0), "mse")
    model.train_on_batch(x, normal(*x.shape))
    after = model.get_weights()
    model.set_weights(before)
    return [outputs, *after], before


@pytest.mark.parametrize("tokens", [7, 8])
@pytest.mark.parametrize(("dtype", "atol"), [("float32", 3e-6), ("mixed_bfloat16", 0.03)])
def test_flash_attention_gives_the_same(flash_attention, monkeypatch, tokens, dtype, atol):
    layer = MultiHeadSelfAttention(5, head_dim=6, qk_norm=True, dtype=dtype)
    layer.build((None, tokens, 20))
    randomise(layer)
    x = normal(2, tokens, 20)
    ours, before = sgd_step(layer, x)
    assert {t.shape[1:] for call in flash_attention for t in call} == {(5, tokens, 6)}
    monkeypatch.setattr(layers, "can_use_flash_attention", lambda q: False)
    theirs, _ = sgd_step(layer, x)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=atol, rtol=0)
    steps = [abs(new - old).max() for new, old in zip(theirs[1:], before, strict=True)]
    assert np.median(steps) > 3 * atol


def test_flash_attention_is_for_all_tokens_and_no_dropout(flash_attention):
    x = normal(2, 7, 20)
    MultiHeadSelfAttention(5, attention_dropout=0.5)(x, training=True)
    MultiHeadSelfAttention(5)(x, queries=3)
    assert not flash_attention
    MultiHeadSelfAttention(5)(x, training=True)
    assert len(flash_attention) == 1


def queries(head_dim=64, dtype="bfloat16"):
    return keras.KerasTensor((2, 3, 7, head_dim), dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [8, 72, 128])
def test_flash_attention_is_for_half_precision_on_a_gpu(gpu, monkeypatch, head_dim, dtype):
    assert layers.can_use_flash_attention(queries(head_dim, dtype))
    monkeypatch.setattr(keras.distribution, "list_devices", lambda: ["cpu:0"])
    assert not layers.can_use_flash_attention(queries(head_dim, dtype))


@pytest.mark.parametrize("other", [{"dtype": "float32"}, {"head_dim": 68}, {"head_dim": 136}])
def test_flash_attention_is_for_what_cudnn_takes(gpu, other):
    assert not layers.can_use_flash_attention(queries(**other))


def test_flash_attention_is_for_jax(gpu, monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "tensorflow")
    assert not layers.can_use_flash_attention(queries())


def test_flash_attention_can_be_disabled(gpu, monkeypatch):
    monkeypatch.setattr(keras.config, "is_flash_attention_enabled", lambda: False)
    assert not layers.can_use_flash_attention(queries())


def test_dropout_acts_in_training_only():
    attention = MultiHeadSelfAttention(2, attention_dropout=0.5)
    x = normal(1, 9, 8)
    quiet = numpy(attention(x))
    np.testing.assert_array_equal(numpy(attention(x)), quiet)
    assert np.abs(numpy(attention(x, training=True)) - quiet).max() > 1e-3


def test_fused_qkv_is_initialised_as_three_matrices():
    """As glorot of the fused (D, 3 D) it would be sqrt(2) too small."""
    attention = MultiHeadSelfAttention(2)
    attention.build((None, None, 128))
    std = numpy(attention.qkv.kernel).std()
    assert abs(std / (2 / 256) ** 0.5 - 1) < 0.02


def test_number_of_tokens_may_vary():
    block = TransformerBlock(2, 12)
    inputs = keras.Input((None, 8))
    model = keras.Model(inputs, block(inputs))
    for tokens in (3, 5):
        x = normal(2, tokens, 8)
        np.testing.assert_allclose(numpy(model(x)), numpy(block(x)), rtol=1e-5, atol=1e-6)


def test_stem_of_images_of_any_size():
    stem = ResNetStem((1, 1), width=32)
    images = keras.Input((None, None, 5))
    model = keras.Model(images, stem(images))
    assert model.output_shape == (None, None, None, 256)
    for height, width in ((24, 40), (48, 24)):
        outputs = numpy(model(normal(2, height, width, 5)))
        assert outputs.shape == (2, height // 8, width // 8, 256)


def test_standardized_convolution():
    """Scaling and shifting the kernel changes nothing but the epsilon's share."""
    layer = StandardizedConv2D(6, 3, use_bias=False)
    x = normal(1, 7, 9, 5)
    layer(x)
    outputs = numpy(layer(x))
    layer.kernel.assign(numpy(layer.kernel) * 30 + 2)
    np.testing.assert_allclose(numpy(layer(x)), outputs, rtol=1e-2, atol=1e-2)
    kernel = numpy(layer.kernel).astype("float64")
    kernel = (kernel - kernel.mean((0, 1, 2))) / (kernel.std((0, 1, 2)) + 1e-5)
    expected = numpy(keras.ops.conv(x.astype("float64"), kernel))
    np.testing.assert_allclose(numpy(layer(x)), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("mixed_bfloat16", 0.03), ("mixed_float16", 0.004)]
)
@pytest.mark.parametrize(
    "make",
    [
        lambda dtype: StandardizedConv2D(64, 3, dtype=dtype),
        lambda dtype: BottleneckUnit(32, dtype=dtype),
    ],
    ids=["alone", "in a unit"],
)
def test_standardized_convolution_in_mixed_precision(make, dtype, tolerance):
    """A kernel far from 0 keeps its differences, which rounding it first would take away."""
    x = normal(2, 7, 9, 10)
    outputs = {}
    for policy in ("float32", dtype):
        layer = make(policy)
        layer.build(x.shape)
        layer.set_weights([normal(*weight.shape) / 100 + 1 for weight in layer.weights])
        outputs[policy] = layer(x)
    assert keras.backend.standardize_dtype(outputs[dtype].dtype) == dtype.removeprefix("mixed_")
    found, expected = (
        numpy(keras.ops.cast(y, "float32")) for y in (outputs[dtype], outputs["float32"])
    )
    assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="reads a TensorFlow graph")
def test_every_tensor_has_rank_four_at_most():
    import tensorflow as tf

    import keras_vit

    config = keras_vit.ViTConfig(8, 1, 2, 12, 2)
    for pooling in ("token", "map"):
        model = keras_vit.build_vit(
            config, image_size=(4, 6), pooling=pooling, qk_norm=True, num_registers=1
        )
        spec = tf.TensorSpec((None, 4, 6, 3))
        graph = tf.function(model).get_concrete_function(spec).graph
        ranks = [out.shape.rank for op in graph.get_operations() for out in op.outputs]
        assert max(rank for rank in ranks if rank is not None) == 4


@pytest.mark.parametrize(
    ("layer", "input_shape", "match"),
    [
        (lambda: Patches(4), (1, 8, 9, 3), r"divisible by `patch_size`.*\(1, 8, 9, 3\).*=4"),
        (lambda: Patches(4), (1, None, 8, 3), r"must be known.*None"),
        (lambda: Patches(0), None, r"`patch_size` must be a positive int.*0"),
        (lambda: PatchEncoder(0), None, r"`hidden_dim` must be a positive int.*0"),
        (lambda: PatchEncoder(8, position="none"), None, r"`position` must be one of.*'none'"),
        (
            lambda: PatchEncoder(8, num_registers=-2),
            None,
            r"an int of at least 0.*-2",
        ),
        (
            lambda: PatchEncoder(8, position="sincos2d"),
            (1, 6, 12),
            r"`grid_size` must be.*grid_size=None, 6 patches",
        ),
        (
            lambda: PatchEncoder(8, grid_size=(2, 4)),
            (1, 6, 12),
            r"`grid_size` must be.*\(2, 4\), 6 patches",
        ),
        (
            lambda: MultiHeadSelfAttention(3),
            (1, 6, 8),
            r"divisible by `num_heads`.*hidden_dim=8, num_heads=3",
        ),
        (lambda: MultiHeadSelfAttention(0), None, r"`num_heads` must be a positive int.*0"),
        (lambda: AttentionPooling(3, 4), (1, 6, 8), r"divisible.*hidden_dim=8, num_heads=3"),
        (lambda: FeedForward(-1), None, r"`mlp_dim` must be a positive int.*-1"),
        (lambda: FeedForward(4, gelu="x"), None, r"`gelu` must be one of 'erf', 'tanh'.*'x'"),
        (lambda: TokenPooling("map"), None, r"`pooling` must be one of.*'map'"),
        (lambda: TokenPooling("gap", num_prefix_tokens=-2), None, r"an int of at least 0.*-2"),
        (
            lambda: TokenPooling("gap", num_prefix_tokens=7),
            (1, 7, 8),
            r"more tokens than the 7 before the patches.*\(1, 7, 8\)",
        ),
        (lambda: PatchEncoder(8), (1, None, 12), r"number of patches must be known.*None"),
        (lambda: PatchEncoder(8, num_registers=1.5), None, r"`num_registers` must be.*1.5"),
        (lambda: PatchEncoder(8, dropout=1.0), None, r"must be in \[0, 1\).*rate=1.0"),
        (lambda: FeedForward(4, dropout=-0.1), None, r"must be in \[0, 1\).*rate=-0.1"),
        (lambda: TransformerBlock(2, 8, drop_path=1), None, r"must be in \[0, 1\).*rate=1"),
        (lambda: PatchEncoder(8, layer_norm_epsilon=None), None, r"finite number.*epsilon=None"),
        (lambda: TransformerBlock(2, 8, layer_norm_epsilon=-1.0), None, r"finite number.*=-1.0"),
        (lambda: AttentionPooling(2, 8, layer_norm_epsilon=True), None, r"finite number.*=True"),
        (lambda: MultiHeadSelfAttention(2, layer_norm_epsilon="x"), None, r"finite number.*='x'"),
        (lambda: ResNetStem((1,), width=40), None, r"multiple of 32.*width=40"),
        (lambda: BottleneckUnit(32, strides=0), None, r"`strides` must be a positive int.*0"),
    ],
)
def test_errors(layer, input_shape, match):
    with pytest.raises(ValueError, match=match):
        layer()(keras.KerasTensor(input_shape or (1, 1)))
