"""Integers in and out of a `.tflite` file that computes with integers alone."""

import copy

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from .calibration import operation_name
from .flatbuffer import pack

_LEVELS = 256
_TYPES = {"int8": (schema.TensorType.INT8, -128), "uint8": (schema.TensorType.UINT8, 0)}


def with_integer_io(content, dtype, calibration, is_probability):
    """Changes the float32 images and output of a file to 8-bit integers.

    value = scale * (integer - zero point). A file that takes pixels gets them as they are: as
    uint8, the scale is 1 and the zero point 0.

    Args:
        content: bytes of a quantized file, whose first operation quantizes the images and whose
            last one dequantizes the output, or computes in float.
        dtype: "int8" or "uint8".
        calibration: the `Calibration` of its float file.
        is_probability: whether the output is in [0, 1]; else it keeps the range that it has.

    Returns:
        The bytes of the new file.
    """
    model = schema.ModelT.InitFromPackedBuf(content)
    graph = model.subgraphs[0]
    (image,), (output,) = graph.inputs, graph.outputs
    (last,) = (op for op in graph.operators if output in op.outputs)
    is_integer = operation_name(model, last) == "DEQUANTIZE"
    low, high = calibration.image_range
    _set_type(graph.tensors[image], dtype, (high - low) / (_LEVELS - 1), low)
    if is_probability:
        scale, low = 1 / _LEVELS, 0.0
    elif is_integer:
        scale, low = _range_of_integers(graph.tensors[last.inputs[0]])
    else:
        name = graph.tensors[output].name.decode()
        low, high = (float(limit.item()) for limit in calibration.ranges[name])
        low, high = min(low, 0.0), max(high, 0.0, low + 1e-6)  # 0 is among what integers stand for
        scale = (high - low) / (_LEVELS - 1)
    if is_integer:
        last.opcodeIndex = _quantize_code(model)
        last.builtinOptionsType, last.builtinOptions = 0, None
    else:
        last = _append_quantize(model, graph, last)
    _set_type(graph.tensors[output], "int8", scale, low)
    if dtype == "uint8":  # no kernel goes there from int16 at once
        last = _append_quantize(model, graph, last)
        _set_type(graph.tensors[output], "uint8", scale, low)
    return pack(model, content)


def _range_of_integers(tensor):
    """The scale and the lowest value that a tensor of int8 or int16 has, or has in 8 bits."""
    scale = float(tensor.quantization.scale[0])
    if tensor.type == schema.TensorType.INT8:
        return scale, scale * (-128 - int(tensor.quantization.zeroPoint[0]))
    return scale * _LEVELS, -scale * _LEVELS * _LEVELS / 2  # around 0


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


def _append_quantize(model, graph, last):
    """Puts a QUANTIZE between the last operation and the output, and returns it."""
    (output,) = graph.outputs
    between = copy.copy(graph.tensors[output])
    between.name = f"output_{len(graph.tensors)}".encode()
    graph.tensors.append(between)
    last.outputs = np.array([len(graph.tensors) - 1], "int32")
    quantize = schema.OperatorT(
        opcodeIndex=_quantize_code(model),
        inputs=np.array(last.outputs),
        outputs=np.array([output], "int32"),
    )
    graph.operators.append(quantize)
    return quantize
