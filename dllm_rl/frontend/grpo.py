"""GRPO in one call: a model, a data set and reward functions."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from dllm_rl.algorithms.losses import FixedLengthMean
from dllm_rl.callbacks import Callback
from dllm_rl.frontend.trl_names import DR_GRPO, with_trl_names
from dllm_rl.groups import with_groups
from dllm_rl.likelihoods.estimators import Causal, LikelihoodEstimator, Trajectory
from dllm_rl.models.base import FamilySpec, Policy, Tokenizer
from dllm_rl.models.checkpoint.families import find_family
from dllm_rl.models.checkpoint.loading import load_config, num_parameters
from dllm_rl.models.lora import is_stacked
from dllm_rl.models.policy import make_policy
from dllm_rl.presets import LARGE_MODEL, find_preset, preset_by_size, print_preset
from dllm_rl.quantization.schemes import Float8ByGPU
from dllm_rl.recipe import Recipe
from dllm_rl.records import fit
from dllm_rl.samplers import Sampler, decodes_in_engine, settings_for
from dllm_rl.samplers.autoregress import Autoregress
from dllm_rl.samplers.renoise import Renoise
from dllm_rl.samplers.rules import SoftThreshold
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.screen import printing_anything
from dllm_rl.tasks.base import Problem, Task
from dllm_rl.tasks.datasets import DatasetTask, RewardFunction, Source, dataset_task, in_memory, training_and_held_out
from dllm_rl.training.policies import call_model_function
from dllm_rl.training.summary import Summary
from dllm_rl.training.trainer import train

MAX_EXACT_STEPS = 3  # samplers of at most this many denoising steps are scored exactly
MAX_SEGMENTS = 8  # largest number of segments for samplers of more steps
# Settings with which no quantized copy samples, or which cannot be compiled.
NO_FAST_COPY = {"rollout_engine", "late", "zero_mismatch"}
TOKENS_PER_STEP = 2  # default for a model with a preset, as in LLaDA's papers


@printing_anything()
def grpo(
    model: str | nn.Module | Policy | Callable[..., Policy],
    train_dataset: Any,
    reward_funcs: RewardFunction | Sequence[RewardFunction] | None = None,
    **settings: Any,
) -> Summary:
    """Train a model with TRL-style reward functions and return the run's summary.

    Use it for a model, a data set and reward functions; use `train` for a recipe that you wrote yourself. Print the
    recipe of `grpo_recipe`, which has the same arguments, to see every setting.

        grpo("GSAI-ML/LLaDA-8B-Instruct", rows, [correct, short], reward_weights=[1.0, 0.1])
        grpo("GSAI-ML/LLaDA-8B-Instruct", Sudoku(split="train"), eval_dataset=Sudoku(split="test", size=256))

    A model of a billion parameters or more uses a preset (`dllm_rl.presets`), whose name and settings are printed; the
    defaults suit small models. `grpo` reads no options of the command line, such as the `--resume_from_checkpoint` that
    slurm.sh adds: write `main(grpo_recipe(...))`, which does, or pass resume_from_checkpoint="latest".

    Args:
        model: A checkpoint's folder, a hub id, a transformers model, a policy, or a function that makes one.
        train_dataset: Rows with a `prompt`; the other columns are passed to the reward functions. Or a task, which has
            its own grader.
        reward_funcs: One reward function or several; None (default) for a task.
        settings: The other arguments of `grpo_recipe`.

    Returns:
        The content of summary.json, with the trained policy as its attribute `policy`.

    Raises:
        ValueError: A setting is unknown, or the recipe cannot run. It is raised before any training.
    """
    return train(grpo_recipe(model, train_dataset, reward_funcs, **settings))


@contextmanager
def name_field_in_error(field: str) -> Iterator[None]:
    """Put the name of an argument before the message of a ValueError that the block raises."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None


def tasks_with_graders(task: Task, eval_task: Any, given: Mapping[str, Any]) -> tuple[Task, Task]:
    """Return a task and its held-out one.

    Raises:
        ValueError: There is no held-out task, or one of the arguments `given` is for rows.
    """
    if for_rows := [name for name, value in given.items() if value is not None]:
        raise ValueError(
            f"{for_rows[0]} is for rows, and train_dataset={task.name!r} is a task with its own grader; leave it out"
        )
    if not isinstance(eval_task, Task):
        raise ValueError(
            f"eval_dataset={'None' if eval_task is None else type(eval_task).__name__}: the task {task.name!r} needs a "
            "held-out task, such as Sudoku(split='test', size=256)"
        )
    return task, eval_task


def with_paid_rewards(reward_funcs: Any, settings: dict[str, Any]) -> Any:
    """Return the reward functions for held-out rows, and add to the settings what a paid one, an `Oracle`, needs: it is
    a callback, too, and has a method `without_calls`.
    """
    functions: Any = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    paid = [each for each in functions if isinstance(each, Callback) and hasattr(each, "without_calls")]
    if not paid:
        return reward_funcs
    if len(paid) > 1:
        raise ValueError(f"reward_funcs: a run takes one {type(paid[0]).__name__}; wrap one function")
    given_callbacks = settings.get("callbacks", ())
    settings["callbacks"] = [*given_callbacks, *(each for each in paid if each not in given_callbacks)]
    # The timeout would limit all calls of a step together; a repeated step may sample other texts, paid for again.
    for group, name, value in (("limits", "reward_timeout", None), ("saves", "steps", 1)):
        given = settings.get(group, {})
        if isinstance(given, dict):
            settings[group] = {name: value, **given}
    return [each.without_calls() if each in paid else each for each in functions]


@with_trl_names
def grpo_recipe(  # noqa: PLR0913
    model: str | nn.Module | Policy | Callable[..., Policy],
    train_dataset: Any,
    reward_funcs: RewardFunction | Sequence[RewardFunction] | None = None,
    *,
    processing_class: Tokenizer = None,
    eval_dataset: Any = None,
    eval_split: float | None = None,
    reward_weights: Sequence[float] | None = None,
    max_new_tokens: int | None = None,
    blank: str | None = None,
    temperature: float | None = None,
    sampler_options: dict[str, Any] | None = None,
    max_rows: int | None = None,
    preset: str | None = None,
    **settings: Any,
) -> Recipe:
    """Make the recipe of `grpo`, with the sampler and the likelihood that the model's attention needs.

    Call it to print or to change the recipe before you pass it to `train`. TRL's names are accepted if they mean the
    same (docs/trl.md). A sampler of at most 3 steps is scored exactly, and so is the commit rule `SoftThreshold`; a
    sampler of more steps is scored in one segment for every four steps, at least 2 and at most 8. For a block-causal
    model the steps of one block count, and one forward scores all blocks.

    Args:
        model: A checkpoint's folder, a hub id, a transformers model, a policy, or a function that makes one and may
            take the seed.
        train_dataset: Rows with a `prompt` (text or chat messages); the other columns are passed to the reward
            functions. Or a task (`dllm_rl.tasks`, or one of your own), which has its own grader.
        reward_funcs: One function or several, f(prompts=, completions=, **columns) -> numbers or None, sync or async.
            Each is logged as rewards/NAME/mean. None (default) for a task.
        processing_class: Tokenizer of a transformers model. Training copies the model.
        eval_dataset: Held-out rows, or a task for a task. None (default): the last rows of `train_dataset`.
        eval_split: Held-out part of `train_dataset`: a share below 1, or a number of rows. None (default): a tenth, at
            most 256 rows.
        reward_weights: One weight per reward function, each 1 by default. With advantages=Decoupled(), each reward is
            normalized before it is weighted.
        max_new_tokens: Length of a completion, in tokens. None (default): 256, or 0 if the prompts have blanks.
        blank: For infilling: a text of which each occurrence in a prompt is one token to fill in. A column `blank`
            gives a row its own. The reward functions receive the filled text. None (default): no infilling.
        temperature: Temperature of the sampler. Default: 1, or the preset's. `Renoise` has t_max and t_min instead.
        sampler_options: Fields of `Unmask`, `Autoregress` or `Renoise`, such as diffusion_steps (unmasking steps, by
            default one per token) or top_p. Its max_new_tokens and temperature override the arguments of these names.
            A `sampler` among the settings has its own fields instead. `eval_sampler` is by default the sampler at
            temperature 0.
        max_rows: Number of rows to read of a data set without a length, such as a streamed one.
        preset: Name of the preset (`dllm_rl.presets`) whose settings replace the defaults. "large": that of large
            models with this model's attention; "d1": that of d1's paper; "none": no preset. None (default): "large"
            from a billion parameters on, and otherwise "none".
        settings: Fields of Recipe: num_steps (RL steps), learning_rate, lora, rollout_quantization, corrector ...

    Returns:
        The recipe, with `train_dataset` as its task and the held-out rows as its evaluation task.

    Raises:
        ValueError: The data set has too few rows, or a setting is unknown.
    """
    model = wrap_model(model, processing_class)
    if callable(train_dataset):
        raise ValueError("train_dataset is a function; the argument order is grpo(model, train_dataset, reward_funcs)")
    name = settings.pop("name", None)
    if isinstance(train_dataset, Task):
        given = {"reward_funcs": reward_funcs, "eval_split": eval_split, "reward_weights": reward_weights}
        task, eval_task = tasks_with_graders(
            train_dataset, eval_dataset, given | {"blank": blank, "max_rows": max_rows}
        )
        name = name or (f"{Path(model).name.lower()}-{task.name}" if isinstance(model, str) else task.name)
    else:
        if reward_funcs is None:
            raise ValueError("reward_funcs=None: rows need a reward function; give one, or a task as train_dataset")
        rows = in_memory(train_dataset, max_rows, name="train_dataset")
        eval_rows = None if eval_dataset is None else in_memory(eval_dataset, max_rows, name="eval_dataset")
        training_rows, held_out_rows = training_and_held_out(rows, eval_rows, eval_split, name="train_dataset")
        held_out = (
            Source("train_dataset", len(rows) - len(held_out_rows)) if eval_rows is None else Source("eval_dataset")
        )
        make_task = partial(dataset_task, weights=reward_weights, blank=blank)
        eval_functions = with_paid_rewards(reward_funcs, settings)
        name = name or (Path(model).name.lower() if isinstance(model, str) else "grpo")
        task = make_task(training_rows, reward_funcs, name=name, source=Source("train_dataset"))
        eval_task = make_task(held_out_rows, eval_functions, name=f"{name}-held-out", source=held_out)
    if isinstance(model, str):
        config = load_config(model)  # only the config, not the weights
        spec: FamilySpec = find_family(config)
        block_size = config.get("block_size") or spec.block_size
        path_or_policy: str | Policy = model
        has_experts = any("experts" in name for name in config)
    else:
        seed = settings.get("seed", Recipe.seed)
        path_or_policy = model if isinstance(model, Policy) else call_model_function(model, seed)
        spec = path_or_policy.spec
        block_size = spec.block_size
        has_experts = any(map(is_stacked, path_or_policy.module.modules()))
    attention = spec.attention
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    options = {field: value for field, value in options.items() if value is not None} | (sampler_options or {})
    if "sampler" in settings:
        settings["sampler"] = given = fit("sampler", Sampler, settings["sampler"], None)
        for field, value in options.items():
            if getattr(given, field, None) != value:
                raise ValueError(
                    f"{field}={value!r} is not what sampler={type(given).__name__} has: set it there, or leave it out"
                )
        options = {"max_new_tokens": given.max_new_tokens}
    blanks = most_blanks(task, is_given="max_new_tokens" in options)
    if blanks and attention == "causal":
        raise ValueError(
            "blank: a causal model appends tokens and cannot fill in blanks; leave blank out, or give a diffusion model"
        )
    options.setdefault("max_new_tokens", 0 if blanks else 256)
    if preset in (None, "large"):  # the latter is the preset of large models for a small one, too
        preset = preset_by_size(attention, LARGE_MODEL if preset else num_parameters(path_or_policy))
    if preset == "large" and not has_experts:
        settings = fast_rollouts(options, settings) | settings
    if preset not in (None, "none"):
        options, settings = apply_preset(preset, task.name, options, settings, is_path=isinstance(model, str))
    options.setdefault("temperature", 1.0)
    sampler_class: type[Sampler]
    if attention == "causal":  # an autoregressive model
        sampler_class = Autoregress
    elif attention == "encoder_decoder":  # a model whose noise is random tokens
        if (given_temperature := options.pop("temperature")) != 1.0:
            raise ValueError(
                f"temperature={given_temperature}: Renoise has t_max and t_min instead; set them in sampler_options"
            )
        sampler_class = Renoise
        options = {"answer": "drawn", **options}
    else:
        sampler_class = Unmask
    given_sampler = settings.get("sampler")
    # A given sampler may also be one that decodes in an engine.
    if isinstance(given_sampler, Unmask | Autoregress) and sampler_class is not Renoise:
        options = settings_for(sampler_class, given_sampler)
    with name_field_in_error("sampler_options"):
        sampler = sampler_class(**options)
    used_sampler = settings.get("sampler", sampler)  # the caller's sampler replaces this one
    if settings.get("rollout_engine"):  # it computes whole rows, and not the blocks of one text in a row
        block_size = None
    # Evaluations of the learner run in this process, where the sampler of an engine that decodes by itself cannot.
    is_of_engine = settings.get("rollout_engine") and decodes_in_engine(used_sampler)
    if settings.get("loss_reduction") is DR_GRPO:
        settings["loss_reduction"] = FixedLengthMean(length=used_sampler.max_new_tokens + blanks)
    fields: dict[str, Any] = {
        "name": name,
        "model": model,
        "task": task,
        "validation_task": eval_task,
        "eval_task": eval_task,
        "sampler": sampler,
        "eval_sampler": settings.get("eval_sampler") or greedy(sampler if is_of_engine else used_sampler),
        "likelihood": default_likelihood(spec, block_size, used_sampler, blanks),
    }
    return Recipe(**fields | with_groups(Recipe, settings, {}))


def greedy(sampler: Sampler) -> Sampler:
    """Return the sampler that evaluates what a sampler trains, or raise ValueError that names `eval_sampler`."""
    try:
        return sampler.greedy()
    except ValueError as error:
        raise ValueError(f"eval_sampler is not given, and {type(sampler).__name__} cannot be greedy: {error}") from None


def apply_preset(
    preset: str, task: str, options: dict[str, Any], settings: dict[str, Any], *, is_path: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Add the preset's sampler options and recipe fields to the caller's, which take precedence; print the preset.

    Returns:
        The sampler's options and the recipe's fields.
    """
    fields, keywords = find_preset(preset, task)
    if "micro_batch_size" in fields:  # a forward has room for one whole group, of the caller's size
        fields["micro_batch_size"] = settings.get("num_generations", fields["num_generations"])
    if not is_path:  # a loaded module has its dtype already
        fields = {field: value for field, value in fields.items() if field not in ("dtype", "base_quantization")}
    length = options["max_new_tokens"]
    block_size = options.get("block_size", keywords.get("block_size"))
    if keywords and length and "diffusion_steps" not in keywords:
        num_blocks = -(-length // (block_size or length))
        keywords["diffusion_steps"] = max(-(-length // TOKENS_PER_STEP), num_blocks)
    if "sampler" in settings:  # the caller's sampler replaces the preset's sampler
        keywords = {}
    settings = with_groups(Recipe, settings, fields)
    fields = {field: value for field, value in fields.items() if field not in settings}
    keywords = {keyword: value for keyword, value in keywords.items() if keyword not in options}
    print_preset(preset, fields | keywords)
    return keywords | options, fields | settings


def fast_rollouts(options: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe's fields for compiled rollouts in the format that suits the GPU, for a model without experts.

    Without a field that conflicts with the caller's sampler options and settings.
    """
    if any(settings.get(name) for name in NO_FAST_COPY):
        return {}
    compiles_steps = options.get("compile_step") or getattr(settings.get("sampler"), "compile_step", False)
    return {"rollout_quantization": Float8ByGPU(), "torch_compile": not compiles_steps}


def default_likelihood(
    spec: FamilySpec, block_size: int | None, sampler: Sampler, num_blanks: int = 0
) -> LikelihoodEstimator:
    """Return the likelihood for a model of this attention and block size, a sampler, and a number of blanks to fill."""
    length = sampler.max_new_tokens + num_blanks
    if spec.attention == "causal":
        return Causal()
    if spec.attention == "encoder_decoder":
        return Trajectory()
    if not isinstance(sampler, Unmask):
        return Trajectory(num_segments=segments_for(length))
    has_model_blocks = block_size is not None and sampler.block_size in (None, block_size)
    if spec.attention != "block_causal" or spec.shift or block_size is None or not has_model_blocks:
        return Trajectory(num_segments=segments_of(sampler, length))
    # One forward scores the same step of every block, so the steps of one block count.
    steps = sampler.diffusion_steps
    if steps:
        steps = max(1, steps * block_size // max(length, 1))
    block_sampler = sampler.replace(diffusion_steps=steps)
    return Trajectory(block_size=block_size, num_segments=segments_of(block_sampler, block_size))


def segments_of(sampler: Unmask, length: int) -> int | None:
    """Return the `num_segments` of `Trajectory` for a sampler that writes `length` tokens; None scores every step."""
    if isinstance(sampler.commit, SoftThreshold) or sampler.commit.revises:
        return None  # steps cannot be merged: a set of positions, or a rewritten token, belongs to one step
    if sampler.commit.adaptive or not sampler.diffusion_steps:
        return segments_for(length)  # at most one step per token
    return segments_for(sampler.diffusion_steps)


def most_blanks(task: Task, *, is_given: bool) -> int:
    """Return the largest number of blanks in a row's prompt; 0 for a task without infilling.

    Raises ValueError for a row without a blank beside a blank's setting, unless max_new_tokens `is_given`: it says how
    many tokens are appended to every row.
    """
    if not isinstance(task, DatasetTask):
        if not getattr(task, "infill", False):
            return 0
    elif task.blank is None and "blank" not in getattr(task.dataset, "column_names", ("blank",)):
        return 0
    problems = [task[index] for index in range(len(task))]
    counts = list(map(num_blanks, problems))
    if not is_given and any(problem.blank is not None for problem in problems) and 0 in counts:
        index = counts.index(0)
        raise ValueError(
            f"train_dataset: the prompt of row {index} has no blank {problems[index].blank!r}, so that it has no token "
            "to fill in: correct the row or blank, or give max_new_tokens, the number of tokens to append to every row"
        )
    return max(counts)


def num_blanks(problem: Problem) -> int:
    """Return the number of tokens to fill in in a problem's prompt."""
    if problem.blank is None:
        return 0
    texts = [problem.prompt] if isinstance(problem.prompt, str) else [turn["content"] for turn in problem.prompt]
    return sum(text.count(problem.blank) for text in texts if isinstance(text, str))


def segments_for(steps: int) -> int | None:
    """Return the number of segments that score a sampler of so many steps; None if every step is scored."""
    # A segment's forward and backward cost as much as three steps of the rollout. With samplers of four and of eight
    # steps, on two tasks and in equal time, a run that scored two segments learned more than a run that scored every
    # step (recipes/studies/likelihoods/README.md).
    return None if steps <= MAX_EXACT_STEPS else max(2, min(MAX_SEGMENTS, steps // 4))


def wrap_model(model: Any, tokenizer: Tokenizer) -> str | Policy | Callable[..., Policy]:
    """Return the value of a recipe's `model`: a transformers model and its tokenizer are wrapped as a policy.

    Raises:
        ValueError: A transformers model without a tokenizer, or a tokenizer for another kind of model.
    """
    kind = type(model).__name__
    if not isinstance(model, str | Path | nn.Module | Policy) and not callable(model):
        raise ValueError(
            f"model={model!r} is not one of these: a checkpoint's folder, a hub id, a transformers model, a policy, or "
            "a function that makes one"
        )
    if isinstance(model, nn.Module) and not isinstance(model, Policy):
        if tokenizer is None:
            raise ValueError(f"processing_class=None: a loaded {kind} needs its tokenizer; pass it as processing_class")
        return make_policy(model, tokenizer)
    if tokenizer is not None:
        raise ValueError(
            f"processing_class is for a loaded transformers model, and this one is of type {kind}; leave it out"
        )
    return str(model) if isinstance(model, Path) else model
