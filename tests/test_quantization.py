"""Rounded weights and calibration, against what can be computed by hand."""

import keras
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

import keras_vit
from keras_vit import export
from keras_vit.export.calibration import calibrate, constant, dense_layers, operation_name
from keras_vit.export.gptq import choose_scales, round_weights
from keras_vit.export.quantization import _INT4, RULES, FloatFile, _scales

SIZE = (24, 40)
# The inputs of dense layers: 192 (patches), 48 and 96, of which 48 is no multiple of 32.
CONFIG = keras_vit.ViTConfig(hidden_dim=48, depth=2, num_heads=3, mlp_dim=96, patch_size=8)


def build(seed=0, **options):
    """A small model, none of whose weights is 0 or 1."""
    model = keras_vit.build_vit(
        CONFIG, image_size=SIZE, num_classes=7, normalization="imagenet", **options
    )
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        weight.assign(rng.normal(0.02, 0.2, weight.shape) + (weight.name == "gamma"))
    return model


def random_images(count, seed=1):
    return np.random.default_rng(seed).uniform(0, 255, (count, *SIZE, 3)).astype("float32")


def correlated_rows(count=300, width=24, seed=0):
    """Inputs of a layer whose channels are alike and of unlike size."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(width, width)) * rng.uniform(0.1, 3, width)
    return rng.normal(size=(count, width)) @ mixing


# GPTQ


def rounded_by_elimination(kernel, hessian, scales, bits, damping):
    """Optimal brain surgeon step by step: invert, round one channel, correct all, remove it."""
    w = kernel.astype("float64")
    h = hessian + np.eye(len(w)) * damping * np.mean(np.diag(hessian))
    scales = np.repeat(scales, len(w) // len(scales), axis=0)
    left = list(np.argsort(-np.diag(hessian), kind="stable"))
    while left:
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        i = left[0]
        levels = np.clip(np.rint(w[i] / scales[i]), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        error = (w[i] - levels * scales[i]) / inverse[0, 0]
        w[i] = levels * scales[i]
        w[left[1:]] -= np.outer(inverse[0, 1:], error)
        left = left[1:]
    return w


@pytest.mark.parametrize("block_size", [8, 24, 72])
def test_round_weights_equals_elimination(block_size):
    x = correlated_rows(width=72)  # more channels than are corrected at a time
    kernel = np.random.default_rng(1).normal(size=(72, 5))
    hessian = x.T @ x / len(x)
    scales = choose_scales(kernel, np.diag(hessian), 4, block_size)
    result = round_weights(kernel, hessian, scales, 4, damping=0.02)
    expected = rounded_by_elimination(kernel, hessian, scales, 4, damping=0.02)
    np.testing.assert_allclose(result, expected, atol=1e-9)
    levels = result / np.repeat(scales, block_size, axis=0)
    np.testing.assert_allclose(levels, np.rint(levels), atol=1e-9)
    assert -8 <= np.rint(levels).min() < np.rint(levels).max() <= 7
    nearest = np.clip(np.rint(kernel / scales.repeat(block_size, 0)), -8, 7)
    nearest *= scales.repeat(block_size, 0)
    assert np.sum((x @ (result - kernel)) ** 2) < 0.5 * np.sum((x @ (nearest - kernel)) ** 2)


def test_channels_that_know_nothing_of_each_other_are_rounded_to_the_nearest():
    kernel = np.random.default_rng(1).normal(size=(16, 3))
    scales = np.full((1, 3), 0.02)
    result = round_weights(kernel, np.diag(np.arange(16.0)), scales, 8)
    np.testing.assert_allclose(result, np.clip(np.rint(kernel / 0.02), -127, 127) * 0.02)


def test_channels_that_are_always_zero_do_no_harm():
    kernel = np.random.default_rng(1).normal(size=(6, 3))
    scales = choose_scales(kernel, np.zeros(6), 8, 6)
    result = round_weights(kernel, np.zeros((6, 6)), scales, 8)
    np.testing.assert_allclose(result, kernel, atol=0.02)


def test_scales_clip_a_weight_that_hardly_counts():
    kernel = np.linspace(-1, 1, 32)[:, None] * [[1.0, 3.0]]
    kernel[7] = 1.3, 3.9
    kernel = np.concatenate([kernel, 2 * kernel])  # two blocks
    importance = np.ones(64)
    importance[[7, 39]] = 1e-9
    scales = choose_scales(kernel, importance, 4, 32)
    assert scales.shape == (2, 2)
    assert np.all(scales < np.array([[1.3, 3.9], [2.6, 7.8]]) / 7 * 0.9)
    np.testing.assert_allclose(scales[1], 2 * scales[0], rtol=1e-6)
    importance[[7, 39]] = 1e9
    np.testing.assert_allclose(
        choose_scales(kernel, importance, 4, 32), [[1.3 / 7, 3.9 / 7], [2.6 / 7, 7.8 / 7]]
    )


# Calibration


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """A float file."""
    path = tmp_path_factory.mktemp("float") / "model.tflite"
    export.export_tflite(build(), path, mode="fp32")
    return path.read_bytes()


def test_ranges_are_the_true_ones(content):
    """Not a moving average: the largest value of all images, whatever their order."""
    images = random_images(3)
    images[1] *= 0.1
    ranges = calibrate(content, images).ranges
    assert ranges == calibrate(content, images[::-1]).ranges
    run = Interpreter(model_content=content).get_signature_runner()
    logits = np.concatenate([run(images=image[None])["logits"] for image in images])
    low, high = ranges[list(ranges)[-1]]
    assert low.shape == high.shape == (1, 1)  # litert-quantizer wants the rank of the tensor
    np.testing.assert_allclose([low.item(), high.item()], [logits.min(), logits.max()], rtol=1e-4)
    # Weights are no activations: their ranges would give all channels of a weight one scale.
    model = schema.ModelT.InitFromPackedBuf(content)
    constants = {
        tensor.name.decode()
        for tensor in model.subgraphs[0].tensors
        if model.buffers[tensor.buffer].data is not None
    }
    assert len(constants) > 20
    assert not constants & set(ranges)


def test_moments_are_those_of_the_inputs(content):
    images = random_images(17)
    calibration = calibrate(content, images)
    layer = dense_layers(schema.ModelT.InitFromPackedBuf(content))[0]
    patches = images.reshape(17, 3, 8, 5, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 192)
    np.testing.assert_allclose(calibration.means[layer.input], patches.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(
        calibration.covariances[layer.input], np.cov(patches.T, bias=True), atol=0.05
    )


# Files


def dense_tensors(content):
    """(name, input type, weights, bias) of every dense layer with weights."""
    model = schema.ModelT.InitFromPackedBuf(content)
    graph = model.subgraphs[0]
    for operator in graph.operators:
        code = model.operatorCodes[operator.opcodeIndex].builtinCode
        if code == schema.BuiltinOperator.FULLY_CONNECTED:
            tensors = [graph.tensors[i] if i >= 0 else None for i in operator.inputs]
            name = graph.tensors[operator.outputs[0]].name.decode()
            yield name, model, *(tensors + [None])[:3]


def values(model, tensor):
    """A quantized constant as float64 `(M, K)`, and its scales `(blocks, M)`."""
    data = np.frombuffer(bytes(model.buffers[tensor.buffer].data), "int8")
    if tensor.type == schema.TensorType.INT8:
        levels = data.reshape(tensor.shape)
        scales = tensor.quantization.scale[:, None]
    else:
        assert tensor.type == schema.TensorType.INT4
        levels = np.stack([np.int8(data << 4) >> 4, data >> 4], axis=-1).reshape(tensor.shape)
        details = tensor.quantization.details
        assert details.blockSize == 32
        scales = model.subgraphs[0].tensors[details.scales]
        scales = np.frombuffer(bytes(model.buffers[scales.buffer].data), "float16")
        scales = scales.reshape(len(levels), -1)
    scales = scales.astype("float64")
    return levels * np.repeat(scales, levels.shape[1] // scales.shape[1], axis=1), scales.T


@pytest.mark.parametrize("mode", ["dynamic_int8", "int4"])
def test_files_hold_the_rounded_weights(content, mode):
    calibration = calibrate(content, random_images(8))
    quantized = FloatFile(content, calibration).quantize(RULES[mode])
    plain = schema.ModelT.InitFromPackedBuf(content)
    weights = {name: rest for name, *rest in dense_tensors(quantized)}
    bits = {}
    for layer in dense_layers(plain):
        model, _, w, b = weights[layer.name]
        bits[layer.name.split("/MatMul")[0]] = 8 if w.type == schema.TensorType.INT8 else 4
        kernel = constant(plain, layer.weights).T.astype("float64")
        mean = calibration.means[layer.input]
        hessian = calibration.covariances[layer.input]
        if layer.bias is None:
            hessian = hessian + np.outer(mean, mean)
        result, scales = values(model, w)
        result = result.T
        expected = round_weights(
            kernel, hessian, scales, 8 if w.type == schema.TensorType.INT8 else 4
        )
        np.testing.assert_allclose(result, expected, atol=1e-6 * np.abs(kernel).max())
        assert np.abs(result - kernel).max() > 0
        if layer.bias is not None:
            # What rounding adds to the mean of the outputs, the bias takes off.
            bias = np.frombuffer(bytes(model.buffers[b.buffer].data), "float32")
            change = bias - constant(plain, layer.bias)
            np.testing.assert_allclose(change, mean @ (kernel - result), atol=2e-5)
    blocks = {name: b for name, b in bits.items() if "block" in name}
    assert len(blocks) == 9
    assert {name for name, b in blocks.items() if b == 4} == (
        {"block_0/fc2", "block_1/fc2"} if mode == "int4" else set()
    )
    assert len(bits) == 11
    assert {b for name, b in bits.items() if "block" not in name} == {8}


def softmax_scales(content):
    """(type, scale, zero point) of what is multiplied with values, by the name of the softmax."""
    model = schema.ModelT.InitFromPackedBuf(content)
    graph = model.subgraphs[0]
    producers = {int(operator.outputs[0]): operator for operator in graph.operators}
    for operator in graph.operators:
        if operation_name(model, operator) == "BATCH_MATMUL":
            index = int(operator.inputs[0])
            tensor = graph.tensors[index]
            if operation_name(model, producers[index]) == "QUANTIZE":
                index = int(producers[index].inputs[0])
            name = graph.tensors[index].name.decode()
            if name.endswith("/Softmax"):
                levels = tensor.quantization
                scale, zero = (np.ravel(x).tolist() for x in (levels.scale, levels.zeroPoint))
                yield name, (tensor.type, *scale, *zero)


@pytest.mark.parametrize("mode", ["int8_mixed", "int8_full", "a16w8"])
def test_probabilities_have_all_levels(content, mode):
    calibration = calibrate(content, random_images(3))
    scales = dict(softmax_scales(FloatFile(content, calibration).quantize(RULES[mode])))
    assert len(scales) == 2
    for name, (kind, scale, zero) in scales.items():
        largest = calibration.ranges[name][1].item()
        assert 0.1 < largest < 1
        if mode == "int8_mixed":
            assert (kind, zero) == (schema.TensorType.INT8, -128)
            assert scale == pytest.approx(largest / 255)
        elif mode == "int8_full":
            assert (kind, zero) == (schema.TensorType.INT8, -128)
            assert scale == 1 / 256  # of any int8 softmax
        else:
            assert (kind, zero) == (schema.TensorType.INT16, 0)
            assert scale == 1 / 32768


def test_scales_that_float16_cannot_hold_stay_at_8_bits(tmp_path):
    """A small LayerScale, folded into the weights, makes them smaller than float16 can hold."""
    path = tmp_path / "model.tflite"
    model = build(layer_scale=0.1)
    for layer in model.layers:
        for weight in layer.weights:
            if "block_0" in weight.path and "scale" in weight.path:
                weight.assign(weight * 0 + 1e-6)
    export.export_tflite(model, path, mode="int4", calibration=random_images(4))
    types = {name[:11]: w.type for name, _, _, w, _ in dense_tensors(path.read_bytes())}
    assert types["block_0/fc2"] == schema.TensorType.INT8
    assert types["block_1/fc2"] == schema.TensorType.INT4


def test_zero_weights_do_not_cost_their_layer_its_4_bits():
    """Of a dead unit, or of a channel that was pruned away."""
    kernel = np.random.default_rng(0).normal(size=(96, 5))
    kernel[:, 1] = 0
    kernel[32:64, 3] = 0
    scales = _scales(kernel, np.ones(96), _INT4.weight_tensor_config)
    assert scales.shape == (3, 5)
    rounded = round_weights(kernel, np.eye(96), scales, 4)
    assert not rounded[kernel == 0].any()
    np.testing.assert_allclose(rounded, kernel, atol=0.3)


def test_calibrated_int8_is_nearer_to_the_model(tmp_path):
    model = build(seed=3)
    images = random_images(40, seed=4)
    expected = model.predict(images, verbose=0)
    errors = {}
    for name, calibration in (("alone", None), ("calibrated", random_images(64))):
        path = tmp_path / f"{name}.tflite"
        export.export_tflite(model, path, mode="dynamic_int8", calibration=calibration)
        run = Interpreter(str(path)).get_signature_runner()
        logits = np.concatenate([run(images=image[None])["logits"] for image in images])
        errors[name] = np.square(logits - expected).mean()
    assert errors["calibrated"] < 0.5 * errors["alone"]


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({"pooling": "map"}, "dynamic_int8"),
        ({"pooling": "map"}, "int8_mixed"),
        ({"pooling": "map"}, "int4"),
        ({"pooling": "map"}, "int8_full"),
        ({"pooling": "map"}, "a16w8"),
        ({"pooling": "token+gap"}, "int8_mixed"),
        ({"distillation_token": True}, "int8_mixed"),
        ({"distillation_token": True}, "a16w8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "=".join(map(str, *value.items())),
)
def test_what_comes_behind_the_blocks_is_quantized_too(tmp_path, options, mode):
    model, path = build(seed=3, **options), tmp_path / "model.tflite"
    images = random_images(6, seed=4)
    expected = model.predict(images, verbose=0)
    export.export_tflite(model, path, mode=mode, calibration=random_images(16))
    run = Interpreter(str(path)).get_signature_runner()
    logits = np.concatenate([run(images=image[None])["logits"] for image in images])
    assert np.sqrt(np.mean((logits - expected) ** 2) / expected.var()) < 0.15
    facts = export.describe_graph(path)
    assert facts.custom_ops == ()
    assert facts.max_rank == 4
    if mode in export.CPU_MODES:
        assert facts.partitions == 1


def test_attention_pooling_of_a_model_that_is_converted_layer_by_layer(tmp_path):
    """Its query is a constant factor of a product, which LiteRT cannot run as int8 weights."""
    x = keras.Input((24, 40, 3))
    y = keras_vit.Patches(8)(x / 255.0)
    y = keras_vit.AttentionPooling(num_heads=3, mlp_dim=20)(keras.layers.Dense(48)(y))
    model = keras.Model(x, keras.layers.Dense(7)(y))
    images, path = random_images(3), tmp_path / "model.tflite"
    report = export.export_tflite(model, path, mode="dynamic_int8")
    assert "no model of build_vit" in report.note
    run = Interpreter(str(path)).get_signature_runner()
    logits = np.concatenate([run(images=image[None])["logits"] for image in images])
    np.testing.assert_allclose(
        logits, model.predict(images, verbose=0), atol=0.03 * np.abs(logits).max()
    )
    types = [w.type for _, _, _, w, _ in dense_tensors(path.read_bytes())]
    assert types.count(schema.TensorType.INT8) >= 5
