"""Writes Fashion-MNIST as an image folder: OUT/{train,test}/CLASS/NUMBER.png.

The data are Debian's: `apt-get install dataset-fashion-mnist`. Then:

    python benchmarks/fashion_mnist.py data/fashion-mnist
    keras-vit train --data folder:data/fashion-mnist --out runs/fashion-mnist --epochs 10
"""

import argparse
import gzip
import pathlib

import numpy as np
from PIL import Image
from rich.progress import track

SOURCE = pathlib.Path("/usr/share/datasets/fashion-mnist")
CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle-boot",
)


def read_idx(path):
    """Reads a gzipped IDX file of bytes: two zeros, the type 8, the rank, the sizes, the data."""
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an IDX file of bytes.")
    shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
    return np.frombuffer(data, "uint8", offset=4 + 4 * data[3]).reshape(shape)


def write_split(source, name, folder, per_class):
    images = read_idx(source / f"{name}-images-idx3-ubyte.gz")
    labels = read_idx(source / f"{name}-labels-idx1-ubyte.gz")
    if per_class is not None:
        first = np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in range(10)])
        images, labels = images[first], labels[first]
    for class_name in CLASSES:
        (folder / class_name).mkdir(parents=True)
    for index, (image, label) in enumerate(
        track(list(zip(images, labels, strict=True)), description=folder.name)
    ):
        Image.fromarray(image).save(folder / CLASSES[label] / f"{index:05}.png", compress_level=1)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=pathlib.Path, help="Folder to make.")
    parser.add_argument("--source", type=pathlib.Path, default=SOURCE, help="The IDX files.")
    parser.add_argument("--per-class", type=int, help="Images of each class and split, at most.")
    arguments = parser.parse_args()
    if not arguments.source.is_dir():
        parser.error(f"{arguments.source} is missing: apt-get install dataset-fashion-mnist")
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists already.")
    write_split(arguments.source, "train", arguments.out / "train", arguments.per_class)
    write_split(arguments.source, "t10k", arguments.out / "test", arguments.per_class)


if __name__ == "__main__":
    main()
