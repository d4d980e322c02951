"""The policies of a run: the learner, the reference, and the rollout policy."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dllm_rl import manifest
from dllm_rl.algorithms.optimizers import keep_rate_ratios
from dllm_rl.checkpoints.resume import allowed_changes
from dllm_rl.checkpoints.state import TrainingState
from dllm_rl.decoding.vocabulary import begin_ids
from dllm_rl.distributed.collectives import check_same, collective, from_main
from dllm_rl.distributed.sharding import sharding_of
from dllm_rl.distributed.stop import as_written
from dllm_rl.evaluation.completions import fingerprint
from dllm_rl.files import replacing
from dllm_rl.models.base import Policy, copied, frozen_names, trainable_parameters
from dllm_rl.models.checkpoint.adapters import load_adapter
from dllm_rl.models.checkpoint.loading import checkpoint_folder, digest_of_checkpoint, has_known_family
from dllm_rl.models.checks import check_weights
from dllm_rl.models.forward.blocks import blocks_of
from dllm_rl.models.load import load_policy, load_weights
from dllm_rl.models.lora import add_lora
from dllm_rl.models.low_bit import is_bitsandbytes
from dllm_rl.models.rollout_engine import RolloutEngine
from dllm_rl.monitoring.log import RunLog
from dllm_rl.quantization.rollout_policy import quantized_copy, sync_weights
from dllm_rl.recipe import Recipe
from dllm_rl.tasks.datasets import num_problems_in_training
from dllm_rl.tasks.user_code import process_restored
from dllm_rl.training.any_recipe import AnyRecipe
from dllm_rl.training.sharded_learner import gather_on_main, loading_device, shard_policy
from dllm_rl.training.validation import evaluate_held_out, evaluate_with, format_metrics, problems_evaluated
from dllm_rl.training.warmup import warm_up
from dllm_rl.versions import versions


def initialize_run(
    recipe: Recipe, policy: Policy, accelerator: Accelerator, log: RunLog, *, base: str | None, contents: dict[str, str]
) -> TrainingState:
    """Warm up the recipe's model, add its adapters, and evaluate it. The state gets `base` and `contents`, the digests
    of what a resume compares.
    """
    evaluate_policy = partial(evaluate_with, recipe, policy, recipe.validation_task, accelerator)
    with log.stage("warm-up"):
        warmup_steps = warm_up(recipe, policy, accelerator, log, evaluate_policy)
    # A resumed run reads the reference from a folder. With adapters, the reference is their base model, which must be
    # saved only if the warm-up changed it.
    needs_reference_folder = (
        recipe.needs_reference_policy if recipe.lora is None else warmup_steps and policy.lora is None
    )
    reference_digest = None
    if needs_reference_folder:
        reference_digest = save_reference(Path(recipe.directory), policy, accelerator)
    if recipe.lora is not None and policy.lora is None:
        add_lora(policy, recipe.lora)
    with log.stage("evaluation"):
        eval_before = evaluate_held_out(recipe, policy, recipe.eval_task, accelerator, log, 0)
    num_in_training = num_problems_in_training(recipe.task, recipe.eval_task)
    problems = problems_evaluated(len(recipe.eval_task), num_in_training)
    log.say(f"before RL: {format_metrics(eval_before)} on {problems}")
    return TrainingState.first(
        recipe.settings(),
        policy,
        begin_ids=begin_ids(policy),
        eval_before=eval_before,
        warmup_steps=warmup_steps,
        reference=reference_digest,
        base=base,
        contents=contents,
    )


def resumed_policy(recipe: Recipe, folder: Path, state: TrainingState, accelerator: Accelerator) -> Policy:
    """Load the learner from a checkpoint of this run."""
    device = loading_device(recipe.shard_size, accelerator)
    dtype = getattr(torch, state.dtype)
    if recipe.lora is None:
        policy = load_from_run_folder(recipe, folder, dtype, device)
        freeze(recipe.model, policy, state.frozen or [])
    else:
        # Adapters apply to the weights after the warm-up, if there was one.
        base = Path(recipe.directory) / "reference"
        is_warmed_up = state.warmup_steps > 0
        policy = load_from_run_folder(recipe, base, dtype, device) if is_warmed_up else build_policy(recipe, device)
        if not is_warmed_up:  # else the folder has been verified
            check_base(recipe, policy, state, accelerator)
        load_adapter(policy, folder / "adapter")
    check_low_bit(recipe, policy)
    return shard_policy(
        policy, accelerator, shard_size=recipe.shard_size, lora=recipe.lora, timeout=recipe.limits.collective_timeout
    )


@collective
def digest_of_base(recipe: AnyRecipe, policy: Policy, accelerator: Accelerator) -> str | None:
    """Return the digest of the recipe's model, to which its adapters belong; None without adapters. `policy` is the
    model as `build_policy` made it.

    Raises:
        ValueError: The function that is the model, or the script that made it, made others in other processes.
    """
    if recipe.lora is None and (isinstance(recipe.model, str) or accelerator.num_processes == 1):
        return None
    digest = digest_of_policy("model", recipe.model, policy, accelerator)
    return None if recipe.lora is None else digest


@collective
def digest_of_policy(setting: str, model: Any, policy: Policy, accelerator: Accelerator) -> str:
    """Return a digest of weights, config and tokenizer of what `build_policy` has made of a setting's `model`.

    Raises:
        ValueError: It has made another policy in another process.
    """
    if isinstance(model, str):  # the files: their digest is the same on every device and in every dtype
        return from_main(partial(digest_of_checkpoint, checkpoint_folder(model)), accelerator)
    digest = fingerprint(policy)
    check_same({setting: f"weights, config and tokenizer of the digest {digest}"}, accelerator)
    return digest


@collective
def check_base(recipe: AnyRecipe, policy: Policy, state: TrainingState, accelerator: Accelerator) -> None:
    """Raise ValueError if the recipe's model is not the one on which the checkpoint's adapters were trained."""
    if digest_of_base(recipe, policy, accelerator) != state.base:
        model = f" {recipe.model!r}" if isinstance(recipe.model, str) else ""
        raise ValueError(
            f"model{model}: its weights, config or tokenizer are not those on which this run's adapters were trained; "
            "put those back, or start a new run"
        )


def build_policy(recipe: AnyRecipe, device: torch.device) -> Policy:
    """Load or build the recipe's `model`: load a checkpoint, copy a policy, or call a function."""
    if isinstance(recipe.model, str):
        load_options: dict[str, Any] = {"dtype": recipe.dtype, "quantization": recipe.base_quantization}
        policy: Policy = load_policy(recipe.model, device=device, **load_options)
    elif isinstance(recipe.model, Policy):
        policy = copied(recipe.model).to(device)  # the caller's policy stays unchanged
    else:
        policy = call_model_function(recipe.model, recipe.seed).to(device)
    check_no_adapters(policy, "lora")
    check_weights(policy.module)
    check_vocab_size(policy)
    policy.weights_version = 0  # of this run: a policy may come from another one
    policy.module.eval()  # as in rollouts: dropout would change the log-probs that a ratio compares
    return apply_compute_settings(recipe, policy)


def check_no_adapters(policy: Policy, setting: str) -> None:
    """Raise ValueError for a policy with adapters, which a checkpoint would mix with those of the run's `setting`."""
    if policy.lora is not None:
        raise ValueError(
            f"model has adapters of rank {policy.lora.r} already; merge them first, "
            f"dllm_rl.models.merge.merge_lora(policy), and give {setting} to train new ones"
        )


def check_vocab_size(policy: Policy) -> None:
    """Raise ValueError for a policy whose module was resized after the policy was made."""
    size = getattr(getattr(policy.module, "config", None), "vocab_size", None)
    if policy.spec.vocab_size is None and size not in (None, policy.vocab_size):
        raise ValueError(
            f"model has {size} tokens since its embeddings were resized, and its policy {policy.vocab_size}: give "
            "make_policy(policy.module, policy.tokenizer)"
        )


def call_model_function(model: Callable[..., Policy], seed: int, *, dry_run: bool = False) -> Policy:
    """Call the function that is a recipe's `model`. It gets the keywords `seed` and `dry_run` if it accepts them.

    A function that also trains its policy should accept `dry_run`: it is True if only the shapes of the weights matter.
    """
    parameters = inspect.signature(model).parameters
    keywords = {"seed": seed, "dry_run": dry_run}
    with process_restored():
        return model(**{name: value for name, value in keywords.items() if name in parameters})


def apply_compute_settings(recipe: AnyRecipe, policy: Policy) -> Policy:
    """Set the recipe's compute settings (checkpointing, compiled blocks) on the policy and return it.

    Raises:
        ValueError: The policy does not support a setting, or the setting is only for a checkpoint that is loaded.
    """
    if not isinstance(recipe.model, str):
        check_given_weights(recipe, policy)
    policy.gradient_checkpointing = recipe.gradient_checkpointing
    for setting in ("gradient_checkpointing", "torch_compile"):
        if getattr(recipe, setting):
            blocks_of(policy.module, setting)  # raises ValueError if the module has none
            if policy.spec.attention == "encoder_decoder":  # a block that runs again would write its cache twice
                raise ValueError(
                    f"{setting}=True cannot be combined with the cache of {policy.spec.name!r}; leave it off"
                )
    return policy


def check_given_weights(recipe: AnyRecipe, policy: Policy) -> None:
    """Raise ValueError for a setting that acts while a checkpoint is loaded, if `model` is a policy or a function."""
    if recipe.base_quantization is not None:
        raise ValueError(
            f"base_quantization={recipe.base_quantization!r} quantizes a checkpoint while it is loaded, and model is "
            "not its folder or id: leave base_quantization out, or give the checkpoint as model"
        )
    dtype = str(next(policy.module.parameters()).dtype).removeprefix("torch.")
    teacher = recipe.teacher
    is_of_teacher = teacher is not None and isinstance(teacher.model, str) and not teacher.is_reference
    if recipe.dtype not in (Recipe.dtype, "auto", dtype) and not is_of_teacher:
        raise ValueError(
            f"dtype={recipe.dtype!r} is for a checkpoint that is loaded, and the weights of this model are in {dtype}: "
            f"cast them before, policy.module.to(torch.{recipe.dtype}), or leave dtype out"
        )


def check_low_bit(recipe: AnyRecipe, policy: Policy) -> None:
    """Raise ValueError for a setting that the learner's bitsandbytes weights, also of a given model, rule out."""
    if any(map(is_bitsandbytes, policy.module.modules())):
        for is_wrong, message in recipe.low_bit_conflicts("a base in bitsandbytes' 4 or 8 bits"):
            if is_wrong:
                raise ValueError(message)


def load_from_run_folder(recipe: AnyRecipe, folder: Path, dtype: torch.dtype, device: torch.device) -> Policy:
    """Load the policy from a folder of this run. If only `load_weights` opens the folder, the recipe builds the policy
    first, with its own spec. The weights of a policy in memory may have several dtypes, which they keep.
    """
    # A folder of this run was verified when the run's folder was opened, or it was written after that.
    if not has_known_family(folder):
        policy = build_policy(recipe, device)
        load_weights(policy, folder, verify_checkpoint="quick")
        return policy
    dtypes = {}
    if isinstance(recipe.model, Policy):
        dtypes = {name: weight.dtype for name, weight in recipe.model.module.named_parameters()}
    has_several = len(set(dtypes.values())) > 1
    policy = load_policy(
        folder, dtype=torch.float32 if has_several else dtype, device=device, verify_checkpoint="quick"
    )
    for name, weight in policy.module.named_parameters() if has_several else ():
        weight.data = weight.data.to(dtypes[name])
    return apply_compute_settings(recipe, policy)


def freeze(model: Any, policy: Policy, names: list[str]) -> None:
    """Freeze exactly the weights with these names, as in the run that is resumed. `model` is the recipe's.

    Raises:
        ValueError: Other weights of the recipe's policy are frozen: the optimizer's state would not fit.
    """
    if isinstance(model, Policy) and (changed_names := set(frozen_names(model.module)) ^ set(names)):
        name = min(changed_names)
        raise ValueError(
            f"requires_grad of {name!r} is {name in names} in this model, and was {name not in names} in the run that "
            "is resumed; set it as it was, or start a new run"
        )
    for name, weight in policy.module.named_parameters():
        if name in names:
            weight.requires_grad_(False)


def make_optimizer(recipe: AnyRecipe, policy: Policy) -> torch.optim.Optimizer:
    """Make the recipe's optimizer of the policy's trainable parameters."""
    trainable = trainable_parameters(policy.module)
    named = [(name, parameter) for name, parameter in policy.module.named_parameters() if parameter.requires_grad]
    optimizer = recipe.optim(named, lr=recipe.learning_rate)
    keep_rate_ratios(optimizer, recipe.learning_rate)
    # Some optimizers write weights in ways that autograd does not count, and an aligned forward quantizes the weights
    # anew when their counts change.
    optimizer.register_step_post_hook(lambda *_: torch.autograd.graph.increment_version(trainable))
    return optimizer


def reference_policy(recipe: Recipe, policy: Policy, accelerator: Accelerator, *, fresh: bool) -> Policy | None:
    """Return the frozen policy that RL started from, or None if the recipe does not need it.

    Args:
        recipe: Settings of the run.
        policy: The learner.
        accelerator: The processes.
        fresh: Whether the run is new: the learner then still has the reference's weights. A resumed run reads them from
            its folder.
    """
    if not recipe.needs_reference_policy:
        return None
    if recipe.lora is not None:
        return policy.reference()  # the learner without its adapters, so there is no second copy
    folder = Path(recipe.directory) / "reference"
    if fresh and sharding_of(policy.module) is None:
        reference = copied(policy)
    else:
        dtype = next(policy.module.parameters()).dtype
        device = loading_device(recipe.shard_size, accelerator)
        reference = shard_policy(
            load_from_run_folder(recipe, folder, dtype, device),
            accelerator,
            shard_size=recipe.shard_size,
            lora=None,
            timeout=recipe.limits.collective_timeout,
        )
    reference.module.requires_grad_(False)  # the loss has no gradient with respect to it
    return reference


@collective
def save_reference(directory: Path, policy: Policy, accelerator: Accelerator) -> str:
    """Write the weights that RL starts from to the run's directory, atomically; return the digest of their manifest."""
    full_policy = gather_on_main(policy, accelerator)

    def write() -> str:
        with replacing(directory / "reference") as temporary_folder:
            full_policy.save_pretrained(temporary_folder)
            return manifest.write(temporary_folder, step=None, processes=accelerator.num_processes, versions=versions())

    return from_main(write, accelerator)


class RolloutCopy(RolloutEngine):
    """The engine of a recipe without `rollout_engine`: it samples in this process, from a copy of the learner.

    Args:
        recipe: Settings of the run.
    """

    recipe: Recipe

    def load(self, learner: Policy) -> Policy:
        """Make the policy that samples: a quantized copy of the learner. Without a quantization scheme it is the
        learner itself, or a full copy of a sharded learner.
        """
        recipe = self.recipe
        scheme = recipe.rollout_quantization
        if scheme is None:
            return learner if sharding_of(learner.module) is None else quantized_copy(learner, None)
        return quantized_copy(learner, scheme, dtype=torch.bfloat16 if recipe.bf16 else None)

    sync = staticmethod(sync_weights)  # type: ignore[assignment]  # it names its parameters differently


def teacher_policy(recipe: Recipe, policy: Policy, accelerator: Accelerator) -> Policy | None:
    """Return the recipe's teacher, frozen; None without a teacher, or if the teacher is the run's reference.

    Raises:
        ValueError: The teacher cannot score this student's completions.
    """
    if recipe.teacher is None or recipe.teacher.is_reference:
        return None
    teacher_settings: dict[str, Any] = {"model": recipe.teacher.model, "base_quantization": None}
    if not isinstance(recipe.teacher.model, str):  # its weights have their dtype
        teacher_settings["dtype"] = "auto"
    teacher = build_policy(replace(recipe, **teacher_settings), accelerator.device)
    check_teacher(policy, teacher)
    teacher.module.requires_grad_(False)
    return teacher


@collective
def digest_of_teacher(
    recipe: Recipe, teacher: Policy | None, saved_state: TrainingState | None, accelerator: Accelerator
) -> str | None:
    """Return the digest of the teacher; None without one.

    Raises:
        ValueError: The run that is resumed, whose state is `saved_state`, had another teacher.
    """
    digest = None
    if recipe.teacher is not None and teacher is not None:
        digest = digest_of_policy("teacher", recipe.teacher.model, teacher, accelerator)
    if (
        saved_state is not None
        and digest != saved_state.teacher
        and "teacher" not in allowed_changes(recipe.settings())
    ):
        raise ValueError(
            "teacher: its weights, config or tokenizer are not those of the run that is resumed; put those back, or "
            f"resume with {as_written(allow_changed='teacher')}"
        )
    return digest


def check_teacher(policy: Policy, teacher: Policy) -> None:
    """Raise ValueError if the teacher's vocabulary or kind of attention differs from the student's."""
    student_spec, teacher_spec = policy.spec, teacher.spec
    if teacher_spec.attention != student_spec.attention:
        raise ValueError(
            f"teacher ({teacher_spec.name}) has {teacher_spec.attention} attention and the student "
            f"({student_spec.name}) {student_spec.attention} attention: it cannot score the student's steps; give a "
            "teacher with the student's kind of attention"
        )
    vocabularies = [model.tokenizer.get_vocab() for model in (policy, teacher) if hasattr(model.tokenizer, "get_vocab")]
    same_vocabulary = len(vocabularies) < 2 or vocabularies[0] == vocabularies[1]
    if not same_vocabulary or (teacher.vocab_size, teacher_spec.mask_id) != (policy.vocab_size, student_spec.mask_id):
        raise ValueError(
            f"teacher ({teacher_spec.name}, {teacher.vocab_size} tokens, mask {teacher_spec.mask_id}) has another "
            f"vocabulary than the student ({student_spec.name}, {policy.vocab_size} tokens, "
            f"mask {student_spec.mask_id}), and the same ids would be other words; give a teacher with the "
            "student's tokenizer"
        )
