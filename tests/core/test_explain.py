"""Attention maps, rollout, distances, positions, filters and features of models as they are."""

import io
import re

import keras
import numpy as np
import pytest
from conftest import randomise
from reference import sincos2d, vit_forward

import keras_vit
from keras_vit import explain
from keras_vit.explain import PatchGrid

CONFIG = keras_vit.ViTConfig(hidden_dim=48, depth=3, num_heads=3, mlp_dim=80, patch_size=4)
HYBRID = keras_vit.ViTConfig(48, 2, 3, 80, 1, stem_units=(1, 1), stem_width=32)
IMAGE_SIZE = (12, 20)  # 3 x 5 patches

# Arguments that `build_vit` and the reference share, and the number of prefix tokens.
SHARED = [
    ({}, 1),
    ({"pooling": "mean"}, 1),
    ({"pooling": "gap", "class_token": False}, 0),
    ({"pooling": "map", "class_token": False, "num_registers": 2}, 2),
    ({"pooling": "token+gap", "num_registers": 4}, 5),
    ({"distillation_token": True, "num_registers": 2}, 4),
    ({"position": "sincos2d", "gelu": "tanh"}, 1),
]
# Arguments that the reference sees in the weights.
IN_WEIGHTS = [
    {"qk_norm": True},
    {"layer_scale": 0.1, "patch_norm": True, "qkv_bias": False},
    {"norm_after_pooling": True, "num_classes": 0},
    {"dropout": 0.3, "attention_dropout": 0.3, "drop_path": 0.3},
]


def name(value):
    if not isinstance(value, dict):
        return ""
    return " ".join(f"{key}={item}" for key, item in value.items()) or "default"


def make(config=CONFIG, image_size=IMAGE_SIZE, **arguments):
    model = keras_vit.build_vit(
        config, image_size=image_size, **{"num_classes": 7, "pooling": "token", **arguments}
    )
    return randomise(model)


def normal(*shape, seed=5):
    return np.random.default_rng(seed).normal(size=shape)


def traced(model, images, config=CONFIG, **arguments):
    """What the reference says of the tokens and attention in a model."""
    weights = {weight.path: keras.ops.convert_to_numpy(weight) for weight in model.weights}
    weights = {path: value for path, value in weights.items() if "seed_generator" not in path}
    trace = {}
    vit_forward(
        weights,
        images,
        patch_size=config.patch_size,
        num_heads=config.num_heads,
        trace=trace,
        **arguments,
    )
    return trace


@pytest.mark.parametrize(("arguments", "prefix"), SHARED, ids=name)
def test_maps_equal_the_reference(arguments, prefix, best_precision):
    model = make(**arguments)
    images = normal(2, *IMAGE_SIZE, 3)
    maps = explain.attention_maps(model, images)
    assert maps.shape == (3, 2, 3, prefix + 15, prefix + 15)
    expected = traced(model, images, **arguments)["attention"]
    np.testing.assert_allclose(maps, np.stack(expected), atol=best_precision)
    np.testing.assert_allclose(maps.sum(axis=-1), 1, atol=1e-6)
    grid = explain.patch_grid(model)
    assert grid == PatchGrid(3, 5, (4.0, 4.0), prefix, arguments.get("class_token", True))


@pytest.mark.parametrize("arguments", IN_WEIGHTS, ids=name)
def test_maps_of_what_the_weights_say(arguments, best_precision):
    model = make(**arguments)
    images = normal(2, *IMAGE_SIZE, 3)
    maps = explain.attention_maps(model, images)
    expected = np.stack(traced(model, images)["attention"])
    np.testing.assert_allclose(maps, expected, atol=best_precision)


def test_maps_of_a_hybrid(best_precision):
    """Patches of 1 on a map of a eighth: 8 pixels each."""
    model = make(HYBRID, image_size=(24, 40))
    images = normal(2, 24, 40, 3)
    maps = explain.attention_maps(model, images)
    expected = traced(model, images, HYBRID, stem_units=(1, 1))["attention"]
    np.testing.assert_allclose(maps, np.stack(expected), atol=best_precision)
    assert explain.patch_grid(model) == PatchGrid(3, 5, (8.0, 8.0), 1, True)


def test_maps_are_float32_by_default():
    """To 1e-6 of a model in float32, whatever the size of its batches."""
    model = keras_vit.build_vit(CONFIG, image_size=IMAGE_SIZE, num_classes=7, num_registers=2)
    images = normal(5, *IMAGE_SIZE, 3).astype("float32")
    maps = explain.attention_maps(model, images, batch_size=2)
    assert maps.dtype == np.float32
    expected = np.stack(traced(model, images, num_registers=2)["attention"])
    np.testing.assert_allclose(maps, expected, atol=1e-6)
    np.testing.assert_array_equal(explain.attention_maps(model, images[2:4]), maps[:, 2:4])


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_maps_of_mixed_precision(policy):
    """The rows would not sum to 1 so nearly in half precision."""
    arguments = {"image_size": IMAGE_SIZE, "num_classes": 7, "qk_norm": True}
    full = keras_vit.build_vit(CONFIG, **arguments)
    keras.config.set_dtype_policy(policy)
    try:
        half = keras_vit.build_vit(CONFIG, **arguments)
    finally:
        keras.config.set_dtype_policy("float32")
    half.set_weights(full.get_weights())
    images = normal(2, *IMAGE_SIZE, 3).astype("float32")
    maps = explain.attention_maps(half, images)
    assert maps.dtype == np.float32
    np.testing.assert_allclose(maps.sum(axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(maps, explain.attention_maps(full, images), atol=0.02)
    assert not np.array_equal(maps, explain.attention_maps(full, images))
    assert explain.features(half, images, layers=[0])["block_0"].dtype == np.float32


def test_model_is_left_as_it_is():
    model = make()
    images = normal(2, *IMAGE_SIZE, 3).astype("float32")
    before, weights, config = model(images), model.get_weights(), model.get_config()
    block = model.get_layer("block_1").output
    explain.attention_maps(model, images)
    explain.features(model, images)
    np.testing.assert_array_equal(model(images), before)
    assert all(map(np.array_equal, model.get_weights(), weights))
    assert model.get_config() == config
    assert model.get_layer("block_1").output is block


def test_maps_of_a_file(tmp_path):
    model = make(num_registers=2, normalization="imagenet", qk_norm=True)
    images = np.random.default_rng(0).integers(0, 256, (2, *IMAGE_SIZE, 3)).astype("uint8")
    maps = explain.attention_maps(model, images)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(explain.attention_maps(again, images), maps)
    assert explain.patch_grid(again) == explain.patch_grid(model)


class Wrapped(keras.Model):
    """A model of a user, with a ViT and something before and after it."""

    def __init__(self, vit):
        super().__init__()
        self.vit = vit
        self.head = keras.layers.Dense(2)

    def call(self, images):
        return self.head(self.vit(2 * images))


def functional(vit):
    """The same as a functional model, the ViT in a model in a model."""
    images = keras.Input((*IMAGE_SIZE, 3))
    backbone = keras.Sequential([keras.Input((*IMAGE_SIZE, 3)), vit], name="backbone")
    x = backbone(keras.layers.Rescaling(2.0)(images))
    return keras.Model(images, keras.layers.Dense(2)(keras.layers.Dropout(0.5)(x)))


@pytest.mark.parametrize("nest", [Wrapped, functional])
def test_nested_models(nest, tmp_path):
    vit = make(num_classes=0)
    images = normal(2, *IMAGE_SIZE, 3).astype("float32")
    maps = explain.attention_maps(vit, 2 * images)
    tokens = explain.features(vit, 2 * images)
    model = nest(vit)
    np.testing.assert_array_equal(explain.attention_maps(model, images), maps)
    np.testing.assert_array_equal(explain.features(model, images)["block_1"], tokens["block_1"])
    assert explain.patch_grid(model) == explain.patch_grid(vit)
    if nest is functional:
        model.save(tmp_path / "model.keras")
        model = keras.saving.load_model(tmp_path / "model.keras")
        np.testing.assert_array_equal(explain.attention_maps(model, images), maps)


def test_user_head_on_the_tokens():
    """A model cut out of a ViT, without its pooling."""
    vit = make()
    model = keras.Model(vit.input, keras.layers.Flatten()(vit.get_layer("encoder_norm").output))
    images = normal(2, *IMAGE_SIZE, 3).astype("float32")
    expected = explain.attention_maps(vit, images)
    np.testing.assert_array_equal(explain.attention_maps(model, images), expected)


def test_model_that_skips_unread_tokens():
    """All rows of the last block are there, which that model does not compute."""
    vit = make()
    model = keras_vit.skip_unread_tokens(vit)
    images = normal(2, *IMAGE_SIZE, 3).astype("float32")
    expected = explain.attention_maps(vit, images)
    np.testing.assert_allclose(explain.attention_maps(model, images), expected, atol=1e-6)
    expected = explain.features(vit, images, layers=[-1])["block_2"]
    assert explain.features(model, images, layers=[-1])["block_2"].shape == (2, 16, 48)
    np.testing.assert_allclose(
        explain.features(model, images, layers=[-1])["block_2"], expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("arguments", [{}, {"distillation_token": True, "num_registers": 2}])
def test_features_equal_the_reference(arguments, best_precision):
    model = make(**arguments)
    images = normal(3, *IMAGE_SIZE, 3)
    expected = traced(model, images, **arguments)["tokens"]
    found = explain.features(model, images, batch_size=2)
    assert list(found) == ["block_0", "block_1", "block_2"]
    for tokens, reference in zip(found.values(), expected[1:], strict=True):
        np.testing.assert_allclose(
            tokens, reference, atol=best_precision * abs(reference).max(), rtol=0
        )
    layers = ["patch_encoder", -1, "encoder_norm", 0, "block_2", 2]  # the last is named thrice
    some = explain.features(model, images, layers=layers)
    assert list(some) == ["patch_encoder", "block_2", "encoder_norm", "block_0"]
    np.testing.assert_allclose(some["patch_encoder"], expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(some["block_2"], found["block_2"], rtol=1e-5, atol=1e-5)
    tokens = keras.Model(model.input, model.get_layer("encoder_norm").output)(images)
    np.testing.assert_allclose(some["encoder_norm"], tokens, rtol=1e-5, atol=1e-5)


# Two blocks of one image with a class token and two patches side by side, one head.
TWO_BLOCKS = np.array(
    [
        [[0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5]],
        [[0.2, 0.6, 0.2], [0.4, 0.4, 0.2], [0.0, 0.0, 1.0]],
    ]
)[:, None, None]


def test_rollout_by_hand():
    """A'_1 = [[.75, .125, .125], [0, 1, 0], [.25, 0, .75]], the first row of A'_2 = [.6, .3, .1].

    .6 [.75, .125, .125] + .3 [0, 1, 0] + .1 [.25, 0, .75] = [.475, .375, .15].
    """
    rollout = explain.attention_rollout(TWO_BLOCKS, PatchGrid(1, 2, (4, 4)))
    np.testing.assert_allclose(rollout, [[[0.375, 0.15]]])


def test_rollout_without_class_token_by_hand():
    """The mean of the rows [.2, .7, .1] and [0, 0, 1] of A'_2, times A'_1 as above.

    .1 [.75, .125, .125] + .35 [0, 1, 0] + .55 [.25, 0, .75] = [.2125, .3625, .425].
    """
    grid = PatchGrid(1, 2, (4, 4), 1, class_token=False)
    np.testing.assert_allclose(explain.attention_rollout(TWO_BLOCKS, grid), [[[0.3625, 0.425]]])


def test_rollout_discards_the_lowest_by_hand():
    """int(.6 * 9) = 5 entries count as 0: .25, .25 and three 0 of A_1, .2, .2, .2 and two 0 of A_2.

    A'_1 = [[1, 0, 0], [0, 1, 0], [.25, 0, .75]], the first row of A'_2 is [.5, .3, 0] / .8.
    """
    grid = PatchGrid(1, 2, (4, 4))
    rollout = explain.attention_rollout(TWO_BLOCKS, grid, discard_ratio=0.6)
    np.testing.assert_allclose(rollout, [[[0.375, 0]]], atol=1e-12)


@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
def test_rollout_is_the_product_of_matrices(fusion):
    """Against the whole product, of distinct sizes: 4 blocks, 2 images, 3 heads, 2 + 3 x 5."""
    maps = np.random.default_rng(0).dirichlet(np.full(17, 0.3), (4, 2, 3, 17))
    grid = PatchGrid(3, 5, (4, 4), 2)
    found = explain.attention_rollout(maps, grid, head_fusion=fusion)
    for b in range(2):
        product = np.eye(17)
        for layer in maps:
            a = {"mean": sum(layer[b]) / 3, "max": layer[b].max(0), "min": layer[b].min(0)}[fusion]
            a = (a + np.eye(17)) / 2
            product = np.diag(1 / a.sum(1)) @ a @ product
        np.testing.assert_allclose(found[b], product[0, 2:].reshape(3, 5))
        np.testing.assert_allclose(product.sum(1), 1)


def test_class_attention():
    maps = np.random.default_rng(0).dirichlet(np.full(18, 0.3), (4, 2, 3, 18))
    grid = PatchGrid(3, 5, (4, 4), 3)
    expected = maps[1, :, :, 0, 3:].reshape(2, 3, 3, 5)
    np.testing.assert_allclose(explain.class_attention(maps, grid, layer=1), expected)
    expected = maps[3, :, :, 3:, 3:].mean(axis=2).reshape(2, 3, 3, 5)
    grid = PatchGrid(3, 5, (4, 4), 3, class_token=False)
    np.testing.assert_allclose(explain.class_attention(maps, grid), expected)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_distances_equal_a_loop(prefix):
    rows, columns, height, width = 2, 3, 4.0, 6.0
    tokens = prefix + rows * columns
    maps = np.random.default_rng(0).dirichlet(np.full(tokens, 0.3), (4, 2, 3, tokens))
    found = explain.mean_attention_distance(maps, PatchGrid(rows, columns, (height, width), prefix))
    assert found.shape == (4, 3)
    for layer in range(4):
        for head in range(3):
            means = []
            for b in range(2):
                for i in range(rows * columns):
                    a = maps[layer, b, head, prefix + i]
                    total = distance = 0.0
                    for j in range(rows * columns):
                        dy = (i // columns - j // columns) * height
                        dx = (i % columns - j % columns) * width
                        distance += a[prefix + j] * (dy**2 + dx**2) ** 0.5
                        total += a[prefix + j]
                    means.append(distance / total)
            assert found[layer, head] == pytest.approx(np.mean(means))


def test_distances_of_what_looks_at_registers_alone():
    maps = np.zeros((1, 1, 1, 3, 3), "float32")
    maps[..., 0] = 1
    grid = PatchGrid(1, 2, (4, 4))
    np.testing.assert_array_equal(explain.mean_attention_distance(maps, grid), [[0]])


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"distillation_token": True, "num_registers": 2},
        {"class_token": False, "pooling": "gap", "num_registers": 2},
        {"position": "sincos2d"},
    ],
    ids=name,
)
def test_position_similarity(arguments):
    model = make(**arguments)
    if "position" in arguments:
        table = sincos2d(3, 5, 48)
    else:
        table = keras.ops.convert_to_numpy(model.get_layer("patch_encoder").position_embedding)[0]
        table = table[-15:].astype("float64")
    found = explain.position_similarity(model)
    assert found.shape == (3, 5, 3, 5)
    for i, u in enumerate(table):
        for j, v in enumerate(table):
            cosine = sum(u * v) / (sum(u * u) * sum(v * v)) ** 0.5
            assert found[i // 5, i % 5, j // 5, j % 5] == pytest.approx(cosine, abs=1e-9)


def test_positions_of_zeros_are_similar_to_nothing():
    model = make()
    model.get_layer("patch_encoder").position_embedding.assign(np.zeros((1, 16, 48)))
    np.testing.assert_array_equal(explain.position_similarity(model), np.zeros((3, 5, 3, 5)))


def test_patch_filters_are_the_eigenvectors_of_the_covariance():
    model = make(channels=2)
    kernel = keras.ops.convert_to_numpy(model.get_layer("patch_encoder").projection.kernel)
    filters = explain.patch_filters(model, count=5)
    assert filters.shape == (5, 4, 4, 2)
    _, vectors = np.linalg.eigh(np.cov(kernel.astype("float64")))  # of 32 values, in 48 filters
    for found, expected in zip(filters.reshape(5, 32), vectors.T[::-1], strict=False):
        assert abs(found @ expected) == pytest.approx(1)
        assert found[abs(found).argmax()] > 0


def test_patch_filters_with_lora():
    model, merged = make(), make()
    projection = model.get_layer("patch_encoder").projection
    projection.enable_lora(3)
    projection.lora_kernel_b.assign(normal(*projection.lora_kernel_b.shape))
    merged.get_layer("patch_encoder").projection.kernel.assign(projection.kernel)
    expected = explain.patch_filters(merged, 4)
    np.testing.assert_allclose(explain.patch_filters(model, 4), expected, atol=1e-5)


def test_patch_filters_of_known_patterns():
    """Filters that are multiples of two patterns: those are found, the stronger first."""
    model = make()
    first, second = np.linalg.qr(normal(48, 2))[0].T
    weights = normal(2, 48) * [[3], [1]]
    weights -= weights.mean(axis=1, keepdims=True)
    weights[1] -= weights[0] * (weights[0] @ weights[1]) / (weights[0] @ weights[0])
    kernel = np.outer(first, weights[0]) + np.outer(second, weights[1])
    model.get_layer("patch_encoder").projection.kernel.assign(kernel)
    filters = explain.patch_filters(model, 2)
    for found, pattern in zip(filters, (first, second), strict=True):
        pattern = pattern * np.sign(pattern[abs(pattern).argmax()])
        np.testing.assert_allclose(found, pattern.reshape(4, 4, 3), atol=1e-5)


MAPS = np.full((2, 1, 3, 16, 16), 1 / 16)
GRID = PatchGrid(3, 5, (4, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head_fusion": "sum"}, r"`head_fusion` must be one of 'mean', 'max', 'min'.*'sum'"),
        ({"discard_ratio": 1}, r"`discard_ratio` must be in \[0, 1\).*discard_ratio=1"),
        ({"discard_ratio": -0.1}, r"`discard_ratio` must be in \[0, 1\).*discard_ratio=-0.1"),
        ({"grid": PatchGrid(3, 4, (4, 4))}, r"heads, 13, 13\).*the shape \(2, 1, 3, 16, 16\)"),
        ({"maps": MAPS[0]}, r"`maps` must be those of `attention_maps`.*\(1, 3, 16, 16\)"),
    ],
)
def test_errors_of_rollout(arguments, message):
    with pytest.raises(ValueError, match=message):
        explain.attention_rollout(**{"maps": MAPS, "grid": GRID, **arguments})


def test_errors_of_class_attention_and_distance():
    with pytest.raises(ValueError, match=r"`layer` must be .* of one of 2 blocks.*layer=2"):
        explain.class_attention(MAPS, GRID, layer=2)
    with pytest.raises(ValueError, match=r"`maps` must be those of `attention_maps`"):
        explain.mean_attention_distance(MAPS[..., 1:], GRID)


READERS = [
    explain.patch_grid,
    explain.position_similarity,
    explain.patch_filters,
    lambda model: explain.attention_maps(model, np.zeros((1, 4))),
    lambda model: explain.features(model, np.zeros((1, 4))),
]


@pytest.mark.parametrize("read", READERS)
def test_errors_of_models_without_a_vit(read):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="only")])
    message = r"`keras_vit.build_vit` made, or have one.*there are 0, with the layers only"
    with pytest.raises(ValueError, match=message):
        read(model)
    with pytest.raises(ValueError, match=r"must be a keras.Model. Received: model='B/16'"):
        read("B/16")


def test_errors_of_several_vits_or_calls():
    images = keras.Input((*IMAGE_SIZE, 3))
    first, second = make(name="first"), make(name="second")
    both = keras.Model(images, first(images) + second(images))
    with pytest.raises(ValueError, match=r"in which there are 2, with .*first, second"):
        explain.patch_grid(both)
    twice = keras.Model(images, first(images) + first(images[:, ::-1]))
    with pytest.raises(ValueError, match=r"each of the ViT's 3 blocks once. .* calls 6: block_0"):
        explain.attention_maps(twice, normal(1, *IMAGE_SIZE, 3))


@pytest.mark.parametrize("shape", [(12, 20, 3), (2, 20, 12, 3), (2, 12, 20, 1), (0, 12, 20, 3)])
def test_errors_of_images(shape):
    message = rf"the shape \(B, 12, 20, 3\), B at least 1.*{re.escape(str(shape))}"
    with pytest.raises(ValueError, match=message):
        explain.attention_maps(make(), np.zeros(shape))
    with pytest.raises(ValueError, match=message):
        explain.features(make(), np.zeros(shape))


@pytest.mark.parametrize("layer", [3, -4, "pooling", "block_7", 1.5])
def test_errors_of_layers(layer):
    message = rf"of the 3 blocks, or names: patch_encoder, block_0, .*{re.escape(repr(layer))}"
    with pytest.raises(ValueError, match=message):
        explain.features(make(), normal(1, *IMAGE_SIZE, 3), layers=[layer])


def test_no_token_norm_where_it_comes_after_the_pooling():
    with pytest.raises(ValueError, match=r"block_1, block_2\. Received: 'encoder_norm'"):
        explain.features(
            make(norm_after_pooling=True), normal(1, *IMAGE_SIZE, 3), layers="encoder_norm"
        )


def test_errors_of_counts():
    with pytest.raises(ValueError, match=r"`count` must be at most 48, for 48 filters.*count=49"):
        explain.patch_filters(make(), count=49)
    with pytest.raises(ValueError, match=r"`count` must be a positive int.*count=0"):
        explain.patch_filters(make(), count=0)
    with pytest.raises(ValueError, match=r"filters of a hybrid are those of its stem.*'vit'"):
        explain.patch_filters(make(HYBRID, image_size=(24, 40)))
    quantized = make()
    quantized.get_layer("patch_encoder").projection.quantize("int8")
    with pytest.raises(ValueError, match=r"a model that is not quantized.*'vit', int8"):
        explain.patch_filters(quantized)
    with pytest.raises(ValueError, match=r"`batch_size` must be a positive int.*batch_size=0"):
        explain.attention_maps(make(), normal(1, *IMAGE_SIZE, 3), batch_size=0)


# What is drawn


def png(figure):
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=40)
    return data.getvalue()


def test_plot_attention():
    """The map is over the picture, to its corners, and its peak is where it is brightest."""
    pytest.importorskip("matplotlib")
    heat = np.zeros((1, 3, 5))
    heat[0, 2, 4] = 1  # bottom right
    picture = np.full((60, 100, 3), 255, "uint8")
    figure = explain.plot_attention([picture], {"a": heat, "b": heat[:, ::-1]}, captions=["x"])
    left, a, b = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["x", "a", "b"]
    np.testing.assert_array_equal(left.get_images()[0].get_array(), np.ones((60, 100, 3)))
    under, over = a.get_images()
    assert under.get_extent() == over.get_extent() == [-0.5, 99.5, 59.5, -0.5]
    drawn = over.get_array()
    assert np.unravel_index(drawn.argmax(), drawn.shape) == (2, 4)
    drawn = b.get_images()[1].get_array()
    assert np.unravel_index(drawn.argmax(), drawn.shape) == (0, 4)
    assert png(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (np.array([0, 51, 255], "uint8"), [0, 0.2, 1]),
        (np.array([0.0, 51, 255]), [0, 0.2, 1]),
        (np.array([0.0, 0.2, 0.9]), [0, 0.2, 0.9]),
        (np.array([0, 1, 1], "uint8"), [0, 1 / 255, 1 / 255]),
        (np.array([-1.0, 0, 3]), [0, 0.25, 1]),
    ],
)
def test_pictures_of_any_range(image, expected):
    pytest.importorskip("matplotlib")
    figure = explain.plot_attention([image.reshape(1, 3, 1)], np.ones((1, 2, 2)))
    drawn = figure.axes[0].get_images()[0].get_array()
    np.testing.assert_allclose(drawn, np.repeat(expected, 3).reshape(1, 3, 3))


def test_plot_attention_distance():
    pytest.importorskip("matplotlib")
    distances = np.arange(8.0).reshape(4, 2)
    dots, means = explain.plot_attention_distance(distances).axes[0].get_lines()
    np.testing.assert_array_equal(dots.get_xdata(), [1, 1, 2, 2, 3, 3, 4, 4])
    np.testing.assert_array_equal(dots.get_ydata(), np.arange(8))
    np.testing.assert_array_equal(means.get_ydata(), [0.5, 2.5, 4.5, 6.5])


def test_plot_position_similarity():
    """3 x 8 of 3 x 11 tiles, each with the map of its patch; the axes name the patches."""
    pytest.importorskip("matplotlib")
    similarity = np.random.default_rng(0).uniform(-1, 1, (3, 11, 3, 11))
    figure = explain.plot_position_similarity(similarity)
    axes = figure.axes[0]
    tiles = np.ma.filled(axes.get_images()[0].get_array(), np.nan)
    shown = [int(label.get_text()) - 1 for label in axes.get_xticklabels()]
    assert shown == [0, 1, 3, 4, 6, 7, 9, 10]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "2", "3"]
    assert tiles.shape == (3 * 3 + 2, 8 * 11 + 7)
    np.testing.assert_array_equal(tiles[4:7, 3 * 12 : 3 * 12 + 11], similarity[1, shown[3]])
    assert np.isnan(tiles[3]).all()
    assert png(figure).startswith(b"\x89PNG")


def test_plot_patch_filters():
    """0 is middle gray, the strongest entry white or black, empty places white."""
    pytest.importorskip("matplotlib")
    filters = np.zeros((9, 4, 4, 3))
    filters[:, 1, 2] = -0.1
    filters[8, 1, 2] = 0.3
    tiles = explain.plot_patch_filters(filters).axes[0].get_images()[0].get_array()
    assert tiles.shape == (4 + 1 + 4, 7 * 4 + 6, 3)
    np.testing.assert_array_equal(tiles[0, 0], [0.5] * 3)
    np.testing.assert_array_equal(tiles[1, 2], [0] * 3)
    np.testing.assert_array_equal(tiles[5 + 1, 5 + 2], [1] * 3)
    np.testing.assert_array_equal(tiles[5:, 10:], np.ones((4, 24, 3)))


@pytest.mark.parametrize(
    ("plot", "message"),
    [
        (lambda: explain.plot_attention([], MAPS[0, :, 0]), r"0 pictures, 0 captions, 1 of 'at"),
        (
            lambda: explain.plot_attention(np.zeros((1, 9, 9, 3)), {"a": np.zeros((2, 3, 5))}),
            r"one map and one caption for each.*1 pictures, 1 captions, 2 of 'a'",
        ),
        (
            lambda: explain.plot_attention(np.zeros((1, 9, 9, 2)), np.zeros((1, 3, 5))),
            r"A picture must be \(H, W, C\), C = 1 or 3.*\(9, 9, 2\)",
        ),
        (lambda: explain.plot_attention_distance(np.zeros(3)), r"\(L, heads\).*\(3,\)"),
        (
            lambda: explain.plot_position_similarity(np.zeros((2, 3, 3, 2))),
            r"`similarity` must be \(rows, columns, rows, columns\).*\(2, 3, 3, 2\)",
        ),
        (
            lambda: explain.plot_patch_filters(np.zeros((2, 4, 4, 2))),
            r"`filters` must be \(count, P, P, C\), C = 1 or 3.*\(2, 4, 4, 2\)",
        ),
    ],
)
def test_errors_of_plots(plot, message):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=message):
        plot()
