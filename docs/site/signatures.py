"""Signatures in docs/reference, for readers of the Markdown itself: the site shows mkdocstrings' in their place.

    python docs/site/signatures.py

Below each line `::: NAME` stands a block with the signature and the docstring, as the code has them, and in training.md
the table of a recipe's fields. A test holds the pages against the code.
"""

import ast
import inspect
import re
import textwrap
from importlib import import_module
from typing import Any

from hooks import DOCS, MARK, PYI, TABLE, recipe_fields

import dllm_rl

WIDTH = 100
SECTION = re.compile(r"\n\n(?:Args|Attributes|Returns|Yields|Raises|Example|Examples):\n")


def named(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """The parameters as they are written, each with its annotation and default."""
    given = node.args
    plain = [*given.posonlyargs, *given.args]
    defaults: list[ast.expr | None] = [*[None] * (len(plain) - len(given.defaults)), *given.defaults]
    texts = [written(each, default) for each, default in zip(plain, defaults, strict=True)]
    if given.posonlyargs:
        texts.insert(len(given.posonlyargs), "/")
    if given.vararg:
        texts.append(f"*{ast.unparse(given.vararg)}")
    elif given.kwonlyargs:
        texts.append("*")
    texts += [written(each, default) for each, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    return [*texts, f"**{ast.unparse(given.kwarg)}"] if given.kwarg else texts


def written(argument: ast.arg, default: ast.expr | None) -> str:
    equals = " = " if argument.annotation else "="
    return ast.unparse(argument) + (equals + ast.unparse(default) if default else "")


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef, indent: str = "") -> str:
    """In one line, or a line for each parameter where that is too long."""
    start = f"{indent}{'async ' if isinstance(node, ast.AsyncFunctionDef) else ''}def {node.name}("
    end = ")" + (f" -> {ast.unparse(node.returns)}" if node.returns else "")
    line = start + ", ".join(arguments(node)) + end
    if len(line) <= WIDTH:
        return line
    return "\n".join([start, *(f"{indent}    {each}," for each in arguments(node)), indent + end])


def is_set_by_callers(field: ast.AnnAssign) -> bool:
    """Is it a public field that a caller sets or reads: no constant of the class, and none that the class fills in?"""
    value = ast.unparse(field.value) if field.value else ""
    filled_in = "init=False" in value and "repr=False" in value
    constant = ast.unparse(field.annotation).startswith("ClassVar")
    return not (ast.unparse(field.target).startswith("_") or constant or filled_in)


def members(node: ast.ClassDef, source: list[str]) -> list[str]:
    """The public fields, as the source's lines have them with their comments, and the signatures of public methods but
    those of a public base, which the page has there."""
    bases = [getattr(dllm_rl, base.id) for base in node.bases if getattr(base, "id", "") in dllm_rl.__all__]
    lines = []
    for each in node.body:
        if isinstance(each, ast.AnnAssign) and is_set_by_callers(each):
            first = each.lineno - 1
            while source[first - 1].strip().startswith("# "):
                first -= 1
            lines += source[first : each.end_lineno]
        elif isinstance(each, ast.FunctionDef) and not (
            each.name.startswith("_") or any(hasattr(base, each.name) for base in bases)
        ):
            kinds = [ast.unparse(kind).removeprefix("cached_") for kind in each.decorator_list]
            lines += [f"    @{kind}" for kind in kinds if kind in ("property", "classmethod", "staticmethod")]
            lines.append(signature(each, "    "))
    return lines


def block(path: str, *, fields: bool) -> str:
    """What stands below `::: path`; with fields=False a class without its fields, which a table has."""
    thing = inspect.unwrap(named(path))
    source = textwrap.dedent(inspect.getsource(thing))
    (node,) = ast.parse(source).body
    told = inspect.getdoc(thing) or ""
    # What it does, and when to call it: the rest (formulas, Args, Returns, ...) is on the site and in help().
    told = "\n\n".join(SECTION.split(told)[0].split("\n\n")[: 2 if fields else 1])
    doc = textwrap.indent(f'"""{told}"""', "    ")
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        lines = [f"class {node.name}({bases}):" if bases else f"class {node.name}:", doc]
        lines += members(node, source.splitlines()) if fields else []
    else:
        assert isinstance(node, ast.FunctionDef)
        lines = [f"{signature(node)}:", doc]
    return "\n".join(["```pyi", *lines, "```"])


def with_signatures(text: str) -> str:
    """A page's text with the blocks and the table as the code has them now."""
    text = PYI.sub("", text)

    def filled(match: re.Match[str]) -> str:
        # What is no name of the package (`truncated_weights` of `tis`; ranks, which guides explain) is on the site.
        if (
            match[1].startswith(("dllm_rl.algorithms.", "dllm_rl.samplers."))
            and match[1].rpartition(".")[2] not in dllm_rl.__all__
        ):
            return match[0]
        return f"{match[0]}\n{block(match[1], fields='members: []' not in match[2])}\n"

    text = re.sub(r"^::: (\S+)\n((?: +.*\n)*)", filled, text, flags=re.MULTILINE)
    return TABLE.sub(lambda _: f"{MARK}\n\n{recipe_fields()}\n", text)


if __name__ == "__main__":
    for page in sorted((DOCS / "reference").glob("*.md")):
        page.write_text(with_signatures(page.read_text(encoding="utf-8")), encoding="utf-8")
