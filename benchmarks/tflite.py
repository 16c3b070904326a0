"""What a ViT costs as a `.tflite` file: keras-vit's modes, KerasHub and timm in turns.

    python benchmarks/tflite.py          # --all: litert-torch too

ViT-Ti/16 and S/16 at 224 px, 1,000 classes, logits, batch 1, random weights and biases. KerasHub's
ViT is exported by Keras (`model.export(format="litert")`) and through a SavedModel of batch 1,
timm's through litert-torch; their int8 files are the dynamic quantization of the same tools. Each
file is made in a process of its own. Then one inference of each file in turns, at 1 and 2 threads.
fp16 computes in float32 on an x86.

"Its products alone" are the matrix products of our graph in int8, with the reshapes and transposes
between them: about the least that an int8 file takes with XNNPACK's kernels.
"""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import subprocess
import tempfile

import models
import numpy as np
from environments import OPTIONAL, Missing, last_line, python_of
from harness import cores, described, draw, markdown, parser, save, versions_line

CLASSES, SIDE = 1000, 224
THREADS = (1, 2)
SHOWN = ("MB", "ms x1", "ms x2")
CALIBRATION_IMAGES = 8  # few: of random weights only the time counts
SIZES = {  # hidden_dim, num_heads, mlp_dim, patch_size; 12 blocks; the name in timm
    "Ti/16": (192, 3, 768, 16, "vit_tiny_patch16_224"),
    "S/16": (384, 6, 1536, 16, "vit_small_patch16_224"),
    "S/14": (384, 6, 1536, 14, "vit_small_patch14_dinov2"),  # with --make
}
MEASURED = ("Ti/16", "S/16")
OURS, PRODUCTS = "keras-vit", "products"
MODES = ("fp32", "fp16", "dynamic_int8", "int8_mixed", "int4")  # those for CPUs
PEER_MODES = ("fp32", "int8")
# Ours over the better file of KerasHub's: fp32 with fp32, the others with dynamic int8.
TIME_GOALS = {"fp32": 0.93, "dynamic_int8": 0.95, "int8_mixed": 0.72}
SIZE_GOALS = {"fp32": 1.0, "dynamic_int8": 1.0, "int8_mixed": 1.0, "int4": 0.65}


def noise(rng, shape, is_scale):
    """Weights of which none is 0 or 1: about 1 if they scale, about 0 else."""
    return is_scale + rng.normal(0, 0.1 if is_scale else 0.05, shape).astype("float32")


def ours(variant, mode, path):
    import keras_vit
    from keras_vit.export import export_tflite

    model = randomised(keras_vit.build_vit(variant, image_size=SIDE, num_classes=CLASSES))
    images = np.random.default_rng(0).normal(size=(CALIBRATION_IMAGES, SIDE, SIDE, 3))
    export_tflite(model, path, mode=mode, calibration=images.astype("float32"))


def products(variant, mode, path):
    """The products of the deploy graph, with the layouts between them, all in int8."""
    import tensorflow as tf
    from litert_quantizer import qtyping, quantizer

    hidden_dim, num_heads, mlp_dim, patch_size, _ = SIZES[variant]
    size = (hidden_dim, 12, num_heads, mlp_dim)
    forward, weights = models.matrix_products(size, patch_size, gain=0.1)
    module = tf.Module()
    module.weights = weights  # or the converter does not find them
    patches = (1, (SIDE // patch_size) ** 2, 3 * patch_size**2)
    graph = tf.function(forward, input_signature=[tf.TensorSpec(patches, name="patches")])
    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [graph.get_concrete_function()], module
    )
    model = quantizer.Quantizer(converter.convert())
    config = qtyping.OpQuantizationConfig(
        activation_tensor_config=qtyping.TensorQuantizationConfig(8, symmetric=True),
        weight_tensor_config=qtyping.TensorQuantizationConfig(
            8, granularity=qtyping.QuantGranularity.CHANNELWISE
        ),
        compute_precision=qtyping.ComputePrecision.INTEGER,
        skip_checks=True,  # as in export/quantization.py
    )
    model.update_quantization_recipe(".*", qtyping.TFLOperationName.ALL_SUPPORTED, config)
    images = [{"patches": np.random.default_rng(0).normal(size=patches).astype("float32")}]
    ranges = model.calibrate({"serving_default": images})
    path.write_bytes(model.quantize(ranges, enable_progress_report=False).quantized_model)


def keras_hub(variant):
    from keras_hub.models import ViTBackbone, ViTImageClassifier

    hidden_dim, num_heads, mlp_dim, patch_size, _ = SIZES[variant]
    backbone = ViTBackbone(
        image_shape=(SIDE, SIDE, 3),
        patch_size=patch_size,
        num_layers=12,
        num_heads=num_heads,
        hidden_dim=hidden_dim,
        mlp_dim=mlp_dim,
    )
    return randomised(ViTImageClassifier(backbone, CLASSES, activation=None))


def randomised(model):
    rng = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(noise(rng, weight.shape, weight.name == "gamma"))
    return model


def keras_export(variant, mode, path):
    """As the documentation of Keras says, with the converter's options that it hands on."""
    import tensorflow as tf

    options = {} if mode == "fp32" else {"optimizations": [tf.lite.Optimize.DEFAULT]}
    keras_hub(variant).export(path, format="litert", **options)


def saved_model(variant, mode, path):
    import keras
    import tensorflow as tf

    images = keras.InputSpec(shape=(1, SIDE, SIDE, 3), dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        keras_hub(variant).export(folder, format="tf_saved_model", input_signature=[images])
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        converter.optimizations = [] if mode == "fp32" else [tf.lite.Optimize.DEFAULT]
        path.write_bytes(converter.convert())


def litert_torch(variant, mode, path):
    import litert_torch
    import timm
    import torch

    model = timm.create_model(SIZES[variant][-1], img_size=SIDE, num_classes=CLASSES).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            is_scale = "norm" in name and name.endswith("weight")
            weight.copy_(torch.from_numpy(noise(rng, tuple(weight.shape), is_scale)))
    litert_torch.convert(model, (torch.zeros(1, 3, SIDE, SIDE),)).export(str(path))
    if mode != "fp32":
        from ai_edge_quantizer import quantizer, recipe  # litert-torch depends on it

        quantized = quantizer.Quantizer(str(path), recipe.dynamic_wi8_afp32()).quantize()
        path.write_bytes(quantized.quantized_model)


PEERS = {  # what exports, where, and whose versions belong to the result
    "KerasHub_keras": (keras_export, "keras-hub", ("keras", "tensorflow", "keras-hub")),
    "KerasHub_savedmodel": (saved_model, "keras-hub", ("keras", "tensorflow", "keras-hub")),
    "timm_litert-torch": (litert_torch, "litert-torch", ("torch", "timm", "litert-torch")),
}
OUR_PACKAGES = ("keras", "tensorflow", "ai-edge-litert")


def installed(packages, python):
    """The versions of packages in an environment."""
    script = (
        "import importlib.metadata, json, sys\n"
        "print(json.dumps({p: importlib.metadata.version(p) for p in sys.argv[1:]}))"
    )
    return json.loads(subprocess.check_output([python, "-c", script, *packages], text=True))


def contenders(modes, peer_modes, everything):
    """(name, mode) -> the Python that makes it; the versions; and why who is missing is."""
    made = {(OURS, mode): python_of(None) for mode in modes}
    made |= {(PRODUCTS, mode): python_of(None) for mode in peer_modes if mode == "int8"}
    versions, missing = installed(OUR_PACKAGES, python_of(None)), {}
    for name, (_, environment, packages) in PEERS.items():
        try:
            python = python_of(environment, make=everything or environment not in OPTIONAL)
        except Missing as error:
            missing[name] = str(error)
        else:
            made |= {(name, mode): python for mode in peer_modes}
            versions |= installed(packages, python)
    return made, versions, missing


def make(variant, made, folder, missing):
    """Makes the files of one size that are not there, one on each core; returns their paths."""
    from keras_vit.export.benchmark import describe_graph

    def one(key, python):
        name, mode = key
        path = folder / f"{name}_{mode}.tflite"
        print(f"  {variant}: making {path.stem}", flush=True)
        try:
            if not path.exists():
                run_make(python, name, mode, variant, path)
            describe_graph(path)
        except (Missing, ValueError) as error:
            missing[f"{variant}, {path.stem}"] = str(error)
            return None
        return path

    with concurrent.futures.ThreadPoolExecutor(cores()) as pool:
        paths = dict(zip(made, pool.map(one, made, made.values()), strict=True))
    return {key: path for key, path in paths.items() if path is not None}


def run_make(python, name, mode, variant, path):
    """Makes one file in a process of its own, since the converters keep memory."""
    part = path.with_suffix(".part.tflite")
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "-1",
        "KERAS_BACKEND": "tensorflow",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "OPENBLAS_NUM_THREADS": "1",  # another file is made on each other core
    }
    command = [python, __file__, "--make", name, mode, variant, str(part)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    if process.returncode:
        part.unlink(missing_ok=True)
        raise Missing(last_line(process.stderr))
    part.replace(path)


def ratios(rows, key, value):
    """A file's value over the least one of each peer, fp32 and fp16 with fp32, others with int8.

    Args:
        rows: (name, mode) -> `BenchmarkRow`.
        key: (name, mode) of the file.
        value: function from a row to a number.

    Returns:
        A dictionary: "KerasHub" or "timm" -> ratio.
    """
    against = "fp32" if key[1] in ("fp32", "fp16") else "int8"
    values = {}
    for (name, mode), row in rows.items():
        if name in PEERS and mode == against:
            values.setdefault(name.split("_")[0], []).append(value(row))
    return {peer: value(rows[key]) / min(others) for peer, others in values.items()}


def compare(rows, threads):
    """Each file's ratios: (name, mode) -> {"MB" or "ms xN" or "med xN" -> ratios}."""
    values = {"MB": lambda row: row.size_bytes}
    for index, count in enumerate(threads):
        values[f"ms x{count}"] = lambda row, i=index: row.latencies[i].min_ms
        values[f"med x{count}"] = lambda row, i=index: row.latencies[i].median_ms
    return {
        key: {title: ratios(rows, key, value) for title, value in values.items()} for key in rows
    }


def measure(variant, made, folder, missing, arguments):
    """Makes and times the files of one size; returns what the JSON holds of it."""
    from keras_vit.export.benchmark import benchmark

    folder.mkdir(parents=True, exist_ok=True)
    paths = make(variant, made, folder, missing)
    print(f"  {variant}: measuring", flush=True)
    result = benchmark(paths.values(), threads=THREADS, rounds=3 if arguments.quick else 40)
    compared = compare(dict(zip(paths, result.rows, strict=True)), THREADS)
    rows = result.as_dict()["rows"]
    return {
        "files": [{name: row[name] for name in row if name != "path"} for row in rows],
        "ratios": {"_".join(key): figures for key, figures in compared.items()},
    }


def table(result):
    """Ours over the better file of each peer, then the files themselves."""
    ratios, files = [], []
    measured = [row["name"] for size in result["sizes"].values() for row in size["files"]]
    peers = [peer for peer in ("KerasHub", "timm") if any(peer in name for name in measured)]
    for variant, measured in result["sizes"].items():
        for name, figures in measured["ratios"].items():
            who, mode = name.split("_", 1)
            if who in (OURS, PRODUCTS):
                row = f"{variant} {mode}" if who == OURS else f"{variant}, its products alone"
                cells = [shown(figures[title].get(peer)) for title in SHOWN for peer in peers]
                ratios.append((row, *cells, goals(mode, figures)))
        files += [(variant, *file_cells(row)) for row in measured["files"]]
    columns = ["ours"]
    columns += [f"{title} / {peer}" for title in SHOWN for peer in peers]
    parts = [markdown([*columns, "goals"], ratios)]
    columns = ["size", "file", "MB", *(f"ms x{n}: min, median" for n in THREADS)]
    parts.append(markdown([*columns, "pieces", "outside"], files))
    parts += [f"{name} is missing: {reason}\n" for name, reason in result["missing"].items()]
    return "\n".join([*parts, versions_line(result["versions"]), described(result)])


def shown(ratio):
    return "" if ratio is None else f"{ratio:.2f}"


def goals(mode, figures):
    """Which of the goals against KerasHub are kept; figures of one and more threads alike."""
    verdicts = []
    for title in SHOWN:
        goal = (SIZE_GOALS if title == "MB" else TIME_GOALS).get(mode)
        if goal and "KerasHub" in figures[title]:
            kept = "kept" if figures[title]["KerasHub"] <= goal else "missed"
            verdicts.append(f"{title} {goal} {kept}")
    return ", ".join(verdicts)


def file_cells(row):
    times = [f"{time['min_ms']:.1f}, {time['median_ms']:.1f}" for time in row["latencies"]]
    graph = row["graph"]
    size = f"{row['size_bytes'] / 1e6:.2f}"
    return row["name"], size, *times, graph["partitions"], sum(graph["outside"].values())


def plot(result, path):
    """The time of each file on one thread."""

    def panel(variant, files):
        def bars(axes):
            color_of = {OURS: "C1", PRODUCTS: "C7"}
            colors = [color_of.get(row["name"].split("_")[0], "C0") for row in files]
            times = [row["latencies"][0]["min_ms"] for row in files]
            axes.barh([row["name"] for row in files], times, color=colors)
            axes.invert_yaxis()
            axes.set_title(f"{variant}: ms on {THREADS[0]} thread")

        return bars

    draw(path, [panel(name, one["files"]) for name, one in result["sizes"].items()])


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--all", action="store_true", help="the optional peers too")
    arguments.add_argument("--folder", type=pathlib.Path, help="keep the files, use those there")
    arguments.add_argument(
        "--make",
        nargs=4,
        metavar=("WHO", "MODE", "SIZE", "PATH"),
        help="only make one file, run by the Python of WHO's environment",
    )
    arguments = arguments.parse_args()
    if arguments.make:
        name, mode, variant, path = arguments.make
        modes = {OURS: MODES, PRODUCTS: ("int8",), **dict.fromkeys(PEERS, PEER_MODES)}
        if mode not in modes.get(name, ()) or variant not in SIZES:
            raise ValueError(
                f"`--make` takes one of {modes} and a size of {tuple(SIZES)}. Received: "
                f"{name} {mode} {variant}."
            )
        functions = {OURS: ours, PRODUCTS: products} | {who: peer[0] for who, peer in PEERS.items()}
        return functions[name](variant, mode, pathlib.Path(path))

    modes = (("fp32",), ("fp32",)) if arguments.quick else (MODES, PEER_MODES)
    made, versions, missing = contenders(*modes, arguments.all)
    sizes = {}
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(tempfile.TemporaryDirectory())
        folder = arguments.folder or pathlib.Path(temporary)
        for variant in MEASURED[:1] if arguments.quick else MEASURED:
            path = folder / variant.replace("/", "")
            sizes[variant] = measure(variant, made, path, missing, arguments)
    save("tflite", arguments.quick, versions=versions, missing=missing, sizes=sizes)


if __name__ == "__main__":
    main()
