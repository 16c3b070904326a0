"""Vision Transformers for Keras, from images to a verified phone file."""

import pathlib
import sys

__version__ = "0.1.0"

# Importing Keras starts its backend, which takes seconds. The `keras-vit` command answers
# `--help` without it: there, each subcommand imports what it needs.
if pathlib.PurePath(sys.argv[0] if sys.argv else "").name not in ("keras-vit", "keras-vit.exe"):
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
    from keras_vit.model import build_vit

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
    ]
