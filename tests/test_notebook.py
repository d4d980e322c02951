"""docs/quickstart.ipynb: its cells run in a fresh process, in the order in which they stand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "quickstart.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_it_is_stored_with_what_its_cells_gave():
    kinds = [output["output_type"] for cell in CELLS if cell["cell_type"] == "code" for output in cell["outputs"]]
    assert set(kinds) == {"stream", "display_data"}, "no error, and a picture"
    stored = NOTEBOOK.read_text(encoding="utf-8")
    assert "held-out reward: 0.0 -> 1.0" in stored and "site-packages" not in stored


@pytest.mark.slow
def test_its_cells_run(tmp_path):
    cells = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
    program = "import json, sys\nfor source in json.load(sys.stdin): exec(compile(source, 'cell', 'exec'), globals())"
    root = str(NOTEBOOK.parents[1])
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(cells),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": root, "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = next(line for line in done.stdout.splitlines() if line.startswith("held-out reward:"))
    before, after = map(float, said.partition(":")[2].split("->"))
    assert before < 0.5 < after, said
    assert "committed at step: [[" in done.stdout and "reward   " in done.stdout
    assert (tmp_path / "runs/quickstart/training.png").is_file()
