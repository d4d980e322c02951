"""An extension of griffe, which reads docstrings as Markdown and knows no records: mends both for the reference."""

import inspect
import re
from typing import Any

import griffe

import dllm_rl
from dllm_rl.records import Record

MODULES = re.compile(r"\b(?:\w+\.)+(?=\w)")
MARKUP = re.compile(r"`[^`]*`|<(?=[A-Za-z/|!])|^\s*>", re.MULTILINE)  # code; a tag; a quotation


def as_text(docstring: str) -> str:
    """Escape what Markdown takes for a tag or a quotation: `<eos>` outside of code, and `>= x` where a line begins."""
    escaped = {"<": "&lt;", ">": "&gt;"}
    return MARKUP.sub(lambda found: found[0] if "`" in found[0] else found[0][:-1] + escaped[found[0][-1]], docstring)


class Fields(griffe.Extension):
    """Give each public record the constructor that its class has, with types and defaults."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_text(obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        for name in dllm_rl.__all__ if pkg.name == "dllm_rl" else ():
            made = getattr(dllm_rl, name)
            if isinstance(made, type) and issubclass(made, Record):
                parameters = [
                    griffe.Parameter(
                        field.name,
                        annotation=MODULES.sub("", inspect.formatannotation(field.annotation)),
                        kind=griffe.ParameterKind.keyword_only,
                        default=None if field.default is field.empty else repr(field.default),
                    )
                    for field in inspect.signature(made).parameters.values()
                ]
                constructor = griffe.Function("__init__", parameters=griffe.Parameters(*parameters))
                pkg[f"{made.__module__.removeprefix('dllm_rl.')}.{name}"].set_member("__init__", constructor)
