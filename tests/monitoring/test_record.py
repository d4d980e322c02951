"""What a run says of its steps: the numbers of its line, and whether it learns."""

import re

import pytest

from dllm_rl import grpo, tiny_masked_lm
from dllm_rl.cli.main import main
from dllm_rl.files import read_json
from dllm_rl.monitoring.health import learning_problems
from dllm_rl.monitoring.log import RunLog
from dllm_rl.monitoring.record import RunRecord

pytestmark = pytest.mark.usefixtures("no_rehearsal")

ROW = {"reward": 0.5, "frac_reward_zero_std": 0.5, "grad_norm": 1.0, "completions/clipped_ratio": 0.1, "parsed": 1.0}
NO_MIX = {"frac_reward_zero_std": 1.0, "grad_norm": 0.0}
WITH_ADVANTAGES = {"band/positive": 1.0, "grad_norm": 1.0}


def test_the_line_has_every_number_by_hand():
    rows = [
        ROW | {"num_tokens": 100.0, "step_time": 9.0, "time/warm-up": 6.0, "time/evaluation": 1.0},  # 2 s of training
        ROW | {"num_tokens": 500.0, "step_time": 4.0, "eval/reward": 0.25, "eval/b": 0.125, "eval/parsed": 1.0},
        ROW | {"num_tokens": 600.0, "step_time": 4.0, "rewards/b/mean": 1 / 3, "rewards/a/mean": 2.0},
    ]
    assert RunRecord().line() == ""
    record = RunRecord(rows)
    assert record.line() == (
        "reward 0.5 (b 0.333, a 2)  held-out at 2: reward 0.25 (b 0.125)  mixed groups 0.5  grad norm 1  cut 0.1  "
        "4 s a step, 50 tokens a second"  # the medians of 2, 4, 4 and of 50, 100, 25
    )
    record.add({"reward": 1.0, "rewards/own/mean": 1.0})
    assert record.line().startswith("reward 1  held-out at 2: "), "one function that is the reward has no name"
    assert RunRecord([{"loss": 2.5, "eval/loss": 3.0}]).line() == "loss 2.5  held-out at 1: loss 3"


def test_a_long_run_keeps_little():
    record = RunRecord({"step": step, "reward": float(step), "eval/reward": 0.0} for step in range(1000))
    assert [row["step"] for row in record.rows] == [*range(20), *range(980, 1000)]
    assert record.line() == "reward 999  held-out at 1000: reward 0"


def series(**changes):
    """Rows of 40 steps, whose metrics are numbers or functions of the step."""
    return [
        ROW | {name: value(step) if callable(value) else value for name, value in changes.items()} for step in range(40)
    ]


PROBLEMS = {  # what is said of a run at its last step
    "31 of 32 groups equal": (series(frac_reward_zero_std=31 / 32), ["not learning: few mixed groups"]),
    "few are mixed, and half of the steps idle": (
        series(frac_reward_zero_std=lambda step: 1.0 if step % 2 else 0.6, grad_norm=lambda step: float(not step % 2)),
        ["not learning: few mixed groups"],
    ),
    "few are mixed": (series(frac_reward_zero_std=0.75), ["learning slowly: few mixed groups"]),
    "the worst prompts": (series(**NO_MIX, reward=0.0), ["not learning: constant reward"]),
    "constant after step 10": (
        series(
            frac_reward_zero_std=lambda step: 0.5 if step < 10 else 1.0,
            reward=lambda step: 0.4 + step % 2 / 5 if step < 10 else 0.25,
        ),
        ["not learning: constant reward"],
    ),
    "constant, and higher than before": (
        series(frac_reward_zero_std=lambda step: 0.5 if step < 10 else 1.0, reward=lambda step: min(step, 10) / 10),
        ["solved or stuck: constant reward"],
    ),
    "a solved task": (
        series(frac_reward_zero_std=lambda step: step / 40, reward=lambda step: step / 40),
        ["solved or stuck: few mixed groups"],  # 26 % mixed in the last 20 steps
    ),
    "solved in ten steps, with answers of a fixed length": (
        series(
            frac_reward_zero_std=lambda step: min(step, 10) / 10,
            reward=lambda step: 0.5 + min(step, 10) / 20,
            **{"completions/clipped_ratio": 1.0},
        ),
        ["solved or stuck: constant reward"],
    ),
    "noise that goes up a little": (
        series(frac_reward_zero_std=0.95, reward=lambda step: 0.3 * (step % 5 == 0) + 0.001 * step),
        ["not learning: few mixed groups"],
    ),
    "all cut": (
        series(**{"completions/clipped_ratio": 1.0, "frac_reward_zero_std": 0.95}),
        ["not learning: few mixed groups", "not learning: cut completions"],
    ),
    "all cut, hardly an answer": (
        series(**{"completions/clipped_ratio": 1.0, "parsed": 0.2}),
        ["learning slowly: cut completions"],
    ),
    "no gradient where groups are mixed": (series(grad_norm=0.0), ["not learning: zero gradient"]),
    "every update is skipped": (series(skipped_updates=1.0), ["not learning: skipped updates"]),
    "six of seven updates are skipped": (
        series(skipped_updates=lambda step: float(step % 7 > 0)),
        ["learning slowly: skipped updates"],
    ),
    "of three updates a step two are skipped": (
        series(skipped_updates=2.0, **{f"grad_norm/iteration_{i}": 1.0 for i in range(3)}),
        ["learning slowly: skipped updates"],
    ),
    "no gradient in SFT": ([{"loss": 1.0, "grad_norm": 0.0}] * 40, ["not learning: zero gradient"]),
}
FINE = {
    "half of the groups": series(),
    "the usual task of a fixed length": series(**{"completions/clipped_ratio": 1.0}),
    "the same, while it is learned": series(
        **{"completions/clipped_ratio": 1.0, "parsed": 0.2, "reward": lambda step: step / 40}
    ),
    "a prompt a step, half of them mixed": series(
        frac_reward_zero_std=lambda step: float(step % 2), grad_norm=lambda step: float(not step % 2)
    ),
    "an outlier of three is skipped": series(skipped_updates=lambda step: float(step % 3 == 0)),
    "of three updates a step one is skipped": series(
        skipped_updates=1.0, **{f"grad_norm/iteration_{i}": 1.0 for i in range(3)}
    ),
    "updates without a gradient are skipped": series(
        frac_reward_zero_std=lambda step: float(step % 2),
        skipped_updates=lambda step: float(step % 2),
        grad_norm=lambda step: float(not step % 2),
    ),
    "rewards that are ranks in the group": series(reward=0.5),
    "replayed answers": series(**NO_MIX, **{"replay/updates": 2.0}),
    "advantages that compare groups": series(frac_reward_zero_std=1.0, **WITH_ADVANTAGES),
    "prompts drawn again": series(**NO_MIX | {"grad_norm": 1.0}, **{"dynamic_sampling/frac_reward_zero_std": 0.0}),
    "a teacher's rewards": series(**{"dynamic_sampling/frac_reward_zero_std": 1.0}),
    "SFT": [{"loss": 1.0, "grad_norm": 0.5}] * 40,
    "no numbers": [{}] * 40,
}


@pytest.mark.parametrize("name", [*PROBLEMS, *FINE])
def test_what_keeps_a_run_from_learning_is_said_and_nothing_else(name):
    rows, said = PROBLEMS.get(name) or (FINE[name], [])
    assert [f"{problem.state}: {problem.name}" for problem in learning_problems(rows)] == said
    assert learning_problems(rows[:19]) == [], "too early"
    kept = RunRecord(row | {"rollout_corr/ess": 1.0} for row in rows)
    assert [f"{problem.state}: {problem.name}" for problem in kept.problems] == said
    assert kept.line().endswith("healthy") == (not said)


def test_what_to_do_follows_what_was_seen():
    """With rewards by the prompt alone no group is mixed, though the mean reward changes."""
    texts = {}
    for equal in (1.0, 0.95):
        (problem,) = learning_problems(series(frac_reward_zero_std=equal, reward=lambda step: step % 3 / 3))
        texts[equal] = problem.text
    assert ": see whether the reward function looks at the completions, raise the temperature" in texts[1.0]
    assert "looks at the completions" not in texts[0.95] and ": raise the temperature" in texts[0.95]
    cut = learning_problems(series(**{"completions/clipped_ratio": 0.995, "parsed": 0.2}))[0].text
    assert cut.startswith("in the last 20 steps 99.5 % of the completions were cut at max_new_tokens: ")


@pytest.mark.parametrize("name", [name for name, (_, said) in PROBLEMS.items() if "not learning" in str(said)])
def test_a_dead_run_is_called_so_within_20_steps(name):
    """Those that die after step 10, at step 30."""
    rows, _ = PROBLEMS[name]
    assert any(problem.state == "not learning" for problem in learning_problems(rows[:30]))


def test_each_problem_is_said_once_and_again_if_it_gets_worse_or_after_a_resume(tmp_path, capsys):
    log = RunLog(tmp_path, start=0, main=True)
    for step in range(100):
        log.write(step, ROW | ({"frac_reward_zero_std": 0.8} if step < 30 else NO_MIX))
    log.close()
    said = re.findall("^warning: (.*): in the last 20 steps ", capsys.readouterr().out, re.MULTILINE)
    assert said == [
        "learning slowly, few mixed groups",
        "not learning, few mixed groups",
        "not learning, constant reward",
    ]
    resumed = RunLog(tmp_path, start=60, main=True)
    assert resumed.record.num_steps == 60 and len(resumed.record.rows) == 40
    resumed.write(60, ROW | NO_MIX)
    resumed.close()
    assert capsys.readouterr().out.count("warning: not learning, constant reward: ") == 1


def nothing(completions, **columns):
    return [0.0] * len(completions)


def of_few_prompts(prompts, completions, **columns):
    return [float(prompt in ("77=", "54=") and i % 2) for i, prompt in enumerate(prompts)]


def ended(completions, **columns):
    return [float(len(completion) < 2) for completion in completions]  # pays for an answer that ends early


@pytest.mark.parametrize(
    ("reward", "options", "names"),
    [
        (nothing, {}, ["constant reward"]),
        (nothing, {"beta": 0.1}, ["constant reward"]),  # whose update has a gradient
        (of_few_prompts, {}, ["few mixed groups"]),
        (ended, {"sampler_options": {"suppress": ("<eos>", "<pad>")}}, ["constant reward", "cut completions"]),
    ],
)
def test_a_dead_run_says_so_on_the_screen_in_status_and_in_the_summary(tmp_path, capsys, reward, options, names):
    model = tiny_masked_lm(characters="12345678=", hidden_size=16, num_layers=1, num_attention_heads=2)
    rows = [{"prompt": f"{a}{b}=", "answer": f"{b}{a}"} for a in "12345678" for b in "12345678"]
    sizes = {"max_new_tokens": 2, "train_batch_size": 2, "num_generations": 4, "num_steps": 20, "eval_steps": 0}
    grpo(model, rows, reward, output_dir=str(tmp_path), logging_steps=100, **sizes, **options)
    out = capsys.readouterr().out
    words = f"not learning ({', '.join(names)})"
    assert not [name for name in names if f"\nwarning: not learning, {name}: " not in out], out
    assert all(f"\nProblem:    not learning, {name}: " in out for name in names)
    assert "healthy" not in out and f"  {words}\n" in out
    assert [problem["name"] for problem in read_json(tmp_path / "summary.json")["problems"]] == names
    assert main(["status", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert f"  {words}\nnot learning, {names[0]}: in the last 20 steps " in shown
