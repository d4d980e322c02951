"""Log-probabilities under the sampled distribution from hidden states, without a (B, T, V) tensor."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dllm_rl.models.base import Head
from dllm_rl.types import SamplingParams

CHUNK_ELEMENTS = 2**23  # fp32 logits in memory at a time on a CPU: 32 MiB
# On an accelerator 256 MiB, 530 rows of LLaDA's vocabulary. Each chunk reads the head's weights and writes their full
# gradient: with 64 rows the traffic takes longer than the products.
ACCELERATOR_ELEMENTS = 2**26
# A product of the head has at least ROWS rows, and a multiple of STEP. Many processors round few rows differently: the
# mismatch of unquantized rollouts is then smaller. Only `zero_mismatch` makes it 0 on every processor.
ROWS = 16
STEP = 8
GROUP = 256  # tokens whose mass is summed before the search for the drawn one


def wide(logits: Tensor) -> Tensor:
    """Return logits in fp32, or in fp64 if they already are."""
    return logits if logits.dtype == torch.float64 else logits.float()


def process(
    logits: Float[Tensor, "K V"],
    sampling_params: SamplingParams,
    keep: Int[Tensor, " K"] | None = None,  # never removed, so that a sampled token's log-prob is finite [ours]
    kept: Int[Tensor, "K C"] | None = None,  # a rollout's tokens, -1 for none, in place of top-k and top-p
) -> Float[Tensor, "K V"]:
    """Return the fp32 logits of the sampled distribution: suppress, divide by temperature, top-k, top-p."""
    logits = wide(logits)
    if sampling_params.suppress:
        logits = logits.clone()
        for token in sampling_params.suppress:  # one by one: a tensor of ids would have to move to the device
            logits[..., token] = -torch.inf
    if sampling_params.temperature not in (0, 1):  # a greedy sampler's log-probs are at temperature 1
        logits = logits / sampling_params.temperature
    if not sampling_params.filters or sampling_params.support == "unfiltered":
        return logits
    if kept is not None:
        size = logits.shape[-1]
        # -1 writes into an extra column, which is cut off: the host would wait for a boolean index.
        there = torch.zeros(len(logits), size + 1, dtype=torch.bool, device=logits.device)
        return logits.masked_fill(~there.scatter(-1, kept.long().where(kept >= 0, size), True)[:, :size], -torch.inf)
    if sampling_params.top_k is not None and sampling_params.top_k < logits.shape[-1]:
        kth = logits.topk(sampling_params.top_k, dim=-1).values[:, -1:]  # all tokens that tie with the k-th stay
        logits = _drop(logits, logits < kth, keep)
    if sampling_params.top_p is not None and sampling_params.top_p < 1:
        # Stable, so that ties go to the lowest index. A token stays while the mass before it is below top_p.
        ordered, index = logits.sort(dim=-1, descending=True, stable=True)
        probs = ordered.softmax(-1)
        late = probs.cumsum(-1) - probs >= sampling_params.top_p
        logits = _drop(logits, torch.zeros_like(late).scatter(-1, index, late), keep)
    return logits


def _drop(logits: Tensor, dropped: Tensor, keep: Tensor | None) -> Tensor:
    if keep is not None:
        dropped = dropped.scatter(-1, keep[:, None], False)
    return logits.masked_fill(dropped, -torch.inf)


class TokenLogprob(torch.autograd.Function):
    """logits[k, tokens_k] - logsumexp(logits_k), whose backward makes one (K, V) tensor: g (onehot - softmax)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> Tensor:
        total = logits.logsumexp(-1)
        ctx.save_for_backward(logits, total, tokens)
        return logits.gather(-1, tokens[:, None])[:, 0] - total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, total, tokens = ctx.saved_tensors
        out = (logits - total[:, None]).exp_().mul_(-gradient[:, None])
        return out.scatter_add_(-1, tokens[:, None], gradient[:, None]), None


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Return the number of rows of logits in memory at a time on a device, a multiple of ROWS."""
    # The number must not depend on free memory, because a row's rounding may depend on its chunk.
    elements = CHUNK_ELEMENTS if device.type == "cpu" else ACCELERATOR_ELEMENTS
    return max(ROWS, elements // vocabulary // ROWS * ROWS)


def chunked(f: Callable, *rows: Tensor, policy: Head) -> tuple[Tensor, ...]:
    """Apply `f` (rows -> tuple of per-row tensors) to chunks of `chunk_rows`."""
    size = chunk_rows(policy.vocab_size, policy.device)
    count = len(rows[0])
    # Rows of zeros fill up the last chunk.
    last = count - (count - 1) // size * size
    if missing := max(ROWS - last, -last % STEP):
        rows = tuple(torch.cat([r, r.new_zeros(missing, *r.shape[1:])]) for r in rows)
    if count <= size:
        return tuple(column[:count] for column in f(*rows))
    # The backward recomputes each chunk's logits: stored ones would be the (K, V) tensor that chunks avoid.
    run = partial(checkpoint, f, use_reentrant=False) if torch.is_grad_enabled() else f
    parts = [run(*chunk) for chunk in zip(*(r.split(size) for r in rows), strict=True)]
    return tuple(torch.cat(columns)[:count] for columns in zip(*parts, strict=True))


def _scored(policy: Head, sampling_params: SamplingParams) -> Callable[..., tuple[Tensor]]:
    def score(h: Tensor, y: Tensor, ids: Tensor | None = None) -> tuple[Tensor]:
        return (TokenLogprob.apply(process(policy.head(h), sampling_params, y, ids), y),)

    return score


def token_logprobs(
    policy: Head,
    hidden: Float[Tensor, "K D"],
    tokens: Int[Tensor, " K"],
    sampling_params: SamplingParams,
    kept: Int[Tensor, "K C"] | None = None,
) -> Float[Tensor, " K"]:
    """Return log p(tokens_k | hidden_k) in nats after `process` (with `kept`). The head runs in chunks of rows."""
    rows = (hidden, tokens) if kept is None else (hidden, tokens, kept)
    return chunked(_scored(policy, sampling_params), *rows, policy=policy)[0]


def backward_token_logprobs(
    policy: Head,
    hidden: Float[Tensor, "K D"],
    tokens: Int[Tensor, " K"],
    sampling_params: SamplingParams,
    vector: Float[Tensor, " K"],
    kept: Int[Tensor, "K C"] | None = None,
) -> None:
    """Compute token_logprobs(...).backward(vector), with each chunk of logits computed once instead of twice."""
    # The vector exists before the forward, so each chunk is differentiated right after its forward.
    rows = (tokens,) if kept is None else (tokens, kept)
    gradient, _ = backward_chunked(_scored(policy, sampling_params), policy, vector, hidden, *rows)
    if len(hidden) and hidden.requires_grad:
        hidden.backward(gradient)


def backward_chunked(
    f: Callable, policy: Head, vector: Float[Tensor, " K"], hidden: Float[Tensor, "K D"], *rows: Tensor
) -> tuple[Float[Tensor, "K D"], tuple[Tensor, ...]]:
    """Run f(hidden, *rows) -> (value (K,), ...) and its backward, chunk by chunk.

    Return the gradient of `hidden`, and f's other outputs.
    """
    size = chunk_rows(policy.vocab_size, policy.device)
    gradients = [torch.zeros_like(hidden[:0])]  # so that an empty batch has a gradient without rows
    others = []
    for h, v, *rest in zip(*(x.split(size) for x in (hidden, vector, *rows)), strict=True):
        leaf = h.detach().requires_grad_()  # the backward ends here: the backbone's runs once, with all chunks
        value, *more = f(leaf, *rest)
        value.backward(v)  # adds the head's gradients
        assert leaf.grad is not None
        gradients.append(leaf.grad)
        others.append(more)
    return torch.cat(gradients), tuple(torch.cat(column) for column in zip(*others, strict=True))


def sample(logits: Float[Tensor, "K V"], uniforms: Float[Tensor, " K"]) -> Int[Tensor, " K"]:
    """Draw one token per row of processed logits: invert the cumulative distribution at `uniforms` in [0, 1)."""
    return invert((logits - logits.amax(-1, keepdim=True)).exp(), uniforms)


def invert(mass: Float[Tensor, "K V"], uniforms: Float[Tensor, " K"]) -> Int[Tensor, " K"]:
    """Draw one token per row, in proportion to its mass (exact to fp32 rounding). A token of mass 0 is never drawn."""
    size = mass.shape[-1]
    whole = size // GROUP  # first a group of GROUP tokens, then a token in it: no cumulative sum over the vocabulary
    groups = rearrange(mass[:, : whole * GROUP], "k (n v) -> k n v", v=GROUP).sum(-1)
    groups = torch.cat([groups, mass[:, whole * GROUP :].sum(-1, keepdim=True)], dim=-1).double().cumsum(-1)
    total = groups[:, -1:]
    # Below the total even where the product rounds up to it, so that the search ends at a token with mass.
    point = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    group = torch.searchsorted(groups, point, right=True)
    point = point - torch.where(group > 0, groups.gather(-1, (group - 1).clamp(min=0)), 0.0)

    members = group * GROUP + torch.arange(GROUP, device=mass.device)
    inside = mass.gather(-1, members.clamp(max=size - 1)).masked_fill(members >= size, 0).double().cumsum(-1)
    total = inside[:, -1:]
    point = torch.minimum(point, torch.nextafter(total, torch.zeros_like(total)))
    # NaN masses end the search after the last token; the log-prob is then NaN, which a caller sees.
    return (group * GROUP + torch.searchsorted(inside, point, right=True)).clamp(max=size - 1)[:, 0]
