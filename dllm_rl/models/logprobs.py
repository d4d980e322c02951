"""Log-probabilities under the sampling distribution, from hidden states, without a (B, T, V) tensor of logits.

docs/papers.md explains the tag [ours].
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dllm_rl.models.base import Head
from dllm_rl.types.rollouts import SamplingParams

CHUNK_ELEMENTS = 2**23  # number of fp32 logits in memory at a time on a CPU: 32 MiB
# The same for an accelerator: 256 MiB, or 530 rows of LLaDA's vocabulary. Each chunk reads the head's weights and
# writes their full gradient. With only 64 rows, this memory traffic would take longer than the matrix products.
ACCELERATOR_ELEMENTS = 2**26
# The head is applied to at least MIN_HEAD_ROWS rows, and to a multiple of HEAD_ROW_MULTIPLE. Many processors round a
# matrix product of few rows differently, so these limits reduce the mismatch of unquantized rollouts. Only
# `zero_mismatch` makes it 0 on every processor.
MIN_HEAD_ROWS = 16
HEAD_ROW_MULTIPLE = 8
SEARCH_GROUP = 256  # number of tokens in a group, in `invert_cdf`


def upcast(logits: Tensor) -> Tensor:
    """Convert logits to fp32. Logits in fp64 stay in fp64."""
    return logits if logits.dtype == torch.float64 else logits.float()


def process(
    logits: Float[Tensor, "K V"],
    sampling_params: SamplingParams,
    always_keep: Int[Tensor, " K"] | None = None,
    support_ids: Int[Tensor, "K C"] | None = None,
) -> Float[Tensor, "K V"]:
    """Return the fp32 logits of the sampling distribution: suppress, divide by temperature, top-k, top-p.

    Args:
        logits: Logits of the model.
        sampling_params: Settings of the distribution.
        always_keep: A token of each row that no filter removes. It is the sampled token, so that its log-prob is finite
            [ours].
        support_ids: Token ids of each row to use in place of top-k and top-p, padded with -1. None (default): top-k and
            top-p.
    """
    logits = upcast(logits)
    if sampling_params.suppress:
        logits = logits.clone()
        for token in sampling_params.suppress:  # one by one: a tensor of ids would first have to move to the device
            logits[..., token] = -torch.inf
    if sampling_params.temperature not in (0, 1):  # a greedy sampler's log-probs are at temperature 1
        logits = logits / sampling_params.temperature
    if not sampling_params.filters or sampling_params.support == "unfiltered":
        return logits
    if support_ids is not None:
        size = logits.shape[-1]
        # Padding (-1) writes to an extra column, which is then removed. A boolean index would make the CPU wait for
        # the GPU.
        columns = support_ids.long().where(support_ids >= 0, size)
        in_support = torch.zeros(len(logits), size + 1, dtype=torch.bool, device=logits.device)
        in_support = in_support.scatter(-1, columns, True)[:, :size]
        return logits.masked_fill(~in_support, -torch.inf)
    if sampling_params.top_k is not None and sampling_params.top_k < logits.shape[-1]:
        kth = logits.topk(sampling_params.top_k, dim=-1).values[:, -1:]  # all tokens that tie with the k-th stay
        logits = _mask_out(logits, logits < kth, always_keep)
    if sampling_params.top_p is not None and sampling_params.top_p < 1:
        # Stable, so that ties go to the lowest index. A token stays while the mass before it is below top_p.
        sorted_logits, index = logits.sort(dim=-1, descending=True, stable=True)
        probs = sorted_logits.softmax(-1)
        removed = probs.cumsum(-1) - probs >= sampling_params.top_p
        logits = _mask_out(logits, torch.zeros_like(removed).scatter(-1, index, removed), always_keep)
    return logits


def _mask_out(logits: Tensor, removed: Tensor, always_keep: Tensor | None) -> Tensor:
    """Set the logits of removed tokens to -inf, except those of `always_keep`."""
    if always_keep is not None:
        removed = removed.scatter(-1, always_keep[:, None], False)
    return logits.masked_fill(removed, -torch.inf)


class TokenLogprob(torch.autograd.Function):
    """logits[k, tokens_k] - logsumexp(logits_k).

    The backward makes a single (K, V) tensor: grad_output * (onehot - softmax).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> Tensor:
        normalizer = logits.logsumexp(-1)
        ctx.save_for_backward(logits, normalizer, tokens)
        return logits.gather(-1, tokens[:, None])[:, 0] - normalizer

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        logits, normalizer, tokens = ctx.saved_tensors
        gradient = (logits - normalizer[:, None]).exp_().mul_(-grad_output[:, None])
        return gradient.scatter_add_(-1, tokens[:, None], grad_output[:, None]), None


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Return the number of rows of logits in memory at a time, a multiple of MIN_HEAD_ROWS."""
    # The number must not depend on the free memory, because the size of a chunk may change how a row is rounded.
    elements = CHUNK_ELEMENTS if device.type == "cpu" else ACCELERATOR_ELEMENTS
    return max(MIN_HEAD_ROWS, elements // vocabulary // MIN_HEAD_ROWS * MIN_HEAD_ROWS)


def chunked(f: Callable, *rows: Tensor, policy: Head) -> tuple[Tensor, ...]:
    """Apply `f`, which maps rows to a tuple of per-row tensors, to chunks of `chunk_rows` rows."""
    chunk_size = chunk_rows(policy.vocab_size, rows[0].device)
    num_rows = len(rows[0])
    # The last chunk is padded with rows of zeros.
    last_size = num_rows - (num_rows - 1) // chunk_size * chunk_size
    if padding := max(MIN_HEAD_ROWS - last_size, -last_size % HEAD_ROW_MULTIPLE):
        rows = tuple(torch.cat([x, x.new_zeros(padding, *x.shape[1:])]) for x in rows)
    if num_rows <= chunk_size:
        return tuple(output[:num_rows] for output in f(*rows))
    # The backward recomputes the logits of each chunk: stored logits would be the (K, V) tensor that chunks avoid.
    run = partial(checkpoint, f, use_reentrant=False) if torch.is_grad_enabled() else f
    chunks = zip(*(x.split(chunk_size) for x in rows), strict=True)
    outputs = [run(*chunk) for chunk in chunks]
    return tuple(torch.cat(chunk_outputs)[:num_rows] for chunk_outputs in zip(*outputs, strict=True))


def _score_chunk(
    policy: Head, sampling_params: SamplingParams, hidden: Tensor, tokens: Tensor, support_ids: Tensor | None = None
) -> tuple[Tensor]:
    """Compute `token_logprobs` of one chunk of rows."""
    logits = process(policy.head(hidden), sampling_params, tokens, support_ids)
    return (TokenLogprob.apply(logits, tokens),)


def token_logprobs(
    policy: Head,
    hidden: Float[Tensor, "K D"],
    tokens: Int[Tensor, " K"],
    sampling_params: SamplingParams,
    support_ids: Int[Tensor, "K C"] | None = None,
) -> Float[Tensor, " K"]:
    """Return log p(tokens_k | hidden_k) in nats, under the distribution of `process`.

    The result is differentiable. The head runs in chunks of rows.
    """
    rows = (hidden, tokens) if support_ids is None else (hidden, tokens, support_ids)
    return chunked(partial(_score_chunk, policy, sampling_params), *rows, policy=policy)[0]


def backward_token_logprobs(
    policy: Head,
    hidden: Float[Tensor, "K D"],
    tokens: Int[Tensor, " K"],
    sampling_params: SamplingParams,
    grad_output: Float[Tensor, " K"],
    support_ids: Int[Tensor, "K C"] | None = None,
) -> None:
    """Compute token_logprobs(...).backward(grad_output), with each chunk of logits computed once instead of twice."""
    # `grad_output` is known before the forward, so that each chunk is differentiated right after its forward.
    rows = (tokens,) if support_ids is None else (tokens, support_ids)
    gradient, _ = backward_chunked(partial(_score_chunk, policy, sampling_params), policy, grad_output, hidden, *rows)
    if len(hidden) and hidden.requires_grad:
        hidden.backward(gradient)


def backward_chunked(
    f: Callable, policy: Head, grad_output: Float[Tensor, " K"], hidden: Float[Tensor, "K D"], *rows: Tensor
) -> tuple[Float[Tensor, "K D"], tuple[Tensor, ...]]:
    """Run f(hidden, *rows) -> (value (K,), ...) and the backward of `value`, chunk by chunk.

    Returns:
        The gradient of `hidden`; f's other outputs.
    """
    chunk_size = chunk_rows(policy.vocab_size, hidden.device)
    gradients = [torch.zeros_like(hidden[:0])]  # so that an empty batch has a gradient without rows
    other_outputs = []
    chunks = zip(*(x.split(chunk_size) for x in (hidden, grad_output, *rows)), strict=True)
    for hidden_chunk, grad_chunk, *row_chunks in chunks:
        # The backward ends at the hidden states: the backward of the backbone runs once, for all chunks.
        leaf = hidden_chunk.detach().requires_grad_()
        value, *others = f(leaf, *row_chunks)
        value.backward(grad_chunk)  # adds the gradients of the head
        assert leaf.grad is not None
        gradients.append(leaf.grad)
        other_outputs.append(others)
    return torch.cat(gradients), tuple(torch.cat(outputs) for outputs in zip(*other_outputs, strict=True))


def sample(logits: Float[Tensor, "K V"], uniforms: Float[Tensor, " K"]) -> Int[Tensor, " K"]:
    """Draw one token per row of processed logits: invert the cumulative distribution at `uniforms` in [0, 1)."""
    return invert_cdf((logits - logits.amax(-1, keepdim=True)).exp(), uniforms)


def invert_cdf(mass: Float[Tensor, "K V"], uniforms: Float[Tensor, " K"]) -> Int[Tensor, " K"]:
    """Draw one token per row with probability proportional to its mass. A token of mass 0 is never drawn.

    To avoid a cumulative sum over the vocabulary, it first searches for a group of SEARCH_GROUP tokens, then for a
    token of this group. The probabilities are exact up to fp32 rounding.
    """
    size = mass.shape[-1]
    width = min(SEARCH_GROUP, size)
    num_full = size // width
    group_mass = mass[:, : num_full * width].unflatten(-1, (num_full, width)).sum(-1)
    last_mass = mass[:, num_full * width :].sum(-1, keepdim=True)
    zero = torch.zeros_like(last_mass)
    sums = torch.cat([zero, group_mass, last_mass], dim=-1).double().cumsum(-1)  # before each group, and the total
    total = sums[:, -1:]
    # The product may round up to the total, and the search would then end after the last token with mass.
    point = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, sums[:, :1]))
    group = torch.searchsorted(sums, point, right=True) - 1
    point = point - sums.gather(-1, group)

    tokens = group * width + torch.arange(width, device=mass.device)
    token_sums = mass.gather(-1, tokens.clamp(max=size - 1)).masked_fill(tokens >= size, 0).double().cumsum(-1)
    total = token_sums[:, -1:]
    point = torch.minimum(point, torch.nextafter(total, sums[:, :1]))
    # With NaN masses the search ends after the last token. The drawn token's log-prob is then NaN too.
    offset = torch.searchsorted(token_sums, point, right=True)
    return (group * width + offset).clamp(max=size - 1)[:, 0]
