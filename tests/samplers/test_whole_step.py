"""Steps of fixed shapes: the rollouts of ragged steps, no host read, and one graph, or two with a cache."""

from dataclasses import replace

import pytest
import torch
import whole_steps
from layouts import checkpoint
from refusals import refuses
from repetitions import few
from simulated_cuda import SimulatedCuda

from dllm_rl import Prompts, load_policy
from dllm_rl.decoding.support import MAX_SUPPORT_IDS
from dllm_rl.models.tiny import tiny_llama
from dllm_rl.quantization import schemes
from dllm_rl.quantization.rollout_policy import quantized_copy
from dllm_rl.samplers import Unmask, whole_step
from dllm_rl.samplers.cache import BlockCache, DualCache, PrefixCache
from dllm_rl.samplers.revise import Remask
from dllm_rl.samplers.rules import MaxProb, RandomOrder, Threshold

FULL = ("llada", "illada", "llada_moe", "dream", "rnd1", "a2d_qwen2", "a2d_qwen3")
BLOCKS = ("llada2", "sdar", "sdar_moe", "stable_diffcoder", "a2d_blocks", "nemotron")
SCHEMES = ("bf16", "Float8WeightOnly", "Int8WeightOnly", "Int8Dynamic", "Int4WeightOnly")


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(whole_step, "compiled", lambda: whole_step._step)


@pytest.mark.parametrize("family", few([*FULL, *BLOCKS], ["sdar"]))
def test_fixed_shapes_write_what_ragged_ones_do(uncompiled, tmp_path, family):
    policy = load_policy(checkpoint(tmp_path, family))
    for cache in whole_steps.caches_of(policy):
        for rule in whole_steps.RULES if cache is None else ("confidence", "max_prob"):
            given = whole_steps.RULES[rule] | {"diffusion_steps": 5, "max_new_tokens": 12}
            ragged, fixed = (whole_steps.sampled(policy, cache, compile_step=on, **given) for on in (False, True))
            assert whole_steps.differing(ragged, fixed) == [], (cache, rule)
            assert fixed.forwards == ragged.forwards


def ragged_and_fixed(sampler, policy, prompts):
    return (sampler.replace(compile_step=on)(policy, prompts, torch.Generator().manual_seed(0)) for on in (False, True))


def test_uneven_blocks_step_by_step(uncompiled):
    """A last block of 2 after two of 5; `watch` sees every step."""
    policy = tiny_llama(**whole_steps.SIZES, causal=False, head_std=0.5)
    prompts = Prompts.from_ids([[3, 4], [5]], pad_id=policy.pad_id)
    sampler = Unmask(max_new_tokens=12, block_size=5, temperature=1.0)
    ragged, fixed = [], []
    sampler(policy, prompts, torch.Generator().manual_seed(0), on_step=ragged.append)
    sampler.replace(compile_step=True)(policy, prompts, torch.Generator().manual_seed(0), on_step=fixed.append)
    assert len(ragged) == 12
    assert not any(whole_steps.differing(one, other) for one, other in zip(ragged, fixed, strict=True))


@pytest.mark.parametrize("kept", [MAX_SUPPORT_IDS, MAX_SUPPORT_IDS + 1])
def test_a_vocabulary_that_is_larger_than_what_is_recorded(uncompiled, kept):
    """The ids of a filter are recorded for up to 64 tokens. One more shows that a set does not fit."""
    characters = "".join(map(chr, range(0x4E00, 0x4E00 + 80)))
    policy = tiny_llama(characters=characters, causal=False, num_layers=1, head_std=0.3)
    prompts = Prompts.from_ids([[3, 4], [5]], pad_id=policy.pad_id)
    sampler = Unmask(max_new_tokens=4, diffusion_steps=2, temperature=1.0, top_k=kept)
    ragged, fixed = ragged_and_fixed(sampler, policy, prompts)
    assert whole_steps.differing(ragged, fixed) == []
    if kept > MAX_SUPPORT_IDS:
        assert fixed.filter_support.ids is None
    else:
        assert ((fixed.filter_support.ids >= 0).sum(-1)[fixed.completion_mask] == kept).all()


def test_a_shifted_block_may_begin_before_the_prompt(uncompiled, tmp_path):
    policy = load_policy(checkpoint(tmp_path, "sdar"), block_size=64)
    policy.spec = replace(policy.spec, shift=True)
    prompts = Prompts.from_ids([[3, 4, 5], [6]], pad_id=policy.pad_id)
    sampler = Unmask(max_new_tokens=61, diffusion_steps=3, cache=BlockCache())
    ragged, fixed = ragged_and_fixed(sampler, policy, prompts)
    assert whole_steps.differing(ragged, fixed) == []


@pytest.mark.parametrize("shift", few([False, True], [True]))
@pytest.mark.parametrize("cache", [None, DualCache()], ids=["whole", "dual"])
def test_prompts_of_most_lengths_share_their_graphs(monkeypatch, shift, cache):
    """A width has graphs of its own: the canvas is padded to 64 columns, and to 128 behind prompts of more."""
    widths = []

    def step(step_sampler, written, *rest):
        widths.append(written.tokens.shape[1])
        return whole_step._step(step_sampler, written, *rest)

    monkeypatch.setattr(whole_step, "compiled", lambda: step)
    policy = tiny_llama(characters="1234.=", causal=False, num_layers=1, max_length=128)
    policy.spec = replace(policy.spec, shift=shift)
    for length in (1, 50, 51, 60, 90):
        prompts = Prompts.from_ids([[3] * length], pad_id=policy.pad_id)
        sampler = Unmask(max_new_tokens=10, diffusion_steps=2, block_size=5, cache=cache, compile_step=True)
        sampler(policy, prompts, torch.Generator().manual_seed(0))
    assert set(widths) == {64, 128}


@pytest.mark.parametrize(("given", "each"), [({}, 0), ({"rank": MaxProb(), "commit": Threshold(tau=1.0)}, 1)])
def test_a_step_waits_for_the_device_once_at_most(uncompiled, given, each):
    """The shares of `schedule` are known to the host; it reads how many positions another rule chose."""
    with SimulatedCuda() as cuda:
        policy = tiny_llama(characters="1234.=", causal=False, num_layers=1).to("cuda")
        prompts = Prompts.from_ids([[3, 4], [5]], pad_id=policy.pad_id)
        with cuda.phase("sampling"):
            Unmask(max_new_tokens=4, compile_step=True, **given)(policy, prompts, torch.Generator())
        # transformers reads the mask once a forward, but not where torch traces it: a graph reads nothing.
        assert cuda.waits("sampling", place="samplers/whole_step.py") == 4 * each, cuda.report()
        assert cuda.waits("sampling") - cuda.waits("sampling", place="samplers/") == 4, cuda.report()


def test_what_has_no_fixed_shapes_is_refused(tmp_path):
    policy = tiny_llama(characters="1234.=", causal=False)
    prompts = Prompts.from_ids([[3, 4], [5]], pad_id=policy.pad_id)

    def run(**settings):
        Unmask(max_new_tokens=4, compile_step=True, **settings)(policy, prompts, torch.Generator())

    refuses(r"^compile_step=True .*use DualCache\(\), or set compile_step=False$", lambda: run(cache=PrefixCache()))
    refuses("commit=Remask, which rewrites", lambda: run(rank=RandomOrder(), commit=Remask(eta=0.1)))
    gaps = Prompts.from_ids([[3, policy.spec.mask_id]], pad_id=policy.pad_id, mask_id=policy.spec.mask_id)
    refuses("open positions", lambda: Unmask(max_new_tokens=4, compile_step=True)(policy, gaps, torch.Generator()))
    bert = load_policy(checkpoint(tmp_path, "modernbert"))
    with pytest.raises(ValueError, match="needs keys and values, which ModernBertForMaskedLM does not keep"):
        whole_steps.sampled(bert, DualCache(), compile_step=True)


def test_quantized_experts_are_refused(tmp_path):
    policy = quantized_copy(load_policy(checkpoint(tmp_path, "llada_moe")), schemes.Float8WeightOnly())
    refuses("quantized experts", lambda: whole_steps.sampled(policy, None, compile_step=True))


def test_too_many_shapes_are_one_line(monkeypatch):
    def fails(*_, **__):
        raise torch._dynamo.exc.FailOnRecompileLimitHit("torch's")

    monkeypatch.setattr(whole_step, "compiled", lambda: fails)
    policy = tiny_llama(characters="1234.=", causal=False)
    with pytest.raises(ValueError, match=r"^compile_step=True has compiled 128 graphs: .*; set compile_step=False$"):
        whole_steps.sampled(policy, None, compile_step=True)


@pytest.mark.nightly
def test_a_whole_step_is_one_graph():
    """Captured with `fullgraph` by dynamo alone."""
    whole_steps.check("eager", ["confidence"], "llada2")


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("rules", "names"),
    [([*whole_steps.RULES], ("llada", "llada2")), (["random"], (*FULL, *BLOCKS)), (["confidence"], SCHEMES)],
    ids=["rules", "families", "schemes"],
)
def test_every_whole_step_is_one_graph(rules, names):
    whole_steps.check("eager", rules, *names)


@pytest.mark.nightly
def test_generated_code_writes_the_same_tokens():
    whole_steps.check("own", ["confidence", "random", "plackett_luce"], "Float8WeightOnly")
