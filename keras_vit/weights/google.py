"""Google's checkpoints: google-research/vision_transformer and google-research/big_vision.

Their arrays have the shapes of Flax: dense kernels are (in, out) as ours, and attention's are split
by head. The two code bases differ in where the positions stand and in the numbers of the layers of
a block, and name the rest alike.

Sources: vision_transformer `models_vit.py`, `models_resnet.py`, `checkpoint.py`; big_vision
`models/vit.py`.
"""

import dataclasses
import re

from keras_vit.config import ViTConfig
from keras_vit.weights.checkpoint import MAX_DEPTH, Tensor
from keras_vit.weights.description import (
    Description,
    file_image_size,
    head_count,
    normalization_of,
)
from keras_vit.weights.entries import reshaped, same

NAME = "google"
# What the original code always computes.
FIXED = {"gelu": "tanh", "layer_norm_epsilon": 1e-6, "qkv_bias": True}
# Pooling -> whether the original code then has tokens before the patches.
POOLINGS = {"token": (True,), "gap": (False,), "map": (False,)}

PREFIXES = ("opt/target/", "params/img/", "params/", "img/", "")

ATTENTION = "MultiHeadDotProductAttention_0"
LAYERS = {
    "patch_encoder/projection": "embedding",
    "block_{i}/norm1": "Transformer/encoderblock_{i}/LayerNorm_0",
    "block_{i}/norm2": "Transformer/encoderblock_{i}/LayerNorm_1",
    "block_{i}/feed_forward/fc1": "Transformer/encoderblock_{i}/MlpBlock_0/Dense_0",
    "block_{i}/feed_forward/fc2": "Transformer/encoderblock_{i}/MlpBlock_0/Dense_1",
    "encoder_norm": "Transformer/encoder_norm",
    "pooling/norm": "MAPHead_0/LayerNorm_0",
    "pooling/feed_forward/fc1": "MAPHead_0/MlpBlock_0/Dense_0",
    "pooling/feed_forward/fc2": "MAPHead_0/MlpBlock_0/Dense_1",
    "pre_logits": "pre_logits",
    "head": "head",
}
# Our layer -> the attention it belongs to, and those of its parts that stand side by side in ours.
ATTENTIONS = {
    "block_{i}/attention/qkv": ("Transformer/encoderblock_{i}", ("query", "key", "value")),
    "block_{i}/attention/proj": ("Transformer/encoderblock_{i}", ("out",)),
    "pooling/query": ("MAPHead_0", ("query",)),
    "pooling/key_value": ("MAPHead_0", ("key", "value")),
    "pooling/proj": ("MAPHead_0", ("out",)),
}
TENSORS = {
    "patch_encoder/class_token": "cls",
    "patch_encoder/position_embedding": "Transformer/posembed_input/pos_embedding",
    "pooling/probe": "MAPHead_0/probe",
}
LEAVES = {"kernel": "kernel", "bias": "bias", "gamma": "scale", "beta": "bias"}


def matches(names):
    """Whether these names are of this family."""
    return any(
        f"{prefix}embedding/kernel" in names and f"{prefix}Transformer/encoder_norm/scale" in names
        for prefix in PREFIXES
    )


def canonical(checkpoint):
    """The checkpoint in one spelling: no prefix, blocks apart, layers numbered by kind."""
    names = checkpoint.tensors
    prefix = next(p for p in PREFIXES if f"{p}embedding/kernel" in names)
    # With a prefix, what stands outside it is another thing: optimizer state, a text tower.
    checkpoint = checkpoint.renamed(
        lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None
    )
    checkpoint = _unstacked(checkpoint).renamed(_respelled)
    for name, tensor in checkpoint.tensors.items():
        if re.search(r"gn(\d|_root|_proj)/(scale|bias)$", name):  # (1, 1, 1, C) in old files
            checkpoint = checkpoint.reshaped(name, tensor.shape[-1:])
    return checkpoint


def _respelled(name):
    if name in ("pos_embedding", "Transformer/pos_embedding"):
        return TENSORS["patch_encoder/position_embedding"]
    name = name.replace("/LayerNorm_2/", "/LayerNorm_1/").replace("/MlpBlock_3/", "/MlpBlock_0/")
    return name.replace("/MultiHeadDotProductAttention_1/", f"/{ATTENTION}/")


def _unstacked(checkpoint):
    """The blocks that `nn.scan` stacked on axis 0, one by one."""
    stack = "Transformer/encoderblock/"
    tensors, last = {}, {}
    for name, tensor in checkpoint.tensors.items():
        if not name.startswith(stack):
            tensors[name] = tensor
            continue
        depth = tensor.shape[0] if tensor.shape else 0
        if depth > MAX_DEPTH:
            raise checkpoint.error(
                f"a model has at most {MAX_DEPTH:,} blocks. Received: {depth:,}."
            )
        for i in range(depth):
            layer = name.removeprefix(stack)
            tensors[f"Transformer/encoderblock_{i}/{layer}"] = Tensor(
                tensor.name, tensor.shape[1:], _slice_reader(tensor, i, last)
            )
    return dataclasses.replace(checkpoint, tensors=tensors)


def _slice_reader(tensor, i, last):
    """Reads one slice of a stack.

    `last` keeps the stacks that were read last: three, as a weight is of queries, keys and values.
    """

    def read():
        if tensor.name not in last:
            if len(last) == 3:
                del last[next(iter(last))]
            last[tensor.name] = tensor.read()
        return last[tensor.name][i]

    return read


def describe(checkpoint, num_heads=None, image_size=None, channels=None):
    """The `Description` of a canonical checkpoint.

    Only the image size of fixed positions is not in the file: 224 pixels, unless it is one of the
    public files, `save_checkpoint` wrote it, or `image_size` says otherwise.
    """
    block = "Transformer/encoderblock_0"
    tensors = checkpoint.tensors
    patch_size, _, channels, hidden_dim = checkpoint.shape("embedding/kernel", 4)
    _, heads, head_dim = checkpoint.shape(f"{block}/{ATTENTION}/query/kernel", 3)
    stem = {}
    if "conv_root/kernel" in tensors:
        _, _, channels, width = checkpoint.shape("conv_root/kernel", 4)
        stem = {"stem_units": _stem_units(checkpoint), "stem_width": width}
    config = ViTConfig(
        hidden_dim,
        checkpoint.count("Transformer/encoderblock_{i}/LayerNorm_0/scale"),
        head_count(checkpoint, hidden_dim, heads, num_heads),
        checkpoint.shape(f"{block}/MlpBlock_0/Dense_0/kernel", 2)[1],
        patch_size,
        head_dim=None if heads * head_dim == hidden_dim else head_dim,
        **stem,
    )
    class_token = "cls" in tensors
    pooling = "token" if class_token else "gap"
    positions = TENSORS["patch_encoder/position_embedding"]
    known, assumed = checkpoint.config.get("image_size"), {}
    if positions in tensors:
        _, length, _ = checkpoint.shape(positions, 3)
        # big_vision adds its positions to patches alone, before the class token stands there; its
        # files from before 2022 do not.
        slots = (0, 1) if class_token else (0,)
        if class_token and "posembed_input" in tensors[positions].name:
            slots = (1,)
        image_size = file_image_size(checkpoint, config, length, slots, known, image_size)
    elif image_size is None:
        image_size = known or 224
        assumed = {} if known else {"image_size": image_size}
    return Description(
        {
            "variant": config,
            "image_size": image_size,
            "num_classes": checkpoint.outputs("head/bias", "head/kernel", 1),
            "channels": channels,
            "pooling": "map" if "MAPHead_0/probe" in tensors else pooling,
            "class_token": class_token,
            "position": "learned" if positions in tensors else "sincos2d",
            "representation_size": (
                checkpoint.shape("pre_logits/bias")[0] if "pre_logits/bias" in tensors else None
            ),
            "normalization": _normalization(checkpoint.config),
            **FIXED,
        },
        interpolation="linear",
        assumed=assumed,
    )


def _normalization(facts):
    """A public file's by name, that of `save_checkpoint` in numbers, or what Google's code does."""
    known = facts.get("normalization", "minus_one_one")
    return normalization_of(*known) if isinstance(known, list) else known


def _stem_units(checkpoint):
    """The bottleneck units of each stage of a hybrid's stem."""
    units = []
    while count := checkpoint.count(f"block{len(units) + 1}/unit{{i}}/conv1/kernel", first=1):
        units.append(count)
    return tuple(units)


def entries(weights, arguments):
    """Where each of our `weights` (paths) stands in a file of this family."""
    rows = {}
    for weight in weights:
        layer, _, leaf = weight.rpartition("/")
        block = re.match(r"block_(\d+)/", layer)
        i = block.group(1) if block else None
        row = layer.replace(f"block_{i}/", "block_{i}/")
        if weight in TENSORS:
            rows[weight] = same(TENSORS[weight])
        elif leaf not in LEAVES:  # of a quantized layer, say
            continue
        elif row in ATTENTIONS:
            rows[weight] = _attention(*ATTENTIONS[row], i, leaf, arguments["variant"])
        elif row in LAYERS and row == "patch_encoder/projection" and leaf == "kernel":
            rows[weight] = _patch_kernel(arguments)
        elif row in LAYERS:
            rows[weight] = same(f"{LAYERS[row].format(i=i)}/{LEAVES[leaf]}")
        elif layer.startswith("stem/"):
            rows[weight] = same(f"{_stem_layer(layer)}/{LEAVES[leaf]}")
    return rows


def _attention(parent, parts, i, leaf, config):
    """A kernel or bias of an attention, which Flax splits by head."""
    names = tuple(f"{parent.format(i=i)}/{ATTENTION}/{part}/{leaf}" for part in parts)
    heads = config.num_heads
    dim = config.hidden_dim // heads
    if parent != "MAPHead_0" and config.head_dim is not None:
        dim = config.head_dim
    if parts == ("out",):
        if leaf == "bias":
            return same(*names)
        return reshaped(names, (heads * dim, -1), (heads, dim, -1))
    if leaf == "bias":
        return reshaped(names, (heads * dim,), (heads, dim))
    return reshaped(names, (-1, heads * dim), (-1, heads, dim))


def _patch_kernel(arguments):
    size = arguments["variant"].patch_size
    dim = arguments["variant"].hidden_dim
    return reshaped(("embedding/kernel",), (-1, dim), (size, size, -1, dim))


def _stem_layer(layer):
    """`stem/block1_unit2/conv3` -> `block1/unit2/conv3`."""
    return layer.removeprefix("stem/").replace("_unit", "/unit")
