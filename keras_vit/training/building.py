"""The model of a run: from its recipe or a backbone to a `DistributedModel` ready for `fit`."""

import contextlib
import dataclasses
import math

import keras

from keras_vit.config import VARIANTS
from keras_vit.model import build_vit, skip_unread_tokens, vit_arguments
from keras_vit.training.distributed import DistributedModel
from keras_vit.training.losses import build_loss, set_head_bias
from keras_vit.training.optimizers import build_optimizer
from keras_vit.weights.loading import HEAD


def steps_per_epoch(recipe, data):
    """Batches in a pass over the training images, the last one filled up from the next pass."""
    return math.ceil(data.train.count / recipe.batch_size)


def model_arguments(recipe, num_classes, backbone=None):
    """The arguments of `build_vit` for a recipe's model, or for a backbone with a new head."""
    if backbone is not None:
        frozen = recipe.freeze_backbone
        return vit_arguments(backbone) | {
            "num_classes": num_classes,
            "dropout": 0.0 if frozen else recipe.dropout,
            "drop_path": 0.0 if frozen else recipe.drop_path,
        }
    return {
        "variant": recipe.variant,
        "image_size": recipe.image_size,
        "num_classes": num_classes,
        "patch_size": recipe.patch_size,
        "pooling": recipe.pooling,
        "class_token": recipe.pooling not in ("gap", "map"),
        "position": recipe.position,
        "dropout": recipe.dropout,
        "drop_path": recipe.drop_path,
        "layer_scale": recipe.layer_scale,
        "normalization": recipe.normalization,
    }


def check_model(recipe):
    """Raises ValueError if a recipe's model cannot be built, by one of a single block."""
    variant = recipe.variant
    config = VARIANTS[variant] if isinstance(variant, str) else variant
    shallow = dataclasses.replace(recipe, variant=dataclasses.replace(config, depth=1))
    build_vit(**model_arguments(shallow, num_classes=2))


def build_model(arguments, recipe, backbone=None):
    """The model of `model_arguments`, with the weights of a backbone, and frozen as asked."""
    model = build_vit(**arguments)
    loaded = {weight.path: weight for weight in backbone.weights} if backbone else {}
    for weight in model.weights:
        if weight.path.startswith(HEAD):
            continue
        if loaded:
            weight.assign(loaded[weight.path])
        if recipe.freeze_backbone:
            # Not its layer's `trainable`, which Keras saves and restores by halves.
            weight.trainable = False
    if recipe.head_bias:
        set_head_bias(model, recipe.head_bias)
    return model


def compiled_model(arguments, recipe, data, options, workers, backbone=None):
    """The model of a run, and the `DistributedModel` of its weights, ready for `fit`."""
    keras.utils.set_random_seed(options["seed"])
    with dtype_policy(options["precision"]), workers.scope():
        vit = build_model(arguments, recipe, backbone)
        fast = skip_unread_tokens(vit)
        model = DistributedModel(fast.input, fast.output, name=vit.name)
        model.compile(
            optimizer=build_optimizer(recipe, model, steps_per_epoch(recipe, data)),
            loss=build_loss(recipe),
            metrics=[keras.metrics.CategoricalAccuracy(name="accuracy")],
            micro_batches=recipe.micro_batches,
            mixing=recipe.mixing,
            seed=options["seed"],
            jit_compile=options["jit_compile"],
        )
        model.optimizer.build(model.trainable_variables)
    return vit, model


@contextlib.contextmanager
def dtype_policy(name):
    """Sets Keras' dtype policy within the block."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)
