"""An engine in a run: its rollouts and syncs are the loop's, and settings that it cannot have are refused."""

import pytest
import torch
from own_module import own_policy
from repetitions import few
from run_outputs import metrics_of
from tiny_recipe import tiny_recipe, tiny_recipe_ar

from dllm_rl import train
from dllm_rl.algorithms.correctors import TIS, Aligned, NoCorrection
from dllm_rl.likelihoods.estimators import Coupled, Trajectory
from dllm_rl.models.base import copied
from dllm_rl.models.lora import add_lora
from dllm_rl.models.lora_settings import Lora
from dllm_rl.models.rollout_engine import FunctionEngine, with_forward
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.quantization.schemes import Float8WeightOnly
from dllm_rl.samplers import Sampler, Unmask
from dllm_rl.training.cautions import cautions
from dllm_rl.training.dry_run.plan import plan

pytestmark = pytest.mark.usefixtures("no_rehearsal")

FEW = {"train_batch_size": 1, "num_generations": 2, "rollout_quantization": None}


def held_apart(noise=0.0):
    """An engine that computes logits with weights of its own, which a sync copies."""

    def load(policy):
        held = copied(policy)
        held.module.requires_grad_(False)

        def forward(*inputs, **cache):
            logits = held.head(held.spec.encode(held.module, *inputs, **cache))
            return logits + noise * torch.arange(logits.shape[-1]) / logits.shape[-1]

        rollout_policy = with_forward(policy, forward)
        rollout_policy.module.held = [held]
        return rollout_policy

    def sync(policy, rollout_policy):
        (held,) = rollout_policy.module.held
        held.module.load_state_dict(policy.module.state_dict())
        rollout_policy.weights_version = policy.weights_version
        return {"engine/synced": 1.0}

    return FunctionEngine(load_fn=load, sync_fn=sync)


@pytest.mark.slow
@pytest.mark.parametrize("make", few([tiny_recipe, tiny_recipe_ar], [tiny_recipe]), ids=["full", "causal"])
@pytest.mark.usefixtures("exact_arithmetic")
def test_an_engine_of_the_same_arithmetic_trains_as_the_learner_alone(tmp_path, make):
    plain = train(make(tmp_path / "a", rollout_quantization=None, report_to=None))
    apart = train(make(tmp_path / "b", rollout_quantization=None, report_to=None, rollout_engine=held_apart()))
    for ours, theirs in zip(apart.policy.module.parameters(), plain.policy.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert apart["eval_after_quantized"] == apart["eval_after"] == plain["eval_after"]
    rows = (tmp_path / "b" / "metrics.jsonl").read_text()
    assert rows.count('"engine/synced": 1.0') == 2 and rows.count('"rollout_corr/abs_log_ratio_mean": 0.0,') == 2


@pytest.mark.parametrize("likelihood", [None, Coupled()], ids=["recorded", "scored"])
@pytest.mark.repeated(first_only=True)
def test_what_an_engine_computes_otherwise_is_measured(tmp_path, likelihood):
    more = {} if likelihood is None else {"likelihood": likelihood}
    engine = held_apart(noise=0.5)
    train(tiny_recipe(tmp_path, rollout_engine=engine, num_steps=1, **FEW, **more))
    line = (tmp_path / "metrics.jsonl").read_text().split('"rollout_corr/abs_log_ratio_mean": ')[1]
    assert float(line.split(",")[0]) > 0.01


@pytest.mark.parametrize("make", [tiny_masked_lm, tiny_llama, own_policy], ids=["roberta", "shifted", "own"])
def test_logits_and_scores_are_the_forwards(make):
    options = {} if make is own_policy else {"characters": "01234"}
    policy = make(**options, **({"causal": True} if make is tiny_llama else {}))
    rollout_policy = held_apart().load(policy)
    tokens = torch.tensor([[0, 3, 4, 5], [3, 4, 5, 4]])
    mask = torch.tensor([[False, True, True, True], [True] * 4])
    with torch.no_grad():
        assert torch.equal(rollout_policy.logits(tokens, mask)[mask], policy.logits(tokens, mask)[mask])
    assert rollout_policy.vocab_size == policy.vocab_size and rollout_policy.device == policy.device
    assert sum(p.numel() for p in rollout_policy.module.parameters()) == 1


def test_an_engines_policy_has_no_adapters_of_its_own():
    """They are merged into what the engine computes with: nothing else may take them for what is trained."""
    policy = tiny_llama(characters="01234", causal=False, num_layers=1)
    add_lora(policy, Lora(r=2, dropout=0.5))
    rollout_policy = with_forward(policy, lambda tokens, mask, positions: torch.zeros(*tokens.shape, policy.vocab_size))
    assert rollout_policy.lora is None and policy.lora is not None
    assert not any(parameter.requires_grad for parameter in rollout_policy.module.parameters())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rollout_quantization": Float8WeightOnly()}, "makes no quantized copy: use rollout_quantization=None"),
        ({"corrector": Aligned()}, "and a corrector that does not align"),
        ({"zero_mismatch": True}, "and no engine"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_an_engine_cannot_have_is_refused_in_a_line(tmp_path, changes, said):
    given = {"rollout_quantization": None, "rollout_engine": held_apart(), "corrector": NoCorrection()} | changes
    with pytest.raises(ValueError, match=said) as error:
        tiny_recipe(tmp_path, **given)
    assert "\n" not in str(error.value)


def test_a_rehearsal_loads_the_engine_before_any_file(tmp_path, rehearsal):
    def load(policy):
        raise ValueError("no server answers")

    engine = FunctionEngine(load_fn=load, sync_fn=held_apart().sync)
    with pytest.raises(ValueError, match="no server answers"):
        train(tiny_recipe(tmp_path / "run", rollout_quantization=None, rollout_engine=engine))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_resumed_run_sets_the_version_of_an_engine_that_counts_for_itself(tmp_path):
    """An engine that starts with weights of its own knows nothing of the steps that the learner has taken."""
    apart = held_apart()

    def load(policy):
        rollout_policy = apart.load(policy)
        rollout_policy.weights_version = 0
        return rollout_policy

    engine = FunctionEngine(load_fn=load, sync_fn=apart.sync)
    options = FEW | {"rollout_engine": engine, "lr_schedule_steps": 2, "eval_steps": 0}
    train(tiny_recipe(tmp_path, num_steps=1, **options))
    train(tiny_recipe(tmp_path, num_steps=2, resume_from_checkpoint="latest", **options))
    assert (tmp_path / "checkpoints/step-000002").exists()


def test_a_name_is_no_engine(tmp_path):
    with pytest.raises(ValueError, match="rollout_engine='vllm' is not known"):
        tiny_recipe(tmp_path, rollout_engine="vllm")


def test_a_run_is_cautioned_and_planned_as_one_whose_rollouts_differ(tmp_path):
    given = {"rollout_quantization": None, "rollout_engine": held_apart(), "corrector": TIS()}
    recipe = tiny_recipe(tmp_path, **given, num_iterations=2, likelihood=Coupled())
    said = cautions(recipe)
    assert len(said) == 2 and "loss.delta" in said[0] and "estimates the ratios" in said[1]
    assert "rollout engine        not counted" in plan(recipe)


class Elsewhere(Sampler):
    """Decodes in an engine: this process has no forward of its weights."""

    temperature: float = 1.0

    def __call__(self, policy, prompts, generator):
        (inner,) = policy.module.inner
        drawn = Unmask(max_new_tokens=self.max_new_tokens, diffusion_steps=3, temperature=self.temperature)
        return drawn(inner, prompts, generator)


def no_forward(*_):
    raise AssertionError("the engine computes no logits")


def decoding():
    def load(policy):
        rollout_policy = with_forward(policy, no_forward)
        rollout_policy.module.inner = [copied(policy)]
        return rollout_policy

    def sync(policy, rollout_policy):
        rollout_policy.module.inner[0].module.load_state_dict(policy.module.state_dict())
        rollout_policy.weights_version = policy.weights_version
        return {}

    return FunctionEngine(load_fn=load, sync_fn=sync)


def test_an_engine_that_decodes_by_itself_is_evaluated_by_its_own_sampler(tmp_path):
    given = {"rollout_quantization": None, "rollout_engine": decoding(), "sampler": Elsewhere(max_new_tokens=16)}
    given |= {"eval_sampler": Unmask(max_new_tokens=16, diffusion_steps=3), "corrector": NoCorrection()}
    summary = train(tiny_recipe(tmp_path, **given, likelihood=Trajectory(), num_steps=1))
    assert metrics_of(tmp_path)[0]["grad_norm"] > 0
    assert summary["eval_after_quantized"] == summary["eval_after"]  # greedy, of the weights that it was last sent
