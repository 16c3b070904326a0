"""Executes the notebooks and stores them with their outputs: `make notebooks`.

Usage: python notebooks/execute.py [NOTEBOOK ...]    (default: all in this folder)
"""

import hashlib
import os
import pathlib
import re
import sys
import tempfile
import time

import nbclient
import nbformat

NOTEBOOKS = sorted(pathlib.Path(__file__).parent.glob("*.ipynb"))
CELL_SECONDS = 1200  # a busy machine is slow
# What TensorFlow, LiteRT and MediaPipe write of the machine when they start.
NATIVE_LOG = re.compile(
    r"[IWE]\d{4} \d\d|WARNING: All log messages before absl|INFO: Created Tensor"
)


def execute(path):
    """Runs a notebook in an empty folder.

    Args:
        path: The notebook.

    Returns:
        The notebook with its outputs, and nothing that differs from one execution to the next
        but what its cells print themselves: no times, no versions, no logs of native libraries.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        nbclient.NotebookClient(
            notebook,
            timeout=CELL_SECONDS,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        ).execute()
    for cell in code_cells(notebook):
        cell.metadata.clear()
        cell.outputs = [output for output in cell.outputs if not _is_empty(_without_log(output))]
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            "executed": code_hash(notebook),
        }
    )
    return notebook


def code_cells(notebook):
    """The cells of code of a notebook."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def code_hash(notebook):
    """What tells whether the stored outputs are of this code."""
    code = "\n".join(cell.source for cell in code_cells(notebook))
    return hashlib.sha256(code.encode()).hexdigest()


def _without_log(output):
    if output.output_type == "stream" and output.name == "stderr":
        lines = output.text.splitlines(keepends=True)
        output.text = "".join(line for line in lines if not NATIVE_LOG.match(line))
    return output


def _is_empty(output):
    return output.output_type == "stream" and not output.text.strip()


def main(paths):
    """Executes notebooks and writes each in its place."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    for path in paths:
        start = time.perf_counter()
        nbformat.write(execute(path), path)
        seconds = time.perf_counter() - start
        print(f"{path}: {seconds:.0f} s, {path.stat().st_size / 1e3:.0f} KB", flush=True)


if __name__ == "__main__":
    main([pathlib.Path(name) for name in sys.argv[1:]] or NOTEBOOKS)
