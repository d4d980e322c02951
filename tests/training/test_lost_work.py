"""An error in the user's code loses no step: at every place a run calls such code, and goes on from `latest`."""

from collections import Counter
from functools import partial

import pytest
import torch
from repetitions import few, slow
from run_outputs import assert_same_weights, metrics_of
from tiny_recipe import made_of

from dllm_rl import Callback, Lora, grpo_recipe, tiny_masked_lm, train
from dllm_rl.algorithms.advantages import GroupRelative
from dllm_rl.algorithms.correctors import FunctionCorrector, NoCorrection
from dllm_rl.algorithms.losses import PPOClip, TokenMean
from dllm_rl.algorithms.optimizers import LinearDecay
from dllm_rl.algorithms.prompt_sources import FunctionPromptSource
from dllm_rl.checkpoints import checkpoint
from dllm_rl.groups import Log
from dllm_rl.likelihoods.estimators import Trajectory
from dllm_rl.models.rollout_engine import FunctionEngine
from dllm_rl.monitoring.json_lines import JsonLines, current_rows
from dllm_rl.quantization.rollout_policy import quantized_copy, sync_weights
from dllm_rl.samplers.sampler import FunctionSampler
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.step.collect import draw_indices
from dllm_rl.supervised.sft import SFT
from dllm_rl.training.fine_tune import fine_tune
from dllm_rl.training.late_rollouts.schedule import InProcessPool

pytestmark = pytest.mark.usefixtures("no_rehearsal")

ROWS = [{"prompt": f"{a}{b}=", "answer": f"{b}{a}"} for a in "123456" for b in "123456"]
STEPS, FAILS = 3, 2  # the error is met in the second of three steps


class Fault(RuntimeError):  # as the run raises for a reward function
    pass


class Places:
    """Counts the calls of user code by place, and raises in one place in one step, counted by what begins a step."""

    def __init__(self):
        self.begin()

    def begin(self, fails=None, step=0):  # a method, so that a resume sees state in them, and no settings
        self.fails, self.step, self.calls = fails, step, Counter()

    def reach(self, place):
        self.calls[place] += 1
        if (place, self.step) == (self.fails, FAILS):
            raise Fault(place)


PLACES = Places()


def reward(completions, answer, held, **columns):
    PLACES.reach("a reward of an evaluation" if held[0] else "a reward of a rollout")
    return [sum(a == b for a, b in zip(*pair, strict=False)) / 2 for pair in zip(completions, answer, strict=True)]


def sampler(place, temperature):
    plain = Unmask(max_new_tokens=2, diffusion_steps=2, temperature=temperature)

    def sample(policy, prompts, generator):
        PLACES.reach(place)
        return plain(policy, prompts, generator)

    return FunctionSampler(function=sample, max_new_tokens=2)


def prompts(*, uses_history=True):
    def draw(history, count, generator):
        PLACES.step += 1
        PLACES.reach("the prompt source")
        return draw_indices(history.num_prompts, count, int(torch.randint(10**6, (1,), generator=generator)))

    return FunctionPromptSource(function=draw, uses_history=uses_history)


def advantages(rewards, group):
    PLACES.reach("the advantages")
    return GroupRelative()(rewards, group)


def corrector():
    def weights(stats):
        PLACES.reach("the corrector")
        return NoCorrection().weights(stats)

    return FunctionCorrector(function=weights)


def loss(log_ratio, advantages, mask):
    PLACES.reach("the loss")
    return PPOClip()(log_ratio, advantages, mask)


def reduction(*arguments, **keywords):
    PLACES.reach("the loss reduction")
    return TokenMean()(*arguments, **keywords)


def rate(step, num_steps):
    PLACES.reach("the learning rate")
    return LinearDecay()(step, num_steps)


def sync(policy, rollout_policy):
    PLACES.reach("the sync of the engine")
    return sync_weights(policy, rollout_policy)


def engine():
    return FunctionEngine(load_fn=partial(quantized_copy, scheme=None), sync_fn=sync)


class Replay(Trajectory):
    def draw_views(self, rollout, generator):
        PLACES.reach("the likelihood")
        return super().draw_views(rollout, generator)


class Summing(Callback):
    """Logs the sum of a metric so far: a number that a lost or a repeated call would change."""

    def __init__(self, name):
        self.name = name

    def on_start(self, run):
        self.sum, self.evaluated = 0.0, []

    def on_step(self, run, metrics):
        PLACES.reach(f"on_step of {self.name}")
        self.sum += metrics["grad_norm"]
        return {f"{self.name}/sum": self.sum, f"{self.name}/evaluated": sum(self.evaluated)}

    def on_evaluate(self, run, metrics):
        PLACES.reach(f"on_evaluate of {self.name}")
        self.evaluated.append(max(metrics.values()))

    def on_save(self, run, folder):
        PLACES.reach(f"on_save of {self.name}")

    def state(self):
        PLACES.reach(f"state of {self.name}")
        return {"sum": self.sum, "evaluated": self.evaluated}

    def load_state(self, state):
        self.sum, self.evaluated = state["sum"], state["evaluated"]


def recipe(folder, **changes):
    rows, held = ([{**row, "held": here} for row in ROWS] for here in (False, True))
    settings = {
        "prompt_source": prompts(),
        "advantages": advantages,
        "corrector": corrector(),
        "loss": loss,
        "loss_reduction": reduction,
        "lr_schedule": rate,
        "rollout_engine": engine(),
        "likelihood": Replay(),
        "sampler": sampler("the sampler of a rollout", 1.0),
        "eval_sampler": sampler("the sampler of an evaluation", 0.0),
        "metric_for_best_model": "reward",
        "load_best_model_at_end": True,
        "learning_rate": 0.02,
    }
    fixed = {"num_steps": STEPS, "eval_steps": FAILS, "save_steps": 100, "train_batch_size": 4, "num_generations": 4}
    small = partial(tiny_masked_lm, characters="123456=", hidden_size=16, num_layers=1)
    callbacks = [Summing("first"), Summing("second")]
    files = {"output_dir": str(folder), "report_to": "none", "callbacks": callbacks}
    return grpo_recipe(small, rows, reward, eval_dataset=held[:4], **fixed | settings | files | changes)


def steps(folder):
    return [step for step, _ in checkpoint.list_checkpoints(folder / "checkpoints")]


def run(folder, pool=None, *, fails=None, **changes):
    PLACES.begin(fails, FAILS if "resume_from_checkpoint" in changes else 0)
    return train(recipe(folder, **changes), pool)


BEFORE = [  # the update
    *("the prompt source", "the sampler of a rollout", "a reward of a rollout", "the advantages", "the likelihood"),
    *("the corrector", "the loss", "the loss reduction", "the learning rate"),
]
AFTER = [
    *("the sync of the engine", "the sampler of an evaluation", "a reward of an evaluation"),
    *(f"{hook} of {name}" for hook in ("on_evaluate", "on_step", "state") for name in ("first", "second")),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lost") / "whole"
    summary = run(folder)
    assert {*BEFORE, *AFTER} <= PLACES.calls.keys()
    return summary, folder


def fail_and_go_on(folder, place, pool=InProcessPool, **changes):
    """Raise in the place, read what is printed, and go on as it says; return the newest step saved and the summary."""
    with pytest.raises(RuntimeError, match=place) as raised:
        run(folder, pool() if "late" in changes else None, fails=place, **changes)
    note = "\n".join(raised.value.__notes__)
    newest = steps(folder)[-1]
    assert f"failed after step {newest} was " in note and "not saved" not in note
    assert f"continue with resume_from_checkpoint='latest', output_dir='{folder}'" in note
    checkpoint.check(checkpoint.folder_of(folder / "checkpoints", newest))
    pool = pool() if "late" in changes else None
    return newest, run(folder, pool, **changes, resume_from_checkpoint="latest")


FIRST = ("the loss", "the sync of the engine", "on_step of second")


@pytest.mark.parametrize("place", few([*BEFORE, *AFTER], FIRST))
def test_an_error_anywhere_loses_no_step_and_the_run_goes_on_bit_for_bit(tmp_path, whole, place):
    """The logs keep each step's completions and seconds, also of a step that was updated, and not logged: it is not
    sampled again."""
    summary, folder = whole
    newest, resumed = fail_and_go_on(tmp_path, place, log=Log(completions_steps=1))
    assert newest == (FAILS if place in AFTER else FAILS - 1)
    assert_same_weights(summary, resumed)
    assert metrics_of(tmp_path) == metrics_of(folder)
    assert (resumed["best_step"], resumed["best_value"]) == (summary["best_step"], summary["best_value"])
    assert resumed["eval_after"] == summary["eval_after"]
    completions, metrics = (current_rows(tmp_path / f"{name}.jsonl") for name in ("completions", "metrics"))
    each = [(row["step"], row["prompt"], row["completion"]) for row in completions]
    assert {step for step, *_ in each} == set(range(STEPS)) and all(row["time/update"] > 0 for row in metrics)
    assert all(row["step_time"] >= row["time/rollout"] + row["time/update"] for row in metrics)
    lines = (tmp_path / "completions.jsonl").read_text().splitlines()
    assert f'{{"resume_from": {newest}}}' in lines and len(lines) == len(each) + 1, "no row is written twice"


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, OSError])
@pytest.mark.repeated(first_only=True)
def test_an_end_of_any_kind_loses_none(tmp_path, whole, monkeypatch, kind):
    """In the log: a full disk, an interrupt in another thread than the main one, `sys.exit()`."""
    append = JsonLines.append

    def failing(self, row):
        if row.get("step") == FAILS - 1:
            raise kind("the end")
        append(self, row)

    with monkeypatch.context() as patched, pytest.raises(kind, match="the end"):
        patched.setattr(JsonLines, "append", failing)
        run(tmp_path)
    assert steps(tmp_path)[-1] == FAILS
    assert_same_weights(whole[0], run(tmp_path, resume_from_checkpoint="latest"))
    assert metrics_of(tmp_path) == metrics_of(whole[1])


@pytest.mark.slow
def test_an_error_in_on_save_of_a_step_that_is_saved(tmp_path, whole):
    newest, resumed = fail_and_go_on(tmp_path, "on_save of second", save_steps=FAILS)
    assert newest == FAILS
    assert_same_weights(whole[0], resumed)
    assert metrics_of(tmp_path) == metrics_of(whole[1])


@pytest.mark.slow
def test_a_second_error_in_the_same_place_loses_none(tmp_path, whole):
    """The step's hooks and its evaluation are called again until they succeed, also after an error in a later step."""
    place = "on_step of second"
    for settings in ({}, {"resume_from_checkpoint": "latest"}):
        with pytest.raises(Fault):
            run(tmp_path, fails=place, **settings)
        assert steps(tmp_path) == [0, FAILS]
    assert_same_weights(whole[0], run(tmp_path, resume_from_checkpoint="latest"))
    assert metrics_of(tmp_path) == metrics_of(whole[1])


@pytest.mark.slow
def test_an_error_in_the_last_step_loses_none(tmp_path, whole):
    """Also its evaluation: a resume makes it and finishes the run."""
    short = {"num_steps": FAILS, "lr_schedule_steps": STEPS}
    newest, resumed = fail_and_go_on(tmp_path / "parts", "a reward of an evaluation", **short)
    assert newest == FAILS
    assert_same_weights(run(tmp_path / "whole", **short), resumed)
    assert metrics_of(tmp_path / "parts") == metrics_of(tmp_path / "whole") == metrics_of(whole[1])[:FAILS]


@pytest.mark.slow
def test_adapters_with_dropout_draw_the_same_masks_after_an_error_between_forward_and_update(tmp_path):
    adapted = {"lora": Lora(r=2, dropout=0.3), "micro_batch_size": 8}
    _, resumed = fail_and_go_on(tmp_path / "parts", "the loss", **adapted)
    assert_same_weights(run(tmp_path / "whole", **adapted), resumed)
    assert metrics_of(tmp_path / "parts") == metrics_of(tmp_path / "whole")


def test_a_checkpoint_that_a_resume_writes_again_is_reported_to_on_save(tmp_path):
    """An error in the evaluation after the last step leaves a checkpoint of it, of which no callback has heard."""
    saved = []

    class Copying(Callback):
        def on_save(self, run, folder):
            saved.append(folder.name)

    settings = {"num_steps": FAILS, "lr_schedule_steps": STEPS, "save_steps": 1, "callbacks": [Copying()]}
    fail_and_go_on(tmp_path, "a reward of an evaluation", **settings)
    assert saved == [f"step-{step:06d}" for step in range(FAILS + 1)]


class FailingPool(InProcessPool):
    """Workers that cannot be told of the weights after the second step."""

    def forget(self, step):
        PLACES.reach("the pool")
        super().forget(step)


LATE = {"late": {"workers": 1, "max_staleness": 1}, "prompt_source": prompts(uses_history=False)}


@pytest.mark.slow
@pytest.mark.parametrize("place", ["the pool", "the sync of the engine", "on_step of first"])
def test_late_rollouts_lose_none(tmp_path, place):
    _, resumed = fail_and_go_on(tmp_path / "parts", place, FailingPool, **LATE)
    assert_same_weights(run(tmp_path / "whole", InProcessPool(), **LATE), resumed)
    # The parts of the mismatch are measured with the weights before the update, which a resumed run does not have.
    parts, whole = (
        [{k: v for k, v in row.items() if not k.startswith("mismatch_split/")} for row in metrics_of(tmp_path / name)]
        for name in ("parts", "whole")
    )
    assert parts == whole


def beginning_rate(step, num_steps):
    PLACES.step = step + 1
    return rate(step, num_steps)


def tune(folder, *, fails=None, **changes):
    PLACES.begin(fails)
    rows = [{"prompt": row["prompt"], "completion": row["answer"]} for row in ROWS]
    small = partial(tiny_masked_lm, characters="123456=", hidden_size=16, num_layers=1)
    settings = {"max_length": 8, "num_steps": STEPS, "eval_steps": FAILS, "save_steps": 100, "report_to": "none"}
    callbacks = [Summing("first"), Summing("second")]
    files = {"name": "sft", "model": small, "dataset": rows, "output_dir": str(folder), "callbacks": callbacks}
    return fine_tune(made_of(SFT, **settings | files | {"lr_schedule": beginning_rate} | changes))


@pytest.mark.parametrize("place", [slow("the learning rate"), "on_evaluate of second", slow("on_step of first")])
def test_fine_tuning_loses_none(tmp_path, place):
    with pytest.raises(Fault):
        tune(tmp_path / "parts", fails=place)
    assert steps(tmp_path / "parts") == [0, FAILS - (place == "the learning rate")]
    resumed = tune(tmp_path / "parts", resume_from_checkpoint="latest")
    assert_same_weights(tune(tmp_path / "whole"), resumed)
    assert metrics_of(tmp_path / "parts") == metrics_of(tmp_path / "whole")
