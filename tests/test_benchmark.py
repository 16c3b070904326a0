"""What `benchmark` says of `.tflite` files, against what they were made from."""

import dataclasses
import json
import math
import statistics

import keras
import numpy as np
import pytest
import tensorflow as tf
from typer.testing import CliRunner

import keras_vit
from keras_vit import cli
from keras_vit.export import export_tflite
from keras_vit.export.benchmark import Benchmark, benchmark, describe_graph, interleaved

CLASSES = 7
CONFIG = keras_vit.ViTConfig(hidden_dim=48, depth=2, num_heads=3, mlp_dim=80, patch_size=8)
# Of the dense layers: patches, queries to values and their projection, the MLP, the head.
DENSE_WEIGHTS = 192 * 48 + CONFIG.depth * (48 * 3 * 48 + 48 * 48 + 2 * 48 * 80) + 48 * CLASSES


def convert(function, *specs, path):
    """Writes a `.tflite` file of a function of tensors."""
    concrete = tf.function(function, input_signature=specs).get_concrete_function()
    converter = tf.lite.TFLiteConverter.from_concrete_functions([concrete])
    path.write_bytes(converter.convert())
    return path


def constant(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


@pytest.fixture(scope="module")
def model():
    arguments = {"image_size": (24, 40), "pooling": "gap", "class_token": False}
    model = keras_vit.build_vit(CONFIG, num_classes=CLASSES, **arguments)
    rng = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(rng.normal(0, 0.2, weight.shape) + (weight.name == "gamma"))
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """One file of each of three modes, of a graph that XNNPACK takes as a whole."""
    folder = tmp_path_factory.mktemp("files")
    for mode in ("fp32", "fp16", "dynamic_int8"):
        export_tflite(model, folder / f"{mode}.tflite", mode=mode)
    return folder


@pytest.fixture(scope="module")
def split_file(tmp_path_factory):
    """Dense layers with an operation between them that XNNPACK does not take, in rank 5."""

    def function(x):
        x = tf.matmul(x, constant(6, 10))
        x = tf.gather(tf.reshape(x, (1, 2, 1, 1, 5)), [4, 0, 3, 1, 2], axis=4)
        return tf.matmul(tf.reshape(x, (2, 5)), constant(5, 3))

    path = tmp_path_factory.mktemp("split") / "split.tflite"
    return convert(function, tf.TensorSpec((1, 6), name="x"), path=path)


@pytest.fixture(scope="module")
def mixed_file(tmp_path_factory):
    """Three inputs, one of each dtype that can be timed."""

    def function(x, y, z):
        return x * tf.cast(y, "float32") + tf.cast(z, "float32")

    specs = [tf.TensorSpec((1, 4), dtype) for dtype in ("float32", "uint8", "int8")]
    return convert(function, *specs, path=tmp_path_factory.mktemp("mixed") / "mixed.tflite")


@pytest.fixture(scope="module")
def result(folder, split_file):
    paths = [folder / "fp32.tflite", folder / "dynamic_int8.tflite", split_file]
    return benchmark(paths, threads=(1, 2), rounds=3)


def test_graph_of_an_exported_file(folder):
    facts = describe_graph(folder / "fp32.tflite")
    assert facts.ops["GELU"] == facts.ops["SOFTMAX"] == CONFIG.depth
    assert facts.ops["BATCH_MATMUL"] == 2 * CONFIG.depth
    assert "DELEGATE" not in facts.ops
    assert (facts.partitions, facts.outside, facts.custom_ops) == (1, {}, ())
    assert facts.max_rank == 4


def test_graph_that_xnnpack_takes_in_two_pieces(split_file):
    facts = describe_graph(split_file)
    assert facts.ops == {"FULLY_CONNECTED": 2, "GATHER": 1, "RESHAPE": 1}
    assert facts.partitions == 2
    assert facts.outside == {"GATHER": 1}
    assert facts.max_rank == 5
    assert facts.weights == {"float32": 6 * 10 + 5 * 3}  # and no indices or shapes
    assert facts.quantized_share == 0


def test_graph_without_weights(mixed_file):
    facts = describe_graph(mixed_file)
    assert (facts.outside, facts.max_rank) == ({"CAST": 2}, 2)
    assert (facts.weights, facts.quantized_share) == ({}, 0)


def test_shares_of_weights(folder, model):
    fp32, fp16, int8 = (
        describe_graph(folder / f"{mode}.tflite") for mode in ("fp32", "fp16", "dynamic_int8")
    )
    total = sum(fp32.weights.values())
    assert list(fp32.weights) == ["float32"]
    # Folding takes weights away and adds a few constants.
    assert total == pytest.approx(model.count_params(), rel=0.03)
    assert next(iter(fp16.weights)) == "float16"
    assert fp16.weights["float16"] / sum(fp16.weights.values()) > 0.98
    assert fp16.quantized_share == 0
    assert int8.weights["int8"] == DENSE_WEIGHTS
    assert sum(int8.weights.values()) == total
    assert int8.quantized_share == DENSE_WEIGHTS / total


def test_rows(result, folder):
    assert [row.name for row in result.rows] == ["fp32", "dynamic_int8", "split"]
    for row in result.rows:
        assert row.accuracy is None
        assert [latency.threads for latency in row.latencies] == [1, 2]
        for latency in row.latencies:
            assert latency.rounds == 3
            assert 0 < latency.min_ms <= latency.median_ms
    assert result.rows[1].size_bytes == len((folder / "dynamic_int8.tflite").read_bytes())
    assert result.rows[1].graph == describe_graph(folder / "dynamic_int8.tflite")
    [note] = result.notes
    assert note.startswith("split: outside of XNNPACK GATHER x1")


def test_inputs_of_any_number_and_dtype(mixed_file):
    [row] = benchmark([mixed_file], threads=[1], rounds=1).rows
    assert row.latencies[0].min_ms > 0


def test_custom_operations_are_noted(result):
    row = result.rows[0]
    graph = dataclasses.replace(row.graph, ops={"Whirl": 1}, custom_ops=("Whirl",))
    row = dataclasses.replace(row, graph=graph)
    [note] = dataclasses.replace(result, rows=(row,)).notes
    assert note == "fp32: custom operations Whirl."


def test_names_are_paths_where_two_would_be_the_same(folder, tmp_path):
    twin = tmp_path / "fp32.tflite"
    twin.write_bytes((folder / "fp32.tflite").read_bytes())
    paths = [twin, folder / "fp32.tflite", folder / "fp16.tflite"]
    rows = benchmark(paths, threads=[1], rounds=1).rows
    assert [row.name for row in rows] == [str(twin), str(folder / "fp32.tflite"), "fp16"]


def test_accuracy_comes_from_the_report_beside_the_file(folder, tmp_path):
    paths = {name: tmp_path / f"{name}.tflite" for name in ("fp32", "fp16", "other")}
    content = (folder / "fp32.tflite").read_bytes()
    for path in paths.values():
        path.write_bytes(content)
    rows = [
        {"path": None, "size_bytes": None, "accuracy": 0.5},
        {"path": "fp32.tflite", "size_bytes": len(content), "accuracy": 0.875},
        {"path": "fp16.tflite", "size_bytes": len(content) + 1, "accuracy": 0.25},  # of another
    ]
    (tmp_path / "report.json").write_text(json.dumps({"rows": rows}))
    result = benchmark(paths.values(), threads=[1], rounds=1)
    assert [row.accuracy for row in result.rows] == [0.875, None, None]
    assert "| 0.8750 |" in result.to_markdown()
    result.plot(tmp_path / "plot.svg")
    assert "top-1 accuracy" in (tmp_path / "plot.svg").read_text()
    (tmp_path / "report.json").write_text('{"rows": [3]}')
    assert benchmark([paths["fp32"]], threads=[1], rounds=1).rows[0].accuracy is None


def test_json_and_markdown_say_the_same(result, tmp_path):
    result.to_json(tmp_path / "result.json")
    content = json.loads((tmp_path / "result.json").read_text())
    text = result.to_markdown(tmp_path / "result.md")
    assert (tmp_path / "result.md").read_text() == text
    header, _, *lines = [
        line.strip("| ").split(" | ") for line in text.split("\n\n")[0].split("\n")
    ]
    table = [dict(zip(header, line, strict=True)) for line in lines]
    assert len(table) == len(content["rows"]) == 3
    for row, cells in zip(content["rows"], table, strict=True):
        graph = row["graph"]
        assert cells["file"] == row["name"]
        assert float(cells["MB"]) == pytest.approx(row["size_bytes"] / 1e6, rel=5e-3)
        assert float(cells["med x2"]) == pytest.approx(row["latencies"][1]["median_ms"], rel=5e-3)
        assert int(cells["ops"]) == sum(graph["ops"].values())
        assert int(cells["parts"]) == graph["partitions"]
        assert int(cells["out"]) == sum(graph["outside"].values())
        assert int(cells["rank"]) == graph["max_rank"]
    share = content["rows"][1]["graph"]["quantized_share"]
    assert table[1]["weights"].startswith(f"int8 {share:.0%}")
    assert table[0]["weights"] == "fp32 100%"
    assert content["notes"] == list(result.notes)
    assert content["versions"]["keras"] == keras.__version__


def test_figures_have_three_digits_and_no_exponent(result):
    row = dataclasses.replace(result.rows[0], size_bytes=1_234_400_000)
    assert "| 1234 |" in Benchmark((row,), 2, {}).to_markdown()


def test_outputs_are_not_overwritten(result, tmp_path):
    writers = {"a.json": result.to_json, "a.md": result.to_markdown, "a.png": result.plot}
    for name, write in writers.items():
        path = tmp_path / name
        path.write_text("mine")
        with pytest.raises(ValueError, match="exists already"):
            write(path)
        assert path.read_text() == "mine"
        write(path, overwrite=True)
        assert path.stat().st_size > 100
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_of_an_unknown_format_leaves_nothing(result, tmp_path):
    with pytest.raises(ValueError, match="xyz"):
        result.plot(tmp_path / "plot.xyz")
    assert not list(tmp_path.iterdir())


def test_functions_run_in_turns():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    rounds = []
    times = interleaved(runs, 20, 60.0, lambda: rounds.append(len(calls)))
    warm_up = rounds[0] - 3
    assert np.diff(rounds).tolist() == [3] * 19
    turns = [tuple(calls[end - 3 : end]) for end in rounds]
    assert {tuple(sorted(turn)) for turn in turns} == {("a", "b", "c")}
    assert len(set(turns)) > 1  # nobody runs after the same one always
    assert sorted(calls[:warm_up]) == sorted("abc" * (warm_up // 3))
    assert {name: len(ms) for name, ms in times.items()} == {"a": 20, "b": 20, "c": 20}
    assert all(0 <= min(ms) <= statistics.median(ms) < math.inf for ms in times.values())


def test_timing_stops_after_its_seconds():
    assert {key: len(ms) for key, ms in interleaved({1: int, 2: int}, 9, 0.0).items()} == {
        1: 1,
        2: 1,
    }


def test_errors(folder, tmp_path):
    good, bad, whole = folder / "fp32.tflite", tmp_path / "bad.tflite", tmp_path / "int64.tflite"
    bad.write_bytes(good.read_bytes()[:10_000])
    convert(lambda x: x + 1, tf.TensorSpec((1, 2), "int64"), path=whole)
    with pytest.raises(ValueError, match="Received: files="):
        benchmark([])
    with pytest.raises(ValueError, match=r"none.tflite', which is missing"):
        benchmark([good, tmp_path / "none.tflite"])
    with pytest.raises(ValueError, match="which is a folder"):
        describe_graph(tmp_path)
    with pytest.raises(ValueError, match=r"LiteRT cannot load '.*bad.tflite': "):
        benchmark([good, bad])
    with pytest.raises(ValueError, match=r"int64.tflite' with an input of dtype int64"):
        benchmark([whole])
    with pytest.raises(ValueError, match=r"Received: threads=\(1, 0\)"):
        benchmark([good], threads=(1, 0))
    with pytest.raises(ValueError, match=r"Received: threads=\(\)"):
        benchmark([good], threads=())
    with pytest.raises(ValueError, match="Received: rounds=0"):
        benchmark([good], rounds=0)


def test_command(folder, tmp_path):
    outputs = {name: tmp_path / f"out.{name}" for name in ("json", "markdown", "plot")}
    outputs["plot"] = outputs["plot"].with_suffix(".png")
    arguments = ["benchmark", folder / "fp32.tflite", folder / "fp16.tflite", "--rounds", 2]
    arguments += ["--threads", 2]
    arguments += [part for name, path in outputs.items() for part in (f"--{name}", path)]
    run = CliRunner(env={"COLUMNS": "200"}).invoke
    output = run(cli.app, list(map(str, arguments)), catch_exceptions=False)
    assert output.exit_code == 0, output.output
    assert "fp32 100%" in output.stdout
    rows = json.loads(outputs["json"].read_text())["rows"]
    assert [[latency["threads"] for latency in row["latencies"]] for row in rows] == [[2], [2]]
    assert "| fp16 |" in outputs["markdown"].read_text()
    with pytest.raises(ValueError, match="exists already: pass --overwrite"):
        run(cli.app, list(map(str, arguments)), catch_exceptions=False)
