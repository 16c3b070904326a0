"""What each layer costs, and which layers get a higher precision."""

import json

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

import keras_vit
from keras_vit import export
from keras_vit.export import convert, sensitivity, tflite
from keras_vit.export.calibration import calibrate, operation_name
from keras_vit.export.quantization import RULES, FloatFile
from keras_vit.export.sensitivity import AccuracyLost, quantize_within, run, signal_to_noise

SIZE = (24, 40)
# Every dense layer's input is a multiple of 32, so that int4 has 4 bits in all of them.
CONFIG = keras_vit.ViTConfig(hidden_dim=64, depth=2, num_heads=4, mlp_dim=96, patch_size=8)
DENSE = ["patches", *(f"block_0/{name}" for name in ("qkv", "proj", "fc1", "fc2"))]
DENSE += [*(f"block_1/{name}" for name in ("q", "kv", "proj", "fc1", "fc2")), "head"]


def random_images(count, seed=1):
    return np.random.default_rng(seed).uniform(0, 255, (count, *SIZE, 3)).astype("float32")


@pytest.fixture(scope="module")
def model():
    """A small model, one of whose layers has an output that a few bits cannot hold."""
    model = keras_vit.build_vit(CONFIG, image_size=SIZE, num_classes=7, normalization="imagenet")
    rng = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(rng.normal(0.02, 0.2, weight.shape) + (weight.name == "gamma"))
    return model


@pytest.fixture(scope="module")
def content(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("float") / "model.tflite"
    export.export_tflite(model, path, mode="fp32")
    return path.read_bytes()


@pytest.fixture(scope="module")
def source(content):
    return FloatFile(content, calibrate(content, random_images(16)))


def weight_types(content):
    """Layer name -> type of its weights, and of what it is multiplied with."""
    model = schema.ModelT.InitFromPackedBuf(bytes(content))
    graph = model.subgraphs[0]
    types = {}
    for operator in graph.operators:
        name = graph.tensors[operator.outputs[0]].name.decode()
        code = model.operatorCodes[operator.opcodeIndex].builtinCode
        if code == schema.BuiltinOperator.FULLY_CONNECTED:
            name = "head" if "PartitionedCall" in name else name.split("/MatMul")[0]
        elif code == schema.BuiltinOperator.BATCH_MATMUL:
            name = name.rpartition("/")[0]
        else:
            continue
        x, weights = (graph.tensors[i].type for i in operator.inputs[:2])
        types[name] = weights, x
    return types


FLOAT, INT16 = schema.TensorType.FLOAT32, schema.TensorType.INT16
INT8, INT4 = schema.TensorType.INT8, schema.TensorType.INT4


def test_signal_to_noise_of_a_case_by_hand():
    expected = np.array([[3.0, 10.0], [1.0, 10.0]])  # 1 above and below the mean in one class
    logits = expected + np.array([[0.1, 0.0], [0.0, 0.1]])
    assert signal_to_noise(expected, logits) == pytest.approx(10 * np.log10(2 / 0.02))
    assert signal_to_noise(expected, expected) == np.inf


@pytest.mark.parametrize("mode", RULES)
def test_layers(source, mode):
    names = [layer.name for layer in source.layers(mode)]
    attention = [f"block_{i}/{name}" for i in range(2) for name in ("probabilities", "values")]
    assert [name for name in names if name not in attention] == DENSE
    assert [name for name in names if name in attention] == (
        [] if mode in ("dynamic_int8", "int4") else attention
    )


@pytest.mark.parametrize("mode", RULES)
def test_one_layer_alone_is_quantized(source, mode):
    plain = weight_types(source.content)
    assert set(plain.values()) == {(FLOAT, FLOAT)}
    for layer in source.layers(mode):
        types = weight_types(source.quantize(layer.only(RULES[mode])))
        changed = {name for name in plain if types[name] != plain[name]}
        assert changed == {layer.name}, layer


def test_sensitivity_is_that_of_one_layer(source):
    """Measured from the files, for a dense layer and for a product of activations."""
    images = random_images(20, seed=3)
    calls = []
    ratios = sensitivity.sensitivity(source, "int8_mixed", images, lambda: calls.append(1))
    layers = {layer.name: layer for layer in source.layers("int8_mixed")}
    assert list(ratios) == list(layers)
    assert len(calls) == len(layers)
    expected = run(source.content, images)[:16].astype("float64")
    signal = np.square(expected - expected.mean(axis=0)).sum()
    for name in ("block_0/fc1", "block_1/values"):
        logits = run(source.quantize(layers[name].only(RULES["int8_mixed"])), images)[:16]
        noise = np.square(logits - expected).sum()
        assert ratios[name] == pytest.approx(10 * np.log10(signal / noise), abs=1e-3)
    assert 10 < min(ratios.values()) < max(ratios.values()) < 80


@pytest.mark.parametrize(
    ("mode", "precision", "name", "types"),
    [
        ("dynamic_int8", "float32", "block_0/fc1", (FLOAT, FLOAT)),
        ("int4", "dynamic_int8", "block_0/fc1", (INT8, FLOAT)),
        ("int8_mixed", "dynamic_int8", "block_0/qkv", (INT8, FLOAT)),
        ("int8_mixed", "float32", "block_0/fc1", (FLOAT, FLOAT)),
        ("int8_mixed", "dynamic_int8", "block_0/probabilities", (FLOAT, FLOAT)),
        ("int8_mixed", "dynamic_int8", "block_0/values", (FLOAT, FLOAT)),
        ("int8_mixed", "float32", "head", (FLOAT, FLOAT)),
        ("int8_full", "a16w8", "block_0/fc1", (INT8, INT16)),
        ("int8_full", "a16w8", "block_1/probabilities", (INT16, INT16)),
        ("int8_full", "a16w8", "block_1/values", (INT16, INT16)),
        ("a16w8", "float32", "block_0/fc1", (FLOAT, FLOAT)),
    ],
)
def test_a_layer_gets_another_precision(source, mode, precision, name, types):
    before = weight_types(source.quantize(RULES[mode]))
    (layer,) = (layer for layer in source.layers(mode) if layer.name == name)
    after = weight_types(source.quantize((*RULES[mode], layer.rule(precision))))
    assert after[name] == types
    assert {key for key in before if before[key] != after[key]} == {name}


@pytest.mark.parametrize("block", ["block_0", "block_1"])
@pytest.mark.parametrize("product", ["probabilities", "values"])
def test_one_product_of_an_attention_in_float(source, tmp_path, block, product):
    """What lays out its operands follows, all else stays in integers that XNNPACK takes."""
    (layer,) = (of for of in source.layers("int8_mixed") if of.name == f"{block}/{product}")
    path = tmp_path / "model.tflite"
    path.write_bytes(source.quantize((*RULES["int8_mixed"], layer.rule("dynamic_int8"))))
    assert export.describe_graph(path).partitions == 1
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes())
    graph = model.subgraphs[0]
    types = {"probabilities": set(), "values": set()}
    for operator in graph.operators:
        output = graph.tensors[operator.outputs[0]]
        name = output.name.decode()
        kind = operation_name(model, operator)
        if name.startswith(f"{block}/") and kind in (
            "BATCH_MATMUL",
            "RESHAPE",
            "TRANSPOSE",
            "SPLIT",
        ):
            types["values" if "/values/" in name else "probabilities"].add(output.type)
            if output.type == INT8:
                assert list(output.quantization.zeroPoint) == [0]
    assert types.pop(product) == {FLOAT}
    assert list(types.values()) == [{INT8}]


def labels_of(content, images):
    return run(content, images).argmax(axis=-1)


def drop(source, content, images):
    return 100 * np.mean(labels_of(source.content, images) != labels_of(content, images))


def test_no_fallback_where_the_accuracy_holds(source):
    images = random_images(20, seed=3)
    labels = labels_of(source.content, images)
    ratios = {layer.name: 30.0 for layer in source.layers("dynamic_int8")}
    content, fallback = quantize_within(source, "dynamic_int8", images, labels, 100, 0, ratios)
    assert fallback == {}
    assert content == source.quantize(RULES["dynamic_int8"])


def worst_of_4_bits(ratios, layers):
    """The names of the layers to which int4 gives 4 bits, from the worst on."""
    names = [layer.name for layer in layers if layer.precision is None]
    return sorted(names, key=ratios.get)


def test_fallback_takes_the_worst_layers_and_no_more(source):
    """int4 loses some of 150 images; the drop holds with the worst `count`, not with one less."""
    images = random_images(150, seed=3)
    labels = labels_of(source.content, images)
    whole = drop(source, source.quantize(RULES["int4"]), images)
    assert whole > 2
    ratios = sensitivity.sensitivity(source, "int4", images)
    tries = []
    content, fallback = quantize_within(
        source, "int4", images, labels, whole / 2, 0, ratios, lambda: tries.append(1)
    )
    assert drop(source, content, images) <= whole / 2
    layers = {layer.name: layer for layer in source.layers("int4")}
    worst = worst_of_4_bits(ratios, layers.values())
    assert set(fallback) == set(worst[: len(fallback)])
    assert 0 < len(fallback) < len(worst)
    assert set(fallback.values()) == {"dynamic_int8"}
    assert len(tries) <= 6  # by bisection
    one_less = [layers[name].rule("dynamic_int8") for name in worst[: len(fallback) - 1]]
    assert drop(source, source.quantize((*RULES["int4"], *one_less)), images) > whole / 2


def test_fallback_until_the_file_agrees(source):
    """Images whose label the float file misses cannot be lost; they count for the agreement."""
    images = random_images(150, seed=3)
    classes = labels_of(source.content, images)
    wrong = (classes + 1) % 7
    ratios = sensitivity.sensitivity(source, "int4", images)
    _, none = quantize_within(source, "int4", images, wrong, 0, 0, ratios)
    assert none == {}
    half_way = 1 - drop(source, source.quantize(RULES["int4"]), images) / 200
    content, fallback = quantize_within(source, "int4", images, wrong, 0, half_way, ratios)
    assert np.mean(labels_of(content, images) == classes) >= half_way
    worst = worst_of_4_bits(ratios, source.layers("int4"))
    assert 0 < len(fallback) < len(worst)
    assert set(fallback) == set(worst[: len(fallback)])


def test_the_agreement_has_a_standard_error_to_spare(source):
    """A file that just holds it on these images would as likely as not fail on others."""
    images = random_images(150, seed=3)
    ratios = sensitivity.sensitivity(source, "int4", images)
    classes = labels_of(source.content, images)
    limit = np.mean(labels_of(source.quantize(RULES["int4"]), images) == classes)
    content, fallback = quantize_within(source, "int4", images, classes, 100, limit, ratios)
    assert fallback
    agreement = np.mean(labels_of(content, images) == classes)
    assert agreement >= limit + np.sqrt(limit * (1 - limit) / 150)


def test_what_the_first_precision_does_not_hold_gets_the_next(source):
    """Nothing may be lost: neither with 4 nor with 8 bits everywhere."""
    images = random_images(150, seed=3)
    labels = labels_of(source.content, images)
    ratios = sensitivity.sensitivity(source, "int4", images)
    content, fallback = quantize_within(source, "int4", images, labels, 0, 0, ratios)
    assert drop(source, content, images) == 0
    worst = sorted(ratios, key=ratios.get)
    lowest = [name for name in worst if fallback.get(name) == "float32"]
    assert 0 < len(lowest) < len(worst)
    assert lowest == worst[: len(lowest)]
    # What has 8 bits in this mode already is not said to be at a higher precision.
    of_4_bits = worst_of_4_bits(ratios, source.layers("int4"))
    assert {"patches", "head"}.isdisjoint(of_4_bits)
    assert set(fallback) == {*of_4_bits, *lowest}


def test_accuracy_that_cannot_be_kept(source, monkeypatch):
    monkeypatch.setitem(sensitivity.FALLBACKS, "int4", ())
    images = random_images(150, seed=3)
    labels = labels_of(source.content, images)
    ratios = dict.fromkeys((layer.name for layer in source.layers("int4")), 30.0)
    message = r"'int4' cannot keep.*max_drop=0 points.* for 98.39% of the images.*150 images"
    with pytest.raises(AccuracyLost, match=message):
        quantize_within(source, "int4", images, labels, 0, 0.97, ratios)
    with pytest.raises(AccuracyLost, match=r"max_drop=100 points.* 100.00% of the images"):
        quantize_within(source, "int4", images, labels, 100, 1, ratios)


# The whole way


@pytest.mark.usefixtures("own_process")
def test_export_holds_the_drop_and_says_how(model, content, tmp_path):
    images = random_images(150, seed=3)
    labels = labels_of(content, images)
    report = export.export_tflite(
        model,
        tmp_path / "int4.tflite",
        mode="int4",
        calibration=random_images(16),
        held_out=(images, labels),
        max_drop=1.5,
        min_agreement=0,
    )
    assert list(report.sensitivity) == DENSE
    assert 0 < len(report.fallback) < len(DENSE)
    assert set(report.fallback) <= set(DENSE)
    written = (tmp_path / "int4.tflite").read_bytes()
    assert np.mean(labels_of(written, images) == labels) >= 0.985
    types = weight_types(written)
    blocks = {name for name in DENSE if name.startswith("block")}
    assert {name for name in blocks if types[name][0] == INT4} == blocks - set(report.fallback)
    assert export.describe_graph(tmp_path / "int4.tflite").partitions == 1


def test_accuracy_lost_reaches_the_user(model, tmp_path, monkeypatch):
    """The process that converts writes down what it could not do; nothing is left of it."""

    def lose(*_):
        raise AccuracyLost("Mode 'int4' cannot keep it.")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.json").write_text(json.dumps({"mode": "int4"}))
    monkeypatch.setattr(convert, "convert", lambda *_: b"float")
    monkeypatch.setattr(convert, "quantize", lose)
    monkeypatch.setattr("sys.argv", ["convert", "out.tflite"])
    convert.main()
    written = (tmp_path / "report.json").read_text()
    assert json.loads(written) == {"error": "Mode 'int4' cannot keep it."}

    def converter(folder, output, mode):
        output.write_bytes(b"")
        (folder / "report.json").write_text(written)

    monkeypatch.setattr(tflite, "_run_converter", converter)
    path = tmp_path / "new" / "int4.tflite"
    path.parent.mkdir()
    with pytest.raises(ValueError, match="Mode 'int4' cannot keep it"):
        export.export_tflite(model, path, mode="int4", calibration=random_images(4))
    assert list(path.parent.iterdir()) == []


HELD_OUT = (random_images(5), np.arange(5))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_drop": 1}, ValueError, r"go together. Received: held_out=None, max_drop=1"),
        ({"held_out": HELD_OUT}, ValueError, "held_out=images, max_drop=None"),
        ({"held_out": HELD_OUT, "max_drop": -1}, ValueError, r"in \[0, 100\] %.*max_drop=-1"),
        (
            {"held_out": HELD_OUT, "max_drop": 1, "min_agreement": 1.5},
            ValueError,
            r"in \[0, 1\], and goes with `max_drop`. Received: min_agreement=1.5",
        ),
        ({"min_agreement": 0.9}, ValueError, r"min_agreement=0.9, max_drop=None"),
        (
            {"held_out": HELD_OUT[0], "max_drop": 1},
            ValueError,
            r"`held_out` must be a pair of images and labels.*ndarray",
        ),
        (
            {"held_out": (np.full_like(HELD_OUT[0], np.nan), np.arange(5)), "max_drop": 1},
            ValueError,
            r"`held_out` must be finite",
        ),
        (
            {"held_out": (HELD_OUT[0][:, :8], np.arange(5)), "max_drop": 1},
            ValueError,
            r"must be images \(N, 24, 40, 3\).*Received: shapes \(5, 8, 40, 3\) and \(5,\)",
        ),
        (
            {"held_out": (HELD_OUT[0], np.arange(4)), "max_drop": 1},
            ValueError,
            r"shapes \(5, 24, 40, 3\) and \(4,\)",
        ),
        (
            {"held_out": (HELD_OUT[0][:1], np.arange(1)), "max_drop": 1},
            ValueError,
            "N >= 2",
        ),
        (
            {"held_out": (HELD_OUT[0], np.arange(5.0)), "max_drop": 1},
            TypeError,
            "integers. Received: dtype=float64",
        ),
        (
            {"held_out": (HELD_OUT[0], np.arange(5) + 3), "max_drop": 1},
            ValueError,
            r"classes in \[0, 7\). Received: values from 3 to 7",
        ),
    ],
)
def test_wrong_held_out_images(model, tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        export.export_tflite(model, tmp_path / "model.tflite", **arguments)
    assert list(tmp_path.iterdir()) == []
