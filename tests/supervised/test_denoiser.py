"""SFT and warm-up of a model whose noise is random tokens."""

from functools import partial

import pytest
import torch
import transformers
from refusals import refused
from sft_toys import ROWS, masks, tiny_sft, trainer_of
from tiny_recipe import tiny_recipe, with_changes

from dllm_rl.decoding.prompts import encode
from dllm_rl.distributed.collectives import make_accelerator
from dllm_rl.models.load import load_policy
from dllm_rl.models.tiny import tiny_diffusion_gemma
from dllm_rl.monitoring.json_lines import warmup_rows
from dllm_rl.monitoring.log import RunLog
from dllm_rl.samplers import Renoise
from dllm_rl.supervised.examples import example, prompt_and_answer, read_examples
from dllm_rl.tasks.base import Problem
from dllm_rl.tasks.sudoku import Sudoku
from dllm_rl.training.fine_tune import fine_tune
from dllm_rl.training.warmup import warm_up

pytestmark = pytest.mark.skipif(
    not hasattr(transformers, "DiffusionGemmaConfig"), reason="this transformers has no DiffusionGemma"
)
SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "embedding_std": 0.5,
}
gemma = partial(tiny_diffusion_gemma, characters="1234.=", canvas_length=4, **SIZES)


def test_an_answer_ends_the_row():
    policy = gemma()
    one = example(tiny_sft(), policy, {"prompt": "12=", "completion": "43"})
    assert prompt_and_answer(policy, one) == ([3, 4, 8], [6, 5, 2])
    whole = example(tiny_sft(), policy, {"text": "12"})  # no state precedes the first token
    assert prompt_and_answer(policy, whole) == ([3], [4, 2])


test_what_is_for_masks_is_refused = refused(
    ({"completion_length": 4}, "completion_length=4 is not for 'diffusion_gemma': end tokens fill"),
    by=lambda settings: read_examples(tiny_sft(**settings), gemma(), ROWS),
)


def test_several_answers_are_refused():
    policy = gemma()
    policy.tokenizer.chat_template = (
        "{% for m in messages %}{{ '' if m.role == 'user' else '=' }}{{ m.content }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}={% endif %}"
    )
    turns = [{"role": role, "content": text} for role, text in (("user", "1"), ("assistant", "2")) * 2]
    with pytest.raises(ValueError, match="dataset: row 0: has several answers, and 'diffusion_gemma' learns one"):
        read_examples(tiny_sft(), policy, [{"messages": turns}])
    (found,) = read_examples(tiny_sft(), policy, [{"messages": turns[:2]}])
    assert prompt_and_answer(policy, found)[1] == [4, 2]


def test_the_number_of_rows_in_a_forward_does_not_change_the_gradient():
    policy = gemma()
    examples = read_examples(tiny_sft(), policy, ROWS[:7])
    found = []
    for size in (None, 3):
        policy.module.zero_grad()
        loss, (padding, places) = trainer_of(policy, micro_batch_size=size).add_gradients(examples, masks())
        found.append(
            (loss, {name: p.grad.clone() for name, p in policy.module.named_parameters() if p.grad is not None})
        )
        assert padding >= 0 and places >= 7 * 7
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], rtol=1e-3, atol=1e-5, msg=name)
    losses = [trainer_of(policy).loss(examples, masks(), micro_batch_size=8) for _ in range(2)]
    assert losses[0] == losses[1] > 0


@pytest.mark.nightly
def test_it_learns_rows_and_writes_them(tmp_path):
    rows = [{"prompt": f"{a}{b}=", "completion": f"{b}{a}"} for a in "1234" for b in "1234"]
    settings = {"model": gemma, "num_steps": 250, "train_batch_size": 16, "learning_rate": 5e-3, "dataset": rows}
    summary = fine_tune(tiny_sft(tmp_path / "sft", eval_dataset=rows, **settings))
    assert summary["eval_after"]["loss"] < 0.6 * summary["eval_before"]["loss"]
    policy = load_policy(summary["checkpoint"])

    prompts = encode(policy, [Problem(row["prompt"]) for row in rows])
    rollout = Renoise(max_new_tokens=4, diffusion_steps=4)(policy, prompts, torch.Generator().manual_seed(0))
    texts = [policy.tokenizer.decode(row[3:5]).replace(" ", "") for row in rollout.tokens.tolist()]
    assert sum(text == row["completion"] for text, row in zip(texts, rows, strict=True)) >= 12


def renoising_recipe(directory, **changes):
    base = tiny_recipe(directory)
    sampler = Renoise(max_new_tokens=16, diffusion_steps=2)
    model = partial(gemma, canvas_length=16)
    given = {"model": model, "sampler": sampler.replace(answer="drawn"), "eval_sampler": sampler}
    return with_changes(base, **given | {"task": Sudoku(split="train", size=1), "sft_warmup_batch_size": 8} | changes)


@pytest.mark.slow
def test_the_warm_up_learns_what_it_is_shown(tmp_path):
    given = {"sft_warmup_steps": 20, "sft_warmup_eval_steps": 21, "sft_warmup_learning_rate": 1e-2}
    recipe, log = renoising_recipe(tmp_path, **given), RunLog(tmp_path, start=0, main=True)
    warm_up(recipe, recipe.model(), make_accelerator(), log, dict)
    log.close()
    losses = [row["warmup/loss"] for row in warmup_rows(tmp_path / "metrics.jsonl")]
    assert min(losses[-5:]) < 0.3 * losses[0]
