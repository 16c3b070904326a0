"""How fast a ViT-Ti/16 trains on the CPU: keras-vit, KerasHub and timm in turns.

    pip install keras-hub timm torch       # a peer that is not installed is left out
    python benchmarks/training_speed.py

A step is the forward pass, the softmax cross-entropy, the backward pass and AdamW's update: 224 px,
1,000 classes, no dropout, float32, the same batch of noise each time, which lies in memory. Each
contender is a process of its own, which takes all cores; it sleeps at its standard input until
its turn, so that one computes at a time. A round is a turn of each.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

CLASSES = 1000
LEARNING_RATE = 1e-4
WARM_UP_STEPS = 2
OURS = "keras-vit"
GOALS = {"KerasHub": 1.25, "timm": 0.95}  # our images/s over those of the faster mode of each


def ours(images, labels):
    import keras_vit
    from keras_vit.training import DistributedModel

    vit = keras_vit.build_vit("Ti/16", num_classes=CLASSES)
    vit = keras_vit.skip_unread_tokens(vit)  # as `keras-vit train` does
    return fitted(DistributedModel(vit.input, vit.output), images, labels)


def keras_hub(images, labels, **options):
    from keras_hub.models import ViTBackbone, ViTImageClassifier

    backbone = ViTBackbone(
        image_shape=images.shape[1:],
        patch_size=16,
        num_layers=12,
        num_heads=3,
        hidden_dim=192,
        mlp_dim=768,
    )
    return fitted(ViTImageClassifier(backbone, CLASSES), images, labels, **options)


def keras_hub_xla(images, labels):
    return keras_hub(images, labels, jit_compile=True)


def fitted(model, images, labels, **options):
    """A function that fits a Keras model for so many steps, and how many weights it has."""
    import keras
    import tensorflow as tf

    model.compile(
        keras.optimizers.AdamW(LEARNING_RATE),
        keras.losses.CategoricalCrossentropy(from_logits=True),
        metrics=[],  # KerasHub would choose some
        **options,
    )
    options = tf.data.Options()
    options.autotune.enabled = False  # its thread lets the end of `fit` wait, up to a minute
    batches = tf.data.Dataset.from_tensors((images, labels)).repeat().with_options(options)

    def train(steps):
        model.fit(batches, steps_per_epoch=steps, shuffle=False, verbose=0)

    return train, model.count_params()


def timm(images, labels, compiled=False):
    import timm
    import torch

    model = timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES).train()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, fused=True)
    forward = torch.compile(model) if compiled else model
    images = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())  # (B, C, H, W)
    labels = torch.from_numpy(labels)

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(forward(images), labels).backward()
            optimizer.step()

    return train, sum(weight.numel() for weight in model.parameters())


def timm_compiled(images, labels):
    return timm(images, labels, compiled=True)


def products(images, labels):
    """The matrix products of our step and nothing else, compiled by XLA: what no step can beat.

    A ViT without norms, biases, softmax, GELU and residuals, of the same shapes and weights.
    """
    import tensorflow as tf

    def weight(*shape):
        return tf.Variable(tf.random.normal(shape, stddev=shape[0] ** -0.5))

    width, heads, mlp, depth = 192, 3, 768, 12
    batch, tokens = len(images), 197
    patches = tf.constant(images.reshape(batch, tokens - 1, -1))
    embedding, head = weight(768, width), weight(width, CLASSES)
    blocks = [
        (weight(width, 3 * width), weight(width, width), weight(width, mlp), weight(mlp, width))
        for _ in range(depth)
    ]

    def split(x, count):
        return tf.transpose(tf.reshape(x, (batch, -1, count, width // heads)), (0, 2, 1, 3))

    def forward():
        x = tf.pad(patches @ embedding, ((0, 0), (1, 0), (0, 0)))
        for i, (qkv, proj, fc1, fc2) in enumerate(blocks):
            if i < depth - 1:
                q, k, v = tf.split(split(x @ qkv, 3 * heads), 3, axis=1)
            else:  # the class token alone
                q = split(x[:, :1] @ qkv[:, :width], heads)
                k, v = tf.split(split(x @ qkv[:, width:], 2 * heads), 2, axis=1)
            x = tf.matmul(tf.matmul(q, k, transpose_b=True), v)
            x = tf.reshape(tf.transpose(x, (0, 2, 1, 3)), (batch, -1, width))
            x = x @ proj @ fc1 @ fc2
        return tf.reduce_sum(x[:, 0] @ head)

    variables = [embedding, head, *(weight for block in blocks for weight in block)]

    @tf.function(jit_compile=True)
    def step():
        with tf.GradientTape() as tape:
            y = forward()
        return tape.gradient(y, variables)

    def train(steps):
        for _ in range(steps):
            step()[0].numpy()

    return train, None


# What builds each contender, and the packages that it needs.
CONTENDERS = {
    OURS: (ours, ("keras", "tensorflow")),
    "its products alone": (products, ("tensorflow",)),
    "KerasHub": (keras_hub, ("keras", "tensorflow", "keras-hub")),
    "KerasHub, XLA": (keras_hub_xla, ("keras", "tensorflow", "keras-hub")),
    "timm": (timm, ("torch", "timm")),
    "timm, compiled": (timm_compiled, ("torch", "timm")),
}


def serve(name, batch_size):
    """The process of a contender: a line with a number of steps -> a line with s per step."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is not an answer
    random = np.random.default_rng(0)
    images = random.normal(size=(batch_size, 224, 224, 3)).astype("float32")
    labels = np.eye(CLASSES, dtype="float32")[random.integers(CLASSES, size=batch_size)]
    build, _ = CONTENDERS[name]
    train, weights = build(images, labels)
    train(WARM_UP_STEPS)
    print(json.dumps(weights), file=answers)
    for line in sys.stdin:
        steps = int(line)
        start = time.perf_counter()
        train(steps)
        print((time.perf_counter() - start) / steps, file=answers)


def start(name, batch_size):
    command = [sys.executable, __file__, "--serve", name, "--batch-size", str(batch_size)]
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "-1",
        "KERAS_BACKEND": "tensorflow",
        # PyTorch's threads sleep when they wait: they would spin, many times slower beside others.
        "OMP_WAIT_POLICY": "passive",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    return subprocess.Popen(
        command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def answer(name, process):
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"The process of {name} ended: see its error above.")
    return json.loads(line)


def missing(packages):
    """The first of the packages that is not installed, or None."""
    for package in packages:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return package
    return None


def measure(names, rounds, steps, batch_size):
    """Seconds per step of each contender, a list with one number for each round."""
    seconds = {name: [] for name in names}
    with contextlib.ExitStack() as stack:
        processes, weights = {}, {}
        for name in track(names, "Building and warming up"):
            processes[name] = stack.enter_context(start(name, batch_size))
            weights[name] = answer(name, processes[name])
        if len(set(weights.values()) - {None}) > 1:
            raise RuntimeError(f"The contenders are not the same model: {weights} weights.")
        for _ in track(range(rounds), "Rounds"):
            for name, process in processes.items():
                print(steps, file=process.stdin, flush=True)
                seconds[name].append(answer(name, process))
    return seconds


def report(seconds, batch_size):
    """Prints the table and the goals; our speed over each contender's, by minimum and median."""
    table = Table("contender")
    for title in ("s/step, min", "median", "images/s", "median", "ours / it", "median"):
        table.add_column(title, justify="right", no_wrap=True)
    ratios = {}
    for name, values in seconds.items():
        fastest, median = min(values), statistics.median(values)
        ratios[name] = (
            fastest / min(seconds[OURS]),
            median / statistics.median(seconds[OURS]),
        )
        figures = [f"{fastest:.3f}", f"{median:.3f}"]
        figures += [f"{batch_size / fastest:.2f}", f"{batch_size / median:.2f}"]
        table.add_row(name, *figures, *(f"{ratio:.2f}" for ratio in ratios[name]))
    Console().print(table)
    for peer, goal in GOALS.items():
        modes = [ratio for name, ratio in ratios.items() if name.startswith(peer)]
        if modes:
            by_min, by_median = (min(values) for values in zip(*modes, strict=True))
            print(
                f"{OURS} / {peer}'s faster mode: {by_min:.2f} by the minimum, {by_median:.2f} by "
                f"the median; the goal is {goal}"
            )
    return ratios


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="of each contender in a round")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--serve", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments.serve, arguments.batch_size)

    names, versions = [], {}
    for name, (_, packages) in CONTENDERS.items():
        if absent := missing(packages):
            print(f"{name} is left out: {absent} is not installed.")
        else:
            names.append(name)
            versions |= {package: importlib.metadata.version(package) for package in packages}
    seconds = measure(names, arguments.rounds, arguments.steps, arguments.batch_size)
    ratios = report(seconds, arguments.batch_size)
    result = {
        "batch_size": arguments.batch_size,
        "steps": arguments.steps,
        "cores": len(os.sched_getaffinity(0)),
        "versions": versions,
        "seconds_per_step": seconds,
        "ours_over_contender": ratios,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
