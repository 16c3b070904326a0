"""DistributedModel: the same training on 1, 2 and 4 devices, and what stock Keras does there."""

import contextlib
import dataclasses
import functools
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_vit
from keras_vit import ViTConfig
from keras_vit.data.pipeline import untuned
from keras_vit.layers import Dropout
from keras_vit.training import DistributedModel, Mixing, distributed
from keras_vit.training.keras_internals import batches_seen, weight_averages

BATCH = 32
IMAGES = np.random.default_rng(0).integers(0, 256, (64, 12, 8, 3)).astype("uint8")
LABELS = np.eye(5, dtype="float32")[np.random.default_rng(1).integers(0, 5, 64)]


def mirrored(replicas):
    """A strategy on so many CPUs; None stays None, for no strategy."""
    if replicas is None:
        return None
    # The default cannot have groups of 2 and of 4 devices in one process.
    reduction = tf.distribute.ReductionToOneDevice()
    devices = [f"CPU:{i}" for i in range(replicas)]
    return tf.distribute.MirroredStrategy(devices, cross_device_ops=reduction)


def scope(strategy):
    return contextlib.nullcontext() if strategy is None else strategy.scope()


@contextlib.contextmanager
def policy(name):
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy("float32")


def batches(batch=BATCH, images=IMAGES, labels=LABELS):
    return untuned(tf.data.Dataset.from_tensor_slices((images, labels)).batch(batch))


def build_small_vit(dropout=0.0):
    vit = keras_vit.build_vit(
        ViTConfig(hidden_dim=12, depth=1, num_heads=3, mlp_dim=20, patch_size=4),
        image_size=(12, 8),
        num_classes=5,
        dropout=dropout,
        drop_path=dropout,
        normalization="minus_one_one",
    )
    # A head of zeros would let no gradient through in the first step.
    head = vit.layers[-1].kernel
    head.assign(np.random.default_rng(5).normal(0, 0.3, head.shape))
    return vit


def build_mlp():
    """What is not about the network is tested with this one, which is traced ten times faster."""
    images = keras.Input((12, 8, 3))
    x = keras.layers.Flatten()(keras.layers.Rescaling(1 / 127.5, -1)(images))
    x = keras.layers.Dense(7, activation="tanh")(x)
    return keras.Model(images, keras.layers.Dense(5)(x))


def compiled(model_class, replicas, optimizer, *, build=build_mlp, **options):
    """A model of the same initial weights each time, made and compiled in the strategy's scope.

    `options` are those of `compile`; XLA only where they ask for it.
    """
    keras.utils.set_random_seed(3)
    with scope(mirrored(replicas)):
        network = build()
        model = model_class(network.inputs, network.outputs)
        loss = keras.losses.CategoricalCrossentropy(from_logits=True)
        options = {"jit_compile": False, "metrics": ["accuracy"], **options}
        model.compile(optimizer(), loss, **options)
    return model


@dataclasses.dataclass
class Training:
    losses: list
    weights: list
    averages: list


def train(model_class, replicas, optimizer, *, batch=BATCH, epochs=2, **options):
    """Trains for `epochs` of 4 steps."""
    model = compiled(model_class, replicas, optimizer, **options)
    history = model.fit(
        batches(batch).repeat(), epochs=epochs, steps_per_epoch=4, shuffle=False, verbose=0
    )
    averages = [average.numpy() for _, average in weight_averages(model.optimizer)]
    return Training(history.history["loss"], model.get_weights(), averages)


def assert_same(training, expected, tolerance=1e-5):
    np.testing.assert_allclose(training.losses, expected.losses, atol=tolerance)
    for weight, other in zip(training.weights, expected.weights, strict=True):
        np.testing.assert_allclose(weight, other, atol=tolerance)


def difference(training, expected):
    """The largest difference between weights."""
    pairs = zip(training.weights, expected.weights, strict=True)
    return max(np.abs(weight - other).max() for weight, other in pairs)


def iterations(model):
    return int(model.optimizer.iterations.numpy())


OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    # Attention does not depend on the bias of its keys, so that their gradient is nothing but
    # rounding, which a small epsilon would make steps as large as those of any other weight.
    "adamw": lambda: keras.optimizers.AdamW(1e-2, weight_decay=0.1, epsilon=1e-3),
    "global_clipnorm": lambda: keras.optimizers.SGD(1.0, global_clipnorm=0.1),
    "clipnorm": lambda: keras.optimizers.SGD(1.0, clipnorm=0.03),
    "clipvalue": lambda: keras.optimizers.SGD(1.0, clipvalue=0.003),
    "ema": lambda: keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.7),
    "all": lambda: keras.optimizers.AdamW(
        1e-2, epsilon=1e-3, global_clipnorm=0.1, use_ema=True, ema_momentum=0.7
    ),
}
CLIPPING = ("global_clipnorm", "clipnorm", "clipvalue")


@functools.cache
def stock(optimizer, build=build_mlp, batch=BATCH):
    """The training of a keras.Model on one device."""
    return train(keras.Model, None, OPTIMIZERS[optimizer], build=build, batch=batch)


@pytest.mark.parametrize("replicas", [2, 4])
def test_vit_trains_as_on_one_device(replicas):
    training = train(DistributedModel, replicas, OPTIMIZERS["adamw"], build=build_small_vit)
    assert_same(training, stock("adamw", build_small_vit))


@pytest.mark.parametrize("replicas", [2, 4])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", *CLIPPING])
def test_same_training_as_on_one_device(optimizer, replicas):
    training = train(DistributedModel, replicas, OPTIMIZERS[optimizer])
    assert_same(training, stock(optimizer))


@pytest.mark.parametrize("optimizer", CLIPPING)
def test_clipping_matters_and_stock_clips_each_replica(optimizer):
    unclipped = train(keras.Model, None, lambda: keras.optimizers.SGD(1.0))
    assert difference(unclipped, stock(optimizer)) > 0.1
    training = train(keras.Model, 2, OPTIMIZERS[optimizer])
    assert difference(training, stock(optimizer)) > 0.01


@pytest.mark.parametrize("replicas", [2, 4])
def test_averages_of_weights(replicas):
    expected = stock("ema")
    training = train(DistributedModel, replicas, OPTIMIZERS["ema"])
    assert_same(training, expected)
    assert difference(expected, stock("sgd")) > 0.01
    for weight, average, other in zip(
        training.weights, training.averages, expected.averages, strict=True
    ):
        np.testing.assert_array_equal(weight, average)
        np.testing.assert_allclose(average, other, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "replicas"),
    [
        *(({"micro_batches": 4}, replicas) for replicas in (None, 1, 2, 4)),
        *(({"steps_per_execution": 4}, replicas) for replicas in (None, 1, 2, 4)),
        *(({"jit_compile": True}, replicas) for replicas in (None, 2, 4)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else str(value),
)
def test_same_training_with(options, replicas):
    training = train(DistributedModel, replicas, OPTIMIZERS["sgd"], **options)
    assert_same(training, stock("sgd"))


def fit_with_callbacks(replicas, folder):
    """What is logged, the rates, and the weights of the epoch that was kept."""
    model = compiled(
        DistributedModel, replicas, OPTIMIZERS["sgd"], metrics=["accuracy"], micro_batches=2
    )
    kept = folder / "best.weights.h5"
    callbacks = [
        keras.callbacks.ModelCheckpoint(kept, "val_loss", save_best_only=True, **WEIGHTS_ALONE),
        keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=0, min_delta=1.0),
        keras.callbacks.EarlyStopping("val_accuracy", patience=2, min_delta=1.0),
    ]
    history = model.fit(
        batches(),
        validation_data=batches(15),
        epochs=9,
        shuffle=False,
        callbacks=callbacks,
        verbose=0,
    )
    model.load_weights(kept)
    return history.history, model.get_weights()


WEIGHTS_ALONE = {"save_weights_only": True}


def test_callbacks_see_the_same(tmp_path):
    expected, weights = fit_with_callbacks(None, tmp_path)
    history, other_weights = fit_with_callbacks(2, tmp_path)
    assert len(history["loss"]) == 3  # stopped early
    assert history["learning_rate"] == expected["learning_rate"]
    assert history["learning_rate"][-1] < history["learning_rate"][0]
    assert history.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(history[name], values, atol=1e-5)
    for weight, other in zip(weights, other_weights, strict=True):
        np.testing.assert_allclose(weight, other, atol=1e-5)


def test_compiled_outside_of_the_scope():
    model = compiled(DistributedModel, 2, OPTIMIZERS["sgd"])
    with model.strategy.scope():
        optimizer = OPTIMIZERS["sgd"]()
    model.compile(optimizer, keras.losses.CategoricalCrossentropy(from_logits=True))
    [total] = [
        variable.value for variable in model.metrics[0].variables if "total" in variable.path
    ]
    assert len(model.strategy.experimental_local_results(total)) == 2


class Centred(keras.layers.Layer):
    """Of no image, the mean is not a number."""

    def call(self, x):
        return x - tf.reduce_mean(x, axis=0, keepdims=True)


def test_a_replica_without_images_has_no_say():
    def build():
        network = build_mlp()
        return keras.Model(network.inputs, Centred()(network.outputs[0]))

    training = train(DistributedModel, 4, OPTIMIZERS["sgd"], batch=31, build=build)
    assert all(np.isfinite(weight).all() for weight in training.weights)


def build_with_norm(**options):
    images = keras.Input((12, 8, 3))
    x = keras.layers.Dense(7)(keras.layers.Flatten()(keras.layers.Rescaling(1 / 127.5)(images)))
    x = keras.layers.BatchNormalization(momentum=0.5, **options)(x)
    return keras.Model(images, keras.layers.Dense(5)(x))


def test_batch_normalization_is_over_all_replicas():
    build = functools.partial(build_with_norm, synchronized=True)
    training = train(DistributedModel, 2, OPTIMIZERS["sgd"], build=build)
    assert_same(training, stock("sgd", build_with_norm), 1e-4)
    match = "must have synchronized=True.*Received: 'batch_normalization.*' with synchronized=False"
    with pytest.raises(ValueError, match=match):
        compiled(DistributedModel, 2, OPTIMIZERS["sgd"], build=build_with_norm)


# 64 images in batches of 31, 31 and 2: on four replicas parts differ in size and some are empty.
@pytest.mark.parametrize("replicas", [2, 4])
def test_same_training_with_ragged_batches(replicas):
    training = train(DistributedModel, replicas, OPTIMIZERS["sgd"], batch=31)
    assert_same(training, stock("sgd", batch=31))


@functools.cache
def all_on_one_device(dropout=0.3):
    build = functools.partial(build_small_vit, dropout)
    return train(DistributedModel, None, OPTIMIZERS["all"], build=build)


@pytest.mark.parametrize(
    ("replicas", "options"),
    [(2, {"jit_compile": True, "steps_per_execution": 4}), (4, {"jit_compile": False})],
)
def test_same_training_with_all_together(replicas, options):
    training = train(
        DistributedModel,
        replicas,
        OPTIMIZERS["all"],
        build=functools.partial(build_small_vit, 0.3),
        micro_batches=4,
        **options,
    )
    expected = all_on_one_device()
    assert_same(training, expected)
    for average, other in zip(training.averages, expected.averages, strict=True):
        np.testing.assert_allclose(average, other, atol=1e-5)
    assert difference(expected, all_on_one_device(dropout=0.0)) > 0.01


@pytest.mark.parametrize(
    ("optimizer", "options", "error", "message"),
    [
        ({}, {"jit_compile": True}, tf.errors.InvalidArgumentError, "resource"),
        ({"gradient_accumulation_steps": 4}, {}, RuntimeError, "merge_call"),
        ({"use_ema": True, "ema_overwrite_frequency": 4}, {}, RuntimeError, "merge_call"),
    ],
)
def test_stock_fails(optimizer, options, error, message):
    """Why there is a DistributedModel: these are what it has `micro_batches` and XLA for."""
    with pytest.raises(error, match=message):
        train(keras.Model, 2, lambda: keras.optimizers.SGD(0.1, **optimizer), **options)


def test_stock_fails_on_a_batch_that_does_not_divide():
    with pytest.raises(tf.errors.InvalidArgumentError, match="same size and shape"):
        train(keras.Model, 2, OPTIMIZERS["sgd"], batch=31)


@pytest.mark.parametrize("replicas", [None, 2, 4])
def test_bfloat16(replicas):
    """Up to the rounding of sums of the activations' gradients, of 8 bits."""
    with policy("mixed_bfloat16"):
        training = train(DistributedModel, replicas, OPTIMIZERS["sgd"], build=build_small_vit)
        expected = stock("sgd", build_small_vit)
    assert_same(training, expected, 1e-2)


@pytest.fixture
def float16():
    with policy("mixed_float16"):
        yield


def fit_non_finite(model_class, replicas):
    """The weights after a step with an infinity in the last image, and after one without."""
    model = compiled(model_class, replicas, OPTIMIZERS["sgd"])
    images = IMAGES[:BATCH].astype("float32")
    infinite = images.copy()
    infinite[-1, 3, 2, 1] = np.inf
    weights = [model.get_weights()]
    scales = [model.optimizer.initial_scale]
    for data in (infinite, images):
        model.fit(batches(BATCH, data, LABELS[:BATCH]), shuffle=False, verbose=0)
        weights.append(model.get_weights())
        scales.append(float(model.optimizer.dynamic_scale.numpy()))
    return weights, scales


@pytest.mark.usefixtures("float16")
@pytest.mark.parametrize("replicas", [None, 2, 4])
def test_a_non_finite_gradient_on_one_replica_skips_the_step_on_all(replicas):
    (start, skipped, stepped), scales = fit_non_finite(DistributedModel, replicas)
    (_, _, expected), _ = fit_non_finite(keras.Model, None)
    assert scales == [2**15, 2**14, 2**14]
    for before, after in zip(start, skipped, strict=True):
        np.testing.assert_array_equal(before, after)
    assert max(np.abs(a - b).max() for a, b in zip(skipped, stepped, strict=True)) > 1e-3
    for weight, other in zip(stepped, expected, strict=True):
        np.testing.assert_allclose(weight, other, atol=1e-3)


# Masks, seen by what they leave of a gradient.

RATE = 0.3
STEPS = 6


def keras_vit_layers():
    twice = Dropout(RATE)
    return {
        "twice 0": (twice, 250),
        "twice 1": (twice, 250),
        "dropout": (Dropout(RATE), 250),  # rows do not begin where a block of random numbers does
        "blocks": (Dropout(RATE), 12),  # and here they do
        "path": (Dropout(RATE, noise_shape=(None, 1)), 5),
    }


def stock_layers():
    return {"stock": (keras.layers.Dropout(RATE), 250)}


def masks(
    model_class=DistributedModel, replicas=None, layers=keras_vit_layers, rows=BATCH, **options
):
    """Which values each layer kept in each step: dict of bool arrays `(STEPS, rows, units)`.

    The images are the rows of the unit matrix, so that row i of a linear map in front of a layer
    is what the layer gets for image i; and in a step of gradient descent on the mean, each value
    of the map moves if the layer kept it.
    """
    keras.utils.set_random_seed(3)
    with scope(mirrored(replicas)):
        images = keras.Input((rows,))
        outputs, maps = [], {}
        for name, (layer, units) in layers().items():
            maps[name] = keras.layers.Dense(units, use_bias=False, kernel_initializer="zeros")
            outputs.append(layer(maps[name](images)))
        model = model_class(images, keras.layers.Concatenate()(outputs))
        options = {"jit_compile": False, **options}
        model.compile(keras.optimizers.SGD(1.0), lambda _, y: keras.ops.mean(y, -1), **options)
    kernels = [[np.zeros((rows, layer.units)) for layer in maps.values()]]

    def note(batch, logs):
        kernels.append([layer.kernel.numpy() for layer in maps.values()])

    data = tf.data.Dataset.from_tensors((np.eye(rows, dtype="float32"), np.zeros(rows)))
    model.fit(
        untuned(data.repeat(STEPS)),
        shuffle=False,
        verbose=0,
        callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=note)],
    )
    return {
        name: np.diff([of_all[i] for of_all in kernels], axis=0) != 0 for i, name in enumerate(maps)
    }


@functools.cache
def masks_on_one_device(rows=BATCH):
    return masks(rows=rows)


def assert_equal_masks(received, expected):
    for name, mask in expected.items():
        np.testing.assert_array_equal(received[name], mask, err_msg=name)


def assert_independent(mask, other):
    """The share of values on which two masks agree, within 5 standard errors."""
    agreement = (1 - RATE) ** 2 + RATE**2
    error = np.sqrt(agreement * (1 - agreement) / mask.size)
    assert np.mean(mask == other) == pytest.approx(agreement, abs=5 * error)


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("replicas", [None, 1, 2, 4])
def test_masks_are_those_of_the_global_batch(replicas, micro_batches):
    received = masks(replicas=replicas, micro_batches=micro_batches)
    assert_equal_masks(received, masks_on_one_device())


@pytest.mark.parametrize("options", [{"replicas": None}, {"replicas": 2, "micro_batches": 4}])
def test_masks_are_the_same_with_xla(options):
    assert_equal_masks(masks(jit_compile=True, **options), masks_on_one_device())


@pytest.mark.parametrize("replicas", [2, 4])
def test_masks_of_ragged_batches(replicas):
    assert_equal_masks(masks(replicas=replicas, rows=30), masks_on_one_device(rows=30))


def test_share_of_kept_values():
    for name, mask in masks_on_one_device().items():
        drawn = mask[..., :1] if name == "path" else mask
        assert np.all(mask == drawn), name
        error = np.sqrt(RATE * (1 - RATE) / drawn.size)
        assert drawn.mean() == pytest.approx(1 - RATE, abs=4 * error), name


def test_masks_differ_between_replicas_steps_layers_and_uses():
    received = masks_on_one_device()
    for name, mask in received.items():
        drawn = mask[..., :1] if name == "path" else mask
        assert_independent(drawn[:, : BATCH // 2], drawn[:, BATCH // 2 :])  # of two replicas
        assert_independent(drawn[:-1], drawn[1:])  # of two steps
    assert_independent(received["twice 0"], received["twice 1"])
    assert_independent(received["twice 0"], received["dropout"])


def test_masks_of_layers_with_neighbouring_seeds_differ():
    received = masks(layers=lambda: {seed: (Dropout(RATE, seed=seed), 250) for seed in (2, 1)})
    assert_independent(received[2], received[1])


@pytest.mark.parametrize(("replicas", "xla"), [(4, False), (2, True)])
def test_masks_of_stock_dropout_differ_between_replicas(replicas, xla):
    mask = masks(replicas=replicas, layers=stock_layers, jit_compile=xla)["stock"]
    error = np.sqrt(RATE * (1 - RATE) / mask.size)
    assert mask.mean() == pytest.approx(1 - RATE, abs=4 * error)
    parts = np.split(mask, replicas, axis=1)
    for i in range(replicas):
        for j in range(i):
            assert_independent(parts[i], parts[j])
    assert_independent(mask[:-1], mask[1:])


def test_stock_draws_the_same_masks_on_all_replicas():
    for layers in (stock_layers, keras_vit_layers):
        for mask in masks(keras.Model, 2, layers).values():
            np.testing.assert_array_equal(mask[:, : BATCH // 2], mask[:, BATCH // 2 :])


@pytest.mark.parametrize(("replicas", "micro_batches"), [(None, 1), (None, 4), (2, 1), (2, 4)])
def test_weights_of_images_and_classes(replicas, micro_batches):
    """As in stock Keras without a strategy, in training and in evaluation."""
    weights = np.random.default_rng(7).uniform(0, 3, len(LABELS)).astype("float32")
    weighted = untuned(tf.data.Dataset.from_tensor_slices((IMAGES, LABELS, weights)).batch(BATCH))
    by_class = {index: 0.2 + index for index in range(5)}
    trained = []
    for model_class, own in (
        (keras.Model, {"replicas": None}),
        (DistributedModel, {"replicas": replicas, "micro_batches": micro_batches}),
    ):
        model = compiled(model_class, optimizer=OPTIMIZERS["sgd"], **own)
        losses = model.fit(weighted, epochs=2, shuffle=False, verbose=0).history["loss"]
        losses += model.fit(
            batches(), epochs=2, class_weight=by_class, shuffle=False, verbose=0
        ).history["loss"]
        evaluated = model.evaluate(weighted, verbose=0)
        trained.append((Training(losses, model.get_weights(), []), evaluated))
    (expected, expected_results), (training, results) = trained
    assert_same(training, expected)
    np.testing.assert_allclose(results, expected_results, atol=1e-5)
    assert abs(results[0] - model.evaluate(batches(), verbose=0)[0]) > 0.01


def squared_error(labels, outputs):
    return keras.ops.mean((labels - outputs) ** 2)


class SquaredError(keras.losses.Loss):
    def call(self, labels, outputs):
        return squared_error(labels, outputs)


@pytest.mark.parametrize(
    "loss",
    [squared_error, functools.partial(squared_error), SquaredError(), "dice"],
    ids=["function", "partial", "class", "name"],
)
def test_a_loss_must_give_a_value_for_each_image(loss):
    """Keras would take the sum of the replicas' means: a learning rate as often as large."""
    with scope(mirrored(2)):
        network = build_mlp()
        model = DistributedModel(network.inputs, network.outputs)
        model.compile("sgd", loss, jit_compile=False)
    match = (
        r"for each image, of shape \(B,\).*Received: '(squared_error|partial|dice)', which gives"
    )
    with pytest.raises(ValueError, match=match):
        model.fit(batches(), verbose=0)
    if isinstance(loss, str):
        return
    network = build_mlp()
    alone = DistributedModel(network.inputs, network.outputs)
    alone.compile("sgd", loss, jit_compile=False, micro_batches=4)
    assert alone.fit(batches(), verbose=0).history["loss"][0] > 0


@pytest.mark.parametrize("reduction", ["sum", "mean_with_sample_weight", None])
@pytest.mark.parametrize(("replicas", "micro_batches"), [(None, 2), (2, 1)])
def test_a_loss_must_be_a_mean(reduction, replicas, micro_batches):
    loss = keras.losses.MeanSquaredError(reduction=reduction)
    with scope(mirrored(replicas)):
        network = build_mlp()
        model = DistributedModel(network.inputs, network.outputs)
        with pytest.raises(ValueError, match=rf"must be a mean.*reduction={reduction!r}"):
            model.compile("sgd", {"dense": loss}, micro_batches=micro_batches)
        if micro_batches > 1:
            model.compile("sgd", loss)


def test_metrics_of_several_values():
    def metrics():
        precision = keras.metrics.Precision(thresholds=[0.3, 0.6], name="precision")
        return ["accuracy", keras.metrics.F1Score(), precision]

    expected = compiled(keras.Model, None, OPTIMIZERS["sgd"])
    model = compiled(DistributedModel, 2, OPTIMIZERS["sgd"])
    results = []
    for each in (expected, model):
        with scope(getattr(each, "strategy", None)):
            loss = keras.losses.CategoricalCrossentropy(from_logits=True)
            optimizer = OPTIMIZERS["sgd"]()
            each.compile(optimizer, loss, metrics=metrics(), jit_compile=False)
        each.fit(batches(), verbose=0)
        results.append(each.evaluate(batches(), verbose=0, return_dict=True))
    assert np.shape(results[0]["f1_score"]) == (5,)
    for name, value in results[0].items():
        np.testing.assert_allclose(results[1][name], value, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("replicas", "micro_batches"), [(None, 4), (2, 1), (2, 4)])
def test_run_eagerly_with_ragged_batches(replicas, micro_batches):
    """Where the size of each batch is known, it is not that of all."""
    data = batches(8, IMAGES[:19], LABELS[:19])  # the last batch: 3
    weights = []
    for eagerly in (False, True):
        model = compiled(
            DistributedModel,
            replicas,
            OPTIMIZERS["sgd"],
            micro_batches=micro_batches,
            run_eagerly=eagerly,
        )
        model.fit(data, epochs=2, shuffle=False, verbose=0)
        weights.append(Training([], model.get_weights(), []))
    assert_same(*weights)


def by_layer():
    """An optimizer for each layer of `build_mlp`, and one that has nothing to do."""
    sgd, adam = keras.optimizers.SGD(0.1), keras.optimizers.AdamW(1e-2, epsilon=1e-3)
    optimizers = keras.optimizers.OptimizerMap(sgd, {".*kernel": adam})
    optimizers["nothing"] = keras.optimizers.SGD(0.3, use_ema=True)
    return keras.optimizers.MultiOptimizer(optimizers)


def test_several_optimizers():
    expected = train(keras.Model, None, by_layer)
    for replicas in (None, 2):
        assert_same(train(DistributedModel, replicas, by_layer), expected)
    model = compiled(DistributedModel, None, by_layer)
    model.fit(batches(), epochs=2, verbose=0)
    assert int(batches_seen(model.optimizer)) == 4


def test_optimizers_of_a_function():
    """Known only when training begins: too late for a strategy."""

    def optimizer():
        one = keras.optimizers.SGD(0.1)
        return keras.optimizers.MultiOptimizer(lambda variable: one)

    train(DistributedModel, None, optimizer)
    with pytest.raises(ValueError, match=r"must be in its OptimizerMap.*of a function"):
        compiled(DistributedModel, 2, optimizer)


class Penalty(keras.layers.Layer):
    def call(self, x):
        self.add_loss(keras.ops.mean(x**2))
        return x


def test_losses_of_layers_with_xla():
    def build():
        network = build_mlp()
        return keras.Model(network.inputs, Penalty()(network.outputs[0]))

    results = []
    for model_class, options in (
        (keras.Model, {"replicas": None}),
        (DistributedModel, {"replicas": 2, "jit_compile": True}),
    ):
        model = compiled(model_class, optimizer=OPTIMIZERS["sgd"], build=build, **options)
        losses = model.fit(
            batches(), epochs=2, validation_data=batches(), shuffle=False, verbose=0
        ).history
        results.append([losses["loss"], losses["val_loss"]])
    np.testing.assert_allclose(*results, atol=1e-5)


def test_no_xla_for_layers_that_it_cannot_compile():
    def build():
        images = keras.Input((12, 8, 3))
        rotated = keras.layers.RandomRotation(0.1)(images)
        return keras.Model(images, keras.layers.Dense(5)(keras.layers.Flatten()(rotated)))

    for replicas in (None, 2):
        model = compiled(
            DistributedModel, replicas, OPTIMIZERS["sgd"], build=build, jit_compile="auto"
        )
        assert not model.xla
    model.fit(batches(), verbose=0)
    with pytest.warns(UserWarning, match="layers that XLA cannot compile"):
        compiled(DistributedModel, 2, OPTIMIZERS["sgd"], build=build, jit_compile=True)


@pytest.mark.parametrize("weights", ["sample_weight", "class_weight"])
def test_mixing_goes_with_no_weights(weights):
    model = compiled(DistributedModel, None, OPTIMIZERS["sgd"], build=build_small_vit)
    model.compile("sgd", "categorical_crossentropy", mixing=Mixing(0.2), jit_compile=False)
    values = {"sample_weight": np.ones(8), "class_weight": {0: 1.0, 1: 2.0}}[weights]
    labels = np.eye(model.output_shape[-1], dtype="float32")[np.arange(8) % 2]
    images = np.zeros((8, *model.input_shape[1:]), "float32")
    with pytest.raises(ValueError, match=r"no `sample_weight` and no `class_weight`"):
        model.fit(images, labels, batch_size=8, verbose=0, **{weights: values})


def test_mixing_is_the_same_on_all_replicas():
    options = {"mixing": Mixing(mixup=0.8, cutmix=1.0), "seed": 11}
    expected = train(DistributedModel, None, OPTIMIZERS["sgd"], **options)
    for replicas, micro_batches in ((None, 4), (2, 1), (4, 4)):
        training = train(
            DistributedModel, replicas, OPTIMIZERS["sgd"], micro_batches=micro_batches, **options
        )
        assert_same(training, expected)
    assert difference(expected, stock("sgd")) > 0.01
    other_seed = train(DistributedModel, None, OPTIMIZERS["sgd"], **{**options, "seed": 12})
    assert difference(expected, other_seed) > 1e-3


# The last batch of 41 images has 5, or 1: fewer than there are replicas.
@pytest.mark.parametrize("batch", [12, 8])
@pytest.mark.parametrize("replicas", [2, 4])
def test_evaluate_and_predict_ragged_batches(replicas, batch):
    data = batches(batch, IMAGES[:41], LABELS[:41])
    model = compiled(DistributedModel, replicas, OPTIMIZERS["sgd"], steps_per_execution=2)
    expected = compiled(keras.Model, None, OPTIMIZERS["sgd"])
    np.testing.assert_allclose(
        model.evaluate(data, verbose=0), expected.evaluate(data, verbose=0), atol=1e-5
    )
    predicted = model.predict(data, verbose=0)
    assert predicted.shape == (41, 5)
    np.testing.assert_allclose(predicted, expected.predict(data, verbose=0), atol=1e-5)


def test_evaluate_and_predict_with_xla():
    data = batches(12, IMAGES[:41], LABELS[:41])
    model = compiled(DistributedModel, 2, OPTIMIZERS["sgd"], jit_compile=True)
    expected = compiled(keras.Model, None, OPTIMIZERS["sgd"])
    np.testing.assert_allclose(
        model.evaluate(data, verbose=0), expected.evaluate(data, verbose=0), atol=1e-5
    )
    np.testing.assert_allclose(
        model.predict(data, verbose=0), expected.predict(data, verbose=0), atol=1e-5
    )


def test_train_on_batch():
    model = compiled(DistributedModel, None, OPTIMIZERS["sgd"])
    expected = compiled(keras.Model, None, OPTIMIZERS["sgd"])
    for begin in (0, BATCH):
        data = IMAGES[begin : begin + BATCH], LABELS[begin : begin + BATCH]
        np.testing.assert_allclose(model.train_on_batch(*data), expected.train_on_batch(*data))
    np.testing.assert_allclose(model.predict_on_batch(IMAGES), expected.predict_on_batch(IMAGES))


def test_train_on_batch_would_train_each_replica_on_all_rows():
    model = compiled(DistributedModel, 2, OPTIMIZERS["sgd"])
    expected = compiled(keras.Model, None, OPTIMIZERS["sgd"])
    data = IMAGES[:BATCH], LABELS[:BATCH]
    np.testing.assert_allclose(model.test_on_batch(*data), expected.test_on_batch(*data), rtol=1e-5)
    with pytest.raises(ValueError, match=r"whole batch: use `fit`\. Received: 2 replicas"):
        model.train_on_batch(*data)


def test_predict_on_batch_of_replicas():
    """Each row once, as `evaluate` and `predict` of `keras_vit.training` take them."""
    with mirrored(2).scope():
        model = compiled(DistributedModel, None, OPTIMIZERS["sgd"])
    expected = compiled(keras.Model, None, OPTIMIZERS["sgd"])
    model.set_weights(expected.get_weights())
    np.testing.assert_allclose(
        model.predict_on_batch(IMAGES[:5]), expected.predict_on_batch(IMAGES[:5]), atol=1e-6
    )


@pytest.mark.parametrize(
    ("name", "flags", "gpus", "xla"),
    [
        ("float32", "fma avx512_bf16", [], True),
        ("mixed_float16", "fma avx512_bf16", [], True),
        ("mixed_bfloat16", "fma avx512_bf16 sha", [], False),
        ("mixed_bfloat16", "amx_bf16", [], False),
        ("mixed_bfloat16", "avx512f", [], True),
        ("mixed_bfloat16", None, [], True),
        ("mixed_bfloat16", "fma avx512_bf16", ["GPU:0"], True),
    ],
)
def test_xla_by_itself(tmp_path, monkeypatch, name, flags, gpus, xla):
    cpuinfo = tmp_path / "cpuinfo"
    if flags is not None:
        cpuinfo.write_text(f"model name\t: A CPU\nflags\t\t: {flags}\n")
    monkeypatch.setattr(distributed, "CPUINFO", cpuinfo)
    monkeypatch.setattr(tf.config, "list_logical_devices", {"GPU": gpus}.get)
    with policy(name):
        network = build_mlp()
        model = DistributedModel(network.inputs, network.outputs)
    model.compile("sgd", "mse")
    assert model.xla is model.jit_compile is xla
    nested = DistributedModel(network.inputs, network(network.inputs))
    nested.compile("sgd", "mse")
    assert nested.xla is xla
    assert nested.get_compile_config()["jit_compile"] == "auto"
    model.compile("sgd", "mse", jit_compile=not xla)
    assert model.xla is not xla


# Saving and loading.

COMPILED_WITH = {
    "micro_batches": 2,
    "mixing": Mixing(mixup=0.2, cutmix=1.0),
    "seed": 13,
    "jit_compile": False,
}


def fit_an_epoch(model):
    model.fit(batches().repeat(), epochs=1, steps_per_epoch=4, shuffle=False, verbose=0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model of two replicas after an epoch, as a file, and its weights after one more."""
    path = tmp_path_factory.mktemp("saved") / "model.keras"

    def build():
        network = build_mlp()
        # A file of Keras does not hold the random state of a layer, but the seed it was given.
        return keras.Model(network.inputs, Dropout(RATE, seed=7)(network.outputs[0]))

    model = compiled(DistributedModel, 2, OPTIMIZERS["all"], build=build, **COMPILED_WITH)
    fit_an_epoch(model)
    model.save(path)
    fit_an_epoch(model)
    return path, model.get_weights()


@pytest.mark.parametrize("replicas", [None, 2, 4])
def test_fit_goes_on_after_loading(saved, replicas):
    path, expected = saved
    with scope(mirrored(replicas)):
        model = keras.saving.load_model(path)
    assert isinstance(model, DistributedModel)
    assert {name: model.get_compile_config()[name] for name in COMPILED_WITH} == {
        **COMPILED_WITH,
        "mixing": keras.saving.serialize_keras_object(COMPILED_WITH["mixing"]),
    }
    assert iterations(model) == 4
    fit_an_epoch(model)
    for weight, other in zip(model.get_weights(), expected, strict=True):
        np.testing.assert_allclose(weight, other, atol=1e-5)


def test_loads_in_a_fresh_process(saved):
    path, _ = saved
    script = (
        "import keras, keras_vit.training, sys; "
        "model = keras.saving.load_model(sys.argv[1]); "
        "print(type(model).__name__, model.micro_batches, model.mixing, model.seed, model.xla, "
        "int(model.optimizer.iterations))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, path],
        capture_output=True,
        text=True,
        cwd=pathlib.Path(__file__).parents[1],
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"DistributedModel 2 {COMPILED_WITH['mixing']} 13 False 4\n"


def test_a_loss_scale_is_loaded_with_its_state(tmp_path):
    with policy("mixed_float16"):
        model = compiled(DistributedModel, None, OPTIMIZERS["sgd"])
    fit_an_epoch(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(loaded.optimizer, keras.optimizers.LossScaleOptimizer)
    for variable, other in zip(loaded.optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(variable, other)
    assert int(batches_seen(loaded.optimizer)) == 4


def test_config_round_trip():
    model = compiled(DistributedModel, None, OPTIMIZERS["sgd"], build=build_small_vit)
    other = DistributedModel.from_config(model.get_config())
    other.set_weights(model.get_weights())
    np.testing.assert_array_equal(other([IMAGES[:3]]), model([IMAGES[:3]]))
    assert other.get_config() == model.get_config()


def test_uncompiled_models_can_be_saved(tmp_path):
    network = build_mlp()
    model = DistributedModel(network.inputs, network.outputs)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(loaded, DistributedModel)
    np.testing.assert_array_equal(loaded([IMAGES[:3]]), model([IMAGES[:3]]))


# Epochs that begin in their middle.


@pytest.mark.parametrize("replicas", [None, 2])
def test_initial_step(replicas):
    whole = compiled(DistributedModel, replicas, OPTIMIZERS["sgd"])
    whole.fit(batches(8).repeat(), epochs=2, steps_per_epoch=5, shuffle=False, verbose=0)

    model = compiled(DistributedModel, replicas, OPTIMIZERS["sgd"])
    model.fit(batches(8).take(3), shuffle=False, verbose=0)
    steps = []
    callbacks = [
        keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: steps.append([]),
            on_train_batch_begin=lambda step, logs: steps[-1].append(step),
        )
    ]
    rest = batches(8).repeat().skip(3)
    model.fit(
        rest,
        initial_step=3,
        epochs=2,
        steps_per_epoch=5,
        shuffle=False,
        verbose=0,
        callbacks=callbacks,
    )
    assert steps == [[3, 4], [0, 1, 2, 3, 4]]
    assert iterations(model) == 10
    for weight, expected in zip(model.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, expected)

    # The next fit begins at the beginning again.
    model.fit(rest, epochs=1, steps_per_epoch=5, shuffle=False, verbose=0, callbacks=callbacks)
    assert steps[2:] == [[0, 1, 2, 3, 4]]


def test_initial_step_with_several_steps_per_execution():
    model = compiled(DistributedModel, 2, OPTIMIZERS["sgd"], steps_per_execution=2)
    model.fit(
        batches(8).repeat(), initial_step=2, epochs=2, steps_per_epoch=6, shuffle=False, verbose=0
    )
    assert iterations(model) == 4 + 6


@pytest.mark.parametrize(("initial_step", "steps"), [(5, 5), (-1, 5), (3, None)])
def test_initial_step_out_of_range(initial_step, steps):
    model = compiled(DistributedModel, None, OPTIMIZERS["sgd"])
    message = rf"in \[0, steps_per_epoch\).*initial_step={initial_step}, steps_per_epoch={steps}\."
    with pytest.raises(ValueError, match=message):
        model.fit(batches(), initial_step=initial_step, steps_per_epoch=steps)


# Errors.


@pytest.mark.parametrize("micro_batches", [0, -2, 2.0, None])
def test_micro_batches_must_be_a_positive_int(micro_batches):
    with pytest.raises(ValueError, match=rf"positive int\. Received: .*={micro_batches!r}\."):
        compiled(DistributedModel, None, OPTIMIZERS["sgd"], micro_batches=micro_batches)


@pytest.mark.parametrize("jit_compile", ["Auto", None, 2])
def test_jit_compile_must_be_one_of_three(jit_compile):
    with pytest.raises(ValueError, match=rf"True, False or 'auto'.*={jit_compile!r}\."):
        compiled(DistributedModel, None, OPTIMIZERS["sgd"], jit_compile=jit_compile)


@pytest.mark.parametrize("replicas", [None, 2])
def test_micro_batches_must_divide_the_images(replicas):
    model = compiled(DistributedModel, replicas, OPTIMIZERS["sgd"], micro_batches=3)
    data = (
        batches()
        .take(1)
        .map(lambda *values: [tf.ensure_shape(v, (BATCH, *v.shape[1:])) for v in values])
    )
    images = BATCH // (replicas or 1)
    with pytest.raises(ValueError, match=rf"must divide .*micro_batches=3, {images} images\."):
        model.fit(data, shuffle=False, verbose=0)


def test_keras_distribution_must_not_be_set():
    network = build_mlp()
    model = DistributedModel(network.inputs, network.outputs)
    # In place of a DataParallel, which Keras 3.12 cannot make on TensorFlow.
    keras.distribution.set_distribution("everything")
    try:
        with pytest.raises(ValueError, match=r"tf\.distribute\.Strategy instead.*'everything'\."):
            model.compile("sgd", "mse")
    finally:
        keras.distribution.set_distribution(None)


def test_optimizer_must_be_of_the_scope():
    optimizer = OPTIMIZERS["sgd"]()
    with pytest.raises(ValueError, match=r"in the scope of the model's strategy.*SGD"):
        compiled(DistributedModel, 2, lambda: optimizer)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"gradient_accumulation_steps": 4}, r"micro_batches=k.*accumulation_steps=4\."),
        ({"use_ema": True, "ema_overwrite_frequency": 6}, r"must be None.*Received: 6\."),
    ],
)
def test_optimizer_without_what_fails_under_a_strategy(optimizer, message):
    with pytest.raises(ValueError, match=message):
        compiled(DistributedModel, 2, lambda: keras.optimizers.SGD(0.1, **optimizer))
    compiled(DistributedModel, None, lambda: keras.optimizers.SGD(0.1, **optimizer))


def test_only_what_keras_makes_of_arrays_is_untuned(monkeypatch):
    """Once for training and once for all validations; it trains as before."""
    expected = train(DistributedModel, None, OPTIMIZERS["sgd"])  # 8 steps of the same batches
    data = []
    prepare = DistributedModel._maybe_symbolic_build

    def record(model, iterator=None, **arguments):
        prepare(model, iterator=iterator, **arguments)
        data.append(iterator._distributed_dataset)

    monkeypatch.setattr(DistributedModel, "_maybe_symbolic_build", record)
    model = compiled(DistributedModel, None, OPTIMIZERS["sgd"])
    options = {"batch_size": BATCH, "shuffle": False, "verbose": 0}
    model.fit(IMAGES, LABELS, epochs=4, validation_data=(IMAGES[:12], LABELS[:12]), **options)
    for weight, other in zip(model.get_weights(), expected.weights, strict=True):
        np.testing.assert_allclose(weight, other, atol=1e-5)
    assert [dataset.options().autotune.enabled for dataset in data] == [False] * 5
    assert data[1] is data[2] is data[3] is data[4]
    own = tf.data.Dataset.from_tensor_slices((IMAGES, LABELS)).batch(BATCH)
    model.fit(own, verbose=0)
    assert data[5].options().autotune.enabled is None


def test_iterators_of_replicas_are_untuned(monkeypatch):
    """Who deletes an iterator waits for the thread that tunes it, which may sleep for a minute."""
    enabled = []
    iterate = tf.data.Dataset.__iter__

    def record(dataset):
        enabled.append(dataset.options().autotune.enabled)
        return iterate(dataset)

    monkeypatch.setattr(tf.data.Dataset, "__iter__", record)
    model = compiled(DistributedModel, 4, OPTIMIZERS["sgd"])
    model.fit(batches(), epochs=2, validation_data=batches(), shuffle=False, verbose=0)
    assert len(enabled) >= 2 * 2 * 4  # epochs, training and validation, replicas
    assert set(enabled) == {False}


@pytest.mark.parametrize("steps_per_execution", [1, 4])
@pytest.mark.parametrize("known", [True, False])
def test_data_that_end(steps_per_execution, known):
    """10 batches an epoch: no part of a step is done without a batch."""

    def fit(strategy, **options):
        keras.utils.set_random_seed(2)
        with scope(strategy):
            inputs = keras.Input((12, 8, 3))
            x = keras.layers.Rescaling(1 / 255)(inputs)
            outputs = keras.layers.Dense(5)(keras.layers.Flatten()(x))
            model = DistributedModel(inputs, outputs)
            loss = keras.losses.CategoricalCrossentropy(from_logits=True)
            model.compile(keras.optimizers.AdamW(1e-2), loss, jit_compile=False, **options)
        data = batches(4, IMAGES[:40], LABELS[:40])
        if not known and strategy is not None:
            data = data.filter(lambda images, labels: True)
        history = model.fit(data, epochs=2, validation_data=data, shuffle=False, verbose=0)
        return model, history.history

    model, history = fit(mirrored(2), steps_per_execution=steps_per_execution)
    expected, expected_history = fit(None)
    assert model.optimizer.iterations.numpy() == 20
    for name in ("loss", "val_loss"):
        np.testing.assert_allclose(history[name], expected_history[name], atol=1e-5)
    for weight, expected_weight in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_allclose(weight, expected_weight, atol=1e-5)
