"""The TFLite converter, run in a process of its own, which `keras_vit.export.tflite` starts.

Every call of the converter leaks memory and logs to stderr, and `tf.lite` is announced for
removal. So this is the only module that touches it.
"""

import argparse
import json
import pathlib

import numpy as np
import tensorflow as tf


def convert(saved_model, mode):
    """Converts the `serving_default` signature of a SavedModel with static shapes.

    Args:
        saved_model: folder of the SavedModel.
        mode: one of `keras_vit.export.MODES`; all but "fp16" are converted in float32.

    Returns:
        The bytes of a `.tflite` file that uses builtin operations only.
    """
    converter = tf.lite.TFLiteConverter.from_saved_model(
        str(saved_model), signature_keys=["serving_default"]
    )
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    if mode == "fp16":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.target_spec.supported_types = [tf.float16]
        # Written into the file as `reduced_precision_support`: ARMv8.2 then computes in float16.
        converter.target_spec._experimental_supported_accumulation_type = tf.float16
    return converter.convert()


def quantize(content, job, say):
    """Quantizes a float32 file.

    Args:
        content: bytes of the file.
        job: what `keras_vit.export.tflite` asks for, see there.
        say: function (what is being done, steps done, steps in all).

    Returns:
        The bytes of the file, and what there is to report: the sensitivities and the fallbacks.
    """
    from .calibration import calibrate
    from .integer_io import with_integer_io
    from .quantization import RULES, FloatFile
    from .sensitivity import quantize_within, sensitivity

    calibration = None
    if job["calibrated"]:
        images = np.load("images.npy", mmap_mode="r")
        calibration = calibrate(content, images, _counter(say, "calibrating", len(images)))
        if job["normalizes"]:
            calibration = calibration.with_image_range(0.0, 255.0)
    source, mode, report = FloatFile(content, calibration), job["mode"], {}
    if job["max_drop"] is None:
        say("quantizing", 0, 1)
        content = source.quantize(RULES[mode])
    else:
        held_out, labels = np.load("held_out.npy", mmap_mode="r"), np.load("labels.npy")
        count = len(source.layers(mode))
        ratios = sensitivity(source, mode, held_out, _counter(say, "measuring layers", count))
        content, fallback = quantize_within(
            source,
            mode,
            held_out,
            labels,
            job["max_drop"],
            job["min_agreement"],
            ratios,
            _counter(say, "trying", None),
        )
        report = {"sensitivity": ratios, "fallback": fallback}
    if job["io_dtype"] != "float32":
        content = with_integer_io(content, job["io_dtype"], calibration, job["gives_probabilities"])
    return content, report


def check_loads(content):
    """Makes LiteRT prepare the bytes of a file to run: not every file that is written can be.

    Raises:
        ValueError, RuntimeError: what LiteRT says is wrong with it.
    """
    from ai_edge_litert.interpreter import Interpreter

    Interpreter(model_content=bytes(content), num_threads=1).allocate_tensors()


def _counter(say, what, total):
    """A function that says how often it was called."""
    done = 0

    def advance():
        nonlocal done
        done += 1
        say(what, done, total)

    say(what, 0, total)
    return advance


def _say(what, done, total):
    """Tells the process that waits: a line of JSON."""
    print(json.dumps([what, done, total]), flush=True)


def main():
    """Reads `job.json` and what it speaks of in a folder, and writes the file it asks for."""
    parser = argparse.ArgumentParser(description="Convert a SavedModel to a .tflite file.")
    parser.add_argument("output", type=pathlib.Path)
    output = parser.parse_args().output
    job = json.loads(pathlib.Path("job.json").read_text())
    _say("converting", 0, 1)
    content, report = convert("saved_model", job["mode"]), {}
    if job["mode"] not in ("fp32", "fp16"):
        from .sensitivity import AccuracyLost

        try:
            content, report = quantize(content, job, _say)
        except AccuracyLost as error:
            content, report = b"", {"error": str(error)}
    if content:
        check_loads(content)
    try:
        output.write_bytes(content)
    except OSError as error:
        output.unlink(missing_ok=True)  # what is left of it fills the disk
        report = {"errno": error.errno}
    pathlib.Path("report.json").write_text(json.dumps(report))
