"""GRPO in one call, as someone who comes from TRL would make it."""

import asyncio
import inspect
import re
from dataclasses import fields, replace
from functools import cache, partial
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from layouts import published
from own_module import own_policy
from readme import README
from refusals import refused, refuses
from run_outputs import metrics_of
from tiny_recipe import SIZES, tiny_recipe
from transformers import LlamaConfig, LlamaForCausalLM, get_scheduler

from dllm_rl import GSPO, Decoupled, Float8WeightOnly, Recipe, grpo, grpo_recipe, sft, tiny_masked_lm, train
from dllm_rl.algorithms.advantages import GroupRelative
from dllm_rl.algorithms.losses import FixedLengthMean, PPOClip, SequenceMean
from dllm_rl.algorithms.optimizers import LinearDecay
from dllm_rl.frontend.trl_names import OFF, REMEDIES, SAME, STRING_VALUES, TRL_NAMES, translate_trl_names
from dllm_rl.groups import TRL_FLAT, Best, Log, Saves
from dllm_rl.integrations.serving.engine import HTTPEngine, HTTPSampler
from dllm_rl.likelihoods.estimators import Causal, OneStep, Trajectory
from dllm_rl.models.base import encode_block_causal
from dllm_rl.models.checkpoint import loading
from dllm_rl.models.load import load_policy
from dllm_rl.models.lora_settings import Lora
from dllm_rl.models.tiny import char_tokenizer, tiny_diffusion_gemma, tiny_llama
from dllm_rl.monitoring.plots import read_metrics
from dllm_rl.records import describe, option
from dllm_rl.samplers import Renoise
from dllm_rl.samplers.autoregress import Autoregress
from dllm_rl.samplers.revise import Remask, SoftEdit
from dllm_rl.samplers.rules import MaxProb, RandomOrder, SoftThreshold, Threshold
from dllm_rl.samplers.sampler import FunctionSampler, Sampler
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.tasks import Sudoku
from dllm_rl.tasks.datasets import digest_of, task_from_dataset

pytestmark = pytest.mark.usefixtures("no_rehearsal")

SMALL = SIZES | {"hidden_size": 16, "num_layers": 1, "intermediate_size": 16}
ROWS = [{"prompt": f"{a}{b}=", "answer": f"{b}{a}"} for a in "1234" for b in "1234"]


def right(completions, answer, **_):
    return [
        sum(x == y for x, y in zip(text, wanted, strict=False)) / 2
        for text, wanted in zip(completions, answer, strict=True)
    ]


async def short(completions, **_):
    await asyncio.sleep(0)
    return [-float(len(text)) for text in completions]


def options(directory, **more):
    small = {"num_steps": 1, "train_batch_size": 4, "num_generations": 4, "rollout_quantization": Float8WeightOnly()}
    return {"max_new_tokens": 4, "output_dir": str(directory), "log": Log(completions_steps=0), **small, **more}


def test_a_policy_a_data_set_and_functions_are_enough(tmp_path):
    policy = tiny_masked_lm(**SMALL)
    given = options(tmp_path, log=Log(completions_steps=1))
    summary = grpo(policy, Dataset.from_list(ROWS), [right, short], reward_weights=[1.0, 0.1], **given)
    assert summary["eval_problems"] == 1 and summary["eval_before"].keys() >= {"right", "short", "reward"}
    for row in read_metrics(tmp_path):
        assert row["reward"] == pytest.approx(row["rewards/right/mean"] + 0.1 * row["rewards/short/mean"])


def test_a_task_brings_its_own_grader(tmp_path):
    """Appended cells of Sudoku, and cells that are filled in: nothing is appended then."""
    for infill, characters in ((False, "1234.="), (True, "1234")):
        train, test = (Sudoku(split=split, clues=(12, 14), size=40, infill=infill) for split in ("train", "test"))
        model = tiny_masked_lm(characters=characters)
        recipe = grpo_recipe(model, train, eval_dataset=test, **({} if infill else {"max_new_tokens": 16}))
        assert (recipe.task, recipe.eval_task, recipe.validation_task) == (train, test, test)
        assert recipe.name == "sudoku" and recipe.sampler.max_new_tokens == (0 if infill else 16)
    summary = grpo(model, train, eval_dataset=test, num_steps=1, output_dir=tmp_path / "run")
    assert set(summary["eval_after"]) >= {"reward", "solve_rate"}


test_rows_and_tasks_are_not_mixed = refused(
    ({"reward_funcs": len}, "reward_funcs is for rows, and train_dataset='sudoku' is a task with its own grader"),
    ({"eval_split": 0.2, "eval_dataset": Sudoku()}, "eval_split is for rows, and train_dataset='sudoku' is a task"),
    ({}, "eval_dataset=None: the task 'sudoku' needs a held-out task, such as Sudoku"),
    ({"eval_dataset": [{"prompt": "1"}]}, "eval_dataset=list: the task 'sudoku' needs a held-out task"),
    ({"train_dataset": [{"prompt": "1"}]}, "reward_funcs=None: rows need a reward function; give one, or a task"),
    by=lambda given: grpo_recipe(
        tiny_masked_lm(characters="1234.="), **{"train_dataset": Sudoku(), "max_new_tokens": 16} | given
    ),
)


def test_a_reward_may_ask_for_speed(tmp_path):
    """The policy may stop writing one position a step, whose forwards each completion's reward is given."""
    told = []

    def quick(completions, forwards, **_):
        told.append(forwards)
        return [-float(each) for each in forwards]

    sampler = {"commit": SoftThreshold(tau=0.1)}
    settings = options(tmp_path, num_iterations=2, sampler_options=sampler)
    grpo(tiny_masked_lm(**SMALL), ROWS, [quick, right], **settings)
    assert {len(each) for each in told} >= {16} and len({each for forwards in told for each in forwards}) > 1
    for row in read_metrics(tmp_path):
        assert row["completions/mean_forwards"] == pytest.approx(-row["rewards/quick/mean"])
        assert row["reward"] == pytest.approx(row["rewards/quick/mean"] + row["rewards/right/mean"])


def test_each_reward_is_normalized_on_its_own(tmp_path, rehearsal, monkeypatch):
    seen = []

    class Spy(Decoupled):
        def __call__(self, rewards, group, *, parts, weights):
            seen.append((rewards, parts, weights))
            return super().__call__(rewards, group, parts=parts, weights=weights)

    def rows_with(advantages):
        folder = tmp_path / describe(advantages).partition("(")[0].rpartition(":")[2]
        given = {"reward_weights": [1.0, 0.1], "advantages": advantages}
        grpo(tiny_masked_lm(**SMALL), ROWS, [right, short], **options(folder, **given))
        return read_metrics(folder)

    (row,) = rows_with(Spy())
    assert len(seen) == 3 and seen[2][1].shape == (2, 16)  # rehearsal and cautions ask once each
    together, parts, weights = seen[2]
    torch.testing.assert_close((weights[:, None] * parts).sum(0), together)
    assert row["rewards/short/mean"] == pytest.approx(parts[1].mean().item())
    monkeypatch.setattr("dllm_rl.training.start.rehearse", lambda *_: None)
    (plain,) = rows_with(Decoupled())
    assert all(plain[name] == row[name] for name in ("reward", "loss", "grad_norm"))


@pytest.mark.slow
def test_ones_own_advantages_may_read_any_component_and_expect_shares(tmp_path):
    """A run first tries them on artificial rewards, which have as many components, in [0, 1]."""

    class OfTheSecond(Decoupled):
        def __call__(self, rewards, group, *, parts, weights):
            assert weights.tolist() == [1.0, 0.5] and parts.min() >= 0 and parts.max() <= 1
            return torch.logit(parts[1], eps=0.1)

    advantages = OfTheSecond()
    grpo(
        tiny_masked_lm(**SMALL), ROWS, [right, ends_in_1], reward_weights=[1.0, 0.5], advantages=advantages,
        **options(tmp_path),
    )  # fmt: skip


def ends_in_1(completions, **_):
    return [float(text.endswith("1")) for text in completions]


@pytest.mark.parametrize(("weight", "draws"), [(0.0, 2), (1.0, 1)])
def test_a_reward_without_weight_makes_no_group_worth_keeping(weight, draws, tmp_path):
    """Of two rewards only the second differs, and it counts by its weight."""

    def never(completions, **_):
        return [0.0] * len(completions)

    def numbers(completions, **_):
        return [float(number % 4) for number in range(len(completions))]

    grpo(
        tiny_masked_lm(**SMALL), ROWS, [never, numbers], reward_weights=[1.0, weight], advantages=Decoupled(),
        max_num_gen_batches=2, **options(tmp_path),
    )  # fmt: skip
    (row,) = read_metrics(tmp_path)
    assert row["dynamic_sampling/draws"] == draws


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reward", "parsed"])
def test_a_reward_function_may_have_the_name_of_a_metric(tmp_path, name):
    def penalty(completions, **_):
        return [-100.0 * text.count("1") for text in completions]

    def ones(completions, **_):
        return [float(text.count("1")) for text in completions]

    ones.__name__ = name
    best = {"eval_steps": 1, "metric_for_best_model": "reward", "eval_split": 8}
    both = grpo(tiny_masked_lm(**SMALL), ROWS, [ones, penalty], **options(tmp_path / "both"), **best)
    for means in (both["eval_before"], both["eval_after"]):
        assert means["reward"] == pytest.approx(means[f"{name}_part"] + means["penalty"]) and means["parsed"] == 1
    rows = read_metrics(tmp_path / "both")
    assert both["best_value"] == max(row["eval/reward"] for row in rows)
    for row in rows:
        assert row["reward"] == pytest.approx(row[f"rewards/{name}/mean"] + row["rewards/penalty/mean"])
    one = grpo(tiny_masked_lm(**SMALL), ROWS, ones, reward_weights=[0.5], **options(tmp_path / "one"))["eval_after"]
    assert one["parsed"] == 1 and one.get("parsed_part", one["reward"] * 2) == one["reward"] * 2


def test_the_models_attention_picks_sampler_and_likelihood(tmp_path):
    recipe = grpo_recipe(partial(tiny_llama, causal=True, **SMALL), ROWS, right, **options(tmp_path))
    assert type(recipe.sampler) is Autoregress and recipe.likelihood == Causal()
    recipe = grpo_recipe(partial(tiny_masked_lm, **SMALL), ROWS, right, **options(tmp_path))
    assert type(recipe.sampler) is Unmask and recipe.likelihood == Trajectory(num_segments=2)
    assert recipe.sampler.temperature == 1.0 and recipe.eval_sampler.temperature == 0.0
    long = grpo_recipe(tiny_masked_lm(**SMALL), ROWS, right, max_new_tokens=32, sampler_options={"diffusion_steps": 16})
    assert long.sampler.diffusion_steps == 16 and not long.likelihood.exact_for_sampler
    assert long.likelihood.num_segments == 4
    few = grpo_recipe(tiny_masked_lm(**SMALL), ROWS, right, max_new_tokens=32, sampler_options={"diffusion_steps": 3})
    assert few.likelihood.exact_for_sampler


@pytest.mark.parametrize(
    ("steps", "options", "expected"),
    [
        (16, {}, Trajectory(block_size=4)),  # two tokens a step: two steps a block
        (32, {}, Trajectory(block_size=4, num_segments=2)),  # one token a step: four
        (None, {}, Trajectory(block_size=4, num_segments=2)),
        (8, {"block_size": 8}, Trajectory(num_segments=2)),  # blocks of another size than the model's
    ],
)
def test_a_block_causal_model_is_scored_in_all_blocks_at_once(tmp_path, steps, options, expected):
    """From a path, of which only the config is read, and from a policy."""
    for model in (block_causal_policy(4), str(published(tmp_path, "sdar"))):
        recipe = grpo_recipe(
            model, ROWS, right, max_new_tokens=32, sampler_options={"diffusion_steps": steps} | options
        )
        assert recipe.likelihood == expected


def test_an_engine_scores_a_block_causal_model_step_by_step():
    """Its forwards have one text a row, and not the blocks of several steps."""
    recipe = grpo_recipe(
        block_causal_policy(4), ROWS, right, sampler=HTTPSampler(max_new_tokens=32), rollout_engine=HTTPEngine()
    )
    assert recipe.likelihood == Trajectory(num_segments=8)


def test_a_sampler_of_ones_own_may_have_other_blocks():
    """So a block-causal model's rollouts are then replayed step by step."""

    def sample(policy, prompts, generator):
        raise AssertionError("not called")

    sampler = FunctionSampler(function=sample, max_new_tokens=32)
    recipe = grpo_recipe(block_causal_policy(4), ROWS, right, max_new_tokens=32, sampler=sampler)
    assert recipe.likelihood == Trajectory(num_segments=8)


def block_causal_policy(block_size):
    policy = tiny_llama(causal=False, **SMALL)
    spec = replace(policy.spec, name="toy", attention="block_causal", block_size=block_size)
    policy.spec = replace(spec, encode=partial(encode_block_causal, spec=spec))
    return policy


def test_a_block_causal_model_trains_with_the_default(tmp_path):
    given = options(tmp_path, sampler_options={"diffusion_steps": 4}, max_new_tokens=8)
    summary = grpo(block_causal_policy(4), ROWS, right, **given)
    assert summary["eval_after"].keys() >= {"right"}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(transformers, "DiffusionGemmaConfig"), reason="transformers has no DiffusionGemma")
def test_a_model_whose_noise_is_random_tokens(tmp_path):
    policy = tiny_diffusion_gemma(characters="1234=", canvas_length=4, hidden_size=16, moe_intermediate_size=16)
    given = options(tmp_path, sampler_options={"diffusion_steps": 2})
    recipe = grpo_recipe(policy, ROWS, right, **given)
    assert type(recipe.sampler) is type(recipe.eval_sampler) is Renoise
    assert recipe.sampler.answer == "drawn" and recipe.eval_sampler.answer == "argmax"
    assert recipe.likelihood == Trajectory()
    assert train(recipe)["eval_after"].keys() >= {"right"}
    with pytest.raises(ValueError, match=r"temperature=0\.7: Renoise has t_max and t_min"):
        grpo_recipe(policy, ROWS, right, **given, temperature=0.7)


def test_a_path_is_looked_at_without_its_weights(tmp_path, monkeypatch):
    tiny_llama(causal=True, **SMALL).save_pretrained(tmp_path / "Some-Model")
    monkeypatch.setattr("dllm_rl.models.load.load_module", None)
    recipe = grpo_recipe(str(tmp_path / "Some-Model"), ROWS, right)
    assert recipe.name == "some-model" and type(recipe.sampler) is Autoregress


def test_a_dry_run_of_a_hubs_model_reads_config_json_alone(tmp_path, monkeypatch, capsys):
    tiny_masked_lm(**SMALL).save_pretrained(tmp_path / "whole")
    shape = tmp_path / "shape"
    shape.mkdir()
    (shape / "config.json").write_bytes((tmp_path / "whole/config.json").read_bytes())
    monkeypatch.setattr(loading, "snapshot_download", lambda name, allow_patterns: str(shape))
    for model in ("owner/tiny", str(shape)):
        grpo(model, ROWS, right, max_new_tokens=4, max_prompt_length=8, dry_run=True)
        assert "full attention)\nparameters " in capsys.readouterr().out


def test_a_tenth_is_held_out_and_not_trained_on(tmp_path):
    rows = [{"prompt": f"{i:03d}="} for i in range(300)]
    recipe = grpo_recipe(
        tiny_masked_lm(characters="0123456789="), rows, lambda completions, **_: [0.0] * len(completions)
    )
    trained, held = ([task[i].prompt for i in range(len(task))] for task in (recipe.task, recipe.eval_task))
    assert len(trained) == 270 and held == [row["prompt"] for row in rows[270:]] and not set(trained) & set(held)
    given = grpo_recipe(tiny_masked_lm(**SMALL), ROWS, right, eval_dataset=ROWS[:3])
    assert len(given.task) == 16 and len(given.eval_task) == 3


def test_a_streamed_data_set_needs_a_bound():
    stream = Dataset.from_list(ROWS).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"list\(itertools.islice\(dataset, N\)\); grpo also takes max_rows=N"):
        grpo_recipe(tiny_masked_lm(**SMALL), stream, right)
    recipe = grpo_recipe(tiny_masked_lm(**SMALL), stream, right, max_rows=10)
    assert (len(recipe.task), len(recipe.eval_task)) == (9, 1)
    recipe = grpo_recipe(tiny_masked_lm(**SMALL), ROWS, right, eval_dataset=stream, max_rows=3)
    assert (len(recipe.task), len(recipe.eval_task)) == (16, 3)
    with pytest.raises(ValueError, match=r"has no length \(it is streamed\): give its first rows"):
        task_from_dataset(stream, reward_funcs=right)


@pytest.mark.slow
def test_a_path_may_be_a_path_object(tmp_path):
    folder = tmp_path / "My Model"
    tiny_masked_lm(**SMALL).save_pretrained(folder)
    recipe = grpo_recipe(folder, ROWS, right, teacher={"model": folder}, **options(tmp_path / "run"))
    assert (recipe.name, recipe.model, recipe.teacher.model) == ("my model", str(folder), str(folder))
    train(replace(recipe, output_dir=tmp_path / "run"))
    again = replace(
        recipe, output_dir=tmp_path / "run", resume_from_checkpoint=tmp_path / "run/checkpoints/step-000001"
    )
    assert train(again)["checkpoint"] == str(tmp_path / "run/checkpoints/step-000001")
    with pytest.raises(ValueError, match=r"dataset=.*rows\.jsonl'\) is a path; give rows"):
        grpo_recipe(folder, tmp_path / "rows.jsonl", right)


@pytest.mark.parametrize("empty", [[], Dataset.from_list([])], ids=["list", "Dataset"])
def test_an_empty_data_set_is_refused(empty):
    refuses("dataset is empty: give at least one row", lambda: task_from_dataset(empty, reward_funcs=right))
    refuses("dataset is empty: give at least one row", lambda: grpo_recipe(tiny_masked_lm(**SMALL), empty, right))


def test_async_functions_wait_at_once_also_inside_a_running_loop():
    """Each awaits the other's start, so that one after the other would never end; a notebook runs such a loop."""
    started = []

    async def meets(name: str, completions):
        started.append(name)
        while len(started) < 2:
            await asyncio.sleep(0)
        return [1.0] * len(completions)

    async def first(completions, **_):
        return await meets("first", completions)

    async def second(completions, **_):
        return await meets("second", completions)

    task = task_from_dataset(ROWS, reward_funcs=[first, right, second])

    async def notebook():
        return task.rewards([task[0], task[1]], ["11", "12"])

    graded = asyncio.run(notebook())
    assert [reward.breakdown for reward in graded] == [
        {"first": 1.0, "right": 1.0, "second": 1.0},
        {"first": 1.0, "right": 0.0, "second": 1.0},
    ]


def test_what_is_stored_of_such_a_task_is_the_same_in_every_process():
    """A resumed run compares it: no addresses, and not the rows themselves."""
    text = describe(task_from_dataset(ROWS, reward_funcs=[right, short], name="sums"))
    graders = f"({__name__}.right, {__name__}.short)"
    assert text == (
        f"DatasetTask(reward_funcs={graders}, weights=(1.0, 1.0), name='sums', version='1', blank=None, "
        f"rows={digest_of(ROWS)!r})"
    )
    assert describe((1,)) == "(1,)" and describe([0.5, "a"]) == "[0.5, 'a']"


@pytest.mark.slow
def test_a_resume_with_other_rows_is_refused(tmp_path):
    """The evaluation before training was of other problems, and a held-out problem may have been trained on."""
    more = [*ROWS, *({"prompt": f"{a}=", "answer": a} for a in "1234")]
    given = options(tmp_path, num_steps=0, eval_dataset=ROWS[:2])
    grpo(tiny_masked_lm(**SMALL), ROWS, right, **given)
    given["resume_from_checkpoint"] = "latest"
    with pytest.raises(ValueError, match=r"^task=DatasetTask\(.*rows='20 rows, .*differs.*rows='16 rows, .*allow_chan"):
        grpo(tiny_masked_lm(**SMALL), more, right, **given)
    with pytest.raises(ValueError, match=r"^\w+_task=DatasetTask\(.*rows='2 rows, .*differs.*rows='2 rows, "):
        grpo(tiny_masked_lm(**SMALL), ROWS, right, **given | {"eval_dataset": ROWS[1:3]})
    allowed = {"allow_changed": "task", "eval_dataset": Dataset.from_list(ROWS[:2])}  # the same two rows
    assert grpo(tiny_masked_lm(**SMALL), more, right, **given | allowed)["eval_problems"] == 2


def test_a_resume_with_another_reward_is_refused(tmp_path):
    def signed(sign):
        return lambda completions, answer, **_: [sign * number for number in right(completions, answer)]

    def run(function, **more):
        return grpo(tiny_masked_lm(**SMALL), ROWS, function, **options(tmp_path, num_steps=0, **more))

    run(signed(1.0))
    run(signed(1.0), resume_from_checkpoint="latest")  # another function of the same code
    for other in (signed(-1.0), lambda completions, answer, **_: right(completions, completions)):
        with pytest.raises(ValueError, match=r"^the code of task, .*eval_task has changed .*allow_changed='task,valid"):
            run(other, resume_from_checkpoint="latest")
    run(signed(-1.0), resume_from_checkpoint="latest", allow_changed="task,validation_task,eval_task")


def test_a_reward_that_keeps_state_resumes_in_the_process_in_which_it_began(tmp_path):
    usage, seen, noise = SimpleNamespace(calls=0), [], np.random.default_rng(0)

    def note(log, text):
        log.append(text)

    def noisy(completions, answer, **_):
        usage.calls += 1
        note(seen, completions)
        return [number + 0.1 * noise.random() for number in right(completions, answer)]

    def run(**more):
        return grpo(tiny_masked_lm(**SMALL), ROWS, noisy, **options(tmp_path, **more), lr_schedule_steps=4)

    run(num_steps=1)
    assert usage.calls and seen
    run(num_steps=2, resume_from_checkpoint="latest")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "policy", "function"])
def test_adapters_do_not_continue_on_another_base(tmp_path, kind):
    def base(seed):
        policy = tiny_masked_lm(**SMALL, seed=seed)
        if kind == "folder":
            policy.save_pretrained(tmp_path / "base")
            return tmp_path / "base"
        return policy if kind == "policy" else lambda: tiny_masked_lm(**SMALL, seed=seed)

    given = options(tmp_path / "run", num_steps=0, lora=Lora(r=2))
    grpo(base(0), ROWS, right, **given)
    given["resume_from_checkpoint"] = "latest"
    grpo(base(0), ROWS, right, **given)
    refuses(r"not those on which this run's adapters were trained", lambda: grpo(base(1), ROWS, right, **given))
    if kind == "folder":
        adapters = tmp_path / "run/checkpoints/step-000000/adapter"
        refuses(r"not those on which the adapters of .* were trained", lambda: load_policy(adapters))
        base(0)
        assert load_policy(adapters).lora is None, "merged"


@cache
def a_model():
    """For recipes that nobody runs."""
    return tiny_masked_lm(**SMALL)


def recipe_of(**settings):
    return grpo_recipe(model=a_model(), train_dataset=ROWS, reward_funcs=right, **settings)


def test_trls_names_set_what_they_mean():
    clip = {"epsilon": 0.1, "epsilon_high": 0.3, "delta": 4.0}
    recipe = recipe_of(
        **clip, max_completion_length=4, max_steps=3, run_name="a", hub_model_id="me/b", report_to="none", top_p=0.9,
        top_k=5, scale_rewards=False, sampler_options={"diffusion_steps": 2},
    )  # fmt: skip
    assert recipe.loss == PPOClip(**clip)
    assert (recipe.max_new_tokens, recipe.num_steps, recipe.name, recipe.saves.push_to_hub) == (4, 3, "a", "me/b")
    assert recipe.advantages == GroupRelative(scale_rewards="none") and recipe.log.trackers == []
    assert recipe.sampler == Unmask(max_new_tokens=4, diffusion_steps=2, top_p=0.9, top_k=5, temperature=1.0)
    assert recipe_of(loss=GSPO(), epsilon=0.1).loss == GSPO(epsilon=0.1)
    assert recipe_of(report_to=["wandb", "mlflow"]).log.trackers == ["wandb", "mlflow"]


def test_a_loss_reduction_of_length_one_stays():
    """TRL's dr_grpo divides by max_completion_length, and is told apart from the reduction that it is made with."""
    assert recipe_of(loss_reduction=FixedLengthMean(length=1)).loss_reduction == FixedLengthMean(length=1)
    assert recipe_of(loss_type="dr_grpo", max_completion_length=8).loss_reduction == FixedLengthMean(length=8)


@pytest.mark.parametrize("order", list(permutations(("epsilon", "epsilon_high", "delta"))))
def test_a_losss_fields_may_come_in_any_order(order):
    """Each is right beside the others; delta alone would be below 1 + the default epsilon."""
    clip = {"epsilon": 0.05, "epsilon_high": 0.1, "delta": 1.15}
    assert recipe_of(**{name: clip[name] for name in order}).loss == PPOClip(**clip)


def test_trls_true_resumes_from_the_latest_checkpoint():
    assert recipe_of(resume_from_checkpoint=True).resume_from_checkpoint == "latest"
    refuses("resume_from_checkpoint=False", lambda: recipe_of(resume_from_checkpoint=False))


@pytest.mark.parametrize("name", ["micro_batch_size", "output_dir", "eval_split"])
def test_none_is_a_value_where_a_setting_takes_it(name):
    assert getattr(recipe_of(**{name: None}), name, None) is None


test_a_name_that_is_not_known_names_the_nearest = refused(
    ({"args": object()}, r"^not settings of grpo: args \(the nearest is each of its fields as an argument\);"),
    ({"generation_batch_size": 8}, r"generation_batch_size \(the nearest is train_batch_size\)"),
    ({"learning_rat": 1e-6}, r"^not settings of grpo: learning_rat \(the nearest is learning_rate\); help"),
    ({"settings": {}}, "not settings of grpo: settings"),
    ({"block_length": 32}, r"block_length \(the nearest is sampler_options.block_size\)"),
    ({"lora.r": 16}, r"lora.r \(an option of the command line: in a call give lora=...\(r=...\)\); help"),
    ({"loss.delta": 1.2}, r"give loss=...\(delta=...\)\)"),
    ({"sampler.temperature": 1.0}, r"give sampler_options=\{'temperature': ...\}\)"),
    ({"zyx": 1}, r"^not settings of grpo: zyx; help\(dllm_rl.Recipe\) lists all"),
    ({"max_steps": 3, "num_steps": 4}, "num_steps is set twice, once by TRL's name"),
    ({"save_steps": 3, "saves": Saves(steps=4)}, r"saves.steps is set twice, to 3 and 4; set it once"),
    ({"eval_steps": 3, "evaluation": {"steps": 4}}, r"evaluation.steps is set twice, to 3 and 4"),
    (
        {"metric_for_best_model": "a", "saves": Saves(best=Best(metric="b"))},
        r"saves.best.metric is set twice, to 'a' and 'b'",
    ),
    (
        {"metric_for_best_model": "a", "saves": {"best": {"metric": "b", "load_at_end": True}}},
        r"saves.best.metric is set twice, to 'a' and 'b'",
    ),
    ({"save_steps": 3, "saves": 5}, r"saves=5"),
    ({"max_steps": 3, "num_iterations": 2}, r"max_steps counts updates, .* give num_steps \(max_steps / 2\)$"),
    ({"max_steps": 8, "num_iterations": 4}, r"give num_steps \(max_steps / 4\)$"),
    ({"max_steps": 8, "preset": "d1"}, r"give num_steps \(max_steps / 8\)$"),
    ({"max_steps": 8, "preset": "d1", "name": "gsm8k"}, r"give num_steps \(max_steps / 12\)$"),
    (
        {"advantages": Decoupled(), "scale_rewards": True},
        "scale_rewards=True is not a setting of advantages=Decoupled",
    ),
    by=lambda settings: recipe_of(**settings),
)


@pytest.mark.parametrize(
    "saves", [Saves(best=Best(metric="reward", load_at_end=True)), {"best": {"load_at_end": True}}]
)
def test_a_flat_name_adds_to_what_its_group_has(saves):
    recipe = recipe_of(metric_for_best_model="reward", save_total_limit=7, saves=saves)
    assert recipe.saves == Saves(total_limit=7, best=Best(metric="reward", load_at_end=True))


def verls_rows():
    """The names of verl in docs/trl.md, each with the text of what stands for it here."""
    table = README.parent.joinpath("docs", "trl.md").read_text().partition("## From verl")[2]
    for line in re.findall(r"^\| (`.*?) \| (.*?) \|$", table, re.M):
        yield from ((name, line[1]) for name in re.findall(r"`(.+?)`", line[0]))


@pytest.mark.parametrize(("name", "ours"), verls_rows())
@pytest.mark.parametrize("written", ["short", "as on the page", "whole"])
def test_verls_names_get_the_translation_of_the_page(name, ours, written):
    given = {"short": name.rpartition(".")[2], "as on the page": name, "whole": f"actor_rollout_ref.{name}"}[written]
    if given in ("train_batch_size", "max_prompt_length", "temperature"):  # the same name
        return
    with pytest.raises(
        ValueError, match=rf"^not settings of grpo: {re.escape(given)} \((the nearest is|give) "
    ) as said:
        grpo_recipe(tiny_masked_lm(**SMALL), ROWS, right, **{given: 2})
    found = re.search(r"\((?:the nearest is|give) (.*?)\);", str(said.value))[1]
    settings = re.findall(
        r"\b(?:[a-z]+_[a-z_]+\b|beta|late|loss(?==)|lora(?==)|corrector|advantages|model|temperature)",
        ours.replace("PPOClip", ""),
    )
    known = {field.name for field in fields(Recipe)} | inspect.signature(grpo_recipe).parameters.keys()
    ours = [setting for setting in settings if setting in known]
    assert any(setting in found for setting in ours or ["all of whose prompts are in each update"]), (found, ours)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("data.train_batch_sizes", r"data.train_batch_sizes \(the nearest is train_batch_size\)"),
        ("trainer.save_freq", r"trainer.save_freq \(the nearest is save_steps\)"),
        ("rollout.temperature", r"rollout.temperature \(give temperature\)"),
        ("actor_rollout_ref.model.path", r"actor_rollout_ref.model.path \(the nearest is model\)"),
        ("algorithm.rollout_correction.rollout_is", r".*rollout_is \(the nearest is corrector\)"),
        ("custom_reward_function.path", r"custom_reward_function.path \(the nearest is reward_funcs\)"),
        ("data.val_files", r"data.val_files \(the nearest is eval_dataset\)"),
        ("trainer.n_gpus_per_node", r".*\(the nearest is accelerate launch --num_processes\)"),
        ("rollout.collective_timeout", r".*\(give limits=\{'collective_timeout': ...\}\)"),
        ("actor_rollout_ref.rollout.name", r".*rollout.name \(the nearest is rollout_engine\)"),
        ("trainer.name", r"trainer.name \(give name\)"),
        ("actor.kl_loss_type", r"actor.kl_loss_type \(the nearest is kl\)"),
        ("actor.fsdp_config.param_offload", r".*param_offload \(the nearest is shard_size\)"),
        ("algorithm.norm_adv_by_std_in_grpo", r".*\(the nearest is scale_rewards\)"),
        ("data.val_batch_size", r".*\(the nearest is evaluation=\{'batch_size': ...\}\)"),
        ("trainer.qqq", "trainer.qqq;"),
    ],
)
def test_a_name_in_a_group_of_verl_is_looked_up_without_it(name, said):
    refuses(f"^not settings of grpo: {said}", lambda: grpo_recipe(tiny_masked_lm(**SMALL), ROWS, right, **{name: 2}))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("logging_steps", -1, "logging_steps=-1 must be at least 1"),
        ("eval_steps", -3, "eval_steps=-3 must be at least 0"),
        ("save_steps", 0, "save_steps=0 must be at least 1"),
        ("save_total_limit", 0, "save_total_limit=0 must be at least 1"),
        ("load_best_model_at_end", "yes", "load_best_model_at_end='yes' is of type str; give bool"),
        ("metric_for_best_model", "", "metric_for_best_model='' is empty; give a name"),
        ("push_to_hub", 3, "push_to_hub=3 is of type int; give str"),
    ],
)
@pytest.mark.parametrize("call", [grpo_recipe, sft])
def test_a_wrong_value_is_named_as_it_was_given(call, name, value, said):
    """And not by the group in which a recipe keeps it."""
    rows = ROWS if call is grpo_recipe else [{"prompt": "1=", "completion": "1"}]
    arguments = (rows, right) if call is grpo_recipe else (rows,)
    refuses(f"^{said}$", lambda: call(tiny_masked_lm(**SMALL), *arguments, **{name: value}))


def test_the_docs_have_the_names():
    page = README.parent.joinpath("docs", "trl.md").read_text()
    table = page.partition("| TRL | here |\n")[2].partition("\n\n")[0]
    assert dict(re.findall(r"^\| `(\w+)` \| `([\w.]+)` \|$", table, re.MULTILINE)) == TRL_NAMES
    own = Recipe.__dataclass_fields__.keys()
    assert not own & (TRL_NAMES | REMEDIES).keys(), "a name of Recipe's is taken as it is"


def llama():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        return LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes, pad_token_id=0, eos_token_id=2, bos_token_id=None))


@pytest.mark.parametrize("name", ["processing_class", "tokenizer"])
@pytest.mark.repeated(first_only=True)
def test_a_loaded_model_is_trained_with_its_tokenizer(tmp_path, name):
    model = llama()
    before = model.lm_head.weight.clone()
    summary = grpo(model, ROWS, right, **{name: char_tokenizer("1234=")}, **options(tmp_path, learning_rate=0.1))
    assert type(summary.policy.module) is LlamaForCausalLM and summary.policy.spec.attention == "causal"
    assert torch.equal(model.lm_head.weight, before), "the caller's model stays as it is"
    assert not torch.equal(summary.policy.module.lm_head.weight, before)


def test_adapters_of_peft_are_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"PeftModel has peft's adapters; pass model.merge_and_unload\(\) instead"):
        grpo_recipe(model, ROWS, right, processing_class=char_tokenizer("1234="))


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"max_new_tokens": "2"}, "max_new_tokens='2'"),
        ({"max_completion_length": 2.5}, "max_new_tokens=2.5"),
        ({"temperature": "1"}, "temperature='1'"),
        ({"temperature": -1}, "temperature=-1"),
        ({"top_k": "5"}, "top_k='5'"),
        ({"sampler_options": {"diffusion_steps": "2"}}, "diffusion_steps='2'"),
        ({"reward_weights": "1"}, "weights='1'"),
        ({"eval_dataset": {"prompt": ["1="]}}, "dataset is a dict of columns"),
    ],
    ids=str,
)
def test_an_argument_of_another_type_is_named(settings, field):
    refuses(re.escape(field), lambda: grpo_recipe(tiny_masked_lm(**SMALL), ROWS, right, **settings))


def test_names_and_peft_settings_are_taken_where_they_mean_one_thing():
    peft = pytest.importorskip("peft")
    settings = {"loss": "GSPO", "epsilon": 0.1, "loss_reduction": "SequenceMean", "max_new_tokens": 4}
    recipe = grpo_recipe(tiny_masked_lm(**SMALL), ROWS, right, peft_config=peft.LoraConfig(r=4), **settings)
    assert recipe.loss == GSPO(epsilon=0.1) and recipe.lora.r == 4
    assert recipe.loss_reduction == SequenceMean()


def test_a_loaded_model_and_its_tokenizer_go_together():
    with pytest.raises(ValueError, match="processing_class=None: a loaded LlamaForCausalLM needs its tokenizer"):
        grpo_recipe(llama(), ROWS, right)
    with pytest.raises(ValueError, match="processing_class is for a loaded transformers model"):
        recipe_of(processing_class=char_tokenizer("1234="))
    with pytest.raises(ValueError, match="Own has no config that names its family: pass a FamilySpec"):
        grpo_recipe(own_policy().module, ROWS, right, tokenizer=char_tokenizer("1234="))
    loaded = llama()
    loaded.config.architectures = ["LLaDAModelLM"]
    with pytest.raises(ValueError, match="code that comes with its checkpoint; pass the checkpoint's folder or id"):
        grpo_recipe(loaded, ROWS, right, tokenizer=char_tokenizer("1234="))


def segments(**settings):
    """How many segments a trajectory is scored in: None where each step is scored, which is exact."""
    return recipe_of(**settings).likelihood.num_segments


def test_the_likelihood_is_chosen_by_the_steps_that_the_sampler_takes():
    """One step per token unless diffusion_steps says fewer; a rule that ignores it may take one per token."""
    assert segments(max_new_tokens=64) == 8 and segments(max_new_tokens=4) == 2 and segments(max_new_tokens=3) is None
    assert segments(sampler_options={"max_new_tokens": 3}) is None
    assert segments(max_new_tokens=4, sampler_options={"max_new_tokens": 64}) == 8
    assert segments(max_new_tokens=4, sampler_options={"max_new_tokens": 64, "diffusion_steps": 12}) == 3
    assert segments(sampler=Unmask(max_new_tokens=3)) is None
    assert segments(max_new_tokens=64, sampler=Unmask(max_new_tokens=64, diffusion_steps=16)) == 4
    rule = Threshold(tau=0.9)
    assert segments(max_new_tokens=64, sampler_options={"diffusion_steps": 4, "commit": rule}) == 8
    assert segments(max_new_tokens=64, sampler_options={"commit": SoftThreshold(tau=0.9)}) is None


@pytest.mark.slow
@pytest.mark.parametrize("rule", [SoftEdit(rate=0.5), Remask(eta=0.5)])
def test_a_run_with_a_rule_that_rewrites_scores_every_step(tmp_path, rule):
    """Its steps cannot be merged, so a default with segments would end the run in its first step."""
    rank = RandomOrder() if isinstance(rule, Remask) else MaxProb()
    options = {"commit": rule, "rank": rank, "diffusion_steps": 4}
    settings = {"num_steps": 1, "num_generations": 2, "train_batch_size": 2, "report_to": None}
    settings |= {"output_dir": tmp_path, "sampler_options": options}
    grpo(tiny_masked_lm(**SMALL), ROWS, right, max_new_tokens=4, **settings)
    assert len(metrics_of(tmp_path)) == 1


def test_the_samplers_own_temperature_is_kept():
    recipe = recipe_of(max_new_tokens=4, sampler_options={"temperature": 0.5})
    assert recipe.sampler.temperature == 0.5 and recipe.eval_sampler.temperature == 0.0


class Plain(Sampler):
    """A sampler of one's own, of one draw by the library's, without a temperature."""

    def __call__(self, policy, prompts, generator):
        drawn = Unmask(max_new_tokens=self.max_new_tokens, temperature=getattr(self, "temperature", 1.0))
        return drawn(policy, prompts, generator)


class Warm(Plain):
    temperature: float = option(default=1.0, at_least=0)


class NeverGreedy(Plain):
    temperature: float = option(default=1.0, above=0)


class Rewriting(Plain):
    def __call__(self, policy, prompts, generator):
        rule = {"rank": RandomOrder(), "commit": Remask(eta=0.5)}
        return Unmask(max_new_tokens=self.max_new_tokens, temperature=1.0, **rule)(policy, prompts, generator)


class Stepless(Plain):
    def __call__(self, policy, prompts, generator):
        rollout = super().__call__(policy, prompts, generator)
        return replace(rollout, unmask_step=torch.where(rollout.unmask_step == 0, -1, rollout.unmask_step))


FUNCTION = FunctionSampler(function=lambda *_: None, max_new_tokens=4)


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (Plain(max_new_tokens=4), Plain(max_new_tokens=4)),
        (Warm(max_new_tokens=4, temperature=0.7), Warm(max_new_tokens=4, temperature=0.0)),
        (FUNCTION, FUNCTION),
        (
            Unmask(max_new_tokens=6, diffusion_steps=3, temperature=0.7, top_k=5),
            Unmask(max_new_tokens=6, diffusion_steps=3, temperature=0.0, top_k=5),
        ),
        (Renoise(max_new_tokens=4, answer="drawn"), Renoise(max_new_tokens=4, answer="argmax")),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_evaluations_take_the_given_sampler_at_temperature_0(sampler, expected):
    assert recipe_of(sampler=sampler).eval_sampler == expected
    own = Unmask(max_new_tokens=2)
    assert recipe_of(sampler=sampler, eval_sampler=own).eval_sampler == own


def test_a_sampler_that_cannot_be_greedy_needs_one_for_evaluations():
    sampler = NeverGreedy(max_new_tokens=4)
    refuses(r"eval_sampler is not given, .*NeverGreedy.* must be above 0", lambda: recipe_of(sampler=sampler))
    assert recipe_of(sampler=sampler, eval_sampler=Warm(max_new_tokens=4)).sampler == sampler


def test_the_sampler_of_an_engine_that_decodes_does_not_evaluate():
    """It would need the engine's policy; one of the library's decodes any engine's logits."""
    decoding = HTTPSampler(max_new_tokens=6, temperature=0.7)
    recipe = recipe_of(sampler=decoding, rollout_engine=HTTPEngine())
    assert recipe.sampler == decoding and recipe.eval_sampler == Unmask(max_new_tokens=6, temperature=0.0)
    settings = {"max_new_tokens": 6, "diffusion_steps": 4, "block_size": 2, "suppress": (3,), "top_k": 5}
    recipe = recipe_of(sampler=HTTPSampler(**settings, temperature=0.7), rollout_engine=HTTPEngine())
    assert recipe.eval_sampler == Unmask(**settings, temperature=0.0)
    ours = Unmask(max_new_tokens=6, diffusion_steps=2, temperature=0.7)
    assert recipe_of(sampler=ours, rollout_engine=HTTPEngine()).eval_sampler == ours.replace(temperature=0.0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_new_tokens": 8}, "max_new_tokens=8 is not what sampler=Warm has: set it there, or leave it out"),
        ({"temperature": 0.5}, "temperature=0.5 is not what sampler=Warm has"),
        ({"sampler_options": {"diffusion_steps": 2}}, "diffusion_steps=2 is not what sampler=Warm has"),
        ({"sampler": lambda *_: None}, "sampler=.* is not of type Sampler"),
    ],
)
def test_a_given_samplers_fields_are_its_own(changes, said):
    refuses(said, lambda: recipe_of(**{"sampler": Warm(max_new_tokens=4)} | changes))
    recipe_of(sampler=Warm(max_new_tokens=4), max_new_tokens=4, temperature=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [Plain(max_new_tokens=4), Warm(max_new_tokens=4)], ids=["plain", "warm"])
def test_an_own_model_of_few_positions_trains_and_is_evaluated_with_an_own_sampler(tmp_path, sampler):
    """Nothing says how long its texts may be: 256 tokens, the default of `Unmask`, would be too many."""
    given = options(tmp_path, sampler=sampler, rollout_quantization=None)
    assert "right" in grpo(partial(own_policy, max_length=None), ROWS, right, **given)["eval_after"]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Rewriting, r"num_segments=2 merges steps.*; use likelihood=Trajectory\(num_segments=None\), which scores"),
        (Stepless, r"records none for some .*; record them, or use OneStep\(\)"),
    ],
)
def test_a_sampler_that_the_default_cannot_score_is_refused_before_anything_is_written(tmp_path, rehearsal, kind, said):
    given = options(tmp_path / "run", sampler=kind(max_new_tokens=4), rollout_quantization=None)
    refuses(said, lambda: grpo(own_policy, ROWS, right, **given))
    assert not (tmp_path / "run/metrics.jsonl").exists()
    grpo(own_policy, ROWS, right, **given, likelihood=Trajectory() if kind is Rewriting else OneStep())


@pytest.mark.parametrize("how", ["grpo_recipe", "grpo", "dry_run"])
def test_a_function_that_makes_the_model_may_need_the_seed(tmp_path, how):
    """As it may in Recipe(model=make); each call gets the run's seed."""
    seeds = []

    def make(seed):
        seeds.append(seed)
        return tiny_masked_lm(**SMALL, seed=seed)

    if how == "grpo_recipe":
        assert type(grpo_recipe(make, ROWS, right).sampler) is Unmask and seeds == [0]
        return
    assert grpo(make, ROWS, right, **options(tmp_path, num_steps=0, seed=3, dry_run=how == "dry_run"))
    assert len(seeds) >= 2 and set(seeds) == {3}


def test_trls_loss_types_weigh_tokens_as_trl_does():
    """By hand, of completions of 1 and 3 tokens; dr_grpo's constant is the completion's length, 5 here."""
    mask = torch.tensor([[True, False, False], [True, True, True]])

    def weights(**settings):
        return recipe_of(**settings).resolved_loss_reduction(mask, num_tokens=4, num_sequences=2).tolist()

    of_sequences = [[1 / 2, 0, 0], [1 / 6, 1 / 6, 1 / 6]]
    of_tokens = [[1 / 4, 0, 0], [1 / 4, 1 / 4, 1 / 4]]
    constants = [[1 / 10, 0, 0], [1 / 10, 1 / 10, 1 / 10]]
    for name, expected in {"grpo": of_sequences, "dapo": of_tokens}.items():
        assert weights(loss_type=name) == [pytest.approx(row) for row in expected], name
    for length in ({"max_completion_length": 5}, {"sampler_options": {"max_new_tokens": 5}}):
        assert weights(loss_type="dr_grpo", **length) == [pytest.approx(row) for row in constants]


def test_the_level_of_the_ratio_changes_nothing_else():
    """By hand: ratios 2 and 1 of one completion, whose geometric mean is the root of 2, clipped at 1 +- 0.2."""
    log_ratio, mask = torch.tensor([[2.0, 1.0]]).log(), torch.ones(1, 2, dtype=torch.bool)

    def objective(advantage, **settings):
        return recipe_of(**settings).resolved_loss(log_ratio, torch.tensor([advantage]), mask)[0].tolist()

    token, sequence = {"importance_sampling_level": "token"}, {"importance_sampling_level": "sequence"}
    root = 2**0.5
    assert objective(1.0, **token) == objective(1.0) == pytest.approx([1.2, 1.0])
    assert objective(1.0, **sequence) == pytest.approx([1.2, 1.2])
    assert objective(-1.0, **sequence) == pytest.approx([-root, -root])
    assert objective(1.0, **sequence, epsilon=0.1) == pytest.approx([1.1, 1.1]), "epsilon_high is then epsilon"
    assert objective(1.0, **sequence, epsilon_high=0.3) == pytest.approx([1.3, 1.3])


@pytest.mark.parametrize("processes", [1, 2])
def test_trls_batch_sizes_count_completions(monkeypatch, processes):
    """16 completions per forward, 4 forwards per process and update: 64 completions, of 8 per prompt, for each."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    recipe = recipe_of(per_device_train_batch_size=16, gradient_accumulation_steps=4, num_generations=8)
    assert (recipe.micro_batch_size, recipe.train_batch_size) == (16, 8 * processes)
    recipe = recipe_of(per_device_train_batch_size=16)
    assert (recipe.micro_batch_size, recipe.train_batch_size) == (16, 2 * processes)
    recipe = recipe_of(per_device_train_batch_size=12, gradient_accumulation_steps=2)  # a forward may split a group
    assert (recipe.micro_batch_size, recipe.train_batch_size) == (12, 3 * processes)


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_trls_learning_rates_are_those_of_transformers(name, warmup):
    if name == "constant" and warmup:
        with pytest.raises(
            ValueError, match=r"warmup_steps=3 is not a setting of lr_schedule=ConstantRate\(\); leave one of"
        ):
            recipe_of(lr_scheduler_type=name, warmup_steps=warmup)
        return
    recipe = recipe_of(lr_scheduler_type=name, warmup_steps=warmup, max_steps=8, learning_rate=0.5)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=8)
    rates = []
    for _ in range(8):
        rates.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert [recipe.update_settings(step).learning_rate for step in range(8)] == pytest.approx(rates)
    assert recipe.warmup.steps == 0, "Recipe's counts supervised steps"


@pytest.mark.parametrize("warmup", [0, 3])
def test_a_warmup_alone_is_that_of_the_default_schedule(warmup):
    schedule = recipe_of(warmup_steps=warmup).lr_schedule
    assert schedule == LinearDecay(warmup_steps=warmup)
    assert recipe_of(warmup_steps=0, num_iterations=2).lr_schedule == LinearDecay(warmup_steps=0)


def test_a_reference_that_stays_is_the_only_one():
    assert recipe_of(sync_ref_model=False, beta=0.1).beta == 0.1


# TRL's defaults that change nothing; tests/integrations/test_trl.py compares them with TRL.
NEUTRAL = OFF | SAME | {"top_k": 0, "top_p": 1.0, "push_to_hub": False, "gradient_accumulation_steps": 1}
NEUTRAL |= {"multi_objective_aggregation": "sum_then_normalize"}


def test_trls_defaults_that_change_nothing_are_accepted():
    plain = recipe_of().settings()
    assert recipe_of(**NEUTRAL).settings() == plain
    for name, value in NEUTRAL.items():
        assert recipe_of(**{name: value}).settings() == plain, name
    causal = tiny_llama(causal=True, **SMALL)
    assert grpo_recipe(causal, ROWS, right, **NEUTRAL).settings() == grpo_recipe(causal, ROWS, right).settings()


@pytest.mark.parametrize("name", NEUTRAL)
def test_another_value_of_them_is_refused_or_sets_it(name):
    other = {"top_k": 5, "top_p": 0.5, "run_name": "b", "push_to_hub": "me/b", "optim": "AdamW8bit"}
    if name in other:
        assert recipe_of(**{name: other[name]}).settings() != recipe_of().settings()
        return
    refuses(name, lambda: recipe_of(**{name: 2}))


test_a_default_of_trl_beside_its_opposite_is_refused = refused(
    ({"top_k": 0, "sampler": Unmask(max_new_tokens=2, top_k=5)}, "top_k=0 is not what sampler=Unmask has"),
    ({"top_p": 1.0, "sampler": Unmask(max_new_tokens=2, top_p=0.5)}, "top_p=1.0 is not what sampler=Unmask has"),
    ({"push_to_hub": False, "hub_model_id": "me/b"}, "push_to_hub=False is of type bool; give str"),
    ({"multi_objective_aggregation": "sum_then_normalize", "advantages": Decoupled()}, "the nearest is advantages"),
    by=lambda settings: recipe_of(**settings),
)


def test_a_sampler_of_ones_own_takes_trls_filters_that_are_off():
    sampler = Unmask(max_new_tokens=2)
    assert recipe_of(sampler=sampler, top_k=0, top_p=1.0).sampler == sampler


test_what_has_no_one_meaning_here_is_refused_in_a_line = refused(
    ({"loss_type": "cispo"}, r"loss_type='cispo' \(give loss=CISPO\("),
    ({"loss_type": ["grpo"]}, r"loss_type=\['grpo'\] \(not one of 'grpo', .*; for others give Recipe's loss_red"),
    (
        {"loss_type": "grpo", "loss_reduction": torch.zeros_like},
        "loss_reduction is set twice, once by TRL's name",
    ),
    ({"loss_type": "bnpo"}, r"loss_type='bnpo' \(give loss_type='dapo'"),
    ({"importance_sampling_level": "sequence_token"}, r"='sequence_token' \(not one of 'token', 'sequence'; for"),
    ({"importance_sampling_level": "sequence", "loss": GSPO()}, "loss is set twice"),
    ({"importance_sampling_level": "sequence", "delta": 4.0}, r"delta=4.0 is not a setting of loss=GSPO\("),
    (
        {"lr_scheduler_type": "polynomial"},
        r"lr_scheduler_type='polynomial' \(not one of 'constant', .*'cosine'; for",
    ),
    (
        {"optim": torch.optim.SGD, "weight_decay": 0.1},
        r"optim.weight_decay=0.1 is not a setting of optim=FunctionOptimizer\(function=torch.optim.sgd.SGD\); leave",
    ),
    ({"lr_scheduler_type": "linear", "warmup_steps": 0.1}, "warmup_steps=0.1 is of type float; give int"),
    ({"warmup_ratio": 0.1}, r"warmup_ratio \(the nearest is warmup_steps\)"),
    (
        {"warmup_steps": 3, "num_iterations": 2},
        "warmup_steps counts updates, and num_iterations of them are one step",
    ),
    (
        {"lr_scheduler_type": "linear", "num_iterations": 2},
        "counts updates, .* give lr_schedule='LinearWithWarmup'",
    ),
    ({"lr_scheduler_type": "cosine", "num_iterations": 3}, "give lr_schedule='CosineWithWarmup'$"),
    (
        {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3, "num_iterations": 2},
        "give lr_schedule='ConstantWithWarmup'$",
    ),
    ({"sync_ref_model": True}, r"sync_ref_model \(the nearest is beta\)"),
    (
        {"per_device_train_batch_size": 12},
        "=12 gives 12 completions per step, which is not a multiple of num_generations=8",
    ),
    ({"per_device_train_batch_size": "8"}, "per_device_train_batch_size='8' is of type str; give int"),
    ({"per_device_train_batch_size": 8, "micro_batch_size": 8}, "micro_batch_size is set twice"),
    ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps=4 needs per_device_train_batch_size"),
    by=lambda settings: recipe_of(**settings),
)


def test_lr_scheduler_type_constant_goes_with_several_updates_per_rollout():
    assert recipe_of(lr_scheduler_type="constant", num_iterations=2).lr_schedule(3, 9) == 1.0


# The fields that TRL 1.16.0 adds to transformers' TrainingArguments.
GRPO_CONFIG = re.findall(
    r"\w+",
    """
    learning_rate model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout cast_lm_head_to_fp32
    remove_unused_columns num_generations num_generations_eval max_completion_length ds3_gather_for_generation
    shuffle_dataset pad_to_multiple_of generation_batch_size steps_per_generation temperature top_p top_k min_p
    generation_kwargs chat_template_kwargs repetition_penalty cache_implementation use_vllm vllm_mode
    vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex vllm_server_base_url vllm_server_host
    vllm_server_port vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length
    vllm_tensor_parallel_size beta num_iterations epsilon delta epsilon_high sapo_temperature_neg
    sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg importance_sampling_level
    reward_weights multi_objective_aggregation scale_rewards loss_type mask_truncated_completions sync_ref_model
    ref_model_mixup_alpha ref_model_sync_steps top_entropy_quantile entropy_coef use_adaptive_entropy
    entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target max_tool_calling_iterations
    vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_clip_max
    vllm_importance_sampling_clip_min off_policy_mask_threshold use_bias_correction_kl log_completions
    log_multimodal num_completions_to_print log_unique_prompts log_completions_hub_repo
    use_transformers_continuous_batching transformers_continuous_batching_config use_transformers_paged
    vllm_importance_sampling_cap
    """,
)


def test_every_name_of_trls_config_is_taken_or_refused_by_its_name():
    known = {*Recipe.__dataclass_fields__, *inspect.signature(grpo_recipe).parameters, *TRL_NAMES, *STRING_VALUES}
    refused = [name for name in GRPO_CONFIG if name not in known]
    assert len(GRPO_CONFIG) == 79 and REMEDIES.keys() & {*GRPO_CONFIG} <= {*refused}
    with pytest.raises(ValueError, match=r"^not settings of grpo: ") as caught:
        translate_trl_names(grpo_recipe, dict.fromkeys(GRPO_CONFIG, object()))
    named = {part.split()[0] for part in str(caught.value).removeprefix("not settings of grpo: ").split(", ")}
    assert {*refused} <= {name.split(";")[0] for name in named} and "\n" not in str(caught.value)


def test_each_remedy_is_a_setting_or_says_what_else():
    known = {
        *Recipe.__dataclass_fields__,
        *inspect.signature(grpo_recipe).parameters,
        *TRL_NAMES,
        *STRING_VALUES,
        *TRL_FLAT,
    }
    others = {remedy for remedy in REMEDIES.values() if remedy.partition(".")[0] not in known}
    assert others == {
        "accelerate launch --cpu",
        "accelerate launch --num_processes",
        "beta, the coefficient of a KL term in the loss",
        "log={'completions_steps': ...}",
        "limits={'collective_timeout': ...}",
        "evaluation={'batch_size': ...}",
        "nothing: logits are computed in fp32",
        "loss=PPOClip(delta=...)",
        "loss=PPOClip(epsilon=...)",
        "loss=PPOClip(epsilon_high=...)",
        "train_batch_size, all of whose prompts are in each update",
        "dllm-rl evaluate --samples",
        "each of its fields as an argument",
        "reward_funcs that return None for cut answers",
        "the environment's HF_TOKEN",
        "train(grpo_recipe(...), features=...)",
    }
    options = {remedy.partition(".")[2] for remedy in REMEDIES.values() if remedy.startswith("sampler_options.")}
    assert options <= inspect.signature(Unmask).parameters.keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"use_vllm": True, "zyx": 1, "max_steps": 3, "num_stepz": 2},
            "use_vllm (the nearest is rollout_quantization), zyx, num_stepz (the nearest is num_steps)",
        ),
        (
            {"loss_type": "vespo", "fp16": True},
            "loss_type='vespo' (give loss=VESPO()), fp16 (the nearest is dtype)",
        ),
        # Names come before values: a wrong value does not hide a further name.
        ({"learning_rate": "fast", "zyx": 1, "xyz": 1}, "zyx, xyz"),
        (
            {"per_device_train_batch_size": 0.5, "hub_token": "a"},
            "hub_token (the nearest is the environment's HF_TOKEN)",
        ),
    ],
)
def test_all_names_that_are_not_known_are_refused_together(settings, message):
    with pytest.raises(
        ValueError, match=f"^{re.escape(f'not settings of grpo: {message}; help(dllm_rl.Recipe) lists all')}$"
    ):
        recipe_of(**settings)


@pytest.mark.parametrize("model", [None, 3, 0.5, ["a"], {"model": "a"}])
def test_what_is_no_model_is_refused_by_its_value(model):
    with pytest.raises(ValueError, match=f"^model={re.escape(repr(model))} is not one of these: a checkpoint's folder"):
        grpo_recipe(model, ROWS, right)


FILL = [{"prompt": f"{a}_={a}_", "right": f"{a}{a}={a}{a}"} for a in "1234"]


@pytest.mark.parametrize(
    ("rows", "settings", "length"),
    [
        (FILL, {"blank": "_"}, 0),
        ([row | {"blank": "_"} for row in FILL], {}, 0),
        ([row | {"blank": "_"} for row in FILL], {"blank": "="}, 0),  # a row's own goes first
        (FILL, {"blank": "_", "max_new_tokens": 1}, 1),
    ],
)
@pytest.mark.repeated
def test_blanks_are_filled_in_and_graded(tmp_path, rows, settings, length):
    seen = []

    def filled(completions, right, **columns):
        seen.extend(completions)
        return [float(text == full) for text, full in zip(completions, right, strict=True)]

    policy = tiny_masked_lm(characters="1234=", hidden_size=16, num_layers=1)
    changes = {"num_steps": 1, "num_generations": 2, "train_batch_size": 2, "report_to": "none"}
    changes |= {"log": Log(completions_steps=0)}
    recipe = grpo_recipe(policy, rows, filled, output_dir=str(tmp_path), **settings, **changes)
    assert recipe.sampler.max_new_tokens == length
    assert recipe.task[0].blank == "_" and isinstance(recipe.likelihood, Trajectory)
    train(recipe)
    assert seen and all("_" not in text and text[0] in "1234" and "=" in text for text in seen)


def test_the_length_of_blanks_counts_as_sampled_tokens():
    """Dr. GRPO divides by it, and a likelihood of many steps is scored in segments."""
    policy = tiny_masked_lm(**SMALL)
    recipe = grpo_recipe(policy, [{"prompt": "1" + "_" * 12}] * 4, right_length, blank="_", loss_type="dr_grpo")
    assert recipe.loss_reduction == FixedLengthMean(length=12)
    assert recipe.likelihood == grpo_recipe(policy, ROWS, right, max_new_tokens=12).likelihood
    chat = [{"prompt": [{"role": "user", "content": "1__"}, {"role": "user", "content": "_"}]}] * 4
    recipe = grpo_recipe(policy, chat, right_length, blank="_", loss_type="dr_grpo")
    assert recipe.loss_reduction == FixedLengthMean(length=3)


def right_length(completions, **columns):
    return [float(len(text)) for text in completions]


@pytest.mark.parametrize("blank", [3, True, ["_"]])
def test_a_column_of_blanks_that_is_not_text_is_refused(blank):
    with pytest.raises(ValueError, match=f"row 0 has blank={re.escape(repr(blank))}, which is not text"):
        grpo_recipe(tiny_masked_lm(**SMALL), [row | {"blank": blank} for row in ROWS], right)


@pytest.mark.parametrize("rows", [["1="], [{"question": "1="}], "1=", {"prompt": ["1="]}])
def test_held_out_rows_that_cannot_be_read_are_named_as_such(rows):
    training = [{"prompt": "12=", "answer": "3"}] * 4
    with pytest.raises(ValueError, match=r"^eval_dataset"):
        grpo_recipe(tiny_masked_lm(characters="123="), training, lambda completions, **_: [0.0], eval_dataset=rows)


def even(prompts, completions, answer, **_):
    return [0.0 for _ in completions]


GOOD = {"prompt": "12=", "answer": "3"}


@pytest.mark.parametrize("given", ["the last of train_dataset", "eval_dataset", "eval_dataset of two"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt": "9=", "answer": "3"}, "text '9=' cannot be tokenized"),
        ({"prompt": [{"role": "user", "content": "1"}], "answer": "3"}, r"give plain text .* with a chat_template"),
        ({"prompt": 7, "answer": "3"}, "prompt=7 is neither text nor chat"),
        ({"prompt": "1" * 63, "answer": "3"}, "the prompt has 63 tokens and its completion 2, more than"),
        ({"prompt": "1="}, "'answer'"),
        ({"question": "1="}, "no (column )?'prompt', only"),
        ({"prompt": "1=", "answer": "3", "blank": 4}, "blank=4, which is not text"),
        (None, "'None' of type NoneType"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_as_the_caller_gave_it(given, bad, message, tmp_path):
    """Also of the held-out rows, which are numbered from the end of the training rows for the caller alone."""
    rows = {
        "the last of train_dataset": ([GOOD] * 30 + [bad], {}, "train_dataset: row 30"),
        "eval_dataset": ([GOOD] * 3, {"eval_dataset": [bad]}, "eval_dataset(: row 0)?"),
        "eval_dataset of two": ([GOOD] * 3, {"eval_dataset": [GOOD, bad]}, "eval_dataset: row 1"),
    }
    train_rows, more, place = rows[given]
    model = tiny_masked_lm(characters="123=")
    with pytest.raises(ValueError, match=f"^{place}.*{message}"):
        grpo(model, train_rows, even, num_steps=1, max_new_tokens=2, output_dir=tmp_path / "run", **more)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rows", "held_out", "said"),
    [
        ([GOOD], None, "1 problem, all of them of training: none is held out"),
        ([GOOD] * 40, None, "4 problems, all of them of training: none is held out"),
        ([GOOD, {"prompt": "1=", "answer": "1"}], [GOOD, {"prompt": "2="}], "2 held-out problems, 1 of them of tr"),
        (Dataset.from_list([{"prompt": "1="}]), Dataset.from_list([{"prompt": "2="}]), "1 held-out problem"),
    ],
)
def test_a_problem_that_is_trained_on_is_not_called_held_out(rows, held_out, said, tmp_path, capsys):
    model = tiny_masked_lm(characters="123=")
    settings = {"num_steps": 0, "max_new_tokens": 2, "output_dir": tmp_path, "eval_dataset": held_out}
    summary = grpo(model, rows, short, **settings)
    printed = capsys.readouterr().out
    assert len(re.findall(rf" on {said}[^,\n]*(?:, after|\n)", printed)) == 2
    num_in_training = {"a": 4, "n": 1, "h": 0}["a" if "all" in said else "n" if "of tr" in said else "h"]
    assert summary["eval_problems_in_training"] == min(num_in_training, summary["eval_problems"])


def test_a_run_without_output_dir_takes_a_new_folder_and_a_resume_the_newest(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    def moves(completions, **_):  # as a checker that runs programs in a folder of its own
        monkeypatch.chdir(tmp_path / "elsewhere")
        return [float(index) for index in range(len(completions))]

    for expected in ("grpo-seed0", "grpo-seed0-2", "grpo-seed0-3"):
        monkeypatch.chdir(tmp_path)
        grpo(tiny_masked_lm(**SMALL), ROWS, moves, **options("x", output_dir=None, num_steps=0))
        assert f"output_dir: runs/{expected}\n" in capsys.readouterr().out
        assert (tmp_path / "runs" / expected / "summary.json").exists()
    monkeypatch.chdir(tmp_path)
    more = {"output_dir": None, "num_steps": 0, "resume_from_checkpoint": "latest"}
    grpo(tiny_masked_lm(**SMALL), ROWS, moves, **options("x", **more))
    assert f"output_dir: runs/{expected}\n" in capsys.readouterr().out
    assert not list((tmp_path / "elsewhere").iterdir()) and len(list((tmp_path / "runs").iterdir())) == 3


@pytest.mark.parametrize(
    ("rows", "blank", "expected"),
    [
        ([{"prompt": "12"}, {"prompt": "1_"}], "_", 0),
        ([{"prompt": "1_"}, {"prompt": "12"}], "_", 1),
        ([{"prompt": "12"}, {"prompt": "12"}], "_", 0),
        ([{"prompt": "1?", "blank": "?"}, {"prompt": "12", "blank": None}], None, 1),
        (Dataset.from_list([{"prompt": "12", "blank": None}, {"prompt": "1?", "blank": "?"}]), None, 0),
    ],
)
def test_a_row_without_a_blank_is_refused_unless_tokens_are_appended(rows, blank, expected):
    arguments = lambda: tiny_masked_lm(characters="12?_"), rows, short
    with pytest.raises(ValueError, match=f"^train_dataset: the prompt of row {expected} has no blank"):
        grpo_recipe(*arguments, blank=blank, eval_dataset=rows)
    assert grpo_recipe(*arguments, blank=blank, eval_dataset=rows, max_new_tokens=3).sampler.max_new_tokens == 3


def test_a_causal_model_fills_in_no_blanks():
    with pytest.raises(ValueError, match="blank: a causal model appends tokens"):
        grpo_recipe(lambda: tiny_llama(characters="12_", causal=True), [{"prompt": "1_"}] * 2, short, blank="_")


test_refused = refused(
    (
        lambda tmp_path: train(tiny_recipe(tmp_path, advantages=Decoupled())),
        r"advantages=Decoupled\(eps=0.0001\) takes each component reward, and task 'sudoku' has",
    ),
    (
        lambda: grpo_recipe(tiny_masked_lm(**SMALL), ROWS, right, max_new_tokens=8, sampler_options={"nope": 1}),
        r"sampler_options: not settings of Unmask: nope; help\(Unmask\)",
    ),
    (lambda: grpo_recipe(tiny_masked_lm(**SMALL), right, right), "train_dataset is a function; the argument order is"),
    (
        lambda: recipe_of(sampler_options={"blok_size": 1, "top_k": 2, "tempo": 1}),
        r"sampler_options: not settings of Unmask: blok_size \(the nearest is block_size\), tempo.*; help",
    ),
)
