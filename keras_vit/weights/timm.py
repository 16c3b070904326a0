"""timm's checkpoints: `VisionTransformer` and `VisionTransformerDistilled` of pytorch-image-models.

The names are also those of the original DeiT, DINO and DINOv2 files, once they are safetensors.

Source: pytorch-image-models `timm/models/vision_transformer.py` and `deit.py`, release 1.0.
"""

import re

from keras_vit.config import ViTConfig
from keras_vit.weights.description import (
    Description,
    file_image_size,
    head_count,
    normalization_of,
)
from keras_vit.weights.entries import convolution, torch_entries

NAME = "timm"
INTERPOLATION = "antialiased_bicubic"
FIXED = {"patch_norm": False}
POOLINGS = ("token", "gap", "map")

MODULES = {
    "patch_encoder/projection": "patch_embed.proj",
    "block_{i}/norm1": "blocks.{i}.norm1",
    "block_{i}/attention/qkv": "blocks.{i}.attn.qkv",
    "block_{i}/attention/query_norm": "blocks.{i}.attn.q_norm",
    "block_{i}/attention/key_norm": "blocks.{i}.attn.k_norm",
    "block_{i}/attention/proj": "blocks.{i}.attn.proj",
    "block_{i}/norm2": "blocks.{i}.norm2",
    "block_{i}/feed_forward/fc1": "blocks.{i}.mlp.fc1",
    "block_{i}/feed_forward/fc2": "blocks.{i}.mlp.fc2",
    "encoder_norm": "norm",
    "pooled_norm": "fc_norm",
    "pooling/query": "attn_pool.q",
    "pooling/key_value": "attn_pool.kv",
    "pooling/proj": "attn_pool.proj",
    "pooling/norm": "attn_pool.norm",
    "pooling/feed_forward/fc1": "attn_pool.mlp.fc1",
    "pooling/feed_forward/fc2": "attn_pool.mlp.fc2",
    "head": "head",
    "head_distillation": "head_dist",
}
TENSORS = {
    "patch_encoder/class_token": "cls_token",
    "patch_encoder/distillation_token": "dist_token",
    "patch_encoder/registers": "reg_token",
    "patch_encoder/position_embedding": "pos_embed",
    "block_{i}/layer_scale1/gamma": "blocks.{i}.ls1.gamma",
    "block_{i}/layer_scale2/gamma": "blocks.{i}.ls2.gamma",
    "pooling/probe": "attn_pool.latent",
}
# Older names, and what is of no use in a trained model.
RENAMED = (
    (r"\.gamma_([12])$", r".ls\1.gamma"),
    (r"^register_tokens$", "reg_token"),
)
IGNORED = {"mask_token"}
CONFIG_POOLINGS = {"token": "token", "avg": "gap", "map": "map"}


def matches(names):
    """Whether these names are of this family."""
    return "patch_embed.proj.weight" in names and "blocks.0.norm1.weight" in names


def canonical(checkpoint):
    """The checkpoint in one spelling."""

    def respelled(name):
        for old, new in RENAMED:
            name = re.sub(old, new, name)
        return None if name in IGNORED else name

    return checkpoint.renamed(respelled)


def describe(checkpoint, num_heads=None, image_size=None):
    """The `Description` of a canonical checkpoint.

    The head count is that of the variant of the same width. Without a config.json, pixels are
    taken to be normalised as in timm's default; or with ImageNet's mean and standard deviation,
    if the file has a distillation token (DeiT), or LayerScale and patches of 14 pixels (DINOv2).
    """
    tensors, facts = checkpoint.tensors, checkpoint.config
    hidden_dim, channels, patch_size, _ = checkpoint.shape("patch_embed.proj.weight", 4)
    if "blocks.0.attn.q_norm.weight" in tensors:
        num_heads = hidden_dim // checkpoint.shape("blocks.0.attn.q_norm.weight", 1)[0]
    config = ViTConfig(
        hidden_dim,
        checkpoint.count("blocks.{i}.norm1.weight"),
        head_count(checkpoint, hidden_dim, num_heads or _known_heads(facts)),
        checkpoint.shape("blocks.0.mlp.fc1.weight", 2)[0],
        patch_size,
    )
    placed = ("cls_token" in tensors) + ("dist_token" in tensors)
    registers = checkpoint.shape("reg_token", 3)[1] if "reg_token" in tensors else 0
    _, length, _ = checkpoint.shape("pos_embed", 3)
    slots = (placed, 0, placed + registers)
    pretrained = facts.get("pretrained_cfg") or {}
    known = facts.get("image_size") or (pretrained.get("input_size") or [None])[1:] or None
    mean, std = pretrained.get("mean"), pretrained.get("std")
    scaled = "blocks.0.ls1.gamma" in tensors
    arguments = {
        "variant": config,
        "image_size": file_image_size(checkpoint, config, length, slots, known, image_size),
        "num_classes": checkpoint.shape("head.bias")[0] if "head.bias" in tensors else 0,
        "channels": channels,
        "pooling": _pooling(checkpoint),
        "class_token": "cls_token" in tensors,
        "distillation_token": "dist_token" in tensors,
        "num_registers": registers,
        "norm_after_pooling": "fc_norm.weight" in tensors,
        "layer_scale": 1e-5 if scaled else None,
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "qk_norm": "blocks.0.attn.q_norm.weight" in tensors,
        "gelu": facts.get("gelu", "erf"),
        "layer_norm_epsilon": facts.get("layer_norm_epsilon", 1e-6),
    }
    if "normalization" in facts or (mean and std):
        known = facts.get("normalization", (mean, std))
        normalization = known and normalization_of(*known)
        return Description({**arguments, "normalization": normalization})
    imagenet = "dist_token" in tensors or (scaled and patch_size == 14)
    normalization = "imagenet" if imagenet else "minus_one_one"
    return Description({**arguments, "normalization": normalization}, assumed=("normalization",))


def _known_heads(facts):
    """The head count in the metadata of `save_checkpoint` or in timm's config.json."""
    return facts.get("num_heads") or (facts.get("model_args") or {}).get("num_heads")


def _pooling(checkpoint):
    if known := CONFIG_POOLINGS.get(checkpoint.config.get("global_pool")):
        return known
    if "attn_pool.latent" in checkpoint.tensors:
        return "map"
    if "fc_norm.weight" in checkpoint.tensors or "cls_token" not in checkpoint.tensors:
        return "gap"
    return "token"


def entries(weights, arguments):
    """Where each of our `weights` (paths) stands in a file of this family."""
    config = arguments["variant"]
    patch_kernel = convolution("patch_embed.proj.weight", config.patch_size)
    return torch_entries(weights, config.depth, MODULES, TENSORS, patch_kernel)
