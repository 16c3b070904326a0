"""The float32 form of a model of any dtype policy, and float32 that is float32."""

import contextlib
import tempfile

import keras
import tensorflow as tf

_OTHER_FLOATS = frozenset({"mixed_bfloat16", "mixed_float16", "bfloat16", "float16", "float64"})
_FLOAT_POLICIES = frozenset({"DTypePolicy", "FloatDTypePolicy"})


def as_float32(model):
    """Returns the model in float32: on its own layers, or copies if their dtype is another one.

    A copy is needed because a layer's compute dtype is part of it: a mixed-precision model would
    leave casts, and bfloat16 operations that no phone has, in the exported graph.

    Args:
        model: functional `keras.Model`.

    Returns:
        A `keras.Model` with the same weights, one float32 tensor in and one out, all of whose
        layers compute in float32.

    Raises:
        ValueError: if the model's class has a `call` of its own.
    """
    if not is_of_layers(model):
        raise ValueError(
            "`model` must compute what its layers do, from its inputs to its outputs. Received: a "
            f"{type(model).__name__}, whose class has a `call` of its own."
        )
    # The same layers as a plain functional model: a Sequential or a named output has no place in
    # what follows, and a compiled model would have its copy compiled.
    model = keras.Model(model.inputs[0], model.outputs[0], name=model.name)
    images = keras.Input(model.inputs[0].shape[1:], name=model.inputs[0].name, dtype="float32")
    if all(_is_float32(layer) for layer in model.layers):
        if model.inputs[0].dtype == "float32":
            return model
        return keras.models.clone_model(model, images, clone_function=lambda layer: layer)
    policy = keras.config.dtype_policy()
    # For layers that a layer creates without handing on its own policy.
    keras.config.set_dtype_policy("float32")
    try:
        copy = keras.models.clone_model(model, images, clone_function=_clone_in_float32)
    finally:
        keras.config.set_dtype_policy(policy)
    if len(copy.weights) == len(model.weights):  # LoRA has more
        copy.set_weights([weight.astype("float32") for weight in model.get_weights()])
    # Through a file, too: there Keras makes anew what a layer computes of its weights, of a
    # Normalization its mean, say, and merges those of LoRA.
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/copy.weights.h5"
        model.save_weights(path)
        copy.load_weights(path)
    return copy


def is_of_layers(model):
    """Whether a model is functional or Sequential, with no `call` of its own class."""
    return type(model).call.__module__.partition(".")[0] == "keras"


def _is_float32(layer):
    """Whether a layer, or every layer of a model used as a layer, keeps to float32."""
    if isinstance(layer, keras.Model):
        return all(_is_float32(inner) for inner in layer.layers)
    return layer.compute_dtype == "float32" and layer.variable_dtype == "float32"


def _clone_in_float32(layer):
    return layer.__class__.from_config(_config_in_float32(layer.get_config()))


def _config_in_float32(config):
    """Copies a layer's config with every floating-point dtype or policy named in it as float32."""
    if isinstance(config, dict):
        if config.get("class_name") in _FLOAT_POLICIES:
            return keras.dtype_policies.serialize(keras.DTypePolicy("float32"))
        return {
            key: "float32"
            if key == "dtype" and isinstance(value, str) and value in _OTHER_FLOATS
            else _config_in_float32(value)
            for key, value in config.items()
        }
    if isinstance(config, (list, tuple)):
        return [_config_in_float32(value) for value in config]
    return config


@contextlib.contextmanager
def full_float32():
    """Keeps GPUs from rounding float32 products to TensorFloat-32, which costs three digits."""
    settings = tf.config.experimental
    before = settings.tensor_float_32_execution_enabled()
    settings.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        settings.enable_tensor_float_32_execution(before)
