"""The contract of policies."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_rl.models.base import Policy, copied, trainable_parameters
from dllm_rl.models.lora import Lora, add_lora
from dllm_rl.models.merge import has_adapted_or_low_bit, merge_lora
from dllm_rl.models.policy import check_tokenizer, load_policy, load_weights
from dllm_rl.quantization.aligned import aligned_forward
from dllm_rl.quantization.rollout_policy import quantized_copy, sync_weights
from dllm_rl.quantization.schemes import fake_quantize

ASKED = (
    "module spec tokenizer weights_version float32_head lora quantization quantization_report device vocab_size pad_id"
)
ASKED += " encode hidden head logits to save_pretrained reference"


def check_policy(policy: Any, *, seed: int = 0) -> None:
    """Raise AssertionError, naming the broken promise, unless the policy fulfills its contract.

    Call it in a test of a custom policy or module.

    The policy must have every member of `Policy`. Logits (B, T, V) are finite and repeatable, whatever the padding and
    the other rows; a row sees what its `attention` allows. Weights get finite gradients, and survive saving bit for
    bit. The blocks have linear layers, whose quantized copy follows the weights. Fresh adapters change nothing, are the
    only trained weights, and are left out of the reference. `aligned_forward` computes what the quantized copy does.

    The policy does not change: its module is copied. A policy with adapters gets no further ones. Sums in another order
    may differ by 1e-4 of the largest logit (0.05 in 16 bits).

    Args:
        policy: Policy to check.
        seed: Seed of the random tokens.

    Raises:
        AssertionError: A promise is broken.
    """
    missing = [name for name in ASKED.split() if not hasattr(policy, name)]
    assert not missing, f"a policy has {', '.join(missing)}: see dllm_rl.models.base.Policy"
    try:
        check_tokenizer(policy.tokenizer)
    except ValueError as error:
        raise AssertionError(str(error)) from None
    tokens, mask = _rows(policy, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        logits = policy.logits(tokens, mask)
        _check_logits(policy, tokens, mask, logits)
        _check_rows(policy, tokens, mask, logits)
        _check_sight(policy, tokens[:1], mask[:1])
        if policy.quantization is None:  # a quantized copy is not saved
            _check_saving(policy, tokens, mask, logits)
    _check_gradient(policy, tokens, mask)
    if policy.lora is None:
        _check_adapters(policy, tokens, mask, logits)
    _check_quantized(policy, tokens, mask, logits)


def _rows(policy: Policy, generator: torch.Generator) -> tuple[Int[Tensor, "3 T"], Bool[Tensor, "3 T"]]:
    """Return three rows of random tokens without the mask token; the last two have padding on the left."""
    spec = policy.spec
    length = 12
    if spec.block_size is not None:
        length = max(length, spec.block_size + 2)  # a token of the second block, to check what it sees
    if spec.max_length is not None:
        assert spec.max_length >= 6, f"max_length={spec.max_length} leaves no room for six tokens"
        length = min(length, spec.max_length)
    tokens = torch.randint(0, policy.vocab_size - 1, (3, length), generator=generator)
    if spec.mask_id is not None:
        tokens = tokens + (tokens >= spec.mask_id)  # skips the mask token
    mask = torch.arange(length) >= torch.tensor([0, 2, length // 2])[:, None]
    return tokens.masked_fill(~mask, policy.pad_id).to(policy.device), mask.to(policy.device)


def _gap(policy: Policy, a: Tensor, b: Tensor) -> float:
    """Return the largest difference, as a share of the difference that another order of sums may cause."""
    half = next(policy.module.parameters()).dtype in (torch.bfloat16, torch.float16)
    return float((a.float() - b.float()).abs().max() / (b.float().abs().max() + 1e-6)) / (0.05 if half else 1e-4)


def _check_logits(policy: Policy, tokens: Tensor, mask: Tensor, logits: Float[Tensor, "B T V"]) -> None:
    shape = (*tokens.shape, policy.vocab_size)
    assert logits.shape == shape, f"logits must be (B, T, V) = {shape}, got {tuple(logits.shape)}"
    assert logits[mask].isfinite().all(), "logits must be finite wherever there is a token"
    assert torch.equal(policy.logits(tokens, mask), logits), "the same call must give the same logits: is dropout on?"
    marked = mask & (torch.arange(tokens.shape[1], device=mask.device) % 2 == 0)
    some = policy.logits(tokens, mask, marked)
    assert some.shape == (int(marked.sum()), policy.vocab_size), "logits at marked positions must be (K, V)"
    assert _gap(policy, some, logits[marked]) <= 1, "logits at marked positions must be those of all, row by row"


def _check_rows(policy: Policy, tokens: Tensor, mask: Tensor, logits: Tensor) -> None:
    for row in range(len(tokens)):
        live = mask[row]
        alone = policy.logits(tokens[row : row + 1, live], mask[row : row + 1, live])[0]
        what = "padding before it, or the rows beside it, must" if not live.all() else "the rows beside it must"
        assert _gap(policy, logits[row, live], alone) <= 1, f"a row differs from the row alone: {what} not be seen"
    turned = policy.logits(tokens.flip(0), mask.flip(0)).flip(0)
    assert _gap(policy, turned[mask], logits[mask]) <= 1, "the order of the rows must not matter"


def _check_sight(policy: Policy, tokens: Int[Tensor, "1 T"], mask: Bool[Tensor, "1 T"]) -> None:
    spec = policy.spec
    at = spec.block_size if spec.block_size is not None else 3
    other = tokens.clone()
    other[0, at] = min({0, 1, 2} - {spec.mask_id, int(tokens[0, at])})
    before = policy.logits(tokens, mask)[0]
    after = policy.logits(other, mask)[0]
    moved = [_gap(policy, new, old) > 1 for old, new in zip(before, after, strict=True)]
    if spec.attention == "full":
        assert moved[0], f"attention='full', but the first position does not see token {at}"
    else:
        unseen = f"attention={spec.attention!r}, but token {at} is seen from"
        assert not any(moved[:at]), f"{unseen} position {moved.index(True)}, before it"
    if spec.attention == "causal":
        assert not moved[at], f"the logits at {at} depend on token {at} itself: is shift=True missing from the spec?"
        assert moved[at + 1], f"the logits at {at + 1} do not depend on token {at}: is the head shifted twice?"


def _check_gradient(policy: Policy, tokens: Tensor, mask: Tensor) -> None:
    twin = copied(policy)
    for name, parameter in twin.module.named_parameters():  # with adapters, only these are trained
        parameter.requires_grad_(policy.lora is None or ".lora_" in name)
    trained = trainable_parameters(twin.module)
    if not all(parameter.dtype.is_floating_point for parameter in trained):
        return  # codes have no gradient
    twin.logits(tokens, mask)[mask].float().log_softmax(-1)[:, 0].sum().backward()
    reached = [parameter.grad for parameter in trained if parameter.grad is not None]
    # Half is enough: an expert without tokens gets no gradient.
    missed = f"{len(trained) - len(reached)} of {len(trained)} weights get no gradient from the logits"
    assert 2 * len(reached) > len(trained), f"{missed}: is there a detach() or no_grad() on the way?"
    assert all(gradient.isfinite().all() for gradient in reached), "a gradient of the log-probs is not finite"
    assert any(gradient.any() for gradient in reached), "every gradient of the log-probs is zero"


def _check_saving(policy: Policy, tokens: Tensor, mask: Tensor, logits: Tensor) -> None:
    with TemporaryDirectory() as folder:
        policy.save_pretrained(folder)
        if (Path(folder) / "config.json").exists():
            again: Policy = load_policy(folder, dtype="auto", device=policy.device, block_size=policy.spec.block_size)
            again.float32_head = policy.float32_head
        else:
            again = copied(policy)
            for parameter in again.module.parameters():
                parameter.zero_()  # so that a weight that is not loaded is noticed
            if has_adapted_or_low_bit(again.module):  # saved merged, as ordinary layers
                merge_lora(again)
            load_weights(again, folder)
        found = again.logits(tokens, mask)
    exact = policy.lora is None  # merged adapters are rounded
    same = torch.equal(found[mask], logits[mask]) if exact else _gap(policy, found[mask], logits[mask]) <= 1
    assert same, "saved and opened again, the logits differ: is a weight neither a parameter nor a lasting buffer?"


def _check_quantized(policy: Policy, tokens: Tensor, mask: Tensor, logits: Tensor) -> None:
    learner = copied(policy)
    # Only weights: a module may choose another kernel for weights that are trained, and a code of an activation
    # would jump by a full level where the two kernels round differently.
    try:
        rollout = quantized_copy(learner, fake_quantize(weight="int8"))
    except ValueError as error:
        raise AssertionError(f"nothing to quantize, linear layers inside a ModuleList are: {error}") from None
    with torch.no_grad():
        ours = rollout.logits(tokens, mask)
        assert ours[mask].isfinite().all() and not torch.equal(ours, logits), "int8 weights must change the logits"
        with aligned_forward(learner, rollout):
            aligned = learner.logits(tokens, mask)
        assert _gap(policy, aligned[mask], ours[mask]) <= 1, "in aligned_forward, logits must be the quantized copy's"
        for parameter in learner.module.parameters():  # an update, after which the old codes would be far off
            parameter.mul_(0.5)
        learner.weights_version += 1
        sync_weights(learner, rollout)
        fresh = quantized_copy(learner, fake_quantize(weight="int8")).logits(tokens, mask)
        assert torch.equal(rollout.logits(tokens, mask), fresh), "after sync_weights the copy must be a fresh copy's"


def _check_adapters(policy: Policy, tokens: Tensor, mask: Tensor, logits: Tensor) -> None:
    twin = copied(policy)
    try:
        add_lora(twin, Lora(r=2))
    except ValueError as error:
        raise AssertionError(f"no layer takes adapters, spec.lora_targets names them: {error}") from None
    with torch.no_grad():
        assert _gap(policy, twin.logits(tokens, mask), logits) <= 1, "fresh adapters must change nothing"
        for name, parameter in twin.module.named_parameters():
            if ".lora_B." in name:  # zero in a fresh adapter, which therefore changes nothing
                parameter.fill_(0.1)
        assert _gap(policy, twin.logits(tokens, mask), logits) > 1, "adapters must change the logits: are they called?"
        apart = _gap(policy, twin.reference().logits(tokens, mask), logits)
        assert apart <= 1, "the reference must leave the adapters out"
    trained = [name for name, parameter in twin.module.named_parameters() if parameter.requires_grad]
    assert all(".lora_" in name for name in trained), f"in addition to adapters, {trained[0]} would be trained"
