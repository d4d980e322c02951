"""Left-to-right sampling with a key-value cache."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from dllm_rl.decoding.prompts import NEEDS_TOKEN
from dllm_rl.decoding.support import filter_support, make_filter_support
from dllm_rl.models.base import Policy, position_ids
from dllm_rl.models.logprobs import process, sample
from dllm_rl.records import option
from dllm_rl.rng import row_seeds
from dllm_rl.samplers.choose import Drawn
from dllm_rl.samplers.sampler import Sampler
from dllm_rl.samplers.unmask import check_fits
from dllm_rl.types.rollouts import Prompts, Rollout, SamplingParams


class Autoregress(Sampler):
    """Complete prompts, one token per step, until an end token or max_new_tokens.

    Use it for policies with causal attention; use `Unmask` for masked-diffusion policies. A prompt runs through the
    model once for all completions of its group. A row depends only on its prompt, its seed and the weights.

    Args:
        max_new_tokens: Largest number of tokens of a completion.
        temperature: Temperature of the token draw. 0 takes the likeliest token.
        top_k: Sample only from the k likeliest tokens. None: all.
        top_p: Sample only from the smallest set of likeliest tokens with this probability. None: all.
        suppress: Tokens that are never sampled, as ids or as texts of the vocabulary. The mask token is always
            excluded.
    """

    max_new_tokens: int = option(at_least=1)
    temperature: float = option(default=1.0, at_least=0)
    top_k: int | None = option(default=None, at_least=1)
    top_p: float | None = option(default=None, above=0, at_most=1)
    suppress: tuple[str | int, ...] = ()

    def check(self) -> None:
        SamplingParams(self.temperature, self.top_k, self.top_p)  # checks them

    def sampling_params(self, policy: Policy, prompts: Prompts) -> SamplingParams:
        """Return the settings of the sampling distribution for these prompts.

        Raises:
            ValueError: The policy is not causal, a prompt is empty or has open positions, or a completion does not fit.
        """
        if policy.spec.attention != "causal":
            sampler = type(self).__name__
            raise ValueError(f"policy {policy.spec.name!r} is not causal; {sampler} needs a causal one: use Unmask")
        if prompts.infill_mask is not None:
            raise ValueError("prompts have open positions, which a causal model cannot fill in; use a diffusion model")
        has_token = prompts.attention_mask.any(-1)
        if not has_token.all():
            row = int(has_token.long().argmin())
            raise ValueError(f"prompts: row {row} has no token, and {NEEDS_TOKEN}")
        mask_id = policy.spec.mask_id  # a diffusion model that decodes from left to right has one
        suppressed = self.suppress if mask_id is None else (*self.suppress, mask_id)
        suppress = check_fits(policy, prompts, self.max_new_tokens, suppressed)
        return SamplingParams(self.temperature, self.top_k, self.top_p, suppress)

    @torch.no_grad()
    def __call__(self, policy: Policy, prompts: Prompts, generator: Generator) -> Rollout:
        """Complete the prompts.

        Args:
            policy: Policy with causal attention.
            prompts: Left-padded prompts, without `infill_mask`.
            generator: Generator that draws one seed per row. It is not used if `prompts.seeds` is set.

        Returns:
            Rollout with the rows of the prompts, and log-probs of the sampled tokens under the sampling distribution,
            in nats.

        Raises:
            ValueError: As `sampling_params` says.
        """
        sampling_params = self.sampling_params(policy, prompts)
        device = policy.device
        num_rows = len(prompts.tokens)
        seeds = row_seeds(generator, num_rows) if prompts.seeds is None else prompts.seeds
        # One uniform number per token, all drawn first, so that a row's numbers do not depend on when other rows end.
        row_generators = [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
        row_uniforms = [torch.rand(self.max_new_tokens, generator=g, dtype=torch.float64) for g in row_generators]
        uniforms = torch.stack(row_uniforms).to(device)

        rows, copies = prompts.shared_rows(torch.arange(num_rows))
        input_tokens = prompts.tokens[rows].to(device)
        attention_mask = prompts.attention_mask[rows].to(device)
        positions = position_ids(attention_mask)
        cache = policy.spec.new_cache(policy.module)
        eos = torch.tensor(policy.spec.eos_ids, device=device)
        is_unfinished = torch.ones(num_rows, dtype=torch.bool, device=device)
        steps: list[tuple[Drawn, Bool[Tensor, " B"]]] = []  # the draws of each step, and the rows that were unfinished
        for step in range(self.max_new_tokens):
            states = policy.encode(input_tokens, attention_mask, positions, cache=cache)[:, -1]
            if step == 0:  # so far one row per prompt; from here on one row per completion
                prompt_index = copies.to(device)
                states = states[prompt_index]
                attention_mask = attention_mask[prompt_index]
                positions = positions[prompt_index]
                cache.set_tensors([x[prompt_index] for x in cache.tensors()])
            drawn = _draw(policy, states, uniforms[:, step], sampling_params)
            steps.append((drawn, is_unfinished))
            # A finished row continues with padding, so that all rows have the same length.
            input_tokens = torch.where(is_unfinished, drawn.tokens, policy.pad_id)[:, None]
            positions = positions[:, -1:] + 1
            attention_mask = torch.cat([attention_mask, is_unfinished[:, None]], dim=1)
            is_unfinished = is_unfinished & ~torch.isin(drawn.tokens, eos)
            if not is_unfinished.any():
                break
        is_drawn = torch.stack([is_unfinished for _, is_unfinished in steps], dim=1)
        fields = zip(*(drawn for drawn, _ in steps), strict=True)
        drawn = Drawn._make(None if values[0] is None else torch.stack(values, dim=1) for values in fields)
        return left_to_right_rollout(policy, prompts, sampling_params, drawn, is_drawn)


def _draw(
    policy: Policy, states: Float[Tensor, "B D"], uniforms: Float[Tensor, " B"], sampling_params: SamplingParams
) -> Drawn:
    """Draw a token for each row."""
    model_logits = policy.head(states)
    logits = process(model_logits, sampling_params)
    tokens = logits.argmax(-1) if sampling_params.temperature == 0 else sample(logits, uniforms)
    normalizer = logits.logsumexp(-1)
    drawn = Drawn(tokens, logits.gather(-1, tokens[:, None])[:, 0] - normalizer, normalizer)
    if not sampling_params.filters:
        return drawn
    unfiltered = process(model_logits, replace(sampling_params, support="unfiltered"))
    log_mass, support = filter_support(unfiltered, logits)
    return drawn._replace(log_mass=log_mass, support=support)


def left_to_right_rollout(
    policy: Policy,
    prompts: Prompts,
    sampling_params: SamplingParams,
    drawn: Drawn,
    is_drawn: Bool[Tensor, "B K"],
) -> Rollout:
    """Build the rollout of completions that were written from left to right.

    Args:
        policy: Policy that sampled.
        prompts: Prompts of the rows.
        sampling_params: Settings of the sampling distribution.
        drawn: Draws of the K steps, each field (B, K) or (B, K, C). Those of a finished row are ignored.
        is_drawn: Whether the row was unfinished in the step.
    """
    tokens = torch.where(is_drawn, drawn.tokens, policy.pad_id)
    prompt_tokens = prompts.tokens.to(policy.device)
    prompt_width = prompt_tokens.shape[1]
    completion_mask = F.pad(is_drawn, (prompt_width, 0))
    unmask_step = torch.arange(completion_mask.shape[1], device=policy.device) - prompt_width
    support = None
    if drawn.log_mass is not None and drawn.support is not None:
        ids = drawn.support.masked_fill(~is_drawn[..., None], -1)
        support = make_filter_support(drawn.log_mass.masked_fill(~is_drawn, 0.0), ids).padded(prompt_width)
    return Rollout(
        tokens=torch.cat([prompt_tokens, tokens], dim=1),
        attention_mask=torch.cat([prompts.attention_mask.to(policy.device), is_drawn], dim=1),
        completion_mask=completion_mask,
        unmask_step=torch.where(completion_mask, unmask_step, -1),
        logprobs=F.pad(drawn.logprobs.masked_fill(~is_drawn, 0.0), (prompt_width, 0)),
        group=prompts.group.to(policy.device),
        weights_version=policy.weights_version,
        sampling_params=sampling_params,
        forwards=is_drawn.shape[1],
        filter_support=support,
    )
