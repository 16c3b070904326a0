"""Exports on a full disk, and many in a row: nothing is lost, and the memory comes back."""

import contextlib
import gc
import pathlib
import re
import resource
import shutil

import flatbuffers
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

import keras_vit
from keras_vit.export import convert, export_saved_model, export_tflite
from keras_vit.export import tflite as tflite_module

CONFIG = keras_vit.ViTConfig(hidden_dim=40, depth=2, num_heads=5, mlp_dim=72, patch_size=8)


@pytest.fixture(scope="module")
def model():
    return keras_vit.build_vit(
        CONFIG, image_size=(16, 24), num_classes=3, normalization="minus_one_one"
    )


@contextlib.contextmanager
def files_of_at_most(size):
    """Larger files cannot be written, by this process and those it starts: as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_disk_is_full_before_the_conversion(model, tmp_path):
    path = tmp_path / "model.tflite"
    path.write_bytes(b"old")
    with (
        files_of_at_most(20_000),
        pytest.raises(OSError, match=r"SavedModel cannot be written.*File too large"),
    ):
        export_tflite(model, path, mode="fp32", overwrite=True)
    assert contents(tmp_path) == {pathlib.Path("model.tflite"): b"old"}


@pytest.mark.usefixtures("own_process")
def test_disk_is_full_when_the_file_is_written(model, tmp_path, monkeypatch):
    path = tmp_path / "model.tflite"
    path.write_bytes(b"old")
    run_converter = tflite_module._run_converter

    def run_with_little_space(*arguments):
        with files_of_at_most(50_000):
            run_converter(*arguments)

    monkeypatch.setattr(tflite_module, "_run_converter", run_with_little_space)
    with pytest.raises(OSError, match=r"File too large: '.*model.*tflite'"):
        export_tflite(model, path, mode="fp32", overwrite=True)
    assert contents(tmp_path) == {pathlib.Path("model.tflite"): b"old"}


def test_disk_is_full_under_a_saved_model(model, tmp_path):
    path = tmp_path / "model"
    export_saved_model(model, path)
    before = contents(tmp_path)
    with (
        files_of_at_most(20_000),
        pytest.raises(OSError, match=r"SavedModel cannot be written.*File too large"),
    ):
        export_saved_model(model, path, overwrite=True)
    assert contents(tmp_path) == before


def test_model_that_no_file_holds(model, tmp_path, monkeypatch):
    count = model.count_params()
    monkeypatch.setattr(tflite_module, "_LARGEST", 4 * count)
    with pytest.raises(ValueError, match=rf"less than {count:,} weights, 2 GiB in.*with {count:,}"):
        export_tflite(model, tmp_path / "model.tflite", mode="fp32")
    assert not list(tmp_path.iterdir())


def test_what_litert_does_not_load_is_not_written(model, tmp_path, monkeypatch):
    path = tmp_path / "model.tflite"
    export_tflite(model, path, mode="fp32")
    before = contents(tmp_path)
    file = schema.ModelT.InitFromPackedBuf(path.read_bytes())
    dense = schema.BuiltinOperator.FULLY_CONNECTED
    codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in file.operatorCodes]
    graph = file.subgraphs[0]
    layer = next(op for op in graph.operators if codes[op.opcodeIndex] == dense)
    graph.tensors[layer.inputs[1]].type = schema.TensorType.BOOL
    builder = flatbuffers.Builder()
    builder.Finish(file.Pack(builder), b"TFL3")
    monkeypatch.setattr(convert, "convert", lambda *_: bytes(builder.Output()))
    with pytest.raises(RuntimeError, match=r"FULLY_CONNECTED.*failed to prepare"):
        export_tflite(model, path, mode="fp32", overwrite=True)
    assert contents(tmp_path) == before


def resident_megabytes():
    gc.collect()
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1e3


@pytest.mark.skipif(
    not pathlib.Path("/proc/self/status").exists(), reason="/proc tells the memory of a process"
)
@pytest.mark.usefixtures("own_process")
def test_ten_exports_give_their_memory_back(tmp_path, monkeypatch):
    """Of a model of 18 MB, of which one copy left behind by each would be 180."""
    config = keras_vit.ViTConfig(hidden_dim=256, depth=1, num_heads=4, mlp_dim=8192, patch_size=8)
    model = keras_vit.build_vit(config, image_size=16, num_classes=3)
    path = tmp_path / "model.tflite"
    export_tflite(model, path, mode="fp32")
    shutil.copy(path, tmp_path / "converted")

    def converted(folder, output, mode):
        """What the other process does, whose memory is its own."""
        shutil.copy(tmp_path / "converted", output)
        (folder / "report.json").write_text("{}")

    monkeypatch.setattr(tflite_module, "_run_converter", converted)
    before = [resident_megabytes()]  # the allocator gives some back at times, and takes it again
    for _ in range(2):
        export_tflite(model, path, mode="fp32", overwrite=True)
        before.append(resident_megabytes())
    for _ in range(10):
        export_tflite(model, path, mode="fp32", overwrite=True)
    assert resident_megabytes() - max(before) < 100


@pytest.mark.slow
@pytest.mark.usefixtures("own_process")
def test_ten_whole_exports_give_their_memory_back(tmp_path):
    model = keras_vit.build_vit("Ti/16", image_size=96)
    path = tmp_path / "model.tflite"
    images = np.random.default_rng(0).normal(size=(4, 96, 96, 3))
    before = []
    for _ in range(2):
        export_tflite(model, path, mode="int8_mixed", calibration=images, overwrite=True)
        before.append(resident_megabytes())
    for _ in range(10):
        export_tflite(model, path, mode="int8_mixed", calibration=images, overwrite=True)
    assert resident_megabytes() - max(before) < 100
