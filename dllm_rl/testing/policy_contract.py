"""Check a policy against its contract."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_rl.models.base import Policy, copied, trainable_parameters
from dllm_rl.models.checkpoint.loading import has_known_family
from dllm_rl.models.checks import DROPOUT, check_tokenizer
from dllm_rl.models.load import load_policy, load_weights
from dllm_rl.models.lora import add_lora, has_adapted_or_low_bit
from dllm_rl.models.lora_settings import Lora
from dllm_rl.models.merge import merge_lora
from dllm_rl.quantization.aligned import aligned_forward
from dllm_rl.quantization.rollout_policy import quantized_copy, sync_weights
from dllm_rl.quantization.schemes import FakeQuantize

MOST_TRIED = 4096  # longest row that is tried, in tokens
MEMBERS = (
    "module spec tokenizer weights_version float32_head lora quantization quantization_report device vocab_size pad_id"
)
MEMBERS += " encode hidden head logits to save_pretrained reference"


def check_policy(policy: Any, *, seed: int = 0) -> None:
    """Check that a policy fulfills its contract.

    Call it in a test of a custom policy or module.

    The policy must have every member of `Policy`, each token of its vocabulary and each position of `spec.max_length`
    (tried up to 4096). Logits (B, T, V) are finite and repeatable, and do not depend on
    padding or other rows. Each position attends as `spec.attention` says. Weights get finite gradients, and saving and
    loading restores them bit for bit. The blocks have linear layers that can be quantized, and `sync_weights` updates
    the quantized copy. `aligned_forward` gives the logits of the quantized copy. New adapters do not change the logits,
    are the only trained weights, and are left out of the reference.

    The policy itself does not change: its module is copied. Adapters are only checked if the policy has none yet.
    Logits that are computed with another batch shape may differ by 1e-4 of the largest logit (0.05 in 16 bits).

    Args:
        policy: Policy to check.
        seed: Seed of the random tokens.

    Raises:
        AssertionError: A requirement is violated. The message says which.
    """
    missing = [name for name in MEMBERS.split() if not hasattr(policy, name)]
    assert not missing, f"a policy has {', '.join(missing)}: see dllm_rl.models.base.Policy"
    try:
        check_tokenizer(policy.tokenizer)
    except ValueError as error:
        raise AssertionError(str(error)) from None
    tokens, mask, logits = check_forward(policy, seed=seed)
    if policy.quantization is None:  # a quantized copy is not saved
        with torch.no_grad():
            _check_saving(policy, tokens, mask, logits)
    _check_gradient(policy, tokens, mask)
    if policy.lora is None:
        _check_adapters(policy, tokens, mask, logits)
    _check_quantized(policy, tokens, mask, logits)


@torch.no_grad()
def check_forward(policy: Policy, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Check the part of the contract that three short rows show, without a copy of the module: logits are finite and
    repeatable, do not depend on padding or other rows, and each position attends as `spec.attention` says.

    Returns:
        Tokens and attention mask (3, T) of the rows, and their logits (3, T, V).

    Raises:
        AssertionError: A requirement is violated. The message says which.
    """
    _check_sizes(policy)
    tokens, mask = _rows(policy, torch.Generator().manual_seed(seed))
    logits = policy.logits(tokens, mask)
    _check_logits(policy, tokens, mask, logits)
    _check_rows(policy, tokens, mask, logits)
    _check_attention(policy, tokens[:1], mask[:1])
    return tokens, mask, logits


@torch.no_grad()
def equals_fresh_copy(learner: Policy, rollout: Policy, scheme: Any, tokens: Tensor, mask: Tensor) -> bool:
    """Return whether a quantized copy that was synced computes the bits of a new copy of the learner."""
    fresh = quantized_copy(learner, scheme)
    return torch.equal(rollout.logits(tokens, mask), fresh.logits(tokens, mask))


def _rows(policy: Policy, generator: torch.Generator) -> tuple[Int[Tensor, "3 T"], Bool[Tensor, "3 T"]]:
    """Return three rows of random tokens without the mask token; the last two have padding on the left."""
    spec = policy.spec
    length = 12
    if spec.block_size is not None:
        length = max(length, spec.block_size + 2)  # reaches into the second block, to check its attention
    if spec.max_length is not None:
        assert spec.max_length >= 6, f"max_length={spec.max_length} leaves no room for six tokens"
        length = min(length, spec.max_length)
    tokens = torch.randint(0, policy.vocab_size - 1, (3, length), generator=generator)
    if spec.mask_id is not None:
        tokens = tokens + (tokens >= spec.mask_id)  # skips the mask token
    mask = torch.arange(length) >= torch.tensor([0, 2, length // 2])[:, None]
    return tokens.masked_fill(~mask, policy.pad_id).to(policy.device), mask.to(policy.device)


def _gap(policy: Policy, a: Tensor, b: Tensor) -> float:
    """Return the largest difference, relative to what rounding may cause: above 1 is a real difference."""
    is_half = next(policy.module.parameters()).dtype in (torch.bfloat16, torch.float16)
    return float((a.float() - b.float()).abs().max() / (b.float().abs().max() + 1e-6)) / (0.05 if is_half else 1e-4)


def _check_sizes(policy: Policy) -> None:
    """Check that the module has the last token of the vocabulary, and the last position."""
    spec, token = policy.spec, policy.vocab_size - 1
    _try_row(policy, [token], f"vocab_size={policy.vocab_size}, but token {token}", "as many tokens as the module has")
    if spec.max_length is not None:
        length = min(spec.max_length, MOST_TRIED)
        known = spec.eos_ids[0]
        _try_row(
            policy, [known] * length, f"max_length={spec.max_length}, but a row of {length} tokens", "its positions"
        )


def _try_row(policy: Policy, ids: list[int], what: str, remedy: str) -> None:
    tokens = torch.tensor([ids], device=policy.device)
    is_last = torch.arange(len(ids), device=policy.device)[None] == len(ids) - 1
    try:
        policy.logits(tokens, torch.ones_like(is_last), is_last)
    except (IndexError, RuntimeError) as error:
        raise AssertionError(f"{what} raises {type(error).__name__} ({error}): give the spec {remedy}") from error


def _check_logits(policy: Policy, tokens: Tensor, mask: Tensor, logits: Float[Tensor, "B T V"]) -> None:
    shape = (*tokens.shape, policy.vocab_size)
    assert logits.shape == shape, f"logits must be (B, T, V) = {shape}, got {tuple(logits.shape)}"
    assert logits[mask].isfinite().all(), "logits must be finite wherever there is a token"
    assert torch.equal(policy.logits(tokens, mask), logits), (
        f"the same call must give the same logits: is dropout on? F.dropout {DROPOUT}"
    )
    marked = mask & (torch.arange(tokens.shape[1], device=mask.device) % 2 == 0)
    marked_logits = policy.logits(tokens, mask, marked)
    assert marked_logits.shape == (int(marked.sum()), policy.vocab_size), "logits at marked positions must be (K, V)"
    gap = _gap(policy, marked_logits, logits[marked])
    assert gap <= 1, "logits at marked positions must be those of all, row by row"


def _check_rows(policy: Policy, tokens: Tensor, mask: Tensor, logits: Tensor) -> None:
    for row in range(len(tokens)):
        is_token = mask[row]
        alone = policy.logits(tokens[row : row + 1, is_token], mask[row : row + 1, is_token])[0]
        what = "padding before it, or the rows beside it, must" if not is_token.all() else "the rows beside it must"
        assert _gap(policy, logits[row, is_token], alone) <= 1, f"a row differs from the row alone: {what} not be seen"
    reordered = policy.logits(tokens.flip(0), mask.flip(0)).flip(0)
    assert _gap(policy, reordered[mask], logits[mask]) <= 1, "the order of the rows must not matter"


def _check_attention(policy: Policy, tokens: Int[Tensor, "1 T"], mask: Bool[Tensor, "1 T"]) -> None:
    """Replace one token, and check at which positions the logits change."""
    spec = policy.spec
    at = spec.block_size if spec.block_size is not None else 3
    changed_tokens = tokens.clone()
    changed_tokens[0, at] = min({0, 1, 2} - {spec.mask_id, int(tokens[0, at])})
    before = policy.logits(tokens, mask)[0]
    after = policy.logits(changed_tokens, mask)[0]
    changed = [_gap(policy, new, old) > 1 for old, new in zip(before, after, strict=True)]
    if spec.attention == "full":
        assert changed[0], f"attention='full', but the first position does not see token {at}"
    else:
        unseen = f"attention={spec.attention!r}, but token {at} is seen from"
        assert not any(changed[:at]), f"{unseen} position {changed.index(True)}, before it"
    if spec.attention == "causal":
        assert not changed[at], f"the logits at {at} depend on token {at} itself: is shift=True missing from the spec?"
        assert changed[at + 1], f"the logits at {at + 1} do not depend on token {at}: is the head shifted twice?"


def _check_gradient(policy: Policy, tokens: Tensor, mask: Tensor) -> None:
    learner = copied(policy)
    for name, parameter in learner.module.named_parameters():  # if there are adapters, only they are trained
        parameter.requires_grad_(policy.lora is None or ".lora_" in name)
    trained = trainable_parameters(learner.module)
    if not all(parameter.dtype.is_floating_point for parameter in trained):
        return  # integer codes of quantized weights have no gradient
    learner.logits(tokens, mask)[mask].float().log_softmax(-1)[:, 0].sum().backward()
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    # Half of them is enough, because experts without tokens get no gradient.
    missed = f"{len(trained) - len(gradients)} of {len(trained)} weights get no gradient from the logits"
    assert 2 * len(gradients) > len(trained), f"{missed}: is there a detach() or no_grad() on the way?"
    assert all(gradient.isfinite().all() for gradient in gradients), "a gradient of the log-probs is not finite"
    assert any(gradient.any() for gradient in gradients), "every gradient of the log-probs is zero"


def _check_saving(policy: Policy, tokens: Tensor, mask: Tensor, logits: Tensor) -> None:
    with TemporaryDirectory() as folder:
        policy.save_pretrained(folder)
        if has_known_family(Path(folder)):
            loaded: Policy = load_policy(folder, dtype="auto", device=policy.device, block_size=policy.spec.block_size)
            loaded.float32_head = policy.float32_head
        else:
            loaded = copied(policy)
            for parameter in loaded.module.parameters():
                parameter.zero_()  # so that a weight that is not loaded is detected
            if has_adapted_or_low_bit(loaded.module):  # saved merged, as ordinary layers
                merge_lora(loaded)
            load_weights(loaded, folder)
        loaded_logits = loaded.logits(tokens, mask)[mask]
    is_exact = policy.lora is None  # merging adapters rounds
    is_same = torch.equal(loaded_logits, logits[mask]) if is_exact else _gap(policy, loaded_logits, logits[mask]) <= 1
    assert is_same, "saved and opened again, the logits differ: is a weight neither a parameter nor a lasting buffer?"


def _check_quantized(policy: Policy, tokens: Tensor, mask: Tensor, logits: Tensor) -> None:
    learner = copied(policy)
    # Quantize only weights. A module may choose another kernel for trained weights, and where the kernels round
    # differently, a quantized activation would change by a full quantization level.
    try:
        rollout = quantized_copy(learner, FakeQuantize(weight="int8"))
    except ValueError as error:
        raise AssertionError(f"nothing to quantize, linear layers inside a ModuleList are: {error}") from None
    with torch.no_grad():
        quantized_logits = rollout.logits(tokens, mask)
        is_changed = quantized_logits[mask].isfinite().all() and not torch.equal(quantized_logits, logits)
        assert is_changed, "int8 weights must change the logits"
        with aligned_forward(learner, rollout):
            aligned = learner.logits(tokens, mask)
        gap = _gap(policy, aligned[mask], quantized_logits[mask])
        assert gap <= 1, "in aligned_forward, logits must be the quantized copy's"
        for parameter in learner.module.parameters():  # an update so large that stale codes are detected
            parameter.mul_(0.5)
        learner.weights_version += 1
        sync_weights(learner, rollout)
        is_fresh = equals_fresh_copy(learner, rollout, FakeQuantize(weight="int8"), tokens, mask)
        assert is_fresh, "after sync_weights the copy must be a fresh copy's"


def _check_adapters(policy: Policy, tokens: Tensor, mask: Tensor, logits: Tensor) -> None:
    adapted = copied(policy)
    try:
        add_lora(adapted, Lora(r=2))
    except ValueError as error:
        raise AssertionError(f"no layer takes adapters, spec.lora_targets names them: {error}") from None
    with torch.no_grad():
        assert _gap(policy, adapted.logits(tokens, mask), logits) <= 1, "fresh adapters must change nothing"
        for name, parameter in adapted.module.named_parameters():
            if ".lora_B." in name:  # zero in a new adapter
                parameter.fill_(0.1)
        gap = _gap(policy, adapted.logits(tokens, mask), logits)
        assert gap > 1, "adapters must change the logits: are they called?"
        reference_gap = _gap(policy, adapted.reference().logits(tokens, mask), logits)
        assert reference_gap <= 1, "the reference must leave the adapters out"
    trained = [name for name, parameter in adapted.module.named_parameters() if parameter.requires_grad]
    assert all(".lora_" in name for name in trained), f"in addition to adapters, {trained[0]} would be trained"
