"""Image data: sources, and reading single images."""

from keras_vit.data.images import decode_image, read_image
from keras_vit.data.sources import load_data
from keras_vit.data.structures import ImageData, Split

__all__ = ["ImageData", "Split", "decode_image", "load_data", "read_image"]
