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
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Int
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PrinterCallback, ProgressCallback

from dllm_rl.algorithms.correctors import Corrector
from dllm_rl.algorithms.losses import Loss
from dllm_rl.decoding.prompts import prompt_ids
from dllm_rl.decoding.texts import before_end, completion_token_ids, text_of
from dllm_rl.decoding.vocabulary import reads_otherwise
from dllm_rl.distributed.collectives import gather_on_host, reduce_metrics, sum_gradients
from dllm_rl.frontend.grpo import wrap_model
from dllm_rl.integrations.trl_settings import (
    check_adapters,
    check_peft_model,
    check_rewards,
    check_settings,
    check_trainer_callbacks,
    make_recipe,
)
from dllm_rl.likelihoods.estimators import LikelihoodEstimator
from dllm_rl.models.base import Policy, copied
from dllm_rl.models.forward.routing import check_routers, load_balancing_loss
from dllm_rl.models.load import load_policy
from dllm_rl.models.lora_settings import Lora
from dllm_rl.models.policy import wrap_module
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
from dllm_rl.types.groups import group_sizes, starts_group
from dllm_rl.types.rollouts import Prompts, Rollout
from dllm_rl.types.scoring import Batch

try:
    import trl
    from peft import PeftModel
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer.callbacks import SyncRefModelCallback
    from trl.trainer.utils import use_adapter
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}; dllm_rl.integrations.trl needs TRL: pip install -e '.[trl]'") from None

VERSIONS = ((1, 15), (1, 16))  # oldest and newest TRL that were tried
# Metrics of this library that TRL has, too, under the same names.
TRL_METRICS = {"kl", "clip_ratio/high_mean", "clip_ratio/low_mean", "clip_ratio/region_mean"}
# TRL's methods that are overridden, and the names of their first parameters.
OVERRIDDEN = {
    "_calculate_rewards": ("self", "inputs", "prompts", "completions", "completion_ids_list"),
    "_generate_and_score_completions": ("self", "inputs"),
    "_get_per_token_logps_and_entropies": ("self", "model", "input_ids", "attention_mask", "logits_to_keep"),
    "_compute_loss": ("self", "model", "inputs"),
    "training_step": ("self", "model", "inputs", "num_items_in_batch"),
    "save_model": ("self", "output_dir", "_internal_call"),
}


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
        check_settings(args, trainer_arguments)
        check_rewards(reward_funcs)
        check_trainer_callbacks(trainer_arguments.get("callbacks") or ())
        if trainer_arguments.get("peft_config") is not None:
            check_adapters(trainer_arguments["peft_config"], "peft_config")
        policy = open_policy(model, processing_class, args)
        choices = {"sampler": sampler, "likelihood": likelihood, "corrector": corrector, "loss": loss}
        choices = {name: choice for name, choice in choices.items() if choice is not None}
        recipe = make_recipe(policy, args, rollout_quantization=rollout_quantization, **choices)
        check_recipe(recipe, policy)
        for field in ("train_dataset", "eval_dataset"):
            rows = trainer_arguments.get(field)
            for part in rows.values() if isinstance(rows, dict) else [rows]:
                if isinstance(part, Dataset):  # not a streamed one
                    check_rows(policy, field, part, recipe.sampler, args.chat_template_kwargs or {})
        apply_compute_settings(recipe, policy)
        self._policy, self._recipe = policy, recipe
        self._generated: tuple[Rollout, int, int]  # of the batch in progress, its number, its completions per prompt
        self._num_eval_batches, self._has_loss = 0, False
        self._own_metrics: set[str] = set()
        is_adapted = isinstance(model, PeftModel)
        has_adapters = is_adapted or trainer_arguments.get("peft_config") is not None
        reference = copied(policy) if recipe.beta and not has_adapters else None
        synced, args.sync_ref_model = args.sync_ref_model, False  # TRL has no reference to sync
        if synced and reference is None:
            raise ValueError("sync_ref_model=True needs a copy of the weights as the reference: beta > 0, no adapters")
        args.beta *= is_adapted  # TRL copies given adapters, and would load a reference as a causal model
        # The policy has its own, which also works in eval mode. Newer versions of transformers call it by another name.
        args.gradient_checkpointing = args.activation_checkpointing = False
        trainer_arguments["rollout_func"] = lambda prompts, trainer: trainer._sample(prompts)
        trained = model if is_adapted else policy.module
        with warnings.catch_warnings():  # about an argument that the user did not give
            warnings.filterwarnings("ignore", "You are using 'rollout_func'", UserWarning)
            super().__init__(trained, reward_funcs, args, processing_class=policy.tokenizer, **trainer_arguments)
        args.beta, args.gradient_checkpointing = recipe.beta, recipe.gradient_checkpointing
        args.sync_ref_model = synced
        if self.aux_loss_enabled:
            check_routers(policy)
        if reference is not None:
            reference.module.to(self.accelerator.device).requires_grad_(False)
            self.ref_model = reference.module  # under TRL's name; its own code does not read it, as its beta was 0
            if synced:
                self.add_callback(SyncRefModelCallback(reference.module, self.accelerator))
        elif recipe.beta:
            reference = without_adapters(policy, self.accelerator.unwrap_model(self.model))
        self._context = make_step(
            recipe, accelerator=self.accelerator, policy=policy, rollout_policy=policy, reference=reference
        )
        lora = Lora() if has_adapters else None
        warned = replace(recipe, learning_rate=args.learning_rate or recipe.learning_rate, lora=lora)
        for caution in cautions(warned) if self.accelerator.is_main_process else []:
            warnings.warn(caution, stacklevel=2)
        self._context.balances = False  # it moves rows to other processes
        self._context.corrector_state = None
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, PrinterCallback | ProgressCallback):
                callback.on_log = partial(self._print_few, callback.on_log)  # type: ignore[method-assign]

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
        self._own_metrics |= metrics.keys() - TRL_METRICS
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)

    def _print_few(self, on_log: Callable, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        """Call the hook of a callback that prints, without this library's metrics, which the log and trackers have."""
        few = {name: value for name, value in logs.items() if name.removeprefix("eval_") not in self._own_metrics}
        on_log(args, state, control, logs=few, **more)

    def _micro_step(self) -> int:
        """Return the number of this step of accumulation: of the global step, so that a resumed run counts the same."""
        accumulation: int = self.args.gradient_accumulation_steps
        return self.state.global_step * accumulation + self._step % accumulation

    def _sample(self, prompts: list) -> dict[str, Any]:
        """Complete the prompts of this process, one row each."""
        is_training, policy, context = self.model.training, self._policy, self._context
        policy.weights_version = self.state.global_step
        if is_training:
            number = self._micro_step()
        else:
            self._num_eval_batches += 1
            number = -self._num_eval_batches
        first_row = self.accelerator.process_index * len(prompts)
        rows = first_row + torch.arange(len(prompts))
        size = self.num_generations if is_training else self.num_generations_eval
        group = rows // size
        firsts = starts_group(group).nonzero()[:, 0].tolist()
        ids = [prompt_ids(policy, prompts[row], template_arguments=self.chat_template_kwargs) for row in firsts]
        sizes = group_sizes(group)
        key = (self.args.seed, "rollout" if is_training else "evaluation", number)
        seeds = row_seeds(generator_for(*key), first_row + len(prompts))[first_row:]  # those of any number of processes
        batch = Prompts.from_ids(ids, pad_id=policy.pad_id, num_generations=sizes, seeds=seeds.tolist())
        with torch.no_grad(), self._arithmetic():
            if self._recipe.rollout_quantization is not None and context.learner_samples:
                context.rollout_policy = RolloutCopy(recipe=self._recipe).load(policy)
            elif not context.learner_samples and (is_training or self._num_eval_batches == 1):
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
        if self.mask_truncated_completions:
            has_end = torch.tensor([len(answer) < len(row) for answer, row in answers], device=rollout.tokens.device)
            rollout = replace(rollout, completion_mask=rollout.completion_mask & has_end[:, None])
            self._generated = replace(rollout, batch_row=rows.to(rollout.tokens.device)), number, size
        prompt_of_row = [row for row, repeats in zip(ids, sizes, strict=True) for _ in range(repeats)]
        return {"prompt_ids": prompt_of_row, "completion_ids": completions, "logprobs": None}

    def _calculate_rewards(self, inputs: Any, prompts: list, completions: list, ids: list[list[int]]) -> Tensor:
        if reads_otherwise(self._policy):  # than TRL, which leaves out special tokens
            is_text = isinstance(completions[0], str)
            texts = [text_of(self._policy, before_end(self._policy, row)) for row in ids]
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
        samples = Samples(rollout, group, rewards, advantages, weights, counts)
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
        recipe, steps, is_training = self._recipe, self.args.steps_per_generation, self.model.training
        accumulation = self.current_gradient_accumulation_steps if is_training else 1
        update = self._step // steps % self.num_iterations if is_training else 0
        batch = rows_of(batches[update % len(batches)], rows, accumulation / steps if is_training else 1.0)
        num_batches = accumulation * self.accelerator.num_processes
        if self.loss_type == "bnpo":  # the mean over each micro-batch
            batch = replace(batch, num_tokens=num_batches * int(batch.rollout.completion_mask.sum()))
        if not is_training:
            with torch.enable_grad():  # the loss differentiates itself
                share = recipe.policy_loss(batch.old_logprobs, batch)[0]
            return share * num_batches + self._router_loss(batch, "eval")  # TRL takes the mean over processes
        with self._arithmetic():
            view_logprobs = batch.old_view_logprobs
            if batch.rollout.weights_version != self.state.global_step:  # an update since the rows were scored
                view_logprobs = recipe.likelihood.view_logprobs(self._policy, batch.rollout, batch.views)
            metrics = forward_backward(
                self._policy, batch, view_logprobs, loss=recipe.policy_loss, likelihood=recipe.likelihood
            )
            router_loss = self._router_loss(batch, "train")
            if router_loss.requires_grad:
                (router_loss / num_batches).backward()
        loss, _ = metrics.pop("loss")  # this process's share; the trainer logs the mean over the processes
        self._log("train", reduce_metrics(metrics, self.accelerator))
        self._has_loss = True
        loss = loss.detach() * self.accelerator.num_processes + router_loss.detach() / accumulation
        return loss.requires_grad_()  # whose backward changes nothing

    def _router_loss(self, batch: Batch, mode: str) -> Tensor:
        """Return the weighted load-balancing loss of the rows in one of their views; 0 without routers.

        The micro-batches of a run take turns at the views, so that one forward is enough.
        """
        if not self.aux_loss_enabled:
            return torch.zeros((), device=batch.loss_mask.device)
        views, rollout = batch.views, batch.rollout
        masked = views.masked[self._micro_step() % len(views.masked)]
        assert self._policy.spec.mask_id is not None, "a diffusion model has a mask token"
        tokens = torch.where(masked, self._policy.spec.mask_id, rollout.tokens)
        loss = load_balancing_loss(self._policy, tokens, rollout.attention_mask)
        self._metrics[mode]["aux_loss"].append(self.accelerator.gather(loss.detach()).mean().item())
        return self.router_aux_loss_coef * loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Compute the gradient of a micro-batch, and sum the gradients over the processes before an update."""
        self._has_loss = False
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not self._has_loss:
            raise RuntimeError(f"TRL {trl.__version__} did not call _compute_loss: it trained a causal model's loss")
        if self.accelerator.sync_gradients:
            sum_gradients(self._policy.module, self.accelerator)
        return loss


def open_policy(model: Any, processing_class: Any, args: Any) -> Policy:
    """Return the policy of the trainer's `model`, whose module TRL can train.

    Raises:
        ValueError: `model` is not one of those that the trainer takes, or does not fit the other arguments.
    """
    if isinstance(model, str | Path):
        policy: Any = load_policy(model, dtype=(args.model_init_kwargs or {}).get("dtype", torch.float32))
        policy.module.name_or_path = str(model)  # peft writes it as the base of its adapters
        if processing_class is not None:
            if processing_class.get_vocab() != policy.tokenizer.get_vocab():
                raise ValueError(f"processing_class has other tokens than the tokenizer of model={model!r}")
            policy.tokenizer = processing_class
    elif args.model_init_kwargs:
        raise ValueError(
            f"model_init_kwargs={args.model_init_kwargs} is for a checkpoint that is loaded, and model is not its "
            "folder or id: leave it out"
        )
    else:
        source = getattr(model, "name_or_path", "")
        if processing_class is None and isinstance(model, nn.Module) and not isinstance(model, Policy) and source:
            processing_class = AutoTokenizer.from_pretrained(source)  # as TRL does
        is_adapted = isinstance(model, PeftModel)
        if is_adapted:
            check_peft_model(model)
            model = model.get_base_model()
        wrap = wrap_module if is_adapted and processing_class is not None else wrap_model
        policy = wrap(model, processing_class)
    if policy.spec.attention == "causal":
        raise ValueError(f"model is causal ({policy.spec.name}); use TRL's GRPOTrainer, or grpo")
    check_no_adapters(policy, "peft_config")
    check_vocab_size(policy)
    module = policy.module
    if not isinstance(module, PreTrainedModel):
        kind = type(module).__name__
        raise ValueError(f"model's module, {kind}, is not one of transformers' models, which TRL needs; use grpo")
    if getattr(module, "generation_config", None) is None:  # TRL writes to it
        module.generation_config = GenerationConfig(eos_token_id=list(policy.spec.eos_ids))
    return policy


def check_recipe(recipe: Recipe, policy: Policy) -> None:
    """Raise ValueError for a likelihood, corrector or loss that does not work with the policy, or by micro-batches."""
    recipe.likelihood.check_policy(policy)
    if recipe.corrector.align_forward or "sum_over_processes" in recipe.resolved_loss.inputs:
        name = "corrector" if recipe.corrector.align_forward else "loss"
        raise ValueError(f"{name}={getattr(recipe, name)!r} does not work by micro-batches of TRL; use grpo")


def without_adapters(policy: Policy, model: Any) -> Policy:
    """Return a policy of the same weights whose forwards do not use the trained adapters of peft's `model`: none, or
    the copy that TRL made of those that it was given.
    """
    name = "ref" if "ref" in model.peft_config else None

    def call(function: Callable, *args: Any, **kwargs: Any) -> Tensor:
        with use_adapter(model, name):
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
