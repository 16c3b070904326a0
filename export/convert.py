"""The TFLite converter, run in a process of its own: `python -m keras_vit.export.convert`.

Every call of the converter leaks memory and logs to stderr, and `tf.lite` is announced for
removal. So this is the only module that touches it, and `keras_vit.export.tflite` only starts it.
"""

import argparse
import pathlib

import numpy as np
import tensorflow as tf


def convert(saved_model, mode, images=None):
    """Converts the `serving_default` signature of a SavedModel with static shapes.

    Args:
        saved_model: folder of the SavedModel.
        mode: one of `keras_vit.export.MODES`.
        images: calibration images (N, H, W, C) for the modes that need some, or None.

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
    content = converter.convert()
    if mode in ("fp32", "fp16"):
        return content
    from .calibration import calibrate
    from .quantization import quantize

    return quantize(content, mode, None if images is None else calibrate(content, images))


def main():
    """Reads the SavedModel, output file and mode from the command line, and converts."""
    parser = argparse.ArgumentParser(description="Convert a SavedModel to a .tflite file.")
    parser.add_argument("saved_model", type=pathlib.Path)
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("--mode", required=True)
    parser.add_argument("--images", type=pathlib.Path, help="a .npy file to calibrate with")
    args = parser.parse_args()
    images = None if args.images is None else np.load(args.images)
    args.output.write_bytes(convert(args.saved_model, args.mode, images))


if __name__ == "__main__":
    main()
