"""How time and memory grow with the image, the patch, the batch and the depth.

    python benchmarks/growth.py

A ViT of width 192 with 3 heads, 2 blocks, patches of 16 px, 224 px and 8 images, unless they are
what grows: its forward pass and training step as in speed.py, and its fp32 `.tflite` file (batch
1, loaded anew). Beside the exponent p of x^p that fits best stands that of theory over the same
points: for time, of the multiplications; for memory, of the bytes that must be kept. Each of the
three is a process of its own, and in TensorFlow another one, without oneDNN, tells its memory: what
one call takes beyond what the process held before it. That includes the weights of a file, which
each call loads, but not those of a model in TensorFlow.

Micro-batches: a training step of 64 images in k parts, and of 8 k images in k parts.
"""

import pathlib
import statistics
import tempfile
import time

import models
import numpy as np
from harness import (
    Contender,
    compare,
    compare_with_memory,
    described,
    draw,
    exponent,
    markdown,
    parser,
    save,
)

PACKAGES = ("keras", "tensorflow", "ai-edge-litert")
WIDTH, HEADS, MLP = 192, 3, 768
BASE = {"image": 224, "patch": 16, "batch": 8, "depth": 2, "parts": 1}
SERIES = {
    "image": (96, 160, 288, 512),
    "patch": (32, 28, 16, 8),
    "batch": (1, 4, 16, 64),
    "depth": (1, 2, 4, 8),
}
QUICK = {"image": (64, 128)}
PARTS = (8, 2, 1)
BATCHES_OF_PARTS = (lambda k: 64, lambda k: 8 * k)
KINDS = ("forward", "training", "fp32")
IN_TENSORFLOW = KINDS[:2]


def tokens(case):
    """Patches of an image, and the class token."""
    return (case["image"] // case["patch"]) ** 2 + 1


def size(case):
    """hidden_dim, depth, num_heads, mlp_dim."""
    return WIDTH, case["depth"], HEADS, MLP


def kept(case, kind):
    """Bytes that a call must take at once.

    Of a pass: the residual stream and the largest of what a block makes of it, scores or MLP. Of a
    step: the gradients, and per block and image of a part the inputs of products, norms, softmax
    and GELU, which the backward pass reads again. Of a file: its weights, and a pass. The last
    block is counted as in `models.multiplications`.
    """
    n, d = tokens(case), WIDTH
    weights = (
        case["depth"] * (4 * d * d + 2 * d * MLP) + (3 * case["patch"] ** 2 + models.CLASSES) * d
    )
    if kind == "training":
        block = n * (8 * d + 2 * MLP) + HEADS * n**2
        last = n * 4 * d + 4 * d + 2 * MLP + HEADS * n  # norm, its input, k and v; one token
        images = case["batch"] // case["parts"]
        return 4 * (weights + images * ((case["depth"] - 1) * block + last))
    block = max(3 * n * d + HEADS * n**2, n * MLP) if case["depth"] > 1 else 2 * n * d
    pass_ = 4 * case["batch"] * (n * d + block)
    return pass_ + (4 * weights if kind == "fp32" else 0)


def build(case):
    import keras_vit

    vit = keras_vit.ViTConfig(*size(case), case["patch"])
    return keras_vit.build_vit(vit, image_size=case["image"], num_classes=models.CLASSES)


def images(case):
    shape = (case["batch"], case["image"], case["image"], 3)
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def contender(kind):
    """What is measured; its cases are dictionaries as `BASE`."""
    return {"forward": forward, "training": training}.get(kind, file)(kind), None


def forward(_):
    import tensorflow as tf

    import keras_vit

    def make(case):
        vit = keras_vit.skip_unread_tokens(build(case))
        function = tf.function(lambda x: vit(x, training=False), jit_compile=True)
        x = tf.constant(images(case))

        def run(calls):
            for _ in range(calls):
                function(x).numpy()

        return run

    return make


def training(_):
    import keras

    import keras_vit
    from keras_vit.training import DistributedModel

    def make(case):
        vit = keras_vit.skip_unread_tokens(build(case))
        model = DistributedModel(vit.input, vit.output)
        model.compile(
            keras.optimizers.AdamW(1e-4),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            micro_batches=case["parts"],
        )
        batches = models.repeated((images(case), np.arange(case["batch"])))

        def run(calls):
            model.fit(batches, steps_per_epoch=calls, shuffle=False, verbose=0)

        return run

    return make


def file(mode):
    """A file; each run loads it anew, which its time leaves out and its memory does not."""
    from ai_edge_litert.interpreter import Interpreter
    from harness import cores

    from keras_vit.export import export_tflite

    def make(case):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "vit.tflite"
            export_tflite(build(case), path, mode=mode)
            content = path.read_bytes()

        x = images(case)

        def run(calls):
            interpreter = Interpreter(model_content=content, num_threads=cores())
            interpreter.allocate_tensors()
            [details] = interpreter.get_input_details()
            interpreter.set_tensor(details["index"], x)
            interpreter.invoke()
            start = time.perf_counter()
            for _ in range(calls):
                interpreter.invoke()
            return time.perf_counter() - start

        return run

    return make


def measured_series(kind, grown, quick):
    """Measures what grows, in one process, and each case once; returns it beside theory.

    Args:
        kind: One of `KINDS`.
        grown: Pairs of what grows and its cases, which the series may have in common.
        quick: Whether to do with less.
    """
    cases = []
    for _, own in grown:
        cases += [case for case in own if case not in cases]
    cases.sort(key=lambda case: kept(case, kind))  # the largest last: memory may end the process
    # A file gives back what it takes: its process tells both. A quick run does with less.
    measure = compare_with_memory if kind in IN_TENSORFLOW and not quick else compare
    contenders = {kind: Contender(contender, None, PACKAGES, {"kind": kind})}
    measured = measure(contenders, cases, rounds=2 if quick else 3, turn=0.2)
    points = [
        {
            **case,
            "multiplications": case["batch"]
            * models.multiplications(size(case), case["image"], case["patch"]),
            "kept_bytes": kept(case, kind),
            **entry["contenders"][kind],
        }
        for case, entry in zip(cases, measured, strict=True)
    ]
    return [
        {"kind": kind, "grows": grows, "points": [points[cases.index(case)] for case in own]}
        for grows, own in grown
    ]


def why_missing(series, fewest=2):
    """The reason why a series has nothing to show, or None; it takes `fewest` points to show."""
    reasons = [point["missing"] for point in series["points"] if "missing" in point]
    return reasons[0] if len(series["points"]) - len(reasons) < fewest else None


def curves(series):
    """x, and of time and of memory what was measured and what theory says; of no failed point."""
    points = [point for point in series["points"] if "missing" not in point]
    return (
        [point[series["grows"]] for point in points],
        [min(point["seconds"]) for point in points],
        [point["multiplications"] for point in points],
        [point["call_bytes"] for point in points],
        [point["kept_bytes"] for point in points],
    )


def is_known(values):
    """Whether each has a logarithm: memory is told on Linux alone, and may be lost in noise."""
    return all(value is not None and value > 0 for value in values)


def table(result):
    """Exponents, then the micro-batches."""
    rows, missing = [], []
    for series in result["series"]:
        if reason := why_missing(series):
            missing.append(f"{series['kind']}, {series['grows']} is missing: {reason}\n")
            continue
        x, *values = curves(series)
        name = f"{series['kind']}, {series['grows']} {x[0]} to {x[-1]}"
        rows.append((name, *(f"{exponent(x, y):.2f}" if is_known(y) else "" for y in values)))
    columns = ("", "time, p", "theory", "memory, p", "theory")
    parts = [markdown(columns, rows)]
    rows = [
        (
            f"{point['batch']} images in {point['parts']}",
            f"{min(point['seconds']):.3f}, {statistics.median(point['seconds']):.3f}",
            f"{point['call_bytes'] / 1e6:.0f}" if is_known([point["call_bytes"]]) else "",
            f"{point['kept_bytes'] / 1e6:.0f}",
        )
        for series in result["micro_batches"]
        for point in series["points"]
        if why_missing(series, 1) is None and "missing" not in point
    ]
    for series in result["micro_batches"]:
        if reason := why_missing(series, 1):
            batches = " to ".join(str(series["points"][i]["batch"]) for i in (0, -1))
            missing.append(f"Micro-batches of {batches} images are missing: {reason}\n")
    parts.append(markdown(("micro-batches", "s per step: min, median", "MB", "theory"), rows))
    return "\n".join([*parts, *missing, described(result)])


def plot(result, path):
    """Time above memory against what grows, log-log; dotted theory, through the middle point."""
    grown = list(dict.fromkeys(series["grows"] for series in result["series"]))

    def panel(grows, measured, theory, title):
        def curve(axes):
            for series in result["series"]:
                if series["grows"] != grows or why_missing(series):
                    continue
                values = curves(series)
                x, y, expected = values[0], values[measured], values[theory]
                if not is_known(y):
                    continue
                label = f"{series['kind']} {exponent(x, y):.2f} ({exponent(x, expected):.2f})"
                [line] = axes.loglog(x, y, "o-", label=label)
                middle = len(x) // 2
                scaled = [value * y[middle] / expected[middle] for value in expected]
                axes.loglog(x, scaled, ":", color=line.get_color())
            axes.set_title(f"{title} against {grows}: p (theory)")
            if axes.lines:
                axes.legend(fontsize="small")

        return curve

    draw(
        path,
        [panel(grows, 1, 2, "s per call") for grows in grown],
        [panel(grows, 3, 4, "bytes") for grows in grown],
    )


def main():
    quick = parser(__doc__).parse_args().quick
    series, micro_batches = [], []
    for kind in KINDS:
        is_file = kind not in IN_TENSORFLOW
        base = {**BASE, "batch": 1} if is_file or quick else BASE
        grown = [
            (grows, [{**base, grows: value} for value in values])
            for grows, values in (QUICK if quick else SERIES).items()
            if not (is_file and grows == "batch")  # a file takes one image
        ]
        if kind == "training":
            grown += in_parts({**BASE, "image": 64} if quick else BASE, quick)
        for measured in measured_series(kind, grown, quick):
            (micro_batches if measured["grows"] == "parts" else series).append(measured)
    save("growth", quick, series=series, micro_batches=micro_batches)


def in_parts(base, quick):
    """Micro-batches: pairs as `measured_series` takes them."""
    return [
        (
            "parts",
            [{**base, "parts": k, "batch": batch(k)} for k in (PARTS[1:] if quick else PARTS)],
        )
        for batch in BATCHES_OF_PARTS[1 if quick else 0 :]
    ]


if __name__ == "__main__":
    main()
