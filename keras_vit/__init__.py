"""Vision Transformers for Keras, from images to a verified phone file."""

import pathlib
import sys

__version__ = "0.1.0"

# Installed, `keras_vit.export` is inside this folder; in a checkout it is the folder beside it, and
# this one shadows an installed package for whoever runs Python there.
_here = pathlib.Path(__file__).parent
if not (_here / "export").is_dir():
    __path__.append(str(_here.parent))

# Importing Keras starts its backend, which takes seconds. The `keras-vit` command answers
# `--help` without it: there, each subcommand imports what it needs.
if pathlib.PurePath(sys.argv[0] if sys.argv else "").name not in ("keras-vit", "keras-vit.exe"):
    from keras_vit import explain
    from keras_vit.config import VARIANTS, ViTConfig
    from keras_vit.hybrid import ResNetStem
    from keras_vit.layers import (
        AttentionPooling,
        FeedForward,
        MultiHeadSelfAttention,
        PatchEncoder,
        Patches,
        TokenPooling,
        TransformerBlock,
    )
    from keras_vit.model import build_vit, skip_unread_tokens
    from keras_vit.weights import from_checkpoint, load_weights, resize_model, save_checkpoint

    __all__ = [
        "VARIANTS",
        "AttentionPooling",
        "FeedForward",
        "MultiHeadSelfAttention",
        "PatchEncoder",
        "Patches",
        "ResNetStem",
        "TokenPooling",
        "TransformerBlock",
        "ViTConfig",
        "build_vit",
        "explain",
        "from_checkpoint",
        "load_weights",
        "resize_model",
        "save_checkpoint",
        "skip_unread_tokens",
    ]
