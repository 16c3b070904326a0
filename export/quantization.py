"""Which operations of the deploy graph compute in how many bits, and the ranges of their tensors.

The operations are found by the names of their outputs, which are those of `graph.py`'s scopes.
Quantizing itself is litert-quantizer's.
"""

import dataclasses
import re

import ml_dtypes
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from litert_quantizer import qtyping, quantizer
from litert_quantizer.algorithm_manager import AlgorithmName

from .calibration import constant, dense_layers, operation_name
from .flatbuffer import pack
from .gptq import choose_scales, round_weights

_Op = qtyping.TFLOperationName
_CHANNEL = qtyping.QuantGranularity.CHANNELWISE

_WEIGHTS = qtyping.TensorQuantizationConfig(8, granularity=_CHANNEL)
_BLOCK = 32
_OUTSIDE = r"^(?!.*(block_\d+|pooling|stem)/)"
_DYNAMIC = qtyping.OpQuantizationConfig(
    weight_tensor_config=_WEIGHTS, compute_precision=qtyping.ComputePrecision.INTEGER
)
_INT4 = qtyping.OpQuantizationConfig(
    weight_tensor_config=qtyping.TensorQuantizationConfig(
        4, granularity=qtyping.QuantGranularity.BLOCKWISE_32
    ),
    compute_precision=qtyping.ComputePrecision.INTEGER,
)


def _static(symmetric, weights=_WEIGHTS, bits=8):
    return qtyping.OpQuantizationConfig(
        activation_tensor_config=qtyping.TensorQuantizationConfig(bits, symmetric=symmetric),
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
# As DYNAMIC_RULES, and attention with ranges of calibration: the layers that make q, k and v, the
# two products of activations, and what lays out their operands. Of two int8 matrices of activations
# XNNPACK wants the zero point of the second to be 0 (its src/subgraph/batch-matrix-multiply.c), and
# a tensor keeps its scale while it is reshaped, transposed and split; of the probabilities
# `_use_all_levels` changes it afterwards. proj, fc1 and fc2 stay dynamic: a static layer's output
# has a range of calibration, too, which costs most in the residual stream and before the GELU.
MIXED_RULES = DYNAMIC_RULES + tuple(
    (regex, operation, _static(symmetric=True, weights=weights))
    for regex, operation, weights in (
        (r"block_\d+/", _Op.BATCH_MATMUL, None),
        (r"block_\d+/", _Op.RESHAPE, None),
        (r"block_\d+/", _Op.TRANSPOSE, None),
        (r"block_\d+/", _Op.SPLIT, None),
        (r"block_\d+/(qkv|q|kv)/", _Op.FULLY_CONNECTED, _WEIGHTS),
    )
)
# 4 bits in the blocks, 32 weights to a scale; what is before and after them, and what has not
# the shape for it, stays at 8.
INT4_RULES = (
    *DYNAMIC_RULES,
    (r"block_\d+/(qkv|q|kv|proj|fc1|fc2)/", _Op.FULLY_CONNECTED, _INT4),
)
_INT16 = _static(symmetric=True, bits=16)
# 16 bits leave room for images that go beyond the calibration images, whose values would be cut.
_HEADROOM = 2
_FLOAT_ENDS = ((".*", _Op.INPUT, None), (".*", _Op.OUTPUT, None))
A16W8_RULES = ((".*", _Op.ALL_SUPPORTED, _INT16), *_FLOAT_ENDS)
# Integers alone: products in 8 bits. The residual stream and the norms, whose range is too wide for
# these, are in 16, whatever cuts them or joins them, and so is what is before and after the blocks.
_OF_THE_STREAM = (_Op.ADD, _Op.SUB, _Op.MUL, _Op.MEAN, _Op.RSQRT)
_OF_THE_STREAM += (_Op.CONCATENATION, _Op.SLICE, _Op.STRIDED_SLICE)
INT8_FULL_RULES = (
    (".*", _Op.ALL_SUPPORTED, _static(symmetric=False)),
    *((".*", operation, _INT16) for operation in _OF_THE_STREAM),
    (_OUTSIDE, _Op.FULLY_CONNECTED, _INT16),
    (_OUTSIDE, _Op.SOFTMAX, _INT16),
    *_FLOAT_ENDS,
)
RULES = {
    "dynamic_int8": DYNAMIC_RULES,
    "int8_mixed": MIXED_RULES,
    "int4": INT4_RULES,
    "int8_full": INT8_FULL_RULES,
    "a16w8": A16W8_RULES,
}
STATIC_MODES = ("int8_mixed", "int8_full", "a16w8")
# What a layer computes in where its mode costs too much, and what if that does, too.
FALLBACKS = {
    "dynamic_int8": ("float32",),
    "int8_mixed": ("dynamic_int8", "float32"),
    "int4": ("dynamic_int8", "float32"),
    "int8_full": ("a16w8", "float32"),
    "a16w8": ("float32",),
}
# Of a block's attention; what splits q, k and v goes with the first product that reads them, so
# that v keeps its 8 bits where the second product alone is in float.
_PRODUCTS = {"probabilities": "probabilities/|Reshape|transpose|split", "values": "values/"}
_CONFIGS = {"dynamic_int8": _DYNAMIC, "a16w8": _INT16, "float32": None}


@dataclasses.dataclass(frozen=True)
class Layer:
    """What is quantized, or is not, as a whole: a dense layer, or a product of activations.

    Attributes:
        name: such as "block_3/fc1"; "block_3/probabilities" for softmax(q k^T), and
            "block_3/values" for the product of these probabilities and the values.
        regex: finds its operations by their names.
        operation: their kind.
        precision: the one of `FALLBACKS` that its mode gives it already, or None.
    """

    name: str
    regex: str
    operation: _Op
    precision: str | None = None

    def nearest(self, precision):
        """The precision that it can have: without weights, what is dynamic is in float."""
        has_weights = self.operation == _Op.FULLY_CONNECTED
        return "float32" if precision == "dynamic_int8" and not has_weights else precision

    def rule(self, precision):
        """The rule that gives this layer a precision of `FALLBACKS`."""
        return self.regex, self.operation, _CONFIGS[self.nearest(precision)]

    def only(self, rules):
        """Those of `rules` that speak of this layer, for it alone."""
        return tuple(
            (f"(?={self.regex})(?=.*{regex})", max(self.operation, operation, key=_is_one), config)
            for regex, operation, config in rules
            if _Op.ALL_SUPPORTED in (self.operation, operation) or operation == self.operation
        )


def _is_one(operation):
    return operation != _Op.ALL_SUPPORTED


class FloatFile:
    """A float32 `.tflite` file that is to be quantized, in one way or in many.

    Args:
        content: bytes of the file.
        calibration: a `Calibration` of the file. "dynamic_int8" can do without it: its weights
            are then rounded each by itself.
    """

    def __init__(self, content, calibration=None):
        self.content = content
        self.calibration = calibration
        self._rounded = {}  # (name of a dense layer, bits) -> what `_round` returns
        self._in_float = tuple(_in_float(schema.ModelT.InitFromPackedBuf(content)))

    def layers(self, mode):
        """The layers that a mode quantizes: a tuple of `Layer`, from first to last."""
        rules = RULES[mode]
        layers = []
        model = schema.ModelT.InitFromPackedBuf(self.content)
        for dense in dense_layers(model):
            config = _config(rules, _Op.FULLY_CONNECTED, dense.name)
            if config is None:
                continue
            if self.calibration is not None:
                fits = self._round(model, dense, config.weight_tensor_config) is not None
                config = config if fits else _DYNAMIC
            precision = next((name for name, other in _CONFIGS.items() if other == config), None)
            name = re.sub(r"/MatMul\d*(;.*)?$", "", dense.name)
            name = "head" if "PartitionedCall" in name else name  # the output, which has no scope
            layers.append(Layer(name, f"^{re.escape(dense.name)}", _Op.FULLY_CONNECTED, precision))
            if mode in STATIC_MODES and (block := re.match(r"(.*/)?block_\d+/(?=proj$)", name)):
                for product, names in _PRODUCTS.items():
                    regex = f"^{re.escape(block[0])}({names})"
                    layers.insert(-1, Layer(block[0] + product, regex, _Op.ALL_SUPPORTED))
        return tuple(layers)

    def quantize(self, rules):
        """Returns the bytes of the file, quantized by rules."""
        content, ranges = self.content, None
        rules = (*rules, *self._in_float)
        if self.calibration is not None:
            ranges = self._ranges(rules)
            content, rules, weight_ranges = self._round_weights(rules)
            ranges.update(weight_ranges)
        model = quantizer.Quantizer(content)
        for regex, operation, config in rules:
            algorithm = AlgorithmName.MIN_MAX_UNIFORM_QUANT if config else AlgorithmName.NO_QUANTIZE
            model.update_quantization_recipe(regex, operation, config, algorithm)
        result = model.quantize(ranges, enable_progress_report=False, enable_progress_bar=False)
        content = result.quantized_model
        quantized = schema.ModelT.InitFromPackedBuf(content)
        _use_all_levels(quantized)
        return pack(quantized, content)

    def _ranges(self, rules):
        """The ranges of the activations as litert-quantizer takes them."""
        model = schema.ModelT.InitFromPackedBuf(self.content)
        names = [tensor.name.decode() for tensor in model.subgraphs[0].tensors]
        tight = {self.calibration.image}  # and whatever an operation of fewer bits reads or writes
        for operator in model.subgraphs[0].operators:
            output = names[operator.outputs[0]]
            if _config(rules, operation_name(model, operator), output) != _INT16:
                tight |= {names[i] for i in (*operator.inputs, *operator.outputs) if i >= 0}
        return {
            name: {"min": factor * low, "max": factor * high}
            for name, (low, high) in self.calibration.ranges.items()
            for factor in [1 if name in tight else _HEADROOM]
        }

    def _round_weights(self, rules):
        """Rounds the weights of the dense layers to the values that they will have.

        Returns:
            The bytes of the file with these weights, the rules, with one more for each layer that
            does not fit its rule, and the ranges of the weights, of which litert-quantizer makes
            the scales.
        """
        model = schema.ModelT.InitFromPackedBuf(self.content)
        ranges = {}
        for layer in dense_layers(model):
            config = _config(rules, _Op.FULLY_CONNECTED, layer.name)
            if config is None:
                continue
            rounded = self._round(model, layer, config.weight_tensor_config)
            if rounded is None:
                rules = (*rules, (f"^{re.escape(layer.name)}", _Op.FULLY_CONNECTED, _DYNAMIC))
                rounded = self._round(model, layer, _WEIGHTS)
            weights, bias, limits = rounded
            _set(model, layer.weights, weights)
            if layer.bias is not None:
                _set(model, layer.bias, bias)
            name = model.subgraphs[0].tensors[layer.weights].name.decode()
            ranges[name] = {"min": -limits, "max": limits}
        return pack(model, self.content), rules, ranges

    def _round(self, model, layer, config):
        """The rounded weights `(M, K)` of a dense layer, its bias, and the limits of its scales.

        None if the layer does not fit the configuration.
        """
        key = layer.name, config.num_bits
        if key not in self._rounded:
            self._rounded[key] = self._round_anew(model, layer, config)
        return self._rounded[key]

    def _round_anew(self, model, layer, config):
        kernel = constant(model, layer.weights).T.astype("float64")
        mean = self.calibration.means[layer.input]
        hessian = self.calibration.covariances[layer.input]
        if layer.bias is None:  # which takes care of the mean
            hessian = hessian + np.outer(mean, mean)
        scales = _scales(kernel, np.diag(hessian), config)
        if scales is None:
            return None
        rounded = round_weights(kernel, hessian, scales, config.num_bits)
        bias = None
        if layer.bias is not None:  # the mean of the outputs stays
            bias = constant(model, layer.bias) + mean @ (kernel - rounded)
        limits = np.float32(scales.T * (2 ** (config.num_bits - 1) - 1))
        return np.float32(rounded.T), bias, limits


def _use_all_levels(model):
    """Gives int8 probabilities, which are never negative, all 256 levels.

    A zero point of 0 wastes the lower half. The second factor of their product needs it, and
    litert-quantizer has one rule for both. (Where the softmax is int8, too, they have them all.)
    """
    graph = model.subgraphs[0]
    producers = {int(index): operator for operator in graph.operators for index in operator.outputs}

    def kind(index):
        return operation_name(model, producers[index]) if index in producers else None

    products = [op for op in graph.operators if operation_name(model, op) == "BATCH_MATMUL"]
    for first in (int(product.inputs[0]) for product in products):
        if kind(first) == "QUANTIZE" and kind(int(producers[first].inputs[0])) == "SOFTMAX":
            probabilities = graph.tensors[first]
            quantization = probabilities.quantization
            is_int8 = probabilities.type == schema.TensorType.INT8
            if is_int8 and quantization.zeroPoint[0] == 0:
                quantization.scale = np.float32(quantization.scale * (127 / 255))
                quantization.zeroPoint = np.array([-128], "int64")


def _in_float(model):
    """Yields rules for products whose first factor is a constant, which LiteRT has not as int8.

    The deploy graph has none; attention pooling has one where Keras' layers are converted.
    """
    for operator in model.subgraphs[0].operators:
        if operation_name(model, operator) == "BATCH_MATMUL":
            first, output = operator.inputs[0], operator.outputs[0]
            if constant(model, first) is not None:
                name = model.subgraphs[0].tensors[output].name.decode()
                yield f"^{re.escape(name)}(;|$)", _Op.BATCH_MATMUL, None


def _config(rules, kind, name):
    """The configuration of an operation: that of the last rule that speaks of it, or None."""
    fitting = [
        config
        for regex, operation, config in rules
        if operation in (_Op.ALL_SUPPORTED, kind) and re.search(regex, name)
    ]
    return fitting[-1] if fitting else None


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
    is_zero = ~kernel.reshape(-1, _BLOCK, kernel.shape[1]).any(axis=1)  # of a dead unit, say
    scales[is_zero] = normal.smallest_normal
    fits = (scales >= normal.smallest_normal) & (scales <= normal.max)
    return scales if fits.all() else None


def _set(model, index, values):
    buffer = model.buffers[model.subgraphs[0].tensors[index].buffer]
    buffer.data = np.frombuffer(np.float32(values).tobytes(), "uint8")
