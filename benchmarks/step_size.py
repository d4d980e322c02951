"""How much code one default training step enters: functions, files and their lines.

    python -m benchmarks.step_size [--list]

A step of `grpo` with FP8 rollouts and TIS on a tiny model, without start, evaluation and checkpoint. Nested functions
and lambdas count; comprehensions do not. It also counts, over the whole package, the functions that take `recipe`, and
lists those with more than six parameters (`self` and `cls` do not count).
"""

import argparse
import ast
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import dllm_rl
from dllm_rl import TIS, Float8WeightOnly, grpo_recipe
from dllm_rl.models.tiny import tiny_llama
from dllm_rl.training import trainer

ROOT = Path(dllm_rl.__file__).parent


def model() -> Any:
    return tiny_llama(characters="0123456789 +-*/()=>,", causal=False, hidden_size=32, num_layers=1)


def entered(run: Callable[[], Any]) -> set[CodeType]:
    """The code objects of this package that a call enters."""
    found: set[CodeType] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(ROOT)):
            found.add(frame.f_code)

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return {code for code in found if not code.co_name.startswith("<") or code.co_name == "<lambda>"}


ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(8) for b in range(8)]


def right(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [float(text[:1] == wanted[:1]) for text, wanted in zip(completions, answer, strict=True)]


def of_a_step() -> set[CodeType]:
    with tempfile.TemporaryDirectory() as folder:
        recipe = grpo_recipe(
            model,
            ROWS,
            right,
            max_new_tokens=8,
            rollout_quantization=Float8WeightOnly(),
            corrector=TIS(),
            train_batch_size=4,
            num_generations=4,
            num_steps=3,
            eval_steps=0,
            save_steps=3,
            output_dir=folder,
            report_to=None,
        )
        run = trainer.start(recipe)
        trainer.take_step(run, 0)  # what is done once is done here
        found = entered(lambda: trainer.take_step(run, 1))
        run.writer.close()
    return found


def by_file(found: set[CodeType]) -> Counter[str]:
    return Counter(str(Path(code.co_filename).relative_to(ROOT)) for code in found)


def parameters_of_functions() -> dict[str, list[str]]:
    """Names of the parameters of every function and method of the package, by its file and its line."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names = [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                where = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
                found[where] = [name for name in names if name not in ("self", "cls")]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="every function, by file")
    options = parser.parse_args()
    found = of_a_step()
    files = by_file(found)
    lines = sum(len({line for _, _, line in code.co_lines() if line}) for code in found)
    print(f"{len(found)} functions in {len(files)} files, {lines} lines of code")
    parameters = parameters_of_functions()
    print(f"{sum('recipe' in names for names in parameters.values())} functions of the package take `recipe`")
    many = [where for where, names in parameters.items() if len(names) > 6]
    print(f"{len(many)} have more than six parameters")
    if options.list:
        print("\n".join(f"     {where}" for where in many))
    for name, count in sorted(files.items()):
        print(f"{count:4} {name}")
        if options.list:
            inside = [code for code in found if Path(code.co_filename) == ROOT / name]
            for code in sorted(inside, key=lambda code: code.co_firstlineno):
                print(f"       {code.co_firstlineno}: {code.co_qualname}")


if __name__ == "__main__":
    main()
