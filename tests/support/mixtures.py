"""Small mixtures of experts, and the definition of replay: routers written out by hand."""

import torch
import torch.nn.functional as F

from dllm_rl.models.lora import moe_layers
from dllm_rl.models.tiny import tiny_moe
from dllm_rl.quantization.rollout_policy import quantized_copy


def sharp_moe(**settings):
    """A `tiny_moe` whose blocks have weights of twice the size: which expert is taken matters."""
    policy = tiny_moe(**settings)
    with torch.no_grad():
        for name, weight in policy.module.named_parameters():
            if ".layers." in name and weight.dim() > 1:
                weight.mul_(1.5 / 0.7)
    return policy


def moe(*, causal=False, **changes):
    settings = {"characters": "123456789", "head_std": 0.5, "hidden_size": 32, "num_layers": 2, "num_experts": 6}
    return sharp_moe(causal=causal, **(settings | {"num_attention_heads": 2, "moe_intermediate_size": 24} | changes))


def own_choice(router, hidden):
    """A stock router's scores, and the experts that it takes: softmax, or LLaDA2's sigmoid, of those groups whose two
    best are best."""
    if hasattr(router, "e_score_correction_bias"):
        scores = F.linear(hidden.float(), router.weight.float()).sigmoid()
        groups = router.num_group if hasattr(router, "num_group") else router.n_group  # below transformers 5.13
        ranked = (scores + router.e_score_correction_bias).unflatten(1, (groups, -1))
        groups = ranked.sort(-1).values[..., -2:].sum(-1).argsort(-1, descending=True)[:, : router.topk_group]
        open_ = torch.zeros(ranked.shape[:2], dtype=torch.bool).scatter(1, groups, True)
        return scores, ranked.where(open_[..., None], -torch.inf).flatten(1).topk(router.top_k).indices
    scores = F.linear(hidden, router.weight).softmax(-1, dtype=torch.float)
    return scores, scores.topk(router.top_k).indices


def by_hand(policy, given, where):
    """Routers whose tokens take `given` (R, W, M, E) where `where` holds; the weights are their own scores there."""
    for number, layer in enumerate(moe_layers(policy.module)):
        router, ids, places = layer.gate, given[:, :, number].flatten(0, 1).long(), where.flatten()

        def forward(hidden, router=router, ids=ids, places=places):
            hidden = hidden.reshape(-1, hidden.shape[-1])
            scores, taken = own_choice(router, hidden)
            taken = torch.where(places[:, None], ids, taken)
            weights = scores.gather(1, taken)
            if router.norm_topk_prob:
                weights = weights / weights.sum(-1, keepdim=True)
            return scores, weights * getattr(router, "routed_scaling_factor", 1.0), taken

        router.forward = forward
        if hasattr(layer, "route_tokens_to_experts"):  # below 5.13, where LLaDA2's router gives scores alone
            layer.route_tokens_to_experts = lambda routed: (routed[2], routed[1])


def chosen_by_hand(policy, tokens, mask):
    """The experts that a forward's tokens take (R, W, M, E), from the routers' inputs."""
    seen, hooks = [], []
    for layer in moe_layers(policy.module):
        hooks.append(layer.gate.register_forward_pre_hook(lambda router, args: seen.append((router, args[0]))))
    policy.hidden(tokens, mask)
    for hook in hooks:
        hook.remove()
    taken = [own_choice(router, x.reshape(-1, x.shape[-1]))[1] for router, x in seen]
    return torch.stack(taken, 1).unflatten(0, tokens.shape)


def on_a_boundary(policy, layers=None):
    """A rollout's copy whose last router (or those of `layers`) sends tokens elsewhere, for a difference of 1e-5 in its
    weights: experts come in pairs that score alike, and are far apart."""
    routers = [layer.gate for layer in moe_layers(policy.module)]
    chosen = routers[-1:] if layers is None else [routers[i] for i in layers]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for router in chosen:
            half = len(router.weight) // 2
            router.weight[half:] = router.weight[:half]
        other = quantized_copy(policy, None)
        for router, theirs in zip(routers, (layer.gate for layer in moe_layers(other.module)), strict=True):
            if router in chosen:
                theirs.weight.add_(torch.randn(theirs.weight.shape, generator=generator), alpha=1e-5)
                router.weight.add_(torch.randn(theirs.weight.shape, generator=generator), alpha=1e-5)
    return other
