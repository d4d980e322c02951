"""The record of an experiment: a flat frozen Recipe. A variant is `replace(base, ...)` in a separate file."""

import inspect
import math
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin

from torch import Generator

from dllm_rl.algorithms import advantages, correctors, losses, optimizers, prompt_sources
from dllm_rl.algorithms.advantages import group_relative, takes_component_rewards
from dllm_rl.algorithms.by_step import by_step
from dllm_rl.algorithms.correctors import Corrector, no_correction
from dllm_rl.algorithms.losses import kl_k3, policy_loss, ppo_clip, surrogate_inputs, token_mean
from dllm_rl.algorithms.optimizers import adamw, linear_decay
from dllm_rl.algorithms.prompt_sources import PromptSource, uniform_prompts
from dllm_rl.algorithms.triage import triage
from dllm_rl.bounds import Bound, check_bound
from dllm_rl.callbacks import check_callbacks
from dllm_rl.likelihoods import estimators
from dllm_rl.likelihoods.estimator import LikelihoodEstimator
from dllm_rl.members import describe, described, flattened, function_of, plain
from dllm_rl.models.base import Policy
from dllm_rl.models.engine import RolloutEngine
from dllm_rl.models.lora import Lora, check_mergeable, from_peft, lora_r16
from dllm_rl.models.support import with_support
from dllm_rl.quantization import schemes
from dllm_rl.renamed import refuse_renamed
from dllm_rl.samplers import by_name, rules
from dllm_rl.tasks.base import Task
from dllm_rl.types import Prompts, Rollout


def _named(module: ModuleType, names: str) -> dict[str, Callable]:
    return {name: getattr(module, name) for name in names.split()}


_LIKELIHOODS = _named(estimators, "block_elbo causal coupled elbo eubo one_step quadrature sandwich trajectory")
_STATE_ONLY = _named(rules, "max_prob margin entropy")
# Functions that can be chosen by name, for each field of a record and keyword of a function that takes a function or
# a function's result. All functions in a row take the same arguments. Others are chosen as MODULE:FUNCTION.
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
    "base_rank": _STATE_ONLY,  # keyword of `plackett_luce`
}


def _(help: str, default: Any = MISSING, **bound: int) -> Any:
    """Make a documented field; `bound` is for `Bound`. `CHOICES` lists the words that a command line accepts."""
    return field(default=default, metadata={"help": help, "bound": Bound(**bound) if bound else None})


RECORDS = (
    Corrector,
    LikelihoodEstimator,
    PromptSource,
    RolloutEngine,
)  # records that functions make
REFERENCE = "reference"  # value of `teacher`: the policy that RL started from
DIRECTION_STEPS = 5  # steps from one measurement of `update/direction` to the next
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")


def documented(record: type) -> str:
    """Return the record's docstring with a line for each field: its meaning and its bound."""
    lines = [f"{record.__doc__}\n"]
    for known in fields(record):
        bound = known.metadata["bound"]
        lines.append(f"{known.name:22}  {known.metadata['help']}" + (f" ({bound})" if bound else ""))
    return "\n".join(lines)


def check_bounds(field: Field, value: Any) -> None:
    """Raise ValueError if a field's number is out of bounds, or its word is unknown."""
    optional = NoneType in get_args(field.type)
    if value is None and optional:
        return
    none = ", or none" if optional else ""
    if isinstance(value, str) and not value:  # the value of an unset variable in a script
        raise ValueError(f"{field.name}='' is empty; give a name{none}")
    check_fits(field, value)
    literals = [kind for kind in (field.type, *get_args(field.type)) if get_origin(kind) is Literal]
    known = [word for kind in literals for word in get_args(kind)]
    if known and value not in known:
        raise ValueError(f"{field.name}={value!r} is not known; use {', '.join(map(repr, known))}{none}")
    if bound := field.metadata.get("bound"):
        bound.check(field.name, value)
    check_bound(value)  # constants that a function binds


def kinds_of(annotation: Any) -> tuple[Any, ...]:
    """Return the types of a union, or a tuple of the only type."""
    return get_args(annotation) if get_origin(annotation) in (UnionType, Union) else (annotation,)


def fitted(name: str, annotation: Any, value: Any) -> Any:
    """Convert a value to the form that a field of this type has, if its meaning is clear.

    It converts text that names a function of the library, a function that makes the record, and settings of adapters.
    Any other value is returned unchanged.
    """
    kinds = kinds_of(annotation)
    value = flattened(value)
    text = str in kinds or any(get_origin(kind) is Literal for kind in kinds)
    if isinstance(value, str) and not text:
        value = CHOICES.get(name, {}).get(value, None if value == "none" and NoneType in kinds else value)
    if name == "lora" and isinstance(value, Lora):
        return partial(adapters, value)
    if name == "lora" and type(value).__module__.partition(".")[0] == "peft":
        return partial(adapters, from_peft(value))
    record = next((kind for kind in kinds if kind in RECORDS), None)
    if record is not None and inspect.isfunction(function_of(value)):
        optional = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        lacking = [
            parameter.name
            for parameter in inspect.signature(value).parameters.values()
            if parameter.default is parameter.empty and parameter.kind not in optional
        ]
        if lacking and record is PromptSource:  # `value` is the function that draws
            return PromptSource(value)
        if lacking:
            needs = f"{name}={describe(value)} needs {', '.join(lacking)}"
            maker = getattr(function_of(value), "__name__", name)
            raise ValueError(f"{needs}; give the {record.__name__} that it makes: {name}={maker}(...)")
        value = value()
    return value


def adapters(lora: Lora) -> Lora:
    """Return the settings unchanged: a recipe contains a function that makes them."""
    return lora


def check_fits(field: Field, value: Any) -> None:
    """Raise ValueError if a value has the wrong type for a field.

    Examples are a flag for a field without flags (push_to_hub=True), a value that is not a function or record
    (optim="adamw_torch", corrector="tis"), and text for a number or flag (learning_rate="1e-3").
    """
    kinds = kinds_of(field.type)
    flag = isinstance(value, bool) and bool not in kinds
    record = next((kind for kind in kinds if kind in RECORDS), None)
    wrong_record = record is not None and not isinstance(value, record)
    wrong_record |= field.type is Task and not hasattr(value, "reward")
    function = Callable in [get_origin(kind) or kind for kind in kinds] and str not in kinds and not callable(value)
    if flag or wrong_record or function:
        raise ValueError(f"{field.name}={value!r} does not fit; it is: {field.metadata['help']}{_remedy(field.name)}")
    check_kind(field.name, field.type, value)
    if isinstance(value, partial) and value.func.__module__.startswith("dllm_rl."):
        parameters = inspect.signature(value.func).parameters
        for name, bound in value.keywords.items():
            if name in parameters:
                check_kind(f"{field.name}.{name}", parameters[name].annotation, bound)


def check_kind(name: str, annotation: Any, value: Any) -> None:
    """Raise ValueError if the annotation requires a number, flag or text, and the value is not one."""
    kinds = kinds_of(annotation)
    if value is None and NoneType in kinds:
        return
    likes = {bool: bool, int: Integral, float: Real, str: str | Path}
    scalars = [kind for kind in kinds if kind in likes]
    if not scalars or any(kind not in (*likes, NoneType) for kind in kinds):
        return  # the annotation allows other types, or no scalar
    flag = isinstance(value, bool) and bool not in kinds
    if flag or not any(isinstance(value, likes[kind]) for kind in scalars):
        expected = " or ".join(kind.__name__ for kind in scalars)
        raise ValueError(f"{name}={value!r} is of type {type(value).__name__}; give {expected}")


def _remedy(name: str) -> str:
    """Return the names of the library's functions for a field, or how to set adapters of another size."""
    if name == "lora":
        return "; use lora=partial(lora_r16, r=16)"
    return f"; use one of {', '.join(CHOICES[name])}" if name in CHOICES else ""


@dataclass(frozen=True, kw_only=True, repr=False)
class Settings:
    """The fields that every record of a run has. Names follow TRL and verl if the meaning is the same."""

    def __new__(cls, **settings: Any) -> Any:
        """Refuse a keyword of an earlier version, and name its replacement."""
        refuse_renamed(settings.keys() - {f.name for f in fields(cls)})
        return super().__new__(cls)

    name: str = _("name of the run, and of its folder below runs/")
    model: Callable[..., Policy] | str | Policy = _("function (seed=...) -> policy, a policy (copied), or a path")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = _("of weights from a path; auto: as stored", "float32")
    float32_head: bool = _("logits in fp32 where the model computes in 16 bits, in rollout and learner alike", True)
    base_quantization: Literal["nf4", "int8"] | None = _("a frozen bitsandbytes base, of a path with lora", None)
    lora: Callable[[], Lora] | None = _("adapters to train; None: all weights", None)
    optim: Callable = _("(parameters, lr, betas, weight_decay) -> Optimizer", adamw)

    seed: int = _("the only source of randomness", 0)
    train_batch_size: int = _("prompts, or SFT's sequences, per step, over all processes", 32, at_least=1)
    num_steps: int = _("optimiser steps", 200, at_least=0)
    learning_rate: float = _("of AdamW", 5e-4, above=0)
    adam_beta1: float = _("of AdamW", 0.9, at_least=0, below=1)
    adam_beta2: float = _("of AdamW", 0.95, at_least=0, below=1)
    weight_decay: float = _("of AdamW", 0.01, at_least=0)
    max_grad_norm: float = _("gradients are scaled down to this norm", 1.0, above=0)
    lr_schedule: Callable = _("(step, num_steps) -> factor on the learning rate", linear_decay)
    lr_schedule_steps: int | None = _("steps that lr_schedule runs over; None: num_steps", None, at_least=1)
    gradient_checkpointing: bool = _(
        "backward recomputes blocks: less memory, same gradients, 1/3 more work (with adapters 1/2)", False
    )
    bf16: bool = _("forwards compute in bf16, weights stay in dtype: with float32 for training all weights", False)

    eval_steps: int | None = _(
        "steps between evaluations, on validation_task or SFT's held-out rows; 0: none; None: as many as keep them "
        "within 2 % of the forwards",
        None,
        at_least=0,
    )
    eval_batch_size: int = _("problems, or SFT's rows, per evaluation batch", 32, at_least=1)
    logging_steps: int = _("steps between lines on the screen (metrics.jsonl has every step)", 10, at_least=1)
    report_to: str | None = _(
        "trackers, by commas: tensorboard, wandb, trackio, mlflow; none: no tracker", "tensorboard"
    )
    save_steps: int = _("steps between checkpoints", 50, at_least=1)
    save_total_limit: int = _("checkpoints kept, the newest ones and the best one", 2, at_least=1)
    save_merged: bool = _(
        "with lora on a path: merged weights in every checkpoint; False: in the last one, the others hold adapters",
        False,
    )
    metric_for_best_model: str | None = _(
        "metric of the evaluations by which a checkpoint is the best, as solve_rate or loss; none: no best one", None
    )
    greater_is_better: bool | None = _("of that metric; None: yes, unless its name ends in loss", None)
    load_best_model_at_end: bool = _("evaluate and return the best checkpoint's weights, not the last ones", False)
    callbacks: Any = _("objects of dllm_rl.Callback, which may log, save and stop", ())
    verify_checkpoint: Literal["full", "quick"] = _(
        "check of a checkpoint before a resume: every byte, or of files over 1 MiB only size and start", "full"
    )
    on_save_error: Literal["stop", "continue"] = _("what to do when a checkpoint cannot be written", "stop")
    stop_seconds: float = _("seconds that a signal leaves the step; then the last step is saved", 20.0, at_least=0)
    output_dir: str | None = _("folder of the run; None: runs/NAME-seedSEED", None)
    resume_from_checkpoint: str | None = _("a checkpoint folder, or 'latest' in output_dir", None)
    allow_changed: str | None = _(
        "fields that a resume may take from this call in place of the checkpoint's, by commas: learning_rate,corrector",
        None,
    )
    collective_timeout: float = _("seconds that a process waits for the others before the run stops", 1800.0, above=0)
    peer_timeout: float | None = _("seconds of silence until a process counts as lost; none: no watch", 40.0, above=0)
    overwrite_output_dir: bool = _("delete the run that output_dir holds", False)

    # Defaults for records without the RL fields of these names. They have no annotation, so that they are class
    # attributes, not fields.
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
        return self.metric_for_best_model and self.metric_for_best_model.removeprefix("eval/").removeprefix("eval_")

    def is_better(self, value: float, best: float | None) -> bool:
        """Return whether a value of `metric_for_best_model` is better than the best so far (None before the first)."""
        greater = self.greater_is_better
        if greater is None:
            greater = not str(self.best_metric).endswith("loss")
        return math.isfinite(value) and (best is None or (value > best if greater else value < best))

    @property
    def trackers(self) -> list[str]:
        names = map(str.strip, (self.report_to or "none").split(","))
        return [name for name in names if name != "none"]

    def settings(self) -> dict[str, Any]:
        """Return the record for JSON, as in checkpoints and summary.json."""
        return described(self)

    def __post_init__(self) -> None:
        """Raise ValueError if a field is out of bounds, or fields cannot be combined."""
        for checked in fields(self):
            value = fitted(checked.name, checked.type, getattr(self, checked.name))
            object.__setattr__(self, checked.name, value)
            check_bounds(checked, value)
        check_callbacks(self.callbacks)
        for wrong, message in self.conflicts():
            if wrong:
                raise ValueError(message)

    def conflicts(self) -> list[tuple[bool, str]]:
        """Return (whether fields cannot be combined, the remedy), by subject."""
        unknown = [name for name in self.trackers if name not in TRACKERS]
        return [
            (bool(unknown), f"report_to={', '.join(unknown)!r} is not known; use {', '.join(TRACKERS)}, or none"),
            (
                self.dtype == "float16" and self.lora is None and function_of(self.optim) is adamw,
                "dtype='float16' needs lora, or another optim: AdamW's second moments of float16 weights underflow to "
                "0 and so does its epsilon; or use 'bfloat16' or 'float32'",
            ),
            (
                self.base_quantization is not None and self.lora is None,
                f"base_quantization={self.base_quantization!r} is a frozen base: set lora, or leave it out",
            ),
            (
                self.metric_for_best_model is not None and self.eval_steps == 0,
                f"metric_for_best_model={self.metric_for_best_model!r} is measured every eval_steps, and eval_steps=0 "
                "never measures: set eval_steps",
            ),
            (
                self.load_best_model_at_end and self.metric_for_best_model is None,
                "load_best_model_at_end=True needs metric_for_best_model: set it, as solve_rate or loss",
            ),
            (
                self.load_best_model_at_end and self.shard_size != 1,
                f"load_best_model_at_end=True loads whole weights, and shard_size={self.shard_size} shards them: leave "
                "it out, and take the folder that summary.json names as best_checkpoint",
            ),
        ]

    def __repr__(self) -> str:
        """Return the fields that differ from their default, one per line."""
        lines = [f"{type(self).__name__}("]
        for known in fields(self):
            value = getattr(self, known.name)
            if value != known.default:  # a variant shows only its changes
                lines.append(f"    {known.name}={describe(value)},")
        return "\n".join([*lines, ")"])

    @property
    def schedule_steps(self) -> int:
        """Number of steps of the learning-rate schedule."""
        return self.lr_schedule_steps or self.num_steps


@dataclass(frozen=True, kw_only=True, repr=False)
class Recipe(Settings):
    """The settings of reinforcement learning."""

    task: Task = _("problems to train on")
    validation_task: Task = _("problems that steer the warm-up and are evaluated every eval_steps")
    eval_task: Task = _("held-out problems, evaluated before and after RL only")

    sampler: Callable = _("rollout sampler: (policy, prompts, generator) -> Rollout")
    eval_sampler: Callable = _("the sampler of evaluations")
    likelihood: LikelihoodEstimator = _("sequence-likelihood estimator")
    prompt_source: PromptSource = _("which prompts a step learns from", uniform_prompts())
    corrector: Corrector = _("correction of the training-inference mismatch", no_correction())
    sampling_support: Literal["per_policy", "unfiltered", "rollout"] = _(
        "tokens over which log-probs are normalised where top_k or top_p filter (models.support.with_support)",
        "per_policy",
    )
    advantages: Callable = _(
        "(P, G) rewards -> (P, G) advantages; one that takes `parts` (decoupled: GDPO) gets each reward",
        group_relative,
    )
    loss: Callable | None = _("the objective; None: the corrector's own, else ppo_clip", None)
    loss_reduction: Callable | None = _("how the loss averages tokens; None: the corrector's, else token_mean", None)
    rollout_quantization: Callable[[], Any] | None = _("the rollout's scheme", None)
    rollout_engine: RolloutEngine | None = _("what makes rollouts; None: the learner, or its quantised copy", None)
    rollout_workers: int = _("Ray actors that make rollouts while the learner trains; 0: none", 0, at_least=0)
    max_staleness: int = _("steps that their weights are behind the learner's; 0: each step waits", 0, at_least=0)

    num_generations: int = _("completions per prompt (G)", 8, at_least=1)
    rollout_batch_size: int | None = _("completions sampled at a time, whole groups; None: all at once", None)
    micro_batch_size: int | None = _("completions per forward, a multiple of num_generations; None: all at once", None)
    max_retained_graphs: int = _(
        "forwards (views x micro-batches) whose graphs scoring keeps for the first update", 1, at_least=0
    )
    old_logprobs: Literal["recompute", "rollout"] = _(
        "what ratios divide by: the learner's log-probs before the update, or the rollout's (bypass)", "recompute"
    )
    router_replay: Literal["R3"] | None = _("experts of the learner's tokens: R3: the rollout's; none: its own", None)
    num_mismatch_groups: int = _("groups without advantage scored per step, to measure the mismatch", 2, at_least=1)
    max_prompt_length: int | None = _(
        "tokens; a longer training prompt is replaced by the task's next one that fits; None: refused", None, at_least=1
    )
    max_num_gen_batches: int = _("draws of prompts per step, until no group's rewards are all equal", 1, at_least=1)
    num_steps: int = _("RL steps", 180, at_least=0)
    num_iterations: int = _("optimiser updates per rollout", 1, at_least=1)
    resample_masks: bool = _(
        "each of these updates draws its own masks, as in d1's code; False: all share one set", True
    )
    adam_beta2: float = _("of AdamW", 0.99, at_least=0, below=1)
    weight_decay: float = _("of AdamW", 0.0, at_least=0)
    beta: float = _("weight of the KL term against the policy that RL started from; 0: none", 0.0, at_least=0)
    kl: Callable = _("estimator of that KL, per token", kl_k3)
    use_bias_correction_kl: bool = _("that KL times the ratio to the rollout: kl_k3 then has the KL's gradient", False)
    teacher: Callable[..., Policy] | str | Policy | None = _(
        "a model (as `model`) whose reverse KL is in the reward; 'reference': the policy that RL started from", None
    )
    teacher_substeps: int = _("steps that the teacher takes for each one of the sampler's; 1: the same", 1, at_least=1)
    teacher_coeff: float = _(
        "the teacher's share of the reward, beside 1 - teacher_coeff of the task's; 1: the teacher alone",
        1.0,
        above=0,
        at_most=1,
    )
    entropy_coeff: float = _("weight of the entropy bonus; 0: none", 0.0, at_least=0)
    torch_compile: bool = _("compile the blocks of the policy that samples: for FP8 products on a GPU", False)
    shard_size: int = _("processes (a divisor of all) that shard the learner (FSDP2); 0: all; 1: none", 1, at_least=0)
    zero_mismatch: bool = _("batch-invariant arithmetic; stop where rollout and learner differ at all", False)

    sft_warmup_steps: int = _("most supervised steps before RL; 0: none", 0, at_least=0)
    sft_warmup_batch_size: int = _("prompts per warm-up step, over all processes", 64, at_least=1)
    sft_warmup_learning_rate: float = _("of the warm-up's AdamW", 2e-3, above=0)
    sft_warmup_corruption: float = _("SFT's corruption, in the warm-up", 0.0, at_least=0, below=1)
    sft_warmup_target: float = _("warm-up ends when sft_warmup_metric on validation_task reaches this", 1.0)
    sft_warmup_metric: str = _("the metric that ends the warm-up", "solve_rate")
    sft_warmup_eval_steps: int = _("steps between looks at that metric", 5, at_least=1)

    eval_batch_size: int = _("problems per evaluation batch and process", 256, at_least=1)
    log_completions_steps: int = _("RL steps between tables of completions, which are kept; 0: never", 50, at_least=0)
    push_to_hub: str | None = _("OWNER/NAME on the Hugging Face hub, for the last checkpoint; none: no upload", None)
    async_save: bool = _("write checkpoints during training, from a host copy of weights and optimiser state", False)
    reward_timeout: float | None = _(
        "seconds of a completion's reward, or of one call of reward functions; then the process ends: 124",
        600.0,
        above=0,
    )
    dry_run: bool = _("print what the recipe would take, without its weights, and stop", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        surrogate_inputs(self.resolved_loss)
        if self.rollout_engine is not None and (self.rollout_quantization is not None or self.corrector.align_forward):
            wrong = f"rollout_engine={describe(self.rollout_engine)} makes no quantised copy"
            raise ValueError(f"{wrong}: use rollout_quantization=None, and a corrector that does not align the forward")
        if self.lora is not None and self.corrector.align_forward and self.rollout_quantization is not None:
            check_mergeable(self.lora())  # the aligned forward quantizes merged weights

    def conflicts(self) -> list[tuple[bool, str]]:
        quantized = self.rollout_quantization is not None
        radius = inspect.signature(self.sampler).parameters.get("confidence_radius")
        found = [
            *super().conflicts(),
            (
                self.router_replay is not None and not quantized,
                "router_replay='R3' takes a quantised copy's experts again, and without rollout_quantization there is "
                "no copy: set a scheme, or leave it at none",
            ),
            (
                self.async_save and self.base_quantization is not None,
                f"async_save=True does not go with base_quantization={self.base_quantization!r}, whose weights have no "
                "copy on the host; use async_save=False",
            ),
            (
                self.loss is not None and self.corrector.loss is not None,
                f"loss={describe(self.loss)} and the corrector's own {describe(self.corrector.loss)} are two "
                "objectives: use loss=None (--loss none), or a corrector without one",
            ),
            (
                self.use_bias_correction_kl and not self.beta,
                "use_bias_correction_kl=True corrects a KL term, and beta=0 has none: set beta above 0",
            ),
            (
                self.old_logprobs == "rollout" and self.corrector.weighs,
                "old_logprobs='rollout' takes ratios against the rollout itself, which a corrector's weights would "
                "correct a second time: use corrector=no_correction(), or one without weight_fn, or "
                "old_logprobs='recompute'",
            ),
            (
                self.zero_mismatch and self.has_separate_rollout_policy and not self.corrector.align_forward,
                "zero_mismatch=True needs rollout_quantization=None and no engine, or a corrector that aligns forwards",
            ),
            (
                self.zero_mismatch and not quantized and not self.likelihood.exact_for_sampler,
                f"zero_mismatch=True with likelihood={self.likelihood.name!r} would compare the learner's log-probs "
                "with themselves: that estimator does not replay the sampler; use trajectory(), or zero_mismatch=False",
            ),
            (
                self.zero_mismatch and self.sampling_support == "unfiltered",
                "zero_mismatch=True does not go with sampling_support='unfiltered', whose rollout log-probs are sums "
                "of two recorded numbers and round; use 'per_policy' or 'rollout'",
            ),
            (
                self.likelihood.reads_confidence_change and radius is not None and radius.default is None,
                "likelihood.informed_masking needs confidences, which the sampler does not record: set "
                "sampler.confidence_radius=10, or leave informed_masking at None",
            ),
        ]
        found += self._late_conflicts() + self._teacher_conflicts()
        group = self.num_generations
        for name in ("rollout_batch_size", "micro_batch_size"):
            size = getattr(self, name)
            whole = size is None or (size >= group and size % group == 0)  # a group is never split
            found.append((not whole, f"{name}={size} must be a multiple of num_generations={group}"))
        return found

    def _late_conflicts(self) -> list[tuple[bool, str]]:
        workers, late = self.rollout_workers, self.max_staleness
        given = f"max_staleness={late}"
        return [
            (bool(late) and not workers, f"{given} needs workers that run ahead: set rollout_workers to 1 or more"),
            (
                workers > late + 1,
                f"rollout_workers={workers} are more than the {late + 1} batches that are made at a time with {given}: "
                f"use {late + 1} workers, or max_staleness={workers - 1}",
            ),
            (
                bool(late) and self.zero_mismatch,
                f"zero_mismatch=True stops where rollout and learner differ, as they do with {given}: leave one out",
            ),
            (
                bool(late) and self.teacher is not None and not self.likelihood.exact_for_sampler,
                f"teacher with {given} and likelihood={self.likelihood.name!r}: a worker scores the groups whose "
                "rewards differ, and the teacher changes the rewards afterwards: use trajectory(), or max_staleness=0",
            ),
            (
                bool(workers) and self.prompt_source.uses_history,
                f"rollout_workers={workers} draw prompts before earlier rewards are known, which prompt_source="
                f"{describe(self.prompt_source)} reads: use uniform_prompts, or rollout_workers=0",
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
        there = self.teacher is not None
        return [
            (
                not there and (self.teacher_substeps, self.teacher_coeff) != (1, 1.0),
                f"teacher_substeps={self.teacher_substeps} and teacher_coeff={self.teacher_coeff:g} are a teacher's, "
                "and teacher=None: set teacher, or leave them out",
            ),
            (
                there and takes_component_rewards(self.advantages),
                f"advantages={describe(self.advantages)} takes each of the task's rewards on its own, and teacher adds "
                "one that is none of them: use group_relative, or leave the teacher out",
            ),
            (
                there and self.max_num_gen_batches > 1,
                f"max_num_gen_batches={self.max_num_gen_batches} draws prompts until the task's rewards differ, and "
                "with a teacher they always do: use 1, or leave the teacher out",
            ),
        ]

    @property
    def needs_reference_policy(self) -> bool:
        """Whether a run stores the policy that RL started from, for the KL term or as a teacher."""
        return bool(self.beta) or self.teacher == REFERENCE

    @property
    def num_mask_sets(self) -> int:
        """Number of mask sets that score a rollout. `rollout_corr/*`, `trained/*` and `ais/*` are computed from the
        first.
        """
        return self.num_iterations if self.resample_masks and self.likelihood.is_random else 1

    @property
    def has_separate_rollout_policy(self) -> bool:
        """Whether rollouts are computed with other arithmetic than the learner's."""
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
        """Sample completions of the prompts, in the form in which they are scored if top_k or top_p filter."""
        return with_support(self.sampler(policy, prompts, generator), self.sampling_support)

    @property
    def policy_loss(self) -> Callable:
        """Function (log-probs (B, T), batch) -> loss, metrics, gradient: the recipe's `losses.policy_loss`.

        The defaults are ppo_clip with epsilon 0.2, an equal weight for every token of the batch, no KL term and no
        entropy bonus.
        """
        return partial(
            policy_loss,
            surrogate=self.resolved_loss,
            loss_reduction=self.resolved_loss_reduction,
            beta=self.beta,
            kl=self.kl,
            entropy=self.entropy_coeff,
            unbiased_kl=self.use_bias_correction_kl,
        )

    def update_settings(self, step: int) -> "UpdateSettings":
        """Return the arguments of `training.learner.update` at a step."""
        return UpdateSettings(
            loss=self.policy_loss,
            likelihood=self.likelihood,
            learning_rate=self.learning_rate * self.lr_schedule(step, self.schedule_steps),
            max_grad_norm=self.max_grad_norm,
            micro_batch_size=self.micro_batch_size,
            max_staleness=self.max_staleness,
            # A forward after the update would quantize an aligned learner's weights again, and count no changes.
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
    """The settings of a step's updates.

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
