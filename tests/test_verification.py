"""What a `Verification` says and draws of its figures."""

import dataclasses
import functools
import json

import matplotlib.figure
import pytest
from matplotlib.text import Text
from rich.console import Console

from keras_vit.export import Comparison, ExportReport, TensorInfo, Verification, plots

LAYERS = [f"block_{i}/{name}" for i in range(10) for name in ("qkv", "proj", "fc1", "fc2")]
SENSITIVITY = {layer: 20.0 + (7 * i) % len(LAYERS) for i, layer in enumerate(LAYERS)}
FALLBACK = {"block_0/qkv": "float32", "block_5/proj": "dynamic_int8"}


def report(mode, **fields):
    return ExportReport(
        path=f"/out/{mode}.tflite",
        mode=mode,
        size_bytes=3,
        input=TensorInfo("images", (1, 24, 40, 3), "float32"),
        output=TensorInfo("logits", (1, 7), "float32"),
        ops={"ADD": 3},
        labels=None,
        command="export it",
        versions={},
        **{"note": None, **fields},
    )


def comparison(name, size, accuracy, latencies, **fields):
    one, all_cores = latencies
    return Comparison(
        name=name,
        path=f"/out/{name}.tflite",
        size_bytes=size,
        max_error=1.234e-5,
        mean_error=2e-6,
        agreement=0.9875,
        accuracy=accuracy,
        drop=100 * (0.8421 - accuracy),
        latency_ms_min=one,
        latency_ms_median=one + 1,
        latency_ms_min_all_cores=all_cores,
        latency_ms_median_all_cores=all_cores and all_cores + 2,
        **fields,
    )


@pytest.fixture
def verification():
    graph = {"operations": 172, "partitions": 3, "quantized_share": 0.984}
    rows = (
        Comparison("keras", accuracy=0.8421),
        comparison("saved_model", 23_000_000, 0.8421, (18.1, None)),
        comparison("fp32", 22_800_000, 0.8421, (24.9, 14.1)),
        comparison("fp16", 11_500_000, 0.8419, (25.2, 14.0)),
        comparison("dynamic_int8", 6_100_000, 0.8417, (11.2, 6.6), **graph),
        comparison("int4", 3_300_000, 0.8166, (11.9, 7.0), failures=("int4: is bad.",)),
    )
    exports = {"fp32": report("fp32"), "fp16": None}
    exports["int4"] = report("int4", sensitivity=SENSITIVITY, fallback=FALLBACK)
    return Verification(rows, 512, 6, "keras-vit export 'my run'", {"keras": "3"}, exports)


def printed(table, width):
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def markdown_rows(text):
    lines = [line.strip("| ").split(" | ") for line in text.split("\n\n")[0].split("\n")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_markdown_has_all_figures(verification):
    keras, saved_model, *_, int8, int4 = markdown_rows(verification.to_markdown())
    assert int8 == {
        "file": "dynamic_int8",
        "MB": "6.1",
        "max err": "1.2e-05",
        "mean err": "2.0e-06",
        "agree": "0.9875",
        "accuracy": "0.8417",
        "drop": "0.04",
        "pass": "ok",
        "ms x1": "11.2",
        "med x1": "12.2",
        "ms x6": "6.6",
        "med x6": "8.6",
        "ops": "172",
        "parts": "3",
        "int": "98%",
    }
    assert (int4["drop"], int4["pass"]) == ("2.55", "FAIL")
    assert [saved_model[key] for key in ("ms x1", "ms x6", "ops", "int")] == ["18.1", *"---"]
    assert [key for key, cell in keras.items() if cell != "-"] == ["file", "accuracy", "pass"]


def test_markdown_says_what_fell_back_and_what_is_sensitive(verification):
    text = verification.to_markdown(plot="report.png")
    assert "\n\nCommand: `keras-vit export 'my run'`\n\n- int4: is bad.\n- int4: left" in text
    assert text.endswith("\n![Accuracy, latency and size](report.png)\n")
    fell_back, worst = verification.notes
    assert fell_back == (
        "int4: left at a higher precision are block_0/qkv (float32), block_5/proj (dynamic_int8)."
    )
    expected = sorted(LAYERS, key=SENSITIVITY.get)[:10]
    assert worst.endswith(
        ": " + ", ".join(f"{layer} {SENSITIVITY[layer]:.1f} dB" for layer in expected) + "."
    )
    assert "block_0/qkv 20.0 dB" in worst
    assert dataclasses.replace(verification, exports={}).notes == ()


def test_markdown_has_the_notes_of_the_exports(verification):
    exports = {"fp32": report("fp32", note="no model of build_vit was found in it")}
    noted = dataclasses.replace(verification, exports=exports)
    assert noted.notes == ("fp32: no model of build_vit was found in it.",)
    assert "\n- fp32: no model of build_vit was found in it.\n" in noted.to_markdown()


def test_json_has_all_of_it(verification, tmp_path):
    verification.to_json(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    assert content == verification.as_dict()
    assert content["command"] == "keras-vit export 'my run'"
    assert (content["cores"], content["images"]) == (6, 512)
    assert content["failures"] == ["int4: is bad."]
    assert content["exports"]["int4"] == verification.exports["int4"].as_dict()
    assert content["exports"]["int4"]["fallback"] == FALLBACK
    assert content["exports"]["fp16"] is None
    moved = verification.relative_to("/out").as_dict()
    assert moved["exports"]["int4"]["path"] == moved["rows"][5]["path"] == "int4.tflite"


@pytest.mark.parametrize("width", [80, 100])
def test_tables_fit_the_terminal(verification, width):
    text = printed(verification.table(), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    words = text.split()
    for row in markdown_rows(verification.to_markdown()):
        assert words.count(row["file"]) == 2  # a table of quality and one of speed
        assert set(row.values()) <= set(words)
    assert "integers." in words


def test_long_names_and_brackets_are_printed_whole(verification):
    name = "/home/user/[bold]models/vit_tiny_patch16_224_int8_mixed"
    row = dataclasses.replace(verification.rows[4], name=name)
    text = printed(dataclasses.replace(verification, rows=(row,)).table(), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "0.8417" in text
    first_words = [line.split()[0] for line in text.splitlines() if line.strip()]
    assert name in "".join(first_words)


def test_outputs_are_not_overwritten(verification, tmp_path):
    writers = (verification.to_json, verification.to_markdown, verification.plot)
    for write, suffix in zip(writers, ("json", "md", "png"), strict=True):
        path = tmp_path / f"check.{suffix}"
        write(path)
        written = path.read_bytes()
        path.write_text("mine")
        with pytest.raises(ValueError, match=f"check.{suffix} exists already: pass overwrite"):
            write(path)
        assert path.read_text() == "mine"
        write(path, overwrite=True)
        assert path.read_bytes() == written
    assert len(list(tmp_path.iterdir())) == 3


# Pictures


def files_of(verification):
    return [
        (row.name, row.size_bytes, verification._latencies(row), row.accuracy)
        for row in verification.rows[1:]
    ]


@pytest.fixture
def axes():
    return matplotlib.figure.Figure(figsize=(7, 4.5), layout="constrained").subplots()


def test_plot_needs_latencies(verification, tmp_path):
    untimed = dataclasses.replace(verification, rows=verification.rows[:1])
    with pytest.raises(ValueError, match="A plot needs latencies: verify with rounds >= 1"):
        untimed.plot(tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())


def test_plot_of_an_unknown_format_leaves_nothing(verification, tmp_path):
    with pytest.raises(ValueError, match="xyz"):
        verification.plot(tmp_path / "plot.xyz")
    assert not list(tmp_path.iterdir())


def test_plot_has_a_panel_for_the_sensitivities(verification, tmp_path):
    verification.plot(tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    for words in ("top-1 accuracy", "6 threads", "int8, 6.1 MB", "int4: the worst 30 of 40 layers"):
        assert words in text
    plain = dataclasses.replace(verification, exports={})
    plain.plot(tmp_path / "plain.svg")
    assert "layers" not in (tmp_path / "plain.svg").read_text()


def test_plot_without_labels_shows_the_agreement(verification, tmp_path):
    rows = [dataclasses.replace(row, accuracy=None) for row in verification.rows]
    dataclasses.replace(verification, rows=tuple(rows)).plot(tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert "top-1 agreement" in text
    assert "top-1 accuracy" not in text


def test_dots_are_at_latency_and_accuracy(verification, axes):
    files = [*files_of(verification), ("unknown", 5_000_000, {1: 3.0}, None)]
    plots.draw_files(axes, files, "top-1 accuracy", reference=0.8421)
    dots = [d for d in axes.collections if len(d.get_offsets())]
    places = [tuple(d.get_offsets()[0]) for d in dots]
    # The SavedModel runs on all cores; the others have a dot for one thread and one for six.
    assert places[:3] == [(18.1, 0.8421), (24.9, 0.8421), (14.1, 0.8421)]
    assert len(places) == 1 + 4 * 2
    areas = [d.get_sizes()[0] for d in dots]
    assert areas[1] / areas[3] == pytest.approx(22.8 / 11.5)
    assert areas[0] == max(areas)
    shapes = [len(d.get_paths()[0].vertices) for d in dots]
    assert shapes[0] == shapes[2] != shapes[1]
    assert axes.lines[-1].get_ydata()[0] == 0.8421
    assert [text.get_text() for text in axes.texts] == [
        "saved_model, 23 MB",
        "fp32, 22.8 MB",
        "fp16, 11.5 MB",
        "dynamic_int8, 6.1 MB",
        "int4, 3.3 MB",
    ]


def test_labels_cover_nothing(verification, axes):
    plots.draw_files(axes, files_of(verification), "top-1 accuracy", reference=0.8421)
    boxes = functools.partial(map, Text.get_window_extent, axes.texts)
    plots.spread_labels(axes.figure)
    after = list(boxes())
    for index, box in enumerate(after):
        assert box.count_overlaps(after[index + 1 :]) == 0
        assert axes.bbox.x0 <= box.x0 < box.x1 <= axes.bbox.x1
        assert axes.bbox.y0 <= box.y0 < box.y1 <= axes.bbox.y1
        for dots in axes.collections:
            assert box.count_overlaps(plots._dot_boxes(dots)) == 0


def test_sensitivities_are_sorted_bars(axes):
    broken = {**SENSITIVITY, "block_1/fc2": float("inf")}
    plots.draw_sensitivity(axes, "int4", report("int4", sensitivity=broken, fallback=FALLBACK))
    del broken["block_1/fc2"]
    worst = sorted(broken, key=broken.get)[:30]
    assert [label.get_text() for label in axes.get_yticklabels()] == worst
    assert axes.yaxis_inverted()  # the worst is on top
    bars = {round(bar.get_y() + bar.get_height() / 2): bar for bar in axes.patches}
    assert [bars[i].get_width() for i in range(30)] == [broken[layer] for layer in worst]
    other = {worst[i] for i, bar in bars.items() if bar.get_facecolor() != bars[1].get_facecolor()}
    assert "block_0/qkv" not in worst[1:2]
    assert other == set(FALLBACK) & set(worst) != set()
