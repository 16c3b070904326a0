"""Export to `.tflite`: static batch 1, float32 images in, float32 logits out, builtin ops only."""

import os
import pathlib
import subprocess
import sys
import tempfile

from keras_vit.files import replacing

from .precision import as_float32
from .report import ExportReport, describe_tflite
from .saved_model import (
    check_labels,
    check_model,
    check_target,
    write_saved_model,
)

MODES = ("fp32", "fp16", "dynamic_int8")


def export_tflite(
    model, path, *, mode="dynamic_int8", calibration=None, labels=None, overwrite=False
):
    """Exports a Keras classifier as a `.tflite` file for LiteRT.

    The file holds the signature `serving_default`: float32 `images` (1, height, width, channels)
    -> float32 `logits` (1, classes), whatever the dtype policy of the model. It uses builtin
    operations only, so it needs no Flex delegate.

    | mode           | weights                   | arithmetic on a CPU                | size |
    |----------------|---------------------------|------------------------------------|------|
    | `fp32`         | float32                   | float32                            | 1    |
    | `fp16`         | float16                   | float16 on ARMv8.2, else float32   | 1/2  |
    | `dynamic_int8` | int8, one scale a channel | int8 in dense layers, else float32 | 1/4  |

    Args:
        model: functional `keras.Model`, images (B, H, W, C) -> logits (B, classes).
        path: file to write; ends in `.tflite`.
        mode: one of `MODES`.
        calibration: images as the model takes them. None of the present modes needs any, so
            they are ignored.
        labels: optional sequence of class names, recorded in the report.
        overwrite: whether an existing file may be replaced.

    Returns:
        An `ExportReport`.

    Raises:
        TypeError: if `model` is not a `keras.Model`, or `labels` are not strings.
        ValueError: if `mode` is unknown, `path` has another suffix or exists, the model has
            several inputs or outputs or sizes that are not static, or the number of `labels`
            is not the number of classes.
        RuntimeError: if the conversion fails. Nothing is left at `path` then.
    """
    if mode not in MODES:
        raise ValueError(f"`mode` must be one of {MODES}. Received: mode={mode!r}.")
    check_model(model)
    labels = check_labels(labels, model)
    path = pathlib.Path(path)
    if path.suffix != ".tflite":
        raise ValueError(f"`path` must end in `.tflite`. Received: path='{path}'.")
    check_target(path, overwrite, pathlib.Path.is_file, "a file")
    with replacing(path) as output, tempfile.TemporaryDirectory() as folder:
        saved_model = os.path.join(folder, "saved_model")
        write_saved_model(as_float32(model), saved_model, batch_size=1)
        run_converter(saved_model, output.absolute(), mode)
    return ExportReport.create(path, mode=mode, labels=labels, **describe_tflite(path))


def run_converter(saved_model, output, mode):
    """Runs `keras_vit.export.convert` in a process of its own, which gives its memory back.

    Args:
        saved_model: folder of the SavedModel to read.
        output: file to write.
        mode: one of `MODES`.

    Raises:
        RuntimeError: with the end of what the process wrote, if it fails.
    """
    command = [sys.executable, "-m", "keras_vit.export.convert", str(saved_model), str(output)]
    environment = {
        **os.environ,
        # The same packages as here, and no hold on the GPU that trains.
        "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path),
        "CUDA_VISIBLE_DEVICES": "-1",
    }
    process = subprocess.run(
        [*command, "--mode", mode],
        cwd=os.path.dirname(saved_model),
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
