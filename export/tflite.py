"""Export to `.tflite`: static batch 1, float32 images in, builtin operations only."""

import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import tensorflow as tf

from keras_vit.files import replacing

from .deployment import deploy
from .equalization import equalize, fit_float16
from .metadata import add_metadata
from .precision import as_float32
from .report import ExportReport, describe_tflite
from .saved_model import (
    check_labels,
    check_model,
    check_target,
    takes_pixels,
    write_endpoints,
)

MODES = ("fp32", "fp16", "dynamic_int8", "int8_mixed", "int4")
_QUANTIZED_MODES = ("dynamic_int8", "int8_mixed", "int4")
_CALIBRATED_MODES = ("int8_mixed", "int4")  # they cannot do without images
_EQUALIZED_MODES = ("dynamic_int8", "int8_mixed")


def export_tflite(
    model,
    path,
    *,
    mode="dynamic_int8",
    calibration=None,
    labels=None,
    activation=None,
    overwrite=False,
):
    """Exports a Keras classifier as a `.tflite` file for LiteRT.

    The file holds the signature `serving_default`: float32 `images` (1, height, width, channels)
    -> float32 (1, classes), named `logits`, or `probabilities` behind a softmax, whatever the
    dtype policy of the model. It uses builtin operations only, so it needs no Flex delegate.

    | mode           | weights                   | arithmetic on a CPU                     | size |
    |----------------|---------------------------|-----------------------------------------|------|
    | `fp32`         | float32                   | float32                                 | 1    |
    | `fp16`         | float16                   | float16 on ARMv8.2, else float32        | 1/2  |
    | `dynamic_int8` | int8, one scale a channel | int8 in dense layers, else float32      | 1/4  |
    | `int8_mixed`   | int8, one scale a channel | int8 in dense layers and attention, the | 1/4  |
    |                |                           | ranges fixed by calibration; else float |      |
    | `int4`         | int4, one scale to 32     | int8 in dense layers, else float32      | 1/6  |

    A model of `build_vit`, with its own head or another, and a model that has one as a layer, are
    written anew for it (see `graph.py`): one piece for a delegate, at most rank 4. Other Keras
    models are converted layer by layer; the report's `note` says so.

    A model that normalises RGB pixels in [0, 255] itself also gets the metadata that MediaPipe's
    ImageClassifier reads; it reports the outputs as scores, so give it `activation="softmax"`.

    Args:
        model: functional `keras.Model`, images (B, H, W, C) -> (B, classes).
        path: file to write; ends in `.tflite`.
        mode: one of `MODES`.
        calibration: images as the model takes them, an array (N, H, W, C) or a `tf.data.Dataset`
            of images or batches of images; some 64 of the training set. `int8_mixed` and `int4`
            need them, `dynamic_int8` is nearer to the model with them, `fp32` and `fp16` take
            no notice.
        labels: optional sequence of class names, written into the file and the report.
        activation: "softmax" puts one behind the model's logits; None leaves them as they are.
        overwrite: whether an existing file may be replaced.

    Returns:
        An `ExportReport`.

    Raises:
        TypeError: if `model` is not a `keras.Model`, or `labels` are not strings.
        ValueError: if `mode` or `activation` is unknown, `path` has another suffix or exists, the
            model has several inputs or outputs or sizes that are not static, the number of
            `labels` is not the number of classes, or the calibration images are missing, of
            another shape or not finite.
        RuntimeError: if the conversion fails. Nothing is left at `path` then.
    """
    if mode not in MODES:
        raise ValueError(f"`mode` must be one of {MODES}. Received: mode={mode!r}.")
    if activation not in (None, "softmax"):
        raise ValueError(
            f'`activation` must be None or "softmax". Received: activation={activation!r}.'
        )
    check_model(model)
    labels = check_labels(labels, model)
    path = pathlib.Path(path)
    if path.suffix != ".tflite":
        raise ValueError(f"`path` must end in `.tflite`. Received: path='{path}'.")
    check_target(path, overwrite, pathlib.Path.is_file, "a file")
    images = _calibration_images(calibration, mode, model.inputs[0].shape[1:])
    deployment = _for_mode(deploy(as_float32(model)), mode, images)
    with replacing(path) as output:
        _write(deployment, output, mode, images, activation)
        if takes_pixels(model):
            described = add_metadata(
                output.read_bytes(),
                name=model.name,
                description=f"Image classifier made by keras-vit, mode {mode}.",
                labels=labels,
            )
            output.write_bytes(described)
    return ExportReport.create(
        path, mode=mode, labels=labels, note=deployment.note, **describe_tflite(path)
    )


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
    if mode == "fp16":
        shape = deployment.model.inputs[0].shape[1:]
        noise = np.random.default_rng(0).uniform(0, 255, (4, *shape)).astype("float32")
        return dataclasses.replace(
            deployment, vit=fit_float16(deployment.vit, deployment.vit_inputs(noise))
        )
    if mode in _EQUALIZED_MODES and images is not None:
        inputs = np.asarray(deployment.vit_inputs(images))
        return dataclasses.replace(deployment, vit=equalize(deployment.vit, inputs))
    return deployment


def _write(deployment, output, mode, images, activation):
    """Writes the deployment as a SavedModel and has it converted."""

    def serve(images):
        y = tf.cast(deployment(images), tf.float32)
        return {"logits": y} if activation is None else {"probabilities": tf.nn.softmax(y)}

    shape = (1, *deployment.model.inputs[0].shape[1:])
    with tempfile.TemporaryDirectory() as folder:
        saved_model = os.path.join(folder, "saved_model")
        spec = tf.TensorSpec(shape, tf.float32, "images")
        write_endpoints(saved_model, {"serving_default": (serve, spec)})
        if images is not None:
            np.save(os.path.join(folder, "images.npy"), images)
        _run_converter(folder, output.absolute(), mode, images is not None)


def _run_converter(folder, output, mode, calibrated):
    """Runs `keras_vit.export.convert` in a process of its own, which gives its memory back.

    Args:
        folder: where `saved_model` and `images.npy` are.
        output: file to write.
        mode: one of `MODES`.
        calibrated: whether there are images.

    Raises:
        RuntimeError: with the end of what the process wrote, if it fails.
    """
    command = [sys.executable, "-m", "keras_vit.export.convert", "saved_model", str(output)]
    command += ["--mode", mode] + (["--images", "images.npy"] if calibrated else [])
    environment = {
        **os.environ,
        # The same packages as here, and no hold on the GPU that trains.
        "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path),
        "CUDA_VISIBLE_DEVICES": "-1",
    }
    process = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if process.returncode != 0:
        raise RuntimeError(
            f"The TFLite converter failed in mode {mode!r} with exit status "
            f"{process.returncode}. It wrote:\n{process.stderr[-4000:]}"
        )
