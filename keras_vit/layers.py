"""The layers of a Vision Transformer.

Shapes: B images, H x W pixels, C channels, P x P patches, N tokens, D hidden width.
"Paper" is Dosovitskiy et al., arXiv 2010.11929; equation numbers are its.
Everything is `keras.ops`, of rank 4 at most, so that mobile delegates can run it.
"""

import contextlib
import math
import threading

import keras
from keras import ops

from keras_vit.config import check_count, check_epsilon, check_heads, check_positive_int
from keras_vit.positions import sincos2d

POSITIONS = ("learned", "sincos2d")
GELUS = ("erf", "tanh")
POOLINGS = ("token", "mean", "gap", "token+gap", "map")


def check_choice(name, value, choices):
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        options = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"`{name}` must be one of {options}. Received: {name}={value!r}.")


def split_heads(x, num_heads):
    """`(B, N, heads * d)` -> `(B, heads, N, d)`."""
    tokens, width = ops.shape(x)[1], x.shape[-1]
    x = ops.reshape(x, (-1, tokens, num_heads, width // num_heads))
    return ops.transpose(x, (0, 2, 1, 3))


def merge_heads(x):
    """`(B, heads, N, d)` -> `(B, N, heads * d)`."""
    heads, tokens, head_dim = x.shape[1], ops.shape(x)[2], x.shape[3]
    return ops.reshape(ops.transpose(x, (0, 2, 1, 3)), (-1, tokens, heads * head_dim))


def on_tokens(dense, x):
    """Applies a function of `(M, D)` -> `(M, E)` to tokens, `(..., D)` -> `(..., E)`.

    A dense layer is then one product of two matrices, as it is in Keras on TensorFlow. On JAX on a
    CPU, the gradient of its kernel would otherwise need the tokens' gradients transposed, and XLA's
    copy takes longer than the product.
    """
    y = dense(ops.reshape(x, (-1, x.shape[-1])))
    return ops.reshape(y, (-1, *ops.shape(x)[1:-1], y.shape[-1]))


def attention_probabilities(q, k):
    """softmax(q k^T / sqrt(d)), Eq. 6: `(B, h, M, d)` and `(B, h, N, d)` -> `(B, h, M, N)`."""
    q = q * q.shape[-1] ** -0.5
    return ops.softmax(ops.matmul(q, ops.transpose(k, (0, 1, 3, 2))), axis=-1)


def can_use_flash_attention(q):
    """Whether `flash_attention` is for queries `(B, h, N, d)`.

    It is on JAX on a machine whose first device is a GPU, in half precision, for d <= 128 divisible
    by 8, which is what cuDNN takes. On GPUs before Ampere, Keras computes it without cuDNN.
    Compiled for the CPU of such a machine, it fails ("not found for platform cpu"):
    `keras.config.disable_flash_attention()` turns it off.
    """
    head_dim = q.shape[-1]
    return (
        keras.backend.backend() == "jax"
        and keras.backend.standardize_dtype(q.dtype) in ("float16", "bfloat16")
        and head_dim % 8 == 0
        and head_dim <= 128
        and keras.config.is_flash_attention_enabled() is not False  # None: it is
        and keras.distribution.list_devices()[0].startswith("gpu")
    )


def flash_attention(q, k, v):
    """A v, Eq. 7, by FlashAttention (arXiv 2205.14135): `(B, h, N, d)` each, N static.

    Keras leaves it to cuDNN, which JAX refuses to differentiate for an odd N: then there is one
    token more, which is masked.
    """
    tokens, mask = q.shape[2], None
    q, k, v = (ops.transpose(x, (0, 2, 1, 3)) for x in (q, k, v))  # as Keras takes them
    if tokens % 2:
        q, k, v = (ops.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
        mask = ops.broadcast_to(ops.arange(tokens + 1) < tokens, (1, 1, tokens + 1, tokens + 1))
    x = ops.dot_product_attention(q, k, v, mask=mask)
    return ops.transpose(x[:, :tokens], (0, 2, 1, 3))


def gelu(x, kind):
    """GELU(x) = x Phi(x), "erf"; or its "tanh" approximation (arXiv 1606.08415).

    `keras.activations.gelu` passes its constants through float32 on TensorFlow, which costs a
    float64 model eight digits.
    """
    if kind == "tanh":
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * ops.power(x, 3))
        return 0.5 * x * (1.0 + ops.tanh(inner))
    return 0.5 * x * (1.0 + ops.erf(x * math.sqrt(0.5)))


def _first_tokens_spec(x, count, dtype):
    """The spec `(B, count, D)` of an output of all tokens `(B, N, D)`, or of the first `count`."""
    batch, tokens, hidden_dim = x.shape
    return keras.KerasTensor((batch, tokens if count is None else count, hidden_dim), dtype=dtype)


def xavier_uniform(fan_in, fan_out):
    """Glorot's uniform initialiser of a `(fan_in, fan_out)` matrix that is part of a fused one."""
    limit = math.sqrt(6.0 / (fan_in + fan_out))
    return keras.initializers.RandomUniform(-limit, limit)


_draws = threading.local()  # the replicas of a strategy are threads


@contextlib.contextmanager
def drawing_by(uniform):
    """Lets a function draw the numbers of every `Dropout` that is called within the block.

    Args:
        uniform: Function (seed, shape) -> float32 tensor of `shape` with values in [0, 1); seed
            are the two integers of the layer's `SeedGenerator`, of which the first is its own.
    """
    before = getattr(_draws, "uniform", None)
    _draws.uniform = uniform
    try:
        yield
    finally:
        _draws.uniform = before


_watch = threading.local()


@contextlib.contextmanager
def watching_blocks(see):
    """Lets a function see the tokens that every `TransformerBlock` called within the block takes.

    Args:
        see: Function (layer, x), called with the `TransformerBlock` and its tokens `(B, N, D)`
            before it computes.
    """
    before = getattr(_watch, "see", None)
    _watch.see = see
    try:
        yield
    finally:
        _watch.see = before


@keras.saving.register_keras_serializable(package="keras_vit")
class Dropout(keras.layers.Dropout):
    """`keras.layers.Dropout`, whose masks can be drawn by somebody else: see `drawing_by`.

    Keras draws them from a state of the layer, which cannot tell the replicas of a distributed
    batch apart. What trains on several replicas draws them by the image's place in the batch.

    Args:
        rate: The share that is dropped, in [0, 1).
        **kwargs: As in `keras.layers.Dropout`.

    Call arguments:
        inputs: Of any shape.
        training: Whether to drop.

    Raises:
        ValueError: The rate is out of its range.

    Source: arXiv 1207.0580; the values kept are divided by 1 - rate.
    """

    def __init__(self, rate, **kwargs):
        if not 0 <= rate < 1:
            raise ValueError(f"The rate of a dropout must be in [0, 1). Received: rate={rate!r}.")
        super().__init__(rate, **kwargs)

    def call(self, inputs, training=False):
        uniform = getattr(_draws, "uniform", None)
        if uniform is None or not training or self.rate == 0:
            return super().call(inputs, training=training)
        noise_shape = self.noise_shape or (None,) * len(inputs.shape)
        shape = [
            size if own is None else own
            for own, size in zip(noise_shape, ops.shape(inputs), strict=True)
        ]
        kept = uniform(self.seed_generator.state, shape) >= self.rate
        return ops.where(kept, inputs / (1 - self.rate), ops.zeros_like(inputs))


@keras.saving.register_keras_serializable(package="keras_vit")
class Patches(keras.layers.Layer):
    """Cuts images into flattened patches: x `(B, H, W, C)` -> x_p `(B, N, P*P*C)`.

    N = (H / P) (W / P), row by row; a patch is flattened as (row, column, channel), the order
    of a convolution kernel `(P, P, C, D)` reshaped to `(P*P*C, D)`.

    Args:
        patch_size: Side P of a patch in pixels.

    Call arguments:
        images: `(B, H, W, C)`; H, W and C are static, H and W divisible by P.

    Raises:
        ValueError: H or W is unknown or not divisible by P.

    Source: the paper, Section 3.1.
    """

    def __init__(self, patch_size, **kwargs):
        super().__init__(**kwargs)
        check_positive_int("patch_size", patch_size)
        self.patch_size = patch_size

    def compute_output_shape(self, input_shape):
        batch, height, width, channels = input_shape
        p = self.patch_size
        if height is None or width is None or height % p or width % p:
            raise ValueError(
                "The height and width of the input must be known and divisible by `patch_size`. "
                f"Received: input shape {tuple(input_shape)}, patch_size={p}."
            )
        return batch, (height // p) * (width // p), p * p * channels

    def call(self, images):
        _, tokens, values = self.compute_output_shape(images.shape)
        _, height, width, channels = images.shape
        p = self.patch_size
        x = ops.reshape(images, (-1, p, width // p, p * channels))  # (B * H/P, P, W/P, P*C)
        x = ops.transpose(x, (0, 2, 1, 3))  # (B * H/P, W/P, P, P*C)
        return ops.reshape(x, (-1, tokens, values))

    def get_config(self):
        return {**super().get_config(), "patch_size": self.patch_size}


@keras.saving.register_keras_serializable(package="keras_vit")
class PatchEncoder(keras.layers.Layer):
    """Projects patches to tokens and gives them positions, Eq. 1.

    z_0 = [x_class; x_p^1 E; ...; x_p^N E] + E_pos, then dropout. A distillation token stands
    after the class token. Registers stand before the patches and have no position. With
    `patch_norm`, LN(LN(x_p) E) takes the place of x_p E.

    Args:
        hidden_dim: Width D of the tokens.
        class_token: Whether to prepend a learned class token.
        distillation_token: Whether to add a learned distillation token.
        num_registers: Number R of learned register tokens.
        position: "learned" (one vector per patch, class and distillation token) or
            "sincos2d" (fixed, patches only).
        grid_size: `(rows, columns)` of the patches; None takes N for a square grid.
            Only "sincos2d" needs it.
        patch_norm: Whether patches are layer-normalised before and after their projection.
        dropout: Rate in [0, 1) after the positions are added.
        layer_norm_epsilon: Epsilon of the norms of `patch_norm`.

    Call arguments:
        patches: `(B, N, P*P*C)`, N static.

    Returns:
        Tokens `(B, T + R + N, D)` with T the number of class and distillation tokens.

    Raises:
        ValueError: An argument is out of its range, or the grid does not have N cells.

    Source: the paper, Eq. 1 and B.1 (dropout). Distillation token: DeiT (arXiv 2012.12877,
    Section 4). Registers: arXiv 2309.16588. Norms around the projection: Dual PatchNorm (arXiv
    2302.01327).
    """

    def __init__(
        self,
        hidden_dim,
        class_token=True,
        distillation_token=False,
        num_registers=0,
        position="learned",
        grid_size=None,
        patch_norm=False,
        dropout=0.0,
        layer_norm_epsilon=1e-6,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_positive_int("hidden_dim", hidden_dim)
        check_choice("position", position, POSITIONS)
        check_count("num_registers", num_registers)
        check_epsilon(layer_norm_epsilon)
        self.hidden_dim = hidden_dim
        self.use_class_token = class_token
        self.use_distillation_token = distillation_token
        self.num_registers = num_registers
        self.position = position
        self.grid_size = None if grid_size is None else tuple(grid_size)
        self.use_patch_norm = patch_norm
        self.layer_norm_epsilon = layer_norm_epsilon
        if patch_norm:
            self.patch_norm = self._layer_norm("patch_norm")
            self.projection_norm = self._layer_norm("projection_norm")
        self.projection = keras.layers.Dense(
            hidden_dim,
            kernel_initializer="lecun_normal",
            dtype=self.dtype_policy,
            name="projection",
        )
        self.dropout = Dropout(dropout, dtype=self.dtype_policy, name="dropout")

    def _layer_norm(self, name):
        return keras.layers.LayerNormalization(
            epsilon=self.layer_norm_epsilon, dtype=self.dtype_policy, name=name
        )

    def build(self, input_shape):
        num_patches = input_shape[1]
        if num_patches is None:
            raise ValueError(
                f"The number of patches must be known. Received: input shape {tuple(input_shape)}."
            )
        rows, columns = self._grid(num_patches)
        self.projection.build(input_shape)
        if self.use_patch_norm:
            self.patch_norm.build(input_shape)
            self.projection_norm.build((*input_shape[:-1], self.hidden_dim))
        if self.use_class_token:
            self.class_token = self.add_weight(
                shape=(1, 1, self.hidden_dim), initializer="zeros", name="class_token"
            )
        if self.use_distillation_token:
            self.distillation_token = self.add_weight(
                shape=(1, 1, self.hidden_dim), initializer="zeros", name="distillation_token"
            )
        if self.num_registers:
            self.registers = self.add_weight(
                shape=(1, self.num_registers, self.hidden_dim),
                initializer=keras.initializers.RandomNormal(stddev=0.02),
                name="registers",
            )
        if self.position == "learned":
            self.position_embedding = self.add_weight(
                shape=(1, self._num_placed_tokens() + num_patches, self.hidden_dim),
                initializer=keras.initializers.RandomNormal(stddev=0.02),
                name="position_embedding",
            )
        else:
            self._sincos = sincos2d((rows, columns), self.hidden_dim)[None]

    def _grid(self, num_patches):
        """The (rows, columns) of the patches; (None, None) if nothing depends on them."""
        if self.grid_size is None and self.position != "sincos2d":
            return None, None
        rows, columns = self.grid_size or (math.isqrt(num_patches),) * 2
        if rows * columns != num_patches:
            raise ValueError(
                "`grid_size` must be (rows, columns) with rows * columns patches; a square grid "
                f"may be left out. Received: grid_size={self.grid_size}, {num_patches} patches."
            )
        return rows, columns

    def _num_placed_tokens(self):
        """How many tokens before the patches have a learned position."""
        return self.use_class_token + self.use_distillation_token

    def call(self, patches, training=None):
        tokens = self._project(patches)  # (B, N, D)
        if self.position == "sincos2d":
            tokens = tokens + ops.convert_to_tensor(self._sincos, dtype=self.compute_dtype)
        elif self._num_placed_tokens():
            tokens = tokens + self.position_embedding[:, self._num_placed_tokens() :]
        else:
            tokens = tokens + self.position_embedding
        prefix = self._prefix_tokens()
        if prefix:
            batch = ops.shape(tokens)[0]
            prefix = [ops.broadcast_to(x, (batch, *x.shape[1:])) for x in prefix]
            tokens = ops.concatenate([*prefix, tokens], axis=1)
        return self.dropout(tokens, training=training)

    def _project(self, patches):
        if self.use_patch_norm:
            return self.projection_norm(on_tokens(self.projection, self.patch_norm(patches)))
        return on_tokens(self.projection, patches)

    def _prefix_tokens(self):
        """Class and distillation token at their positions, and the registers, `(1, ., D)` each."""
        placed = [self.class_token] if self.use_class_token else []
        placed += [self.distillation_token] if self.use_distillation_token else []
        if self.position == "learned":
            placed = [
                token + self.position_embedding[:, i : i + 1] for i, token in enumerate(placed)
            ]
        registers = [self.registers] if self.num_registers else []
        return [ops.convert_to_tensor(tokens) for tokens in (*placed, *registers)]

    def compute_output_shape(self, input_shape):
        batch, num_patches, _ = input_shape
        prefix = self._num_placed_tokens() + self.num_registers
        return batch, prefix + num_patches, self.hidden_dim

    def get_config(self):
        return {
            **super().get_config(),
            "hidden_dim": self.hidden_dim,
            "class_token": self.use_class_token,
            "distillation_token": self.use_distillation_token,
            "num_registers": self.num_registers,
            "position": self.position,
            "grid_size": self.grid_size,
            "patch_norm": self.use_patch_norm,
            "dropout": self.dropout.rate,
            "layer_norm_epsilon": self.layer_norm_epsilon,
        }


@keras.saving.register_keras_serializable(package="keras_vit")
class MultiHeadSelfAttention(keras.layers.Layer):
    """Multi-head self-attention, Eq. 5-8.

    [q, k, v] = z U_qkv, A = softmax(q k^T / sqrt(d)), SA(z) = A v for each head of width
    d, MSA(z) = [SA_1(z); ...; SA_h(z)] U_msa.

    Args:
        num_heads: Number of heads h; divides D unless `head_dim` is set.
        head_dim: Width d of a head, or None for D / h.
        dropout: Rate in [0, 1) on the output.
        attention_dropout: Rate in [0, 1) on the attention probabilities A.
        qkv_bias: Whether U_qkv has a bias.
        qk_norm: Whether q and k are layer-normalised per head before the product.
        layer_norm_epsilon: Epsilon of those norms.

    Call arguments:
        x: Tokens `(B, N, D)`.
        queries: Number M of tokens, from the first, that ask and are put out, or None for all N.

    Returns:
        `(B, M, D)`.

    Raises:
        ValueError: D is not divisible by `num_heads` and `head_dim` is None.

    Source: the paper, Appendix A, with the biases its code has. The U_qkv of q, k and v are one
    kernel `(D, 3 h d)`, columns q|k|v, each third initialised as a `(D, h d)` matrix of its own.
    qk_norm: arXiv 2302.05442, Section 2. On JAX on a GPU, in half precision, for all N tokens and
    without attention dropout, SA(z) uses FlashAttention: see `can_use_flash_attention`.
    """

    def __init__(
        self,
        num_heads,
        head_dim=None,
        dropout=0.0,
        attention_dropout=0.0,
        qkv_bias=True,
        qk_norm=False,
        layer_norm_epsilon=1e-6,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_positive_int("num_heads", num_heads)
        if head_dim is not None:
            check_positive_int("head_dim", head_dim)
        check_epsilon(layer_norm_epsilon)
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.qkv_bias = qkv_bias
        self.qk_norm = qk_norm
        self.layer_norm_epsilon = layer_norm_epsilon
        dtype = self.dtype_policy
        self.dropout = Dropout(dropout, dtype=dtype, name="dropout")
        self.attention_dropout = Dropout(attention_dropout, dtype=dtype, name="attention_dropout")
        if qk_norm:
            self.query_norm = keras.layers.LayerNormalization(
                epsilon=layer_norm_epsilon, dtype=dtype, name="query_norm"
            )
            self.key_norm = keras.layers.LayerNormalization(
                epsilon=layer_norm_epsilon, dtype=dtype, name="key_norm"
            )

    def build(self, input_shape):
        hidden_dim = input_shape[-1]
        if self.head_dim is None:
            check_heads(hidden_dim, self.num_heads)
        head_dim = self.head_dim or hidden_dim // self.num_heads
        inner_dim = self.num_heads * head_dim
        self.qkv = keras.layers.Dense(
            3 * inner_dim,
            use_bias=self.qkv_bias,
            kernel_initializer=xavier_uniform(hidden_dim, inner_dim),
            dtype=self.dtype_policy,
            name="qkv",
        )
        self.proj = keras.layers.Dense(
            hidden_dim, kernel_initializer="glorot_uniform", dtype=self.dtype_policy, name="proj"
        )
        self.qkv.build(input_shape)
        self.proj.build((*input_shape[:-1], inner_dim))
        if self.qk_norm:
            head_shape = (None, self.num_heads, None, head_dim)
            self.query_norm.build(head_shape)
            self.key_norm.build(head_shape)

    def call(self, x, training=None, queries=None):
        q, k, v = self._qkv(x) if queries is None else self._few_queries(x, queries)
        if self.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        is_dropping = training and self.attention_dropout.rate
        if queries is None and not is_dropping and can_use_flash_attention(q):
            x = flash_attention(q, k, v)
        else:
            a = self.attention_dropout(attention_probabilities(q, k), training=training)
            x = ops.matmul(a, v)
        return self.dropout(on_tokens(self.proj, merge_heads(x)), training=training)

    def probabilities(self, x):
        """A of all tokens, without dropout: x `(B, N, D)` -> `(B, h, N, N)`, float32 at least."""
        q, k, _ = self._qkv(x)
        if self.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        dtype = keras.backend.result_type(q.dtype, "float32")
        return attention_probabilities(ops.cast(q, dtype), ops.cast(k, dtype))

    def _qkv(self, x):
        qkv = split_heads(on_tokens(self.qkv, x), 3 * self.num_heads)  # (B, 3 h, N, d)
        return ops.split(qkv, 3, axis=1)  # (B, h, N, d) each

    def _few_queries(self, x, queries):
        """q `(B, h, M, d)` of the first tokens, k and v `(B, h, N, d)` of all."""
        if self.qkv.quantization_mode is not None:  # its kernel is integers without their scales
            q, k, v = self._qkv(x)
            return q[:, :, :queries], k, v
        kernel = ops.convert_to_tensor(self.qkv.kernel, dtype=self.compute_dtype)
        inner_dim = kernel.shape[-1] // 3
        q = on_tokens(lambda rows: ops.matmul(rows, kernel[:, :inner_dim]), x[:, :queries])
        kv = on_tokens(lambda rows: ops.matmul(rows, kernel[:, inner_dim:]), x)
        if self.qkv_bias:
            bias = ops.convert_to_tensor(self.qkv.bias, dtype=self.compute_dtype)
            q, kv = q + bias[:inner_dim], kv + bias[inner_dim:]
        k, v = ops.split(split_heads(kv, 2 * self.num_heads), 2, axis=1)
        return split_heads(q, self.num_heads), k, v

    def compute_output_spec(self, x, training=None, queries=None):
        return _first_tokens_spec(x, queries, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "head_dim": self.head_dim,
            "dropout": self.dropout.rate,
            "attention_dropout": self.attention_dropout.rate,
            "qkv_bias": self.qkv_bias,
            "qk_norm": self.qk_norm,
            "layer_norm_epsilon": self.layer_norm_epsilon,
        }


@keras.saving.register_keras_serializable(package="keras_vit")
class FeedForward(keras.layers.Layer):
    """The MLP of a block: MLP(x) = GELU(x W_1 + b_1) W_2 + b_2, each layer followed by dropout.

    Args:
        mlp_dim: Width of the hidden layer.
        dropout: Rate in [0, 1) after both dense layers.
        gelu: "erf" (exact) or "tanh" (approximation).

    Call arguments:
        x: Tokens `(B, N, D)`.

    Returns:
        `(B, N, D)`.

    Raises:
        ValueError: `gelu` is unknown or `mlp_dim` not a positive int.

    Source: the paper, Section 3.1 and B.1; biases start at N(0, 1e-6) as in its code.
    """

    def __init__(self, mlp_dim, dropout=0.0, gelu="erf", **kwargs):
        super().__init__(**kwargs)
        check_positive_int("mlp_dim", mlp_dim)
        check_choice("gelu", gelu, GELUS)
        self.mlp_dim = mlp_dim
        self.gelu = gelu
        self.dropout = Dropout(dropout, dtype=self.dtype_policy, name="dropout")

    def _dense(self, units, name):
        return keras.layers.Dense(
            units,
            kernel_initializer="glorot_uniform",
            bias_initializer=keras.initializers.RandomNormal(stddev=1e-6),
            dtype=self.dtype_policy,
            name=name,
        )

    def build(self, input_shape):
        self.fc1 = self._dense(self.mlp_dim, "fc1")
        self.fc2 = self._dense(input_shape[-1], "fc2")
        self.fc1.build(input_shape)
        self.fc2.build((*input_shape[:-1], self.mlp_dim))

    def call(self, x, training=None):
        x = self.dropout(gelu(on_tokens(self.fc1, x), self.gelu), training=training)
        return self.dropout(on_tokens(self.fc2, x), training=training)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {
            **super().get_config(),
            "mlp_dim": self.mlp_dim,
            "dropout": self.dropout.rate,
            "gelu": self.gelu,
        }


@keras.saving.register_keras_serializable(package="keras_vit")
class LayerScale(keras.layers.Layer):
    """Multiplies each of the D features by a learned factor: y = gamma * x.

    Args:
        initial_value: The factors at the start of training, such as 1e-5.

    Call arguments:
        x: `(..., D)`.

    Source: "Going deeper with Image Transformers" (arXiv 2103.17239, Section 2).
    """

    def __init__(self, initial_value, **kwargs):
        super().__init__(**kwargs)
        self.initial_value = initial_value

    def build(self, input_shape):
        self.gamma = self.add_weight(
            shape=(input_shape[-1],),
            initializer=keras.initializers.Constant(self.initial_value),
            name="gamma",
        )

    def call(self, x):
        return x * self.gamma

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "initial_value": self.initial_value}


@keras.saving.register_keras_serializable(package="keras_vit")
class TransformerBlock(keras.layers.Layer):
    """A pre-norm encoder block, Eq. 2-3: z' = MSA(LN(z)) + z, z'' = MLP(LN(z')) + z'.

    With `layer_scale` and `drop_path`, each branch f adds DropPath(gamma * f(LN(z))).

    Args:
        num_heads: Attention heads; divides D unless `head_dim` is set.
        mlp_dim: Width of the MLP's hidden layer.
        head_dim: Width of a head, or None for D / `num_heads`.
        dropout: Rate in [0, 1) after every dense layer except qkv.
        attention_dropout: Rate in [0, 1) on the attention probabilities.
        drop_path: Probability in [0, 1) that a branch is left out, per image (stochastic depth).
        layer_scale: Initial value of LayerScale on both branches, or None for none.
        qkv_bias: Whether q, k and v have a bias.
        qk_norm: Whether q and k are layer-normalised per head.
        gelu: "erf" or "tanh".
        layer_norm_epsilon: Epsilon of every LayerNorm of the block.

    Call arguments:
        x: Tokens `(B, N, D)`.
        queries: Number M of tokens, from the first, that are put out, or None for all N. The
            others are attended to, and the rest of the block is not computed for them.

    Returns:
        `(B, M, D)`.

    Raises:
        ValueError: An argument is out of its range.

    Source: the paper, Eq. 2-3; DropPath: arXiv 1603.09382.
    """

    def __init__(
        self,
        num_heads,
        mlp_dim,
        head_dim=None,
        dropout=0.0,
        attention_dropout=0.0,
        drop_path=0.0,
        layer_scale=None,
        qkv_bias=True,
        qk_norm=False,
        gelu="erf",
        layer_norm_epsilon=1e-6,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_epsilon(layer_norm_epsilon)
        self.layer_scale = layer_scale
        self.layer_norm_epsilon = layer_norm_epsilon
        dtype = self.dtype_policy
        self.norm1 = keras.layers.LayerNormalization(
            epsilon=layer_norm_epsilon, dtype=dtype, name="norm1"
        )
        self.attention = MultiHeadSelfAttention(
            num_heads,
            head_dim=head_dim,
            dropout=dropout,
            attention_dropout=attention_dropout,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            layer_norm_epsilon=layer_norm_epsilon,
            dtype=dtype,
            name="attention",
        )
        self.layer_scale1 = self._layer_scale("layer_scale1")
        self.norm2 = keras.layers.LayerNormalization(
            epsilon=layer_norm_epsilon, dtype=dtype, name="norm2"
        )
        self.feed_forward = FeedForward(
            mlp_dim, dropout=dropout, gelu=gelu, dtype=dtype, name="feed_forward"
        )
        self.layer_scale2 = self._layer_scale("layer_scale2")
        # One decision per image and branch: the mask is (B, 1, 1).
        self.drop_path = Dropout(drop_path, noise_shape=(None, 1, 1), dtype=dtype, name="drop_path")

    def _layer_scale(self, name):
        if self.layer_scale is None:
            return keras.layers.Identity(dtype=self.dtype_policy, name=name)
        return LayerScale(self.layer_scale, dtype=self.dtype_policy, name=name)

    def build(self, input_shape):
        for layer in (
            self.norm1,
            self.attention,
            self.layer_scale1,
            self.norm2,
            self.feed_forward,
            self.layer_scale2,
        ):
            layer.build(input_shape)

    def call(self, x, training=None, queries=None):
        if getattr(_watch, "see", None) is not None:
            _watch.see(self, x)
        y = self.attention(self.norm1(x), training=training, queries=queries)
        x = x if queries is None else x[:, :queries]
        x = x + self.drop_path(self.layer_scale1(y), training=training)
        y = self.feed_forward(self.norm2(x), training=training)
        return x + self.drop_path(self.layer_scale2(y), training=training)

    def compute_output_spec(self, x, training=None, queries=None):
        return _first_tokens_spec(x, queries, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {
            **super().get_config(),
            "num_heads": self.attention.num_heads,
            "mlp_dim": self.feed_forward.mlp_dim,
            "head_dim": self.attention.head_dim,
            "dropout": self.feed_forward.dropout.rate,
            "attention_dropout": self.attention.attention_dropout.rate,
            "drop_path": self.drop_path.rate,
            "layer_scale": self.layer_scale,
            "qkv_bias": self.attention.qkv_bias,
            "qk_norm": self.attention.qk_norm,
            "gelu": self.feed_forward.gelu,
            "layer_norm_epsilon": self.layer_norm_epsilon,
        }


@keras.saving.register_keras_serializable(package="keras_vit")
class TokenPooling(keras.layers.Layer):
    """Makes one vector of the tokens: `(B, N, D)` -> `(B, D)`.

    Args:
        pooling: "token": the first token, the class token (Eq. 4); "distillation": the second,
            the distillation token; "mean": the mean of all tokens, the class token and registers
            included; "gap": the mean of the patch tokens; "token+gap": both, `(B, 2 D)`.
        num_prefix_tokens: How many tokens stand before the patches; "gap" leaves them out.

    Call arguments:
        x: Tokens `(B, N, D)`.

    Raises:
        ValueError: `pooling` is unknown, or there are not more tokens than `num_prefix_tokens`.

    Source: the paper, Eq. 4; "gap" is its code's name and D.3's alternative. "token+gap": the
    linear classifier of DINOv2 (arXiv 2304.07193).
    """

    def __init__(self, pooling="token", num_prefix_tokens=1, **kwargs):
        super().__init__(**kwargs)
        check_choice("pooling", pooling, ("token", "distillation", "mean", "gap", "token+gap"))
        check_count("num_prefix_tokens", num_prefix_tokens)
        self.pooling = pooling
        self.num_prefix_tokens = num_prefix_tokens

    def build(self, input_shape):
        tokens = input_shape[1]
        if "gap" in self.pooling and tokens is not None and tokens <= self.num_prefix_tokens:
            raise ValueError(
                f"There must be more tokens than the {self.num_prefix_tokens} before the patches. "
                f"Received: input shape {tuple(input_shape)}."
            )

    def call(self, x):
        if self.pooling == "token":
            return x[:, 0]
        if self.pooling == "distillation":
            return x[:, 1]
        if self.pooling == "mean":
            return ops.mean(x, axis=1)
        patches = ops.mean(x[:, self.num_prefix_tokens :], axis=1)
        if self.pooling == "gap":
            return patches
        return ops.concatenate([x[:, 0], patches], axis=-1)

    def compute_output_shape(self, input_shape):
        batch, _, hidden_dim = input_shape
        return batch, 2 * hidden_dim if self.pooling == "token+gap" else hidden_dim

    def get_config(self):
        return {
            **super().get_config(),
            "pooling": self.pooling,
            "num_prefix_tokens": self.num_prefix_tokens,
        }


@keras.saving.register_keras_serializable(package="keras_vit")
class AttentionPooling(keras.layers.Layer):
    """Multi-head attention pooling (MAP): a learned probe attends over all tokens.

    y = MHA(probe, x, x); pooled = y + MLP(LN(y)): `(B, N, D)` -> `(B, D)`.

    Args:
        num_heads: Attention heads; divides D.
        mlp_dim: Width of the MLP's hidden layer.
        gelu: "erf" or "tanh".
        layer_norm_epsilon: Epsilon of the LayerNorm.

    Call arguments:
        x: Tokens `(B, N, D)`.

    Raises:
        ValueError: D is not divisible by `num_heads`.

    Source: "Scaling Vision Transformers" (arXiv 2106.04560, Section 3.2), big_vision's MAPHead.
    """

    def __init__(self, num_heads, mlp_dim, gelu="erf", layer_norm_epsilon=1e-6, **kwargs):
        super().__init__(**kwargs)
        check_positive_int("num_heads", num_heads)
        check_epsilon(layer_norm_epsilon)
        self.num_heads = num_heads
        self.layer_norm_epsilon = layer_norm_epsilon
        self.norm = keras.layers.LayerNormalization(
            epsilon=layer_norm_epsilon, dtype=self.dtype_policy, name="norm"
        )
        self.feed_forward = FeedForward(
            mlp_dim, gelu=gelu, dtype=self.dtype_policy, name="feed_forward"
        )

    def build(self, input_shape):
        batch, _, hidden_dim = input_shape
        check_heads(hidden_dim, self.num_heads)
        self.probe = self.add_weight(
            shape=(1, 1, hidden_dim),
            initializer=xavier_uniform(1, hidden_dim),
            name="probe",
        )
        initializer = xavier_uniform(hidden_dim, hidden_dim)
        for name, parts in (("query", 1), ("key_value", 2), ("proj", 1)):
            dense = keras.layers.Dense(
                parts * hidden_dim,
                kernel_initializer=initializer.clone(),
                dtype=self.dtype_policy,
                name=name,
            )
            dense.build(input_shape)
            setattr(self, name, dense)
        self.norm.build((batch, 1, hidden_dim))
        self.feed_forward.build((batch, 1, hidden_dim))

    def call(self, x):
        # The probe is the same for every image: its query is computed once, with batch size 1.
        q = split_heads(self.query(ops.convert_to_tensor(self.probe)), self.num_heads)
        kv = split_heads(on_tokens(self.key_value, x), 2 * self.num_heads)  # (B, 2 h, N, d)
        k, v = ops.split(kv, 2, axis=1)
        y = self.proj(merge_heads(ops.matmul(attention_probabilities(q, k), v)))  # (B, 1, D)
        y = y + self.feed_forward(self.norm(y))
        return ops.reshape(y, (-1, x.shape[-1]))

    def compute_output_shape(self, input_shape):
        return input_shape[0], input_shape[-1]

    def get_config(self):
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "mlp_dim": self.feed_forward.mlp_dim,
            "gelu": self.feed_forward.gelu,
            "layer_norm_epsilon": self.layer_norm_epsilon,
        }
