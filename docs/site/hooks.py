"""What mkdocs needs besides docs/: pages of the repository that docs link to, and the reference of the public names."""

import ast
import json
import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"(\[[^][]*)?\]\(([^)#\s]+)(#[^)\s]*)?\)")  # text, target, anchor
STUB = re.compile(r"^from \.(\S+) import (\w+)", re.MULTILINE)
# Names that guides and examples import from elsewhere than dllm_rl, by module.
ELSEWHERE = {
    "algorithms.prompt_sources": ("MixedRewardPrompts", "PromptSource"),
    "callbacks": ("StopBelow",),
    "integrations.oracle": ("Oracle",),
    "models.base": ("FamilySpec",),
    "models.checkpoint.families": ("register_family",),
    "models.rollout_engine": ("RolloutEngine",),
    "models.tiny": ("tiny_llama",),
    "samplers.revise": ("Edit", "Remask", "SoftEdit"),
    "tasks": ("GSM8K", "MATH500", "Code", "Countdown", "Problem", "Reward", "Sudoku", "Task", "task_from_dataset"),
    "testing": ("check_corrector", "check_engine", "check_estimator", "check_order", "check_policy", "tiny_checkpoint"),
}
# Pages of the reference: the packages whose public names each one has.
REFERENCE = {
    "Training": ("frontend", "recipe", "training", "supervised", "callbacks", "cli", "step"),
    "Tasks": ("tasks", "integrations"),
    "Models": ("models",),
    "Samplers": ("samplers",),
    "Quantization": ("quantization",),
    "Likelihoods": ("likelihoods",),
    "Algorithms": ("algorithms",),
    "Evaluation": ("evaluation", "testing"),
    "Records": ("records", "types"),
}


NOTEBOOK = DOCS / "quickstart.ipynb"
# README is the first page of the site, the list of all pages another one, and the notebook a page.
MOVED = {ROOT / "README.md": "index.md", DOCS / "index.md": "pages.md", NOTEBOOK: "quickstart.md"}


def place(path: Path) -> str:
    """Where a file of the repository lies in the site: docs/ is its top, the rest a folder of it."""
    if path in MOVED:
        return MOVED[path]
    return (path.relative_to(DOCS) if path.is_relative_to(DOCS) else "repository" / path.relative_to(ROOT)).as_posix()


def targets(page: Path) -> list[Path]:
    """The files of the repository that a page links to."""
    found = [match[2] for match in LINK.finditer(page.read_text(encoding="utf-8")) if "://" not in match[2]]
    return [path for path in (Path(os.path.normpath(page.parent / target)) for target in found) if path.is_file()]


def linked(pages: list[Path]) -> list[Path]:
    """The files outside of docs/ that these pages link to, and those that the pages among them link to."""
    found: dict[Path, None] = {}
    while pages:
        new = [path for path in targets(pages.pop()) if path not in found and not path.is_relative_to(DOCS)]
        found |= dict.fromkeys(new)
        pages += [path for path in new if path.suffix == ".md"]
    return list(found)


def relinked(text: str, source: Path) -> str:
    """A page's text, whose links lead to where the files lie in the site; links to folders become plain text."""
    here = Path(place(source)).parent

    def rewrite(match: re.Match[str]) -> str:
        text, given, anchor = (part or "" for part in match.groups())
        if "://" in given:
            return match[0]
        target = Path(os.path.normpath(source.parent / given))
        if target.is_dir():
            return text[1:]
        return f"{text}]({Path(os.path.relpath(place(target), here)).as_posix()}{anchor})"

    return LINK.sub(rewrite, text)


def row(*cells: str) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def group_fields() -> dict[str, list[tuple[str, str, str]]]:
    """By class of a group of settings its fields: name, default, meaning."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    for record in ast.parse((ROOT / "dllm_rl" / "groups.py").read_text(encoding="utf-8")).body:
        if not isinstance(record, ast.ClassDef):
            continue
        text = (ast.get_docstring(record) or "").partition("Args:")[2].partition("\n\n")[0]
        meanings = dict(re.findall(r"^    (\w+): (.*(?:\n        .*)*)", text, re.MULTILINE))
        for node in record.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                value: ast.expr | None = node.value
                if isinstance(value, ast.Call) and ast.unparse(value.func) == "option":
                    value = next((keyword.value for keyword in value.keywords if keyword.arg == "default"), None)
                shown = "required" if value is None else f"`{ast.unparse(value)}`"
                meaning = " ".join(meanings[node.target.id].split())
                found.setdefault(record.name, []).append((node.target.id, shown, meaning))
                inner = found.get(ast.unparse(node.annotation).partition(" ")[0], [])  # of a class above: `saves.best`
                found[record.name] += [(f"{node.target.id}.{name}", *rest) for name, *rest in inner]
    return found


def recipe_fields() -> str:
    """A Markdown table of Recipe's fields and those of its groups: name, default, meaning."""
    groups = group_fields()
    files = [ROOT / "dllm_rl" / name for name in ("settings.py", "step/settings.py", "recipe.py")]
    classes = [node for file in files for node in ast.parse(file.read_text(encoding="utf-8")).body]
    rows = {}
    for record in classes:
        for node in record.body if isinstance(record, ast.ClassDef) else ():  # Settings, StepSettings, then Recipe
            if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call):
                assert isinstance(node.target, ast.Name)
                given = {keyword.arg: keyword.value for keyword in node.value.keywords}
                shown = f"`{ast.unparse(given['default'])}`" if "default" in given else "required"
                cells = (f"`{node.target.id}`", shown, ast.literal_eval(given["help"]))
                rows[node.target.id] = row(*cells)
                annotation = ast.unparse(node.annotation).partition(" ")[0]
                rows |= {
                    f"{node.target.id}.{name}": row(f"`{node.target.id}.{name}`", *rest)
                    for name, *rest in groups.get(annotation, ())
                }
    return "\n".join(["| field | default | what it is |", "| --- | --- | --- |", *rows.values()])


def reference() -> dict[str, str]:
    """The pages of the reference, by path: the public names with their signatures and docstrings."""
    stub = (ROOT / "dllm_rl" / "__init__.pyi").read_text(encoding="utf-8")
    entries = [(module, f"::: dllm_rl.{module}.{name}") for module, name in STUB.findall(stub)]
    path = "\n    options:\n      show_root_full_path: true"  # from where it is imported
    entries += [(module, f"::: dllm_rl.{module}.{name}{path}") for module, names in ELSEWHERE.items() for name in names]
    pages = {}
    for title, packages in REFERENCE.items():
        lines = [line for module, line in entries if module.partition(".")[0] in packages]
        if title == "Training":
            place = lines.index("::: dllm_rl.recipe.Recipe")
            lines[place] += "\n    options:\n      members: []"
            lines.insert(place + 1, recipe_fields())
        pages[f"reference/{title.lower()}.md"] = "\n\n".join([f"# {title}", *lines])
    return pages


def notebook() -> str:
    """The quickstart's cells and what they printed, as Markdown; without pictures."""
    parts = []
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        printed = ["".join(output.get("text", "")) for output in cell.get("outputs", ())]
        parts += [f"```text\n{text.rstrip()}\n```" for text in printed if text]
    return "\n\n".join(parts)


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    index = DOCS / "index.md"
    files.remove(files.get_file_from_path("index.md"))
    files.append(File.generated(config, place(index), abs_src_path=str(index)))
    files.append(File.generated(config, place(NOTEBOOK), content=relinked(notebook(), NOTEBOOK)))
    for source in linked(sorted(DOCS.rglob("*.md"))):
        added = File.generated(config, place(source), abs_src_path=str(source))
        added.inclusion = type(added.inclusion).NOT_IN_NAV
        files.append(added)
    for path, text in reference().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    source = page.file.abs_src_path
    return relinked(markdown, Path(source)) if source else markdown
