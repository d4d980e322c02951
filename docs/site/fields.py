"""An extension of griffe, which reads docstrings as Markdown and knows no records: mends both for the reference."""

import inspect
import re
from collections.abc import Iterator
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


def records(base: type[Record] = Record) -> Iterator[type[Record]]:
    """All record classes of the modules that the public names import."""
    for name in dllm_rl.__all__ if base is Record else ():
        getattr(dllm_rl, name)
    for record in base.__subclasses__():
        yield record
        yield from records(record)


class Fields(griffe.Extension):
    """Give each record the constructor that its class has, with types and defaults."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_text(obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        for made in records() if pkg.name == "dllm_rl" else ():
            if made.__module__.startswith("dllm_rl.") and made.__qualname__ == made.__name__:
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
                pkg[f"{made.__module__.removeprefix('dllm_rl.')}.{made.__name__}"].set_member("__init__", constructor)
