"""The command line: settings at every depth, classes by name, files of settings, help, and what is refused."""

import sys
from dataclasses import dataclass, fields, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny_recipe import SIZES, tiny_recipe, with_changes

from dllm_rl.algorithms import correctors, losses
from dllm_rl.cli.options import read_methods
from dllm_rl.config import from_command_line, override
from dllm_rl.groups import Best, Saves, Teacher
from dllm_rl.likelihoods.estimators import ELBO, Trajectory
from dllm_rl.models.lora_settings import Lora
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.quantization.schemes import FakeQuantize, Int4WeightOnly, Int8WeightOnly
from dllm_rl.samplers.cache import DualCache, PrefixCache
from dllm_rl.samplers.revise import Remask
from dllm_rl.samplers.rules import FunctionRank, MaxProb, RandomOrder, Schedule, Threshold
from dllm_rl.supervised.sft import SFT
from dllm_rl.tasks.datasets import task_from_dataset
from dllm_rl.tasks.sudoku import Sudoku
from dllm_rl.testing import make_stats
from dllm_rl.training.cautions import cautions
from recipes import sudoku_unique
from recipes.examples import turns
from recipes.examples.bounds import BlockELBO, Sandwich
from recipes.studies.likelihoods.surrogates import __name__ as surrogates
from recipes.sudoku_unique import __file__ as main_job_file

pytestmark = pytest.mark.usefixtures("no_rehearsal")

OWN = """
from dllm_rl import Corrector, option


class Mine(Corrector):
    \"\"\"Weights of one's own.

    Args:
        strength: Power of the ratio, above 0.
        halved: Whether weights are halved. Default: no.
        note: A text that changes nothing.
    \"\"\"

    strength: float = option(above=0)
    halved: bool = False
    note: str = "-"

    def weights(self, stats):
        return stats.log_mismatch.exp() ** self.strength, stats.mask, {}
"""


@pytest.fixture
def recipe(tmp_path):
    return tiny_recipe(tmp_path)


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module of the user's in the working folder."""
    (tmp_path / "own_method.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield "own_method.Mine"
    sys.modules.pop("own_method", None)


def errors(recipe, words, capsys):
    """The lines that a refused command line prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        from_command_line(recipe, words)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()


def printed(recipe, words, capsys):
    """What `--help` and its like print."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        from_command_line(recipe, words)
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("model", [tiny_masked_lm, tiny_masked_lm(**SIZES)], ids=["function", "policy"])
def test_what_no_text_can_give_is_kept_beside_its_groups_options(recipe, model):
    changed = override(recipe.replace(teacher={"model": model}), ["--teacher.coeff", "0.5"])
    assert changed.teacher.coeff == 0.5 and changed.teacher.model is model


def test_scalars_at_every_depth(recipe):
    words = "--num_steps 7 --learning_rate=1e-4 --bf16 --sampler.temperature 0.5 --task.clues 8,9 --micro_batch_size 8"
    words += " --corrector TIS --corrector.cap 3 --loss PPOClip --loss.epsilon 0.1"
    new = from_command_line(recipe, [*words.split(), "--output_dir", "x"])
    assert (new.num_steps, new.learning_rate, new.bf16, new.micro_batch_size, new.output_dir) == (7, 1e-4, True, 8, "x")
    assert new.sampler == recipe.sampler.replace(temperature=0.5)
    assert new.task.clues == (8, 9) and recipe.task.clues == (10, 12)
    assert new.corrector == correctors.TIS(cap=3) and new.loss == losses.PPOClip(epsilon=0.1)


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        ("--lora Lora --lora.r 4", "lora", Lora(r=4)),
        ("--lora.r 4", "lora", Lora(r=4)),  # the only class
        ("--saves.best.metric loss", "saves", Saves(best=Best(metric="loss"))),
        ("--teacher.coeff 0.5 --teacher.model ./a", "teacher", Teacher(model="./a", coeff=0.5)),
        ("--likelihood.num_segments 2", "likelihood", Trajectory(num_segments=2)),
        (
            "--likelihood recipes.examples.bounds.BlockELBO --likelihood.block_size 4",
            "likelihood",
            BlockELBO(block_size=4),
        ),
        (
            "--likelihood recipes.examples.bounds.Sandwich --likelihood.mix 0.25 --likelihood.base ELBO "
            "--likelihood.base.num_samples 2",
            "likelihood",
            Sandwich(mix=0.25, base=ELBO(num_samples=2)),
        ),
        ("--rollout_quantization Int8WeightOnly", "rollout_quantization", Int8WeightOnly()),
        (
            "--rollout_quantization Int4WeightOnly --rollout_quantization.group_size 16",
            "rollout_quantization",
            Int4WeightOnly(group_size=16),
        ),
        (
            "--rollout_quantization FakeQuantize --rollout_quantization.weight int4",
            "rollout_quantization",
            FakeQuantize(weight="int4"),
        ),
        ("--corrector TIS --corrector.pool geometric", "corrector", correctors.TIS(pool="geometric")),
        ("--corrector QaRL --corrector.max_weight 3", "corrector", correctors.QaRL(max_weight=3)),
        ("--corrector dllm_rl.algorithms.correctors.TIS", "corrector", correctors.TIS()),
        (
            "--loss_reduction FixedLengthMean --loss_reduction.length 16",
            "loss_reduction",
            losses.FixedLengthMean(length=16),
        ),
        ("--kl K2", "kl", losses.K2()),
        (
            "--corrector Compose --corrector.parts [TIS,Reject]",
            "corrector",
            correctors.Compose(parts=(correctors.TIS(), correctors.Reject())),
        ),
    ],
)
@pytest.mark.repeated(every=4)
def test_classes_by_name_with_settings_in_any_order(recipe, words, field, value):
    words = words.split()
    pairs = [words[i : i + 2] for i in range(0, len(words), 2)]
    for order in (pairs, pairs[::-1]):
        assert getattr(from_command_line(recipe, [word for pair in order for word in pair]), field) == value


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        ("--sampler.commit Threshold --sampler.commit.tau 0.9", "commit", Threshold(tau=0.9)),
        ("--sampler.commit Schedule", "commit", Schedule()),
        ("--sampler.cache DualCache --sampler.cache.refresh 4", "cache", DualCache(refresh=4)),
        ("--sampler.rank MaxProb", "rank", MaxProb()),
        ("--sampler.suppress 1,2", "suppress", (1, 2)),
        ("--sampler.suppress 1", "suppress", (1,)),
        ("--sampler.suppress [1,2,3]", "suppress", (1, 2, 3)),
    ],
)
@pytest.mark.repeated
def test_parts_of_the_sampler(recipe, words, field, value):
    assert getattr(from_command_line(recipe, words.split()).sampler, field) == value


def test_two_parts_that_go_together(recipe):
    words = "--sampler.commit Remask --sampler.commit.eta 0.1 --sampler.rank RandomOrder"
    sampler = from_command_line(recipe, words.split()).sampler
    assert (sampler.commit, sampler.rank) == (Remask(eta=0.1), RandomOrder())


def test_a_setting_of_the_present_class_changes_it_alone(recipe):
    held = recipe.replace(corrector=correctors.TIS(cap=3.0))
    changed = from_command_line(held, ["--corrector.level", "sequence"])
    assert changed.corrector == correctors.TIS(cap=3.0, level="sequence")
    assert held.corrector == correctors.TIS(cap=3.0)
    stats = make_stats(torch.full((1, 1), 9.0), torch.ones(1), torch.ones(1, 1, dtype=torch.bool))
    weights, _, _ = from_command_line(held, ["--corrector.cap", "2.5"]).corrector.weights(stats)
    assert weights.item() == 2.5, "min(exp(9), 2.5)"


def test_records_that_hold_functions_keep_them(recipe):
    own = recipe.replace(sampler=recipe.sampler.replace(rank=FunctionRank(function=lambda logits: logits.amax(-1))))
    assert from_command_line(own, ["--sampler.temperature", "0.3"]).sampler == own.sampler.replace(temperature=0.3)


def test_none_and_text_that_is_called_none(recipe):
    new = from_command_line(
        recipe, ["--rollout_quantization", "none", "--micro_batch_size", "none", "--log.report_to", "none"]
    )
    assert (new.rollout_quantization, new.micro_batch_size, new.log.trackers) == (None, None, [])
    cached = recipe.replace(sampler=recipe.sampler.replace(cache=DualCache()))
    assert from_command_line(cached, ["--sampler.cache", "none"]).sampler.cache is None
    assert from_command_line(recipe, ["--advantages.scale_rewards", "none"]).advantages.scale_rewards == "none"
    assert from_command_line(recipe, ["--zero_mismatch", "false"]).zero_mismatch is False


@pytest.mark.parametrize("text", ["5", "1e3", "null", "true", "a: b", "[x]"])
@pytest.mark.repeated
def test_text_stays_text(recipe, text):
    assert from_command_line(recipe, ["--name", text]).name == text


def test_any_recipe_takes_a_checkpoint_for_its_model(recipe):
    assert from_command_line(recipe, ["--model", "runs/x/checkpoints/step-000180"]).model.endswith("step-000180")


def test_the_settings_of_a_task_are_checked_together(recipe):
    for words in (["--task.side=9", "--task.clues=30,40"], ["--task.clues=30,40", "--task.side=9"]):
        assert from_command_line(recipe, words).task == replace(recipe.task, side=9, clues=(30, 40))
    assert from_command_line(recipe, ["--task.clues", "8"]).task.clues == 8


@dataclass(frozen=True)
class Lazy(Sudoku):
    rule: Schedule = Schedule()

    @cached_property
    def puzzles(self):
        return object()


@pytest.mark.parametrize("change", [{"size": 7}, {"seed": 2}, {"solved_weight": 0.5}, {"rule": Schedule()}])
@pytest.mark.repeated
def test_what_a_task_has_cached_is_no_setting(recipe, change):
    task = Lazy(prompt_format="text")  # whose constructor reads its text
    assert task.puzzles and {"puzzles", "_template"} <= vars(task).keys()
    given = replace(recipe, task=task)
    words = [f"--task.{name}={'Schedule' if name == 'rule' else value}" for name, value in change.items()]
    assert override(given, words).task == replace(task, **change)
    assert override(given, ["--seed=3"]).task == task


def test_settings_of_a_task_that_is_no_recipe():
    assert override(Sudoku(), ["--clues", "8,9", "--unique=false"]) == Sudoku(clues=(8, 9), unique=False)


def test_a_class_of_ones_own_with_options_of_its_own(recipe, own_module, capsys):
    chosen = ["--corrector", own_module, "--corrector.strength", "0.5", "--corrector.halved"]
    corrector = from_command_line(recipe, chosen).corrector
    assert (type(corrector).__name__, corrector.strength, corrector.halved) == ("Mine", 0.5, True)
    assert "Power of the ratio, above 0." in printed(recipe, ["--corrector.help", own_module], capsys)
    for words, message in [
        (chosen[:2], "needs --corrector.strength"),
        ([*chosen[:3], "0"], "corrector.strength=0 must be above 0"),
        ([*chosen, "--corrector.strenth", "1"], "the nearest is --corrector.strength"),
        (["--corrector", "own_method.Mne"], "has no attribute 'Mne'; give MODULE.NAME"),
        (["--kl", own_module], "is not a subclass of KL"),
    ]:
        (line,) = errors(recipe, words, capsys)
        assert message in line


def test_a_script_of_the_recipes(recipe):
    loss = from_command_line(recipe, ["--loss", f"{surrogates}.GDSD", "--loss.psi", "0.1"]).loss
    assert (type(loss).__name__, loss.psi) == ("GDSD", 0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--learning_rat 1", "the nearest is --learning_rate"),
        ("--sampler.temprature 1", "the nearest is --sampler.temperature"),
        ("--samper.temperature 1", "the nearest is --sampler"),
        ("--learning_rate.x 1", "the nearest is --learning_rate"),
        ("--task.side 9", "task.clues=(10, 12) must lie in 26..81 on 9x9"),
        ("--task.side 9 --task.clues 20", "task.clues=20 must lie in 26..81 on 9x9"),
        ("--task.clues 8,9,10", "task.clues=[8, 9, 10] must have 2 values"),
        ("--task chess", "task='chess': a task is chosen by its recipe; set its fields: --task.split"),
        ("--num_steps many", "num_steps='many' is of type str; give int"),
        ("--num_steps 1.5", "num_steps=1.5 is of type float; give int"),
        ("--learning_rate nan", "learning_rate='nan' is of type str; give float"),
        ("--learning_rate .nan", "learning_rate=nan must be above 0"),
        ("--learning_rate -1", "learning_rate=-1 must be above 0"),
        ("--beta .inf", "beta=inf must be at least 0, and be finite"),
        ("--corrector tis", "the nearest is TIS"),
        ("--corrector tsi", "the nearest is TIS"),
        ("--corrector PPOClip", "is not known"),
        ("--rollout_quantization quantized_copy", "is not known"),
        ("--bf16 maybe", "bf16='maybe' is of type str; give bool"),
        ("--task.split tset", "task.split='tset' must be one of 'train', 'validation', 'test'"),
        ("--dtype float8", "dtype='float8' must be one of 'float32', 'bfloat16', 'float16', 'auto'"),
        ("--base_quantization nf", "base_quantization='nf' must be one of 'nf4', 'int8'"),
        ("--likelihood.num_segments 0", "likelihood.num_segments=0 must be at least 1"),
        ("num_steps 1", "options are written --name value"),
        ("--loss nowhere.at_all.x", "No module named 'nowhere'; give MODULE.NAME"),
        ("--loss .x", "loss='.x': "),
        ("--loss math.pi", "loss='math.pi' is neither a function nor a class"),
        ("--corrector dllm_rl.likelihoods.estimators.ELBO", "is not a subclass of Corrector"),
        (
            "--corrector NoCorrection --corrector.cap 3",
            "--corrector.cap is not a setting of NoCorrection, which has none",
        ),
        ("--corrector TIS --corrector.cap 0.5", "corrector.cap=0.5 must be at least 1"),
        ("--corrector TIS --corrector.level tokn", "corrector.level='tokn' must be one of 'token', 'sequence'"),
        (
            "--corrector Compose --corrector.parts [{class_path:\xa0TIS,init_args:\xa0{cap:\xa00.5}}]",
            "cap=0.5 must be at least 1",
        ),
        ("--kl PPOClip", "kl='PPOClip' is not known (K1, K2, K3)"),
        ("--loss.epsilon 0.1", "choose it by --loss, one of"),
        ("--sampler.commit Threshold", "needs --sampler.commit.tau"),
        ("--likelihood recipes.examples.bounds.BlockELBO", "needs --likelihood.block_size"),
        ("--preset d2", "preset='d2' is not one of large"),
        ("--config nowhere.yaml", "config='nowhere.yaml': No such file"),
        ("--corrector.help TSI", "the nearest is TIS"),
    ],
)
def test_what_is_refused_in_one_line(recipe, arguments, message, capsys):
    (line,) = errors(recipe, [word.replace("\xa0", " ") for word in arguments.split(" ")], capsys)
    assert line.startswith("error: ") and message in line


def test_all_wrong_options_at_once_and_no_model_is_made(recipe, capsys):
    """Wrong names, types, bounds and classes, of the run and of records in it; the same lines from Python."""

    def model(seed):
        raise AssertionError("a model was made")

    words = "--num_steps many --learning_rat 3 --corrector TIS --corrector.cap 0.2 --loss PPOClip --loss.epsilon -1"
    words += " --optim.weight_decay -1 --sampler.commit Thresold --task.split x"
    lines = errors(recipe.replace(model=model), words.split(), capsys)
    assert sorted(line.removeprefix("error: ").split()[0].partition("=")[0] for line in lines) == [
        *("--learning_rat", "corrector.cap", "loss.epsilon", "num_steps", "optim.weight_decay", "sampler.commit"),
        "task.split",
    ]
    with pytest.raises(
        ValueError, match=r"learning_rate=-3 must be above 0\nnum|num_steps=-1 must be at least 0\nlearning"
    ):
        recipe.replace(num_steps=-1, learning_rate=-3)
    with pytest.raises(ValueError, match=r"cap=0 must be at least 1\nlevel='x' must be one of"):
        correctors.TIS(cap=0, level="x")


@pytest.mark.parametrize("name", ["name", "model", "output_dir", "resume_from_checkpoint"])
def test_an_empty_name_is_refused(recipe, name, capsys):
    with pytest.raises(ValueError, match=f"{name}='' is empty; give a name"):
        with_changes(recipe, **{name: ""})
    for arguments in ([f"--{name}", ""], [f"--{name}="]):
        (line,) = errors(recipe, [*arguments, "--overwrite_output_dir"], capsys)
        assert f"{name}='' is empty" in line


def test_an_empty_path_of_a_task_is_refused_and_an_empty_text_is_not(recipe):
    known = replace(recipe, task=Sudoku(split="train", path="grids.txt"))
    with pytest.raises(ValueError, match=r"task\.path='' is empty"):
        override(known, ["--task.path", ""])
    assert override(known, ["--task.opening", ""]).task.opening == ""


WORDS = (
    "--corrector Compose --corrector.parts [TIS,Reject] --sampler.commit Threshold --sampler.commit.tau 0.7 "
    "--task.clues 5,6 --lora Lora --sampler.suppress 1,2 --advantages.scale_rewards none --loss PPOClip --name null"
)


@pytest.mark.slow
@pytest.mark.parametrize("words", ["", "--num_steps 9 --log.report_to none", WORDS, "--sampler.cache DualCache"])
def test_a_printed_config_is_read_back(recipe, words, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(printed(recipe, [*words.split(), "--print_config"], capsys))
    assert from_command_line(recipe, ["--config", str(file)]) == from_command_line(recipe, words.split())


@pytest.mark.repeated(first_only=True)
@pytest.mark.parametrize(
    "made", [sudoku_unique.recipe_of("diffusion_gemma"), turns.recipe], ids=["infinity", "a sampler in a sampler"]
)
def test_a_printed_config_of_a_recipe_is_read_back(made, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(printed(made, ["--print_config"], capsys))
    assert from_command_line(made, ["--config", str(file)]) == made


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["sampler", "sampler.turn"])
def test_none_is_a_value_in_a_class_in_a_class(prefix, tmp_path, capsys):
    """Also of a recipe, a file or an option before it whose value is another."""
    cached = ["--sampler.turn.cache", "PrefixCache", "--sampler.turn.cache.refresh", "3"]
    base, words = turns.recipe, [word.replace("sampler.turn", prefix) for word in cached]
    if prefix == "sampler":
        base = replace(base, sampler=base.sampler.turn.replace(max_new_tokens=10))
    recipe = from_command_line(base, [*words, f"--{prefix}.block_size", "5"])
    (tmp_path / "a.yaml").write_text(printed(recipe, ["--print_config"], capsys))
    none = [f"--{prefix}.cache.refresh", "none"]
    for given in ((recipe, none), (recipe, [*words, *none]), (base, ["--config", str(tmp_path / "a.yaml"), *none])):
        sampler = from_command_line(*given).sampler
        assert getattr(sampler, "turn", sampler).cache == PrefixCache(refresh=None)
    (tmp_path / "b.yaml").write_text(printed(recipe, [*none, "--print_config"], capsys))
    again = from_command_line(base, ["--config", str(tmp_path / "b.yaml")])
    assert again == from_command_line(recipe, none) != recipe


@pytest.mark.parametrize("rows", [list, Dataset.from_list])
@pytest.mark.repeated(first_only=True)
def test_a_printed_config_leaves_out_the_rows_and_functions_of_a_script(rows, recipe, tmp_path, capsys):
    def right(completions, answer, **columns):
        return [float(text == each) for text, each in zip(completions, answer, strict=True)]

    task = task_from_dataset(rows([{"prompt": "1=", "answer": "2"}] * 2), reward_funcs=[right])
    recipe = replace(recipe, task=task, eval_task=task)
    file = tmp_path / "run.yaml"
    file.write_text(printed(recipe, ["--num_steps", "9", "--print_config"], capsys))
    assert "answer" not in (text := file.read_text()) and "\ntask:" not in text and "\nvalidation_task:" in text
    found = from_command_line(recipe, ["--config", str(file), "--task.blank", "_"])
    assert found == from_command_line(recipe, ["--num_steps", "9", "--task.blank", "_"]) and found.task.blank == "_"
    (line,) = errors(recipe, ["--task.blank", "_", "--print_config"], capsys)
    assert line.startswith("error: --task.blank: --print_config leaves out the task")
    (line,) = errors(recipe, ["--task.rows", "x"], capsys)  # which rows they are, no setting
    assert line == "error: --task.rows is not a setting of DatasetTask (--help lists all)"


@pytest.mark.parametrize("words", ["--num_steps {1", "--task.clues [1", "--sampler.suppress [1"])
def test_text_that_is_no_yaml_is_refused_in_a_line(recipe, words, capsys):
    (line,) = errors(recipe, words.split(), capsys)
    assert "is not YAML" in line and line.startswith(f"error: {words.split()[0][2:]}=")


@pytest.mark.slow
def test_a_config_of_ones_own_class_is_read_back(recipe, own_module, tmp_path, capsys):
    words = ["--corrector", own_module, "--corrector.strength", "0.5"]
    Path("run.yaml").write_text(printed(recipe, [*words, "--print_config"], capsys))
    assert from_command_line(recipe, ["--config", "run.yaml"]) == from_command_line(recipe, words)


def test_options_override_a_config(recipe, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("num_steps: 9\ncorrector:\n  class_path: TIS\n  init_args:\n    cap: 3\n    level: sequence\n")
    words = ["--config", str(file)]
    assert from_command_line(recipe, words).corrector == correctors.TIS(cap=3, level="sequence")
    for order in ([*words, "--corrector.cap", "7"], ["--corrector.cap", "7", *words]):
        new = from_command_line(recipe, order)
        assert new.corrector == correctors.TIS(cap=7, level="sequence") and new.num_steps == 9
    assert from_command_line(recipe, [*words, "--corrector", "MIS"]).corrector == correctors.MIS()


@pytest.mark.parametrize("name", ["TIS", "dllm_rl.TIS", "dllm_rl.algorithms.correctors.TIS"])
@pytest.mark.parametrize("given", ["TIS", "dllm_rl.algorithms.correctors.TIS"])
@pytest.mark.repeated
def test_the_same_class_by_another_name_keeps_the_settings_of_a_config(recipe, tmp_path, name, given):
    (tmp_path / "a.yaml").write_text(f"corrector:\n  class_path: {name}\n  init_args:\n    cap: 3.5\n")
    words = ["--config", str(tmp_path / "a.yaml"), "--corrector", given, "--corrector.level", "sequence"]
    assert from_command_line(recipe, words).corrector == correctors.TIS(cap=3.5, level="sequence")


def test_a_later_config_chooses_another_class(recipe, tmp_path):
    """The settings of the former one's class do not count; those of the same class do."""
    classes = {"a": "TIS\n  init_args:\n    cap: 3.5", "b": "MIS", "c": "TIS\n  init_args:\n    level: sequence"}
    for stem, text in classes.items():
        (tmp_path / f"{stem}.yaml").write_text(f"corrector:\n  class_path: {text}\n")

    def read(*stems):
        return from_command_line(recipe, [word for s in stems for word in ("--config", str(tmp_path / f"{s}.yaml"))])

    assert read("a", "b").corrector == correctors.MIS()
    assert read("a", "c").corrector == correctors.TIS(cap=3.5, level="sequence")
    assert read("a", "b", "c").corrector == correctors.TIS(level="sequence")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("num_stes: 3\nseed: x\n", ["the nearest is --num_steps", "seed='x' is of type str"]),
        ("corrector:\n  class_path: TIS\n  init_args:\n    cap: 0\n", ["corrector.cap=0 must be at least 1"]),
        ("corrector:\n  class_path: TSI\n", ["corrector='TSI' is not known; the nearest is TIS"]),
        ("task:\n  clues: x\n", ["task.clues='x' must be a tuple"]),
        ("num_steps\n", ["has no lines NAME: VALUE"]),
        ("num_steps: [1\n", ["is not YAML"]),
    ],
)
def test_a_wrong_config_is_refused_by_the_same_lines(recipe, text, wanted, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(text)
    lines = errors(recipe, ["--config", str(tmp_path / "run.yaml")], capsys)
    assert len(lines) == len(wanted) and all(part in line for part, line in zip(wanted, lines, strict=True))


TEXTS = ["3.10", "0123", "12:30", "12:30:00", "2024-01-01", "yes", "on", "1e3", "0x1F", "1_000", "True", ".5", "="]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_of_a_file_stays_as_it_is_written(recipe, text, tmp_path):
    """So it does on the command line, and in lists, whose words may be numbers of tokens, too."""
    words = ["--config", str(tmp_path / "run.yaml")]
    for name in ("name", "output_dir"):
        (tmp_path / "run.yaml").write_text(f"{name}: {text}\n")
        assert getattr(override(recipe, words), name) == text == getattr(override(recipe, [f"--{name}", text]), name)
    lists = f"lora:\n  targets:\n  - {text}\n  - 'no'\nsampler: {{suppress: [{text}, 7, '7']}}\n"
    (tmp_path / "run.yaml").write_text(lists)
    from_file = override(recipe, ["--lora", "Lora", *words])
    on_line = override(
        recipe, ["--lora", "Lora", "--lora.targets", f"{text},no", "--sampler.suppress", f"{text},7,'7'"]
    )
    assert from_file.lora.targets == on_line.lora.targets == (text, "no")
    assert from_file.sampler.suppress == on_line.sampler.suppress == (text, 7, "7")


@pytest.mark.parametrize(
    "text",
    [
        "{class_path: own_method.Mine, strength: 1, note: 3.10}",
        "{class_path: own_method.Mine, init_args: {strength: 1, note: 3.10}}",
        "{class_path: Compose, init_args: {parts: [TIS, "
        "{class_path: own_method.Mine, init_args: {strength: 1, note: 3.10}}]}}",
    ],
)
def test_a_text_of_a_class_stays_as_it_is_written(recipe, own_module, text, tmp_path):
    (tmp_path / "run.yaml").write_text(f"corrector: {text}\n")
    corrector = override(recipe, ["--config", str(tmp_path / "run.yaml")]).corrector
    assert getattr(corrector, "parts", [corrector])[-1].note == "3.10"
    (method,) = read_methods(correctors.Corrector, "rank", [own_module], {"rank": {"strength": "1", "note": "3.10"}})
    assert method.note == "3.10" and method.strength == 1


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("num_steps: 3\nname: a\nnum_steps: 5\n", "sets num_steps in lines 1 and 3"),
        (
            "corrector: {class_path: TIS, init_args: {cap: 3}}\ncorrector.cap: 5\n",
            "sets corrector.cap in lines 1 and 2",
        ),
        ("corrector:\n  class_path: TIS\n  cap: 3\n  init_args:\n    cap: 5\n", "sets corrector.cap in lines 3 and 5"),
        ("corrector: TIS\ncorrector: {class_path: MIS}\n", "sets corrector in lines 1 and 2"),
        ("corrector: {class_path: Compose, init_args: {parts: [{class_path: TIS, class_path: MIS}]}}", "twice"),
        ("corrector: {class_path: TIS, cab: 3}\n", "--corrector.cab is not a setting of TIS"),
        ("output_dir: '#4'\n", "output_dir='#4' would be read as none"),
        ("name: ~\n", "name has no value in the file"),
        ("name: #4\n", "name has no value in the file"),
        ("name: &a\nnum_steps: 3\n", "name has no value in the file"),
        ("num_steps:\nname: a\n", "num_steps has no value in the file"),
        ("corrector: &this {cap: *this}\n", "is not YAML: maximum recursion"),
        ("name: !env HOME\n", "tags are not read"),
        ("num_steps: 1:30\n", "num_steps='1:30' is of type str; give int"),
        ("num_steps: 010\n", "num_steps='010' is of type str; give int"),
        ("task: {clues: [1:30, 5]}\n", "task.clues[0]='1:30' is of type str; give int"),
    ],
)
def test_a_file_that_could_be_read_in_two_ways_is_refused(recipe, text, wanted, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(text)
    (line,) = errors(recipe, ["--config", str(tmp_path / "run.yaml")], capsys)
    assert wanted in line


def test_help_explains_each_setting_with_its_bound_and_choices(recipe, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    for each in (recipe, SFT(name="sft", model=recipe.model, dataset=[])):
        lines = [" ".join(line.split()) for line in printed(each, ["--help"], capsys).splitlines()]
        told = [line for line in lines if line.startswith("--")]
        text = " ".join(lines)
        bounds = 0
        for setting in fields(each):
            if not any(line.startswith(f"--{setting.name} ") for line in told):
                continue
            assert setting.metadata["help"] and setting.metadata["help"] in text, setting.name
            if setting.metadata["bound"]:
                bounds += 1
                assert f"{setting.metadata['help']} ({setting.metadata['bound']})" in text
        assert bounds > 5
        assert "{float32,bfloat16,float16,auto}" in text and "'nf4', 'int8'" in text
    assert "known subclasses" in text


def test_help_of_a_class_shows_its_settings(recipe, capsys):
    out = " ".join(printed(recipe, ["--corrector.help", "TIS"], capsys).split())
    assert "--corrector.cap CAP Largest weight, at least 1." in out and "--corrector.level {token,sequence}" in out
    assert "--corrector.tau" in printed(recipe, ["--corrector.help"], capsys), "of the recipe's own, AIS"
    assert "Lowest probability" in printed(recipe, ["--sampler.commit.help", "Threshold"], capsys)


NAMES = [path.stem for path in sorted(Path(main_job_file).parent.glob("*.py")) if "recipe" in path.read_text()]
NO_RECIPES = ("__init__", "weights", "antibody_loops", "one_file", "results", "latin_limit")
NAMES = [name for name in NAMES if name not in NO_RECIPES]


@pytest.mark.parametrize("name", NAMES)
def test_no_recipe_is_what_the_cautions_warn_of(name):
    module = import_module(f"recipes.{name}")
    kinds = {"sudoku_unique": "LAYOUTS", "llada_8b": "TASKS"}
    made = [module.recipe_of(kind) for kind in getattr(module, kinds[name])] if name in kinds else [module.recipe]
    assert [isinstance(recipe, SFT) or cautions(recipe) for recipe in made] in ([[]] * len(made), [True])


def test_what_a_named_class_keeps_of_the_recipe_is_said(recipe, capsys):
    clipped = replace(recipe, loss=losses.PPOClip(epsilon=0.2, epsilon_high=0.3), corrector=correctors.TIS())
    given = from_command_line(clipped, ["--loss", "GSPO", "--loss.epsilon", "3e-4", "--corrector", "TIS"])
    assert given.loss == losses.GSPO(epsilon=3e-4, epsilon_high=0.3)
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "--loss GSPO keeps the recipe's epsilon_high=0.3; another value: --loss.epsilon_high"
    from_command_line(replace(recipe, likelihood=Trajectory(num_segments=8)), ["--likelihood=Trajectory"])
    assert "--likelihood Trajectory keeps the recipe's num_segments=8;" in capsys.readouterr().out
    from_command_line(recipe, ["--sampler.rank", "RandomOrder", "--loss", "GSPO", "--loss.epsilon_high", "4e-4"])
    assert capsys.readouterr().out == ""


@dataclass(frozen=True)
class Colors:
    names: list[str]
    folder: Path
    size: int = 4
    name = "colors"
    version = "1"

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return Sudoku(split="train", size=4)[index]

    def reward(self, problem, completion):
        raise NotImplementedError


@pytest.mark.slow
def test_a_task_whose_values_are_texts_is_printed_and_read_back(recipe, tmp_path, capsys):
    recipe = replace(recipe, task=Colors(names=["a", "b"], folder=Path("x")))
    (tmp_path / "run.yaml").write_text(printed(recipe, ["--task.size", "3", "--print_config"], capsys))
    read = from_command_line(recipe, ["--config", str(tmp_path / "run.yaml")])
    assert read.task == Colors(names=["a", "b"], folder=Path("x"), size=3)
