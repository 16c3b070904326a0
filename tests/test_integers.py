"""Files that compute with integers alone, and take and give them."""

import types

import keras
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

import keras_vit
from keras_vit import export
from keras_vit.export.calibration import calibrate
from keras_vit.export.integer_io import with_integer_io
from keras_vit.export.metadata import read_metadata
from keras_vit.export.quantization import RULES, FloatFile
from keras_vit.export.sensitivity import signal_to_noise
from keras_vit.export.verification import verify

SIZE = (24, 40)
CONFIG = keras_vit.ViTConfig(hidden_dim=64, depth=2, num_heads=4, mlp_dim=96, patch_size=8)
PIXELS = types.SimpleNamespace(image_range=(0.0, 255.0))  # all that is asked of a calibration
TYPES = {number: name for name, number in vars(schema.TensorType).items() if name[0] != "_"}


def build(**options):
    options = {"num_classes": 7, "normalization": "imagenet", **options}
    model = keras_vit.build_vit(CONFIG, image_size=SIZE, **options)
    rng = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(rng.normal(0.02, 0.2, weight.shape) + (weight.name == "gamma"))
    return model


def random_images(count, seed=1):
    return np.random.default_rng(seed).integers(0, 256, (count, *SIZE, 3)).astype("float32")


def write(model, path, scale=1, **options):
    images = random_images(24) * scale
    export.export_tflite(model, path, calibration=images, **options)
    return path


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """Paths by mode, type in and out, and activation."""
    folder = tmp_path_factory.mktemp("integers")
    files = {}
    for mode in export.NPU_MODES:
        for activation in (None, "softmax"):
            path = folder / f"{mode}_{activation}.tflite"
            files[mode, "float32", activation] = write(
                model, path, mode=mode, activation=activation
            )
            for dtype in ("uint8", "int8"):
                changed = with_integer_io(path.read_bytes(), dtype, PIXELS, bool(activation))
                files[mode, dtype, activation] = folder / f"{mode}_{dtype}_{activation}.tflite"
                files[mode, dtype, activation].write_bytes(changed)
    return files


@pytest.mark.usefixtures("own_process")
def test_export_writes_integer_ends(files, model, tmp_path):
    path = tmp_path / "model.tflite"
    write(model, path, mode="int8_full", io_dtype="uint8", activation="softmax")
    images = random_images(5, seed=2)
    result, *_ = run(path, images)
    expected, *_ = run(files["int8_full", "uint8", "softmax"], images)
    np.testing.assert_array_equal(result, expected)
    metadata = read_metadata(path)
    assert (metadata["mean"], metadata["std"]) == (0, 1)


def test_gray_pixels_go_in_as_they_are(tmp_path):
    """Calibrated with dark images, of a model that normalises [0, 255] itself."""
    path = tmp_path / "model.tflite"
    images = random_images(8)[..., :1] * (99 / 255)
    model = build(channels=1, normalization="minus_one_one")
    export.export_tflite(model, path, calibration=images, mode="int8_full", io_dtype="uint8")
    [details] = Interpreter(str(path)).get_input_details()
    assert details["quantization"] == (1.0, 0)


def activations(path):
    """Operation -> types of the tensors that it puts out, of all but the ends of a file."""
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes())
    names = {code: name for name, code in vars(schema.BuiltinOperator).items() if name[0] != "_"}
    graph = model.subgraphs[0]
    found = {}
    for op in graph.operators:
        name = names[model.operatorCodes[op.opcodeIndex].builtinCode]
        types = {TYPES[graph.tensors[i].type] for i in op.outputs if i not in graph.outputs}
        found.setdefault(name, set()).update(types)
    return found


@pytest.mark.parametrize("activation", [None, "softmax"])
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_a16w8_computes_in_16_bits(files, dtype, activation):
    found = activations(files["a16w8", dtype, activation])
    assert {"FULLY_CONNECTED", "BATCH_MATMUL", "SOFTMAX", "GELU", "RSQRT", "ADD"} <= set(found)
    inside = set.union(*(types for name, types in found.items() if name != "QUANTIZE"))
    assert inside == {"INT16"}


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_int8_full_computes_products_in_8_bits(files, dtype):
    found = activations(files["int8_full", dtype, None])
    for name in ("BATCH_MATMUL", "GELU", "SOFTMAX", "SPLIT", "TRANSPOSE"):
        assert found[name] == {"INT8"}
    for name in ("ADD", "MUL", "MEAN", "RSQRT", "CONCATENATION", "SLICE"):
        assert found[name] == {"INT16"}
    assert set.union(*found.values()) == {"INT8", "INT16"}


@pytest.mark.parametrize("mode", export.NPU_MODES)
def test_integers_alone(files, mode):
    """No tensor of a file with integer ends is float."""
    model = schema.ModelT.InitFromPackedBuf(files[mode, "uint8", "softmax"].read_bytes())
    types = {TYPES[tensor.type] for tensor in model.subgraphs[0].tensors}
    assert not {name for name in types if "FLOAT" in name}


@pytest.mark.parametrize("mode", export.NPU_MODES)
def test_near_to_the_model(files, model, mode):
    images = random_images(100, seed=2)
    logits, *_ = run(files[mode, "float32", None], images)
    ratio = signal_to_noise(model.predict(images, verbose=0), logits)
    assert ratio > {"int8_full": 15, "a16w8": 25}[mode]


def run(path, images):
    """Outputs of a file as they are, and the quantization of its ends."""
    interpreter = Interpreter(str(path))
    interpreter.allocate_tensors()
    (image,), (output,) = interpreter.get_input_details(), interpreter.get_output_details()
    outputs = []
    for values in images:
        interpreter.set_tensor(image["index"], values[None].astype(image["dtype"]))
        interpreter.invoke()
        outputs.append(interpreter.get_tensor(output["index"])[0])
    assert np.stack(outputs).dtype == output["dtype"]
    return np.stack(outputs), image["quantization"], output["quantization"]


@pytest.mark.parametrize("activation", [None, "softmax"])
@pytest.mark.parametrize(("dtype", "smallest"), [("uint8", 0), ("int8", -128)])
@pytest.mark.parametrize("mode", export.NPU_MODES)
def test_integer_ends_give_what_float_ends_give(files, mode, dtype, smallest, activation):
    """Pixels are taken as they are; the output is rounded to its 256 levels."""
    images = random_images(30, seed=2)
    expected, _, _ = run(files[mode, "float32", activation], images)
    integers, image, (scale, zero_point) = run(files[mode, dtype, activation], images + smallest)
    assert integers.dtype == dtype
    assert image == (1.0, smallest)
    result = scale * (integers.astype("float64") - zero_point)
    level = 1 / 256 if activation else scale
    assert scale == level
    assert result.min() < np.median(result) < result.max()
    top = 255 / 256 if activation else np.inf  # 1 is no level of a probability
    np.testing.assert_allclose(result, expected.clip(max=top), atol=0.51 * level)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("mode", export.NPU_MODES)
def test_integer_ends_of_a_head_in_float(model, tmp_path, mode, dtype):
    """Where `max_drop` left it in float."""
    path = write(model, tmp_path / "fp32.tflite", mode="fp32")
    calibration = calibrate(path.read_bytes(), random_images(24)).with_image_range(0.0, 255.0)
    source = FloatFile(path.read_bytes(), calibration)
    head = source.layers(mode)[-1]
    assert head.name == "head"
    content = source.quantize((*RULES[mode], head.rule("float32")))
    path.write_bytes(content)
    images = random_images(24)
    expected, _, _ = run(path, images)
    path.write_bytes(with_integer_io(content, dtype, calibration, False))
    smallest = {"uint8": 0, "int8": -128}[dtype]
    integers, image, (scale, zero_point) = run(path, images + smallest)
    assert image == (1.0, smallest)
    result = scale * (integers.astype("float64") - zero_point)
    assert integers.dtype == dtype
    assert np.ptp(result) > 100 * scale
    # What is outside of the calibrated range is cut.
    low, high = (scale * (smallest + level - zero_point) for level in (0, 255))
    np.testing.assert_allclose(result, expected.clip(low, high), atol=0.51 * scale)


def sigmoid_head():
    vit = build(num_classes=0)
    return keras.Model(vit.input, keras.layers.Dense(7, activation="sigmoid")(vit.output))


def softmax_head():
    vit = build()
    return keras.Model(vit.input, keras.ops.softmax(vit.output))


def tanh_features():
    return build(num_classes=0, representation_size=11)


def map_features():
    return build(num_classes=0, pooling="map")


@pytest.mark.parametrize(
    ("make", "mode"),
    [
        (sigmoid_head, "int8_full"),
        (softmax_head, "a16w8"),
        (tanh_features, "a16w8"),
        (map_features, "int8_full"),
        pytest.param(sigmoid_head, "a16w8", marks=pytest.mark.slow),
        pytest.param(softmax_head, "int8_full", marks=pytest.mark.slow),
        pytest.param(tanh_features, "int8_full", marks=pytest.mark.slow),
        pytest.param(map_features, "a16w8", marks=pytest.mark.slow),
    ],
)
def test_integer_ends_of_other_outputs(tmp_path, make, mode):
    """What they end in has 8 bits already, or a range of its own."""
    model = make()
    paths = {
        dtype: write(model, tmp_path / f"{dtype}.tflite", mode=mode, io_dtype=dtype)
        for dtype in ("float32", "uint8", "int8")
    }
    images = random_images(30, seed=2)
    expected, _, _ = run(paths["float32"], images)
    assert np.ptp(expected) > 0.1
    for dtype, smallest in (("uint8", 0), ("int8", -128)):
        integers, _, (scale, zero_point) = run(paths[dtype], images + smallest)
        assert scale < np.ptp(expected) / 60
        low, high = (scale * (smallest + level - zero_point) for level in (0, 255))
        result = scale * (integers.astype("float64") - zero_point)
        np.testing.assert_allclose(result, expected.clip(low, high), atol=0.51 * scale)


@pytest.mark.parametrize("mode", export.NPU_MODES)
def test_images_that_are_no_pixels(tmp_path, mode):
    """Their range is that of the calibration images."""
    model = build(normalization=None)
    paths = {
        dtype: write(model, tmp_path / f"{dtype}.tflite", 1 / 255, mode=mode, io_dtype=dtype)
        for dtype in ("float32", "uint8")
    }
    pixels = random_images(30, seed=2)
    expected, _, _ = run(paths["float32"], pixels / 255)
    integers, image, (scale, zero_point) = run(paths["uint8"], pixels)
    assert image == (pytest.approx(1 / 255), 0)
    result = scale * (integers.astype("float64") - zero_point)
    # The float file rounds images as the integer file does, in 8 bits, or in 16.
    np.testing.assert_allclose(result, expected, atol=0.51 * scale + 0.02 * (mode == "a16w8"))


def test_verify_runs_integer_files(files, model):
    images = random_images(60, seed=2)
    names = [("int8_full", dtype, "softmax") for dtype in ("float32", "uint8", "int8")]
    paths = {"/".join(name): files[name] for name in names}
    _, *rows = verify(model, paths, images, rounds=2).rows
    plain, *integers = rows
    for row in integers:
        assert row.agreement == pytest.approx(plain.agreement, abs=0.02)
        assert row.max_error == pytest.approx(plain.max_error, abs=1 / 256)
        assert row.latency_ms_min > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"io_dtype": "int16"}, '"float32", "uint8" or "int8". Received: io_dtype=\'int16\''),
        (
            {"io_dtype": "uint8", "mode": "int8_mixed"},
            "float32 except in the modes.*io_dtype='uint8', mode='int8_mixed'",
        ),
    ],
)
def test_wrong_types(model, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        write(model, tmp_path / "model.tflite", **options)
    assert list(tmp_path.iterdir()) == []
