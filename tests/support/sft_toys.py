"""Rows, a recipe and models of supervised fine-tuning, small enough for a test."""

from dataclasses import replace
from functools import partial
from itertools import product

from made_run import make_run
from tiny_recipe import SIZES, with_changes

from dllm_rl.groups import Log
from dllm_rl.models.base import encode_block_causal
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.rng import generator_for
from dllm_rl.supervised.sft import SFT
from dllm_rl.training.fine_tune import make_trainer

ROWS = [{"prompt": f"{a}{b}=", "completion": f"{b}{a}"[: 1 + (a < b)]} for a, b in product("1234", repeat=2)]
CHAT = "{% for m in messages %}{{ '' if m.role == 'user' else '=' }}{{ m.content }}<eos>.{% endfor %}"
CHAT += "{% if add_generation_prompt %}={% endif %}"


def tiny_sft(directory=None, **changes):
    base = SFT(
        name="tiny",
        model=partial(tiny_masked_lm, **SIZES),
        dataset=ROWS,
        train_batch_size=4,
        num_steps=4,
        max_length=16,
        output_dir=None if directory is None else str(directory),
        log=Log(report_to=None),
    )
    return with_changes(base, **changes)


def trainer_of(policy, **changes):
    """What takes the steps of a run of `tiny_sft` with these changes."""
    return make_trainer(make_run(recipe=tiny_sft(**changes), policy=policy))


def masks(step=0):
    return generator_for(0, "masks", step)


def dream_like():
    """A bidirectional model that predicts each token from the state before it."""
    policy = tiny_llama(causal=False, **SIZES)
    policy.spec = replace(policy.spec, shift=True)
    return policy


def block_causal(block_size=2, *, shift=False):
    policy = tiny_llama(causal=False, **SIZES)
    spec = replace(policy.spec, name="toy", attention="block_causal", block_size=block_size, shift=shift)
    policy.spec = replace(spec, encode=partial(encode_block_causal, spec=spec))
    return policy


BLOCKS = {"block": block_causal, "shifted block": partial(block_causal, shift=True)}
MODELS = {
    "masked": lambda: tiny_masked_lm(**SIZES),
    "llada": lambda: tiny_llama(causal=False, **SIZES),
    "dream": dream_like,
    "causal": lambda: tiny_llama(causal=True, **SIZES),
}
