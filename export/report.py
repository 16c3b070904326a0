"""What an exported file holds: its signature, operations, size and origin."""

import collections
import dataclasses
import json
import math
import pathlib
import shlex
import sys

from ai_edge_litert import schema_py_generated as schema
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from keras_vit.files import check_new, write_text
from keras_vit.versions import versions


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Name, shape (None for any batch size) and dtype of an input or output."""

    name: str
    shape: tuple
    dtype: str


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        path: the file or folder.
        mode: "saved_model" or one of `keras_vit.export.MODES`.
        size_bytes: size of the file, or of all files in the folder.
        input, output: `TensorInfo` of the signature `serving_default`.
        ops: operation name -> count, sorted by name; empty for a SavedModel.
        labels: class names, or None.
        note: what is not as it could be, or None.
        command: the command line that exported.
        versions: package -> version.
        sensitivity: layer name -> signal-to-noise ratio in dB of the outputs with that layer alone
            quantized; empty if it was not measured.
        fallback: layer name -> precision that it was given instead of the mode's, such as
            "float32" or "dynamic_int8".
    """

    path: str
    mode: str
    size_bytes: int
    input: TensorInfo
    output: TensorInfo
    ops: dict
    labels: tuple | None
    note: str | None
    command: str
    versions: dict
    sensitivity: dict = dataclasses.field(default_factory=dict)
    fallback: dict = dataclasses.field(default_factory=dict)

    @classmethod
    def create(cls, path, *, note=None, **fields):
        """Returns a report on `path` with its size, the command line and versions filled in."""
        return cls(
            note=note,
            path=str(path),
            size_bytes=size_bytes(path),
            command=shlex.join(sys.argv),
            versions=versions(),
            **fields,
        )

    def as_dict(self):
        """Returns the report as plain dictionaries, lists, strings and numbers."""
        return plain(self)

    def to_json(self, path, *, overwrite=False):
        """Writes the report as JSON. Raises ValueError if `path` exists, unless `overwrite`."""
        write_new_text(path, json.dumps(self.as_dict(), indent=2) + "\n", overwrite)

    def __str__(self):
        batch = "any batch" if self.input.shape[0] is None else f"batch {self.input.shape[0]}"
        sizes = " x ".join(str(size) for size in self.input.shape[1:])
        operations = f", {sum(self.ops.values())} operations" if self.ops else ""
        return (
            f"{self.path}: {self.mode}, {self.size_bytes / 1e6:.2f} MB, {batch} of {sizes} -> "
            f"{self.output.shape[-1]} {self.output.name}{operations}"
            + (f"\n  {self.note}" if self.note else "")
        )


def describe_tflite(path):
    """Reads the operations and the signature of a `.tflite` file from its flatbuffer.

    Args:
        path: the file.

    Returns:
        A dictionary with `ops` (operation name -> count, sorted; a custom operation is named
        `CUSTOM:<name>`), `input` and `output` (`TensorInfo`).
    """
    model = schema.Model.GetRootAs(pathlib.Path(path).read_bytes(), 0)
    signature = model.SignatureDefs(0)
    subgraph = model.Subgraphs(signature.SubgraphIndex())
    return {
        "ops": _operation_counts(model),
        "input": _tensor_info(subgraph, signature.Inputs(0)),
        "output": _tensor_info(subgraph, signature.Outputs(0)),
    }


def _operation_counts(model):
    names = {code: name for name, code in vars(schema.BuiltinOperator).items() if name[0] != "_"}
    counts = collections.Counter()
    for subgraph in map(model.Subgraphs, range(model.SubgraphsLength())):
        for operator in map(subgraph.Operators, range(subgraph.OperatorsLength())):
            code = model.OperatorCodes(operator.OpcodeIndex())
            # Codes below 127 are written to the older, one-byte field too; files differ in which.
            name = names[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())]
            counts[f"CUSTOM:{code.CustomCode().decode()}" if name == "CUSTOM" else name] += 1
    return dict(sorted(counts.items()))


def _tensor_info(subgraph, entry):
    types_by_code = {code: name for name, code in vars(schema.TensorType).items()}
    tensor = subgraph.Tensors(entry.TensorIndex())
    return TensorInfo(
        name=entry.Name().decode(),
        shape=tuple(int(size) for size in tensor.ShapeAsNumpy()),
        dtype=types_by_code[tensor.Type()].lower(),
    )


def size_bytes(path):
    """Returns the size of a file, or of all files below a folder, in bytes."""
    path = pathlib.Path(path)
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def markdown_table(columns, rows):
    """Returns a table in Markdown, its first column on the left and the others on the right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def terminal_tables(columns, rows, split, notes, red=()):
    """Returns two tables for a terminal of 80 columns, both with the names, and notes below.

    Args:
        columns: titles; of two words each stands on a line of its own.
        rows: lists of cells; the first is a name, which is folded where a terminal is narrow.
        split: number of columns of the first table.
        notes: sentences.
        red: names of the rows in red.
    """
    tables = [Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)) for _ in range(2)]
    for table, part in zip(tables, (slice(1, split), slice(split, None)), strict=True):
        table.add_column(columns[0], min_width=7, overflow="fold")
        for column in columns[part]:
            table.add_column(column.replace(" ", "\n"), justify="right", no_wrap=True)
        for row in rows:
            cells = map(Text, (row[0], *row[part]))  # not strings, whose brackets are markup
            table.add_row(*cells, style="red" if row[0] in red else None)
    return Group(*tables, *map(Text, notes))


def three_digits(value):
    """Formats a number with three digits and no exponent for large ones."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def write_new_text(path, text, overwrite=False):
    """Writes a text file; raises ValueError if something stands at `path`, unless `overwrite`."""
    check_new(path, overwrite)
    write_text(path, text)


def plain(value):
    """Turns dataclasses and tuples into what JSON knows; a number that is not finite into null."""
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {field.name: plain(getattr(value, field.name)) for field in fields}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
