"""train(): the run folder, the optimizer, and what happens when something is wrong."""

import csv
import dataclasses
import json
import math
import os
import pathlib
import re
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from keras_vit import ViTConfig
from keras_vit.data import load_data
from keras_vit.data.pipeline import training_batches, untuned
from keras_vit.data.structures import array_split
from keras_vit.layers import Dropout
from keras_vit.training import (
    RECIPES,
    DistributedModel,
    NonFiniteLossError,
    Recipe,
    fitting,
    load_run,
    report,
    resume,
    train,
    trainer,
)
from keras_vit.training.building import build_model, model_arguments
from keras_vit.training.callbacks import BestModel
from keras_vit.training.evaluation import (
    MISTAKES,
    evaluate,
    plot_confusion,
    plot_mistakes,
    predict,
)
from keras_vit.training.optimizers import build_optimizer
from keras_vit.training.recipes import resolve_recipe
from keras_vit.training.report import plot_curves
from keras_vit.training.run import Run, forget_old_run, new_run_folder
from keras_vit.training.workers import Workers
from keras_vit.weights import save_checkpoint

SMALL = Recipe(ViTConfig(16, 2, 2, 24, 4), image_size=8, epochs=2, batch_size=128)


def train_small(out, **arguments):
    return train("digits", out, **{"recipe": SMALL, "jit_compile": False, **arguments})


def model_of(recipe, num_classes):
    return build_model(model_arguments(recipe, num_classes), recipe)


def history(run):
    return list(csv.DictReader((run.folder / "history.csv").read_text().splitlines()))


def test_run_folder(digits_run):
    folder = digits_run.folder
    names = {path.name for path in folder.iterdir()}
    files = {"run.json", "best.keras", "last.keras", "history.csv", "curves.png"}
    assert names == files | {"checkpoints", "tensorboard"}
    assert list((folder / "tensorboard").rglob("events.*"))
    with Image.open(folder / "curves.png") as image:
        assert image.size[0] > 1000

    info = json.loads((folder / "run.json").read_text())
    data = load_data("digits")
    assert info["data"] == {
        "name": "digits",
        "class_names": [str(digit) for digit in range(10)],
        "train": data.train.count,
        "validation": data.validation.count,
        "test": data.test.count,
        "skipped": 0,
        "fingerprint": data.fingerprint,
    }
    assert info["recipe"] == json.loads(json.dumps(dataclasses.asdict(RECIPES["tiny"])))
    assert info["options"]["seed"] == 0
    assert info["versions"]["keras"] == keras.__version__
    assert info["results"]["status"] == "finished"

    rows = history(digits_run)
    assert [row["epoch"] for row in rows] == [str(epoch) for epoch in range(70)]
    losses = [float(row["val_loss"]) for row in rows]
    best = info["results"]["best_epoch"] - 1
    assert losses[best] == min(losses)
    accuracy = float(rows[best]["val_accuracy"])
    assert accuracy == pytest.approx(info["results"]["validation_accuracy"])
    assert float(rows[0]["images_per_second"]) > 0
    assert float(rows[-1]["learning_rate"]) < 1e-6


def test_digits_are_learned(digits_run):
    """The default recipe: in about a minute on two cores."""
    assert digits_run.info["results"]["test_accuracy"] >= 0.97


def test_best_model_is_the_one_reported(digits_run):
    run = load_run(digits_run.folder)
    data = run.data()
    results = run.info["results"]
    model = run.model()
    top1 = evaluate(model, data.test, run.class_names).top1
    assert top1 == pytest.approx(results["test_accuracy"], abs=1e-6)
    top1 = evaluate(model, data.validation, run.class_names).top1
    assert top1 == pytest.approx(results["validation_accuracy"], abs=1e-6)
    for which in ("best", "last"):
        assert not isinstance(run.model(which), DistributedModel)  # any Keras loads it
        assert not run.model(which).compiled


def test_same_seed_same_training(tmp_path):
    losses = [
        [float(row["loss"]) for row in history(train_small(tmp_path / str(i), seed=seed))]
        for i, seed in enumerate((5, 5, 6))
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert abs(losses[0][0] - losses[2][0]) > 1e-4


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(tmp_path, precision):
    run = train_small(tmp_path / "run", precision=precision)
    model = run.model()
    assert model.get_layer("block_1").compute_dtype == precision.removeprefix("mixed_")
    assert keras.config.dtype_policy().name == "float32"
    assert run.info["results"]["status"] == "finished"


def test_best_model_has_the_smallest_loss():
    """Of few validation images, the largest accuracy is luck."""
    saved = []
    best = BestModel(saved.append)
    model = keras.Sequential([keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    best.set_model(model)
    for epoch, (accuracy, loss) in enumerate(
        [(0.1, 0.9), (0.9, 0.5), (0.8, 0.4), (0.95, 0.45), (0.9, 0.4)]
    ):
        best.on_epoch_end(epoch, {"val_accuracy": accuracy, "val_loss": loss})
    assert (best.epoch, best.accuracy, best.loss) == (3, 0.8, 0.4)
    assert saved == 3 * ["best.keras"]


def test_early_stop(tmp_path):
    run = train_small(tmp_path / "run", epochs=30, learning_rate=1e-12, early_stop=2)
    assert len(history(run)) == run.info["results"]["best_epoch"] + 2 < 10


def test_weight_decay_acts_on_kernels_alone():
    """With zero gradients, a step scales kernels by 1 - lr * wd and leaves the rest alone."""
    recipe = dataclasses.replace(
        SMALL, pooling="token", learning_rate=0.1, weight_decay=0.5, warmup=0.0, clip_norm=None
    )
    model = model_of(recipe, 3)
    for weight in model.weights:
        weight.assign(np.ones(weight.shape))
    optimizer = build_optimizer(recipe, model, steps_per_epoch=1000)
    optimizer.apply([keras.ops.zeros(w.shape) for w in model.trainable_weights], model.weights)
    decayed = {w.path for w in model.weights if not np.allclose(w.numpy(), 1)}
    kernels = ["attention/qkv", "attention/proj", "feed_forward/fc1", "feed_forward/fc2"]
    assert decayed == {
        "patch_encoder/projection/kernel",
        "head/kernel",
        *(f"block_{i}/{kernel}/kernel" for i in range(2) for kernel in kernels),
    }
    np.testing.assert_allclose(model.get_layer("head").kernel, 0.95, rtol=1e-6)


def test_learning_rate_rises_linearly_and_falls_as_a_cosine():
    recipe = dataclasses.replace(SMALL, epochs=10, learning_rate=0.4, warmup=0.2)
    schedule = build_optimizer(recipe, model_of(recipe, 3), steps_per_epoch=50)._learning_rate
    rates = [float(schedule(step)) for step in range(501)]
    np.testing.assert_allclose(rates[:101], np.linspace(0, 0.4, 101), rtol=1e-5)
    cosine = [0.2 * (1 + math.cos(math.pi * step / 400)) for step in range(401)]
    np.testing.assert_allclose(rates[100:], cosine, atol=1e-6)


def test_warm_up_leaves_a_step_to_decay():
    recipe = dataclasses.replace(SMALL, epochs=1, warmup=0.99)
    schedule = build_optimizer(recipe, model_of(recipe, 3), steps_per_epoch=3)._learning_rate
    np.testing.assert_allclose([float(schedule(step)) for step in range(3)], [0, 5e-4, 1e-3])


def test_gradients_are_clipped():
    model = model_of(SMALL, 3)
    recipe = dataclasses.replace(SMALL, clip_norm=0.25)
    assert build_optimizer(recipe, model, 10).global_clipnorm == 0.25
    recipe = dataclasses.replace(SMALL, clip_norm=None)
    assert build_optimizer(recipe, model, 10).global_clipnorm is None


def test_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    """The step is named, also when the run was resumed; the model of the last good epoch stays."""

    def poisoned(*args, first_step, **kwargs):
        batches = training_batches(*args, first_step=first_step, **kwargs).enumerate(first_step)
        return batches.map(
            lambda step, batch: (
                batch[0],
                tf.where(step < 13, batch[1], math.nan * batch[1]),
            )
        )

    monkeypatch.setattr(fitting, "training_batches", poisoned)
    with pytest.raises(NonFiniteLossError, match=r"loss is nan at step 14"):
        train_small(tmp_path / "run", epochs=5)  # 10 steps an epoch
    run = load_run(tmp_path / "run")
    assert run.info["results"]["status"] == "stopped"
    assert "step 14" in run.info["results"]["error"]
    assert len(history(run)) == 1
    assert all(np.isfinite(weight).all() for weight in run.model().get_weights())
    with pytest.raises(ValueError, match=r"last.keras is missing"):
        run.model("last")
    assert (run.folder / "curves.png").exists()
    with pytest.raises(NonFiniteLossError, match=r"loss is nan at step 14"):
        resume(run.folder)


def test_existing_run_is_kept_or_replaced(tmp_path):
    out = tmp_path / "run"
    train_small(out, epochs=1)
    before = (out / "best.keras").read_bytes()
    with pytest.raises(ValueError, match=r"holds a run already: pass overwrite=True"):
        train_small(out)
    with pytest.raises(ValueError, match=r"`learning_rate` must be positive"):
        train_small(out, overwrite=True, learning_rate=-1)
    with pytest.raises(ValueError, match=r"does not exist.*nothing"):
        train(f"folder:{tmp_path}/nothing", out, overwrite=True)
    diverging = {"learning_rate": 1e30, "warmup": 0.0, "clip_norm": None}
    for checkpoint_steps in (None, 1):  # before the new run has a model
        with pytest.raises(NonFiniteLossError):
            train_small(out, overwrite=True, checkpoint_steps=checkpoint_steps, **diverging)
    assert (out / "best.keras").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    train_small(out, overwrite=True)
    assert len(history(load_run(out))) == 2


def test_run_that_goes_on_forgets_what_it_replaced(tmp_path):
    """Of which its process was killed before it could."""
    out, old = tmp_path / "run", tmp_path / ".run.old"
    old.mkdir()
    out.mkdir()
    forget_old_run(out)
    assert old.exists()
    (out / "checkpoints" / "step-00000005").mkdir(parents=True)
    forget_old_run(out)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_address_of_weights_says_more_than_its_file(monkeypatch):
    """What is known of a public checkpoint is found by it."""
    seen = []
    monkeypatch.setattr(trainer, "local_path", lambda weights: pathlib.Path("cached.npz"))
    monkeypatch.setattr(trainer, "sha256", lambda path: str(path))
    monkeypatch.setattr(trainer, "load_backbone", lambda weights, **_: seen.append(weights))
    address = "https://storage.googleapis.com/vit_models/augreg/S_16.npz"
    source, _ = trainer._load_weights(address, None, RECIPES["finetune_small"])
    assert seen == [address]
    assert source == {"path": address, "sha256": "cached.npz", "num_heads": None}


@pytest.mark.parametrize("out", ["run", "photos/run", "photos/../photos/a/run"])
def test_run_folder_is_no_class(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "a").mkdir(parents=True)
    match = r"outside of the images' folder" if out != "run" else "Every class folder must hold"
    with pytest.raises(ValueError, match=match):
        train("folder:photos", out)
    assert not pathlib.Path(out).exists()


def test_evaluation_takes_no_more_memory_than_training():
    recipe = {"batch_size": 96, "micro_batches": 4}
    assert Run("run", {"recipe": recipe, "replicas": 3}).images_at_once == 8
    assert (
        Run("run", {"recipe": {**recipe, "batch_size": 4096}, "replicas": 1}).images_at_once == 128
    )
    recipe = dataclasses.replace(RECIPES["tiny"], batch_size=48, micro_batches=4)
    model = types.SimpleNamespace(input_shape=(None, 8, 10, 3))
    _, validation = fitting._batches(load_data("digits"), recipe, model, 0, Workers(), 0)
    images, _ = next(iter(validation))
    assert images.shape == (12, 8, 10, 3)


def test_what_training_tests_with(tmp_path, monkeypatch):
    taken, whole = [], fitting.evaluate
    monkeypatch.setattr(fitting, "evaluate", lambda *args: taken.append(args[3]) or whole(*args))
    run = train_small(tmp_path / "run", epochs=1, batch_size=64, micro_batches=4)
    assert taken == [16] == [run.images_at_once]


def test_run_on_a_mount_is_not_replaced(tmp_path, monkeypatch):
    """It cannot be moved away: refused before the images are read."""
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path)
    monkeypatch.setattr(trainer, "load_data", None)
    (tmp_path / "run.json").touch()
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"is a mount, and the run in it cannot be replaced"):
            train_small(tmp_path, overwrite=overwrite)


def test_an_empty_folder_stays(tmp_path):
    """It may be a mount, or belong to others."""
    before = tmp_path.stat().st_ino
    with new_run_folder(tmp_path, overwrite=False) as folder:
        (folder / "best.keras").touch()
    assert tmp_path.stat().st_ino == before
    assert [path.name for path in tmp_path.iterdir()] == ["best.keras"]


def header_info(recipe, image_size, weights=None):
    """What run.json says of a run, as far as its header does."""
    data = {"name": "fish", "class_names": list("abcdef"), "skipped": 2}
    return {
        "data": {**data, "train": 1234, "validation": 56, "test": 78},
        "weights": weights,
        "recipe": dataclasses.asdict(recipe),
        "model": {"image_size": image_size, "parameters": 4321},
    }


@pytest.mark.parametrize(
    ("gpus", "replicas", "hidden", "said"),
    [
        (0, 1, None, "the CPU"),
        (0, 1, "-1", "the CPU"),
        (0, 4, "-1", "4 CPUs"),
        (2, 1, None, "1 GPU (NVIDIA H200)"),
        (2, 6, None, "6 GPUs (NVIDIA H200)"),
    ],
)
def test_header(gpus, replicas, hidden, said, tmp_path, monkeypatch, capsys):
    model = model_of(SMALL, 6)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["a GPU"] * gpus)
    details = {"device_name": "NVIDIA H200"}
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda device: details)
    monkeypatch.setattr(report, "_NVIDIA_DRIVER", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    strategy = types.SimpleNamespace(num_replicas_in_sync=replicas)
    console = report.chief_console(Workers())
    run = Run(tmp_path, header_info(SMALL, [8, 8]))
    report.print_header(console, run, model, Workers(strategy))
    out = capsys.readouterr().out
    assert out.startswith(
        "fish: 6 classes (a, b, c, d, e, ...), 1,234 training, 56 validation, 78 test images, "
        "2 unreadable skipped\n"
        f"2 blocks of width 16, patches of 4 px, images of 8 px, 4,321 parameters, on {said}\n"
    )
    assert ("TensorFlow found no GPU: pip install" in out) == (not gpus and not hidden)
    assert "note: patches per image: 4, few" in out
    assert "or a smaller patch_size (--patch-size) gives more" in out


def test_header_of_few_patches_that_stay_as_they_are(tmp_path, capsys):
    """Of a checkpoint, and of a hybrid, whose patches are one pixel of what its stem gives."""
    recipe = dataclasses.replace(SMALL, patch_size=1, image_size=3)
    weights = {"path": "S_16.npz", "sha256": 64 * "a"}
    for of, model in ((None, model_of(recipe, 6)), (weights, model_of(SMALL, 6))):
        run = Run(tmp_path, header_info(recipe, [3, 3], weights=of))
        report.print_header(report.chief_console(Workers()), run, model, Workers())
    said = [line for line in capsys.readouterr().out.splitlines() if "few" in line]
    ending = ", few for a transformer; a larger image_size (--image-size) gives more"
    assert said == [f"note: patches per image: {count}{ending}" for count in (9, 4)]


def test_header_of_enough_patches(tmp_path, capsys):
    model = model_of(dataclasses.replace(SMALL, image_size=(8, 32)), 6)  # 2 x 8
    run = Run(tmp_path, header_info(SMALL, [8, 32]))
    report.print_header(report.chief_console(Workers()), run, model, Workers())
    out = capsys.readouterr().out
    assert "images of 8 x 32 px" in out
    assert "few" not in out


@pytest.mark.parametrize(
    ("made", "stays"),
    [
        ((), "old"),
        (("checkpoints",), "old"),  # the disk was full
        (("checkpoints", "checkpoints/.step-00000005.12ab"), "old"),
        (("checkpoints", "checkpoints/step-00000005"), "new"),
        (("best.keras",), "new"),
    ],
)
@pytest.mark.parametrize("killed", [False, True])
def test_old_run_is_put_back_without_anything_to_go_on_from(made, stays, killed, tmp_path):
    """Also where the process that replaced it was killed, by the next that does."""
    out = tmp_path / "run"
    out.mkdir()
    for name in ("run.json", "old"):
        (out / name).touch()

    def begin(made):
        with new_run_folder(out, overwrite=True) as folder:
            for name in made:
                (folder / name).mkdir()
            raise OSError("The disk is full.")

    if killed:
        os.rename(out, tmp_path / ".run.old")
        for name in ("run.json", "new", *made):
            (out / name).mkdir(parents=True)
        made = ()
    begun = ("newer",) if killed else ("new", *made)
    with pytest.raises(OSError, match="full"):
        begin(begun)
    assert (out / stays).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("stuck", ["unlink", "replace"])
def test_what_cannot_be_cleared_away_does_not_hide_why_it_failed(stuck, tmp_path, monkeypatch):
    """On NFS, a folder with an open file cannot be removed; on Windows, nor can it be moved."""
    out = tmp_path / "run"
    out.mkdir()
    for name in ("run.json", "old"):
        (out / name).touch()

    def refuse(*args, **kwargs):
        raise OSError("It is open.")

    def fail():
        with new_run_folder(out, overwrite=True) as folder:
            (folder / "history.csv").touch()
            monkeypatch.setattr(os, stuck, refuse)
            raise ValueError("The loss is infinite.")

    def check():
        with pytest.raises(ValueError, match="infinite"):
            fail()

    if stuck == "unlink":
        check()
        assert [path.name for path in sorted(out.iterdir())] == ["old", "run.json"]
    else:
        with pytest.warns(UserWarning, match=r"not be put back, and is at .*\.run\.old: It"):
            check()
        assert (tmp_path / ".run.old" / "old").exists()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"data": "digit"}, r"`spec` must be .*'digit'"),
        ({"data": "digits:8"}, r"`spec` must be .*'digits:8'"),
        ({"data": "folder:"}, r"`spec` must be .*'folder:'"),
        ({"data": "folder:/no/photos"}, r"does not exist.*/no/photos"),
        ({"data": "tfrecord:/no/photos"}, r"must exist.*/no/photos"),
        ({"variant": "Ti/17"}, r"`variant` must be one of.*'Ti/17'"),
        ({"recipe": "smal"}, r"`recipe` must be one of.* Did you mean 'small'\? Received: 'smal'"),
        ({}, r"exists and is not a run folder"),
    ],
)
def test_the_cheap_arguments_are_checked_before_the_folder(tmp_path, arguments, match):
    (tmp_path / "photo.jpg").write_text("mine")
    with pytest.raises(ValueError, match=match):
        train(**{"data": "digits", "out": tmp_path, **arguments})


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"recipe": SMALL, "image_size": 9}, r"divisible by `patch_size`.*\(9, 9\)"),
        (
            {"recipe": "plain_imagenet", "image_size": 200},
            r"divisible by `patch_size`.*\(200, 200\)",
        ),
        ({"recipe": SMALL, "pooling": "sum"}, r"`pooling` must be one of.*'sum'"),
        ({"recipe": SMALL, "micro_batches": 3}, r"`batch_size` must be a multiple of 3.*=128"),
        ({"batch_size": 30, "micro_batches": 4}, r"`batch_size` must be a multiple of 4.*=30"),
    ],
)
def test_what_can_be_checked_before_the_images_is(arguments, match, tmp_path, monkeypatch):
    """Which may take minutes to read."""
    monkeypatch.setattr(trainer, "load_data", None)
    with pytest.raises(ValueError, match=match):
        train("digits", tmp_path / "run", **arguments)


def test_batch_that_is_lowered_is_said(tmp_path, capsys):
    run = train_small(tmp_path / "run", epochs=1, batch_size=2000)
    assert run.info["recipe"]["batch_size"] == 1024
    said = "a batch of 2,000 is more than the 1,257 training images: took 1,024\n"
    assert said in capsys.readouterr().out
    train_small(tmp_path / "other", epochs=1)
    assert "training images: took" not in capsys.readouterr().out


def test_model_file_as_weights(digits_run, tmp_path):
    """The message says what to do, and that works."""
    path = digits_run.folder / "best.keras"
    with pytest.raises(ValueError, match=r"not a model file of Keras.*train --resume") as caught:
        train("digits", tmp_path / "run", weights=path)
    [call] = re.findall(r"with keras_vit\.(save_checkpoint\(.*\))\. An", str(caught.value))
    names = {"keras": keras, "save_checkpoint": save_checkpoint}
    eval(call.replace("vit.safetensors", f"{tmp_path}/vit.safetensors"), names)
    run = train("digits", tmp_path / "run", weights=tmp_path / "vit.safetensors", epochs=1)
    assert run.info["results"]["test_accuracy"] > 0.9


def small_network():
    """With dropout, whose masks depend on the place of an image in the batch."""
    keras.utils.set_random_seed(3)
    images = keras.Input((6,))
    x = Dropout(0.3)(keras.layers.Dense(7, activation="tanh")(images))
    return DistributedModel(images, keras.layers.Dense(5)(x))


def test_optimizer_that_accumulates_gets_other_masks_for_each_batch():
    """Although Keras does not count its batches as iterations."""
    images, labels = np.ones((32, 6), "float32"), np.zeros((32, 5), "float32")
    losses = []
    for steps in (None, 4):
        model = small_network()
        optimizer = keras.optimizers.SGD(0.0, gradient_accumulation_steps=steps)
        model.compile(optimizer, "mse", jit_compile=False)
        fitted = model.fit(images, labels, batch_size=32, epochs=4, shuffle=False, verbose=0)
        losses.append(fitted.history["loss"])
    assert len(set(losses[0])) == 4
    assert losses[0] == losses[1]


@pytest.mark.parametrize("xla", [False, True])
@pytest.mark.parametrize("micro_batches", [4, 9])
def test_last_batch_that_micro_batches_do_not_divide(micro_batches, xla):
    """36, 36 and 7 images, then 36 and 35: the same training as with whole batches."""
    rng = np.random.default_rng(0)
    images = rng.normal(0, 1, (79, 6)).astype("float32")
    labels = rng.normal(0, 1, (79, 5)).astype("float32")
    trained = []
    for k in (1, micro_batches):
        model = small_network()
        model.compile(
            keras.optimizers.SGD(1.0), "mse", micro_batches=k, jit_compile=xla, metrics=["mae"]
        )
        for rows in (79, 71):
            data = untuned(
                tf.data.Dataset.from_tensor_slices((images[:rows], labels[:rows])).batch(36)
            )
            history = model.fit(data, shuffle=False, verbose=0).history
        trained.append((history, model.get_weights()))
    (history, weights), (other_history, other_weights) = trained
    for name in ("loss", "mae"):
        np.testing.assert_allclose(other_history[name], history[name], rtol=1e-5)
    for weight, other in zip(weights, other_weights, strict=True):
        np.testing.assert_allclose(other, weight, atol=1e-6)


def test_folder_that_is_no_run_is_never_replaced(tmp_path):
    (tmp_path / "photo.jpg").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="is not a run folder"):
            train_small(tmp_path, overwrite=overwrite)
    assert (tmp_path / "photo.jpg").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"data": "mnist"}, ValueError, r'"digits", "folder:PATH", .*\'mnist\''),
        ({"recipe": "huge"}, ValueError, r"`recipe` must be one of tiny, small, photos.*'huge'"),
        ({"recipe": 3}, TypeError, r"`recipe` must be a Recipe, a name or None.*3"),
        ({"precision": "int8"}, ValueError, r"`precision` must be one of.*'int8'"),
        ({"epoch": 3}, TypeError, r"Not a field of Recipe: epoch"),
        ({"epochs": 0}, ValueError, r"`epochs` must be a positive int.*epochs=0"),
        ({"batch_size": 0}, ValueError, r"`batch_size` must be a positive int.*batch_size=0"),
        ({"learning_rate": 0}, ValueError, r"`learning_rate` must be positive.*learning_rate=0"),
        ({"warmup": 1}, ValueError, r"`warmup` must be in \[0, 1\).*warmup=1"),
        ({"weight_decay": -1}, ValueError, r"`weight_decay` must be at least 0.*-1"),
        ({"label_smoothing": 1}, ValueError, r"`label_smoothing` must be in.*label_smoothing=1"),
        ({"clip_norm": 0}, ValueError, r"`clip_norm` must be positive or None.*clip_norm=0"),
        ({"min_crop_area": 0}, ValueError, r"`min_crop_area` must be in \(0, 1\].*=0"),
        ({"rotation": 200}, ValueError, r"`rotation` must be in \[0, 180\].*rotation=200"),
        ({"shift": 1}, ValueError, r"`shift` must be in \[0, 1\).*shift=1"),
        ({"normalization": None}, ValueError, r"`normalization` must be set.*None"),
        ({"image_size": 9}, ValueError, r"divisible by `patch_size`.*\(9, 9\)"),
        ({"variant": "Ti/17"}, ValueError, r"`variant` must be one of.*'Ti/17'"),
        ({"jit_compile": "yes"}, ValueError, r"`jit_compile` must be True, False or 'auto'.*'yes'"),
        ({"early_stop": 0}, ValueError, r"`early_stop` must be a positive int.*early_stop=0"),
        ({"seed": -1}, ValueError, r"`seed` must be an int of at least 0.*seed=-1"),
        ({"checkpoint_steps": "5"}, ValueError, r"`checkpoint_steps` must be a positive int.*'5'"),
        ({"checkpoint_minutes": 0}, ValueError, r"`checkpoint_minutes` must be positive.*=0"),
        ({"keep_checkpoints": 2.5}, ValueError, r"`keep_checkpoints` must be a positive int.*2.5"),
    ],
)
def test_errors(tmp_path, arguments, error, match):
    with pytest.raises(error, match=match):
        train(**{"data": "digits", "out": tmp_path / "run", **arguments})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("image_size", "name"), [((8, 8), "tiny"), ((28, 28), "small"), ((480, 640), "photos")]
)
def test_recipe_fits_the_images(image_size, name):
    assert resolve_recipe(None, image_size, {}) == RECIPES[name]


def test_run_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"is not a run folder: run.json cannot be read"):
        load_run(tmp_path)


def test_run_whose_data_were_moved(digits_run):
    info = json.loads(json.dumps(digits_run.info))
    info["data"]["name"] = "folder:/no/such/place"
    match = r"The run's data cannot be loaded: .*'/no/such/place'\. .*with `--data`"
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(digits_run, info=info).data()
    with pytest.raises(ValueError, match=r"^The image folder does not exist"):
        dataclasses.replace(digits_run, info=info).data("folder:/no/other")


def test_run_whose_data_changed(digits_run):
    info = json.loads(json.dumps(digits_run.info))
    info["data"]["fingerprint"] = "0"
    with pytest.raises(ValueError, match=r"digits has changed since the run.*expected 0"):
        dataclasses.replace(digits_run, info=info).data()
    info["data"]["class_names"] = ["zero"]
    with pytest.raises(ValueError, match=r"classes of digits must be.*\['zero'\]"):
        dataclasses.replace(digits_run, info=info).data("digits")


def colour_model():
    """Says which of red, green and blue an image has most of."""
    images = keras.Input((4, 6, 3))
    return keras.Model(images, keras.layers.GlobalAveragePooling2D()(images))


def colour_split(colours, labels):
    images = np.zeros((len(colours), 4, 6, 3), "uint8")
    for image, colour in zip(images, colours, strict=True):
        image[..., colour] = 200
    return array_split(images, np.array(labels))


def test_evaluation(tmp_path):
    labels = [0, 0, 0, 0, 1, 1, 2]
    colours = [0, 0, 0, 1, 1, 0, 0]
    result = evaluate(colour_model(), colour_split(colours, labels), ("red", "green", "blue"), 3)
    np.testing.assert_array_equal(result.confusion, [[3, 1, 0], [1, 1, 0], [1, 0, 0]])
    assert result.top1 == pytest.approx(4 / 7)
    assert result.top5 == 1
    np.testing.assert_allclose(result.precision, [3 / 5, 1 / 2, 0])
    np.testing.assert_allclose(result.recall, [3 / 4, 1 / 2, 0])
    np.testing.assert_allclose(result.f1, [2 / 3, 1 / 2, 0])

    result.save(tmp_path)
    saved = json.loads((tmp_path / "evaluation.json").read_text())
    assert saved["images"] == 7
    assert saved["confusion"] == [[3, 1, 0], [1, 1, 0], [1, 0, 0]]
    rows = list(csv.DictReader((tmp_path / "per_class.csv").read_text().splitlines()))
    assert [row["class"] for row in rows] == ["red", "green", "blue"]
    assert rows[0]["images"] == "4"
    with Image.open(tmp_path / "confusion.png") as image:
        assert min(image.size) > 500


def test_long_class_names_leave_room_for_the_matrix(recwarn):
    names = tuple(f"{i:05}_Animalia_Annelida_Clitellata_Haplotaxida_Lumbricidae" for i in range(3))
    result = evaluate(colour_model(), colour_split([0, 1, 2], [0, 1, 1]), names, 3)
    figure = plot_confusion(result)
    figure.canvas.draw()
    assert not [warning for warning in recwarn if "constrained_layout" in str(warning.message)]
    assert figure.axes[0].get_xticklabels()[1].get_text() == "00001_Animalia_Annelida…"


def test_curves_of_one_epoch_are_seen(tmp_path):
    """No line goes through one point: it is marked."""

    def blue_pixels(loss):
        text = f"epoch,accuracy,loss,val_accuracy,val_loss\n0,0.5,{loss},0.4,1.7\n"
        (tmp_path / "history.csv").write_text(text)
        plot_curves(tmp_path)
        with Image.open(tmp_path / "curves.png") as image:
            pixels = np.asarray(image.convert("RGB"), int)
        return (abs(pixels - (31, 119, 180)).sum(axis=-1) < 60).sum()

    assert blue_pixels(1.5) > blue_pixels("nan") + 50


def test_most_confident_mistakes(tmp_path):
    """Of several batches, the most confident first, as the model took them."""
    shades = [10, 3, 7, 20, 5]  # of green, all of them labelled otherwise but the fourth
    images = np.zeros((5, 4, 6, 3), "uint8")
    images[..., 1] = np.reshape(shades, (5, 1, 1))
    split = array_split(images, np.array([0, 2, 0, 1, 2]))
    names = ("$5_$10", "$green{", "blue" * 9)
    result = evaluate(colour_model(), split, names, batch_size=2)
    assert [m.index for m in result.mistakes] == [0, 2, 4, 1]
    assert [m.label for m in result.mistakes] == [0, 0, 2, 2]
    assert {m.predicted for m in result.mistakes} == {1}
    for mistake in result.mistakes:
        np.testing.assert_array_equal(mistake.image, images[mistake.index])
        expected = 1 / (1 + 2 * math.exp(-shades[mistake.index]))
        assert mistake.probability == pytest.approx(expected, abs=1e-6)
    result.save(tmp_path)
    [first, *_] = json.loads((tmp_path / "evaluation.json").read_text())["mistakes"]
    probability = first.pop("probability")
    assert first == {"index": 0, "class": "$5_$10", "predicted": "$green{"}
    assert probability == result.mistakes[0].probability
    with Image.open(tmp_path / "mistakes.png") as image:
        assert min(image.size) > 300
    drawn = [axes for axes in plot_mistakes(result).axes if axes.get_images()]
    np.testing.assert_array_equal(drawn[2].get_images()[0].get_array(), images[4])
    assert drawn[2].get_title() == "blueblueblueblu…\ntaken for $green{ (99%)"


def test_no_more_mistakes_than_a_sheet_holds():
    images = np.zeros((60, 4, 6, 3), "uint8")
    images[..., 1] = np.arange(60).reshape(60, 1, 1) // 10  # probabilities are below 1
    result = evaluate(colour_model(), array_split(images, np.full(60, 2)), tuple("abc"), 7)
    assert len(result.mistakes) == MISTAKES
    assert [m.index for m in result.mistakes] == [*range(50, 60), *range(40, 50), *range(30, 34)]
    title = plot_mistakes(result).get_suptitle()
    assert title == "mistakes: 60 of 60 images, the 24 most confident"


def test_no_mistakes():
    result = evaluate(colour_model(), colour_split([0, 1], [0, 1]), ("a", "b", "c"))
    assert result.mistakes == ()
    assert plot_mistakes(result).get_suptitle() == "mistakes: 0 of 2 images"


def test_top5_is_not_top1():
    images = keras.Input((1, 1, 3))
    scores = keras.layers.Dense(7, kernel_initializer="zeros")
    model = keras.Model(images, keras.layers.Flatten()(scores(images)))
    scores.bias.assign(np.arange(7.0, 0, -1))  # ranks the classes 0, 1, ..., 6
    split = array_split(np.zeros((4, 1, 1, 3), "uint8"), np.array([0, 4, 5, 6]))
    result = evaluate(model, split, tuple("abcdefg"))
    assert (result.top1, result.top5) == (0.25, 0.5)


def test_predict(tmp_path):
    paths = []
    for index, colour in enumerate([(10, 0, 0), (0, 0, 12)]):
        paths.append(tmp_path / f"{index}.png")
        Image.new("RGB", (9, 5), colour).save(paths[-1])
    (red, *_), (blue, green) = predict(
        colour_model(), paths, ("red", "green", "blue"), top=2, batch_size=1
    )
    assert red[0] == "red"
    assert red[1] == pytest.approx(1 / (1 + 2 * math.exp(-10)), abs=1e-6)
    assert [blue[0], green[0]] == ["blue", "red"]
    with pytest.raises(ValueError, match=r"`top` must be at least 1.*top=0"):
        list(predict(colour_model(), paths, ("red", "green", "blue"), top=0))
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.jpg"):
        list(predict(colour_model(), [tmp_path / "text.jpg"], ("red", "green", "blue")))
