"""How fast a ViT computes and trains on the CPU: keras-vit and its peers in turns.

    python benchmarks/speed.py

ViT-Ti/16 and S/16 at 224 px, 1,000 classes, float32, no dropout, the same batch of noise each time,
which lies in memory. `forward` is inference; `training` a step of it: forward pass, softmax
cross-entropy, backward pass and AdamW's update. Each contender runs as its users would run it:

- keras-vit: `skip_unread_tokens(vit)`, as `keras-vit train` does; inference by
  `tf.function(jit_compile=True)` of it, training by `DistributedModel` as it comes, with XLA;
- its products alone: the matrix products of our pass or step and nothing else, compiled by XLA;
- KerasHub: `predict` and `fit` as they come; "XLA": `tf.function(jit_compile=True)`, and `fit` with
  `compile(jit_compile=True)`;
- keras.io example: what "Image classification with Vision Transformer" builds (positions in an
  Embedding, keras.layers.MultiHeadAttention, an MLP), at our size. So the heads' width is
  hidden_dim / num_heads, and where it flattens all tokens into a large MLP, the mean of the tokens
  goes to one Dense layer. It has no class token. `predict` and `fit`;
- vit-keras: its own `build_model`, `predict` and `fit`;
- timm and vit-pytorch: PyTorch as it comes, and "compiled": `torch.compile`. vit-pytorch has no
  bias in qkv, and two norms more about the patch projection.
"""

import statistics

import numpy as np
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

CLASSES, SIDE, PATCH = 1000, 224, 16
LEARNING_RATE = 1e-4
OURS, PRODUCTS = "keras-vit", "its products alone"
SIZES = {  # hidden_dim, depth, num_heads, mlp_dim
    "Ti/16": (192, 12, 3, 768),
    "S/16": (384, 12, 6, 1536),
}
BATCHES = {"forward": (1, 8, 32), "training": (8, 32)}
CLAIMED = ("KerasHub", "keras.io example", "timm", "vit-pytorch")  # of the peers, in README
# (kind, batch, peer, what, goal) for each size: ours against the better mode of the peer.
GOALS = (
    ("forward", 32, "KerasHub", "speed", 1.2),
    ("forward", 32, "timm", "speed", 1.0),
    ("forward", 1, "KerasHub", "speed", 1.2),
    ("training", 32, "KerasHub", "speed", 1.25),
    ("training", 32, "timm", "speed", 1.0),
    ("training", 32, "KerasHub", "memory", 1.0),
    ("training", 32, "timm", "memory", 1.0),
)


def data(batch):
    """Images (B, H, W, C) and one-hot labels."""
    random = np.random.default_rng(0)
    images = random.normal(size=(batch, SIDE, SIDE, 3)).astype("float32")
    return images, np.eye(CLASSES, dtype="float32")[random.integers(CLASSES, size=batch)]


def ours(variant, kind):
    import keras_vit
    from keras_vit.training import DistributedModel

    vit = keras_vit.skip_unread_tokens(keras_vit.build_vit(variant, num_classes=CLASSES))
    if kind == "forward":
        return keras_forward(vit, xla=True)
    return keras_training(DistributedModel(vit.input, vit.output))


def keras_hub(variant, kind, xla):
    from keras_hub.models import ViTBackbone, ViTImageClassifier

    hidden_dim, depth, num_heads, mlp_dim = SIZES[variant]
    backbone = ViTBackbone(
        image_shape=(SIDE, SIDE, 3),
        patch_size=PATCH,
        num_layers=depth,
        num_heads=num_heads,
        hidden_dim=hidden_dim,
        mlp_dim=mlp_dim,
    )
    return keras_contender(ViTImageClassifier(backbone, CLASSES), kind, xla)


def vit_keras(variant, kind):
    from vit_keras import vit

    hidden_dim, depth, num_heads, mlp_dim = SIZES[variant]
    model = vit.build_model(
        image_size=SIDE,
        patch_size=PATCH,
        num_layers=depth,
        hidden_size=hidden_dim,
        num_heads=num_heads,
        name="vit",
        mlp_dim=mlp_dim,
        classes=CLASSES,
        dropout=0.0,
    )
    return keras_contender(model, kind)


def keras_io_example(variant, kind):
    import keras
    from keras import layers

    class Patches(layers.Layer):
        """Images -> (B, N, P * P * C)."""

        def call(self, images):
            patches = keras.ops.image.extract_patches(images, PATCH)
            return keras.ops.reshape(patches, (-1, (SIDE // PATCH) ** 2, PATCH * PATCH * 3))

    class PatchEncoder(layers.Layer):
        """A projection, plus an embedding of the place."""

        def __init__(self, patches, width):
            super().__init__()
            self.patches = patches
            self.projection = layers.Dense(width)
            self.positions = layers.Embedding(patches, width)

        def call(self, x):
            places = keras.ops.expand_dims(keras.ops.arange(self.patches), 0)
            return self.projection(x) + self.positions(places)

    hidden_dim, depth, num_heads, mlp_dim = SIZES[variant]
    inputs = keras.Input((SIDE, SIDE, 3))
    x = PatchEncoder((SIDE // PATCH) ** 2, hidden_dim)(Patches()(inputs))
    for _ in range(depth):
        y = layers.LayerNormalization(epsilon=1e-6)(x)
        y = layers.MultiHeadAttention(num_heads, hidden_dim // num_heads)(y, y)
        x = layers.Add()([y, x])
        y = layers.LayerNormalization(epsilon=1e-6)(x)
        for units in (mlp_dim, hidden_dim):
            y = layers.Dense(units, activation=keras.activations.gelu)(y)
        x = layers.Add()([y, x])
    x = layers.LayerNormalization(epsilon=1e-6)(x)
    logits = layers.Dense(CLASSES)(layers.GlobalAveragePooling1D()(x))
    return keras_contender(keras.Model(inputs, logits), kind)


def keras_contender(model, kind, xla=False):
    if kind == "forward":
        return keras_forward(model, xla)
    return keras_training(model, **({"jit_compile": True} if xla else {}))


def keras_forward(model, xla):
    import tensorflow as tf

    function = tf.function(lambda images: model(images, training=False), jit_compile=True)

    def make(batch):
        images = tf.constant(data(batch)[0])
        batches = repeated(images)

        def run(calls):
            if not xla:
                return model.predict(batches, steps=calls, verbose=0)
            for _ in range(calls):
                function(images).numpy()

        return lambda calls: ignore(run(calls))

    return make, model.count_params()


def ignore(_):
    """Gives None: of a contender's run, anything else would be its time."""


def keras_training(model, **options):
    import keras

    model.compile(
        keras.optimizers.AdamW(LEARNING_RATE),
        keras.losses.CategoricalCrossentropy(from_logits=True),
        metrics=[],  # KerasHub would choose some
        **options,
    )

    def make(batch):
        batches = repeated(data(batch))
        return lambda calls: ignore(
            model.fit(batches, steps_per_epoch=calls, shuffle=False, verbose=0)
        )

    return make, model.count_params()


def repeated(tensors):
    import tensorflow as tf

    options = tf.data.Options()
    options.autotune.enabled = False  # its thread lets the end of `fit` wait, up to a minute
    return tf.data.Dataset.from_tensors(tensors).repeat().with_options(options)


def timm(variant, kind, compiled):
    import timm

    name = {"Ti/16": "vit_tiny_patch16_224", "S/16": "vit_small_patch16_224"}[variant]
    return torch_contender(timm.create_model(name, num_classes=CLASSES), kind, compiled)


def vit_pytorch(variant, kind, compiled):
    import vit_pytorch

    hidden_dim, depth, num_heads, mlp_dim = SIZES[variant]
    model = vit_pytorch.ViT(
        image_size=SIDE,
        patch_size=PATCH,
        num_classes=CLASSES,
        dim=hidden_dim,
        depth=depth,
        heads=num_heads,
        mlp_dim=mlp_dim,
        dim_head=hidden_dim // num_heads,
    )
    return torch_contender(model, kind, compiled)


def torch_contender(model, kind, compiled):
    import torch

    forward = torch.compile(model, dynamic=False) if compiled else model

    def make_forward(batch):
        images = torch.from_numpy(data(batch)[0].transpose(0, 3, 1, 2).copy())  # (B, C, H, W)
        model.eval()

        def run(calls):
            with torch.inference_mode():
                for _ in range(calls):
                    forward(images)

        return run

    def make_training(batch):
        images, labels = data(batch)
        images = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        labels = torch.from_numpy(labels)
        optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, fused=True)
        model.train()

        def run(calls):
            for _ in range(calls):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(forward(images), labels).backward()
                optimizer.step()

        return run

    weights = sum(weight.numel() for weight in model.parameters())
    return make_forward if kind == "forward" else make_training, weights


def products(variant, kind):
    """The matrix products of our pass or step alone, by XLA.

    A ViT without norms, biases, softmax, GELU and residuals, of the same shapes and weights.
    """
    import tensorflow as tf

    def weight(*shape):
        return tf.Variable(tf.random.normal(shape, stddev=shape[0] ** -0.5))

    width, depth, heads, mlp = SIZES[variant]
    embedding, head = weight(PATCH * PATCH * 3, width), weight(width, CLASSES)
    blocks = [
        (weight(width, 3 * width), weight(width, width), weight(width, mlp), weight(mlp, width))
        for _ in range(depth)
    ]
    variables = [embedding, head, *(weight for block in blocks for weight in block)]

    def split(x, count):
        return tf.transpose(tf.reshape(x, (len(x), -1, count, width // heads)), (0, 2, 1, 3))

    def forward(patches):
        x = tf.pad(patches @ embedding, ((0, 0), (1, 0), (0, 0)))
        for i, (qkv, proj, fc1, fc2) in enumerate(blocks):
            if i < depth - 1:
                q, k, v = tf.split(split(x @ qkv, 3 * heads), 3, axis=1)
            else:  # the class token alone
                q = split(x[:, :1] @ qkv[:, :width], heads)
                k, v = tf.split(split(x @ qkv[:, width:], 2 * heads), 2, axis=1)
            x = tf.matmul(tf.matmul(q, k, transpose_b=True), v)
            x = tf.reshape(tf.transpose(x, (0, 2, 1, 3)), (len(patches), -1, width))
            x = x @ proj @ fc1 @ fc2
        return x[:, 0] @ head

    @tf.function(jit_compile=True)
    def step(patches):
        if kind == "forward":
            return forward(patches)
        with tf.GradientTape() as tape:
            y = tf.reduce_sum(forward(patches))
        return tape.gradient(y, variables)

    def make(batch):
        patches = tf.constant(data(batch)[0].reshape(batch, (SIDE // PATCH) ** 2, -1))

        def run(calls):
            for _ in range(calls):
                tf.nest.flatten(step(patches))[0].numpy()

        return run

    return make, None


def contenders(variant, kind):
    keras = ("keras", "tensorflow")

    def one(build, environment, *packages, **options):
        options = {"variant": variant, "kind": kind, **options}
        return Contender(build, environment, packages, options)

    return {
        OURS: one(ours, None, *keras),
        PRODUCTS: one(products, None, "tensorflow"),
        "KerasHub": one(keras_hub, "keras-hub", *keras, "keras-hub", xla=False),
        "KerasHub, XLA": one(keras_hub, "keras-hub", *keras, "keras-hub", xla=True),
        "keras.io example": one(keras_io_example, None, *keras),
        "vit-keras": one(vit_keras, "vit-keras", *keras, "vit-keras"),
        "timm": one(timm, "timm", "torch", "timm", compiled=False),
        "timm, compiled": one(timm, "timm", "torch", "timm", compiled=True),
        "vit-pytorch": one(vit_pytorch, "vit-pytorch", "torch", "vit-pytorch", compiled=False),
        "vit-pytorch, compiled": one(
            vit_pytorch, "vit-pytorch", "torch", "vit-pytorch", compiled=True
        ),
    }


def check_same_model(measured):
    """Raises ValueError unless keras-vit, KerasHub and timm have the same number of weights."""
    weights = {
        name: entry["weights"]
        for name, entry in measured.items()
        if "missing" not in entry and name.split(",")[0] in (OURS, "KerasHub", "timm")
    }
    if len(set(weights.values())) > 1:
        raise ValueError(f"The contenders must be the same model. Received: {weights} weights.")


def table(result):
    """Goals, then a table for each size and kind."""
    parts = [goals_table(result)]
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
        ratios = [ratio(best, entry, f) for f in (min, statistics.median)]
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
                    reasons.setdefault(entry["missing"], where)
    lines = [f"{where} is missing: {reason}\n" for reason, where in reasons.items()]
    return "\n".join([*lines, versions_line(versions)])


def judged(result):
    """Each goal as (variant, kind, batch, peer, what, goal, by minimum, by median); memory once."""
    for group in result["groups"]:
        for kind, batch, peer, what, goal in GOALS:
            for case in group["cases"]:
                if group["kind"] != kind or case["case"] != batch:
                    continue
                entries = case["contenders"]
                modes = [
                    entry
                    for name, entry in entries.items()
                    if name.split(",")[0] == peer and "missing" not in entry
                ]
                if modes and "missing" not in entries[OURS]:
                    values = against(entries[OURS], modes, what)
                    yield (group["variant"], kind, batch, peer, what, goal, *values)


def against(entry, modes, what):
    """Our speed over that of the fastest mode, by minimum and median; or our memory over its."""
    if what == "speed":
        return [min(ratio(entry, mode, f) for mode in modes) for f in (min, statistics.median)]
    return [entry["peak_bytes"] / min(mode["peak_bytes"] for mode in modes)]


def goals_table(result):
    rows = []
    for variant, kind, batch, peer, what, goal, *values in judged(result):
        kept = values[0] >= goal if what == "speed" else values[0] <= goal
        sign = ">=" if what == "speed" else "<="
        rows.append(
            (
                f"{variant}, {kind}, batch {batch}: {what} / {peer}",
                f"{sign} {goal}",
                ", ".join(f"{value:.2f}" for value in values),
                "kept" if kept else "missed",
            )
        )
    return markdown(("ours over the better mode of the peer", "goal", "is", ""), rows)


def plot(result, path):
    """Images per second of each contender at the largest batch, a panel for each size and kind."""

    def panel(group):
        def bars(axes):
            case = group["cases"][-1]
            entries = {k: v for k, v in case["contenders"].items() if "missing" not in v}
            speeds = [case["case"] / min(entry["seconds"]) for entry in entries.values()]
            colors = [
                "C1" if name == OURS else "C7" if name == PRODUCTS else "C0" for name in entries
            ]
            axes.barh(list(entries), speeds, color=colors)
            axes.invert_yaxis()
            axes.set_title(f"{group['variant']}, {group['kind']}, batch {case['case']}: images/s")

        return bars

    draw(path, [panel(group) for group in result["groups"]], width=4.5)


def claims(result):
    """README's table: ours over the better mode of each peer, at the largest batch."""
    rows = []
    for group in result["groups"]:
        case = group["cases"][-1]
        entries = case["contenders"]
        row = [f"{group['variant']}, {group['kind']}"]
        row.append(f"{case['case'] / min(entries[OURS]['seconds']):.1f}")
        for peer in CLAIMED:
            modes = [
                entry
                for name, entry in entries.items()
                if name.split(",")[0] == peer and "missing" not in entry
            ]
            row.append(f"{against(entries[OURS], modes, 'speed')[0]:.2f}" if modes else "missing")
        rows.append(row)
    columns = ["", "images/s", *(f"/ {peer}" for peer in CLAIMED)]
    return markdown(columns, rows) + "\n" + described(result)


def main():
    quick = parser(__doc__).parse_args().quick
    groups = []
    for variant in ("Ti/16",) if quick else SIZES:
        for kind, batches in BATCHES.items():
            print(f"{variant}, {kind}", flush=True)
            cases = compare(
                contenders(variant, kind),
                (2,) if quick else batches,
                rounds=2 if quick else 5 if variant == "Ti/16" else 3,
                turn=0.1 if quick else 0.5,
                least_calls=1 if quick or kind == "forward" else 2,
            )
            groups.append({"variant": variant, "kind": kind, "cases": cases})
    for group in groups:
        check_same_model(group["cases"][0]["contenders"])
    save("speed", quick, groups=groups)


if __name__ == "__main__":
    main()
