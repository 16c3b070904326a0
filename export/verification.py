"""Verification: exported files compared with the model that they came from."""

import dataclasses
import functools
import json
import pathlib
import shlex
import statistics
import sys
import types

import keras
import numpy as np
from ai_edge_litert.interpreter import Interpreter

from keras_vit.versions import versions

from .benchmark import available_cores, describe_graph, interleaved, progress_bar
from .precision import as_float32, full_float32
from .report import (
    markdown_table,
    plain,
    size_bytes,
    terminal_tables,
    three_digits,
    write_new_text,
)
from .saved_model import check_pixels, is_headless, output_name


@dataclasses.dataclass(frozen=True)
class Limit:
    """What a file must keep to, compared with the model it was exported from.

    Attributes:
        agreement: smallest share of the images with the same top-1 class, in [0, 1].
        error: largest absolute difference of a logit, in units of max(1, max |logit|) of the
            model; None for no limit.
        relative_error: largest `Comparison.relative_error` of a model without classes; None for
            no limit.
    """

    agreement: float
    error: float | None = None
    relative_error: float | None = None


# The relative errors are 3 to 8 times the largest of models with random weights, of 2 to 6 blocks:
# fp16 0.003, dynamic_int8 0.065 (0.026 with calibration images), int8_mixed 0.076, int4
# 0.13, int8_full 0.075, a16w8 0.013.
LIMITS = types.MappingProxyType(
    {
        "saved_model": Limit(agreement=0.99, error=1e-4),
        "fp32": Limit(agreement=0.99, error=1e-4),
        "fp16": Limit(agreement=0.99, relative_error=0.02),
        "dynamic_int8": Limit(agreement=0.98, relative_error=0.3),
        "int8_mixed": Limit(agreement=0.95, relative_error=0.4),
        "int4": Limit(agreement=0.9, relative_error=0.5),
        "int8_full": Limit(agreement=0.95, relative_error=0.4),
        "a16w8": Limit(agreement=0.98, relative_error=0.1),
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
        relative_error: of a model without classes, of one output or without a head, the root of
            sum (file - model)^2 / sum (model - mean of its outputs over the images)^2: 1 for a
            file that gives that mean for any image. None for a model with classes.
        agreement: share of the images with the same top-1 class as the model; None without
            classes.
        accuracy: share of the images whose top-1 class is the label.
        drop: points of accuracy, in percent, that the model has and the file has not.
        latency_ms_min, latency_ms_median: of one image, on one thread; of a SavedModel on
            TensorFlow's threads.
        latency_ms_min_all_cores, latency_ms_median_all_cores: of one image, of a `.tflite` file
            on as many threads as there are cores.
        operations: number of operations of a `.tflite` file.
        partitions: number of pieces of its graph that XNNPACK takes over; 1 is the goal.
        quantized_share: share of its weights that are integers, in [0, 1].
        failures: what is wrong with it, in sentences.
    """

    name: str
    path: str | None = None
    size_bytes: int | None = None
    max_error: float | None = None
    mean_error: float | None = None
    relative_error: float | None = None
    agreement: float | None = None
    accuracy: float | None = None
    drop: float | None = None
    latency_ms_min: float | None = None
    latency_ms_median: float | None = None
    latency_ms_min_all_cores: float | None = None
    latency_ms_median_all_cores: float | None = None
    operations: int | None = None
    partitions: int | None = None
    quantized_share: float | None = None
    failures: tuple = ()


_QUALITY = ("file", "MB", "max err", "mean err", "agree", "accuracy", "drop", "pass")
_WORST_LAYERS = 10


@dataclasses.dataclass(frozen=True)
class Verification:
    """How exported files compare with their model: one row each, the model's first.

    Attributes:
        rows: tuple of `Comparison`.
        images: number of images compared.
        cores: number of cores that were there to use.
        command: the command line that compared.
        versions: package -> version.
        exports: name of a file -> `ExportReport` on it, for those that have one.
    """

    rows: tuple
    images: int
    cores: int
    command: str
    versions: dict
    exports: dict = dataclasses.field(default_factory=dict)

    @property
    def failures(self):
        """Sentences that say which file fails in what; empty if all pass."""
        return tuple(failure for row in self.rows for failure in row.failures)

    @property
    def notes(self):
        """Sentences about what is not as it could be, and the layers that quantizing costs most."""
        reports = ((name, report) for name, report in self.exports.items() if report)
        return tuple(note for name, report in reports for note in _notes(name, report))

    def check(self):
        """Raises ValueError with all failures if there are any."""
        if self.failures:
            raise ValueError("The export failed its check:\n- " + "\n- ".join(self.failures))

    def relative_to(self, folder):
        """Returns the same with the paths of files below a folder relative to it."""

        def moved(entry):
            if entry is None or entry.path is None:
                return entry
            path = pathlib.Path(entry.path).relative_to(folder).as_posix()
            return dataclasses.replace(entry, path=path)

        exports = {name: moved(report) for name, report in self.exports.items()}
        return dataclasses.replace(self, rows=tuple(map(moved, self.rows)), exports=exports)

    def as_dict(self):
        """Returns rows and failures as plain dictionaries, lists, strings and numbers."""
        return {**plain(self), "failures": list(self.failures)}

    def to_json(self, path, *, overwrite=False):
        """Writes the comparison as JSON. Raises ValueError if `path` exists, unless `overwrite`."""
        write_new_text(path, json.dumps(self.as_dict(), indent=2) + "\n", overwrite)

    def to_markdown(self, path=None, *, plot=None, overwrite=False):
        """Returns the comparison as a Markdown table, and writes it if `path` is given.

        Args:
            path: file to write.
            plot: path of a picture to show, relative to the file.
            overwrite: whether an existing file may be replaced.

        Raises:
            ValueError: if `path` exists and `overwrite` is False.
        """
        text = markdown_table(self._columns(), map(_cells, self.rows))
        text += f"\n{self._caption()}\n\nCommand: `{self.command}`\n"
        lines = [*self.failures, *self.notes]
        text += "\n" * bool(lines) + "".join(f"- {line}\n" for line in lines)
        if plot is not None:
            text += f"\n![Accuracy, latency and size]({plot})\n"
        if path is not None:
            write_new_text(path, text, overwrite)
        return text

    def table(self):
        """Returns the comparison as what rich prints: one table of quality, one of speed."""
        columns, rows = self._columns(), list(map(_cells, self.rows))
        failing = [row.name for row in self.rows if row.failures]
        return terminal_tables(columns, rows, len(_QUALITY), [self._caption()], failing)

    def plot(self, path, *, overwrite=False):
        """Draws accuracy against latency, the size as area, and the most sensitive layers.

        Without labels, and so accuracies, the top-1 agreement with the model takes their place.

        Args:
            path: file to write; its suffix, such as `.png` or `.svg`, says the format.
            overwrite: whether an existing file may be replaced.

        Raises:
            ValueError: if nothing was timed, `path` exists and `overwrite` is False, or it has an
                unknown suffix.
        """
        from .plots import draw_files, draw_sensitivity, save_panels

        model, *_ = self.rows
        known = "agreement" if model.accuracy is None else "accuracy"
        files = [
            (row.name, row.size_bytes, latencies, getattr(row, known))
            for row in self.rows
            if (latencies := self._latencies(row))
        ]
        if not files:
            raise ValueError("A plot needs latencies: verify with rounds >= 1. Received: none.")
        label = f"top-1 {known}"
        panels = [functools.partial(draw_files, files=files, label=label, reference=model.accuracy)]
        for name, report in self.exports.items():
            if report and report.sensitivity:
                panels.append(functools.partial(draw_sensitivity, name=name, report=report))
        save_panels(path, panels, overwrite=overwrite)

    def _latencies(self, row):
        """Threads -> ms of a row; TensorFlow runs a SavedModel on all cores."""
        if row.latency_ms_min is None:
            return {}
        if row.latency_ms_min_all_cores is None:
            return {self.cores: row.latency_ms_min}
        return {1: row.latency_ms_min, self.cores: row.latency_ms_min_all_cores}

    def _columns(self):
        latencies = [f"{ms} x{n}" for n in (1, self.cores) for ms in ("ms", "med")]
        return [*_QUALITY, *latencies, "ops", "parts", "int"]

    def _caption(self):
        return (
            f"{self.images} images, compared with the model in float32; drop: points of accuracy "
            "lost. ms xN, med xN: one image on N threads, minimum and median, the files in turns; "
            "SavedModel on TensorFlow's threads. parts: pieces of the graph that XNNPACK takes "
            "over; int: share of the weights that are integers."
        )


def _cells(row):
    """Formats a row; a dash for what was not measured."""
    size = None if row.size_bytes is None else row.size_bytes / 1e6
    latencies = (row.latency_ms_min, row.latency_ms_median)
    latencies += (row.latency_ms_min_all_cores, row.latency_ms_median_all_cores)
    return [
        row.name,
        _cell(size, three_digits),
        *(_cell(error, "{:.1e}".format) for error in (row.max_error, row.mean_error)),
        *(_cell(share, "{:.4f}".format) for share in (row.agreement, row.accuracy)),
        _cell(row.drop, "{:.2f}".format),
        "FAIL" if row.failures else "ok",
        *(_cell(latency, three_digits) for latency in latencies),
        *(_cell(count, str) for count in (row.operations, row.partitions)),
        _cell(row.quantized_share, "{:.0%}".format),
    ]


def _cell(value, form):
    return "-" if value is None else form(value)


def _notes(name, report):
    if report.note:
        yield f"{name}: {report.note}."
    if report.fallback:
        layers = (f"{layer} ({precision})" for layer, precision in report.fallback.items())
        yield f"{name}: left at a higher precision are {', '.join(layers)}."
    if report.sensitivity:
        worst = sorted(report.sensitivity.items(), key=lambda item: item[1])[:_WORST_LAYERS]
        layers = (f"{layer} {ratio:.1f} dB" for layer, ratio in worst)
        yield (
            f"{name}: the layers that quantization costs most, by the signal-to-noise ratio of the "
            f"outputs with that layer alone quantized: {', '.join(layers)}."
        )


def verify(
    model,
    files,
    images,
    labels=None,
    *,
    limits=LIMITS,
    batch_size=32,
    rounds=30,
    seconds=5.0,
    exports=None,
):
    """Runs a model and files exported from it on the same images and compares their logits.

    The latencies are interleaved: every round times each file once on one image, so that a
    disturbance of the machine meets all of them alike; first on one thread, then the `.tflite`
    files on all cores.

    Args:
        model: the `keras.Model`, or the path of a file, that the others are compared with. A
            model of another dtype policy computes in float32 here, as its files do.
        files: mapping of names to paths. A path is a SavedModel folder or a `.tflite` file with
            one input (1, H, W, C) and one output (1, classes), of float32, uint8 or int8; an
            output named `probabilities` is compared with the softmax of the model's logits, if
            the model gives these. A name that `limits` has must keep to that limit; for any other
            name it is enough that all outputs are finite.
        images: float or uint8 array (N, H, W, C), as the model takes them.
        labels: optional integer array (N,) of classes, for the accuracies; None for a model of one
            output or without a head.
        limits: mapping of names to `Limit`.
        batch_size: images that the model and SavedModels take at a time.
        rounds: number of timings of each file; 0 for none.
        seconds: the timing on a number of threads stops after the round that passes this time.
        exports: optional mapping of names of `files` to the `ExportReport` on them, or None, for
            the comparison to hold.

    Returns:
        A `Verification`. Call its `check()` to raise on failures.

    Raises:
        TypeError: if `images` or `labels` have another dtype.
        ValueError: if there are no files, a path is missing or of another kind, `exports` names
            another file, the shapes of images, labels, files and model do not fit each other,
            there are labels for a model without classes, or the images are in [0, 1] where the
            model takes [0, 255].
    """
    images = _check_images(images)
    paths = {name: _check_path(path) for name, path in dict(files).items()}
    if not paths:
        raise ValueError(f"`files` must map names to paths. Received: files={files!r}.")
    if isinstance(model, keras.Model):
        check_pixels("images", images, model)
    exports = dict(exports or {})
    if unknown := sorted(exports.keys() - paths.keys()):
        raise ValueError(f"`exports` must be of names of {sorted(paths)}. Received: {unknown}.")
    with progress_bar() as progress, full_float32():
        task = progress.add_task("Verifying", total=len(images) * (len(paths) + 1) + 2 * rounds)

        def outputs(source):
            run = _runner(source, images.shape[1:], available_cores())
            return _run_all(run, images, batch_size, lambda n: progress.advance(task, n))

        expected = outputs(model)
        classes = _has_classes(model, expected)
        labels = _check_labels(labels, expected, classes)
        rows = [_reference_row(model, expected, labels)]
        for name, path in paths.items():
            pair = _alike(path, outputs(path), model, expected)
            rows.append(_compare(name, path, *pair, labels, limits.get(name), classes))
        timings = _latencies(paths, images[:1], rounds, seconds, lambda: progress.advance(task))
    first, *others = rows
    others = [
        dataclasses.replace(row, drop=_drop(first, row), **timings.get(row.name, {}))
        for row in others
    ]
    return Verification(
        rows=(first, *others),
        images=len(images),
        cores=available_cores(),
        command=shlex.join(sys.argv),
        versions=versions(),
        exports=exports,
    )


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


def _check_labels(labels, expected, has_classes):
    if labels is None:
        return None
    if not has_classes:
        raise ValueError(
            "`labels` must be None for a model of one output or without a head. Received: labels "
            f"and outputs of shape {expected.shape}."
        )
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
    if len(dtypes) != 2 or not set(dtypes) <= {np.float32, np.uint8, np.int8}:
        raise ValueError(
            "A `.tflite` file must have one input and output of float32, uint8 or int8. Received: "
            f"path='{path}' with {len(inputs)} inputs and {len(outputs)} outputs of dtypes "
            f"{[np.dtype(dtype).name for dtype in dtypes]}."
        )

    def run(images):
        logits = []
        for image in images:
            interpreter.set_tensor(inputs[0]["index"], _quantized(image[None], inputs[0]))
            interpreter.invoke()
            output = interpreter.get_tensor(outputs[0]["index"])[0]
            logits.append(_dequantized(output, outputs[0]))
        return np.stack(logits)

    return inputs[0]["shape"].tolist(), run


def _quantized(values, details):
    """Float values as a tensor holds them."""
    if details["dtype"] == np.float32:
        return values
    scale, zero_point = details["quantization"]
    limits = np.iinfo(details["dtype"])
    integers = np.rint(values / scale) + zero_point
    return np.clip(integers, limits.min, limits.max).astype(limits.dtype)


def _dequantized(values, details):
    """What the values of a tensor stand for."""
    if details["dtype"] == np.float32:
        return values
    scale, zero_point = details["quantization"]
    return np.float32(scale) * (values.astype("float32") - zero_point)


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
    """Whether a model ends in a softmax or sigmoid, or a file names its output so."""
    if isinstance(source, keras.Model):
        return output_name(source) == "probabilities"
    return _output_names(pathlib.Path(source)) == ["probabilities"]


def _output_names(path):
    """The names of what `serving_default` of a file gives."""
    if path.is_dir():
        from tensorflow.core.protobuf import saved_model_pb2

        graphs = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())
        return list(graphs.meta_graphs[0].signature_def["serving_default"].outputs)
    signatures = Interpreter(model_path=str(path)).get_signature_list()
    return signatures.get("serving_default", {"outputs": []})["outputs"]


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


def _has_classes(model, outputs):
    """Whether the largest output says something: not of one output, nor of features."""
    headless = isinstance(model, keras.Model) and is_headless(model)
    return outputs.shape[-1] > 1 and not headless


def _compare(name, path, logits, expected, labels, limit, classes):
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
        relative_error=None if classes else _relative_error(logits, expected),
        agreement=float(np.mean(logits.argmax(-1) == expected.argmax(-1))) if classes else None,
        accuracy=_accuracy(logits, labels),
        **_graph(path),
    )
    scale = max(1.0, float(np.abs(expected).max()))
    failures = _non_finite(name, logits) + _beyond(row, limit, scale, len(logits))
    return dataclasses.replace(row, failures=failures)


def _relative_error(outputs, expected):
    """What `Comparison.relative_error` says; of one image, in units of its outputs themselves."""
    signal = expected - expected.mean(axis=0) if len(expected) > 1 else expected
    error, scale = (float(np.linalg.norm(x)) for x in (outputs - expected, signal))
    if error == 0:
        return 0.0
    return error / scale if np.isfinite(error) and scale else float("inf")


def _graph(path):
    """The fields on the graph of a `.tflite` file."""
    if path.is_dir():
        return {}
    facts = describe_graph(path)
    return {
        "operations": sum(facts.ops.values()),
        "partitions": facts.partitions,
        "quantized_share": facts.quantized_share,
    }


def _drop(model, row):
    return None if row.accuracy is None else 100 * (model.accuracy - row.accuracy)


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
    if row.agreement is None:
        if limit.relative_error is not None and not row.relative_error <= limit.relative_error:
            failures.append(
                f"{row.name}: the outputs differ from the model's by {row.relative_error:.3g} of "
                f"what these differ from their mean; at most {limit.relative_error:.3g} is allowed."
            )
    elif not row.agreement >= limit.agreement:
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
    fields = {name: {} for name in paths}
    files = {name: path for name, path in paths.items() if not path.is_dir()}
    for turn, threads, suffix in ((paths, 1, ""), (files, available_cores(), "_all_cores")):
        times = _times(turn, image, threads, rounds, seconds, advance)
        for name, ms in times.items():
            fields[name][f"latency_ms_min{suffix}"] = min(ms)
            fields[name][f"latency_ms_median{suffix}"] = statistics.median(ms)
    return fields


def _times(paths, image, threads, rounds, seconds, advance):
    runs = {
        name: functools.partial(_runner(path, image.shape[1:], threads), image)
        for name, path in paths.items()
    }
    return interleaved(runs, rounds, seconds, advance)
