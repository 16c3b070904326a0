"""Any `.tflite` files side by side: what they hold, and how fast they run here."""

import collections
import dataclasses
import functools
import json
import math
import os
import pathlib
import random
import statistics
import time

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from rich.console import Console
from rich.progress import Progress

from keras_vit.versions import versions

from .report import (
    markdown_table,
    plain,
    size_bytes,
    terminal_tables,
    three_digits,
    write_new_text,
)

_WARM_UP_CALLS = 2
# Constants of these types are shapes, indices, and the biases of integer layers: not weights.
_NOT_WEIGHTS = frozenset({"int32", "int64", "uint32", "uint64", "bool", "string", "resource"})
_FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})


@dataclasses.dataclass(frozen=True)
class GraphFacts:
    """What a `.tflite` file makes LiteRT do on a CPU.

    Attributes:
        ops: operation name -> count in the main subgraph.
        custom_ops: names among them that are not LiteRT's own; TensorFlow's begin with "Flex".
        partitions: number of pieces of the graph that XNNPACK takes over. 1 is the goal: between
            two pieces the data leave its layout.
        outside: operation name -> count of those that run outside of XNNPACK.
        max_rank: the largest rank of a tensor. GPU delegates stop at 4.
        weights: dtype -> number of constant values that operations read, the most frequent
            first. Integers of 32 and 64 bits are not counted: they are shapes and the biases of
            integer layers.
    """

    ops: dict
    custom_ops: tuple
    partitions: int
    outside: dict
    max_rank: int
    weights: dict

    @property
    def quantized_share(self):
        """Share of the weights that are integers, in [0, 1]."""
        integers = [count for dtype, count in self.weights.items() if dtype not in _FLOATS]
        return sum(integers) / max(1, sum(self.weights.values()))


@dataclasses.dataclass(frozen=True)
class Latency:
    """Of one inference, in ms, with a number of threads, over a number of rounds."""

    threads: int
    min_ms: float
    median_ms: float
    rounds: int


@dataclasses.dataclass(frozen=True)
class BenchmarkRow:
    """One file of a `Benchmark`.

    Attributes:
        name: name of the file without `.tflite`, or its path if another file has that name too.
        path: the file.
        size_bytes: its size.
        graph: `GraphFacts`.
        latencies: tuple of `Latency`, one for each number of threads.
        accuracy: share of the held-out images whose top-1 class is the label, if the
            `report.json` beside the file says so; None else.
    """

    name: str
    path: str
    size_bytes: int
    graph: GraphFacts
    latencies: tuple
    accuracy: float | None = None


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """How `.tflite` files compare: one row each.

    Attributes:
        rows: tuple of `BenchmarkRow`.
        cores: number of cores that were there to use.
        versions: package -> version.
    """

    rows: tuple
    cores: int
    versions: dict

    @property
    def notes(self):
        """Sentences about files with operations that are custom or outside of XNNPACK."""
        return tuple(note for row in self.rows for note in _notes(row))

    def as_dict(self):
        """Returns rows and notes as plain dictionaries, lists, strings and numbers."""
        content = plain(self)
        for row, entry in zip(self.rows, content["rows"], strict=True):
            entry["graph"]["quantized_share"] = row.graph.quantized_share
        return {**content, "notes": list(self.notes)}

    def to_json(self, path, *, overwrite=False):
        """Writes the comparison as JSON. Raises ValueError if `path` exists, unless `overwrite`."""
        write_new_text(path, json.dumps(self.as_dict(), indent=2) + "\n", overwrite)

    def to_markdown(self, path=None, *, overwrite=False):
        """Returns the comparison as a Markdown table, and writes it if `path` is given.

        Raises:
            ValueError: if `path` exists and `overwrite` is False.
        """
        text = markdown_table(self._columns(), map(self._cells, self.rows))
        text += f"\n{self._caption()}\n"
        text += "".join(f"- {note}\n" for note in self.notes)
        if path is not None:
            write_new_text(path, text, overwrite)
        return text

    def table(self):
        """Returns the comparison as what rich prints: one table of speed, one of the graphs."""
        columns, rows = self._columns(), list(map(self._cells, self.rows))
        return terminal_tables(columns, rows, columns.index("ops"), (self._caption(), *self.notes))

    def plot(self, path, *, overwrite=False):
        """Draws latency against size, and against accuracy where one is known, as a picture.

        Args:
            path: file to write; its suffix, such as `.png` or `.svg`, says the format.
            overwrite: whether an existing file may be replaced.

        Raises:
            ValueError: if `path` exists and `overwrite` is False, or has an unknown suffix.
        """
        from .plots import draw_files, save_panels

        heights = {"size, MB": lambda row: row.size_bytes / 1e6}
        if self._has_accuracy():
            heights["top-1 accuracy"] = lambda row: row.accuracy
        panels = [
            functools.partial(draw_files, files=self._dots(height), label=label)
            for label, height in heights.items()
        ]
        save_panels(path, panels, overwrite=overwrite)

    def _dots(self, height):
        return [
            (
                row.name,
                row.size_bytes,
                {latency.threads: latency.min_ms for latency in row.latencies},
                height(row),
            )
            for row in self.rows
        ]

    def _columns(self):
        columns = ["file", "MB"]
        if self._has_accuracy():
            columns.append("top-1")
        for latency in self.rows[0].latencies:
            columns += [f"ms x{latency.threads}", f"med x{latency.threads}"]
        return [*columns, "ops", "parts", "out", "rank", "weights"]

    def _cells(self, row):
        """Formats a row; a dash for an accuracy that is not known."""
        cells = [row.name, three_digits(row.size_bytes / 1e6)]
        if self._has_accuracy():
            cells.append("-" if row.accuracy is None else f"{row.accuracy:.4f}")
        for latency in row.latencies:
            cells += [three_digits(latency.min_ms), three_digits(latency.median_ms)]
        graph = row.graph
        counts = (sum(graph.ops.values()), graph.partitions, sum(graph.outside.values()))
        return [*cells, *map(str, counts), str(graph.max_rank), _weights_text(graph.weights)]

    def _has_accuracy(self):
        return any(row.accuracy is not None for row in self.rows)

    def _caption(self):
        rounds = max(latency.rounds for row in self.rows for latency in row.latencies)
        return (
            f"ms xN, med xN: one inference with N threads, minimum and median of {rounds} rounds "
            f"in which each file ran once, on {self.cores} cores. parts: pieces of the graph that "
            "XNNPACK takes over; out: operations that it leaves; rank: the largest of a tensor."
        )


def benchmark(files, *, threads=None, rounds=30, seconds=20.0):
    """Compares `.tflite` files side by side: size, graph and latency.

    The latencies are interleaved: a round runs each file once, in an order drawn anew, so that a
    disturbance of the machine meets all of them alike. One number of threads is timed after the
    other: the files of a turn are in memory together, each with the weights that XNNPACK has
    packed for it, which is about twice the sum of their sizes.

    Args:
        files: paths of `.tflite` files. Inputs, of any number, are float32, uint8 or int8; they
            get noise, and a dimension of any size is 1. Of several subgraphs the first is run.
        threads: numbers of threads; by default 1 and the number of cores.
        rounds: number of timings of each file, >= 1.
        seconds: the timing of a number of threads stops after the round that passes this time.

    Returns:
        A `Benchmark`, its rows in the order of `files`.

    Raises:
        ValueError: if there are no files, one is missing or cannot be loaded, an input has
            another dtype, or `threads` or `rounds` are below 1.
    """
    paths = [_check_file(path) for path in files]
    threads = _check_threads(threads)
    if not paths:
        raise ValueError(f"`files` must name `.tflite` files. Received: files={files!r}.")
    if rounds < 1:
        raise ValueError(f"`rounds` must be at least 1. Received: rounds={rounds}.")
    with progress_bar() as progress:
        task = progress.add_task("Benchmark", total=len(paths) + rounds * len(threads))

        def advance():
            progress.advance(task)

        graphs = []
        for path in paths:
            graphs.append(describe_graph(path))
            advance()
        timings = [_latencies(paths, count, rounds, seconds, advance) for count in threads]
    by_file = zip(_names(paths), paths, graphs, zip(*timings, strict=True), strict=True)
    rows = [
        BenchmarkRow(name, str(path), size_bytes(path), graph, latencies, _known_accuracy(path))
        for name, path, graph, latencies in by_file
    ]
    return Benchmark(rows=tuple(rows), cores=available_cores(), versions=versions())


def describe_graph(path):
    """Reads a `.tflite` file, and what becomes of its graph when LiteRT loads it.

    Args:
        path: the file.

    Returns:
        `GraphFacts`.

    Raises:
        ValueError: if the file is missing or cannot be loaded.
    """
    path = _check_file(path)
    interpreter = _load(path, threads=1)
    ops = collections.Counter(op["op_name"] for op in interpreter._get_ops_details())
    del ops["DELEGATE"]
    running = _running_ops(interpreter)
    partitions = running.pop("DELEGATE", 0)
    model = schema.Model.GetRootAs(path.read_bytes(), 0)
    return GraphFacts(
        ops=dict(sorted(ops.items())),
        custom_ops=tuple(sorted(name for name in ops if name not in vars(schema.BuiltinOperator))),
        partitions=partitions,
        outside=dict(sorted(running.items())),
        max_rank=max(tensor.ShapeLength() for graph in _subgraphs(model) for tensor in graph[1]),
        weights=_weights(model),
    )


def interleaved(runs, rounds, seconds, advance=lambda: None):
    """Times functions in turns: a round calls each once, in an order drawn anew.

    Interpreters that wait do not disturb the one that runs, since XNNPACK's workers sleep between
    inferences: on 2 cores, with 1 and with 2 threads, six of them changed a minimum of 0.3 ms by
    less than 1%. What runs in between takes the caches with it, though: a file is slower here
    than alone by the time to read its weights anew (0.05 ms for 6 MB, 0.2 ms for 22 MB there),
    as it is in an application that has other work too.

    Args:
        runs: mapping of keys to functions without arguments; they are warmed up first.
        rounds: number of timings of each.
        seconds: the timing stops after the round that passes this time.
        advance: called after each round.

    Returns:
        A dictionary: key -> list of ms, one for each round.
    """
    for run in runs.values():
        for _ in range(_WARM_UP_CALLS):
            run()
    times = {key: [] for key in runs}
    turns, order = list(runs.items()), random.Random(0)
    deadline = time.perf_counter() + seconds
    for _ in range(rounds):
        order.shuffle(turns)
        for key, run in turns:
            start = time.perf_counter()
            run()
            times[key].append(1e3 * (time.perf_counter() - start))
        advance()
        if time.perf_counter() > deadline:
            break
    return times


def progress_bar():
    """A progress bar on stderr, shown only if that is a terminal."""
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def available_cores():
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check_file(path):
    path = pathlib.Path(path)
    if not path.is_file():
        state = "a folder" if path.is_dir() else "missing"
        raise ValueError(f"A `.tflite` file is needed. Received: path='{path}', which is {state}.")
    return path


def _check_threads(threads):
    """Returns the numbers of threads as a tuple, each once."""
    threads = (1, available_cores()) if threads is None else threads
    threads = tuple(dict.fromkeys(threads))
    if not threads or min(threads) < 1:
        raise ValueError(f"`threads` must be numbers of at least 1. Received: threads={threads}.")
    return threads


def _load(path, threads):
    """Returns an interpreter that is ready to run, XNNPACK in it."""
    try:
        interpreter = Interpreter(str(path), num_threads=threads)
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"LiteRT cannot load '{path}': {str(error).strip()}") from error
    return interpreter


def _running_ops(interpreter):
    """Counts the operations that the outputs need, those of a partition as one DELEGATE.

    The interpreter lists the operations of the file and after them one DELEGATE for each
    partition, which gives the same tensors as some of those that it stands for: what runs is
    found by walking from the outputs back, through the DELEGATE where there are both.
    """
    ops = interpreter._get_ops_details()
    producers = {tensor: op for op in ops for tensor in op["outputs"]}
    tensors = [details["index"] for details in interpreter.get_output_details()]
    running = {}
    while tensors:
        op = producers.get(tensors.pop())
        if op is not None and op["index"] not in running:
            running[op["index"]] = op["op_name"]
            tensors.extend(op["inputs"])
    return dict(collections.Counter(running.values()))


def _subgraphs(model):
    """Yields the operators and the tensors of each subgraph, as two lists."""
    for graph in map(model.Subgraphs, range(model.SubgraphsLength())):
        operators = list(map(graph.Operators, range(graph.OperatorsLength())))
        yield operators, list(map(graph.Tensors, range(graph.TensorsLength())))


def _weights(model):
    """Counts the constant values that operations read, by dtype; a shared buffer counts once."""
    dtypes = {code: name.lower() for name, code in vars(schema.TensorType).items()}
    constants = {}
    for operators, tensors in _subgraphs(model):
        read = {index for operator in operators for index in operator.InputsAsNumpy().tolist()}
        for tensor in (tensors[index] for index in read if index >= 0):
            buffer = model.Buffers(tensor.Buffer())
            if buffer.DataLength() or buffer.Size():  # the latter: it lies behind the flatbuffer
                count = math.prod(tensor.Shape(i) for i in range(tensor.ShapeLength()))
                constants[tensor.Buffer()] = dtypes[tensor.Type()], count
    counts = collections.Counter()
    for dtype, count in constants.values():
        if dtype not in _NOT_WEIGHTS:
            counts[dtype] += count
    return dict(counts.most_common())


def _weights_text(weights):
    """For example "int8 98% fp32 2%"."""
    total = sum(weights.values())
    shares = {dtype.replace("float", "fp"): count / total for dtype, count in weights.items()}
    return " ".join(f"{dtype} {share:.0%}" for dtype, share in shares.items() if share >= 0.005)


def _latencies(paths, threads, rounds, seconds, advance):
    """Returns the `Latency` of each file with so many threads, in the order of `paths`."""
    runs = dict(enumerate(_runner(path, threads) for path in paths))
    times = interleaved(runs, rounds, seconds, advance)
    return [
        Latency(threads, min(ms), statistics.median(ms), len(ms))
        for ms in map(times.get, range(len(paths)))
    ]


def _runner(path, threads):
    """Returns a function that runs a file once on noise."""
    interpreter = _load(path, threads)
    rng = np.random.default_rng(0)
    for details in interpreter.get_input_details():
        noise = _noise(rng, details["shape"], np.dtype(details["dtype"]), path)
        interpreter.set_tensor(details["index"], noise)
    return interpreter.invoke


def _noise(rng, shape, dtype, path):
    if dtype == np.float32:
        return rng.standard_normal(shape, dtype)
    if dtype in (np.uint8, np.int8):
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)
    raise ValueError(
        f"Inputs must be float32, uint8 or int8. Received: path='{path}' with an input of dtype "
        f"{dtype.name}."
    )


def _names(paths):
    """The names of files without `.tflite`; the path where two would be the same."""
    stems = collections.Counter(path.stem for path in paths)
    return [path.stem if stems[path.stem] == 1 else str(path) for path in paths]


def _known_accuracy(path):
    """The accuracy that the report of the export beside a file has for it, or None."""
    try:
        rows = json.loads((path.parent / "report.json").read_text(encoding="utf-8"))["rows"]
        [row] = [row for row in rows if row["path"] == path.name]
        is_same = row["size_bytes"] == size_bytes(path)
        return row["accuracy"] if is_same else None
    except (OSError, ValueError, KeyError, TypeError):  # none, or a report of something else
        return None


def _notes(row):
    if row.graph.custom_ops:
        yield f"{row.name}: custom operations {', '.join(row.graph.custom_ops)}."
    if row.graph.outside:
        outside = ", ".join(f"{name} x{count}" for name, count in row.graph.outside.items())
        yield f"{row.name}: outside of XNNPACK {outside}."
