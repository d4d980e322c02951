"""All settings of an experiment, in one flat frozen record, `Recipe`. Write a variant as `replace(base, ...)`."""

import difflib
import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Any, Literal, Self, Union, cast, get_args, get_origin

from torch import Generator

from dllm_rl.algorithms import advantages, correctors, losses, optimizers, prompt_sources
from dllm_rl.algorithms.advantages import group_relative, takes_component_rewards
from dllm_rl.algorithms.by_step import by_step
from dllm_rl.algorithms.correctors import Corrector, no_correction
from dllm_rl.algorithms.losses import (
    bias_corrected_kl,
    is_per_token,
    kl_k3,
    policy_loss,
    ppo_clip,
    surrogate_inputs,
    token_mean,
)
from dllm_rl.algorithms.optimizers import adamw, linear_decay
from dllm_rl.algorithms.prompt_sources import PromptSource, uniform_prompts
from dllm_rl.algorithms.triage import triage
from dllm_rl.algorithms.values import ValueModel, value_head
from dllm_rl.bounds import Bound, check_bound
from dllm_rl.callbacks import SaveBest, StopBelow, check_callbacks
from dllm_rl.likelihoods import estimators
from dllm_rl.likelihoods.estimator import LikelihoodEstimator
from dllm_rl.members import describe, described, flattened, function_of, plain
from dllm_rl.models.base import Policy
from dllm_rl.models.engine import RolloutEngine
from dllm_rl.models.lora import Lora, check_mergeable, from_peft, lora_r16
from dllm_rl.models.support import with_support
from dllm_rl.quantization import schemes
from dllm_rl.samplers import by_name, rules
from dllm_rl.tasks.base import Task
from dllm_rl.types import Prompts, Rollout


def _named(module: ModuleType, names: str) -> dict[str, Callable]:
    return {name: getattr(module, name) for name in names.split()}


_LIKELIHOODS = _named(estimators, "block_elbo causal coupled elbo eubo one_step quadrature sandwich trajectory")
# Ranks that read the logits, but no drawn tokens.
_STATE_ONLY = _named(rules, "max_prob margin entropy")
# Functions that the command line accepts by name, for each field or keyword whose value is a function or a record that
# a function makes. The functions of an entry can replace each other. Other functions are named as MODULE:FUNCTION.
CHOICES: dict[str, dict[str, Callable]] = {
    "advantages": _named(advantages, "decoupled group_relative leave_one_out"),
    "loss_reduction": _named(losses, "fixed_length_mean sequence_mean token_mean"),
    "base": _LIKELIHOODS,  # keyword of `eubo` and `sandwich`
    "cache": by_name.CACHES,
    "lambda_fn": _named(correctors, "ais_lambda"),  # keyword of `ais`
    "commit": by_name.COMMITS,
    "corrector": _named(correctors, "ais aligned icepop mis qarl reject tbpo tis")
    | {"by_step": by_step, "none": no_correction, "triage": triage},
    "kl": _named(losses, "kl_k1 kl_k2 kl_k3"),
    "likelihood": _LIKELIHOODS,
    "lora": {"lora_r16": lora_r16},
    "loss": _named(losses, "cispo gspo ppo_clip reinforce trust_band vespo"),
    "lr_schedule": _named(
        optimizers, "constant_rate constant_with_warmup cosine_with_warmup linear_decay linear_with_warmup"
    ),
    "optim": _named(optimizers, "adamw adamw_8bit"),
    "prompt_source": _named(prompt_sources, "mixed_reward_prompts uniform_prompts"),
    "rank": by_name.RANKS,
    "rollout_quantization": _named(
        schemes,
        "fake_quantize float8_dynamic float8_dynamic_emulated float8_weight_only int4_packed int4_weight_only "
        "int8_dynamic int8_weight_only",
    ),
    "value_model": {"value_head": value_head},
    "base_rank": _STATE_ONLY,  # keyword of `plackett_luce`
}


def _(help: str, default: Any = MISSING, **bound: int) -> Any:
    """Make a field with a help text; `bound` is passed to `Bound`."""
    return field(default=default, metadata={"help": help, "bound": Bound(**bound) if bound else None})


# Records that a function of the library makes, such as `tis()`.
RECORDS = (Corrector, LikelihoodEstimator, PromptSource, RolloutEngine, ValueModel)
REFERENCE = "reference"  # value of `teacher`: the policy that RL started from
DIRECTION_STEPS = 5  # steps from one measurement of `update/direction` to the next
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")


def with_nearest(name: str, known: Iterable[str]) -> str:
    """Return an unknown name for an error message, with the nearest of the known names if one is near."""
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"{name} (the nearest is {nearest[0]})" if nearest else name


def documented(record: type) -> str:
    """Return the record's docstring with a line per field: its name, help text and bound."""
    lines = [f"{record.__doc__}\n"]
    for setting in fields(record):
        bound = setting.metadata["bound"]
        lines.append(f"{setting.name:22}  {setting.metadata['help']}" + (f" ({bound})" if bound else ""))
    return "\n".join(lines)


def best_rule(metric: str | None, greater_is_better: bool | None) -> tuple[str | None, bool]:
    """Return the name of `metric_for_best_model` in the evaluations, and whether a larger value is better."""
    name = metric and metric.removeprefix("eval/").removeprefix("eval_")
    return name, not str(name).endswith("loss") if greater_is_better is None else greater_is_better


def check_bounds(field: Field, value: Any) -> None:
    """Raise ValueError if a field's value has the wrong type, is out of bounds, or is not an allowed word."""
    optional = NoneType in get_args(field.type)
    if value is None and optional:
        return
    none_too = ", or none" if optional else ""
    if isinstance(value, str) and not value:  # for example from an unset variable in a script
        raise ValueError(f"{field.name}='' is empty; give a name{none_too}")
    check_fits(field, value)
    literals = [literal for literal in (field.type, *get_args(field.type)) if get_origin(literal) is Literal]
    words = [word for literal in literals for word in get_args(literal)]
    if words and value not in words:
        raise ValueError(f"{field.name}={value!r} is not known; use {', '.join(map(repr, words))}{none_too}")
    if bound := field.metadata.get("bound"):
        bound.check(field.name, value)
    check_bound(value)  # the keywords that `partial` fixes


def union_members(annotation: Any) -> tuple[Any, ...]:
    """Return the types of a union; for any other annotation, the annotation in a tuple."""
    return get_args(annotation) if get_origin(annotation) in (UnionType, Union) else (annotation,)


def convert_value(name: str, annotation: Any, value: Any) -> Any:
    """Convert a value to the type of a field; return a value that needs no conversion unchanged.

    The name of a function of the library becomes the function, a function that makes the field's record is called, and
    LoRA settings of this library or of PEFT become a function that returns them.

    Raises:
        ValueError: The function that makes the record has arguments without defaults.
    """
    kinds = union_members(annotation)
    value = flattened(value)
    accepts_text = str in kinds or any(get_origin(kind) is Literal for kind in kinds)
    if isinstance(value, Path) and accepts_text:
        return str(value)
    if isinstance(value, str) and not accepts_text:
        value = CHOICES.get(name, {}).get(value, None if value == "none" and NoneType in kinds else value)
    if name == "lora" and isinstance(value, Lora):
        return partial(adapters, value)
    if name == "lora" and type(value).__module__.partition(".")[0] == "peft":
        return partial(adapters, from_peft(value))
    record = next((kind for kind in kinds if kind in RECORDS), None)
    if record is not None and inspect.isfunction(function_of(value)):
        optional = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        missing = [
            parameter.name
            for parameter in inspect.signature(value).parameters.values()
            if parameter.default is parameter.empty and parameter.kind not in optional
        ]
        if missing and record is PromptSource:  # `value` is the function that draws prompts
            return PromptSource(value)
        if missing:
            problem = f"{name}={describe(value)} needs {', '.join(missing)}"
            function_name = getattr(function_of(value), "__name__", name)
            raise ValueError(f"{problem}; give the {record.__name__} that it makes: {name}={function_name}(...)")
        value = value()
    return value


def adapters(lora: Lora) -> Lora:
    """Return the settings unchanged. `partial(adapters, settings)` is the function that `Recipe.lora` requires."""
    return lora


def check_fits(field: Field, value: Any) -> None:
    """Raise ValueError if a value has the wrong type for a field.

    Examples: True where no bool is expected (push_to_hub=True), text where a function is expected
    (optim="adamw_torch"), or text where a number is expected (learning_rate="1e-3").
    """
    kinds = union_members(field.type)
    is_wrong_flag = isinstance(value, bool) and bool not in kinds
    record = next((kind for kind in kinds if kind in RECORDS), None)
    is_wrong_record = record is not None and not isinstance(value, record)
    is_wrong_record |= field.type is Task and not hasattr(value, "reward")
    is_not_callable = (
        Callable in [get_origin(kind) or kind for kind in kinds] and str not in kinds and not callable(value)
    )
    if is_wrong_flag or is_wrong_record or is_not_callable:
        raise ValueError(f"{field.name}={value!r} does not fit; it is: {field.metadata['help']}{_remedy(field.name)}")
    check_kind(field.name, field.type, value)
    if isinstance(value, partial) and value.func.__module__.startswith("dllm_rl."):
        parameters = inspect.signature(value.func).parameters
        for name, keyword_value in value.keywords.items():
            if name in parameters:
                check_kind(f"{field.name}.{name}", parameters[name].annotation, keyword_value)


def check_kind(name: str, annotation: Any, value: Any) -> None:
    """Raise ValueError if the annotation is a scalar type (number, bool, text) and the value has another type."""
    kinds = union_members(annotation)
    if value is None and NoneType in kinds:
        return
    accepted_types = {bool: bool, int: Integral, float: Real, str: str | Path}
    scalar_types = [kind for kind in kinds if kind in accepted_types]
    if not scalar_types or any(kind not in (*accepted_types, NoneType) for kind in kinds):
        return  # the annotation allows a type that is not a scalar
    is_wrong_flag = isinstance(value, bool) and bool not in kinds
    if is_wrong_flag or not any(isinstance(value, accepted_types[kind]) for kind in scalar_types):
        expected = " or ".join(kind.__name__ for kind in scalar_types)
        raise ValueError(f"{name}={value!r} is of type {type(value).__name__}; give {expected}")


def _remedy(name: str) -> str:
    """Return the end of an error message: the library's functions for a field, or how to set up adapters."""
    if name == "lora":
        return "; use lora=partial(lora_r16, r=16)"
    return f"; use one of {', '.join(CHOICES[name])}" if name in CHOICES else ""


@dataclass(frozen=True, kw_only=True, repr=False)
class Settings:
    """The settings that RL and SFT share. Their names are those of TRL or verl where the meaning is the same."""

    def __new__(cls, *_: Any, **settings: Any) -> Self:
        known = [setting.name for setting in fields(cls)]
        if unknown := [with_nearest(name, known) for name in settings if name not in known]:
            kind = cls.__name__
            raise ValueError(f"not settings of {kind}: {', '.join(unknown)}; help(dllm_rl.{kind}) lists all")
        return super().__new__(cls)

    name: str = _("name of the run; its default folder is runs/NAME-seedSEED")
    model: Callable[..., Policy] | str | Policy = _(
        "a checkpoint's path or hub id, a policy (it is copied), or a function (seed=...) -> policy"
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = _(
        "dtype of weights loaded from a path; auto: the stored dtype", "float32"
    )
    float32_head: bool = _("compute logits in fp32 if the model computes in 16 bits", True)
    base_quantization: Literal["nf4", "int8"] | None = _(
        "load the checkpoint's weights in this bitsandbytes format and freeze them; needs lora", None
    )
    lora: Callable[[], Lora] | None = _("LoRA adapters to train, e.g. lora_r16; None: train all weights", None)
    optim: Callable = _("optimizer: (parameters, lr, betas, weight_decay) -> torch.optim.Optimizer", adamw)

    seed: int = _("seed of everything random in the run", 0)
    train_batch_size: int = _("prompts (SFT: sequences) per step, over all processes", 32, at_least=1)
    num_steps: int = _("training steps", 200, at_least=0)
    learning_rate: float = _("learning rate of the optimizer, before lr_schedule", 5e-4, above=0)
    adam_beta1: float = _("the optimizer's beta1", 0.9, at_least=0, below=1)
    adam_beta2: float = _("the optimizer's beta2", 0.95, at_least=0, below=1)
    weight_decay: float = _("the optimizer's weight decay", 0.01, at_least=0)
    max_grad_norm: float = _("largest norm of the gradient; larger gradients are clipped", 1.0, above=0)
    lr_schedule: Callable = _("(step, num_steps) -> factor on the learning rate", linear_decay)
    lr_schedule_steps: int | None = _("length of lr_schedule in steps; None: num_steps", None, at_least=1)
    gradient_checkpointing: bool = _(
        "recompute blocks in the backward: less memory, same gradients, 1/3 more work (1/2 with adapters)", False
    )
    bf16: bool = _("autocast forwards to bf16; the weights keep `dtype`", False)

    eval_steps: int | None = _(
        "steps between evaluations; 0: none; None: evaluations take at most 2 % of the forwards",
        None,
        at_least=0,
    )
    eval_batch_size: int = _("problems (SFT: rows) per evaluation batch", 32, at_least=1)
    logging_steps: int = _("steps between lines on the screen (metrics.jsonl has every step)", 10, at_least=1)
    report_to: str | None = _(
        "trackers, separated by commas: tensorboard, wandb, trackio, mlflow; none: no tracker", "tensorboard"
    )
    save_steps: int = _("steps between checkpoints", 50, at_least=1)
    save_total_limit: int = _("newest checkpoints to keep, beside the best one", 2, at_least=1)
    save_merged: bool = _(
        "with lora on a path: store merged weights in every checkpoint; False: only in the last",
        False,
    )
    metric_for_best_model: str | None = _(
        "metric of the evaluations that selects the best checkpoint, e.g. solve_rate or loss",
        None,
    )
    greater_is_better: bool | None = _(
        "whether metric_for_best_model should be high; None: yes, unless its name ends in loss", None
    )
    load_best_model_at_end: bool = _("evaluate and return the best checkpoint instead of the last weights", False)
    callbacks: Any = _("dllm_rl.Callback objects", ())
    verify_checkpoint: Literal["full", "quick"] = _(
        "what to verify of a checkpoint: full: every byte; quick: size and start of files over 1 MiB",
        "full",
    )
    on_save_error: Literal["stop", "continue"] = _(
        "stop the run if a checkpoint cannot be written, or warn and continue", "stop"
    )
    stop_seconds: float = _(
        "seconds after a stop signal in which the step may begin its updates; else the last update is saved",
        20.0,
        at_least=0,
    )
    output_dir: str | None = _("folder of the run; None: runs/NAME-seedSEED", None)
    resume_from_checkpoint: str | None = _(
        "checkpoint folder to resume from, or 'latest': the newest one in output_dir", None
    )
    allow_changed: str | None = _(
        "fields that a resume may change, separated by commas, e.g. learning_rate,corrector",
        None,
    )
    collective_timeout: float = _("seconds that a process waits in a collective before the run stops", 1800.0, above=0)
    peer_timeout: float | None = _(
        "seconds without a sign of life after which a process counts as dead; None: never", 40.0, above=0
    )
    overwrite_output_dir: bool = _("delete a run that is already in output_dir", False)

    # Values for SFT, which lacks the RL fields of these names. Without annotations, they are not dataclass fields.
    shard_size = 1
    async_save = False
    sft_warmup_steps = 0
    beta = 0.0
    log_completions_steps = 0
    torch_compile = False
    router_replay = cast(Any, None)
    push_to_hub = cast("str | None", None)

    @property
    def directory(self) -> str:
        return self.output_dir or f"runs/{self.name}-seed{self.seed}"

    @property
    def best_metric(self) -> str | None:
        """`metric_for_best_model` as the evaluations name it, without `eval/` or transformers' `eval_`."""
        return best_rule(self.metric_for_best_model, self.greater_is_better)[0]

    @property
    def evaluated_metrics(self) -> dict[str, str]:
        """Metrics of the evaluations that the recipe needs, by the setting that names them in messages."""
        names = {}
        if self.best_metric is not None:
            names[f"metric_for_best_model={self.metric_for_best_model!r}"] = self.best_metric
        for callback in self.callbacks:
            if isinstance(callback, StopBelow | SaveBest) and callback.metric.startswith("eval/"):
                names[f"callbacks: {type(callback).__name__}({callback.metric!r})"] = callback.metric.removeprefix(
                    "eval/"
                )
        return names

    def is_better(self, value: float, best: float | None) -> bool:
        """Return whether a value of `metric_for_best_model` is better than the best so far (None before the first)."""
        _, greater_is_better = best_rule(self.metric_for_best_model, self.greater_is_better)
        return math.isfinite(value) and (best is None or (value > best if greater_is_better else value < best))

    @property
    def trackers(self) -> list[str]:
        names = map(str.strip, (self.report_to or "none").split(","))
        return [name for name in names if name != "none"]

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON, as checkpoints and summary.json store them."""
        return described(self)

    def __post_init__(self) -> None:
        """Convert the values. Raise ValueError if a value is out of bounds, or fields cannot be combined."""
        for setting in fields(self):
            value = convert_value(setting.name, setting.type, getattr(self, setting.name))
            object.__setattr__(self, setting.name, value)
            check_bounds(setting, value)
        check_callbacks(self.callbacks)
        for is_wrong, message in self.conflicts():
            if is_wrong:
                raise ValueError(message)

    def conflicts(self) -> list[tuple[bool, str]]:
        """Return pairs (whether certain fields are in conflict, the error message with the remedy)."""
        unknown = [name for name in self.trackers if name not in TRACKERS]
        return [
            (bool(unknown), f"report_to={', '.join(unknown)!r} is not known; use {', '.join(TRACKERS)}, or none"),
            (
                self.dtype == "float16" and self.lora is None and function_of(self.optim) is adamw,
                "dtype='float16' needs lora, or another optim: AdamW's second moments and its epsilon underflow to "
                "0 in float16; or use 'bfloat16' or 'float32'",
            ),
            (
                self.base_quantization is not None and self.lora is None,
                f"base_quantization={self.base_quantization!r} freezes the base model: set lora, or leave it out",
            ),
            (
                self.eval_steps == 0 and bool(self.evaluated_metrics),
                f"{', '.join(self.evaluated_metrics)} is measured every eval_steps, and eval_steps=0 never measures: "
                "set eval_steps",
            ),
            (
                self.load_best_model_at_end and self.metric_for_best_model is None,
                "load_best_model_at_end=True needs metric_for_best_model: set it, for example to solve_rate or loss",
            ),
            (
                self.load_best_model_at_end and self.shard_size != 1,
                f"load_best_model_at_end=True loads full weights, and shard_size={self.shard_size} shards them: set it "
                "to False, and take the folder that summary.json names as best_checkpoint",
            ),
        ]

    def __repr__(self) -> str:
        """Return the fields that differ from their default, one per line."""
        lines = [f"{type(self).__name__}("]
        for setting in fields(self):
            value = getattr(self, setting.name)
            if value != setting.default:  # only what a variant changes
                lines.append(f"    {setting.name}={describe(value)},")
        return "\n".join([*lines, ")"])

    @property
    def schedule_steps(self) -> int:
        """Number of steps of the learning-rate schedule."""
        return self.lr_schedule_steps or self.num_steps


@dataclass(frozen=True, kw_only=True, repr=False)
class Recipe(Settings):
    """The settings of reinforcement learning."""

    task: Task = _("problems to train on")
    validation_task: Task = _("problems to evaluate every eval_steps, and to decide when the warm-up ends")
    eval_task: Task = _("held-out problems, evaluated only before and after RL")

    sampler: Callable = _("rollout sampler: (policy, prompts, generator) -> Rollout")
    eval_sampler: Callable = _("sampler of evaluations, usually greedy: (policy, prompts, generator) -> Rollout")
    likelihood: LikelihoodEstimator = _("estimator of the completions' log-probs: trajectory, causal, elbo ...")
    prompt_source: PromptSource = _("how each step chooses its prompts", uniform_prompts())
    corrector: Corrector = _(
        "correction of the mismatch between rollout and learner: tis, mis, ais ...; none: no correction",
        no_correction(),
    )
    sampling_support: Literal["per_policy", "unfiltered", "rollout"] = _(
        "with top_k or top_p: normalize log-probs over each policy's own tokens, all, or the rollout's",
        "per_policy",
    )
    advantages: Callable = _(
        "(P, G) rewards -> (P, G) advantages; an argument `parts` (decoupled) gets each component",
        group_relative,
    )
    value_model: ValueModel | None = _(
        "value_head: subtract a learned value from the advantage at each denoising step; None: one advantage per row",
        None,
    )
    loss: Callable | None = _("policy-gradient objective; None: the corrector's, if it has one, else ppo_clip", None)
    loss_reduction: Callable | None = _(
        "how the loss averages over tokens; None: the corrector's, if it has one, else token_mean", None
    )
    rollout_quantization: Callable[[], Any] | None = _(
        "quantization of the policy that samples, e.g. float8_dynamic; None: not quantized", None
    )
    rollout_engine: RolloutEngine | None = _("external engine that makes the rollouts; None: this process", None)
    rollout_workers: int = _(
        "number of Ray actors that make rollouts while the learner trains; 0: the learner makes them", 0, at_least=0
    )
    max_staleness: int = _(
        "steps by which the rollouts' weights are older than the learner's",
        0,
        at_least=0,
    )
    rollout_schedule: Literal["in_order", "first_ready"] = _(
        "in_order: weights exactly max_staleness steps old, the same bits with any workers; first_ready: a free worker "
        "takes the newest weights, and a step any finished batch",
        "in_order",
    )

    num_generations: int = _("completions per prompt (G)", 8, at_least=1)
    rollout_batch_size: int | None = _("completions per sampler call, a multiple of num_generations; None: all", None)
    micro_batch_size: int | None = _(
        "completions per forward of scoring and update, a multiple of num_generations; None: all", None
    )
    max_retained_graphs: int = _(
        "scoring forwards whose autograd graphs the first update may reuse: faster, more memory",
        1,
        at_least=0,
    )
    old_logprobs: Literal["recompute", "rollout"] = _(
        "denominator of the ratios: the learner's log-probs before the update, or the rollout's (bypass)", "recompute"
    )
    router_replay: Literal["R3"] | None = _("R3: the learner uses the experts that the rollout chose", None)
    num_mismatch_groups: int = _("groups without advantage scored per step, to measure the mismatch", 2, at_least=1)
    max_prompt_length: int | None = _(
        "tokens; a longer training prompt is replaced by the next that fits; None: beyond the model's limit, an error",
        None,
        at_least=1,
    )
    max_num_gen_batches: int = _(
        "draws of prompts per step: groups of equal rewards are redrawn (DAPO); 1: no redraw",
        1,
        at_least=1,
    )
    num_steps: int = _("RL steps", 180, at_least=0)
    num_iterations: int = _("optimizer updates per rollout", 1, at_least=1)
    resample_masks: bool = _("draw new masks for each update of num_iterations; False: one set for all", True)
    adam_beta2: float = _("the optimizer's beta2", 0.99, at_least=0, below=1)
    weight_decay: float = _("the optimizer's weight decay", 0.0, at_least=0)
    beta: float = _("weight of the KL term to the policy that RL started from; 0: no term", 0.0, at_least=0)
    kl: Callable = _("per-token estimator of the KL term: kl_k1, kl_k2 or kl_k3", kl_k3)
    use_bias_correction_kl: bool = _(
        "multiply each token's KL term by its ratio to the rollout, with the ratio's gradient", False
    )
    teacher: Callable[..., Policy] | str | Policy | None = _(
        "model for on-policy distillation, as `model`, or 'reference': the policy that RL started from",
        None,
    )
    teacher_substeps: int = _(
        "denoising steps of the teacher per step of the sampler; 1: the same steps", 1, at_least=1
    )
    teacher_coeff: float = _(
        "weight of the teacher's reward; the task's has 1 - teacher_coeff",
        1.0,
        above=0,
        at_most=1,
    )
    entropy_coeff: float = _("weight of the entropy bonus; 0: no bonus", 0.0, at_least=0)
    torch_compile: bool = _("compile the blocks of the policy that samples; speeds up FP8 on a GPU", False)
    shard_size: int = _(
        "processes that share the learner's weights (FSDP2); 0: all; 1: no sharding",
        1,
        at_least=0,
    )
    zero_mismatch: bool = _(
        "compute batch-invariantly; stop if a log-prob of rollout and learner differs in any bit",
        False,
    )

    sft_warmup_steps: int = _("largest number of supervised steps before RL; 0: no warm-up", 0, at_least=0)
    sft_warmup_batch_size: int = _("prompts per warm-up step, over all processes", 64, at_least=1)
    sft_warmup_learning_rate: float = _("learning rate of the warm-up", 2e-3, above=0)
    sft_warmup_corruption: float = _(
        "share of the visible tokens that the warm-up replaces by random ones", 0.0, at_least=0, below=1
    )
    sft_warmup_target: float = _("end the warm-up when sft_warmup_metric on validation_task reaches this value", 1.0)
    sft_warmup_metric: str = _("metric of validation_task that ends the warm-up", "solve_rate")
    sft_warmup_eval_steps: int = _("warm-up steps between evaluations of sft_warmup_metric", 5, at_least=1)

    eval_batch_size: int = _("problems per evaluation batch, in each process", 256, at_least=1)
    log_completions_steps: int = _(
        "steps between tables of completions, on the screen and in completions.jsonl; 0: never", 50, at_least=0
    )
    push_to_hub: str | None = _(
        "OWNER/NAME on the Hugging Face hub to upload the last checkpoint to; None: no upload", None
    )
    async_save: bool = _(
        "write checkpoints while training continues, from a host copy of weights and optimizer state", False
    )
    reward_timeout: float | None = _(
        "seconds of one call of the reward functions, or of grading a completion; then exit with 124; None: no limit",
        600.0,
        above=0,
    )
    dry_run: bool = _("print the settings and the estimated memory and time without loading weights, and exit", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        surrogate_inputs(self.resolved_loss)
        if self.rollout_engine is not None and (self.rollout_quantization is not None or self.corrector.align_forward):
            problem = f"rollout_engine={describe(self.rollout_engine)} makes no quantized copy"
            raise ValueError(
                f"{problem}: use rollout_quantization=None, and a corrector that does not align the forward; dllm-rl "
                "serve --quantization quantizes on the server"
            )
        if self.lora is not None and self.corrector.align_forward and self.rollout_quantization is not None:
            check_mergeable(self.lora())  # the aligned forward quantizes merged weights

    def conflicts(self) -> list[tuple[bool, str]]:
        is_quantized = self.rollout_quantization is not None
        confidence_radius = inspect.signature(self.sampler).parameters.get("confidence_radius")
        conflicts = [
            *super().conflicts(),
            (
                self.router_replay is not None and not is_quantized,
                "router_replay='R3' reuses the experts of a quantized copy, and without rollout_quantization there is "
                "no copy: set a scheme, or router_replay=None",
            ),
            (
                self.async_save and self.base_quantization is not None,
                f"async_save=True cannot be combined with base_quantization={self.base_quantization!r}, whose weights "
                "have no copy on the host; use async_save=False",
            ),
            (
                self.loss is not None and self.corrector.loss is not None,
                f"loss={describe(self.loss)} and the corrector's loss {describe(self.corrector.loss)} are two "
                "objectives: use loss=None (--loss none), or a corrector without a loss",
            ),
            (
                self.use_bias_correction_kl and not self.beta,
                "use_bias_correction_kl=True corrects a KL term, and beta=0 has none: set beta above 0",
            ),
            (
                self.old_logprobs == "rollout" and self.corrector.has_weight_fn,
                "old_logprobs='rollout' divides by the rollout's probabilities, which corrects the mismatch, and a "
                "corrector's weights would correct it a second time: use corrector=no_correction(), a corrector "
                "without weight_fn, or old_logprobs='recompute'",
            ),
            (
                self.zero_mismatch and self.has_separate_rollout_policy and not self.corrector.align_forward,
                "zero_mismatch=True needs rollout_quantization=None and no engine, or a corrector that aligns forwards",
            ),
            (
                self.zero_mismatch and not is_quantized and not self.likelihood.exact_for_sampler,
                f"zero_mismatch=True with likelihood={self.likelihood.name!r} would compare the learner's log-probs "
                "with themselves: that estimator does not replay the sampler; use trajectory(), or zero_mismatch=False",
            ),
            (
                self.zero_mismatch and self.sampling_support == "unfiltered",
                "zero_mismatch=True cannot be combined with sampling_support='unfiltered': its rollout log-probs are "
                "rounded sums of two recorded numbers, not bit for bit the learner's; use 'per_policy' or 'rollout'",
            ),
            (
                self.likelihood.reads_confidence_change
                and confidence_radius is not None
                and confidence_radius.default is None,
                "likelihood.informed_masking needs confidences, which the sampler does not record: set "
                "sampler.confidence_radius=10, or leave informed_masking at None",
            ),
        ]
        if self.value_model is not None:
            conflicts += [
                (
                    not self.likelihood.replays_steps,
                    f"value_model needs a likelihood whose views are the sampler's steps, and {self.likelihood.name!r} "
                    "has others: use trajectory() without block_size (diffusion models only), or value_model=None",
                ),
                (
                    not is_per_token(self.resolved_loss),
                    f"value_model gives each token its advantage, and loss={describe(self.resolved_loss)} treats a "
                    "row's tokens together: use ppo_clip, cispo or reinforce, or value_model=None",
                ),
            ]
        conflicts += self._async_conflicts() + self._teacher_conflicts()
        group_size = self.num_generations
        for name in ("rollout_batch_size", "micro_batch_size"):
            size = getattr(self, name)
            is_multiple = size is None or (size >= group_size and size % group_size == 0)  # a group is never split
            conflicts.append((not is_multiple, f"{name}={size} must be a multiple of num_generations={group_size}"))
        return conflicts

    def _async_conflicts(self) -> list[tuple[bool, str]]:
        workers, max_staleness = self.rollout_workers, self.max_staleness
        staleness = f"max_staleness={max_staleness}"
        return [
            (
                bool(max_staleness) and not workers,
                f"{staleness} needs workers that run ahead: set rollout_workers to 1 or more",
            ),
            (
                self.rollout_schedule == "first_ready" and not max_staleness,
                "rollout_schedule='first_ready' chooses among batches that workers make ahead, and max_staleness=0 "
                "allows one at a time: set max_staleness to 1 or more, or rollout_schedule='in_order'",
            ),
            (
                workers > max_staleness + 1,
                f"rollout_workers={workers} are more than the {max_staleness + 1} batches made at a time with "
                f"{staleness}: use {max_staleness + 1} workers, or max_staleness={workers - 1}",
            ),
            (
                bool(max_staleness) and self.zero_mismatch,
                f"zero_mismatch=True stops if rollout and learner differ, as they do with {staleness}: leave one out",
            ),
            (
                bool(max_staleness) and self.teacher is not None and not self.likelihood.exact_for_sampler,
                f"teacher with {staleness} and likelihood={self.likelihood.name!r}: a worker scores the groups whose "
                "rewards differ, and the teacher changes the rewards afterwards: use trajectory(), or max_staleness=0",
            ),
            (
                bool(workers) and self.prompt_source.uses_history,
                f"rollout_workers={workers} draw prompts before earlier rewards are available, which "
                f"prompt_source={describe(self.prompt_source)} reads: use uniform_prompts, or rollout_workers=0",
            ),
            (
                bool(workers) and self.rollout_engine is not None and self.rollout_engine.is_exclusive,
                f"rollout_workers={workers} load the rollout_engine a second time, and it serves one process: "
                "leave one out",
            ),
            (
                bool(workers) and self.router_replay is not None,
                f"rollout_workers={workers} with router_replay='R3' was not tried: leave one out",
            ),
            (
                bool(workers) and self.torch_compile,
                f"rollout_workers={workers} with torch_compile=True was not tried: leave one out",
            ),
        ]

    def _teacher_conflicts(self) -> list[tuple[bool, str]]:
        has_teacher = self.teacher is not None
        return [
            (
                not has_teacher and (self.teacher_substeps, self.teacher_coeff) != (1, 1.0),
                f"teacher_substeps={self.teacher_substeps} and teacher_coeff={self.teacher_coeff:g} need a "
                "teacher, and teacher=None: set teacher, or leave them out",
            ),
            (
                has_teacher and takes_component_rewards(self.advantages),
                f"advantages={describe(self.advantages)} takes the task's component rewards, and the teacher's "
                "reward is not one of them: use group_relative, or leave the teacher out",
            ),
            (
                has_teacher and self.max_num_gen_batches > 1,
                f"max_num_gen_batches={self.max_num_gen_batches} redraws groups of equal rewards, and with a "
                "teacher rewards always differ: use 1, or leave the teacher out",
            ),
        ]

    @property
    def needs_reference_policy(self) -> bool:
        """Whether a run stores the policy that RL started from, for the KL term or as a teacher."""
        return bool(self.beta) or self.teacher == REFERENCE

    @property
    def num_mask_sets(self) -> int:
        """Number of sets of masks that score a rollout.

        The metrics `rollout_corr/*`, `trained/*` and `ais/*` use the first set.
        """
        return self.num_iterations if self.resample_masks and self.likelihood.is_random else 1

    @property
    def has_separate_rollout_policy(self) -> bool:
        """Whether a policy other than the learner samples: a quantized copy, or an external engine."""
        return self.rollout_quantization is not None or self.rollout_engine is not None

    @property
    def resolved_loss_reduction(self) -> Callable:
        """The reduction in effect: the recipe's function, else the corrector's, else `token_mean`."""
        return self.loss_reduction or self.corrector.loss_reduction or token_mean

    def settings(self) -> dict[str, Any]:
        """Return the recipe for JSON, with the loss and the reduction in effect."""
        return described(self) | {
            "loss": plain(self.resolved_loss),
            "loss_reduction": plain(self.resolved_loss_reduction),
        }

    @property
    def resolved_loss(self) -> Callable:
        """The objective in effect: the recipe's function, else the corrector's, else PPO's clipped ratio."""
        return self.loss or self.corrector.loss or ppo_clip

    def sample(self, policy: Policy, prompts: Prompts, generator: Generator) -> Rollout:
        """Sample completions of the prompts, with log-probs normalized as `sampling_support` says."""
        return with_support(self.sampler(policy, prompts, generator), self.sampling_support)

    @property
    def policy_loss(self) -> Callable:
        """Function (log-probs (B, T), batch) -> loss, metrics, gradient: `losses.policy_loss` with this recipe's terms.

        The defaults are ppo_clip with epsilon 0.2, an equal weight for every token of the batch, no KL term and no
        entropy bonus.
        """
        return partial(
            policy_loss,
            surrogate=self.resolved_loss,
            loss_reduction=self.resolved_loss_reduction,
            beta=self.beta,
            kl=partial(bias_corrected_kl, kl=self.kl) if self.use_bias_correction_kl else self.kl,
            entropy=self.entropy_coeff,
        )

    def update_settings(self, step: int) -> "UpdateSettings":
        """Return the settings of `training.learner.update` at a step."""
        return UpdateSettings(
            loss=self.policy_loss,
            likelihood=self.likelihood,
            learning_rate=self.learning_rate * self.lr_schedule(step, self.schedule_steps),
            max_grad_norm=self.max_grad_norm,
            micro_batch_size=self.micro_batch_size,
            max_staleness=self.max_staleness,
            # Not with an aligned forward: the extra forward of the measurement would quantize the updated weights, and
            # the next `quantization/codes_changed` would count no change.
            measure=(step + 1) % DIRECTION_STEPS == 0 and not self.corrector.align_forward,
        )

    @property
    def max_new_tokens(self) -> int:
        """Length of a completion in tokens, as bound in the sampler."""
        if isinstance(self.sampler, partial) and "max_new_tokens" in self.sampler.keywords:
            return self.sampler.keywords["max_new_tokens"]
        raise ValueError("sampler must be a partial that binds max_new_tokens")


Recipe.__doc__ = documented(Recipe)


@dataclass(frozen=True, kw_only=True)
class UpdateSettings:
    """Settings of the updates of one step.

    Args:
        loss: Function (detached log-probs, batch) -> loss, metrics, gradient.
        likelihood: Estimator of the log-probs.
        learning_rate: Learning rate of the step.
        max_grad_norm: Norm to which gradients are clipped. Default: 1.
        micro_batch_size: Rows per forward. None (default): all.
        max_staleness: Largest number of updates by which the rollout's weights may be older. Default: 0.
        measure: Whether to measure `update_direction` after the updates. Default: False.
    """

    loss: Callable  # detached log-probs, batch -> loss, metrics, gradient
    likelihood: LikelihoodEstimator
    learning_rate: float
    max_grad_norm: float = 1.0
    micro_batch_size: int | None = None
    max_staleness: int = 0
    measure: bool = False
