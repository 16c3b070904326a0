"""Models into checkpoints of other code."""

import json
import pathlib
import zipfile

import keras
import numpy as np
import safetensors.numpy

from keras_vit.files import check_new, replacing
from keras_vit.model import check_whole, vit_arguments
from keras_vit.positions import sincos2d
from keras_vit.weights import google, timm
from keras_vit.weights.checkpoint import listed
from keras_vit.weights.description import grid_of
from keras_vit.weights.loading import POSITIONS, REGISTERS, weights_by_path

TOKENS = ("patch_encoder/class_token", "patch_encoder/distillation_token")


def save_checkpoint(model, path, family, *, overwrite=False):
    """Writes a model in a family's format, for the family's own code.

    "google" is a .npz file for vision_transformer and big_vision. "timm" is a .safetensors file
    for timm, in which a class token beside registers takes its position into itself, as timm's
    models with registers expect. The other code is to be told what no tensor says: that the
    pixels are normalised outside of it, and for timm, beside the sizes,

    - pooling="gap": `global_pool="avg"`, and `fc_norm=False` unless `norm_after_pooling`;
    - registers: `reg_tokens`, `no_embed_class=True`; layer_scale: `init_values`;
    - gelu="tanh": `act_layer="gelu_tanh"`; an epsilon other than 1e-6: `norm_layer`.

    Example:

        keras_vit.save_checkpoint(model, "vit.safetensors", "timm")
        # elsewhere: timm.create_model("vit_small_patch16_224", checkpoint_path="vit.safetensors")

    Args:
        model: A model of `build_vit`.
        path: The file to write.
        family: "google" or "timm".
        overwrite: Whether to replace a file that is there.

    Raises:
        ValueError: The model is not as `build_vit` makes it, the family has no place for one of
            its parts, `path` has another suffix than the family's, or exists.
    """
    writers = {"google": (google, ".npz", _write_npz), "timm": (timm, ".safetensors", _write_timm)}
    if family not in writers:
        raise ValueError(f"`family` must be 'google' or 'timm'. Received: family={family!r}.")
    module, suffix, write = writers[family]
    if not str(path).endswith(suffix):
        raise ValueError(f"A {family} checkpoint must end in {suffix}. Received: {path}.")
    path = pathlib.Path(path).expanduser()
    check_new(path, overwrite, "pass overwrite=True")
    check_whole(model)
    arguments = vit_arguments(model)
    arrays = {
        name: keras.ops.convert_to_numpy(weight.value).astype("float32")
        for name, weight in weights_by_path(model).items()
    }
    _check_saveable(module, arguments, arrays)
    if module is timm:
        arrays = _with_positions_of_timm(arrays, arguments)
    tensors = {}
    for name, entry in module.entries(arrays, arguments).items():
        parts = map(np.ascontiguousarray, entry.save(arrays[name]))
        tensors |= dict(zip(entry.names, parts, strict=True))
    with replacing(path) as temporary:
        write(temporary, tensors, arguments)


def _check_saveable(family, arguments, weights):
    """ValueError unless the family's own code can compute what the model does."""
    wrong = [
        f"{name}={arguments[name]!r} (expected {expected!r})"
        for name, expected in family.FIXED.items()
        if arguments[name] != expected
    ]
    pooling, prefix = arguments["pooling"], arguments["class_token"] or arguments["num_registers"]
    if pooling not in family.POOLINGS:
        wrong.append(f"pooling={pooling!r} (expected {' or '.join(family.POOLINGS)})")
    elif bool(prefix) not in family.POOLINGS[pooling]:
        wrong.append(f"pooling={pooling!r} beside a class token or registers")
    if family is timm and arguments["distillation_token"]:  # its class of them has neither
        if arguments["num_registers"]:
            wrong.append("registers beside a distillation token")
        if arguments["norm_after_pooling"]:
            wrong.append("norm_after_pooling=True beside a distillation token")
    config = arguments["variant"]
    if config.head_dim not in (None, config.hidden_dim / config.num_heads):
        wrong.append(f"head_dim={config.head_dim} (expected None)")
    wrong += sorted(set(weights) - set(family.entries(weights, arguments)))
    if wrong:
        raise ValueError(
            f"The family {family.NAME!r} has no place for what the model has. "
            f"Received: {listed(wrong)}."
        )


def _with_positions_of_timm(arrays, arguments):
    """Positions as timm's models have them: learned, and of patches alone beside registers."""
    arrays = dict(arrays)
    placed = [TOKENS[0]] * arguments["class_token"] + [TOKENS[1]] * arguments["distillation_token"]
    if arguments["position"] == "sincos2d":
        hidden_dim = arguments["variant"].hidden_dim
        patches = sincos2d(grid_of(arguments), hidden_dim)[None].astype("float32")
        tokens = np.zeros((1, len(placed), hidden_dim), "float32")
        arrays[POSITIONS] = np.concatenate([tokens, patches], axis=1)
    if REGISTERS in arrays:
        for i, token in enumerate(placed):
            arrays[token] = arrays[token] + arrays[POSITIONS][:, i : i + 1]
        arrays[POSITIONS] = arrays[POSITIONS][:, len(placed) :]
    return arrays


def _write_npz(path, tensors, arguments):
    """Writes the tensors, and as the comment of the archive what they do not say."""
    facts = {name: arguments[name] for name in ("image_size", "normalization")}
    np.savez(path, **tensors)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = json.dumps({"keras_vit": facts}).encode()


def _write_timm(path, tensors, arguments):
    """Writes the tensors, and as metadata what timm's names and shapes do not say."""
    facts = {
        "num_heads": arguments["variant"].num_heads,
        "global_pool": {"gap": "avg"}.get(arguments["pooling"], arguments["pooling"]),
        **{
            name: arguments[name]
            for name in ("image_size", "gelu", "layer_norm_epsilon", "normalization")
        },
    }
    metadata = {"format": "pt", "keras_vit": json.dumps(facts)}
    safetensors.numpy.save_file(tensors, path, metadata=metadata)
