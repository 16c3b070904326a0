"""Writing `.tflite` files: the flatbuffer, smaller and better aligned than its generated packer."""

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema


class _AlignedBuffer(schema.BufferT):
    """A buffer that is packed as the schema asks, `force_align: 16`; `BufferT` aligns to 4."""

    def Pack(self, builder):
        if self.data is not None:
            builder.Prep(16, len(self.data))
        return super().Pack(builder)


class _SharingBuilder(flatbuffers.Builder):
    """A builder that writes equal vectors of int64 once: the zero points of all the channels."""

    def __init__(self, size):
        super().__init__(size)
        self.written = {}

    def CreateNumpyVector(self, x):
        if x.dtype != np.int64:
            return super().CreateNumpyVector(x)
        key = x.tobytes()
        if key not in self.written:
            self.written[key] = super().CreateNumpyVector(x)
        return self.written[key]


def pack(model, content):
    """Writes the model that was read from `content`, smaller and better aligned than it may be.

    Args:
        model: a `ModelT`.
        content: bytes of the `.tflite` file that it was read from.

    Returns:
        The bytes of the flatbuffer.

    Files near 2 GB, the limit of a flatbuffer, have weights behind it. These move with its end.
    """
    model.buffers = [_AlignedBuffer(b.data, b.offset, b.size) for b in model.buffers]
    # The format reserves the offsets 0 and 1 for buffers within the flatbuffer.
    behind = [buffer for buffer in model.buffers if buffer.offset > 1]
    start = min((buffer.offset for buffer in behind), default=len(content))
    end = max((buffer.offset + buffer.size for buffer in behind), default=start)
    flatbuffer = _pack_flatbuffer(model, start)
    if not behind:
        return flatbuffer
    for buffer in behind:
        buffer.offset += len(flatbuffer) - start
    return _pack_flatbuffer(model, start) + content[start:end]


def _pack_flatbuffer(model, size):
    """Writes a model of about `size` bytes; its length is a multiple of 16."""
    # Space for all at once: a growing builder would copy the weights again and again.
    builder = _SharingBuilder(size + 65536)
    builder.Finish(model.Pack(builder), b"TFL3")
    return builder.Output()
