"""Which operations of the deploy graph compute in how many bits, and the ranges of their tensors.

The operations are found by the names of their outputs, which are those of `graph.py`'s scopes.
Quantizing itself is litert-quantizer's.
"""

import re

import ml_dtypes
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from litert_quantizer import qtyping, quantizer
from litert_quantizer.algorithm_manager import AlgorithmName

from .calibration import constant, dense_layers
from .flatbuffer import pack
from .gptq import choose_scales, round_weights

_Op = qtyping.TFLOperationName
_CHANNEL = qtyping.QuantGranularity.CHANNELWISE

_WEIGHTS = qtyping.TensorQuantizationConfig(8, granularity=_CHANNEL)
_BLOCK = 32
_DYNAMIC = qtyping.OpQuantizationConfig(
    weight_tensor_config=_WEIGHTS, compute_precision=qtyping.ComputePrecision.INTEGER
)
_INT4 = qtyping.OpQuantizationConfig(
    weight_tensor_config=qtyping.TensorQuantizationConfig(
        4, granularity=qtyping.QuantGranularity.BLOCKWISE_32
    ),
    compute_precision=qtyping.ComputePrecision.INTEGER,
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
# 4 bits in the blocks, 32 weights to a scale; what is before and after them, and what has not
# the shape for it, stays at 8.
INT4_RULES = (
    *DYNAMIC_RULES,
    (r"block_\d+/(qkv|q|kv|proj|fc1|fc2)/", _Op.FULLY_CONNECTED, _INT4),
)
RULES = {"dynamic_int8": DYNAMIC_RULES, "int8_mixed": MIXED_RULES, "int4": INT4_RULES}


def quantize(content, mode, calibration=None):
    """Quantizes a float32 `.tflite` file.

    Args:
        content: bytes of the file.
        mode: one of `RULES`.
        calibration: a `Calibration` of the file. "dynamic_int8" can do without it: its weights
            are then rounded each by itself.

    Returns:
        The bytes of the quantized file.
    """
    rules = RULES[mode]
    ranges = None
    if calibration is not None:
        ranges = {
            name: {"min": low, "max": high} for name, (low, high) in calibration.ranges.items()
        }
        content, rules, weight_ranges = _round_weights(content, rules, calibration)
        ranges.update(weight_ranges)
    model = quantizer.Quantizer(content)
    for regex, operation, config in rules:
        algorithm = AlgorithmName.MIN_MAX_UNIFORM_QUANT if config else AlgorithmName.NO_QUANTIZE
        model.update_quantization_recipe(regex, operation, config, algorithm)
    result = model.quantize(ranges, enable_progress_report=False, enable_progress_bar=False)
    content = result.quantized_model
    return pack(schema.ModelT.InitFromPackedBuf(content), content)


def _config(rules, name):
    """The configuration of a dense layer: that of the last rule that speaks of it, or None."""
    fitting = [
        config
        for regex, operation, config in rules
        if operation in (_Op.ALL_SUPPORTED, _Op.FULLY_CONNECTED) and re.search(regex, name)
    ]
    return fitting[-1] if fitting else None


def _round_weights(content, rules, calibration):
    """Rounds the weights of the dense layers to the values that they will have.

    Returns:
        The bytes of the file with these weights, the rules, with one more for each layer that
        does not fit its rule, and the ranges of the weights, of which litert-quantizer makes the
        scales.
    """
    model = schema.ModelT.InitFromPackedBuf(content)
    ranges = {}
    for layer in dense_layers(model):
        config = _config(rules, layer.name)
        if config is None:
            continue
        kernel = constant(model, layer.weights).T.astype("float64")
        hessian = calibration.covariances[layer.input]
        mean = calibration.means[layer.input]
        if layer.bias is None:  # which takes care of the mean
            hessian = hessian + np.outer(mean, mean)
        scales = _scales(kernel, np.diag(hessian), config.weight_tensor_config)
        if scales is None:
            rules = (*rules, (re.escape(layer.name), _Op.FULLY_CONNECTED, _DYNAMIC))
            scales = _scales(kernel, np.diag(hessian), _WEIGHTS)
            config = _DYNAMIC
        bits = config.weight_tensor_config.num_bits
        rounded = round_weights(kernel, hessian, scales, bits)
        _set(model, layer.weights, rounded.T)
        if layer.bias is not None:  # the mean of the outputs stays
            bias = constant(model, layer.bias)
            _set(model, layer.bias, bias + mean @ (kernel - rounded))
        name = model.subgraphs[0].tensors[layer.weights].name.decode()
        limits = np.float32(scales.T * (2 ** (bits - 1) - 1))
        ranges[name] = {"min": -limits, "max": limits}
    return pack(model, content), rules, ranges


def _scales(kernel, importance, config):
    """The scales of a dense layer, or None if the layer does not fit the configuration."""
    if config.granularity == _CHANNEL:
        return choose_scales(kernel, importance, config.num_bits, len(kernel))
    if len(kernel) % _BLOCK:
        return None
    # What the runtime computes with: litert-quantizer rounds scales to bfloat16, and stores
    # them as float16.
    scales = choose_scales(kernel, importance, config.num_bits, _BLOCK, ml_dtypes.bfloat16)
    normal = np.finfo("float16")
    fits = (scales >= normal.smallest_normal) & (scales <= normal.max)
    return scales if fits.all() else None


def _set(model, index, values):
    buffer = model.buffers[model.subgraphs[0].tensors[index].buffer]
    buffer.data = np.frombuffer(np.float32(values).tobytes(), "uint8")
