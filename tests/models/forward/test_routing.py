"""Router replay: experts noted in a forward, and taken again, against routers written out by hand."""

import pytest
import torch
import torch.nn.functional as F
from layouts import published
from mixtures import by_hand, chosen_by_hand, moe
from repetitions import slow

from dllm_rl import load_policy
from dllm_rl.models.base import copied
from dllm_rl.models.forward.routing import Routing, agreement, to_state_columns, to_token_columns, tokens_per_expert
from dllm_rl.models.lora import moe_layers

FAMILIES = ("llada_moe", "llada2", "sdar_moe", "qwen3_moe")


@pytest.fixture(scope="module", params=FAMILIES)
def opened(request, tmp_path_factory):
    if request.param == "qwen3_moe":
        return moe(causal=True)
    made = load_policy(published(tmp_path_factory.mktemp("opened"), request.param))
    for name, parameter in made.module.named_parameters():
        if ".experts." in name or ".mlp.gate." in name:  # large enough that which expert is taken matters
            parameter.data.mul_(8)
    return made


@pytest.fixture
def policy(opened):
    return copied(opened)


def batch():
    tokens = torch.randint(4, 11, (3, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, :4] = False
    return tokens, mask


def some_routes(policy, tokens, seed=0):
    """Random experts for two tokens in three."""
    generator = torch.Generator().manual_seed(seed)
    layers = moe_layers(policy.module)
    count, each = len(layers[0].experts.gate_up_proj), layers[0].gate.top_k
    draws = torch.rand(*tokens.shape, len(layers), count, generator=generator)
    return draws.topk(each).indices.to(torch.uint8), torch.rand(tokens.shape, generator=generator) < 0.67


def gradients(policy, tokens, mask):
    policy.module.zero_grad()
    logits = policy.logits(tokens, mask)
    F.cross_entropy(logits[mask], tokens[mask]).backward()
    return logits.detach(), {n: p.grad.clone() for n, p in policy.module.named_parameters() if p.grad is not None}


def test_a_forward_notes_what_its_routers_took(policy):
    tokens, mask = batch()
    with torch.no_grad(), Routing(policy.module) as routing:
        policy.hidden(tokens, mask)
    noted = routing.experts(len(tokens))
    assert noted.dtype == torch.uint8
    expected = chosen_by_hand(policy, tokens, mask)
    assert torch.equal(noted[mask].long().sort().values, expected[mask].sort().values)
    assert len(noted[mask].unique()) > 2


@pytest.mark.repeated
@pytest.mark.parametrize("checkpointing", [slow(False), True])
def test_replay_is_the_definition_with_its_gradient(policy, checkpointing):
    """The router's own scores at the experts given, normalized as it does; every gradient, the router's too."""
    tokens, mask = batch()
    given, where = some_routes(policy, tokens)
    policy.gradient_checkpointing = checkpointing
    with Routing(policy.module, given, where):
        logits = policy.logits(tokens, mask)
    F.cross_entropy(logits[mask], tokens[mask]).backward()  # outside: a block that is run again takes them again
    ours = {n: p.grad.clone() for n, p in policy.module.named_parameters() if p.grad is not None}
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in moe_layers(policy.module))
    plain, others = gradients(policy, tokens, mask)
    policy.gradient_checkpointing = False
    by_hand(policy, given, where)
    theirs, definition = gradients(policy, tokens, mask)
    torch.testing.assert_close(logits.detach(), theirs, rtol=1e-5, atol=1e-6)
    assert ours.keys() == definition.keys()
    for name, gradient in definition.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    routers = [name for name in ours if name.endswith("mlp.gate.weight")]
    assert routers and all(ours[name].norm() > 0 for name in routers)
    assert not torch.allclose(logits, plain, atol=1e-2)  # the experts given are others
    assert not torch.allclose(ours[routers[0]], others[routers[0]])


def test_its_own_experts_change_nothing(policy):
    tokens, mask = batch()
    with torch.no_grad():
        with Routing(policy.module) as first:
            plain = policy.logits(tokens, mask)
        with Routing(policy.module, first.experts(len(tokens)), mask) as again:
            assert torch.equal(policy.logits(tokens, mask), plain)
    assert torch.equal(first.experts(len(tokens))[mask], again.experts(len(tokens))[mask])


def test_a_packed_forward_gives_and_takes_its_last_columns():
    policy = moe()
    tokens, _ = batch()
    packed = torch.cat([tokens, tokens[:, 4:]], dim=1)
    attended = torch.ones_like(packed, dtype=torch.bool)
    given, where = some_routes(policy, tokens)
    with torch.no_grad(), Routing(policy.module, given, where) as routing:
        policy.hidden(packed, attended)
    noted, everything = routing.experts(3, 10), routing.experts(3)
    assert noted.shape[1] == 10 and everything.shape[1] == 16
    assert torch.equal(noted[:, 4:][where[:, 4:]], given[:, 4:][where[:, 4:]]) and not noted[:, :4].any()
    own = chosen_by_hand(policy, packed, attended)[:, :10, 0].sort().values
    assert torch.equal(everything[:, :10, 0].long().sort().values, own)  # clean columns choose, in the first layer


def test_a_router_that_does_not_choose_by_topk_is_refused():
    policy = moe()
    tokens, mask = batch()

    def first_two(hidden):
        scores = hidden.reshape(-1, hidden.shape[-1])[:, :6]
        return scores, scores[:, :2], torch.zeros(len(scores), 2, dtype=torch.long)

    moe_layers(policy.module)[0].gate.forward = first_two
    with Routing(policy.module) as routing:
        policy.hidden(tokens, mask)
    with pytest.raises(ValueError, match=r"1 of 2 MoE layers .*router_replay=None"):
        routing.experts(3)


def test_states_and_tokens_of_a_shifted_family():
    policy, x = moe(causal=True), torch.arange(1, 6)[None, :, None, None]
    assert to_token_columns(policy, x)[0, 1:, 0, 0].tolist() == [1, 2, 3, 4]
    assert to_state_columns(policy, to_token_columns(policy, x))[0, :, 0, 0].tolist() == [1, 2, 3, 4, 0]
    assert to_token_columns(moe(), x) is x and to_state_columns(moe(), x) is x


def test_agreement_and_load_by_hand():
    ours, theirs = torch.tensor([[[0, 1]], [[2, 3]]]), torch.tensor([[[1, 0]], [[3, 1]]])
    assert agreement(ours, theirs).tolist() == [[[True, True]], [[False, True]]]
    assert tokens_per_expert(ours.repeat(2, 1, 1), 5).tolist() == [[2, 2, 2, 2, 0]]
    assert tokens_per_expert(torch.tensor([[[0], [2]], [[0], [1]]]), 3).tolist() == [[2, 0, 0], [0, 1, 1]]


def test_ids_beyond_a_byte_are_kept_whole():
    policy = moe(num_experts=300)
    tokens, mask = batch()
    with torch.no_grad(), Routing(policy.module) as routing:
        policy.hidden(tokens, mask)
    noted = routing.experts(3)
    assert noted.dtype == torch.int16 and noted.max() > 255
    assert torch.equal(noted[mask].long().sort().values, chosen_by_hand(policy, tokens, mask)[mask].sort().values)


def test_a_dense_model_has_no_mixtures(tmp_path):
    assert moe_layers(load_policy(published(tmp_path, "llada")).module) == []
