"""vit-pytorch's checkpoints: its class `ViT`, by lucidrains.

It is not the paper's model: patches are layer-normalised before and after their projection,
queries, keys and values have no bias, and the width of a head is free.

Source: lucidrains/vit-pytorch `vit_pytorch/vit.py`, release 1.26.
"""

import math

from keras_vit.config import ViTConfig
from keras_vit.weights.description import Description, file_image_size
from keras_vit.weights.entries import torch_entries

NAME = "lucidrains"

MODULES = {
    "patch_encoder/patch_norm": "to_patch_embedding.1",
    "patch_encoder/projection": "to_patch_embedding.2",
    "patch_encoder/projection_norm": "to_patch_embedding.3",
    "block_{i}/norm1": "transformer.layers.{i}.0.norm",
    "block_{i}/attention/qkv": "transformer.layers.{i}.0.to_qkv",
    "block_{i}/attention/proj": "transformer.layers.{i}.0.to_out.0",
    "block_{i}/norm2": "transformer.layers.{i}.1.net.0",
    "block_{i}/feed_forward/fc1": "transformer.layers.{i}.1.net.1",
    "block_{i}/feed_forward/fc2": "transformer.layers.{i}.1.net.4",
    "encoder_norm": "transformer.norm",
    "head": "mlp_head",
}
TENSORS = {
    "patch_encoder/class_token": "cls_token",
    "patch_encoder/position_embedding": "pos_embedding",
}
HEAD_DIM = 64  # the library's default


def matches(names):
    """Whether these names are of this family."""
    return "to_patch_embedding.2.weight" in names and "transformer.layers.0.0.norm.weight" in names


def canonical(checkpoint):
    """The checkpoint with a batch axis for the class token and the positions, as older releases.

    A model that pools by the mean has a class token of no rows: it is left out.
    """
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    checkpoint.config["of_older_release"] = len(shapes.get("cls_token", ())) == 3
    if 0 in shapes.get("cls_token", ()):
        checkpoint = checkpoint.renamed(lambda name: None if name == "cls_token" else name)
    for name in ("cls_token", "pos_embedding"):
        if len(shapes.get(name, ())) == 2:
            shape = (1, 1, *shapes[name]) if name == "cls_token" else (1, *shapes[name])
            checkpoint = checkpoint.reshaped(name, shape[-3:])
    return checkpoint


def describe(checkpoint, num_heads=None, image_size=None, channels=None):
    """The `Description` of a canonical checkpoint.

    Heads are 64 wide, as by the library's default, unless `num_heads` says otherwise. Images are
    gray if a patch has a square number of values, else RGB, unless `channels` says otherwise, and
    taken as they come: the library does not say how to normalise pixels. Of older releases, models
    that pool by the mean of all tokens have a class token, too: a file with one is taken for a
    model that reads it alone.
    """
    tensors = checkpoint.tensors
    hidden_dim, patch_values = checkpoint.shape("to_patch_embedding.2.weight", 2)
    asked = channels
    if asked is None:
        channels = 1 if math.isqrt(patch_values) ** 2 == patch_values else 3
    patch_size = math.isqrt(patch_values // channels)
    if patch_size**2 * channels != patch_values:
        raise checkpoint.error(
            f"its patches of {patch_values} values are no squares of {channels} channels: pass "
            f"the `channels` of its images. Received: channels={asked}."
        )
    inner_dim = checkpoint.shape("transformer.layers.0.0.to_qkv.weight", 2)[0] // 3
    if num_heads is None and (inner_dim % HEAD_DIM or inner_dim == 0):
        raise checkpoint.error(
            f"the file does not say how many heads its attention of width {inner_dim} has: pass "
            "`num_heads`."
        )
    heads = num_heads or inner_dim // HEAD_DIM
    if inner_dim % heads:
        raise checkpoint.error(
            f"`num_heads` must divide the width {inner_dim} of its attention. "
            f"Received: num_heads={heads}."
        )
    config = ViTConfig(
        hidden_dim,
        checkpoint.count("transformer.layers.{i}.0.norm.weight"),
        heads,
        checkpoint.shape("transformer.layers.0.1.net.1.weight", 2)[0],
        patch_size,
        head_dim=None if inner_dim == hidden_dim else inner_dim // heads,
    )
    class_token = "cls_token" in tensors
    _, length, _ = checkpoint.shape("pos_embedding", 3)
    assumed = {} if num_heads else {"num_heads": heads}
    if asked is None and channels == 1:
        assumed["channels"] = channels
    if class_token and checkpoint.config["of_older_release"]:
        assumed["pooling"] = "token"
    return Description(
        {
            "variant": config,
            "image_size": file_image_size(
                checkpoint,
                config,
                length,
                (int(class_token),),
                checkpoint.config.get("image_size"),
                image_size,
            ),
            "num_classes": checkpoint.outputs("mlp_head.bias", "mlp_head.weight", 0),
            "channels": channels,
            "pooling": "token" if class_token else "mean",
            "class_token": class_token,
            "patch_norm": True,
            "qkv_bias": False,
            "gelu": "erf",
            "layer_norm_epsilon": 1e-5,
            "normalization": None,
        },
        interpolation="antialiased_bicubic",
        assumed=assumed,
    )


def entries(weights, arguments):
    """Where each of our `weights` (paths) stands in a file of this family."""
    return torch_entries(weights, arguments["variant"].depth, MODULES, TENSORS)
