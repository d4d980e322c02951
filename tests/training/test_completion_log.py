"""What a run shows and keeps of its completions."""

import dataclasses
import io
import math
from dataclasses import replace
from datetime import date

import pytest
import torch
from rich.console import Console
from tiny_recipe import ONE_PUZZLE, tiny_recipe, with_changes

from dllm_rl.files import as_json
from dllm_rl.monitoring.json_lines import current_rows
from dllm_rl.step.collect import collect
from dllm_rl.step.score import draw_view_sets
from dllm_rl.training.completion_log import best_and_worst_rows, log_completions, shorten, table
from dllm_rl.training.start import start
from dllm_rl.training.trainer import train
from dllm_rl.types.scoring import Logprobs

pytestmark = pytest.mark.usefixtures("no_rehearsal")

ROW = {"step": 0, "prompt": "12", "completion": "34", "reward": 1.0, "advantage": 0.5, "mismatch": -0.25}
ROW |= {"parts": {"parsed": 1.0}, "tokens": []}


def test_of_each_group_the_best_and_the_worst():
    assert best_and_worst_rows([0.0, 2.0, 1.0, 2.0, 5.0, 5.0, 5.0, 5.0], [4, 4]) == [1, 0, 4]
    assert best_and_worst_rows([0.0] * 30, [1] * 30) == [0, 1, 2, 3]
    assert best_and_worst_rows([float(i % 3) for i in range(30)], [3] * 10) == [2, 0, 5, 3, 8, 6, 11, 9]
    assert best_and_worst_rows([0.0, 1.0, 2.0, 7.0, 5.0, 6.0], [3, 1, 2]) == [2, 0, 3, 5, 4]


def test_rows_of_a_run_are_its_own(tmp_path, capsys):
    train(recipe := tiny_recipe(tmp_path, num_steps=4, log_completions_steps=2, train_batch_size=2))
    rows = current_rows(tmp_path / "completions.jsonl")
    assert sorted({row["step"] for row in rows}) == [0, 2, 3] and 3 * 2 <= len(rows) <= 3 * 4
    known = {problem.prompt: problem for problem in map(recipe.task.__getitem__, range(len(recipe.task)))}
    for row in rows:
        reward = recipe.task.reward(known[row["prompt"]], row["completion"])
        assert (row["reward"], row["parts"]["parsed"]) == (reward.value, reward.parsed)
        assert row["parts"]["solve_rate"] == reward.breakdown["solve_rate"] and "correct_cells" not in row["parts"]
        assert len(row["tokens"]) == 16 and {token["step"] for token in row["tokens"]} == {0, 1, 2}
        assert {name: row[name] for name in ("puzzle", "solution")} == known[row["prompt"]].fields
        assert row["completion"] in "".join(token["text"] for token in row["tokens"]).replace("<pad>", "")
    assert any(row["advantage"] > 0 for row in rows) and any(row["mismatch"] for row in rows)
    assert capsys.readouterr().out.count("those of highest and lowest reward") == 3


def test_zero_means_never(tmp_path, capsys):
    small = {"num_steps": 1, "train_batch_size": 1, "num_generations": 2, "rollout_quantization": None}
    train(tiny_recipe(tmp_path, log_completions_steps=0, **small))
    assert not (tmp_path / "completions.jsonl").exists()
    assert "highest and lowest" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="log: completions_steps=-1 must be at least 0"):
        tiny_recipe(tmp_path, log_completions_steps=-1)


@pytest.mark.slow
def test_a_resumed_run_adds_to_them(tmp_path):
    recipe = tiny_recipe(tmp_path, log_completions_steps=1, save_steps=1, save_total_limit=9)
    train(recipe)
    before, rows = (tmp_path / "completions.jsonl").read_bytes(), current_rows(tmp_path / "completions.jsonl")
    again = {"resume_from_checkpoint": str(tmp_path / "checkpoints/step-000001"), "log_completions_steps": 0}
    train(with_changes(recipe, **again))
    assert (tmp_path / "completions.jsonl").read_bytes() == before + b'{"resume_from": 1}\n'
    assert current_rows(tmp_path / "completions.jsonl") == [row for row in rows if row["step"] < 1]
    train(with_changes(recipe, **again | {"log_completions_steps": 1}))
    assert current_rows(tmp_path / "completions.jsonl") == rows
    train(with_changes(recipe, overwrite_output_dir=True, log_completions_steps=0, num_steps=1))
    assert not (tmp_path / "completions.jsonl").exists()


def test_mismatch_and_advantage_by_hand(tmp_path):
    """The learner gives every token exp(0.25) times the rollout's probability; the last group is not scored."""
    run = start(tiny_recipe(tmp_path, log_completions_steps=1))
    samples, answers, _ = collect(run.step, 0)
    rollout, rewards = samples.rollout, samples.rewards
    learned = dataclasses.replace(samples, advantages=torch.arange(16.0))
    scored = dataclasses.replace(learned, metric_weights=(torch.arange(16) < 12).double())
    noise = draw_view_sets(run.recipe, scored, 0, run.accelerator)[0]
    old = rollout.logprobs + 0.25 * rollout.completion_mask
    logps = Logprobs(
        old_logprobs=old,
        old_view_logprobs=old[None],
        rollout_logprobs=rollout.logprobs,
        reference_logprobs=None,
        views=noise,
    )
    log_completions(run, 0, answers, samples, learned, logps)
    run.log.close()
    rows = current_rows(tmp_path / "completions.jsonl")
    chosen = best_and_worst_rows(rewards.tolist(), [4] * 4)
    assert [row["advantage"] for row in rows] == chosen
    assert [row["mismatch"] for row in rows] == [
        pytest.approx(0.25 * rollout.completion_mask[i].sum().item(), rel=1e-5) if i < 12 else None for i in chosen
    ]
    assert max(chosen) >= 12, "a row that is not scored"


def test_a_probability_that_is_no_number_stops_no_run(tmp_path):
    """JSON has none for it, and a rollout may have one."""
    run = start(tiny_recipe(tmp_path, log_completions_steps=1))
    samples, answers, _ = collect(run.step, 0)
    rollout = dataclasses.replace(samples.rollout, logprobs=torch.full_like(samples.rollout.logprobs, torch.nan))
    samples = dataclasses.replace(samples, rollout=rollout, advantages=torch.full((16,), torch.inf))
    noise = draw_view_sets(run.recipe, samples, 0, run.accelerator)[0]
    same = rollout.logprobs
    logps = Logprobs(
        old_logprobs=same, old_view_logprobs=same[None], rollout_logprobs=same, reference_logprobs=None, views=noise
    )
    log_completions(run, 0, answers, samples, samples, logps)
    run.log.close()
    for row in current_rows(tmp_path / "completions.jsonl"):
        assert row["mismatch"] is None and row["advantage"] is None
        assert {token["probability"] for token in row["tokens"]} == {None}


def test_the_table_obeys_no_text_and_fits_80_columns():
    hostile = "[red]x[/red]\x1b[2J\x07\u202e" + "long " * 100
    rows = [ROW | {"prompt": [{"role": "user", "content": hostile}], "completion": hostile}, ROW | {"mismatch": None}]
    rows[0]["parts"] = {"[bold]\x1b": 1.0}
    console = Console(file=io.StringIO(), width=80)
    console.print(table("completions", rows))
    text = console.file.getvalue()
    assert "[red]x[/red]\u241b" in text.replace(" ", "") and "\x1b" not in text and "\u202e" not in text
    assert max(map(len, text.splitlines())) <= 80 and text.count("long") < 80
    assert "+0.5" in text and "-0.25" in text


def test_a_prompt_of_the_main_job_stays_whole_at_80_columns():
    parts = {"parsed": 1.0, "solve_rate": 0.0, "cell_accuracy": 0.571, "givens_kept": 0.9}
    rows = [ROW | {"prompt": "421..12424.113.2=", "completion": "4213312424311342", "parts": parts}]
    console = Console(file=io.StringIO(), width=80)
    console.print(table("completions", rows))
    text = console.file.getvalue()
    assert "421..12424.113.2=  4213312424311342  1: parsed 1" in text and max(map(len, text.splitlines())) <= 80


def test_a_field_that_json_has_no_form_for_is_text():
    """A data set's columns are fields, of any kind; the row's own names win."""
    fields = {"day": date(2026, 1, 2), "share": math.nan, "deep": {"low": [-math.inf, 1]}, (1, 2): 3, "answer": "7"}
    stored = as_json(fields)
    assert stored == {"day": "2026-01-02", "share": "NaN", "deep": {"low": ["-Infinity", 1]}, "answer": "7"}
    loop = []
    loop.append(loop)
    long = as_json(fields | {"long": 10**5000, "loop": loop, "more": [10**5000]})  # Python writes 4300 digits
    assert int(long.pop("long"), 16) == 10**5000
    assert long == stored | dict.fromkeys(("loop", "more"), "a list that JSON cannot hold")


def test_a_long_text_is_shown_by_its_ends():
    assert shorten("a" * 160) == "a" * 160
    assert shorten("a" * 100 + "b" * 100) == "a" * 80 + " ... " + "b" * 80


def cut_in_half(text):
    return text[: len(text) // 2]


def without_a_row(text):
    first, _, *others = text.splitlines(keepends=True)
    return "".join([first, *others, *others])  # longer than it was


@pytest.mark.parametrize("change", [cut_in_half, without_a_row, lambda text: "", lambda text: None, lambda text: text])
def test_a_log_that_was_cut_is_said_when_the_run_is_resumed(tmp_path, capsys, change):
    recipe = tiny_recipe(tmp_path, num_steps=2, log_completions_steps=1, lr_schedule_steps=9, **ONE_PUZZLE)
    train(recipe)
    for name in ("completions", "held_out", "metrics"):
        path = tmp_path / f"{name}.jsonl"
        before = path.read_text()
        capsys.readouterr()
        changed = change(before)
        path.unlink() if changed is None else path.write_text(changed)
        recipe = replace(recipe, num_steps=recipe.num_steps + 1, resume_from_checkpoint="latest")
        train(recipe)
        said = [line for line in capsys.readouterr().out.splitlines() if "was cut or changed" in line]
        step = recipe.num_steps - 1
        expected = f"warning: {path} was cut or changed after the checkpoint of step {step}, from which the run "
        assert len(said) == (changed != before) and all(line.startswith(expected) for line in said)


def test_a_log_that_another_folder_has_is_not_missed(tmp_path, capsys):
    recipe = tiny_recipe(tmp_path / "a", num_steps=1, lr_schedule_steps=9, **ONE_PUZZLE)
    train(recipe)
    folder = str(tmp_path / "a" / "checkpoints" / "step-000001")
    train(replace(recipe, num_steps=2, resume_from_checkpoint=folder, output_dir=str(tmp_path / "b")))
    train(replace(recipe, num_steps=3, resume_from_checkpoint="latest", output_dir=str(tmp_path / "b")))
    assert "was cut" not in capsys.readouterr().out
