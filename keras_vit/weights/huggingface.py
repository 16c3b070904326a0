"""Hugging Face transformers' checkpoints: ViT, DeiT, DINOv2, and DINOv2 with registers.

Release 5 renamed the layers of the encoder; both spellings are read. A pooler that a file may have
beside the encoder is left out.

Source: transformers `models/{vit,deit,dinov2,dinov2_with_registers}/modeling_*.py`, release 5.
"""

import math
import re

from keras_vit.config import ViTConfig
from keras_vit.weights.description import (
    Description,
    file_image_size,
    head_count,
    normalization_of,
)
from keras_vit.weights.entries import convolution, torch_entries

NAME = "huggingface"

MODULES = {
    "patch_encoder/projection": "embeddings.patch_embeddings.projection",
    "block_{i}/norm1": "layers.{i}.layernorm_before",
    "block_{i}/attention/qkv": (
        "layers.{i}.attention.q_proj",
        "layers.{i}.attention.k_proj",
        "layers.{i}.attention.v_proj",
    ),
    "block_{i}/attention/proj": "layers.{i}.attention.o_proj",
    "block_{i}/norm2": "layers.{i}.layernorm_after",
    "block_{i}/feed_forward/fc1": "layers.{i}.mlp.fc1",
    "block_{i}/feed_forward/fc2": "layers.{i}.mlp.fc2",
    "encoder_norm": "layernorm",
    "head": "classifier",
    "head_distillation": "distillation_classifier",
}
TENSORS = {
    "patch_encoder/class_token": "embeddings.cls_token",
    "patch_encoder/distillation_token": "embeddings.distillation_token",
    "patch_encoder/registers": "embeddings.register_tokens",
    "patch_encoder/position_embedding": "embeddings.position_embeddings",
    "block_{i}/layer_scale1/gamma": "layers.{i}.layer_scale1.lambda1",
    "block_{i}/layer_scale2/gamma": "layers.{i}.layer_scale2.lambda1",
}
# One spelling for all: the first of each pair becomes the second, in this order.
RENAMED = (
    (r"^(vit|deit|dinov2|dinov2_with_registers)\.", ""),
    (r"^encoder\.layer\.", "layers."),
    (r"\.attention\.attention\.(q)uery\.", r".attention.\1_proj."),
    (r"\.attention\.attention\.(k)ey\.", r".attention.\1_proj."),
    (r"\.attention\.attention\.(v)alue\.", r".attention.\1_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"(layers\.\d+)\.intermediate\.dense\.", r"\1.mlp.fc1."),
    (r"(layers\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"(layers\.\d+)\.norm1\.", r"\1.layernorm_before."),
    (r"(layers\.\d+)\.norm2\.", r"\1.layernorm_after."),
    (r"^cls_classifier\.", "classifier."),
)
IGNORED = r"embeddings\.mask_token|pooler\..*"
GELUS = {"gelu": "erf", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh"}


def matches(names):
    """Whether these names are of this family."""
    kinds = ("", "vit.", "deit.", "dinov2.", "dinov2_with_registers.")
    return any(f"{kind}embeddings.patch_embeddings.projection.weight" in names for kind in kinds)


def canonical(checkpoint):
    """The checkpoint in one spelling.

    A DeiT file with a head for its class token alone uses the distillation token as a register:
    it becomes one.
    """

    def respelled(name):
        for old, new in RENAMED:
            name = re.sub(old, new, name)
        return None if re.fullmatch(IGNORED, name) else name

    checkpoint = checkpoint.renamed(respelled)
    names = checkpoint.tensors
    if "classifier.weight" in names and "distillation_classifier.weight" not in names:
        token, register = "embeddings.distillation_token", "embeddings.register_tokens"
        checkpoint = checkpoint.renamed(lambda name: register if name == token else name)
    return checkpoint


def describe(checkpoint, num_heads=None, image_size=None, channels=None):
    """The `Description` of a canonical checkpoint.

    Without config.json, heads are those of the variant of the same width, and the epsilon of the
    norms is 1e-6 for DINOv2 and 1e-12 for the others. Without preprocessor_config.json, pixels
    are normalised to [-1, 1] for ViT and with ImageNet's mean and standard deviation for others.
    With do_rescale=False in it, it does not say the range of the pixels: [0, 1] is assumed.
    """
    tensors, facts = checkpoint.tensors, checkpoint.config
    hidden_dim, channels, patch_size, _ = checkpoint.shape(
        "embeddings.patch_embeddings.projection.weight", 4
    )
    config = ViTConfig(
        hidden_dim,
        checkpoint.count("layers.{i}.layernorm_before.weight"),
        head_count(checkpoint, hidden_dim, facts.get("num_attention_heads"), num_heads),
        checkpoint.shape("layers.0.mlp.fc1.weight", 2)[0],
        patch_size,
    )
    class_token = "embeddings.cls_token" in tensors
    distilled = "embeddings.distillation_token" in tensors
    registers = 0
    if "embeddings.register_tokens" in tensors:
        registers = checkpoint.shape("embeddings.register_tokens", 3)[1]
    _, length, _ = checkpoint.shape("embeddings.position_embeddings", 3)
    slots = (class_token + distilled, class_token + distilled + registers)
    dinov2 = "layers.0.layer_scale1.lambda1" in tensors
    classes, features = 0, hidden_dim
    if "classifier.weight" in tensors:
        classes, features = checkpoint.shape("classifier.weight", 2)
    pooling = "token" if class_token else "gap"
    assumed = {}
    if not (num_heads or facts.get("num_attention_heads")):
        assumed["num_heads"] = config.num_heads
    normalization = _normalization(facts)
    if normalization is None:
        plain = not (dinov2 or distilled or registers)
        normalization = assumed["normalization"] = "minus_one_one" if plain else "imagenet"
    elif facts.get("do_rescale") is False:
        assumed["normalization"] = normalization
    epsilon = facts.get("layer_norm_eps")
    if epsilon is None:
        epsilon = assumed["layer_norm_epsilon"] = 1e-6 if dinov2 else 1e-12
    return Description(
        {
            "variant": config,
            "image_size": file_image_size(
                checkpoint, config, length, slots, facts.get("image_size"), image_size
            ),
            "num_classes": classes,
            "channels": channels,
            "pooling": pooling if features == hidden_dim else "token+gap",
            "class_token": class_token,
            "distillation_token": distilled,
            "num_registers": registers,
            "layer_scale": 1.0 if dinov2 else None,
            "qkv_bias": "layers.0.attention.q_proj.bias" in tensors,
            "gelu": _gelu(checkpoint),
            "layer_norm_epsilon": epsilon,
            "normalization": normalization,
        },
        # As DINOv2 with registers does, and the others do.
        interpolation="antialiased_bicubic" if registers and dinov2 else "bicubic",
        assumed=assumed,
    )


def _normalization(facts):
    """The normalisation of pixels in [0, 1] that the facts say, or None.

    (x r - mean) / std for pixels x in [0, 255] and the rescale_factor r, which is 1 / 255 as a
    rule: (x / 255 - s mean) / (s std) with s = 1 / (255 r).
    """
    if facts.get("do_normalize") is False:  # whatever mean and deviation stand beside it
        mean, std = [0.0], [1.0]
    elif facts.get("image_mean") and facts.get("image_std"):
        mean, std = facts["image_mean"], facts["image_std"]
    else:
        return None
    scale = 1 / (255 * facts.get("rescale_factor", 1 / 255))
    if facts.get("do_rescale") is not False and not math.isclose(scale, 1, rel_tol=1e-6):
        mean, std = ([scale * value for value in values] for values in (mean, std))
    return normalization_of(mean, std)


def _gelu(checkpoint):
    name = checkpoint.config.get("hidden_act", "gelu")
    if name not in GELUS:
        raise checkpoint.error(
            f"config.json must name an activation of {', '.join(GELUS)}. "
            f"Received: hidden_act={name!r}."
        )
    return GELUS[name]


def entries(weights, arguments):
    """Where each of our `weights` (paths) stands in a file of this family."""
    config = arguments["variant"]
    name = "embeddings.patch_embeddings.projection.weight"
    patch_kernel = convolution(name, config.patch_size)
    return torch_entries(weights, config.depth, MODULES, TENSORS, patch_kernel)
