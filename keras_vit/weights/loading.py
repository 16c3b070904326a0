"""Checkpoints into models and back."""

import math
import warnings

import keras
import numpy as np

from keras_vit.config import check_positive_int
from keras_vit.model import NORMALIZATIONS, build_vit, check_whole, vit_arguments
from keras_vit.positions import resize_positions
from keras_vit.weights import google, huggingface, lucidrains, timm
from keras_vit.weights.checkpoint import listed, open_checkpoint
from keras_vit.weights.description import grid_of, normalization_of
from keras_vit.weights.sources import checkpoint_facts, local_path

FAMILIES = (google, timm, huggingface, lucidrains)
HEAD = ("pre_logits/", "head/", "head_distillation/")
HEAD_WEIGHTS = tuple(f"{layer}{leaf}" for layer in HEAD for leaf in ("kernel", "bias"))
POSITIONS = "patch_encoder/position_embedding"
REGISTERS = "patch_encoder/registers"


def from_checkpoint(
    path,
    *,
    num_classes=None,
    image_size=None,
    num_heads=None,
    interpolation=None,
    **overrides,
):
    """Builds the model that a public checkpoint is of, with its weights.

    Example:

        model = keras_vit.from_checkpoint("hf://google/vit-base-patch16-224")
        features = keras_vit.from_checkpoint("dinov2_vits14.safetensors", num_classes=0)

    Args:
        path: A .npz or .safetensors file, the index of a sharded one, a folder with one of them,
            "hf://owner/name[/file]" or an "https://" address. The families are Google's (both
            vision_transformer and big_vision), timm, Hugging Face (ViT, DeiT, DINOv2) and
            lucidrains' vit-pytorch.
        num_classes: None: the head of the file. 0: no head, the model gives pooled features
            `(B, D)` (`(B, 2 D)` for DINOv2 with its classifier). Another number than the file's:
            a new head of zeros. `pre_logits` goes with the file's head.
        image_size: Side of the images in pixels, or `(height, width)`; None: the file's. The
            positions are resized to it. Of as many patches as the file has, in another grid than
            the square one, it is an error unless the configuration says the file's size.
        num_heads: Attention heads, for files that do not say (timm, lucidrains, Hugging Face's
            without their config.json); None: those of the variant of the same width, and in
            lucidrains' attention as many as are 64 wide. A number that contradicts the file is an
            error.
        interpolation: How positions are resized, see `keras_vit.positions.resize_positions`;
            None: as the family's own code does.
        **overrides: Other arguments of `build_vit`, such as `drop_path=0.1`,
            `normalization=None` for images that come normalised, or `channels=4` for lucidrains'
            files, which do not say it.

    Returns:
        A model of `build_vit`. It takes images in [0, 255] unless `normalization` is None.

    Raises:
        ValueError: The file is of no known family, is damaged, holds values that are not finite,
            or its tensors do not make a model; says which.
        TypeError: An override is not an argument of `build_vit`.

    Warns:
        UserWarning: The file does not say an argument, and a family's habit was taken.
    """
    asked = {"num_heads": num_heads, "channels": overrides.get("channels")}
    for name, value in asked.items():
        if value is not None:
            check_positive_int(name, value)
    asked["image_size"] = image_size
    checkpoint, family = _open(path)
    description = _description(checkpoint, family, asked)
    arguments = dict(description.arguments)
    if image_size is not None:
        arguments["image_size"] = image_size
    if num_classes == 0 or num_classes not in (None, arguments["num_classes"]):
        arguments |= {"num_classes": num_classes, "representation_size": None}
    try:
        model = build_vit(**{**arguments, **overrides})
    except ValueError as error:
        raise checkpoint.error(error) from error
    _load(model, checkpoint, family, description, interpolation)
    assumed = {k: value for k, value in description.assumed.items() if k not in overrides}
    if assumed:
        took = ", ".join(f"{name}={value!r}" for name, value in assumed.items())
        warnings.warn(
            f"{checkpoint.path} does not say its {' and '.join(assumed)}: took {took}. Pass "
            f"{' and '.join(assumed)} to be sure.",
            stacklevel=2,
        )
    return model


def load_weights(model, path, *, interpolation=None):
    """Loads a public checkpoint into a model of `build_vit`.

    The positions are resized to the model's patches. The head is left as it is if the file has
    none or one of another number of classes. The model is not changed if anything is wrong.

    Example:

        model = keras_vit.build_vit("S/14", image_size=224, num_classes=10, layer_scale=1e-5)
        keras_vit.load_weights(model, "dinov2_vits14.safetensors")

    Args:
        model: A model of `build_vit`.
        path: As in `from_checkpoint`.
        interpolation: As in `from_checkpoint`.

    Raises:
        ValueError: As `from_checkpoint`; also if the tensors do not fit the model, with the names
            of those that are missing, unexpected and mis-shaped.

    Warns:
        UserWarning: The file says that it was made with another GELU, epsilon or normalisation
            than the model's, or its head with another pooling; or it does not say its head count,
            and the model's is not that of `from_checkpoint`.
    """
    arguments = vit_arguments(model)
    checkpoint, family = _open(path)
    # Before the file is described: a model of another size is told by the names of its tensors.
    try:
        _check_fit(checkpoint, family, _without_head(weights_by_path(model)), arguments, arguments)
    except ValueError as error:
        raise ValueError(
            f"{error}\n`keras_vit.from_checkpoint` builds the model that the file is of."
        ) from error
    asked = {name: arguments[name] for name in ("image_size", "channels")}
    asked["num_heads"] = arguments["variant"].num_heads
    description = _description(checkpoint, family, asked)
    _load(model, checkpoint, family, description, interpolation)
    heads = _usual_heads(checkpoint, family, asked)
    if heads not in (None, arguments["variant"].num_heads):
        warnings.warn(
            f"{checkpoint.path} does not say its head count: `from_checkpoint` would take "
            f"num_heads={heads}, and the model has num_heads={arguments['variant'].num_heads}. "
            "With another one than the file's it computes something else.",
            stacklevel=2,
        )
    for name, (ours, theirs) in _differences(arguments, description).items():
        warnings.warn(
            f"{checkpoint.path} was made with {name}={theirs!r}, and the model has "
            f"{name}={ours!r}: it computes something else.",
            stacklevel=2,
        )


def resize_model(model, image_size, *, interpolation="antialiased_bicubic"):
    """The same trained model for images of another size: the positions are resized.

    Args:
        model: A model of `build_vit`.
        image_size: Side of the images in pixels, or `(height, width)`.
        interpolation: See `keras_vit.positions.resize_positions`.

    Returns:
        A new model with the other weights as they are, frozen where the model's are.

    Raises:
        ValueError: `model` is not of `build_vit`, or has other layers too, another head than
            `build_vit` makes, or quantized or LoRA weights; or the size does not divide into
            patches.
    """
    check_whole(model)
    arguments = vit_arguments(model)
    new_arguments = {**arguments, "image_size": image_size}
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(model.get_layer("patch_encoder").dtype_policy)
    try:
        new = build_vit(**new_arguments)
    finally:
        keras.config.set_dtype_policy(policy)
    old_weights = weights_by_path(model)
    if different := sorted(set(old_weights) ^ set(weights_by_path(new))):
        raise ValueError(
            "`model` must be as `build_vit` makes it, neither quantized nor with LoRA. "
            f"Received: a model with other weights, {listed(different)}."
        )
    for name, weight in weights_by_path(new).items():
        value = keras.ops.convert_to_numpy(old_weights[name].value)
        if name == POSITIONS:
            value = _resized(value, grid_of(arguments), grid_of(new_arguments), interpolation)
        weight.assign(value)
    for layer in new.layers:
        layer.trainable = model.get_layer(layer.name).trainable
    for name, weight in weights_by_path(new).items():
        weight.trainable = old_weights[name].trainable
    return new


def _open(path):
    """The checkpoint in its family's canonical spelling, and the family."""
    checkpoint = open_checkpoint(local_path(path))
    checkpoint.config.update(checkpoint_facts(path))
    for family in FAMILIES:
        if family.matches(checkpoint.tensors):
            return family.canonical(checkpoint), family
    raise checkpoint.error(
        f"its tensors are of no known family ({', '.join(f.NAME for f in FAMILIES)}). "
        f"Received: {listed(checkpoint.tensors)}."
    )


def _description(checkpoint, family, asked):
    """What the file says of its model, if that model can be in it: larger ones are not built."""
    try:
        description = family.describe(checkpoint, **asked)
    except ValueError as error:
        raise checkpoint.error(error) from error
    held = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    needed = _least_size(description.arguments)
    if needed > held:
        raise checkpoint.error(
            f"the file holds fewer numbers than a model of its shapes. Received: {held:,}."
        )
    return description


def _usual_heads(checkpoint, family, asked):
    """The head count that `from_checkpoint` would take, or None if it would ask for one."""
    try:
        description = family.describe(checkpoint, **{**asked, "num_heads": None})
    except ValueError:
        return None
    return description.arguments["variant"].num_heads


def _least_size(arguments):
    """The numbers in some of the kernels of each part of a model with these arguments."""
    config, features = arguments["variant"], arguments.get("representation_size")
    width, channels = config.hidden_dim, arguments["channels"]
    heads = config.num_heads * (config.head_dim or width // config.num_heads)
    size = config.depth * width * (heads + config.mlp_dim)
    size += width * (features or 0) + (features or width) * arguments["num_classes"]
    if config.stem_units is not None:
        channels = config.stem_width
    if config.stem_units:
        channels *= 4 * 2 ** (len(config.stem_units) - 1)
        size += channels**2 // 4
    return size + config.patch_size**2 * channels * width


def _differences(arguments, description):
    """What a model computes otherwise than its file says: name -> (the model's, the file's)."""
    theirs = description.arguments
    names = ["gelu", "layer_norm_epsilon"]
    if arguments["num_classes"] == theirs["num_classes"] != 0:
        names.append("pooling")
    if arguments["normalization"] is not None and theirs["normalization"] is not None:
        names.append("normalization")
        arguments = {**arguments, "normalization": normalization_of(*arguments["normalization"])}
    return {
        name: (arguments[name], theirs[name])
        for name in names
        if name not in description.assumed and not _same(name, arguments[name], theirs[name])
    }


def _same(name, ours, theirs):
    """Whether two values of an argument are the same, normalisations but for rounding."""
    if name != "normalization" or ours == theirs:
        return ours == theirs
    ours, theirs = (NORMALIZATIONS[n] if isinstance(n, str) else n for n in (ours, theirs))
    return all(
        (1 in (len(a), len(b)) or len(a) == len(b)) and np.allclose(a, b, rtol=0, atol=1e-9)
        for a, b in zip(ours, theirs, strict=True)
    )


def _load(model, checkpoint, family, description, interpolation):
    """Checks that everything fits and is finite, and only then assigns it."""
    weights, described = weights_by_path(model), description.arguments
    arguments = vit_arguments(model)
    if arguments["num_classes"] != described["num_classes"]:
        weights = _without_head(weights, described.get("representation_size") is not None)
    entries = _check_fit(checkpoint, family, weights, arguments, described)
    names = [name for entry in entries.values() for name in entry.names]
    # By their place in the file: of stacked blocks, each stack is read once.
    for name in sorted(names, key=lambda name: checkpoint.tensors[name].name):
        if not np.isfinite(_read(checkpoint, name)).all():
            raise checkpoint.error(f"{name} holds values that are not finite.")

    def value(weight):
        return entries[weight].load([_read(checkpoint, name) for name in entries[weight].names])

    placed = {}  # before anything is assigned, for it can fail
    if POSITIONS in weights:
        registers = value(REGISTERS) if REGISTERS in weights else None
        placed = _place(
            value(POSITIONS),
            registers,
            grid_of(described),
            arguments,
            interpolation or description.interpolation,
        )
    for name in sorted(weights, key=lambda name: checkpoint.tensors[entries[name].names[0]].name):
        weights[name].assign(placed[name] if name in placed else value(name))


def _read(checkpoint, name):
    """A tensor in float32; what is too large for it becomes infinite."""
    with np.errstate(over="ignore"):
        return checkpoint.tensors[name].read().astype("float32", copy=False)


def _without_head(weights, pre_logits=False):
    """Weights without those of the head; `pre_logits` may stay."""
    head = HEAD[1:] if pre_logits else HEAD
    return {name: weight for name, weight in weights.items() if not name.startswith(head)}


def _check_fit(checkpoint, family, weights, arguments, described):
    """Where the weights stand in the file; its head may be left over if they have none.

    ValueError with the names of the tensors that keep the file from fitting the model.
    """
    tensors = checkpoint.tensors
    entries = family.entries(weights, arguments)
    has_head = any(name.startswith("head/") for name in weights)
    spare = {} if has_head else family.entries(HEAD_WEIGHTS, described)
    missing = [weight for weight in weights if weight not in entries]
    misshaped, used = [], set()
    for weight, entry in entries.items():
        shapes = entry.shapes(tuple(weights[weight].shape))
        for name, expected in zip(entry.names, shapes, strict=True):
            used.add(name)
            if name not in tensors:
                missing.append(name)
                continue
            shape = tensors[name].shape
            if weight == POSITIONS:  # of any number
                expected = (1, shape[1] if len(shape) == 3 else -1, expected[2])
            if shape != expected:
                misshaped.append(f"{name} {shape}, expected {expected}")
    used |= {name for entry in spare.values() for name in entry.names}
    unexpected = [tensor.name for name, tensor in tensors.items() if name not in used]
    problems = [
        f"  {kind} ({len(names)}): {listed(names)}"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("mis-shaped", misshaped),
        )
        if names
    ]
    if problems:
        raise checkpoint.error(
            f"the file (of the family {family.NAME}) does not fit the model.\n"
            + "\n".join(problems)
        )
    return entries


def _place(table, registers, grid_size, arguments, interpolation):
    """Our positions, and registers if there are any, from a file's table of positions.

    The first rows of the table `(1, ., D)` are of the class and the distillation token, and may be
    of the registers, which take them into themselves. If there are none (big_vision and timm's
    `no_embed_class` add positions to patches alone), those tokens have the position 0.
    """
    tokens = arguments["class_token"] + arguments["distillation_token"]
    slots = table.shape[1] - grid_size[0] * grid_size[1]
    if slots == 0:
        table = np.concatenate([np.zeros_like(table[:, :1])] * tokens + [table], axis=1)
    elif slots > tokens:
        registers = registers + table[:, tokens:slots]
        table = np.concatenate([table[:, :tokens], table[:, slots:]], axis=1)
    placed = {POSITIONS: _resized(table, grid_size, grid_of(arguments), interpolation)}
    return placed if registers is None else {**placed, REGISTERS: registers}


def _resized(table, grid_size, new_grid_size, interpolation):
    """Positions `(1, T + N, D)`: those of the T first tokens are kept, the grid is resized."""
    tokens = table.shape[1] - grid_size[0] * grid_size[1]
    patches = resize_positions(table[0, tokens:], grid_size, new_grid_size, interpolation)
    return np.concatenate([table[:, :tokens], patches[None]], axis=1)


def weights_by_path(model):
    """The weights of a model by path, without the state of its random generators.

    Nor with the name scope in which the model was made, if there was one.
    """
    scope = model.get_layer("patch_encoder").path.removesuffix("patch_encoder")
    return {w.path.removeprefix(scope): w for w in model.weights if "seed_generator" not in w.path}
