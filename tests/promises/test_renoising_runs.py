"""A run whose model has random tokens as noise: sampled by an FP8 copy, replayed, updated, saved."""

from dataclasses import replace
from functools import partial

import pytest
import transformers
from tiny_recipe import with_changes

from dllm_rl import load_policy, train
from dllm_rl.models.tiny import tiny_diffusion_gemma
from dllm_rl.samplers import Renoise
from recipes.sudoku_unique import recipe as base

pytestmark = pytest.mark.usefixtures("no_rehearsal")


@pytest.mark.skipif(not hasattr(transformers, "DiffusionGemmaConfig"), reason="transformers has no DiffusionGemma")
def test_the_loop_trains_it(tmp_path):
    recipe = with_changes(
        base,
        model=partial(tiny_diffusion_gemma, characters="1234.=", canvas_length=16, hidden_size=32),
        sampler=Renoise(max_new_tokens=16, diffusion_steps=2, answer="drawn"),
        eval_sampler=Renoise(max_new_tokens=16, diffusion_steps=2),
        eval_task=replace(base.eval_task, size=1),
        validation_task=replace(base.validation_task, size=1),
        sft_warmup_steps=0,
        num_steps=1,
        train_batch_size=2,
        num_generations=4,
        report_to=None,
        output_dir=str(tmp_path),
    )
    summary = train(recipe)
    after = load_policy(summary["checkpoint"]).module.state_dict()
    before = tiny_diffusion_gemma(characters="1234.=", canvas_length=16, hidden_size=32).module.state_dict()
    moved = [name for name in before if not before[name].equal(after[name])]
    assert any("self_attn" in name for name in moved) and not any("vision" in name for name in moved)
