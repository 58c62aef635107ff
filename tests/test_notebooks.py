"""The notebooks read well as they are stored, and run from top to bottom."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))
# The others take longer; `make notebooks` runs all.
RUN = NOTEBOOKS[:3]
LONGEST_CELL = 40


def code_cells(name: str) -> list[dict]:
    cells = json.loads((FOLDER / name).read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_all_five_are_here():
    assert [name[:2] for name in NOTEBOOKS] == ["01", "02", "03", "04", "05"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_are_stored_and_cells_fit_a_screen(name):
    cells = code_cells(name)
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for output in outputs:
        assert output["output_type"] != "error" and output.get("name") != "stderr", output
    assert max(len(cell["source"]) for cell in cells) <= LONGEST_CELL


@pytest.mark.parametrize("name", RUN)
def test_runs_from_top_to_bottom(name, tmp_path):
    script = tmp_path / "cells.py"
    script.write_text("\n".join("".join(cell["source"]) + "\n" for cell in code_cells(name)))
    paths = (str(FOLDER.parent), str(FOLDER), os.environ.get("PYTHONPATH", ""))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "MPLBACKEND": "agg",
        "JAX_PLATFORMS": "cpu",
    }
    run = subprocess.run(
        [sys.executable, str(script)], cwd=FOLDER, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
