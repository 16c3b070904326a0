"""Checkpoints of every family against the outputs of its own code, and back."""

import collections
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import warnings
import zipfile

import keras
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from conftest import randomise

import keras_vit
from keras_vit.model import vit_arguments
from keras_vit.weights import google
from keras_vit.weights.description import normalization_of

DATA = pathlib.Path(__file__).parent.parent / "data" / "checkpoints"
NAMES = sorted(folder.name for folder in DATA.iterdir() if folder.is_dir())
PRETRAINED = pathlib.Path(
    os.environ.get("KERAS_VIT_PRETRAINED")
    or pathlib.Path(__file__).parents[3] / "shared" / "pretrained"
)


def weights_file(name):
    (path,) = DATA.joinpath(name).glob("weights.*")
    return path


@functools.cache
def meta(name):
    return json.loads((DATA / name / "meta.json").read_text())


@functools.cache
def outputs(name):
    with np.load(DATA / name / "io.npz") as file:
        return dict(file)


@functools.cache
def tensors(name):
    path = weights_file(name)
    if path.suffix == ".npz":
        with np.load(path) as file:
            return dict(file)
    return safetensors.numpy.load_file(path)


def num_heads(name):
    facts = meta(name)
    if "num_attention_heads" in facts.get("config", {}):
        return facts["config"]["num_attention_heads"]
    return 3


def load(name, path=None, **arguments):
    size = outputs(name)["images"].shape[1:3]
    arguments = {"num_heads": num_heads(name), "image_size": size, **arguments}
    return keras_vit.from_checkpoint(path or weights_file(name), normalization=None, **arguments)


def assert_same(found, expected, tolerance=1e-5):
    """Equal to 1e-5 of the largest value."""
    assert found.shape == expected.shape
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error < tolerance


def predict(model, images):
    """As NumPy arrays, the faster way: TensorFlow traces for longer than JAX compiles."""
    if keras.backend.backend() == "jax":
        return model.predict(images, verbose=0)
    return keras.tree.map_structure(keras.ops.convert_to_numpy, model(images))


def tokens_of(model):
    """The tokens after the last norm, or after the last block if the norm follows the pooling."""
    layers = {layer.name: layer for layer in model.layers}
    blocks = [name for name in layers if name.startswith("block_")]
    last = "encoder_norm" if "encoder_norm" in layers else blocks[-1]
    return keras.Model(model.input, layers[last].output)


def write_npz(path, arrays):
    np.savez(path, **arrays)
    return path


def write_safetensors(path, arrays, **metadata):
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(array) for name, array in arrays.items()}, path, metadata
    )
    return path


# Every family


@pytest.mark.parametrize("name", NAMES)
def test_outputs(name):
    """Logits, and where they are given the tokens after and before the last norm."""
    model = load(name)
    # Where the norm follows the pooling, there is none before: both are the last block's.
    layers = {layer.name: layer for layer in model.layers}
    last = layers["block_2"].output
    outputs_of = {
        "logits": model.output,
        "tokens": layers["encoder_norm"].output if "encoder_norm" in layers else last,
        "last_hidden_before_norm": last,
    }
    expected = {key: value for key, value in outputs(name).items() if key != "images"}
    model = keras.Model(model.input, {key: outputs_of[key] for key in expected})
    found = predict(model, outputs(name)["images"])
    for key in expected:
        assert_same(found[key], expected[key])


@pytest.mark.parametrize("name", NAMES)
def test_load_weights_into_a_built_model(name):
    """The same as from_checkpoint, bit for bit, and every weight is replaced."""
    expected = load(name)
    model = randomise(keras_vit.build_vit(**vit_arguments(expected)))
    keras_vit.load_weights(model, weights_file(name))
    for weight, other in zip(model.weights, expected.weights, strict=True):
        if "seed_generator" not in weight.path:
            np.testing.assert_array_equal(
                keras.ops.convert_to_numpy(weight), keras.ops.convert_to_numpy(other), weight.path
            )


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("google_vit_prelogits", 24),
        ("bigvision_map", 24),
        ("timm_avg_fcnorm", 24),
        ("hf_dinov2_registers", 48),
        ("lucidrains_vit_mean", 24),
    ],
)
def test_features_and_a_new_head(name, width):
    """Without a head, what the file's head (and pre_logits) takes; a new head is of zeros."""
    features = load(name, num_classes=0)
    assert features.output_shape == (None, width)
    original = load(name)
    layers = {layer.name: layer for layer in original.layers}
    inputs = layers["pre_logits" if "pre_logits" in layers else "head"].input
    images = outputs(name)["images"]
    expected = predict(keras.Model(original.input, inputs), images)
    np.testing.assert_array_equal(predict(features, images), expected)
    model = load(name, num_classes=5)
    assert "pre_logits" not in {layer.name for layer in model.layers}
    np.testing.assert_array_equal(predict(model, images), np.zeros((2, 5)))


def test_features_of_a_distilled_model():
    """The mean of both tokens, as timm gives them."""
    features = load("timm_deit_distilled", num_classes=0)
    images, tokens = (outputs("timm_deit_distilled")[key] for key in ("images", "tokens"))
    assert_same(predict(features, images), tokens[:, :2].mean(axis=1))


def test_pre_logits_may_stay_without_the_head():
    features = load("google_vit_prelogits", num_classes=0, representation_size=24)
    original = load("google_vit_prelogits")
    images = outputs("google_vit_prelogits")["images"]
    expected = keras.Model(original.input, original.get_layer("pre_logits").output)
    np.testing.assert_array_equal(predict(features, images), predict(expected, images))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("google_vit_token", {"pooling": "token", "gelu": "tanh", "layer_norm_epsilon": 1e-6}),
        ("google_vit_gap", {"pooling": "gap", "class_token": False}),
        ("google_vit_prelogits", {"representation_size": 24}),
        ("google_vit_hybrid", {"image_size": (64, 64)}),
        ("bigvision_gap_sincos", {"position": "sincos2d", "representation_size": 24}),
        ("bigvision_map", {"pooling": "map", "class_token": False}),
        ("bigvision_tok", {"pooling": "token", "class_token": True}),
        ("timm_token", {"pooling": "token", "gelu": "erf", "layer_norm_epsilon": 1e-6}),
        ("timm_avg_fcnorm", {"pooling": "gap", "norm_after_pooling": True, "class_token": True}),
        ("timm_deit_distilled", {"distillation_token": True}),
        ("timm_qknorm", {"qk_norm": True}),
        ("timm_reg4_gap_ls", {"num_registers": 4, "class_token": False}),
        ("hf_vit", {"layer_norm_epsilon": 1e-12, "gelu": "erf"}),
        ("hf_deit_distilled", {"distillation_token": True, "layer_norm_epsilon": 1e-12}),
        ("hf_dinov2", {"pooling": "token+gap", "layer_norm_epsilon": 1e-6}),
        ("hf_dinov2_registers", {"num_registers": 4}),
        ("lucidrains_vit_cls", {"patch_norm": True, "qkv_bias": False}),
        ("lucidrains_vit_mean", {"pooling": "mean", "class_token": False}),
    ],
)
def test_recognised_architecture(name, expected):
    """What the file says, without a hint of its size but the number of heads."""
    found = vit_arguments(load(name, image_size=None if "sincos" not in name else 32))
    assert {key: found[key] for key in expected} == expected
    sizes = (3, 48 if "lucidrains" in name else 96, 3, 7, 3)
    config = found["variant"]
    assert sizes == (
        config.depth,
        config.mlp_dim,
        config.num_heads,
        found["num_classes"],
        found["channels"],
    )
    assert config.patch_size == (1 if "hybrid" in name else 8)


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("google_vit_token", 1 / 127.5),
        ("bigvision_map", 1 / 127.5),
        ("timm_token", 1 / 127.5),
        ("timm_deit_distilled", 1 / (255 * 0.229)),
        ("hf_vit", 1 / 127.5),
        ("hf_dinov2", 1 / (255 * 0.229)),
        ("lucidrains_vit_cls", None),
    ],
)
@pytest.mark.filterwarnings("ignore:.*does not say its")
def test_normalisation_of_the_family(name, scale):
    model = keras_vit.from_checkpoint(weights_file(name), num_heads=3)
    layers = {layer.name: layer for layer in model.layers}
    found = np.ravel(layers["normalization"].scale)[0] if "normalization" in layers else None
    assert found == pytest.approx(scale)


def test_what_is_assumed_is_said():
    path = weights_file("timm_token")
    with pytest.warns(UserWarning, match=r"does not say its normalization.*'minus_one_one'"):
        keras_vit.from_checkpoint(path, num_heads=3)
    with pytest.warns(UserWarning, match=r"does not say its num_heads: took num_heads=3"):
        keras_vit.from_checkpoint(weights_file("lucidrains_vit_cls"))
    with pytest.warns(UserWarning, match=r"does not say its normalization.*'imagenet'"):
        keras_vit.from_checkpoint(weights_file("hf_dinov2"), num_heads=3)
    with pytest.warns(UserWarning, match=r"does not say its image_size: took image_size=224"):
        keras_vit.from_checkpoint(weights_file("bigvision_gap_sincos"))
    with pytest.warns(UserWarning, match=r"its normalization and gelu: took .*gelu='erf'"):
        keras_vit.from_checkpoint(weights_file("timm_map"), num_heads=3)
    with pytest.warns(UserWarning, match=r"does not say its gelu: took gelu='erf'"):
        load("timm_reg4_gap_ls")  # without a class token, as SigLIP's without attention pooling
    with pytest.warns(UserWarning, match=r"layer_norm_epsilon: took layer_norm_epsilon=1e-12"):
        load("hf_vit")


@pytest.mark.parametrize(
    ("name", "other"), [("timm_map", {"gelu": "tanh"}), ("hf_vit", {"layer_norm_epsilon": 1e-6})]
)
@pytest.mark.filterwarnings("ignore:.*does not say its")
def test_what_is_assumed_does_not_differ(name, other):
    """A model that has it otherwise may be right: the file does not say that it is not."""
    arguments = vit_arguments(load(name)) | other | {"normalization": "imagenet"}
    model = keras_vit.build_vit(**arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keras_vit.load_weights(model, weights_file(name))


@pytest.mark.parametrize("name", ["timm_token", "hf_vit", "lucidrains_vit_headdim"])
def test_unknown_head_count_is_asked_for(name):
    with pytest.raises(ValueError, match=r"weights.safetensors: .*heads.*pass `num_heads`"):
        keras_vit.from_checkpoint(weights_file(name))


def test_non_square_positions_ask_for_the_image_size():
    path = weights_file("timm_nonsquare_ls")
    with pytest.raises(ValueError, match=r"19 positions are of no square grid.*image_size=None"):
        keras_vit.from_checkpoint(path, num_heads=3)
    with pytest.raises(ValueError, match=r"no square grid.*image_size=\(24, 24\)"):
        keras_vit.from_checkpoint(path, num_heads=3, image_size=(24, 24))


def without_facts(path, to):
    """A file of `save_checkpoint` as other code writes it: with nothing but its tensors."""
    if path.suffix == ".npz":
        with np.load(path) as file:
            np.savez(to, **file)
    else:
        safetensors.numpy.save_file(safetensors.numpy.load_file(path), to)
    return to


def test_grid_beside_a_class_position_that_makes_a_square(tmp_path):
    """3 x 5 patches and a class token have 16 positions, as 4 x 4 patches without one."""
    size = {"image_size": (12, 20)}
    model = randomise(keras_vit.build_vit(CONFIG, num_classes=7, gelu="tanh", **size))
    images = np.random.default_rng(0).normal(size=(2, 12, 20, 3)).astype("float32")
    keras_vit.save_checkpoint(model, tmp_path / "vit.npz", "google")
    path = without_facts(tmp_path / "vit.npz", tmp_path / "bare.npz")
    # vision_transformer's name of the table says that the class token is in it.
    again = keras_vit.from_checkpoint(path, normalization=None, **size)
    np.testing.assert_array_equal(predict(again, images), predict(model, images))
    with pytest.raises(ValueError, match=r"16 positions are of no square grid"):
        keras_vit.from_checkpoint(path)
    # timm's says nothing.
    keras_vit.save_checkpoint(model, tmp_path / "vit.safetensors", "timm")
    path = without_facts(tmp_path / "vit.safetensors", tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match=r"may be of 4 x 4 patches, or of 3 x 5 patches and other"):
        keras_vit.from_checkpoint(path, num_heads=3, **size)
    (tmp_path / "config.json").write_text('{"pretrained_cfg": {"input_size": [3, 12, 20]}}')
    facts = {"num_heads": 3, "gelu": "tanh", "normalization": None}
    again = keras_vit.from_checkpoint(path, **facts, **size)
    np.testing.assert_array_equal(predict(again, images), predict(model, images))


@pytest.mark.parametrize("name", ["lucidrains_vit_cls", "timm_token", "hf_vit"])
def test_grid_of_as_many_patches_as_a_square(name, tmp_path):
    """2 x 8 patches are 16, as 4 x 4: the file is of the one or to be resized to the other."""
    path, wide = weights_file(name), {"image_size": (16, 64)}
    model = keras_vit.build_vit(**vit_arguments(load(name, image_size=32)) | wide)
    match = r"17 positions may be of 4 x 4 patches, or of 2 x 8 patches\. If.*\(16, 64\)"
    with pytest.raises(ValueError, match=match):
        load(name, **wide)
    with pytest.raises(ValueError, match=match):
        keras_vit.load_weights(model, path)
    table = positions_of(load(name, image_size=32))
    # The first: as the message says.
    resized = positions_of(keras_vit.resize_model(load(name, image_size=None), (16, 64)))
    assert np.abs(resized - table).max() > 1e-2
    # The other.
    folder = folder_with(tmp_path, name, config={"image_size": [16, 64]})
    np.testing.assert_array_equal(positions_of(load(name, folder, **wide)), table)
    keras_vit.load_weights(model, folder)
    np.testing.assert_array_equal(positions_of(model), table)


def test_null_in_a_configuration_says_nothing(tmp_path):
    shutil.copy(weights_file("timm_token"), tmp_path / "model.safetensors")
    facts = {"architecture": None, "model_args": {"act_layer": None}, "layer_norm_eps": None}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.warns(UserWarning, match="does not say its normalization"):
        found = vit_arguments(keras_vit.from_checkpoint(tmp_path, num_heads=3))
    assert (found["gelu"], found["layer_norm_epsilon"]) == ("erf", 1e-6)


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_channels_of_lucidrains(channels, tmp_path):
    """A patch of 16 C values, for C = 4 a square as of one channel, is C channels of 4 x 4."""
    name, rng = "lucidrains_vit_cls", np.random.default_rng(0)
    values = {
        "to_patch_embedding.1.weight": rng.normal(size=16 * channels),
        "to_patch_embedding.1.bias": rng.normal(size=16 * channels),
        "to_patch_embedding.2.weight": rng.normal(size=(24, 16 * channels)),
    }
    arrays = tensors(name) | {key: a.astype("float32") for key, a in values.items()}
    path = write_safetensors(tmp_path / "vit.safetensors", arrays)
    model = load(name, path, image_size=None, channels=channels)
    assert model.input_shape == (None, 16, 16, channels)
    kernel = keras.ops.convert_to_numpy(model.get_layer("patch_encoder").projection.kernel)
    np.testing.assert_array_equal(kernel, arrays["to_patch_embedding.2.weight"].T)
    other = randomise(keras_vit.build_vit(**vit_arguments(model)))
    keras_vit.load_weights(other, path)
    images = rng.normal(size=(2, 16, 16, channels)).astype("float32")
    np.testing.assert_array_equal(predict(other, images), predict(model, images))


def test_channels_that_make_no_square_patches():
    path = weights_file("lucidrains_vit_cls")
    match = r"patches of 192 values are no squares of 4 channels: pass .*channels=4"
    with pytest.raises(ValueError, match=match):
        keras_vit.from_checkpoint(path, num_heads=3, channels=4)
    with pytest.raises(ValueError, match=r"`channels` must be a positive int.*channels=0"):
        keras_vit.from_checkpoint(path, num_heads=3, channels=0)


def test_head_count_of_zero():
    with pytest.raises(ValueError, match=r"`num_heads` must be a positive int.*num_heads=0"):
        keras_vit.from_checkpoint(weights_file("lucidrains_vit_headdim"), num_heads=0)


# Other spellings of the same weights: the logits stay.


def google_prefixed(prefix):
    def change(arrays):
        extra = {"opt/state/step": np.ones(1, "float32"), "txt/head/bias": np.ones(3, "float32")}
        return {**{f"{prefix}{name}": a for name, a in arrays.items()}, **extra}

    return change


def google_pre_linen(arrays):
    """The numbers that vision_transformer's published files have."""
    renames = (
        ("LayerNorm_1", "LayerNorm_2"),
        ("MultiHeadDotProductAttention_0", "MultiHeadDotProductAttention_1"),
        ("MlpBlock_0", "MlpBlock_3"),
    )
    for old, new in renames:
        arrays = {name.replace(f"/{old}/", f"/{new}/"): a for name, a in arrays.items()}
    return arrays


def old_big_vision(key):
    """Before 2022, the class token had a position too, the first of the table."""

    def change(arrays):
        place = np.random.default_rng(0).normal(size=(1, 1, 24)).astype("float32")
        table = np.concatenate([place, arrays["pos_embedding"]], axis=1)
        rest = {name: a for name, a in arrays.items() if name != "pos_embedding"}
        return {**rest, "cls": arrays["cls"] - place, key: table}

    return change


def old_group_norm(arrays):
    return {
        name: a.reshape(1, 1, 1, -1) if "/gn" in f"/{name}" else a for name, a in arrays.items()
    }


def old_huggingface(arrays):
    """The names before transformers 5."""
    renames = (
        (".layers.", ".encoder.layer."),
        (".q_proj.", ".attention.query."),
        (".k_proj.", ".attention.key."),
        (".v_proj.", ".attention.value."),
        (".o_proj.", ".output.dense."),
    )
    for old, new in renames:
        arrays = {name.replace(old, new): a for name, a in arrays.items()}
    return arrays


def old_huggingface_mlp(arrays):
    return {
        name.replace(".mlp.fc1.", ".intermediate.dense.").replace(".mlp.fc2.", ".output.dense."): a
        for name, a in old_huggingface(arrays).items()
    }


def without_prefix(arrays):
    extra = {"pooler.dense.weight": np.ones((24, 24), "f4"), "pooler.dense.bias": np.ones(24, "f4")}
    return {**{name.removeprefix("vit."): a for name, a in arrays.items()}, **extra}


def deit_iii(arrays):
    return {
        name.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2"): a
        for name, a in arrays.items()
    }


def dinov2_original(arrays):
    renamed = {name.replace("reg_token", "register_tokens"): a for name, a in arrays.items()}
    return {**renamed, "mask_token": np.ones((1, 24), "float32")}


def positions_of_registers(arrays):
    """timm without `no_embed_class`: registers have positions too."""
    places = np.random.default_rng(0).normal(size=(1, 4, 24)).astype("float32")
    return {
        **arrays,
        "reg_token": arrays["reg_token"] - places,
        "pos_embed": np.concatenate([places, arrays["pos_embed"]], axis=1),
    }


def no_class_position(arrays):
    """timm's `no_embed_class`: the class token has taken its position into itself."""
    table = arrays["pos_embed"]
    return {
        **arrays,
        "cls_token": arrays["cls_token"] + table[:, :1],
        "pos_embed": table[:, 1:],
    }


def old_lucidrains(arrays):
    return {
        **arrays,
        "cls_token": arrays["cls_token"][None],
        "pos_embedding": arrays["pos_embedding"][None],
    }


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("google_vit_token", google_prefixed("opt/target/")),
        ("google_vit_token", google_prefixed("params/")),
        ("bigvision_map", google_prefixed("params/img/")),
        ("google_vit_prelogits", google_pre_linen),
        ("bigvision_tok", old_big_vision("pos_embedding")),
        ("bigvision_tok", old_big_vision("Transformer/pos_embedding")),
        ("google_vit_hybrid", old_group_norm),
        ("hf_vit", old_huggingface_mlp),
        ("hf_vit", without_prefix),
        ("hf_deit_distilled", old_huggingface_mlp),
        ("hf_dinov2", old_huggingface),
        ("timm_nonsquare_ls", deit_iii),
        ("timm_reg4_gap_ls", dinov2_original),
        ("timm_reg4_gap_ls", positions_of_registers),
        ("timm_token", no_class_position),
        ("lucidrains_vit_cls", old_lucidrains),
    ],
)
@pytest.mark.filterwarnings("ignore:.*does not say its pooling")
def test_other_spellings(name, change, tmp_path):
    arrays = change(tensors(name))
    write = write_npz if weights_file(name).suffix == ".npz" else write_safetensors
    path = write(tmp_path / weights_file(name).name, arrays)
    images, logits = outputs(name)["images"], outputs(name)["logits"]
    assert_same(predict(load(name, path), images), logits)


def test_older_lucidrains_does_not_say_its_pooling(tmp_path):
    """Its models that take the mean of all tokens have a class token, too."""
    name = "lucidrains_vit_cls"
    path = write_safetensors(tmp_path / "old.safetensors", old_lucidrains(tensors(name)))
    heads = {"num_heads": vit_arguments(load(name))["variant"].num_heads}
    with pytest.warns(UserWarning, match=r"does not say its pooling: took pooling='token'"):
        keras_vit.from_checkpoint(path, **heads)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keras_vit.from_checkpoint(weights_file(name), **heads)
        model = keras_vit.from_checkpoint(path, pooling="mean", **heads)
        keras_vit.load_weights(model, path)
    assert vit_arguments(model)["pooling"] == "mean"


def test_deit_with_one_head_uses_the_class_token_alone(tmp_path):
    """DeiTForImageClassification: the distillation token is there, and its head is not."""
    name = "hf_deit_distilled"
    arrays = {
        key.replace("cls_classifier", "classifier"): array
        for key, array in tensors(name).items()
        if "distillation_classifier" not in key
    }
    path = write_safetensors(tmp_path / "weights.safetensors", arrays)
    model, both = load(name, path), load(name)
    expected = keras.Model(both.input, both.get_layer("head").output)
    images = outputs(name)["images"]
    assert_same(predict(model, images), predict(expected, images), 1e-6)
    # The positions of the patches are resized in the same way.
    one_head, two_heads = (
        positions_of(load(name, file, image_size=(24, 40))) for file in (path, None)
    )
    patches = two_heads.shape[1] - 2
    np.testing.assert_array_equal(one_head[:, -patches:], two_heads[:, -patches:])


@pytest.mark.parametrize("name", ["bigvision_tok", "google_vit_token"])
def test_bfloat16_in_two_bytes_of_no_type(name, tmp_path):
    """NumPy saves bfloat16 as |V2."""
    arrays = {key: a.astype(ml_dtypes.bfloat16) for key, a in tensors(name).items()}
    path = write_npz(tmp_path / "half.npz", arrays)
    with np.load(path) as file:
        assert file["cls"].dtype.str == "|V2"
    rounded = {key: a.astype("float32") for key, a in arrays.items()}
    expected = load(name, write_npz(tmp_path / "rounded.npz", rounded))
    images = outputs(name)["images"]
    found = predict(load(name, path), images)
    np.testing.assert_array_equal(found, predict(expected, images))
    assert np.abs(found - outputs(name)["logits"]).max() > 1e-4  # it was rounded indeed


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16, "float64"])
def test_dtypes_of_safetensors(dtype, tmp_path):
    name = "timm_token"
    arrays = {key: a.astype(dtype) for key, a in tensors(name).items()}
    model = load(name, write_safetensors(tmp_path / "other.safetensors", arrays))
    kernel = keras.ops.convert_to_numpy(model.get_layer("head").kernel)
    np.testing.assert_array_equal(kernel, arrays["head.weight"].astype("float32").T)


def test_scan_stacks_in_a_model_of_the_same_weights(tmp_path):
    """Stacked blocks are the blocks: unstacked by hand, the file gives the same model."""
    name = "bigvision_scan"
    apart = {}
    for key, array in tensors(name).items():
        if "/encoderblock/" in key:
            for i, part in enumerate(array):
                apart[key.replace("/encoderblock/", f"/encoderblock_{i}/")] = part
        else:
            apart[key] = array
    other = load(name, write_npz(tmp_path / "apart.npz", apart))
    images = outputs(name)["images"]
    np.testing.assert_array_equal(predict(load(name), images), predict(other, images))


def test_scan_stacks_are_read_twice_at_most(monkeypatch):
    """To see that they are finite, and to take them: not for each block anew."""
    reads, slice_reader = collections.Counter(), google._slice_reader

    def counted(tensor, i, last):
        def read():
            reads[tensor.name] += 1
            return tensor.read()

        return slice_reader(dataclasses.replace(tensor, read=read), i, last)

    monkeypatch.setattr(google, "_slice_reader", counted)
    depth = vit_arguments(load("bigvision_scan"))["variant"].depth
    assert depth > 1
    assert len(reads) == 16
    assert max(reads.values()) == 2


# What stands beside the file


def folder_with(tmp_path, name, **files):
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(weights_file(name), folder / f"model{weights_file(name).suffix}")
    for file, content in files.items():
        (folder / f"{file}.json").write_text(json.dumps(content))
    return folder


def test_config_of_huggingface(tmp_path):
    config = {
        "model_type": "vit",
        "num_attention_heads": 6,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu_pytorch_tanh",
        "image_size": 32,
    }
    preprocessor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    folder = folder_with(tmp_path, "hf_vit", config=config, preprocessor_config=preprocessor)
    found = vit_arguments(keras_vit.from_checkpoint(folder))
    assert found["variant"].num_heads == 6
    assert found["layer_norm_epsilon"] == 1e-5
    assert found["gelu"] == "tanh"
    assert found["normalization"] == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


def test_config_of_huggingface_without_normalization(tmp_path):
    """Its mean and standard deviation stand there and are not used."""
    preprocessor = {"do_normalize": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    folder = folder_with(tmp_path, "hf_vit", preprocessor_config=preprocessor)
    model = keras_vit.from_checkpoint(folder, num_heads=3)
    assert vit_arguments(model)["normalization"] == ([0.0], [1.0])
    pixels = np.array([0.0, 51.0, 255.0], "float32").reshape(1, 1, 1, 3)
    scaled = keras.ops.convert_to_numpy(model.get_layer("normalization")(pixels))
    np.testing.assert_allclose(scaled.ravel(), [0, 0.2, 1], rtol=1e-6)


@pytest.mark.parametrize("do_normalize", [True, False])
@pytest.mark.parametrize("factor", [0.00392156862745098, 0.00392157, 1 / 127.5])
def test_rescale_factor_of_huggingface(factor, do_normalize, tmp_path):
    """The pixels are multiplied by it before they are normalised."""
    mean, std = np.array([0.1, 0.2, 0.3]), np.array([0.4, 0.45, 0.5])
    facts = {"image_mean": list(mean), "image_std": list(std), "do_normalize": do_normalize}
    facts |= {"rescale_factor": factor, "do_rescale": True}
    config = {"layer_norm_eps": 1e-12}
    folder = folder_with(tmp_path, "hf_vit", config=config, preprocessor_config=facts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = keras_vit.from_checkpoint(folder, num_heads=3)
    pixels = np.array([3.0, 51.0, 255.0], "float32")
    scaled = model.get_layer("normalization")(pixels.reshape(1, 1, 1, 3))
    expected = (pixels * factor - mean) / std if do_normalize else pixels * factor
    np.testing.assert_allclose(np.ravel(scaled), expected, rtol=1e-5, atol=1e-6)


def test_pixels_of_huggingface_that_are_not_rescaled(tmp_path):
    """Their range is not known: [0, 1] for the mean and deviation that stand there."""
    facts = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_rescale": False}
    config = {"layer_norm_eps": 1e-12}
    folder = folder_with(tmp_path, "hf_vit", config=config, preprocessor_config=facts)
    with pytest.warns(UserWarning, match=r"does not say its normalization: took .*minus_one_one"):
        model = keras_vit.from_checkpoint(folder, num_heads=3)
    assert vit_arguments(model)["normalization"] == ([0.5], [0.5])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keras_vit.from_checkpoint(folder, num_heads=3, normalization="imagenet")


@pytest.mark.parametrize(
    ("name", "config", "match"),
    [
        ("timm_token", {"architecture": "vit_base_patch16_rpn_224"}, r"norm after each branch"),
        ("timm_token", {"architecture": "vit_small_patch16_rope_ape_224"}, r"rotary positions"),
        ("timm_token", {"global_pool": "avgmax"}, r"`global_pool` must be .*'avgmax'"),
        ("timm_token", {"model_args": {"act_layer": "silu"}}, r"`act_layer` must be .*'silu'"),
        ("timm_token", {"model_args": {"num_heads": 6}}, r"has 6 heads. Received: num_heads=3"),
        ("hf_vit", {"num_attention_heads": 6}, r"has 6 heads. Received: num_heads=3"),
    ],
)
def test_config_of_a_model_that_is_not_ours(name, config, match, tmp_path):
    folder = folder_with(tmp_path, name, config=config)
    with pytest.raises(ValueError, match=rf"model.safetensors: .*{match}"):
        keras_vit.from_checkpoint(folder, num_heads=3)


@pytest.mark.parametrize(
    ("config", "gelu"),
    [
        ({"architecture": "vit_so400m_patch16_siglip_256"}, "tanh"),
        ({"model_args": {"act_layer": "gelu_tanh"}}, "tanh"),
        ({"architecture": "vit_base_patch16_siglip_256"}, "erf"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*does not say its")
def test_gelu_of_timms_architectures(config, gelu, tmp_path):
    folder = folder_with(tmp_path, "timm_map", config=config)
    assert vit_arguments(keras_vit.from_checkpoint(folder, num_heads=3))["gelu"] == gelu


def test_gated_mlps_of_timm(tmp_path):
    """Their first layer has the gates too: twice the outputs that the second one takes."""
    arrays = {
        key: a[:, :48] if "fc2.weight" in key else a for key, a in tensors("timm_token").items()
    }
    path = write_safetensors(tmp_path / "gated.safetensors", arrays)
    with pytest.raises(ValueError, match=r"gated.*SwiGLU.*Received: fc1 of 96 outputs"):
        load("timm_token", path)


def test_attention_pooling_of_timm_leaves_prefix_tokens_out(tmp_path):
    """So a file with both is refused, unless its config.json says that they are pooled too."""
    arrays = dict(tensors("timm_map"))
    arrays["cls_token"] = np.ones((1, 1, 24), "float32")
    path = write_safetensors(tmp_path / "model.safetensors", arrays)
    with pytest.raises(ValueError, match=r"leaves out the tokens .*Received: cls_token"):
        load("timm_map", path)
    config = {"model_args": {"pool_include_prefix": True}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load("timm_map", path).get_layer("patch_encoder").use_class_token


def test_mean_of_timm_with_prefix_tokens(tmp_path):
    """Where its config.json says so, its mean is of all tokens."""
    size = outputs("timm_reg4_gap_ls")["images"].shape[1]
    config = {
        "global_pool": "avg",
        "model_args": {"pool_include_prefix": True, "num_heads": 3},
        "pretrained_cfg": {"input_size": [3, size, size]},
    }
    folder = folder_with(tmp_path, "timm_reg4_gap_ls", config=config)
    model = keras_vit.from_checkpoint(folder, normalization=None)
    expected = load("timm_reg4_gap_ls", pooling="mean")
    images = outputs("timm_reg4_gap_ls")["images"]
    np.testing.assert_array_equal(predict(model, images), predict(expected, images))


@pytest.mark.parametrize(
    ("name", "bias"),
    [
        ("timm_token", "head.bias"),
        ("google_vit_token", "head/bias"),
        ("lucidrains_vit_cls", "mlp_head.bias"),
    ],
)
def test_a_head_without_a_bias_is_not_left_out(name, bias, tmp_path):
    arrays = {key: array for key, array in tensors(name).items() if key != bias}
    write = write_npz if name.startswith("google") else write_safetensors
    path = write(tmp_path / f"x{'.npz' if write is write_npz else '.safetensors'}", arrays)
    with pytest.raises(ValueError, match=rf"missing \(1\): {bias}"):
        load(name, path)


def test_normalisation_of_a_config_with_a_name(tmp_path):
    """Three equal values are one: they fit a hybrid's error message and read as a name."""
    assert normalization_of([0.5] * 3, [0.5] * 3) == "minus_one_one"
    assert normalization_of([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) == "imagenet"
    assert normalization_of([0.5], [0.25]) == ((0.5,), (0.25,))


def test_config_with_another_activation(tmp_path):
    folder = folder_with(tmp_path, "hf_vit", config={"hidden_act": "relu"})
    with pytest.raises(ValueError, match=r"model.safetensors: .*activation.*hidden_act='relu'"):
        keras_vit.from_checkpoint(folder, num_heads=3)


@pytest.mark.parametrize("older", [False, True])
def test_config_of_timm(older, tmp_path, recwarn):
    """The hub's config.json tells the grid of non-square positions, and the pixels."""
    pretrained = {
        "input_size": [3, 24, 48],
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    pretrained = pretrained if older else {"pretrained_cfg": pretrained}
    config = {"global_pool": "avg", **pretrained, "model_args": {"num_heads": 6}}
    folder = folder_with(tmp_path, "timm_nonsquare_ls", config=config)
    found = vit_arguments(keras_vit.from_checkpoint(folder))
    assert found["image_size"] == (24, 48)
    assert found["variant"].num_heads == 6
    assert found["pooling"] == "gap"
    assert found["normalization"] == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert not recwarn.list


def test_heads_of_the_table(tmp_path):
    """A file of a published width needs no hint: its heads are its variant's."""
    config = keras_vit.ViTConfig(192, 1, 3, 32, 8)
    model = randomise(keras_vit.build_vit(config, image_size=16, num_classes=2))
    keras_vit.save_checkpoint(model, tmp_path / "ti.safetensors", "timm")
    arrays = safetensors.numpy.load_file(tmp_path / "ti.safetensors")
    path = write_safetensors(tmp_path / "bare.safetensors", arrays)
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype("float32")
    found = keras_vit.from_checkpoint(path, normalization=None)
    np.testing.assert_array_equal(predict(found, images), predict(model, images))


# Another resolution


def positions_of(model):
    return keras.ops.convert_to_numpy(model.get_layer("patch_encoder").position_embedding)


@pytest.mark.parametrize(
    ("name", "interpolation"),
    [
        ("google_vit_token", "linear"),
        ("bigvision_map", "linear"),
        ("timm_token", "antialiased_bicubic"),
        ("hf_dinov2", "bicubic"),
        ("hf_dinov2_registers", "antialiased_bicubic"),
        ("hf_vit", "bicubic"),
        ("hf_deit_distilled", "bicubic"),
        ("lucidrains_vit_cls", "antialiased_bicubic"),
    ],
)
def test_positions_are_resized_as_the_family_does(name, interpolation):
    """By default as the family's code; by resize_model or at loading; and to a non-square grid."""
    original = load(name)
    found = positions_of(load(name, image_size=(24, 40)))
    for way in ("linear", "antialiased_bicubic", "bicubic"):
        resized = positions_of(keras_vit.resize_model(original, (24, 40), interpolation=way))
        asked = positions_of(load(name, image_size=(24, 40), interpolation=way))
        np.testing.assert_array_equal(asked, resized)
        assert np.array_equal(found, resized) == (way == interpolation)


@pytest.mark.parametrize(
    ("name", "interpolation"),
    [("timm_token", "bicubic"), ("timm_reg4_gap_ls", "antialiased_bicubic")],
)
def test_positions_of_the_original_dinov2_are_resized_as_its_code_does(
    name, interpolation, tmp_path
):
    """Its files have a mask token, which timm's have not; with registers it antialiases."""
    path = write_safetensors(tmp_path / "dinov2.safetensors", dinov2_original(tensors(name)))
    size = {"image_size": (16, 24)}
    expected = positions_of(load(name, interpolation=interpolation, **size))
    np.testing.assert_array_equal(positions_of(load(name, path, **size)), expected)
    other = {"bicubic": "antialiased_bicubic", "antialiased_bicubic": "bicubic"}[interpolation]
    assert np.abs(expected - positions_of(load(name, interpolation=other, **size))).max() > 1e-3


# Saving


def saved(name, path, family):
    """The tensors that a file's model is saved as, and the model."""
    model = load(name)
    keras_vit.save_checkpoint(model, path, family)
    if family == "google":
        with np.load(path) as file:
            return model, dict(file)
    return model, safetensors.numpy.load_file(path)


GOOGLE = [name for name in NAMES if name.startswith(("google", "bigvision"))]
TIMM = [name for name in NAMES if name.startswith("timm")]


@pytest.mark.parametrize(
    ("name", "family"), [(name, "google") for name in GOOGLE] + [(name, "timm") for name in TIMM]
)
def test_round_trip(name, family, tmp_path):
    """A file, loaded and saved, has the file's names and bits; loaded again, the same logits."""
    path = tmp_path / f"saved{'.npz' if family == 'google' else '.safetensors'}"
    model, arrays = saved(name, path, family)
    expected = tensors(name)
    if name.startswith("bigvision"):  # positions stand in another place there
        expected = as_vision_transformer(expected)
    assert set(arrays) == set(expected)
    for key, array in arrays.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, expected[key].astype("float32"), key)
    images = outputs(name)["images"]
    again = load(name, path)
    np.testing.assert_array_equal(predict(again, images), predict(model, images))


def as_vision_transformer(arrays):
    """big_vision's arrays under the names of vision_transformer."""
    renamed = {}
    for key, array in arrays.items():
        if key == "pos_embedding":
            if "cls" in arrays:  # its class token has no position: vision_transformer's has, 0
                array = np.concatenate([np.zeros((1, 1, 24), "float32"), array], axis=1)
            renamed["Transformer/posembed_input/pos_embedding"] = array
        elif "/encoderblock/" in key:
            for i, part in enumerate(array):
                renamed[key.replace("/encoderblock/", f"/encoderblock_{i}/")] = part
        else:
            renamed[key] = array
    return renamed


CONFIG = keras_vit.ViTConfig(hidden_dim=24, depth=2, num_heads=3, mlp_dim=40, patch_size=4)
HYBRID = keras_vit.ViTConfig(24, 1, 3, 40, 1, stem_units=(1, 2), stem_width=32)
TANH = {"gelu": "tanh"}


@pytest.mark.parametrize(
    ("config", "arguments", "family"),
    [
        (CONFIG, TANH, "google"),
        (CONFIG, {**TANH, "pooling": "gap", "class_token": False}, "google"),
        (
            CONFIG,
            {**TANH, "pooling": "map", "class_token": False, "position": "sincos2d"},
            "google",
        ),
        (CONFIG, {**TANH, "representation_size": 11}, "google"),
        (CONFIG, {**TANH, "num_classes": 0}, "google"),
        (CONFIG, {**TANH, "channels": 5}, "google"),
        (HYBRID, TANH, "google"),
        (CONFIG, {}, "timm"),
        (CONFIG, {"normalization": "imagenet"}, "timm"),
        (CONFIG, {"gelu": "tanh", "layer_norm_epsilon": 1e-5}, "timm"),
        (CONFIG, {"num_registers": 3}, "timm"),
        (CONFIG, {"distillation_token": True}, "timm"),
        (CONFIG, {"pooling": "gap", "norm_after_pooling": True}, "timm"),
        (CONFIG, {"pooling": "gap", "class_token": False}, "timm"),
        (CONFIG, {"pooling": "map", "class_token": False, "qk_norm": True}, "timm"),
        (CONFIG, {"layer_scale": 0.1, "qkv_bias": False, "channels": 1}, "timm"),
        (CONFIG, {"num_classes": 0}, "timm"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("error::UserWarning")
def test_our_models_survive(config, arguments, family, tmp_path):
    """What we train, saved and loaded by nothing but the file, gives the same logits."""
    size = (40, 100) if config is HYBRID else (16, 36)  # 4 x 9 patches: no square of 6 x 6
    model = randomise(
        keras_vit.build_vit(config, image_size=size, **{"num_classes": 7, **arguments})
    )
    path = tmp_path / f"vit{'.npz' if family == 'google' else '.safetensors'}"
    keras_vit.save_checkpoint(model, path, family)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    again = keras_vit.from_checkpoint(path)
    images = np.random.default_rng(0).uniform(0, 255, (3, *model.input_shape[1:]))
    images = images.astype("float32")
    np.testing.assert_array_equal(predict(again, images), predict(model, images))


def test_positions_of_sincos_become_timms_learned_ones(tmp_path):
    model = randomise(
        keras_vit.build_vit(CONFIG, image_size=(8, 20), num_classes=7, position="sincos2d")
    )
    keras_vit.save_checkpoint(model, tmp_path / "vit.safetensors", "timm")
    again = keras_vit.from_checkpoint(tmp_path / "vit.safetensors")
    images = np.random.default_rng(0).normal(size=(3, 8, 20, 3)).astype("float32")
    assert_same(predict(again, images), predict(model, images))


@pytest.mark.parametrize(
    ("arguments", "family", "match"),
    [
        ({}, "google", r"'google' has no place.*gelu='erf' \(expected 'tanh'\)"),
        ({**TANH, "layer_norm_epsilon": 1e-5}, "google", r"layer_norm_epsilon=1e-05"),
        ({**TANH, "layer_scale": 0.1}, "google", r"block_0/layer_scale1/gamma"),
        ({**TANH, "qkv_bias": False}, "google", r"qkv_bias=False"),
        ({**TANH, "pooling": "mean"}, "google", r"pooling='mean' \(expected token or gap or map\)"),
        ({**TANH, "num_registers": 2}, "google", r"patch_encoder/registers"),
        ({**TANH, "pooling": "gap"}, "google", r"pooling='gap' beside a class token"),
        ({**TANH, "pooling": "map"}, "google", r"pooling='map' beside a class token"),
        ({"pooling": "map"}, "timm", r"pooling='map' beside a class token"),
        ({**TANH, "norm_after_pooling": True}, "google", r"pooled_norm/beta, pooled_norm/gamma"),
        ({"patch_norm": True}, "timm", r"'timm' has no place.*patch_norm=True"),
        ({"pooling": "token+gap"}, "timm", r"pooling='token\+gap'"),
        ({"representation_size": 5}, "timm", r"pre_logits/bias, pre_logits/kernel"),
        (
            {"distillation_token": True, "num_registers": 2},
            "timm",
            r"registers beside a distillation token",
        ),
        (
            {"distillation_token": True, "norm_after_pooling": True},
            "timm",
            r"norm_after_pooling=True beside a distillation token",
        ),
    ],
)
def test_what_a_family_cannot_hold(arguments, family, match, tmp_path):
    model = keras_vit.build_vit(CONFIG, image_size=8, num_classes=7, **arguments)
    path = tmp_path / f"vit{'.npz' if family == 'google' else '.safetensors'}"
    with pytest.raises(ValueError, match=match):
        keras_vit.save_checkpoint(model, path, family)
    assert not path.exists()


def test_free_head_width_cannot_be_saved(tmp_path):
    config = keras_vit.ViTConfig(24, 1, 3, 40, 4, head_dim=5)
    model = keras_vit.build_vit(config, image_size=8)
    with pytest.raises(ValueError, match=r"no place.*head_dim=5 \(expected None\)"):
        keras_vit.save_checkpoint(model, tmp_path / "vit.safetensors", "timm")


def test_usual_head_width_may_be_said(tmp_path):
    config = keras_vit.ViTConfig(24, 1, 3, 40, 4, head_dim=8)
    model = keras_vit.build_vit(config, image_size=8, num_classes=7)
    keras_vit.save_checkpoint(model, tmp_path / "vit.safetensors", "timm")
    assert keras_vit.from_checkpoint(tmp_path / "vit.safetensors").output_shape == (None, 7)


def resized(model):
    return keras_vit.resize_model(model, 16)


def test_models_made_in_a_name_scope(tmp_path):
    """As within a layer's `build`: their weights are found under the same names."""
    expected = load("timm_token")
    with keras.name_scope("teacher"):
        model = load("timm_token")
    assert any(weight.path.startswith("teacher/") for weight in model.weights)
    images = outputs("timm_token")["images"]
    np.testing.assert_array_equal(predict(model, images), predict(expected, images))
    keras_vit.load_weights(model, weights_file("timm_token"))
    keras_vit.save_checkpoint(model, tmp_path / "vit.safetensors", "timm")
    assert positions_of(resized(model)).shape == positions_of(resized(expected)).shape


def test_no_part_of_a_model_is_left_out(tmp_path):
    vit = keras_vit.build_vit(CONFIG, image_size=8, num_classes=0)
    head = keras.layers.Dense(7, activation="softmax", name="head")
    path = tmp_path / "vit.safetensors"
    with pytest.raises(ValueError, match=r"layers of its own, \['head'\]"):
        keras_vit.save_checkpoint(keras.Model(vit.input, head(vit.output)), path, "timm")
    head = keras.layers.Dense(7, use_bias=False, name="head")
    for save in (lambda m: keras_vit.save_checkpoint(m, path, "timm"), resized):
        with pytest.raises(ValueError, match=r"layers of its own, \['head'\]"):
            save(keras.Model(vit.input, head(vit.output)))
    x = keras.layers.Dense(5, activation="relu", name="pre_logits")(vit.output)
    with pytest.raises(ValueError, match=r"layers of its own, \['pre_logits'\]"):
        resized(keras.Model(vit.input, keras.layers.Dense(7, name="head")(x)))
    block = keras_vit.TransformerBlock(3, 40, name="mine")
    tokens = block(vit.get_layer("encoder_norm").output)
    with pytest.raises(ValueError, match=r"layers of its own, \['mine'\]"):
        resized(keras.Model(vit.input, vit.get_layer("pooling")(tokens)))
    outputs = [vit.output, vit.get_layer("encoder_norm").output]
    with pytest.raises(ValueError, match=r"a model with 2 outputs"):
        keras_vit.save_checkpoint(keras.Model(vit.input, outputs), path, "timm")
    assert not path.exists()


def test_path_from_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = keras_vit.build_vit(CONFIG, image_size=8, num_classes=7)
    keras_vit.save_checkpoint(model, "~/vit.safetensors", "timm")
    assert keras_vit.from_checkpoint("~/vit.safetensors").output_shape == (None, 7)
    assert (tmp_path / "vit.safetensors").exists()


def test_saving_errors(tmp_path):
    model = keras_vit.build_vit(CONFIG, image_size=8, num_classes=7)
    with pytest.raises(ValueError, match=r"must be 'google' or 'timm'.*family='torch'"):
        keras_vit.save_checkpoint(model, tmp_path / "vit.pt", "torch")
    with pytest.raises(ValueError, match=r"timm checkpoint must end in .safetensors.*vit.npz"):
        keras_vit.save_checkpoint(model, tmp_path / "vit.npz", "timm")
    path = tmp_path / "vit.safetensors"
    path.write_text("mine")
    with pytest.raises(ValueError, match=r"vit.safetensors exists already: pass overwrite=True"):
        keras_vit.save_checkpoint(model, path, "timm")
    assert path.read_text() == "mine"
    keras_vit.save_checkpoint(model, path, "timm", overwrite=True)
    assert keras_vit.from_checkpoint(path).output_shape == (None, 7)


# A model that does not fit


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"layer_scale": 0.1}, r"missing \(6\): blocks.0.ls1.gamma, blocks.0.ls2.gamma"),
        ({"class_token": False, "pooling": "gap"}, r"unexpected \(1\): cls_token"),
        ({"channels": 4}, r"patch_embed.proj.weight \(24, 3, 8, 8\), expected \(24, 4, 8, 8\)"),
        ({"norm_after_pooling": True}, r"missing \(2\): fc_norm.weight, fc_norm.bias\n.*norm.bias"),
        ({"patch_norm": True}, r"missing \(4\): patch_encoder/patch_norm/gamma"),
    ],
)
def test_load_weights_names_what_does_not_fit(arguments, match):
    base = {"variant": keras_vit.ViTConfig(24, 3, 3, 96, 8), "image_size": 32, "num_classes": 7}
    model = randomise(keras_vit.build_vit(**base, **arguments))
    before = model.get_weights()
    with pytest.raises(ValueError, match=rf"(?s)weights.safetensors: .*timm.*{match}"):
        keras_vit.load_weights(model, weights_file("timm_token"))
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_model_that_does_not_fit_is_told_what_builds_one():
    model = keras_vit.build_vit(keras_vit.ViTConfig(24, 3, 3, 96, 8), image_size=32, num_classes=7)
    with pytest.raises(ValueError, match=r"unexpected \(6\).*\n`keras_vit.from_checkpoint` builds"):
        keras_vit.load_weights(model, weights_file("timm_nonsquare_ls"))


def test_load_weights_keeps_the_head_of_other_classes():
    config = keras_vit.ViTConfig(24, 3, 3, 96, 8)
    model = randomise(keras_vit.build_vit(config, image_size=32, num_classes=5))
    head = keras.ops.convert_to_numpy(model.get_layer("head").kernel)
    keras_vit.load_weights(model, weights_file("timm_token"))
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(model.get_layer("head").kernel), head)
    features = keras.Model(model.input, model.get_layer("head").input)
    expected = load("timm_token", num_classes=0)
    images = outputs("timm_token")["images"]
    np.testing.assert_array_equal(predict(features, images), predict(expected, images))


def test_load_weights_warns_of_another_gelu():
    config = keras_vit.ViTConfig(24, 3, 3, 96, 8)
    model = keras_vit.build_vit(config, image_size=32, num_classes=7)
    with pytest.warns(UserWarning, match=r"made with gelu='tanh'.*has gelu='erf'"):
        keras_vit.load_weights(model, weights_file("google_vit_token"))
    model = keras_vit.build_vit(config, image_size=32, num_classes=7, layer_norm_epsilon=1e-3)
    with pytest.warns(UserWarning, match=r"made with layer_norm_epsilon=1e-06"):
        keras_vit.load_weights(model, weights_file("timm_token"))


def test_load_weights_warns_of_an_unusual_head_count(tmp_path):
    """Which no shape of the file tells."""
    files = {}
    for heads in (3, 12):
        config = keras_vit.ViTConfig(192, 1, heads, 32, 8)
        model = keras_vit.build_vit(config, image_size=16, num_classes=2)
        keras_vit.save_checkpoint(model, tmp_path / f"{heads}.safetensors", "timm")
        arrays = safetensors.numpy.load_file(tmp_path / f"{heads}.safetensors")
        files[heads] = write_safetensors(tmp_path / f"bare{heads}.safetensors", arrays), model
    path, model = files[12]
    match = r"bare12.*does not say its head count.*num_heads=3, and the model has num_heads=12"
    with pytest.warns(UserWarning, match=match):
        keras_vit.load_weights(model, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keras_vit.load_weights(model, tmp_path / "12.safetensors")  # says it
        keras_vit.load_weights(files[3][1], files[3][0])


def test_load_weights_warns_of_another_normalisation_and_pooling(tmp_path):
    pretrained = {"mean": [0.5] * 3, "std": [0.5] * 3}
    folder = folder_with(tmp_path, "timm_token", config={"pretrained_cfg": pretrained})
    base = {"variant": keras_vit.ViTConfig(24, 3, 3, 96, 8), "image_size": 32, "num_classes": 7}
    model = keras_vit.build_vit(**base, normalization="imagenet")
    with pytest.warns(UserWarning, match=r"made with normalization='minus_one_one'.*'imagenet'"):
        keras_vit.load_weights(model, folder)
    model = keras_vit.build_vit(**base, pooling="gap")
    with pytest.warns(UserWarning, match=r"made with pooling='token'.*pooling='gap'"):
        keras_vit.load_weights(model, weights_file("timm_token"))


@pytest.mark.parametrize(
    ("mean", "std"),
    [([1 / 3, 0.41, 0.52], [2 / 7, 0.2, 0.3]), ([1 / 3] * 3, [2 / 7] * 3)],
    ids=["each", "equal"],
)
def test_load_weights_takes_a_rounded_normalisation_for_the_same(mean, std, tmp_path):
    folder = folder_with(tmp_path, "timm_token", config={"mean": mean, "std": std})
    config = keras_vit.ViTConfig(24, 3, 3, 96, 8)
    base = {"variant": config, "image_size": 32, "num_classes": 7}
    same = (mean, std) if len(set(mean)) > 1 else (mean[0], std[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keras_vit.load_weights(keras_vit.build_vit(**base, normalization=same), folder)
    model = keras_vit.build_vit(**base, normalization=(mean, [std[0] + 1e-6, *std[1:]]))
    with pytest.warns(UserWarning, match=r"made with normalization=\(\(0.33"):
        keras_vit.load_weights(model, folder)


@pytest.mark.parametrize("name", ["timm_token", "hf_vit", "lucidrains_vit_cls"])
def test_a_model_of_another_width_is_told_the_shapes(name):
    """Not that the heads do not divide: the model has 5, and the file a width of 24."""
    model = keras_vit.build_vit(keras_vit.ViTConfig(40, 3, 5, 96, 8), image_size=32, num_classes=7)
    with pytest.raises(ValueError, match=r"mis-shaped \(\d+\): .*expected \(40"):
        keras_vit.load_weights(model, weights_file(name))


@pytest.mark.parametrize("normalization", [None, "imagenet", "minus_one_one"])
def test_a_google_file_of_ours_says_the_normalisation(tmp_path, normalization):
    model = keras_vit.build_vit(CONFIG, image_size=8, gelu="tanh", normalization=normalization)
    path = tmp_path / "vit.npz"
    keras_vit.save_checkpoint(model, path, "google")
    again = keras_vit.from_checkpoint(path)
    expected, received = (vit_arguments(m)["normalization"] for m in (model, again))
    assert received == expected
    with np.load(path) as arrays:  # as Google's code reads it
        assert arrays["Transformer/encoder_norm/scale"].shape == (CONFIG.hidden_dim,)


@pytest.mark.parametrize(
    "comment", [b"by hand", b"[" * 60_000, b"[1]", b'{"keras_vit": null}', b'{"other": {}}']
)
def test_comments_of_others_in_an_archive(tmp_path, comment):
    path = tmp_path / "vit.npz"
    keras_vit.save_checkpoint(
        keras_vit.build_vit(CONFIG, image_size=8, gelu="tanh"), path, "google"
    )
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = comment
    if b"null" in comment:
        with pytest.raises(ValueError, match=r"vit.npz: the file must hold a JSON object.*None"):
            keras_vit.from_checkpoint(path)
    else:
        model = keras_vit.from_checkpoint(path)
        assert vit_arguments(model)["normalization"] == ([0.5], [0.5])


def test_heads_that_the_file_knows_must_be_the_models():
    model = keras_vit.build_vit(
        keras_vit.ViTConfig(24, 3, 6, 96, 8), image_size=32, num_classes=7, gelu="tanh"
    )
    with pytest.raises(ValueError, match=r"query/kernel \(24, 3, 8\), expected \(24, 6, 4\)"):
        keras_vit.load_weights(model, weights_file("google_vit_token"))


def test_no_known_family(tmp_path):
    path = write_safetensors(tmp_path / "resnet.safetensors", {"conv1.weight": np.ones((2, 3))})
    match = r"resnet.safetensors: .*no known family \(google, timm, huggingface, lucidrains\)"
    with pytest.raises(ValueError, match=rf"{match}.*conv1.weight"):
        keras_vit.from_checkpoint(path)


def test_unknown_override():
    with pytest.raises(TypeError, match="unexpected keyword argument 'depth'"):
        keras_vit.from_checkpoint(weights_file("timm_token"), num_heads=3, depth=2)


# The real thing


@pytest.mark.skipif(
    not PRETRAINED.is_dir(), reason="no pretrained DINOv2: set KERAS_VIT_PRETRAINED to its folder"
)
@pytest.mark.parametrize("size", [224, 98])
@pytest.mark.parametrize("way", ["at loading", "afterwards"])
def test_dinov2_at_other_resolutions(size, way):
    """timm 1.0.31's tokens of two photographs, with positions resized from 37 x 37."""
    path = PRETRAINED / "dinov2_vits14.safetensors"
    if way == "at loading":
        model = keras_vit.from_checkpoint(path, image_size=size, normalization=None)
    else:
        model = keras_vit.from_checkpoint(path, normalization=None)
        assert model.input_shape == (None, 518, 518, 3)
        model = keras_vit.resize_model(model, size)
    with np.load(PRETRAINED / "io.npz") as file:
        images, tokens = file[f"images_{size}"], file[f"tokens_{size}"]
    assert_same(predict(tokens_of(model), images), tokens, 2e-5)
