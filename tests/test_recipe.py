"""The record of a run: what its fields are, their bounds, and what they mean together."""

import copy
import math
import re
from dataclasses import fields, replace
from functools import partial

import pytest
from peft import IA3Config, LoraConfig
from tiny_recipe import tiny_recipe

from dllm_rl.algorithms import correctors
from dllm_rl.algorithms.correctors import tis
from dllm_rl.algorithms.losses import bias_corrected_kl, gspo, kl_k2, ppo_clip, sequence_mean, token_mean, trust_band
from dllm_rl.algorithms.optimizers import adamw
from dllm_rl.config import from_command_line
from dllm_rl.likelihoods.estimators import one_step, trajectory
from dllm_rl.members import describe
from dllm_rl.models.lora import Lora, lora_r16
from dllm_rl.recipe import Recipe, adapters, check_bounds
from dllm_rl.samplers.autoregress import autoregress
from dllm_rl.samplers.unmask import unmask
from dllm_rl.supervised.recipe import SFT


@pytest.fixture
def recipe(tmp_path):
    return tiny_recipe(tmp_path)


def test_the_record_says_what_its_fields_are():
    for field in fields(Recipe):
        assert f"{field.name} " in Recipe.__doc__ and field.metadata["help"] in Recipe.__doc__


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_generations": 0}, "num_generations=0 must be at least 1"),
        ({"weight_decay": float("nan")}, "weight_decay=nan must be at least 0, and be finite"),
        ({"max_grad_norm": math.inf}, "max_grad_norm=inf must be above 0, and be finite"),
        ({"peer_timeout": 0.0}, "peer_timeout=0.0 must be above 0"),
    ],
)
def test_a_field_out_of_its_bounds_is_refused_in_both_records(recipe, changes, said):
    made = [partial(replace, recipe)]
    if "num_generations" not in changes:
        made.append(partial(SFT, name="sft", model=recipe.model, dataset=[]))
    for make in made:
        with pytest.raises(ValueError, match=re.escape(said)):
            make(**changes)
    replace(recipe, peer_timeout=None, lr_schedule_steps=None)


def test_a_word_that_a_field_does_not_know_is_refused(recipe):
    """The suite checks types before a record is made; a user's program does not."""
    known = {field.name: field for field in fields(recipe)}
    check_bounds(known["base_quantization"], None)
    check_bounds(known["learning_rate"], 1)
    for name, value, said in (
        ("dtype", "fp32", "dtype='fp32' is not known; use 'float32', 'bfloat16', 'float16', 'auto'"),
        ("base_quantization", "int3", "base_quantization='int3' is not known; use 'nf4', 'int8', or none"),
        ("learning_rate", "1e-3", "learning_rate='1e-3' is of type str; give float"),
        ("num_steps", 1.5, "num_steps=1.5 is of type float; give int"),
        ("bf16", "false", "bf16='false' is of type str; give bool"),
        ("verify_checkpoint", None, "verify_checkpoint=None is not known; use 'full', 'quick'"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            check_bounds(known[name], value)


def test_the_aggregation_is_the_one_given_else_the_correctors_papers_else_token(recipe):
    taken = lambda *words: from_command_line(recipe, list(words)).resolved_loss_reduction  # noqa: E731
    assert taken() is token_mean and taken("--corrector", "ais") is token_mean
    assert taken("--corrector", "tbpo") is sequence_mean and taken("--corrector", "qarl") is sequence_mean
    assert taken("--corrector", "tbpo", "--loss_reduction", "token_mean") is token_mean
    assert taken("--corrector", "none", "--loss_reduction", "sequence_mean") is sequence_mean
    assert replace(recipe, corrector=correctors.tbpo()).policy_loss.keywords["loss_reduction"] is sequence_mean


def test_the_objective_is_the_one_given_else_the_correctors_else_ppos(recipe):
    taken = lambda *words: from_command_line(recipe, list(words)).policy_loss.keywords["surrogate"]  # noqa: E731
    assert taken() is ppo_clip and taken("--corrector", "ais") is ppo_clip
    assert taken("--loss", "gspo") is gspo
    assert taken("--corrector", "qarl").func is trust_band
    assert recipe.settings()["loss"] == "ppo_clip"
    both = r"loss=gspo and the corrector's loss trust_band\(.*\) are two objectives: use loss=None"
    with pytest.raises(ValueError, match=both):
        replace(recipe, loss=gspo, corrector=correctors.tbpo())


def test_an_update_has_the_recipes_rate_limits_and_loss(recipe):
    """The rate is that of a schedule of ten steps, whatever the number of the run's own."""
    limits = {"max_grad_norm": 0.25, "micro_batch_size": 8}
    schedule = {"learning_rate": 0.5, "lr_schedule": lambda step, num_steps: step / num_steps, "lr_schedule_steps": 10}
    terms = {"beta": 0.1, "kl": kl_k2, "use_bias_correction_kl": True, "entropy_coeff": 0.01}
    given = dict(vars(replace(recipe, **limits, **schedule, **terms).update_settings(3)))
    loss = given.pop("loss").keywords
    late = {"max_staleness": 0, "measure": False}
    assert given == limits | late | {"likelihood": recipe.likelihood, "learning_rate": 0.5 * 3 / 10}
    named = {"surrogate": ppo_clip, "loss_reduction": token_mean, "beta": 0.1, "entropy": 0.01}
    kl = loss.pop("kl")
    assert loss == named and kl.func is bias_corrected_kl and kl.keywords == {"kl": kl_k2}


@pytest.mark.parametrize(
    ("likelihood", "fresh", "draws"), [(one_step(), True, 3), (one_step(), False, 1), (trajectory(), True, 1)]
)
def test_masks_are_drawn_anew_where_another_draw_gives_others(recipe, likelihood, fresh, draws):
    assert replace(recipe, likelihood=likelihood, num_iterations=3, resample_masks=fresh).num_mask_sets == draws


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optim", "adamw_torch"),
        ("loss", "gspo"),
        ("corrector", "tis"),
        ("likelihood", "trajectory"),
        ("sampler", "unmask"),
        ("task", "sudoku"),
        ("push_to_hub", True),
        ("resume_from_checkpoint", True),
        ("lora", True),
    ],
)
def test_what_is_no_function_and_a_flag_where_there_is_none_are_refused(name, value):
    (known,) = [field for field in fields(Recipe) if field.name == name]
    with pytest.raises(ValueError, match=f"{name}={value!r} does not fit; it is: "):
        check_bounds(known, value)


@pytest.mark.parametrize(
    ("changes", "described"),
    [
        ({"loss": "gspo"}, gspo),
        ({"corrector": "tis"}, tis()),
        ({"corrector": partial(tis, cap=3.0)}, tis(cap=3.0)),
        ({"likelihood": trajectory}, trajectory()),
        ({"optim": "adamw"}, adamw),
        ({"lora": "lora_r16"}, lora_r16),
        ({"lora": Lora(r=4)}, partial(adapters, Lora(r=4))),
        (
            {"lora": LoraConfig(r=8, lora_alpha=4, target_modules=["v", "q"])},
            partial(adapters, Lora(r=8, alpha=4.0, targets=("q", "v"))),
        ),
        ({"lora": LoraConfig(r=4, lora_alpha=4, use_rslora=True)}, partial(adapters, Lora(r=4, alpha=8.0))),
    ],
)
def test_what_has_one_meaning_is_taken(recipe, changes, described):
    (name,) = changes
    assert describe(getattr(replace(recipe, **changes), name)) == describe(described)


def made_of(argument):
    return argument


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("corrector", made_of),
        ("corrector", dict),
        ("likelihood", made_of),
        ("lora", 16),
        ("lora", LoraConfig(use_dora=True)),
        ("lora", LoraConfig(bias="all")),
        ("lora", LoraConfig(target_modules=".*proj")),
        ("lora", IA3Config()),
        ("num_steps", "3"),
        ("learning_rate", None),
        ("learning_rate", "1e-3"),
        ("bf16", "true"),
        ("output_dir", 5),
        ("max_prompt_length", 5.0),
        ("task", dict),
        ("sampler", partial(unmask, max_new_tokens="2")),
        ("sampler", partial(unmask, max_new_tokens=2, temperature=-1)),
        ("sampler", partial(unmask, max_new_tokens=2, top_p=2.0)),
        ("sampler", partial(unmask, max_new_tokens=2, diffusion_steps=True)),
        ("eval_sampler", partial(autoregress, max_new_tokens=2, temperature=float("nan"))),
    ],
)
def test_what_a_field_does_not_hold_is_refused_by_its_name(recipe, name, value):
    bound = list(getattr(value, "keywords", {}))[-1:]
    with pytest.raises(ValueError, match=(bound or [name])[0]) as caught:
        replace(recipe, **{name: value})
    assert "\n" not in str(caught.value)


def test_no_tracker_is_none_or_its_name(recipe):
    assert [replace(recipe, report_to=given).trackers for given in (None, "none")] == [[], []]


def test_a_run_is_said_to_aggregate_as_it_does(recipe):
    assert recipe.settings()["loss_reduction"] == "token_mean"
    assert replace(recipe, corrector=correctors.qarl()).settings()["loss_reduction"] == "sequence_mean"
    assert describe(correctors.no_correction()) == "no_correction()"
    mine = replace(correctors.tbpo(), loss=None)  # no function makes it: its parts tell it from others
    assert describe(mine).startswith("Corrector(weight_fn=band_weights(max_weight=2.0), ")
    assert describe(mine).endswith(", align_forward=False, loss_reduction=sequence_mean, needs_entropy=False)")


def test_a_partial_whose_dict_was_read_is_bound_again(tmp_path):
    """`dir`, as debuggers call it, gives it a dict; functools.partial then nests instead of merging."""
    inner = partial(unmask, max_new_tokens=8, diffusion_steps=4)
    dir(inner)
    outer = partial(inner, diffusion_steps=2)
    assert outer.func is inner
    sampler = tiny_recipe(tmp_path, sampler=outer).sampler
    assert sampler.func is unmask and sampler.keywords == {"max_new_tokens": 8, "diffusion_steps": 2}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Recipe(aggregate=1, fresh_maskz=2, num_stepz=3),
            "Recipe: aggregate, fresh_maskz (the nearest is resample_masks), num_stepz (the nearest is num_steps)",
        ),
        (lambda: SFT(aggregate=1, num_stepz=3), "SFT: aggregate, num_stepz (the nearest is num_steps)"),
        (
            lambda: replace(tiny_recipe("a"), learning_rat=1, sedd=2),
            "Recipe: learning_rat (the nearest is learning_rate), sedd (the nearest is seed)",
        ),
    ],
)
def test_all_unknown_settings_are_refused_together(make, message):
    with pytest.raises(ValueError, match=re.escape(f"not settings of {message}; help(dllm_rl.")):
        make()


def test_a_recipe_is_copied():
    recipe = replace(tiny_recipe("a"), model="folder")
    for twin in (copy.copy(recipe), copy.deepcopy(recipe)):
        assert twin.num_steps == recipe.num_steps and type(twin) is Recipe
