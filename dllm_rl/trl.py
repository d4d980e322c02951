"""TRL's `GRPOTrainer` for masked diffusion language models: `DiffusionGRPOTrainer`.

TRL draws prompts, calls the rewards, computes advantages, and runs the optimizer, callbacks and checkpoints; between,
this library takes its own step. A row of TRL's batch carries its number in the rollout, which TRL shuffles and splits
with its tensors, so that steps, masks and weights stay with their rows.
"""

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Int
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from dllm_rl.algorithms.correctors import Corrector, NoCorrection
from dllm_rl.algorithms.losses import K3, Loss
from dllm_rl.decoding.tokens import before_end, completion_token_ids, prompt_ids, symbol_pattern, text_of
from dllm_rl.distributed.collectives import gather_on_host, reduce_metrics, sum_gradients
from dllm_rl.frontend.grpo import grpo_recipe, wrap_model
from dllm_rl.frontend.trl_names import OFF
from dllm_rl.likelihoods.estimators import LikelihoodEstimator
from dllm_rl.models.base import Policy, copied
from dllm_rl.models.lora import Lora
from dllm_rl.models.policy import load_policy
from dllm_rl.quantization.rollout_policy import sync_weights
from dllm_rl.recipe import Recipe
from dllm_rl.rng import generator_for, row_seeds
from dllm_rl.samplers.sampler import Sampler
from dllm_rl.step.correct import make_batches
from dllm_rl.step.samples import Samples
from dllm_rl.step.score import score_samples
from dllm_rl.step.update import forward_backward
from dllm_rl.training.cautions import cautions
from dllm_rl.training.make_step import make_step
from dllm_rl.training.policies import RolloutCopy, apply_compute_settings, check_no_adapters, check_vocab_size
from dllm_rl.training.prompts import check_rows
from dllm_rl.training.sharded_learner import launch_engine
from dllm_rl.types import Batch, Prompts, Rollout, group_sizes, starts_group

try:
    import trl
    from trl import GRPOConfig, GRPOTrainer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}; dllm_rl.trl needs TRL: pip install -e '.[trl]'") from None

VERSIONS = ((1, 15), (1, 16))  # oldest and newest TRL that were tried
# TRL's methods that are overridden, and the names of their first parameters.
OVERRIDDEN = {
    "_calculate_rewards": ("self", "inputs", "prompts", "completions", "completion_ids_list"),
    "_generate_and_score_completions": ("self", "inputs"),
    "_get_per_token_logps_and_entropies": ("self", "model", "input_ids", "attention_mask", "logits_to_keep"),
    "_compute_loss": ("self", "model", "inputs"),
    "training_step": ("self", "model", "inputs", "num_items_in_batch"),
    "save_model": ("self", "output_dir", "_internal_call"),
}
# Fields of GRPOConfig that this trainer does not read, or with which it was not tried: they stay at their defaults.
UNUSED_FIELDS = (*OFF, "cast_lm_head_to_fp32", "torch_compile", "trust_remote_code")
UNUSED_ARGUMENTS = ("tools", "rollout_func", "environment_factory", "quantization_config", "reward_processing_classes")
SAME_FIELDS = ("num_generations", "num_iterations", "beta", "seed", "bf16", "gradient_checkpointing")  # as a Recipe's
LOSS_TYPES = ("grpo", "dapo", "dr_grpo")


class DiffusionGRPOTrainer(GRPOTrainer):
    """GRPO of a masked diffusion language model in TRL's trainer.

    Use it if you have a script for `trl.GRPOTrainer`; use `grpo` otherwise. Forwards have no dropout.

    Args:
        model: A checkpoint's folder or hub id, a transformers model, or a policy, which is trained in place.
        reward_funcs: As in GRPOTrainer.
        args: GRPOConfig. max_completion_length, temperature, top_k and top_p are the sampler's; loss_type, epsilon and
            delta choose the loss as in `grpo`.
        sampler: Sampler of the completions. Default: `Unmask`, one token per step.
        likelihood: Estimator of the log-probs. Default: that of `grpo`.
        corrector: Correction of the mismatch between sampler and learner. Default: none.
        rollout_quantization: Scheme of the copy that samples, such as Float8Dynamic(). None: the learner samples.
        loss: Objective, such as GSPO(), instead of TRL's epsilon, delta and importance_sampling_level.
        processing_class: Tokenizer of a transformers model.
        trainer_arguments: The other arguments of GRPOTrainer.

    Raises:
        ValueError: Settings have no meaning here, or the model, sampler, likelihood and corrector cannot be combined.
        RuntimeError: The installed TRL is older or newer than those that were tried, or has other methods.
    """

    def __init__(  # noqa: PLR0913
        self,
        model: str | Path | nn.Module | Policy,
        reward_funcs: Any,
        args: Any = None,
        *,
        sampler: Sampler | None = None,
        likelihood: LikelihoodEstimator | None = None,
        corrector: Corrector | None = None,
        rollout_quantization: Any = None,
        loss: Loss | None = None,
        processing_class: Any = None,
        **trainer_arguments: Any,
    ) -> None:
        check_trl()
        args = GRPOConfig("diffusion-grpo") if args is None else copy.copy(args)
        check_unused(args, trainer_arguments)
        policy: Any = wrap_model(model, processing_class)
        if isinstance(policy, str):
            policy = load_policy(policy, dtype=(args.model_init_kwargs or {}).get("dtype", torch.float32))
            policy.module.name_or_path = str(model)  # peft writes it as the base of its adapters
        elif args.model_init_kwargs:
            raise ValueError(
                f"model_init_kwargs={args.model_init_kwargs} is for a checkpoint that is loaded, and model is not its "
                "folder or id: leave it out"
            )
        if policy.spec.attention == "causal":
            raise ValueError(f"model is causal ({policy.spec.name}); use TRL's GRPOTrainer, or grpo")
        check_no_adapters(policy, "peft_config")
        check_vocab_size(policy)
        if not isinstance(policy.module, PreTrainedModel):
            kind = type(policy.module).__name__
            raise ValueError(f"model's module, {kind}, is none of transformers' models, which TRL needs; use grpo")
        choices = {"sampler": sampler, "likelihood": likelihood, "corrector": corrector, "loss": loss}
        choices = {name: choice for name, choice in choices.items() if choice is not None}
        recipe = make_recipe(policy, args, rollout_quantization=rollout_quantization, **choices)
        recipe.likelihood.check_policy(policy)
        if recipe.corrector.align_forward or "sum_over_processes" in recipe.resolved_loss.inputs:
            name = "corrector" if recipe.corrector.align_forward else "loss"
            raise ValueError(f"{name}={getattr(recipe, name)!r} does not work by micro-batches of TRL; use grpo")
        for field in ("train_dataset", "eval_dataset"):
            rows = trainer_arguments.get(field)
            for part in rows.values() if isinstance(rows, dict) else [rows]:
                if isinstance(part, Dataset):  # not a streamed one
                    check_rows(policy, field, part, recipe.sampler)
        apply_compute_settings(recipe, policy)
        self._policy, self._recipe = policy, recipe
        adapters = trainer_arguments.get("peft_config")
        reference = copied(policy) if recipe.beta and adapters is None else None
        warned = replace(
            recipe, learning_rate=args.learning_rate or recipe.learning_rate, lora=None if adapters is None else Lora()
        )
        self._generated: tuple[Rollout, int, int]  # of the batch in progress, its number, its completions per prompt
        self._num_eval_batches, self._has_loss = 0, False
        module = policy.module
        if getattr(module, "generation_config", None) is None:  # TRL writes to it
            module.generation_config = GenerationConfig(eos_token_id=list(policy.spec.eos_ids))
        args.beta = 0.0  # TRL would load the reference as a causal model
        args.gradient_checkpointing = False  # the policy has its own, which also works in eval mode
        trainer_arguments["rollout_func"] = lambda prompts, trainer: trainer._sample(prompts)
        super().__init__(module, reward_funcs, args, processing_class=policy.tokenizer, **trainer_arguments)
        args.beta, args.gradient_checkpointing = recipe.beta, recipe.gradient_checkpointing
        if reference is not None:
            reference.module.to(self.accelerator.device).requires_grad_(False)
        elif recipe.beta:
            reference = without_adapters(policy, self.accelerator.unwrap_model(self.model))
        policies = {"policy": policy, "rollout_policy": policy, "reference": reference}
        self._context = make_step(recipe, accelerator=self.accelerator, **policies)
        for caution in cautions(warned) if self.accelerator.is_main_process else []:
            warnings.warn(caution, stacklevel=2)
        self._context.features = ()  # without load balancing, which moves rows to other processes

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as TRL does, with the same random numbers at each evaluation."""
        self._num_eval_batches = 0
        return super().evaluate(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model in the layout of the checkpoint that was loaded, or peft's adapters.

        The checkpoints of a run have the stock class's layout, which a resume reads. `load_policy` opens both.
        """
        super().save_model(output_dir, _internal_call)
        is_final = (output_dir is None or not _internal_call) and self.args.should_save
        if is_final and not hasattr(self.accelerator.unwrap_model(self.model), "peft_config"):
            self._policy.save_pretrained(output_dir or self.args.output_dir)

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """Put the module into eval mode and set what the step's forwards need."""
        module = self._policy.module
        was_training = module.training
        module.eval()
        try:
            with self._context.arithmetic(learner=True):
                yield
        finally:
            module.train(was_training)

    def _log(self, mode: str, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)

    def _sample(self, prompts: list) -> dict[str, Any]:
        """Complete the prompts of this process, one row each."""
        is_training, policy, context = self.model.training, self._policy, self._context
        policy.weights_version = self.state.global_step
        if is_training:  # a function of the global step, so that a resumed run draws the same numbers
            accumulation = self.args.gradient_accumulation_steps
            number = self.state.global_step * accumulation + self._step % accumulation
        else:
            self._num_eval_batches += 1
            number = -self._num_eval_batches
        first_row = self.accelerator.process_index * len(prompts)
        rows = first_row + torch.arange(len(prompts))
        size = self.num_generations if is_training else self.num_generations_eval
        group = rows // size
        ids = [prompt_ids(policy, prompts[row]) for row in starts_group(group).nonzero()[:, 0].tolist()]
        sizes = group_sizes(group)
        key = (self.args.seed, "rollout" if is_training else "evaluation", number)
        seeds = row_seeds(generator_for(*key), first_row + len(prompts))[first_row:]  # those of any number of processes
        batch = Prompts.from_ids(ids, pad_id=policy.pad_id, num_generations=sizes, seeds=seeds.tolist())
        with torch.no_grad(), self._arithmetic():
            if self._recipe.rollout_quantization is not None and context.rollout_policy is policy:
                context.rollout_policy = RolloutCopy(recipe=self._recipe).load(policy)
            elif context.rollout_policy is not policy and (is_training or number == -1):
                # Before each evaluation, too: the trainer may have loaded other weights since the last rollout.
                metrics = sync_weights(policy, context.rollout_policy)
                self._log("train", metrics if is_training else {})
            rollout = self._recipe.sampler(context.rollout_policy, batch, generator_for(*key, int(seeds[0])))
        if not rollout.logprobs.isfinite().all():
            raise FloatingPointError(
                f"the rollout's logits are not finite at step {self.state.global_step}; use a "
                f"learning_rate below {self.args.learning_rate:g}, or an earlier checkpoint"
            )
        self._generated = replace(rollout, batch_row=rows.to(rollout.tokens.device)), number, size
        eos = policy.tokenizer.eos_token_id  # TRL's, whichever of the model's end tokens it was
        end = [policy.spec.eos_ids[0] if eos is None else eos]
        answers = [(before_end(policy, row), row) for row in completion_token_ids(rollout)]
        completions = [answer + end if len(answer) < len(row) else answer for answer, row in answers]
        prompt_of_row = [row for row, repeats in zip(ids, sizes, strict=True) for _ in range(repeats)]
        return {"prompt_ids": prompt_of_row, "completion_ids": completions, "logprobs": None}

    def _calculate_rewards(self, inputs: Any, prompts: list, completions: list, ids: list[list[int]]) -> Tensor:
        if symbol_pattern(self._policy.tokenizer) is not None:  # TRL decodes residues with spaces between them
            is_text = isinstance(completions[0], str)
            texts = [text_of(self._policy, row) for row in ids]
            # In place, because TRL also logs this list.
            completions[:] = texts if is_text else [[{"role": "assistant", "content": text}] for text in texts]
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, ids)  # of all processes, by function
        self._lacks_reward = rewards.isnan().all(1).cpu()
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        mode = "train" if self.model.training else "eval"
        output = super()._generate_and_score_completions(inputs)  # calls `_sample`
        rollout, number, size = self._generated
        counts = (len(rollout.tokens),) * self.accelerator.num_processes
        (advantages,) = gather_on_host([output["advantages"]], self.accelerator, counts)
        group = torch.arange(len(advantages)) // size
        weights = torch.ones(len(advantages), dtype=torch.double)  # scoring sets them
        rewards = advantages.masked_fill(self._lacks_reward, torch.nan)  # it reads only which are lacking
        samples = Samples(rollout, group, rewards, advantages, weights, counts, batch_number=number)
        with self._arithmetic():
            scored = score_samples(self._context, samples, number)
            batches, metrics = make_batches(self._context, scored)
        self._log(mode, metrics)
        output["dllm_rl"] = [(batches, row) for row in range(len(rollout.tokens))]
        return output

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None, None]:
        """Return placeholders: `_compute_loss` uses the scores of the rollout's own views."""
        return torch.zeros(len(input_ids), logits_to_keep, device=input_ids.device), None, None

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Add the gradient of a micro-batch's loss to the parameters, and return the loss without a graph."""
        batches, _ = inputs["dllm_rl"][0]
        # Sorted: a view runs one row for a group of equal rows, if they follow each other, and TRL shuffles them.
        rows = torch.tensor(sorted(row for _, row in inputs["dllm_rl"]), device=self.accelerator.device)
        recipe, steps = self._recipe, self.args.steps_per_generation
        if not self.model.training:
            batch = rows_of(batches[0], rows)
            with torch.enable_grad():  # the loss differentiates itself
                share = recipe.policy_loss(batch.old_logprobs, batch)[0]
            return share * self.accelerator.num_processes  # TRL takes the mean over processes
        update = self._step // steps % self.num_iterations
        batch = rows_of(batches[update % len(batches)], rows, self.current_gradient_accumulation_steps / steps)
        with self._arithmetic():
            view_logprobs = batch.old_view_logprobs
            if batch.rollout.weights_version != self.state.global_step:  # an update since the rows were scored
                view_logprobs = recipe.likelihood.view_logprobs(self._policy, batch.rollout, batch.views)
            metrics = forward_backward(
                self._policy, batch, view_logprobs, loss=recipe.policy_loss, likelihood=recipe.likelihood
            )
        loss, _ = metrics.pop("loss")  # this process's share; the trainer logs the mean over the processes
        self._log("train", reduce_metrics(metrics, self.accelerator))
        self._has_loss = True
        return (loss.detach() * self.accelerator.num_processes).requires_grad_()  # whose backward changes nothing

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Compute the gradient of a micro-batch, and sum the gradients over the processes before an update."""
        self._has_loss = False
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not self._has_loss:
            raise RuntimeError(f"TRL {trl.__version__} did not call _compute_loss: it trained a causal model's loss")
        if self.accelerator.sync_gradients:
            sum_gradients(self._policy.module, self.accelerator)
        return loss


def make_recipe(policy: Policy, args: Any, **choices: Any) -> Recipe:
    """Return the recipe of a GRPOConfig, with the sampler, likelihood, corrector and loss in `choices`."""
    sampler, corrector = choices.get("sampler"), choices.get("corrector", NoCorrection())
    drawing = {"max_new_tokens": args.max_completion_length, "temperature": args.temperature}
    drawing |= {"top_k": args.top_k or None, "top_p": None if args.top_p == 1 else args.top_p}
    if sampler is not None:
        drawing = {name: value for name, value in drawing.items() if hasattr(sampler, name)}
        for name, value in drawing.items():
            if getattr(sampler, name) not in (None, 0.0, value):
                raise ValueError(f"sampler.{name}={getattr(sampler, name)} is not GRPOConfig's ({value}); set it there")
        choices["sampler"] = sampler.replace(**drawing)
    if corrector.loss is None and "loss" not in choices:
        names = ("importance_sampling_level", "epsilon", "epsilon_high", "delta")
        choices |= {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if corrector.loss_reduction is None:
        choices["loss_type"] = args.loss_type
    return grpo_recipe(
        policy,
        [{"prompt": ""}] * 2,  # nothing reads the recipe's task: TRL draws prompts and grades
        lambda completions: [0.0] * len(completions),
        preset="none",
        sampler_options=None if sampler else {name: value for name, value in drawing.items() if value is not None},
        micro_batch_size=args.per_device_train_batch_size,
        max_retained_graphs=0,
        kl=K3(bias_correction=args.use_bias_correction_kl),
        **{name: getattr(args, name) for name in SAME_FIELDS},
        **choices,
    )


def without_adapters(policy: Policy, model: Any) -> Policy:
    """Return a policy of the same weights whose forwards do not use the adapters of peft's `model`."""

    def call(function: Callable, *args: Any, **kwargs: Any) -> Tensor:
        with model.disable_adapter():
            return function(*args, **kwargs)

    reference, spec = copy.copy(policy), policy.spec
    reference.spec = replace(spec, encode=partial(call, spec.encode), head=partial(call, spec.head))
    return reference


def rows_of(batch: Batch, rows: Int[Tensor, " R"], share: float = 1.0) -> Batch:
    """Return the batch of some rows. Its counts are `share` of all: that of an update that takes a part of the rows."""
    names = ("advantages", "old_logprobs", "importance_weights", "loss_mask", "reference_logprobs", "rollout_logprobs")
    return replace(
        batch,
        rollout=batch.rollout.rows(rows),
        views=batch.views.rows(rows),
        old_view_logprobs=batch.old_view_logprobs[:, rows],
        num_tokens=round(batch.num_tokens * share),
        num_sequences=round(batch.num_sequences * share),
        **{name: value[rows] for name in names if (value := getattr(batch, name)) is not None},
    )


def check_trl() -> None:
    """Raise RuntimeError for a TRL that was not tried, or whose methods changed: it would train causal log-probs."""
    found = tuple(map(int, trl.__version__.split(".")[:2]))
    problem = "" if VERSIONS[0] <= found <= VERSIONS[1] else " was not tried"
    for name, expected in OVERRIDDEN.items():
        parameters = tuple(inspect.signature(getattr(GRPOTrainer, name, lambda: None)).parameters)[: len(expected)]
        if parameters != expected:
            problem = problem or f": GRPOTrainer.{name}{parameters} should be {name}{expected}"
    if problem:
        raise RuntimeError(f"TRL {trl.__version__}{problem}; install TRL {'{}.{} to {}.{}'.format(*sum(VERSIONS, ()))}")


def check_unused(args: Any, trainer_arguments: dict[str, Any]) -> None:
    """Raise one ValueError for all settings that have no meaning for a diffusion model, or are not supported."""
    defaults = {field.name: field.default for field in fields(GRPOConfig)}
    values = {name: getattr(args, name) for name in UNUSED_FIELDS if name in defaults}  # a TRL may lack some
    refused = [f"{name}={x!r}" for name, x in values.items() if x != defaults[name] and (x or defaults[name])]
    refused += [name for name in UNUSED_ARGUMENTS if trainer_arguments.get(name) is not None]
    if args.loss_type not in LOSS_TYPES:
        refused.append(f"loss_type={args.loss_type!r} (it is {', '.join(LOSS_TYPES)}; others: loss=CISPO() ...)")
    if others := set(args.model_init_kwargs or {}) - {"dtype"}:
        refused.append(f"model_init_kwargs {sorted(others)} (only dtype)")
    if engine := launch_engine():
        refused.append(f"distributed_type={engine} in the launch's config (only MULTI_GPU or MULTI_CPU)")
    if dropout := getattr(trainer_arguments.get("peft_config"), "lora_dropout", 0.0):
        refused.append(f"lora_dropout={dropout} (forwards have no dropout; set it to 0)")
    if refused:
        raise ValueError(f"DiffusionGRPOTrainer has no use for {'; '.join(refused)}; leave them out")
