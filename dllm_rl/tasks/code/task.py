"""Python functions to write: problems from files in the format of HumanEval or MBPP, and their rewards."""

import ast
import builtins
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

from dllm_rl.tasks.answers import SPECIAL_TOKENS, cut
from dllm_rl.tasks.base import Grader, Reward
from dllm_rl.tasks.code import sandbox
from dllm_rl.tasks.math.task import Questions
from dllm_rl.tasks.rows import Row, Split, require_field, text_of

NUM_PARALLEL = 4  # programs that run at the same time
MAX_PROGRAM_LENGTH = 20_000  # characters of a program; a longer one is not parsed
MAX_FENCES = 20  # fences in the strings and comments of a program
_FENCE = re.compile("(`{3,})")
_INFO = re.compile(  # after an opening fence
    r"^(?:[\w+.{}-]*|[ \t]+(?i:python|py)[\d.]*|(?i:python|py)[\d.]*[ \t][^\n]*|\{[^\n}]*\})[ \t\r]*\n"
)
# Texts that end a function which the prompt begins (arXiv 2107.03374).
ENDS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(")
MODULES = """__future__ abc array bisect calendar cmath collections copy dataclasses datetime decimal enum fractions
functools hashlib heapq itertools json math operator random re statistics string sys textwrap time typing"""
FORBIDDEN = "__import__ breakpoint compile eval exec exit getattr globals input locals open quit vars"


def program(fields: Mapping[str, Any], completion: str) -> str:
    """Return the program of a completion: the prelude and the last code block that defines the function.

    Without such a block, the first block that begins with white space, else the first nonblank block, is appended to
    the prelude as the function's body. A fence in a string or in a comment of a program is a part of the program. If
    the block begins with future imports, they come before the prelude.
    """
    prelude = fields["prelude"]
    text = cut(completion, 0, SPECIAL_TOKENS)
    if "```" not in text:  # Markdown's other fence, which is an operator elsewhere
        text = re.sub("^[ \t]*~{3,}", "```", text, flags=re.MULTILINE)
    pieces = _FENCE.split(text)  # the odd ones are the fences between the others
    block = _definition(pieces, fields["entry_point"])
    if block is not None:
        return _with_prelude(sandbox.before_function(prelude, fields["entry_point"]), block)
    texts = {place: _code(pieces, place, place) for place in range(0, len(pieces), 2)}
    nonblank = [place for place, text in texts.items() if text.strip()]
    start = next((place for place in nonblank if texts[place][0].isspace()), (nonblank or [0])[0])
    ends = range(start, min(len(pieces), start + 2 * MAX_FENCES), 2)
    bodies = (prelude + cut(_code(pieces, start, end), 0, ENDS) for end in ends)
    return next(filter(_tree, bodies), prelude + cut(texts[start], 0, ENDS))


def _code(pieces: Sequence[str], start: int, end: int) -> str:
    """Return the code of the pieces from `start` to `end`, which is one of them, without the name of a language."""
    return _INFO.sub("", "".join(pieces[start : end + 1]))


def _definition(pieces: Sequence[str], name: str) -> str | None:
    """Return the last block that defines the function, or None.

    Pieces with a fence between them are one block if they parse together: then the fence is in a string or a comment.
    """
    definition = re.compile(rf"^def {re.escape(name)}\b", re.MULTILINE)
    blocks = {place: textwrap.dedent(_code(pieces, place, place)) for place in range(0, len(pieces), 2)}
    last = next((place for place in reversed(blocks) if definition.search(blocks[place])), None)
    if last is None:
        return None
    for start in range(max(0, last - 2 * MAX_FENCES), last + 1, 2):
        for end in range(min(len(pieces) - 1, start + 2 * MAX_FENCES), max(start, last - 2), -2):
            if sum(map(len, pieces[start : end + 1])) <= MAX_PROGRAM_LENGTH:
                block = textwrap.dedent(_code(pieces, start, end))
                if definition.search(block) and _tree(block):
                    return block
    return blocks[last]


def _with_prelude(prelude: str, block: str) -> str:
    """Return the prelude and a block, after the future imports with which they begin: Python wants these first."""
    trees = [_tree(prelude), _tree(block)] if "__future__" in block else []
    futures: list[ast.stmt] = []
    for tree in filter(None, trees):
        head = 0 if ast.get_docstring(tree) is None else 1
        while tree.body[head:] and isinstance(node := tree.body[head], ast.ImportFrom) and node.module == "__future__":
            futures.append(tree.body.pop(head))
    with suppress(RecursionError):
        if futures and None not in trees:
            return "\n".join(map(ast.unparse, [*futures, *filter(None, trees)]))
    return f"{prelude}\n{block}"


def _tree(code: str) -> ast.Module | None:
    """Return the syntax tree of a program; None if it does not parse or is longer than MAX_PROGRAM_LENGTH."""
    if len(code) > MAX_PROGRAM_LENGTH:
        return None
    try:
        with warnings.catch_warnings(action="ignore"):
            return ast.parse(code)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None


def static(fields: Mapping[str, Any], completion: str) -> Reward:
    """Return the mean of four checks, without running the program [ours].

    The program parses. Its function has the requested number of arguments and returns something. Its names are defined
    in it. It imports only MODULES, and uses no name of FORBIDDEN.
    """
    code = program(fields, completion)
    checks = dict.fromkeys(("parses", "signature", "names", "allowed"), 0.0)
    tree = _tree(code)
    if tree is None:
        return Reward(0.0, False, checks)
    nodes = list(ast.walk(tree))
    defined = set(dir(builtins))
    used = set()
    foreign = set()  # imported modules, and attributes such as __globals__
    for node in nodes:
        match node:
            case ast.Name(name, ast.Load()):
                used.add(name)
            case ast.Name(name) | ast.arg(name) | ast.FunctionDef(name) | ast.ClassDef(name):
                defined.add(name)
            case ast.AsyncFunctionDef(name) | ast.ExceptHandler(_, name):
                defined.add(str(name))
            case ast.MatchAs(_, name) | ast.MatchStar(name) | ast.MatchMapping(rest=name):
                defined.add(str(name))
            case ast.alias(name, other):
                defined.add(other or name.split(".")[0])
            case ast.Import(names):
                foreign |= {alias.name.split(".")[0] for alias in names}
            case ast.ImportFrom(name, _, level):
                foreign.add("." * level + str(name).split(".")[0])
            case ast.Attribute(_, name) if name.startswith("__") and name != "__init__":
                foreign.add(name)
    checks["parses"] = 1.0
    checks["signature"] = float(any(_fits(node, fields) for node in nodes))
    checks["names"] = float(used <= defined)
    checks["allowed"] = float(foreign <= {*MODULES.split()} and not used & {*FORBIDDEN.split()})
    return Reward(sum(checks.values()) / 4, True, checks)


def _fits(node: ast.AST, fields: Mapping[str, Any]) -> bool:
    """Return whether a node defines the requested function, accepts its number of arguments and returns a value."""
    if not isinstance(node, ast.FunctionDef) or node.name != fields["entry_point"]:
        return False
    num_places = len(node.args.posonlyargs) + len(node.args.args)
    fewest = num_places - len(node.args.defaults)
    fits = fewest <= fields["arguments"] and (fields["arguments"] <= num_places or node.args.vararg is not None)
    returns = any(isinstance(child, ast.Return | ast.Yield | ast.YieldFrom) and child.value for child in ast.walk(node))
    return fits and returns and None not in node.args.kw_defaults  # None: an argument that only its name can give


@lru_cache(maxsize=4096)
def _passes(prelude: str, code: str, tests: str, entry_point: str) -> bool:
    return sandbox.run(prelude, code, tests, entry_point)[0]


def sandboxed(fields: Mapping[str, Any], completion: str) -> Reward:
    """Return 1 if the tests pass in the sandbox [ours]. Raises OSError without the sandbox's programs."""
    code = program(fields, completion)
    right = float(_passes(fields["prelude"], code, fields["tests"], fields["entry_point"]))
    return Reward(right, static(fields, completion).parsed, {"accuracy": right})


def run_all(fields: Sequence[Mapping[str, Any]], completions: Sequence[str]) -> None:
    """Run the programs in parallel and cache their verdicts for `sandboxed`."""
    with ThreadPoolExecutor(NUM_PARALLEL) as pool:
        list(pool.map(sandboxed, fields, completions))


def read_fields(row: Mapping[str, Any], protocol: str) -> dict[str, Any]:
    """Read the fields of a stored row. Raises ValueError if they are malformed."""
    if type(require_field(row, "arguments")) is not int:  # not isinstance: True is an int
        raise ValueError(f"arguments={row['arguments']!r} must be an integer")
    fields = {name: text_of(row, name) for name in ("prelude", "entry_point", "tests")}
    if not _tests_anything(fields["tests"]):
        raise ValueError(
            "tests have no assert and no call outside of functions, so that every program would pass; after "
            f"HumanEval's test write check({fields['entry_point']})"
        )
    return fields | {"arguments": row["arguments"]}


def _tests_anything(tests: str) -> bool:
    tree = _tree(tests)
    if tree is None:
        return True  # the sandbox grades it wrong
    run = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Assign)]
    return any(isinstance(part, ast.Assert | ast.Call | ast.Raise) for node in run for part in ast.walk(node))


def _texts(row: Mapping[str, Any], name: str) -> list[str]:
    """Return a field that is a list of texts. Raises ValueError for other types, including a single text."""
    texts = require_field(row, name)
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name}={texts!r} must be a list of texts")
    return list(texts)


GRADERS: dict[str, Grader] = {"strict": static, "sandbox": sandboxed}
REQUIRE = {"sandbox": sandbox.require}
PREPARE = {"sandbox": run_all}


@dataclass(frozen=True)
class Code(Questions):
    """Python functions to write, as in HumanEval or MBPP.

    Use it to train or evaluate on programs. Metrics: parses, signature (defines the function), names (all are defined)
    and allowed (imports only harmless modules); with the sandbox also accuracy, programs that pass all tests.

    Args:
        path: File of rows with `prompt`, `entry_point`, `canonical_solution`, `test` (HumanEval's), or with `text` or
            `prompt`, `code`, `test_list` (MBPP's; the prompt shows the tests). None (default): HumanEval by `datasets`.
        split: "test" (default), "validation" or "train", as for MATH500.
        size: Number of problems, in the file's order. None (default): all.
        prompt_format: "text" (default): the built-in instruction. Otherwise a template with {question}, or the path of
            its file.
        chat: Whether the prompt is one user message; False: plain text. Default: True.
        opening: Text that begins the assistant's turn; needs chat. Default: none.
        reward_rule: "static" (default): share of checks that the text passes; nothing runs. "sandbox": 1 if the tests
            pass, run in a sandbox (Linux only). Tests pass plain data to the function (`sandbox.Shared`), see
            what it changes in them, compare plain data, and catch built-in exceptions.

    Raises:
        ValueError: A setting is unknown, a row is malformed, or the sandbox does not work on this machine.
    """

    name: ClassVar[str] = "code"
    version: ClassVar[str] = "8"
    text: ClassVar[str] = "Write this Python function, in one ```python block and nothing else.\n\n{question}"
    placeholders: ClassVar[tuple[str, ...]] = ("question",)
    hub: ClassVar[tuple[str, str | None]] = ("openai/openai_humaneval", None)
    rules: ClassVar[Mapping[str, Grader]] = {"static": static, "sandbox": sandboxed}
    prepare: ClassVar[Mapping[str, Any]] = {"sandbox": run_all}

    split: Split = "test"
    reward_rule: Literal["static", "sandbox"] = "static"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward_rule == "sandbox":
            sandbox.require()

    @staticmethod
    def read_row(row: Row) -> tuple[str, Any, str]:
        """Return (question, the grader's fields, solution) of a row."""
        try:
            if "entry_point" in row:
                question = prelude = text_of(row, "prompt")
                solution = prelude + text_of(row, "canonical_solution")
                calls = text_of(row, "entry_point")
                tests = f"{text_of(row, 'test')}\ncheck({calls})"
            else:
                solution = text_of(row, "code")
                calls = tests = "\n".join(_texts(row, "test_list"))
                question = f"{text_of(row, 'text' if 'text' in row else 'prompt')}\nIt must pass these tests:\n{tests}"
                prelude = "\n".join(
                    [*_texts({"test_imports": []} | row, "test_imports"), row.get("test_setup_code", "")]
                )
            functions = [node for node in ast.parse(solution).body if isinstance(node, ast.FunctionDef)]
            function = [node for node in functions if re.search(rf"\b{node.name}\b", calls)][-1]
        except (ValueError, TypeError, KeyError, IndexError, SyntaxError) as error:
            raise ValueError(f"no problem in the form of HumanEval or MBPP ({error!r})") from None
        fields = {
            "prelude": prelude,
            "entry_point": function.name,
            "arguments": len(function.args.args),
            "tests": tests,
        }
        return question, fields, f"```python\n{solution}\n```"
