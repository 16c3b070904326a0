"""What the tensors of a float `.tflite` file hold while it sees images of the training set."""

import dataclasses

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType

_NAMES = {code: name for name, code in vars(schema.BuiltinOperator).items() if name[0] != "_"}


@dataclasses.dataclass(frozen=True)
class DenseLayer:
    """A dense layer of a `.tflite` file: indices of tensors, and its name.

    Attributes:
        name: of the tensor that it puts out.
        input, weights: x `(..., K)`, and W^T `(M, K)`.
        bias: `(M,)`, or None.
    """

    name: str
    input: int
    weights: int
    bias: int | None


def dense_layers(model):
    """The dense layers of a file whose weights are constants.

    Args:
        model: a `ModelT`.

    Returns:
        List of `DenseLayer` in the order of execution.
    """
    graph = model.subgraphs[0]
    layers = []
    for operator in graph.operators:
        if operation_name(model, operator) == "FULLY_CONNECTED":
            x, weights, bias = (*map(int, operator.inputs), -1)[:3]
            if constant(model, weights) is not None:
                name = graph.tensors[operator.outputs[0]].name.decode()
                layers.append(DenseLayer(name, x, weights, None if bias < 0 else bias))
    return layers


def operation_name(model, operator):
    """The name of an operator's kind, such as "FULLY_CONNECTED"."""
    return _NAMES[model.operatorCodes[operator.opcodeIndex].builtinCode]


def constant(model, index):
    """The float32 values of a constant tensor, or None if it is something else."""
    tensor = model.subgraphs[0].tensors[index]
    data = model.buffers[tensor.buffer].data
    if data is None or tensor.type != schema.TensorType.FLOAT32:
        return None
    return np.frombuffer(bytes(data), "float32").reshape(tensor.shape)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Statistics over all images.

    Attributes:
        image: name of the tensor of the images.
        ranges: tensor name -> (smallest, largest value), of the images and of every tensor that
            an operation puts out; arrays of the tensor's rank.
        means: tensor index -> mean input `(K,)`, of the inputs of dense layers.
        covariances: tensor index -> `(K, K)`, of the same.
    """

    image: str
    ranges: dict
    means: dict
    covariances: dict

    @property
    def image_range(self):
        """The smallest and the largest value of an image, or 0 if all are on one side of it."""
        low, high = self.ranges[self.image]
        return min(float(low.item()), 0.0), max(float(high.item()), 0.0)

    def with_image_range(self, low, high):
        """The same with another range of the images: one that is known."""
        shape = self.ranges[self.image][0].shape
        known = np.full(shape, low, "float32"), np.full(shape, high, "float32")
        return dataclasses.replace(self, ranges={**self.ranges, self.image: known})


def calibrate(content, images, advance=lambda: None):
    """Runs images through a float file.

    The ranges are the true ones. litert-quantizer's own, a moving average, clip the few large
    activations that carry the signal of trained ViTs.

    Args:
        content: bytes of a float32 `.tflite` file.
        images: array (N, H, W, C), as the file takes them.
        advance: called after every image.

    Returns:
        A `Calibration`.
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
    inputs = {layer.input for layer in dense_layers(schema.ModelT.InitFromPackedBuf(content))}
    low, high = {}, {}
    moments = {index: _Moments() for index in inputs}
    for image in images:
        interpreter.set_tensor(image_tensor, image[None].astype("float32"))
        interpreter.invoke()
        for index in names:
            values = interpreter.get_tensor(index)
            low[index] = np.minimum(low.get(index, np.inf), values.min(keepdims=True))
            high[index] = np.maximum(high.get(index, -np.inf), values.max(keepdims=True))
            if index in inputs:
                moments[index].add(values.reshape(-1, values.shape[-1]))
        advance()
    return Calibration(
        image=names[image_tensor],
        ranges={name: (low[index], high[index]) for index, name in names.items()},
        means={index: of.mean() for index, of in moments.items()},
        covariances={index: of.covariance() for index, of in moments.items()},
    )


class _Moments:
    """Mean and covariance of rows `(K,)` that come by and by.

    They are measured from the mean of the first rows: of inputs that are large and hardly vary,
    float32 would lose the covariance.
    """

    def __init__(self):
        self.count, self.origin, self.sum, self.products, self.waiting = 0, None, 0, 0, []

    def add(self, rows):
        if self.origin is None:
            self.origin = rows.mean(axis=0)
        rows = rows - self.origin
        self.count += len(rows)
        self.sum = self.sum + rows.sum(axis=0, dtype="float64")
        self.waiting.append(rows)
        if sum(map(len, self.waiting)) >= rows.shape[1]:
            self._multiply()

    def _multiply(self):
        if self.waiting:
            rows = np.concatenate(self.waiting)
            self.products = self.products + rows.T @ rows
            self.waiting = []

    def mean(self):
        return self.origin + self.sum / self.count

    def covariance(self):
        self._multiply()
        shift = self.sum / self.count
        return self.products / self.count - np.outer(shift, shift)
