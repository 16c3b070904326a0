"""What a ViT costs as a `.tflite` file: keras-vit's modes, KerasHub and timm in turns.

    pip install keras-hub timm litert-torch     # a peer that is not installed is left out
    python benchmarks/tflite.py

ViT-Ti/16 and S/16 at 224 px, 1,000 classes, logits, batch 1, random weights and biases. KerasHub's
ViT is exported by Keras (`model.export(format="litert")`) and through a SavedModel of batch 1,
timm's through litert-torch; their int8 files are the dynamic quantization of the same tools. Each
file is made in a process of its own. Then one inference of each file in turns, at 1 and 2 threads.

litert-torch may need another PyTorch than the one installed, which an environment of its own has:

    python -m venv litert-torch && litert-torch/bin/pip install litert-torch timm
    python benchmarks/tflite.py --litert-torch-python litert-torch/bin/python
"""

import argparse
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

CLASSES, SIDE = 1000, 224
CALIBRATION_IMAGES = 32
SIZES = {  # hidden_dim, num_heads, mlp_dim; 12 blocks; the name in timm
    "Ti/16": (192, 3, 768, "vit_tiny_patch16_224"),
    "S/16": (384, 6, 1536, "vit_small_patch16_224"),
}
OURS = "keras-vit"
MODES = ("fp32", "fp16", "dynamic_int8", "int8_mixed", "int4")  # those for CPUs
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


def keras_hub(variant):
    from keras_hub.models import ViTBackbone, ViTImageClassifier

    hidden_dim, num_heads, mlp_dim, _ = SIZES[variant]
    backbone = ViTBackbone(
        image_shape=(SIDE, SIDE, 3),
        patch_size=16,
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

    model = timm.create_model(SIZES[variant][-1], num_classes=CLASSES).eval()
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


PEERS = {  # what exports, and the packages that it needs
    "KerasHub_keras": (keras_export, ("keras", "tensorflow", "keras-hub")),
    "KerasHub_savedmodel": (saved_model, ("keras", "tensorflow", "keras-hub")),
    "timm_litert-torch": (litert_torch, ("torch", "timm", "litert-torch")),
}


def installed(packages, python):
    """The versions of packages in another Python's environment, or None if one is not there."""
    script = (
        "import importlib.metadata, json, sys\n"
        "print(json.dumps({p: importlib.metadata.version(p) for p in sys.argv[1:]}))"
    )
    process = subprocess.run([python, "-c", script, *packages], capture_output=True, text=True)
    return json.loads(process.stdout) if process.returncode == 0 else None


def contenders(litert_torch_python):
    """(name, mode) -> the Python that makes it, and the versions of what it is made with."""
    from keras_vit.export import MODES as exported

    for mode in MODES:
        if mode not in exported:
            print(f"{OURS} {mode} is left out: keras_vit.export has no such mode.")
    made = {(OURS, mode): sys.executable for mode in MODES if mode in exported}
    versions = installed(("keras", "tensorflow", "ai-edge-litert"), sys.executable)
    for name, (function, packages) in PEERS.items():
        python = litert_torch_python if function is litert_torch else sys.executable
        found = installed(packages, python)
        if found is None:
            print(f"{name} is left out: it needs {', '.join(packages)}.")
        else:
            made |= {(name, mode): python for mode in ("fp32", "int8")}
            versions |= found
    return made, versions


def make(variant, made, folder):
    """Makes the files of one size that are not there; returns their paths by (name, mode)."""
    from keras_vit.export.benchmark import describe_graph

    paths = {}
    for (name, mode), python in track(made.items(), f"Making the files of {variant}"):
        path = folder / f"{name}_{mode}.tflite"
        try:
            if not path.exists():
                run_make(python, name, mode, variant, path)
            describe_graph(path)
        except (RuntimeError, ValueError) as error:
            if name == OURS:
                raise
            print(f"{variant}: {name} {mode} is left out: {error}")
        else:
            paths[name, mode] = path
    return paths


def run_make(python, name, mode, variant, path):
    """Makes one file in a process of its own, since the converters keep memory."""
    part = path.with_suffix(".part.tflite")
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "-1",
        "KERAS_BACKEND": "tensorflow",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    command = [python, __file__, "--make", name, mode, variant, str(part)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    if process.returncode:
        part.unlink(missing_ok=True)
        raise RuntimeError(f"{name} {mode} failed:\n{process.stderr[-3000:]}")
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
        if name != OURS and mode == against:
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


def report(variant, compared):
    """Prints the ratios as a table, and the goals."""
    first = next(iter(compared.values()))
    if not first["MB"]:
        return  # no peer is there
    table = Table(
        title=f"{variant}: over the better file of each peer, fp32 or int8",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("file", overflow="fold")
    shown = [title for title in first if not title.startswith("med")]
    titles = [(title, peer) for title in shown for peer in first[title]]
    for title, peer in titles:
        table.add_column(f"{title}\n/ {peer}", justify="right", no_wrap=True)
    for (name, mode), figures in compared.items():
        cells = [f"{figures[title][peer]:.2f}" for title, peer in titles]
        table.add_row(f"{name}_{mode}", *cells)
    Console().print(table)
    for (name, mode), figures in compared.items():
        for title, peers in figures.items():
            goal = (SIZE_GOALS if title == "MB" else TIME_GOALS).get(mode)
            if name == OURS and goal and "KerasHub" in peers:
                ratio = peers["KerasHub"]
                verdict = "kept" if ratio <= goal else "MISSED"
                print(f"{variant} {mode}, {title}: {ratio:.3f} of KerasHub's, {goal}: {verdict}")


def measure(variant, made, folder, arguments):
    """Makes and times the files of one size; returns what the JSON holds of it."""
    from keras_vit.export.benchmark import benchmark

    folder.mkdir(parents=True, exist_ok=True)
    paths = make(variant, made, folder)
    result = benchmark(
        paths.values(),
        threads=arguments.threads,
        rounds=arguments.rounds,
        seconds=arguments.seconds,
    )
    Console().print(result.table())
    compared = compare(dict(zip(paths, result.rows, strict=True)), arguments.threads)
    report(variant, compared)
    return {
        **result.as_dict(),
        "ratios": {"_".join(key): figures for key, figures in compared.items()},
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=300.0, help="of a number of threads")
    parser.add_argument("--folder", type=pathlib.Path, help="keep the files, and use those there")
    parser.add_argument("--litert-torch-python", default=sys.executable, metavar="PATH")
    parser.add_argument("--make", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        name, mode, variant, path = arguments.make
        function = ours if name == OURS else PEERS[name][0]
        return function(variant, mode, pathlib.Path(path))

    made, versions = contenders(arguments.litert_torch_python)
    result = {"rounds": arguments.rounds, "versions": versions}
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(tempfile.TemporaryDirectory())
        folder = arguments.folder or pathlib.Path(temporary)
        for variant in arguments.variants:
            path = folder / variant.replace("/", "")
            result[variant] = measure(variant, made, path, arguments)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
