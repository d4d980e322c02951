"""How far a scheme's copy is from the learner, and how much of it is the weights' and how much the inputs'.

`diagnose` on 64 puzzles of the recipe, two completions each, with the recipe's sampler. First the run, then its
numbers, which docs/method.md has:

    python recipes/sudoku_unique.py --seed 0 --num_steps 60 --output_dir runs/schemes
    python -m recipes.studies.schemes runs/schemes
"""

import sys
from pathlib import Path

from dllm_rl import load_policy
from dllm_rl.checkpoints.checkpoint import list_checkpoints
from dllm_rl.decoding.tokens import encode
from dllm_rl.diagnostics.doctor import diagnose
from dllm_rl.files import read_json, write_json
from dllm_rl.quantization import schemes
from recipes.sudoku_unique import recipe

STORED = Path(__file__).with_suffix(".json")
SCHEMES = {
    "float8_weight_only": schemes.Float8WeightOnly,
    "float8_dynamic_emulated": schemes.Float8DynamicEmulated,
    "int4_weight_only": schemes.Int4WeightOnly,
}
PARTS = {"weights": "quantized weights", "activations": "quantized activations"}  # columns and the doctor's causes


def main(run: Path) -> None:
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
        print(rows[-1])
    solved = read_json(run / "summary.json")["eval_after"]["solve_rate"]
    write_json(STORED, {"seed": 0, "RL steps": steps, "solved": solved, "rows": rows})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
