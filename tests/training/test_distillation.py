"""A teacher: its probabilities add up to 1, its reward has the gradient of the KL, and runs that use it."""

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from accelerate import Accelerator
from likelihood_toys import TablePolicy
from refusals import refused
from repetitions import few, slow
from run_outputs import assert_same_weights, metrics_of, weights_of
from tiny_recipe import SIZES, tiny_recipe, tiny_recipe_ar, with_changes

from dllm_rl import Decoupled, MaxProb, Trajectory, Unmask, tiny_masked_lm, train
from dllm_rl.decoding.prompts import encode
from dllm_rl.frontend.grpo import grpo_recipe
from dllm_rl.groups import Late, Teacher
from dllm_rl.models.lora_settings import Lora
from dllm_rl.models.tiny import tiny_llama
from dllm_rl.monitoring import health
from dllm_rl.rng import generator_for
from dllm_rl.samplers.revise import Remask
from dllm_rl.samplers.rules import Confidence, PlackettLuce, RandomOrder
from dllm_rl.tasks.datasets import task_from_dataset
from dllm_rl.tasks.sudoku import Sudoku
from dllm_rl.testing.enumeration import ToyPolicy, contributions, per_outcome
from dllm_rl.training.late_rollouts.schedule import InProcessPool
from dllm_rl.training.parts.teacher import TeacherReward, refine_steps, student_teacher_log_ratio
from dllm_rl.training.policies import build_policy, teacher_policy

pytestmark = pytest.mark.usefixtures("no_rehearsal")

STATE_ONLY = Unmask(max_new_tokens=16, diffusion_steps=3, rank=MaxProb(), temperature=1.0)


def scoring(recipe):
    """The settings of a recipe with which its teacher scores."""
    chosen = {name: getattr(recipe, name) for name in ("sampler", "micro_batch_size")}
    return chosen | {"num_substeps": recipe.teacher.substeps}


def taught_recipe(directory, teaches="reference", substeps=1, coeff=1.0, **changes):
    given = {"sampler": STATE_ONLY, "rollout_quantization": None, "report_to": None}
    given["teacher"] = Teacher(model=teaches, substeps=substeps, coeff=coeff)
    given |= {"eval_task": Sudoku(split="test", size=1)}
    return tiny_recipe(directory, **{**given, **changes})


def other_model(**changes):
    return tiny_masked_lm(**SIZES | changes, seed=9)


# --- The mathematics ------------------------------------------------------------------------------------------------


def test_finer_steps_by_hand():
    """Steps of three, two and one positions. In two parts each: 2 and 1, 1 and 1, 1."""
    toy = TablePolicy(length=6, words=2, seed=0)
    steps = torch.tensor([[-1, 1, 0, 0, 2, 1, 0]] * 4)
    rollout = toy.rollout(torch.zeros(4, 6, dtype=torch.long), num_generations=2, unmask_step=steps)
    seeds = torch.tensor([3, 3, 4, 4])
    parted = refine_steps(rollout, seeds, num_parts=2).unmask_step
    for row in parted.tolist():
        assert row[0] == -1 and sorted(row[2:4] + row[6:]) == [0, 0, 1]
        assert sorted([row[1], row[5]]) == [2, 3] and row[4] == 4
    alone = refine_steps(rollout, seeds, num_parts=8).unmask_step  # one position at a time, as far as there are any
    for row in alone.tolist():
        assert sorted(row[2:4] + row[6:]) == [0, 1, 2] and sorted([row[1], row[5]]) == [8, 9] and row[4] == 16
    assert torch.equal(alone[0], alone[1]) and torch.equal(alone[2], alone[3])  # one order for a prompt
    many = rollout.rows(torch.zeros(600, dtype=torch.long))
    drawn = refine_steps(many, torch.arange(600), num_parts=8).unmask_step
    orders = [tuple(row) for row in drawn[:, [2, 3, 6]].tolist()]
    assert all(60 < orders.count(order) < 140 for order in set(orders)) and len(set(orders)) == 6
    wider = refine_steps(rollout.padded(3), seeds, num_parts=8).unmask_step
    assert torch.equal(wider[:, 3:], alone)
    same = refine_steps(rollout, seeds, num_parts=1).unmask_step
    assert torch.equal(same, steps)


def outcomes(student: TablePolicy, sizes: tuple[int, ...]):
    """Every completion of a student that writes so many positions a step, the surest first, with its steps; by hand."""
    tokens, steps = [], []
    for words in product(range(student.words), repeat=student.length):
        step = [-1] * student.length
        for number, size in enumerate(sizes):
            open_ = [i for i in range(student.length) if step[i] < 0]
            sure = {
                i: max(student.logp([*words[:i], w, *words[i + 1 :]], set(open_), i) for w in range(student.words))
                for i in open_
            }
            for i in sorted(open_, key=lambda i: -sure[i])[:size]:
                step[i] = number
        tokens.append(words)
        steps.append([-1, *step])
    return torch.tensor(tokens), torch.tensor(steps)


@pytest.mark.parametrize("num_parts", [1, 2, 8])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_teachers_probabilities_add_up_to_one(tmp_path, num_parts, seed):
    """In the student's own order, which depends on what it wrote before."""
    student, teacher = (TablePolicy(length=5, words=2, seed=seed + each) for each in (0, 10))
    tokens, steps = outcomes(student, (2, 2, 1))
    assert len({tuple(row) for row in steps.tolist()}) > 1
    rollout = student.rollout(tokens, unmask_step=steps)
    recipe = taught_recipe(tmp_path, substeps=num_parts)
    # All completions are of one prompt, with one draw of the order; the rollout's own record is left at 0.
    found = -student_teacher_log_ratio(teacher, rollout, torch.full((32,), seed), **scoring(recipe))
    torch.testing.assert_close(found.exp().sum(), torch.ones((), dtype=torch.float64), rtol=0, atol=1e-6)
    parted = refine_steps(rollout, torch.full((32,), seed), num_parts=num_parts).unmask_step[:, 1:].tolist()
    by_hand = [
        sum(teacher.logp(words, {j for j in range(5) if row[j] >= row[i]}, i) for i in range(5))
        for words, row in zip(tokens.tolist(), parted, strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(by_hand, dtype=torch.float64), rtol=0, atol=1e-5)


class SinglePrecision(ToyPolicy):
    """With logits in fp32, as scoring stores them."""

    def head(self, hidden):
        return hidden.float()


@pytest.mark.parametrize("num_parts", [slow(1), 2])
def test_the_rewards_gradient_is_that_of_the_reverse_kl(tmp_path, num_parts):
    """A network of 336 weights writes four words in two steps. E_q[(log p_T - log q) grad log q] by enumeration, with
    the library's own ratios, against differences of KL(q || p_T) along random directions."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"length": 4, "words": 3, "generator": generator}
    student, teacher = ToyPolicy(**sizes, sharpness=1.0), SinglePrecision(**sizes, sharpness=1.5)
    rollout = student.rollout(2)
    seeds = torch.full((81,), 5)
    taken = refine_steps(rollout, seeds, num_parts=num_parts)

    def logps(policy, of):
        return contributions(policy, of, Trajectory().draw_views(of, torch.Generator()), Trajectory())

    target = logps(teacher, taken).sum(-1).double()

    def kl():
        own = logps(student, rollout).sum(-1)
        return (own.exp() * (own - target)).sum().item()

    before = [weight.clone() for weight in student.weights]
    wanted, directions = [], []
    for _ in range(2):
        direction = [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in before]
        ends = []
        for sign in (1, -1):
            student.weights = [w + sign * 1e-5 * d for w, d in zip(before, direction, strict=True)]
            ends.append(kl())
        wanted.append((ends[0] - ends[1]) / 2e-5)
        directions.append(torch.cat([d.flatten() for d in direction]))
    student.weights = [w.requires_grad_() for w in before]
    own = logps(student, rollout)
    recipe = taught_recipe(tmp_path, substeps=num_parts)
    reward = -student_teacher_log_ratio(teacher, replace(rollout, logprobs=own.detach()), seeds, **scoring(recipe))
    gradient = torch.einsum("b,btw->w", own.detach().sum(-1).exp() * reward, per_outcome(student, own))
    found = [-(gradient @ direction).item() for direction in directions]
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6) and max(map(abs, wanted)) > 0.1


def test_the_same_model_in_the_same_steps_has_a_kl_of_exactly_zero(tmp_path):
    settings = {"model": partial(tiny_masked_lm, **SIZES | {"num_layers": 2}), "zero_mismatch": True, "num_steps": 1}
    settings |= {"train_batch_size": 2, "num_generations": 2}
    train(taught_recipe(tmp_path / "same", **settings))
    assert metrics_of(tmp_path / "same")[0]["teacher/reverse_kl"] == 0
    train(taught_recipe(tmp_path / "refine_steps", **settings, substeps=8))
    assert metrics_of(tmp_path / "refine_steps")[0]["teacher/reverse_kl"] > 1e-4


# --- Runs -----------------------------------------------------------------------------------------------------------


def test_the_reward_is_shared_between_task_and_teacher(tmp_path, monkeypatch):
    seen = []
    add_teacher_reward = TeacherReward.after_rollout

    def watched(self, context, samples, step):
        found = add_teacher_reward(self, context, samples, step)
        seen.append((samples, *found))
        return found

    monkeypatch.setattr(TeacherReward, "after_rollout", watched)
    recipe = taught_recipe(tmp_path, teaches=other_model, substeps=4, coeff=0.25, num_steps=1)
    train(recipe)
    ((before, after, metrics),) = seen
    seeds = torch.randint(2**63 - 1, (4,), generator=generator_for(0, "teacher", 0)).repeat_interleave(4)
    apart = student_teacher_log_ratio(other_model(), before.rollout, seeds, **scoring(recipe))
    torch.testing.assert_close(after.rewards, 0.75 * before.rewards - 0.25 * apart.double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(after.advantages, recipe.advantages(after.rewards, after.group).float())
    kl = pytest.approx(apart.mean().item(), abs=1e-4)
    assert metrics == {"teacher/reverse_kl": kl, "teacher/coeff": 0.25, "frac_reward_zero_std": 0.0}
    assert metrics_of(tmp_path)[0]["reward"] == pytest.approx(before.rewards.mean().item())  # stays the task's


@pytest.mark.slow
def test_equal_rewards_of_the_task_teach_with_a_teacher(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(health, "WINDOW", 2)
    task = task_from_dataset([{"prompt": "1="}] * 4, reward_funcs=[lambda completions, **_: [0.0] * len(completions)])
    for teacher in (Teacher(model=other_model), None):
        train(taught_recipe(tmp_path / str(teacher), task=task, teacher=teacher, num_steps=2))
        rows = metrics_of(tmp_path / str(teacher))
        assert [row["frac_reward_zero_std"] for row in rows] == [float(teacher is None)] * 2
        assert ("warning: not learning, constant reward" in capsys.readouterr().out) == (teacher is None)


@pytest.mark.parametrize("kind", ["function", "policy", "path"])
def test_a_teacher_is_given_as_a_model_is(tmp_path, kind):
    made = other_model()
    made.save_pretrained(tmp_path / "model")
    given = {"function": other_model, "policy": made, "path": str(tmp_path / "model")}[kind]
    recipe = taught_recipe(tmp_path / "run", teaches=given)
    policy = build_policy(recipe, torch.device("cpu"))
    found = teacher_policy(recipe, policy, Accelerator(cpu=True))
    for name, weight in made.module.state_dict().items():
        torch.testing.assert_close(found.module.state_dict()[name], weight, rtol=0, atol=0)
    assert not any(p.requires_grad for p in found.module.parameters())
    assert all(p.requires_grad for p in made.module.parameters())
    assert teacher_policy(with_changes(recipe, teacher=None), policy, Accelerator(cpu=True)) is None


@pytest.mark.slow
@pytest.mark.parametrize("teacher", few(["reference", other_model], [other_model]))
def test_a_resumed_run_has_the_same_teacher(tmp_path, teacher):
    recipe = partial(taught_recipe, teaches=teacher, substeps=4, sft_warmup_steps=2, train_batch_size=2)
    whole = train(recipe(tmp_path / "whole", num_steps=2))
    train(recipe(tmp_path / "parts", num_steps=1, lr_schedule_steps=2))
    parts = train(recipe(tmp_path / "parts", num_steps=2, lr_schedule_steps=2, resume_from_checkpoint="latest"))
    assert_same_weights(whole, parts)
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "parts")
    assert "kl" not in metrics_of(tmp_path / "whole")[0]  # the reference alone adds no KL term


@pytest.mark.slow
def test_with_adapters_the_reference_is_the_base(tmp_path):
    train(taught_recipe(tmp_path, lora=Lora(), zero_mismatch=True, coeff=0.5, learning_rate=1e-2))
    first, second = metrics_of(tmp_path)
    assert first["teacher/reverse_kl"] == 0 != second["teacher/reverse_kl"]
    assert not (tmp_path / "reference").exists()


@pytest.mark.slow
def test_an_autoregressive_student_has_a_teacher(tmp_path):
    larger = partial(tiny_llama, causal=True, **SIZES | {"hidden_size": 64})
    given = {"rollout_quantization": None, "report_to": None, "num_steps": 1}
    train(tiny_recipe_ar(tmp_path / "larger", teacher=Teacher(model=larger), **given))
    assert abs(metrics_of(tmp_path / "larger")[0]["teacher/reverse_kl"]) > 0.01  # of 16 completions: of either sign
    train(tiny_recipe_ar(tmp_path / "same", teacher=Teacher(model="reference"), **given))
    assert metrics_of(tmp_path / "same")[0]["teacher/reverse_kl"] == pytest.approx(0, abs=1e-4)


def test_the_order_of_draws_counts_on_both_sides_in_the_same_steps(tmp_path):
    """Under a rank that chooses by the draws: both probabilities are of tokens and order, and equal."""
    by_draws = Unmask(max_new_tokens=16, diffusion_steps=3, temperature=1.0)
    train(taught_recipe(tmp_path, sampler=by_draws, num_steps=1, train_batch_size=2, num_generations=2))
    assert metrics_of(tmp_path)[0]["teacher/reverse_kl"] == pytest.approx(0, abs=1e-4)


@pytest.mark.slow
def test_late_rollouts_are_scored_by_the_learners_process(tmp_path):
    """Without staleness the steps of a plain run; q is the record of the weights that sampled."""
    few_rows = {"substeps": 4, "train_batch_size": 2, "num_generations": 2}
    plain = train(taught_recipe(tmp_path / "plain", **few_rows))
    late = train(taught_recipe(tmp_path / "late", **few_rows, late=Late(max_staleness=0)), InProcessPool())
    stale = {"substeps": 1, "rollout_workers": 2, "max_staleness": 1, "learning_rate": 1e-2}
    train(taught_recipe(tmp_path / "stale", **few_rows | stale), InProcessPool())
    for name, weight in weights_of(plain).items():
        torch.testing.assert_close(weights_of(late)[name], weight, rtol=1e-4, atol=1e-5)
    rows = metrics_of(tmp_path / "stale")
    assert rows[1]["staleness"] == 1
    assert rows[1]["teacher/reverse_kl"] == pytest.approx(0, abs=1e-4)  # of the first weights still


def test_micro_batches_change_nothing(tmp_path):
    policy = tiny_masked_lm(**SIZES)
    recipe = taught_recipe(tmp_path, substeps=4)
    prompts = encode(policy, [recipe.task[i] for i in range(2)], num_generations=3, seeds=range(6))
    rollout = recipe.sampler(policy, prompts, torch.Generator())
    whole, parts = (
        student_teacher_log_ratio(other_model(), rollout, rollout.group, **scoring(recipe) | {"micro_batch_size": size})
        for size in (None, 4)
    )
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-4)


def test_grpo_takes_a_teacher():
    rows = [{"prompt": character} for character in "abcdef" * 4]
    options = {
        "max_new_tokens": 4,
        "sampler_options": {"diffusion_steps": 2},
        "teacher": {"model": "reference", "substeps": 2},
    }
    recipe = grpo_recipe(
        tiny_masked_lm(characters="abcdef"), rows, lambda completions: [0.0] * len(completions), **options
    )
    assert recipe.teacher == Teacher(model="reference", substeps=2, coeff=1.0)
    assert recipe.needs_reference_policy and not recipe.beta


# --- Refusals -------------------------------------------------------------------------------------------------------


test_settings_that_do_not_go_together = refused(
    ({"coeff": -0.1}, r"coeff=-0\.1 must lie in \(0, 1\]"),
    ({"coeff": 1.5}, r"coeff=1\.5"),
    ({"substeps": 0}, "substeps=0 must be at least 1"),
    ({"teaches": 5}, "model=5 must be a path, a hub id, a policy, or a function"),
    ({"teaches": None}, "model=None must be a path"),
    ({"teaches": ""}, "model='' is empty"),
    ({"teacher": "reference"}, "teacher='reference' is not known; set the fields of Teacher: teacher.model, teacher"),
    ({"teacher": other_model}, r"teacher=.*other_model is not of type Teacher; give Teacher\(...\)"),
    ({"advantages": Decoupled()}, r"advantages=Decoupled\(.*\) takes the task's component rewards"),
    ({"max_num_gen_batches": 2}, "max_num_gen_batches=2 redraws groups"),
    by=lambda changes, tmp_path: taught_recipe(tmp_path, **changes),
)


@pytest.mark.repeated(every=3)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"teaches": partial(tiny_llama, causal=True, **SIZES)},
            r"teacher \(.*\) has causal attention and the student \(.*\) full attention",
        ),
        ({"teaches": partial(other_model, characters="1234.=x")}, "teacher .* has another vocabulary than"),
        ({"teaches": partial(other_model, characters="4321.=")}, "teacher .* has another vocabulary than"),
        (
            {"sampler": STATE_ONLY.replace(rank=PlackettLuce(temperature=1.0))},
            "teacher.substeps=2: the sampler's rank reads",
        ),
        (
            {"sampler": Unmask(max_new_tokens=16, diffusion_steps=3, temperature=1.0, rank=Confidence())},
            r"teacher.substeps=2: .* rank .*; use teacher.substeps=1, or rank=MaxProb\(\)$",
        ),
        (
            {"sampler": STATE_ONLY.replace(rank=RandomOrder(), commit=Remask(eta=0.3))},
            "teacher.substeps=2: .* more than once.*; use teacher.substeps=1$",
        ),
        ({"sampler": STATE_ONLY.replace(top_k=3)}, "teacher with top_k or top_p"),
    ],
)
def test_a_run_that_cannot_be_taught_is_refused_before_any_work(tmp_path, rehearsal, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        train(taught_recipe(tmp_path / "run", substeps=2, **changes))
    assert "\n" not in str(caught.value) and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_autoregressive_students_steps_have_no_parts(tmp_path):
    with pytest.raises(ValueError, match=r"teacher\.substeps=2: an autoregressive student writes one token per step"):
        train(tiny_recipe_ar(tmp_path, teacher=Teacher(model="reference", substeps=2)))
