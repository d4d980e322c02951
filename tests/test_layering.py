"""Imports go strictly downwards; costly libraries stay in their rooms."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import dllm_rl

PACKAGE = Path(dllm_rl.__file__).parent


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if not name.endswith("__init__"):
            found[name] = path
    return found


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {path}"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def edges() -> dict[str, set[str]]:
    """module -> the modules of the package that it imports."""
    known = modules()
    inside = {name: {other.removeprefix("dllm_rl.") for other in imported(path)} for name, path in known.items()}
    return {name: {other for other in others if other in known and other != name} for name, others in inside.items()}


def test_imports_go_downwards():
    TopologicalSorter(edges()).prepare()  # raises CycleError


@pytest.mark.parametrize("module", sorted(modules()))
def test_libraries_stay_in_their_rooms(module):
    tops = {name.split(".")[0] for name in imported(modules()[module])}
    if not module.startswith("quantization"):
        assert "torchao" not in tops
    if module not in ("training", "learner", "launch", "evaluation.evaluate", "evaluation.completions", "distributed"):
        assert "accelerate" not in tops
    if module.startswith("tasks."):
        assert "torch" not in tops


def test_importing_the_package_costs_nothing():
    program = (
        "import sys, dllm_rl; print([n for n in ('torch', 'torchao', 'datasets', 'matplotlib') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n" and done.stderr == ""


def test_tasks_import_no_torch():
    program = "import sys, dllm_rl.tasks.sudoku; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_every_public_name_resolves():
    for name in dllm_rl.__all__:
        assert callable(getattr(dllm_rl, name))


def test_start_up_chatter_of_libraries_is_dropped():
    program = "import dllm_rl, torchao, transformers; from transformers import LlamaForCausalLM"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "Failed to load" not in done.stderr and "Enum subclass" not in done.stderr


def test_no_file_is_longer_than_400_lines():
    long = {name: n for name, path in modules().items() if (n := len(path.read_text().splitlines())) > 400}
    assert not long
