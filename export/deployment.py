"""What of a Keras model becomes the deploy graph: all of it, a ViT within it, or nothing."""

import dataclasses

import keras
import numpy as np
import tensorflow as tf

from keras_vit.layers import TransformerBlock
from keras_vit.model import vit_arguments

from .folding import DeployModel, fold
from .graph import forward
from .precision import is_of_layers

_BACKBONE = {"normalization", "stem", "patches", "patch_encoder", "encoder_norm", "pooled_norm"}
_BACKBONE |= {"pooling", "distillation_pooling"}
_HEAD = {"pre_logits", "head", "head_distillation", "average"}
_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True, eq=False)
class Deployment:
    """A model as the function that is converted: `before`, the deploy graph, `after`.

    Attributes:
        model: the Keras model, float32.
        vit: the folded ViT, or None if the model is converted as it is.
        before: what stands before the ViT, a Keras model or None.
        after: what stands after it, a Keras model or None.
        note: why the model is converted as it is, or None.
    """

    model: keras.Model
    vit: DeployModel | None = None
    before: keras.Model | None = None
    after: keras.Model | None = None
    note: str | None = None

    def __call__(self, images):
        """The outputs `(1, classes)` for one image `(1, H, W, C)`."""
        if self.vit is None:
            return self.model(images, training=False)
        x = forward(self.vit, self.vit_inputs(images))
        return x if self.after is None else self.after(x, training=False)

    def vit_inputs(self, images):
        """Images as the ViT takes them."""
        return images if self.before is None else self.before(images, training=False)


def deploy(model):
    """Folds a Keras model for a phone.

    Args:
        model: functional `keras.Model` in float32, images (B, H, W, C) -> (B, classes).

    Returns:
        A `Deployment`. A model of `build_vit`, whatever its head, and a model that has such a one
        as a layer, at any depth, get the deploy graph. Of any other, and where the graph does not
        give the model's outputs, the note says what is lost.
    """
    try:
        deployment = _found_in(model)
        error = deployment and _error(deployment)
    except (ValueError, KeyError):  # something else of the ViT is read; Keras 3.12 sees it late
        error = None
    if error is None:
        return Deployment(
            model,
            note="no model of build_vit was found in it: its layers are converted as they are, "
            "which may make the file slower, and split it among delegates",
        )
    if error <= _TOLERANCE:
        return deployment
    return Deployment(
        model,
        note=f"the deploy graph differs from the model by {error:.1e} of the largest output: the "
        "model's layers are converted as they are, which may make the file slower",
    )


def _found_in(model):
    """The `Deployment` of a model that is a ViT or has one within it, or None."""
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        return None
    # Functional: the layers of a Sequential cannot be wired anew.
    model = keras.Model(model.inputs[0], model.outputs[0])
    return _flat(model) if _is_vit(model) else _nested(model)


def _is_vit(model):
    try:
        vit_arguments(model)
    except (ValueError, AttributeError, KeyError):  # other layers of the same names
        return False
    return True


def _own_layers(model):
    """The names of the layers that `build_vit` made; another layer may have a name of its head."""
    blocks = {layer.name for layer in model.layers if isinstance(layer, TransformerBlock)}
    inputs = {layer.name for layer in model.layers if isinstance(layer, keras.layers.InputLayer)}
    kinds = keras.layers.Dense | keras.layers.Average
    head = {layer.name for layer in model.layers if isinstance(layer, kinds)} & _HEAD
    return _BACKBONE | blocks | inputs | head


def _flat(model):
    """Of a model of `build_vit`, or one made from its outputs; None if it is something else."""
    layers = {layer.name: layer for layer in model.layers}
    others = {operation.name for operation in model.operations} - _own_layers(model)
    if "distillation_pooling" not in layers:
        if not others:
            return Deployment(model, fold(model))
        end, head = "pooled_norm" if "pooled_norm" in layers else "pooling", False
    elif "average" in layers:  # of two heads, or of the features of both tokens
        end, head = "average", "head_distillation" in layers
        if not others and head == ("head" in layers):
            return Deployment(model, fold(model))
    else:
        return None
    _, y, clone = _wired_anew(model, layers[end])
    return Deployment(model, fold(model, head), after=keras.Model(y, clone.output))


def _nested(model):
    """Of a model that has one of the above among its layers, or within one of them, or None."""
    layers = [each for each in model.layers if isinstance(each, keras.Model) and is_of_layers(each)]
    found = {layer: inner for layer in layers if (inner := _found_in(layer)) is not None}
    if len(found) != 1:
        return None
    ((layer, inner),) = found.items()
    x, y, clone = _wired_anew(model, layer)
    before = None if x is clone.input else keras.Model(clone.input, x)
    after = None if y is clone.output else keras.Model(y, clone.output)
    return Deployment(
        model,
        inner.vit,
        before=_one_after_the_other(before, inner.before),
        after=_one_after_the_other(inner.after, after),
    )


def _one_after_the_other(first, second):
    """Two models, either of which may be None, as one."""
    if first is None or second is None:
        return first or second
    return keras.Model(first.input, second(first.output))


def _wired_anew(model, part):
    """What goes into a layer of a model and out of it, in a model of the same layers.

    The layer's own `output` may belong to another model that shares it.
    """
    ends = {}

    def call(layer, *args, **kwargs):
        y = layer(*args, **kwargs)
        if layer is part:
            ends["in"], ends["out"] = (*args, *kwargs.values())[0], y
        return y

    clone = keras.models.clone_model(model, clone_function=lambda layer: layer, call_function=call)
    return ends["in"], ends["out"], clone


def _error(deployment):
    """The largest difference from the Keras model on images of noise, over the largest output.

    Of noise in [0, 255] and in [-1, 1], as models take either.
    """
    shape = deployment.model.inputs[0].shape[1:]
    noise = np.random.default_rng(0).uniform(0, 1, (1, *shape))
    compute, errors = tf.function(deployment, autograph=False), []
    for image in (255 * noise, 2 * noise - 1):
        image = image.astype("float32")
        expected = np.asarray(deployment.model(image, training=False))
        result = np.asarray(compute(tf.constant(image)))
        if result.shape != expected.shape:
            return np.inf
        errors.append(np.abs(result - expected).max() / max(np.abs(expected).max(), 1e-6))
    return float(max(errors))
