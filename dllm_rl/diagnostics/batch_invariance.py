"""Whether learner and rollout agree bit for bit, and the first layer where they do not."""

import torch
from torch import Tensor

from dllm_rl.likelihoods.views import each_view
from dllm_rl.models.base import Policy
from dllm_rl.quantization.linear import UnstackedExperts
from dllm_rl.types.rollouts import Rollout
from dllm_rl.types.scoring import Logprobs


def check_bitwise_equal(policy: Policy, rollout_policy: Policy, rollout: Rollout, logps: Logprobs) -> None:
    """Raise RuntimeError, naming position and layer, unless learner and rollout agree bitwise in every scored row."""
    views = logps.views
    mask = views.scored(rollout.completion_mask)
    differs = mask & (logps.old_logprobs != logps.rollout_logprobs)
    if not differs.any():
        return
    row, position = differs.nonzero()[0].tolist()
    token = int(rollout.tokens[row, position])
    view = int((views.coefficients[:, row, position] != 0).int().argmax())  # the first that scores the token, or 0
    tokens = list(each_view(views))[view].inputs_and_targets(policy, rollout)[0][row : row + 1]
    attention_mask = rollout.attention_mask[row : row + 1]
    learner_outputs = layer_outputs(policy, tokens, attention_mask)
    rollout_outputs = layer_outputs(rollout_policy, tokens, attention_mask)
    location = (
        "no layer differs if both score only this row: the sampler, the batch's shape (rollout_batch_size and "
        "max_num_gen_batches change its width) or the settings differ"
    )
    if differing := [
        name
        for name in learner_outputs
        if name in rollout_outputs and not torch.equal(learner_outputs[name], rollout_outputs[name])
    ]:
        location = f"the hidden states first differ at {differing[0]}"  # names are in the order of the forward
    raise RuntimeError(
        f"zero_mismatch: {int(differs.sum())} of {int(mask.sum())} log-probs differ, the first at row {row}, position "
        f"{position} (token {token}, {policy.tokenizer.decode([token], skip_special_tokens=False)!r}): learner "
        f"{float(logps.old_logprobs[row, position]):.9g}, rollout "
        f"{float(logps.rollout_logprobs[row, position]):.9g} nats; {location}"
    )


@torch.no_grad()
def layer_outputs(policy: Policy, tokens: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
    """Return the outputs of every layer that has weights (an adapted layer is one layer), in order of execution."""
    outputs: dict[str, Tensor] = {}
    hooks = []
    for name, layer in policy.module.named_modules():
        # The parts of an adapted layer differ between a learner and a merged copy: only their sum can be compared.
        is_inner = ".base_layer" in name or ".lora_A" in name or ".lora_B" in name
        is_combined = hasattr(layer, "base_layer") or isinstance(layer, UnstackedExperts)
        if is_combined or (not is_inner and next(layer.parameters(recurse=False), None) is not None):
            hooks.append(layer.register_forward_hook(lambda _, __, out, name=name: outputs.__setitem__(name, out)))
    try:
        policy.logits(tokens, attention_mask)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: out.detach() for name, out in outputs.items() if isinstance(out, Tensor)}
