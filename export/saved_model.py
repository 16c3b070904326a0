"""Export to a SavedModel that TensorFlow alone can load and serve."""

import pathlib

import keras
import tensorflow as tf

from keras_vit.files import check_new, replacing

from .precision import as_float32
from .report import ExportReport, TensorInfo


def export_saved_model(model, path, *, labels=None, overwrite=False):
    """Exports a Keras classifier as a SavedModel folder.

    Its signature `serving_default` takes float32 `images` (B, height, width, channels) with any
    batch size and gives a dictionary with float32 `logits` (B, classes), whatever the dtype
    policy of the model:

    ```python
    serve = tf.saved_model.load(path).signatures["serving_default"]
    logits = serve(images=images)["logits"]
    ```

    Args:
        model: functional `keras.Model`, images (B, H, W, C) -> logits (B, classes).
        path: folder to write.
        labels: optional sequence of class names, recorded in the report.
        overwrite: whether an existing SavedModel may be replaced.

    Returns:
        An `ExportReport`.

    Raises:
        TypeError: if `model` is not a `keras.Model`, or `labels` are not strings.
        ValueError: if `path` exists, the model has several inputs or outputs or sizes that are
            not static, or the number of `labels` is not the number of classes.
    """
    check_model(model)
    labels = check_labels(labels, model)
    path = pathlib.Path(path)
    check_target(path, overwrite, _is_saved_model, "a SavedModel folder")
    with replacing(path) as folder:
        write_saved_model(as_float32(model), folder)
    return ExportReport.create(
        path,
        mode="saved_model",
        labels=labels,
        input=TensorInfo("images", (None, *model.inputs[0].shape[1:]), "float32"),
        output=TensorInfo("logits", (None, *model.outputs[0].shape[1:]), "float32"),
        ops={},
    )


def _is_saved_model(path):
    return (path / "saved_model.pb").is_file()


def write_saved_model(model, path, batch_size=None):
    """Writes a SavedModel with the signature `serving_default`: images -> {logits}.

    Args:
        model: float32 functional `keras.Model`.
        path: folder to write; must not exist.
        batch_size: static batch size, or None for any.
    """

    def serve(images):
        return {"logits": tf.cast(model(images, training=False), tf.float32)}

    shape = (batch_size, *model.inputs[0].shape[1:])
    # Not `track(model)`: the endpoint brings its variables along, and tracking stores them twice.
    archive = keras.export.ExportArchive()
    archive.add_endpoint(
        "serving_default", serve, input_signature=[tf.TensorSpec(shape, tf.float32, "images")]
    )
    archive.write_out(path, verbose=False)


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
    if isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
        raise TypeError(f"`labels` must be a sequence of strings. Received: labels={labels!r}.")
    classes = model.outputs[0].shape[-1]
    if len(labels) != classes:
        raise ValueError(
            f"`labels` must name each of the model's {classes} outputs. Received: "
            f"{len(labels)} labels."
        )
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
