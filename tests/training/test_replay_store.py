"""Replay: right answers are kept, and trained on again under fresh masks. Rewards here are a function of the text."""

import os
import shutil
import signal
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from refusals import refused, refuses
from repetitions import slow
from run_outputs import assert_same_weights, metrics_of, weights_of
from tiny_recipe import ONE_PUZZLE, SIZES, Wrapped, tiny_recipe, tiny_recipe_ar

from dllm_rl import Float8WeightOnly, Lora, Replay, tiny_masked_lm, train
from dllm_rl.algorithms.correctors import TIS, NoCorrection
from dllm_rl.checkpoints.checkpoint import list_checkpoints
from dllm_rl.groups import Teacher
from dllm_rl.likelihoods.estimators import Coupled, Trajectory
from dllm_rl.rng import generator_for
from dllm_rl.step import update
from dllm_rl.supervised import trainer
from dllm_rl.supervised.examples import Example
from dllm_rl.tasks import Reward, Sudoku
from dllm_rl.training.parts import replay as replay_store
from dllm_rl.training.parts.replay import Answer, ReplayStore, examples_of

pytestmark = pytest.mark.usefixtures("no_rehearsal")

SMALL = {"min_reward": 1.0, "num_updates": 3, "batch_size": 4}


class EvenLength(Wrapped):
    """A completion is right if its number of digits is even: about half of those of an untrained model."""

    def reward(self, problem, completion):
        digits = sum(character.isdigit() for character in completion)
        return Reward(1.0 - digits % 2, True, {"solve_rate": 1.0 - digits % 2})


class NeverRight(Wrapped):
    def reward(self, problem, completion):
        return Reward(0.5 * (completion[:1] == "1"), True, {"solve_rate": 0.0})


def recipe_of(directory, *, recipe=tiny_recipe, task=EvenLength, replay=None, **changes):
    changes = {"rollout_quantization": None, "corrector": NoCorrection(), **ONE_PUZZLE} | changes
    replay = replay or Replay(**SMALL)
    return recipe(directory, task=task(Sudoku(split="train", size=40)), replay=replay, **changes)


class Spy:
    """What each replay update saw: its examples, the masked canvases, and its learning rate."""

    def __init__(self, monkeypatch):
        self.examples, self.seen, self.rates, self.noise = [], [], [], []
        step, loss = trainer.SupervisedTrainer.step, trainer.weighted_loss

        def spied_step(made, optimizer, examples, generator, **options):
            self.examples.append(examples)
            self.rates.append(options["learning_rate"])
            self.noise.append(generator.get_state().tolist())
            assert all(p.grad is None for p in made.policy.module.parameters()), "that of the policy gradient is gone"
            return step(made, optimizer, examples, generator, **options)

        def spied_loss(policy, layout, **options):
            self.seen.append((layout.tokens.clone(), layout.seen.clone(), layout.weight.clone()))
            return loss(policy, layout, **options)

        monkeypatch.setattr(trainer.SupervisedTrainer, "step", spied_step)
        monkeypatch.setattr(trainer, "weighted_loss", spied_loss)


def store_of(size, **settings):
    store = ReplayStore(Replay(min_reward=1.0, **settings), num_steps=9)
    empty = torch.zeros(0, dtype=torch.long)
    store.answers = [Answer(Example(empty, empty.bool()), step) for step in range(size)]
    return store


@pytest.mark.parametrize(
    ("size", "settings", "updates"),
    [
        (0, {}, []),
        (1, {}, [4]),  # four trainings of the one answer
        (5, {"max_replays": 2}, [10]),
        (5, {"max_replays": 2, "batch_size": 4}, [4, 4, 2]),
        (40, {"num_updates": 2, "batch_size": 16}, [16, 16]),
        (1000, {}, [64] * 8),
        (130, {"max_replays": 1, "num_updates": 5}, [64, 64, 2]),
    ],
)
def test_an_answer_comes_again_after_all_others_and_at_most_max_replays_times(size, settings, updates):
    store = store_of(size, **settings)
    visits = store.draw(seed=0)
    assert [len(batch) for batch in visits] == updates
    drawn = [i for batch in visits for i in batch]
    counts = Counter(drawn)
    assert not drawn or max(counts.values()) <= store.replay.max_replays
    for start in range(0, len(drawn) - size + 1, size or 1):
        assert sorted(drawn[start : start + size]) == list(range(size)), "a pass has every answer once"
    if size > 1:
        store.step = 1
        assert store.draw(seed=0) != visits, "another step has another order"


def halving(step, num_steps):
    return 0.5 ** (step + 1)


@pytest.fixture(scope="module")
def replayed(tmp_path_factory):
    """Three steps of four updates on six answers: what was seen, the run's folder and policy, and its store."""
    stores, folder = [], tmp_path_factory.mktemp("replayed")
    replay = Replay(min_reward=1.0, num_updates=4, batch_size=6, learning_rate=3e-3)
    changes = {"num_steps": 3, "log_completions_steps": 1, "learning_rate": 1e-3, "lr_schedule": halving}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dllm_rl.training.start.rehearse", lambda *_: None)
        patch.setattr(replay_store.ReplayStore, "__init__", keep(stores, ReplayStore.__init__))
        spy = Spy(patch)
        policy = train(recipe_of(folder, replay=replay, **changes)).policy
    return spy, folder, policy, stores[-1]


def test_right_answers_alone_are_kept_with_their_steps(replayed):
    """What is replayed is what the log's completions say is right, and ages are steps since then, by hand."""
    spy, folder, policy, store = replayed
    rows = metrics_of(folder)
    per_step = Counter(answer.step for answer in store.answers)
    assert [per_step[step] for step in range(3)] == [round(16 * row["reward"]) for row in rows]
    assert [row["replay/size"] for row in rows] == [sum(per_step[s] for s in range(step + 1)) for step in range(3)]
    for answer in store.answers:
        written = answer.example.tokens[answer.example.learned].tolist()
        text = policy.tokenizer.decode(written, skip_special_tokens=False).split("<eos>")[0]
        assert sum(character.isdigit() for character in text) % 2 == 0
    step_of = {id(answer.example): answer.step for answer in store.answers}
    for step, row in enumerate(rows):
        drawn = [example for batch in spy.examples[4 * step : 4 * step + 4] for example in batch]
        assert row["replay/updates"] == 4 and row["replay/visits"] == 24 / row["replay/size"]
        assert row["replay/age"] == pytest.approx(sum(step - step_of[id(e)] for e in drawn) / 24)
    assert rows[-1]["replay/age"] > 0


def keep(made, function):
    def kept(self, *args):
        made.append(self)
        function(self, *args)

    return kept


def test_masks_are_drawn_anew_and_prompts_are_never_masked(replayed):
    spy, *_ = replayed
    masks = [
        {tuple(row.tolist()): (a != b).tolist() for row, a, b in zip(tokens, tokens, visible, strict=True)}
        for tokens, visible, _ in spy.seen
    ]
    again = [(a[row], b[row]) for i, a in enumerate(masks) for b in masks[i + 1 :] for row in a.keys() & b.keys()]
    assert len(again) > 20 and sum(a != b for a, b in again) > 0.9 * len(again)
    assert all(a != b for i, a in enumerate(spy.noise) for b in spy.noise[i + 1 :])
    for tokens, visible, weight in spy.seen:
        assert ((tokens != visible) == (weight > 0)).all()
        assert (weight[weight > 0] >= 1).all(), "1 / t: every token counts alike, in short answers and in long ones"
        assert not (tokens != visible)[:, :17].any(), "the prompt of 17 characters"


def test_rewards_that_are_lacking_or_too_low_are_not_right():
    rollout = SimpleNamespace(rows=lambda keep: keep)
    made = []
    cases = [
        (0.5, [float("nan"), 0.5, 0.49, 1.0]),
        (0.5, [float("-inf"), float("nan"), 0.0, -1.0]),
        (0.9, [0.7 + 0.1 + 0.1, 0.8999999]),  # the first is 0.8999999999999999 in fp64
        (-1e6 - 0.01, [-1e6 - 0.01, -1e6 - 0.02]),  # equal in fp32
    ]
    for min_reward, rewards in cases:
        store = ReplayStore(Replay(min_reward=min_reward), num_steps=9)
        given = torch.tensor(rewards, dtype=torch.float64)
        samples = SimpleNamespace(rollout=rollout, rewards=given, local=lambda values, _: values)
        context = SimpleNamespace(
            accelerator=None,
            log=SimpleNamespace(last={}),
            settings=SimpleNamespace(num_generations=2, update_settings=str),
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(replay_store, "examples_of", torch.Tensor.tolist)
            patch.setattr(replay_store, "gather_objects", lambda found, _: found)
            store.after_rollout(context, samples, 0)
        made.append([answer.example for answer in store.new_answers])
    assert made == [[1, 3], [], [0], [0]]


def test_the_oldest_answers_leave_first(tmp_path):
    recipe = recipe_of(tmp_path, num_steps=2, replay=Replay(capacity=6, **SMALL))
    stores = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay_store.ReplayStore, "__init__", keep(stores, ReplayStore.__init__))
        train(recipe)
    assert metrics_of(tmp_path)[-1]["replay/size"] == 6
    steps = [answer.step for answer in stores[-1].answers]
    assert steps == sorted(steps) and steps[-1] == 1


FP8 = {"rollout_quantization": Float8WeightOnly(), "corrector": TIS(), "likelihood": Trajectory()}


@pytest.mark.parametrize(
    "changes", [{}, {"num_iterations": 0}, {"lora": Lora()}, FP8], ids=["both", "no_grpo", "lora", "fp8"]
)
@pytest.mark.repeated(first_only=True)
def test_a_resume_continues_bit_for_bit(tmp_path, changes):
    changes = {"save_steps": 1, "save_total_limit": 9, "num_steps": 2, **changes}
    recipe = recipe_of(tmp_path / "whole", **changes)
    whole = train(recipe)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-000002")
    resumed = train(replace(recipe, output_dir=str(tmp_path / "parts"), resume_from_checkpoint="latest"))
    assert_same_weights(whole, resumed)
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "parts")
    states = [next((tmp_path / name / "checkpoints").glob("*02/ReplayStore.state")) for name in ("whole", "parts")]
    assert states[0].read_bytes() == states[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name", "calls", "save_steps"),
    [
        (trainer.SupervisedTrainer, "step", 8, 1),  # the second of three updates of the third step
        (update, "score_samples", 3, 4),  # after the rollout of the third step: the error saves the second
    ],
    ids=["killed", "error"],
)
def test_a_run_that_ends_within_a_step_continues_bit_for_bit(tmp_path, module, name, calls, save_steps):
    """What the step has added to the store is gone with the step."""
    changes = {"save_steps": save_steps, "num_steps": 4}
    whole = train(recipe_of(tmp_path / "whole", **changes))
    seen, function = [], getattr(module, name)

    def ends(*args, **options):
        seen.append(name)
        if len(seen) == calls:
            if name == "step":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("ends here")
        return function(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, ends)
        if name == "step":
            if not (child := os.fork()):
                train(recipe_of(tmp_path / "parts", **changes))
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        else:
            refuses("ends here", lambda: train(recipe_of(tmp_path / "parts", **changes)))
    assert max(step for step, _ in list_checkpoints(tmp_path / "parts" / "checkpoints")) == 2
    resumed = train(recipe_of(tmp_path / "parts", **changes, resume_from_checkpoint="latest"))
    assert_same_weights(whole, resumed)
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "parts")


def test_a_state_is_read_back():
    store = store_of(0)
    store.answers = [
        Answer(Example(torch.tensor([5, 6, 7]), torch.tensor([False, True, True])), 3),
        Answer(Example(torch.tensor([8]), torch.tensor([True])), 9),
    ]
    again = store_of(0)
    again.load_state(None, store.state(None))
    assert [answer.step for answer in again.answers] == [3, 9]
    for mine, other in zip(store.answers, again.answers, strict=True):
        assert torch.equal(mine.example.tokens, other.example.tokens)
        assert torch.equal(mine.example.learned, other.example.learned)
    assert store_of(0).state(None) is None


def test_without_a_policy_gradient_only_replay_trains(tmp_path, monkeypatch):
    """An untrained store changes nothing; otherwise the weights move by replay alone, and the mismatch is measured."""
    recipe = recipe_of(tmp_path / "none", task=NeverRight, num_iterations=0, num_steps=1)
    weights, first = weights_of(train(recipe)), recipe.model(seed=0).module.state_dict()
    assert weights and all(torch.equal(weight, first[name]) for name, weight in weights.items())
    rows = metrics_of(tmp_path / "none")
    assert all(row["replay/size"] == row["replay/updates"] == 0 and "grad_norm" not in row for row in rows)
    changes = {"num_iterations": 0, "num_steps": 1, "rollout_quantization": Float8WeightOnly()}
    train(recipe_of(tmp_path / "some", **changes))
    for row in metrics_of(tmp_path / "some"):
        assert row["replay/updates"] == 3 and row["rollout_corr/abs_log_ratio_mean"] > 0
        assert "grad_norm" not in row and row["quantization/codes_changed"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"replay": Replay(min_reward=0.0, batch_size=4), "allow_changed": "replay"}])
def test_a_run_without_a_right_answer_yet_is_resumed(tmp_path, changes):
    """No update has made moments of the optimizer."""
    task = {"task": NeverRight, "num_iterations": 0}
    first = train(recipe_of(tmp_path, **task, num_steps=2))
    again = {"num_steps": 4, "lr_schedule_steps": 2, "resume_from_checkpoint": "latest"}
    last = train(recipe_of(tmp_path, **task | again | changes))
    assert [row["replay/updates"] > 0 for row in metrics_of(tmp_path)] == [False, False, *[bool(changes)] * 2]
    assert all(torch.equal(*pair) for pair in parameters_of(first, last)) == (not changes)


def parameters_of(*summaries):
    return zip(*(summary.policy.module.parameters() for summary in summaries), strict=True)


@pytest.mark.slow
def test_right_answers_become_likelier(tmp_path):
    """Without a policy gradient, too: the loss of the answers in the store, under one set of masks."""
    stores, losses = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay_store.ReplayStore, "__init__", keep(stores, ReplayStore.__init__))
        summary = train(recipe_of(tmp_path, num_iterations=0, num_steps=12, learning_rate=3e-3))
    examples = [answer.example for answer in stores[-1].answers]
    for policy in (tiny_masked_lm(**SIZES), summary.policy):
        processes = SimpleNamespace(process_index=0, num_processes=1)
        made = trainer.SupervisedTrainer(policy=policy, processes=processes, like_rollouts=True)
        losses.append(made.loss(examples, generator_for(1), micro_batch_size=100))
    assert losses[1] < 0.9 * losses[0]


@pytest.mark.parametrize(("num_steps", "told"), [slow(20, 20), slow(22, 20), slow(3, 3), (2, 2)])
def test_a_run_without_right_answers_says_so(tmp_path, capsys, num_steps, told):
    train(recipe_of(tmp_path, task=NeverRight, num_steps=num_steps, num_iterations=0, train_batch_size=1))
    said = capsys.readouterr().out
    assert said.count(f"replay: no completion of the first {told} steps has a reward of at least 1") == 1
    assert "with num_iterations=0 no weight has changed" in said


def test_a_schedule_that_fails_is_called_before_the_update(tmp_path):
    """It is the user's function: after the update its error would lose the update."""
    calls = []

    def schedule(step, num_steps):
        calls.append(step)
        return 1.0

    seen = []
    with pytest.MonkeyPatch.context() as patch:
        step = trainer.SupervisedTrainer.step
        patch.setattr(trainer.SupervisedTrainer, "step", lambda *a, **k: (seen.append(len(calls)), step(*a, **k))[1])
        train(recipe_of(tmp_path, num_steps=1, lr_schedule=schedule))
    assert len(seen) == 3 and set(seen) == {len(calls)}, "no call between the updates or after them"


def test_a_collapse_is_said_once(tmp_path, capsys):
    changes = {"num_steps": 3, "num_generations": 8, "train_batch_size": 1}
    recipe = recipe_of(tmp_path, **changes)
    train(replace(recipe, sampler=recipe.sampler.replace(temperature=1e-3)))
    said = capsys.readouterr().out
    assert said.count("replay: completions/distinct_ratio=0.12") == 1 and "StopBelow" in said


def test_the_rate_follows_the_schedule(replayed):
    spy, *_ = replayed
    assert spy.rates == pytest.approx([3e-3 / 2] * 4 + [3e-3 / 4] * 4 + [3e-3 / 8] * 4)


@pytest.mark.slow
def test_the_recipes_rate_is_that_of_replay_which_has_none(tmp_path, monkeypatch):
    spy = Spy(monkeypatch)
    train(recipe_of(tmp_path, learning_rate=1e-3, lr_schedule=halving))
    assert spy.rates == pytest.approx([1e-3 / 2] * 3 + [1e-3 / 4] * 3)


def test_bf16_updates_use_the_weights_of_the_update_before(tmp_path):
    """Autocast keeps bf16 copies of the weights: with and without its cache, the same weights result."""
    made = []
    for cache in (True, False):
        recipe = recipe_of(tmp_path / str(cache), bf16=True, num_steps=1, learning_rate=1e-2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "autocast", autocast(cache))
            made.append(train(recipe))
    assert_same_weights(*made, rtol=1e-6, atol=1e-7)


def autocast(cache):
    real = torch.autocast

    def made(*args, **options):
        return real(*args, **options | {"cache_enabled": cache})

    return made


def test_without_a_policy_gradient_a_likelihood_that_draws_masks_works_too(tmp_path):
    train(recipe_of(tmp_path, num_iterations=0, num_steps=1, likelihood=Coupled()))
    assert all(row["replay/updates"] == 3 and "grad_norm" not in row for row in metrics_of(tmp_path))


@pytest.mark.slow
def test_a_causal_model(tmp_path):
    train(recipe_of(tmp_path, recipe=tiny_recipe_ar, num_steps=2))
    assert all(row["replay/updates"] == 3 for row in metrics_of(tmp_path))


def test_rollouts_of_several_turns_are_refused():
    rollout = SimpleNamespace(first_step=torch.zeros(1, 2))
    refuses("replay cannot train on rollouts of several turns", lambda: examples_of(rollout))


test_settings_that_cannot_be_combined = refused(
    ({"replay": None, "num_iterations": 0}, "num_iterations=0 trains on nothing without replay"),
    ({"num_iterations": 0, "beta": 0.1}, "num_iterations=0 has no policy gradient"),
    ({"num_iterations": 0, "entropy_coeff": 0.1}, "num_iterations=0 has no policy gradient"),
    ({"teacher": Teacher(model="reference")}, "replay keeps answers by their reward"),
    by=lambda changes, tmp_path: tiny_recipe(tmp_path, **{"replay": Replay(min_reward=1.0), **changes}),
)


@pytest.mark.parametrize("setting", ["num_updates", "batch_size", "max_replays", "capacity", "learning_rate"])
def test_settings_below_their_bounds(setting):
    refuses(f"{setting}=0", lambda: Replay(**{"min_reward": 1.0, setting: 0}))
