"""From hidden states to log-probabilities of the distribution that is sampled from, without a (B, T, V) tensor."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dllm_rl.types import Processors

CHUNK_ELEMENTS = 2**24  # fp32 logits held at once: 64 MiB


def process(logits: Float[Tensor, "K V"], processors: Processors) -> Float[Tensor, "K V"]:
    """Raw logits -> fp32 logits of the distribution sampled from: suppress, divide by temperature, top-k, top-p.

    At temperature 0 the division is left out (log-probs of a greedy sampler are reported at temperature 1).
    """
    logits = logits.float()
    if processors.suppress:
        suppressed = torch.tensor(processors.suppress, device=logits.device)
        logits = logits.index_fill(-1, suppressed, -torch.inf)
    if processors.temperature not in (0, 1):
        logits = logits / processors.temperature
    if processors.top_k is not None and processors.top_k < logits.shape[-1]:
        kth = logits.topk(processors.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if processors.top_p is not None and processors.top_p < 1:
        # Stable, so that ties go to the lowest index. A token stays while the mass before it is below top_p.
        ordered, index = logits.sort(dim=-1, descending=True, stable=True)
        probs = ordered.softmax(-1)
        late = probs.cumsum(-1) - probs >= processors.top_p
        logits = logits.masked_fill(torch.zeros_like(late).scatter(-1, index, late), -torch.inf)
    return logits


def chunked(f: Callable, *rows: Tensor, vocabulary: int) -> tuple[Tensor, ...]:
    """Apply `f` (rows -> tuple of per-row tensors) to chunks of rows that fit CHUNK_ELEMENTS logits.

    With more than one chunk and gradients on, each chunk's logits are recomputed in the backward.
    """
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    if len(rows[0]) <= size:
        return f(*rows)
    run = (lambda *a: checkpoint(f, *a, use_reentrant=False)) if torch.is_grad_enabled() else f
    parts = [run(*chunk) for chunk in zip(*(r.split(size) for r in rows), strict=True)]
    return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))


def token_logprobs(
    policy,
    hidden: Float[Tensor, "K D"],
    tokens: Int[Tensor, " K"],
    processors: Processors,
) -> Float[Tensor, " K"]:
    """log p(tokens_k | hidden_k) in nats, under the processed distribution; the head runs in chunks of rows."""

    def score(h: Tensor, y: Tensor) -> tuple[Tensor]:
        logits = process(policy.head(h), processors)
        return (logits.gather(-1, y[:, None])[:, 0] - logits.logsumexp(-1),)

    return chunked(score, hidden, tokens, vocabulary=policy.vocab_size)[0]


def entropies(policy, hidden: Float[Tensor, "K D"], processors: Processors) -> Float[Tensor, " K"]:
    """Entropy of each row's processed distribution, nats."""

    def score(h: Tensor) -> tuple[Tensor]:
        logp = process(policy.head(h), processors).log_softmax(-1)
        return (-torch.xlogy(logp.exp(), logp.exp()).sum(-1),)

    return chunked(score, hidden, vocabulary=policy.vocab_size)[0]


def sample(logits: Float[Tensor, "K V"], uniforms: Float[Tensor, " K"]) -> Int[Tensor, " K"]:
    """One token per row of processed logits by inverting the cumulative distribution at `uniforms` in [0, 1).

    Exact to fp64 rounding, one random number per token; a token of probability 0 is never drawn.
    """
    mass = (logits - logits.amax(-1, keepdim=True)).double().exp().cumsum(-1)
    total = mass[:, -1:]
    point = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(mass, point, right=True)[:, 0]
