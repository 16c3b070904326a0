"""TFRecord files whose records can be read at any time, in any order."""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from keras_vit.data.progress import map_threads

_HEADER = struct.Struct("<QI")  # length of the data, its checksum; then data, their checksum
_FOOTER = 4


class Records(NamedTuple):
    """Where records stand.

    Attributes:
        paths: The files.
        files: int `(N,)`, the place in `paths` of each record's file.
        offsets: int64 `(N,)`, where the data of each record begin, in bytes.
        lengths: int64 `(N,)`, the number of their bytes.
    """

    paths: tuple[str, ...]
    files: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray

    def take(self, indices: np.ndarray | slice) -> Records:
        """Some of the records."""
        return Records(self.paths, *(column[indices] for column in self[1:]))

    def place(self, index: int) -> str:
        """What error messages call a record."""
        offset = self.offsets[index] - _HEADER.size
        return f"{str(self.paths[self.files[index]])!r} at offset {offset}"

    def read(self, index: int) -> bytes:
        """The data of a record. Their checksum is not checked."""
        offset, length = int(self.offsets[index]), int(self.lengths[index])
        path = self.paths[self.files[index]]
        # Opened each time: thousands of files may be more than a process can hold open, and
        # threads read at once. Without `os.pread`, which Windows has not.
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            data = file.read(length)
        if len(data) < length:
            raise ValueError(
                f"A TFRecord file has become shorter. Received: {self.place(index)}, which ends "
                f"before {offset + length}."
            )
        return data

    def tensor(self, index: tf.Tensor) -> tf.Tensor:
        """The data of a record in a TensorFlow graph: int64 scalar -> string scalar."""
        data = tf.numpy_function(self.read, [index], tf.string, stateful=False)
        return tf.ensure_shape(data, ())


def scan_records(paths: list[str]) -> Records:
    """Finds every record of TFRecord files, hopping from header to header.

    Args:
        paths: The files, uncompressed.

    Returns:
        The `Records`, file after file.

    Raises:
        ValueError: If a file is damaged, cut off or compressed; names the file and the offset.
    """
    found = map_threads(_scan, paths, "Looking for records")
    counts = [len(spans) for spans in found]
    spans = np.concatenate([np.empty((0, 2), np.int64), *found])
    files = np.repeat(np.arange(len(paths)), counts)
    return Records(tuple(paths), files, spans[:, 0], spans[:, 1])


def _scan(path: str) -> np.ndarray:
    """The (offset, length) of each record's data, int64 `(N, 2)`."""
    spans, at, size = [], 0, os.path.getsize(path)
    with open(path, "rb", buffering=0) as file:
        while at < size:
            file.seek(at)
            header = file.read(_HEADER.size)
            length, checksum = _HEADER.unpack(header.ljust(_HEADER.size, b"\0"))
            end = at + _HEADER.size + length + _FOOTER
            if len(header) < _HEADER.size or _masked_crc(header[:8]) != checksum or end > size:
                raise ValueError(
                    "A TFRecord file must be whole and uncompressed. "
                    f"Received: {str(path)!r}, damaged or cut off at offset {at} of {size}."
                )
            spans.append((at + _HEADER.size, length))
            at = end
    return np.array(spans, np.int64).reshape(-1, 2)


def _crc_table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [(value >> 1) ^ (0x82F63B78 if value & 1 else 0) for value in table]
    return table


_CRC_TABLE = _crc_table()


def _masked_crc(data: bytes) -> int:
    """CRC-32C, turned and moved as TensorFlow's `lib/hash/crc32c.h` says."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC_TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
