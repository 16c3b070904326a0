"""Which operations of the deploy graph compute in how many bits, and the ranges of their tensors.

The operations are found by the names of their outputs, which are those of `graph.py`'s scopes.
Quantizing itself is litert-quantizer's.
"""

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from litert_quantizer import qtyping, quantizer
from litert_quantizer.algorithm_manager import AlgorithmName

from .flatbuffer import pack

_Op = qtyping.TFLOperationName
_CHANNEL = qtyping.QuantGranularity.CHANNELWISE

_WEIGHTS = qtyping.TensorQuantizationConfig(8, granularity=_CHANNEL)
_DYNAMIC = qtyping.OpQuantizationConfig(
    weight_tensor_config=_WEIGHTS, compute_precision=qtyping.ComputePrecision.INTEGER
)


def _static(symmetric, weights=_WEIGHTS):
    return qtyping.OpQuantizationConfig(
        activation_tensor_config=qtyping.TensorQuantizationConfig(8, symmetric=symmetric),
        weight_tensor_config=weights,
        compute_precision=qtyping.ComputePrecision.INTEGER,
        skip_checks=True,  # litert-quantizer knows no symmetric int8 activations; XNNPACK does
    )


# Weights of all that has weights in int8, one scale per output channel; the runtime quantizes what
# they are multiplied with, token by token. The products that are means stay in float.
DYNAMIC_RULES = (
    (".*", _Op.ALL_SUPPORTED, _DYNAMIC),
    ("mean_square", _Op.FULLY_CONNECTED, None),
)
# XNNPACK multiplies int8 matrices of activations only if their zero point is 0, and a tensor keeps
# its scale while it is reshaped, transposed and split. What goes in and out of the MLP's layers,
# the result of a GELU above all, is not symmetric.
MIXED_RULES = DYNAMIC_RULES + tuple(
    (regex, operation, _static(symmetric, weights))
    for regex, operation, symmetric, weights in (
        (r"block_\d+/(MatMul|Softmax)", _Op.BATCH_MATMUL, True, None),
        (r"block_\d+/", _Op.RESHAPE, True, None),
        (r"block_\d+/", _Op.TRANSPOSE, True, None),
        (r"block_\d+/", _Op.SPLIT, True, None),
        (r"block_\d+/(qkv|q|kv|proj)/", _Op.FULLY_CONNECTED, True, _WEIGHTS),
        (r"block_\d+/(fc1|fc2)/", _Op.FULLY_CONNECTED, False, _WEIGHTS),
    )
)
RULES = {"dynamic_int8": DYNAMIC_RULES, "int8_mixed": MIXED_RULES}


def quantize(content, mode, images=None):
    """Quantizes a float32 `.tflite` file.

    Args:
        content: bytes of the file.
        mode: "dynamic_int8" or "int8_mixed".
        images: array (N, H, W, C), as the file takes them; "int8_mixed" needs them.

    Returns:
        The bytes of the quantized file.
    """
    model = quantizer.Quantizer(content)
    for regex, operation, config in RULES[mode]:
        algorithm = AlgorithmName.MIN_MAX_UNIFORM_QUANT if config else AlgorithmName.NO_QUANTIZE
        model.update_quantization_recipe(regex, operation, config, algorithm)
    ranges = tensor_ranges(content, images) if model.need_calibration else None
    result = model.quantize(ranges, enable_progress_report=False, enable_progress_bar=False)
    content = result.quantized_model
    return pack(schema.ModelT.InitFromPackedBuf(content), content)


def tensor_ranges(content, images):
    """The smallest and largest value of every tensor that an operation puts out, over all images.

    Not litert-quantizer's own: its moving average clips the few large activations that carry the
    signal of trained ViTs.

    Args:
        content: bytes of a float32 `.tflite` file.
        images: array (N, H, W, C).

    Returns:
        Dictionary, tensor name -> {"min": (1,), "max": (1,)}, as litert-quantizer takes it.
    """
    interpreter = Interpreter(
        model_content=bytes(content),
        # Not XNNPACK, which keeps the tensors within a partition to itself.
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        experimental_preserve_all_tensors=True,
        num_threads=2,
    )
    interpreter.allocate_tensors()
    (image_tensor,) = (details["index"] for details in interpreter.get_input_details())
    indices = {image_tensor} | {
        int(index) for op in interpreter._get_ops_details() for index in op["outputs"]
    }
    names = {
        details["index"]: details["name"]
        for details in interpreter.get_tensor_details()
        if details["index"] in indices and details["dtype"] == np.float32
    }
    low, high = dict.fromkeys(names, np.inf), dict.fromkeys(names, -np.inf)
    for image in images:
        interpreter.set_tensor(image_tensor, image[None].astype("float32"))
        interpreter.invoke()
        for index in names:
            values = interpreter.get_tensor(index)
            low[index] = min(low[index], values.min())
            high[index] = max(high[index], values.max())
    return {
        name: {"min": np.float32([low[index]]), "max": np.float32([high[index]])}
        for index, name in names.items()
    }
