"""The same ViT, built and run as the users of keras-vit and of each of its peers do.

Each function here is the `build` of a `harness.Contender`: what `speed.py` measures.
"""

import numpy as np

CLASSES, SIDE, PATCH = 1000, 224, 16
LEARNING_RATE = 1e-4
SIZES = {  # hidden_dim, depth, num_heads, mlp_dim
    "Ti/16": (192, 12, 3, 768),
    "S/16": (384, 12, 6, 1536),
    "two blocks of Ti/16": (192, 2, 3, 768),  # to try
}


def data(batch, side=SIDE):
    """Images (B, H, W, C) and one-hot labels."""
    random = np.random.default_rng(0)
    images = random.normal(size=(batch, side, side, 3)).astype("float32")
    return images, np.eye(CLASSES, dtype="float32")[random.integers(CLASSES, size=batch)]


def multiplications(size, side=SIDE, patch=PATCH, whole=False):
    """Of the matrix products of one image's forward pass.

    A block: qkv and output projections, q k^T and A v, and the MLP. Unless it is the `whole` model,
    the last one makes keys and values of all tokens, and everything else of the class token alone,
    as ours does.
    """
    d, depth, _, mlp_dim = size
    patches = (side // patch) ** 2
    n = patches + 1
    block = n * (4 * d * d + 2 * d * mlp_dim) + 2 * n**2 * d
    last = block if whole else n * 2 * d * d + 2 * d * d + 2 * d * mlp_dim + 2 * n * d
    return patches * 3 * patch**2 * d + (depth - 1) * block + last + CLASSES * d


def ours(variant, kind, mixed=False):
    import keras

    import keras_vit
    from keras_vit.training import DistributedModel

    if mixed:
        keras.config.set_dtype_policy("mixed_bfloat16")
    size = keras_vit.ViTConfig(*SIZES[variant], PATCH)
    vit = keras_vit.skip_unread_tokens(keras_vit.build_vit(size, num_classes=CLASSES))
    if kind == "forward":
        return keras_forward(vit, xla=True)
    return keras_training(DistributedModel(vit.input, vit.output))


def ours_on_jax(size, kind, side=SIDE):
    """A pass, or a step, in one `jax.jit`; the state of a step is donated."""
    import jax
    import keras

    import keras_vit

    size = keras_vit.ViTConfig(*size, PATCH)
    vit = keras_vit.build_vit(size, image_size=side, num_classes=CLASSES)
    model = keras_vit.skip_unread_tokens(vit)

    @jax.jit
    def forward(state, images):
        return model.stateless_call(*state, images, training=False)[0]

    optimizer = keras.optimizers.AdamW(LEARNING_RATE)
    if kind == "training":
        optimizer.build(model.trainable_variables)
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)

    def loss_of(weights, others, images, labels):
        logits, others = model.stateless_call(weights, others, images, training=True)
        return loss(labels, logits), others

    def step(weights, others, moments, images, labels):
        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (value, others), gradients = gradient(weights, others, images, labels)
        weights, moments = optimizer.stateless_apply(moments, gradients, weights)
        return weights, others, moments, value

    step = jax.jit(step, donate_argnums=(0, 1, 2))
    variables = (model.trainable_variables, model.non_trainable_variables, optimizer.variables)
    state = [[variable.value for variable in group] for group in variables]

    def make(batch):
        images, labels = map(jax.device_put, data(batch, side))

        def run(calls):
            nonlocal state
            for _ in range(calls):
                if kind == "training":
                    *state, result = step(*state, images, labels)
                    continue
                result = forward(state[:2], images)
                if jax.default_backend() == "cpu":  # where passes may overlap
                    result.block_until_ready()
            result.block_until_ready()

        run.device_bytes = lambda: (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        return run

    return make, model.count_params()


def keras_hub(variant, kind, xla, mixed=False):
    import keras
    from keras_hub.models import ViTBackbone, ViTImageClassifier

    if mixed:
        keras.config.set_dtype_policy("mixed_bfloat16")
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


def vit_keras(variant, kind, xla):
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
    return keras_contender(model, kind, xla)


def keras_io_example(variant, kind, xla):
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
    return keras_contender(keras.Model(inputs, logits), kind, xla)


def keras_contender(model, kind, xla):
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


def timm(variant, kind, compiled, mixed=False):
    import timm

    hidden_dim, depth, num_heads, _ = SIZES[variant]
    sizes = {"embed_dim": hidden_dim, "depth": depth, "num_heads": num_heads}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, **sizes)
    return torch_contender(model, kind, compiled, mixed)


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


def torch_contender(model, kind, compiled, mixed=False):
    import torch

    forward = torch.compile(model, dynamic=False) if compiled else model
    precision = torch.autocast("cpu", torch.bfloat16, enabled=mixed)

    def make_forward(batch):
        images = torch.from_numpy(data(batch)[0].transpose(0, 3, 1, 2).copy())  # (B, C, H, W)
        model.eval()

        def run(calls):
            with torch.inference_mode():
                for _ in range(calls):
                    with precision:
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
                with precision:
                    loss = torch.nn.functional.cross_entropy(forward(images), labels)
                loss.backward()
                optimizer.step()

        return run

    weights = sum(weight.numel() for weight in model.parameters())
    return make_forward if kind == "forward" else make_training, weights


def matrix_products(size, patch=PATCH, gain=1.0):
    """The matrix products of our pass alone.

    Args:
        size: hidden_dim, depth, num_heads, mlp_dim.
        patch: Pixels of a side.
        gain: Of the random weights; below 1, the products of products stay finite without norms.

    Returns:
        A ViT without norms, biases, softmax, GELU and residuals, of the same shapes and weights:
        a function of patches `(B, N, P*P*C)` -> `(B, classes)`, and its weights.
    """
    import tensorflow as tf

    def weight(*shape):
        return tf.Variable(tf.random.normal(shape, stddev=gain * shape[0] ** -0.5))

    width, depth, heads, mlp = size
    embedding, head = weight(patch * patch * 3, width), weight(width, CLASSES)
    blocks = [
        (weight(width, 3 * width), weight(width, width), weight(width, mlp), weight(mlp, width))
        for _ in range(depth)
    ]
    weights = [embedding, head, *(weight for block in blocks for weight in block)]

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
        return tf.reshape(x, (len(patches), width)) @ head

    return forward, weights


def products(variant, kind):
    """The matrix products of our pass or step alone, by XLA."""
    import tensorflow as tf

    forward, weights = matrix_products(SIZES[variant])

    @tf.function(jit_compile=True)
    def step(patches):
        if kind == "forward":
            return forward(patches)
        with tf.GradientTape() as tape:
            y = tf.reduce_sum(forward(patches))
        return tape.gradient(y, weights)

    def make(batch):
        patches = tf.constant(data(batch)[0].reshape(batch, (SIDE // PATCH) ** 2, -1))

        def run(calls):
            for _ in range(calls):
                tf.nest.flatten(step(patches))[0].numpy()

        return run

    return make, None
