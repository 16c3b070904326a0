"""Export to a SavedModel that TensorFlow alone can load and serve."""

import contextlib
import pathlib

import keras
import numpy as np
import tensorflow as tf

from keras_vit.config import check_positive_int
from keras_vit.data.pipeline import resize
from keras_vit.files import check_new, replacing
from keras_vit.layers import PatchEncoder

from .decoding import decode_image
from .metadata import check_class_names
from .precision import as_float32, is_of_layers
from .report import ExportReport, TensorInfo

# Which layer with weights may be the last one of a model of `build_vit` without a head.
_LAST_OF_FEATURES = ("encoder_norm", "pooling", "pooled_norm", "pre_logits")
# What may stand before the normalisation, beside the layers named Random...
_KEEP_THE_RANGE = (
    keras.layers.InputLayer,
    keras.layers.Identity,
    keras.layers.Dropout,
    keras.layers.GaussianDropout,
    keras.layers.GaussianNoise,
    keras.layers.RandAugment,
    keras.layers.AugMix,
    keras.layers.MixUp,
    keras.layers.CutMix,
    keras.layers.Resizing,
    keras.layers.CenterCrop,
    keras.layers.Cropping2D,
    keras.layers.ZeroPadding2D,
)
# What may stand behind the activation that a model ends in. Before a merge of several heads stands
# the last one, which speaks for all.
_LOOKED_THROUGH = ("identity", "reshape", "flatten", "cast", "dropout")
_LOOKED_THROUGH += ("concatenate", "average", "add")


def export_saved_model(model, path, *, labels=None, top=5, overwrite=False):
    """Exports a Keras classifier as a SavedModel folder.

    Its signatures take any batch size B and compute in float32, whatever the dtype policy of the
    model:

    - `serving_default`: float32 `images` (B, height, width, channels) -> float32 `logits`
      (B, classes), or `probabilities` of a model that ends in a softmax or sigmoid.
    - `serve_bytes`: string `encoded` (B,), JPEG or PNG data of any sizes -> the k most likely
      classes, the most likely first: float32 `probabilities` (B, k), string `classes` (B, k) and
      int32 `indices` (B, k). The images are decoded (see `decode_image`) and resized as in
      evaluation, and the probabilities are the softmax of the logits: those of `keras-vit
      predict`. Data that are no such image raise `tf.errors.InvalidArgumentError`.
    - `features`: float32 `images` (B, height, width, channels) -> float32 `features` (B, D), what
      the head takes: what `build_vit(num_classes=0)` gives, or the input of the last `Dense` of
      any other model.

    ```python
    serve = tf.saved_model.load(path).signatures["serve_bytes"]
    best = serve(encoded=tf.constant([jpeg]))
    name, probability = best["classes"][0, 0], best["probabilities"][0, 0]
    ```

    Left out is `serve_bytes` of a model without a head or of one output, and of one that does not
    normalise RGB pixels in [0, 255] itself, by a `Rescaling` as `build_vit(normalization=...)`
    makes: what its images are is not known. Left out is `features` where there is no such layer.

    Args:
        model: functional `keras.Model`, images (B, H, W, C) -> logits (B, classes); after a
            softmax or sigmoid of its own, `serve_bytes` takes no other.
        path: folder to write.
        labels: optional sequence of class names; without them `classes` are the indices.
        top: how many classes `serve_bytes` names, at least 1; all of them if there are fewer.
        overwrite: whether an existing SavedModel may be replaced.

    Returns:
        An `ExportReport`.

    Raises:
        TypeError: if `model` is not a `keras.Model`, or `labels` are not strings.
        ValueError: if `path` exists, the model has several inputs or outputs, sizes that are not
            static or a `call` of its own class, the number of `labels` is not the number of
            classes, or `top` is below 1.
        OSError: if the disk is full, say. What was at `path` is still there then.
    """
    check_model(model)
    labels = check_labels(labels, model)
    check_positive_int("top", top)
    path = pathlib.Path(path)
    check_target(path, overwrite, _is_saved_model, "a SavedModel folder")
    with replacing(path) as folder:
        write_endpoints(folder, _endpoints(as_float32(model), labels, top))
    return ExportReport.create(
        path,
        mode="saved_model",
        labels=labels,
        input=TensorInfo("images", (None, *model.inputs[0].shape[1:]), "float32"),
        output=TensorInfo(output_name(model), (None, *model.outputs[0].shape[1:]), "float32"),
        ops={},
    )


def _is_saved_model(path):
    return (path / "saved_model.pb").is_file()


def write_endpoints(path, endpoints):
    """Writes a SavedModel of signatures: name -> (function of one tensor, its `TensorSpec`)."""
    # Not `track(model)`: an endpoint brings its variables along, and tracking stores them twice.
    archive = keras.export.ExportArchive()
    for name, (serve, spec) in endpoints.items():
        archive.add_endpoint(name, serve, input_signature=[spec])
    try:
        with _quiet_tensorflow():
            archive.write_out(path, verbose=False)
    except tf.errors.OpError as error:  # what a full disk is there
        raise OSError(f"The SavedModel cannot be written: {error.message}") from error


@contextlib.contextmanager
def _quiet_tensorflow():
    """Keeps TensorFlow from saying where it writes, which it does in notebooks alone."""
    logger = tf.get_logger()
    before = logger.level
    logger.setLevel("WARNING")
    try:
        yield
    finally:
        logger.setLevel(before)


def _endpoints(model, labels, top):
    """The signatures that a float32 model can answer, as `write_endpoints` takes them."""
    endpoints = {"serving_default": _outputs_endpoint(model)}
    several = model.outputs[0].shape[-1] > 1  # of one, a softmax is always 1
    if takes_pixels(model) and several and not is_headless(model):
        endpoints["serve_bytes"] = _bytes_endpoint(model, labels, top)
    extractor = _feature_extractor(model)
    if extractor is not None:
        endpoints["features"] = _features_endpoint(extractor)
    return endpoints


def _outputs_endpoint(model):
    spec, name = _images_spec(model), output_name(model)

    def serve(images):
        images = tf.ensure_shape(images, spec.shape)  # which a signature does not do by itself
        return {name: tf.cast(model(images, training=False), tf.float32)}

    return serve, spec


def _bytes_endpoint(model, labels, top):
    image_size = tuple(model.inputs[0].shape[1:3])
    classes = model.outputs[0].shape[-1]
    names = [str(index) for index in range(classes)] if labels is None else list(labels)
    is_logits = gives_logits(model)

    def read(data):
        return resize(decode_image(data), image_size)

    def serve(encoded):
        pixels = tf.TensorSpec((*image_size, 3), tf.uint8)
        with tf.device("CPU:0"):  # a GPU would get each byte that is looked at on its own
            images = tf.map_fn(read, encoded, fn_output_signature=pixels)
        scores = tf.cast(model(tf.cast(images, tf.float32), training=False), tf.float32)
        probabilities = tf.nn.softmax(scores) if is_logits else scores
        probabilities, indices = tf.math.top_k(probabilities, k=min(top, classes))
        return {
            "probabilities": probabilities,
            "classes": tf.gather(tf.constant(names), indices),
            "indices": indices,
        }

    return serve, tf.TensorSpec((None,), tf.string, "encoded")


def _features_endpoint(extractor):
    spec = _images_spec(extractor)

    def serve(images):
        images = tf.ensure_shape(images, spec.shape)
        return {"features": tf.cast(extractor(images, training=False), tf.float32)}

    return serve, spec


def _images_spec(model):
    return tf.TensorSpec((None, *model.inputs[0].shape[1:]), tf.float32, "images")


def takes_pixels(model):
    """Whether a model takes RGB images in [0, 255], which it normalises itself."""
    return model.inputs[0].shape[-1] == 3 and normalizes(model)


def normalizes(model):
    """Whether a model takes images in [0, 255], of any number of channels.

    Its first `Rescaling` then scales them down, by 1 / (255 std), of which no std in use makes
    more than 0.1. For pixels in [0, 1] it would be 1 / std, at least 1.
    """
    for operation in _operations(model):
        if isinstance(operation, keras.layers.Rescaling):
            return bool(np.all(np.less(operation.scale, 0.1)))
        if not _keeps_the_range(operation):
            return False
    return False


def check_pixels(name, images, model):
    """ValueError for images in [0, 1] where a model takes [0, 255].

    Trained with them, it may even be right; but a phone feeds its file what the metadata say.
    """
    if normalizes(model) and 0 < images.max() <= 1:
        raise ValueError(
            f"`{name}` must be in [0, 255]: the model normalises its images itself. Received: "
            f"values up to {images.max():.3g}."
        )


def _operations(model):
    """The layers and the functions of keras.ops of a model and of those within it, in order.

    A model whose class has a `call` of its own is one of them: its layers may be in any order.
    """
    for operation in getattr(model, "operations", model.layers):
        if isinstance(operation, keras.Model) and is_of_layers(operation):
            yield from _operations(operation)
        else:
            yield operation


def _keeps_the_range(operation):
    """Whether the pixels behind a layer are in the range of those before it."""
    name = type(operation).__name__
    is_random = name.startswith("Random") and isinstance(operation, keras.layers.Layer)
    return is_random or name == "Cast" or isinstance(operation, _KEEP_THE_RANGE)


def ends_in_softmax(model):
    """Whether a model gives the probabilities of its classes rather than logits."""
    return _last_activation(model) == "softmax"


def gives_logits(model):
    """Whether a model ends in neither a softmax nor a sigmoid."""
    return _last_activation(model) is None


def output_name(model):
    """What a signature calls the outputs of a model."""
    return "logits" if gives_logits(model) else "probabilities"


def _last_activation(model):
    """The activation that a model ends in, "softmax" or "sigmoid", or None."""
    for operation in reversed(list(_operations(model))):
        kind = type(operation).__name__.lower()  # of a layer, or of a function of keras.ops
        if kind in ("softmax", "sigmoid"):
            return kind
        if isinstance(operation, keras.Model):  # only its outputs say what it ends in
            return "softmax" if _sums_to_one(model) else None
        activation = getattr(operation, "activation", None)
        name = getattr(activation, "__name__", None)
        if name in ("softmax", "sigmoid"):
            return name
        if kind not in _LOOKED_THROUGH and not (kind == "activation" and name == "linear"):
            return None
    return None


def _sums_to_one(model):
    """Whether a model gives probabilities for images of noise."""
    noise = np.random.default_rng(0).uniform(0, 255, (2, *model.inputs[0].shape[1:]))
    outputs = np.asarray(model(noise.astype("float32"), training=False), "float32")
    return bool(np.all(outputs >= 0) and np.allclose(outputs.sum(axis=-1), 1, atol=0.01))


def _heads(model):
    """The dense layers that give the classes: two of a model with a distillation token."""
    dense = [
        layer
        for layer in model.layers
        if isinstance(layer, keras.layers.Dense) and layer.name != "pre_logits"
    ]
    named = [layer for layer in dense if layer.name in ("head", "head_distillation")]
    return named or dense[-1:]


def is_headless(model):
    """Whether nothing with weights comes after the features of a `build_vit` model."""
    operations = list(_operations(model))
    if not any(isinstance(operation, PatchEncoder) for operation in operations):
        return False
    last = [operation for operation in operations if getattr(operation, "weights", ())][-1]
    return last.name in _LAST_OF_FEATURES


def _feature_extractor(model):
    """The part of a model that gives its features (B, D), on the same weights, or None.

    They are what the head takes, the mean of both where there are two heads.
    """
    if is_headless(model):
        return model
    heads, features = _heads(model), []

    def call(layer, *args, **kwargs):
        if layer in heads:
            features.append((*args, *kwargs.values())[0])
        return layer(*args, **kwargs)

    # Wired anew, because a layer's own `input` may belong to another model that shares it.
    copy = keras.models.clone_model(model, clone_function=lambda layer: layer, call_function=call)
    if not features or any(len(tensor.shape) != 2 for tensor in features):
        return None
    outputs = features[0] if len(features) == 1 else keras.layers.average(features)
    return keras.Model(copy.inputs[0], outputs)


def check_model(model):
    """Raises unless the model is one image classifier with static sizes, on TensorFlow."""
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"`model` must be a keras.Model. Received: model={model!r} of type "
            f"{type(model).__name__}."
        )
    inputs, outputs = (getattr(model, name, None) or () for name in ("inputs", "outputs"))
    if len(inputs) != 1 or len(outputs) != 1:
        raise ValueError(
            "`model` must be functional, with one input and one output. Received a model with "
            f"{len(inputs)} inputs and {len(outputs)} outputs."
        )
    for what, shape, rank in (("input", inputs[0].shape, 4), ("output", outputs[0].shape, 2)):
        if len(shape) != rank or None in shape[1:]:
            wanted = "(None, height, width, channels)" if rank == 4 else "(None, classes)"
            raise ValueError(
                f"The {what} of `model` must have a static shape {wanted}. Received: {shape}."
            )
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            "Export needs Keras on its TensorFlow backend. Received: "
            f"backend={keras.backend.backend()!r}."
        )


def check_labels(labels, model):
    """Returns the class names as a tuple, or None; raises unless there is one per output."""
    if labels is None:
        return None
    check_class_names(labels, model.outputs[0].shape[-1])
    return tuple(labels)


def check_target(path, overwrite, is_export, kind):
    """Raises unless the output may be written.

    Args:
        path: `pathlib.Path` of the output.
        overwrite: whether an earlier export may be replaced.
        is_export: function from a path to whether it is such an export; anything else that
            exists is left alone.
        kind: what `is_export` looks for, for the message.
    """
    check_new(path, overwrite)
    if path.exists() and not is_export(path):
        raise ValueError(
            f"The output exists and is not {kind}, so it is left alone. Received: path='{path}'."
        )
