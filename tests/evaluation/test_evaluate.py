"""Evaluation: random numbers per problem and sample, means and intervals, stored completions, kill and resume."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import refuses
from sorting import Mini

from dllm_rl import evaluate, quantized_copy
from dllm_rl.decoding.prompts import prompt_ids
from dllm_rl.decoding.texts import before_end, completion_token_ids, decode
from dllm_rl.distributed.collectives import OneProcess
from dllm_rl.evaluation.complete import complete_problems
from dllm_rl.evaluation.completions import fingerprint, merge_parts, read
from dllm_rl.evaluation.grading import grade_file
from dllm_rl.evaluation.intervals import wilson
from dllm_rl.evaluation.results import Evaluation, GradedAnswer, interval, mean
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.quantization.schemes import Float8WeightOnly
from dllm_rl.samplers.autoregress import Autoregress
from dllm_rl.samplers.rules import Entropy, MaxProb, RandomOrder, SoftThreshold, Threshold
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.tasks import Problem, Reward, Sudoku, task_from_dataset
from dllm_rl.tasks.base import grade
from dllm_rl.tasks.protocols import under_protocol
from dllm_rl.types.rollouts import Rollout

ROOT = Path(__file__).parents[2]
MODEL = {
    "characters": "0123456789.=",
    "hidden_size": 16,
    "num_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
EOS = 2
SAMPLER = Unmask(max_new_tokens=16, diffusion_steps=4, temperature=1.0, suppress=(EOS,))


@pytest.fixture(scope="module")
def policy():
    return tiny_masked_lm(**MODEL)


def sudoku(size=10, **settings):
    return Sudoku(split="test", size=size, **settings)


def texts(path):
    return {key: row["completion"] for key, row in read(path).items()}


def answers(values, *, name="accuracy", per_problem=1):
    """GradedAnswer completions with the given value of one metric, per_problem samples of each problem in a row."""
    graded = (Reward(float(value), True, {name: float(value)}) for value in values)
    return tuple(
        GradedAnswer(i // per_problem, i % per_problem, reward, 3, 0.5, 0.25) for i, reward in enumerate(graded)
    )


def test_a_reward_may_ask_for_speed(policy, tmp_path):
    """A row's forwards are its own: those of the row alone, whatever else its batch holds; and those of the file."""

    def asks(completions, forwards, num_tokens, **_):
        return [100 * each + count for each, count in zip(forwards, num_tokens, strict=True)]

    rows = [{"prompt": "1" * n} for n in range(1, 5)]
    task = task_from_dataset(rows, reward_funcs=asks)
    sampler = SAMPLER.replace(rank=MaxProb(), commit=SoftThreshold(tau=0.2))
    found = evaluate(policy, task, sampler, completions=tmp_path / "c.jsonl")
    values = [answer.reward.value for answer in found.answers]
    assert values == [100 * answer.steps + answer.tokens for answer in found.answers]
    assert len({answer.steps for answer in found.answers}) > 1, "rows that took different numbers of steps"
    alone = evaluate(policy, task, sampler, batch_size=1)
    assert [answer.reward.value for answer in alone.answers] == values
    again = evaluate(policy, task, sampler, completions=tmp_path / "c.jsonl")  # samples nothing
    assert [answer.reward.value for answer in again.answers] == values


# --- what is drawn -----------------------------------------------------------------------------------------------


def test_completions_depend_on_seed_problem_and_sample_only(policy, tmp_path):
    for name, options in {
        "one": {},
        "small_batches": {"batch_size": 3},
        "first": {"limit": 4},
        "three": {"samples": 3, "batch_size": 7},
        "other_seed": {"seed": 1},
    }.items():
        evaluate(policy, sudoku(5), SAMPLER, completions=tmp_path / f"{name}.jsonl", **options)
    one, three = texts(tmp_path / "one.jsonl"), texts(tmp_path / "three.jsonl")
    assert list(one) == [(i, 0) for i in range(5)]
    assert texts(tmp_path / "small_batches.jsonl") == one
    assert texts(tmp_path / "first.jsonl") == {key: one[key] for key in list(one)[:4]}
    assert {key: text for key, text in three.items() if key[1] == 0} == one
    assert len(three) == 15 and len(set(three.values())) == 15  # a random model: 16 characters never come twice
    assert not set(one.values()) & set(texts(tmp_path / "other_seed.jsonl").values())


def test_a_row_holds_what_grading_needs_and_what_made_it(policy, tmp_path):
    task = under_protocol(sudoku(), "d1")
    found = evaluate(policy, task, SAMPLER, completions=tmp_path / "c.jsonl", model="here", seed=5, batch_size=4)
    rows = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [task[i].prompt for i in range(10)]
    assert [(row["puzzle"], row["solution"]) for row in rows] == [tuple(task[i].fields.values()) for i in range(10)]
    record = rows[0]["evaluation"]
    assert {name: record[name] for name in ("task", "version", "protocol", "split", "model", "seed", "weights")} == {
        "task": "sudoku",
        "version": Sudoku.version,
        "protocol": "d1",
        "split": "test",
        "model": "here",
        "seed": 5,
        "weights": fingerprint(policy),
    }
    assert record["settings"]["clues"] == [10, 12] and record["sampler"].startswith(
        "Unmask(max_new_tokens=16, diffusion_steps=4,"
    )
    # three batches of four steps each: 4, 4 and 2 problems share 4 model calls
    assert [row["evaluation"]["forwards"] for row in rows] == [1.0] * 8 + [2.0] * 2
    assert found.summary["forwards"] == 12 and found.summary["seconds"] > 0
    assert found.summary["tokens"] == sum(row["evaluation"]["tokens"] for row in rows) == 160
    regraded = grade_file(tmp_path / "c.jsonl", task="sudoku", protocol="d1")
    assert regraded.pop("problems") == 10
    assert {name: found.summary[name] for name in regraded} == regraded


def test_means_are_the_same_with_and_without_a_file(policy, tmp_path):
    plain = evaluate(policy, sudoku(), SAMPLER).means
    assert evaluate(policy, sudoku(), SAMPLER, completions=tmp_path / "c.jsonl").means == plain
    assert set(plain) == {"reward", "parsed", "solve_rate", "cell_accuracy", "givens_kept"}


# --- kill and resume ---------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def dying(calls, seen):
    """The sampler, which dies instead of answering when it has been called that often; `seen` counts rows."""

    def sampler(policy, prompts, generator):
        if len(seen) == calls:
            raise Killed
        seen.append(len(prompts.tokens))
        return SAMPLER(policy, prompts, generator)

    return sampler


def test_a_killed_evaluation_loses_no_finished_completion_and_ends_with_the_same_numbers(policy, tmp_path):
    path, seen = tmp_path / "c.jsonl", []
    run = partial(evaluate, policy, sudoku(), completions=path, batch_size=3)
    whole = evaluate(policy, sudoku(), dying(99, []), completions=tmp_path / "whole.jsonl", batch_size=3)
    with pytest.raises(Killed):
        run(dying(2, seen))
    part = tmp_path / "c.part0.jsonl"
    assert len(part.read_text().splitlines()) == 6 and not path.exists()
    part.write_text(part.read_text() + '{"puzzle": "12')  # the kill came in the middle of a line
    again = run(dying(99, seen))
    assert seen == [3, 3, 3, 1]  # the first two batches are not run again
    assert not part.exists() and texts(path) == texts(tmp_path / "whole.jsonl")
    cost = ("seconds", "forwards")
    assert {n: v for n, v in again.summary.items() if n not in cost} == {
        n: v for n, v in whole.summary.items() if n not in cost
    }
    assert again.summary["forwards"] == whole.summary["forwards"] == 16


def test_a_batch_of_which_some_rows_are_lost_is_run_whole_and_only_they_are_added(policy, tmp_path):
    path, seen = tmp_path / "c.jsonl", []
    counting = dying(99, seen)
    evaluate(policy, sudoku(), counting, completions=path, batch_size=4)
    before = path.read_text().splitlines()
    before[2] = json.dumps(json.loads(before[2]) | {"completion": sudoku()[2].solution})  # unlike a new sample
    path.write_text("\n".join(before[:3] + before[5:]) + "\n")
    graded = evaluate(policy, sudoku(), counting, completions=path, batch_size=4)
    solved = [answer.reward.breakdown["solve_rate"] == 1 for answer in graded.answers]
    assert solved.index(True) == 2, "the stored completion is graded"
    after = path.read_text().splitlines()
    same = lambda line: json.loads(line)["completion"]  # noqa: E731
    assert [same(line) for line in after] == [same(line) for line in before]
    kept = [[line for i, line in enumerate(lines) if i not in (2, 3, 4)] for lines in (after, before)]
    assert kept[0] == kept[1]
    assert seen == [4, 4, 2, 4, 4]  # rows 3 and 4 lie in the first two batches; the third is not sampled again


def test_a_finished_file_is_extended_and_graded_again_under_another_protocol(policy, tmp_path):
    path, seen = tmp_path / "c.jsonl", []
    evaluate(policy, sudoku(), SAMPLER, completions=path, limit=4)
    counting = dying(99, seen)
    counting_evaluate = partial(evaluate, policy, sudoku(), counting, completions=tmp_path / "d.jsonl", batch_size=4)
    counting_evaluate(limit=4)
    found = counting_evaluate()
    assert seen == [4, 4, 2] and found.summary["n"] == 10
    graded = evaluate(policy, under_protocol(sudoku(), "d1"), counting, completions=tmp_path / "d.jsonl", batch_size=4)
    assert seen == [4, 4, 2] and graded.summary["protocol"] == "d1"


def test_completions_of_anything_else_are_refused(policy, tmp_path):
    path = tmp_path / "c.jsonl"
    run = partial(evaluate, policy, sudoku(), SAMPLER, completions=path)
    run()
    refuses(r"made with seed=0, not 1; give another output_dir", lambda: run(seed=1))
    with pytest.raises(
        ValueError, match=r"made with sampler=Unmask\(.*temperature=1.0.*, not Unmask\(.*temperature=0.5"
    ):
        evaluate(policy, sudoku(), SAMPLER.replace(temperature=0.5), completions=path)
    other = tiny_masked_lm(**MODEL, seed=1)
    refuses("made with weights=", lambda: evaluate(other, sudoku(), SAMPLER, completions=path))
    refuses("has another problem 0: its puzzle is", lambda: evaluate(policy, sudoku(seed=1), SAMPLER, completions=path))
    path.write_text('{"completion": "1"}\n')
    refuses(r"c.jsonl, line 1: not a stored completion", run)


def test_fingerprints_tell_weights_apart(policy):
    other = tiny_masked_lm(**MODEL)
    assert fingerprint(other) == fingerprint(policy)
    assert fingerprint(quantized_copy(policy, Float8WeightOnly())) != fingerprint(policy)
    with torch.no_grad():
        largest = max(other.module.parameters(), key=torch.Tensor.numel)
        largest.view(-1)[500] += 1e-3
    assert fingerprint(other) != fingerprint(policy)


def test_folding_survives_a_kill_between_the_file_and_its_parts(tmp_path):
    line = lambda i, text: json.dumps({"completion": text, "evaluation": {"problem": i, "sample": 0}}) + "\n"  # noqa: E731
    path, first, second = (tmp_path / name for name in ("c.jsonl", "c.part0.jsonl", "c.part1.jsonl"))
    first.write_text(line(0, "a") + line(2, "c"))
    second.write_text(line(1, "b") + '{"half')
    path.write_text(line(0, "older"))  # the file was replaced, its parts were not deleted yet
    (tmp_path / ".c.jsonl.partial").write_text("rubbish of an earlier kill")
    merge_parts(path)
    assert list(texts(path).items()) == [((0, 0), "a"), ((1, 0), "b"), ((2, 0), "c")]
    assert [p.name for p in tmp_path.iterdir()] == ["c.jsonl"]


@pytest.mark.parametrize(("count", "processes"), [(3, 5), (7, 3), (6, 3)])
def test_processes_share_the_problems_however_many_they_are(policy, monkeypatch, count, processes):
    """Each problem is completed by one process; some may have none."""
    monkeypatch.setattr("dllm_rl.evaluation.evaluate.gather_objects", lambda answers, processes: answers)
    done = []
    for index in range(processes):
        found = evaluate(policy, sudoku(count), SAMPLER, accelerator=OneProcess(processes, index))
        done += [answer.problem for answer in found.answers]
    assert sorted(done) == list(range(count))


@pytest.mark.slow
def test_two_processes_give_what_one_gives(policy, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import json, os, sys\n"
        "from test_evaluate import MODEL, SAMPLER, sudoku\n"
        "from dllm_rl import evaluate\n"
        "from dllm_rl.distributed.collectives import make_accelerator\n"
        "from dllm_rl.models.tiny import tiny_masked_lm\n"
        "options = {'batch_size': 3, 'completions': 'two.jsonl', 'accelerator': make_accelerator()}\n"
        "found = evaluate(tiny_masked_lm(**MODEL), sudoku(), SAMPLER, **options)\n"
        "open('summary' + os.environ['RANK'], 'w').write(json.dumps(found.summary))\n"
    )
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        f"{ROOT}/recipes/accelerate/cpu_2.yaml",
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests/support", Path(__file__).parent))),
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run([*launch, str(script)], check=True, cwd=tmp_path, env=environment, capture_output=True)
    one = evaluate(policy, sudoku(), SAMPLER, batch_size=3, completions=tmp_path / "one.jsonl")
    assert texts(tmp_path / "two.jsonl") == texts(tmp_path / "one.jsonl") and len(one.answers) == 10
    both = [json.loads((tmp_path / f"summary{rank}").read_text()) for rank in (0, 1)]
    assert both[0] == both[1]
    same = lambda summary: {**summary, "seconds": 0}  # noqa: E731
    assert same(both[0]) == json.loads(json.dumps(same(one.summary)))
    assert sorted(p.name for p in tmp_path.glob("*.jsonl")) == ["one.jsonl", "two.jsonl"]


def test_the_seconds_of_a_batch_are_shared_by_its_rows(policy, monkeypatch):
    clock = iter([0.0, 6.0])
    monkeypatch.setattr("dllm_rl.evaluation.evaluate.time.perf_counter", lambda: next(clock))
    found = evaluate(policy, sudoku(size=3), SAMPLER)
    assert [answer.seconds for answer in found.answers] == [2.0] * 3
    assert found.summary["seconds"] == 6.0


# --- numbers -----------------------------------------------------------------------------------------------------


def test_means_and_intervals_by_hand():
    found = Evaluation(answers([1, 0, 1, 1]), {"seed": 0}).summary
    assert (found["n"], found["samples"], found["tokens"], found["forwards"], found["seconds"]) == (4, 1, 12, 2, 1.0)
    # of each answer 3 tokens, half a forward of its batch, and 5 forwards of its own
    stepped = Evaluation(tuple(replace(answer, steps=5) for answer in answers([1, 0, 1, 1])), {}).summary
    assert (stepped["forwards_per_answer"], stepped["tokens_per_forward"]) == (5, 3 / 5)
    assert found["accuracy"] == found["reward"] == 0.75
    assert found["accuracy_interval"] == list(wilson(3, 4))
    assert found["parsed"] == 1.0 and found["parsed_interval"] == list(wilson(4, 4))
    assert not [name for name in found if name.startswith(("pass@", "frac_reward"))]
    # a reward is a number by nature, also where all of them are 0 or 1
    assert interval("reward", [1.0] * 4, [1.0] * 4) is None and interval("accuracy", [1.0] * 4, [1.0] * 4)[0] < 1
    # unequal numbers of completions: ten right problems of 8, ten wrong ones of 2, of which half are right
    low, high = interval("accuracy", [8.0] * 10 + [0.0] * 10, [8.0] * 10 + [2.0] * 10)
    assert 0.5 < low < 0.8 < high < 1.0
    assert interval("accuracy", [8.0, 2.0], [8.0, 2.0]) == wilson(2, 2) and interval(
        "parsed", [0.0] * 3, [1, 2, 3]
    ) == wilson(0, 3)
    # a mean of other numbers is resampled: quarter, half -> all resampled means lie between them
    low, high = Evaluation(answers([0.25, 0.5] * 20), {}).summary["accuracy_interval"]
    assert 0.25 < low < 0.375 < high < 0.5


def test_samples_of_a_problem_are_resampled_together():
    """40 problems, all of whose 10 samples agree: as uncertain as 40 trials, not as 400."""
    together = [float(i % 2) for i in range(40) for _ in range(10)]
    found = Evaluation(answers(together, per_problem=10), {}).summary
    assert found["accuracy_interval"] == list(wilson(20, 40))
    mixed = Evaluation(answers([*together[:-1], 0.0], per_problem=10), {}).summary["accuracy_interval"]
    assert mixed == pytest.approx(wilson(20, 40), abs=0.03)


def test_pass_at_k_by_hand():
    """4 samples; 0, 1, 2, 4 right: two equal groups. pass@1 = 7/16; pass@2: 0, 1-3/6, 1-1/6, 1; pass@4: 0, 1, 1, 1."""
    right = [0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 1, 0, 1, 1, 1, 1]
    found = Evaluation(answers(right, per_problem=4, name="solve_rate"), {}).summary
    assert found["pass@1"] == found["solve_rate"] == pytest.approx(7 / 16)
    assert found["pass@2"] == pytest.approx((0 + 1 / 2 + 5 / 6 + 1) / 4)
    assert found["frac_reward_zero_std"] == 0.5
    assert found["pass@4"] == 0.75 and found["pass@4_interval"] == list(wilson(3, 4))
    low, high = found["pass@2_interval"]
    assert 0 <= low < found["pass@2"] < high <= 1
    three = Evaluation(answers([1, 0, 0], per_problem=3), {}).summary
    assert [name for name in three if name.startswith("pass@") and "_" not in name] == ["pass@1", "pass@2", "pass@3"]


def test_cells_that_a_protocol_counts_are_summed_before_dividing():
    def counted(right, empty):
        return Reward(right / max(empty, 1), True, {"cell_accuracy": 0.0, "correct_cells": right, "empty_cells": empty})

    rows = [
        GradedAnswer(i, 0, counted(*cells), 1, 1.0, 1.0) for i, cells in enumerate([(1.0, 2.0), (6.0, 8.0), (0.0, 0.0)])
    ]
    assert Evaluation(tuple(rows), {}).sums["cell_accuracy"] == {0: (1.0, 2.0), 1: (6.0, 8.0)}
    assert Evaluation(tuple(rows), {}).means == {"cell_accuracy": 0.7, "parsed": 1.0, "reward": pytest.approx(1.25 / 3)}


def test_a_metric_that_some_completions_lack_is_a_mean_over_the_others():
    rows = [GradedAnswer(i, 0, Reward(1.0, True, {"length": 2.0} if i else {}), 1, 1.0, 1.0) for i in range(3)]
    assert Evaluation(tuple(rows), {}).means["length"] == 2.0


@pytest.mark.slow
def test_intervals_cover_the_truth():
    """Over simulated evaluations of 50 problems with 4 samples each, about 95 % of the intervals hold the truth."""
    rng, covered, trials = np.random.default_rng(0), {"accuracy": 0, "graded": 0}, 100
    for _ in range(trials):
        chance = rng.beta(2, 2, size=50)  # problems differ in difficulty; the mean is 1/2
        right = rng.random((50, 4)) < chance[:, None]
        graded = rng.exponential(1.0, size=50)
        values = {
            "accuracy": (right.sum(1).astype(float).tolist(), [4.0] * 50),
            "graded": (graded.tolist(), [1.0] * 50),
        }
        for (name, found), truth in zip(values.items(), (0.5, 1.0), strict=True):
            low, high = interval(name, *found)
            covered[name] += low <= truth <= high
    assert 0.88 <= covered["accuracy"] / trials <= 1.0  # standard error of the share: 0.022
    assert 0.84 <= covered["graded"] / trials <= 0.99  # a percentile bootstrap of a skewed mean falls somewhat short


def test_ratios_of_sums():
    assert mean([1.0, 2.0], [2.0, 2.0]) == 0.75


# --- errors ------------------------------------------------------------------------------------------------------


def test_batch_size_counts_completions(policy, tmp_path):
    seen = []

    def counting(*arguments):
        rollout = SAMPLER(*arguments)
        seen.append(len(rollout.tokens))
        return rollout

    evaluate(policy, sudoku(6), counting, samples=2, batch_size=4)
    assert seen == [4, 4, 4]
    seen.clear()
    found = evaluate(policy, sudoku(2), counting, samples=5, batch_size=2, completions=tmp_path / "parts.jsonl")
    assert seen == [2, 2, 1] * 2 and len(found.answers) == 10
    assert texts(tmp_path / "parts.jsonl").keys() == {(problem, sample) for problem in range(2) for sample in range(5)}


def test_counts_below_one_are_refused(policy):
    for name in ("samples", "batch_size", "limit"):
        with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
            evaluate(policy, sudoku(), SAMPLER, **{name: 0})


def test_samples_that_would_all_be_equal_are_refused(policy):
    for sampler in (
        Unmask(max_new_tokens=16, diffusion_steps=4),
        Unmask(max_new_tokens=16, rank=Entropy(), commit=Threshold(tau=0.9)),
        Autoregress(max_new_tokens=3, temperature=0),
    ):
        with pytest.raises(ValueError, match="samples=3 at temperature=0 would all be equal; give a temperature"):
            evaluate(policy, sudoku(2), sampler, samples=3)
        with pytest.raises(ValueError, match="num_generations=2 at temperature=0 would all be equal"):
            complete_problems(policy, [Problem("1=")], sampler, num_generations=2)
    for sampler in (Unmask(max_new_tokens=16, temperature=1.0, top_k=1), Autoregress(max_new_tokens=3, top_k=1)):
        with pytest.raises(ValueError, match=r"samples=2 with top_k=1 would all be equal; leave top_k out, or"):
            evaluate(policy, sudoku(2), sampler, samples=2)
    in_random_order = Unmask(max_new_tokens=16, diffusion_steps=16, rank=RandomOrder())
    assert len(evaluate(policy, sudoku(1), in_random_order, samples=2).answers) == 2

    class OfItsOwn(Unmask):  # may draw in a way of its own
        def __call__(self, *arguments, **keywords):
            return SAMPLER(*arguments, **keywords)

    assert len(evaluate(policy, sudoku(1), OfItsOwn(max_new_tokens=16), samples=2).answers) == 2


@dataclass(frozen=True)
class Raising(Mini):
    def reward(self, problem, completion):
        raise KeyError("no grade")


def test_a_grader_that_raises_stops_the_run_with_what_it_was_given():
    with pytest.raises(
        RuntimeError, match=r"grader of task 'mini' raised on problem Problem\(prompt='.*completion '7'"
    ):
        grade(Raising(), [Raising()[0]], ["7"])


def test_fields_that_rows_need_for_themselves_are_refused(policy):
    @dataclass(frozen=True)
    class Clashing(Mini):
        def __getitem__(self, index):
            return replace(super().__getitem__(index), fields={"sorted": "1", "evaluation": 1})

    with pytest.raises(ValueError, match="field 'evaluation' of the problem has a name that stored completions need"):
        evaluate(policy, Clashing(size=2), SAMPLER)


# --- text --------------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat_policy():
    made = tiny_masked_lm(**MODEL | {"characters": "<>abcdefghijklmnopqrstuvwxyz "})
    made.tokenizer.chat_template = TEMPLATE
    return made


def test_an_assistants_last_message_begins_its_turn():
    chat = chat_policy()
    spelled = lambda prompt: chat.tokenizer.decode(prompt_ids(chat, prompt))  # noqa: E731
    asked = [{"role": "user", "content": "hi"}]
    assert spelled(asked) == "<user>hi<assistant>"
    assert spelled([*asked, {"role": "assistant", "content": "<reasoning> "}]) == "<user>hi<assistant><reasoning> "


def test_prompts_that_a_model_cannot_read_are_refused_in_a_line(policy):
    refuses("no chat template; give plain text", lambda: prompt_ids(policy, [{"role": "user", "content": "1"}]))
    refuses("text '1x' cannot be tokenized by this model", lambda: prompt_ids(policy, "1x"))


def test_completions_end_before_the_first_end_token(policy):
    (a, b), eos = policy.tokenizer.encode("45", add_special_tokens=False), EOS
    assert policy.spec.eos_ids == (EOS,)
    tokens = torch.tensor([[a, a, b, eos, b], [a, eos, a, b, a]])
    chosen = torch.tensor([[False, True, True, True, True], [False, False, True, True, True]])
    blank = torch.zeros(tokens.shape)
    rollout = Rollout(tokens, chosen | True, chosen, blank.long(), blank, group=torch.arange(len(tokens)))
    assert [before_end(policy, ids) for ids in completion_token_ids(rollout)] == [[a, b], [a, b, a]]
    assert decode(policy, rollout) == ["45", "454"]
    several = copy.copy(policy)
    several.spec = replace(policy.spec, eos_ids=(policy.spec.mask_id, b))  # any of several ends it
    assert [before_end(several, ids) for ids in completion_token_ids(rollout)] == [[a], [a]]


def test_problems_and_rewards_are_public():
    assert Reward(1.0, True).breakdown == {} and Problem("1").solution is None


def test_a_completion_without_a_reward_is_stored_and_not_counted(policy, tmp_path):
    """The judge grades every other completion, all as right: the mean is that of the graded ones."""

    def accuracy(completions, place, **_):
        return [None if number % 2 else 1.0 for number in place]

    rows = [{"prompt": f"{place}=", "place": place} for place in range(4)]
    task = task_from_dataset(rows, reward_funcs=accuracy)
    found = evaluate(policy, task, SAMPLER, completions=tmp_path / "c.jsonl", batch_size=1)
    assert (found.summary["accuracy"], found.summary["reward"], found.summary["n"]) == (1.0, 1.0, 4)
    assert found.summary["accuracy_interval"] == list(wilson(2, 2)) and found.summary["parsed"] == 1.0
    stored = [json.loads(line)["evaluation"] for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert [row["reward"] for row in stored] == [1.0, None, 1.0, None] and stored[1]["parts"] == {}
    again = evaluate(policy, task, SAMPLER, completions=tmp_path / "c.jsonl", batch_size=1)
    assert again.means == found.means
    nothing = task_from_dataset(rows, reward_funcs=lambda completions, **_: [None] * len(completions))
    with pytest.raises(ValueError, match="no completion of task 'dataset' has a reward"):
        _ = evaluate(policy, nothing, SAMPLER).summary
