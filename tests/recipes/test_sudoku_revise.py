"""The recipe of a sampler that revises, cut short."""

from dataclasses import replace
from functools import partial

from dllm_rl.config import from_command_line
from dllm_rl.monitoring.json_lines import current_rows
from dllm_rl.training.trainer import train
from recipes import sudoku_revise

SHORT = "--sft_warmup_steps 2 --num_steps 2 --train_batch_size 2 --num_generations 4"
FEW = "--eval_task.size 8 --validation_task.size 8"


def test_the_recipe_runs_and_measures_the_mismatch_of_every_writing(tmp_path):
    short = from_command_line(sudoku_revise.recipe, [*SHORT.split(), *FEW.split(), "--output_dir", str(tmp_path)])
    summary = train(replace(short, model=partial(short.model, num_layers=1)))
    rows = current_rows(tmp_path / "metrics.jsonl")
    assert summary["warmup_steps"] == 2 and [row["step"] for row in rows] == [0, 1]
    assert all(0 < row["rollout_corr/abs_log_ratio_mean"] < 0.1 and row["rollout_corr/ess"] > 0.9 for row in rows)
