"""How fast a ViT computes and trains on the CPU: keras-vit and its peers in turns.

    python benchmarks/speed.py

ViT-Ti/16 and S/16 at 224 px, 1,000 classes, float32, no dropout, the same batch of noise each time,
which lies in memory. `forward` is inference; `training` a step of it: forward pass, softmax
cross-entropy, backward pass and AdamW's update. Each contender runs as its users would run it:

- keras-vit: `skip_unread_tokens(vit)`, as `keras-vit train` does; inference by
  `tf.function(jit_compile=True)` of it, training by `DistributedModel` as it comes;
- keras-vit, JAX: the same model on that backend, a pass or a step in one `jax.jit`;
- its products alone: the matrix products of our pass or step and nothing else, compiled by XLA;
- KerasHub: `predict` and `fit` as they come; "XLA": `tf.function(jit_compile=True)`, and `fit` with
  `compile(jit_compile=True)`;
- keras.io example: what "Image classification with Vision Transformer" builds (positions in an
  Embedding, keras.layers.MultiHeadAttention, an MLP), at our size. So the heads' width is
  hidden_dim / num_heads, and where it flattens all tokens into a large MLP, the mean of the tokens
  goes to one Dense layer. It has no class token. `predict` and `fit`; "XLA": the former alone;
- vit-keras: its own `build_model`. `predict` and `fit`; "XLA": the former alone;
- timm and vit-pytorch: PyTorch as it comes, and "compiled": `torch.compile`. vit-pytorch has no
  bias in qkv, and two norms more about the patch projection.

`training in bfloat16` is the same in mixed precision, for CPUs that multiply bfloat16 themselves
(others leave it out): Keras' policy `mixed_bfloat16`, with which ours leaves XLA out (`keras-vit
train --precision mixed_bfloat16`), PyTorch's autocast, and ours in float32 as in `training`.
"""

import dataclasses
import statistics

import models
from harness import (
    Contender,
    compare,
    described,
    draw,
    markdown,
    parser,
    ratio,
    save,
    versions_line,
)

OURS, PRODUCTS = "keras-vit", "its products alone"
# As many as 24 GB hold together when they are large; of timm the compiled mode alone.
FEW = (OURS, PRODUCTS, "KerasHub", "KerasHub, XLA", "timm, compiled")
MIXED = (OURS, "KerasHub", "KerasHub, XLA", "timm, compiled")
FORWARD_ALONE = ("keras.io example, XLA", "vit-keras, XLA")  # 24 GB do not hold their steps as well
BFLOAT16 = " in bfloat16"  # ends the kind of a group
GROUPS = (  # variant, kind, batches, rounds, contenders or None for all
    ("Ti/16", "forward", (1, 8, 32), 3, None),
    ("Ti/16", "training", (8,), 3, None),
    ("Ti/16", "training", (32,), 4, FEW),
    ("Ti/16", f"training{BFLOAT16}", (32,), 3, MIXED),
    ("S/16", "forward", (1, 32), 3, FEW),
    ("S/16", "training", (8,), 3, FEW),
)
AS_THEY_COME = (  # what torch.compile does takes half a minute each time
    OURS,
    f"{OURS}, JAX",
    PRODUCTS,
    "KerasHub",
    "keras.io example",
    "vit-keras",
    "timm",
    "vit-pytorch",
)
QUICK = (
    ("two blocks of Ti/16", "forward", (1,), 2, AS_THEY_COME),
    ("two blocks of Ti/16", "training", (1,), 2, (OURS, PRODUCTS, "timm, compiled")),
    ("two blocks of Ti/16", f"training{BFLOAT16}", (1,), 2, (OURS, "KerasHub, XLA")),
)
SAME = (OURS, "KerasHub", "vit-keras", "timm")
CLAIMED = (
    "KerasHub",
    "keras.io example",
    "vit-keras",
    "timm",
    "vit-pytorch",
)  # of the peers, in README
# (kind, peer, what, goal) for each size and batch: ours against the better mode of the peer.
GOALS = (
    ("forward", "KerasHub", "speed", 1.2),
    ("forward", "timm", "speed", 1.0),
    ("training", "KerasHub", "speed", 1.25),
    ("training", "timm", "speed", 1.0),
    ("training", "KerasHub", "memory", 1.0),
    ("training", "timm", "memory", 1.0),
    (f"training{BFLOAT16}", "KerasHub", "speed", 1.25),
    (f"training{BFLOAT16}", "timm", "speed", 1.0),
)


def contenders(variant, kind):
    keras = ("keras", "tensorflow")

    def one(build, environment, *packages, **options):
        options = {"variant": variant, "kind": kind, **options}
        return Contender(build, environment, packages, options)

    return {
        OURS: one(models.ours, None, *keras),
        f"{OURS}, JAX": Contender(
            models.ours_on_jax,
            None,
            ("keras", "jax"),
            {"size": models.SIZES[variant], "kind": kind},
            {"KERAS_BACKEND": "jax"},
        ),
        PRODUCTS: one(models.products, None, "tensorflow"),
        "KerasHub": one(models.keras_hub, "keras-hub", *keras, "keras-hub", xla=False),
        "KerasHub, XLA": one(models.keras_hub, "keras-hub", *keras, "keras-hub", xla=True),
        "keras.io example": one(models.keras_io_example, None, *keras, xla=False),
        "keras.io example, XLA": one(models.keras_io_example, None, *keras, xla=True),
        "vit-keras": one(models.vit_keras, "vit-keras", *keras, "vit-keras", xla=False),
        "vit-keras, XLA": one(models.vit_keras, "vit-keras", *keras, "vit-keras", xla=True),
        "timm": one(models.timm, "timm", "torch", "timm", compiled=False),
        "timm, compiled": one(models.timm, "timm", "torch", "timm", compiled=True),
        "vit-pytorch": one(
            models.vit_pytorch, "vit-pytorch", "torch", "vit-pytorch", compiled=False
        ),
        "vit-pytorch, compiled": one(
            models.vit_pytorch, "vit-pytorch", "torch", "vit-pytorch", compiled=True
        ),
    }


def in_bfloat16(chosen):
    """The contenders in mixed precision, and ours in float32 with them."""
    mixed = {
        name: dataclasses.replace(contender, options={**contender.options, "mixed": True})
        for name, contender in chosen.items()
    }
    return {**mixed, f"{OURS}, float32": chosen[OURS]}


def same_model(entries):
    """The entries; who should be our model and has another number of weights becomes missing."""
    weights = entries[OURS].get("weights")

    def is_other(name, entry):
        has = entry.get("weights", weights)
        return weights is not None and name.split(",")[0] in SAME and has != weights

    return {
        name: {"missing": f"another model: {entry['weights']:,} weights"}
        if is_other(name, entry)
        else entry
        for name, entry in entries.items()
    }


def table(result):
    """Goals, then a table for each size and kind."""
    parts = [goals_table(result), memory_table(result)]
    for group in result["groups"]:
        cases = group["cases"]
        columns = ["contender", "weights"]
        for case in cases:
            columns += [f"batch {case['case']}, ms", "ours / it"]
        columns.append("peak MB")
        rows = [group_row(name, cases) for name in cases[-1]["contenders"]]
        parts.append(f"{group['variant']}, {group['kind']}:\n\n{markdown(columns, rows)}")
    return "\n".join([*parts, missing_list(result), described(result)])


def group_row(name, cases):
    """Minimum and median of a contender's time, and our speed over its."""
    row = [name, ""]
    for case in cases:
        entry, best = case["contenders"][name], case["contenders"][OURS]
        if "missing" in entry:
            row += ["missing", ""]
            continue
        row[1] = f"{entry['weights']:,}" if entry["weights"] else ""
        times = [1e3 * f(entry["seconds"]) for f in (min, statistics.median)]
        row.append(", ".join(f"{time:.{0 if time >= 100 else 1}f}" for time in times))
        both = () if "missing" in best else (min, statistics.median)
        ratios = [ratio(best, entry, f) for f in both]
        row.append(", ".join(f"{value:.2f}" for value in ratios))
    peak = cases[-1]["contenders"][name].get("peak_bytes")
    return [*row, f"{peak / 1e6:,.0f}" if peak else ""]


def missing_list(result):
    """Who could not be measured, and why; and the versions of those who could."""
    reasons, versions = {}, {}
    for group in result["groups"]:
        for case in group["cases"]:
            for name, entry in case["contenders"].items():
                versions |= entry.get("versions", {})
                if "missing" in entry:
                    where = f"{name} ({group['variant']}, {group['kind']}, batch {case['case']})"
                    reasons.setdefault((name, entry["missing"]), where)
    lines = [f"{where} is missing: {reason}\n" for (_, reason), where in reasons.items()]
    return "\n".join([*lines, versions_line(versions)])


def modes_of(peer, entries):
    """What was measured of each mode of a peer."""
    return [
        entry
        for name, entry in entries.items()
        if name.split(",")[0] == peer and "missing" not in entry
    ]


def judged(result):
    """Each goal as (case, what, peer, goal, values, bound): see `against`.

    The bound is what the products alone would reach, or None.
    """
    for group in result["groups"]:
        for case in group["cases"]:
            entries = case["contenders"]
            for kind, peer, what, goal in GOALS if "missing" not in entries[OURS] else ():
                modes = modes_of(peer, entries)
                if group["kind"] != kind or not modes:
                    continue
                values = against(entries[OURS], modes, what)
                if None in values:  # memory is told on Linux alone
                    continue
                products = modes_of(PRODUCTS, entries) if what == "speed" else []
                bound = against(products[0], modes, what) if products else None
                name = f"{group['variant']}, {kind}, batch {case['case']}"
                yield name, what, peer, goal, values, bound


def against(entry, modes, what):
    """Our speed over that of the fastest mode, by minimum and median; or our memory over its."""
    if what == "speed":
        return [min(ratio(entry, mode, f) for mode in modes) for f in (min, statistics.median)]
    peaks = [mode["peak_bytes"] for mode in modes]
    return [entry["peak_bytes"] / min(peaks)] if all([entry["peak_bytes"], *peaks]) else [None]


def verdict(kept):
    """Of whether a goal is kept by minimum and by median, of which the first decides."""
    if all(kept):
        return "kept"
    return "kept by the minimum alone" if kept[0] else "missed"


def goals_table(result):
    rows = []
    for name, what, peer, goal, values, bound in judged(result):
        speed = what == "speed"
        rows.append(
            (
                f"{name}: {what} / {peer}",
                f"{'>=' if speed else '<='} {goal}",
                ", ".join(f"{value:.3f}" for value in values),
                verdict([value >= goal if speed else value <= goal for value in values]),
                ", ".join(f"{value:.2f}" for value in bound or ()),
            )
        )
    columns = ("ours over the better mode of the peer", "goal", "is", "", PRODUCTS)
    return markdown(columns, rows)


def memory_table(result):
    """What a training step takes at any batch, and for each image: the line through two batches.

    And what the process held before its first call, which is part of the former.
    """
    entries = {}  # (variant, contender) -> batch -> what was measured
    for group in result["groups"]:
        for case in group["cases"] if group["kind"] == "training" else ():
            for name, entry in case["contenders"].items():
                if entry.get("peak_bytes"):
                    entries.setdefault((group["variant"], name), {})[case["case"]] = entry
    rows = []
    for (variant, name), measured in entries.items():
        if len(measured) == 2:
            (few, less), (many, more) = sorted(measured.items())
            each = (more["peak_bytes"] - less["peak_bytes"]) / (many - few)
            at_any_batch = less["peak_bytes"] - few * each
            values = [
                f"{value / 1e6:,.0f}" for value in (less["resident_bytes"], at_any_batch, each)
            ]
            rows.append((f"{variant}: {name}", *values))
    columns = ("memory of a training step", "MB before it", "MB at any batch", "MB for each image")
    return markdown(columns, rows) if rows else ""


def plot(result, path):
    """Images per second of each contender at the largest batch, a panel for each size and kind."""

    def panel(group):
        def bars(axes):
            case = group["cases"][-1]
            entries = {k: v for k, v in case["contenders"].items() if "missing" not in v}
            speeds = [case["case"] / min(entry["seconds"]) for entry in entries.values()]
            colors = [
                "C1" if name.startswith(OURS) else "C7" if name == PRODUCTS else "C0"
                for name in entries
            ]
            axes.barh(list(entries), speeds, color=colors)
            axes.invert_yaxis()
            axes.set_title(f"{group['variant']}, {group['kind']}, batch {case['case']}: images/s")

        return bars

    draw(path, [panel(group) for group in result["groups"]], width=4.5)


def claims(result):
    """README's table: ours over the better mode of each peer."""
    rows = [
        claim(f"{group['variant']}, {group['kind']}, batch {case['case']}", case)
        for group in result["groups"]
        for case in group["cases"]
    ]
    columns = ["", "images/s", *(f"/ {peer}" for peer in CLAIMED)]
    return markdown(columns, rows) + "\n" + described(result)


def claim(name, case):
    """A row of `claims`."""
    entries = case["contenders"]
    if "missing" in entries[OURS]:
        return [name, "missing", *("" for _ in CLAIMED)]
    row = [name, f"{case['case'] / min(entries[OURS]['seconds']):.1f}"]
    for peer in CLAIMED:
        if modes := modes_of(peer, entries):
            row.append(f"{against(entries[OURS], modes, 'speed')[0]:.2f}")
        else:
            row.append("missing" if any(name.split(",")[0] == peer for name in entries) else "")
    return row


def main():
    quick = parser(__doc__).parse_args().quick
    groups = []
    for variant, kind, batches, rounds, few in QUICK if quick else GROUPS:
        print(f"{variant}, {kind}", flush=True)
        chosen = contenders(variant, kind.removesuffix(BFLOAT16))
        everyone = [name for name in chosen if kind == "forward" or name not in FORWARD_ALONE]
        chosen = {name: chosen[name] for name in few or everyone}
        if kind.endswith(BFLOAT16):
            from keras_vit.training.distributed import cpu_multiplies_bfloat16

            if not cpu_multiplies_bfloat16():
                print("left out: this CPU has no instructions for it", flush=True)
                continue
            chosen = in_bfloat16(chosen)
        cases = compare(
            chosen,
            batches,
            rounds=rounds,
            turn=0.1 if quick else 0.5,
            least_calls=1 if kind == "forward" else 2,
        )
        cases = [{**case, "contenders": same_model(case["contenders"])} for case in cases]
        groups.append({"variant": variant, "kind": kind, "cases": cases})
    save("speed", quick, groups=groups)


if __name__ == "__main__":
    main()
