"""The signatures of an exported SavedModel against `keras_vit`'s own answers."""

import io
import logging
import pathlib
import re
import struct
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import keras_vit
from keras_vit import export
from keras_vit.data import decode_image
from keras_vit.export import decoding
from keras_vit.export.saved_model import ends_in_softmax, gives_logits
from keras_vit.training import DistributedModel
from keras_vit.training.evaluation import predict

IMAGE_SHAPE = (24, 40, 3)
LABELS = ("ant", "bee", "cat", "dog", "eel", "fox", "gnü")
CONFIG = keras_vit.ViTConfig(hidden_dim=48, depth=2, num_heads=3, mlp_dim=80, patch_size=8)
ORIENTATION_TAG = 0x0112


def build(**kwargs):
    """A small model, none of whose weights is 0 or 1."""
    kwargs = {"num_classes": 7, "normalization": "imagenet", **kwargs}
    return randomise(keras_vit.build_vit(CONFIG, image_size=IMAGE_SHAPE[:2], **kwargs))


def randomise(model, seed=0):
    rng = np.random.default_rng(seed)
    for w in model.weights:
        value = rng.normal(0, 0.2 if len(w.shape) == 1 else 0.15, w.shape)
        w.assign(value + (w.name == "gamma"))
    return model


def random_images(count):
    return np.random.default_rng(1).uniform(0, 255, (count, *IMAGE_SHAPE)).astype("float32")


def photograph(width, height, channels=3, dtype=np.uint8, seed=0):
    """A smooth array with detail, so that a decoder that differs is seen."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (7, 9, channels), dtype=np.uint8)
    bands = [
        Image.fromarray(coarse[..., i]).resize((width, height), Image.Resampling.BICUBIC)
        for i in range(channels)
    ]
    image = np.stack([np.asarray(band) for band in bands], axis=-1).astype(dtype)
    if dtype == np.uint16:
        image = image * 257 + rng.integers(0, 256, image.shape, dtype=dtype) // 2
    return image.squeeze()


def encode(image, kind, mode=None, **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    data = io.BytesIO()
    image.convert(mode or image.mode).save(data, kind, **options)
    return data.getvalue()


def exif(orientation, endian="<"):
    block = Image.Exif()
    block.endian = endian
    block[0x010F] = "a maker"
    block[ORIENTATION_TAG] = orientation
    return block.tobytes()


def tf_png(channels):
    """A PNG of 16 bits that Pillow cannot write."""
    return tf.io.encode_png(photograph(37, 53, channels, np.uint16)).numpy()


def palette(colors):
    return Image.fromarray(photograph(45, 29)).quantize(colors)


def files():
    """Image data by name, each of another size: what TensorFlow decodes to Pillow's pixels."""
    rgba = photograph(47, 31, channels=4)
    wide = photograph(59, 43, channels=1, dtype=np.uint16)
    colors = palette(5).convert("RGB")
    # What phones write: another block, a profile and a comment before the image.
    phone = {"exif": exif(6, ">"), "icc_profile": b"profile" * 10_000, "comment": b"hello"}
    return {
        "jpeg": encode(photograph(61, 43), "JPEG"),
        "coarse jpeg": encode(photograph(203, 101), "JPEG", quality=20),
        "jpeg 4:4:4": encode(photograph(33, 21), "JPEG", subsampling=0),
        "progressive jpeg": encode(photograph(71, 67), "JPEG", progressive=True),
        "gray jpeg": encode(photograph(23, 81), "JPEG", mode="L"),
        "cmyk jpeg": encode(photograph(64, 41), "JPEG", mode="CMYK"),
        "phone jpeg": encode(photograph(83, 49), "JPEG", **phone),
        "oriented cmyk jpeg": encode(photograph(19, 37), "JPEG", mode="CMYK", exif=exif(8)),
        "png": encode(photograph(40, 24), "PNG"),  # the model's own size
        "gray png": encode(photograph(11, 13), "PNG", mode="L"),
        "png with alpha": encode(rgba, "PNG"),
        "gray png with alpha": encode(rgba, "PNG", mode="LA"),
        "png with a transparent color": encode(colors, "PNG", transparency=colors.getpixel((3, 5))),
        "black and white png": encode(photograph(35, 57), "PNG", mode="1"),
        "palette png": encode(palette(200), "PNG"),
        "palette png of 2 bits": encode(palette(4), "PNG", bits=2),
        "palette png with alpha": encode(palette(11), "PNG", transparency=bytes(range(0, 255, 25))),
        "gray png of 16 bits": encode(wide, "PNG"),
        "gray png of 16 bits with a transparent level": encode(
            wide, "PNG", transparency=int(wide[3, 5])
        ),
        "png of 16 bits": tf_png(3),
        "png of 16 bits with alpha": tf_png(4),
        "gray png of 16 bits with alpha": tf_png(2),
        "oriented png": encode(photograph(27, 39), "PNG", exif=exif(5)),
        # Pillow takes away one of the headers, which a PNG's block should be without.
        "oriented png with a header": encode(photograph(27, 39), "PNG", exif=b"Exif\0\0" + exif(6)),
    }


FILES = files()


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "model"
    export.export_saved_model(model, path, labels=LABELS, top=3)
    return path


@pytest.fixture(scope="module")
def serve(saved):
    return signatures(saved)["serve_bytes"]


def signatures(path):
    loaded = tf.saved_model.load(path)
    return {name: keep(loaded, serve) for name, serve in loaded.signatures.items()}


def keep(loaded, serve):
    """A signature as a function of one tensor that keeps the variables of `loaded` alive."""
    [argument] = serve.structured_input_signature[1]
    return lambda tensor, loaded=loaded: {
        name: value.numpy() for name, value in serve(**{argument: tf.constant(tensor)}).items()
    }


def export_signatures(model, folder, **kwargs):
    export.export_saved_model(model, folder / "model", **kwargs)
    return signatures(folder / "model")


def write(folder, contents):
    paths = [folder / f"{index:02}" for index in range(len(contents))]
    for path, data in zip(paths, contents, strict=True):
        path.write_bytes(data)
    return paths


def expected_of(model, contents, folder, class_names, top):
    """(classes, probabilities) that `keras-vit predict` gives, each `(B, k)`."""
    rows = list(predict(model, write(folder, contents), class_names, top))
    classes, probabilities = zip(*[zip(*row, strict=True) for row in rows], strict=True)
    return np.array(classes), np.array(probabilities)


def decoded(strings):
    return np.vectorize(lambda data: data.decode())(strings)


def assert_answers(answer, classes, probabilities, atol=1e-5):
    np.testing.assert_array_equal(decoded(answer["classes"]), classes)
    np.testing.assert_allclose(answer["probabilities"], probabilities, atol=atol, rtol=0)


# All signatures, in a process of TensorFlow alone


SCRIPT = """
import pathlib, sys
sys.modules["keras"] = sys.modules["keras_vit"] = sys.modules["PIL"] = None  # importing them fails
import numpy as np
import tensorflow as tf

loaded = tf.saved_model.load(sys.argv[1])
images = np.load("images.npy")
contents = [path.read_bytes() for path in sorted(pathlib.Path("files").iterdir())]
for n in (1, 3, 17):
    answers = {}
    for name, argument, values in (
        ("serving_default", "images", images),
        ("features", "images", images),
        ("serve_bytes", "encoded", contents),
    ):
        answers |= loaded.signatures[name](**{argument: tf.constant(values[:n])})
    answers["classes"] = tf.strings.unicode_decode(answers["classes"], "UTF-8").to_tensor()
    np.savez(f"{n}.npz", **{name: value.numpy() for name, value in answers.items()})
"""


def test_tensorflow_alone_answers_every_signature(model, saved, tmp_path):
    contents, images = list(FILES.values())[:17], random_images(17)
    np.save(tmp_path / "images.npy", images)
    (tmp_path / "files").mkdir()
    classes, probabilities = expected_of(model, contents, tmp_path / "files", LABELS, top=3)
    subprocess.run(
        [sys.executable, "-c", SCRIPT, saved], cwd=tmp_path, check=True, capture_output=True
    )
    logits = model.predict(images, verbose=0)
    features = keras.Model(model.inputs[0], model.get_layer("pooling").output)(images)
    for n in (1, 3, 17):
        answers = dict(np.load(tmp_path / f"{n}.npz"))
        names = [["".join(map(chr, name[name > 0])) for name in row] for row in answers["classes"]]
        np.testing.assert_array_equal(names, classes[:n])
        np.testing.assert_array_equal(np.array(LABELS)[answers["indices"]], classes[:n])
        np.testing.assert_allclose(answers["probabilities"], probabilities[:n], atol=1e-5)
        np.testing.assert_allclose(answers["logits"], logits[:n], atol=1e-5)
        np.testing.assert_allclose(answers["features"], features[:n], atol=1e-5)


def test_signatures(saved):
    found = tf.saved_model.load(saved).signatures
    described = {
        name: [
            {key: (spec.dtype.name, tuple(spec.shape)) for key, spec in specs.items()}
            for specs in (serve.structured_input_signature[1], serve.structured_outputs)
        ]
        for name, serve in found.items()
    }
    images = {"images": ("float32", (None, *IMAGE_SHAPE))}
    assert described == {
        "serving_default": [images, {"logits": ("float32", (None, 7))}],
        "serve_bytes": [
            {"encoded": ("string", (None,))},
            {
                "probabilities": ("float32", (None, 3)),
                "classes": ("string", (None, 3)),
                "indices": ("int32", (None, 3)),
            },
        ],
        "features": [images, {"features": ("float32", (None, 48))}],
    }


# Decoding


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_those_of_keras_vit(name):
    image = decoding.decode_image(tf.constant(FILES[name]))
    np.testing.assert_array_equal(image, decode_image(FILES[name], name))


@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize("orientation", range(10))
def test_orientation(orientation, endian):
    data = encode(photograph(48, 33), "JPEG", exif=exif(orientation, endian))
    image = decoding.decode_image(tf.constant(data))
    assert image.shape == ((48, 33, 3) if 5 <= orientation <= 8 else (33, 48, 3))
    np.testing.assert_array_equal(image, decode_image(data, "a"))


def test_orientation_of_four_bytes():
    block = struct.pack(">2sHLHHHLLL", b"MM", 42, 8, 1, 0x0112, 4, 1, 6, 0)
    data = encode(photograph(48, 33), "JPEG", exif=b"Exif\0\0" + block)
    image = decoding.decode_image(tf.constant(data))
    assert image.shape == (48, 33, 3)
    np.testing.assert_array_equal(image, decode_image(data, "a"))


def test_bytes_that_fill_before_the_orientation():
    data = encode(photograph(48, 33), "JPEG", exif=exif(6, "<"))
    marker = data.index(b"\xff\xe1")
    data = data[:marker] + b"\xff\xff" + data[marker:]
    image = decoding.decode_image(tf.constant(data))
    assert image.shape == (48, 33, 3)
    np.testing.assert_array_equal(image, decode_image(data, "a"))


@pytest.mark.parametrize(
    "block",
    [b"", b"MM", b"XX\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0", b"MM\0*\xff\xff\xff\xff"],
    ids=["empty", "cut off", "no byte order", "directory past the end"],
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_is_ignored(block):
    data = encode(photograph(48, 33), "JPEG", exif=b"Exif\0\0" + block)
    np.testing.assert_array_equal(decoding.decode_image(tf.constant(data)), decode_image(data, "a"))


def test_cmyk_with_black_is_rounded_down():
    """Its black makes TensorFlow differ from Pillow, by 1 at most."""
    cmyk = Image.fromarray(photograph(61, 43, channels=4), mode="CMYK")
    data = encode(cmyk, "JPEG")
    ours = decoding.decode_image(tf.constant(data)).numpy()
    difference = decode_image(data, "a").astype(int) - ours
    assert (difference.min(), difference.max()) == (0, 1)


# Probabilities


def test_code_of_the_readme(model, saved, tmp_path, monkeypatch, capsys):
    """The fixture names three classes, where the README speaks of five."""
    text = pathlib.Path(export.__file__).with_name("README.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```py\n(.*?)```", text, re.DOTALL)
    content = encode(photograph(50, 30), "JPEG")
    (tmp_path / "photo.jpg").write_bytes(content)
    (tmp_path / "saved_model").symlink_to(saved)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "export/README.md", "exec"), {})
    (tmp_path / "files").mkdir()
    [names], [values] = expected_of(model, [content], tmp_path / "files", LABELS, top=3)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [name for _, name in lines] == list(names)
    np.testing.assert_allclose([float(value) for value, _ in lines], values, atol=6e-4)


def test_bytes_give_the_answers_of_predict(model, serve, tmp_path):
    contents = list(FILES.values())
    expected = expected_of(model, contents, tmp_path, LABELS, top=3)
    answer = serve(contents)
    assert_answers(answer, *expected)
    assert len(set(answer["indices"][:, 0].tolist())) > 1
    assert np.ptp(answer["probabilities"][:, 0]) > 0.05


def test_cmyk_with_black_gives_nearly_the_answers_of_predict(model, serve, tmp_path):
    contents = [
        encode(Image.fromarray(photograph(81, 63, channels=4, seed=seed), mode="CMYK"), "JPEG")
        for seed in range(5)
    ]
    expected = expected_of(model, contents, tmp_path, LABELS, top=3)
    assert_answers(serve(contents), *expected, atol=3e-3)


def test_without_labels_the_classes_are_indices(model, tmp_path):
    served = export_signatures(model, tmp_path, top=12)["serve_bytes"]
    contents = list(FILES.values())[:2]
    (tmp_path / "files").mkdir()
    names = [str(index) for index in range(7)]
    answer = served(contents)
    assert answer["indices"].shape == (2, 7)
    assert_answers(answer, *expected_of(model, contents, tmp_path / "files", names, top=12))
    np.testing.assert_array_equal(decoded(answer["classes"]), answer["indices"].astype(str))
    np.testing.assert_allclose(answer["probabilities"].sum(axis=1), 1, atol=1e-6)


def test_tensorflow_is_quiet_as_in_a_script(model, tmp_path, caplog):
    """Its logger speaks at every file in a notebook, where its level is INFO."""
    logger = tf.get_logger()
    before = logger.level
    logger.setLevel("INFO")
    try:
        export.export_saved_model(model, tmp_path / "saved_model")
        assert logger.level == logging.INFO
    finally:
        logger.setLevel(before)
    assert not caplog.records


@pytest.fixture
def policy():
    """Sets the global dtype policy for one test."""
    before = keras.config.dtype_policy()
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy(before)


def test_mixed_bfloat16_model_answers_in_float32(tmp_path, policy, model, serve):
    policy("mixed_bfloat16")
    mixed = build()
    policy("float32")
    served = export_signatures(mixed, tmp_path, labels=LABELS, top=3)
    contents, images = list(FILES.values())[:4], random_images(2)
    for name, value in served["serve_bytes"](contents).items():
        same = np.testing.assert_array_equal if value.dtype == object else assert_close
        same(value, serve(contents)[name])
    features = served["features"](images)["features"]
    assert features.dtype == np.float32
    pooled = keras.Model(model.inputs[0], model.get_layer("pooling").output)
    assert_close(features, pooled(images))


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=1e-5)


# Data that are no image


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "must be JPEG or PNG.*bytes:. .0."),
        (b"\x00\xff\xfe no image", r"must be JPEG or PNG.*bytes:. .12."),
        (encode(photograph(9, 7), "GIF"), "must be JPEG or PNG"),
        (encode(photograph(9, 7), "BMP"), "must be JPEG or PNG"),
        (encode(photograph(9, 7), "WEBP"), "must be JPEG or PNG"),
        (FILES["jpeg"][:700], "Invalid JPEG data"),
        (FILES["jpeg"][:3], "Invalid JPEG data"),
        (FILES["jpeg"][:-9], "Invalid JPEG data"),
        (FILES["png"][:700], "Invalid PNG data"),
        (FILES["png"][:8], "Invalid PNG"),
        (FILES["png"].replace(b"IDAT", b"IDAT\xff\xff", 1), "Invalid PNG data"),
    ],
)
def test_data_that_are_no_image(serve, data, match):
    with pytest.raises(tf.errors.InvalidArgumentError, match=match):
        serve([FILES["jpeg"], data, FILES["png"]])


@pytest.mark.parametrize("name", ["serving_default", "features"])
@pytest.mark.parametrize("shape", [(5, 48, 80, 3), (1, 40, 24, 3), (1, 24, 40, 1)])
def test_images_of_another_shape(saved, name, shape):
    """The pixels of larger ones would else make several images, those of a turned one another."""
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"not compatible.*\[\?,24,40,3\]"):
        signatures(saved)[name](np.zeros(shape, "float32"))


# What is left out


def small_classifier(channels=3, scale=None, nested=False, dense=True):
    """A Keras model of another kind, which may normalise its images."""
    images = keras.Input((24, 40, channels))
    x = images if scale is None else keras.layers.Rescaling(scale, offset=-1)(images)
    if nested:
        x = keras.Model(images, x)(images)
    x = keras.layers.Conv2D(7, 5, activation="relu")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    if dense:
        x = keras.layers.Dense(5, activation="softmax")(keras.layers.Dense(11)(x))
    return randomise(keras.Model(images, x))


def from_unit_range(model):
    return keras.Sequential([keras.Input(IMAGE_SHAPE), keras.layers.Rescaling(255), model])


def with_temperature(model):
    return keras.Model(model.input, keras.layers.Rescaling(0.05)(model.output))


@pytest.fixture(scope="module")
def logits(tmp_path_factory):
    """A model of logits, and its `serve_bytes`."""
    model, folder = build(), tmp_path_factory.mktemp("logits")
    return model, export_signatures(model, folder, top=3)["serve_bytes"]


@pytest.mark.parametrize(
    "softmax",
    [
        keras.layers.Softmax(),
        keras.layers.Activation(keras.activations.softmax),
        keras.layers.Activation(keras.ops.softmax),
        keras.activations.softmax,
        keras.ops.softmax,
        lambda x: keras.layers.Activation("linear", dtype="float32")(keras.ops.softmax(x)),
    ],
    ids=["layer", "activation", "of a function", "Keras' function", "operation", "linear after"],
)
def test_no_softmax_comes_after_one(tmp_path, softmax, logits):
    without, served = logits
    model = keras.Model(without.input, softmax(without.output))
    image = np.random.default_rng(0).integers(0, 256, IMAGE_SHAPE, "uint8")
    expected = np.sort(model.predict(image[None].astype("float32"), verbose=0))[:, :-4:-1]
    for serve in (served, export_signatures(model, tmp_path, top=3)["serve_bytes"]):
        best = serve([encode(image, "PNG")])["probabilities"]
        np.testing.assert_allclose(best, expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"must be None for a model that ends in a softmax or"):
        export.export_tflite(model, tmp_path / "vit.tflite", mode="fp32", activation="softmax")


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: build(normalization=None), {"features"}),
        (lambda: build(num_classes=0), {"features"}),
        (lambda: build(channels=1, normalization="minus_one_one"), {"features"}),
        (lambda: small_classifier(), {"features"}),
        (lambda: small_classifier(scale=2), {"features"}),
        (lambda: small_classifier(scale=0.5), {"features"}),
        (lambda: small_classifier(scale=1 / 255, dense=False), {"serve_bytes"}),
        (lambda: small_classifier(scale=1 / 127.5, nested=True), {"serve_bytes", "features"}),
        (lambda: keras.Sequential([keras.Input(IMAGE_SHAPE), build()]), {"serve_bytes"}),
        (lambda: from_unit_range(build()), set()),
        (lambda: with_temperature(build(normalization=None)), {"features"}),
    ],
    ids=[
        "normalised",
        "headless",
        "gray",
        "other",
        "[0, 1]",
        "[-1, 1]",
        "no dense",
        "nested",
        "wrapped",
        "from [0, 1]",
        "temperature",
    ],
)
def test_signatures_of_other_models(tmp_path, make, names):
    assert export_signatures(make(), tmp_path).keys() == names | {"serving_default"}


def test_no_softmax_comes_after_a_sigmoid(tmp_path):
    """Of a model that says yes or no to each class."""
    vit = build(num_classes=0)
    model = keras.Model(vit.input, keras.layers.Dense(5, activation="sigmoid")(vit.output))
    image = np.random.default_rng(0).integers(0, 256, IMAGE_SHAPE, "uint8")
    served = export_signatures(model, tmp_path / "saved", top=5)["serve_bytes"]
    expected = np.sort(model.predict(image[None].astype("float32"), verbose=0))[:, ::-1]
    np.testing.assert_allclose(served([encode(image, "PNG")])["probabilities"], expected, rtol=1e-5)


@pytest.mark.parametrize("merge", ["Average", "Concatenate", "Add"])
def test_what_several_heads_give(merge):
    vit = build(num_classes=0)
    for activation, kind in (
        (None, (True, False)),
        ("softmax", (False, True)),
        ("sigmoid", (False, False)),
    ):
        heads = [keras.layers.Dense(5, activation=activation)(vit.output) for _ in range(2)]
        model = keras.Model(vit.input, getattr(keras.layers, merge)()(heads))
        assert (gives_logits(model), ends_in_softmax(model)) == kind


class OwnCall(keras.Model):
    """Its layers are in an order, and of a number, that say nothing of what it computes."""

    def __init__(self, activation):
        super().__init__()
        self.scale = keras.layers.Rescaling(1 / 255)
        self.head = keras.layers.Dense(5)
        self.last = keras.layers.Activation(activation)
        self.hidden = keras.layers.Dense(7, activation="softmax")
        self.pool = keras.layers.GlobalAveragePooling2D()

    def call(self, x):
        return self.last(self.head(self.hidden(self.pool(x))))


@pytest.mark.parametrize("activation", ["softmax", "linear"])
def test_models_that_call_as_they_like(tmp_path, activation):
    before = [keras.Input(IMAGE_SHAPE), keras.layers.Rescaling(1 / 255)]
    model = randomise(keras.Sequential([*before, OwnCall(activation)]))
    served = export_signatures(model, tmp_path / "pixels", top=5)["serve_bytes"]
    image = np.random.default_rng(0).integers(0, 256, IMAGE_SHAPE, "uint8")
    scores = model.predict(image[None].astype("float32"), verbose=0)
    expected = np.asarray(keras.ops.softmax(scores)) if activation == "linear" else scores
    found = served([encode(image, "PNG")])["probabilities"]
    np.testing.assert_allclose(found, np.sort(expected)[:, ::-1], rtol=1e-5)
    images = keras.Input(IMAGE_SHAPE)  # in whatever range
    model = keras.Model(images, OwnCall(activation)(images))
    assert "serve_bytes" not in export_signatures(model, tmp_path / "other")


class Sharpened(keras.Model):
    """Functional, but for what it adds."""

    def call(self, images, training=None):
        return 3 * super().call(images, training=training)


def test_functional_models_with_a_call_of_their_own_are_refused(tmp_path):
    vit = build()
    model = Sharpened(vit.input, vit.output)
    match = r"must compute what its layers do.*Received: a Sharpened.*`call` of its own"
    with pytest.raises(ValueError, match=match):
        export.export_saved_model(model, tmp_path / "saved")
    with pytest.raises(ValueError, match=match):
        export.export_tflite(model, tmp_path / "model.tflite", mode="fp32")
    assert list(tmp_path.iterdir()) == []
    path = tmp_path / "model.tflite"
    export.export_tflite(vit, path, mode="fp32")
    with pytest.raises(ValueError, match=match):
        export.verify(model, {"fp32": path}, np.zeros((2, *IMAGE_SHAPE)), rounds=0)
    model = DistributedModel(vit.input, vit.output)
    export.export_tflite(model, tmp_path / "distributed.tflite", mode="fp32")


def with_head_of_layers():
    vit = build(num_classes=0)
    head = keras.Sequential([keras.layers.Dropout(0.1), keras.layers.Dense(5)])
    return keras.Model(vit.input, head(vit.output))


def scaled_by_an_operation():
    images = keras.Input(IMAGE_SHAPE)
    return keras.Model(images, build()(images * 255.0))


def scaled_by_a_function():
    scale = keras.layers.Lambda(lambda images: images * 255.0)
    return keras.Sequential([keras.Input(IMAGE_SHAPE), scale, build()])


def augmented():
    layers = [keras.layers.RandomFlip(), keras.layers.RandAugment(), keras.layers.Dropout(0.1)]
    return keras.Sequential([keras.Input(IMAGE_SHAPE), *layers, build()])


def normalized_features():
    vit = build(num_classes=0)
    return keras.Model(vit.input, keras.layers.UnitNormalization()(vit.output))


def with_another_head():
    vit = build(num_classes=0)
    return keras.Model(vit.input, keras.layers.EinsumDense("bd,dk->bk", 5)(vit.output))


def wrapped_features():
    return keras.Sequential([keras.Input(IMAGE_SHAPE), build(num_classes=0)])


def of_one_output():
    return build(num_classes=1)


def called_by_name():
    vit, images = build(num_classes=0), keras.Input(IMAGE_SHAPE)
    return keras.Model(images, keras.layers.Dense(5)(inputs=vit(inputs=images)))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (with_head_of_layers, {"serve_bytes"}),
        (scaled_by_an_operation, set()),
        (scaled_by_a_function, set()),
        (augmented, {"serve_bytes"}),
        (normalized_features, {"features"}),
        (of_one_output, {"features"}),
        (with_another_head, {"serve_bytes"}),
        (wrapped_features, {"features"}),
        (called_by_name, {"serve_bytes", "features"}),
    ],
)
def test_signatures_of_models_with_other_layers(tmp_path, make, names):
    assert export_signatures(make(), tmp_path).keys() == names | {"serving_default"}


def test_features_of_a_dense_layer_on_a_grid_are_left_out(tmp_path):
    images = keras.Input(IMAGE_SHAPE)
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Dense(5)(images))
    assert list(export_signatures(keras.Model(images, x), tmp_path)) == ["serving_default"]


# Features


@pytest.mark.parametrize(
    "kwargs",
    [
        {"pooling": "gap", "class_token": False, "norm_after_pooling": True},
        {"pooling": "token+gap"},
        {"representation_size": 13},
        {"distillation_token": True},
        {"num_classes": 0, "pooling": "map"},
        {"num_classes": 0, "representation_size": 13},
    ],
    ids=lambda kwargs: "-".join(map(str, kwargs)),
)
def test_features_are_those_of_a_model_without_a_head(tmp_path, kwargs):
    model = build(**kwargs)
    headless = build(**{**kwargs, "num_classes": 0})
    weights = {weight.path: weight for weight in model.weights}
    for weight in headless.weights:
        weight.assign(weights[weight.path])
    images = random_images(3)
    served = export_signatures(model, tmp_path)
    assert_close(served["features"](images)["features"], headless(images))
    assert_close(served["serving_default"](images)["logits"], model(images))


def test_features_of_other_models_are_what_the_last_dense_layer_takes(tmp_path):
    model = small_classifier()
    images = random_images(3) / 255
    served = export_signatures(model, tmp_path)
    features = keras.Model(model.inputs[0], model.layers[-2].output)(images)
    assert_close(served["features"](images)["features"], features)


def test_features_of_a_head_on_shared_layers(tmp_path):
    """The head's own `input` is that of the model for which it was made."""
    model = build()
    images = keras.Input(IMAGE_SHAPE)
    backbone = keras.Model(model.inputs[0], model.get_layer("pooling").output)
    shared = keras.Model(images, model.get_layer("head")(2 * backbone(images)))
    served = export_signatures(shared, tmp_path)
    images = random_images(3)
    assert_close(served["features"](images)["features"], 2 * backbone(images))


# Errors


@pytest.mark.parametrize("top", [0, -1, 2.0, True])
def test_top_must_be_positive(model, tmp_path, top):
    with pytest.raises(ValueError, match=f"`top` must be a positive int. Received: top={top}"):
        export.export_saved_model(model, tmp_path / "model", top=top)
    assert not list(tmp_path.iterdir())
