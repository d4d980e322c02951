"""`policy.reference()` on every path that reads a module: the base model bit for bit, and not the adapted one."""

import re
from pathlib import Path

import pytest
import torch
from layouts import checkpoint
from repetitions import few

import dllm_rl
from dllm_rl import load_policy
from dllm_rl.likelihoods.estimators import Causal, Coupled, Trajectory
from dllm_rl.models.base import position_ids
from dllm_rl.models.lora import adapted_layers, add_lora
from dllm_rl.models.lora_settings import Lora
from dllm_rl.samplers import sampler_for
from dllm_rl.samplers.cache import BlockCache, DualCache, PrefixCache
from dllm_rl.types.rollouts import Prompts, Rollout

TOKENS = torch.randint(3, 38, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(TOKENS, dtype=torch.bool)
PROMPTS = Prompts.from_ids([[5, 6, 7], [8, 9, 10, 11, 12]], pad_id=1, num_generations=2, seeds=range(4))
PACKAGE = Path(dllm_rl.__file__).parent


def sampled(policy, **options) -> Rollout:
    options = {"max_new_tokens": 8, "temperature": 1.0} | options
    return sampler_for(policy)(**options)(policy, PROMPTS, torch.Generator())


def recorded(**options):
    """The log-probs that a sampler records."""
    return lambda policy: sampled(policy, **options).logprobs


def scored(estimator):
    """Log-probs of tokens that stand still, whatever the policy."""

    def run(policy):
        width = TOKENS.shape[1]
        steps = torch.arange(width).expand_as(TOKENS) - 1
        chosen = steps >= 0
        rollout = Rollout(
            TOKENS,
            MASK,
            chosen,
            torch.where(chosen, steps, -1),
            torch.zeros(TOKENS.shape),
            group=torch.arange(len(TOKENS)),
        )
        return estimator.logprobs(policy, rollout, estimator.draw_views(rollout, torch.Generator().manual_seed(0)))

    return run


def four_axes(policy):
    """A mask of four axes in place of the family's own."""
    lower = torch.ones(9, 9, dtype=torch.bool).tril().expand(2, 1, 9, 9)
    return policy.encode(TOKENS, lower, position_ids(MASK))


PATHS = {
    "hidden": ("llada", lambda policy: policy.hidden(TOKENS, MASK)),
    "encode": ("sdar", lambda policy: policy.encode(TOKENS, MASK, position_ids(MASK))),
    "encode with a mask of four axes": ("sdar", four_axes),
    "logits": ("dream", lambda policy: policy.logits(TOKENS, MASK)),
    "head": ("bert", lambda policy: policy.head(torch.linspace(-2, 2, 64).view(2, 32))),
    "scoring": ("llada2", scored(Coupled())),
    "packed scoring": ("sdar", scored(Trajectory(block_size=4))),
    "causal scoring": ("llama", scored(Causal())),
    "sampler": ("roberta", recorded()),
    "block cache": ("sdar", recorded(cache=BlockCache())),
    "prefix cache": ("llada", recorded(cache=PrefixCache(), block_size=4)),
    "dual cache": ("dream", recorded(cache=DualCache(), block_size=4)),
    "autoregress": ("qwen3", recorded(max_new_tokens=3)),
}


@pytest.mark.parametrize("path", few(PATHS, ["dual cache", "autoregress"]))
def test_the_reference_is_the_base_model(tmp_path, path):
    family, run = PATHS[path]
    folder = checkpoint(tmp_path, family)
    base, policy = load_policy(folder), load_policy(folder)
    add_lora(policy, Lora(r=4, targets=("cls.predictions.transform.dense",) if path == "head" else None))
    generator = torch.Generator().manual_seed(7)
    for layer in adapted_layers(policy.module).values():
        layer.lora_B.weight.data.normal_(0, 0.3, generator=generator)
    with torch.no_grad():
        wanted, adapted, found = run(base), run(policy), run(policy.reference())
    assert torch.equal(found, wanted)
    assert not torch.equal(adapted, wanted)


def test_nothing_above_the_models_runs_a_module_by_itself():
    """A path that runs the module past `policy.encode` and `policy.head` gives the reference its adapters back."""
    past = re.compile(r"\.base_model\b|\.module\(|spec\.(encode|head)\(|\bencode_(base|roberta|block_causal)\b")
    below = {"models", "quantization", "diagnostics"}
    found = [
        f"{file.relative_to(PACKAGE)}: {line.strip()}"
        for file in sorted(PACKAGE.rglob("*.py"))
        if file.relative_to(PACKAGE).parts[0] not in below
        for line in file.read_text().splitlines()
        if past.search(line)
    ]
    assert found == []
