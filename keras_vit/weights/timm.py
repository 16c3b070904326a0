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
FIXED = {"patch_norm": False}
# Pooling -> whether there may be tokens before the patches; "map" would leave them out.
POOLINGS = {"token": (True,), "gap": (True, False), "map": (False,)}

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
GELUS = {"gelu": "erf", "gelu_tanh": "tanh"}
# Architectures that are built with act_layer="gelu_tanh".
TANH = r"so400m_patch16_siglip|giantopt|base_patch32_siglip|large_patch16_siglip(_gap)?_512"
# Architectures that compute something else under the same names.
OTHERS = {
    r"_rpn_": "the norm after each branch",
    r"_rope_": "rotary positions",  # beside absolute ones, they have no tensor
}


def matches(names):
    """Whether these names are of this family."""
    return "patch_embed.proj.weight" in names and "blocks.0.norm1.weight" in names


def canonical(checkpoint):
    """The checkpoint in one spelling."""
    checkpoint.config["of_dinov2"] = "mask_token" in checkpoint.tensors  # timm's have none

    def respelled(name):
        for old, new in RENAMED:
            name = re.sub(old, new, name)
        return None if name in IGNORED else name

    return checkpoint.renamed(respelled)


def describe(checkpoint, num_heads=None, image_size=None, channels=None):
    """The `Description` of a canonical checkpoint.

    The head count is that of the variant of the same width. Without a config.json, pixels are
    taken to be normalised as in timm's default; or with ImageNet's mean and standard deviation,
    if the file has a distillation token (DeiT), or LayerScale and patches of 14 pixels (DINOv2).
    """
    tensors, facts = checkpoint.tensors, checkpoint.config
    _check_architecture(checkpoint)
    hidden_dim, channels, patch_size, _ = checkpoint.shape("patch_embed.proj.weight", 4)
    heads = _known_heads(checkpoint, hidden_dim)
    config = ViTConfig(
        hidden_dim,
        checkpoint.count("blocks.{i}.norm1.weight"),
        head_count(checkpoint, hidden_dim, heads, num_heads),
        checkpoint.shape("blocks.0.mlp.fc1.weight", 2)[0],
        patch_size,
    )
    placed = ("cls_token" in tensors) + ("dist_token" in tensors)
    registers = checkpoint.shape("reg_token", 3)[1] if "reg_token" in tensors else 0
    _, length, _ = checkpoint.shape("pos_embed", 3)
    slots = (placed, 0, placed + registers)
    pretrained = facts.get("pretrained_cfg") or facts  # older files have all in one
    file_size = facts.get("image_size") or (pretrained.get("input_size") or [None])[1:] or None
    scaled = "blocks.0.ls1.gamma" in tensors
    assumed = {}
    if not (heads or num_heads or "architecture" in facts):
        assumed["num_heads"] = config.num_heads
    arguments = {
        "variant": config,
        "image_size": file_image_size(checkpoint, config, length, slots, file_size, image_size),
        "num_classes": checkpoint.outputs("head.bias", "head.weight", 0),
        "channels": channels,
        "pooling": _pooling(checkpoint),
        "class_token": "cls_token" in tensors,
        "distillation_token": "dist_token" in tensors,
        "num_registers": registers,
        "norm_after_pooling": "fc_norm.weight" in tensors,
        "layer_scale": 1e-5 if scaled else None,
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "qk_norm": "blocks.0.attn.q_norm.weight" in tensors,
        "gelu": _gelu(checkpoint),
        "layer_norm_epsilon": facts.get("layer_norm_epsilon", 1e-6),
    }
    if "normalization" in facts:
        arguments["normalization"] = facts["normalization"] and normalization_of(
            *facts["normalization"]
        )
    elif pretrained.get("mean") and pretrained.get("std"):
        arguments["normalization"] = normalization_of(pretrained["mean"], pretrained["std"])
    else:
        imagenet = "dist_token" in tensors or (scaled and patch_size == 14)
        assumed["normalization"] = "imagenet" if imagenet else "minus_one_one"
    said = "gelu" in facts or "architecture" in facts or "act_layer" in facts.get("model_args", {})
    if not said and "cls_token" not in tensors:
        assumed["gelu"] = arguments["gelu"]  # some of SigLIP's models have the other
    interpolation = "antialiased_bicubic"
    if facts["of_dinov2"] and not registers:  # the original code of those with registers does
        interpolation = "bicubic"
    return Description({**arguments, **_but_heads(assumed)}, interpolation, assumed)


def _but_heads(assumed):
    """What is assumed, but for the head count, which is in the `ViTConfig`."""
    return {name: value for name, value in assumed.items() if name != "num_heads"}


def _known_heads(checkpoint, hidden_dim):
    """The head count, if norms of single heads, our metadata or timm's config.json say it."""
    if "blocks.0.attn.q_norm.weight" in checkpoint.tensors:
        return hidden_dim // checkpoint.shape("blocks.0.attn.q_norm.weight", 1)[0]
    facts = checkpoint.config
    return facts.get("num_heads") or (facts.get("model_args") or {}).get("num_heads")


def _check_architecture(checkpoint):
    """ValueError for models that compute something else under the same names."""
    facts, tensors = checkpoint.config, checkpoint.tensors
    architecture = facts.get("architecture", "")
    for pattern, what in OTHERS.items():
        if re.search(pattern, architecture):
            raise checkpoint.error(
                f"models with {what} are not supported. Received: architecture={architecture!r}."
            )
    mlp_dim, _ = checkpoint.shape("blocks.0.mlp.fc1.weight", 2)
    _, inputs = checkpoint.shape("blocks.0.mlp.fc2.weight", 2)
    if mlp_dim == 2 * inputs:
        raise checkpoint.error(
            "gated MLPs (SwiGLU) are not supported. "
            f"Received: fc1 of {mlp_dim} outputs, twice the inputs of fc2."
        )
    prefix = [name for name in ("cls_token", "dist_token", "reg_token") if name in tensors]
    whole = (facts.get("model_args") or {}).get("pool_include_prefix")
    if "attn_pool.latent" in tensors and prefix and not whole:
        raise checkpoint.error(
            "its attention pooling leaves out the tokens before the patches, which is not "
            f"supported. Received: {', '.join(prefix)}."
        )


def _gelu(checkpoint):
    facts = checkpoint.config
    if "gelu" in facts:  # our metadata
        return facts["gelu"]
    name = (facts.get("model_args") or {}).get("act_layer", "gelu")
    if re.search(TANH, facts.get("architecture", "")):
        name = "gelu_tanh"
    if name not in GELUS:
        raise checkpoint.error(
            f"`act_layer` must be one of {', '.join(GELUS)}. Received: act_layer={name!r}."
        )
    return GELUS[name]


def _pooling(checkpoint):
    if known := checkpoint.config.get("global_pool"):
        if known not in CONFIG_POOLINGS:
            raise checkpoint.error(
                f"`global_pool` must be one of {', '.join(CONFIG_POOLINGS)}. "
                f"Received: global_pool={known!r}."
            )
        if known == "avg" and (checkpoint.config.get("model_args") or {}).get(
            "pool_include_prefix"
        ):
            return "mean"
        return CONFIG_POOLINGS[known]
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
