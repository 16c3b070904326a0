"""keras-vit train in processes of their own: one or two, which are told to end and killed."""

import contextlib
import csv
import dataclasses
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from keras_vit import ViTConfig
from keras_vit.training import RECIPES, load_run, resume, train

STEPS = 16  # of an epoch
# Everything that is random, and everything that a step keeps for the next ones.
SETTINGS = {
    "epochs": 2,
    "batch_size": 80,  # of the 180 images of validation, the last batch has none for worker 1
    "patch_size": 8,
    "dropout": 0.1,
    "drop_path": 0.2,
    "ema": 0.9,
    "mixup": 0.2,
    "cutmix": 1.0,
    "min_crop_area": 0.5,
    "rotation": 10.0,
    "shift": 0.1,
    "rand_augment": (1, 9),
    "erasing": 0.25,
}
TRAIN = ["--data", "digits", "--out", "run", "--no-xla", "--checkpoint-steps", "9"]
for name, value in SETTINGS.items():
    TRAIN += ["--set", f"{name}={value}"]
RESUME = ["--resume", "run"]

# A smaller model than the recipe's, as each process has to trace it.
SMALL = ViTConfig(hidden_dim=24, depth=2, num_heads=3, mlp_dim=40, patch_size=4)
# The command, which waits at its checkpoints within an epoch until it has been acted upon.
COMMAND = f"""
import dataclasses, os, pathlib, signal, sys, time
from keras_vit import ViTConfig, cli
from keras_vit.training import callbacks, recipes
tiny = dataclasses.replace(recipes.RECIPES["tiny"], variant={SMALL!r})
recipes.RECIPES = {{**recipes.RECIPES, "tiny": tiny}}
save = callbacks.save_state
def save_and_wait(folder, model, position, *args, **kwargs):
    save(folder, model, position, *args, **kwargs)
    deadline = time.monotonic() + 60
    if position["step_of_epoch"] and str(position["epoch"]) == os.environ.get("HELD_EPOCH"):
        while not pathlib.Path("../released").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
callbacks.save_state = save_and_wait
signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a shell's foreground
cli.main()
"""


@contextlib.contextmanager
def workers(folder, count, *arguments, held_epoch=None):
    """Starts `keras-vit train` on workers, each in a folder of its own: folder/0, folder/1, ...

    Their output goes to folder/0.out, folder/0.err, ... They do not outlive the block. In the
    midst of `held_epoch`, counted from 0, a checkpoint waits for the file folder/released.
    """
    processes = []
    (folder / "released").unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:
        for index, environ in enumerate(environments(count)):
            (folder / str(index)).mkdir(parents=True, exist_ok=True)
            out, err = (
                stack.enter_context((folder / f"{index}.{name}").open("w"))
                for name in ("out", "err")
            )
            process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, "train", *arguments],
                cwd=folder / str(index),
                env=environ | {"HELD_EPOCH": str(held_epoch)},
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
            stack.callback(end, process)
            processes.append(process)
        yield processes


def environments(count):
    """The environment of each worker; one that is alone has nothing in it that speaks of others."""
    common = {**os.environ, "KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": ""}
    if count == 1:
        return [common]
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        addresses = [f"127.0.0.1:{server.getsockname()[1]}" for server in servers]
    cluster = {"worker": addresses}
    tasks = [{"type": "worker", "index": index} for index in range(count)]
    return [
        {**common, "TF_CONFIG": json.dumps({"cluster": cluster, "task": task})} for task in tasks
    ]


def end(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)


def run_workers(folder, count, *arguments):
    """Runs `keras-vit train` to its end, which has to be a good one."""
    with workers(folder, count, *arguments) as processes:
        codes = [process.wait(180) for process in processes]
    assert codes == [0] * count, (folder / "0.err").read_text()
    return load_run(folder / "0" / "run")


def wait_for_checkpoint(folder, process, epoch):
    """Waits for a checkpoint in the midst of an epoch, counted from 0; returns its position."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        for path in (folder / "0" / "run" / "checkpoints").glob("step-*/position.json"):
            # Of the last two, the older one goes at any moment.
            with contextlib.suppress(FileNotFoundError):
                position = json.loads(path.read_text())
                if position["epoch"] == epoch and position["step_of_epoch"] > 0:
                    return position
        assert process.poll() is None, (folder / "0.err").read_text()
        time.sleep(0.02)
    raise AssertionError((folder / "0.err").read_text())


def newest_position(run):
    return json.loads((sorted((run / "checkpoints").iterdir())[-1] / "position.json").read_text())


def history(run):
    return list(csv.DictReader((run.folder / "history.csv").read_text().splitlines()))


def assert_same(run, expected, atol):
    """The models and the history; with `atol` 0, everything that training depends on, too."""
    for which in ("best", "last"):
        pairs = zip(run.model(which).weights, expected.model(which).weights, strict=True)
        for weight, other in pairs:
            np.testing.assert_allclose(weight, other, rtol=0, atol=atol, err_msg=weight.path)
    rows, others = history(run), history(expected)
    assert [row["epoch"] for row in rows] == [row["epoch"] for row in others] == ["0", "1"]
    for name in ("val_loss", "val_accuracy", "learning_rate"):
        values = [[float(row[name]) for row in table] for table in (rows, others)]
        np.testing.assert_allclose(*values, rtol=0, atol=atol)
    if atol == 0:
        assert newest_position(run.folder) == newest_position(expected.folder)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run of one process, uninterrupted. Tests must not change the folder."""
    out = tmp_path_factory.mktemp("one") / "run"
    recipe = dataclasses.replace(RECIPES["tiny"], variant=SMALL)
    return train("digits", out, recipe=recipe, jit_compile=False, **SETTINGS)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of two workers, uninterrupted. Tests must not change it."""
    folder = tmp_path_factory.mktemp("two")
    run_workers(folder, 2, *TRAIN, "--strategy", "multiworker")
    return folder


@pytest.fixture(scope="module")
def terminated(tmp_path_factory):
    """The folder of two workers, of which the chief alone got SIGTERM in the midst of epoch 0."""
    folder = tmp_path_factory.mktemp("terminated")
    with workers(folder, 2, *TRAIN, "--strategy", "multiworker", held_epoch=0) as processes:
        wait_for_checkpoint(folder, processes[0], epoch=0)
        processes[0].send_signal(signal.SIGTERM)
        (folder / "released").touch()
        codes = [process.wait(120) for process in processes]
    assert codes == [0, 0], (folder / "0.err").read_text()
    return folder


@pytest.fixture(scope="module")
def killed(terminated, tmp_path_factory):
    """The folder of these two, resumed, of which one was killed in the midst of epoch 1."""
    folder = shutil.copytree(terminated, tmp_path_factory.mktemp("killed") / "copy")
    with workers(folder, 2, *RESUME, "--strategy", "multiworker", held_epoch=1) as processes:
        wait_for_checkpoint(folder, processes[0], epoch=1)
        processes[1].kill()
        (folder / "released").touch()
        code = processes[0].wait(120)
    assert code == 1, (folder / "0.err").read_text()
    return folder


def test_two_workers_train_as_one(one, two):
    run = load_run(two / "0" / "run")
    assert (run.info["replicas"], one.info["replicas"]) == (2, 1)
    assert_same(run, one, atol=1e-5)
    for name in ("loss", "accuracy"):
        values = [[float(row[name]) for row in history(each)] for each in (run, one)]
        np.testing.assert_allclose(*values, rtol=0, atol=1e-5)
    assert run.info["results"]["test_accuracy"] == one.info["results"]["test_accuracy"]


def test_the_chief_alone_writes_and_speaks(two):
    assert list((two / "1").iterdir()) == []
    assert (two / "1.out").read_text() == ""
    assert (two / "0.out").read_text().count("epoch ") == 3  # two, and the best one's number
    names = {path.name for path in (two / "0" / "run").iterdir()}
    assert names == {
        "run.json",
        "best.keras",
        "last.keras",
        "checkpoints",
        "history.csv",
        "curves.png",
        "tensorboard",
    }
    assert len(list((two / "0" / "run" / "tensorboard").rglob("events.*"))) == 2


def test_sigterm_saves_and_says_how_to_go_on(terminated):
    run = terminated / "0" / "run"
    position = newest_position(run)
    assert position["epoch"] == 0
    step = position["step"]
    assert position["step_of_epoch"] == step == 10  # when they ask each other
    said = f"Stopped by SIGTERM at step {step}. Continue with: keras-vit train --resume"
    assert said in (terminated / "0.out").read_text()
    assert load_run(run).info["results"]["status"] == "interrupted"
    assert list((terminated / "1").iterdir()) == []


def test_lost_worker_is_an_error_that_says_how_to_go_on(killed):
    run = killed / "0" / "run"
    position = newest_position(run)
    assert position["epoch"] == 1
    assert 0 < position["step_of_epoch"] < STEPS
    assert position["step"] == STEPS + position["step_of_epoch"]
    error = (killed / "0.err").read_text().splitlines()[-1]
    assert error.startswith("error: Another worker was lost")
    assert "keras-vit train --resume" in error
    assert load_run(run).info["results"]["status"] == "stopped"


def test_two_workers_go_on_to_the_same_weights(killed, two, tmp_path):
    """Without a disk in common: worker 1 has no run folder."""
    folder = shutil.copytree(killed, tmp_path / "copy")
    run = run_workers(folder, 2, *RESUME, "--strategy", "multiworker")
    assert_same(run, load_run(two / "0" / "run"), atol=0)


def test_one_worker_goes_on_where_two_were(killed, one, tmp_path):
    folder = shutil.copytree(killed, tmp_path / "copy")
    assert_same(resume(folder / "0" / "run"), one, atol=1e-5)


def test_one_process_is_interrupted_and_killed(one, tmp_path):
    """By Ctrl-C; and goes on with the command that it printed."""
    with workers(tmp_path, 1, *TRAIN, held_epoch=0) as [process]:
        wait_for_checkpoint(tmp_path, process, epoch=0)
        process.send_signal(signal.SIGINT)
        (tmp_path / "released").touch()
        assert process.wait(60) == 0, (tmp_path / "0.err").read_text()
    last_line = (tmp_path / "0.out").read_text().splitlines()[-1]
    said, command = last_line.split("Continue with: keras-vit train ")
    position = newest_position(tmp_path / "0" / "run")
    assert said == f"Stopped by SIGINT at step {position['step']}. "
    assert 0 < position["step_of_epoch"] < STEPS
    assert "Ctrl-C again stops at once" in (tmp_path / "0.err").read_text()
    assert load_run(tmp_path / "0" / "run").info["results"]["status"] == "interrupted"
    with workers(tmp_path, 1, *shlex.split(command), held_epoch=1) as [process]:
        wait_for_checkpoint(tmp_path, process, epoch=1)
        process.kill()
        assert process.wait(60) == -signal.SIGKILL
    assert 0 < newest_position(tmp_path / "0" / "run")["step_of_epoch"] < STEPS
    assert load_run(tmp_path / "0" / "run").info["results"]["status"] == "running"
    assert_same(resume(tmp_path / "0" / "run"), one, atol=0)
