"""The supervised losses against transformers' cross-entropy and a loop over positions."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from refusals import refuses
from tiny_recipe import SIZES, tiny_recipe

from dllm_rl.distributed.collectives import OneProcess, make_accelerator
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.monitoring.json_lines import warmup_rows
from dllm_rl.monitoring.log import RunLog
from dllm_rl.supervised.examples import solution_examples
from dllm_rl.supervised.loss import add_noise, draw_levels, lay_out, weighted_loss
from dllm_rl.supervised.trainer import SupervisedTrainer
from dllm_rl.tasks import task_from_dataset
from dllm_rl.tasks.base import Problem
from dllm_rl.tasks.sudoku import Sudoku
from dllm_rl.training import warmup
from dllm_rl.training.trainer import train
from dllm_rl.training.warmup import drawn_problems, warm_up

pytestmark = pytest.mark.usefixtures("no_rehearsal")

PROBLEMS = [Problem("12=", solution="3412"), Problem("1.2.4=", solution="21")]


def layout_of(policy, examples, levels, uniforms):
    """The rows of a warm-up's step, and the divisor of their loss."""
    shown, total = add_noise(policy, examples, levels, uniforms, per_token=True)
    return lay_out(shown, pad_id=policy.pad_id, device=policy.device, like_rollouts=True), total


def loss_of(policy, *given):
    layout, total = layout_of(policy, *given)
    return weighted_loss(policy, layout) / total


def test_examples_fill_up_with_the_end_token():
    policy = tiny_masked_lm(**SIZES)
    one, two, three, four, dot, equals, eos, pad = 3, 4, 5, 6, 7, 8, 2, 0
    examples = solution_examples(policy, PROBLEMS, max_new_tokens=5)
    assert [item.tokens.tolist() for item in examples] == [
        [one, two, equals, three, four, one, two, eos],
        [one, dot, two, dot, four, equals, two, one, eos, eos, eos],
    ]
    assert [item.learned.tolist() for item in examples] == [[False] * 3 + [True] * 5, [False] * 6 + [True] * 5]
    layout, total = layout_of(policy, examples, torch.ones(2), torch.zeros(2, 5))
    assert layout.tokens[0].tolist() == [pad] * 3 + examples[0].tokens.tolist() and total == 10
    assert layout.attention_mask.tolist() == [[False] * 3 + [True] * 8, [True] * 11]
    causal = solution_examples(tiny_llama(causal=True, **SIZES), PROBLEMS, max_new_tokens=5)
    assert causal[1].learned.tolist() == [False] * 6 + [True] * 3 + [False] * 2


def test_a_row_that_nothing_is_learned_of_takes_part_in_no_forward():
    policy = tiny_masked_lm(**SIZES)
    examples = solution_examples(policy, PROBLEMS, max_new_tokens=5)
    uniforms = torch.tensor([[0.0] * 5, [0.9] * 5])
    layout, total = layout_of(policy, examples, torch.full((2,), 0.5), uniforms)
    assert layout.tokens.shape == (1, 11) and total == 10
    assert loss_of(policy, examples, torch.full((2,), 0.5), uniforms + 0.5).item() == 0


def test_causal_loss_is_cross_entropy():
    policy = tiny_llama(causal=True, **SIZES)
    examples = solution_examples(policy, PROBLEMS, max_new_tokens=5)
    layout, total = layout_of(policy, examples, torch.ones(2), torch.zeros(2, 5))
    labels = layout.tokens.masked_fill(layout.weight == 0, -100)
    real = layout.attention_mask
    positions = (real.long().cumsum(-1) - 1).clamp(min=0)
    logits = policy.module(layout.tokens, attention_mask=real, position_ids=positions).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    found = weighted_loss(policy, layout) / total
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_diffusion_loss_weighs_masked_tokens_by_one_over_t():
    policy = tiny_masked_lm(**SIZES)
    examples = solution_examples(policy, PROBLEMS, max_new_tokens=5)
    clean = layout_of(policy, examples, torch.ones(2), torch.zeros(2, 5))[0]
    t = torch.tensor([0.5, 0.25])
    uniforms = torch.tensor([[0.1, 0.6, 0.4, 0.5, 0.9], [0.9, 0.2, 0.3, 0.24, 0.99]])
    masked = [[0, 2], [1, 3]]  # uniforms < t
    tokens = clean.tokens.clone()
    for row, columns in enumerate(masked):
        for column in columns:
            tokens[row, 6 + column] = 1
    logits = policy.logits(tokens, clean.attention_mask)
    logits[..., 1] = -torch.inf  # the mask is never an answer
    logps = logits.log_softmax(-1)
    total = sum(
        logps[row, 6 + column, clean.tokens[row, 6 + column]] / t[row]
        for row, columns in enumerate(masked)
        for column in columns
    )
    torch.testing.assert_close(loss_of(policy, examples, t, uniforms), -total / 10, rtol=1e-5, atol=1e-6)


def test_levels_are_stratified_and_floored():
    levels, uniforms, noise = draw_levels(torch.Generator().manual_seed(0), 50, 7, min_t=0.02)
    strata = ((levels - 0.02) / 0.98 * 50).sort().values.floor()
    assert strata.tolist() == list(range(50)) and uniforms.shape == noise.shape == (50, 7)
    assert not torch.equal(uniforms, noise)


def stepped(policy, tmp_path, *, steps: int, **changes):
    """The losses of the first steps."""
    given = {"sft_warmup_steps": steps, "sft_warmup_eval_steps": steps + 1, "sft_warmup_batch_size": 8}
    recipe = tiny_recipe(tmp_path, **given | {"sft_warmup_learning_rate": 1e-2} | changes)
    log = RunLog(tmp_path, start=0, main=True)
    assert warm_up(recipe, policy, make_accelerator(), log, dict) == steps
    log.close()
    return [row["warmup/loss"] for row in warmup_rows(tmp_path / "metrics.jsonl")[-steps:]]


def test_warm_up_learns_what_it_is_shown(tmp_path):
    losses = stepped(tiny_recipe(tmp_path).model(), tmp_path, steps=60, task=Sudoku(split="train", size=1))
    assert min(losses) < 0.05 < losses[0]


def test_each_step_hides_other_tokens(tmp_path):
    """One problem, and a rate that moves no weight: masks alone can change the loss."""
    still = {"steps": 3, "sft_warmup_learning_rate": 1e-30, "task": Sudoku(split="train", size=1)}
    policy = tiny_recipe(tmp_path).model()
    losses = [stepped(policy, tmp_path, **still) for _ in range(2)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    every = sorted(losses[0])
    assert all(after - before > 1e-3 for before, after in pairwise(every))


def test_warm_up_takes_micro_batches_the_gradients_norm_and_bf16_of_the_run(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        warmup, "SupervisedTrainer", lambda **settings: made.append(settings) or SupervisedTrainer(**settings)
    )
    given = {"micro_batch_size": 4, "max_grad_norm": 0.2, "bf16": True}
    stepped(tiny_recipe(tmp_path).model(), tmp_path, steps=1, **given)
    assert made[0].items() >= given.items()


def test_the_learning_rate_rises_to_its_full_height(tmp_path):
    """AdamW moves a weight first by the rate, here 1/30 of 1e-3, and by its decay, a hundredth of that."""
    policy = tiny_recipe(tmp_path).model()
    before = [p.detach().clone() for p in policy.module.parameters()]
    stepped(policy, tmp_path, steps=1, sft_warmup_learning_rate=1e-3)
    moved = max((p - was).abs().max().item() for p, was in zip(policy.module.parameters(), before, strict=True))
    assert moved == pytest.approx(1e-3 / 30, rel=0.05)


@pytest.mark.parametrize("causal", [False, True])
def test_the_processes_gradients_sum_to_that_of_one_process(causal):
    """Also where one process has the longer solutions, and the model learns more tokens of them."""
    policy = tiny_llama(causal=causal, **SIZES)
    solutions = ["3412", "2", "43", "1", "12", "3", "2143", "1"]
    problems = [Problem("12="[: 1 + i % 3], solution=text) for i, text in enumerate(solutions)]
    examples = solution_examples(policy, problems, max_new_tokens=5)

    def gradient_of(*processes):
        policy.module.zero_grad()
        for one in processes:
            trainer = SupervisedTrainer(policy=policy, processes=one, like_rollouts=True)
            trainer.add_gradients(examples, torch.Generator().manual_seed(0))
        return torch.cat([p.grad.flatten() for p in policy.module.parameters()])

    two = [SimpleNamespace(num_processes=2, process_index=index) for index in range(2)]
    torch.testing.assert_close(gradient_of(*two), gradient_of(OneProcess()), rtol=1e-4, atol=1e-6)


def test_a_gradient_that_is_not_finite_stops_the_warm_up(tmp_path):
    policy = tiny_recipe(tmp_path).model()
    with torch.no_grad():
        next(policy.module.parameters()).fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="gradient norm is nan at warm-up step 0; the update was not applied"):
        stepped(policy, tmp_path, steps=1)


def test_warm_up_ends_with_the_first_look_that_finds_the_target(tmp_path):
    recipe = tiny_recipe(tmp_path, sft_warmup_steps=8, sft_warmup_eval_steps=2, sft_warmup_target=0.5)
    policy, log, looks = recipe.model(), RunLog(tmp_path, start=0, main=True), iter([0.25, 0.5, 0.75])
    taken = warm_up(recipe, policy, make_accelerator(), log, lambda: {"solve_rate": next(looks)})
    assert taken == 4 and list(looks) == [0.75]


@pytest.mark.parametrize(
    ("problem", "message"),
    [(Problem("1="), "solution is None"), (Problem("1=", solution="12341"), "max_new_tokens=4 is too short")],
)
def test_what_cannot_be_shown_is_refused(problem, message):
    refuses(message, lambda: solution_examples(tiny_masked_lm(**SIZES), [problem], max_new_tokens=4))


ROWS = [{"prompt": f"{a}{b}=", "completion": f"{b}{a}"} for a in "1234" for b in "1234"]


def of_rows(tmp_path, rows, **changes):
    task = task_from_dataset(rows, reward_funcs=lambda completions: [0.0] * len(completions))
    given = {"sft_warmup_steps": 30, "sft_warmup_batch_size": 4, "sft_warmup_metric": "reward", "num_steps": 0}
    return tiny_recipe(tmp_path / "run", task=task, validation_task=task, eval_task=task, **given | changes)


@pytest.mark.parametrize(
    ("solution", "message"),
    [
        (None, "solution is None for the problem '22='"),
        ("1234" * 4 + "1", "max_new_tokens=16 is too short for a solution of 17"),
        ("1é", "text '1é' cannot be tokenized"),
    ],
)
@pytest.mark.repeated(first_only=True)
def test_each_solution_that_is_drawn_is_read_before_the_run(tmp_path, rehearsal, solution, message):
    """One row of sixteen; the run would end after some steps of the warm-up."""
    rows = [row | {"completion": solution} if row["prompt"] == "22=" else row for row in ROWS]
    refuses(message, lambda: train(of_rows(tmp_path, rows)))
    assert not (tmp_path / "run").exists()
    train(of_rows(tmp_path, rows, sft_warmup_steps=0))


@pytest.mark.parametrize("max_prompt_length", [None, 3])
def test_the_solutions_that_are_read_are_those_that_are_learned(tmp_path, monkeypatch, max_prompt_length):
    """Without repeats; of a row whose prompt is too long, those of the next one. At most 5000, here 3."""
    rows = [*ROWS[:5], {"prompt": "1111=", "completion": None}, *ROWS[5:]] if max_prompt_length else ROWS
    recipe = of_rows(tmp_path, rows, sft_warmup_steps=3, sft_warmup_batch_size=4, max_prompt_length=max_prompt_length)
    learned, read = [], warmup.solution_examples
    monkeypatch.setattr(
        warmup, "solution_examples", lambda *given, **more: learned.extend(given[1]) or read(*given, **more)
    )
    policy, log = recipe.model(), RunLog(tmp_path, start=0, main=True)
    warm_up(recipe, policy, make_accelerator(), log, dict)
    log.close()
    prompts = {problem.prompt for problem in learned}
    found = [problem.prompt for problem in drawn_problems(recipe, policy)]
    assert {*found} == prompts and len(learned) == 12 and len(found) <= 12
    monkeypatch.setattr(warmup, "MAX_CHECKED_PROMPTS", 3)
    assert len([*drawn_problems(recipe, policy)]) in (3, 4)


def test_a_warmup_of_blanks_is_refused_before_the_model_is_made(tmp_path):
    task = task_from_dataset(
        [{"prompt": "1_"}] * 4, reward_funcs=lambda completions: [0.0] * len(completions), blank="_"
    )
    given = {"task": task, "sft_warmup_steps": 2, "model": lambda: pytest.fail("made")}
    refuses("a problem has blanks", lambda: train(tiny_recipe(tmp_path / "run", **given)))
