"""What commands read from a run's folder, and that nothing of its text is executed."""

import io
import json
from argparse import Namespace
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
from tiny_recipe import SIZES, tiny_recipe

from dllm_rl import grpo, sft, train
from dllm_rl.cli import evaluate_run as evaluate_command
from dllm_rl.cli import options as options_module
from dllm_rl.cli import run_settings, sample
from dllm_rl.cli.main import main
from dllm_rl.cli.options import open_policy
from dllm_rl.cli.run_settings import sampler_of, task_of
from dllm_rl.frontend.grpo import num_blanks
from dllm_rl.groups import Log
from dllm_rl.integrations.serving.engine import HTTPSampler
from dllm_rl.likelihoods.estimators import OneStep
from dllm_rl.models.tiny import tiny_diffusion_gemma, tiny_masked_lm
from dllm_rl.quantization.schemes import Int8WeightOnly
from dllm_rl.records import describe, from_json, to_json
from dllm_rl.samplers import rules
from dllm_rl.samplers.autoregress import Autoregress
from dllm_rl.samplers.cache import DualCache, PrefixCache
from dllm_rl.samplers.renoise import Renoise
from dllm_rl.samplers.revise import Remask
from dllm_rl.samplers.rules import Threshold
from dllm_rl.samplers.sampler import FunctionSampler, Sampler
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.samplers.with_settings import sampler_with
from dllm_rl.tasks import Countdown, Sudoku
from dllm_rl.tasks.prompt_texts import BLANK

pytestmark = pytest.mark.usefixtures("no_rehearsal")


def made(name, **settings):
    """A record as a checkpoint stores it."""
    return {"class_path": name, "init_args": settings}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    sampler = Unmask(max_new_tokens=16, diffusion_steps=None, commit=Threshold(tau=0.75))
    rollout = {"sampler": sampler.replace(temperature=0.8), "rollout_quantization": Int8WeightOnly()}
    rollout |= {"train_batch_size": 1, "num_generations": 2, "likelihood": OneStep()}
    evaluations = {"eval_sampler": sampler.replace(suppress=(0, 2)), "eval_task": Sudoku(split="test", size=5)}
    train(tiny_recipe(folder, num_steps=1, **rollout, **evaluations))
    return folder


@pytest.mark.repeated(first_only=True)
@pytest.mark.parametrize("checkpoint", ["", "checkpoints/step-000001"])
def test_evaluate_takes_task_and_sampler_from_the_run_and_finds_its_numbers(run, capsys, checkpoint):
    assert main(["evaluate", str(run / checkpoint), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    summary = json.loads((run / "summary.json").read_text())
    assert row["task"] == "sudoku" and row["n"] == summary["eval_problems"]
    assert row["commit"] == "Threshold(tau=0.75)" and row["max_new_tokens"] == 16
    assert row["solve_rate"] == summary["eval_after"]["solve_rate"]
    assert row["cell_accuracy"] == pytest.approx(summary["eval_after"]["cell_accuracy"], rel=1e-12)


def test_an_option_replaces_the_runs_own(run, capsys):
    assert main(["evaluate", str(run), "--json", "--limit", "2", "--commit", "Schedule", "--set", "seed=3"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["n"] == 2 and row["commit"] == "Schedule()"


def store(monkeypatch, **settings):
    """Let any model be a run with these settings, as a checkpoint stores them."""
    stored = json.loads(json.dumps({name: v if isinstance(v, dict) else to_json(v) for name, v in settings.items()}))
    for module in (options_module, run_settings):
        monkeypatch.setattr(module, "recipe_of", lambda model: stored)


OWN = Sudoku(split="validation", clues=8, size=3, seed=5, prompt_format="text")
RUNS = {
    "own": {"eval_task": OWN},
    "numbers": {"eval_task": Countdown(split="test", count=4)},
    "script": {"eval_task": "mine:Words"},
}


def task_for(monkeypatch, command):
    """The task of `evaluate COMMAND`, before a protocol grades it, where only the names of RUNS are runs."""
    stored = {name: {"eval_task": to_json(recipe["eval_task"])} for name, recipe in RUNS.items()}
    for module in (options_module, run_settings):
        monkeypatch.setattr(module, "recipe_of", stored.get)
    made = []
    monkeypatch.setattr(
        "dllm_rl.cli.evaluate_run.evaluate_command", lambda given: made.append(evaluate_command.make_task(given))
    )
    assert main(["evaluate", *command.split()]) == 0
    return made[0].task


@pytest.mark.parametrize(
    ("command", "task"),
    [
        ("own --task sudoku", OWN),
        ("base own --task sudoku", OWN),
        ("base own", OWN),
        ("base other numbers own --task sudoku", OWN),
        ("script own --task sudoku", OWN),
        ("own --task sudoku --set clues=9", replace(OWN, clues=9)),
        ("own --task sudoku --split test", replace(OWN, split="test")),
        ("numbers own", RUNS["numbers"]["eval_task"]),
        ("own --task countdown", Countdown(split="test")),
        ("base --task sudoku", Sudoku(split="test")),
        ("script --task sudoku", Sudoku(split="test")),
    ],
)
def test_the_task_of_the_first_run_that_has_it_keeps_its_settings(monkeypatch, command, task):
    assert task_for(monkeypatch, command) == task


@pytest.mark.parametrize("option", ["", "--task sudoku "])
def test_all_rows_of_a_file_are_asked_as_the_run_asks(monkeypatch, tmp_path, option):
    rows = [{"Puzzle": "1234341221430000", "Solution": "1234341221434321"}] * 5
    (tmp_path / "own.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    task = task_for(monkeypatch, f"own {option}--path {tmp_path}/own.jsonl")
    assert len(task) == 5 and (task.split, task.prompt_format) == ("test", "text")


@pytest.mark.parametrize(
    ("models", "message"), [("base other", "task is not given, and 'base'"), ("base script own", "script: a script")]
)
def test_without_an_option_the_first_run_decides(monkeypatch, models, message):
    with pytest.raises(AssertionError):
        task_for(monkeypatch, models)
    with pytest.raises(ValueError, match=message):
        run_settings.task_named(models.split(), None)


class TestEvaluatePlans:
    """An option replaces one setting of the run's sampler, and the others stay."""

    UNMASK = Unmask(
        max_new_tokens=8,
        diffusion_steps=6,
        block_size=4,
        temperature=0.7,
        top_p=0.9,
        suppress=(0, 2),
        rank=rules.Confidence(),
    )
    THRESHOLD = Unmask(max_new_tokens=8, commit=Threshold(tau=0.75))
    POLICY = SimpleNamespace(spec=SimpleNamespace(attention="full", block_size=None, name="tiny"))
    CAUSAL = SimpleNamespace(spec=SimpleNamespace(attention="causal", block_size=None, name="tiny"))
    RENOISE = SimpleNamespace(spec=SimpleNamespace(attention="encoder_decoder", block_size=4, name="tiny"))

    def plans(self, monkeypatch, sampler, options="", policy=POLICY):
        """Rows and samplers of `evaluate RUN OPTIONS`, where RUN's evaluations are by this sampler."""
        store(monkeypatch, eval_sampler=sampler)
        seen = []
        monkeypatch.setattr("dllm_rl.cli.evaluate_run.evaluate_command", seen.append)
        assert main(["evaluate", "runs/a", "--task", "sudoku", *options.split()]) == 0
        return evaluate_command.make_plans(policy, Sudoku(), seen[0])

    @pytest.mark.parametrize(
        ("options", "changed"),
        [
            ("--diffusion_steps 4", {"diffusion_steps": 4}),
            ("--temperature 0", {"temperature": 0.0}),
            ("--temperature 1.5", {"temperature": 1.5}),
            ("--rank RandomOrder", {"rank": rules.RandomOrder()}),
            ("--max_new_tokens 4", {"max_new_tokens": 4, "diffusion_steps": 3}),  # as many tokens per step
            ("--max_new_tokens 16", {"max_new_tokens": 16, "diffusion_steps": 12}),
            ("--block_size 8", {"block_size": 8}),
            ("--cache DualCache --cache.refresh 2", {"cache": DualCache(refresh=2)}),
            ("--samples 3", {}),
            ("--commit LateSchedule", {"commit": rules.LateSchedule()}),
            ("--max_new_tokens 16 --diffusion_steps 8 --rank RandomOrder",
             {"max_new_tokens": 16, "diffusion_steps": 8, "rank": rules.RandomOrder()}),
        ],
    )  # fmt: skip
    def test_one_setting_changes(self, monkeypatch, options, changed):
        ((before, sampler),) = self.plans(monkeypatch, self.UNMASK)
        assert (before["temperature"], before["commit"]) == (0.7, "Schedule()")
        assert sampler == sampler_of("runs/a") == self.UNMASK
        ((row, changed_sampler),) = self.plans(monkeypatch, self.UNMASK, options)
        assert changed_sampler == sampler.replace(**changed)
        differ = {name for name in before if row[name] != before[name]}
        assert differ == changed.keys()

    def test_filters_of_the_token_draw(self, monkeypatch):
        ((row, sampler),) = self.plans(monkeypatch, self.UNMASK, "--top_p 0.5")
        assert (row["top_p"], sampler.top_p, sampler.top_k) == (0.5, 0.5, None)
        own = Autoregress(max_new_tokens=8, top_k=3)
        ((row, sampler),) = self.plans(monkeypatch, own, "--top_k 2", self.CAUSAL)
        assert (row["top_k"], sampler.top_k) == (2, 2)
        for option in ("--top_p 0.5", "--suppress 0"):
            with pytest.raises(
                ValueError, match=f"{option.split()[0].removeprefix('--')}=.* is not a setting of Renoise, the"
            ):
                self.plans(monkeypatch, Renoise(max_new_tokens=8), option, self.RENOISE)

    @pytest.mark.parametrize(
        ("text", "kept"), [("3", (3,)), ("1,4", (1, 4)), ("none", ()), ("3,<eos>", (3, "<eos>")), ("A,2", ("A", 2))]
    )
    def test_suppressed_tokens_replace_the_runs(self, monkeypatch, text, kept):
        ((row, sampler),) = self.plans(monkeypatch, self.UNMASK, f"--suppress {text}")
        assert row["suppress"] == sampler.suppress == kept

    def test_lists_give_one_plan_each(self, monkeypatch):
        plans = self.plans(monkeypatch, self.UNMASK, "--diffusion_steps 2,4 --rank RandomOrder,MaxProb")
        assert [(row["rank"], row["diffusion_steps"]) for row, _ in plans] == [
            ("RandomOrder()", 2), ("RandomOrder()", 4), ("MaxProb()", 2), ("MaxProb()", 4)]  # fmt: skip
        assert all(sampler.suppress == (0, 2) for _, sampler in plans)

    def test_a_rank_of_ones_own_is_imported_and_the_runs_sampler_with_it_is_kept(self, monkeypatch, tmp_path):
        (tmp_path / "rank_of_mine.py").write_text(
            "from dllm_rl import Rank\n\nclass Peak(Rank):\n    sharpness: float = 1.0\n\n"
            "    def __call__(self, logits, normalizer):\n        return self.sharpness * logits.amax(-1)\n"
        )
        monkeypatch.chdir(tmp_path)
        stored = made("Unmask", max_new_tokens=8, block_size=4, rank=made("rank_of_mine.Peak", sharpness=2.0))
        options = "--rank rank_of_mine.Peak --rank.sharpness 2.0"
        ((row, sampler),) = self.plans(monkeypatch, stored, options)
        assert (row["max_new_tokens"], row["block_size"]) == (8, 4)
        assert type(sampler.rank).__name__ == "Peak" and sampler.rank.sharpness == 2.0
        for name, message in (("Absent", "has no attribute 'Absent'"), ("Rank.check", "is not a subclass of Rank")):
            with pytest.raises(ValueError, match=message):
                self.plans(monkeypatch, stored, f"--rank rank_of_mine.{name}")

    def test_a_rule_that_needs_another_rank_gets_it(self, monkeypatch):
        options = "--commit Threshold,EntropyBound --commit.tau 0.9 --commit.gamma 0.5"
        plans = self.plans(monkeypatch, self.UNMASK, options)
        assert [row["rank"] for row, _ in plans] == ["Confidence()", "Entropy()"]
        assert plans[1][1].rank == rules.Entropy() and plans[1][1].commit == rules.EntropyBound(gamma=0.5)

    def test_an_adaptive_rule_has_no_number_of_steps(self, monkeypatch):
        ((row, sampler),) = self.plans(monkeypatch, self.THRESHOLD, "--max_new_tokens 4")
        assert row["commit"] == "Threshold(tau=0.75)" and sampler.max_new_tokens == 4
        for option, message in (
            ("--diffusion_steps 4", r"commit=Threshold\(tau=0.75\) chooses its number of steps; add --commit Schedule"),
            ("--samples 2", "samples=2 at temperature=0 would all be equal"),
        ):
            with pytest.raises(ValueError, match=message):
                self.plans(monkeypatch, self.THRESHOLD, option)
        ((row, _),) = self.plans(monkeypatch, self.THRESHOLD, "--diffusion_steps 4 --commit Schedule")
        assert (row["commit"], row["diffusion_steps"]) == ("Schedule()", 4)

    def test_other_samplers(self, monkeypatch):
        own = Autoregress(max_new_tokens=8, top_k=3)
        ((row, sampler),) = self.plans(monkeypatch, own, "", self.CAUSAL)
        assert row == {"max_new_tokens": 8, "temperature": 1.0} and sampler == own
        ((_, sampler),) = self.plans(monkeypatch, own, "--temperature 0.5", self.CAUSAL)
        assert sampler == own.replace(temperature=0.5)
        own = Renoise(max_new_tokens=8, t_max=0.9)
        ((_, sampler),) = self.plans(monkeypatch, own, "--diffusion_steps 5", self.RENOISE)
        assert sampler == own.replace(diffusion_steps=5)


def test_evaluate_takes_the_runs_suppressed_ids_with_another_number_of_steps(run, capsys, tmp_path):
    options = ["--limit", "2", "--commit", "Schedule", "--diffusion_steps", "4", "--output_dir", str(tmp_path)]
    assert main(["evaluate", str(run), *options, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["diffusion_steps"], row["max_new_tokens"], row["forwards_per_answer"]) == (4, 16, 4.0)
    ((path,),) = [list(tmp_path.glob("completions-*.jsonl"))]
    assert "suppress=(0, 2)" in path.read_text()


def test_sample_keeps_the_runs_rank_with_another_rule(monkeypatch):
    own = Unmask(max_new_tokens=8, temperature=0.7, rank=rules.Confidence())
    store(monkeypatch, eval_sampler=own)
    monkeypatch.setattr("dllm_rl.cli.sample.open_policy", lambda arguments: TestEvaluatePlans.POLICY)
    seen = []

    def complete(policy, problems, sampler, **_):
        seen.append(sampler)
        raise ValueError("enough")

    monkeypatch.setattr("dllm_rl.cli.sample.complete_problems", complete)
    for rule in ("LateSchedule", "Remask --commit.eta 0.5"):
        assert main(["sample", "runs/a", "12", "--commit", *rule.split()]) == 2
    remask = own.replace(commit=Remask(eta=0.5), rank=rules.RandomOrder())
    assert seen == [own.replace(commit=rules.LateSchedule()), remask]


def stored_sampler(run, field):
    """The sampler in a run's summary.json."""
    return from_json(Sampler, json.loads((run / "summary.json").read_text())["recipe"][field], field)


def test_sample_takes_sampler_and_problems_from_the_run(run, capsys, monkeypatch):
    """Its suppressed ids, too; an option replaces one of them."""
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    assert main(["sample", str(run), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    task = Sudoku(**task_of(str(run))[1])
    assert [row["prompt"] for row in record["rows"]] == [task[i].prompt for i in range(4)]
    assert record["sampler"] == describe(stored_sampler(run, "eval_sampler"))
    assert main(["sample", str(run), "12", "--json", "--suppress", "3,4", "--max_new_tokens", "5"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert "suppress=(3, 4)" in record["sampler"] and "tau=0.75" in record["sampler"]
    assert [row["prompt"] for row in record["rows"]] == ["12"] and record["num_tokens"] == 5
    assert not {"1", "2"} & {token["text"] for row in record["rows"] for token in row["tokens"]}  # ids 3 and 4


@pytest.mark.parametrize("options", [[], ["--quantization", "none", "--temperature", "0.5"]])
def test_doctor_takes_task_sampler_and_scheme_from_the_run(run, monkeypatch, options):
    seen = {}

    def diagnose(policy, scheme, *, prompts, sampler, seed):
        seen.update(scheme=scheme, sampler=sampler, group=prompts.group.tolist())
        raise ValueError("enough")

    monkeypatch.setattr("dllm_rl.doctor.mismatch.diagnose", diagnose)
    assert main(["doctor", str(run), "--num_prompts", "3", *options]) == 2
    sampler = stored_sampler(run, "sampler")
    assert sampler.temperature == 0.8
    assert seen["group"] == [0, 0, 1, 1, 2, 2]
    assert seen["sampler"] == (sampler.replace(temperature=0.5) if options else sampler)
    assert seen["scheme"] == (None if options else Int8WeightOnly())


def test_the_doctor_checks_a_runs_checkpoint_as_a_model(run, monkeypatch):
    seen = []
    monkeypatch.setattr("dllm_rl.cli.check_model.check_model_command", lambda arguments: seen.append(arguments.quick))
    assert not main(["doctor", str(run / "checkpoints" / "step-000001"), "--quick"]) and seen == [True]


def test_a_doctor_asked_for_the_runs_task_samples_the_runs_problems(run, monkeypatch):
    seen = []

    def encode(policy, problems, **_):
        seen.append([problem.prompt for problem in problems])
        raise ValueError("enough")

    monkeypatch.setattr("dllm_rl.decoding.prompts.encode", encode)
    task = Sudoku(split="test", clues=8)
    stored = run_settings.recipe_of(str(run)) | {"eval_task": to_json(task)}
    for module in (options_module, run_settings):
        monkeypatch.setattr(module, "recipe_of", lambda model: stored)
    for options in ((), ("--task", "sudoku"), ("--task", "countdown")):
        assert main(["doctor", str(run), "--num_prompts", "3", *options]) == 2
    own = [task[i].prompt for i in range(3)]
    assert seen == [own, own, [Countdown()[i].prompt for i in range(3)]]


def own_rank(uniforms):
    return uniforms


class OwnSampler(Sampler):
    pass


@pytest.mark.parametrize(
    "stored",
    [
        made("mine.OwnSampler", max_new_tokens=4),
        to_json(FunctionSampler(max_new_tokens=4, function=own_rank)),
        to_json(Unmask(max_new_tokens=4, rank=own_rank)),
        made("Unmask", max_new_tokens=4, rank=made("mine.Rank")),
        made("Unmask", max_new_tokens=4, other=1),
        made("Threshold", tau=0.5),
        made("os.system", command="exit 1"),
        made("Unmask"),
        "mine:sampler(temperature=1.0)",
        None,
    ],
)
def test_a_scripts_sampler_is_named_and_the_librarys_is_not(run, monkeypatch, capsys, stored):
    assert sampler_of(str(run)) is not None and sampler_of("no run") is None
    assert capsys.readouterr().err == ""
    for module in (options_module, run_settings):
        monkeypatch.setattr(module, "recipe_of", lambda model: {"eval_sampler": stored})
    assert sampler_of("runs/mine") is None
    assert capsys.readouterr().err.startswith(f"note: eval_sampler={stored} ")


@pytest.mark.parametrize(
    ("run", "length", "steps"),
    [
        ({"max_new_tokens": 16, "diffusion_steps": 4}, 8, 2),  # four tokens per step
        ({"max_new_tokens": 16, "diffusion_steps": 4}, 9, 3),
        ({"max_new_tokens": 16, "diffusion_steps": 4}, 64, 16),
        ({"max_new_tokens": 16, "diffusion_steps": 4, "block_size": 4}, 20, 5),
        ({"max_new_tokens": 16, "diffusion_steps": 2, "block_size": 8}, 32, 4),
        ({"max_new_tokens": 16, "diffusion_steps": 2, "block_size": 8}, 33, 5),  # a block needs one
        ({"max_new_tokens": 0, "diffusion_steps": 8}, 4, 4),  # blanks, whose number is not known
        ({"max_new_tokens": 0, "diffusion_steps": 8}, 16, 8),
        ({"max_new_tokens": 16, "diffusion_steps": 4}, 0, 4),
        ({"max_new_tokens": 16}, 8, None),  # one per token
    ],
)
def test_another_length_keeps_the_tokens_per_step(run, length, steps):
    expected = Unmask(**run).replace(max_new_tokens=length, diffusion_steps=steps)
    assert sampler_with(tiny_masked_lm(**SIZES), Unmask(**run), {"max_new_tokens": length}) == expected


def test_a_shorter_completion_takes_fewer_steps_and_the_runs_own_length_does_not():
    policy, of_canvases = tiny_masked_lm(**SIZES), tiny_diffusion_gemma(characters="123=", canvas_length=4)
    own = Unmask(max_new_tokens=2, diffusion_steps=8)  # 8 steps: open positions beside the 2 new ones
    assert sampler_with(policy, own, {"temperature": 0.5, "max_new_tokens": None}) == own.replace(temperature=0.5)
    shorter = sampler_with(policy, own, {"max_new_tokens": 4, "diffusion_steps": None})
    assert shorter == Unmask(max_new_tokens=4, diffusion_steps=4)
    # The steps of `Renoise` are those of a canvas, which may be more than its tokens.
    per_canvas = Renoise(max_new_tokens=8, diffusion_steps=8)
    assert sampler_with(of_canvases, per_canvas, {"max_new_tokens": 4}) == per_canvas.replace(max_new_tokens=4)
    given = {"max_new_tokens": 4, "diffusion_steps": 9}  # refused when it samples, as it was typed
    assert sampler_with(policy, own, given) == Unmask(**given)


def test_a_sampler_of_another_kind_of_model_gives_nothing_to_the_policys():
    assert sampler_with(tiny_masked_lm(**SIZES), Autoregress(max_new_tokens=4, top_k=3), {}) == Unmask(
        max_new_tokens=16
    )


def test_the_sampler_of_a_server_gives_its_settings_to_the_policys():
    causal = SimpleNamespace(spec=SimpleNamespace(attention="causal", block_size=None, name="tiny"))
    served = HTTPSampler(max_new_tokens=40, temperature=0.7, top_k=3)
    wanted = Autoregress(max_new_tokens=40, temperature=0.7, top_k=3)
    assert sampler_with(causal, served, {}) == wanted
    assert sampler_with(causal, served, {"max_new_tokens": 4}) == wanted.replace(max_new_tokens=4)
    unmask = sampler_with(tiny_masked_lm(**SIZES), served, {})
    assert type(unmask) is Unmask and (unmask.max_new_tokens, unmask.temperature, unmask.top_k) == (40, 0.7, 3)
    other = sampler_with(causal, Unmask(max_new_tokens=40), {})
    assert other == Autoregress(max_new_tokens=16, temperature=0.0)  # of another kind of model


@pytest.mark.parametrize(
    "stored", [to_json(Int8WeightOnly()) | {"class_path": "mine.Scheme"}, made("Int8WeightOnly", bits=3), "mine:scheme"]
)
def test_a_scripts_scheme_is_named(monkeypatch, stored):
    for module in (options_module, run_settings):
        monkeypatch.setattr(module, "recipe_of", lambda model: {"rollout_quantization": stored})
    with pytest.raises(ValueError) as error:
        run_settings.scheme_of("runs/mine")
    assert f"a script defines its rollout_quantization, {stored}; give --quantization" in str(error.value)


def test_what_is_read_back_is_what_was_stored(run):
    wanted = json.loads((run / "summary.json").read_text())["recipe"]
    assert to_json(sampler_of(str(run))) == wanted["eval_sampler"]
    name, settings = task_of(str(run))
    assert name == "sudoku" and to_json(Sudoku(**settings)) == wanted["eval_task"]


def test_a_scripts_task_is_named(monkeypatch):
    for stored in (
        made("mine.Words", seed=1),
        made("mine.Sudoku"),
        made("Sudoku", seed=1, words=2),
        "mine:Words",
        None,
    ):
        for module in (options_module, run_settings):
            monkeypatch.setattr(module, "recipe_of", lambda model, stored=stored: {"eval_task": stored})
        with pytest.raises(ValueError) as error:
            task_of("run")
        assert f"a script defines its task, {stored}; give --task" in str(error.value)


@pytest.mark.parametrize(
    ("max_new_tokens", "prompts"),
    [(4, ["1+1=", [{"role": "user", "content": "hi"}]]), (0, [])],  # without blanks, nothing is sampled
)
def test_problems_of_a_scripts_task_are_the_prompts_of_its_completions(tmp_path, monkeypatch, max_new_tokens, prompts):
    store(monkeypatch, eval_task="mine:Words", eval_sampler=Unmask(max_new_tokens=max_new_tokens))
    assert run_settings.problems_of(str(tmp_path), 3) == []
    chat = [{"role": "user", "content": "hi"}]
    rows = [{"step": 0, "prompt": prompt} for prompt in ("1+1=", "1+1=", chat, "2+2=")]
    (tmp_path / "completions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows) + "half a li")
    assert [problem.prompt for problem in run_settings.problems_of(str(tmp_path), 2)] == prompts


@pytest.mark.parametrize("max_new_tokens", [2, 0])
def test_problems_of_an_infilling_run_have_its_blanks(tmp_path, max_new_tokens):
    rows = [{"prompt": f"{a}_=", "answer": f"{a}1="} for a in "12345678"]
    settings = {"max_new_tokens": max_new_tokens, "num_steps": 1, "train_batch_size": 2, "num_generations": 2}
    settings |= {"blank": "_", "report_to": None, "output_dir": str(tmp_path), "log": Log(completions_steps=1)}

    def reward(completions, **columns):
        return [float("3" in text) for text in completions]

    grpo(tiny_masked_lm(**SIZES | {"characters": "12345678=_"}), rows, reward, **settings)
    problems = run_settings.problems_of(str(tmp_path), 2)
    assert len(problems) == 2 and {num_blanks(problem) for problem in problems} == {1}


@pytest.mark.parametrize("options", [[], ["--num_prompts", "0"]])
def test_a_doctor_without_prompts_names_the_option(tmp_path, monkeypatch, capsys, options):
    for module in (options_module, run_settings):
        monkeypatch.setattr(module, "recipe_of", lambda model: {"eval_task": made("mine.Words")})
    (tmp_path / "checkpoints").mkdir()
    assert main(["doctor", str(tmp_path), *options]) == 2
    assert ("num_prompts=0" if options else "--task") in capsys.readouterr().err


@pytest.mark.parametrize("passed", [{"commit": rules.EntropyBound(gamma=0.1)}, {"rank": rules.Margin()}], ids=str)
def test_what_only_a_runs_own_rules_can_do_is_left_out_with_others(passed):
    """A compiled step."""
    policy = tiny_masked_lm(**SIZES)
    compiled = Unmask(max_new_tokens=4, rank=rules.MaxProb(), compile_step=True)
    assert not sampler_with(policy, compiled, passed).compile_step
    assert sampler_with(policy, compiled, {"temperature": 0.5}).compile_step


def test_a_custom_policy_computes_logits_as_it_says(tmp_path):
    asked = {"make_model": None, "dtype": "auto", "device": "cpu", "verify_checkpoint": "full"}
    policy = half_policy()
    policy.save_pretrained(tmp_path / "saved")
    made = Namespace(model=str(tmp_path / "saved"), **asked | {"make_model": f"{__name__}:half_policy"})
    assert not open_policy(made).float32_head
    assert open_policy(Namespace(model=str(tmp_path / "saved"), **asked)).float32_head


def half_policy():
    policy = tiny_masked_lm(**SIZES)
    policy.float32_head = False
    return policy


def standard_input(monkeypatch, text):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))


@pytest.mark.slow
def test_prompts_by_a_pipe_have_the_form_of_the_runs_too(tmp_path, capsys, monkeypatch):
    """Of an infilling run, whose prompts have blanks; and a task whose file is gone is not opened."""
    task = Sudoku(split="test", size=4, infill=True)
    sampler = Unmask(max_new_tokens=0, temperature=1.0)
    recipe = tiny_recipe(tmp_path, num_steps=1, sft_warmup_steps=0, sampler=sampler, eval_sampler=sampler.greedy())
    model = partial(tiny_masked_lm, characters="1234.=" + BLANK)
    train(replace(recipe, model=model, task=task, eval_task=task, validation_task=task))
    prompt = task[0].prompt
    monkeypatch.setattr(sample, "problems_of", lambda *_: pytest.fail("opens the task"))
    found = []
    capsys.readouterr()
    for arguments in ([prompt], []):
        standard_input(monkeypatch, prompt + "\n")
        assert main(["sample", str(tmp_path), *arguments, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["rows"][0]["completion"])
    assert found[0] == found[1] != prompt


@pytest.mark.slow
def test_no_cache_is_a_setting_too(tmp_path, capsys):
    sampler = Unmask(max_new_tokens=16, cache=PrefixCache())
    train(tiny_recipe(tmp_path, num_steps=1, sft_warmup_steps=0, eval_sampler=sampler))
    capsys.readouterr()
    for options, cache in (([], "PrefixCache(refresh=None)"), (["--cache", "none"], "None")):
        assert main(["sample", str(tmp_path), "1234", "--json", *options]) == 0
        assert f"cache={cache}" in json.loads(capsys.readouterr().out)["sampler"]
    assert main(["evaluate", str(tmp_path), "--limit", "1", "--cache", "none", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cache"] == "none"
    for option in ("--rank", "--commit"):
        assert main(["sample", str(tmp_path), "1234", option, "none"]) == 2
        assert f"{option} none: a sampler has a {option[2:]}" in capsys.readouterr().err


def made_with_a_seed(seed):
    return tiny_masked_lm(**SIZES, seed=seed)


def test_a_function_that_takes_a_seed_makes_the_model(run, capsys):
    name = f"{__name__}:made_with_a_seed"
    assert main(["sample", str(run), "12=", "--make_model", name, "--max_new_tokens", "4"]) == 0


@pytest.mark.slow
def test_a_supervised_run_is_diagnosed_under_the_default_scheme(tmp_path, capsys):
    rows = [{"prompt": f"{a}=", "completion": f"{a}"} for a in "1234"] * 2
    model = tiny_masked_lm(**SIZES)
    options = {"completion_length": 1, "num_steps": 1, "train_batch_size": 2, "report_to": None}
    checkpoint = sft(model, rows, output_dir=str(tmp_path), **options)["checkpoint"]
    worst = []
    capsys.readouterr()
    for folder in (str(tmp_path), checkpoint):
        words = ["--task", "sudoku", "--num_prompts", "2", "--max_new_tokens", "4", "--json"]
        assert main(["doctor", folder, *words]) == 0
        out, error = capsys.readouterr()
        assert "eval_sampler" not in error
        worst.append(json.loads(out))
    assert worst[0]["scheme"] == worst[1]["scheme"] and "Float8" in str(worst[0]["scheme"])


@pytest.mark.slow
def test_the_printed_command_is_of_the_best_checkpoint(tmp_path, capsys):
    best = {"eval_steps": 1, "metric_for_best_model": "reward", "load_best_model_at_end": True}
    recipe = tiny_recipe(tmp_path, num_steps=3, save_steps=1, save_total_limit=9, sft_warmup_steps=0, **best)
    summary = train(recipe)
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if line.startswith("Sample:")]
    step = summary["best_step"]
    is_last = step == 3
    assert (summary["checkpoint"] in line) == (not is_last)
