"""The README's code runs as it stands, and its claims about the tables hold.

What needs the network or days of training gets a small stand-in, under the name that the code
gives it.
"""

import dataclasses
import pathlib
import re
import shlex

import keras
import numpy as np
import PIL.Image
import pytest
import sklearn.datasets
import tensorflow as tf
import typer.main

import keras_vit
from keras_vit import VARIANTS, ViTConfig, cli
from keras_vit.export import export_tflite
from keras_vit.training import RECIPES
from keras_vit.training.building import build_model, model_arguments
from keras_vit.training.recipes import named_recipe, parse_override
from keras_vit.weights import loading

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(?:py|python)\n(.*?)```", README, re.DOTALL)
# What each of the blocks is known by.
EXAMPLE, FILE, WEIGHTS, LOOKS, DISTRIBUTED = MARKS = (
    "load_digits()",
    "Interpreter(",
    "from_checkpoint(",
    "attention_maps(",
    "DistributedModel(",
)
PIXELS = np.random.default_rng(5)


def run(mark, names=None, changes=()):
    """Executes the block with a mark, in which `changes` are made; returns its names."""
    [code] = [block for block in BLOCKS if mark in block]
    for old, new in changes:
        assert code.count(old) == 1
        code = code.replace(old, new)
    names = dict(names or {})
    exec(compile(code, "README.md", "exec"), names)
    return names


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keras.utils.set_random_seed(17)


def test_every_block_is_run_here():
    assert [[mark in block for mark in MARKS].count(True) for block in BLOCKS] == [1] * len(MARKS)


def test_array_to_phone(tmp_path, capsys):
    result = run(EXAMPLE)["result"]
    result.check()
    [reference, file] = result.rows
    assert min(reference.accuracy, file.accuracy) > 0.8
    assert "dynamic_int8" in capsys.readouterr().out
    assert (tmp_path / "digits.tflite").exists()


def test_file_of_a_run(digits_run, tmp_path):
    """With a digit of the training images, at a larger size."""
    digits = sklearn.datasets.load_digits()
    index = np.flatnonzero(digits.target == 7)[0]
    seven = PIL.Image.fromarray(np.uint8(digits.images[index] * (255 / 16)))
    seven.resize((40, 40)).save("seven.png")
    path = tmp_path / "runs" / "digits" / "export" / "vit_int8_mixed.tflite"
    path.parent.mkdir(parents=True)
    calibration = PIXELS.uniform(0, 255, (8, 16, 16, 3))
    export_tflite(
        digits_run.model(), path, mode="int8_mixed", calibration=calibration, activation="softmax"
    )
    probabilities = run(FILE)["probabilities"]
    assert probabilities.shape == (1, 10)
    assert probabilities.argmax() == 7
    np.testing.assert_allclose(probabilities.sum(), 1, atol=1e-5)


def save_stand_ins():
    """Checkpoints of random weights, of the shapes of those that the README names."""
    small = {"image_size": 224, "num_classes": 1000, "normalization": "minus_one_one"}
    keras_vit.save_checkpoint(keras_vit.build_vit("Ti/16", **small), "hub.safetensors", "timm")
    google = keras_vit.build_vit("S/16", gelu="tanh", **small)
    keras_vit.save_checkpoint(google, "S_16.npz", "google")
    dinov2 = keras_vit.build_vit("S/14", image_size=518, num_classes=0, layer_scale=1e-5)
    keras_vit.save_checkpoint(dinov2, "dinov2_vits14.safetensors", "timm")


@pytest.mark.filterwarnings("ignore:.*does not say its")
def test_public_weights(monkeypatch):
    """Other weights stand in for those of the hub."""
    save_stand_ins()
    local_path = loading.local_path

    def local(path):
        return local_path("hub.safetensors" if path.startswith("hf://google/") else path)

    monkeypatch.setattr(loading, "local_path", local)
    images = PIXELS.uniform(0, 255, (2, 224, 224, 3))
    names = run(WEIGHTS, {"images": images})
    assert names["logits"].shape == (2, 1000)
    assert names["features"].input_shape == (None, 224, 224, 3)
    assert names["features"].output_shape == (None, 384)
    assert names["flowers"].input_shape == (None, 288, 384, 3)
    assert names["flowers"].output_shape == (None, 102)


def test_what_a_model_looks_at(tmp_path):
    size = ViTConfig(hidden_dim=24, depth=3, num_heads=4, mlp_dim=32, patch_size=8)
    model = keras_vit.build_vit(size, image_size=(40, 56), normalization="imagenet")
    images = PIXELS.uniform(0, 255, (2, 40, 56, 3))
    names = run(LOOKS, {"model": model, "images": images})
    assert names["maps"].shape == (3, 2, 4, 36, 36)
    assert names["heat"].shape == (2, 5, 7)
    assert names["pixels"].shape == (3, 4)
    shapes = {name: tokens.shape for name, tokens in names["tokens"].items()}
    assert shapes == {"block_2": (2, 36, 24), "encoder_norm": (2, 36, 24)}
    assert PIL.Image.open(tmp_path / "attention.png").size[0] > 300


def test_distributed_model():
    """A smaller model, for one epoch, on two of the logical devices of `conftest.py`."""
    images = PIXELS.uniform(0, 255, (16, 224, 224, 3)).astype("float32")
    labels = keras.ops.one_hot(PIXELS.integers(1000, size=16), 1000)
    dataset = tf.data.Dataset.from_tensor_slices((images, labels)).batch(16, drop_remainder=True)
    changes = [
        ('"S/16"', "keras_vit.ViTConfig(16, 1, 2, 24, patch_size=16)"),
        ("MirroredStrategy()", 'MirroredStrategy(["CPU:0", "CPU:1"])'),
        ("epochs=90", "epochs=1"),
    ]
    model = run(DISTRIBUTED, {"dataset": dataset}, changes)["model"]
    # The head starts at zero: all classes are alike.
    np.testing.assert_allclose(model.history.history["loss"], [np.log(1000)], rtol=1e-5)


def commands():
    """Every line of the documents that calls the command, without what stands before it."""
    for document in ("README.md", "docs/cluster.md", "benchmarks/README.md"):
        text = (ROOT / document).read_text().replace("\\\n", " ")
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            for line in re.findall(r"keras-vit (?!\.)(.*)", block):
                yield pytest.param(line, id=f"{document}: {line[:50]}")


@pytest.mark.parametrize("line", commands())
def test_command_is_one(line, tmp_path):
    """Its options exist and take these values; nothing is run."""
    name, *arguments = shlex.split(line, comments=True)
    command = typer.main.get_command(cli.app).commands[name]
    with command.make_context(name, arguments) as context:
        assert context.command is command
        if name == "train":
            settings = dict(map(parse_override, context.params["settings"] or ()))
            dataclasses.replace(named_recipe(context.params["recipe"] or "photos"), **settings)


def test_the_documents_have_commands():
    assert len(list(commands())) > 20


def test_no_placeholder_is_left():
    assert not re.search(r"@[A-Z]+@", README)


def test_every_variant_has_its_line():
    section = README.split("## Variants")[1].split("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| `")]
    named = {}
    for row in rows:
        for name in re.findall(r"`([^`]+)`", row[0]):
            named[name] = tuple(int(cell) for cell in row[1:5])
    assert named == {
        name: (config.hidden_dim, config.depth, config.num_heads, config.mlp_dim)
        for name, config in VARIANTS.items()
    }


@pytest.mark.parametrize("variant", ["Ti/16", "S/16", "B/16", "L/16", "H/14", "g/14", "G/14"])
def test_multiplications_are_as_stated(variant):
    """Projection, then qkv and output, q k^T and A v, and the MLP of each block, then the head."""
    config = VARIANTS[variant]
    d, patches = config.hidden_dim, (224 // config.patch_size) ** 2
    tokens = patches + 1
    block = tokens * (4 * d * d + 2 * d * config.mlp_dim) + 2 * tokens**2 * d
    macs = patches * 3 * config.patch_size**2 * d + config.depth * block + 1000 * d
    [row] = re.findall(rf"^\|.*`{variant}`.*$", README, re.MULTILINE)
    assert row.split("|")[-2].strip() == f"{macs / 1e9:.2f}"


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_as_described(name):
    [row] = re.findall(rf"^\| `{name}` \|(.*)$", README, re.MULTILINE)
    if RECIPES[name].variant is None:
        assert f"{RECIPES[name].epochs} epochs" in row
        assert {"adamw": "AdamW", "sgd": "SGD"}[RECIPES[name].optimizer] in row
        assert (f"{RECIPES[name].image_size} px" if RECIPES[name].image_size else "its own") in row
        return
    model = build_model(model_arguments(RECIPES[name], 10), RECIPES[name])
    millions = float(re.search(r"([\d.]+) M", row)[1])
    assert round(model.count_params() / 1e6, 1) == millions
    assert model.output_shape == (None, 10)
    assert row.split("|")[-2].strip() == f"{RECIPES[name].image_size} px"
