"""The model of a checkpoint as training, probing and explaining take it."""

import warnings

from keras_vit.weights import from_checkpoint

# For a checkpoint that does not say how its pixels were normalised: that of the paper's code.
ASSUMED_NORMALIZATION = "minus_one_one"


def load_backbone(weights, *, num_classes=0, **arguments):
    """The model of a checkpoint, without its head by default, for RGB images in [0, 255].

    Args:
        weights: A checkpoint, as `keras_vit.from_checkpoint` takes it.
        num_classes: 0 for no head, None for the checkpoint's.
        **arguments: Of `from_checkpoint`; None stands for what the checkpoint says.

    Returns:
        A model of `build_vit`, images `(B, H, W, 3)` in [0, 255] -> features `(B, D)`, or logits.

    Raises:
        ValueError: As `from_checkpoint`; or the model takes other images than RGB.

    Warns:
        UserWarning: The checkpoint does not say how pixels are normalised: [-1, 1] was taken.
    """
    if str(weights).endswith(".keras"):
        raise ValueError(
            "Weights are a checkpoint (.npz, .safetensors), not a model file of Keras: write one "
            f"with keras_vit.save_checkpoint(keras.saving.load_model({str(weights)!r}), "
            "'vit.safetensors', 'timm'). An interrupted run goes on with "
            f"`keras-vit train --resume RUN`. Received: weights={str(weights)!r}."
        )
    arguments = {name: value for name, value in arguments.items() if value is not None}
    model = from_checkpoint(weights, num_classes=num_classes, **arguments)
    if model.input_shape[-1] != 3:
        raise ValueError(
            "The checkpoint's model must take images of 3 channels, as the data are. "
            f"Received: weights={str(weights)!r}, of {model.input_shape[-1]} channels."
        )
    if "normalization" not in {layer.name for layer in model.layers}:
        warnings.warn(
            f"{weights} does not say its normalization: took {ASSUMED_NORMALIZATION!r}. Pass it "
            "to be sure.",
            stacklevel=2,
        )
        arguments["normalization"] = ASSUMED_NORMALIZATION
        model = from_checkpoint(weights, num_classes=num_classes, **arguments)
    return model
