"""`explain`: a page that shows what a trained model looks at in pictures, and what it learned.

The folder of an explanation:

index.html                the page, with its pictures inside
NN-NAME.png               a picture, and where the model looks in it
attention_distance.png    how far each head looks
position_similarity.png   how similar the positions of patches are
patch_filters.png         principal components of the patch projection; a hybrid has none
explanation.json          the predictions and the distances
"""

import base64
import html
import pathlib
import re

import numpy as np
from rich import progress
from rich.console import Console

from keras_vit import explain as measures
from keras_vit.config import check_positive_int
from keras_vit.data import read_image
from keras_vit.data.folder import check_images, find_images
from keras_vit.data.pipeline import resize
from keras_vit.files import check_replaceable, replacing, shown, write_json, write_text
from keras_vit.model import vit_arguments
from keras_vit.training.backbone import load_backbone
from keras_vit.training.evaluation import predict
from keras_vit.training.run import load_run
from keras_vit.versions import versions
from keras_vit.weights import resize_model

IMAGES = 24
TOP = 5
# Without it, what every patch attends to a little hides the rest.
DISCARD_RATIO = 0.9
_SHOWN_PIXELS = 480  # of the longer side of a picture
_FILTERS = 28
_DPI = 110

_CAPTIONS = {
    "attention_distance.png": "Mean attention distance of each head over these pictures: "
    "small values are heads that look nearby.",
    "position_similarity.png": "Cosine similarity of the position of a patch with those of all "
    "patches, one map for each patch.",
    "patch_filters.png": "Principal components of the filters that project a patch to a token, "
    "the strongest first.",
}

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff; }
section { display: flex; flex-wrap: wrap; gap: 0 2rem; align-items: center;
          border-top: 1px solid #ddd; padding: 1rem 0; }
h2 { flex-basis: 100%; font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
img { max-width: 100%; }
section img { flex: 1 1 34rem; min-width: 0; }
figure { margin: 2rem 0; }
td { padding-right: 1rem; }
td:last-child { text-align: right; font-variant-numeric: tabular-nums; }
"""


def explain(
    source,
    images,
    out,
    *,
    image_size=None,
    num_heads=None,
    normalization=None,
    count=IMAGES,
    skip_unreadable=False,
    overwrite=False,
):
    """Writes a page that shows what a model looks at in pictures, see `keras_vit.explain`.

    Args:
        source: A run folder, or a checkpoint as `keras_vit.from_checkpoint` takes it.
        images: Image files, and folders with image files in them or below.
        out: The folder to write, which appears when it is complete.
        image_size: Side of the images in pixels, or `(height, width)`; None: the model's.
        num_heads: Attention heads, for checkpoints that do not say.
        normalization: As in `build_vit`; None: what the checkpoint says.
        count: How many images at most, the first ones.
        skip_unreadable: Leave out images that cannot be read.
        overwrite: Whether an earlier explanation at `out` is replaced.

    Returns:
        The `pathlib.Path` of the page.

    Raises:
        ValueError: `out` exists, there are no images, one cannot be read, the source is neither a
            run nor a checkpoint, or an argument is for the other of the two.
    """
    check_positive_int("count", count)
    out = pathlib.Path(out)
    check_replaceable(out, "explanation.json", "explain", overwrite)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    files = find_images(images, out)
    if len(files) > count:
        console.print(f"the first {count} of {len(files):,} images")
    paths, errors = check_images(files[:count], skip_unreadable)
    for error in errors:
        console.print(f"skipped: {error}")
    with console.status(f"loading {shown(source)}"):
        model, class_names = _load(source, image_size, num_heads, normalization)
    with replacing(out) as folder:
        folder.mkdir()
        rows, distances = _explain_images(model, class_names, paths, folder, console)
        _plot_model(model, distances, folder)
        write_json(
            folder / "explanation.json",
            {
                "source": shown(source),
                "image_size": list(model.input_shape[1:3]),
                "images": rows,
                "mean_attention_distance": distances.tolist(),
                "versions": versions(),
            },
        )
        write_text(folder / "index.html", _page(shown(source), model, rows, folder))
    return out / "index.html"


def _load(source, image_size, num_heads, normalization):
    """The model of a run or a checkpoint, and the names of its classes; None without a head."""
    if not (pathlib.Path(source) / "run.json").exists():
        model = load_backbone(
            source,
            num_classes=None,
            image_size=image_size,
            num_heads=num_heads,
            normalization=normalization,
        )
        classes = vit_arguments(model)["num_classes"]
        return model, [f"class {index}" for index in range(classes)] or None
    if num_heads is not None or normalization is not None:
        raise ValueError(
            "`num_heads` and `normalization` are for checkpoints: a run has its own. "
            f"Received: num_heads={num_heads!r}, normalization={normalization!r}."
        )
    run = load_run(source)
    model = run.model()
    return model if image_size is None else resize_model(model, image_size), run.class_names


def _explain_images(model, class_names, paths, folder, console):
    """Draws each image; returns what explanation.json says of them, and the mean distances."""
    grid, size = measures.patch_grid(model), model.input_shape[1:3]
    rows, distances = [], []
    tracked = progress.track(
        enumerate(paths),
        "explaining",
        len(paths),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    for index, path in tracked:
        picture = read_image(path)
        maps = measures.attention_maps(model, np.asarray(resize(picture, size))[None])
        figure = measures.plot_attention(
            [_shown(picture)],
            {
                "attention rollout": measures.attention_rollout(
                    maps, grid, discard_ratio=DISCARD_RATIO
                ),
                "attention of the last block": measures.class_attention(maps, grid).mean(axis=1),
            },
        )
        name = f"{index + 1:02d}-{re.sub(r'[^A-Za-z0-9._-]+', '_', path.stem)}.png"
        figure.savefig(folder / name, dpi=_DPI)
        distances.append(measures.mean_attention_distance(maps, grid))
        [best] = predict(model, [path], class_names, TOP) if class_names else [[]]
        found = [{"class": label, "probability": p} for label, p in best]
        rows.append({"image": shown(path), "file": name, "predictions": found})
        said = ", ".join(f"{label} {p:.3f}" for label, p in best) or f"drawn as {name}"
        console.print(f"{shown(path)}: {said}")
    return rows, np.mean(distances, axis=0)


def _shown(picture):
    """A picture with `_SHOWN_PIXELS` on its longer side, or as it is if it has fewer."""
    scale = _SHOWN_PIXELS / max(picture.shape[:2])
    size = [max(1, round(side * scale)) for side in picture.shape[:2]]
    return picture if scale >= 1 else np.asarray(resize(picture, size))


def _plot_model(model, distances, folder):
    """Draws what does not belong to one picture."""
    figures = {
        "attention_distance.png": measures.plot_attention_distance(distances),
        "position_similarity.png": measures.plot_position_similarity(
            measures.position_similarity(model)
        ),
    }
    config = vit_arguments(model)["variant"]
    if config.stem_units is None:
        count = min(_FILTERS, config.hidden_dim, config.patch_size**2 * model.input_shape[-1])
        filters = measures.patch_filters(model, count)
        figures["patch_filters.png"] = measures.plot_patch_filters(filters)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=_DPI)


def _page(source, model, rows, folder):
    """The page as HTML that needs no other file."""
    config = vit_arguments(model)["variant"]
    height, width = model.input_shape[1:3]
    title = html.escape(f"What {pathlib.PurePath(source).name} looks at")
    figures = "".join(
        f"<figure>{_img(folder / name, caption)}<figcaption>{caption}</figcaption></figure>\n"
        for name, caption in _CAPTIONS.items()
        if (folder / name).exists()
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n<h1>{title}</h1>\n"
        f"<p>{html.escape(source)}: {config.depth} blocks of width {config.hidden_dim} with "
        f"{config.num_heads} heads, on images of {height} x {width} px.</p>\n"
        f"<p>Attention rollout follows the attention through all blocks, without the lowest "
        f"{DISCARD_RATIO:.0%} of each; beside it, the mean over the heads of the last block. "
        "Bright is where the model looks. Attention is not proof of what decided.</p>\n"
        f"{''.join(_section(row, folder) for row in rows)}{figures}</html>\n"
    )


def _section(row, folder):
    """A picture and what the model takes it for."""
    name = html.escape(pathlib.PurePath(row["image"]).name)
    predictions = "".join(
        f'<tr><td>{html.escape(best["class"])}<td><meter value="{best["probability"]:.4f}">'
        f"</meter><td>{best['probability']:.1%}</tr>\n"
        for best in row["predictions"]
    )
    table = f"<table>{predictions}</table>" if predictions else ""
    return f"<section><h2>{name}</h2>{_img(folder / row['file'], name)}{table}</section>\n"


def _img(path, alt):
    """A picture, written into the page."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{alt}" src="data:image/png;base64,{data}">'
