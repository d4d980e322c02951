"""What commands read from a run's folder, and that nothing of its text is executed."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
from tiny_recipe import tiny_recipe

from dllm_rl import train
from dllm_rl.cli import evaluate as evaluate_command
from dllm_rl.cli import run_settings
from dllm_rl.cli.main import main
from dllm_rl.cli.run_settings import read_call, sampler_of, sampler_or_note, task_of, with_passed
from dllm_rl.members import describe
from dllm_rl.quantization.schemes import int8_weight_only
from dllm_rl.samplers import rules
from dllm_rl.samplers.cache import dual_cache
from dllm_rl.samplers.renoise import renoise
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


class TestEvaluatePlans:
    """An option replaces one setting of the run's sampler, and the others stay."""

    UNMASK = (
        "unmask(max_new_tokens=8, diffusion_steps=6, block_size=4, temperature=0.7, top_p=0.9, suppress=(0, 2), "
        "rank=confidence)"
    )
    THRESHOLD = "unmask(max_new_tokens=8, commit=threshold(tau=0.75))"
    POLICY = SimpleNamespace(spec=SimpleNamespace(attention="full", block_size=None, name="tiny"))
    CAUSAL = SimpleNamespace(spec=SimpleNamespace(attention="causal", block_size=None, name="tiny"))
    RENOISE = SimpleNamespace(spec=SimpleNamespace(attention="encoder_decoder", block_size=4, name="tiny"))

    def plans(self, monkeypatch, text, options="", policy=POLICY):
        """Rows and bound settings of `evaluate RUN OPTIONS`, where RUN's evaluations are by the sampler `text`."""
        monkeypatch.setattr(run_settings, "recipe_of", lambda model: {"eval_sampler": text})
        seen = []
        monkeypatch.setattr("dllm_rl.cli.evaluate.evaluate_command", seen.append)
        assert main(["evaluate", "runs/a", "--task", "sudoku", *options.split()]) == 0
        return evaluate_command.make_plans(policy, Sudoku(), seen[0])

    @pytest.mark.parametrize(
        ("options", "changed"),
        [
            ("--diffusion_steps 4", {"diffusion_steps": 4}),
            ("--temperature 0", {"temperature": 0.0}),
            ("--temperature 1.5", {"temperature": 1.5}),
            ("--rank random", {"rank": rules.random}),
            ("--max_new_tokens 4", {"max_new_tokens": 4, "diffusion_steps": 4}),  # a step writes at least one token
            ("--max_new_tokens 16", {"max_new_tokens": 16}),
            ("--block_size 8", {"block_size": 8}),
            ("--cache dual=2", {"cache": dual_cache(refresh=2)}),
            ("--samples 3", {}),
            ("--commit late_schedule", {"commit": rules.late_schedule}),
            ("--max_new_tokens 16 --diffusion_steps 8 --rank random",
             {"max_new_tokens": 16, "diffusion_steps": 8, "rank": rules.random}),
        ],
    )  # fmt: skip
    def test_one_setting_changes(self, monkeypatch, options, changed):
        ((before, sampler),) = self.plans(monkeypatch, self.UNMASK)
        assert (before["temperature"], before["commit"]) == (0.7, "schedule")
        assert describe(sampler) == describe(sampler_of("runs/a"))
        ((row, changed_sampler),) = self.plans(monkeypatch, self.UNMASK, options)
        assert changed_sampler.func is unmask and changed_sampler.keywords == sampler.keywords | changed
        differ = {name for name in before if row[name] != before[name]}
        assert differ == changed.keys()

    def test_filters_of_the_token_draw(self, monkeypatch):
        ((row, sampler),) = self.plans(monkeypatch, self.UNMASK, "--top_p 0.5")
        assert (row["top_p"], sampler.keywords["top_p"], sampler.keywords.get("top_k")) == (0.5, 0.5, None)
        text = "autoregress(max_new_tokens=8, top_k=3)"
        ((row, sampler),) = self.plans(monkeypatch, text, "--top_k 2", self.CAUSAL)
        assert (row["top_k"], sampler.keywords["top_k"]) == (2, 2)
        for option in ("--top_p 0.5", "--suppress 0"):
            with pytest.raises(ValueError, match=f"{option.split()[0]} is not for"):
                self.plans(monkeypatch, "renoise(max_new_tokens=8)", option, self.RENOISE)

    @pytest.mark.parametrize(("text", "kept"), [("3", (3,)), ("1,4", (1, 4)), ("none", ())])
    def test_suppressed_tokens_replace_the_runs(self, monkeypatch, text, kept):
        ((row, sampler),) = self.plans(monkeypatch, self.UNMASK, f"--suppress {text}")
        assert row["suppress"] == sampler.keywords["suppress"] == kept

    def test_lists_give_one_plan_each(self, monkeypatch):
        plans = self.plans(monkeypatch, self.UNMASK, "--diffusion_steps 2,4 --rank random,max_prob")
        assert [(row["rank"], row["diffusion_steps"]) for row, _ in plans] == [
            ("random", 2), ("random", 4), ("max_prob", 2), ("max_prob", 4)]  # fmt: skip
        assert all(sampler.keywords["suppress"] == (0, 2) for _, sampler in plans)

    def test_a_rule_that_needs_another_rank_gets_it(self, monkeypatch):
        plans = self.plans(monkeypatch, self.UNMASK, "--commit threshold=0.9,entropy_bound=0.5")
        assert [row["rank"] for row, _ in plans] == ["confidence", "entropy"]

    def test_an_adaptive_rule_has_no_number_of_steps(self, monkeypatch):
        ((row, sampler),) = self.plans(monkeypatch, self.THRESHOLD, "--max_new_tokens 4")
        assert row["commit"] == "threshold(tau=0.75)" and sampler.keywords["max_new_tokens"] == 4
        for option, message in (
            ("--diffusion_steps 4", "commit=threshold=0.75 chooses its number of steps; add --commit schedule"),
            ("--samples 2", "--samples 2 at --temperature 0 would all be equal"),
        ):
            with pytest.raises(ValueError, match=message):
                self.plans(monkeypatch, self.THRESHOLD, option)
        ((row, _),) = self.plans(monkeypatch, self.THRESHOLD, "--diffusion_steps 4 --commit schedule")
        assert (row["commit"], row["diffusion_steps"]) == ("schedule", 4)

    def test_other_samplers(self, monkeypatch):
        text = "autoregress(max_new_tokens=8, top_k=3)"
        ((row, sampler),) = self.plans(monkeypatch, text, "", self.CAUSAL)
        assert row == {"max_new_tokens": 8, "temperature": 1.0} and sampler.keywords == row | {"top_k": 3}
        ((_, sampler),) = self.plans(monkeypatch, text, "--temperature 0.5", self.CAUSAL)
        assert sampler.keywords == {"max_new_tokens": 8, "top_k": 3, "temperature": 0.5}
        text = "renoise(max_new_tokens=8, t_max=0.9)"
        ((_, sampler),) = self.plans(monkeypatch, text, "--diffusion_steps 5", self.RENOISE)
        assert sampler.keywords == {"max_new_tokens": 8, "t_max": 0.9, "diffusion_steps": 5}


def test_evaluate_takes_the_runs_suppressed_ids_with_another_number_of_steps(run, capsys, tmp_path):
    options = ["--limit", "2", "--commit", "schedule", "--diffusion_steps", "4", "--output_dir", str(tmp_path)]
    assert main(["evaluate", str(run), *options, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["diffusion_steps"], row["max_new_tokens"], row["forwards_per_answer"]) == (4, 16, 4.0)
    ((path,),) = [list(tmp_path.glob("completions-*.jsonl"))]
    assert "suppress=(0, 2)" in path.read_text()


def test_sample_keeps_the_runs_rank_with_another_rule(monkeypatch):
    text = "unmask(max_new_tokens=8, temperature=0.7, rank=confidence, commit=schedule)"
    monkeypatch.setattr(run_settings, "recipe_of", lambda model: {"eval_sampler": text})
    monkeypatch.setattr("dllm_rl.cli.main.open_policy", lambda arguments: None)
    seen = []

    def complete(policy, problems, options, **_):
        seen.append(options)
        raise ValueError("enough")

    monkeypatch.setattr("dllm_rl.cli.sample.complete", complete)
    for rule in ("late_schedule", "remask=0.5"):
        assert main(["sample", "runs/a", "12", "--commit", rule]) == 2
    assert [options["rank"] for options in seen] == [rules.confidence, rules.random]
    assert all(options["temperature"] == 0.7 for options in seen)


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
    assert with_passed(settings, {"temperature": 0.5, "max_new_tokens": None}) == {**settings, "temperature": 0.5}
    assert with_passed(settings, {"max_new_tokens": 4}) == {"max_new_tokens": 4, "diffusion_steps": 4}
    # The steps of `renoise` are those of a canvas, which may be more than its tokens.
    per_canvas = partial(renoise, **settings)
    assert with_passed(settings, {"max_new_tokens": 4}, per_canvas) == settings | {"max_new_tokens": 4}
    given = {"max_new_tokens": 4, "diffusion_steps": 9}  # refused by the sampler, as it was typed
    assert with_passed(settings, given) == given


def test_a_scripts_scheme_is_named(monkeypatch):
    monkeypatch.setattr(run_settings, "recipe_of", lambda model: {"rollout_quantization": "mine:scheme(bits=3)"})
    with pytest.raises(ValueError, match="a script defines its rollout_quantization, mine:scheme"):
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
    with pytest.raises(ValueError, match="a script defines its task, mine:Words"):
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
