"""How far a scheme's copy is from the learner, and how much of it is the weights' and how much the inputs'.

`diagnose` on 64 puzzles of the recipe, two completions each, with the recipe's sampler. First the run, then its
numbers, which docs/mismatch.md has:

    python recipes/sudoku_unique.py --seed 0 --num_steps 60 --output_dir runs/schemes
    python -m recipes.studies.schemes runs/schemes
    python -m recipes.studies.schemes --report         the table of schemes.json
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dllm_rl import load_policy
from dllm_rl.checkpoints.checkpoint import list_checkpoints
from dllm_rl.decoding.tokens import encode
from dllm_rl.diagnostics.doctor import diagnose
from dllm_rl.files import read_json, write_json
from dllm_rl.quantization import schemes
from recipes.studies.paired import markdown
from recipes.sudoku_unique import recipe

STORED = Path(__file__).with_suffix(".json")
SCHEMES = {
    "float8_weight_only": schemes.Float8WeightOnly,
    "float8_dynamic_emulated": schemes.Float8DynamicEmulated,
    "int4_weight_only": schemes.Int4WeightOnly,
}
PARTS = {"weights": "quantized weights", "activations": "quantized activations"}  # columns and the doctor's causes


def measure(run: Path) -> None:
    steps, checkpoint = list_checkpoints(run / "checkpoints")[-1]
    policy = load_policy(str(checkpoint))
    prompts = encode(policy, [recipe.task[i] for i in range(64)], num_generations=2)
    rows = []
    for name, scheme in SCHEMES.items():
        report = diagnose(policy, scheme(), prompts=prompts, sampler=recipe.sampler)
        causes = {cause.name: cause.mean_abs for cause in report.causes}
        row = {"scheme": name, "tokens": report.num_tokens} | vars(report.total)
        row |= {column: causes.pop(cause) for column, cause in PARTS.items()}
        rows.append(row | {"largest other cause": max(causes.values())})
    solved = read_json(run / "summary.json")["eval_after"]["solve_rate"]
    write_json(STORED, {"seed": 0, "RL steps": steps, "solved": solved, "rows": rows})


def told(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table, as the document holds it."""
    cells = []
    for row in rows:
        name = SCHEMES[row["scheme"]].__name__
        cell = {"rollout": f"`{name}` (W8A8)" if name == "Float8DynamicEmulated" else f"`{name}`"}
        cell["mean abs log-ratio, nats"] = f"{row['mean_abs']:.4f}"
        parts = (f"{row[part]:.4f}" if row[part] > 1e-6 else "0" for part in PARTS)
        cell["of which weights / activations"] = " / ".join(parts)
        cells.append(cell | {"max": f"{row['max_abs']:.2f}", "k3": f"{row['k3']:.4f}", "ESS": f"{row['ess']:.4f}"})
    return markdown(cells)


def page_tables() -> dict[str, str]:
    return {"schemes": told(read_json(STORED)["rows"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("run", nargs="?", type=Path, help="the output_dir of a run of sudoku_unique")
    group.add_argument("--report", action="store_true", help="run nothing: the table of schemes.json")
    options = parser.parse_args()
    if not options.report:
        measure(options.run)
    print(told(read_json(STORED)["rows"]))


if __name__ == "__main__":
    main()
