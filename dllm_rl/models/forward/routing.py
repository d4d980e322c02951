"""The load-balancing loss of a mixture's routers. docs/papers.md explains the tag [paper]."""

import sys

from jaxtyping import Bool, Float
from torch import Tensor

from dllm_rl.models.base import Policy, Tokens


def check_routers(policy: Policy) -> None:
    """Raise ValueError if transformers has no load-balancing loss for the policy's class."""
    module = policy.module
    if not hasattr(sys.modules[type(module).__module__], "load_balancing_loss_func") or policy.spec.mask_id is None:
        raise ValueError(
            f"router_aux_loss_coef: transformers has no load-balancing loss of {type(module).__name__}, or it has no "
            "mask token; set it to 0"
        )


def load_balancing_loss(policy: Policy, tokens: Tokens, attention_mask: Bool[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Return transformers' load-balancing loss of a mixture's routers in one forward, over all layers and real tokens.

    Call it in addition to a loss of the completions, so that the experts stay in even use. With an even use by all
    tokens it is the number of experts per token. Source: Switch Transformer, arXiv 2101.03961 [paper].

    Args:
        policy: A policy that `check_routers` accepts.
        tokens: Token ids that the model reads, with mask tokens.
        attention_mask: False on padding.
    """
    module, logits = policy.module, []
    hooks = (
        module.base_model.register_forward_pre_hook(
            lambda _, args, kwargs: (args, kwargs | {"output_router_logits": True}), with_kwargs=True
        ),
        module.base_model.register_forward_hook(lambda _, args, output: logits.append(output.router_logits)),
    )
    try:
        policy.hidden(tokens, attention_mask)
    finally:
        for hook in hooks:
            hook.remove()
    function = sys.modules[type(module).__module__].load_balancing_loss_func
    return function(*logits, module.num_experts, module.num_experts_per_tok, attention_mask)
