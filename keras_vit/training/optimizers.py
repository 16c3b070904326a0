"""The optimizer of a recipe: its schedule, and learning rates that differ by layer."""

import math

import keras
from keras import ops

# Where a weight of a ViT begins: the standard deviation of DeiT's kernels (`models_v2.py`).
INITIAL_DEVIATION = 0.02


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
        self.kernels = [v.name == "kernel" for v in variables]
        self.decays = [self.kernel_decay * kernel for kernel in self.kernels]

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


@keras.saving.register_keras_serializable(package="keras_vit")
class LayerRatesLamb(_LayerRates, keras.optimizers.Lamb):
    """LAMB, which moves every kernel by the same share of its norm, for large batches.

    u = m / (sqrt(v) + epsilon) + decay w; w <- w - r lr max(|w|, 0.02 sqrt(n)) / |u| u, n the
    number of the kernel's weights, m and v as Adam's; what is no kernel has neither decay nor
    norms, w <- w - r lr m / (sqrt(v) + epsilon).

    Args:
        learning_rate: As in `keras.optimizers.Lamb`.
        layer_rates: As in `LayerRatesAdamW`.
        weight_decay: Decay of the kernels, at least 0.
        **kwargs: As in `keras.optimizers.Lamb`.

    Source: arXiv 1904.00962, Algorithm 2, whose function phi is the max here: a head that starts
    at zero would otherwise stay near it, since its steps are shares of its norm. What is no
    kernel is left out as in apex' `FusedLAMB`, DeiT III's. `keras.optimizers.Lamb` decays outside
    of the ratio, where the papers' decay would take the weights to zero.
    """

    def update_step(self, gradient, variable, learning_rate):
        index = self._get_variable_index(variable)
        rate = ops.cast(learning_rate, variable.dtype) * self.rates[index]
        update = self._adam_update(ops.cast(gradient, variable.dtype), index)
        if self.kernels[index]:
            update = update + self.decays[index] * variable
            norm = ops.sqrt(ops.sum(ops.square(update)))
            least = INITIAL_DEVIATION * math.sqrt(math.prod(variable.shape))
            target = ops.maximum(ops.sqrt(ops.sum(ops.square(variable))), least)
            update = update * (target / ops.where(norm > 0, norm, 1))
        self.assign_sub(variable, rate * update)

    def _adam_update(self, gradient, index):
        """m / (sqrt(v) + epsilon), the moments corrected for their start."""
        m, v = self._momentums[index], self._velocities[index]
        step = ops.cast(self.iterations + 1, gradient.dtype)
        self.assign_add(m, (gradient - m) * (1 - self.beta_1))
        self.assign_add(v, (ops.square(gradient) - v) * (1 - self.beta_2))
        mean = m / (1 - ops.power(ops.cast(self.beta_1, gradient.dtype), step))
        square = v / (1 - ops.power(ops.cast(self.beta_2, gradient.dtype), step))
        return mean / (ops.sqrt(square) + self.epsilon)


@keras.saving.register_keras_serializable(package="keras_vit")
class LinearDecay(keras.optimizers.schedules.LearningRateSchedule):
    """A rate that rises linearly from 0 to its peak and falls linearly to 0.

    peak * min(t / warmup_steps, (steps - t) / (steps - warmup_steps)), 0 from `steps` on.

    Args:
        peak: The highest rate, reached at step `warmup_steps`.
        steps: Steps in all, more than `warmup_steps`.
        warmup_steps: Steps of the rise, at least 0.

    Raises:
        ValueError: There are not more steps than `warmup_steps`.

    Source: `create_learning_rate_schedule` of google-research/vision_transformer (`utils.py`),
    whose linear decay ends at 1e-5.
    """

    def __init__(self, peak, steps, warmup_steps=0):
        if not 0 <= warmup_steps < steps:
            raise ValueError(
                "`warmup_steps` must be in [0, steps). "
                f"Received: warmup_steps={warmup_steps}, steps={steps}."
            )
        self.peak = peak
        self.steps = steps
        self.warmup_steps = warmup_steps

    def __call__(self, step):
        step = ops.cast(step, "float32")
        fall = (self.steps - step) / (self.steps - self.warmup_steps)
        rise = step / self.warmup_steps if self.warmup_steps else 1.0
        return self.peak * ops.maximum(ops.minimum(rise, fall), 0.0)

    def get_config(self):
        return {"peak": self.peak, "steps": self.steps, "warmup_steps": self.warmup_steps}


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
    """The optimizer of a recipe: AdamW, SGD with momentum 0.9, or LAMB.

    The rate rises linearly from 0 and falls, as a cosine or linearly, to 0 at the last step. The
    weight decay acts on kernels alone. `recipe.ema` is Keras' moving average of the weights, which
    `finalize_variable_values` puts in their place.

    Args:
        recipe: A `Recipe`.
        model: A model of `build_vit`.
        steps_per_epoch: Updates in an epoch.

    Returns:
        A `keras.optimizers.Optimizer`, not built; its `global_clipnorm` is the recipe's clip_norm.
    """
    arguments = {"weight_decay": recipe.weight_decay, "global_clipnorm": recipe.clip_norm}
    if recipe.ema is not None:
        arguments |= {"use_ema": True, "ema_momentum": recipe.ema}
    if recipe.optimizer == "sgd":
        arguments["momentum"] = 0.9
    schedule = _schedule(recipe, recipe.epochs * steps_per_epoch)
    if recipe.layer_decay < 1 or recipe.optimizer == "lamb":
        cls = {"adamw": LayerRatesAdamW, "sgd": LayerRatesSGD, "lamb": LayerRatesLamb}
        rates = layer_rates(model, recipe.layer_decay)
        return cls[recipe.optimizer](schedule, layer_rates=rates, **arguments)
    cls = {"adamw": keras.optimizers.AdamW, "sgd": keras.optimizers.SGD}[recipe.optimizer]
    optimizer = cls(schedule, **arguments)
    optimizer.exclude_from_weight_decay(
        [weight for weight in model.trainable_weights if weight.name != "kernel"]
    )
    return optimizer


def _schedule(recipe, steps):
    warmup_steps = min(round(recipe.warmup * steps), steps - 1)
    if recipe.schedule == "linear":
        return LinearDecay(recipe.learning_rate, steps, warmup_steps)
    return keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0 if warmup_steps else recipe.learning_rate,
        warmup_target=recipe.learning_rate if warmup_steps else None,
        warmup_steps=warmup_steps,
        decay_steps=steps - warmup_steps,
    )
