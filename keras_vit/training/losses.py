"""The loss of a recipe."""

import keras
from keras import ops

from keras_vit.weights.loading import HEAD


@keras.saving.register_keras_serializable(package="keras_vit")
class SigmoidCrossEntropy(keras.losses.Loss):
    """A yes or no for each class: the sum over the classes, and the mean over the images.

    -sum_k (y_k log p_k + (1 - y_k) log(1 - p_k)), p = sigmoid(logits).

    Labels may be soft, as MixUp makes them. The initial loss is smallest with a head whose bias is
    about -ln(K); see `set_head_bias`.

    Args:
        label_smoothing: s in [0, 1): the labels become (1 - s) y + s / K, K the classes.
        name: Name of the loss.
        **kwargs: Of `keras.losses.Loss`.

    Raises:
        ValueError: `label_smoothing` is out of its range.

    Source: `sigmoid_xent` of big_vision (`utils.py`). DeiT III (arXiv 2204.07118) takes the mean
    over the classes, this over K, and labels that are 1 for both classes of a blended image.
    Label smoothing is that of the softmax; `keras.losses.BinaryCrossentropy` moves towards 1/2.
    """

    def __init__(self, label_smoothing=0.0, name="sigmoid_cross_entropy", **kwargs):
        super().__init__(name=name, **kwargs)
        if not 0 <= label_smoothing < 1:
            raise ValueError(
                f"`label_smoothing` must be in [0, 1). Received: label_smoothing={label_smoothing}."
            )
        self.label_smoothing = label_smoothing

    def call(self, y_true, y_pred):
        """Labels and logits `(B, K)` -> `(B,)`."""
        if self.label_smoothing:
            share = self.label_smoothing / y_true.shape[-1]
            y_true = (1 - self.label_smoothing) * y_true + share
        return ops.sum(ops.binary_crossentropy(y_true, y_pred, from_logits=True), axis=-1)

    def get_config(self):
        return {**super().get_config(), "label_smoothing": self.label_smoothing}


def build_loss(recipe):
    """The loss of a recipe, on labels and logits `(B, K)`.

    Args:
        recipe: A `Recipe`; its `loss` and `label_smoothing` are read.

    Returns:
        `keras.losses.CategoricalCrossentropy` from logits, or `SigmoidCrossEntropy`.
    """
    if recipe.loss == "sigmoid":
        return SigmoidCrossEntropy(recipe.label_smoothing)
    return keras.losses.CategoricalCrossentropy(
        from_logits=True, label_smoothing=recipe.label_smoothing
    )


def set_head_bias(model, value):
    """Sets the bias of the head, and of a distillation token's head, to one value.

    With a sigmoid loss and a kernel of zeros, -ln(K) makes every class as likely as it is among K
    balanced ones, so that training does not begin by unlearning K - 1 times "yes".

    Args:
        model: A model of `build_vit` with a head.
        value: The value, a float.

    Raises:
        ValueError: The model has no head.

    Source: `init_head_bias` of big_vision, -6.9 for 1,000 classes and -10 for 21,843
    (`configs/vit_i1k.py`, `configs/vit_i21k.py`).
    """
    biases = [w for w in model.weights if w.path.startswith(HEAD[1:]) and w.name == "bias"]
    if not biases:
        raise ValueError(
            "The bias is that of a model of `build_vit` with a head (num_classes > 0). "
            f"Received: {model.name!r}, without one."
        )
    for bias in biases:
        bias.assign(ops.full(bias.shape, value))
