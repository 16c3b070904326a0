"""Public checkpoints: loading, saving, and another resolution."""

from keras_vit.weights.loading import from_checkpoint, load_weights, resize_model
from keras_vit.weights.saving import save_checkpoint

__all__ = ["from_checkpoint", "load_weights", "resize_model", "save_checkpoint"]
