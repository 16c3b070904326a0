"""What phone clients read in a `.tflite` file: its name, its labels, how its pixels are scaled."""

import io
import pathlib
import zipfile

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from .flatbuffer import pack

_ENTRY = "TFLITE_METADATA"
_LABELS = "labels.txt"

# The tables of metadata_schema.fbs (version 1.5.0, in MediaPipe's wheel) that are written here:
# their fields in slot order, up to the last one used. A union fills two slots: type and value.
_SCHEMA = {
    "ModelMetadata": (
        "name description version subgraph_metadata author license associated_files "
        "min_parser_version"
    ),
    "SubGraphMetadata": "name description input_tensor_metadata output_tensor_metadata",
    "TensorMetadata": (
        "name description dimension_names content process_units stats associated_files"
    ),
    "Content": "content_properties_type content_properties",
    "FeatureProperties": "",
    "ImageProperties": "color_space",
    "ProcessUnit": "options_type options",
    "NormalizationOptions": "mean std",
    "Stats": "max min",
    "AssociatedFile": "name description type",
}
# Values of its unions and enums.
_FEATURE_PROPERTIES, _IMAGE_PROPERTIES = 1, 2  # ContentProperties
_NORMALIZATION_OPTIONS = 1  # ProcessUnitOptions
_COLOR_SPACES = {3: 1, 1: 2}  # channels -> ColorSpaceType: RGB, GRAYSCALE; others are UNKNOWN, 0
_TENSOR_AXIS_LABELS = 2  # AssociatedFileType


def add_metadata(content, *, name, description, labels=None, mean=0.0, std=1.0, version=None):
    """Writes into an image classifier's `.tflite` file what phone clients need to run it.

    The file gets a buffer `TFLITE_METADATA` and, if there are labels, `labels.txt` as a zip entry
    behind the model, where an interpreter does not look. Metadata that it had is replaced.

    MediaPipe's ImageClassifier then opens it as it is: it resizes an RGB image to the input's
    size, feeds (pixel - mean) / std to a float32 input, and reports the output as scores, which
    should therefore be probabilities. It takes uint8 inputs as well, to which it copies the pixels
    whatever `mean` and `std` are. It refuses int8 inputs and one-channel images: for other
    clients these are described all the same (one channel as GRAYSCALE).

    Args:
        content: bytes of a `.tflite` file whose one signature maps images (1, H, W, C) to
            (1, classes).
        name: str, name of the model.
        description: str, what the model does.
        labels: optional sequence of class names, one per output.
        mean, std: float, for all channels, of pixels in [0, 255]. 0 and 1 if the model scales
            its input itself.
        version: optional str, version of the model.

    Returns:
        The bytes of the new file. Weights stay aligned to 16 bytes.

    Raises:
        TypeError: if `labels` are not strings.
        ValueError: if `content` is no `.tflite` file or not such a model, the number of `labels`
            is not the number of classes, one of them has a line break, or `std` is not positive.

    Source: metadata_schema.fbs of MediaPipe.
    """
    if content[4:8] != b"TFL3":
        raise ValueError(
            "`content` must be a `.tflite` file, with TFL3 in bytes 4 to 7. Received: "
            f"{len(content)} bytes that begin with {bytes(content[:8])!r}."
        )
    if not std > 0:
        raise ValueError(f"`std` must be positive. Received: std={std}.")
    model = schema.ModelT.InitFromPackedBuf(content)
    image, scores = _input_and_output(model)
    if labels is not None:
        check_class_names(labels, scores["classes"])
    metadata = _table(
        "ModelMetadata",
        name=name,
        description=description,
        version=version,
        subgraph_metadata=[
            _table(
                "SubGraphMetadata",
                input_tensor_metadata=[_describe_image(**image, mean=mean, std=std)],
                output_tensor_metadata=[_describe_scores(**scores, has_labels=bool(labels))],
            )
        ],
        # Every field above has been there since the first version.
        min_parser_version="1.0.0",
    )
    _attach(model, metadata)
    return with_labels(pack(model, content), labels)


def _input_and_output(model):
    """Returns name and size of a classifier's input and output, or raises ValueError."""
    signatures = model.signatureDefs or []
    counts = [(len(s.inputs), len(s.outputs)) for s in signatures]
    if counts != [(1, 1)]:
        raise ValueError(
            "The model must have one signature, with one input and one output. Received: "
            f"{counts} inputs and outputs."
        )
    tensors = model.subgraphs[signatures[0].subgraphIndex].tensors
    entries = [signatures[0].inputs[0], signatures[0].outputs[0]]
    shapes = [tensors[entry.tensorIndex].shape.tolist() for entry in entries]
    if [len(shape) for shape in shapes] != [4, 2]:
        raise ValueError(
            "The model must map (1, height, width, channels) to (1, classes). Received: "
            f"{shapes[0]} to {shapes[1]}."
        )
    names = [entry.name.decode() for entry in entries]
    return (
        {"name": names[0], "channels": shapes[0][-1]},
        {"name": names[1], "classes": shapes[1][-1]},
    )


def check_class_names(labels, classes):
    """Raises unless there is one label per class and each fits a line of its own."""
    if isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
        raise TypeError(f"`labels` must be a sequence of strings. Received: labels={labels!r}.")
    if len(labels) != classes:
        raise ValueError(
            f"`labels` must name each of the model's {classes} outputs. Received: "
            f"{len(labels)} labels."
        )
    for label in labels:
        if "\n" in label or "\r" in label:
            raise ValueError(f"`labels` must have no line breaks. Received: {label!r}.")


def _describe_image(name, channels, mean, std):
    return _table(
        "TensorMetadata",
        name=name,
        description=f"Image of {channels} channels; pixels in [0, 255], less {mean}, over {std}.",
        content=_table(
            "Content",
            content_properties_type=_IMAGE_PROPERTIES,
            content_properties=_table(
                "ImageProperties", color_space=_COLOR_SPACES.get(channels, 0)
            ),
        ),
        process_units=[
            _table(
                "ProcessUnit",
                options_type=_NORMALIZATION_OPTIONS,
                options=_table("NormalizationOptions", mean=_floats(mean), std=_floats(std)),
            )
        ],
        stats=_table("Stats", max=_floats((255 - mean) / std), min=_floats(-mean / std)),
    )


def _describe_scores(name, classes, has_labels):
    file = _table(
        "AssociatedFile",
        name=_LABELS,
        description="Names of the classes, one a line.",
        type=_TENSOR_AXIS_LABELS,
    )
    return _table(
        "TensorMetadata",
        name=name,
        description=f"Score of each of the {classes} classes.",
        content=_table(
            "Content",
            content_properties_type=_FEATURE_PROPERTIES,
            content_properties=_table("FeatureProperties"),
        ),
        associated_files=[file] if has_labels else None,
    )


def _floats(value):
    return np.array([value], "float32")


# Writing and reading tables of the schema


def _table(kind, **fields):
    """A table to write: an int is an enum's value, None is left out."""
    return kind, {field: value for field, value in fields.items() if value is not None}


def _write(builder, value):
    """Writes a string, an array, a list of tables or a table, and returns its offset."""
    if isinstance(value, str):
        return builder.CreateString(value)
    if isinstance(value, np.ndarray):
        return builder.CreateNumpyVector(value)
    if isinstance(value, list):
        offsets = [_write(builder, table) for table in value]
        builder.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            builder.PrependUOffsetTRelative(offset)
        return builder.EndVector()
    kind, fields = value
    slots = _SCHEMA[kind].split()
    enums = {field: value for field, value in fields.items() if isinstance(value, int)}
    offsets = {field: _write(builder, fields[field]) for field in fields if field not in enums}
    builder.StartObject(len(slots))
    for field, number in enums.items():
        builder.PrependInt8Slot(slots.index(field), number, 0)
    for field, offset in offsets.items():
        builder.PrependUOffsetTRelativeSlot(slots.index(field), offset, 0)
    return builder.EndObject()


class _Reader:
    """A table in a buffer, whose fields are read by name; what is missing reads as None."""

    def __init__(self, kind, content, position):
        self.kind = kind
        self.table = flatbuffers.table.Table(content, position)

    def _offset(self, field):
        # A vtable begins with two 16-bit sizes.
        return self.table.Offset(4 + 2 * _SCHEMA[self.kind].split().index(field))

    def text(self, field):
        offset = self._offset(field)
        return self.table.String(offset + self.table.Pos).decode() if offset else None

    def number(self, field):
        """The first number of a vector of floats."""
        flags = flatbuffers.number_types.Float32Flags
        return self.table.Get(flags, self.table.Vector(self._offset(field)))

    def child(self, kind, field):
        position = self.table.Indirect(self._offset(field) + self.table.Pos)
        return _Reader(kind, self.table.Bytes, position)

    def first(self, kind, field):
        """The first table of a vector of tables."""
        position = self.table.Indirect(self.table.Vector(self._offset(field)))
        return _Reader(kind, self.table.Bytes, position)


def read_metadata(path):
    """Reads what `add_metadata` wrote.

    Args:
        path: `.tflite` file.

    Returns:
        A dictionary with `name`, `description`, `version` (str or None), `labels` (tuple or
        None), `mean` and `std`; None if the file has no metadata.
    """
    model = schema.Model.GetRootAs(pathlib.Path(path).read_bytes(), 0)
    entries = [model.Metadata(i) for i in range(model.MetadataLength())]
    buffers = {entry.Name().decode(): model.Buffers(entry.Buffer()) for entry in entries}
    if _ENTRY not in buffers:
        return None
    content = buffers[_ENTRY].DataAsNumpy().tobytes()
    root = flatbuffers.encode.Get(flatbuffers.packer.uoffset, content, 0)
    metadata = _Reader("ModelMetadata", content, root)
    image = metadata.first("SubGraphMetadata", "subgraph_metadata").first(
        "TensorMetadata", "input_tensor_metadata"
    )
    options = image.first("ProcessUnit", "process_units").child("NormalizationOptions", "options")
    return {
        **{field: metadata.text(field) for field in ("name", "description", "version")},
        "labels": _read_labels(path),
        **{field: options.number(field) for field in ("mean", "std")},
    }


def _read_labels(path):
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        return tuple(archive.read(_LABELS).decode().split("\n")[:-1])


# Writing the file


def _attach(model, metadata):
    """Adds the metadata to a model, in the place of any it has."""
    builder = flatbuffers.Builder()
    builder.Finish(_write(builder, metadata), b"M001")
    model.metadata = model.metadata or []
    entries = [entry for entry in model.metadata if entry.name.decode() == _ENTRY]
    if not entries:
        entries = [schema.MetadataT(name=_ENTRY, buffer=len(model.buffers))]
        model.metadata += entries
        model.buffers.append(schema.BufferT())
    model.buffers[entries[0].buffer].data = np.frombuffer(builder.Output(), "uint8")


def with_labels(content, labels):
    """Appends the labels as a zip archive, whose entries are found from the end of the file."""
    if not labels:
        return bytes(content)
    stream = io.BytesIO()
    stream.write(content)
    # Mode "a" would look for an archive in the weights.
    with zipfile.ZipFile(stream, "w") as archive:
        # Stored, because MediaPipe does not decompress, and with the format's first date.
        archive.writestr(zipfile.ZipInfo(_LABELS), "".join(f"{label}\n" for label in labels))
    return stream.getvalue()
