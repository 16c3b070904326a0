"""Verification: exported files compared with the model that they came from."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import types

import keras
import numpy as np
from ai_edge_litert.interpreter import Interpreter
from rich.box import SIMPLE_HEAD
from rich.table import Table

from keras_vit.versions import versions

from .benchmark import interleaved, progress_bar
from .precision import as_float32
from .report import plain, size_bytes, write_new_text


@dataclasses.dataclass(frozen=True)
class Limit:
    """What a file must keep to, compared with the model it was exported from.

    Attributes:
        agreement: smallest share of the images with the same top-1 class, in [0, 1].
        error: largest absolute difference of a logit, in units of max(1, max |logit|) of the
            model; None for no limit.
    """

    agreement: float
    error: float | None = None


LIMITS = types.MappingProxyType(
    {
        "saved_model": Limit(agreement=0.99, error=1e-4),
        "fp32": Limit(agreement=0.99, error=1e-4),
        "fp16": Limit(agreement=0.99),
        "dynamic_int8": Limit(agreement=0.98),
        "int8_mixed": Limit(agreement=0.95),
        "int4": Limit(agreement=0.9),
    }
)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One row of a `Verification`; what was not measured is None.

    Attributes:
        name: name of the file, or "keras" for the model itself.
        path: the file; None for the model.
        size_bytes: size of the file or folder.
        max_error, mean_error: absolute differences of the logits, or of the probabilities for a
            file that gives these; infinite where one is not finite.
        agreement: share of the images with the same top-1 class as the model.
        accuracy: share of the images whose top-1 class is the label.
        latency_ms_min, latency_ms_median: of one image.
        failures: what is wrong with it, in sentences.
    """

    name: str
    path: str | None = None
    size_bytes: int | None = None
    max_error: float | None = None
    mean_error: float | None = None
    agreement: float | None = None
    accuracy: float | None = None
    latency_ms_min: float | None = None
    latency_ms_median: float | None = None
    failures: tuple = ()


_COLUMNS = ("file", "MB", "max err", "mean err", "agree", "accuracy", "ms min", "ms med")


@dataclasses.dataclass(frozen=True)
class Verification:
    """How exported files compare with their model: one row each, the model's first.

    Attributes:
        rows: tuple of `Comparison`.
        images: number of images compared.
        versions: package -> version.
    """

    rows: tuple
    images: int
    versions: dict

    @property
    def failures(self):
        """Sentences that say which file fails in what; empty if all pass."""
        return tuple(failure for row in self.rows for failure in row.failures)

    def check(self):
        """Raises ValueError with all failures if there are any."""
        if self.failures:
            raise ValueError("The export failed its check:\n- " + "\n- ".join(self.failures))

    def relative_to(self, folder):
        """Returns the same with the paths of files below a folder relative to it."""
        rows = tuple(
            row if row.path is None else dataclasses.replace(row, path=_relative(row.path, folder))
            for row in self.rows
        )
        return dataclasses.replace(self, rows=rows)

    def as_dict(self):
        """Returns rows and failures as plain dictionaries, lists, strings and numbers."""
        return {**plain(self), "failures": list(self.failures)}

    def to_json(self, path, *, overwrite=False):
        """Writes the comparison as JSON. Raises ValueError if `path` exists, unless `overwrite`."""
        write_new_text(path, json.dumps(self.as_dict(), indent=2) + "\n", overwrite)

    def to_markdown(self, path=None, *, overwrite=False):
        """Returns the comparison as a Markdown table, and writes it if `path` is given.

        Raises:
            ValueError: if `path` exists and `overwrite` is False.
        """
        columns = (*_COLUMNS, "pass")
        lines = [columns, ["---", *["---:"] * (len(columns) - 2), "---"], *map(_cells, self.rows)]
        text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        text += f"\n{self._caption()}\n"
        text += "".join(f"- {failure}\n" for failure in self.failures)
        if path is not None:
            write_new_text(path, text, overwrite)
        return text

    def table(self):
        """Returns the comparison as a `rich.table.Table`."""
        table = Table(
            caption=self._caption(), box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
        )
        for column in _COLUMNS:
            table.add_column(column, justify="left" if column == "file" else "right", no_wrap=True)
        table.add_column("pass")
        for row in self.rows:
            table.add_row(*_cells(row), style="red" if row.failures else None)
        return table

    def _caption(self):
        return (
            f"{self.images} images, compared with the model in float32. Latency of one image: "
            ".tflite on one thread, SavedModel on TensorFlow's threads."
        )


def _relative(path, folder):
    return pathlib.Path(path).relative_to(folder).as_posix()


def _cells(row):
    """Formats a row; a dash for what was not measured."""
    size = None if row.size_bytes is None else row.size_bytes / 1e6
    values = (size, row.max_error, row.mean_error, row.agreement, row.accuracy)
    values += (row.latency_ms_min, row.latency_ms_median)
    formats = ("{:.3g}", "{:.1e}", "{:.1e}", "{:.4f}", "{:.4f}", "{:.3g}", "{:.3g}")
    cells = ["-" if v is None else f.format(v) for f, v in zip(formats, values, strict=True)]
    return [row.name, *cells, "FAIL" if row.failures else "ok"]


def verify(
    model, files, images, labels=None, *, limits=LIMITS, batch_size=32, rounds=30, seconds=5.0
):
    """Runs a model and files exported from it on the same images and compares their logits.

    The latencies are interleaved: every round times each file once on one image, so that a
    disturbance of the machine meets all of them alike.

    Args:
        model: the `keras.Model`, or the path of a file, that the others are compared with. A
            model of another dtype policy computes in float32 here, as its files do.
        files: mapping of names to paths. A path is a SavedModel folder or a `.tflite` file with
            one float32 input (1, H, W, C) and one float32 output (1, classes); if it is named
            `probabilities`, it is compared with the softmax of the model's logits. A name that
            `limits` has must keep to that limit; for any other name it is enough that all
            outputs are finite.
        images: float or uint8 array (N, H, W, C), as the model takes them.
        labels: optional integer array (N,) of classes, for the accuracies.
        limits: mapping of names to `Limit`.
        batch_size: images that the model and SavedModels take at a time.
        rounds: number of timings of each file; 0 for none.
        seconds: the timing stops after the round that passes this time.

    Returns:
        A `Verification`. Call its `check()` to raise on failures.

    Raises:
        TypeError: if `images` or `labels` have another dtype.
        ValueError: if there are no files, a path is missing or of another kind, or the shapes
            of images, labels, files and model do not fit each other.
    """
    images = _check_images(images)
    paths = {name: _check_path(path) for name, path in dict(files).items()}
    if not paths:
        raise ValueError(f"`files` must map names to paths. Received: files={files!r}.")
    with progress_bar() as progress, _full_float32():
        task = progress.add_task("Verifying", total=len(images) * (len(paths) + 1) + rounds)

        def outputs(source):
            run = _runner(source, images.shape[1:], os.cpu_count())
            return _run_all(run, images, batch_size, lambda n: progress.advance(task, n))

        expected = outputs(model)
        labels = _check_labels(labels, expected)
        rows = [_reference_row(model, expected, labels)]
        for name, path in paths.items():
            pair = _alike(path, outputs(path), model, expected)
            rows.append(_compare(name, path, *pair, labels, limits.get(name)))
        timings = _latencies(paths, images[:1], rounds, seconds, lambda: progress.advance(task))
    rows = [dataclasses.replace(row, **timings.get(row.name, {})) for row in rows]
    return Verification(rows=tuple(rows), images=len(images), versions=versions())


@contextlib.contextmanager
def _full_float32():
    """Keeps GPUs from rounding float32 products to TensorFloat-32, which costs three digits."""
    import tensorflow as tf

    settings = tf.config.experimental
    before = settings.tensor_float_32_execution_enabled()
    settings.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        settings.enable_tensor_float_32_execution(before)


def _check_images(images):
    images = np.asarray(images)
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise TypeError(f"`images` must be float or uint8. Received: dtype={images.dtype}.")
    if images.ndim != 4 or not len(images):
        raise ValueError(
            f"`images` must have the shape (N, H, W, C), N >= 1. Received: shape={images.shape}."
        )
    return images


def _check_path(path):
    path = pathlib.Path(path)
    if (path / "saved_model.pb").is_file() or (path.suffix == ".tflite" and path.is_file()):
        return path
    raise ValueError(
        "A file to verify must be a SavedModel folder or a `.tflite` file. Received: "
        f"path='{path}', which is {'another kind' if path.exists() else 'missing'}."
    )


def _check_labels(labels, expected):
    if labels is None:
        return None
    labels = np.asarray(labels)
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"`labels` must be integers. Received: dtype={labels.dtype}.")
    count, classes = expected.shape
    if labels.shape != (count,) or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"`labels` must be {count} classes in [0, {classes}), one per image. Received: "
            f"shape={labels.shape}, values from {labels.min()} to {labels.max()}."
        )
    return labels


def _runner(source, image_shape, threads):
    """Returns a function from float32 images (n, H, W, C) to logits (n, classes).

    Args:
        source: a `keras.Model` or a path.
        image_shape: (H, W, C) of the images, which must be what the source takes.
        threads: number of threads of a `.tflite` file.
    """
    if isinstance(source, keras.Model):
        name, shape, run = "the model", source.inputs[0].shape, _keras_runner(source)
    else:
        name = _check_path(source)
        shape, run = (_saved_model if name.is_dir() else _tflite)(str(name), threads)
    if tuple(shape[1:]) != tuple(image_shape):
        raise ValueError(
            f"`images` must have the shape (N, H, W, C) that {name} takes, {tuple(shape)}. "
            f"Received: images of shape (N, {', '.join(map(str, image_shape))})."
        )
    return run


def _keras_runner(model):
    model = as_float32(model)
    return lambda images: keras.ops.convert_to_numpy(model(images, training=False))


def _saved_model(path, threads):
    import tensorflow as tf

    loaded = tf.saved_model.load(path)
    serve = loaded.signatures["serving_default"]
    (name, spec), *_ = serve.structured_input_signature[1].items()

    def run(images, loaded=loaded):  # `loaded` keeps the variables of the signature alive
        (logits,) = serve(**{name: tf.constant(images)}).values()
        return logits.numpy()

    return spec.shape.as_list(), run


def _tflite(path, threads):
    interpreter = Interpreter(model_path=path, num_threads=threads)
    interpreter.allocate_tensors()
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
    dtypes = [details["dtype"] for details in inputs + outputs]
    if dtypes != [np.float32, np.float32]:
        raise ValueError(
            f"A `.tflite` file must have one float32 input and output. Received: path='{path}' "
            f"with {len(inputs)} inputs and {len(outputs)} outputs of dtypes "
            f"{[np.dtype(dtype).name for dtype in dtypes]}."
        )

    def run(images):
        logits = []
        for image in images:
            interpreter.set_tensor(inputs[0]["index"], image[None])
            interpreter.invoke()
            logits.append(interpreter.get_tensor(outputs[0]["index"])[0])
        return np.stack(logits)

    return inputs[0]["shape"].tolist(), run


def _run_all(run, images, batch_size, advance):
    logits = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size].astype("float32")
        logits.append(run(batch))
        advance(len(batch))
    return np.concatenate(logits)


def _alike(path, outputs, model, expected):
    """The outputs of a file and of the model, both as probabilities if one of them gives these."""
    of_file, of_model = _gives_probabilities(path), _gives_probabilities(model)
    if of_file and not of_model:
        expected = _softmax(expected)
    elif of_model and not of_file:
        outputs = _softmax(outputs)
    return outputs, expected


def _gives_probabilities(source):
    """Whether it is a `.tflite` file that was exported with a softmax behind the logits."""
    if isinstance(source, keras.Model) or pathlib.Path(source).suffix != ".tflite":
        return False
    signatures = Interpreter(model_path=str(source)).get_signature_list()
    return any(signature["outputs"] == ["probabilities"] for signature in signatures.values())


def _softmax(logits):
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def _reference_row(model, logits, labels):
    """The model's own row: a model that gives NaN cannot vouch for any file."""
    is_model = isinstance(model, keras.Model)
    path = None if is_model else str(model)
    name = "keras" if is_model else "reference"
    failures = _non_finite(name, logits)
    size = None if is_model else size_bytes(model)
    accuracy = _accuracy(logits, labels)
    return Comparison(name, path, size, accuracy=accuracy, failures=failures)


def _compare(name, path, logits, expected, labels, limit):
    """Returns the row of one file, latencies aside."""
    if logits.shape != expected.shape:
        raise ValueError(
            f"'{name}' must give logits of shape {expected.shape}, as the model does. Received: "
            f"shape {logits.shape} from '{path}'."
        )
    errors = np.abs(logits - expected)
    errors = np.where(np.isfinite(errors), errors, np.inf)
    row = Comparison(
        name=name,
        path=str(path),
        size_bytes=size_bytes(path),
        max_error=float(errors.max()),
        mean_error=float(errors.mean()),
        agreement=float(np.mean(logits.argmax(-1) == expected.argmax(-1))),
        accuracy=_accuracy(logits, labels),
    )
    scale = max(1.0, float(np.abs(expected).max()))
    failures = _non_finite(name, logits) + _beyond(row, limit, scale, len(logits))
    return dataclasses.replace(row, failures=failures)


def _accuracy(logits, labels):
    return None if labels is None else float(np.mean(logits.argmax(-1) == labels))


def _non_finite(name, logits):
    bad = int(np.sum(~np.isfinite(logits)))
    return (f"{name}: {bad} of {logits.size} logits are not finite.",) if bad else ()


def _beyond(row, limit, scale, images):
    """Sentences for the limits that a row does not keep to, written so that NaN fails them."""
    failures = []
    if limit is None:
        return ()
    if limit.error is not None and not row.max_error <= limit.error * scale:
        failures.append(
            f"{row.name}: a logit differs from the model's by {row.max_error:.3g}; at most "
            f"{limit.error * scale:.3g} is allowed."
        )
    if not row.agreement >= limit.agreement:
        failures.append(
            f"{row.name}: the top-1 class agrees with the model's on {row.agreement:.2%} of "
            f"{images} images; at least {limit.agreement:.2%} is required."
        )
    return tuple(failures)


def _latencies(paths, image, rounds, seconds, advance):
    """Times one image through every file, in turns; returns name -> latency fields."""
    if rounds < 1:
        return {}
    image = image.astype("float32")
    runs = {
        name: functools.partial(_runner(path, image.shape[1:], threads=1), image)
        for name, path in paths.items()
    }
    times = interleaved(runs, rounds, seconds, advance)
    return {
        name: {"latency_ms_min": min(ms), "latency_ms_median": statistics.median(ms)}
        for name, ms in times.items()
    }
