"""The notebooks run as they stand, and what is stored in them is what they give."""

import getpass
import importlib.util
import json
import os
import pathlib
import re

import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PRETRAINED = pathlib.Path(
    os.environ.get("KERAS_VIT_PRETRAINED")
    or pathlib.Path(__file__).parents[2] / "shared" / "pretrained"
)
LONG = ("01_quickstart", "02_finetune", "03_to_the_phone")  # minutes each
LARGEST = 400_000  # bytes
ABSOLUTE_PATH = re.compile(r"(?<![\w<>./:)-])(/[\w.-]+){2,}|\b[A-Z]:\\")

_spec = importlib.util.spec_from_file_location("execute", ROOT / "notebooks" / "execute.py")
execute = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(execute)


def stored(path):
    return nbformat.read(path, as_version=4)


def shown(cell):
    """What a cell shows, its numbers aside: they differ from one processor to the next.

    So do the warnings of libraries, which the stored notebooks are without.
    """
    outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    kinds = [sorted(output.get("data", {})) for output in outputs]
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    return kinds, " ".join(re.sub(r"[-+]?\d[\d.,]*(e[-+]?\d+)?", "#", text).split())


def check_values(name, cells):
    """What the texts of the notebooks say of their numbers; 04 asserts it itself."""
    text = "".join(o.text for cell in cells for o in cell.outputs if o.output_type == "stream")

    def number(pattern):
        [found] = re.findall(pattern, text, re.MULTILINE)
        return float(found)

    if name == "01_quickstart":
        assert number(r"^test accuracy ([\d.]+):") > 0.95
    if name == "02_finetune":
        frozen = number(r"^frozen, logistic, 56 px +([\d.]+)$")
        tuned = number(r"^fine-tuned, 56 px .* ([\d.]+)$")
        scratch = number(r"^from scratch, 56 px .* ([\d.]+)$")
        assert tuned > frozen > scratch
        assert number(r"^ 56 px: test accuracy ([\d.]+)$") > number(r"^ 98 px: .* ([\d.]+)$")
    if name == "03_to_the_phone":
        assert number(r"^calibrated with digits .* agreement ([\d.]+)") > 0.95
        assert number(r"^calibrated with black .* agreement ([\d.]+)") < 0.9


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


def test_all_four_are_there():
    assert [path.stem for path in NOTEBOOKS] == [
        "01_quickstart",
        "02_finetune",
        "03_to_the_phone",
        "04_inside_a_vit",
    ]


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in LONG else [])
        for path in NOTEBOOKS
    ],
)
def test_notebook_runs(path, monkeypatch):
    """And prints what is stored, its numbers aside."""
    if "KERAS_VIT_PRETRAINED" in path.read_text():
        if not PRETRAINED.is_dir():
            pytest.skip("no pretrained DINOv2: set KERAS_VIT_PRETRAINED to its folder")
        monkeypatch.setenv("KERAS_VIT_PRETRAINED", str(PRETRAINED))
    executed = execute.code_cells(execute.execute(path))
    for cell, expected in zip(executed, execute.code_cells(stored(path)), strict=True):
        assert shown(cell) == shown(expected), cell.source
    check_values(path.stem, executed)


def test_outputs_are_of_this_code(path):
    notebook = stored(path)
    assert notebook.metadata.executed == execute.code_hash(notebook), "run `make notebooks`"
    cells = execute.code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))


def test_stored_values(path):
    check_values(path.stem, execute.code_cells(stored(path)))


def test_outputs_are_clean(path):
    cells = execute.code_cells(stored(path))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any(output.output_type == "stream" for output in outputs)
    assert any({"image/png", "image/jpeg"} & set(output.get("data", {})) for output in outputs)
    for output in outputs:
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text


def test_notebook_is_small(path):
    assert path.stat().st_size < LARGEST


def test_nothing_of_the_machine_is_stored(path):
    text = json.dumps(stored(path), indent=1)
    pictures = r'"image/(png|jpeg)": ".*"'
    text = re.sub(pictures, "", text).replace("\\n", "\n")
    assert not ABSOLUTE_PATH.search(text), ABSOLUTE_PATH.search(text)
    user = re.escape(getpass.getuser())
    assert not re.search(rf"/{user}\b|\b{user}@", text)


def test_metadata_do_not_change_by_themselves(path):
    notebook = stored(path)
    assert set(notebook.metadata) == {"kernelspec", "language_info", "executed"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.language_info == {"name": "python"}
    assert not any(cell.metadata for cell in notebook.cells)
