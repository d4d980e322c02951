"""The record of a run: what its fields are, their bounds, and what they mean together."""

import copy
import math
import re
from dataclasses import fields, replace
from functools import partial

import pytest
from peft import IA3Config, LoraConfig
from tiny_recipe import SIZES, tiny_recipe, with_changes

from dllm_rl import sft, tiny_masked_lm
from dllm_rl.algorithms import correctors
from dllm_rl.algorithms.correctors import TIS, NoCorrection
from dllm_rl.algorithms.losses import CISPO, GSPO, K2, PPOClip, Reinforce, SequenceMean, TokenMean, TrustBand
from dllm_rl.config import from_command_line
from dllm_rl.groups import GROUPED, Best, Late, Log, Saves, Teacher
from dllm_rl.likelihoods.estimators import OneStep, Trajectory
from dllm_rl.models.lora_settings import Lora
from dllm_rl.recipe import Recipe
from dllm_rl.records import to_json
from dllm_rl.samplers.autoregress import Autoregress
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.supervised.sft import SFT

pytestmark = pytest.mark.usefixtures("no_rehearsal")


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
        ({"learning_rate": float("nan")}, "learning_rate=nan must be above 0, and be finite"),
        ({"max_grad_norm": math.inf}, "max_grad_norm=inf must be above 0, and be finite"),
    ],
)
def test_a_field_out_of_its_bounds_is_refused_in_both_records(recipe, changes, said):
    made = [partial(replace, recipe)]
    if "num_generations" not in changes:
        made.append(partial(SFT, name="sft", model=recipe.model, dataset=[]))
    for make in made:
        with pytest.raises(ValueError, match=re.escape(said)):
            make(**changes)
    with_changes(recipe, peer_timeout=None, lr_schedule_steps=None)


def test_a_word_that_a_field_does_not_know_is_refused(recipe):
    """The suite checks types before a record is made; a user's program does not."""
    replace(recipe, base_quantization=None, learning_rate=1)
    for name, value, said in (
        ("dtype", "fp32", "dtype='fp32' must be one of 'float32', 'bfloat16', 'float16', 'auto'"),
        ("base_quantization", "int3", "base_quantization='int3' must be one of 'nf4', 'int8'"),
        ("learning_rate", "1e-3", "learning_rate='1e-3' is of type str; give float"),
        ("num_steps", 1.5, "num_steps=1.5 is of type float; give int"),
        ("bf16", "false", "bf16='false' is of type str; give bool"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            with_changes(recipe, **{name: value})


def test_the_aggregation_is_the_one_given_else_the_correctors_papers_else_token(recipe):
    taken = lambda *words: from_command_line(recipe, list(words)).resolved_loss_reduction  # noqa: E731
    assert taken() == TokenMean() and taken("--corrector", "AIS") == TokenMean()
    assert taken("--corrector", "TBPO") == SequenceMean() and taken("--corrector", "QaRL") == SequenceMean()
    assert taken("--corrector", "TBPO", "--loss_reduction", "TokenMean") == TokenMean()
    assert taken("--corrector", "NoCorrection", "--loss_reduction", "SequenceMean") == SequenceMean()
    assert replace(recipe, corrector=correctors.TBPO()).policy_loss.keywords["loss_reduction"] == SequenceMean()


def test_the_objective_is_the_one_given_else_the_correctors_else_ppos(recipe):
    taken = lambda *words: from_command_line(recipe, list(words)).policy_loss.keywords["surrogate"]  # noqa: E731
    assert taken() == PPOClip() and taken("--corrector", "AIS") == PPOClip()
    assert taken("--loss", "GSPO") == GSPO()
    assert taken("--corrector", "QaRL") == TrustBand()
    assert recipe.settings()["loss"] == to_json(PPOClip())
    both = r"loss=GSPO\(.*\) and the corrector's loss TrustBand\(.*\) are two objectives: use loss=None"
    with pytest.raises(ValueError, match=both):
        replace(recipe, loss=GSPO(), corrector=correctors.TBPO())


def test_ratios_against_the_rollout_take_correctors_that_only_drop(recipe):
    class Capped(correctors.Reject):
        def weights(self, stats):
            return TIS().weights(stats)

    class Dropped(correctors.Corrector):
        only_masks = True

        def weights(self, stats):
            return correctors.Reject().weights(stats)

    taken = partial(replace, recipe, old_logprobs="rollout")
    both = correctors.Compose(parts=(correctors.Reject(level="token"), correctors.Reject()))
    for corrector in (NoCorrection(), correctors.Aligned(), correctors.Reject(threshold=0.1), both, Dropped()):
        taken(corrector=corrector)
    mixed = correctors.Compose(parts=(TIS(), correctors.Reject()))
    for corrector in (TIS(), correctors.MIS(outside="drop"), TIS().weights, mixed, Capped()):
        with pytest.raises(ValueError, match=r"a second time: use a corrector that only drops, such as NoCorr"):
            taken(corrector=corrector)


def test_an_update_has_the_recipes_rate_limits_and_loss(recipe):
    """The rate is that of a schedule of ten steps, whatever the number of the run's own."""
    limits = {"max_grad_norm": 0.25, "micro_batch_size": 8}
    schedule = {"learning_rate": 0.5, "lr_schedule": lambda step, num_steps: step / num_steps, "lr_schedule_steps": 10}
    terms = {"beta": 0.1, "kl": K2(bias_correction=True), "entropy_coeff": 0.01}
    given = dict(vars(with_changes(recipe, **limits, **schedule, **terms).update_settings(3)))
    loss = given.pop("loss").keywords
    late = {"max_staleness": 0, "measure": False}
    assert given == limits | late | {"likelihood": recipe.likelihood, "learning_rate": 0.5 * 3 / 10}
    named = {"surrogate": PPOClip(), "loss_reduction": TokenMean(), "beta": 0.1, "entropy": 0.01}
    assert loss == named | {"kl": K2(bias_correction=True)}


@pytest.mark.parametrize(
    ("likelihood", "fresh", "draws"), [(OneStep(), True, 3), (OneStep(), False, 1), (Trajectory(), True, 1)]
)
def test_masks_are_drawn_anew_where_another_draw_gives_others(recipe, likelihood, fresh, draws):
    assert replace(recipe, likelihood=likelihood, num_iterations=3, resample_masks=fresh).num_mask_sets == draws


@pytest.mark.parametrize(
    ("changes", "scored"),
    [
        ({}, 1),
        ({"loss": CISPO()}, 3),
        ({"corrector": TIS()}, 3),
        ({"beta": 0.1}, 3),
        ({"likelihood": Trajectory()}, 1),
    ],
)
def test_masks_of_later_updates_are_scored_if_something_reads_their_log_probs(recipe, changes, scored):
    settings = {"corrector": NoCorrection(), "likelihood": OneStep(), "num_iterations": 3, "loss": Reinforce()}
    assert with_changes(recipe, **(settings | changes)).num_scored_mask_sets == scored


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("optim", "adamw_torch", "the nearest is AdamW "),
        ("loss", "gspo", "the nearest is GSPO "),
        ("corrector", "tis", "the nearest is TIS "),
        ("likelihood", "trajectory", "the nearest is Trajectory "),
        ("likelihood", Trajectory, "is a class; give an object: likelihood=Trajectory(...)"),
        ("sampler", "unmask", "the nearest is Unmask "),
        ("task", "sudoku", "give an object of a class like it"),
        ("push_to_hub", True, "give str"),
        ("resume_from_checkpoint", True, "give str"),
        ("lora", True, "give Lora(...)"),
        ("lora", "lora_r16", "is not known; set the fields of Lora: lora.r, "),
    ],
)
def test_what_a_field_does_not_hold_is_refused_with_the_remedy(recipe, name, value, remedy):
    with pytest.raises(ValueError, match=f"{name}=.*{re.escape(remedy)}"):
        with_changes(recipe, **{name: value})


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda recipe, module: replace(recipe, model=module), "model"),
        (lambda recipe, module: with_changes(recipe, teacher={"model": module}), "teacher: model"),
        (lambda recipe, module: SFT(name="a", model=module, dataset=[{"prompt": "1", "completion": "2"}]), "model"),
        (lambda recipe, module: sft(module, [{"prompt": "1", "completion": "2"}] * 4), "model"),
    ],
)
def test_a_loaded_module_needs_its_tokenizer(recipe, make, field):
    """It can be called, and would be taken for a function that makes a policy."""
    with pytest.raises(ValueError, match=rf"^{field} is a loaded module: give make_policy\(module, tokenizer\)$"):
        make(recipe, tiny_masked_lm(**SIZES).module)


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({"corrector": "TIS"}, TIS()),
        ({"lora": LoraConfig(r=8, lora_alpha=4, target_modules=["v", "q"])}, Lora(r=8, alpha=4.0, targets=("q", "v"))),
        ({"lora": LoraConfig(r=4, lora_alpha=4, use_rslora=True)}, Lora(r=4, alpha=8.0)),
    ],
)
def test_what_has_one_meaning_is_taken(recipe, changes, taken):
    (name,) = changes
    assert getattr(with_changes(recipe, **changes), name) == taken


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("likelihood", {}),
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
    ],
)
def test_what_a_field_does_not_hold_is_refused_by_its_name(recipe, name, value):
    with pytest.raises(ValueError, match=name) as caught:
        with_changes(recipe, **{name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sampler", "name", "value"),
    [
        (Unmask, "max_new_tokens", "2"),
        (Unmask, "temperature", -1),
        (Unmask, "top_p", 2.0),
        (Unmask, "diffusion_steps", True),
        (Autoregress, "temperature", math.nan),
    ],
)
def test_what_a_samplers_field_does_not_hold_is_refused_by_its_name(sampler, name, value):
    with pytest.raises(ValueError, match=f"{name}="):
        sampler(**{"max_new_tokens": 2, name: value})


def test_a_dictionary_changes_fields_of_a_group_and_leaves_the_others(recipe):
    changed = recipe.replace(saves={"total_limit": 7}, log={"steps": 3}).replace(saves={"best": {"metric": "reward"}})
    assert changed.saves == Saves(total_limit=7, best=Best(metric="reward"))
    assert changed.log == recipe.log.replace(steps=3) != Log(steps=3)
    with pytest.raises(ValueError, match=r"stepz \(the nearest is steps\)"):
        recipe.replace(saves={"stepz": 7})
    with pytest.raises(ValueError, match="Best needs metric"):
        recipe.replace(saves={"best": {"load_at_end": True}})


@pytest.mark.parametrize(("flat", "path"), GROUPED.items())
def test_a_flat_name_is_answered_by_the_path_of_the_setting(recipe, flat, path, capsys):
    value = recipe
    for name in path.split(".")[:-1]:
        value = getattr(value, name) or {"best": Best(metric="a"), "teacher": Teacher(model="a"), "late": Late()}[name]
    assert hasattr(value, path.rpartition(".")[2])
    with pytest.raises(ValueError, match=rf"^not settings of Recipe: {flat} \(it is {re.escape(path)}\)"):
        replace(recipe, **{flat: 3})
    with pytest.raises(SystemExit):
        from_command_line(recipe, [f"--{flat}", "3"])
    assert f"--{flat} is not a setting of Recipe; it is --{path} " in capsys.readouterr().err


def test_no_tracker_is_none_or_its_name(recipe):
    assert [with_changes(recipe, report_to=given).log.trackers for given in (None, "none")] == [[], []]


def test_a_run_is_said_to_aggregate_as_it_does(recipe):
    assert recipe.settings()["loss_reduction"] == to_json(TokenMean())
    assert replace(recipe, corrector=correctors.QaRL()).settings()["loss_reduction"] == to_json(SequenceMean())


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
    with pytest.raises(ValueError, match=re.escape(f"not settings of {message}; help(")):
        make()


def test_a_recipe_is_copied():
    recipe = replace(tiny_recipe("a"), model="folder")
    for twin in (copy.copy(recipe), copy.deepcopy(recipe)):
        assert twin.num_steps == recipe.num_steps and type(twin) is Recipe
