"""The grain of the package: short functions, one assignment a line, a test file for each module."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "dllm_rl").rglob("*.py"))
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in FILES}
BRANCHES = (ast.If, ast.For, ast.While, ast.IfExp, ast.BoolOp, ast.comprehension, ast.Try, ast.With, ast.ExceptHandler)
LINES = sum(len(path.read_text().splitlines()) for path in FILES)


def functions(tree):
    """Name, code lines without the docstring, and branches of each function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node, clean=False) or ""
            lines = node.end_lineno - node.lineno + 1 - len(docstring.splitlines())
            yield node.name, lines, sum(isinstance(part, BRANCHES) for part in ast.walk(node))


def parallel_assignments(tree):
    """`a, b = x, y`: two statements on one line."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Tuple)
            and isinstance(node.value, ast.Tuple)
        ):
            yield node


def test_no_function_has_more_than_60_lines_or_12_branches():
    found = []
    for path, tree in TREES.items():
        found += [f"{path}: {name}" for name, lines, branches in functions(tree) if lines > 60 or branches > 12]
    assert found == []


def test_at_most_3_parallel_assignments_in_1000_lines():
    count = sum(len(list(parallel_assignments(tree))) for tree in TREES.values())
    assert count <= 3 * LINES / 1000


def test_no_module_of_more_than_400_lines():
    assert [path.name for path in FILES if len(path.read_text().splitlines()) > 400] == []


def test_each_module_has_a_test_file():
    named = {path.stem.removeprefix("test_") for path in (ROOT / "tests").rglob("test_*.py")}
    modules = [path for path in FILES if path.name not in ("__init__.py", "__main__.py")]
    assert [path.relative_to(ROOT).as_posix() for path in modules if path.stem not in named] == []


def test_no_support_module_has_the_name_of_a_folder_that_runs_leave():
    """Ruff sorts `from runs import ...` among the package's own imports where a folder `runs` lies beside it."""
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    folders = {line.removesuffix("/") for line in ignored if line.endswith("/")}
    assert "runs" in folders
    assert not folders & {path.stem for path in (ROOT / "tests" / "support").glob("*.py")}


def test_the_measures_see_what_they_measure():
    source = 'def f(x):\n    """One\n    two"""\n    a, b = x, 1\n    return a if b and a else [i for i in x]\n'
    tree = ast.parse(source)
    assert list(functions(tree)) == [("f", 3, 3)]
    assert len(list(parallel_assignments(tree))) == 1
