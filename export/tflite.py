"""Export to `.tflite`: static batch 1, float32 images in, builtin operations only."""

import dataclasses
import gc
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import warnings

import numpy as np
import tensorflow as tf

from keras_vit.files import replacing

from .benchmark import progress_bar
from .deployment import deploy
from .equalization import equalize, fit_float16
from .metadata import add_metadata, with_labels
from .precision import as_float32, full_float32
from .report import ExportReport, describe_tflite
from .saved_model import (
    check_labels,
    check_model,
    check_pixels,
    check_target,
    ends_in_softmax,
    gives_logits,
    is_headless,
    normalizes,
    output_name,
    write_endpoints,
)
from .verification import LIMITS

CPU_MODES = ("fp32", "fp16", "dynamic_int8", "int8_mixed", "int4")
NPU_MODES = ("int8_full", "a16w8")  # slow on a CPU
MODES = CPU_MODES + NPU_MODES
_CALIBRATED_MODES = ("int8_mixed", "int4", *NPU_MODES)  # they cannot do without images
_QUANTIZED_MODES = ("dynamic_int8", *_CALIBRATED_MODES)
_8_BIT_PROBABILITIES = ("int8_mixed", "int8_full")
_EQUALIZED_MODES = ("dynamic_int8", "int8_mixed", *NPU_MODES)

# TensorFlow and Keras import these three where they are installed, a third of the time that the
# process takes to start. The conversion needs none of them; None stands for "not installed".
_CONVERT = """
import sys
sys.modules.update(dict.fromkeys(("jax", "matplotlib", "sklearn")))
from keras_vit.export.convert import main
main()
"""

_LARGEST = 2**31  # bytes of a graph that TensorFlow serializes, as of a flatbuffer


def export_tflite(
    model,
    path,
    *,
    mode="dynamic_int8",
    calibration=None,
    labels=None,
    activation=None,
    io_dtype="float32",
    held_out=None,
    max_drop=None,
    min_agreement=None,
    overwrite=False,
):
    """Exports a Keras classifier as a `.tflite` file for LiteRT.

    The file holds the signature `serving_default`: float32 `images` (1, height, width, channels)
    -> float32 (1, classes), named `logits`, or `probabilities` behind a softmax or sigmoid, this
    function's or the model's own, whatever the dtype policy of the model. It uses builtin
    operations only, so it needs no Flex delegate.

    | mode           | weights                   | arithmetic on a CPU                     | size |
    |----------------|---------------------------|-----------------------------------------|------|
    | `fp32`         | float32                   | float32                                 | 1    |
    | `fp16`         | float16                   | float16 on ARMv8.2, else float32        | 1/2  |
    | `dynamic_int8` | int8, one scale a channel | int8 in dense layers, else float32      | 1/4  |
    | `int8_mixed`   | int8, one scale a channel | int8 in dense layers and attention,     | 1/4  |
    |                |                           | whose ranges calibration fixes, from    |      |
    |                |                           | the layer for q, k, v on; else float32  |      |
    | `int4`         | int4, one scale to 32     | int8 in dense layers, else float32      | 1/6  |
    | `int8_full`    | int8, one scale a channel | integers only, for NPUs: int8, norms    | 1/4  |
    |                |                           | and residual stream int16; CPUs: slow   |      |
    | `a16w8`        | int8, one scale a channel | int16 only, for NPUs; CPUs: very slow   | 1/4  |

    A model of `build_vit`, with its own head or another, and a model that has one as a layer, are
    written anew for it (see `graph.py`): one piece for a delegate, at most rank 4. Other Keras
    models are converted layer by layer; a warning and the report's `note` say so.

    A model that normalises pixels in [0, 255] itself also gets metadata. Of RGB models MediaPipe's
    ImageClassifier reads it; it reports the outputs as scores, so give it `activation="softmax"`.

    Args:
        model: functional `keras.Model`, images (B, H, W, C) -> logits (B, classes), without a
            softmax of its own if `activation` adds one.
        path: file to write; ends in `.tflite`.
        mode: one of `MODES`.
        calibration: images as the model takes them, an array (N, H, W, C) or a `tf.data.Dataset`
            of images or batches of images, labels beside them or not; some 64 of the training set.
            `dynamic_int8` is nearer to the model with them, `fp32` and `fp16` take no notice; the
            others need them.
        labels: optional sequence of class names, written into the file and the report.
        activation: "softmax" puts one behind the model's logits, of two classes or more; None
            leaves them as they are.
        io_dtype: "float32", or "uint8" or "int8", with the modes for NPUs: type of the images and
            of the output. The file says what an integer stands for (scale and zero point); pixels
            are fed to uint8 as they are, if the model normalises them itself.
        held_out: images as the model takes them (N, H, W, C) and their labels `(N,)`, integers,
            that neither trained nor calibrated it; with `max_drop`.
        max_drop: how many percent of the held-out images a quantized file may get wrong more than
            the float32 one. Where a mode loses more, the layers that cost most get a higher
            precision, as few as hold it; the report says what each layer costs, and which did.
        min_agreement: for how large a share of images, a in [0, 1], the file must also name the
            float32 file's class; with `max_drop`. None: what `LIMITS` has for the mode. Of the N
            held-out images it must for one standard error more, sqrt(a (1 - a) / N), so that it
            most likely does for others, too.
        overwrite: whether an existing file may be replaced.

    Returns:
        An `ExportReport`.

    Raises:
        TypeError: if `model` is not a `keras.Model`, `labels` are not strings, or the labels of
            `held_out` are not integers.
        ValueError: if `mode` or `activation` is unknown, `activation` or `max_drop` are given for
            a model of one output or without a head, `path` has another suffix or exists, the
            model has several inputs or outputs, sizes that are not static, a `call` of its own
            class, quantized weights or 2 GiB of them, the number of `labels` is not the number of
            classes, the calibration images are missing, of another shape, not finite, or in
            [0, 1] where the model takes [0, 255], `io_dtype` does not go with the mode,
            `held_out` is missing or does not fit the model, `min_agreement` is not in [0, 1], or
            no choice of layers holds it and `max_drop`.
        RuntimeError: if the conversion fails.
        OSError: if the disk is full, say. What was at `path` is still there, whatever fails.

    Warns:
        UserWarning: the model is converted layer by layer.
    """
    if mode not in MODES:
        raise ValueError(f"`mode` must be one of {MODES}. Received: mode={mode!r}.")
    if activation not in (None, "softmax"):
        raise ValueError(
            f'`activation` must be None or "softmax". Received: activation={activation!r}.'
        )
    check_model(model)
    has_classes = model.outputs[0].shape[-1] > 1 and not is_headless(model)
    for name, value in (("activation", activation), ("max_drop", max_drop)):
        if value is not None and not has_classes:
            raise ValueError(
                f"`{name}` must be None for a model of one output or without a head. Received: "
                f"{name}={value!r} and a model of {model.outputs[0].shape[-1]} outputs."
            )
    if activation is not None and not gives_logits(model):
        raise ValueError(
            "`activation` must be None for a model that ends in a softmax or sigmoid. Received: "
            f"activation={activation!r}."
        )
    if quantized := sorted({w.dtype for w in model.weights} & {"int8", "uint8"}):
        raise ValueError(
            "`model` must have float weights, which `mode` says how to quantize. Received: a model "
            f"with weights of {' and '.join(quantized)}, as `keras.Model.quantize` makes them."
        )
    if 4 * model.count_params() >= _LARGEST:
        raise ValueError(
            f"`model` must have less than {_LARGEST // 4:,} weights, 2 GiB in float32: no more go "
            f"into a .tflite file. Received: a model with {model.count_params():,}."
        )
    labels = check_labels(labels, model)
    path = pathlib.Path(path)
    if path.suffix != ".tflite":
        raise ValueError(f"`path` must end in `.tflite`. Received: path='{path}'.")
    check_target(path, overwrite, pathlib.Path.is_file, "a file")
    job = {"mode": mode, "activation": activation, "io_dtype": io_dtype, "max_drop": max_drop}
    job["output"] = output_name(model) if activation is None else "probabilities"
    job["gives_probabilities"] = activation is not None or ends_in_softmax(model)
    job["min_agreement"] = LIMITS[mode].agreement if min_agreement is None else min_agreement
    _check_io_dtype(io_dtype, mode)
    arrays = {"images": _calibration_images(calibration, mode, model.inputs[0].shape[1:])}
    arrays |= _held_out(held_out, max_drop, mode, model)
    for name, key in (("calibration", "images"), ("held_out", "held_out")):
        if arrays.get(key) is not None:
            check_pixels(name, arrays[key], model)
    if min_agreement is not None and (max_drop is None or not 0 <= min_agreement <= 1):
        raise ValueError(
            "`min_agreement` must be in [0, 1], and goes with `max_drop`. Received: "
            f"min_agreement={min_agreement}, max_drop={max_drop}."
        )
    with full_float32():
        deployment = _for_mode(deploy(as_float32(model)), mode, arrays["images"])
    if deployment.note:
        warnings.warn(f"{path}: {deployment.note}.", stacklevel=2)
    with replacing(path) as output:
        job["normalizes"] = normalizes(model)
        measured = _write(deployment, output, job, arrays)
        if job["normalizes"]:
            described = add_metadata(
                output.read_bytes(),
                name=model.name,
                description=f"Image classifier made by keras-vit, mode {mode}.",
                labels=labels,
            )
            output.write_bytes(described)
        elif labels is not None:
            output.write_bytes(with_labels(output.read_bytes(), labels))
    fields = {**describe_tflite(path), **measured}
    return ExportReport.create(path, mode=mode, labels=labels, note=deployment.note, **fields)


def _check_io_dtype(io_dtype, mode):
    if io_dtype not in ("float32", "uint8", "int8"):
        raise ValueError(
            f'`io_dtype` must be "float32", "uint8" or "int8". Received: io_dtype={io_dtype!r}.'
        )
    if io_dtype != "float32" and mode not in NPU_MODES:
        raise ValueError(
            f"`io_dtype` must be float32 except in the modes {NPU_MODES}, which compute with "
            f"integers alone. Received: io_dtype={io_dtype!r}, mode={mode!r}."
        )


def _held_out(held_out, max_drop, mode, model):
    """The images and labels to hold `max_drop` on, as arrays by name; empty without it."""
    if (held_out is None) != (max_drop is None):
        raise ValueError(
            "`held_out` and `max_drop` go together. Received: "
            f"held_out={'images' if held_out is not None else None}, max_drop={max_drop}."
        )
    if max_drop is None:
        return {}
    if not 0 <= max_drop <= 100:
        raise ValueError(f"`max_drop` must be in [0, 100] %. Received: max_drop={max_drop}.")
    if not isinstance(held_out, (tuple, list)) or len(held_out) != 2:
        raise ValueError(
            "`held_out` must be a pair of images and labels. "
            f"Received: held_out of type {type(held_out).__name__}."
        )
    images, labels = (np.asarray(array) for array in held_out)
    shape, classes = tuple(model.inputs[0].shape[1:]), model.outputs[0].shape[-1]
    if images.shape[1:] != shape or labels.shape != images.shape[:1] or len(images) < 2:
        raise ValueError(
            f"`held_out` must be images (N, {', '.join(map(str, shape))}) and labels (N,), N >= 2. "
            f"Received: shapes {images.shape} and {labels.shape}."
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"The labels must be integers. Received: dtype={labels.dtype}.")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"The labels must be classes in [0, {classes}). Received: values from {labels.min()} "
            f"to {labels.max()}."
        )
    if not np.isfinite(images).all():
        raise ValueError("`held_out` must be finite. Received: images with NaN or infinity.")
    return {"held_out": images, "labels": labels} if mode in _QUANTIZED_MODES else {}


def _calibration_images(calibration, mode, shape):
    """The images to calibrate with, float32 (N, H, W, C), or None for a mode without."""
    if mode not in _QUANTIZED_MODES:
        return None
    if calibration is None:
        if mode not in _CALIBRATED_MODES:
            return None
        raise ValueError(
            f"mode={mode!r} needs `calibration`: some 64 images of the training set, as the model "
            "takes them. Received: calibration=None."
        )
    if isinstance(calibration, tf.data.Dataset):
        if isinstance(calibration.element_spec, tuple):
            calibration = calibration.map(lambda images, *_: images)
        endless = calibration.cardinality() == tf.data.INFINITE_CARDINALITY
        if endless or not isinstance(calibration.element_spec, tf.TensorSpec):
            raise ValueError(
                "`calibration` must be a dataset of images, or of images and more, that ends. "
                f"Received: {'an endless one' if endless else calibration.element_spec}."
            )
        batches = [np.asarray(batch) for batch in calibration.as_numpy_iterator()]
        calibration = [
            image for batch in batches for image in (batch if batch.ndim == 4 else [batch])
        ]
    images = np.asarray(calibration, "float32")
    if images.ndim != 4 or not len(images) or images.shape[1:] != tuple(shape):
        raise ValueError(
            f"`calibration` must be images (N, {', '.join(map(str, shape))}), N >= 1, as the model "
            f"takes them. Received: shape={images.shape}."
        )
    if not np.isfinite(images).all():
        raise ValueError("`calibration` must be finite. Received: images with NaN or infinity.")
    return images


def _for_mode(deployment, mode, images):
    """The deployment with the weights of its ViT made fit for a mode."""
    if deployment.vit is None:
        if mode in _CALIBRATED_MODES:
            raise ValueError(
                f"mode={mode!r} needs a model of build_vit, or one that has it as a layer. "
                f"Received: {deployment.model.name!r}: {deployment.note}."
            )
        return deployment
    if mode == "fp32":
        vit = dataclasses.replace(deployment.vit, float_weights=True)
        return dataclasses.replace(deployment, vit=vit)
    if mode == "fp16":  # for GPUs, too, which take what is whole
        shape = deployment.model.inputs[0].shape[1:]
        noise = np.random.default_rng(0).uniform(0, 255, (4, *shape)).astype("float32")
        return dataclasses.replace(
            deployment, vit=fit_float16(deployment.vit, deployment.vit_inputs(noise))
        )
    if mode in _EQUALIZED_MODES and images is not None:
        inputs = np.asarray(deployment.vit_inputs(images))
        vit = dataclasses.replace(deployment.vit, float_norms=mode not in NPU_MODES)
        return dataclasses.replace(
            deployment, vit=equalize(vit, inputs, mode in _8_BIT_PROBABILITIES)
        )
    return deployment


def _write(deployment, output, job, arrays):
    """Writes the deployment as a SavedModel and has it converted; returns what was measured."""

    def serve(images):
        y = tf.cast(deployment(images), tf.float32)
        return {job["output"]: y if job["activation"] is None else tf.nn.softmax(y)}

    shape = (1, *deployment.model.inputs[0].shape[1:])
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        spec = tf.TensorSpec(shape, tf.float32, "images")
        write_endpoints(str(folder / "saved_model"), {"serving_default": (serve, spec)})
        gc.collect()  # the graphs refer to themselves, and would pile up over several exports
        for key, array in arrays.items():
            if array is not None:
                np.save(folder / f"{key}.npy", array)
        job = {**job, "calibrated": arrays["images"] is not None}
        (folder / "job.json").write_text(json.dumps(job))
        _run_converter(folder, output.absolute(), job["mode"])
        measured = json.loads((folder / "report.json").read_text())
    if "error" in measured:
        raise ValueError(measured["error"])
    if "errno" in measured:
        raise OSError(measured["errno"], os.strerror(measured["errno"]), str(output))
    return measured


def _run_converter(folder, output, mode):
    """Runs `keras_vit.export.convert` in a process of its own, which gives its memory back.

    Args:
        folder: where `saved_model`, `job.json` and the arrays `images.npy`, `held_out.npy` and
            `labels.npy` are, and `report.json` will be.
        output: file to write.
        mode: one of `MODES`.

    Raises:
        RuntimeError: with the end of what the process wrote, if it fails.
    """
    environment = {
        **os.environ,
        # The same packages as here, and no hold on the GPU that trains.
        "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path),
        "CUDA_VISIBLE_DEVICES": "-1",
        "KERAS_BACKEND": "tensorflow",
    }
    with progress_bar() as progress, open(folder / "stderr", "w+", errors="replace") as errors:
        task = progress.add_task(mode, total=None)
        process = subprocess.Popen(
            [sys.executable, "-c", _CONVERT, str(output)],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        with process:
            for line in process.stdout:
                _show(progress, task, mode, line)
        if process.returncode != 0:
            errors.seek(0)
            raise RuntimeError(
                f"The TFLite converter failed in mode {mode!r} with exit status "
                f"{process.returncode}. It wrote:\n{errors.read()[-4000:]}"
            )


def _show(progress, task, mode, line):
    """Shows a line of the converter: what it does, steps done, steps in all."""
    try:
        what, done, total = json.loads(line)
    except ValueError:  # something else of what it imports
        return
    progress.update(task, description=f"{mode}: {what}", completed=done, total=total)
