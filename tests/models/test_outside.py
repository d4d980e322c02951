"""Backbones from outside the package: families, classes of transformers' Auto registries, modules of one's own."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from layouts import checkpoint, published, stock
from own_module import own_policy
from refusals import refuses
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from dllm_rl import load_policy, make_policy
from dllm_rl.models.base import CheckpointFiles, FamilySpec, encode_roberta, mlm_head
from dllm_rl.models.checkpoint import families
from dllm_rl.models.checkpoint.families import register_family
from dllm_rl.models.load import load_weights
from dllm_rl.models.lora import add_lora
from dllm_rl.models.lora_settings import Lora
from dllm_rl.models.tiny import char_tokenizer

TOKENS = torch.tensor([[3, 4, 5, 6, 7, 4]])
MASK = torch.ones_like(TOKENS, dtype=torch.bool)


@pytest.fixture
def own_families(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", list(families.FAMILIES))


class NestConfig(LlamaConfig):
    model_type = "nest-of-the-tests"


class NestForDiffusionLM(LlamaForCausalLM):
    config_class = NestConfig


class EggConfig(RobertaConfig):
    model_type = "egg-of-the-tests"


class EggForMaskedLM(RobertaForMaskedLM):
    config_class = EggConfig


AutoConfig.register("nest-of-the-tests", NestConfig)
AutoModelForCausalLM.register(NestConfig, NestForDiffusionLM)
AutoConfig.register("egg-of-the-tests", EggConfig)
AutoModelForMaskedLM.register(EggConfig, EggForMaskedLM)


def renamed_checkpoint(folder, family: str, architecture: str, kind: str, **fields):
    stock(folder, family)
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"architectures": [architecture], "model_type": kind, **fields}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def test_a_registered_family_of_a_class_in_the_auto_registry(tmp_path, own_families):
    """A name that no family knows is refused; once registered it is opened, saved and opened again."""
    folder = renamed_checkpoint(
        tmp_path / "a", "llama", "NestForDiffusionLM", "nest-of-the-tests", is_causal=False, mask_token_id=39
    )
    refuses(r"'NestForDiffusionLM' is not known.*pass a FamilySpec to register_family", lambda: load_policy(folder))
    register_family(
        FamilySpec(name="nest", attention="full", files=CheckpointFiles(architectures=("NestForDiffusionLM",)))
    )
    policy = load_policy(folder)
    assert type(policy.module) is NestForDiffusionLM and policy.spec.name == "nest" and policy.spec.mask_id == 39
    policy.save_pretrained(tmp_path / "b")
    assert torch.equal(load_policy(tmp_path / "b").logits(TOKENS, MASK), policy.logits(TOKENS, MASK))


def test_a_class_in_the_auto_registry_whose_name_a_family_knows(tmp_path, own_families):
    """It counts positions as RoBERTa's classes do, and the family of its name as BERT's do."""
    folder = renamed_checkpoint(tmp_path, "roberta", "EggForMaskedLM", "egg-of-the-tests")
    refuses("EggForMaskedLM computes other logits than its family 'masked_lm'", lambda: load_policy(folder))
    register_family(replace(families.ROBERTA, name="egg", files=CheckpointFiles(architectures=("EggForMaskedLM",))))
    assert type(load_policy(folder).module) is EggForMaskedLM


TINY = {"vocab_size": 9, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
TINY |= {"pad_token_id": 0, "max_position_embeddings": 64, "embedding_size": 16, "shape_vocab_size": 9}


def masked_lm(name, **fields):
    kind = getattr(transformers, f"{name}ForMaskedLM")
    return kind(kind.config_class(**TINY | fields)).eval()


@pytest.mark.parametrize("name", ["Electra", "DistilBert", "ConvBert"])
def test_a_masked_lm_whose_output_layer_is_not_known_is_refused(name):
    fields = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 16} if name == "DistilBert" else {}
    message = rf"^{name}ForMaskedLM has none of the output layers decoder, .* pass make_policy a FamilySpec with its"
    refuses(message, lambda: make_policy(masked_lm(name, **fields), char_tokenizer("1234")))


@pytest.mark.parametrize("name", ["MPNet", "IBert", "XLMRobertaXL", "Nystromformer", "FNet"])
def test_a_masked_lm_of_other_logits_than_its_familys_is_refused(name):
    """The first count positions as RoBERTa does, Nystromformer from 2, and FNet mixes padding in."""
    with pytest.raises(ValueError, match=f"^{name}ForMaskedLM computes other logits than its family 'masked_lm': "):
        make_policy(masked_lm(name), char_tokenizer("1234"))


def test_a_masked_lm_without_a_largest_length_is_no_error_of_python():
    """FunnelConfig has none; its policy does not mask padding as the class does."""
    sizes = {"d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 16, "block_sizes": [1, 1]}
    module = transformers.FunnelForMaskedLM(transformers.FunnelConfig(vocab_size=9, pad_token_id=0, **sizes)).eval()
    with pytest.raises(ValueError, match=r"^FunnelForMaskedLM computes other logits than its family"):
        make_policy(module, char_tokenizer("1234"))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in ("Bert", "MobileBert", "RoCBert")), ("Roberta", torch.bfloat16)],
)
def test_a_masked_lm_computes_what_its_class_does(name, dtype):
    """The configs of MobileBert and RoCBert have no eos_token_id."""
    module = masked_lm(name).to(dtype)
    policy = make_policy(module, char_tokenizer("1234"))
    with torch.no_grad():
        expected = module(input_ids=TOKENS, attention_mask=MASK.long()).logits.float()
        torch.testing.assert_close(policy.logits(TOKENS, MASK), expected, rtol=0.02, atol=0.02)


def test_a_family_is_replaced_under_its_name_and_comes_first(own_families):
    spec = FamilySpec(
        name="roberta", attention="full", head=mlm_head, files=CheckpointFiles(architectures=("EggForMaskedLM",))
    )
    register_family(spec)
    register_family(replace(spec, encode=encode_roberta))
    assert [family.name for family in families.FAMILIES].count("roberta") == 1
    assert families.FAMILIES[0].encode is encode_roberta
    with pytest.raises(ValueError, match=r"files\.architectures=\(\) of the family 'mine'"):
        register_family(FamilySpec(name="mine", attention="full"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_dtype_of_a_native_checkpoint_does_not_hang_on_a_tensors_name(tmp_path, dtype):
    """`auto` takes the dtype of most numbers; LLaDA2's expert bias is in fp32 beside weights in bf16."""
    policy = load_policy(published(tmp_path / "a", "llada2", dtype=dtype), dtype="auto")
    assert policy.module.get_input_embeddings().weight.dtype == dtype
    policy.save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")


class TestAModuleOfOnesOwn:
    def test_is_saved_and_opened_bit_for_bit(self, tmp_path):
        policy, other = own_policy(seed=1), own_policy(seed=2)
        policy.save_pretrained(tmp_path)
        assert {file.name for file in tmp_path.iterdir()} >= {"model.safetensors", "tokenizer.json"}
        assert not torch.equal(other.logits(TOKENS, MASK), policy.logits(TOKENS, MASK))
        assert load_weights(other, tmp_path) is other
        assert torch.equal(other.logits(TOKENS, MASK), policy.logits(TOKENS, MASK))

    def test_with_tied_weights(self, tmp_path):
        policies = [own_policy(seed=seed) for seed in (1, 2)]
        for policy in policies:
            policy.module.vocabulary.weight = policy.module.embed.weight
        policies[0].save_pretrained(tmp_path)
        load_weights(policies[1], tmp_path)
        assert policies[1].module.vocabulary.weight is policies[1].module.embed.weight
        assert torch.equal(*(policy.logits(TOKENS, MASK) for policy in policies))

    def test_weights_of_another_module_are_refused(self, tmp_path):
        own_policy(characters="123").save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"tensors \['embed.weight', .* do not fit Own; build the module"):
            load_weights(own_policy(), tmp_path)

    def test_adapters_are_added_after_the_weights(self, tmp_path):
        policy = own_policy()
        policy.save_pretrained(tmp_path)
        add_lora(policy, Lora(r=2))
        refuses("load the weights first, then add_lora", lambda: load_weights(policy, tmp_path))

    def test_load_policy_says_what_the_folder_is(self, tmp_path):
        own_policy().save_pretrained(tmp_path)
        refuses(r"without a config.json, .* load_policy\(folder, into=policy\)", lambda: load_policy(tmp_path))

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"vocab_size": None}, "vocab_size=None in the spec 'own', and Own has no config"),
            ({"mask_id": None}, "mask_id=None in the spec 'own'"),
            ({"mask_id": 9}, "has the id 9, but its vocabulary has 9 tokens"),
            ({"eos_ids": ()}, r"eos_ids=\(\) in the spec 'own'"),
            ({"attention": "causal"}, "attention='causal' is what Own should have"),
        ],
    )
    def test_a_spec_that_cannot_be_is_refused(self, changes, said):
        refuses(said, lambda: own_policy(**changes))

    def test_a_head_in_16_bits_must_be_known(self):
        policy = own_policy()
        policy.module.bfloat16()
        refuses(r"float32_head=True needs to know the output layer of Own", lambda: policy.logits(TOKENS, MASK))
        policy.float32_head = False
        assert policy.logits(TOKENS, MASK).dtype == torch.bfloat16
        policy.float32_head = True
        policy.module.get_output_embeddings = lambda: policy.module.vocabulary
        assert policy.logits(TOKENS, MASK).dtype == torch.float32

    def test_says_what_it_is(self):
        assert repr(own_policy()) == "ModulePolicy(Own, 19,017 parameters, family own)"


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    refuses(r"empty has no config.json: it is not a checkpoint", lambda: load_policy(tmp_path / "empty"))
    (tmp_path / "empty/step-000004").mkdir()
    (tmp_path / "empty/step-000004/config.json").write_text("{}")
    refuses("give one of those in it, such as .*/empty/step-000004$", lambda: load_policy(tmp_path / "empty"))
    (tmp_path / "run" / "checkpoints" / "step-000002").mkdir(parents=True)
    refuses(r"run is a run's folder without a checkpoint yet; give a checkpoint", lambda: load_policy(tmp_path / "run"))
    broken = checkpoint(tmp_path / "broken", "llama")
    (broken / "config.json").write_text('{"architectures": [')
    refuses(r"config.json is damaged: it is not JSON", lambda: load_policy(broken))


def test_make_policy_needs_no_spec_for_a_known_class():
    tokenizer = char_tokenizer("0123")
    config = LlamaConfig(
        vocab_size=7,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=None,
        architectures=["LlamaForCausalLM"],
    )
    with torch.random.fork_rng(devices=[]):
        assert make_policy(LlamaForCausalLM(config), tokenizer).spec.attention == "causal"
