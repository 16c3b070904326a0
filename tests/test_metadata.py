"""Metadata of `.tflite` files, as MediaPipe's ImageClassifier and its schema read them."""

import functools
import pathlib
import re
import zipfile

import flatbuffers
import keras
import mediapipe
import numpy as np
import PIL.Image
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from mediapipe.tasks.metadata import metadata_schema_py_generated as metadata_schema
from mediapipe.tasks.python import BaseOptions, vision
from sklearn import datasets

import keras_vit
from keras_vit import export
from keras_vit.export.metadata import add_metadata, read_metadata

# The modes that a CPU runs, with float images in and float probabilities out.
MODES = ("fp32", "dynamic_int8", "int8_mixed")
# Name of the output.
OUTPUT = "probabilities"
README = pathlib.Path(export.__file__).with_name("README.md")
IMAGE_SIZE = (16, 24)
CLASSES = 10
LABELS = ("zéro", "one", "two", "three", "four, or 4", "five", "six", " seven", "八", "nine")
TEXTS = {"name": "Digits", "description": "Names handwritten digits."}


@functools.cache
def digits():
    """Scans as RGB images of the model's size, each channel another, and their labels."""
    images, labels = datasets.load_digits(return_X_y=True)
    grey = np.kron(images.reshape(-1, 8, 8) * (255 / 16), np.ones((2, 3)))
    return np.stack([grey, 255 - grey, grey / 2], axis=-1).round().astype("uint8"), labels


def photographs():
    """scikit-learn's two photographs, at the model's size."""
    images = datasets.load_sample_images().images
    return np.stack([PIL.Image.fromarray(i).resize(IMAGE_SIZE[::-1]) for i in images])


@pytest.fixture(scope="module")
def classifier():
    """A small ViT, trained for seconds on the first digits and the photographs: sure of most."""
    keras.utils.set_random_seed(1)
    config = keras_vit.ViTConfig(hidden_dim=48, depth=2, num_heads=3, mlp_dim=80, patch_size=4)
    model = keras_vit.build_vit(
        config, image_size=IMAGE_SIZE, num_classes=CLASSES, normalization="imagenet", pooling="gap"
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(3e-3), loss, jit_compile=True)
    images, labels = (array[:1500] for array in digits())
    images = np.concatenate([images, np.repeat(photographs(), 30, axis=0)])
    labels = np.concatenate([labels, np.repeat([3, 6], 30)])
    model.fit(images.astype("float32"), labels, batch_size=50, epochs=12, verbose=0)
    return model


@pytest.fixture(scope="module")
def model(classifier):
    """Its probabilities."""
    return keras.Model(classifier.inputs, keras.layers.Softmax()(classifier.outputs[0]))


@pytest.fixture(scope="module")
def plain(classifier, tmp_path_factory):
    """Exported files without metadata, by mode."""
    folder = tmp_path_factory.mktemp("plain")
    options = {"calibration": digits()[0][:64], "activation": "softmax"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export.tflite, "add_metadata", lambda content, **_: content)
        for mode in MODES:
            export.export_tflite(classifier, folder / f"{mode}.tflite", mode=mode, **options)
    return {mode: (folder / f"{mode}.tflite").read_bytes() for mode in MODES}


@pytest.fixture(scope="module")
def files(plain, tmp_path_factory):
    """The files with metadata, by mode."""
    folder = tmp_path_factory.mktemp("files")
    for mode, content in plain.items():
        path = folder / f"{mode}.tflite"
        path.write_bytes(add_metadata(content, **TEXTS, labels=LABELS, version="3.1"))
    return {mode: folder / f"{mode}.tflite" for mode in plain}


MARGIN = 0.25


def margins(probabilities):
    """By how much the likeliest class leads `(N,)`."""
    best = np.sort(probabilities, axis=1)
    return best[:, -1] - best[:, -2]


def unseen_digits(model, count):
    """Digits that the model was not trained on and is sure of, and their labels.

    Rounding to 8 bits may change the class where the two best ones are all but equally likely.
    """
    images, labels = (array[1500:] for array in digits())
    probabilities = model.predict(images.astype("float32"), verbose=0)
    sure = np.flatnonzero(margins(probabilities) > MARGIN)[:count]
    assert len(sure) == count
    return images[sure], labels[sure]


def classify(path, images):
    """Names, indices and scores of every class for each image, the best first."""
    options = vision.ImageClassifierOptions(base_options=BaseOptions(model_asset_path=str(path)))
    with vision.ImageClassifier.create_from_options(options) as classifier:
        results = [
            classifier.classify(
                mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=image)
            )
            for image in images
        ]
    return [result.classifications[0].categories for result in results]


def edited(content, change):
    """A `.tflite` file after `change` worked on its object."""
    model = schema.ModelT.InitFromPackedBuf(content)
    change(model)
    builder = flatbuffers.Builder()
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def run(content, images):
    return Interpreter(model_content=content).get_signature_runner()(images=images)[OUTPUT]


# What MediaPipe makes of it


@pytest.mark.parametrize("mode", MODES)
def test_image_classifier_names_the_class_that_keras_names(model, files, mode):
    images, labels = unseen_digits(model, 50)
    images = np.concatenate([images, photographs()])
    expected = model.predict(images.astype("float32"), verbose=0)
    assert (expected[:50].argmax(1) == labels).mean() > 0.8
    assert margins(expected).min() > MARGIN
    results = classify(files[mode], images)
    assert [result[0].index for result in results] == expected.argmax(1).tolist()
    assert [result[0].category_name for result in results] == [
        LABELS[i] for i in expected.argmax(1)
    ]
    scores = [[c.score for c in sorted(r, key=lambda c: c.index)] for r in results]
    np.testing.assert_allclose(scores, expected, atol=1e-5 if mode == "fp32" else 0.1)


@pytest.mark.parametrize("mode", MODES)
def test_image_classifier_opens_what_is_exported(classifier, model, tmp_path, mode):
    path = tmp_path / "model.tflite"
    options = {"calibration": digits()[0][:64], "activation": "softmax", "labels": LABELS}
    export.export_tflite(classifier, path, mode=mode, **options)
    images, _ = unseen_digits(model, 20)
    expected = model.predict(images.astype("float32"), verbose=0)
    results = classify(path, images)
    assert [r[0].category_name for r in results] == [LABELS[i] for i in expected.argmax(1)]
    scores = [[c.score for c in sorted(r, key=lambda c: c.index)] for r in results]
    np.testing.assert_allclose(scores, expected, atol=1e-5 if mode == "fp32" else 0.1)


@pytest.mark.parametrize("mode", MODES)
def test_image_classifier_resizes(model, files, mode):
    images, _ = unseen_digits(model, 20)
    expected = model.predict(images.astype("float32"), verbose=0).argmax(1)
    larger = [np.kron(image, np.ones((6, 5, 1), "uint8")) for image in images]
    assert [result[0].index for result in classify(files[mode], larger)] == expected.tolist()


def test_export_writes_the_metadata(classifier, tmp_path):
    path = tmp_path / "model.tflite"
    export.export_tflite(classifier, path, mode="fp32", activation="softmax", labels=LABELS)
    assert read_metadata(path) == {
        "name": classifier.name,
        "description": "Image classifier made by keras-vit, mode fp32.",
        "version": None,
        "labels": LABELS,
        "mean": 0.0,
        "std": 1.0,
    }


@pytest.mark.parametrize(("channels", "normalization"), [(1, "minus_one_one"), (3, None)])
def test_labels_of_other_images(tmp_path, channels, normalization):
    """Gray ones are described, too; of those that come normalised only the labels are."""
    config = keras_vit.ViTConfig(hidden_dim=48, depth=1, num_heads=3, mlp_dim=80, patch_size=4)
    options = {"num_classes": CLASSES, "channels": channels, "normalization": normalization}
    model = keras_vit.build_vit(config, image_size=IMAGE_SIZE, **options)
    path = tmp_path / "model.tflite"
    export.export_tflite(model, path, mode="fp32", labels=LABELS)
    assert zipfile.ZipFile(path).read("labels.txt").decode().splitlines() == list(LABELS)
    if normalization is None:
        assert read_metadata(path) is None
    else:
        assert read_metadata(path)["labels"] == LABELS
    Interpreter(str(path)).allocate_tensors()


def test_image_classifier_without_labels(model, plain, tmp_path):
    path = tmp_path / "model.tflite"
    path.write_bytes(add_metadata(plain["fp32"], **TEXTS))
    assert not zipfile.is_zipfile(path)
    assert read_metadata(path)["labels"] is None
    image = digits()[0][-1]
    expected = model.predict(image[None].astype("float32"), verbose=0).argmax()
    assert classify(path, [image])[0][0].index == expected


def test_image_classifier_scales_pixels_by_the_metadata(model, plain, tmp_path):
    path = tmp_path / "model.tflite"
    path.write_bytes(add_metadata(plain["fp32"], **TEXTS, labels=LABELS, mean=-50.0, std=1.5))
    images = digits()[0][-9:]
    expected = model.predict((images.astype("float32") + 50) / 1.5, verbose=0)
    assert (expected.max(1) != model.predict(images.astype("float32"), verbose=0).max(1)).all()
    scores = [result[0].score for result in classify(path, images)]
    np.testing.assert_allclose(scores, expected.max(1), atol=1e-5)


def take_integers(dtype):
    """Returns a change that makes a file take integers, which a first operation casts."""

    def change(model):
        graph = model.subgraphs[0]
        before = graph.inputs[0]
        shape = graph.tensors[before].shape
        graph.tensors.append(schema.TensorT(name="pixels", type=dtype, shape=shape))
        model.operatorCodes.append(
            schema.OperatorCodeT(
                deprecatedBuiltinCode=schema.BuiltinOperator.CAST,
                builtinCode=schema.BuiltinOperator.CAST,
            )
        )
        added = len(graph.tensors) - 1
        code = len(model.operatorCodes) - 1
        cast = schema.OperatorT(opcodeIndex=code, inputs=[added], outputs=[before])
        graph.operators.insert(0, cast)
        graph.inputs = [added]
        model.signatureDefs[0].inputs[0].tensorIndex = added

    return change


def test_image_classifier_copies_pixels_to_uint8_inputs(model, plain, tmp_path):
    content = edited(plain["fp32"], take_integers(schema.TensorType.UINT8))
    path = tmp_path / "uint8.tflite"
    path.write_bytes(add_metadata(content, **TEXTS, labels=LABELS, mean=127.5, std=127.5))
    images = digits()[0][-9:]
    expected = model.predict(images.astype("float32"), verbose=0)
    results = classify(path, images)
    assert [result[0].index for result in results] == expected.argmax(1).tolist()
    np.testing.assert_allclose([r[0].score for r in results], expected.max(1), atol=1e-5)


def test_image_classifier_refuses_int8_inputs(plain, tmp_path):
    content = edited(plain["fp32"], take_integers(schema.TensorType.INT8))
    (tmp_path / "int8.tflite").write_bytes(add_metadata(content, **TEXTS, labels=LABELS))
    with pytest.raises(ValueError, match="uint8/float32, got INT8"):
        classify(tmp_path / "int8.tflite", [])


def channels(number):
    """Returns a change of the input's shape alone."""

    def change(model):
        graph = model.subgraphs[0]
        graph.tensors[graph.inputs[0]].shape = [1, 16, 24, number]

    return change


def test_image_classifier_refuses_one_channel(plain, tmp_path):
    content = edited(plain["fp32"], channels(1))
    (tmp_path / "grey.tflite").write_bytes(add_metadata(content, **TEXTS, labels=LABELS))
    with pytest.raises(ValueError, match="Only RGB color space is supported"):
        classify(tmp_path / "grey.tflite", [])


def test_python_of_the_readme(model, files, tmp_path, monkeypatch, capsys):
    [code] = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    photograph = photographs()[0]
    monkeypatch.chdir(tmp_path)
    PIL.Image.fromarray(photograph).save("photo.jpg", format="PNG")
    pathlib.Path("model.tflite").write_bytes(files["fp32"].read_bytes())
    exec(compile(code.replace('"probabilities"', repr(OUTPUT)), str(README), "exec"), {})
    (scores,) = model.predict(photograph[None].astype("float32"), verbose=0)
    best = scores.argsort()[::-1][:5]
    assert capsys.readouterr().out.splitlines() == [f"{scores[i]:.3f} {LABELS[i]}" for i in best]


# What it holds, read with MediaPipe's code for the schema


def stored(content):
    """The metadata of a file, as an object of MediaPipe's."""
    model = schema.ModelT.InitFromPackedBuf(content)
    (entry,) = [e for e in model.metadata if e.name == b"TFLITE_METADATA"]
    data = model.buffers[entry.buffer].data.tobytes()
    assert data[4:8] == b"M001"
    return metadata_schema.ModelMetadataT.InitFromPackedBuf(data)


def test_every_field(files):
    metadata = stored(files["dynamic_int8"].read_bytes())
    assert (metadata.name, metadata.description) == (b"Digits", b"Names handwritten digits.")
    assert (metadata.version, metadata.minParserVersion) == (b"3.1", b"1.0.0")
    (graph,) = metadata.subgraphMetadata
    (image,) = graph.inputTensorMetadata
    assert image.name == b"images"
    assert image.description.startswith(b"Image of 3 channels; pixels in [0, 255], less 0.0, ")
    assert isinstance(image.content.contentProperties, metadata_schema.ImagePropertiesT)
    assert image.content.contentProperties.colorSpace == metadata_schema.ColorSpaceType.RGB
    (unit,) = image.processUnits
    assert isinstance(unit.options, metadata_schema.NormalizationOptionsT)
    assert (unit.options.mean.tolist(), unit.options.std.tolist()) == ([0], [1])
    assert (image.stats.min.tolist(), image.stats.max.tolist()) == ([0], [255])
    (scores,) = graph.outputTensorMetadata
    assert scores.name == OUTPUT.encode()
    assert scores.description == b"Score of each of the 10 classes."
    assert isinstance(scores.content.contentProperties, metadata_schema.FeaturePropertiesT)
    (file,) = scores.associatedFiles
    assert file.name == b"labels.txt"
    assert file.type == metadata_schema.AssociatedFileType.TENSOR_AXIS_LABELS
    with zipfile.ZipFile(files["dynamic_int8"]) as archive:
        (entry,) = archive.infolist()
        assert (entry.filename, entry.compress_type) == ("labels.txt", zipfile.ZIP_STORED)
        assert archive.read(entry).decode() == "\n".join(LABELS) + "\n"


def test_stats_are_those_of_the_scaled_pixels(plain):
    metadata = stored(add_metadata(plain["fp32"], **TEXTS, mean=51.0, std=102.0))
    (image,) = metadata.subgraphMetadata[0].inputTensorMetadata
    assert (image.stats.min.tolist(), image.stats.max.tolist()) == ([-0.5], [2])
    assert metadata.subgraphMetadata[0].outputTensorMetadata[0].associatedFiles is None


@pytest.mark.parametrize(("number", "color_space"), [(1, "GRAYSCALE"), (3, "RGB"), (5, "UNKNOWN")])
def test_color_space(plain, number, color_space):
    metadata = stored(add_metadata(edited(plain["fp32"], channels(number)), **TEXTS))
    (image,) = metadata.subgraphMetadata[0].inputTensorMetadata
    found = image.content.contentProperties.colorSpace
    assert found == getattr(metadata_schema.ColorSpaceType, color_space)


@pytest.mark.parametrize("version", [None, "3.1"])
def test_read_metadata(plain, tmp_path, version):
    path = tmp_path / "model.tflite"
    path.write_bytes(plain["fp32"])
    assert read_metadata(path) is None
    given = {**TEXTS, "version": version, "labels": LABELS, "mean": 127.5, "std": 63.75}
    path.write_bytes(add_metadata(plain["fp32"], **given))
    assert read_metadata(path) == given


# What is left as it was


@pytest.mark.parametrize("mode", MODES)
def test_the_model_stays_the_same(plain, files, mode):
    content = files[mode].read_bytes()
    before, after = (schema.ModelT.InitFromPackedBuf(c) for c in (plain[mode], content))
    assert len(content) < len(plain[mode]) + 20_000
    assert [e.name for e in after.metadata] == [
        *(e.name for e in before.metadata),
        b"TFLITE_METADATA",
    ]
    for old, new in zip(before.buffers, after.buffers, strict=False):
        np.testing.assert_array_equal(new.data, old.data)
    images = digits()[0][-1:].astype("float32")
    np.testing.assert_array_equal(run(content, images), run(plain[mode], images))


@pytest.mark.parametrize("mode", MODES)
def test_weights_are_aligned(files, mode):
    content = np.frombuffer(files[mode].read_bytes(), "uint8")
    model = schema.Model.GetRootAs(content, 0)
    buffers = [model.Buffers(i) for i in range(model.BuffersLength())]
    starts = [b.DataAsNumpy().ctypes.data for b in buffers if b.DataLength()]
    assert len(starts) > 20
    assert {(start - content.ctypes.data) % 16 for start in starts} == {0}


def test_metadata_is_replaced(plain, files):
    content = files["fp32"].read_bytes()
    new = {"name": "Other", "description": "A longer description than that of the first one."}
    assert add_metadata(content, **new) == add_metadata(plain["fp32"], **new)
    same = {**TEXTS, "version": "3.1", "labels": LABELS}
    assert add_metadata(bytearray(add_metadata(content, **new)), **same) == content


def moved_behind(content):
    """The file as converters write it near 2 GB: the weights stand behind the flatbuffer."""
    weights = []

    def change(model, start=1):
        weights.clear()
        for buffer in model.buffers:
            if buffer.data is not None and len(buffer.data) > 1000:
                weights.append(buffer.data.tobytes() + bytes(-len(buffer.data) % 16))
                buffer.offset, buffer.size = start, len(buffer.data)
                buffer.data = None
                start += len(weights[-1])

    size = len(edited(content, lambda model: change(model, start=16)))
    start = size + 16 + -size % 16
    flatbuffer = edited(content, lambda model: change(model, start))
    return flatbuffer.ljust(start, b"\0") + b"".join(weights)


@pytest.mark.parametrize("mode", MODES)
def test_weights_behind_the_flatbuffer(plain, files, tmp_path, mode):
    content = moved_behind(plain[mode])
    images = digits()[0][-3:]
    expected = run(plain[mode], images[:1].astype("float32"))
    np.testing.assert_array_equal(run(content, images[:1].astype("float32")), expected)
    described = add_metadata(content, **TEXTS, labels=LABELS)
    np.testing.assert_array_equal(run(described, images[:1].astype("float32")), expected)
    assert add_metadata(described, **TEXTS, labels=LABELS) == described
    model = schema.Model.GetRootAs(described, 0)
    offsets = [model.Buffers(i).Offset() for i in range(model.BuffersLength())]
    assert sum(offset > 1 for offset in offsets) >= 10
    assert {offset % 16 for offset in offsets} == {0}
    (tmp_path / "model.tflite").write_bytes(described)
    assert classify(tmp_path / "model.tflite", images) == classify(files[mode], images)


# Errors


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"labels": LABELS[:7]}, ValueError, "each of the model's 10 outputs.*7 labels"),
        ({"labels": ()}, ValueError, "each of the model's 10 outputs.*0 labels"),
        ({"labels": "0123456789"}, TypeError, "a sequence of strings.*'0123456789'"),
        ({"labels": range(10)}, TypeError, r"a sequence of strings.*range\(0, 10\)"),
        ({"labels": [*LABELS[:9], "a\nb"]}, ValueError, r"no line breaks.*'a\\nb'"),
        ({"labels": ["a\r", *LABELS[:9]]}, ValueError, r"no line breaks.*'a\\r'"),
        ({"std": 0.0}, ValueError, "`std` must be positive.*std=0.0"),
        ({"content": b"PK\3\4"}, ValueError, r"must be a `.tflite` file.*4 bytes.*b'PK"),
    ],
)
def test_errors(plain, change, error, match):
    with pytest.raises(error, match=match):
        add_metadata(**{"content": plain["fp32"], **TEXTS, **change})


def two_outputs(model):
    model.signatureDefs[0].outputs *= 2


def two_signatures(model):
    model.signatureDefs *= 2


def no_signature(model):
    model.signatureDefs = None


def flat_input(model):
    graph = model.subgraphs[0]
    graph.tensors[graph.inputs[0]].shape = [1, 16, 72]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (two_outputs, r"one signature, with one input and one output.*\[\(1, 2\)\]"),
        (two_signatures, r"one signature.*\[\(1, 1\), \(1, 1\)\]"),
        (no_signature, r"one signature.*Received: \[\]"),
        (flat_input, r"\(1, height, width, channels\) to.*\[1, 16, 72\] to \[1, 10\]"),
    ],
)
def test_other_models_are_refused(plain, change, match):
    with pytest.raises(ValueError, match=match):
        add_metadata(edited(plain["fp32"], change), **TEXTS)
