"""check_policy names each broken promise."""

import pytest
import torch
from own_module import Own, own_policy, pretrained, shifted_llama, with_remote_code
from refusals import refuses
from torch import nn

from dllm_rl.models import load as own
from dllm_rl.models.checkpoint import loading
from dllm_rl.models.lora import add_lora
from dllm_rl.models.lora_settings import Lora
from dllm_rl.testing import check_policy


class Causal(Own):
    causal = True


class SeesPadding(Own):
    def sight(self, attention_mask):
        return super().sight(torch.ones_like(attention_mask))


class CountsColumns(Own):
    def states(self, tokens, attention_mask, positions):
        return super().states(tokens, attention_mask, torch.arange(tokens.shape[1]).expand(tokens.shape))


class MixesRows(Own):
    def states(self, tokens, attention_mask, positions):
        x = super().states(tokens, attention_mask, positions)
        return x + 0.1 * x.mean(0, keepdim=True)


class Drops(Own):
    def states(self, tokens, attention_mask, positions):
        return nn.functional.dropout(super().states(tokens, attention_mask, positions), 0.1)


class Detaches(Own):
    def states(self, tokens, attention_mask, positions):
        with torch.no_grad():
            return super().states(tokens, attention_mask, positions)


class Explodes(Own):
    def states(self, tokens, attention_mask, positions):
        return super().states(tokens, attention_mask, positions) / 0


class NoBlocks(Own):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.only, self.blocks = self.blocks[0], nn.ModuleList()

    def states(self, tokens, attention_mask, positions):
        return self.norm(self.only(self.embed(tokens) + self.place(positions), self.sight(attention_mask)))


class Bypasses(Own):
    """The layers' weights are read, and the layers never called: neither copies nor adapters reach the result."""

    def states(self, tokens, attention_mask, positions):
        x = self.embed(tokens) + self.place(positions)
        for block in self.blocks:
            seen = (
                torch.where(attention_mask[..., None], x, 0).sum(1, keepdim=True)
                / attention_mask.sum(-1)[:, None, None]
            )
            x = x + torch.tanh((x + seen) @ block.out.weight.T)
        return self.norm(x)


BROKEN = {
    SeesPadding: "must not be seen",
    CountsColumns: "must not be seen",
    MixesRows: "must not be seen",
    Drops: "is dropout on",
    Detaches: "28 of 30 weights get no gradient",
    Explodes: "must be finite",
    NoBlocks: "no layer takes adapters",
    Bypasses: "22 of 30 weights get no gradient",
}


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_a_broken_promise_is_named(kind, monkeypatch):
    monkeypatch.setattr("dllm_rl.models.policy.check_attention", lambda policy: None)
    policy = own_policy(kind=kind)
    with torch.random.fork_rng(devices=[]), pytest.raises(AssertionError, match=BROKEN[kind]):
        check_policy(policy)


@pytest.mark.parametrize("attention", ["full", "causal", "block_causal"])
@pytest.mark.parametrize("rate", [0.05, 0.9])
def test_dropout_in_ones_own_encode_is_not_called_wrong_attention(attention, rate):
    """Whether the spec's attention is right or not, as the states would change anyway."""

    def encode(module, tokens, attention_mask, positions):
        return nn.functional.dropout(module.states(tokens, attention_mask, positions), rate)

    for kind in (Own, Causal):
        spec = {"attention": attention, "block_size": 4 if attention == "block_causal" else None, "encode": encode}
        with torch.random.fork_rng(devices=[]), pytest.raises(ValueError, match=r"called again: is there dropout"):
            own_policy(kind=kind, **spec | {"mask_id": None if attention == "causal" else 1, "shift": False})


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"max_length": 41}, "max_length=41, but a row of 41 tokens raises IndexError"),
        ({"max_length": 5000}, "max_length=5000, but a row of 4096 tokens raises IndexError"),
        (
            {"vocab_size": 10},
            "vocab_size=10, but token 9 raises IndexError .*: give the spec as many tokens as the mod",
        ),
        ({"vocab_size": 900}, "vocab_size=900, but token 899 raises IndexError"),
    ],
)
def test_sizes_that_the_module_does_not_have_are_named(spec, said):
    assert own_policy().module.place.num_embeddings == 40 and own_policy().vocab_size == 9
    refuses(said, lambda: check_policy(own_policy(**spec)), AssertionError)


def test_a_spec_that_says_another_thing_than_the_module_does(monkeypatch):
    monkeypatch.setattr("dllm_rl.models.policy.check_attention", lambda policy: None)
    for changes, said in (
        ({"kind": Causal, "attention": "full", "mask_id": 1, "shift": False}, "does not see token"),
        ({"attention": "causal"}, "is seen from position 0, before it"),
        ({"kind": Causal, "shift": False}, "is shift=True missing"),
        ({"attention": "block_causal", "block_size": 4}, "is seen from position 0"),
        ({"lora_targets": ("query",)}, "no layer takes adapters"),
    ):
        with pytest.raises(AssertionError, match=said):
            check_policy(own_policy(**changes))


def test_a_weight_that_is_not_saved(monkeypatch):
    everything = loading.merged_state_dict
    for module in (loading, own):  # what saves, what loads
        monkeypatch.setattr(module, "merged_state_dict", lambda m, **_: {"norm.bias": everything(m)["norm.bias"]})
    refuses("neither a parameter nor a lasting buffer", lambda: check_policy(own_policy()), AssertionError)


@pytest.mark.repeated(first_only=True)
@pytest.mark.parametrize("kind", [pretrained, with_remote_code], ids=["of a script", "of remote code"])
@pytest.mark.parametrize("lora", [None, Lora(r=2)], ids=["weights", "adapters"])
def test_a_class_that_transformers_lacks_keeps_its_promises(kind, lora):
    policy = own_policy(kind=kind)
    if lora is not None:
        add_lora(policy, lora)
    check_policy(policy)


@pytest.mark.repeated(first_only=True)
@pytest.mark.parametrize("lora", [None, Lora(r=2)], ids=["weights", "adapters"])
def test_a_transformers_class_with_another_spec_than_its_familys_keeps_its_promises(lora):
    policy = shifted_llama()
    if lora is not None:
        add_lora(policy, lora)
    check_policy(policy)


def test_what_is_missing_is_listed():
    class Half:
        module = spec = None

    refuses(r"a policy has tokenizer, weights_version, .*reference: see", lambda: check_policy(Half()), AssertionError)
