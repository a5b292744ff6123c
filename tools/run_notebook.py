#!/usr/bin/env python3
"""Executes a notebook and writes it with its outputs: `python tools/run_notebook.py IN.ipynb [OUT.ipynb]`.

What libraries write to stderr is left out, and so are the times of cells: both differ from run to run and name this
machine. What a cell prints is one output. Needs the extra `examples`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

CELL_SECONDS = 600


def main(source: Path, target: Path) -> None:
    notebook = nbformat.read(source, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=CELL_SECONDS, record_timing=False, resources=resources).execute()
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        printed = "".join(one.text for one in cell.outputs if one.get("name") == "stdout")
        others = [one for one in cell.outputs if one.output_type != "stream"]
        cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=printed)] * bool(printed) + others
    del notebook.metadata["language_info"]  # names this machine's Python
    nbformat.write(notebook, target)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python tools/run_notebook.py IN.ipynb [OUT.ipynb]")
    main(Path(sys.argv[1]), Path(sys.argv[-1]))
