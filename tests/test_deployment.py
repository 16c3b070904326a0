"""The deploy graph against the Keras model, before and after every exact change of its weights."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

import keras_vit
from keras_vit import export
from keras_vit.export import graph
from keras_vit.export.benchmark import describe_graph
from keras_vit.export.deployment import deploy
from keras_vit.export.equalization import equalize, fit_float16, output_ranges, rescale
from keras_vit.export.folding import fold
from keras_vit.export.graph import forward
from keras_vit.export.precision import as_float32
from keras_vit.layers import POOLINGS

SIZE = (24, 40)
CLASSES = 7
CONFIG = keras_vit.ViTConfig(hidden_dim=48, depth=3, num_heads=3, mlp_dim=80, patch_size=8)
HYBRID = dataclasses.replace(CONFIG, patch_size=1, stem_units=(1, 1), stem_width=32)
WIDE_HEADS = dataclasses.replace(CONFIG, head_dim=20)
# The names of `build_vit`'s options in the tests' names.
OPTIONS = {
    **{pooling: {"pooling": pooling} for pooling in POOLINGS},
    **{f"{p}, norm after": {"pooling": p, "norm_after_pooling": True} for p in POOLINGS},
    "distillation": {"distillation_token": True},
    "distillation, norm after": {"distillation_token": True, "norm_after_pooling": True},
    "registers": {"num_registers": 3},
    "registers, gap": {"num_registers": 2, "pooling": "gap", "class_token": False},
    "sincos2d": {"position": "sincos2d"},
    "patch_norm": {"patch_norm": True},
    "qk_norm": {"qk_norm": True, "layer_scale": 0.3, "gelu": "tanh"},
    "representation": {"representation_size": 11},
    "no bias": {"qkv_bias": False, "normalization": None},
    "hybrid": {"variant": HYBRID},
    "wide heads": {"variant": WIDE_HEADS},
    # As large as the variances, so that it counts.
    "epsilon, qk_norm": {"layer_norm_epsilon": 0.1, "qk_norm": True},
    "epsilon, patch_norm": {"layer_norm_epsilon": 0.1, "patch_norm": True},
    "epsilon, map": {"layer_norm_epsilon": 0.1, "pooling": "map"},
}
NOT_CENTERED = (
    "patch_norm",
    "epsilon, patch_norm",
    "map, norm after",
    "token+gap, norm after",
)


def build(num_classes=CLASSES, variant=CONFIG, **options):
    """A small model, none of whose weights is 0 or 1."""
    options = {"normalization": "imagenet", **options}
    model = keras_vit.build_vit(variant, image_size=SIZE, num_classes=num_classes, **options)
    return randomise(model)


def randomise(model, seed=0):
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        weight.assign(rng.normal(0.02, 0.2, weight.shape) + (weight.name == "gamma"))
    return model


def random_images(count, seed=1):
    return np.random.default_rng(seed).uniform(0, 255, (count, *SIZE, 3)).astype("float32")


def outputs_of(vit, images):
    return np.concatenate([forward(vit, tf.constant(image[None])) for image in images])


def assert_alike(result, expected, tolerance=1e-5):
    assert result.shape == expected.shape
    np.testing.assert_allclose(result, expected, rtol=0, atol=tolerance * np.abs(expected).max())


# Folding


@pytest.mark.parametrize("num_classes", [CLASSES, 0])
@pytest.mark.parametrize("name", OPTIONS)
def test_deploy_graph_equals_keras(name, num_classes):
    if name == "hybrid" and num_classes == 0:
        pytest.skip("the stem has nothing to do with the head")
    model = build(num_classes, **OPTIONS[name])
    images = random_images(2)
    expected = np.asarray(model(images))
    vit = fold(model)
    assert_alike(outputs_of(vit, images), expected)
    assert vit.centered == (name not in NOT_CENTERED)
    for change in (equalize, fit_float16):
        assert_alike(outputs_of(change(vit, images), images), expected, 3e-5)
    if vit.centered:
        c = np.random.default_rng(2).uniform(0.2, 5, 48)
        rescaled = rescale(vit, c)
        np.testing.assert_allclose(rescaled.positions * c, vit.positions)
        assert_alike(outputs_of(rescaled, images), expected, 3e-5)


@pytest.mark.parametrize("name", ["token", "mean", "no bias", "wide heads", "distillation"])
def test_pieces_of_a_cache_are_the_whole(name, monkeypatch):
    """Products whose weights are cut, with a last piece that is smaller."""
    monkeypatch.setattr(graph, "CACHE", 1200)
    monkeypatch.setattr(graph, "LANES", 8)
    model = build(**OPTIONS[name])
    vit = dataclasses.replace(fold(model), float_weights=True)
    images, seen = random_images(2), []
    forward(vit, images[:1], lambda name, y: seen.append((name, y.shape[-1])))
    inner = 60 if name == "wide heads" else 48
    expected = [(part, inner) for part in ("q", "k", "v")] + [("proj", 48)]
    for width in (24, 24, 24, 8):  # of 80
        expected += [("fc1", width), ("fc2", 48)]
    block = [(layer.split("/")[1], width) for layer, width in seen if layer.startswith("block_0")]
    assert block == expected
    assert_alike(outputs_of(vit, images), np.asarray(model(images)))


def test_file_of_pieces(monkeypatch, tmp_path):
    monkeypatch.setattr(graph, "CACHE", 1200)
    monkeypatch.setattr(graph, "LANES", 8)
    model, path = build(), tmp_path / "vit.tflite"
    report = export.export_tflite(model, path, mode="fp32")
    assert report.ops["GELU"] == 3 * 4
    assert describe_graph(path).partitions == 1
    run, images = Interpreter(str(path)).get_signature_runner(), random_images(2)
    result = np.concatenate([run(images=image[None])["logits"] for image in images])
    assert_alike(result, np.asarray(model(images)))
    assert export.export_tflite(model, tmp_path / "half.tflite", mode="fp16").ops["GELU"] == 3


def test_small_models_are_in_one_piece():
    vit = dataclasses.replace(fold(build()), float_weights=True)
    names = []
    forward(vit, random_images(1), lambda name, y: names.append(name))
    assert names.count("block_1/fc1") == names.count("block_1/qkv") == 1


def test_tokens_of_the_stream_have_no_mean():
    vit = fold(build())
    for kernel in (vit.patches.kernel, vit.blocks[1].proj.kernel, vit.blocks[2].fc2.kernel):
        np.testing.assert_allclose(kernel.mean(axis=1), 0, atol=1e-14)
    for tokens in (vit.positions, vit.prefix, vit.blocks[0].fc2.bias):
        np.testing.assert_allclose(tokens.mean(axis=-1), 0, atol=1e-14)


@pytest.mark.parametrize("distillation_token", [False, True])
def test_the_last_block_computes_what_is_read(distillation_token):
    shapes = {}
    vit = fold(build(distillation_token=distillation_token))
    forward(vit, random_images(1), lambda name, y: shapes.update({name: y.shape.as_list()}))
    tokens = 16 + distillation_token
    assert shapes["block_1/fc1"] == [1, tokens, 80]
    assert shapes["block_2/kv"] == [1, tokens, 96]
    for name, width in (("q", 48), ("proj", 48), ("fc1", 80), ("fc2", 48)):
        assert shapes[f"block_2/{name}"] == [1, 1 + distillation_token, width]


# Equalizing


def test_output_ranges_are_those_of_every_token_and_image():
    model, images = build(pooling="gap"), random_images(3)
    block = model.get_layer("block_1")
    before = keras.Model(model.input, model.get_layer("block_0").output)
    y = np.array(block.attention.qkv(block.norm1(before(images)))).reshape(-1, 144)
    y[:, :48] /= 4  # the root of the head's width, folded into the queries
    measured = output_ranges(fold(model), images)["block_1/qkv"]
    np.testing.assert_allclose(measured.low, y.min(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(measured.high, y.max(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(measured.mean, y.mean(axis=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rounded_probabilities", [False, True])
def test_equalize_makes_the_channels_alike(rounded_probabilities):
    model, images = build(), random_images(4)
    # Two channels that tower above the others, as in trained models, and keys far from 0.
    for name in ("block_0", "block_1", "block_2"):
        block = model.get_layer(name)
        for dense in (block.attention.proj, block.feed_forward.fc2):
            dense.kernel.assign(dense.kernel * np.where(np.isin(np.arange(48), (5, 31)), 40, 1))
        bias = block.attention.qkv.bias
        bias.assign(bias + np.repeat([0.0, 30.0, 7.0], 48))
    vit = fold(model)
    before = output_ranges(vit, images)
    equal = equalize(vit, images, rounded_probabilities)
    after = output_ranges(equal, images)
    assert_alike(outputs_of(equal, images), model.predict(images, verbose=0), 1e-4)
    for i in range(3):
        q, k, v = np.split(after[f"block_{i}/qkv"].size, 3)
        np.testing.assert_allclose(q, k, rtol=1e-3)
        np.testing.assert_allclose(v, max(q.max(), k.max()), rtol=1e-3)
        qkv = after[f"block_{i}/qkv"]
        centered = qkv.mean if rounded_probabilities else qkv.middle
        np.testing.assert_allclose(qkv.middle[48:96] / v.max(), 0, atol=1e-3)
        np.testing.assert_allclose(centered[96:] / v.max(), 0, atol=1e-3)
        for name in ("proj", "fc2"):
            spread = [
                ranges[f"block_{i}/{name}"].size.max() / np.median(ranges[f"block_{i}/{name}"].size)
                for ranges in (before, after)
            ]
            assert spread[0] > 15
            assert spread[1] < 4


def test_fit_float16_bounds_the_stream():
    model, images = build(), random_images(2)
    kernel = model.get_layer("block_1").feed_forward.fc2.kernel
    kernel.assign(kernel * 1000)
    vit = fold(model)
    assert fit_float16(fold(build()), images).stream is None
    fitted = fit_float16(vit, images)
    factor = fitted.stream[0]
    assert np.all(fitted.stream == factor)
    assert factor == 2 ** round(np.log2(factor))
    largest = max(r.size.max() for n, r in output_ranges(fitted, images).items() if "fc2" in n)
    assert 10 < largest < 64
    assert_alike(outputs_of(fitted, images), model.predict(images, verbose=0), 3e-5)


# Models that are not those of build_vit alone


def with_own_head(images, features):
    x = keras.layers.Dropout(0.3)(features)
    return keras.Model(images, keras.layers.Dense(5, activation="softmax")(x))


def nested():
    images = keras.Input((*SIZE, 3))
    return with_own_head(images, build(0)(images))


def continued():
    backbone = build(0, pooling="token+gap")
    return with_own_head(backbone.input, backbone.output)


def preprocessed():
    images = keras.Input((*SIZE, 3))
    x = build(normalization=None)(keras.layers.Rescaling(1 / 127.5, offset=-1.0)(images))
    return keras.Model(images, x)


def sequential():
    return keras.Sequential([build(0), keras.layers.Dropout(0.3), keras.layers.Dense(5)])


def named_output():
    vit = build()
    return keras.Model(vit.input, {"scores": vit.output})


def softmax_function():
    """No layer gives its output."""
    vit = build()
    return keras.Model(vit.input, keras.ops.softmax(vit.output / 3))


def distilled_continued():
    vit = build(distillation_token=True)
    return keras.Model(vit.input, keras.layers.Softmax()(vit.output))


def distilled_headless():
    return build(0, distillation_token=True)


def distilled_own_head():
    """Of the name that `build_vit` gives to the first of two."""
    vit = build(0, distillation_token=True)
    return keras.Model(vit.input, keras.layers.Dense(5, name="head")(vit.output))


def skipping():
    """Its layers belong to another model, too, where they are wired otherwise."""
    vit = build()
    own = keras.Model(vit.input, keras.layers.Dense(5)(vit.output))
    return keras_vit.skip_unread_tokens(own)


def head_of_layers():
    """Of the name that `build_vit` gives to a dense layer."""
    vit = build(0)
    head = keras.Sequential([keras.layers.Dense(9, "relu"), keras.layers.Dense(5)], name="head")
    return keras.Model(vit.input, head(vit.output))


def nested_head_of_layers():
    return keras.Sequential([keras.Input((*SIZE, 3)), head_of_layers()])


def augmented():
    """Its ViT is one with a head of its own."""
    layers = [keras.layers.RandomFlip(), keras.layers.Rescaling(0.9), continued()]
    return keras.Sequential([keras.Input((*SIZE, 3)), *layers])


def two_sequentials_deep():
    inner = keras.Sequential([keras.layers.Rescaling(0.9), build(0), keras.layers.Dense(7)])
    outer = [keras.layers.Rescaling(0.8), inner, keras.layers.Dense(5)]
    return keras.Sequential([keras.Input((*SIZE, 3)), *outer])


def head_of_two_inputs():
    vit = build(0)
    ends = [keras.Input((vit.output_shape[-1],)) for _ in range(2)]
    head = keras.Model(ends, keras.layers.Dense(5)(keras.layers.Add()(ends)))
    images = keras.Input((*SIZE, 3))
    x = vit(images)
    return keras.Model(images, head([x, keras.ops.tanh(x)]))


def called_by_name():
    images = keras.Input((*SIZE, 3))
    return keras.Model(images, keras.layers.Dense(5)(inputs=build(0)(inputs=images)))


@pytest.mark.parametrize(
    "make",
    [
        nested,
        head_of_layers,
        nested_head_of_layers,
        augmented,
        two_sequentials_deep,
        head_of_two_inputs,
        called_by_name,
        continued,
        preprocessed,
        sequential,
        named_output,
        softmax_function,
        distilled_continued,
        distilled_headless,
        distilled_own_head,
        skipping,
    ],
)
def test_models_around_a_vit_get_the_deploy_graph(make, tmp_path):
    model = randomise(make(), seed=4)
    deployment = deploy(as_float32(model))
    assert deployment.vit is not None
    assert deployment.note is None
    images = random_images(2)
    path = tmp_path / "model.tflite"
    report = export.export_tflite(model, path, mode="fp32")
    run = Interpreter(str(path)).get_signature_runner()
    result = np.concatenate([run(images=image[None])[report.output.name] for image in images])
    [expected] = keras.tree.flatten(model.predict(images, verbose=0))
    assert_alike(result, expected)
    assert report.note is None
    assert describe_graph(path).partitions == 1


def plain_model():
    images = keras.Input((*SIZE, 3))
    x = keras.layers.Conv2D(6, 3)(images)
    return keras.Model(images, keras.layers.Dense(5)(keras.layers.GlobalAveragePooling2D()(x)))


def read_tokens():
    """Its head reads what the deploy graph does not compute."""
    vit = build(0)
    tokens = vit.get_layer("block_1").output
    x = keras.ops.mean(tokens, axis=1) + vit.output
    return keras.Model(vit.input, keras.layers.Dense(5)(x))


def one_head_of_two():
    vit = build(distillation_token=True)
    return keras.Model(vit.input, vit.get_layer("head").output)


def both_tokens_side_by_side():
    vit = build(distillation_token=True)
    tokens = [vit.get_layer(name).output for name in ("pooling", "distillation_pooling")]
    return keras.Model(vit.input, keras.layers.Dense(5)(keras.ops.concatenate(tokens, axis=-1)))


def changed_pixels():
    """A layer between the images and the patches, which the names do not show."""
    vit = build(normalization=None)

    def call(layer, *args, **kwargs):
        x = layer(*args, **kwargs)
        return keras.ops.sin(x) if layer.name == "patches" else x

    return keras.models.clone_model(vit, clone_function=lambda layer: layer, call_function=call)


@pytest.mark.parametrize(
    ("make", "note"),
    [
        (plain_model, "no model of build_vit was found"),
        (read_tokens, "no model of build_vit was found"),
        (one_head_of_two, "no model of build_vit was found"),
        (both_tokens_side_by_side, "no model of build_vit was found"),
        (changed_pixels, "the deploy graph differs from the model by"),
    ],
)
def test_other_models_are_converted_as_they_are(make, note, tmp_path):
    model = make()
    if make is not changed_pixels:
        randomise(model)
    path = tmp_path / "model.tflite"
    with pytest.warns(UserWarning, match=rf"model\.tflite: {note}"):
        report = export.export_tflite(model, path, mode="fp32")
    assert note in report.note
    assert report.note in str(report)
    images = random_images(2)
    run = Interpreter(str(path)).get_signature_runner()
    result = np.concatenate([run(images=image[None])["logits"] for image in images])
    assert_alike(result, model.predict(images, verbose=0))
    with pytest.raises(ValueError, match="mode='int8_mixed' needs a model of build_vit"):
        export.export_tflite(
            model, tmp_path / "mixed.tflite", mode="int8_mixed", calibration=images
        )


# Files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file of every mode, of a ViT and of a hybrid."""
    folder = tmp_path_factory.mktemp("files")
    files = {}
    for name, options in (("vit", {}), ("hybrid", {"variant": HYBRID, "pooling": "gap"})):
        model = build(**options)
        for mode in export.CPU_MODES:
            path = folder / f"{name}_{mode}.tflite"
            export.export_tflite(model, path, mode=mode, calibration=random_images(4))
            files[name, mode] = path
    return files


@pytest.mark.parametrize("mode", export.CPU_MODES)
@pytest.mark.parametrize("name", ["vit", "hybrid"])
def test_files_are_one_partition(files, name, mode):
    graph = describe_graph(files[name, mode])
    assert graph.partitions == 1
    assert not graph.outside
    assert not graph.custom_ops
    assert graph.max_rank <= 4


def operators(path):
    """(operation, its first output's name, the tensors that go in) of every operation."""
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes())
    names = {code: name for name, code in vars(schema.BuiltinOperator).items() if name[0] != "_"}
    graph = model.subgraphs[0]
    for op in graph.operators:
        code = model.operatorCodes[op.opcodeIndex]
        inputs = [graph.tensors[i] for i in op.inputs if i >= 0]
        name = names[max(code.builtinCode, code.deprecatedBuiltinCode)]
        yield name, graph.tensors[op.outputs[0]], inputs


def test_int8_mixed_multiplies_integers(files):
    """In attention, by calibration; for XNNPACK, the zero point of a second activation is 0."""
    products = [
        (name, output.name.decode(), inputs)
        for name, output, inputs in operators(files["vit", "int8_mixed"])
        if name in ("BATCH_MATMUL", "FULLY_CONNECTED")
    ]
    attention = [inputs for name, _, inputs in products if name == "BATCH_MATMUL"]
    assert len(attention) == 2 * CONFIG.depth
    for first, second in attention:
        assert first.type == second.type == schema.TensorType.INT8
        assert list(second.quantization.zeroPoint) == [0]
    for (queries, _), (probabilities, _) in zip(attention[::2], attention[1::2], strict=True):
        assert list(queries.quantization.zeroPoint) == [0]
        assert list(probabilities.quantization.zeroPoint) == [-128]  # 0 is the lowest level
    dense = {name: inputs for op, name, inputs in products if op == "FULLY_CONNECTED"}
    types = {
        name: tuple(tensor.type == schema.TensorType.INT8 for tensor in inputs[:2])
        for name, inputs in dense.items()
    }
    means = [both for name, both in types.items() if "mean_square" in name]
    assert means == [(False, False)] * (2 * CONFIG.depth + 1)
    static, dynamic = (
        {name.split("/MatMul")[0] for name, both in types.items() if both == (by_calibration, True)}
        for by_calibration in (True, False)
    )
    assert static == {"block_0/qkv", "block_1/qkv", "block_2/q", "block_2/kv"}
    layers = {f"block_{i}/{name}" for i in range(CONFIG.depth) for name in ("proj", "fc1", "fc2")}
    assert {name for name in dynamic if name.startswith("block")} == layers
    assert len(dynamic - layers) == 2  # the patches and the head


@pytest.mark.parametrize(
    "make",
    [
        lambda images: tf.data.Dataset.from_tensor_slices(images),
        lambda images: tf.data.Dataset.from_tensor_slices(images).batch(3),
        lambda images: tf.data.Dataset.from_tensor_slices((images, range(len(images)))).batch(3),
        lambda images: images.astype("uint8").tolist(),
    ],
    ids=["images", "batches", "with labels", "list"],
)
def test_calibration_images_come_in_any_form(make):
    images = random_images(5).round()
    read = export.tflite._calibration_images(make(images), "int8_mixed", (*SIZE, 3))
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, images)


@pytest.mark.parametrize(
    ("calibration", "match"),
    [
        (None, "mode='int8_mixed' needs `calibration`: some 64 images"),
        (np.zeros((0, 24, 40, 3)), r"`calibration` must be images.*shape=\(0, 24, 40, 3\)"),
        (np.zeros((2, 40, 24, 3)), r"\(N, 24, 40, 3\), N >= 1.*shape=\(2, 40, 24, 3\)"),
        (np.full((2, 24, 40, 3), np.nan), "`calibration` must be finite"),
        (tf.data.Dataset.from_tensors(np.zeros((2, 24, 40, 3))).repeat(), "that ends.*an endless"),
        (tf.data.Dataset.from_tensors({"x": 0.0}), "must be a dataset of images, .*'x'"),
    ],
)
def test_calibration_errors(calibration, match, tmp_path):
    path = tmp_path / "model.tflite"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=match):
        export.export_tflite(
            build(), path, mode="int8_mixed", calibration=calibration, overwrite=True
        )
    assert path.read_bytes() == b"old"


def test_unknown_activation(tmp_path):
    with pytest.raises(ValueError, match=r"`activation` must be None or .*'relu'"):
        export.export_tflite(build(), tmp_path / "model.tflite", activation="relu")
