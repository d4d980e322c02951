"""check_engine passes this library's copies, and an engine that decodes by itself; it names each planted fault."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from sft_toys import block_causal
from tiny_recipe import SIZES, tiny_recipe

from dllm_rl import tiny_masked_lm
from dllm_rl.models.base import copied
from dllm_rl.models.lora import add_lora
from dllm_rl.models.lora_settings import Lora
from dllm_rl.models.rollout_engine import FunctionEngine, with_forward
from dllm_rl.models.tiny import tiny_llama
from dllm_rl.quantization.schemes import Int8WeightOnly
from dllm_rl.samplers.autoregress import Autoregress
from dllm_rl.samplers.cache import BlockCache
from dllm_rl.samplers.rules import Confidence, MaxProb
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.testing import check_engine
from dllm_rl.training.policies import RolloutCopy
from dllm_rl.types.rollouts import Prompts

SAMPLERS = {
    "full": Unmask(max_new_tokens=6, diffusion_steps=2, temperature=0.7, rank=Confidence()),  # some rows end
    "causal": Autoregress(max_new_tokens=4, temperature=0.7),
}


def model(attention):
    return tiny_llama(**SIZES, causal=attention == "causal", head_std=0.1)


def prompts(policy):
    return Prompts.from_ids([[3, 4, 5, 6], [7, 8], [4]], pad_id=policy.pad_id, num_generations=4)


def checked(engine, attention="full", sampler=None, **options):
    policy = model(attention)
    check_engine(engine, policy, prompts(policy), sampler or SAMPLERS[attention], **options)


@pytest.mark.repeated(first_only=True)
@pytest.mark.parametrize("scheme", [None, Int8WeightOnly()], ids=["learner", "int8"])
@pytest.mark.parametrize("attention", SAMPLERS)
def test_this_librarys_copies_pass(tmp_path, attention, scheme):
    checked(
        RolloutCopy(recipe=tiny_recipe(tmp_path, rollout_quantization=scheme)),
        attention,
        bound=0.05 if scheme else 1e-5,
    )


def test_adapters_and_learned_positions_pass(tmp_path):
    policy = tiny_masked_lm(**SIZES, head_std=0.1)
    add_lora(policy, Lora(r=2))
    engine = RolloutCopy(recipe=tiny_recipe(tmp_path, rollout_quantization=Int8WeightOnly()))
    check_engine(engine, policy, prompts(policy), SAMPLERS["full"], bound=0.05)


def forward_of(policy):
    return with_forward(
        policy, lambda tokens, mask, positions: policy.head(policy.spec.encode(policy.module, tokens, mask, positions))
    )


class Elsewhere:
    """An engine with weights of its own: it computes logits, or decodes by itself through `sampler`."""

    def __init__(self, fault=None):
        self.fault = fault

    @property
    def record(self):
        return FunctionEngine(load_fn=self.load, sync_fn=self.sync)

    def load(self, policy):
        self.held = policy if self.fault == "the learner's weights" else copied(policy)
        return forward_of(self.held)

    def sync(self, policy, rollout_policy):
        if self.fault != "stale weights":
            self.held.module.load_state_dict(policy.module.state_dict())
        if self.fault != "stale version":
            rollout_policy.weights_version = policy.weights_version
        if self.fault == "a draw in sync":
            torch.rand(1)
        if self.fault == "the learner's weights in sync":
            next(policy.module.parameters()).add_(1e-4)
        return {"seconds": torch.ones(())} if self.fault == "metrics" else {}

    def sampler(self, policy, prompts, generator, *, attention):
        """The library's sampler on the held weights, whose record then gets the fault."""
        if self.fault == "lost seed":
            prompts = replace(prompts, seeds=torch.arange(len(prompts.tokens)))
        if self.fault == "one seed":
            prompts = replace(prompts, seeds=prompts.seeds[:1] + torch.arange(len(prompts.tokens)))
        rollout = replace(SAMPLERS[attention](self.held, prompts, generator), weights_version=policy.weights_version)
        if self.fault == "other tokens":
            return replace(rollout, logprobs=rollout.logprobs.roll(1, 0))
        if self.fault == "steps from 1":
            return replace(rollout, unmask_step=rollout.unmask_step + rollout.completion_mask)
        if self.fault == "no numbers":
            return replace(rollout, logprobs=torch.full_like(rollout.logprobs, torch.nan))
        if self.fault == "tempered":
            return replace(rollout, sampling_params=replace(rollout.sampling_params, temperature=1.0))
        if self.fault == "dropped end":
            ended = (rollout.tokens == policy.spec.eos_ids[0]).cumsum(1) > 0
            return replace(rollout, completion_mask=rollout.completion_mask & ~ended)
        if self.fault == "global generator":
            torch.rand(1)
        if self.fault == "the learner's weights":
            next(self.held.module.parameters()).add_(1e-4)
        return rollout


@pytest.mark.parametrize("attention", SAMPLERS)
def test_an_engine_that_decodes_by_itself_passes(attention):
    engine = Elsewhere()
    checked(engine.record, attention, partial(engine.sampler, attention=attention), bound=1e-5)


def test_an_engine_that_computes_logits_passes():
    checked(Elsewhere().record, bound=1e-5)


FAULTS = {
    "other tokens": "log-probs differ",
    "no numbers": "log-probs differ by nan",
    "steps from 1": "the record is impossible: steps",
    "tempered": "temperature",
    "dropped end": "without an end token",
    "lost seed": "other seeds must give other tokens",
    "one seed": "must depend only on its seed",
    "stale weights": "log-probs differ",
    "stale version": "weights_version=0 of a rollout, but the learner's is 1",
    "global generator": "global generator",
    "the learner's weights": "weights must not change",
    "a draw in sync": "global generator",
    "the learner's weights in sync": "weights must not change",
    "metrics": "metrics as floats",
}


CAUSAL = ("other tokens", "dropped end", "lost seed")


@pytest.mark.repeated(every=3)
@pytest.mark.parametrize(
    ("fault", "attention"), [*((fault, "full") for fault in FAULTS), *((fault, "causal") for fault in CAUSAL)]
)
def test_a_planted_fault_is_named(fault, attention):
    engine = Elsewhere(fault)
    with torch.random.fork_rng(devices=[]), pytest.raises(AssertionError, match=FAULTS[fault]):
        checked(engine.record, attention, partial(engine.sampler, attention=attention))


def test_a_check_that_could_not_tell_is_refused():
    with pytest.raises(AssertionError, match="hides weights that differ"):
        checked(Elsewhere().record, bound=9.0)
    with pytest.raises(AssertionError, match="sample at a temperature other"):
        checked(Elsewhere().record, sampler=SAMPLERS["full"].replace(temperature=1.0))


def test_the_cache_of_a_block_causal_module_is_an_engines_matter():
    """A row may go on to the end of the block of its end token; a cache that forgets is far off the learner."""
    policy = block_causal()
    prompts = Prompts.from_ids([[3, 4, 5], [6, 5]], pad_id=policy.pad_id, num_generations=4)
    in_blocks = Unmask(max_new_tokens=4, diffusion_steps=4, block_size=2, rank=MaxProb(), temperature=0.7)

    def sync(learner, rollout_policy):
        rollout_policy.module.load_state_dict(learner.module.state_dict())
        rollout_policy.weights_version = learner.weights_version
        return {}

    check_engine(
        FunctionEngine(load_fn=copied, sync_fn=sync), policy, prompts, in_blocks.replace(cache=BlockCache()), bound=1e-4
    )
