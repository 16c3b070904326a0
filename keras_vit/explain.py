"""What a Vision Transformer looks at and what it has learned: attention, positions, filters.

Every function reads a trained model as it is: one of `build_vit`, or a model that has one as a
layer. Nothing is trained, copied or changed.

Shapes: L blocks, B images, N tokens: the prefix tokens (class and distillation token, registers),
then rows x columns patches. "Paper" is Dosovitskiy et al., arXiv 2010.11929.
"""

import dataclasses
import math

import keras
import numpy as np
from keras import ops

from keras_vit.config import check_positive_int
from keras_vit.layers import PatchEncoder, TransformerBlock, check_choice, watching_blocks
from keras_vit.positions import sincos2d

HEAD_FUSIONS = {"mean": np.mean, "max": np.max, "min": np.min}
_SHOWN_POSITIONS = 8  # rows and columns of small maps that a page has room for
_BRIGHTEST = 98  # percentile: a few patches of nothing draw much attention (arXiv 2309.16588)


@dataclasses.dataclass(frozen=True)
class PatchGrid:
    """Where the tokens of a model stand in its images.

    Args:
        rows: Rows of patches.
        columns: Columns of patches.
        patch_size: `(height, width)` of a patch in pixels of the ViT's images. A patch of a
            hybrid is a patch of its stem's feature map, with the pixels that this stands for.
        num_prefix_tokens: How many tokens stand before the patches.
        class_token: Whether the first of them is a class token.
    """

    rows: int
    columns: int
    patch_size: tuple[float, float]
    num_prefix_tokens: int = 1
    class_token: bool = True


def patch_grid(model):
    """The `PatchGrid` of a model.

    Args:
        model: A model of `build_vit`, or one that has one as a layer.

    Raises:
        ValueError: There is no ViT in `model`, or more than one.
    """
    vit, encoder = _parts(model)
    num_patches = encoder.input.shape[1]
    rows, columns = encoder.grid_size or (math.isqrt(num_patches),) * 2
    _, height, width, _ = vit.input_shape
    return PatchGrid(
        rows,
        columns,
        (height / rows, width / columns),
        num_prefix_tokens=encoder.output.shape[1] - num_patches,
        class_token=encoder.use_class_token,
    )


def attention_maps(model, images, *, batch_size=8):
    """The attention probabilities A = softmax(q k^T / sqrt(d)) of every block and head, Eq. 6.

    Example:

        maps = keras_vit.explain.attention_maps(model, images)
        heat = keras_vit.explain.attention_rollout(maps, keras_vit.explain.patch_grid(model))

    Args:
        model: A model of `build_vit`, or one that has one as a layer.
        images: `(B, H, W, C)`, as `model` takes them.
        batch_size: Images at a time. The backend holds the maps of one block of as many; the
            result takes 4 L B heads N^2 bytes of memory.

    Returns:
        NumPy array `(L, B, heads, N, N)`, rows are queries and sum to 1. It is float32, also of a
        model in half precision, whose queries and keys are taken as they are; float64 of a
        float64 model. Of a distillation token and registers too; the probe of pooling="map" is
        none of the tokens.

    Raises:
        ValueError: There is no ViT in `model`, or more than one, or one that is called more than
            once; or the images do not fit.

    Source: the paper, Appendix A.
    """

    def see(block, x):
        return ops.convert_to_numpy(block.attention.probabilities(block.norm1(x)))

    maps, done = None, 0
    for seen in _see_blocks(model, images, see, batch_size):
        for layer, a in enumerate(seen.values()):
            if maps is None:
                maps = np.empty((len(seen), len(images), *a.shape[1:]), a.dtype)
            maps[layer, done : done + len(a)] = a
        done += len(a)
    return maps


def features(model, images, *, layers=None, batch_size=32):
    """The tokens that layers of a model put out.

    Args:
        model: A model of `build_vit`, or one that has one as a layer.
        images: `(B, H, W, C)`, as `model` takes them.
        layers: Indices of blocks (-1 is the last) and names of layers: "patch_encoder", the
            blocks "block_0", ... and "encoder_norm", the last LayerNorm, unless it comes after
            the pooling. None: all blocks.
        batch_size: Images at a time.

    Returns:
        dict of name -> NumPy array `(B, N, D)`, float32 at least, in the order of `layers`.

    Raises:
        ValueError: There is no such layer, or as `attention_maps`.
    """
    vit, encoder = _parts(model)
    blocks = _blocks(vit)
    norm = next((layer for layer in vit.layers if layer.name == "encoder_norm"), None)
    names = [encoder.name, *blocks, *([] if norm is None else [norm.name])]
    wanted = _layer_names(range(len(blocks)) if layers is None else layers, list(blocks), names)

    taken_by = dict(zip([encoder.name, *blocks], blocks, strict=False))

    def tokens(name, seen):
        if name in taken_by:
            return seen[taken_by[name]]
        if name in blocks:
            # Called again, for in a model of `skip_unread_tokens` the last puts out fewer tokens.
            return blocks[name](seen[name], training=False)
        return norm(tokens(list(blocks)[-1], seen))

    parts = {name: [] for name in wanted}
    for seen in _see_blocks(model, images, lambda block, x: x, batch_size):
        for name in wanted:
            x = tokens(name, seen)
            x = ops.cast(x, keras.backend.result_type(x.dtype, "float32"))
            parts[name].append(ops.convert_to_numpy(x))
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def attention_rollout(maps, grid, *, head_fusion="mean", discard_ratio=0.0):
    """How much of the class token comes from each patch, through all blocks.

    rollout = A'_L ... A'_1 with A' = 0.5 A + 0.5 I, rows renormalised: A is a block's attention
    fused over its heads, and I stands for the residual connection.

    Args:
        maps: Of `attention_maps`, `(L, B, heads, N, N)`.
        grid: The `PatchGrid` of the model.
        head_fusion: "mean", "max" or "min" over the heads of a block.
        discard_ratio: Share in [0, 1) of the entries of each A, the lowest ones, that count as 0.

    Returns:
        `(B, rows, columns)`: what the class token takes from each patch; without a class token,
        the mean over the patches as queries. What is missing to a sum of 1 comes from the prefix
        tokens.

    Raises:
        ValueError: An argument is out of its range, or the maps are not of this grid.

    Source: Abnar & Zuidema, arXiv 2005.00928, Section 3, which takes the mean over the heads.
    The other fusions and the discarded entries are jacobgil/vit-explain's, which keeps the first
    entry of all and divides columns rather than rows.
    """
    maps = _check_maps(maps, grid)
    check_choice("head_fusion", head_fusion, tuple(HEAD_FUSIONS))
    if not 0 <= discard_ratio < 1:
        raise ValueError(
            f"`discard_ratio` must be in [0, 1). Received: discard_ratio={discard_ratio!r}."
        )
    # Of the product only some rows are read: it is a row vector times one matrix after the other.
    shares = np.broadcast_to(_queries(grid), (maps.shape[1], 1, maps.shape[-1]))
    for layer in maps[::-1]:
        a = HEAD_FUSIONS[head_fusion](layer, axis=1).astype("float64")  # (B, N, N)
        a = 0.5 * _without_lowest(a, discard_ratio) + 0.5 * np.eye(a.shape[-1])
        shares = shares @ (a / a.sum(axis=-1, keepdims=True))
    return shares[:, 0, grid.num_prefix_tokens :].reshape(-1, grid.rows, grid.columns)


def class_attention(maps, grid, *, layer=-1):
    """The attention of the class token to the patches in one block.

    Args:
        maps: Of `attention_maps`, `(L, B, heads, N, N)`.
        grid: The `PatchGrid` of the model.
        layer: Index of the block; -1 is the last.

    Returns:
        `(B, heads, rows, columns)`; without a class token, the mean over the patches as queries.

    Raises:
        ValueError: The maps are not of this grid, or there is no such block.

    Source: DINO, arXiv 2104.14294, Figure 1.
    """
    maps = _check_maps(maps, grid)
    if not -len(maps) <= layer < len(maps):
        raise ValueError(
            f"`layer` must be the index of one of {len(maps)} blocks. Received: layer={layer!r}."
        )
    _, batch, heads, _, _ = maps.shape
    attention = (_queries(grid) @ maps[layer])[:, :, 0, grid.num_prefix_tokens :]
    return attention.reshape(batch, heads, grid.rows, grid.columns)


def mean_attention_distance(maps, grid):
    """How far each head looks: the mean of sum_j A_ij |x_i - x_j| over patches i and images.

    x are the centres of the patches. Prefix tokens have no place: they are left out, and the rows
    of A are renormalised over the patches.

    Args:
        maps: Of `attention_maps`, `(L, B, heads, N, N)`.
        grid: The `PatchGrid` of the model.

    Returns:
        `(L, heads)` in pixels of the ViT's images.

    Raises:
        ValueError: The maps are not of this grid.

    Source: the paper, Figure 7 (right) and D.7.
    """
    maps = _check_maps(maps, grid)
    height, width = grid.patch_size
    y, x = np.mgrid[: grid.rows, : grid.columns].reshape(2, -1)
    distance = np.hypot((y[:, None] - y) * height, (x[:, None] - x) * width)  # (patches, patches)
    means = []
    for layer in maps:
        a = layer[..., grid.num_prefix_tokens :, grid.num_prefix_tokens :].astype("float64")
        # A head may give all of its attention to a register: its patches' is 0 in float32.
        total = np.maximum(a.sum(axis=-1), np.finfo("float64").tiny)
        means.append(np.mean(np.einsum("bhij,ij->bhi", a, distance) / total, axis=(0, 2)))
    return np.stack(means)


def position_similarity(model):
    """The cosine similarity of the position embedding of every patch with all others.

    Args:
        model: A model of `build_vit`, or one that has one as a layer.

    Returns:
        float64 array `(rows, columns, rows, columns)`, values in [-1, 1]; an embedding of zeros
        is similar to nothing.

    Raises:
        ValueError: There is no ViT in `model`, or more than one.

    Source: the paper, Figure 7 (centre).
    """
    grid = patch_grid(model)
    _, encoder = _parts(model)
    if encoder.position == "learned":
        table = ops.convert_to_numpy(encoder.position_embedding.value)[0].astype("float64")
        table = table[len(table) - grid.rows * grid.columns :]  # the first are of prefix tokens
    else:
        table = sincos2d((grid.rows, grid.columns), encoder.hidden_dim)
    norms = np.linalg.norm(table, axis=1, keepdims=True)
    table = table / np.maximum(norms, np.finfo("float64").tiny)
    return (table @ table.T).reshape(grid.rows, grid.columns, grid.rows, grid.columns)


def patch_filters(model, count=28):
    """The first principal components of the D filters that project a patch to a token.

    Args:
        model: A model of `build_vit`, or one that has one as a layer.
        count: How many, at most D and P * P * C.

    Returns:
        float64 array `(count, P, P, C)` of orthonormal filters, the strongest first; of the two
        signs the one whose entry of the greatest absolute value is positive.

    Raises:
        ValueError: `count` is out of its range; `model` is a hybrid, whose patches are not of
            pixels, or quantized; or there is no ViT in it, or more than one.

    Source: the paper, Figure 7 (left).
    """
    check_positive_int("count", count)
    vit, encoder = _parts(model)
    _, _, _, channels = vit.input_shape
    if encoder.projection.quantization_mode is not None:
        raise ValueError(
            "The filters are those of a model that is not quantized. "
            f"Received: {model.name!r}, {encoder.projection.quantization_mode}."
        )
    kernel = ops.convert_to_numpy(encoder.projection.kernel).astype("float64")  # (P P C, D)
    side = math.isqrt(len(kernel) // channels)
    if any(layer.name == "stem" for layer in vit.layers):
        raise ValueError(
            "The filters of a hybrid are those of its stem: its patches are not of pixels. "
            f"Received: {model.name!r}."
        )
    if count > min(kernel.shape):
        raise ValueError(
            f"`count` must be at most {min(kernel.shape)}, for {kernel.shape[1]} filters of "
            f"{len(kernel)} values. Received: count={count}."
        )
    kernel = kernel - kernel.mean(axis=1, keepdims=True)
    components = np.linalg.svd(kernel, full_matrices=False)[0].T[:count]
    strongest = np.take_along_axis(components, abs(components).argmax(axis=1)[:, None], axis=1)
    return (components * np.sign(strongest)).reshape(count, side, side, channels)


def _parts(model):
    """The ViT in a model, which may be the model itself, and its `PatchEncoder`."""
    if not isinstance(model, keras.Model):
        raise ValueError(f"`model` must be a keras.Model. Received: model={model!r}.")
    found = []
    for vit in _models(model):
        encoders = [layer for layer in vit.layers if isinstance(layer, PatchEncoder)]
        if len(encoders) == 1 and _blocks(vit) and getattr(vit, "inputs", None):
            found.append((vit, encoders[0]))
    if len(found) != 1:
        raise ValueError(
            "`model` must be one that `keras_vit.build_vit` made, or have one such model as a "
            f"layer. Received: {model.name!r}, in which there are {len(found)}, with the layers "
            f"{', '.join(layer.name for layer in model.layers)}."
        )
    return found[0]


def _models(model):
    """The model and all models within it, each once."""
    found = {id(model): model}
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            found |= {id(inner): inner for inner in _models(layer)}
    return list(found.values())


def _blocks(vit):
    return {layer.name: layer for layer in vit.layers if isinstance(layer, TransformerBlock)}


def _see_blocks(model, images, see, batch_size):
    """Runs the model; yields for each batch what `see(block, tokens)` says of each block."""
    vit, _ = _parts(model)
    blocks = _blocks(vit)
    check_positive_int("batch_size", batch_size)
    images = _check_images(model, images)
    if not model.built:  # the first call of a subclassed model traces it
        model(images[:1], training=False)
    for start in range(0, len(images), batch_size):
        seen, calls = {}, []

        def note(block, x, seen=seen, calls=calls):
            calls.append(block.name)
            seen[block.name] = see(block, x)

        with watching_blocks(note):
            model(images[start : start + batch_size], training=False)
        if calls != list(blocks):
            raise ValueError(
                f"The model must call each of the ViT's {len(blocks)} blocks once. Received: "
                f"{model.name!r}, which calls {len(calls)}: {', '.join(calls)}."
            )
        yield seen


def _check_images(model, images):
    """The images as an array, if the model takes such."""
    images = ops.convert_to_numpy(images)
    expected = (None, None, None, None)
    if getattr(model, "inputs", None):
        expected = tuple(model.inputs[0].shape)
    fits = len(images.shape) == len(expected) and all(
        size in (None, own) for size, own in zip(expected[1:], images.shape[1:], strict=True)
    )
    if not fits or len(images) == 0:
        sizes = ", ".join("any" if size is None else str(size) for size in expected[1:])
        raise ValueError(
            f"`images` must be of the shape (B, {sizes}), B at least 1. "
            f"Received: images of the shape {images.shape}."
        )
    return images


def _layer_names(layers, blocks, names):
    """The names that indices of blocks and names of layers stand for."""
    if isinstance(layers, str | int):
        layers = [layers]
    found = []
    for layer in layers:
        if isinstance(layer, int | np.integer) and -len(blocks) <= layer < len(blocks):
            layer = blocks[layer]
        if layer not in names:
            raise ValueError(
                f"`layers` must be indices of the {len(blocks)} blocks, or names: "
                f"{', '.join(names)}. Received: {layer!r}."
            )
        found.append(layer)
    return list(dict.fromkeys(found))  # an index and a name may stand for the same


def _check_maps(maps, grid):
    """The maps as an array, if they are of this grid."""
    maps = np.asarray(maps)
    tokens = grid.num_prefix_tokens + grid.rows * grid.columns
    if maps.ndim != 5 or maps.shape[3:] != (tokens, tokens):
        raise ValueError(
            f"`maps` must be those of `attention_maps`, (L, B, heads, {tokens}, {tokens}) for "
            f"{grid}. Received: maps of the shape {maps.shape}."
        )
    return maps


def _queries(grid):
    """The weights `(1, N)` of the tokens whose attention is read."""
    queries = np.zeros((1, grid.num_prefix_tokens + grid.rows * grid.columns))
    if grid.class_token:
        queries[0, 0] = 1
    else:
        queries[0, grid.num_prefix_tokens :] = 1 / (grid.rows * grid.columns)
    return queries


def _without_lowest(a, ratio):
    """`(B, N, N)` with the lowest share of the entries of each image set to 0."""
    count = int(ratio * a[0].size)
    if count == 0:
        return a
    flat = a.reshape(len(a), -1)
    lowest = np.argpartition(flat, count - 1, axis=1)[:, :count]
    np.put_along_axis(flat, lowest, 0, axis=1)
    return flat.reshape(a.shape)


def plot_attention(images, maps, *, captions=None):
    """Draws each picture, and beside it the same picture under its attention.

    Args:
        images: Pictures `(H, W, C)`, C = 1 or 3, which may differ in size; any values.
        maps: `(B, rows, columns)`, such as `attention_rollout` gives, or a dict of title -> such
            maps, which stand side by side. The brightest color is a map's 98th percentile.
        captions: Text beside each picture, or None.

    Returns:
        A matplotlib Figure with a row for each picture.

    Raises:
        ValueError: There is not one map and one caption for each picture.
    """
    maps = maps if isinstance(maps, dict) else {"attention": maps}
    captions = [""] * len(images) if captions is None else captions
    lengths = {len(images), len(captions), *map(len, maps.values())}
    if len(lengths) != 1 or not len(images):
        raise ValueError(
            "There must be a picture, and one map and one caption for each. Received: "
            f"{len(images)} pictures, {len(captions)} captions, "
            f"{', '.join(f'{len(m)} of {title!r}' for title, m in maps.items())}."
        )
    pictures = [_displayable(image) for image in images]
    heights = [picture.shape[0] / picture.shape[1] for picture in pictures]
    figure = _figure(3.2 * (1 + len(maps)), 3.1 * sum(heights) + 0.35 * len(images))
    rows = figure.subplots(
        len(images), 1 + len(maps), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for index, (picture, row) in enumerate(zip(pictures, rows, strict=True)):
        row[0].imshow(picture)
        row[0].set_title(captions[index], fontsize=10, parse_math=False)
        for (title, all_maps), axes in zip(maps.items(), row[1:], strict=True):
            _draw_heat(axes, picture, np.asarray(all_maps[index], "float64"))
            axes.set_title(title, fontsize=10, parse_math=False)
        for axes in row:
            axes.axis("off")
    return figure


def plot_attention_distance(distances):
    """Draws the mean attention distance of every head, by block, as the paper's Figure 7 (right).

    Args:
        distances: `(L, heads)` in pixels, of `mean_attention_distance`.

    Returns:
        A matplotlib Figure.

    Raises:
        ValueError: `distances` is not of rank 2.
    """
    distances = np.asarray(distances)
    if distances.ndim != 2:
        raise ValueError(f"`distances` must be (L, heads). Received: shape {distances.shape}.")
    depth, heads = distances.shape
    figure = _figure(6.5, 4)
    axes = figure.subplots()
    blocks = np.arange(1, depth + 1)
    dots = np.repeat(blocks, heads)
    axes.plot(dots, distances.reshape(-1), "o", alpha=0.6, markeredgewidth=0, label="a head")
    axes.plot(blocks, distances.mean(axis=1), "-", color="0.3", label="mean of the block")
    axes.set(xlabel="block", ylabel="mean attention distance (pixels)")
    axes.set_ylim(0, 1.05 * distances.max() or 1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def plot_position_similarity(similarity):
    """Draws a map for each patch: how similar its position is to all, as Figure 7 (centre).

    Args:
        similarity: `(rows, columns, rows, columns)`, of `position_similarity`. Of a grid of more
            than 8 rows or columns, 8 are shown, evenly spaced.

    Returns:
        A matplotlib Figure.

    Raises:
        ValueError: `similarity` is not of such a shape.
    """
    similarity = np.asarray(similarity)
    if similarity.ndim != 4 or similarity.shape[:2] != similarity.shape[2:]:
        raise ValueError(
            "`similarity` must be (rows, columns, rows, columns). "
            f"Received: shape {similarity.shape}."
        )
    ys, xs = (_spread(size) for size in similarity.shape[:2])
    tiles = _tiled(similarity[np.ix_(ys, xs)])
    aspect = tiles.shape[0] / tiles.shape[1]
    figure = _figure(6.4, max(4.7 * aspect + 0.6, 2))
    axes = figure.subplots()
    image = axes.imshow(tiles, cmap="viridis", vmin=-1, vmax=1, interpolation="nearest")
    pitch = np.array(similarity.shape[2:]) + _gap(similarity.shape[2:])
    centre = (np.array(similarity.shape[2:]) - 1) / 2
    axes.set_yticks(np.arange(len(ys)) * pitch[0] + centre[0], ys + 1)
    axes.set_xticks(np.arange(len(xs)) * pitch[1] + centre[1], xs + 1)
    axes.set(xlabel="column of the patch", ylabel="row of the patch")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, label="cosine similarity")
    return figure


def plot_patch_filters(filters):
    """Draws filters of RGB or gray patches, each around middle gray, as Figure 7 (left).

    Args:
        filters: `(count, P, P, C)`, C = 1 or 3, of `patch_filters`.

    Returns:
        A matplotlib Figure.

    Raises:
        ValueError: `filters` is not of such a shape.
    """
    filters = np.asarray(filters)
    if filters.ndim != 4 or filters.shape[-1] not in (1, 3):
        raise ValueError(
            f"`filters` must be (count, P, P, C), C = 1 or 3. Received: shape {filters.shape}."
        )
    columns = min(7, len(filters))
    rows = -(-len(filters) // columns)
    scale = np.maximum(abs(filters).max(axis=(1, 2, 3), keepdims=True), np.finfo("float64").tiny)
    shown = np.full((rows * columns, *filters.shape[1:3], 3), np.nan)
    shown[: len(filters)] = 0.5 + 0.5 * filters / scale
    tiles = _tiled(shown.reshape(rows, columns, *shown.shape[1:]))
    figure = _figure(0.9 * columns, 0.9 * rows)
    axes = figure.subplots()
    axes.imshow(np.nan_to_num(tiles, nan=1.0), interpolation="nearest")
    axes.axis("off")
    return figure


def _figure(width, height):
    """A matplotlib Figure of a size in inches. Nothing else here needs matplotlib."""
    import matplotlib.figure

    return matplotlib.figure.Figure(figsize=(width, height), layout="compressed")


def _displayable(image):
    """RGB in [0, 1] of an image in [0, 255] or [0, 1]; one that is normalised is stretched."""
    image = ops.convert_to_numpy(image)
    if image.ndim != 3 or image.shape[-1] not in (1, 3):
        raise ValueError(f"A picture must be (H, W, C), C = 1 or 3. Received: shape {image.shape}.")
    whole = image.dtype.kind in "iu"
    image = image.astype("float64")
    low, high = image.min(), image.max()
    if low < 0 or high > 255:
        image = (image - low) / max(high - low, np.finfo("float64").tiny)
    elif whole or high > 1:
        image = image / 255
    return np.broadcast_to(image, (*image.shape[:2], 3))


def _draw_heat(axes, picture, heat):
    """A picture in gray under its map."""
    height, width, _ = picture.shape
    axes.imshow(picture @ (0.299, 0.587, 0.114), cmap="gray", vmin=0, vmax=1)
    axes.imshow(
        np.minimum(heat, np.percentile(heat, _BRIGHTEST)),  # before it is interpolated
        cmap="inferno",
        alpha=0.6,
        interpolation="bilinear",
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
    )


def _spread(size):
    """At most `_SHOWN_POSITIONS` indices of an axis, evenly spaced."""
    return np.unique(np.linspace(0, size - 1, min(size, _SHOWN_POSITIONS)).round().astype(int))


def _gap(shape):
    return max(1, round(max(shape) / 8))


def _tiled(tiles):
    """Tiles `(R, S, h, w, ...)` in one array, NaN between them."""
    rows, columns, height, width = tiles.shape[:4]
    gap = _gap((height, width))
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap, *tiles.shape[4:])
    array = np.full(shape, np.nan)
    for row in range(rows):
        for column in range(columns):
            y, x = row * (height + gap), column * (width + gap)
            array[y : y + height, x : x + width] = tiles[row, column]
    return array
