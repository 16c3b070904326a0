"""The optimizer of a recipe, and learning rates that differ by layer."""

import keras
from keras import ops


class _LayerRates:
    """Scales the learning rate, and the weight decay with it, by the layer of a variable.

    Keras' own weight decay knows one rate alone, so the decay is part of the step here.
    """

    def __init__(self, learning_rate=0.001, *, layer_rates, weight_decay=0.0, **kwargs):
        super().__init__(learning_rate, **kwargs)
        self.layer_rates = dict(layer_rates)
        self.kernel_decay = weight_decay

    def build(self, variables):
        super().build(variables)
        # By the variable's index: TensorFlow's variables, which a step receives, have no path.
        self.rates = [self.layer_rates.get(v.path.split("/")[0], 1.0) for v in variables]
        self.decays = [self.kernel_decay * (v.name == "kernel") for v in variables]

    def update_step(self, gradient, variable, learning_rate):
        index = self._get_variable_index(variable)
        rate = ops.cast(learning_rate, variable.dtype) * self.rates[index]
        if self.decays[index]:
            self.assign_sub(variable, variable * (rate * self.decays[index]))
        super().update_step(gradient, variable, rate)

    def get_config(self):
        return {
            **super().get_config(),
            "layer_rates": dict(self.layer_rates),
            "weight_decay": self.kernel_decay,
        }


@keras.saving.register_keras_serializable(package="keras_vit")
class LayerRatesAdamW(_LayerRates, keras.optimizers.Adam):
    """AdamW with a learning rate for each layer.

    w <- w - r lr (m / (sqrt(v) + epsilon) + decay w), r the rate of w's layer; m and v are Adam's
    moments, corrected for their start. The decay acts on kernels alone.

    Args:
        learning_rate: As in `keras.optimizers.Adam`.
        layer_rates: Dict from the name of a layer of the model, the first part of a variable's
            path, to r >= 0; layers that are not in it have 1. See `layer_rates`.
        weight_decay: Decay of the kernels, at least 0.
        **kwargs: As in `keras.optimizers.Adam`.

    Source: AdamW, arXiv 1711.05101, Algorithm 2; Keras' AdamW has one rate for all.
    """


@keras.saving.register_keras_serializable(package="keras_vit")
class LayerRatesSGD(_LayerRates, keras.optimizers.SGD):
    """SGD with momentum and a learning rate for each layer.

    w <- (1 - r lr decay) w, on kernels alone; v <- momentum v - r lr g; w <- w + v.

    Args:
        learning_rate: As in `keras.optimizers.SGD`.
        layer_rates: As in `LayerRatesAdamW`.
        weight_decay: Decay of the kernels, at least 0.
        **kwargs: As in `keras.optimizers.SGD`.

    Source: arXiv 1711.05101, Algorithm 1; Keras' SGD has one rate for all.
    """


def layer_rates(model, decay):
    """Learning rates that fall from the head of a ViT to its first layer.

    Block i of L, from 0, has decay^(L - i), what is before the blocks decay^(L + 1), and what is
    after them 1.

    Args:
        model: A model of `build_vit`.
        decay: In (0, 1].

    Returns:
        Dict from the names of the layers that have weights to their rates.

    Source: BEiT (arXiv 2106.08254, Appendix) and MAE (arXiv 2111.06377, A.1), as in the latter's
    code, `util/lr_decay.py`.
    """
    depth = sum(layer.name.startswith("block_") for layer in model.layers)
    rates, stage = {}, 0  # 0: before the blocks, 1 to L: the blocks, L + 1: after them
    for layer in model.layers:
        if layer.name.startswith("block_") or stage == depth:
            stage += 1
        if layer.weights:
            rates[layer.name] = decay ** (depth + 1 - min(stage, depth + 1))
    return rates


def build_optimizer(recipe, model, steps_per_epoch):
    """The optimizer of a recipe: AdamW, or SGD with momentum 0.9.

    The rate rises linearly from 0 and falls as a cosine to 0 at the last step.
    """
    steps = recipe.epochs * steps_per_epoch
    warmup_steps = min(round(recipe.warmup * steps), steps - 1)
    schedule = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0 if warmup_steps else recipe.learning_rate,
        warmup_target=recipe.learning_rate if warmup_steps else None,
        warmup_steps=warmup_steps,
        decay_steps=steps - warmup_steps,
    )
    arguments = {"weight_decay": recipe.weight_decay, "global_clipnorm": recipe.clip_norm}
    if recipe.optimizer == "sgd":
        arguments["momentum"] = 0.9
    if recipe.layer_decay < 1:
        cls = {"adamw": LayerRatesAdamW, "sgd": LayerRatesSGD}[recipe.optimizer]
        rates = layer_rates(model, recipe.layer_decay)
        return cls(schedule, layer_rates=rates, **arguments)
    cls = {"adamw": keras.optimizers.AdamW, "sgd": keras.optimizers.SGD}[recipe.optimizer]
    optimizer = cls(schedule, **arguments)
    optimizer.exclude_from_weight_decay(
        [weight for weight in model.trainable_weights if weight.name != "kernel"]
    )
    return optimizer
