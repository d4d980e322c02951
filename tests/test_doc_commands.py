"""Every command that the documents print is one that the programs understand. Nothing is trained or opened."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from dllm_rl.cli import main as program
from dllm_rl.config import from_command_line
from recipes.llada_8b import TASKS
from recipes.sudoku_unique import LAYOUTS

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *(page for folder in ("docs", "recipes", "benchmarks") for page in ROOT.glob(f"{folder}/**/*.md")),
]


def commands(page):
    """The words of each indented command, without what stands before it: `VAR=1 python x.py --a 1` -> (python, ...)."""
    text = page.read_text().replace("\\\n", " ").replace("$((n / 2))", "64").replace("$n", "128")  # of a shell's loop
    for line in re.findall(r"^ {4,}(\S.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE):
        for part in line.split(" && "):
            try:
                words = shlex.split(part, comments=True)
            except ValueError:  # an apostrophe: what a program prints
                continue
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words.pop(0)
            if words:
                yield Path(words[0]).name, words[1:]


def all_commands(*names):
    return [(page, name, words) for page in PAGES for name, words in commands(page) if name in names]


def recipe_of(script):
    """The recipe that a script's last line trains; of RECIPE.py, which stands for any, one of 4x4 Sudoku."""
    module = "recipes/sudoku_unique.py" if script == "RECIPE.py" else script
    assert (ROOT / module).is_file(), script
    made = importlib.import_module(module.removesuffix(".py").replace("/", "."))
    return getattr(made, "recipe", None) or made.recipe_of()


def scripts():
    """(page, script, its options) of each command that runs a recipe."""
    for page, _, words in all_commands("python", "accelerate", "sbatch"):
        if "pytest" in words:
            continue
        place = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
        theirs = any(word.startswith(("mine:", "mine.")) for word in words)  # a module that a reader writes
        if place is not None and words[place] != "recipes/one_file.py" and not theirs:
            yield page, words[place], words[place + 1 :]


def chosen(script, options):
    """The recipe of a command, and its options without the one that the script itself reads."""
    name, values = {"recipes/sudoku_unique.py": ("--layout", LAYOUTS), "recipes/llada_8b.py": ("--task", TASKS)}.get(
        script, ("", {})
    )
    if name not in options:
        return recipe_of(script), options
    place = options.index(name)
    choice = options[place + 1]
    assert choice in values, (script, choice)
    made = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    return made.recipe_of(choice), options[:place] + options[place + 2 :]


@pytest.mark.slow
def test_options_of_recipes_are_fields_of_theirs():
    found = list(scripts())
    assert len(found) > 20
    for page, script, options in found:
        if not options:  # also of an example that trains nothing
            assert script == "RECIPE.py" or (ROOT / script).is_file(), script
            continue
        try:
            from_command_line(*chosen(script, options))
        except SystemExit:
            pytest.fail(f"{page.name}: {script} {' '.join(options)}")


@pytest.mark.slow
def test_published_methods_are_options():
    """The options of each method of docs/papers.md, on a recipe of 4x4 Sudoku without its warm-up."""
    told = (ROOT / "docs" / "papers.md").read_text()
    rows = re.findall(r"^    (--.+)$", told, re.MULTILINE)
    assert len(rows) == told.count("\n### ") > 10
    for options in rows:
        try:
            from_command_line(recipe_of("RECIPE.py"), ["--warmup.steps", "0", *shlex.split(options)])
        except SystemExit:
            pytest.fail(options)


def test_launch_files_are_there_and_their_options_accelerates():
    found = all_commands("accelerate")
    assert len(found) > 5
    for page, _, words in found:
        if words[0] == "launch":
            launched = launch_command_parser().parse_args(words[1:])
            assert launched.config_file is None or (ROOT / launched.config_file).is_file(), page
    for page, _, words in all_commands("sbatch"):
        assert any((ROOT / word).is_file() for word in words if word.endswith(".sh")), page


def test_modules_that_are_run_are_there():
    found = [words[1] for _, _, words in all_commands("python") if words[0] == "-m"]
    ours = {name for name in found if name.startswith(("recipes.", "benchmarks."))}
    assert len(ours) > 5 and all(importlib.util.find_spec(name) for name in ours)


def test_options_of_dllm_rl_are_known(monkeypatch):
    read = []
    modules = {"main": "doctor", "evaluate_run": "evaluate_command", "stop_run": "stop_command"}
    modules |= {"compare_runs": "compare_command"}
    modules |= {name: f"{name}_command" for name in ("sample", "serve", "grade", "check_trace", "status")}
    for module, name in [*modules.items(), ("main", "verify")]:
        monkeypatch.setattr(f"dllm_rl.cli.{module}.{name}", read.append)
    found = [(page, words) for page, _, words in all_commands("dllm-rl") if words[0] != "lm-eval"]
    for page, words in found:
        words = words[: words.index(">")] if ">" in words else words
        try:
            assert program.main(words) == 0
        except SystemExit:
            pytest.fail(f"{page.name}: dllm-rl {' '.join(words)}")
    assert len(read) == len(found) > 8
