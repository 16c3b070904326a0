"""The ResNet stem of the paper's hybrids (Section 3.1, "Hybrid Architecture")."""

import keras
from keras import ops

from keras_vit.config import check_positive_int


@keras.saving.register_keras_serializable(package="keras_vit")
class StandardizedConv2D(keras.layers.Conv2D):
    """A convolution whose kernel has mean 0 and standard deviation 1 per output channel.

    w <- (w - mean(w)) / (std(w) + 1e-5), over the kernel's height, width and input channels.

    Source: "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization"
    (arXiv 1903.10520); epsilon outside the root as in the paper's code.
    """

    def add_weight(self, *args, name=None, autocast=True, **kwargs):
        # In mixed precision the kernel is rounded when it is standardised, not before.
        autocast = autocast and name != "kernel"
        return super().add_weight(*args, name=name, autocast=autocast, **kwargs)

    def convolution_op(self, inputs, kernel):
        kernel = ops.cast(kernel, self.variable_dtype)
        kernel = kernel - ops.mean(kernel, axis=(0, 1, 2))
        kernel = kernel / (ops.std(kernel, axis=(0, 1, 2)) + 1e-5)
        return super().convolution_op(inputs, ops.cast(kernel, inputs.dtype))


def _conv(filters, kernel_size, strides, dtype, name):
    return StandardizedConv2D(
        filters,
        kernel_size,
        strides=strides,
        padding="same",
        data_format="channels_last",
        use_bias=False,
        kernel_initializer="lecun_normal",
        dtype=dtype,
        name=name,
    )


def _group_norm(dtype, name, gamma_initializer="ones"):
    return keras.layers.GroupNormalization(
        groups=32, epsilon=1e-6, gamma_initializer=gamma_initializer, dtype=dtype, name=name
    )


@keras.saving.register_keras_serializable(package="keras_vit")
class BottleneckUnit(keras.layers.Layer):
    """A ResNet bottleneck: y = relu(shortcut(x) + conv1x1(conv3x3(conv1x1(x)))).

    Convolutions are weight-standardised and followed by GroupNorm and, but for the last, ReLU.
    The shortcut is a 1x1 convolution with GroupNorm where the shape changes.

    Args:
        width: Channels of the inner convolutions; the output has `4 * width`.
        strides: Stride of the 3x3 convolution and of the shortcut.

    Call arguments:
        x: `(B, H, W, C)`.

    Returns:
        `(B, ceil(H / strides), ceil(W / strides), 4 * width)`.

    Raises:
        ValueError: `width` or `strides` is not a positive int.

    Source: google-research/vision_transformer, `models_resnet.py`.
    """

    def __init__(self, width, strides=1, **kwargs):
        super().__init__(**kwargs)
        check_positive_int("width", width)
        check_positive_int("strides", strides)
        self.width = width
        self.strides = strides
        dtype = self.dtype_policy
        self.conv1 = _conv(width, 1, 1, dtype, "conv1")
        self.gn1 = _group_norm(dtype, "gn1")
        self.conv2 = _conv(width, 3, strides, dtype, "conv2")
        self.gn2 = _group_norm(dtype, "gn2")
        self.conv3 = _conv(4 * width, 1, 1, dtype, "conv3")
        self.gn3 = _group_norm(dtype, "gn3", gamma_initializer="zeros")

    def build(self, input_shape):
        self.projects = input_shape[-1] != 4 * self.width or self.strides != 1
        if self.projects:
            self.conv_proj = _conv(4 * self.width, 1, self.strides, self.dtype_policy, "conv_proj")
            self.gn_proj = _group_norm(self.dtype_policy, "gn_proj")
            self.conv_proj.build(input_shape)
            self.gn_proj.build(self.compute_output_shape(input_shape))
        shape = input_shape
        for layer in (self.conv1, self.gn1, self.conv2, self.gn2, self.conv3, self.gn3):
            layer.build(shape)
            shape = layer.compute_output_shape(shape)

    def call(self, x):
        shortcut = self.gn_proj(self.conv_proj(x)) if self.projects else x
        x = ops.relu(self.gn1(self.conv1(x)))
        x = ops.relu(self.gn2(self.conv2(x)))
        return ops.relu(shortcut + self.gn3(self.conv3(x)))

    def compute_output_shape(self, input_shape):
        batch, *sides, _ = input_shape
        sides = [side and -(-side // self.strides) for side in sides]  # None stays None
        return batch, *sides, 4 * self.width

    def get_config(self):
        return {**super().get_config(), "width": self.width, "strides": self.strides}


@keras.saving.register_keras_serializable(package="keras_vit")
class ResNetStem(keras.layers.Layer):
    """The convolutional stem of a hybrid: images -> the feature map that is cut into patches.

    A 7x7 convolution and a 3x3 max pooling, of stride 2 each, then one stage of bottleneck
    units per entry of `units`, the second and later ones of stride 2.

    Args:
        units: Bottleneck units of each stage, such as `(3, 4, 9)`; `()` is the root alone.
        width: Channels of the root; a multiple of 32. Stage s (from 0) puts out
            `4 * width * 2**s`.

    Call arguments:
        images: `(B, H, W, C)`.

    Returns:
        `(B, H / s, W / s, C')`, with s = 4 for no or one stage, and twice more for each further
        one, rounded up.

    Raises:
        ValueError: `width` is not a multiple of 32.

    Source: google-research/vision_transformer, `models_vit.py`; "R50" there has stages (3, 4, 9)
    for a total stride of 16.
    """

    def __init__(self, units, width=64, **kwargs):
        super().__init__(**kwargs)
        if width % 32:
            raise ValueError(f"`width` must be a multiple of 32. Received: width={width}.")
        self.units = tuple(units)
        self.width = width
        dtype = self.dtype_policy
        self.conv_root = _conv(width, 7, 2, dtype, "conv_root")
        self.gn_root = _group_norm(dtype, "gn_root")
        self.pool_root = keras.layers.MaxPooling2D(
            3,
            strides=2,
            padding="same",
            data_format="channels_last",
            dtype=dtype,
            name="pool_root",
        )
        self.stages = [
            BottleneckUnit(
                width * 2**stage,
                strides=2 if stage > 0 and unit == 0 else 1,
                dtype=dtype,
                name=f"block{stage + 1}_unit{unit + 1}",
            )
            for stage, num_units in enumerate(self.units)
            for unit in range(num_units)
        ]

    def build(self, input_shape):
        shape = input_shape
        for layer in (self.conv_root, self.gn_root, self.pool_root, *self.stages):
            layer.build(shape)
            shape = layer.compute_output_shape(shape)

    def call(self, images):
        x = self.pool_root(ops.relu(self.gn_root(self.conv_root(images))))
        for unit in self.stages:
            x = unit(x)
        return x

    def compute_output_shape(self, input_shape):
        shape = input_shape
        for layer in (self.conv_root, self.pool_root, *self.stages):
            shape = layer.compute_output_shape(shape)
        return shape

    def get_config(self):
        return {**super().get_config(), "units": self.units, "width": self.width}
