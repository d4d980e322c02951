"""A recipe that runs in a second: what the tests of the loop start from."""

from dataclasses import replace
from functools import partial

from dllm_rl.algorithms.correctors import AIS
from dllm_rl.groups import Log, nested, with_groups
from dllm_rl.likelihoods.estimators import Causal
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.samplers.autoregress import Autoregress
from dllm_rl.samplers.rules import Confidence
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.tasks.sudoku import Sudoku
from recipes.sudoku_unique import recipe as main_job

SIZES = {"characters": "1234.=", "hidden_size": 32, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
MOE_SIZES = {name: size for name, size in SIZES.items() if name != "intermediate_size"}
MOE_SIZES |= {"num_layers": 2, "moe_intermediate_size": 32}

# For a test that does not look at evaluations, which take a seventh of a run of two steps.
ONE_PUZZLE = {"validation_task": Sudoku(split="validation", size=1), "eval_task": Sudoku(split="test", size=1)}


def with_changes(base, **changes):
    """A recipe with other settings. Those of groups have flat names here, as in `grpo`, so that dictionaries of changes
    merge: `save_steps` for `saves.steps` (`Recipe.GROUPED` has them all)."""
    return replace(base, **with_groups(type(base), nested(type(base), changes, base.GROUPED), vars(base)))


def made_of(kind, **settings):
    """A `Recipe` or `SFT` of settings of which those of groups have flat names."""
    return kind(**with_groups(kind, nested(kind, settings, kind.GROUPED), {}))


def tiny_recipe(directory, **changes):
    """Two steps of four prompts with four completions each, on an untrained model: rewards are dense and varied. No
    tables of completions, and no tracker, which cost a twelfth of such a run."""
    base = with_changes(
        main_job,
        name="tiny",
        model=partial(tiny_masked_lm, **SIZES),
        validation_task=Sudoku(split="validation", size=8),
        eval_task=Sudoku(split="test", size=8),
        sampler=Unmask(max_new_tokens=16, diffusion_steps=3, temperature=1.0, rank=Confidence()),
        eval_sampler=Unmask(max_new_tokens=16, diffusion_steps=1, rank=Confidence()),
        corrector=AIS(),  # sudoku_unique takes none
        train_batch_size=4,
        num_generations=4,
        num_steps=2,
        sft_warmup_steps=0,
        log=Log(report_to=None, completions_steps=0),
        output_dir=str(directory),
    )
    return with_changes(base, **changes)


def tiny_recipe_ar(directory, **changes):
    return tiny_recipe(
        directory,
        model=partial(tiny_llama, causal=True, **SIZES),
        sampler=Autoregress(max_new_tokens=16, temperature=1.0),
        eval_sampler=Autoregress(max_new_tokens=16, temperature=0.0),
        likelihood=Causal(),
        **changes,
    )


class Wrapped:
    """Another task's problems; a subclass grades them."""

    name, version = "wrapped", "1"

    def __init__(self, task):
        self.task = task

    def __len__(self):
        return len(self.task)

    def __getitem__(self, index):
        return self.task[index]


class OddPuzzles:
    """Sudoku, but only every other prompt tells completions apart: the rest are all worth 1."""

    name, version = "odd", "1"

    def __init__(self):
        self.task = Sudoku(split="train", size=64)

    def __len__(self):
        return len(self.task)

    def __getitem__(self, index):
        problem = self.task[index]
        prompt = problem.prompt + "=" * (index % 5)  # so that a later draw is wider or narrower
        return replace(problem, prompt=prompt, fields={**problem.fields, "dull": index % 2 == 0})

    def reward(self, problem, completion):
        graded = self.task.reward(problem, completion)
        return replace(graded, value=1.0) if problem.fields["dull"] else graded
