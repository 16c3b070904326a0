"""train(weights=...): from a checkpoint to a run, with layer-wise rates or a frozen backbone."""

import dataclasses
import hashlib
import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import safetensors.numpy
from rich.console import Console

from keras_vit import ViTConfig, build_vit
from keras_vit.training import RECIPES, Recipe, load_run, train
from keras_vit.training.backbone import load_backbone
from keras_vit.training.building import build_model, model_arguments
from keras_vit.training.checkpoints import load_state
from keras_vit.training.evaluation import evaluate
from keras_vit.training.optimizers import (
    LayerRatesAdamW,
    LayerRatesSGD,
    build_optimizer,
    layer_rates,
)
from keras_vit.training.recipes import resolve_recipe
from keras_vit.training.report import print_large
from keras_vit.weights import save_checkpoint

CONFIG = ViTConfig(hidden_dim=16, depth=3, num_heads=2, mlp_dim=24, patch_size=4)
TUNED = dataclasses.replace(RECIPES["finetune_small"], image_size=8)


def pretrained(**arguments):
    """A model whose every weight is random, its head's too."""
    keras.utils.set_random_seed(3)
    model = build_vit(
        CONFIG, **{"image_size": 12, "num_classes": 7, "normalization": "imagenet", **arguments}
    )
    rng = np.random.default_rng(4)
    for weight in model.weights:
        weight.assign(weight + rng.normal(0, 0.1, weight.shape))
    return model


@pytest.fixture(scope="module")
def source():
    return pretrained(layer_scale=0.5)


@pytest.fixture(scope="module")
def checkpoint(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_checkpoint(source, path, "timm")
    return path


def backbone_of(recipe, path):
    return load_backbone(
        path,
        image_size=recipe.image_size,
        pooling=recipe.pooling,
        normalization=recipe.normalization,
    )


def model_of(recipe, num_classes, backbone):
    return build_model(model_arguments(recipe, num_classes, backbone), recipe, backbone)


def train_tuned(out, checkpoint, **arguments):
    return train(
        "digits",
        out,
        weights=checkpoint,
        **{"image_size": 8, "epochs": 1, "batch_size": 256, "jit_compile": False, **arguments},
    )


@pytest.fixture(scope="module")
def run(checkpoint, tmp_path_factory):
    """What the default recipe makes of the checkpoint. Tests must not change the folder."""
    return train_tuned(tmp_path_factory.mktemp("runs") / "run", checkpoint)


def backbone_weights(model):
    return {w.path: w.numpy() for w in model.weights if not w.path.startswith("head")}


def head_weights(model):
    return [w.numpy() for w in model.weights if w.path.startswith("head")]


# The model.


@pytest.mark.parametrize("num_classes", [5, 7])
def test_starts_as_the_checkpoint_with_a_head_of_zeros(source, checkpoint, num_classes):
    """The head is new where the file has one of as many classes, too."""
    recipe = dataclasses.replace(TUNED, image_size=None, drop_path=0.3, dropout=0.2)
    model = model_of(recipe, num_classes, backbone_of(recipe, checkpoint))
    assert model.input_shape == (None, 12, 12, 3)
    expected = backbone_weights(source)
    assert backbone_weights(model).keys() == expected.keys()
    for path, value in backbone_weights(model).items():
        np.testing.assert_array_equal(value, expected[path])
    assert [w.shape for w in head_weights(model)] == [(16, num_classes), (num_classes,)]
    assert not any(w.any() for w in head_weights(model))
    assert model.get_layer("block_2").get_config()["drop_path"] == 0.3
    assert model.get_layer("block_1").get_config()["dropout"] == 0.2
    images = np.random.default_rng(0).uniform(0, 255, (2, 12, 12, 3)).astype("float32")
    features = [
        keras.Model(m.input, m.get_layer("pooling").output)(images) for m in (source, model)
    ]
    np.testing.assert_allclose(*features, rtol=1e-6, atol=1e-6)


def test_positions_are_resized(tmp_path):
    """What is the same at every patch stays so; the class token's position is kept."""
    model = pretrained(gelu="tanh")
    table = model.get_layer("patch_encoder").position_embedding
    values = np.concatenate([np.full((1, 1, 16), 7.0), np.tile(np.arange(16.0), (1, 9, 1))], 1)
    table.assign(values)
    save_checkpoint(model, tmp_path / "vit.npz", "google")
    recipe = dataclasses.replace(TUNED, image_size=20)
    model = model_of(recipe, 5, backbone_of(recipe, tmp_path / "vit.npz"))
    resized = model.get_layer("patch_encoder").position_embedding.numpy()
    assert resized.shape == (1, 1 + 25, 16)
    np.testing.assert_array_equal(resized[0, 0], 7.0)
    np.testing.assert_allclose(resized[0, 1:], np.tile(np.arange(16.0), (25, 1)), rtol=1e-5)


def test_whole_head_is_left_out(tmp_path):
    """The paper's fine-tuning: pre_logits goes with the head."""
    save_checkpoint(pretrained(gelu="tanh", representation_size=6), tmp_path / "vit.npz", "google")
    model = model_of(TUNED, 7, backbone_of(TUNED, tmp_path / "vit.npz"))
    assert "pre_logits" not in [layer.name for layer in model.layers]
    assert head_weights(model)[0].shape == (16, 7)


def test_normalization_is_the_files_unless_the_recipe_says(checkpoint, tmp_path):
    def scale(recipe, path):
        layer = model_of(recipe, 5, backbone_of(recipe, path)).get_layer("normalization")
        return np.ravel(layer.scale) * 255, np.ravel(layer.offset)

    imagenet = 1 / np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(scale(TUNED, checkpoint)[0], imagenet)
    recipe = dataclasses.replace(TUNED, normalization="minus_one_one")
    np.testing.assert_allclose(scale(recipe, checkpoint), ([2.0], [-1.0]))
    save_checkpoint(pretrained(normalization=None), tmp_path / "raw.safetensors", "timm")
    np.testing.assert_allclose(scale(TUNED, tmp_path / "raw.safetensors"), ([2.0], [-1.0]))


def test_pooling_can_be_chosen(checkpoint):
    recipe = dataclasses.replace(TUNED, pooling="token+gap")
    model = model_of(recipe, 5, backbone_of(recipe, checkpoint))
    assert head_weights(model)[0].shape == (32, 5)


def test_frozen_backbone_trains_every_head():
    recipe = dataclasses.replace(TUNED, freeze_backbone=True, dropout=0.2)
    model = model_of(recipe, 5, pretrained(num_classes=0, distillation_token=True))
    assert {w.path for w in model.trainable_weights} == {
        f"{head}/{name}" for head in ("head", "head_distillation") for name in ("kernel", "bias")
    }
    assert model.get_layer("block_2").get_config()["drop_path"] == 0.0
    assert model.get_layer("block_2").get_config()["dropout"] == 0.0


# The optimizers.


def test_rates_fall_towards_the_first_layer(source):
    assert layer_rates(source, 0.5) == {
        "patch_encoder": 0.0625,
        "block_0": 0.125,
        "block_1": 0.25,
        "block_2": 0.5,
        "encoder_norm": 1.0,
        "head": 1.0,
    }
    hybrid = build_vit(
        dataclasses.replace(CONFIG, patch_size=1, stem_units=(), stem_width=32),
        image_size=32,
        num_classes=2,
        pooling="map",
    )
    rates = layer_rates(hybrid, 0.5)
    assert (rates["stem"], rates["patch_encoder"], rates["pooling"]) == (0.0625, 0.0625, 1.0)


@pytest.mark.parametrize(
    ("cls", "plain"),
    [
        (LayerRatesAdamW, keras.optimizers.AdamW),
        (LayerRatesSGD, lambda *args, **kw: keras.optimizers.SGD(*args, momentum=0.9, **kw)),
    ],
)
def test_each_layer_moves_as_under_an_optimizer_of_its_own(cls, plain):
    """Three steps with known gradients against Keras' optimizers, one for each layer."""
    momentum = {"momentum": 0.9} if cls is LayerRatesSGD else {}
    model, expected = pretrained(), pretrained()
    rates = layer_rates(model, 0.5)
    optimizer = cls(0.02, layer_rates=rates, weight_decay=0.3, **momentum)
    optimizer.build(model.trainable_weights)
    plains = {}
    for weight in expected.trainable_weights:
        decay = 0.3 if weight.name == "kernel" else 0.0
        layer = weight.path.split("/")[0]
        plains[weight.path] = plain(0.02 * rates[layer], weight_decay=decay)
    rng = np.random.default_rng(1)
    for _ in range(3):
        gradients = [rng.normal(0, 1, w.shape).astype("float32") for w in model.trainable_weights]
        optimizer.apply([keras.ops.convert_to_tensor(g) for g in gradients])
        for weight, gradient in zip(expected.trainable_weights, gradients, strict=True):
            plains[weight.path].apply([keras.ops.convert_to_tensor(gradient)], [weight])
    for weight, other in zip(model.weights, expected.weights, strict=True):
        np.testing.assert_allclose(weight, other, rtol=1e-5, atol=1e-7, err_msg=weight.path)


def test_one_step_by_hand():
    """SGD: w (1 - r lr decay) - r lr g, the gradient clipped first; a bias does not decay."""
    model = pretrained()
    recipe = dataclasses.replace(
        RECIPES["finetune"], layer_decay=0.5, learning_rate=0.1, weight_decay=0.4, warmup=0.0
    )
    optimizer = build_optimizer(recipe, model, steps_per_epoch=1000)
    before = {w.path: w.numpy() for w in model.weights}
    size = sum(w.numpy().size for w in model.weights)
    optimizer.apply([keras.ops.ones(w.shape) for w in model.weights], model.weights)
    step = 1 / np.sqrt(size)  # of every value, after clipping to norm 1
    for path, rate in (("block_1/feed_forward/fc1", 0.025), ("head", 0.1)):
        layer = before[f"{path}/kernel"], before[f"{path}/bias"]
        after = [w.numpy() for w in model.weights if w.path.rpartition("/")[0] == path]
        np.testing.assert_allclose(after[0], layer[0] * (1 - 0.4 * rate) - rate * step, rtol=1e-5)
        np.testing.assert_allclose(after[1], layer[1] - rate * step, rtol=1e-5)


def test_recipes_without_layer_decay_use_keras_optimizers(source):
    optimizer = build_optimizer(RECIPES["finetune"], source, steps_per_epoch=2500)
    assert type(optimizer) is keras.optimizers.SGD
    assert (optimizer.momentum, optimizer.global_clipnorm, optimizer.weight_decay) == (0.9, 1.0, 0)
    rates = [float(optimizer._learning_rate(step)) for step in (0, 250, 500, 20_000)]
    np.testing.assert_allclose(rates, [0, 0.015, 0.03, 0], atol=1e-8)
    recipe = dataclasses.replace(TUNED, layer_decay=1.0)
    assert type(build_optimizer(recipe, source, 10)) is keras.optimizers.AdamW
    assert type(build_optimizer(TUNED, source, 10)) is LayerRatesAdamW


CONTINUE = """
import sys, numpy as np, keras
import keras_vit
best, last, images, out = sys.argv[1:]
model = keras.saving.load_model(best)  # which needs nothing but `keras_vit`
assert not model.compiled
import keras_vit.training
model = keras.saving.load_model(last)
images = np.load(images)
labels = np.eye(7)[np.arange(len(images)) % 7]
model.fit(images, labels, epochs=2, shuffle=False, verbose=0)
np.savez(out, *model.get_weights())
"""


def test_continues_the_same_in_a_fresh_process(run, tmp_path):
    """The rates of the layers, the decay and the moments are all in a saved model."""
    model = pretrained()
    recipe = dataclasses.replace(TUNED, weight_decay=2.0, learning_rate=0.01)
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    model.compile(build_optimizer(recipe, model, steps_per_epoch=10), loss, jit_compile=False)
    images = np.random.default_rng(5).uniform(0, 255, (20, 12, 12, 3)).astype("float32")
    labels = np.eye(7)[np.arange(20) % 7]
    model.fit(images, labels, epochs=2, shuffle=False, verbose=0)
    model.save(tmp_path / "last.keras")
    np.save(tmp_path / "images.npy", images)
    before = model.get_weights()
    files = [run.folder / "best.keras"]
    files += [tmp_path / name for name in ("last.keras", "images.npy", "weights.npz")]
    subprocess.run(
        [sys.executable, "-c", CONTINUE, *map(str, files)],
        check=True,
        env={**os.environ, "KERAS_BACKEND": "tensorflow"},
    )
    model.fit(images, labels, epochs=2, shuffle=False, verbose=0)
    with np.load(files[-1]) as arrays:
        others = [arrays[name] for name in arrays.files]
    for start, value, other in zip(before, model.get_weights(), others, strict=True):
        assert np.abs(value - start).max() > 0
        np.testing.assert_allclose(value, other, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_scaled_loss_and_xla(checkpoint, source, tmp_path):
    """With a decay so strong that the first layers hardly move, and the head does."""
    arguments = {"precision": "mixed_float16", "jit_compile": True, "layer_decay": 1e-4}
    run = train_tuned(tmp_path / "run", checkpoint, **arguments)
    assert run.info["results"]["status"] == "finished"
    before, after = backbone_weights(source), backbone_weights(run.model())
    for name in ("attention/proj/kernel", "norm1/gamma"):
        name = f"block_0/{name}"
        np.testing.assert_allclose(after[name], before[name], rtol=0, atol=1e-8)
    assert np.abs(after["encoder_norm/gamma"] - before["encoder_norm/gamma"]).max() > 1e-4
    assert np.abs(head_weights(run.model())[0]).max() > 1e-4


# The run.


def test_frozen_backbone_stays_as_it_was(checkpoint, source, tmp_path, capsys):
    recipe = Recipe(None, 12, pooling=None, position=None, normalization=None, batch_size=256)
    run = train_tuned(
        tmp_path / "run", checkpoint, recipe=recipe, image_size=None, freeze_backbone=True
    )
    parameters = source.count_params() - (16 + 1) * 7 + (16 + 1) * 10
    assert f"170 of {parameters:,} parameters trained" in capsys.readouterr().out
    assert run.info["model"]["trained_parameters"] == 170
    model = run.model()
    expected = backbone_weights(source)
    for path, value in backbone_weights(model).items():
        np.testing.assert_array_equal(value, expected[path])
    assert min(np.abs(w).max() for w in head_weights(model)) > 1e-4
    assert len(model.trainable_weights) == len(model.weights)  # what comes next is not frozen
    assert not model.compiled


def test_run_folder(run, checkpoint):
    info = json.loads((run.folder / "run.json").read_text())
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert info["weights"] == {"path": str(checkpoint), "sha256": digest, "num_heads": None}
    assert info["recipe"]["variant"] is None
    assert info["recipe"]["layer_decay"] == TUNED.layer_decay < 1
    assert info["model"]["image_size"] == [8, 8]
    assert info["model"]["trained_parameters"] == info["model"]["parameters"]

    again = load_run(run.folder)
    result = evaluate(again.model(), again.data().test, again.class_names)
    assert result.top1 == pytest.approx(info["results"]["test_accuracy"], abs=1e-6)
    position, state = load_state(again.folder)
    assert position["step"] == 5  # of 256 of 1,257 images
    moments = [name for name in state if name.endswith(("_momentum", "_velocity"))]
    assert len(moments) == 2 * len(again.model().trainable_weights)


def test_same_seed_same_run(run, checkpoint, tmp_path, capsys):
    again = train_tuned(tmp_path / "run", checkpoint)
    for first, second in zip(run.model().weights, again.model().weights, strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-6)
    out = capsys.readouterr().out
    digest = again.info["weights"]["sha256"]
    assert f"{checkpoint} (SHA-256 {digest[:12]}...), new head" in out
    assert "3 blocks of width 16, patches of 4 px, images of 8 px" in out


@pytest.mark.parametrize(("side", "said"), [(384, False), (400, True)])
def test_large_images_are_said_to_be_costly(side, said, capsys):
    model = build_vit(ViTConfig(8, 1, 2, 8, patch_size=16), image_size=(16, side))
    print_large(Console(soft_wrap=True), model)
    out = capsys.readouterr().out
    assert (f"note: {side} px, the checkpoint's own size" in out and "--image-size" in out) == said


def test_command(checkpoint, tmp_path):
    command = pathlib.Path(sys.executable).with_name("keras-vit")
    bare = tmp_path / "bare.safetensors"  # without the metadata, which say that there are 2
    safetensors.numpy.save_file(safetensors.numpy.load_file(checkpoint), bare)
    arguments = ["--weights", bare, "--num-heads", "4", "--image-size", "8", "--epochs", "1"]
    arguments += ["--freeze", "--optimizer", "sgd", "--layer-decay", "0.9", "--no-xla"]
    arguments += ["--normalization", "minus_one_one", "--out", tmp_path / "run"]
    result = subprocess.run(
        [command, "train", *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "parameters trained" in result.stdout
    assert "Warning" not in result.stderr
    run = load_run(tmp_path / "run")
    recipe = run.info["recipe"]
    assert (recipe["optimizer"], recipe["layer_decay"], recipe["freeze_backbone"]) == (
        "sgd",
        0.9,
        True,
    )
    assert run.model().get_layer("block_0").get_config()["num_heads"] == 4
    np.testing.assert_allclose(np.ravel(run.model().get_layer("normalization").offset), [-1.0])


# What is wrong.


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"recipe": "photos"}, ValueError, r"must be one of finetune_small, finetune, or.*photos"),
        ({"variant": "Ti/16"}, ValueError, r"`variant` cannot be chosen with weights.*'Ti/16'"),
        ({"patch_size": 2}, ValueError, r"`patch_size` cannot be chosen with weights.*=2"),
        ({"position": "sincos2d"}, ValueError, r"`position` cannot be chosen with weights.*sincos"),
        ({"image_size": 10}, ValueError, r"divisible by `patch_size`.*\(10, 10\)"),
        ({"optimizer": "lion"}, ValueError, r"`optimizer` must be 'adamw' or 'sgd'.*'lion'"),
        ({"layer_decay": 0}, ValueError, r"`layer_decay` must be in \(0, 1\].*layer_decay=0"),
        ({"layer_decay": 1.1}, ValueError, r"`layer_decay` must be in \(0, 1\].*layer_decay=1.1"),
        ({"recipe": "finetun"}, ValueError, r"`recipe` must be one of.*finetune.*'finetun'"),
        ({"epoch": 1}, TypeError, r"Not a field of Recipe: epoch"),
        ({"weights": "none.npz"}, ValueError, r"no such file or folder.*'none.npz'"),
        ({"weights": 3}, TypeError, r"`path` must be a string or a path.*3"),
        ({"weights": None}, ValueError, r"is for `weights` alone.*num_heads=2"),
        (
            {"weights": None, "num_heads": None, "recipe": "finetune"},
            ValueError,
            r"pass it as `weights`.*recipe='finetune', weights=None",
        ),
        (
            {"weights": None, "num_heads": None, "freeze_backbone": True},
            ValueError,
            r"`freeze_backbone` must be False without weights.*True",
        ),
    ],
)
def test_errors_come_before_the_images_are_read(checkpoint, tmp_path, arguments, error, match):
    (tmp_path / "photos").mkdir()
    with pytest.raises(error, match=match):
        train(
            f"folder:{tmp_path}/photos",  # it has no images
            tmp_path / "run",
            **{"weights": checkpoint, "num_heads": 2, **arguments},
        )
    assert not (tmp_path / "run").exists()


def test_checkpoint_of_gray_images(tmp_path):
    model = pretrained(channels=1, normalization="minus_one_one")
    save_checkpoint(model, tmp_path / "gray.safetensors", "timm")
    with pytest.raises(ValueError, match=r"must take images of 3 channels.*of 1 channels"):
        train("digits", tmp_path / "run", weights=tmp_path / "gray.safetensors", num_heads=2)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"variant": "Ti/16"}, r"`image_size` must be set.*None"),
        ({"variant": None}, r"`position` must be None with weights.*'learned'"),
        ({"variant": None, "position": None, "patch_size": 8}, r"`patch_size` must be None.*8"),
    ],
)
def test_recipes_of_a_checkpoint_leave_the_model_to_it(arguments, match):
    with pytest.raises(ValueError, match=match):
        Recipe(**{"image_size": None, **arguments})


def test_default_recipe_of_weights():
    assert resolve_recipe(None, (480, 640), {}, weights="x.npz") == RECIPES["finetune_small"]
    recipe = resolve_recipe("finetune", (8, 8), {"image_size": 224}, weights="x.npz")
    assert recipe == dataclasses.replace(RECIPES["finetune"], image_size=224)
