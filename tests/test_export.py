"""Exported files against the Keras model they came from."""

import json
import math
import pathlib
import shlex
import subprocess
import sys

import flatbuffers
import keras
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

import keras_vit
from keras_vit import export

IMAGE_SHAPE = (24, 40, 3)
CLASSES = 7
LABELS = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")
CONFIG = keras_vit.ViTConfig(hidden_dim=48, depth=2, num_heads=3, mlp_dim=80, patch_size=8)


def build(seed=0, **kwargs):
    """A small model, none of whose weights is 0 or 1."""
    kwargs = {"num_classes": CLASSES, "normalization": "imagenet", **kwargs}
    return randomise(keras_vit.build_vit(CONFIG, image_size=IMAGE_SHAPE[:2], **kwargs), seed)


def build_classifier():
    """A small model with a head fitted by ridge regression: it tells the classes well apart."""
    model = build()
    images, labels = labelled_images(350, seed=2)
    pooled = keras.Model(model.inputs, model.get_layer("pooling").output)
    features = np.c_[pooled.predict(images.astype("float32"), verbose=0), np.ones(len(images))]
    gram = features.T @ features + 3 * np.eye(features.shape[1])
    weights = np.linalg.solve(gram, features.T @ (4 * np.eye(CLASSES)[labels]))
    model.get_layer("head").set_weights([weights[:-1], weights[-1]])
    return model


def randomise(model, seed):
    """Sets weights that depend on the seed alone."""
    rng = np.random.default_rng(seed)
    for w in model.weights:
        value = rng.normal(0, 0.2 if len(w.shape) == 1 else 0.15, w.shape)
        w.assign(value + (w.name == "gamma"))
    return model


def labelled_images(count, seed=1):
    """Images in [0, 255]: one pattern of patches per class, and noise."""
    patterns = np.random.default_rng(0).uniform(20, 235, (CLASSES, 3, 5, 3))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    patches = patterns[labels] + rng.normal(0, 10, (count, 3, 5, 3))
    images = np.repeat(np.repeat(patches, 8, axis=1), 8, axis=2)
    return images.clip(0, 255).astype("uint8"), labels


def random_images(count):
    return labelled_images(count)[0]


def logits_of(path, images):
    runner = Interpreter(str(path)).get_signature_runner("serving_default")
    batches = images.astype("float32")[:, None]
    return np.concatenate([runner(images=batch)["logits"] for batch in batches])


def assert_equal_logits(path, model, images):
    expected = model.predict(images.astype("float32"), verbose=0)
    np.testing.assert_allclose(
        logits_of(path, images), expected, atol=1e-4 * max(1, np.abs(expected).max()), rtol=0
    )


def tensor_ranks(path):
    model = schema.Model.GetRootAs(path.read_bytes(), 0)
    subgraphs = [model.Subgraphs(i) for i in range(model.SubgraphsLength())]
    return [s.Tensors(i).ShapeLength() for s in subgraphs for i in range(s.TensorsLength())]


@pytest.fixture(scope="module")
def model():
    return build_classifier()


@pytest.fixture(scope="module")
def reports(model, tmp_path_factory):
    """Reports on one export in each mode, by the name of the mode."""
    folder = tmp_path_factory.mktemp("exported")
    reports = {"saved_model": export.export_saved_model(model, folder / "saved", labels=LABELS)}
    for mode in export.MODES:
        path = folder / f"{mode}.tflite"
        reports[mode] = export.export_tflite(
            model, path, mode=mode, labels=LABELS, calibration=random_images(64)
        )
    return reports


@pytest.fixture(scope="module")
def files(reports):
    return {mode: report.path for mode, report in reports.items()}


def failing_model():
    """A model that converts to no builtin operation."""
    images = keras.Input(IMAGE_SHAPE)
    x = keras.layers.GlobalAveragePooling2D()(images)
    return keras.Model(images, keras.ops.erfinv(x))


# What the files hold


@pytest.mark.parametrize("mode", export.MODES)
def test_tflite_runs_anywhere(reports, tmp_path, mode):
    report = reports[mode]
    assert report.input == export.TensorInfo("images", (1, *IMAGE_SHAPE), "float32")
    assert report.output == export.TensorInfo("logits", (1, CLASSES), "float32")
    assert not [name for name in report.ops if name.startswith(("CUSTOM", "Flex"))]
    assert max(tensor_ranks(tmp_path / report.path)) <= 4
    assert report.ops["GELU"] == CONFIG.depth
    assert report.note is None
    assert report.ops["BATCH_MATMUL"] == 2 * CONFIG.depth
    interpreter = Interpreter(report.path)
    signature = {"inputs": ["images"], "outputs": ["logits"]}
    assert interpreter.get_signature_list() == {"serving_default": signature}


def test_fp32_equals_keras(files, model):
    assert_equal_logits(files["fp32"], model, random_images(5))


def test_sizes(reports, model):
    size = {mode: report.size_bytes for mode, report in reports.items()}
    kernels = sum(math.prod(w.shape) for w in model.weights if "kernel" in w.name)
    assert size["fp32"] < 4 * model.count_params() + 50_000
    assert size["fp32"] - size["fp16"] > 0.9 * 2 * model.count_params()
    assert size["fp32"] - size["dynamic_int8"] > 0.9 * 3 * kernels


def test_saved_model_holds_each_variable_once(files, model):
    shapes = dict(tf.train.list_variables(files["saved_model"] + "/variables/variables")).values()
    assert sum(math.prod(shape) for shape in shapes if shape) == model.count_params()


def test_dynamic_int8_quantizes_every_dense_layer(files):
    with open(files["dynamic_int8"], "rb") as file:
        content = schema.Model.GetRootAs(file.read(), 0)
    graph = content.Subgraphs(0)
    types = []
    for operator in map(graph.Operators, range(graph.OperatorsLength())):
        code = content.OperatorCodes(operator.OpcodeIndex()).BuiltinCode()
        if code == schema.BuiltinOperator.FULLY_CONNECTED:
            weights = graph.Tensors(operator.Inputs(1))
            if b"mean_square" in graph.Tensors(operator.Outputs(0)).Name():
                continue
            scales = weights.Quantization().ScaleLength()
            types.append((weights.Type(), scales == weights.Shape(0)))
    # Per block qkv (in the last q, and k and v), projection and two of the MLP; the patch
    # projection and the head.
    assert types == [(schema.TensorType.INT8, True)] * (4 * CONFIG.depth + 3)


def test_fp16_asks_for_float16_arithmetic(files):
    with open(files["fp16"], "rb") as file:
        assert b"reduced_precision_support" in file.read()


@pytest.mark.parametrize(
    "kwargs",
    [
        {"pooling": "mean", "gelu": "tanh", "normalization": None},
        {"pooling": "gap", "class_token": False, "position": "sincos2d", "qk_norm": True},
        {
            "pooling": "map",
            "num_registers": 2,
            "layer_scale": 0.5,
            "normalization": "minus_one_one",
        },
    ],
    ids=lambda kwargs: kwargs["pooling"],
)
def test_every_pooling_converts(tmp_path, kwargs):
    model = build(seed=2, **kwargs)
    path = tmp_path / "model.tflite"
    report = export.export_tflite(model, path, mode="fp32")
    assert max(tensor_ranks(path)) <= 4
    # "map" has an MLP of its own; both forms of GELU become the builtin operation.
    assert report.ops["GELU"] == CONFIG.depth + (kwargs["pooling"] == "map")
    images = random_images(4)
    assert_equal_logits(path, model, images / 255 if kwargs["pooling"] == "mean" else images)


def test_saved_model_runs_with_tensorflow_alone(files, model, tmp_path):
    images = random_images(17).astype("float32")
    np.save(tmp_path / "images.npy", images)
    script = (
        "import sys, numpy as np, tensorflow as tf\n"
        "images = np.load('images.npy')\n"
        "serve = tf.saved_model.load(sys.argv[1]).signatures['serving_default']\n"
        "for n in (1, 3, 17):\n"
        "    logits = serve(images=tf.constant(images[:n]))['logits']\n"
        "    np.save(f'{n}.npy', logits.numpy())\n"
        "assert 'keras_vit' not in sys.modules\n"
    )
    command = [sys.executable, "-c", script, files["saved_model"]]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    expected = model.predict(images, verbose=0)
    for n in (1, 3, 17):
        np.testing.assert_allclose(np.load(tmp_path / f"{n}.npy"), expected[:n], atol=1e-5)


# Other dtype policies


@pytest.fixture
def policy():
    """Sets the global dtype policy for one test."""
    before = keras.config.dtype_policy()
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy(before)


def test_mixed_bfloat16_model_exports_in_float32(tmp_path, policy):
    policy("mixed_bfloat16")
    mixed = build(seed=6)
    assert keras.config.dtype_policy().name == "mixed_bfloat16"
    path = tmp_path / "mixed.tflite"
    report = export.export_tflite(mixed, path, mode="fp32")
    assert keras.config.dtype_policy().name == "mixed_bfloat16"
    assert "CAST" not in report.ops
    assert (report.input.dtype, report.output.dtype) == ("float32", "float32")
    policy("float32")
    model = build(seed=6)
    assert_equal_logits(path, model, random_images(4))
    export.verify(mixed, {"fp32": path}, random_images(8), rounds=0).check()


def test_as_float32_copies_what_layers_compute_of_their_weights(policy):
    """The mean of a Normalization, and the product of two matrices of LoRA."""
    policy("mixed_bfloat16")
    images = random_images(4).astype("float32")
    normalization = keras.layers.Normalization()
    normalization.adapt(images)
    vit = build(normalization=None)
    lora = vit.get_layer("block_0").attention.qkv
    lora.enable_lora(3)
    lora.lora_kernel_b.assign(np.random.default_rng(5).normal(0, 0.3, lora.lora_kernel_b.shape))
    model = keras.Sequential([keras.Input(images.shape[1:]), normalization, vit])
    copy = export.precision.as_float32(model)
    expected, found = (np.asarray(each(images), "float32") for each in (model, copy))
    np.testing.assert_allclose(found, expected, atol=0.05 * np.abs(expected).max())
    means = [each.get_layer(normalization.name).mean for each in (model, copy)]
    np.testing.assert_allclose(*(np.asarray(mean, "float32") for mean in means), rtol=5e-3)


def test_images_of_another_range_are_refused(tmp_path, files):
    """Where file and model would agree, and a phone feeds something else."""
    model, images = build(), random_images(8).astype("float32") / 255
    match = r"must be in \[0, 255\].*values up to (1|0\.9)"
    with pytest.raises(ValueError, match=f"`calibration` {match}"):
        export.export_tflite(model, tmp_path / "a.tflite", mode="int8_mixed", calibration=images)
    with pytest.raises(ValueError, match=f"`images` {match}"):
        export.verify(model, {"fp32": files["fp32"]}, images)
    assert list(tmp_path.iterdir()) == []


def test_quantized_models_are_refused(tmp_path):
    model = build()
    model.quantize("int8")
    with pytest.raises(ValueError, match=r"must have float weights.*with weights of int8"):
        export.export_tflite(model, tmp_path / "vit.tflite", mode="fp32")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["mixed_float16", "bfloat16", "float64"])
def test_as_float32_copies_a_model_of_any_keras_layers(policy, name):
    policy(name)
    images = keras.Input((6, 5, 3))
    inner_input = keras.Input((6, 5, 4))
    inner = keras.Model(inner_input, keras.layers.LayerNormalization()(inner_input))
    x = inner(keras.layers.Conv2D(4, 3, padding="same")(images))
    x = keras.layers.GlobalAveragePooling2D()(keras.ops.gelu(x) * 2.0)
    model = randomise(keras.Model(images, keras.layers.Dense(7)(x)), seed=3)
    # A loss that Keras cannot copy.
    model.compile("adam", loss=lambda labels, logits: keras.ops.mean(logits))
    copy = export.precision.as_float32(model)
    assert not copy.compiled
    assert all(v.dtype == "float32" for v in copy.variables)
    inputs = np.random.default_rng(0).normal(size=(2, 6, 5, 3)).astype("float32")
    result = keras.ops.convert_to_numpy(copy(inputs))
    assert result.dtype == "float32"
    np.testing.assert_allclose(result, np.asarray(model(inputs), "float32"), atol=0.05)
    assert model.dtype_policy.name == name


def without_input(_):
    """Of whose input Keras makes the dtype that of the policy."""
    layers = [keras.layers.Conv2D(4, 3), keras.layers.GlobalAveragePooling2D()]
    model = keras.Sequential([*layers, keras.layers.Dense(7)])
    model.build((None, *IMAGE_SHAPE))
    return model


def with_input(dtype):
    images = keras.Input(IMAGE_SHAPE, dtype=dtype)
    x = keras.layers.Rescaling(1 / 255)(images)
    return keras.Model(images, keras.layers.Dense(7)(keras.layers.GlobalAveragePooling2D()(x)))


@pytest.mark.parametrize(
    ("make", "dtype_policy", "dtype"),
    [
        (without_input, "mixed_bfloat16", "bfloat16"),
        (with_input, "float32", "uint8"),
        (with_input, "mixed_bfloat16", "uint8"),
    ],
)
def test_as_float32_takes_float32(policy, make, dtype_policy, dtype):
    policy(dtype_policy)
    model = randomise(make(dtype), seed=3)
    assert model.inputs[0].dtype == dtype
    copy = export.precision.as_float32(model)
    assert copy.inputs[0].dtype == "float32"
    policy("float32")
    images = random_images(3) + np.float32(0.3)  # which half precision or an integer rounds
    expected = randomise(make("float32"), seed=3)(images)
    np.testing.assert_allclose(copy(images), expected, rtol=1e-5, atol=1e-5)


def test_as_float32_leaves_the_layers_of_a_float32_model_alone(model):
    result = export.precision.as_float32(model)
    assert [*map(id, result.layers)] == [*map(id, model.layers)]


# Verification


@pytest.fixture(scope="module")
def verification(model, files, reports):
    images, labels = labelled_images(300)
    labels[:75] = (labels[:75] + 1) % CLASSES
    return export.verify(model, files, images, labels, rounds=5, exports=reports)


def test_verify_passes_every_mode(verification):
    verification.check()
    assert verification.failures == ()
    keras_row, *rows = verification.rows
    assert (keras_row.name, keras_row.accuracy, keras_row.agreement) == ("keras", 0.75, None)
    assert [row.name for row in rows] == ["saved_model", *export.MODES]
    largest = {"int8_mixed": 1, "int8_full": 1.5}
    for row in rows:
        assert row.agreement >= export.LIMITS[row.name].agreement
        assert row.accuracy == pytest.approx(0.75, abs=0.02)
        assert 0 <= row.mean_error <= row.max_error < largest.get(row.name, 0.5)
        assert row.drop == pytest.approx(75 - 100 * row.accuracy)
        assert 0 < row.latency_ms_min <= row.latency_ms_median
    assert (keras_row.drop, keras_row.latency_ms_min, keras_row.operations) == (None, None, None)
    errors = {row.name: row.max_error for row in rows}
    assert errors["fp32"] < errors["fp16"] < errors["dynamic_int8"]
    assert errors["fp16"] < 0.03  # 0.013; bfloat16 rounds 8 times as coarsely


def test_verification_describes_the_graphs(verification, reports):
    _, saved_model, *rows = verification.rows
    assert (saved_model.operations, saved_model.partitions) == (None, None)
    assert saved_model.latency_ms_min_all_cores is None
    assert saved_model.quantized_share is None
    for row in rows:
        assert row.operations == sum(reports[row.name].ops.values())
        assert (row.partitions == 1) == (row.name in export.CPU_MODES)
        assert row.quantized_share == export.describe_graph(row.path).quantized_share
        assert 0 < row.latency_ms_min_all_cores <= row.latency_ms_median_all_cores
    shares = {row.name: row.quantized_share for row in rows}
    assert (shares["fp32"], shares["fp16"]) == (0, 0)
    assert shares["dynamic_int8"] > 0.9


def test_verification_holds_the_reports(verification, reports):
    assert verification.exports == reports
    folder = pathlib.Path(reports["fp32"].path).parent
    content = verification.relative_to(folder).as_dict()
    fp32 = {**reports["fp32"].as_dict(), "path": "fp32.tflite"}
    assert content["exports"]["fp32"] == fp32
    assert [row["path"] for row in content["rows"][:3]] == [None, "saved", "fp32.tflite"]
    assert verification.command == shlex.join(sys.argv)


def test_verify_fails_for_a_file_of_other_weights(files):
    result = export.verify(build(seed=4), files, random_images(60), rounds=0)
    with pytest.raises(ValueError, match="The export failed its check:\n- saved_model: a logit"):
        result.check()
    for name in files:
        assert any(f.startswith(f"{name}: the top-1 class agrees") for f in result.failures)
    assert "| FAIL |" in result.to_markdown()


def test_verify_fails_for_small_changes(files):
    """A changed head bias moves no class, yet is not what was exported."""
    changed = build_classifier()
    changed.layers[-1].bias.assign(changed.layers[-1].bias + 0.01)
    result = export.verify(changed, files, random_images(300), rounds=0)
    assert [f.split(": ")[0] for f in result.failures] == ["saved_model", "fp32"]


def test_verify_fails_outputs_that_are_not_finite(model, tmp_path):
    broken = build()
    broken.layers[-1].bias.assign([0, 0, np.nan, 0, 0, 0, 0])
    export.export_saved_model(broken, tmp_path / "broken")
    images = random_images(9)
    result = export.verify(model, {"mine": tmp_path / "broken"}, images, rounds=0)
    assert result.failures == ("mine: 9 of 63 logits are not finite.",)
    assert result.as_dict()["rows"][1]["max_error"] is None
    result = export.verify(broken, {"mine": tmp_path / "broken"}, images, rounds=0)
    assert result.failures[0] == "keras: 9 of 63 logits are not finite."


def test_verify_compares_probabilities_with_those_of_the_model(model, files, tmp_path):
    path = tmp_path / "model.tflite"
    report = export.export_tflite(model, path, mode="fp32", activation="softmax")
    assert report.output == export.TensorInfo("probabilities", (1, CLASSES), "float32")
    images = random_images(9)
    result = export.verify(model, {"fp32": path}, images, rounds=0)
    assert result.rows[1].max_error < 1e-5
    result = export.verify(path, {"fp32": path, "logits": files["fp32"]}, images, rounds=0)
    assert result.rows[1].max_error == 0
    assert result.rows[2].max_error < 1e-5


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_outputs_are_named_by_what_they_are(model, files, tmp_path, activation):
    """Of a model with a softmax of its own, which no comparison makes another one of."""
    own = keras.Model(model.input, keras.layers.Activation(activation)(model.output))
    paths = {"saved_model": tmp_path / "saved", "fp32": tmp_path / "model.tflite"}
    reports = [
        export.export_saved_model(own, paths["saved_model"]),
        export.export_tflite(own, paths["fp32"], mode="fp32"),
    ]
    images = random_images(9)
    result = export.verify(own, paths, images, rounds=0)
    assert max(row.max_error for row in result.rows[1:]) < 1e-5
    result = export.verify(paths["fp32"], {"other": paths["saved_model"]}, images, rounds=0)
    assert result.rows[1].max_error < 1e-5
    for report in reports:
        assert report.output.name == "probabilities"
    assert list(
        Interpreter(str(paths["fp32"])).get_signature_runner()(images=images[:1].astype("float32"))
    ) == ["probabilities"]
    if activation == "softmax":
        result = export.verify(own, {"fp32": files["fp32"]}, images, rounds=0)
        assert result.rows[1].max_error < 1e-5
        path = tmp_path / "softmax.tflite"
        export.export_tflite(model, path, mode="fp32", activation="softmax")
        assert export.verify(own, {"fp32": path}, images, rounds=0).rows[1].max_error < 1e-5


@pytest.mark.parametrize("classes", [0, 1], ids=["features", "one output"])
def test_verify_measures_models_without_classes(tmp_path, classes):
    """The largest output of them says nothing: any file would agree."""
    model, path = build(num_classes=classes), tmp_path / "model.tflite"
    export.export_tflite(model, path, mode="dynamic_int8")
    images = random_images(30)
    result = export.verify(model, {"dynamic_int8": path}, images, rounds=0)
    result.check()
    row = result.rows[1]
    assert row.agreement is None
    outputs = np.concatenate([logits_of(path, image[None]) for image in images])
    expected = model.predict(images.astype("float32"), verbose=0)
    errors = np.square(outputs - expected).sum() / np.square(expected - expected.mean(0)).sum()
    assert row.relative_error == pytest.approx(np.sqrt(errors), rel=1e-3)
    assert 0.003 < row.relative_error < 0.1
    other = build(seed=4, num_classes=classes)
    for mode in ("fp16", "dynamic_int8", "int8_mixed", "int4", "int8_full", "a16w8"):
        result = export.verify(other, {mode: path}, images, rounds=0)
        with pytest.raises(ValueError, match=rf"{mode}: the outputs differ from the model's by"):
            result.check()
    with pytest.raises(ValueError, match=r"`labels` must be None for.*shape \(30, "):
        export.verify(model, {"fp32": path}, images, np.zeros(30, int), rounds=0)


def test_relative_error_of_a_case_by_hand():
    expected = np.array([[41.0], [39.0], [42.0], [38.0]])
    relative_error = export.verification._relative_error
    assert relative_error(expected + [[1.0], [0.0], [0.0], [0.0]], expected) == pytest.approx(
        1 / np.sqrt(10)
    )
    assert relative_error(np.full((4, 1), 40.0), expected) == 1
    assert relative_error(expected[:1] * 1.5, expected[:1]) == 0.5
    assert relative_error(np.full((4, 1), np.nan), expected) == np.inf
    assert relative_error(expected[:2] * 0, expected[:2] * 0) == 0


def test_verify_compares_any_files(files):
    files = {"small": files["dynamic_int8"], "half": files["fp16"]}
    limits = {"half": export.Limit(agreement=0.9, error=1e-9)}
    images = random_images(12)
    result = export.verify(files["half"], files, images, limits=limits, rounds=0)
    assert [row.name for row in result.rows] == ["reference", "small", "half"]
    assert result.rows[2].max_error == 0
    result.check()
    limits = {"small": export.Limit(agreement=0.9, error=1e-9)}
    result = export.verify(files["half"], files, images, limits=limits, rounds=0)
    with pytest.raises(ValueError, match="small: a logit differs from the model's by"):
        result.check()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"files": {}}, ValueError, "`files` must map names to paths.*files={}"),
        ({"files": {"fp32": "no.tflite"}}, ValueError, "path='no.tflite', which is missing"),
        ({"files": {"fp32": __file__}}, ValueError, "test_export.py', which is another kind"),
        ({"images": np.zeros((2, 24, 40, 3), int)}, TypeError, "float or uint8.*dtype=int64"),
        ({"images": np.zeros((24, 40, 3))}, ValueError, r"\(N, H, W, C\).*shape=\(24, 40, 3\)"),
        ({"images": np.zeros((0, 24, 40, 3))}, ValueError, r"N >= 1.*shape=\(0, 24, 40, 3\)"),
        ({"images": np.zeros((2, 40, 24, 3))}, ValueError, r"the model takes.*\(N, 40, 24, 3\)"),
        ({"labels": [0.5, 1.0]}, TypeError, "`labels` must be integers.*float64"),
        ({"labels": [1, 2, 3]}, ValueError, r"`labels` must be 2 classes.*shape=\(3,\)"),
        ({"labels": [1, 7]}, ValueError, r"in \[0, 7\).*values from 1 to 7"),
        ({"exports": {"fp16": None}}, ValueError, r"names of \['fp32'\]. Received: \['fp16'\]"),
        ({"labels": [-1, 6]}, ValueError, r"in \[0, 7\).*values from -1 to 6"),
    ],
)
def test_verify_errors(model, files, change, error, match):
    arguments = {"files": {"fp32": files["fp32"]}, "images": np.zeros((2, 24, 40, 3)), **change}
    with pytest.raises(error, match=match):
        export.verify(model, **arguments, rounds=0)


def test_verify_refuses_a_file_of_other_sizes(files):
    model = build(num_classes=5)
    with pytest.raises(ValueError, match=r"'fp32' must give logits of shape \(2, 5\).*\(2, 7\)"):
        export.verify(model, {"fp32": files["fp32"]}, random_images(2))


def test_verify_refuses_a_file_with_two_outputs(model, files, tmp_path):
    with open(files["fp32"], "rb") as file:
        content = schema.ModelT.InitFromPackedBuf(file.read())
    graph = content.subgraphs[0]
    graph.outputs = [*graph.outputs, graph.operators[-2].outputs[0]]
    builder = flatbuffers.Builder()
    builder.Finish(content.Pack(builder), b"TFL3")
    path = tmp_path / "two.tflite"
    path.write_bytes(builder.Output())
    with pytest.raises(ValueError, match=r"float32, uint8 or int8.*1 inputs and 2 outputs"):
        export.verify(model, {"fp32": path}, random_images(2))


def test_verify_bounds_the_timing(model, files):
    fp32 = {"fp32": files["fp32"]}
    result = export.verify(model, fp32, random_images(2), rounds=10**9, seconds=0.1)
    assert result.rows[1].latency_ms_min > 0


# Reports


def test_report(reports, tmp_path):
    report = reports["dynamic_int8"]
    assert report.labels == LABELS
    assert report.mode == "dynamic_int8"
    assert list(report.ops) == sorted(report.ops)
    assert {"python", "keras-vit", "keras", "tensorflow", "litert-quantizer"} <= set(
        report.versions
    )
    assert "dynamic_int8, 0.07 MB, batch 1 of 24 x 40 x 3 -> 7 logits, " in str(report)
    assert "any batch of 24 x 40 x 3 -> 7 logits" in str(reports["saved_model"])
    report.to_json(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == report.as_dict()
    with pytest.raises(ValueError, match=r"report\.json exists already: pass overwrite=True"):
        report.to_json(tmp_path / "report.json")
    report.to_json(tmp_path / "report.json", overwrite=True)


# Errors


def export_to(kind, folder, model, **kwargs):
    if kind == "tflite":
        return export.export_tflite(model, folder / "model.tflite", **kwargs)
    return export.export_saved_model(model, folder / "model", **kwargs)


def two_inputs():
    a, b = keras.Input(IMAGE_SHAPE), keras.Input(IMAGE_SHAPE)
    return keras.Model([a, b], keras.layers.GlobalAveragePooling2D()(a + b))


def two_outputs():
    images = keras.Input(IMAGE_SHAPE)
    x = keras.layers.GlobalAveragePooling2D()(images)
    return keras.Model(images, [x, keras.layers.Dense(5)(x)])


def any_size():
    images = keras.Input((None, 40, 3))
    return keras.Model(images, keras.layers.GlobalAveragePooling2D()(images))


def image_output():
    images = keras.Input(IMAGE_SHAPE)
    return keras.Model(images, keras.layers.Dense(2)(images))


@pytest.mark.parametrize("kind", ["tflite", "saved_model"])
@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: "model.keras", TypeError, "must be a keras.Model.*'model.keras' of type str"),
        (two_inputs, ValueError, "one input and one output.*2 inputs and 1 outputs"),
        (two_outputs, ValueError, "one input and one output.*1 inputs and 2 outputs"),
        (keras.Sequential, ValueError, "one input and one output.*0 inputs and 0 outputs"),
        (any_size, ValueError, r"The input of `model`.*static.*\(None, None, 40, 3\)"),
        (image_output, ValueError, r"The output of `model`.*\(None, classes\).*\(None, 24, 40, 2"),
    ],
)
def test_models_that_cannot_be_exported(tmp_path, kind, make, error, match):
    with pytest.raises(error, match=match):
        export_to(kind, tmp_path, make())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["tflite", "saved_model"])
@pytest.mark.parametrize(
    ("labels", "error", "match"),
    [
        (LABELS[:5], ValueError, "`labels` must name each of the model's 7 outputs.*5 labels"),
        ([*"abcdef", "g\nh"], ValueError, r"no line breaks.*'g\\nh'"),
        ("abcdefg", TypeError, "`labels` must be a sequence of strings.*'abcdefg'"),
        (range(7), TypeError, r"`labels` must be a sequence of strings.*range\(0, 7\)"),
    ],
)
def test_wrong_labels(model, tmp_path, kind, labels, error, match):
    with pytest.raises(error, match=match):
        export_to(kind, tmp_path, model, labels=labels)
    assert not list(tmp_path.iterdir())


def test_other_backend(model, tmp_path, monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ValueError, match=r"TensorFlow backend. Received: backend='jax'"):
        export.export_saved_model(model, tmp_path / "model")


@pytest.mark.parametrize("classes", [0, 1])
@pytest.mark.parametrize(
    "arguments", [{"activation": "softmax"}, {"max_drop": 1}], ids=lambda values: next(iter(values))
)
def test_what_takes_classes_is_refused_without(tmp_path, classes, arguments):
    """Of one output the softmax is 1, whatever the image."""
    match = rf"`{next(iter(arguments))}` must be None for a model of one output or without a head"
    with pytest.raises(ValueError, match=match):
        export.export_tflite(build(num_classes=classes), tmp_path / "model.tflite", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_unknown_mode(model, tmp_path):
    with pytest.raises(ValueError, match=r"`mode` must be one of \('fp32', .*mode='int3'"):
        export.export_tflite(model, tmp_path / "model.tflite", mode="int3")


def test_wrong_suffix(model, tmp_path):
    with pytest.raises(ValueError, match=r"`path` must end in `.tflite`.*model.lite'"):
        export.export_tflite(model, tmp_path / "model.lite")


def test_existing_file_is_kept(model, tmp_path):
    (tmp_path / "model.tflite").write_bytes(b"old")
    with pytest.raises(ValueError, match=r"tflite exists already: pass overwrite=True"):
        export.export_tflite(model, tmp_path / "model.tflite")
    assert (tmp_path / "model.tflite").read_bytes() == b"old"


@pytest.mark.usefixtures("own_process")
def test_failed_conversion_keeps_the_old_file_alone(tmp_path):
    path = tmp_path / "model.tflite"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match=r"(?s)failed in mode 'fp32' with exit .*Erfinv"):
        export.export_tflite(failing_model(), path, mode="fp32", overwrite=True)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("own_process")
def test_file_is_replaced_when_asked(model, tmp_path):
    path = tmp_path / "model.tflite"
    path.write_bytes(b"old")
    export.export_tflite(model, path, mode="fp32", overwrite=True)
    assert path.stat().st_size > 100_000


def test_existing_saved_model_is_kept_or_replaced(model, tmp_path):
    path = tmp_path / "model"
    export.export_saved_model(model, path)
    before = (path / "fingerprint.pb").read_bytes()
    with pytest.raises(ValueError, match=r"model exists already: pass overwrite=True"):
        export.export_saved_model(model, path)
    assert (path / "fingerprint.pb").read_bytes() == before
    other = build(seed=5)
    export.export_saved_model(other, path, overwrite=True)
    assert list(tmp_path.iterdir()) == [path]
    export.verify(other, {"saved_model": path}, random_images(4), rounds=0).check()


def test_other_folders_are_never_replaced(model, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "draft.txt").write_text("chapter 1")
    with pytest.raises(ValueError, match="is not a SavedModel folder, so it is left alone"):
        export.export_saved_model(model, tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "draft.txt").read_text() == "chapter 1"
    (tmp_path / "model.tflite").mkdir()
    with pytest.raises(ValueError, match="is not a file, so it is left alone"):
        export.export_tflite(model, tmp_path / "model.tflite", overwrite=True)
