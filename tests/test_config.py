"""Overrides by name: good ones, unknown fields, bad values; recipes as text."""

import inspect
import re
from dataclasses import fields, replace
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from repetitions import few
from tiny_recipe import tiny_recipe

from dllm_rl.algorithms import correctors
from dllm_rl.algorithms.advantages import decoupled
from dllm_rl.algorithms.losses import ppo_clip, sequence_mean
from dllm_rl.config import CHOICES, explained_by, from_command_line, override, paths, usage
from dllm_rl.likelihoods import estimators as likelihoods
from dllm_rl.members import describe, members
from dllm_rl.models.lora import Lora
from dllm_rl.quantization.schemes import int8_weight_only
from dllm_rl.recipe import Recipe
from dllm_rl.samplers.cache import dual_cache
from dllm_rl.samplers.rules import margin, schedule
from dllm_rl.supervised.recipe import SFT
from dllm_rl.tasks.sudoku import Sudoku
from dllm_rl.testing import make_stats
from dllm_rl.training.cautions import cautions
from recipes.studies.surrogates import gdsd
from recipes.sudoku_unique import __file__ as main_job_file


@pytest.fixture
def recipe(tmp_path):
    return tiny_recipe(tmp_path)


def test_scalars_at_every_depth(recipe):
    new = from_command_line(
        recipe,
        [
            *[
                "--num_steps",
                "7",
                "--learning_rate=1e-4",
                "--bf16",
                "--sampler.temperature",
                "0.5",
                "--task.clues",
                "8,9",
            ],
            *["--corrector", "tis", "--corrector.cap", "3", "--loss", "ppo_clip", "--loss.epsilon", "0.1"],
            *["--micro_batch_size", "8"],
            *["--output_dir", "x"],
        ],
    )
    assert (new.num_steps, new.learning_rate, new.bf16, new.micro_batch_size, new.output_dir) == (7, 1e-4, True, 8, "x")
    assert new.sampler.keywords == {**recipe.sampler.keywords, "temperature": 0.5}
    assert new.task.clues == (8, 9) and recipe.task.clues == (10, 12)
    assert new.corrector.weight_fn.keywords["cap"] == 3 and new.loss.keywords["epsilon"] == 0.1


def test_the_order_of_overrides_does_not_matter(recipe):
    words = ["--zero_mismatch", "--rollout_quantization", "none"]
    for arguments in (words, words[1:] + words[:1]):
        assert from_command_line(recipe, arguments).zero_mismatch
    assert from_command_line(recipe, ["--zero_mismatch", "false"]).zero_mismatch is False


def test_the_settings_of_a_task_are_checked_together(recipe):
    for words in (["--task.side=9", "--task.clues=30,40"], ["--task.clues=30,40", "--task.side=9"]):
        assert from_command_line(recipe, words).task == replace(recipe.task, side=9, clues=(30, 40))


def test_a_task_is_chosen_by_the_recipe_that_is_named(monkeypatch, capsys):
    script = Path(main_job_file).with_name("llada_8b_sudoku.py")
    monkeypatch.setattr("sys.argv", [str(script), "--task", "gsm8k"])
    with pytest.raises(SystemExit):
        from_command_line(import_module("recipes.llada_8b_sudoku").recipe)
    said = "error: --task 'gsm8k': a task is chosen by its recipe: llada_8b_gsm8k.py\n"
    assert capsys.readouterr().err == said


def test_what_functions_take_by_default_has_a_name_too(recipe):
    """A plain function's keywords, and those of one that was just picked."""
    changed = from_command_line(
        recipe,
        ["--advantages.scale_rewards", "none", "--lr_schedule.final", "0.5", "--lora", "lora_r16", "--lora.r", "4"],
    )
    assert changed.advantages(torch.tensor([[0.0, 4.0]])).tolist() == [[-2.0, 2.0]]
    assert changed.lr_schedule(10, 10) == pytest.approx(0.5) and changed.lora() == Lora(r=4)
    assert describe(changed.advantages) == "group_relative(scale_rewards='none', eps=0.0001)"
    assert changed.update_settings(0).learning_rate == pytest.approx(recipe.learning_rate * 0.2)


def test_a_name_that_may_be_left_out_is_left_out_by_none(recipe):
    assert from_command_line(recipe, ["--report_to", "none"]).trackers == []


def test_any_recipe_takes_a_checkpoint_for_its_model(recipe):
    assert from_command_line(recipe, ["--model", "runs/x/checkpoints/step-000180"]).model.endswith("step-000180")
    assert from_command_line(recipe, ["--model.hidden_size", "8"]).model.keywords["hidden_size"] == 8


def test_an_estimators_keywords_have_names(recipe):
    changed = from_command_line(recipe, ["--likelihood.num_segments", "2"])
    assert describe(changed.likelihood) == describe(likelihoods.trajectory(num_segments=2))
    assert not changed.likelihood.exact_for_sampler and recipe.likelihood.exact_for_sampler
    again = from_command_line(changed, ["--likelihood.num_segments", "none"])
    assert describe(again.likelihood) == describe(recipe.likelihood)


def test_the_keywords_of_an_estimator_that_is_picked_and_of_one_within_it(recipe):
    words = [["--likelihood", "sandwich"], ["--likelihood.mix", "0.25"], ["--likelihood.base", "elbo"]]
    words.append(["--likelihood.base.num_samples", "2"])
    for order in (words, words[::-1]):
        changed = from_command_line(recipe, [word for pair in order for word in pair])
        wanted = likelihoods.sandwich(mix=0.25, base=likelihoods.elbo(num_samples=2))
        assert describe(changed.likelihood) == describe(wanted)


def test_a_shorter_path_is_followed_first(recipe):
    # Otherwise the estimator that is picked would undo what was said of it before.
    changed = from_command_line(recipe, ["--likelihood.num_segments", "3", "--likelihood", "trajectory"])
    assert describe(changed.likelihood) == describe(likelihoods.trajectory(num_segments=3))


def test_an_estimators_parts_are_not_changed_one_by_one(recipe):
    # trajectory() says of itself that it replays the sampler; with fewer segments it would not.
    assert [path for path in paths(recipe) if path.startswith("likelihood.")] == [
        "likelihood.num_segments",
        "likelihood.block_size",
        "likelihood.include_order",
        "likelihood.num_sampled_steps",
        "likelihood.self_conditioning",
    ]
    mine = replace(recipe, likelihood=replace(recipe.likelihood, name="mine"))  # no function makes this one
    assert not [path for path in paths(mine) if path.startswith("likelihood.")]


def test_what_a_picked_function_needs_has_a_name_and_is_asked_for(recipe, capsys):
    rules = ["--sampler.commit", "threshold", "--sampler.commit.tau", "0.9"]
    changed = from_command_line(recipe, rules)
    assert describe(changed.sampler.keywords["commit"]) == "threshold(tau=0.9)"
    again = ["--sampler.commit", "remask", "--sampler.commit.eta", "0.1", "--sampler.rank", "random"]
    assert describe(from_command_line(recipe, again).sampler.keywords["commit"]) == "remask(eta=0.1)"
    assert describe(from_command_line(changed, [*rules[2:3], "0.8"]).sampler.keywords["commit"]) == "threshold(tau=0.8)"
    assert from_command_line(changed, ["--sampler.commit", "schedule"]).sampler.keywords["commit"] is schedule
    blocks = ["--likelihood", "block_elbo", "--likelihood.block_size", "4"]
    changed = from_command_line(recipe, blocks)
    assert describe(changed.likelihood) == describe(likelihoods.block_elbo(block_size=4))
    constant = from_command_line(
        recipe, ["--loss_reduction", "fixed_length_mean", "--loss_reduction.length", "16"]
    ).loss_reduction
    assert describe(constant.keywords) == "{'length': 16}"  # what the learner gives is not asked for
    for words, message in [
        (rules[:2], "--sampler.commit threshold needs --sampler.commit.tau\n"),
        (blocks[:2], "--likelihood block_elbo needs --likelihood.block_size\n"),
    ]:
        with pytest.raises(SystemExit) as stop:
            from_command_line(recipe, words)
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_caches_schemes_adapters_and_parts_of_a_composition(recipe):
    cached = from_command_line(recipe, ["--sampler.cache", "dual", "--sampler.cache.refresh", "4"])
    assert cached.sampler.keywords["cache"] == dual_cache(refresh=4)
    assert override(cached, {"sampler.cache": "none"}).sampler.keywords["cache"] is None
    grouped = ["--rollout_quantization", "int4_weight_only", "--rollout_quantization.group_size", "16"]
    assert from_command_line(recipe, grouped).rollout_quantization().granularity.group_size == 16
    fake = ["--rollout_quantization", "fake_quantize", "--rollout_quantization.weight", "int3"]
    assert from_command_line(recipe, fake).rollout_quantization().weight == "int3"
    adapted = replace(recipe, lora=partial(Lora, r=128))
    assert from_command_line(adapted, ["--lora.r", "8"]).lora() == Lora(r=8)
    assert from_command_line(adapted, ["--lora", "lora_r16"]).lora() == Lora(r=16)
    two = replace(recipe, corrector=correctors.compose(correctors.tis(), correctors.reject()))
    changed = from_command_line(two, ["--corrector.2.threshold", "0.1"])
    wanted = correctors.compose(correctors.tis(), correctors.reject(threshold=0.1))
    assert describe(changed.corrector) == describe(wanted)


def test_the_keywords_of_a_corrector_stand_below_its_name(recipe):
    """However a method is made: `qarl` is composed of `tbpo`, whose weights and whose objective have keywords."""

    def changed(start, *words):
        return describe(from_command_line(start, list(words)).corrector)

    picked = ["--corrector", "tis", "--corrector.cap", "2.5"]
    assert changed(recipe, *picked) == changed(recipe, *picked[2:], *picked[:2]) == describe(correctors.tis(cap=2.5))
    held = replace(recipe, corrector=correctors.tis(cap=3.0))
    assert changed(held, "--corrector.level", "sequence") == describe(correctors.tis(cap=3.0, level="sequence"))
    assert describe(held.corrector) == describe(correctors.tis(cap=3.0)), "the recipe's own stays as it is"
    words = ["--corrector", "tis", "--corrector.cap", "2.5"]
    weights, _, _ = from_command_line(recipe, words).corrector.weight_fn(
        make_stats(torch.full((1, 1), 9.0), torch.ones(1), torch.ones(1, 1, dtype=torch.bool))
    )
    assert weights.item() == 2.5, "min(exp(9), 2.5)"
    banded = from_command_line(
        recipe, ["--corrector", "qarl", "--corrector.max_weight", "3", "--corrector.neg_low", "0.1"]
    )
    assert describe(banded.corrector) == describe(correctors.qarl(max_weight=3.0, neg_low=0.1))
    assert banded.corrector.loss.keywords["neg_low"] == 0.1 and banded.corrector.align_forward
    for name, make in CHOICES["corrector"].items():
        keywords = inspect.signature(make).parameters
        below = {path for path in paths(make(), "corrector.") if path != "corrector.combine.tau"}
        assert below <= {f"corrector.{keyword}" for keyword in keywords} and len(below) == len(keywords), name


def test_the_choices_of_a_name_are_called_alike(recipe):
    """Whoever calls one of a row calls every other: they take the same positional arguments, or a row's are by name."""
    by_name = {"advantages", "rank", "base_rank", "commit", "loss"}  # what these take, they get by their names
    for name, known in CHOICES.items():
        assert known and all(inspect.isfunction(function) for function in known.values()), name
        kinds = [inspect.signature(function).parameters.values() for function in known.values()]
        positional = [[p.name for p in each if p.kind is not p.KEYWORD_ONLY] for each in kinds]
        assert name in by_name or all(names == positional[0] for names in positional), name


def test_a_keyword_that_says_a_word_is_no_choice_of_functions(recipe):
    """`loss_reduction` is a field that takes a function, `pool` a keyword of correctors that takes a word."""
    changed = from_command_line(recipe, ["--corrector", "tis", "--corrector.pool", "geometric"])
    assert describe(changed.corrector) == describe(correctors.tis(pool="geometric"))


def test_a_function_of_any_module_by_name(recipe):
    name = "recipes.studies.surrogates:gdsd"
    picked = from_command_line(recipe, ["--loss", name, "--loss.psi", "0.1"])
    assert picked.loss.func is gdsd and picked.loss.keywords == {"psi": 0.1}
    made = from_command_line(recipe, ["--corrector", "dllm_rl.algorithms.correctors:tis", "--corrector.cap", "4"])
    assert describe(made.corrector) == describe(correctors.tis(cap=4.0))
    ranked = from_command_line(recipe, ["--sampler.rank", "dllm_rl.samplers.rules:margin"])
    assert ranked.sampler.keywords["rank"] is margin


def test_functions_by_name(recipe):
    new = from_command_line(
        recipe,
        [
            *["--corrector", "none", "--likelihood", "one_step", "--loss_reduction", "sequence_mean", "--kl", "kl_k2"],
            *["--rollout_quantization", "int8_weight_only", "--advantages", "leave_one_out"],
            *["--sampler.rank", "max_prob"],
        ],
    )
    assert new.corrector == correctors.no_correction() and new.likelihood.name == "one_step"
    assert override(recipe, {"advantages": "decoupled"}).advantages is decoupled
    assert "row_mean" not in paths(recipe)["loss"].choices
    bounded = ["--loss", "cispo", "--loss.max_ratio", "3"]
    assert from_command_line(recipe, bounded).loss.keywords == {"max_ratio": 3.0}
    assert paths(override(recipe, {"corrector": "ais"}))["corrector.lambda_fn"].choices == ("ais_lambda",)
    assert new.loss_reduction is sequence_mean and new.rollout_quantization is int8_weight_only
    assert new.sampler.keywords["rank"].__name__ == "max_prob"
    assert override(recipe, {"rollout_quantization": "none"}).rollout_quantization is None
    assert override(recipe, {"micro_batch_size": "none"}).micro_batch_size is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rat", "1"], "the nearest is --learning_rate"),
        (["--sampler.temprature", "1"], "the nearest is --sampler.temperature"),
        (["--samper.temperature", "1"], "the nearest is --sampler.temperature"),
        (
            ["--learning_rate.x", "1"],
            "--learning_rate.x is not a field of the recipe; --learning_rate is 0.",
        ),
        (["--model.seed", "1"], "--model.seed is not a field of the recipe; the nearest is --model."),
        (["--task.side", "9"], "clues=(10, 12) must lie in 26..81 on 9x9"),
        (["--task.side", "9", "--task.clues", "20"], "clues=20 must lie in 26..81 on 9x9"),
        (["--task", "chess"], "--task 'chess': a task is chosen by its recipe's file"),
        (["--num_steps", "many"], "--num_steps 'many' is not a valid int"),
        (["--num_steps", "1.5"], "--num_steps '1.5' is not a valid int"),
        (["--learning_rate", "nan"], "--learning_rate 'nan' is not a valid float"),
        (["--learning_rate", "-1"], "learning_rate=-1.0 must be above 0"),
        (["--beta", "inf"], "--beta 'inf' is not a valid float"),
        (["--corrector", "tiss"], "the nearest is 'tis'"),
        (["--use_bias_correction_kl", "true"], "use_bias_correction_kl=True corrects a KL term, and beta=0 has none"),
        (["--corrector", "Corrector"], "is not known"),
        (["--rollout_quantization", "quantized_copy"], "is not known"),
        (["--bf16", "yes"], "--bf16 'yes' is not a valid bool"),
        (["--task.split", "tset"], "--task.split 'tset' is not known; the nearest is 'test'"),
        (["--dtype", "float8"], "(one of float32, bfloat16, float16, auto)"),
        (["--base_quantization", "nf"], "the nearest is 'nf4' (one of nf4, int8, none)"),
        (["--likelihood.num_segments", "0"], "num_segments=0 must be at least 1"),
        (["num_steps", "1"], "options are written --name value"),
        (["--loss", "nowhere.at_all:x"], "No module named 'nowhere'; give MODULE:FUNCTION"),
        (["--loss", ":x"], "--loss ':x': Empty module name"),
        (["--loss", "math:pi"], "module 'math' has no function 'pi'"),
        (
            ["--corrector", "dllm_rl.likelihoods.estimators:elbo"],
            "does not make a Corrector; give a function that returns one",
        ),
        (
            ["--corrector", "none", "--corrector.cap", "3"],
            "--corrector.cap is not a field of the recipe; --corrector is no_correction",
        ),
        (["--corrector", "tis", "--corrector.weight_fn.cap", "3"], "the nearest is --corrector.cap"),
        (["--corrector", "tis", "--corrector.cap", "0.5"], "cap=0.5 must be at least 1"),
        (["--corrector", "tis", "--corrector.level", "tokn"], "the nearest is 'token' (one of token, sequence)"),
        (["--kl", "ppo_clip"], "(one of kl_k1, kl_k2, kl_k3)"),
    ],
)
def test_what_is_refused_in_one_line(recipe, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        from_command_line(recipe, arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["name", "model", "output_dir", "resume_from_checkpoint"])
def test_an_empty_name_is_refused(recipe, name, capsys):
    with pytest.raises(ValueError, match=f"{name}='' is empty; give a name"):
        replace(recipe, **{name: ""})
    for arguments in ([f"--{name}", ""], [f"--{name}="]):
        with pytest.raises(SystemExit) as stopped:
            from_command_line(recipe, [*arguments, "--overwrite_output_dir"])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and f"{name}" in error and error.count("\n") == 1


def test_an_empty_path_of_a_task_is_refused_and_an_empty_text_is_not(recipe):
    known = replace(recipe, task=Sudoku(split="train", path="grids.txt"))
    with pytest.raises(ValueError, match=r"--task\.path '' is not a valid"):
        override(known, {"task.path": ""})
    assert override(known, {"task.opening": ""}).task.opening == ""


def test_the_models_seed_is_the_runs(recipe):
    assert "seed" in paths(recipe) and "seed" in paths(recipe.model) and "model.seed" not in paths(recipe)


def test_help_lists_every_path(recipe, capsys):
    with pytest.raises(SystemExit) as stop:
        from_command_line(recipe, ["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    for path in paths(recipe):
        assert f"--{path} " in out


def test_help_is_of_the_recipe_that_the_other_arguments_make(recipe, capsys):
    with pytest.raises(SystemExit) as stop:
        from_command_line(recipe, ["--sampler.cache", "dual", "--help", "--likelihood", "elbo"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "--likelihood.num_samples 4" in out and "--sampler.cache.refresh None" in out
    assert "one of: full, quick" in out and "one of: nf4, int8" in out and "one of: train, validation, test" in out


def test_help_shows_each_bound(recipe):
    supervised = SFT(name="sft", model=recipe.model, dataset=[])
    for record in (recipe, supervised):
        text = " ".join(usage(record).partition("Keywords, as")[0].split())
        bounds = {field.name: field.metadata["bound"] for field in fields(record) if field.metadata["bound"]}
        assert len(bounds) > 15
        for name, bound in bounds.items():
            help = text[text.index(f" --{name} ") + 3 :].partition(" --")[0]
            assert help.endswith(f" ({bound})"), name
    tis = " ".join(usage(replace(recipe, corrector=correctors.tis(), loss=ppo_clip)).split())
    for said in (
        "--num_steps 2 RL steps (at least 0)",
        "--adam_beta1 0.9 the optimizer's beta1 (in [0, 1))",
        "--corrector.cap 2.0 --corrector.level",
        "--loss.epsilon 0.2 (at least 1e-06) --loss.epsilon_high",
    ):
        assert said in tis


NAMES = [path.stem for path in sorted(Path(main_job_file).parent.glob("*.py")) if "recipe" in path.read_text()]
NAMES = [name for name in NAMES if name not in ("__init__", "weights", "antibody_loops", "one_file")]
PICKS = (
    "likelihood",
    "corrector",
    "loss",
    "advantages",
    "loss_reduction",
    "rollout_quantization",
    "lora",
    "sampler.commit",
)


@pytest.mark.parametrize("name", NAMES)
def test_no_recipe_is_what_the_cautions_warn_of(name):
    recipe = import_module(f"recipes.{name}").recipe
    assert isinstance(recipe, SFT) or cautions(recipe) == []


@pytest.mark.parametrize("name", few(NAMES, ["sudoku_tiny", "sft_tiny", "countdown_tiny_ar", "sudoku_tiny_moe"]))
def test_every_name_of_every_recipe_is_explained(name):
    recipe = import_module(f"recipes.{name}").recipe
    without_dropout = replace(recipe, lora=None)  # which aligned forwards refuse
    if isinstance(recipe, Recipe):
        # tbpo brings its own loss, correctors that weigh go with the learner's old log-probs, decoupled with no teacher
        plain = {"loss": None, "old_logprobs": "recompute", "max_staleness": 0, "rollout_workers": 0}
        plain |= {"teacher": None, "teacher_substeps": 1, "teacher_coeff": 1.0}
        without_dropout = replace(without_dropout, **plain)
    needed = {
        "threshold": ("tau", "0.9"),
        "soft_threshold": ("tau", "0.9"),
        "factor": ("f", "1"),
        "entropy_bound": ("gamma", "1"),
        "edit": ("tau", "1"),
    }
    needed |= {
        "remask": ("eta", "0.1"),
        "soft_edit": ("rate", "0.1"),
        "fixed_length_mean": ("length", "16"),
        "likelihood block_elbo": ("block_size", "4"),
    }
    recipes = [recipe]
    for field in (*PICKS, "sampler.cache", "optim", "kl", "lr_schedule"):
        offered = paths(without_dropout)
        for choice in offered[field].choices if field in offered else ():
            texts = {field: choice}
            if found := needed.get(choice) or needed.get(f"{field} {choice}"):
                keyword, number = found
                texts[f"{field}.{keyword}"] = number
            recipes.append(override(without_dropout, texts))
    assert len(recipes) > (40 if isinstance(recipe, Recipe) else 5)
    settable = {path for each in recipes for path in paths(each)}
    assert [path for each in recipes for path in unexplained(each) if path in settable] == []


def unexplained(owner, prefix=""):
    """Paths that have neither a help of their own nor a line "name: text" in the docstring of what takes them."""
    told = "\n".join(inspect.getdoc(explains) for explains in explained_by(owner))
    for name, member in members(owner).items():
        line = rf"^ *{name}(: | {{2,}})\S"
        if not member.help and not re.search(line, told, re.MULTILINE):
            yield f"{prefix}{name}"
        yield from unexplained(member.value, f"{prefix}{name}.")
