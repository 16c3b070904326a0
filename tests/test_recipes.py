"""Recipes: the table, its losses, mixing and optimizers, each against NumPy or its source."""

import dataclasses
import math
import re

import keras
import numpy as np
import pytest
import scipy.special
import scipy.stats
import tensorflow as tf
from rich.console import Console

from keras_vit import ViTConfig, build_vit
from keras_vit.data import load_data
from keras_vit.data.augmentation import Augmentation
from keras_vit.data.pipeline import training_batches
from keras_vit.training.building import compiled_model, model_arguments
from keras_vit.training.fitting import _batches
from keras_vit.training.losses import SigmoidCrossEntropy, build_loss, set_head_bias
from keras_vit.training.mixing import PROPOSALS, Mixing, _beta, _box_weights, _uniform
from keras_vit.training.optimizers import (
    LayerRatesAdamW,
    LayerRatesLamb,
    LayerRatesSGD,
    LinearDecay,
    build_optimizer,
    layer_rates,
)
from keras_vit.training.recipe_table import recipe_details, recipes_table
from keras_vit.training.recipes import RECIPES, TEXTS, Recipe, parse_override
from keras_vit.training.workers import Workers

SMALL = Recipe(ViTConfig(16, 2, 2, 24, 4), image_size=8, epochs=2)


def small_vit(**arguments):
    return build_vit(SMALL.variant, image_size=8, **{"num_classes": 5, **arguments})


# The table.


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_say_what_they_are(name):
    recipe = RECIPES[name]
    assert all(getattr(recipe, text) for text in TEXTS)
    assert name == name.lower()


# Training images and classes: ImageNet-1k has 1,281,167 images, of which big_vision keeps 1 % back;
# ImageNet-21k 14,197,122, of which it keeps 51,200.
@pytest.mark.parametrize(
    ("name", "images", "classes"),
    [
        ("paper_imagenet", 1_281_167, None),
        ("paper_imagenet21k", 14_197_122, None),
        ("plain_imagenet", 1_268_355, None),
        ("augreg_imagenet", 1_268_355, 1000),
        ("augreg_imagenet21k", 14_145_922, 21_843),
    ],
)
def test_steps_and_biases_are_the_sources(name, images, classes):
    recipe = RECIPES[name]
    steps = recipe.epochs * images / recipe.batch_size
    assert recipe.warmup * steps == pytest.approx(10_000, rel=0.01)
    expected = 0.0 if classes is None else -math.log(classes)
    assert recipe.head_bias == pytest.approx(expected, abs=0.02)


def test_parts_of_a_recipe():
    recipe = RECIPES["cifar"]
    assert recipe.augmentation == Augmentation(
        min_crop_area=0.8, flip=True, rand_augment=(2, 9), erasing=0.25
    )
    assert recipe.mixing == Mixing(mixup=0.8, cutmix=1.0)
    assert RECIPES["photos"].mixing is None


def test_ints_and_lists_are_taken():
    """As they come from JSON and from a command line."""
    recipe = dataclasses.replace(SMALL, mixup=1, rand_augment=[2, 9], normalization=[0.5, 1])
    assert recipe.augmentation.rand_augment == [2, 9]


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"learning_rate": "abc"}, TypeError, r"`learning_rate` must be a finite number.*'abc'"),
        ({"learning_rate": math.inf}, TypeError, r"`learning_rate` must be a finite.*inf"),
        ({"weight_decay": math.nan}, TypeError, r"`weight_decay` must be a finite number.*nan"),
        ({"weight_decay": True}, TypeError, r"`weight_decay` must be a finite number.*True"),
        ({"ema": "0.9"}, TypeError, r"`ema` must be a finite number or None.*'0.9'"),
        ({"epochs": 1.5}, TypeError, r"`epochs` must be an int.*epochs=1.5"),
        ({"epochs": True}, TypeError, r"`epochs` must be an int.*epochs=True"),
        ({"flip": 1}, TypeError, r"`flip` must be True or False.*flip=1"),
        ({"optimizer": 3}, TypeError, r"`optimizer` must be a string.*optimizer=3"),
        ({"variant": 16}, TypeError, r"`variant` must be a string or a ViTConfig or None.*16"),
        ({"image_size": "large"}, TypeError, r"`image_size` must be an int or a tuple.*'large'"),
        ({"rand_augment": "2,x"}, TypeError, r"`rand_augment` must be a tuple or None.*'2,x'"),
        (
            {"rand_augment": 2},
            TypeError,
            r"such as \(2,10\), which is --set rand_augment=2,10\..*=2",
        ),
        ({"variant": "Ti/17"}, ValueError, r"`variant` must be one of Ti/16, .*'Ti/17'"),
        ({"dropout": 1}, ValueError, r"`dropout` must be in \[0, 1\).*dropout=1"),
        ({"drop_path": -0.1}, ValueError, r"`drop_path` must be in \[0, 1\).*-0.1"),
        ({"micro_batches": 0}, ValueError, r"`micro_batches` must be a positive int.*=0"),
        ({"optimizer": "lion"}, ValueError, r"`optimizer` must be 'adamw'.*'lamb'.*'lion'"),
        ({"schedule": "step"}, ValueError, r"`schedule` must be one of.*linear.*'step'"),
        ({"loss": "hinge"}, ValueError, r"`loss` must be one of.*sigmoid.*'hinge'"),
        ({"ema": 1.0}, ValueError, r"`ema` must be in \(0, 1\) or None.*ema=1.0"),
        ({"mixup": -1}, ValueError, r"`mixup` must be a number of at least 0.*mixup=-1"),
        ({"cutmix": -1}, ValueError, r"`cutmix` must be a number of at least 0.*cutmix=-1"),
        ({"mixup": 0.2, "batch_size": 9}, ValueError, r"`batch_size` must be even.*=9"),
        ({"erasing": 2}, ValueError, r"`erasing` must be in \[0, 1\].*erasing=2"),
        ({"rand_augment": (2, 11)}, ValueError, r"`rand_augment` must be.*\(2, 11\)"),
        (
            {"variant": None, "position": None, "layer_scale": 0.1},
            ValueError,
            r"`layer_scale` must be None with weights.*0.1",
        ),
    ],
)
def test_errors(arguments, error, match):
    with pytest.raises(error, match=match):
        dataclasses.replace(SMALL, **arguments)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mixup=0.2", ("mixup", 0.2)),
        (" epochs = 3 ", ("epochs", 3)),
        ("learning_rate=1e-3", ("learning_rate", 0.001)),
        ("rand_augment=2,10", ("rand_augment", (2, 10))),
        ("rand_augment=(2, 10)", ("rand_augment", (2, 10))),
        ("ema=none", ("ema", None)),
        ("flip=True", ("flip", True)),
        ("three_augment=false", ("three_augment", False)),
        ("variant=Ti/16", ("variant", "Ti/16")),
        ("optimizer=lamb", ("optimizer", "lamb")),
        ("mixup=high", ("mixup", "high")),  # which `Recipe` refuses
        ("patch_size=016", ("patch_size", "016")),
    ],
)
def test_overrides_of_text(text, expected):
    name, value = parse_override(text)
    assert (name, value) == expected
    assert type(value) is type(expected[1])


@pytest.mark.parametrize("text", ["mixup", "mixing=0.2", "=3", "source=me", ""])
def test_text_that_is_no_override(text):
    with pytest.raises(ValueError, match=rf"FIELD=VALUE.*`keras-vit recipes small`.*{text!r}"):
        parse_override(text)


@pytest.mark.parametrize(
    ("text", "meant"), [("mixp=0.2", "mixup"), ("drop-path=0.1", "drop_path"), ("lr=1", None)]
)
def test_the_nearest_field_is_named(text, meant):
    with pytest.raises(ValueError, match=f"Received: {text!r}") as caught:
        parse_override(text)
    named = re.findall(r"Did you mean (\w+)=\.\.\.\?", str(caught.value))
    assert named == ([meant] if meant else [])


def printed(table):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_tables():
    lines = printed(recipes_table()).splitlines()
    for name, recipe in RECIPES.items():
        [line] = [line for line in lines if f" {name} " in line]
        assert f" {recipe.epochs} " in line
        assert f" {recipe.batch_size} " in line
    text = printed(recipe_details("cifar"))
    assert "7 blocks of width 256, patches of 4 px" in text
    assert "rand_augment" in text
    assert "(2, 9)" in text
    assert "arXiv 2104.05704" in text
    with pytest.raises(ValueError, match=r"one of tiny, small.*'smal'"):
        recipe_details("smal")


# Losses.


def logits_and_labels():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (7, 5))
    logits[0, :2] = 80, -80  # whose probabilities are 1 and 0 in float32
    return logits, rng.dirichlet(np.ones(5), 7)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_sigmoid_loss(smoothing):
    """The sum over the classes and the mean over the images, in float64."""
    logits, labels = logits_and_labels()
    y = (1 - smoothing) * labels + smoothing / 5
    each = -y * scipy.special.log_expit(logits) - (1 - y) * scipy.special.log_expit(-logits)
    loss = build_loss(dataclasses.replace(SMALL, loss="sigmoid", label_smoothing=smoothing))
    value = loss(labels.astype("float32"), logits.astype("float32"))
    assert float(value) == pytest.approx(each.sum(1).mean(), rel=1e-6)
    again = keras.losses.deserialize(keras.losses.serialize(loss))
    assert isinstance(again, SigmoidCrossEntropy)
    assert again.label_smoothing == smoothing


def test_softmax_loss():
    logits, labels = logits_and_labels()
    y = 0.9 * labels + 0.1 / 5
    expected = -(y * scipy.special.log_softmax(logits, axis=1)).sum(1).mean()
    value = build_loss(SMALL)(labels.astype("float32"), logits.astype("float32"))
    assert float(value) == pytest.approx(expected, rel=1e-6)


def test_head_bias():
    model = small_vit(distillation_token=True, pooling="token")
    set_head_bias(model, -6.9)
    for weight in model.weights:
        biased = weight.path in ("head/bias", "head_distillation/bias")
        assert np.all(np.isclose(weight, -6.9)) == biased, weight.path
    logits = model(np.zeros((3, 8, 8, 3), "float32"))
    np.testing.assert_allclose(logits, np.full((3, 5), -6.9), rtol=1e-6)


def test_head_bias_without_a_head():
    with pytest.raises(ValueError, match=r"a model of `build_vit` with a head.*without one"):
        set_head_bias(small_vit(num_classes=0, representation_size=3, pooling="token"), -1.0)


# Mixing.

IMAGES = np.random.default_rng(1).integers(0, 256, (8, 10, 14, 3), "uint8")
LABELS = np.eye(11, dtype="float32")[[0, 3, 3, 7, 10, 2, 5, 5]]
PARTNERS = [1, 0, 3, 2, 5, 4, 7, 6]


def mix(mixing, seed, images=IMAGES, labels=LABELS):
    images, labels = mixing(tf.constant(images), tf.constant(labels), tf.constant([seed, 9]))
    assert images.dtype == labels.dtype == tf.float32
    return images.numpy(), labels.numpy()


def test_mixup_blends_pairs():
    shares = set()
    for seed in range(20):
        images, labels = mix(Mixing(mixup=0.8), seed)
        share = labels[0, 0]  # of the first image, whose partner is of another class
        shares.add(share)
        blend = share * IMAGES.astype("float64") + (1 - share) * IMAGES[PARTNERS]
        np.testing.assert_allclose(images, blend, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(labels, share * LABELS + (1 - share) * LABELS[PARTNERS])
    assert len(shares) == 20
    assert 0 < min(shares) < 0.3 < 0.7 < max(shares) < 1


def test_cutmix_pastes_a_box_of_the_labels_share():
    areas = set()
    for seed in range(20):
        images, labels = mix(Mixing(cutmix=1.0), seed)
        pasted = (images != IMAGES).any(axis=(0, 3))  # (H, W)
        areas.add(pasted.sum())
        expected = np.where(pasted[..., None], IMAGES[PARTNERS], IMAGES)
        np.testing.assert_array_equal(images, expected)
        rows, columns = pasted.any(1), pasted.any(0)
        np.testing.assert_array_equal(pasted, rows[:, None] & columns)
        assert np.abs(np.diff(rows.astype(int))).sum() <= 2  # one piece
        assert np.abs(np.diff(columns.astype(int))).sum() <= 2
        share = 1 - pasted.mean()
        np.testing.assert_allclose(
            labels, share * LABELS + (1 - share) * LABELS[PARTNERS], rtol=1e-5, atol=1e-6
        )
    assert len(areas) > 8


@pytest.mark.parametrize("share", [0.0, 0.23, 0.5, 0.99, 1.0])
def test_box_is_the_papers(share):
    """Its corners, as the authors' code computes and clips them."""
    for center in ([0.0, 0.999], [0.3, 0.55], [0.72, 0.01]):
        expected = np.ones((10, 14))
        corners = []
        for side, place in zip((10, 14), center, strict=True):
            half = int(side * math.sqrt(1 - share)) // 2
            corners.append(np.clip([int(side * place) - half, int(side * place) + half], 0, side))
        (top, bottom), (left, right) = corners
        expected[top:bottom, left:right] = 0
        box = _box_weights(tf.constant(share, tf.float32), tf.constant(center), 10, 14)
        np.testing.assert_array_equal(box[..., 0], expected)


@pytest.mark.parametrize("alpha", [0.02, 0.2, 0.5, 0.8, 1.0, 3.0])
def test_lambda_is_beta_distributed(alpha):
    """At eleven places of the distribution, within 5 standard errors."""
    count = 6000

    @tf.function
    def draw(start):
        seeds = tf.stack([start + tf.range(count), tf.fill([count], 3)], 1)
        return tf.vectorized_map(lambda seed: _beta(alpha, _uniform(2 * PROPOSALS, seed)), seeds)

    shares = draw(tf.constant(0)).numpy()
    beta = scipy.stats.beta(alpha, alpha)
    for place in (1e-6, 1e-3, 0.01, 0.1, 0.3, 0.5, 0.6, 0.8, 0.95, 0.99, 0.999):
        expected = beta.cdf(place)
        error = math.sqrt(expected * (1 - expected) / count) + 1e-12
        assert abs((shares <= place).mean() - expected) < 5 * error, place
    assert shares.var() == pytest.approx(beta.var(), rel=0.1)


def test_either_is_done_with_equal_chance():
    """An image of one colour beside one of another: MixUp alone makes a third."""
    images = np.stack([np.zeros((6, 7, 3), "uint8"), np.full((6, 7, 3), 200, "uint8")])
    mixing, labels = Mixing(mixup=1.0, cutmix=1.0), LABELS[:2]
    colours = [set(np.unique(mix(mixing, seed, images, labels)[0])) for seed in range(200)]
    blends = sum(not each <= {0.0, 200.0} for each in colours)
    assert 65 < blends < 135  # 100 +- 5 standard errors


@pytest.mark.parametrize("mixing", [Mixing(0.2), Mixing(0, 1.0), Mixing(0.8, 1.0)])
def test_the_same_compiled_and_in_parts(mixing):
    """XLA, other integer seeds, and a batch cut into even parts give the same images."""
    compiled = tf.function(mixing, jit_compile=True)
    for number in range(5):
        seed = tf.constant([number, 9])
        images, labels = mix(mixing, number)
        results = [
            compiled(tf.constant(IMAGES), tf.constant(LABELS), seed),
            mixing(IMAGES, LABELS, tf.cast(seed, tf.int64)),
            mixing(IMAGES, LABELS, tf.cast(seed, tf.uint32)),
            [
                np.concatenate(parts)
                for parts in zip(
                    mix(mixing, number, IMAGES[:6], LABELS[:6]),
                    mix(mixing, number, IMAGES[6:], LABELS[6:]),
                    strict=True,
                )
            ],
        ]
        for other_images, other_labels in results:
            np.testing.assert_allclose(other_images, images, rtol=1e-6, atol=1e-4)
            np.testing.assert_allclose(other_labels, labels, rtol=1e-6, atol=1e-7)


def test_no_mixing_is_a_cast():
    images, labels = mix(Mixing(), 0)
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(labels, LABELS)


@pytest.mark.parametrize("count", [8, 7])
def test_batch_of_unknown_size(count):
    """An odd last image stays as it is."""
    mixing, even = Mixing(0.2, 1.0), count - count % 2
    signature = [
        tf.TensorSpec((None, 10, 14, 3), tf.uint8),
        tf.TensorSpec((None, 11)),
        tf.TensorSpec((2,), tf.int32),
    ]
    received = tf.function(mixing, input_signature=signature)(
        IMAGES[:count], LABELS[:count], tf.constant([4, 9])
    )
    mixed = mix(mixing, 4, IMAGES[:even], LABELS[:even])
    for values, expected, stock in zip(received, mixed, (IMAGES, LABELS), strict=True):
        np.testing.assert_allclose(values[:even], expected, rtol=1e-6)
        np.testing.assert_allclose(values[even:], stock[even:count], rtol=1e-6)


def test_mixing_errors():
    with pytest.raises(ValueError, match=r"even number of images.*\(7, 10, 14, 3\)"):
        mix(Mixing(0.2), 0, IMAGES[:7], LABELS[:7])
    for numbers in (LABELS.argmax(1), LABELS.argmax(1)[:, None], LABELS.argmax(1) * 1.0):
        with pytest.raises(ValueError, match=rf"to_categorical.*{re.escape(str(numbers.shape))}"):
            Mixing(0.2)(tf.constant(IMAGES), numbers, tf.constant([0, 9]))
    with pytest.raises(ValueError, match=r"`mixup` must be a number of at least 0.*'a'"):
        Mixing(mixup="a")
    with pytest.raises(ValueError, match=r"`cutmix` must be a number of at least 0.*nan"):
        Mixing(cutmix=math.nan)


def test_mixing_is_serialisable():
    mixing = Mixing(0.8, 1.0)
    config = keras.saving.serialize_keras_object(mixing)
    assert keras.saving.deserialize_keras_object(config) == mixing


# Optimizers.


@pytest.mark.parametrize("warmup", [0.0, 0.2])
def test_linear_schedule(warmup):
    recipe = dataclasses.replace(
        SMALL, epochs=10, learning_rate=0.4, warmup=warmup, schedule="linear"
    )
    schedule = build_optimizer(recipe, small_vit(), steps_per_epoch=50)._learning_rate
    schedule = keras.optimizers.schedules.deserialize(
        keras.optimizers.schedules.serialize(schedule)
    )
    assert isinstance(schedule, LinearDecay)
    rates = [float(schedule(step)) for step in range(503)]
    peak = int(500 * warmup)
    np.testing.assert_allclose(rates[:peak], np.linspace(0, 0.4, peak, endpoint=False), rtol=1e-5)
    np.testing.assert_allclose(rates[peak:501], np.linspace(0.4, 0, 501 - peak), atol=1e-7)
    assert rates[501:] == [0, 0]


def lamb_by_hand(weights, names, gradients, rate, rates, decay):
    """Algorithm 2 of arXiv 1904.00962 in float64; what is no kernel takes Adam's steps."""
    m = [np.zeros(w.shape) for w in weights]
    v = [np.zeros(w.shape) for w in weights]
    for step, each in enumerate(gradients, start=1):
        for i, gradient in enumerate(each):
            m[i] = 0.9 * m[i] + 0.1 * gradient
            v[i] = 0.999 * v[i] + 0.001 * gradient**2
            update = m[i] / (1 - 0.9**step)
            update = update / (np.sqrt(v[i] / (1 - 0.999**step)) + 1e-7)
            layer, name = names[i]
            if name == "kernel":
                update += decay * weights[i]
                norm = max(np.linalg.norm(weights[i]), 0.02 * weights[i].size ** 0.5)
                update *= norm / np.linalg.norm(update)
            weights[i] = weights[i] - rate * rates[layer] * update
    return weights


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_lamb(layer_decay):
    """Three steps with known gradients, the kernel of the head from zero."""
    model = small_vit()
    recipe = dataclasses.replace(SMALL, optimizer="lamb", layer_decay=layer_decay, clip_norm=None)
    optimizer = build_optimizer(recipe, model, steps_per_epoch=10)
    assert type(optimizer) is LayerRatesLamb
    config = keras.optimizers.serialize(optimizer)
    config["config"]["learning_rate"] = 0.1
    optimizer = keras.optimizers.deserialize(config)
    optimizer.build(model.trainable_weights)
    rng = np.random.default_rng(1)
    gradients = [[rng.normal(0, 1, w.shape) for w in model.trainable_weights] for _ in range(3)]
    names = [(w.path.split("/")[0], w.name) for w in model.trainable_weights]
    weights = [w.numpy().astype("float64") for w in model.trainable_weights]
    rates = layer_rates(model, layer_decay)
    expected = lamb_by_hand(weights, names, gradients, 0.1, rates, recipe.weight_decay)
    for each in gradients:
        optimizer.apply([tf.constant(gradient, tf.float32) for gradient in each])
    for weight, value in zip(model.trainable_weights, expected, strict=True):
        np.testing.assert_allclose(weight, value, rtol=1e-4, atol=1e-6, err_msg=weight.path)
    assert np.abs(model.get_layer("head").kernel).max() > 1e-3


def test_lamb_without_a_gradient_or_a_decay():
    """Stays where it is, though 0 / 0 is near."""
    model = small_vit()
    recipe = dataclasses.replace(SMALL, optimizer="lamb", weight_decay=0.0)
    optimizer = build_optimizer(recipe, model, steps_per_epoch=10)
    before = model.get_weights()
    optimizer.apply([tf.zeros(w.shape) for w in model.trainable_weights], model.trainable_weights)
    for weight, value in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, value)


def test_lamb_trains_from_a_head_of_zeros():
    """Under XLA; beyond what the head's bias alone can do, the same chances for every image."""
    keras.utils.set_random_seed(0)
    model = build_vit(ViTConfig(16, 1, 2, 24, 4), image_size=8, num_classes=5)
    recipe = dataclasses.replace(
        SMALL, optimizer="lamb", learning_rate=0.2, epochs=40, loss="sigmoid", clip_norm=None
    )
    images = np.random.default_rng(2).normal(0, 1, (20, 8, 8, 3)).astype("float32")
    labels = np.eye(5)[np.arange(20) % 5].astype("float32")
    optimizer = build_optimizer(recipe, model, steps_per_epoch=1)
    model.compile(optimizer, build_loss(recipe), jit_compile=True)
    history = model.fit(images, labels, epochs=40, batch_size=20, verbose=0).history["loss"]
    assert history[0] == pytest.approx(5 * math.log(2), rel=1e-5)
    best_of_biases = -math.log(0.2) - 4 * math.log(0.8)
    assert history[-1] < 0.8 * best_of_biases


@pytest.mark.parametrize(
    ("optimizer", "layer_decay", "cls"),
    [
        ("adamw", 1.0, keras.optimizers.AdamW),
        ("adamw", 0.7, LayerRatesAdamW),
        ("sgd", 1.0, keras.optimizers.SGD),
        ("sgd", 0.7, LayerRatesSGD),
        ("lamb", 1.0, LayerRatesLamb),
    ],
)
def test_moving_average(optimizer, layer_decay, cls):
    """average <- 0.75 average + 0.25 w, from the first w on; it takes the weights' place."""
    model = small_vit()
    recipe = dataclasses.replace(
        SMALL, optimizer=optimizer, layer_decay=layer_decay, ema=0.75, warmup=0.0, clip_norm=2.0
    )
    built = build_optimizer(recipe, model, steps_per_epoch=10)
    assert type(built) is cls
    assert (built.global_clipnorm, built.ema_overwrite_frequency) == (2.0, None)
    rng = np.random.default_rng(3)
    average = None
    for _ in range(3):
        gradients = [tf.constant(rng.normal(0, 1, w.shape), "float32") for w in model.weights]
        built.apply(gradients, model.trainable_weights)
        weights = model.get_weights()
        if average is None:
            average = weights
        average = [0.75 * a + 0.25 * w for a, w in zip(average, weights, strict=True)]
    built.finalize_variable_values(model.trainable_weights)
    for value, expected, last in zip(model.get_weights(), average, weights, strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-7)
        assert np.abs(value - last).max() > 0


def test_no_moving_average():
    assert not build_optimizer(SMALL, small_vit(), steps_per_epoch=10).use_ema


# The recipe of a run.


def test_every_part_of_a_recipe_reaches_the_training():
    """What two runs of the same code have in common, a comparison of them would not miss."""
    recipe = dataclasses.replace(
        SMALL,
        image_size=(12, 8),
        batch_size=6,
        micro_batches=2,
        dropout=0.1,
        drop_path=0.2,
        layer_scale=0.3,
        clip_norm=0.7,
        weight_decay=0.4,
        ema=0.9,
        loss="sigmoid",
        label_smoothing=0.1,
        head_bias=-2.0,
        mixup=0.2,
        cutmix=1.0,
        flip=True,
        rand_augment=(2, 9),
        erasing=0.25,
    )
    options = {"seed": 11, "precision": "float32", "jit_compile": False}
    data = load_data("digits")
    vit, model = compiled_model(model_arguments(recipe, 10), recipe, data, options, Workers())
    assert (model.mixing, model.micro_batches, model.seed) == (recipe.mixing, 2, 11)
    assert not model.xla
    assert isinstance(model.loss, SigmoidCrossEntropy)
    assert model.loss.label_smoothing == 0.1
    np.testing.assert_array_equal(vit.get_layer("head").bias, np.full(10, -2.0, "float32"))
    block = vit.get_layer("block_1")
    assert (block.feed_forward.dropout.rate, block.attention.dropout.rate) == (0.1, 0.1)
    assert (block.drop_path.rate, block.layer_scale1.initial_value) == (0.2, 0.3)
    optimizer = model.optimizer
    assert (optimizer.global_clipnorm, optimizer.weight_decay) == (0.7, 0.4)
    assert (optimizer.use_ema, optimizer.ema_momentum) == (True, 0.9)

    def batch(seed=11, augmentation=recipe.augmentation):
        batches = training_batches(
            data.train, (12, 8), 6, 10, seed=seed, first_step=4, augmentation=augmentation
        )
        return [tensor.numpy() for tensor in next(iter(batches))]

    training, validation = _batches(data, recipe, model, 11, Workers(), 4)
    for found, expected in zip(next(iter(training)), batch(), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(batch()[0], batch(augmentation=Augmentation())[0])
    assert not np.array_equal(batch()[1], batch(seed=12)[1])
    assert next(iter(validation))[0].shape == (3, 12, 8, 3)  # as many as a micro-batch has
