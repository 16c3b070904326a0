"""The TFLite converter, run in a process of its own: `python -m keras_vit.export.convert`.

Every call of the converter leaks memory and logs to stderr, and `tf.lite` is announced for
removal. So this is the only module that touches it, and `keras_vit.export.tflite` only starts it.
"""

import argparse
import pathlib

import tensorflow as tf


def convert(saved_model, mode):
    """Converts the `serving_default` signature of a SavedModel with static shapes.

    Args:
        saved_model: folder of the SavedModel.
        mode: one of `keras_vit.export.MODES`.

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
    return quantize(content) if mode == "dynamic_int8" else content


def quantize(content):
    """Gives a float32 `.tflite` file int8 weights, one scale per output channel.

    The activations stay float32 in the file; the runtime quantizes them per token as it runs.

    Args:
        content: bytes of the float32 file.

    Returns:
        The bytes of the quantized file.
    """
    from litert_quantizer import quantizer, recipe

    return quantizer.Quantizer(content, recipe.dynamic_wi8_afp32()).quantize().quantized_model


def main():
    """Reads the SavedModel, output file and mode from the command line, and converts."""
    parser = argparse.ArgumentParser(description="Convert a SavedModel to a .tflite file.")
    parser.add_argument("saved_model", type=pathlib.Path)
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("--mode", required=True)
    args = parser.parse_args()
    args.output.write_bytes(convert(args.saved_model, args.mode))


if __name__ == "__main__":
    main()
