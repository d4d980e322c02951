"""Gradient checkpointing: the same gradients bit for bit, from a fraction of what the backward would keep."""

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from layouts import ORIGINAL, STOCK, checkpoint
from repetitions import few
from tiny_recipe import tiny_recipe
from torch import nn
from transformers import AlbertConfig, AlbertForMaskedLM, LlamaConfig

from dllm_rl import load_policy, quantized_copy, train
from dllm_rl.likelihoods import estimators as lik
from dllm_rl.models.forward.batch_invariance import BatchInvariantOps
from dllm_rl.models.forward.blocks import blocks_of, recomputed_blocks
from dllm_rl.models.lora import adapted_layers, add_lora
from dllm_rl.models.lora_settings import Lora
from dllm_rl.models.tiny import char_tokenizer, tiny_llama, tiny_masked_lm
from dllm_rl.quantization.aligned import aligned_forward
from dllm_rl.quantization.schemes import Int8WeightOnly
from dllm_rl.step.settings import UpdateSettings
from dllm_rl.step.update import update
from dllm_rl.training import policies
from dllm_rl.types.rollouts import Rollout
from dllm_rl.types.scoring import Batch
from recipes.sudoku_unique import recipe as main_job

pytestmark = pytest.mark.usefixtures("no_rehearsal")

SMALL = {
    "characters": "abcdefgh",
    "hidden_size": 16,
    "num_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}


def rollout_of(policy, *, prompts: int = 2, width: int = 12, group: int = 2) -> Rollout:
    """Random tokens behind prompts of 4 tokens, the second of which is padded."""
    rows = prompts * group
    tokens = torch.randint(3, policy.vocab_size - 2, (rows, width), generator=torch.Generator().manual_seed(5))
    attention_mask = torch.ones_like(tokens, dtype=torch.bool)
    attention_mask[group:, :2] = False
    tokens[:, :4] = tokens[::group, :4].repeat_interleave(group, 0)
    chosen = torch.zeros_like(attention_mask)
    chosen[:, 4:] = True
    steps = torch.where(chosen, torch.arange(width) // 3, -1)
    return Rollout(
        tokens, attention_mask, chosen, steps, torch.zeros(tokens.shape), group=torch.arange(len(tokens)) // group
    )


def gradients(policy, *, recompute: bool) -> tuple[dict, int]:
    """The gradients of two forwards, how many dropout masks were drawn, and the bytes kept for the backward."""
    policy, rollout = copy.deepcopy(policy), rollout_of(policy)
    policy.gradient_checkpointing = recompute
    own_forwards = {name for name, layer in policy.module.named_modules() if "forward" in vars(layer)}
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, nn.Parameter):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        hidden = policy.hidden(rollout.tokens, rollout.attention_mask)
        hidden = hidden + policy.hidden(rollout.tokens.flip(0), rollout.attention_mask.flip(0))
    vector = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(6))
    hidden.float().backward(vector)
    found = {n: p.grad for n, p in policy.module.named_parameters() if p.requires_grad and p.grad is not None}
    assert own_forwards == {name for name, layer in policy.module.named_modules() if "forward" in vars(layer)}
    return found | {f"{n}.calls": layer.calls for n, layer in adapted_layers(policy.module).items()}, sum(kept.values())


def assert_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys() and len(one) > 3
    for name, value in one.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[name])), name


ALIKE = ("llada_tied", "sdar_moe", "a2d_qwen3", "roberta", "smollm2")  # each as one that is tested


@pytest.mark.repeated
@pytest.mark.parametrize(
    "lora", [pytest.param(None, id="full", marks=pytest.mark.slow), pytest.param(Lora(r=4, dropout=0.3), id="lora")]
)
@pytest.mark.parametrize(
    "family", few([f for f in (*ORIGINAL, *STOCK) if f not in ALIKE], ["llada2", "nemotron", "bert", "modernbert"])
)
def test_every_family_has_the_same_gradients_from_less_memory(tmp_path, family, lora):
    policy = load_policy(checkpoint(tmp_path, family))
    if lora is not None:
        add_lora(policy, lora)
    for layer in adapted_layers(policy.module).values():
        layer.lora_B.weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    (plain, many), (again, kept) = (gradients(policy, recompute=on) for on in (False, True))
    assert_equal(plain, again)
    assert kept < 0.4 * many
    if lora is not None:
        assert {v for n, v in again.items() if n.endswith(".calls")} == {2}  # run again counts as none


def test_a_block_that_is_run_many_times_is_recomputed_each_time():
    """ALBERT has one block, which stands in a list of a group in a list of groups."""
    tokenizer = char_tokenizer("abcdefgh")
    config = AlbertConfig(
        vocab_size=len(tokenizer), embedding_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=24, pad_token_id=0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        policy = replaced_module(tiny_masked_lm(**SMALL), AlbertForMaskedLM(config).eval())
    assert len(blocks_of(policy.module)) == 1
    (plain, many), (again, kept) = (gradients(policy, recompute=on) for on in (False, True))
    assert_equal(plain, again)
    assert kept < 0.5 * many


def replaced_module(policy, module):
    policy.module = module
    policy.spec = replace(policy.spec, encode=lambda m, t, a, p: m.base_model(t, a, position_ids=p).last_hidden_state)
    return policy


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_a_quantized_base(tmp_path, base):
    policy = load_policy(checkpoint(tmp_path, "llama"), quantization=base)
    add_lora(policy, Lora(r=4, dropout=0.2))
    for layer in adapted_layers(policy.module).values():
        layer.lora_B.weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    (plain, many), (again, kept) = (gradients(policy, recompute=on) for on in (False, True))
    assert_equal(plain, again)
    assert kept < 0.4 * many


def updated(policy, estimator, *, recompute: bool, align: bool = False, bf16: bool = False) -> dict:
    """The weights after two inner updates in constant memory."""
    policy, rollout = copy.deepcopy(policy), rollout_of(policy)
    policy.gradient_checkpointing = recompute
    generator = torch.Generator().manual_seed(3)
    noise = estimator.draw_views(rollout, generator)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    scores = estimator.view_logprobs(policy, rollout, noise)
    old = estimator.combine(scores, noise)
    batch = Batch(
        rollout=rollout, views=noise, advantages=advantages, old_logprobs=old, old_view_logprobs=scores,
        importance_weights=torch.ones_like(old), loss_mask=rollout.completion_mask, reference_logprobs=None,
        num_tokens=32, num_sequences=4,
    )  # fmt: skip
    optimizer = torch.optim.AdamW([p for p in policy.module.parameters() if p.requires_grad], lr=1e-2)
    settings = {"loss": main_job.policy_loss, "likelihood": estimator, "learning_rate": 1e-2}
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    with aligned_forward(policy, quantized_copy(policy, Int8WeightOnly())) if align else autocast:
        update(policy, optimizer, [batch] * 2, Accelerator(cpu=True), UpdateSettings(**settings))
    return {name: parameter.detach() for name, parameter in policy.module.named_parameters()}


@pytest.mark.parametrize("how", ["plain", "aligned", "aligned adapters", "bf16", "dropout"])
@pytest.mark.repeated
def test_updates_view_by_view(how):
    policy = tiny_masked_lm(**SMALL)
    if how in ("dropout", "aligned adapters"):
        add_lora(policy, Lora(r=2, dropout=0.3 if how == "dropout" else 0.0))
    options = {"align": how.startswith("aligned"), "bf16": how == "bf16"}
    estimator = lik.Trajectory(num_segments=2)
    assert_equal(*(updated(policy, estimator, recompute=on, **options) for on in (False, True)))


def test_packed_scoring(tmp_path):
    policy = load_policy(checkpoint(tmp_path, "sdar"))
    estimator = lik.Trajectory(block_size=policy.spec.block_size)
    assert estimator.block_size
    assert_equal(*(updated(policy, estimator, recompute=on) for on in (False, True)))


@pytest.mark.slow
def test_a_run_with_it_is_the_run_without(tmp_path, monkeypatch):
    """Same metrics, and the setting reaches fresh and resumed policies."""
    ran = []
    monkeypatch.setattr("dllm_rl.models.policy.recomputed_blocks", spying(ran))
    changes = {"gradient_checkpointing": True, "save_steps": 1, "lr_schedule_steps": 2}
    plain = train(tiny_recipe(tmp_path / "plain", **changes | {"gradient_checkpointing": False}))
    assert not ran
    again = train(tiny_recipe(tmp_path / "again", **changes))
    assert plain["eval_after"] == again["eval_after"]
    name = "checkpoints/step-000002/model.safetensors"
    first, second = ((tmp_path / folder / name).read_bytes() for folder in ("plain", "again"))
    assert first == second
    ran_before = len(ran)
    train(tiny_recipe(tmp_path / "again", num_steps=3, resume_from_checkpoint="latest", **changes))
    assert ran_before > 0 and len(ran) > ran_before


def spying(ran: list):
    from dllm_rl.models.forward.blocks import recomputed_blocks

    return lambda module: (ran.append(module), recomputed_blocks(module))[1]


def test_a_module_without_blocks_is_refused(tmp_path):
    class Flat(nn.Linear):
        base_model = property(lambda self: self)
        config = LlamaConfig()

    policy = tiny_llama(causal=False, **SMALL)
    policy.module = Flat(2, 2)
    with pytest.raises(ValueError, match="gradient_checkpointing=True: Flat has no list of blocks; leave it off"):
        policies.apply_compute_settings(tiny_recipe(tmp_path, gradient_checkpointing=True), policy)


def test_nothing_is_recomputed_where_nothing_is_differentiated():
    policy = tiny_llama(causal=False, **SMALL)
    policy.gradient_checkpointing, calls = True, []
    for block in blocks_of(policy.module):
        block.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    rollout = rollout_of(policy)
    with torch.no_grad():
        lik.OneStep().logprobs(policy, rollout, lik.OneStep().draw_views(rollout, torch.Generator().manual_seed(0)))
    assert calls == [False, False]


def test_a_block_that_is_run_again_in_the_backward_runs_in_the_mode_of_its_forward():
    """A backward is outside of every mode: a block recomputed by other kernels stops torch."""
    gradients = []
    for again in (False, True):
        policy = tiny_masked_lm(
            characters="abc", hidden_size=32, num_layers=2, num_attention_heads=2, intermediate_size=32
        )
        tokens = torch.arange(3, 6).repeat(2, 3)
        with torch.autocast("cpu", torch.bfloat16), BatchInvariantOps():
            with recomputed_blocks(policy.module) if again else nullcontext():
                logits = policy.logits(tokens, torch.ones_like(tokens, dtype=torch.bool))
            logits.float().square().mean().backward()
        gradients.append([p.grad for p in policy.module.parameters() if p.grad is not None])
    assert gradients[0] and all(map(torch.equal, *gradients))
