"""A paid oracle: who calls it, what is remembered, how its budget ends a run, and that a killed run pays for no text
twice.
"""

import json
import os
import re
import signal
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import transformers
from forked import Child
from refusals import refuses
from run_outputs import metrics_of

from dllm_rl import grpo, grpo_recipe, make_policy, sft, tiny_masked_lm, train
from dllm_rl.callbacks import RunControl
from dllm_rl.groups import Late, Limits
from dllm_rl.integrations.oracle import Oracle
from dllm_rl.tasks import task_from_dataset

pytestmark = pytest.mark.usefixtures("no_rehearsal")

SPECIAL = ["<eos>", "<pad>", "<mask>"]
OPTIONS = {"num_steps": 6, "train_batch_size": 2, "num_generations": 8, "report_to": "none", "max_new_tokens": 3}
OPTIONS |= {"sampler_options": {"diffusion_steps": 1}}
ROWS = [{"prompt": ""}]


def model():
    return tiny_masked_lm(characters="ACD", hidden_size=32, num_layers=1)


def design(folder, reward, rows=ROWS, **settings):
    options = OPTIONS["sampler_options"] | {"suppress": SPECIAL}
    settings = OPTIONS | {"output_dir": str(folder), "sampler_options": options} | settings
    return grpo(model(), rows, reward, **settings)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class Counted:
    """A reward function that counts the texts of its calls."""

    def __init__(self):
        self.__name__ = "share_of_a"
        self.texts, self.sizes = [], []

    def __call__(self, completions):
        self.texts += completions
        self.sizes.append(len(completions))
        return [text.count("A") / 3 for text in completions]


def started(folder, function, **settings):
    folder.mkdir(exist_ok=True)
    oracle = Oracle(function, **settings)
    oracle.on_start(RunControl(folder, 0, 10))
    return oracle


def test_only_training_steps_call_and_each_text_once(tmp_path, rehearsal):
    """Not the rehearsal, the evaluations before, during and after the run; unwrapped, each of them calls."""
    plain, wrapped = Counted(), Counted()
    design(tmp_path / "plain", plain, eval_steps=1, num_steps=2)
    assert len(plain.texts) == 8 + 1 + 2 * 16 + 2 + 1
    oracle = Oracle(wrapped)
    summary = design(tmp_path / "run", oracle, eval_steps=1, num_steps=2)
    rows = metrics_of(tmp_path / "run")
    assert Counter(wrapped.texts).most_common(1)[0][1] == 1 and {*wrapped.texts} <= {*plain.texts}
    assert rows[-1]["oracle/calls"] == len(wrapped.texts) == oracle.calls and set(wrapped.sizes) == {1}
    assert [row["reward"] for row in rows] == [row["reward"] for row in metrics_of(tmp_path / "plain")]
    known = len(wrapped.texts)
    assert rows[0]["oracle/frac_repeated"] == 1 - rows[0]["oracle/calls"] / 16 and known < 2 * 16
    assert summary["eval_before"] == {}  # nothing is known yet
    texts = lines(tmp_path / "run" / "oracle.jsonl")
    assert [row["arguments"]["completions"] for row in texts] == wrapped.texts
    assert all(row["reward"] == row["arguments"]["completions"].count("A") / 3 for row in texts)


def test_the_best_texts_are_kept_and_their_mean_is_logged(tmp_path):
    counted = Counted()
    design(tmp_path, Oracle(counted, top_k=4), num_steps=2)
    best = lines(tmp_path / "best.jsonl")
    rewards = sorted((text.count("A") / 3 for text in counted.texts), reverse=True)[:4]
    assert [row["reward"] for row in best] == rewards
    last = metrics_of(tmp_path)[-1]
    assert last["oracle/best"] == rewards[0] and last["oracle/top"] == pytest.approx(sum(rewards) / 4)


@pytest.mark.parametrize("budget", [1, 7, 16, 19])
@pytest.mark.repeated(first_only=True)
def test_the_budget_ends_the_run_with_a_checkpoint_that_a_larger_one_continues(tmp_path, budget):
    counted = Counted()
    summary = design(tmp_path, Oracle(counted, budget=budget))
    assert len(counted.texts) == budget == metrics_of(tmp_path)[-1]["oracle/calls"]
    stopped = summary["stopped"]
    assert stopped["reason"] == f"the budget of {budget} calls of share_of_a is spent; a larger one continues"
    assert Path(summary["checkpoint"]).name == f"step-{stopped['step']:06d}" and stopped["step"] < 6
    again = design(tmp_path, Oracle(counted, budget=budget), resume_from_checkpoint="latest")
    assert again["stopped"] == stopped and len(counted.texts) == budget  # no further step
    design(tmp_path, Oracle(counted, budget=budget + 3), resume_from_checkpoint="latest")
    assert len(counted.texts) == len({*counted.texts}) == budget + 3
    assert len(metrics_of(tmp_path)) > stopped["step"]


@pytest.mark.parametrize(("size", "sizes"), [(1, [1, 1, 1, 1, 1]), (2, [2, 2, 1]), (5, [5]), (64, [5])])
def test_texts_are_called_in_batches_without_repeats(tmp_path, size, sizes):
    counted = Counted()
    oracle = started(tmp_path, counted, batch_size=size)
    assert oracle(completions=[*"ACADEFA"]) == [1 / 3, 0, 1 / 3, 0, 0, 0, 1 / 3]
    assert counted.sizes == sizes and counted.texts == [*"ACDEF"]
    assert oracle(completions=["A", "E"]) == [1 / 3, 0] and counted.sizes == sizes


def test_what_the_function_does_not_accept_does_not_distinguish_texts(tmp_path):
    seen = []

    def of_text(completions):
        return [float(len(seen) or 1) for text in completions]

    def of_all(completions, prompts, target):
        seen.append({"prompts": prompts, "target": target})
        return [1.0] * len(completions)

    rows = [{"prompt": "A", "target": 1}, {"prompt": "C", "target": 2}]
    for function, calls in ((of_text, 1), (of_all, 2)):
        oracle = started(tmp_path / function.__name__, function)
        task = task_from_dataset(rows, reward_funcs=oracle)
        assert [reward.value for reward in task.rewards([task[0], task[1], task[0]], ["D"] * 3)] == [1.0] * 3
        assert oracle.calls == calls
    assert seen == [{"prompts": ["A"], "target": [1]}, {"prompts": ["C"], "target": [2]}]


class Takes:
    def __call__(self, completions, target=None, **rest):
        return [0.0] * len(completions)


@pytest.mark.parametrize("function", [Takes(), lambda **columns: [0.0], lambda completions, *, a, **b: [0.0]])
def test_a_function_of_every_column_is_refused(function):
    refuses(r"of Oracle accepts every column, .*: name the columns that it reads", lambda: Oracle(function))


def test_a_noisy_function_is_called_for_each_text_up_to_its_budget(tmp_path):
    numbers = iter(range(100))
    oracle = started(tmp_path, lambda completions: [float(next(numbers)) for _ in completions], cache=False, budget=5)
    assert oracle(completions=[*"AAC"]) == [0, 1, 2] and oracle(completions=[*"ACDD"]) == [3, 4, None, None]
    assert oracle.calls == 5 and len(lines(tmp_path / "oracle.jsonl")) == 5


@pytest.mark.parametrize("value", [0.5, -2, True])
def test_a_stored_reward_is_the_one_that_was_given(tmp_path, value):
    """Also with columns that JSON writes otherwise: tuples; and after an incomplete line."""
    calls = []

    def reward(completions, extra):
        calls.append(extra)
        return [value] * len(completions)

    arguments = {"completions": ["Ä\n", "b"], "extra": [{"1": (2, 0.1)}, None]}
    first = started(tmp_path, reward)
    given = first(**arguments)
    assert given == [value] * 2 and first(**arguments) == given and first.without_calls()(**arguments) == given
    first._close()
    with (tmp_path / "oracle.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')
    second = started(tmp_path, reward)
    assert second(**arguments) == given and second.calls == 2 and len(calls) == 2
    second(completions=["c"], extra=[1])
    assert started(tmp_path, reward).calls == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "0.5"])
def test_a_number_that_is_refused_loses_none_of_the_others(tmp_path, bad):
    numbers = {"A": 1.0, "C": bad, "D": None, "E": 2.0}
    oracle = started(tmp_path, lambda completions: [numbers[text] for text in completions], batch_size=4)
    refuses("give a finite number, or None", lambda: oracle(completions=[*"ACDE"]))
    stored = [(row["arguments"]["completions"], row["reward"]) for row in lines(tmp_path / "oracle.jsonl")]
    assert stored == [("A", 1.0), ("D", None), ("E", 2.0)] and oracle.calls == 3
    numbers["C"] = 0.5
    again = started(tmp_path, lambda completions: [numbers[text] for text in completions], batch_size=4)
    assert again(completions=[*"ACE"]) == [1.0, 0.5, 2.0] and again.calls == 4


def test_novelty_by_hand(tmp_path):
    """1 / copies of what no earlier step measured, before and after the oracle's call; failed ones stay new."""
    oracle = started(tmp_path, lambda completions: [None if text == "D" else 1.0 for text in completions])
    batch = [*"AACD"]
    before = oracle.novelty(completions=batch)
    oracle(completions=batch)
    assert before == oracle.novelty(completions=batch) == [0.5, 0.5, 1, 1]
    oracle._run.step = 1
    assert oracle.novelty(completions=[*"ACDEDE"]) == [0, 0, 0.5, 0.5, 0.5, 0.5]
    oracle(completions=["E"])
    oracle._close()  # as when the run ends
    for step, e in ((1, 1), (2, 0)):  # a resume that repeats step 1, and one after it
        again = Oracle(Counted())
        again.on_start(RunControl(tmp_path, step, 10))
        assert again.novelty(completions=[*"ADE"]) == [0, 1, e]


def of_the_text(completions):
    return [1.0] * len(completions)


def of_the_row(completions, prompts):
    return [1.0] * len(completions)


@pytest.mark.parametrize(("function", "new"), [(of_the_text, [1 / 3] * 3), (of_the_row, [1, 0.5, 0.5])])
def test_novelty_tells_apart_what_the_function_does(tmp_path, function, new):
    oracle = started(tmp_path, function)
    rows = [{"prompt": "A", "target": 1}, {"prompt": "C", "target": 2}]
    task = task_from_dataset(rows, reward_funcs=[oracle, oracle.novelty], weights=[1.0, 0.5])
    graded = task.rewards([task[1], task[0], task[0]], ["D"] * 3)
    assert [reward.breakdown["novelty"] for reward in graded] == new
    assert [reward.value for reward in graded] == [1 + 0.5 * number for number in new]


@pytest.mark.slow
@pytest.mark.parametrize("at", [0, 1])
def test_novelty_is_logged_and_only_trains(tmp_path, at):
    """Its mean is the share of new texts, in each order of the functions; an evaluation's reward is the oracle's."""
    oracle = Oracle(Counted())
    functions, weights = [oracle], [1.0]
    functions.insert(at, oracle.novelty)
    weights.insert(at, 0.5)
    design(tmp_path, functions, reward_weights=weights, eval_steps=2)
    rows = metrics_of(tmp_path)
    repeated = [row["oracle/frac_repeated"] for row in rows]
    assert [row["rewards/novelty/mean"] for row in rows] == pytest.approx([1 - share for share in repeated])
    means = [row["rewards/share_of_a/mean"] + 0.5 * row["rewards/novelty/mean"] for row in rows]
    assert [row["reward"] for row in rows] == pytest.approx(means) and 0 < repeated[1] < 1
    evaluated = [row["eval/reward"] for row in rows if "eval/reward" in row]
    assert evaluated and all(reward * 3 in range(4) for reward in evaluated)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("size", [1, 2, 64])
def test_a_failed_measurement_is_counted_and_called_again(tmp_path, cache, size):
    """None is no reward: neither in this run nor in a resumed one; a number replaces it, and it replaces none."""
    failing, calls = {"A", "C"}, []

    def assay(completions):
        calls.extend(completions)
        return [None if text in failing else float(ord(text)) for text in completions]

    oracle = started(tmp_path, assay, cache=cache, batch_size=size, budget=9)
    assert oracle(completions=[*"ACD"]) == [None, None, 68.0] and oracle.calls == 3
    failing.remove("A")
    assert oracle(completions=[*"AC"]) == [65.0, None] and oracle.calls == 5
    failing.add("D")  # known by now
    assert oracle.without_calls()(completions=[*"ACD"]) == [65.0, None, 68.0]
    assert oracle(completions=["D"]) == [68.0 if cache else None]
    assert oracle.without_calls()(completions=["D"]) == [68.0]
    oracle._close()  # as when the run ends
    failing.clear()
    again = started(tmp_path, assay, budget=9)
    assert again.calls == len(calls) == 5 + (not cache)
    assert again(completions=[*"ACD"]) == [65.0, 67.0, 68.0] and again.calls == len(calls) == 6 + (not cache)
    first = lines(tmp_path / "oracle.jsonl")[0]
    assert first == {"step": 0, "reward": None, "arguments": {"completions": "A"}}


def test_a_resume_with_a_smaller_budget_than_its_calls_pays_for_none(tmp_path):
    counted = Counted()
    started(tmp_path, counted, budget=9)(completions=["A", "C", "D"])
    again = started(tmp_path, counted, budget=1)
    assert again.calls == 3 and again(completions=["AA", "CC", "DD", "A"]) == [None, None, None, 1 / 3]
    assert counted.texts == ["A", "C", "D"]


def test_failed_measurements_use_up_the_budget(tmp_path):
    calls = []

    def mostly(completions):
        calls.extend(completions)
        return [1.0 if text == calls[0] else None for text in completions]

    summary = design(tmp_path, Oracle(mostly, budget=20))
    assert len(calls) == 20 > len({*calls}) and "budget of 20 calls of mostly" in summary["stopped"]["reason"]
    best = [row["arguments"]["completions"] for row in lines(tmp_path / "best.jsonl")]
    assert best == calls[:1] and calls.count(calls[0]) == 1


class Breaks(Counted):
    """Raises at one call, once, as a service that is away for a moment."""

    def __init__(self, at, error):
        super().__init__()
        self.at, self.error = at, error

    def __call__(self, completions):
        numbers = super().__call__(completions)
        if len(self.sizes) == self.at:
            raise self.error
        return numbers


@pytest.mark.parametrize(
    ("error", "size", "cache"),
    [(KeyError("away"), 1, True), (TimeoutError(), 3, False), (SystemExit(3), 1, False), (OSError(5), 64, True)],
)
@pytest.mark.repeated(first_only=True)
def test_an_exception_ends_the_run_without_another_call(tmp_path, size, cache, error):
    """The failing text is not called again, nor one after it; a resume goes on with what is not measured."""
    at = 1 if size == 64 else 3
    breaks = Breaks(at, error)
    oracle = Oracle(breaks, batch_size=size, cache=cache)
    with pytest.raises(RuntimeError, match=f"in one call: .*{type(error).__name__}") as caught:
        design(tmp_path, oracle, num_steps=2)
    assert len(breaks.sizes) == at
    last = breaks.texts[-1]
    assert isinstance(error, SystemExit) or f'{{"completions": "{last}"}}' in str(caught.value)
    paid = sum(breaks.sizes[:-1])
    assert len(lines(tmp_path / "oracle.jsonl")) == oracle.calls == paid
    design(tmp_path, Oracle(breaks, batch_size=size, cache=cache), num_steps=2, resume_from_checkpoint="latest")
    assert len(metrics_of(tmp_path)) == 2


@pytest.mark.slow
def test_a_checkpoint_of_another_folder_needs_its_paid_calls(tmp_path):
    """Without them the budget would begin anew, and known texts would be paid for again."""
    first = Counted()
    design(tmp_path / "a", Oracle(first, budget=400), save_steps=1, save_total_limit=9)
    start = str(tmp_path / "a" / "checkpoints" / "step-000003")
    resume = {"resume_from_checkpoint": start, "output_dir": str(tmp_path / "b")}
    second = Counted()
    with pytest.raises(ValueError, match=r"oracle.jsonl of this output_dir has 0 of the \d+ calls .* copy that run's"):
        design(tmp_path / "b", Oracle(second, budget=400), **resume)
    assert not second.texts


def test_an_exception_of_another_reward_calls_no_text_again(tmp_path):
    counted = Counted()

    def picky(completions):
        raise KeyError("no")

    with pytest.raises(RuntimeError, match="completions in one call: KeyError"):
        design(tmp_path, [Oracle(counted, cache=False), picky])
    assert not counted.texts  # the rehearsal finds it

    def late(completions):
        if counted.texts:
            raise KeyError("no")
        return [0.0] * len(completions)

    with pytest.raises(RuntimeError, match="completions in one call: KeyError"):
        design(tmp_path / "late", [Oracle(counted, cache=False), late])
    assert len(counted.texts) == 16


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("weight", [1.0, 0.0])
@pytest.mark.parametrize(("settings", "measured"), [({}, "AD"), ({"budget": 3}, "A"), ({"budget": 1}, "A")])
def test_without_a_measurement_another_reward_trains_nothing(tmp_path, at, weight, settings, measured):
    """A failed one or one beyond the budget leaves no reward, in training and in evaluations; other None do not."""
    oracle = started(tmp_path, lambda completions: [None if text == "C" else 5.0 for text in completions], **settings)

    def penalty(completions):
        return [None if text == "A" else -1.0 for text in completions]

    for reader in (oracle, oracle.without_calls()):
        functions, weights = [penalty], [2.0]
        functions.insert(at, reader)
        weights.insert(at, weight)
        task = task_from_dataset(ROWS, reward_funcs=functions, weights=weights)
        rewards = dict(zip("ACED", task.rewards([task[0]] * 4, [*"ACED"]), strict=True))
        assert rewards["A"].value == 5 * weight and {name for name in "ACD" if rewards[name].parsed} == {*measured}
        assert rewards["C"].value is None and not rewards["C"].breakdown
        assert rewards["D"].value == (5 * weight - 2 if "D" in measured else None)


@pytest.mark.repeated(every=3)
@pytest.mark.parametrize("settings", [{}, {"limits": Limits(reward_timeout=7.0)}, {"save_steps": 20}])
@pytest.mark.parametrize("wrapped", [[Oracle(Counted())], [Counted(), Oracle(Counted())]])
def test_a_paid_step_has_no_time_limit_and_is_saved(settings, wrapped):
    recipe = grpo_recipe(model(), ROWS, wrapped, **settings)
    assert recipe.limits == settings.get("limits", Limits(reward_timeout=None))
    assert recipe.saves.steps == settings.get("save_steps", 1)
    plain = grpo_recipe(model(), ROWS, Counted())
    assert (plain.limits.reward_timeout, plain.saves.steps) == (600.0, 50)


def test_paid_rewards_are_not_overwritten(tmp_path):
    counted = Counted()
    design(tmp_path, Oracle(counted, budget=5))
    paid = tmp_path / "oracle.jsonl"
    before = paid.read_bytes()
    for reward in (Oracle(counted), counted):
        with pytest.raises(ValueError, match=r"oracle\.jsonl, and overwrite_output_dir=True would delete them; move"):
            design(tmp_path, reward, overwrite_output_dir=True)
    assert paid.read_bytes() == before and len(counted.texts) == 5
    design(tmp_path, Oracle(counted, budget=7), overwrite_output_dir=True, resume_from_checkpoint="latest")
    assert len(counted.texts) == 7
    paid.write_text("")  # as a run leaves it that was stopped before its first call
    design(tmp_path, Oracle(counted, budget=5), overwrite_output_dir=True)
    assert len(counted.texts) == 12
    paid.rename(tmp_path.with_suffix(".moved"))
    design(tmp_path, Oracle(counted, budget=5), overwrite_output_dir=True)
    assert len(counted.texts) == 17


def test_without_its_run_nothing_is_called(tmp_path):
    counted = Counted()
    oracle = Oracle(counted)
    assert oracle(completions=["A"]) == oracle.without_calls()(completions=["A"]) == [None] and not counted.texts
    oracle.on_start(RunControl(tmp_path, 0, 1))
    reader = oracle.without_calls()
    assert reader(completions=["A"]) == [None] and oracle(completions=["A"]) == [1 / 3]
    assert reader(completions=["A", "C"]) == [1 / 3, None] and counted.texts == ["A"]
    oracle._close()  # as when the run ends
    assert oracle(completions=["A", "C"]) == [1 / 3, None] and counted.texts == ["A"]


def test_a_recipe_takes_it_as_a_callback(tmp_path):
    counted = Counted()
    recipe = grpo_recipe(
        model(), ROWS, lambda completions: [0.0] * len(completions), output_dir=str(tmp_path), **OPTIONS
    )
    oracle = Oracle(counted, budget=9)
    tasks = [task_from_dataset(ROWS, reward_funcs=each) for each in (oracle, oracle.without_calls())]
    train(recipe.replace(task=tasks[0], validation_task=tasks[1], eval_task=tasks[1], callbacks=[oracle]))
    assert len(counted.texts) == 9


async def later(completions):
    return [0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None,), "function=None of Oracle must be a function"),
        ((later,), "later of Oracle must be a function that is not async"),
        ((len, "budget"), "budget=0 must be at least 1"),
        ((len, "top_k"), "top_k=0 must be at least 1"),
        ((len, "batch_size"), "batch_size=0 must be at least 1"),
    ],
)
def test_what_is_no_oracle_is_refused(arguments, message):
    function, *names = arguments
    refuses(message, lambda: Oracle(function, **dict.fromkeys(names, 0)))


def test_a_run_that_could_not_count_its_calls_is_refused(tmp_path, monkeypatch):
    refuses("a run takes one Oracle", lambda: design(tmp_path, [Oracle(Counted()), Oracle(Counted())]))
    with pytest.raises(ValueError, match=r"late\.workers=2 grade with copies .* use late=None"):
        design(tmp_path, Oracle(Counted()), late=Late(workers=2))
    with pytest.raises(ValueError, match="workers=1 grade with copies"):  # as on a recipe's command line
        grpo_recipe(
            tiny_masked_lm(characters="ab"), [{"prompt": "a"}] * 9, Oracle(Counted()), max_new_tokens=2
        ).replace(late=Late())
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuses("start the run without a launcher", lambda: Oracle(Counted())(completions=["A"]))


CHILD = """
import os, signal, sys
from pathlib import Path
from test_oracle import OPTIONS, design
from dllm_rl.integrations.oracle import Oracle

folder = Path(sys.argv[1])

def assay(completions):
    kill_at = int(sys.argv[2])  # here, since a constant of the module would be another reward
    done = folder.with_suffix(".paid")
    if done.exists() and len(done.read_text().split()) + 1 == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    with done.open("a") as file:
        file.write("".join(text + "\\n" for text in completions))
    return [text.count("A") / 3 for text in completions]

resume = {"resume_from_checkpoint": "latest"} if folder.exists() else {}
oracle = Oracle(assay, budget=22)
design(folder, [oracle, oracle.novelty], reward_weights=[1.0, 0.2], save_steps=2, **resume)
"""


def child(folder, kill_at):
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    process = Child(CHILD, folder, kill_at, environment=os.environ | {"PYTHONPATH": path})
    _, error = process.communicate()
    return process.returncode, error


def test_a_killed_run_pays_for_no_text_twice_and_gives_the_same_result(tmp_path):
    """SIGKILL between two calls of a step, twice: the resumed run's calls are those of a run that was never killed."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder, kill_at in [(whole, 0), *((killed, at) for at in (5, 14, 21)), (killed, 0)]:
        status, error = child(folder, kill_at)
        assert status == (-signal.SIGKILL if kill_at else 0), error
    paid = [folder.with_suffix(".paid").read_text().split() for folder in (whole, killed)]
    assert paid[0] == paid[1] and len({*paid[1]}) == len(paid[1]) == 22
    assert (whole / "best.jsonl").read_text() == (killed / "best.jsonl").read_text()
    rewards = [[row["reward"] for row in metrics_of(folder)] for folder in (whole, killed)]
    assert rewards[0] == rewards[1] and len(rewards[0]) > 1


@pytest.mark.slow
def test_the_page_trains_esm_on_a_score(tmp_path, monkeypatch, capsys):
    """Its code as it is printed, with a small ESM-2 and two steps: sequences keep scaffold and length, 4 x 8 a step."""
    page = (Path(__file__).parents[2] / "recipes" / "protein-dna.md").read_text()
    code = page.partition("```python\n")[2].partition("```")[0]
    words = "<cls> <pad> <eos> <unk> L A G V S E R T I D P K Q N F Y M H W C X B U Z O . - <null_1> <mask>"
    (tmp_path / "vocab.txt").write_text(words.replace(" ", "\n"))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.EsmConfig(
        **sizes, vocab_size=33, pad_token_id=1, mask_token_id=32, max_position_embeddings=34, token_dropout=True
    )
    config.position_embedding_type = "rotary"
    tokenizer = transformers.EsmTokenizer(str(tmp_path / "vocab.txt"))
    make_policy(transformers.EsmForMaskedLM(config), tokenizer).save_pretrained(tmp_path / "esm")
    monkeypatch.chdir(tmp_path)
    steps = ('"num_steps": 60', '"num_steps": 2, "output_dir": "run"')
    for old, new in (("facebook/esm2_t12_35M_UR50D", "esm"), steps):
        assert old in code
        code = code.replace(old, new)
    exec(code, {})
    first = metrics_of(tmp_path / "run")[0]
    assert first["oracle/calls"] == 4 * 8 * (1 - first["oracle/frac_repeated"])
    assert re.search(r"'reward': [\d.]+", capsys.readouterr().out.splitlines()[-1])  # of held-out scaffolds, after it
    paid = [row["arguments"]["completions"][0]["content"] for row in lines(tmp_path / "run" / "oracle.jsonl")]
    assert len(paid) == len({*paid}) == metrics_of(tmp_path / "run")[-1]["oracle/calls"] > 1
    assert all(re.fullmatch("MKTAY[ACDEFGHIKLMNPQRSTVWY]{4}KQRLV", text) for text in paid)


def test_after_an_error_the_next_run_pays_for_its_own_steps_alone(tmp_path):
    paid = []

    def score(completions):
        if len(paid) == 1:
            paid.append(None)
            raise RuntimeError("results are missing")
        paid.append(len(completions))
        return [float(text.count("A")) for text in completions]

    oracle = Oracle(score)
    refuses("results are missing", lambda: design(tmp_path / "a", oracle, num_steps=3), RuntimeError)
    before = (tmp_path / "a" / "oracle.jsonl").read_text()
    design(tmp_path / "b", oracle, num_steps=1, seed=1)
    assert (tmp_path / "a" / "oracle.jsonl").read_text() == before
    calls = [row for row in lines(tmp_path / "b" / "oracle.jsonl") if "arguments" in row]
    assert len(calls) == sum(paid[2:])


def test_an_oracle_may_be_among_the_callbacks_too(tmp_path):
    oracle = Oracle(Counted())
    assert design(tmp_path, oracle, num_steps=1, callbacks=[oracle])["stages"]


@pytest.mark.slow
def test_a_run_of_a_trained_policy_resumes_before_its_first_step(tmp_path):
    """As while the results of its first step are awaited: its weights were trained by another run."""
    ready = tmp_path / "ready"

    def score(completions):
        if not ready.exists():
            raise RuntimeError("results are missing")
        return [float(text.count("A")) for text in completions]

    rows = [{"prompt": "", "completion": "ACD"}] * 4
    trained = sft(
        model(), rows, completion_length=3, num_steps=2, output_dir=str(tmp_path / "sft"), report_to=None
    ).policy
    given = OPTIONS | {"output_dir": str(tmp_path / "rl"), "num_steps": 1}
    refuses("results are missing", lambda: grpo(trained, ROWS, Oracle(score), **given), RuntimeError)
    ready.touch()
    assert grpo(trained, ROWS, Oracle(score), **given, resume_from_checkpoint="latest")["checkpoint"].endswith("000001")
    assert trained.weights_version == 2, "the caller's policy stays as it is"


LONG = 10**5000  # Python writes no such number
DEEP: list = []
for _ in range(100):
    DEEP = [DEEP]
IN_ITSELF: list = []
IN_ITSELF.append(IN_ITSELF)


@pytest.mark.parametrize(
    "value",
    [
        *(np.zeros(3), np.float32(1), float("nan"), float("inf"), {1, 2}, object(), {1: "a"}, [{"a": (b"x",)}]),
        *(LONG, {"a": [-LONG]}, DEEP, IN_ITSELF),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_argument_that_json_cannot_hold_is_refused(value):
    oracle = Oracle(lambda completions, at: [0.0] * len(completions))
    with pytest.raises(ValueError, match=r"^Oracle: the column at.* has a value of type"):
        task_from_dataset([{"prompt": "a", "at": None}, {"prompt": "a", "at": value}], reward_funcs=oracle)
    refuses(r"^Oracle: the column at.* has a value of type", lambda: oracle(completions=["a"], at=[value]))
    assert oracle(completions=["a"], at=[{"a": [1, 0.5, (None, True)]}]) == [None]
