"""The packages from the ground up, and who may import whom. docs/ARCHITECTURE.md says what each is for."""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import dllm_rl

PACKAGE = Path(dllm_rl.__file__).parent
# Public name -> package, from the lines `from .package.module import Name as Name` of the stub.
HOME = {
    alias.name: (each.module or "").split(".")[0]
    for each in ast.walk(ast.parse((PACKAGE / "__init__.pyi").read_text()))
    if isinstance(each, ast.ImportFrom)
    for alias in each.names
}

# Each may import what stands in its row and, of course, itself; nothing else of dllm_rl.
MAY_IMPORT = {
    # floor 1
    "device": "",
    "files": "",
    "manifest": "",
    "rng": "",
    "screen": "",
    "records": "",
    "versions": "",
    "types": "",
    "identity": "",
    # floor 2
    "tasks": "identity",
    "algorithms": "records types",
    "callbacks": "records",
    "groups": "records",
    "distributed": "device files screen versions",
    "models": "files identity manifest rng screen records types",
    # floor 3
    "decoding": "types tasks models",
    "settings": "records algorithms callbacks models groups",
    "quantization": "records rng models",
    # floor 4
    "likelihoods": "device rng records types models decoding",
    "samplers": "device rng records types models decoding",
    "monitoring": "device files screen settings",
    "checkpoints": "files identity manifest records versions distributed models settings",
    # floor 5
    "diagnostics": "files screen records types models quantization likelihoods samplers",
    "evaluation": "device files identity rng screen records types tasks distributed models decoding quantization "
    "samplers monitoring checkpoints",
    "step": "device rng records types tasks algorithms distributed models decoding settings quantization likelihoods "
    "samplers monitoring groups",
    "supervised": "records types tasks algorithms distributed models decoding settings likelihoods groups",
    # floor 6
    "recipe": "records tasks algorithms models settings quantization likelihoods samplers step groups",
    # floor 7
    "presets": "screen records algorithms models likelihoods samplers recipe groups",
    "training": "device files identity manifest rng screen records versions types tasks algorithms callbacks "
    "distributed models decoding quantization likelihoods samplers monitoring checkpoints recipe "
    "diagnostics evaluation step supervised groups",
    # floor 8
    "config": "screen records recipe presets ",
    "frontend": "screen records tasks algorithms callbacks distributed models quantization likelihoods samplers recipe "
    "presets training groups",
    # floor 9
    "testing": "records types tasks algorithms models decoding quantization likelihoods samplers diagnostics step",
    "integrations": "device files identity rng screen records types tasks algorithms callbacks distributed models "
    "decoding quantization likelihoods samplers monitoring diagnostics evaluation step recipe training frontend",
    # floor 10
    "doctor": "device files rng screen versions types tasks algorithms distributed models decoding quantization "
    "likelihoods samplers monitoring checkpoints diagnostics step recipe presets training frontend "
    "testing",
    # floor 11
    "cli": "device files manifest screen records versions types tasks callbacks distributed models decoding "
    "quantization likelihoods samplers monitoring checkpoints diagnostics evaluation step supervised "
    "recipe training config integrations doctor",
}
# Costly libraries, and the only packages that may import them.
ROOMS = {
    "torchao": {"quantization"},
    "ray": {"integrations"},
    "trl": {"integrations"},
    "fastapi": {"integrations"},
    "pydantic": {"integrations"},
    "uvicorn": {"integrations"},
    "accelerate": {"distributed", "integrations", "monitoring", "step", "training"},
}
NO_TORCH = {"tasks", "identity", "files", "manifest", "screen", "records", "config", "versions"}


def statements(body):
    """All statements of a module, also those inside others: without expressions, which are ten times as many nodes."""
    for node in body:
        yield node
        for inner in ("body", "orelse", "finalbody", "handlers", "cases"):
            yield from statements(getattr(node, inner, ()))


@cache
def imported(source: str, where: str) -> set[str]:
    """Dotted names that a module imports: at its top, inside a function, or as a text given to `import_module`."""
    names: set[str] = set()
    tree = ast.parse(source)
    for node in ast.walk(tree) if "import_module" in source else statements(tree.body):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            names |= {
                each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)
            }
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {where}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def package_of(module: str) -> str:
    """`dllm_rl.samplers.rules.max_prob` -> `samplers`; a name of the public face stands for its home."""
    name = module.split(".")[1]
    return HOME.get(name, name)


def violations(sources: dict[str, str]) -> list[str]:
    """What the modules, given by path in the package, break of the rules above."""
    found = []
    for path, source in sources.items():
        package = path.split("/")[0].removesuffix(".py")
        if package == "__init__":
            continue
        names = imported(source, path)
        for other in {package_of(name) for name in names if name.startswith("dllm_rl.")}:
            if other != package and other not in MAY_IMPORT[package].split():
                found.append(f"{path} imports {other}")
        tops = {name.split(".")[0] for name in names}
        found += [f"{path} imports {lib}" for lib, rooms in ROOMS.items() if lib in tops and package not in rooms]
        if package in NO_TORCH and "torch" in tops:
            found.append(f"{path} imports torch")
    return found


@cache
def sources() -> dict[str, str]:
    return {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in PACKAGE.rglob("*.py")}


def floors() -> dict[str, int]:
    """Each package stands on the floor above all that it may import. Raises RecursionError on a circle."""

    def floor(package: str) -> int:
        return 1 + max(map(floor, MAY_IMPORT[package].split()), default=0)

    return {package: floor(package) for package in MAY_IMPORT}


def test_the_table_lists_every_package_and_stands_on_eleven_floors():
    entries = {
        path.stem
        for path in PACKAGE.iterdir()
        if path.name not in ("__pycache__", "__init__.py", "__init__.pyi", "py.typed")
    }
    assert entries == set(MAY_IMPORT), "a new package or module needs a row in MAY_IMPORT and in docs/ARCHITECTURE.md"
    assert max(floors().values()) <= 11
    assert len(entries) <= 35, "put it into a package that is there, or raise this number"


def test_each_package_is_in_a_row_above_all_that_it_imports():
    table = (PACKAGE.parent / "docs" / "ARCHITECTURE.md").read_text().partition("## Packages")[2].partition("##")[0]
    lines = (line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    rows = [re.findall(r"`(\w+)(?:\.py)?`", line) for line in lines]
    row = {package: number for number, packages in enumerate(rows) for package in packages}
    assert sum(map(len, rows)) == len(row) and row.keys() == MAY_IMPORT.keys()
    assert not [(a, b) for a, below in MAY_IMPORT.items() for b in below.split() if row[b] < row[a]]


def test_every_module_keeps_to_the_table():
    assert violations(sources()) == []


def test_a_step_knows_no_recipe_no_files_and_no_signals():
    assert not {"recipe", "files", "manifest", "checkpoints", "training", "callbacks"} & set(MAY_IMPORT["step"].split())
    modules = {name for path, text in sources().items() if path.startswith("step/") for name in imported(text, path)}
    assert not {name for name in modules if name.startswith(("signal", "dllm_rl.distributed.stop"))}


def file_imports() -> dict[str, set[str]]:
    """The files of the package that each file imports in any way: at its top, in a function, or for types alone."""
    modules = {
        path.removesuffix(".py").replace("/", "."): path for path in sources() if not path.endswith("__init__.py")
    }
    found = {}
    for path, source in sources().items():
        names = {name.removeprefix("dllm_rl.") for name in imported(source, path) if name.startswith("dllm_rl.")}
        targets = {modules.get(name) or modules.get(name.rpartition(".")[0]) for name in names}
        found[path] = {target for target in targets if target is not None} - {path}
    return found


def test_only_the_commands_import_the_integrations():
    assert [package for package, row in MAY_IMPORT.items() if "integrations" in row.split()] == ["cli"]


def test_the_sandbox_and_the_command_line_have_one_room_each():
    """A core that starts no programs and reads no command line serves as a library."""
    importers = {path for path, files in file_imports().items() if "tasks/code/sandbox.py" in files}
    assert importers == {"tasks/code/task.py"}
    readers = {path for path, source in sources().items() if "sys.argv" in source and not path.startswith("cli/")}
    assert readers == {"config.py", "tasks/code/sandbox.py", "tasks/math/math_verify_worker.py"}  # two programs


def test_no_circle_of_files():
    TopologicalSorter(file_imports()).prepare()  # raises CycleError, which names the files


def test_every_permission_is_used():
    """The table is a picture of what is, not of what might be."""
    used = {package: set() for package in MAY_IMPORT}
    for path, source in sources().items():
        package = path.split("/")[0].removesuffix(".py")
        if package in used:
            used[package] |= {package_of(n) for n in imported(source, path) if n.startswith("dllm_rl.")} - {package}
    assert {p: set(row.split()) - used[p] for p, row in MAY_IMPORT.items() if set(row.split()) - used[p]} == {}


@pytest.mark.parametrize(
    ("path", "line", "said"),
    [
        ("samplers/rules.py", "from dllm_rl.training.trainer import train", "samplers/rules.py imports training"),
        ("samplers/rules.py", "from dllm_rl import train", "samplers/rules.py imports training"),
        ("models/base.py", "def f():\n    import dllm_rl.samplers.rules", "models/base.py imports samplers"),
        ("algorithms/losses.py", "from dllm_rl.models.base import Policy", "algorithms/losses.py imports models"),
        (
            "records.py",
            "import importlib\nimportlib.import_module('dllm_rl.integrations.serving')",
            "records.py imports integrations",
        ),
        ("tasks/base.py", "import torch", "tasks/base.py imports torch"),
        ("tasks/sudoku/task.py", "from torch import nn", "tasks/sudoku/task.py imports torch"),
        ("samplers/unmask.py", "from torchao.quantization import PerRow", "samplers/unmask.py imports torchao"),
        ("evaluation/evaluate.py", "import accelerate.utils", "evaluation/evaluate.py imports accelerate"),
    ],
)
def test_each_kind_of_violation_is_seen(path, line, said):
    assert violations({path: f"{sources()[path]}\n{line}\n"}) == [said]


def test_a_circle_in_the_table_is_seen(monkeypatch):
    monkeypatch.setitem(MAY_IMPORT, "types", "training")
    with pytest.raises(RecursionError):
        floors()


@pytest.mark.slow
def test_a_class_is_found_by_its_name_among_few_modules():
    program = """
import sys
from dllm_rl.algorithms.correctors import Corrector
from dllm_rl.records import from_json
print(from_json(Corrector, "TIS", "corrector"), sum(name.startswith("dllm_rl") for name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("TIS(cap=2.0") and int(done.stdout.split()[-1]) < 15


def test_importing_the_package_costs_nothing():
    program = (
        "import sys, dllm_rl; print([n for n in ('torch', 'torchao', 'datasets', 'matplotlib') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n" and done.stderr == ""


def test_tasks_import_no_torch():
    program = "import sys, dllm_rl.tasks.protocols; print([n for n in ('torch', 'datasets') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.slow
def test_correctors_and_metrics_need_torch_alone():
    """Somebody with another trainer takes them without this library's other dependencies."""
    program = """
import sys
sys.modules |= dict.fromkeys(("transformers", "accelerate", "torchao", "peft", "datasets"))
import pkgutil, dllm_rl.algorithms
for module in pkgutil.iter_modules(dllm_rl.algorithms.__path__, "dllm_rl.algorithms."):
    __import__(module.name)
from recipes.examples.correctors_elsewhere import main
reward, metrics = main()
assert reward > 0.5 and 0 < metrics["rollout_corr/ess"] <= 1, (reward, metrics)
"""
    subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent, check=True)


@pytest.mark.slow
def test_the_help_of_a_recipe_imports_no_library_of_training():
    program = """
import atexit, runpy, sys
names = ("torchao", "transformers", "accelerate", "torch.distributed.fsdp", "torch._dynamo", "dllm_rl.training.trainer")
atexit.register(lambda: print([name for name in names if name in sys.modules]))
sys.argv = ["recipes/sudoku_tiny.py", "--help"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert "--learning_rate" in done.stdout and done.stdout.endswith("\n[]\n")


def test_every_public_name_resolves():
    for name in dllm_rl.__all__:
        assert callable(getattr(dllm_rl, name))


ROOT = PACKAGE.parent
PAGES = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("docs/*.ipynb"), *ROOT.glob("recipes/**/*.md")]
NAMED = re.compile(r"\bdllm_rl(?:\.(?!NAME)[A-Za-z_]\w*)+")  # help(dllm_rl.NAME) is of any name
IMPORT = re.compile(r"^[+\s\"]*(from dllm_rl[\w.]* import (?:\([^)]*\)|[^\n\\;(]+))", re.MULTILINE)


def test_scripts_and_pages_import_names_that_exist():
    scripts = [
        (path, path.read_text()) for folder in ("recipes", "benchmarks") for path in ROOT.glob(f"{folder}/**/*.py")
    ]
    shown = [(path, "\n".join(IMPORT.findall(path.read_text()))) for path in PAGES]
    imports = [
        (path, each.module, alias.name)
        for path, text in scripts + shown
        for each in statements(ast.parse(text).body)
        if isinstance(each, ast.ImportFrom) and (each.module or "").startswith("dllm_rl")
        for alias in each.names
    ]
    assert len(imports) > 100 and sum(path in PAGES for path, *_ in imports) > 30
    missing = []
    for path, module, name in imports:
        if not hasattr(importlib.import_module(module), name):
            try:
                importlib.import_module(f"{module}.{name}")
            except ModuleNotFoundError:
                missing.append(f"{path.relative_to(ROOT)}: {module}.{name}")
    assert not missing


def test_pages_name_what_exists():
    found = {name: path.name for path in PAGES for name in NAMED.findall(path.read_text())}
    assert len(found) > 50
    missing = []
    for name, page in found.items():
        try:
            pkgutil.resolve_name(name)
        except (AttributeError, ImportError):
            missing.append(f"{page}: {name}")
    assert not missing


@pytest.mark.slow
def test_start_up_chatter_of_libraries_is_dropped():
    program = "import dllm_rl, torchao, transformers; from transformers import LlamaForCausalLM"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "Failed to load" not in done.stderr and "Enum subclass" not in done.stderr
