"""Left-to-right sampling with a key-value cache."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Generator

from dllm_rl.models.base import Policy, position_ids
from dllm_rl.models.logprobs import fitting, kept_set, process, sample
from dllm_rl.rng import row_seeds
from dllm_rl.samplers.cache import KeysAndValues
from dllm_rl.samplers.unmask import check_fits, check_suppress
from dllm_rl.types import Prompts, Rollout, SamplingParams

FEWEST = 4  # rows of a step: products of fewer end in other last bits (fp32, MKL on a CPU with AVX2)


@torch.no_grad()
def autoregress(
    policy: Policy,
    prompts: Prompts,
    generator: Generator,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    suppress: tuple[int, ...] = (),
) -> Rollout:
    """Complete every prompt `group_size` times, one token per step, until an end token or max_new_tokens.

    The prompt is read once per group. Log-probs are those of the processed distribution, nats. A row depends on its
    prompt, its seed and the weights only. Raises ValueError for a diffusion policy or a completion that does not fit.
    max_new_tokens  tokens of a completion, at most
    temperature     of the categorical distribution; 0 takes the likeliest token
    top_k           only the k likeliest tokens are sampled; None: all
    top_p           only the smallest set of likeliest tokens with this probability is sampled; None: all
    suppress        token ids that are never sampled
    """
    if policy.spec.attention != "causal":
        raise ValueError(
            f"policy is a diffusion model ({type(policy.module).__name__}); autoregress needs a causal one: use unmask"
        )
    if prompts.open is not None:
        raise ValueError("prompts have open positions, which a causal model cannot fill in; use a diffusion model")
    check_fits(policy, prompts, max_new_tokens)
    sampling_params = SamplingParams(temperature, top_k, top_p, suppress)
    check_suppress(policy, sampling_params)
    device, group = policy.device, prompts.group_size
    seeds = row_seeds(generator, prompts.num_rows) if prompts.seeds is None else prompts.seeds
    # One uniform a token, all drawn at the start: a row's numbers do not depend on when its neighbours end.
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    rows = [torch.rand(max_new_tokens, generator=g, dtype=torch.float64) for g in generators]
    # Copies of the last row make up the fewest.
    place = torch.arange(max(FEWEST, len(rows)), device=device).clamp(max=len(rows) - 1)
    uniforms = torch.stack(rows).to(device)[place]

    new = prompts.tokens.to(device)
    attention_mask = prompts.attention_mask.to(device)
    positions = position_ids(attention_mask)
    cache, eos = KeysAndValues(config=policy.module.config), torch.tensor(policy.spec.eos_ids, device=device)
    alive = torch.ones_like(place, dtype=torch.bool)
    columns, logprobs, chosen, masses, kept = [], [], [], [], []
    for step in range(max_new_tokens):
        states = policy.encode(new, attention_mask, positions, past_key_values=cache, use_cache=True)[:, -1]
        if step == 0:
            states, attention_mask, positions = (x[place // group] for x in (states, attention_mask, positions))
            cache.batch_select_indices(place // group)
        raw = policy.head(states)
        logits = process(raw, sampling_params)
        token = logits.argmax(-1) if temperature == 0 else sample(logits, uniforms[:, step])
        logp = logits.gather(-1, token[:, None])[:, 0] - logits.logsumexp(-1)
        columns.append(torch.where(alive, token, policy.pad_id))
        logprobs.append(torch.where(alive, logp, 0.0))
        chosen.append(alive)
        if sampling_params.filters:
            log_mass, ids = kept_set(process(raw, replace(sampling_params, support="unfiltered")), logits)
            masses.append(torch.where(alive, log_mass, 0.0))
            kept.append(ids.where(alive[:, None], -1))
        new, positions = columns[-1][:, None], positions[:, -1:] + 1
        attention_mask = torch.cat([attention_mask, alive[:, None]], dim=1)
        alive = alive & ~torch.isin(token, eos)
        if not alive.any():
            break

    columns, logprobs, chosen, masses, kept = (
        [x[: len(rows)] for x in part] for part in (columns, logprobs, chosen, masses, kept)
    )
    start = prompts.tokens.shape[1]
    before = repeat(prompts.tokens.to(device), "p s -> (p g) s", g=group)
    completion_mask = torch.cat([torch.zeros_like(before, dtype=torch.bool), torch.stack(chosen, 1)], dim=1)
    steps = torch.arange(completion_mask.shape[1], device=device) - start
    blank = torch.zeros(before.shape, device=device)
    kept_ids = fitting(torch.stack(kept, 1)) if kept else None
    return Rollout(
        tokens=torch.cat([before, torch.stack(columns, 1)], dim=1),
        attention_mask=attention_mask[: len(rows)],
        completion_mask=completion_mask,
        unmask_step=torch.where(completion_mask, steps, -1),
        logprobs=torch.cat([blank, torch.stack(logprobs, 1)], dim=1),
        group_size=group,
        weights_version=policy.version,
        sampling_params=sampling_params,
        forwards=len(columns),
        log_kept_mass=torch.cat([blank, torch.stack(masses, 1)], dim=1) if masses else None,
        kept_ids=None if kept_ids is None else F.pad(kept_ids, (0, 0, start, 0), value=-1),
    )
