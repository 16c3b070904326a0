"""resume(): what was interrupted, in whatever way, comes to the result that it would have had."""

import csv
import dataclasses
import errno
import json
import os
import pathlib
import resource
import shutil
import signal
import types
import warnings

import keras
import numpy as np
import pytest
import rich.console
import safetensors.numpy
import tensorflow as tf
from PIL import Image
from typer.testing import CliRunner

from keras_vit import ViTConfig, build_vit, cli
from keras_vit.data import load_data
from keras_vit.data.pipeline import spread_images
from keras_vit.training import (
    DistributedModel,
    Recipe,
    TrainingInterrupted,
    callbacks,
    load_run,
    resume,
    train,
    workers,
)
from keras_vit.training.callbacks import BestModel, Checkpoints
from keras_vit.training.checkpoints import load_state, restore_state, save_state, state_variables
from keras_vit.training.fitting import lost_workers
from keras_vit.training.losses import build_loss
from keras_vit.training.trainer import _check_average, _check_batch, _check_same_data, _fit_batch
from keras_vit.weights import save_checkpoint

CONFIG = ViTConfig(hidden_dim=8, depth=1, num_heads=2, mlp_dim=12, patch_size=4)
# Everything that is random, and everything that a step keeps for the next ones.
EVERYTHING = Recipe(
    CONFIG,
    image_size=(8, 12),
    pooling="token",
    epochs=2,
    batch_size=128,  # 10 steps an epoch
    dropout=0.1,
    drop_path=0.2,
    ema=0.9,
    mixup=0.2,
    cutmix=1.0,
    rotation=10.0,
    shift=0.1,
    rand_augment=(1, 9),
    erasing=0.25,
)
TUNED = {
    "image_size": (12, 8),
    "epochs": 2,
    "batch_size": 128,
    "freeze_backbone": True,
    "dropout": 0.1,
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    keras.utils.set_random_seed(3)
    model = build_vit(CONFIG, image_size=8, num_classes=7, normalization="minus_one_one")
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_checkpoint(model, path, "timm")
    return path


def train_small(out, **arguments):
    defaults = {"recipe": EVERYTHING, "jit_compile": False, "checkpoint_steps": 4}
    return train("digits", out, **{**defaults, **arguments})


def train_tuned(out, weights, **arguments):
    return train_small(out, weights=weights, recipe=None, **{**TUNED, **arguments})


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Tests must not change the folder."""
    return train_small(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def tuned(weights, tmp_path_factory):
    """Tests must not change the folder."""
    return train_tuned(tmp_path_factory.mktemp("runs") / "run", weights)


class Killed(BaseException):
    """Takes training's life."""


@pytest.fixture
def killed_at(monkeypatch):
    """Function of (step, train, ...) that calls `train` and ends it after the step."""

    def run_until(step, function, *args, **kwargs):
        after_step = Checkpoints.on_train_batch_end

        def die(self, batch, logs=None):
            after_step(self, batch, logs)
            if self.model.optimizer.iterations == step:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "on_train_batch_end", die)
            with pytest.raises(Killed):
                function(*args, **kwargs)

    return run_until


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run that ended after step 17, with checkpoints of the steps 12 and 16. Copy the folder."""
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        killed_at.__wrapped__(patch)(17, train_small, out)
    return out


@pytest.fixture
def copy(killed, tmp_path):
    return shutil.copytree(killed, tmp_path / "run")


def folders(run):
    return sorted((run / "checkpoints").iterdir())


def position(run):
    return json.loads((folders(run)[-1] / "position.json").read_text())


def history(run):
    return list(csv.DictReader((run / "history.csv").read_text().splitlines()))


def assert_same(run, expected):
    """Bit for bit: the models, and, by its checksum, everything that training depends on."""
    for which in ("best", "last"):
        for weight, other in zip(
            run.model(which).get_weights(), expected.model(which).get_weights(), strict=True
        ):
            np.testing.assert_array_equal(weight, other)
    assert position(run.folder) == position(expected.folder)
    for name in ("status", "best_epoch", "validation_accuracy", "test_accuracy"):
        assert run.info["results"][name] == expected.info["results"][name]
    rows, others = history(run.folder), history(expected.folder)
    for name in ("epoch", "val_loss", "val_accuracy", "learning_rate"):
        assert [row[name] for row in rows] == [row[name] for row in others]


# The same result.


def test_averages_over_more_steps_than_there_are():
    recipe = dataclasses.replace(EVERYTHING, ema=0.9999)
    for steps, left, better in ((750, 93, 0.99), (5000, 61, 0.998), (12, 100, 0.5)):
        match = rf"After the {steps:,} steps.*{left}%.*ema=0.9999; take {better}, say"
        with pytest.warns(UserWarning, match=match):
            _check_average(recipe, steps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _check_average(EVERYTHING, 20)
        _check_average(dataclasses.replace(EVERYTHING, ema=None), 1)


def test_the_averages_are_validated_and_kept(uninterrupted):
    images, labels = spread_images(uninterrupted.data().validation, (8, 12), 10_000)
    one_hot = np.eye(10, dtype="float32")[labels]
    rows = history(uninterrupted.folder)
    best = uninterrupted.info["results"]["best_epoch"] - 1
    for which, row in (("best", rows[best]), ("last", rows[-1])):
        logits = uninterrupted.model(which).predict(images, verbose=0)
        loss = float(build_loss(EVERYTHING)(one_hot, logits))
        assert loss == pytest.approx(float(row["val_loss"]), rel=1e-5)


def test_goes_on_in_mid_epoch(copy, uninterrupted):
    assert [folder.name for folder in folders(copy)] == ["step-00000012", "step-00000016"]
    assert (position(copy)["epoch"], position(copy)["step_of_epoch"]) == (1, 6)
    run = resume(copy)
    assert_same(run, uninterrupted)
    assert [folder.name for folder in folders(copy)] == ["step-00000016", "step-00000020"]
    assert "error" not in run.info["results"]
    assert json.loads((copy / "run.json").read_text()) == run.info


def test_state_has_what_a_step_depends_on(uninterrupted):
    names = list(load_state(uninterrupted.folder)[1])
    parts = ("head/kernel", "seed_generator_state", "iteration", "_momentum", "_average")
    for part in parts:
        assert any(part in name for name in names), part


@pytest.mark.slow
def test_scaled_loss_and_xla(tmp_path, killed_at):
    recipe = Recipe(CONFIG, image_size=8, epochs=1, batch_size=256, dropout=0.1, ema=0.9)
    arguments = {"recipe": recipe, "precision": "mixed_float16", "jit_compile": True}
    expected = train_small(tmp_path / "expected", **arguments)
    killed_at(4, train_small, tmp_path / "run", **arguments)
    position, state = load_state(tmp_path / "run")
    assert position["step"] == 4
    [finite_steps] = [value for name, value in state.items() if name.endswith("step_counter")]
    assert finite_steps == 4
    assert_same(resume(tmp_path / "run"), expected)


def test_frozen_backbone(weights, tuned, tmp_path, killed_at):
    """Without the checkpoint that the run began from: the state has it all."""
    moved = shutil.copy(weights, tmp_path / "vit.safetensors")
    killed_at(13, train_tuned, tmp_path / "run", moved)
    os.remove(moved)
    run = resume(tmp_path / "run")
    assert_same(run, tuned)
    assert run.info["model"]["trained_parameters"] == 8 * 10 + 10


def test_begins_anew_without_a_checkpoint(tmp_path, killed_at, uninterrupted, capsys):
    killed_at(3, train_small, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert_same(resume(tmp_path / "run"), uninterrupted)
    assert "from step 0 of 20" in capsys.readouterr().out


def test_begins_anew_from_weights(weights, tuned, tmp_path, killed_at):
    changed = shutil.copy(weights, tmp_path / "vit.safetensors")
    killed_at(3, train_tuned, tmp_path / "run", changed)
    other = build_vit(CONFIG, image_size=8, num_classes=7, normalization="minus_one_one")
    save_checkpoint(other, changed, "timm", overwrite=True)
    with pytest.raises(ValueError, match=r"vit.safetensors has changed since.*Received: SHA-256"):
        resume(tmp_path / "run")
    shutil.copy(weights, changed)
    assert_same(resume(tmp_path / "run"), tuned)


def test_early_stop_and_best_epoch_survive(tmp_path, killed_at, monkeypatch):
    arguments = {"epochs": 30, "learning_rate": 1e-12, "early_stop": 1}
    expected = train_small(tmp_path / "expected", **arguments)
    best, run = expected.info["results"]["best_epoch"], tmp_path / "run"
    killed_at(10 * best + 7, train_small, run, **arguments)  # in the last epoch of all

    def die(self, path):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(keras.Model, "save", die)  # at last.keras: the best epoch lies behind
        with pytest.raises(Killed):
            resume(run)
    assert position(run)["stopped"]
    assert not (run / "last.keras").exists()
    assert_same(resume(run), expected)
    assert len(history(run)) == best + 1 < 30


def test_finished_run_stays_as_it_is(uninterrupted, capsys):
    def contents():
        files = [path for path in uninterrupted.folder.rglob("*") if path.is_file()]
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}

    before = contents()
    run = resume(uninterrupted.folder)
    assert run.info["results"] == uninterrupted.info["results"]
    assert f"{run.folder} is finished: nothing to resume" in capsys.readouterr().out
    arguments = ["train", "--resume", str(uninterrupted.folder)]
    assert CliRunner().invoke(cli.app, arguments, catch_exceptions=False).exit_code == 0
    assert contents() == before


@pytest.mark.filterwarnings("error:Your input ran out of data")  # as Keras says of such parts
def test_all_devices_of_a_machine_train_as_one(tmp_path, monkeypatch, uninterrupted):
    """Each of the four has its part of a batch, and of the last one of the validation."""
    # `build_strategy` takes TensorFlow's default way to reduce, which cannot have groups of 2 and
    # of 4 devices in one process: other tests have 2.
    strategy = tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(4)], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )
    monkeypatch.setattr(workers, "build_strategy", lambda *_: strategy)
    run = train_small(tmp_path / "run", strategy="mirrored")
    assert run.info["replicas"] == 4
    assert run.info["data"]["validation"] % run.info["recipe"]["batch_size"] > 0
    weights = (each.model("last").weights for each in (run, uninterrupted))
    for weight, other in zip(*weights, strict=True):
        np.testing.assert_allclose(weight, other, rtol=0, atol=1e-5)
    rows, others = history(run.folder), history(uninterrupted.folder)
    for name in ("loss", "accuracy", "val_loss", "val_accuracy"):
        values = [[float(row[name]) for row in table] for table in (rows, others)]
        np.testing.assert_allclose(*values, rtol=0, atol=1e-5)


# SIGTERM.


@pytest.mark.parametrize(
    ("signalled", "writes", "saved_at"),
    [
        (7, True, [7, 10]),  # Whoever writes saves at once, and stops when all ask,
        (7, False, []),  # as others do,
        (None, True, [10]),  # and as one that hears it of another.
        (None, False, []),
    ],
)
def test_workers_stop_at_one_step(signalled, writes, saved_at, monkeypatch):
    saved, asked = [], []
    monkeypatch.setattr(callbacks, "save_state", lambda *args: saved.append(args[2]["step"]))

    def any_worker(stops):
        asked.append(stops)
        return stops or signalled is None

    checkpoints = Checkpoints(
        "run" if writes else None,
        BestModel(None),
        12,
        every_steps=None,
        every_minutes=None,
        keep=1,
        any_worker=any_worker,
    )
    checkpoints.set_model(types.SimpleNamespace(stop_training=False))
    checkpoints.on_epoch_begin(0)

    def steps():
        for batch in range(12):
            if batch + 1 == signalled:
                checkpoints.stopped_by = "SIGTERM"
            checkpoints.on_train_batch_end(batch)

    who = "SIGTERM" if signalled else "a signal to another worker"
    with pytest.raises(TrainingInterrupted, match=f"Stopped by {who} at step 10"):
        steps()
    assert saved == saved_at
    assert len(asked) == 2  # to know, and to wait for who writes


def test_who_is_alone_stops_at_once(monkeypatch):
    saved = []
    monkeypatch.setattr(callbacks, "save_state", lambda *args: saved.append(args[2]["step"]))
    times = {"every_steps": None, "every_minutes": None}
    checkpoints = Checkpoints("run", BestModel(None), 12, **times, keep=1)
    checkpoints.set_model(types.SimpleNamespace(stop_training=False))
    checkpoints.on_epoch_begin(0)
    checkpoints.on_train_batch_end(5)
    checkpoints.stopped_by = "SIGTERM"
    with pytest.raises(TrainingInterrupted, match="Stopped by SIGTERM at step 7"):
        checkpoints.on_train_batch_end(6)
    assert saved == [7]


def test_worker_that_was_told_to_stop_is_not_lost():
    checkpoints = Checkpoints(None, None, 3, every_steps=None, every_minutes=None, keep=1)
    checkpoints.stopped_by = "SIGTERM"
    error = tf.errors.UnavailableError(None, None, "The chief is gone.")
    with (
        pytest.raises(TrainingInterrupted, match="Stopped by SIGTERM"),
        lost_workers("run", checkpoints),
    ):
        raise error
    with (
        pytest.raises(RuntimeError, match=r"Another worker was lost.*train --resume run"),
        lost_workers("run"),
    ):
        raise error


def test_workers_must_have_the_same_images():
    data = load_data("digits")

    def second(fingerprint_of_the_first):
        """The second of two workers."""
        return types.SimpleNamespace(
            json_from_chief=lambda _: fingerprint_of_the_first, any=lambda value: value
        )

    match = rf"digits must be the same for all workers.*{data.fingerprint} here, and 0123"
    with pytest.raises(ValueError, match=match):
        _check_same_data(data, second("0123"))
    _check_same_data(data, second(data.fingerprint))


@pytest.mark.usefixtures("sigterm")
def test_sigterm_during_validation(tmp_path, monkeypatch, uninterrupted):
    """In each epoch: training ends after it, with a checkpoint, and `resume` only has to finish."""

    class Terminating(callbacks.Averages):
        def on_test_begin(self, logs=None):
            os.kill(os.getpid(), signal.SIGTERM)
            super().on_test_begin(logs)

    monkeypatch.setattr("keras_vit.training.fitting.Averages", Terminating)
    before = signal.getsignal(signal.SIGTERM)
    for step, call in ((10, train_small), (20, resume)):
        with pytest.raises(TrainingInterrupted, match=f"Stopped by SIGTERM at step {step}"):
            call(tmp_path / "run")
        info = load_run(tmp_path / "run").info
        assert info["results"]["status"] == "interrupted"
        assert position(tmp_path / "run")["step"] == step
        assert not (tmp_path / "run" / "last.keras").exists()
    assert_same(resume(tmp_path / "run"), uninterrupted)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def ctrl_c():
    """Lets Ctrl-C raise KeyboardInterrupt, which is ignored in a script's background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def sigterm():
    """Lets a SIGTERM that nothing listens to fail the test, and not end the tests' process."""

    def fail(*_):
        raise AssertionError("SIGTERM")

    before = signal.signal(signal.SIGTERM, fail)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_ctrl_c_stops_at_once(capfd):
    checkpoints = Checkpoints(None, None, 3, every_steps=None, every_minutes=None, keep=1)
    with checkpoints.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert checkpoints.stopped_by == "SIGINT"
        assert (
            capfd.readouterr().err == "\nstopping with a checkpoint; Ctrl-C again stops at once\n"
        )
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_that_is_ignored_stays_so():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    checkpoints = Checkpoints(None, None, 3, every_steps=None, every_minutes=None, keep=1)
    with checkpoints.listening():
        os.kill(os.getpid(), signal.SIGINT)
    assert checkpoints.stopped_by is None


# Full disks.


def half_written(save, error, only=""):
    """A function that saves to a path; this writes half a file, and raises as on a full disk."""

    def write(value, path):
        if only not in pathlib.Path(path).name:
            return save(value, path)
        save(value, path)
        os.truncate(path, os.path.getsize(path) // 2)
        raise error

    return write


def test_checkpoint_that_does_not_fit_is_a_warning(tmp_path, monkeypatch, uninterrupted, killed_at):
    """Training goes on; what cannot be resumed begins anew, with each epoch once in its history."""
    error = safetensors.SafetensorError("No space left on device")
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        save = half_written(safetensors.numpy.save_file, error)
        patch.setattr(safetensors.numpy, "save_file", save)
        with pytest.warns(UserWarning, match=r"step 4 could not be written \(No space left"):
            killed_at(15, train_small, out)
    assert folders(out) == []
    assert len(history(out)) == 1
    assert_same(resume(out), uninterrupted)


def test_full_disk_leaves_earlier_checkpoints(tmp_path):
    """With a limit on the size of files, which the writers meet as a full disk."""
    model = small_model()
    save_state(model, tmp_path, {"step": 5}, keep=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large"):
            save_state(model, tmp_path, {"step": 7}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [folder.name for folder in folders(tmp_path)] == ["step-00000005"]
    assert load_state(tmp_path)[0]["step"] == 5


@pytest.mark.parametrize(("name", "step"), [("best", 8), ("last", 20)])
def test_model_that_does_not_fit_ends_the_run(name, step, tmp_path, monkeypatch, uninterrupted):
    full = OSError(errno.ENOSPC, "No space left on device")
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(keras.Model, "save", half_written(keras.Model.save, full, name))
        with pytest.raises(OSError, match="No space left on device"):
            train_small(out)
    assert not (out / f"{name}.keras").exists()
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    results = load_run(out).info["results"]
    assert (results["status"], "No space" in results["error"]) == ("stopped", True)
    assert position(out)["step"] == step
    assert_same(resume(out), uninterrupted)


# Damaged checkpoints.


def truncate(folder):
    os.truncate(folder / "state.safetensors", 2000)


def flip_a_bit(folder):
    content = bytearray((folder / "state.safetensors").read_bytes())
    content[-100] ^= 1
    (folder / "state.safetensors").write_bytes(content)


def lose_position(folder):
    (folder / "position.json").unlink()


def garble_position(folder):
    (folder / "position.json").write_text('{"step": 16, "ep')


def empty_position(folder):
    (folder / "position.json").write_text("[]")


DAMAGES = [truncate, flip_a_bit, lose_position, garble_position, empty_position]


def small_model():
    """A model that counts its steps, with an optimizer's state that is not 0."""
    keras.utils.set_random_seed(4)
    vit = build_vit(CONFIG, image_size=8, num_classes=3, dropout=0.1, normalization="minus_one_one")
    model = DistributedModel(vit.inputs, vit.outputs)
    model.compile(keras.optimizers.AdamW(0.1, use_ema=True), "mse", run_eagerly=True)
    model.train_on_batch(np.ones((2, 8, 8, 3)), np.ones((2, 3)))
    return model


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_passed_over(damage, copy):
    damage(copy / "checkpoints" / "step-00000016")
    with pytest.warns(UserWarning, match=r"step-00000016 is damaged"):
        assert load_state(copy)[0]["step"] == 12
    damage(copy / "checkpoints" / "step-00000012")
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(ValueError, match=r"No checkpoint.*is whole(.*step-0000001[26]){2}"),
    ):
        resume(copy)


def test_goes_on_from_the_checkpoint_before(copy, uninterrupted):
    flip_a_bit(copy / "checkpoints" / "step-00000016")
    with pytest.warns(UserWarning, match=r"step-00000016 is damaged \(ValueError: SHA-256"):
        run = resume(copy)
    assert_same(run, uninterrupted)


def test_state_is_restored_in_another_model(tmp_path):
    """One that was made later, whose variables Keras has numbered on."""
    model, other = small_model(), small_model()
    for variable in state_variables(model).values():
        variable.assign(variable + keras.ops.cast(3, variable.dtype))
    save_state(model, tmp_path, {"step": 1}, keep=1)
    restore_state(other, load_state(tmp_path)[1])
    pairs = list(zip(model.variables, other.variables, strict=True))
    pairs += zip(model.optimizer.variables, other.optimizer.variables, strict=True)
    metrics = {id(variable) for variable in model.metrics_variables}
    assert sum("average" in variable.path for variable, _ in pairs) == len(model.weights)
    for variable, restored in pairs:
        if id(variable) not in metrics:
            np.testing.assert_array_equal(variable, restored, err_msg=variable.path)
    wider = build_vit(
        CONFIG, image_size=8, num_classes=4, dropout=0.1, normalization="minus_one_one"
    )
    wider = DistributedModel(wider.inputs, wider.outputs)
    wider.compile("adam", "mse")
    wider.optimizer.build(wider.trainable_variables)
    with pytest.raises(
        ValueError, match=r"checkpoint is of another model.*head/kernel', \(8, [34]\)"
    ):
        restore_state(wider, load_state(tmp_path)[1])


def test_old_checkpoints_go(tmp_path):
    """What is later is damaged, and what is hidden is of a process that died."""
    model = small_model()
    for step in (2, 3, 5, 7, 30):
        save_state(model, tmp_path, {"step": step}, keep=3)
    assert [folder.name[-2:] for folder in folders(tmp_path)] == ["05", "07", "30"]
    (tmp_path / "checkpoints" / ".step-00000030.123").mkdir()
    save_state(model, tmp_path, {"step": 11}, keep=2)
    assert [folder.name[-2:] for folder in folders(tmp_path)] == ["07", "11"]


# When there are checkpoints.


def saved_steps(monkeypatch, epochs=2, steps_per_epoch=10, **arguments):
    """The steps that `Checkpoints` saves, at 1 second a step."""
    saved, seconds = [], [0.0]
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: seconds[0])
    monkeypatch.setattr(callbacks, "save_state", lambda *args: saved.append(args[2]["step"]))
    arguments = {"every_steps": None, "every_minutes": None, "keep": 2, **arguments}
    checkpoints = Checkpoints("run", BestModel(None), steps_per_epoch, **arguments)
    checkpoints.set_model(types.SimpleNamespace(stop_training=False))
    for epoch in range(epochs):
        checkpoints.on_epoch_begin(epoch)
        for step in range(steps_per_epoch):
            seconds[0] += 1
            checkpoints.on_train_batch_end(step)
        checkpoints.on_epoch_end(epoch)
    return saved


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({}, [10, 20]),
        ({"every_steps": 4}, [4, 8, 10, 12, 16, 20]),
        ({"every_steps": 10}, [10, 20]),
        ({"every_minutes": 0.1}, [6, 10, 16, 20]),
        ({"every_minutes": 0.1, "every_steps": 7}, [6, 7, 10, 14, 20]),
    ],
)
def test_steps_of_checkpoints(arguments, steps, monkeypatch):
    assert saved_steps(monkeypatch, **arguments) == steps


def test_workers_that_do_not_write_save_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints(None, BestModel(None), 3, every_steps=1, every_minutes=0, keep=1)
    checkpoints.on_epoch_begin(0)
    checkpoints.on_train_batch_end(0)
    checkpoints.on_epoch_end(0)
    assert list(tmp_path.iterdir()) == []


# What cannot be resumed.


def test_data_that_changed(tmp_path, killed_at):
    for name, level in (("dark", 20), ("light", 220)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(10):
            image = Image.fromarray(np.full((8, 8, 3), level + index, "uint8"))
            image.save(tmp_path / "photos" / name / f"{index}.png")
    arguments = {"recipe": EVERYTHING, "batch_size": 8, "jit_compile": False}
    data = f"folder:{tmp_path / 'photos'}"
    killed_at(1, train, data, tmp_path / "run", **arguments)
    shutil.copytree(tmp_path / "photos", tmp_path / "elsewhere")
    (tmp_path / "photos" / "dark" / "3.png").unlink()
    with pytest.raises(ValueError, match=r"has changed since the run began.*Received: 15 training"):
        resume(tmp_path / "run")
    shutil.rmtree(tmp_path / "photos")
    with pytest.raises(ValueError, match=r"images cannot be loaded: .*not exist.*with `--data`"):
        resume(tmp_path / "run")
    elsewhere = f"folder:{tmp_path / 'elsewhere'}"
    arguments = ["train", "--resume", str(tmp_path / "run"), "--data", elsewhere]
    outcome = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert "test accuracy" in outcome.output
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (info["data"]["name"], info["results"]["status"]) == (elsewhere, "finished")
    assert load_run(tmp_path / "run").data().fingerprint == info["data"]["fingerprint"]


def edit(run, *keys, value):
    """Changes a value of run.json."""
    info = json.loads((run / "run.json").read_text())
    inner = info
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (run / "run.json").write_text(json.dumps(info))


def test_other_versions_are_a_warning(copy):
    edit(copy, "versions", "keras", value="3.0.0")
    edit(copy, "data", "fingerprint", value="0")  # so that it ends there
    with (
        pytest.warns(UserWarning, match=r"begun with.*'keras': '3\.0\.0'.*differ in the last"),
        pytest.raises(ValueError, match="digits has changed since the run began"),
    ):
        resume(copy)


def test_run_of_an_older_version(copy):
    info = json.loads((copy / "run.json").read_text())
    del info["model"]["arguments"]
    (copy / "run.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="begun by an older keras-vit, without checkpoints"):
        resume(copy)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"results": {}}', "\xff"])
def test_folder_that_is_no_run(tmp_path, content):
    if content is not None:
        (tmp_path / "run.json").write_text(content, encoding="latin1")
    with pytest.raises(ValueError, match=r"is not a run folder: run.json cannot be read"):
        resume(tmp_path)


def test_options_beside_resume(killed):
    arguments = ["train", "--resume", str(killed), "--epochs", "3", "--no-xla"]
    with pytest.raises(ValueError, match=r"--strategy can.*with --data.*Received: --epochs, --xla"):
        CliRunner().invoke(cli.app, arguments, catch_exceptions=False)


@pytest.mark.parametrize(
    ("replicas", "changes", "match"),
    [
        (3, {}, r"a multiple of 6: 3 devices with 1 micro-batches each, in pairs.*batch_size=128"),
        (2, {"micro_batches": 5}, r"a multiple of 20: 2 devices with 5 micro.*batch_size=128"),
        (2, {"micro_batches": 6}, r"a multiple of 12: 2 devices with 6 micro.*batch_size=128"),
        (3, {"mixup": 0.0, "cutmix": 0.0}, r"of 3: 3 devices with 1 micro-batches each\. Rec"),
    ],
)
def test_batches_that_do_not_divide(replicas, changes, match):
    with pytest.raises(ValueError, match=match):
        _check_batch(dataclasses.replace(EVERYTHING, **changes), replicas)


def test_batch_that_does_not_divide_is_an_error_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"a multiple of 6: 1 devices with 3 micro-batches each"):
        train_small(tmp_path / "run", micro_batches=3)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("replicas", [1, 2, 8])
def test_fewer_images_than_a_batch_are_one_on_any_number_of_devices(replicas):
    recipe, console = dataclasses.replace(EVERYTHING, batch_size=2048), rich.console.Console()
    fitting = _fit_batch(recipe, 1257, console)
    assert fitting.batch_size == 1024
    _check_batch(fitting, replicas)
    assert _fit_batch(recipe, 2048, console).batch_size == 2048


def test_batch_that_is_lowered_is_said_before_it_does_not_divide(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"multiple of 10: 1 devices with 5 .*batch_size=1024"):
        train_small(tmp_path / "run", micro_batches=5, batch_size=2560)
    assert "a batch of 2,560 is more than the" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"checkpoint_steps": 0}, r"`checkpoint_steps` must be a positive int. Received: .*=0"),
        ({"checkpoint_minutes": 0.0}, r"`checkpoint_minutes` must be positive. Received: .*=0.0"),
        (
            {"checkpoint_minutes": float("nan")},
            r"`checkpoint_minutes` must be positive. Received: .*=nan",
        ),
        ({"keep_checkpoints": 0}, r"`keep_checkpoints` must be a positive int. Received: .*=0"),
    ],
)
def test_checkpoint_options(tmp_path, option, match):
    with pytest.raises(ValueError, match=match):
        train_small(tmp_path / "run", **option)
    assert not (tmp_path / "run").exists()
