"""Integers in and out of a `.tflite` file that computes with integers alone."""

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from .flatbuffer import pack

_LEVELS = 256
_TYPES = {"int8": (schema.TensorType.INT8, -128), "uint8": (schema.TensorType.UINT8, 0)}


def with_integer_io(content, dtype, images, is_probability):
    """Changes the float32 images and output of a file to 8-bit integers.

    value = scale * (integer - zero point). A file that takes pixels gets them as they are: as
    uint8, the scale is 1 and the zero point 0.

    Args:
        content: bytes of a quantized file, whose first operation quantizes the images and whose
            last one dequantizes the output.
        dtype: "int8" or "uint8".
        images: (smallest, largest) value of an image.
        is_probability: whether the output is in [0, 1]; else it keeps the range that it has.

    Returns:
        The bytes of the new file.
    """
    model = schema.ModelT.InitFromPackedBuf(content)
    graph = model.subgraphs[0]
    (image,), (output,) = graph.inputs, graph.outputs
    (dequantize,) = (op for op in graph.operators if output in op.outputs)
    low, high = images
    _set_type(graph.tensors[image], dtype, (high - low) / (_LEVELS - 1), low)
    inside = graph.tensors[dequantize.inputs[0]].quantization
    if is_probability:
        scale, low = 1 / _LEVELS, 0.0
    else:  # from 16 bits around 0
        scale = float(inside.scale[0]) * _LEVELS
        low = -scale * _LEVELS / 2
    dequantize.opcodeIndex = _quantize_code(model)
    dequantize.builtinOptionsType, dequantize.builtinOptions = 0, None
    _set_type(graph.tensors[output], "int8", scale, low)
    if dtype == "uint8":  # no kernel goes there from int16 at once
        _append_uint8(model, graph, dequantize, scale, low)
    return pack(model, content)


def _set_type(tensor, dtype, scale, low):
    """Makes a tensor one of integers whose smallest stands for `low`."""
    tensor.type, smallest = _TYPES[dtype]
    tensor.quantization = schema.QuantizationParametersT()
    tensor.quantization.scale = np.array([scale], "float32")
    tensor.quantization.zeroPoint = np.array([smallest - round(low / scale)], "int64")


def _quantize_code(model):
    """The index of the operation QUANTIZE, which the images need, so that it is there."""
    return next(
        index
        for index, code in enumerate(model.operatorCodes)
        if code.builtinCode == schema.BuiltinOperator.QUANTIZE
    )


def _append_uint8(model, graph, last, scale, low):
    """Has the output go through int8 to uint8."""
    (output,) = graph.outputs
    between = schema.TensorT(name=b"output_int8", shape=graph.tensors[output].shape, buffer=0)
    _set_type(between, "int8", scale, low)
    _set_type(graph.tensors[output], "uint8", scale, low)
    graph.tensors.append(between)
    last.outputs = np.array([len(graph.tensors) - 1], "int32")
    graph.operators.append(
        schema.OperatorT(
            opcodeIndex=last.opcodeIndex,
            inputs=np.array(last.outputs),
            outputs=np.array([output], "int32"),
        )
    )
