"""The command `keras-vit`. Each subcommand imports what it needs, so that `--help` is quick."""

import contextlib
import dataclasses
import enum
import json
import os
import pathlib
import sys
import tempfile
import warnings
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

app = typer.Typer(
    help="Vision Transformers for Keras: from images to a verified phone file.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help texts are plain: brackets stay
    add_completion=False,
)

DATA_HELP = "digits, folder:PATH, tfds:NAME[:CONFIG] or tfrecord:PATH."


def parse_image_size(text):
    """The image size that "224" or "224,320" says: an int, or `(height, width)`."""
    sides = text.split(",")
    if len(sides) > 2 or not all(side.strip().isdecimal() and int(side) > 0 for side in sides):
        raise typer.BadParameter(f"must be PIXELS or HEIGHT,WIDTH, such as 224,320, not {text!r}.")
    height, *width = map(int, sides)
    return (height, *width) if width else height


RunArgument = Annotated[pathlib.Path, typer.Argument(metavar="RUN", help="A run folder.")]
DataOption = Annotated[str | None, typer.Option(help="Other data of the same classes.")]
SkipOption = Annotated[
    bool, typer.Option("--skip-unreadable", help="Leave out images that cannot be read.")
]
ImageSizeOption = Annotated[
    Any,  # int | tuple | None, which typer does not take
    typer.Option(
        parser=parse_image_size,
        metavar="SIZE",
        help="Pixels, or HEIGHT,WIDTH (default: that of the recipe, checkpoint or run).",
    ),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


class Precision(str, enum.Enum):
    """The dtype policies to train with."""

    float32 = "float32"
    mixed_bfloat16 = "mixed_bfloat16"
    mixed_float16 = "mixed_float16"


class StrategyName(str, enum.Enum):
    """The devices to train on."""

    auto = "auto"
    one = "one"
    mirrored = "mirrored"
    multiworker = "multiworker"


class SplitName(str, enum.Enum):
    """The splits of the data."""

    train = "train"
    validation = "validation"
    test = "test"


def main():
    """Runs the command; an error is a message on stderr and exit status 1, a warning one line."""
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        app()
    except Exception as error:
        if os.environ.get("KERAS_VIT_TRACEBACK"):
            raise
        if isinstance(error, ModuleNotFoundError):
            install = 'Install what the command needs: pip install ".[all]" in a clone of keras-vit'
            sys.exit(f"error: {error}. {install}")
        if isinstance(error, (ValueError, TypeError, ArithmeticError, RuntimeError, OSError)):
            sys.exit(f"error: {error}")
        if type(error).__module__.startswith("tensorflow."):  # such as that of too little memory
            sys.exit(f"error: {type(error).__name__}: {error}")
        raise


@app.command()
def train(
    context: typer.Context,
    data: Annotated[str, typer.Option(help=DATA_HELP)] = "digits",
    out: Annotated[
        pathlib.Path | None, typer.Option(help="Run folder (default: runs/DATA).")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="A checkpoint to start from: PATH, hf://OWNER/NAME or https://...."),
    ] = None,
    num_heads: Annotated[
        int | None, typer.Option(help="Heads, for weights that do not say.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A name that `keras-vit recipes` lists (default: tiny, small or photos by the "
            "size of the images; with weights finetune_small)."
        ),
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help="A ViT of the table, such as Ti/16 (default: the recipe's).")
    ] = None,
    image_size: ImageSizeOption = None,
    patch_size: Annotated[int | None, typer.Option(help="Pixels (default: the variant's).")] = None,
    pooling: Annotated[str | None, typer.Option(help="token, mean, gap, token+gap or map.")] = None,
    position: Annotated[str | None, typer.Option(help="learned or sincos2d.")] = None,
    normalization: Annotated[
        str | None,
        typer.Option(help="minus_one_one or imagenet (default: the recipe's or checkpoint's)."),
    ] = None,
    dropout: Annotated[float | None, typer.Option(help="Rate (default: the recipe's).")] = None,
    drop_path: Annotated[float | None, typer.Option(help="Rate of the last block.")] = None,
    freeze_backbone: Annotated[
        bool | None,
        typer.Option(
            "--freeze",
            help="With weights: train the head alone, best with a --learning-rate of about 0.01.",
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the images.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw, sgd or lamb.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Its peak.")] = None,
    layer_decay: Annotated[
        float | None, typer.Option(help="Rate of a layer over that of the next; 1: all the same.")
    ] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of the steps.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="On kernels alone.")] = None,
    label_smoothing: Annotated[float | None, typer.Option(help="In [0, 1).")] = None,
    clip_norm: Annotated[float | None, typer.Option(help="Largest gradient norm.")] = None,
    min_crop_area: Annotated[
        float | None, typer.Option(help="Smallest share a random crop keeps; 1: none.")
    ] = None,
    rotation: Annotated[float | None, typer.Option(help="Largest angle in degrees.")] = None,
    shift: Annotated[float | None, typer.Option(help="Largest share of the side.")] = None,
    flip: Annotated[bool | None, typer.Option(help="Mirror half of the images.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Any other field of the recipe, such as mixup=0.2; see `keras-vit recipes NAME`.",
        ),
    ] = None,
    precision: Annotated[Precision, typer.Option(help="Dtype policy.")] = Precision.float32,
    xla: Annotated[
        bool | None,
        typer.Option(
            "--xla/--no-xla",
            help="Compile with XLA (default: yes, except in bfloat16 on a CPU that has it).",
        ),
    ] = None,
    strategy: Annotated[
        StrategyName, typer.Option(help="Devices; auto: all GPUs of all workers.")
    ] = StrategyName.auto,
    early_stop: Annotated[
        int | None, typer.Option(help="Stop after so many epochs without a lower validation loss.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, order and augmentation.")] = 0,
    checkpoint_steps: Annotated[
        int | None, typer.Option(help="Steps between checkpoints within an epoch.")
    ] = None,
    checkpoint_minutes: Annotated[float, typer.Option(help="Minutes between them.")] = 10.0,
    keep_checkpoints: Annotated[int, typer.Option(help="How many stay.")] = 2,
    resume: Annotated[
        pathlib.Path | None,
        typer.Option(
            metavar="RUN", help="Continue this run, as it was begun; with --strategy, --data."
        ),
    ] = None,
    skip_unreadable: SkipOption = False,
    overwrite: OverwriteOption = False,
):
    """Train a Vision Transformer, from scratch or from weights, and write a run folder.

    SIGTERM and Ctrl-C save a checkpoint and end with exit status 0; --resume continues.
    """
    if resume is not None:
        check_resume_options(context)
        continue_run(resume, data if is_given(context, "data") else None, strategy)
        return
    out = out or pathlib.Path("runs") / run_name(data)
    start_tensorflow()
    from keras_vit.training import Recipe, TrainingInterrupted, train

    fields = {field.name for field in dataclasses.fields(Recipe)}
    # Options that are not used above by name are fields of the recipe.
    options = {name: value for name, value in context.params.items() if name in fields}
    overrides = recipe_overrides(options, settings)
    with contextlib.suppress(TrainingInterrupted):  # which has said how to go on
        train(
            data,
            out,
            weights=weights,
            num_heads=num_heads,
            recipe=recipe,
            precision=precision.value,
            jit_compile="auto" if xla is None else xla,
            strategy=strategy.value,
            early_stop=early_stop,
            seed=seed,
            checkpoint_steps=checkpoint_steps,
            checkpoint_minutes=checkpoint_minutes,
            keep_checkpoints=keep_checkpoints,
            skip_unreadable=skip_unreadable,
            overwrite=overwrite,
            **overrides,
        )


def recipe_overrides(options, settings):
    """Fields of a recipe by the options of their names (None: not given) and by --set."""
    from keras_vit.training.recipes import parse_override

    overrides = {name: value for name, value in options.items() if value is not None}
    for name, value in map(parse_override, settings or ()):
        if name in overrides:
            raise ValueError(f"{name} must be given once. Received: {overrides[name]} and {value}.")
        overrides[name] = value
    return overrides


def check_resume_options(context):
    """Raises ValueError if --resume came with options that the run itself says."""
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if is_given(context, parameter.name)
        and parameter.name not in ("resume", "data", "strategy")
    ]
    if given:
        raise ValueError(
            "--resume continues a run as it was begun: --strategy can be given with it, and, with "
            "--data, the place where its images are now. To train otherwise, begin another run, "
            f"without --resume. Received: {', '.join(given)}."
        )


def is_given(context, name):
    """Whether an option stands on the command line."""
    return context.get_parameter_source(name).name == "COMMANDLINE"


def continue_run(run, data, strategy):
    """Resumes a run."""
    start_tensorflow()
    from keras_vit.training import TrainingInterrupted, resume

    with contextlib.suppress(TrainingInterrupted):  # which has said how to go on
        resume(run, data=data, strategy=strategy.value)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="A recipe, to see all of it.")] = None,
):
    """List the recipes, or say what one of them does and where it comes from."""
    start_tensorflow()
    from keras_vit.training.recipe_table import recipe_details, recipes_table

    Console().print(recipes_table() if name is None else recipe_details(name))


@app.command()
def data_speed(
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    recipe: Annotated[str, typer.Option(help="Whose augmentation and image size.")] = "photos",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Any field of the recipe."),
    ] = None,
    image_size: ImageSizeOption = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per batch; 32 by default.")] = None,
    rounds: Annotated[int, typer.Option(help="How often to measure.")] = 5,
    compare_keras: Annotated[
        bool, typer.Option("--compare-keras", help="Against keras.layers.RandAugment, in turn.")
    ] = False,
    skip_unreadable: SkipOption = False,
):
    """Say how many images per second are read and augmented, without a model."""
    start_tensorflow()
    from keras_vit.data import load_data
    from keras_vit.data.speed import data_speed
    from keras_vit.training.recipes import named_recipe

    options = {"image_size": image_size, "batch_size": batch_size}
    overrides = recipe_overrides(options, settings)
    recipe = dataclasses.replace(named_recipe(recipe), **overrides)
    size = recipe.image_size or 224
    result = data_speed(
        load_data(data, skip_unreadable=skip_unreadable).train,
        (size, size) if isinstance(size, int) else tuple(size),
        batch_size=overrides.get("batch_size", 32),
        augmentation=recipe.augmentation,
        compare_keras=compare_keras,
        rounds=rounds,
    )
    Console().print(result.table())


@app.command()
def evaluate(
    run: RunArgument,
    split: Annotated[SplitName, typer.Option(help="Split of the data.")] = SplitName.test,
    data: DataOption = None,
    skip_unreadable: SkipOption = False,
):
    """Print accuracies and write them to RUN/evaluation, with what the model confuses.

    confusion.png is the confusion matrix, mistakes.png the most confident mistakes.

    The result of an earlier evaluation on the same images is replaced.
    """
    start_tensorflow()
    from keras_vit.training import load_run
    from keras_vit.training.evaluation import evaluate

    run = load_run(run)
    images = run.data(data, skip_unreadable)
    name = split.value if data is None else f"{run_name(data)}-{split.value}"
    folder = run.folder / "evaluation" / name
    _check_same_images(folder / "evaluation.json", images)
    part = getattr(images, split.value)
    result = evaluate(run.model(), part, run.class_names, run.images_at_once)
    result.save(folder, data=images.name, split=split.value, fingerprint=images.fingerprint)
    table = Table("class", title=f"{split.value} images of {escape(images.name)}")
    for column in ("images", "precision", "recall", "f1"):
        table.add_column(column, justify="right")
    for row in result.rows():
        scores = [f"{row[key]:.3f}" for key in ("precision", "recall", "f1")]
        table.add_row(escape(row["class"]), f"{row['images']:,}", *scores)
    Console().print(table)
    top5 = f"  top-5 {result.top5:.4f}" if len(run.class_names) > 5 else ""
    print(f"top-1 {result.top1:.4f}{top5} -> {folder}")


@app.command()
def predict(
    run: RunArgument,
    images: Annotated[
        list[pathlib.Path],
        typer.Argument(metavar="IMAGE...", help="Image files, and folders of them."),
    ],
    top: Annotated[int, typer.Option(help="Classes to name for each image.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    skip_unreadable: SkipOption = False,
):
    """Name what is in image files."""
    start_tensorflow()
    from keras_vit.data.folder import check_images, find_images
    from keras_vit.files import shown
    from keras_vit.training import load_run
    from keras_vit.training.evaluation import predict

    run = load_run(run)
    paths, errors = check_images(find_images(images), skip_unreadable)
    for error in errors:
        print(f"skipped: {error}", file=sys.stderr)
    rows = []
    predictions = predict(run.model(), paths, run.class_names, top)
    for path, classes in zip(paths, predictions, strict=True):
        if as_json:
            named = [{"class": name, "probability": p} for name, p in classes]
            rows.append({"image": shown(path), "predictions": named})
        else:
            named = ", ".join(f"{name} {p:.3f}" for name, p in classes)
            print(f"{shown(path)}: {named}", flush=True)
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))


@app.command()
def explain(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_CHECKPOINT",
            help="A run folder, or a checkpoint: a file, hf://OWNER/NAME or a URL.",
        ),
    ],
    images: Annotated[
        list[pathlib.Path],
        typer.Argument(metavar="IMAGE...", help="Image files, and folders of them."),
    ],
    out: Annotated[
        pathlib.Path | None,
        typer.Option(help="Folder (default: RUN/explanation or runs/explain-CHECKPOINT)."),
    ] = None,
    image_size: ImageSizeOption = None,
    count: Annotated[int, typer.Option(help="Images at most, the first ones.", min=1)] = 24,
    num_heads: Annotated[
        int | None, typer.Option(help="Attention heads, if the checkpoint does not say.")
    ] = None,
    normalization: Annotated[
        str | None, typer.Option(help="minus_one_one or imagenet (default: the checkpoint's).")
    ] = None,
    skip_unreadable: SkipOption = False,
    overwrite: OverwriteOption = False,
):
    """Show where a model looks in your images, on a page with its pictures.

    The page, OUT/index.html, needs no other file.
    """
    start_tensorflow()
    from keras_vit.training.explanation import explain

    if out is None:
        run = pathlib.Path(source)
        is_run = (run / "run.json").exists()
        out = run / "explanation" if is_run else pathlib.Path("runs") / f"explain-{run.stem}"
    page = explain(
        source,
        images,
        out,
        image_size=image_size,
        num_heads=num_heads,
        normalization=normalization,
        count=count,
        skip_unreadable=skip_unreadable,
        overwrite=overwrite,
    )
    print(f"-> {page}")


@app.command()
def probe(
    weights: Annotated[str, typer.Option(help="A checkpoint: a file, hf://OWNER/NAME or a URL.")],
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    out: Annotated[
        pathlib.Path | None, typer.Option(help="Folder (default: runs/probe-WEIGHTS-DATA).")
    ] = None,
    image_size: ImageSizeOption = None,
    train_images: Annotated[
        int | None, typer.Option(help="Training images, from all over the split (default: 10,000).")
    ] = None,
    test_images: Annotated[
        int | None, typer.Option(help="Test images, from all over the split (default: all).")
    ] = None,
    num_heads: Annotated[
        int | None, typer.Option(help="Attention heads, if the checkpoint does not say.")
    ] = None,
    normalization: Annotated[
        str | None, typer.Option(help="minus_one_one or imagenet (default: the checkpoint's).")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 32,
    skip_unreadable: SkipOption = False,
    overwrite: OverwriteOption = False,
):
    """Say how good the features of a checkpoint are for your images, without training it.

    The folder keeps the features: the same command again does not compute them again.
    """
    start_tensorflow()
    from keras_vit.training.probing import probe

    if out is None:
        name = pathlib.PurePath(weights).name.removesuffix(".npz").removesuffix(".safetensors")
        out = pathlib.Path("runs") / f"probe-{name}-{run_name(data)}"
    result = probe(
        weights,
        data,
        out,
        image_size=image_size,
        train_images=train_images,
        test_images=test_images,
        num_heads=num_heads,
        normalization=normalization,
        batch_size=batch_size,
        overwrite=overwrite,
        skip_unreadable=skip_unreadable,
    )
    Console().print(result.table())
    print(f"-> {out}")


@app.command()
def export(
    run: RunArgument,
    out: Annotated[pathlib.Path | None, typer.Option(help="Folder (default: RUN/export).")] = None,
    modes: Annotated[
        list[str] | None,
        typer.Option(
            "--mode",
            help="fp32, fp16, dynamic_int8, int8_mixed, int4, or for NPUs int8_full, a16w8; may be "
            "given several times (default: the first five).",
        ),
    ] = None,
    logits: Annotated[
        bool, typer.Option("--logits", help="TFLite files that give logits, not probabilities.")
    ] = False,
    calibration_images: Annotated[
        int, typer.Option(help="Training images to calibrate integers with.", min=1)
    ] = 128,
    images: Annotated[int, typer.Option(help="Held-out images to verify with.", min=1)] = 1000,
    min_agreement: Annotated[
        float | None,
        typer.Option(
            help="Share of the images for which each file must name the model's class (default: by "
            "its mode).",
            min=0,
            max=1,
        ),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="Points of accuracy (%) that quantizing may cost on the validation images: the "
            "layers that cost most get a higher precision until it and the agreement hold.",
            min=0,
            max=100,
        ),
    ] = None,
    io_dtype: Annotated[
        str, typer.Option(help="float32, uint8 or int8 in and out (modes for NPUs).")
    ] = "float32",
    data: DataOption = None,
    skip_unreadable: SkipOption = False,
    overwrite: OverwriteOption = False,
):
    """Export a SavedModel and TFLite files, each verified against the Keras model.

    The folder appears when every file has passed; a failure leaves what was there.
    """
    start_tensorflow()
    from keras_vit.data.pipeline import spread_images
    from keras_vit.export import CPU_MODES, LIMITS, MODES, NPU_MODES, verify
    from keras_vit.files import check_replaceable, replacing, write_text
    from keras_vit.training import load_run

    if unknown := set(modes or ()) - set(MODES):
        raise ValueError(f"`--mode` must be one of {', '.join(MODES)}. Received: {min(unknown)}.")
    modes = modes or (CPU_MODES if io_dtype == "float32" else NPU_MODES)
    run = load_run(run)
    out = out or run.folder / "export"
    check_replaceable(out, "report.json", "export", overwrite)
    model = run.model()
    data = run.data(data, skip_unreadable)
    held_out, labels = spread_images(data.test, model.input_shape[1:3], images)
    calibration, _ = spread_images(data.train, model.input_shape[1:3], calibration_images)
    chosen_by = None
    if max_drop is not None:  # what it is verified with has no part in the choice
        chosen_by = spread_images(data.validation, model.input_shape[1:3], images)
    limits = dict(LIMITS)
    if min_agreement is not None:
        limits = {
            name: dataclasses.replace(limit, agreement=min_agreement)
            for name, limit in limits.items()
        }
    with replacing(out) as folder:
        reports = export_files(
            run,
            model,
            folder,
            modes,
            calibration=calibration,
            activation=None if logits else "softmax",
            io_dtype=io_dtype,
            held_out=chosen_by,
            max_drop=max_drop,
            min_agreement=None if max_drop is None else min_agreement,
        )
        files = {name: report.path for name, report in reports.items()}
        result = verify(
            model,
            files,
            held_out,
            labels,
            limits=limits,
            batch_size=min(32, run.images_at_once),
            exports=reports,
        )
        result = result.relative_to(folder)
        Console().print(result.table())
        result.check()
        result.to_json(folder / "report.json")
        result.plot(folder / "report.png")
        result.to_markdown(folder / "report.md", plot="report.png")
        write_text(folder / "labels.txt", "\n".join(run.class_names) + "\n")
    print(f"-> {out}")


@app.command()
def benchmark(
    files: Annotated[list[pathlib.Path], typer.Argument(metavar="FILE...", help=".tflite files.")],
    threads: Annotated[
        list[int] | None,
        typer.Option(min=1, help="May be given several times (default: 1 and all cores)."),
    ] = None,
    rounds: Annotated[int, typer.Option(help="How often each file runs.", min=1)] = 30,
    seconds: Annotated[float, typer.Option(help="Limit of each number of threads.")] = 20.0,
    json_file: Annotated[
        pathlib.Path | None, typer.Option("--json", metavar="PATH", help="Write JSON.")
    ] = None,
    markdown: Annotated[
        pathlib.Path | None, typer.Option(metavar="PATH", help="Write a Markdown table.")
    ] = None,
    plot: Annotated[
        pathlib.Path | None,
        typer.Option(metavar="PATH", help="Draw latency against size, and accuracy if known."),
    ] = None,
    overwrite: OverwriteOption = False,
):
    """Compare any TFLite files side by side: size, operations and latency, in turns.

    An accuracy is known if the report that `export` wrote lies beside the file.
    """
    start_tensorflow()
    from keras_vit.export.benchmark import benchmark
    from keras_vit.files import check_new

    for path in filter(None, (json_file, markdown, plot)):
        check_new(path, overwrite, how="pass --overwrite")
    result = benchmark(files, threads=threads or None, rounds=rounds, seconds=seconds)
    Console().print(result.table())
    if json_file:
        result.to_json(json_file, overwrite=overwrite)
    if markdown:
        result.to_markdown(markdown, overwrite=overwrite)
    if plot:
        result.plot(plot, overwrite=overwrite)


def export_files(run, model, folder, modes, **options):
    """Exports a run's model in every form; returns the `ExportReport` of each by name."""
    from keras_vit.export import export_saved_model, export_tflite

    files = {"saved_model": folder / "saved_model"}
    files |= {mode: folder / f"{run.model_name}_{mode}.tflite" for mode in modes}
    reports, options = {}, {"labels": run.class_names, **options}
    for name, path in files.items():
        if name == "saved_model":
            with Console(stderr=True).status("exporting saved_model"):
                reports[name] = export_saved_model(model, path, labels=run.class_names)
        else:
            reports[name] = export_tflite(model, path, mode=name, **options)
    return reports


def _check_same_images(path, images):
    """ValueError if the evaluation that stands at a path is of other data of the same name."""
    if not path.exists():
        return
    other = json.loads(path.read_text(encoding="utf-8"))
    is_same = other.get("fingerprint") == images.fingerprint  # at another path
    if other.get("data") != images.name and not is_same:
        raise ValueError(
            f"{path.parent} has the result on {other.get('data')}: rename it, or the data. "
            f"Received: {images.name}."
        )


def run_name(data):
    """A folder name for data such as "folder:/photos/flowers": flowers."""
    source, _, rest = data.partition(":")
    if source in ("folder", "tfrecord"):
        return pathlib.Path(rest).expanduser().resolve().name or source
    return (rest or source).replace(":", "-").replace("/", "-")


def start_tensorflow():
    """Imports TensorFlow without the notes that it writes to stderr about this machine."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    with quiet_stderr():
        import tensorflow as tf

        tf.config.list_physical_devices()
    from absl import logging

    logging.set_verbosity(logging.ERROR)


@contextlib.contextmanager
def quiet_stderr():
    """Keeps what native code writes to file descriptor 2 to itself, unless the block fails."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 2)
        try:
            yield
        except BaseException:
            sink.seek(0)
            os.write(kept, sink.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


if __name__ == "__main__":
    main()
