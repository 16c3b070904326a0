"""The command, as a user types it."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from typer.testing import CliRunner

from keras_vit import cli, training
from keras_vit.data import load_data, speed
from keras_vit.data.pipeline import spread_images
from keras_vit.data.speed import DataSpeed
from keras_vit.export import LIMITS, NPU_MODES
from keras_vit.training import evaluation


def run_cli(*arguments, code=0):
    """Runs the command as `main` does; returns (stdout, stderr)."""
    result = subprocess.run(
        [pathlib.Path(sys.executable).with_name("keras-vit"), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert result.returncode == code, result.stderr
    return result.stdout, result.stderr


def error_of(*arguments):
    """Runs `main` in this process; returns what it exits with, an error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["keras-vit", *map(str, arguments)])
        patch.setattr("warnings.showwarning", None)  # `main` has one of its own
        with pytest.raises(SystemExit) as caught:
            cli.main()
    return caught.value.code


def invoke(*arguments):
    """Runs the command in this process; returns stdout."""
    runner = CliRunner(env={"COLUMNS": "200"})
    result = runner.invoke(cli.app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def exported(digits_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "export"
    return invoke("export", digits_run.folder, "--out", out), out


def test_train_evaluate_predict_in_processes_of_their_own(tmp_path):
    """The way of the README on an image folder, and errors as one line."""
    rng = np.random.default_rng(0)
    for name, colour in {"red": (200, 30, 30), "blue": (30, 30, 200)}.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(20):
            pixels = np.clip(rng.normal(colour, 20, (20, 24, 3)), 0, 255).astype("uint8")
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{index}.png")
    run = tmp_path / "run"
    data = f"folder:{tmp_path / 'photos'}"
    arguments = ("--data", data, "--out", run, "--epochs", 6, "--image-size", "16,24")
    arguments += ("--no-xla",)
    out, err = run_cli("train", *arguments)
    assert "2 classes (blue, red), 32 training, 4 validation, 4 test images" in out
    assert "epoch 6/6  loss" in out
    assert "images/s" in out
    assert "test accuracy 1.0000" in out
    assert "Traceback" not in err
    _, err = run_cli("train", *arguments, code=1)
    assert err.startswith("error: ")
    assert "holds a run already" in err

    photo = tmp_path / "photos" / "blue" / "3.png"
    out, err = run_cli("predict", run, photo, "--json")
    [prediction] = json.loads(out)
    assert prediction["image"] == str(photo)
    assert [row["class"] for row in prediction["predictions"]] == ["blue", "red"]
    assert sum(row["probability"] for row in prediction["predictions"]) == pytest.approx(1)
    assert "none.png" in error_of("predict", run, tmp_path / "none.png")


def test_unreadable_files_are_named_or_skipped(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(10):
            image = Image.new("RGB", (9, 9), (index, 100 * (name == "a"), 0))
            image.save(tmp_path / "photos" / name / f"{index}.png")
    (tmp_path / "photos" / "a" / "notes.jpg").write_text("no image")
    train = ("train", "--data", f"folder:{tmp_path / 'photos'}", "--out", tmp_path / "run")
    with pytest.raises(ValueError, match=r"--skip-unreadable(.|\n)*notes\.jpg"):
        invoke(*train)
    out = invoke(*train, "--skip-unreadable", "--epochs", 1, "--image-size", 8, "--no-xla")
    assert "1 unreadable skipped" in out
    assert re.search(r"skipped: .*notes\.jpg': \w+", out)
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["data"]["skipped"] == 1
    assert info["options"]["jit_compile"] is False
    out = invoke("evaluate", tmp_path / "run")
    assert "top-1" in out
    assert "top-5" not in out  # of two classes


@pytest.mark.parametrize(
    ("arguments", "expected"), [([], "auto"), (["--xla"], True), (["--no-xla"], False)]
)
def test_xla(monkeypatch, arguments, expected):
    asked = {}
    monkeypatch.setattr(training, "train", lambda *_, **options: asked.update(options))
    invoke("train", "--data", "digits", *arguments)
    assert asked["jit_compile"] == expected


@pytest.mark.parametrize(("text", "expected"), [("24", 24), ("24, 32", (24, 32))])
def test_image_size(monkeypatch, text, expected):
    asked = {}
    monkeypatch.setattr(training, "train", lambda *_, **options: asked.update(options))
    invoke("train", "--data", "digits", "--image-size", text)
    assert asked["image_size"] == expected


@pytest.mark.parametrize("text", ["", "24,", "24x32", "24,32,3", "-24", "24.0", "0", "24,0"])
def test_invalid_image_size(text):
    result = CliRunner().invoke(cli.app, ["train", "--image-size", text])
    assert result.exit_code == 2
    assert f"must be PIXELS or HEIGHT,WIDTH, such as 224,320, not {text!r}" in " ".join(
        result.stderr.split()
    )


def test_a_field_is_given_once(tmp_path):
    twice = ("--batch-size", 64, "--set", "batch_size=32")
    for given in (twice, ("--set", "batch_size=64", *twice[2:])):
        with pytest.raises(ValueError, match=r"batch_size must be given once. Received: 64 and 32"):
            invoke("train", "--data", "digits", "--out", tmp_path / "run", *given)
    with pytest.raises(ValueError, match=r"image_size must be given once. Received: 24 and 32"):
        invoke("data-speed", "--data", "digits", "--image-size", 24, "--set", "image_size=32")


@pytest.mark.parametrize(
    ("options", "size", "batch_size"),
    [
        ((), (16, 16), 32),
        (("--image-size", "24,40", "--set", "batch_size=8"), (24, 40), 8),
        (("--set", "image_size=40", "--batch-size", 8), (40, 40), 8),
    ],
)
def test_data_speed_is_of_what_is_asked(monkeypatch, options, size, batch_size):
    asked = []

    def data_speed(split, image_size, *, batch_size, **_):
        asked.append((image_size, batch_size))
        return DataSpeed((1.0,), ())

    monkeypatch.setattr(speed, "data_speed", data_speed)
    invoke("data-speed", "--data", "digits", "--recipe", "tiny", *options)
    assert asked == [(size, batch_size)]


def test_options_that_turn_something_off_are_taken(monkeypatch):
    """0 and no are values; what is not named stays the recipe's."""
    asked = {}
    monkeypatch.setattr(training, "train", lambda *_, **options: asked.update(options))
    invoke("train", "--data", "digits", "--no-flip", "--label-smoothing", 0, "--warmup", 0)
    fields = {field.name for field in dataclasses.fields(training.Recipe)}
    given = {name: value for name, value in asked.items() if name in fields}
    assert given == {"flip": False, "label_smoothing": 0.0, "warmup": 0.0}


def test_evaluate(digits_run, tmp_path):
    folder = shutil.copytree(digits_run.folder, tmp_path / "run")
    out = invoke("evaluate", folder, "--split", "validation")
    accuracy = digits_run.info["results"]["validation_accuracy"]
    assert f"top-1 {accuracy:.4f}" in out
    assert "top-5" in out
    assert "recall" in out
    folder = folder / "evaluation" / "validation"
    names = {path.name for path in folder.iterdir()}
    assert names == {"evaluation.json", "per_class.csv", "confusion.png", "mistakes.png"}
    assert json.loads((folder / "evaluation.json").read_text())["data"] == "digits"


def test_evaluate_other_images(digits_run, tmp_path):
    folder = shutil.copytree(digits_run.folder, tmp_path / "run")
    digits = load_data("digits").test.dataset.take(200).as_numpy_iterator()
    for index, (image, label) in enumerate(digits):
        path = tmp_path / "photos" / str(label) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    data = f"folder:{tmp_path / 'photos'}"
    out = invoke("evaluate", folder, "--data", data, "--split", "train")
    evaluation = json.loads(
        (folder / "evaluation" / "photos-train" / "evaluation.json").read_text()
    )
    assert evaluation["data"] == data
    assert evaluation["top1"] > 0.9
    assert f"top-1 {evaluation['top1']:.4f}" in out


def test_evaluation_of_the_same_images_at_another_path_is_replaced(digits_run, tmp_path):
    folder = shutil.copytree(digits_run.folder, tmp_path / "run")
    invoke("evaluate", folder)
    path = folder / "evaluation" / "test" / "evaluation.json"
    moved = {**json.loads(path.read_text()), "data": "folder:/elsewhere/../photos", "top1": 0}
    path.write_text(json.dumps(moved))
    invoke("evaluate", folder)
    replaced = json.loads(path.read_text())
    assert replaced["data"] == "digits"
    assert replaced["top1"] > 0.9


def test_evaluation_of_other_data_stays(digits_run, tmp_path):
    folder = shutil.copytree(digits_run.folder, tmp_path / "run")
    path = folder / "evaluation" / "test" / "evaluation.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"data": "folder:/other/photos"}')
    said = error_of("evaluate", folder)
    assert re.search(r"has the result on folder:/other/photos: rename it.*Received: digits", said)
    assert path.read_text() == '{"data": "folder:/other/photos"}'


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            tf.errors.ResourceExhaustedError(None, None, "OOM when allocating"),
            "error: ResourceExhaustedError: OOM when allocating",
        ),
        (
            ModuleNotFoundError("No module named 'x'"),
            "error: No module named 'x'. Install what the command needs: "
            'pip install ".[all]" in a clone of keras-vit',
        ),
    ],
)
def test_error_of_a_library_is_a_message(error, said, monkeypatch):
    def app():
        raise error

    monkeypatch.setattr(cli, "app", app)
    assert error_of().startswith(said)
    monkeypatch.setenv("KERAS_VIT_TRACEBACK", "1")
    with pytest.raises(type(error)):
        cli.main()


def test_mistake_of_ours_is_a_traceback(monkeypatch):
    def app():
        raise KeyError("ours")

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(KeyError):
        error_of()


def test_predict_names_digits(digits_run, tmp_path):
    """Images written to files are classified as they are from the data set."""
    paths, labels = [], []
    for index, (image, label) in enumerate(load_data("digits").test.dataset.take(40)):
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray(image.numpy()).save(paths[-1])
        labels.append(str(int(label)))
    lines = invoke("predict", digits_run.folder, *paths, "--top", 1).splitlines()
    names = [line.rsplit(": ", 1)[1].split()[0] for line in lines]
    assert [line.split(": ")[0] for line in lines] == [str(path) for path in paths]
    assert np.mean([a == b for a, b in zip(names, labels, strict=True)]) > 0.8


@pytest.fixture
def colours(tmp_path, monkeypatch):
    """A folder of a red and a blue image, and one that cannot be read; the run tells colours."""
    images = keras.Input((4, 4, 3))
    means = keras.layers.GlobalAveragePooling2D()(images)
    model = keras.Model(images, means)
    run = types.SimpleNamespace(model=lambda: model, class_names=["red", "green", "blue"])
    monkeypatch.setattr(training, "load_run", lambda folder: run)
    for name, colour in {"a": (9, 0, 0), "c": (0, 0, 9)}.items():
        Image.new("RGB", (6, 5), colour).save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_text("no image")
    return tmp_path


def test_predict_skips_unreadable_files_if_asked(colours):
    with pytest.raises(ValueError, match=r"^1 of 3 images.*--skip-unreadable.*b\.png"):
        invoke("predict", "run", colours)
    with pytest.raises(ValueError, match=r"image files, or folders of them.*none\.png, nothing"):
        invoke("predict", "run", colours, colours / "none.png", "--skip-unreadable")
    result = CliRunner().invoke(
        cli.app, ["predict", "run", str(colours), "--skip-unreadable", "--top", "1"]
    )
    lines = [f"{colours}/a.png: red 1.000", f"{colours}/c.png: blue 1.000"]
    assert result.stdout.splitlines() == lines
    assert re.search(r"skipped: .*b\.png", result.stderr)


@pytest.mark.parametrize("as_json", [False, True])
def test_predict_of_a_file_whose_name_is_no_text(as_json, colours):
    os.rename(colours / "a.png", os.fsencode(colours) + b"/caf\xe9.png")
    options = ("--skip-unreadable", "--top", 1, *["--json"] * as_json)
    assert f"{colours}/caf\ufffd.png" in invoke("predict", "run", colours, *options)


def test_predictions_are_printed_as_they_come(colours, monkeypatch):
    def predict(*_):
        yield [("red", 0.75), ("blue", 0.25)]
        raise MemoryError

    monkeypatch.setattr(evaluation, "predict", predict)
    files = [str(colours / name) for name in ("a.png", "c.png")]
    result = CliRunner().invoke(cli.app, ["predict", "run", *files])
    assert isinstance(result.exception, MemoryError)
    assert result.stdout == f"{files[0]}: red 0.750, blue 0.250\n"


def test_export(digits_run, exported):
    out, folder = exported
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "saved_model",
        "vit_fp32.tflite",
        "vit_fp16.tflite",
        "vit_dynamic_int8.tflite",
        "vit_int8_mixed.tflite",
        "vit_int4.tflite",
        "report.json",
        "report.md",
        "report.png",
        "labels.txt",
    }
    assert (folder / "labels.txt").read_text().split() == digits_run.class_names
    for word in ("saved_model", "fp32", "fp16", "dynamic_int8", "int8_mixed", "agree"):
        assert word in out
        assert word in (folder / "report.md").read_text()
    assert "![Accuracy, latency and size](report.png)" in (folder / "report.md").read_text()
    report = json.loads((folder / "report.json").read_text())
    assert f"{digits_run.info['results']['test_accuracy']:.4f}" in out
    assert report["failures"] == []
    rows = {row["name"]: row for row in report["rows"]}
    assert report["command"].startswith(sys.argv[0])
    for name, exported in report["exports"].items():
        assert (exported["path"], exported["mode"]) == (rows[name]["path"], name)
    assert report["exports"].keys() == rows.keys() - {"keras"}
    assert report["exports"]["fp32"]["output"]["name"] == "probabilities"
    assert rows["int8_mixed"]["partitions"] == 1
    assert min(row["accuracy"] for row in rows.values()) >= 0.97
    assert rows["fp32"]["max_error"] <= 1e-4
    assert rows["fp32"]["path"] == "vit_fp32.tflite"
    for name, agreement in {
        "fp32": 0.99,
        "fp16": 0.99,
        "dynamic_int8": 0.98,
        "int8_mixed": 0.95,
    }.items():
        assert rows[name]["agreement"] >= agreement


def test_exported_saved_model_equals_the_run(digits_run, exported):
    images = np.random.default_rng(0).uniform(0, 255, (3, 16, 16, 3)).astype("float32")
    serve = tf.saved_model.load(str(exported[1] / "saved_model")).signatures["serving_default"]
    expected = digits_run.model().predict(images, verbose=0)
    np.testing.assert_allclose(
        serve(images=tf.constant(images))["logits"], expected, rtol=1e-4, atol=1e-4
    )


def test_export_keeps_what_is_there(digits_run, exported):
    _, folder = exported
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(ValueError, match=r"export exists already"):
        invoke("export", digits_run.folder, "--out", folder)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_file_that_fails_its_check_is_an_error(digits_run, tmp_path, monkeypatch):
    unreachable = {**LIMITS, "fp32": dataclasses.replace(LIMITS["fp32"], agreement=1.01)}
    monkeypatch.setattr("keras_vit.export.LIMITS", unreachable)
    with pytest.raises(ValueError, match=r"fp32: the top-1 class agrees"):
        invoke("export", digits_run.folder, "--out", tmp_path / "x", "--mode", "fp32")
    assert list(tmp_path.iterdir()) == []


def test_layers_are_chosen_by_other_images_than_those_of_the_check(
    digits_run, tmp_path, monkeypatch
):
    class Verified(Exception):
        pass

    asked = {}

    def export_files(run, model, folder, modes, **options):
        asked.update(options, modes=modes)
        return {"int8_full": types.SimpleNamespace(path=folder / "x.tflite")}

    def verify(model, files, images, labels, *, limits, batch_size, exports):
        asked.update(checked=images, checked_labels=labels, limits=limits)
        raise Verified

    monkeypatch.setattr(cli, "export_files", export_files)
    monkeypatch.setattr("keras_vit.export.verify", verify)
    options = ("--max-drop", 0.5, "--min-agreement", 0.9, "--io-dtype", "uint8", "--logits")
    counts = ("--images", 20, "--calibration-images", 7)
    with pytest.raises(Verified):
        invoke("export", digits_run.folder, "--out", tmp_path / "x", *options, *counts)
    data, size = digits_run.data(), (16, 16)
    for found, split, count in (
        ((asked["checked"], asked["checked_labels"]), data.test, 20),
        (asked["held_out"], data.validation, 20),
        ((asked["calibration"], None), data.train, 7),
    ):
        images, labels = spread_images(split, size, count)
        np.testing.assert_array_equal(found[0], images)
        assert found[1] is None or np.array_equal(found[1], labels)
    assert asked["modes"] == NPU_MODES
    assert (asked["max_drop"], asked["min_agreement"], asked["io_dtype"]) == (0.5, 0.9, "uint8")
    assert asked["activation"] is None
    assert {limit.agreement for limit in asked["limits"].values()} == {0.9}
    assert list(tmp_path.iterdir()) == []


def test_export_replaces_exports_alone(digits_run, tmp_path):
    (tmp_path / "photo.jpg").write_text("mine")
    with pytest.raises(ValueError, match=r"is not a folder that `export` wrote"):
        invoke("export", digits_run.folder, "--out", tmp_path, "--overwrite")
    assert (tmp_path / "photo.jpg").read_text() == "mine"


COMMANDS = ("train", "recipes", "data-speed", "evaluate", "predict", "explain", "probe", "export")


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help(command):
    assert "--help" in invoke(*command, "--help")


def test_help_keeps_its_brackets():
    """Neither help nor errors are read as markup."""
    out = invoke("train", "--help")
    assert "(default: runs/DATA)" in out
    assert "tfds:NAME[:CONFIG]" in out
    assert "/no/[red]where[/b]" in error_of("train", "--data", "folder:/no/[red]where[/b]")


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("digits", "digits"),
        ("folder:/a/flowers/", "flowers"),
        ("folder:/a/b/..", "a"),
        ("folder:/", "folder"),
        ("tfrecord:/a/flowers/", "flowers"),
        ("tfrecord:/", "tfrecord"),
        ("tfds:cats_vs_dogs", "cats_vs_dogs"),
        ("tfds:pets:2.0/x", "pets-2.0-x"),
    ],
)
def test_run_name(data, name):
    assert cli.run_name(data) == name


PACKAGES = "{m.split('.')[0] for m in sys.modules}"


def imported(code, before="set()"):
    """Names of the top-level packages in sys.modules after `code`, in a fresh process."""
    code += f"; import json, sys; print(json.dumps(sorted({PACKAGES} - {before})))"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    return set(json.loads(out.splitlines()[-1]))


def test_help_needs_no_backend():
    modules = imported("import sys; sys.argv[0] = '/bin/keras-vit'; import keras_vit.cli")
    assert "typer" in modules
    assert modules.isdisjoint({"keras", "tensorflow", "numpy", "matplotlib"})


def test_the_core_runs_without_tensorflow(tmp_path):
    code = """
import os, sys
os.environ["KERAS_BACKEND"] = "jax"
sys.modules["tensorflow"] = None  # its import is an error
import keras_vit
model = keras_vit.build_vit("Ti/16", image_size=32, num_classes=3)
keras_vit.save_checkpoint(model, sys.argv[1], "timm")
again = keras_vit.from_checkpoint(sys.argv[1])
print(again.predict(__import__("numpy").zeros((2, 32, 32, 3)), verbose=0).shape)
"""
    path = tmp_path / "vit.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=False
    )
    assert done.stdout == "(2, 3)\n", done.stderr


def test_import_of_keras_vit_brings_little_beside_keras():
    keras_alone = f"import keras, json, sys; before = {PACKAGES}"
    added = imported(f"{keras_alone}; import keras_vit", "before")
    light = {"keras_vit", "_distutils_hack", "safetensors", "filelock"}
    assert added <= light | set(sys.stdlib_module_names)
