"""`renoise` against transformers' own `generate` of the same model, given the same random numbers."""

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import transformers

from dllm_rl import Prompts
from dllm_rl.cli.main import main as run
from dllm_rl.models.logprobs import invert_cdf
from dllm_rl.models.tiny import tiny_diffusion_gemma
from dllm_rl.rng import uniforms
from dllm_rl.samplers import Renoise, sampler_for
from dllm_rl.samplers.canvas import TOKEN_STREAM
from dllm_rl.samplers.renoise import NOISE_STREAM, accept

needs_gemma = pytest.mark.skipif(
    not hasattr(transformers, "DiffusionGemmaConfig"), reason="this transformers has no DiffusionGemma"
)
pytestmark = needs_gemma


@contextmanager
def numbers_of(seeds, canvas, steps_of):
    """torch's draws inside are of the numbers that `renoise` takes. `steps_of` counts canvases and their steps."""
    multinomial, randint = torch.multinomial, torch.randint
    at = {"block": -1, "step": 0, "fresh": True}

    def numbers(rows, stream):
        places = at["block"] * canvas + torch.arange(canvas)
        each = seeds.repeat_interleave(canvas)
        return uniforms(each, torch.full_like(each, at["step"]), places.repeat(rows), stream=stream)

    def drawn(probs, num_samples):
        found = invert_cdf(probs, numbers(len(seeds), TOKEN_STREAM))[:, None]
        at["step"] += 1  # the random tokens that follow have the next step's number
        steps_of.append((at["block"], at["step"]))
        return found

    def random_canvas(low, high, size, device):
        if at["fresh"]:  # a canvas begins; else a step ends
            at["block"], at["step"], at["fresh"] = at["block"] + 1, 0, False
        return (numbers(size[0], NOISE_STREAM) * high).long().view(size)

    torch.multinomial, torch.randint = drawn, random_canvas
    try:
        yield at
    finally:
        torch.multinomial, torch.randint = multinomial, randint


def authors_tokens(policy, prompts, *, canvases, **settings):
    """What transformers' `generate` writes behind the prompts, and its steps."""
    module = policy.module
    canvas = policy.spec.block_size
    steps = []
    config = transformers.models.diffusion_gemma.generation_diffusion_gemma
    options = {
        "max_new_tokens": canvases * canvas,
        "max_denoising_steps": settings["diffusion_steps"],
        "sampler_config": config.EntropyBoundSamplerConfig(settings["entropy_bound"]),
        "t_min": settings["t_min"],
        "t_max": settings["t_max"],
        "stability_threshold": settings["stability_threshold"],
        "confidence_threshold": settings["confidence_threshold"],
        "pad_token_id": policy.pad_id,
        "eos_token_id": list(policy.spec.eos_ids),
    }
    prepare = module._prepare_denoiser_inputs
    with numbers_of(prompts.seeds, canvas, steps) as at:

        def begins(*args, **kwargs):
            at["fresh"] = True  # its first random canvas is a new one's
            return prepare(*args, **kwargs)

        module._prepare_denoiser_inputs = begins
        try:
            found = module.generate(
                prompts.tokens,
                attention_mask=prompts.attention_mask,
                generation_config=config.DiffusionGemmaGenerationConfig(**options),
            )
        finally:
            del module._prepare_denoiser_inputs
    return found.sequences[:, prompts.tokens.shape[1] :], steps


def as_the_authors(policy, rollout, width):
    """Our tokens, with padding behind the end token, and in the columns that a row did not reach."""
    tokens = rollout.tokens[:, width:].clone()
    ends = torch.isin(tokens, torch.tensor(policy.spec.eos_ids)) & rollout.completion_mask[:, width:]
    behind = ends.long().cumsum(-1) - ends.long() > 0
    return tokens.masked_fill(behind | ~rollout.completion_mask[:, width:], policy.pad_id)


def random_case(seed):
    """A tiny model, prompts and settings, all by chance; the end token is likely or unlikely."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(len(values), (), generator=generator))]

    heads = pick(1, 2)
    policy = tiny_diffusion_gemma(
        characters="abcdefgh"[: pick(3, 5, 8)],
        seed=seed,
        hidden_size=16,
        num_layers=pick(1, 2, 3),
        num_attention_heads=heads,
        intermediate_size=16,
        num_experts=pick(2, 4),
        top_k_experts=pick(1, 2),
        moe_intermediate_size=8,
        canvas_length=pick(2, 3, 5),
        sliding_window=pick(2, 4, 64),
        final_logit_softcapping=pick(4.0, 10.0, 30.0),  # a smaller one saturates: logits tie
        embedding_std=pick(0.1, 0.4, 0.8),
    )
    if pick(True, False):
        policy.spec = replace(policy.spec, eos_ids=(len(policy.tokenizer) - 1,))
    lengths = [pick(1, 3, 6) for _ in range(3)]
    size = len(policy.tokenizer)
    ids = [torch.randint(size, (length,), generator=generator).tolist() for length in lengths]
    prompts = Prompts.from_ids(ids, pad_id=policy.pad_id, seeds=[seed * 10 + row for row in range(3)])
    stability = pick(None, 0, 1, 2)
    settings = {
        "diffusion_steps": pick(1, 2, 4, 7),
        "t_min": 0.4,
        "t_max": pick(0.8, 1.5),
        "entropy_bound": pick(0.05, 0.5, 2.0),
        "stability_threshold": stability,
        "confidence_threshold": None if stability is None else pick(0.3, 1.0, 1.6),
    }
    return policy, prompts, pick(1, 2, 3), settings


def check(seeds):
    """Compare case by case. One in fifty may differ: where two draws or two experts nearly tie, processors decide."""
    differ = []
    seen = {"stopped early": 0, "ended early": 0, "ragged": 0, "several canvases": 0}
    for seed in seeds:
        policy, prompts, canvases, settings = random_case(seed)
        wanted, steps = authors_tokens(policy, prompts, canvases=canvases, **settings)
        length = canvases * policy.spec.block_size
        rollout = Renoise(max_new_tokens=length, **settings)(policy, prompts, torch.Generator())
        ours = as_the_authors(policy, rollout, prompts.tokens.shape[1])
        same = (ours[:, : wanted.shape[1]] == wanted).all() and (ours[:, wanted.shape[1] :] == policy.pad_id).all()
        if not same:
            differ.append(seed)
        seen["stopped early"] += len(steps) < settings["diffusion_steps"] * (steps[-1][0] + 1)
        seen["ended early"] += not bool(rollout.completion_mask[:, -length:].all())
        seen["ragged"] += not bool(prompts.attention_mask.all())
        seen["several canvases"] += steps[-1][0] > 0
    assert len(differ) <= len(seeds) // 50, differ
    return seen


def test_tokens_are_those_of_transformers():
    check(range(2))


@pytest.mark.slow
@pytest.mark.parametrize("count", [60, pytest.param(200, marks=pytest.mark.nightly)])
def test_tokens_are_those_of_transformers_in_many_configurations(count):
    seen = check(range(count))
    assert min(seen.values()) >= count // 10, seen  # of each kind there are some


def test_accept_by_hand():
    """Ascending entropies 0.1, 0.3, 0.5: before the third the sum is 0.4, before the second 0.1."""
    entropies = torch.tensor([[0.5, 0.1, 0.3]])
    for bound, wanted in ((0.05, [0, 1, 0]), (0.2, [0, 1, 1]), (0.45, [1, 1, 1])):
        assert accept(entropies, bound).int().tolist() == [wanted]
    assert accept(torch.ones(1, 4), 1.0).int().sum() == 2  # the bound itself is allowed
    assert accept(torch.zeros(1, 4), 0.0).all()


def test_watched_it_shows_the_canvas_in_motion():
    policy = tiny_diffusion_gemma(characters="abc", canvas_length=4, hidden_size=16)
    assert sampler_for(policy) is Renoise
    seen = []
    prompts = Prompts.from_ids([[3, 4]], pad_id=0, num_generations=2)
    options = {"diffusion_steps": 3, "stability_threshold": None, "confidence_threshold": None}
    rollout = Renoise(max_new_tokens=4, **options)(policy, prompts, torch.Generator(), on_step=seen.append)
    assert len(seen) == 3 and rollout.forwards == 4  # the encoder's, and three steps
    for shown in seen[:2]:
        noise = shown.unmask_step[:, 2:] < 0
        assert noise.any() and shown.completion_mask[:, 2:].all()
    assert (seen[-1].tokens == rollout.tokens).all() and (rollout.unmask_step[:, 2:] == 2).all()


def test_the_commands_sample_and_evaluate(tmp_path, capsys):
    policy = tiny_diffusion_gemma(characters="1234.=", canvas_length=16, hidden_size=16)
    policy.save_pretrained(tmp_path / "model")
    run(["sample", str(tmp_path / "model"), "1.=", "--max_new_tokens", "16", "--diffusion_steps", "3", "--json"])
    record = json.loads(capsys.readouterr().out)
    assert record["forwards"] <= 4 and len(record["rows"][0]["tokens"]) == 16
    sudoku = ["--task", "sudoku", "--limit", "2", "--diffusion_steps", "2", "--json"]
    run(["evaluate", str(tmp_path / "model"), *sudoku, "--output_dir", str(tmp_path / "found")])
    (found,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert found["diffusion_steps"] == 2 and found["max_new_tokens"] == 16
    assert run(["evaluate", str(tmp_path / "model"), *sudoku, "--rank", "RandomOrder"]) == 2
    assert "rank=RandomOrder() is not a setting of Renoise, the sampler of this model" in capsys.readouterr().err
    assert run(["sample", str(tmp_path / "model"), "1.=", "--temperature", "0.5"]) == 2
    assert "temperature=0.5 is not a setting of Renoise, the sampler of this model" in capsys.readouterr().err
