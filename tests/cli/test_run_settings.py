"""What commands read from a run's folder, and that nothing of its text is executed."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
from tiny_recipe import tiny_recipe

from dllm_rl import train
from dllm_rl.cli import run_settings
from dllm_rl.cli.main import main
from dllm_rl.cli.run_settings import read_call, sampler_of, sampler_or_note, task_of, with_given
from dllm_rl.members import describe
from dllm_rl.quantization.schemes import int8_weight_only
from dllm_rl.samplers.rules import threshold
from dllm_rl.samplers.unmask import unmask
from dllm_rl.tasks import Sudoku


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    sampler = partial(unmask, max_new_tokens=16, diffusion_steps=None, commit=partial(threshold, tau=0.75))
    rollout = {"sampler": partial(sampler, temperature=0.8), "rollout_quantization": int8_weight_only}
    train(
        tiny_recipe(folder, num_steps=1, sft_warmup_steps=0, eval_sampler=partial(sampler, suppress=(0, 2)), **rollout)
    )
    return folder


def test_evaluate_takes_task_and_sampler_from_the_run_and_finds_its_numbers(run, capsys):
    assert main(["evaluate", str(run), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    summary = json.loads((run / "summary.json").read_text())
    assert row["task"] == "sudoku" and row["n"] == summary["eval_problems"]
    assert row["commit"] == "threshold(tau=0.75)" and row["max_new_tokens"] == 16
    assert row["solve_rate"] == summary["eval_after"]["solve_rate"]
    assert row["cell_accuracy"] == pytest.approx(summary["eval_after"]["cell_accuracy"], rel=1e-12)


def test_an_option_replaces_the_runs_own(run, capsys):
    assert main(["evaluate", str(run), "--json", "--limit", "2", "--commit", "schedule", "--set", "seed=3"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["n"] == 2 and row["commit"] == "schedule"


def test_sample_takes_sampler_and_problems_from_the_run(run, capsys, monkeypatch):
    """Its suppressed ids, too; an option replaces one of them."""
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    assert main(["sample", str(run), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    task = Sudoku(**task_of(str(run))[1])
    assert [row["prompt"] for row in record["rows"]] == [task[i].prompt for i in range(4)]
    assert record["sampler"] == json.loads((run / "summary.json").read_text())["recipe"]["eval_sampler"]
    assert main(["sample", str(run), "12", "--json", "--suppress", "3,4", "--max_new_tokens", "5"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert "suppress=(3, 4)" in record["sampler"] and "tau=0.75" in record["sampler"]
    assert [row["prompt"] for row in record["rows"]] == ["12"] and record["num_tokens"] == 5
    assert not {"1", "2"} & {token["text"] for row in record["rows"] for token in row["tokens"]}  # ids 3 and 4


@pytest.mark.parametrize("options", [[], ["--quantization", "none", "--temperature", "0.5"]])
def test_doctor_takes_task_sampler_and_scheme_from_the_run(run, monkeypatch, options):
    seen = {}

    def diagnose(policy, scheme, *, prompts, sampler, seed):
        seen.update(scheme=scheme, sampler=describe(sampler), rows=len(prompts.tokens))
        raise ValueError("enough")

    monkeypatch.setattr("dllm_rl.diagnostics.doctor.diagnose", diagnose)
    assert main(["doctor", str(run), "--num_prompts", "3", *options]) == 2
    sampler = json.loads((run / "summary.json").read_text())["recipe"]["sampler"]
    wanted = sampler.replace("temperature=0.8", "temperature=0.5") if options else sampler
    assert seen["rows"] == 3 and seen["sampler"] == wanted
    assert (seen["scheme"] is None) == bool(options)


@pytest.mark.parametrize("text", ["mine:sampler(temperature=1.0)", "unmask(max_new_tokens=4, rank=mine:rank)", None])
def test_a_scripts_sampler_is_named_and_the_librarys_is_not(run, monkeypatch, capsys, text):
    assert sampler_or_note(str(run)) is not None and sampler_or_note("no run") is None
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(run_settings, "recipe_of", lambda model: {"eval_sampler": text})
    assert sampler_or_note("runs/mine") is None
    assert capsys.readouterr().err.startswith(f"note: eval_sampler={text} ")


def test_a_shorter_completion_takes_fewer_steps_and_the_runs_own_length_does_not():
    settings = {"max_new_tokens": 2, "diffusion_steps": 8}  # 8 steps: open positions beside the 2 new ones
    assert with_given(settings, {"temperature": 0.5, "max_new_tokens": None}) == {**settings, "temperature": 0.5}
    assert with_given(settings, {"max_new_tokens": 4}) == {"max_new_tokens": 4, "diffusion_steps": 4}
    given = {"max_new_tokens": 4, "diffusion_steps": 9}  # refused by the sampler, as it was typed
    assert with_given(settings, given) == given


def test_a_scripts_scheme_is_named(monkeypatch):
    monkeypatch.setattr(run_settings, "recipe_of", lambda model: {"rollout_quantization": "mine:scheme(bits=3)"})
    with pytest.raises(ValueError, match="rollout_quantization is of a script, mine:scheme"):
        run_settings.scheme_of("runs/mine")


def test_what_is_read_back_is_what_was_described(run):
    sampler = sampler_of(str(run))
    wanted = json.loads((run / "summary.json").read_text())["recipe"]
    assert describe(sampler) == wanted["eval_sampler"]
    name, settings = task_of(str(run))
    assert name == "sudoku" and describe(Sudoku(**settings)) == wanted["eval_task"]


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('x')",
        "Sudoku(split=open('x'))(1)",
        "Sudoku(*x)",
        "Sudoku(**{'split': 'test'})",
        "Sudoku(split=[x for x in y])",
        "DatasetTask(reward_funcs=(mine:reward))",
        "(" * 5000,
        "Sudoku",
        None,
    ],
)
def test_other_text_is_no_call(text):
    assert read_call(text) is None


def test_a_call_within_a_call_stays_a_name():
    assert read_call("f(a=g(b=1), c=h, d=(1, 2))") == ("f", {"a": ("g", {"b": 1}), "c": ("h", {}), "d": (1, 2)})


def test_a_model_that_names_no_task_needs_the_option(tmp_path, capsys):
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "task" in capsys.readouterr().err


def test_a_scripts_task_is_named(monkeypatch):
    monkeypatch.setattr(run_settings, "recipe_of", lambda model: {"eval_task": "mine:Words(seed=1)"})
    with pytest.raises(ValueError, match="of a script, mine:Words"):
        task_of("run")


@pytest.mark.parametrize(
    ("max_new_tokens", "prompts"),
    [(4, ["1+1=", [{"role": "user", "content": "hi"}]]), (0, [])],  # of blanks the file says nothing
)
def test_problems_of_a_scripts_task_are_the_prompts_of_its_completions(tmp_path, monkeypatch, max_new_tokens, prompts):
    sampler = f"unmask(max_new_tokens={max_new_tokens})"
    monkeypatch.setattr(run_settings, "recipe_of", lambda model: {"eval_task": "mine:Words()", "eval_sampler": sampler})
    assert run_settings.problems_of(str(tmp_path), 3) == []
    chat = [{"role": "user", "content": "hi"}]
    rows = [{"step": 0, "prompt": prompt} for prompt in ("1+1=", "1+1=", 7, None, ["hi"], chat, "2+2=")]
    (tmp_path / "completions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows) + "half a li")
    assert [problem.prompt for problem in run_settings.problems_of(str(tmp_path), 2)] == prompts


@pytest.mark.parametrize("options", [[], ["--num_prompts", "0"]])
def test_a_doctor_without_prompts_names_the_option(tmp_path, monkeypatch, capsys, options):
    monkeypatch.setattr(run_settings, "recipe_of", lambda model: {"eval_task": "mine:Words()"})
    assert main(["doctor", str(tmp_path), *options]) == 2
    assert ("num_prompts=0" if options else "--task") in capsys.readouterr().err
