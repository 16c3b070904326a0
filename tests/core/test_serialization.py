"""Models and layers survive config round trips and files, in another process too."""

import inspect
import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from conftest import randomise

import keras_vit
from keras_vit.model import NORMALIZATIONS, vit_arguments

CONFIG = keras_vit.ViTConfig(hidden_dim=24, depth=2, num_heads=3, mlp_dim=40, patch_size=4)
HYBRID = keras_vit.ViTConfig(24, 1, 3, 40, 1, stem_units=(1, 1), stem_width=32)
MODELS = {
    "plain": (CONFIG, {}),
    "everything": (
        CONFIG,
        {
            "pooling": "map",
            "num_registers": 2,
            "position": "sincos2d",
            "representation_size": 11,
            "dropout": 0.1,
            "attention_dropout": 0.2,
            "drop_path": 0.3,
            "layer_scale": 0.1,
            "qk_norm": True,
            "gelu": "tanh",
            "normalization": "imagenet",
        },
    ),
    "gap": (CONFIG, {"pooling": "gap", "class_token": False, "normalization": "minus_one_one"}),
    "distilled": (
        keras_vit.ViTConfig(24, 2, 3, 40, 4, head_dim=5),
        {
            "distillation_token": True,
            "patch_norm": True,
            "qkv_bias": False,
            "norm_after_pooling": True,
        },
    ),
    "token+gap": (CONFIG, {"pooling": "token+gap", "num_registers": 3}),
    "hybrid": (HYBRID, {"pooling": "mean"}),
}

LOAD_AND_RUN = """
import sys
import keras, keras_vit
import numpy as np
for folder in sys.argv[1:]:
    model = keras.saving.load_model(f"{folder}/model.keras")
    logits = model.predict(np.load(f"{folder}/images.npy"), verbose=0)
    np.save(f"{folder}/logits.npy", logits)
"""


def make(name):
    config, arguments = MODELS[name]
    image_size = (16, 24)
    model = randomise(
        keras_vit.build_vit(config, image_size=image_size, num_classes=7, **arguments)
    )
    images = np.random.default_rng(0).uniform(0, 255, (3, *image_size, 3)).astype("float32")
    return model, images


@pytest.mark.parametrize("name", MODELS)
def test_config_round_trip(name):
    model, images = make(name)
    config = json.loads(json.dumps(model.get_config()))
    copy = keras.Model.from_config(json.loads(json.dumps(config)))
    assert json.loads(json.dumps(copy.get_config())) == config
    copy.set_weights(model.get_weights())
    np.testing.assert_array_equal(copy.predict(images, verbose=0), model.predict(images, verbose=0))
    clone = keras.models.model_from_json(model.to_json())
    assert [w.path for w in clone.weights] == [w.path for w in model.weights]


@pytest.mark.parametrize("name", MODELS)
def test_arguments_read_back(name):
    """`vit_arguments` gives what `build_vit` was given, and the same function with the weights."""
    config, arguments = MODELS[name]
    model, images = make(name)
    found = vit_arguments(keras.Model.from_config(model.get_config()))
    defaults = {
        key: parameter.default
        for key, parameter in inspect.signature(keras_vit.build_vit).parameters.items()
    }
    expected = {**defaults, "variant": config, "image_size": (16, 24), "num_classes": 7}
    expected |= {**arguments, "name": "vit"}
    if expected["normalization"] is not None:
        mean, std = NORMALIZATIONS[expected["normalization"]]
        expected["normalization"] = (list(mean), list(std))
    assert found == expected
    copy = keras_vit.build_vit(**found)
    copy.set_weights(model.get_weights())
    np.testing.assert_array_equal(copy.predict(images, verbose=0), model.predict(images, verbose=0))


def test_older_files_have_lists_in_their_normalization():
    model, images = make("everything")
    config = model.get_config()
    [layer] = [layer for layer in config["layers"] if layer["name"] == "normalization"]
    for name in ("scale", "offset"):
        layer["config"][name] = layer["config"][name]["config"]["value"]
        assert np.shape(layer["config"][name]) == (1, 1, 3)
    older = keras.Model.from_config(config)
    assert vit_arguments(older) == vit_arguments(model)
    older.set_weights(model.get_weights())
    expected = model.predict(images, verbose=0)
    np.testing.assert_array_equal(older.predict(images, verbose=0), expected)


def test_arguments_of_another_model():
    model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(2, name="only")])
    with pytest.raises(ValueError, match=r"must be one that .*build_vit.* made.*layers only"):
        vit_arguments(model)


@pytest.fixture(scope="module")
def loaded_elsewhere(tmp_path_factory):
    """Name -> model, images, and the logits of its file in a process that all have in common."""
    base, made = tmp_path_factory.mktemp("models"), {}
    for name in MODELS:
        made[name] = model, images = make(name)
        (base / name).mkdir()
        model.save(base / name / "model.keras")
        np.save(base / name / "images.npy", images)
    subprocess.run(
        [sys.executable, "-c", LOAD_AND_RUN, *(str(base / name) for name in MODELS)],
        check=True,
        env={**os.environ, "KERAS_BACKEND": keras.backend.backend()},
        cwd=base,
    )
    return {name: (*made[name], np.load(base / name / "logits.npy")) for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_file_loads_in_a_process_that_imports_keras_and_keras_vit(name, loaded_elsewhere):
    model, images, logits = loaded_elsewhere[name]
    np.testing.assert_array_equal(logits, model.predict(images, verbose=0))


def test_weights_file(tmp_path):
    model, images = make("everything")
    model.save_weights(tmp_path / "model.weights.h5")
    other, _ = make("everything")
    for weight in other.weights:
        if "seed_generator" not in weight.path:
            weight.assign(np.zeros(weight.shape))
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(
        other.predict(images, verbose=0), model.predict(images, verbose=0)
    )
