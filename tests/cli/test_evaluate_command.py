"""`dllm-rl evaluate` and `dllm-rl grade`, as a user calls them."""

import io
import json
import re
from argparse import Namespace
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
from rich.console import Console
from tiny_recipe import tiny_recipe

import dllm_rl
from dllm_rl import train
from dllm_rl.cli import evaluate_run
from dllm_rl.cli.evaluate_run import make_task, num_problems, results_table, sweep_table
from dllm_rl.cli.main import main
from dllm_rl.evaluation.results import WHY_NULL
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.monitoring.json_lines import current_rows
from dllm_rl.tasks import Countdown, Sudoku
from dllm_rl.tasks.code import sandbox
from dllm_rl.tasks.protocols import under_protocol

pytestmark = pytest.mark.usefixtures("no_rehearsal")

SMALL = {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
CHARACTERS = "0123456789+-*/(),>.= "


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_masked_lm(characters=CHARACTERS, **SMALL).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def causal_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("causal")
    tiny_llama(characters=CHARACTERS, causal=True, **SMALL).save_pretrained(folder)
    return str(folder)


def output(capsys, *arguments):
    """What the command prints, having ended well."""
    assert main(list(map(str, arguments))) == 0
    return capsys.readouterr().out


def words(text):
    """Options as they are typed."""
    return text.split()


def refusal(capsys, *arguments):
    """The one line with which the command refuses."""
    assert main(list(map(str, arguments))) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


def test_json_says_what_was_evaluated_and_how(model, capsys, tmp_path):
    given = words("--task sudoku --limit 4 --diffusion_steps 2 --seed 3 --samples 2 --temperature 0.5 --block_size 8")
    given += ["--set", "clues=9", "--output_dir", tmp_path, "--json"]
    text = output(capsys, "evaluate", model, "--protocol", "d1", *given)
    assert text.count("\n") == 1
    found = json.loads(text)
    said = {"task": "sudoku", "protocol": "d1", "split": "test", "seed": 3, "n": 4, "samples": 2, "model": model}
    said |= {"max_new_tokens": 16, "diffusion_steps": 2, "block_size": 8, "temperature": 0.5, "version": Sudoku.version}
    assert {name: found[name] for name in said} == said
    assert found["settings"]["clues"] == 9
    for name in ("cell_accuracy", "solve_rate", "parsed", "pass@1", "pass@2"):
        low, high = found[f"{name}_interval"] or (0.0, 1.0)
        assert low <= found[name] <= high
    assert found["forwards"] == 2 and 0 <= found["tokens"] <= 8 * 16 and found["seconds"] > 0
    assert json.loads((tmp_path / "results.json").read_text()) == [found]
    assert found["protocol_source"] == "arXiv 2504.12216" and found["dtype"] == "float32"
    assert found["versions"]["dllm_rl"] == dllm_rl.__version__ and found["versions"]["torch"] == version("torch")
    rows = [json.loads(line) for line in (tmp_path / found["completions"]).read_text().splitlines()]
    task = Sudoku(split="test", clues=9)
    assert [row["puzzle"] for row in rows] == [task[i // 2].fields["puzzle"] for i in range(8)]
    grades = [row["evaluation"] for row in rows]
    assert sum(grade["parts"]["solve_rate"] for grade in grades) / 8 == found["solve_rate"]
    assert sum(grade["reward"] for grade in grades) / 8 == pytest.approx(found["reward"])
    output(capsys, "evaluate", model, "--protocol", "strict", *given, "--limit", 2)
    rows = [json.loads(line)["evaluation"] for line in (tmp_path / found["completions"]).read_text().splitlines()]
    assert [row["protocol"] for row in rows] == ["strict"] * 4 + ["d1"] * 4, "the latest that graded the row"
    assert rows[4:] == grades[4:] and {row["reward"] for row in rows[:4]} <= {0.0, 1.0}


def test_several_lengths_give_a_table_and_a_file_each(model, capsys, tmp_path):
    options = (*words("--task countdown --lengths 8,12 --diffusion_steps 2 --limit 4 --output_dir"), tmp_path)
    text = output(capsys, "evaluate", model, *options)
    assert f"countdown (version {Countdown.version}), protocol strict, test split, seed 0, 4 problems x 1" in " ".join(
        text.split()
    )
    assert "8 tokens, 2 steps" in text and "12 tokens, 2 steps" in text
    assert "accuracy" in text and "[0.000, 0.490]" in text  # Wilson's interval of none in four
    assert "[no interval]" in text and WHY_NULL in " ".join(text.split())  # of the reward, a number of any size
    assert sorted(path.name.rpartition("-")[0] or path.name for path in tmp_path.iterdir()) == [
        f"completions-{Path(model).name}-12-tokens-2-steps",
        f"completions-{Path(model).name}-8-tokens-2-steps",
        "results.json",
    ]
    lines = output(capsys, "evaluate", model, *options, "--json").splitlines()
    assert [json.loads(line)["max_new_tokens"] for line in lines] == [8, 12]


def test_a_file_of_completions_is_named_by_its_model_and_found_again_under_another_name(tmp_path):
    arguments = Namespace(output_dir=str(tmp_path), seed=0)
    settings = {"max_new_tokens": 8, "diffusion_steps": 2}

    def named(model, weights="0123", **changes):
        return evaluate_run.completions_file(arguments, weights, Countdown(), settings | changes, model=model)

    first = named("hub/qwen2.5 base")
    assert re.fullmatch(r"completions-qwen2.5_base-8-tokens-2-steps-[0-9a-f]{8}.jsonl", first.name)
    first.with_name(f"{first.stem}.part0.jsonl").touch()  # of an evaluation that was interrupted
    assert named("copy") == first
    assert named("copy", weights="4567").name.startswith("completions-copy-8-tokens")
    assert named("copy", temperature=0.5) != first and named("copy", weights=None) is None


def test_a_bar_says_what_it_is_and_goes(monkeypatch):
    written = io.StringIO()
    written.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", written)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    with evaluate_run.progress_bar("countdown, runs/a, diffusion_steps 2", 4, main=True) as progress:
        progress(3)
    shown = re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", written.getvalue())
    assert re.search(r"countdown, runs/a, diffusion_steps 2 +.* 3/4 +\d:\d\d:\d\d", shown), shown
    assert written.getvalue().endswith("\x1b[1A\x1b[2K"), "the line is erased"


@pytest.mark.slow
def test_a_folder_keeps_the_rows_of_every_command(model, capsys, tmp_path):
    def rows(*options):
        output(capsys, "evaluate", model, *words("--task sudoku --limit 2 --output_dir"), tmp_path, *options)
        found = json.loads((tmp_path / "results.json").read_text())
        return [(row["max_new_tokens"], row["protocol"], row["n"]) for row in found]

    assert rows("--max_new_tokens", 8) == [(8, "strict", 2)]
    rows("--max_new_tokens", 12)
    three = [(8, "strict", 2), (12, "strict", 2), (16, "strict", 2)]
    assert rows("--max_new_tokens", 16) == three
    assert rows("--max_new_tokens", 8, "--limit", 3) == [*three[1:], (8, "strict", 3)]  # the same evaluation, continued
    assert rows("--max_new_tokens", 12, "--protocol", "d1") == [*three[1:], (8, "strict", 3), (12, "d1", 2)]


def test_tokens_are_counted_by_completion_not_by_problem():
    result = {"task": "t", "version": "1", "protocol": "own", "split": "", "seed": 0, "model": "m", "seconds": 1.0}
    result |= {"n": 5, "samples": 2, "tokens": 34, "forwards": 7, "max_new_tokens": 4}
    result |= {"forwards_per_answer": 3.0, "tokens_per_forward": 34 / 30}
    console = Console(record=True, width=80)
    console.print(results_table([result]))
    text = " ".join(console.export_text().replace("│", " ").split())
    assert "tokens per completion 3.4 forwards per answer 3.0 tokens per forward 1.1 seconds 1.0" in text


def test_evaluate_and_grade_agree_and_a_second_run_makes_nothing_again(model, capsys, tmp_path, monkeypatch):
    command = ("evaluate", model, "--task", "sudoku", "--limit", 5, "--output_dir", tmp_path, "--json")
    found = json.loads(output(capsys, *command))
    for protocol in ("strict", "d1"):
        again = json.loads(output(capsys, *command, "--protocol", protocol))
        grading = ("grade", "--json", "--protocol", protocol, tmp_path / found["completions"])
        graded = json.loads(output(capsys, *grading))  # the task is that of results.json
        assert graded["protocol"] == protocol and graded.pop("problems") == again["n"]
        assert {name: again[name] for name in graded} == graded
    newest = json.loads(output(capsys, "grade", "--json", tmp_path / found["completions"]))
    assert newest["protocol"] == "d1", "without --protocol that of the newest row"
    assert found["seconds"] == again["seconds"]  # the time is that of the first run, which made the completions


@pytest.mark.slow
def test_a_sweep_keeps_every_setting_apart_and_goes_on_where_it_stopped(model, capsys, tmp_path, monkeypatch):
    lists = ("--diffusion_steps", "1,4", "--rank", "MaxProb,Confidence", "--quantization", "none,Int8WeightOnly")
    rules = ("--commit", "Schedule,Threshold", "--commit.tau", "0.7,0.9")
    rules += ("--cache", "none,PrefixCache", "--cache.refresh", 2)
    command = ("evaluate", model, "--task", "sudoku", "--limit", 3, "--output_dir", tmp_path, *lists, *rules, "--json")
    found = [json.loads(line) for line in output(capsys, *command).splitlines()]
    # (2 steps + 2 adaptive rules, which decide for themselves) x 2 ranks x 2 caches x 2 schemes
    assert len(found) == 4 * 2 * 2 * 2 == len({row["completions"] for row in found})
    assert {row["diffusion_steps"] for row in found if row["commit"] != "Schedule()"} == {None}
    assert {row["forwards_per_answer"] for row in found if row["commit"] == "Schedule()"} == {1.0, 4.0}
    assert len({row["sampler"] for row in found}) == 16 and len({row["weights"] for row in found}) == 2
    monkeypatch.setattr("dllm_rl.evaluation.evaluate.complete", None)  # nothing is left to be made
    again = [json.loads(line) for line in output(capsys, *command).splitlines()]
    assert again == found


@pytest.mark.slow
def test_two_dtypes_keep_their_completions_apart(capsys, tmp_path):
    """The numbers of a checkpoint in bf16 are the same in both; what is sampled is not the same."""
    policy = tiny_masked_lm(characters=CHARACTERS, **SMALL)
    policy.module.bfloat16()
    policy.save_pretrained(tmp_path / "model")
    command = ("evaluate", tmp_path / "model", "--task", "sudoku", "--limit", 1, "--diffusion_steps", 1, "--json")
    found = []
    for dtype in ("float32", "bfloat16", "float32"):
        found.append(json.loads(output(capsys, *command, "--output_dir", tmp_path, "--dtype", dtype)))
    exact, rounded, again = (row["completions"] for row in found)
    assert exact == again != rounded


@pytest.fixture
def runs(tmp_path):
    """Two runs' folders, the second with a newest checkpoint that is damaged."""
    folders = [tmp_path / name for name in ("one", "two")]
    for seed, folder in enumerate(folders):
        train(tiny_recipe(folder, num_steps=1, seed=seed))
    (folders[1] / "checkpoints" / "step-000001" / "state.json").write_text("{}")
    return folders


@pytest.mark.parametrize("compared", [True, False])
def test_the_numbers_of_a_comparison_break_lines_and_names_do_not(compared):
    facts = {"task": "t", "version": "1", "protocol": "own", "seed": 0, "n": 4, "samples": 1, "seconds": 0.5}
    facts |= {"forwards_per_answer": 2.0, "tokens_per_forward": 4.0, "accuracy": 0.5, "accuracy_interval": [0.1, 0.9]}
    other = {"against": "a", "difference": {"accuracy": [0.25, 0.1, 0.4]}} if compared else {}
    console = Console(file=io.StringIO(), width=80)
    console.print(sweep_table([facts | {"model": "a"}, facts | {"model": "b\nc\x1b"} | other]))
    lines = console.file.getvalue().splitlines()
    (place,) = (place for place, line in enumerate(lines) if line.startswith("b\u21b5c\u241b "))
    assert "\u21b5" not in lines[place].partition("\u241b")[2]
    if compared:
        assert lines[place].split()[1:] == ["0.500", "+0.250", "2.0", "0.5"]
        assert lines[place + 1].split() == ["[0.100,", "0.900]", "[+0.100,", "+0.400]", "x", "4.0"]
    else:
        assert lines[place].split()[1:] == ["0.500", "[0.100,", "0.900]", "2.0", "x", "4.0", "0.5"]


@pytest.mark.slow
def test_runs_are_compared_problem_by_problem(runs, capsys, tmp_path):
    options = words("--task sudoku --limit 6 --diffusion_steps 1,4 --temperature 1")
    command = ("evaluate", *runs, *options, "--output_dir", tmp_path)
    assert main(list(map(str, (*command, "--json")))) == 0
    printed = capsys.readouterr()
    assert "skipped" in printed.err and "step-000001" in printed.err
    found = [json.loads(line) for line in printed.out.splitlines()]
    assert [(row["model"], row["diffusion_steps"]) for row in found] == [(str(run), n) for run in runs for n in (1, 4)]
    assert len({row["completions"] for row in found}) == 4, "models are kept apart, as settings are"
    assert found[0]["givens_kept"] != found[1]["givens_kept"], "or each could be held against the other's setting"
    assert "difference" not in found[0] and found[2]["against"] == str(runs[0])
    for before, after in zip(found[:2], found[2:], strict=True):
        for name, (less, low, high) in after["difference"].items():
            assert less == pytest.approx(after[name] - before[name])
            assert low is None or low <= less <= high
    text = output(capsys, *command)
    assert "difference: solve_rate minus that of" in " ".join(text.split()) and " steps " in text
    table = text.partition("Completions and")[0].splitlines()
    assert max(map(len, table)) <= 80 and "\u2026" not in text, "no name is cut"
    cells = [line.partition("  ")[0].strip() for line in table]
    assert str(runs[1]) in "".join(cells)


def test_quantizations_of_one_model_are_compared_with_the_first(model, capsys):
    options = words("--task sudoku --limit 3 --diffusion_steps 1,2 --temperature 1 --quantization Int8WeightOnly,none")
    found = [json.loads(line) for line in output(capsys, "evaluate", model, *options, "--json").splitlines()]
    assert [row.get("against") for row in found] == [None, None, *["quantization Int8WeightOnly()"] * 2]
    for before, after in zip(found[:2], found[2:], strict=True):
        for name, (less, *_) in after["difference"].items():
            assert less == pytest.approx(after[name] - before[name])
    text = output(capsys, "evaluate", model, *options[:-4], *options[-2:])
    assert "minus that of quantization Int8WeightOnly" in " ".join(text.split())
    assert "none" in text, "a table of two rows names their quantization, too"


@pytest.mark.slow
def test_a_model_against_itself_differs_by_nothing(model, capsys):
    command = ("evaluate", model, model, "--task", "sudoku", "--limit", 5, "--diffusion_steps", 2, "--json")
    first, second = (json.loads(line) for line in output(capsys, *command).splitlines())
    assert {tuple(numbers) for numbers in second["difference"].values()} == {(0.0, None, None)}
    assert first["solve_rate"] == second["solve_rate"]


@pytest.mark.parametrize(
    ("protocol", "metric"),
    [("strict", "solve_rate"), ("d1", "cell_accuracy"), ("spg", "cell_accuracy"), ("espo", "cell_accuracy")],
)
@pytest.mark.repeated
def test_a_comparison_shows_the_metric_of_the_protocol(model, capsys, tmp_path, protocol, metric):
    command = ("evaluate", model, model, "--task", "sudoku", "--limit", 3, "--diffusion_steps", 1, "--output_dir")
    table = " ".join(output(capsys, *command, tmp_path, "--protocol", protocol).split())
    first = json.loads((tmp_path / "results.json").read_text())[0]
    assert f" {metric} " in table and f"difference: {metric} minus that of" in table
    assert f"best {metric}: {first[metric]:.3f} " in table


def test_a_run_without_a_checkpoint(capsys, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert "is a run's folder without a checkpoint yet" in refusal(capsys, "evaluate", tmp_path, "--task", "sudoku")


def test_a_recorded_protocol_runs_no_program_unasked(capsys, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"completion": "1", "test": "", "entry_point": "f"}) + "\n")
    recorded = {"task": "code", "protocol": "sandbox", "completions": "rows.jsonl"}
    (tmp_path / "results.json").write_text(json.dumps([recorded]))
    said = refusal(capsys, "grade", tmp_path / "rows.jsonl")
    assert "asks to run its programs; give --protocol sandbox" in said


def test_grade_by_hand(capsys, tmp_path):
    path = tmp_path / "theirs.jsonl"
    rows = [
        {"numbers": [3, 5, 7], "target": 22, "completion": "<answer>3*5+7</answer>"},
        {"numbers": [3, 5, 7], "target": 22, "completion": "<answer>3+5+7</answer>"},
        {"numbers": [3, 5, 7], "target": 22, "completion": "no idea", "note": "ignored"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = json.loads(output(capsys, "grade", "--json", "--task", "countdown", path))
    assert (found["n"], found["accuracy"], found["parsed"], found["protocol"]) == (3, 1 / 3, 2 / 3, "strict")
    path.write_text(json.dumps(rows[0]) + "\n" + json.dumps({"completion": "1", "numbers": [1]}) + "\n")
    assert "theirs.jsonl, line 2: no field 'target'" in refusal(capsys, "grade", "--task", "countdown", path)
    assert "task='chess'" in refusal(capsys, "grade", "--task", "chess", path)
    assert "task=None, and no results.json beside" in refusal(capsys, "grade", path)
    for text in ("{}", "[3]", '[{"completions": "others.jsonl", "task": "sudoku"}]'):
        (tmp_path / "results.json").write_text(text)
        assert "give --task" in refusal(capsys, "grade", path)
    assert "protocol='d2' is not one of countdown's" in refusal(
        capsys, "grade", "--task", "countdown", "--protocol", "d2", path
    )


def test_the_completions_of_a_run_are_graded(capsys, tmp_path):
    """Those of a resumed run count once."""
    small = {"train_batch_size": 1, "num_generations": 2, "rollout_quantization": None}
    recipe = tiny_recipe(tmp_path, save_steps=1, save_total_limit=9, log_completions_steps=1, **small)
    train(recipe)
    command = ("grade", "--json", "--task", "sudoku", tmp_path / "completions.jsonl")
    found = json.loads(output(capsys, *command).splitlines()[-1])
    train(replace(recipe, resume_from_checkpoint=str(tmp_path / "checkpoints/step-000001")))
    assert json.loads(output(capsys, *command).splitlines()[-1]) == found
    rows = current_rows(tmp_path / "completions.jsonl")
    solved = sum(row["parts"]["solve_rate"] for row in rows)
    assert found["n"] == len(rows) and found["solve_rate"] == solved / len(rows)


def test_a_causal_model(causal_model, capsys):
    found = json.loads(output(capsys, "evaluate", causal_model, "--task", "sudoku", "--limit", 3, "--json"))
    assert (found["task"], found["protocol"], found["split"], found["n"]) == ("sudoku", "strict", "test", 3)
    assert "diffusion_steps" not in found and found["max_new_tokens"] == 16
    message = refusal(capsys, "evaluate", causal_model, "--task", "sudoku", "--diffusion_steps", 2)
    assert "diffusion_steps=2 is not a setting of Autoregress, the sampler of this model; leave it out" in message


def test_problems_from_a_file_are_all_evaluated(model, capsys, tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text('{"input": "3,5,7", "output": "22"}\n' * 3)
    found = json.loads(
        output(capsys, "evaluate", model, "--task", "countdown", "--path", path, "--lengths", 9, "--json")
    )
    assert (found["n"], found["settings"]["path"]) == (3, str(path))


def test_as_many_problems_as_asked_all_of_a_file_or_500_of_what_is_made(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text('{"input": "3,5,7", "output": "22"}\n' * 700)
    asked = lambda limit: Namespace(limit=limit)  # noqa: E731
    assert num_problems(Sudoku(), asked(None)) == num_problems(under_protocol(Sudoku(), "d1"), asked(None)) == 500
    assert num_problems(Sudoku(size=20), asked(None)) == 20
    assert num_problems(Sudoku(), asked(7)) == 7
    assert num_problems(Countdown(path=path), asked(None)) == 700


def test_the_settings_of_a_task_are_checked_together():
    for settings in (["side=9", "clues=50,60"], ["clues=50,60", "side=9"]):
        asked = Namespace(models=[], task="sudoku", split=None, path=None, protocol=None, set=settings)
        assert make_task(asked).task == Sudoku(split="test", side=9, clues=(50, 60))


def test_a_sudoku_is_filled_in(model, capsys, tmp_path):
    """Its kept completions are whole texts, and `grade` grades them as `evaluate` did."""
    options = ("--limit", 3, "--set", "infill=true", "--set", "clues=12", "--output_dir", tmp_path, "--json")
    command = ("evaluate", model, "--task", "sudoku", *options)
    found = json.loads(output(capsys, *command))
    assert (found["task"], found["n"], found["max_new_tokens"]) == ("sudoku", 3, 0)
    rows = [json.loads(line) for line in (tmp_path / found["completions"]).read_text().splitlines()]
    for row in rows:
        assert re.fullmatch(row["puzzle"].replace("0", "."), row["completion"], re.DOTALL)
    graded = json.loads(output(capsys, "grade", "--json", "--task", "sudoku", tmp_path / found["completions"]))
    assert (graded["solve_rate"], graded["parsed"]) == (found["solve_rate"], found["parsed"])
    steps = json.loads(output(capsys, *command, "--diffusion_steps", 2, "--block_size", 2))
    assert (found["diffusion_steps"], steps["diffusion_steps"], steps["forwards_per_answer"]) == (None, 2, 2.0)


def test_a_file_without_a_row_is_refused(model, capsys, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    message = refusal(capsys, "evaluate", model, "--task", "sudoku", "--path", tmp_path / "empty.jsonl")
    assert f"task: 'sudoku' has no problems in '{tmp_path}/empty.jsonl'; give a file with more rows" in message


@pytest.mark.parametrize(
    ("options", "seconds"), [((), 600.0), (("--reward_timeout", 7), 7.0), (("--reward_timeout", "none"), None)]
)
def test_graders_have_a_time_limit(model, capsys, monkeypatch, options, seconds):
    from dllm_rl.evaluation import evaluate

    grade, limits = evaluate.grade, []
    monkeypatch.setattr(evaluate, "grade", lambda *a, timeout: [limits.append(timeout), grade(*a, timeout=timeout)][1])
    output(capsys, "evaluate", model, *words("--task sudoku --limit 1 --diffusion_steps 1"), *options)
    assert limits == [seconds]


def test_the_usual_length_is_that_of_the_answer(model, capsys):
    found = json.loads(output(capsys, "evaluate", model, "--task", "countdown", "--limit", 1, "--json"))
    assert found["max_new_tokens"] == found["diffusion_steps"] == Countdown().width == 10


def test_a_paced_rule_with_a_number_of_its_own_takes_the_steps_that_are_asked_for(model, capsys, tmp_path):
    rules = ("--commit", "Remask,Edit", "--commit.eta", "0.5", "--commit.tau", "0.5")
    rules += ("--diffusion_steps", "2,4")
    command = ("evaluate", model, "--task", "sudoku", "--limit", 2, "--output_dir", tmp_path, *rules, "--json")
    found = [json.loads(line) for line in output(capsys, *command).splitlines()]
    assert [(row["commit"].partition("(")[0], row["diffusion_steps"]) for row in found] == [
        ("Remask", 2), ("Remask", 4), ("Edit", 2), ("Edit", 4)]  # fmt: skip
    assert [row["forwards_per_answer"] for row in found[:2]] == [2.0, 4.0]


def test_an_error_obeys_no_escape_sequence_of_a_path(capsys, tmp_path):
    path = tmp_path / "the\x1b[2Jirs.jsonl"
    path.write_text(json.dumps({"completion": "1", "numbers": [1]}) + "\n")
    message = refusal(capsys, "grade", "--task", "countdown", path)
    assert "irs.jsonl, line 1: no field 'target'" in message and "\x1b" not in message


@pytest.fixture
def sums(tmp_path):
    """Questions whose every sign the model has, and the options with which they are asked."""
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps({"question": f"{n}+1=", "answer": f"#### {n + 1}"}) + "\n" for n in range(3)))
    return "--task", "gsm8k", "--path", path, "--set", "prompt_format={question}", "--set", "chat=false"


def test_majority_of_answers_that_a_model_gives(model, capsys, sums):
    """ESPO reads any integer, so that a random model votes. Of one sample, the vote is the sample."""
    many = ("--samples", 5, "--temperature", 1, "--lengths", 4, "--protocol", "espo", "--json")
    found = json.loads(output(capsys, "evaluate", model, *sums, *many, "--majority", "1,5"))
    assert found["maj@1"] == pytest.approx(found["accuracy"]) and found["parsed"] > 0
    for name in ("maj@1", "maj@5"):
        low, high = found[f"{name}_interval"] or (0.0, 1.0)
        assert low <= found[name] <= high
    assert "maj@5" not in json.loads(output(capsys, "evaluate", model, *sums, *many))
    message = refusal(capsys, "evaluate", model, *sums, *many, "--majority", 6)
    assert "--majority 6 needs --samples 6 or more, and a grader that says" in message


def test_code_runs_only_on_request_and_grade_agrees(capsys, tmp_path, monkeypatch):
    tiny_masked_lm(characters="".join(map(chr, range(10, 127))), **SMALL).save_pretrained(tmp_path / "model")
    tests = "def check(candidate):\n    assert candidate(1) == 2"
    names = {"prompt": "def f(a):\n", "entry_point": "f", "canonical_solution": "    return a + 1\n", "test": tests}
    (tmp_path / "problems.jsonl").write_text(json.dumps(names) + "\n")
    monkeypatch.setattr(sandbox, "run", None)  # a call of it raises
    command = ["evaluate", tmp_path / "model", "--task", "code", "--path", tmp_path / "problems.jsonl", "--json"]
    command += ["--set", "prompt_format={question}", "--set", "chat=false", "--max_new_tokens", 4]
    kept = json.loads(output(capsys, *command, "--output_dir", tmp_path))
    assert (kept["protocol"], kept["n"], "parses" in kept, "accuracy" in kept) == ("strict", 1, True, False)
    graded = json.loads(output(capsys, "grade", "--json", "--task", "code", tmp_path / kept["completions"]))
    assert {name: graded[name] for name in ("reward", "parsed")} == {name: kept[name] for name in ("reward", "parsed")}
    ran = []
    monkeypatch.setattr(sandbox, "run", lambda *each: (ran.append(each) is None, ""))
    found = json.loads(output(capsys, *command, "--set", "reward_rule=sandbox"))
    assert (found["protocol"], found["accuracy"]) == ("sandbox", 1.0)
    graded = output(
        capsys, "grade", "--json", "--task", "code", "--protocol", "sandbox", tmp_path / kept["completions"]
    )
    assert json.loads(graded)["accuracy"] == 1.0
    programs = [each[1] for each in ran if each[0]]  # the trials of the sandbox itself have no prelude
    assert len(programs) == 1 and programs[0].startswith("def f(a):\n"), "a verdict is remembered"


def test_a_task_of_the_user_s_grades_by_its_own_rules(model, capsys, tmp_path, monkeypatch):
    """As a class with a split, and as a function; the same task that a run names."""
    (tmp_path / "copying.py").write_text("""
from dataclasses import dataclass
from dllm_rl.tasks import Problem, Reward

@dataclass(frozen=True)
class Copy:
    size: int = 9
    split: str = "train"
    name = "copy"
    version = "3"

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return Problem(f"{index % 4 + 1}=", {"answer": str(index % 4 + 1)})

    def reward(self, problem, completion):
        right = float(problem.fields["answer"] in completion)
        return Reward(right, True, {"accuracy": right})

def two():
    return Copy(size=2)

def text():
    return "no task"
""")
    monkeypatch.syspath_prepend(tmp_path)
    command = ("evaluate", model, "--lengths", 4, "--diffusion_steps", 2, "--json")
    options = ("--task", "copying:Copy", "--set", "size=5", "--output_dir", tmp_path / "o")
    found = json.loads(output(capsys, *command, *options))
    assert (found["n"], found["task"], found["version"], found["split"]) == (5, "copy", "3", "test")
    assert (found["protocol"], found["protocol_source"]) == ("own", "copying:Copy") and found["settings"]["size"] == 5
    assert 0 <= found["accuracy"] == found["reward"] <= 1 and (tmp_path / "o" / found["completions"]).is_file()
    assert json.loads(output(capsys, *command, "--task", "copying:two"))["n"] == 2
    for options, message in (
        (("copying:Copy", "--protocol", "d1"), "task 'copying:Copy' grades by its own rules; leave it out"),
        (("copying:two", "--split", "test"), "split='test': task 'copying:two' makes its problems; leave it out"),
        (("copying:Copy", "--path", "x"), "path='x': task 'copying:Copy' makes its problems; leave it out"),
        (
            ("copying:Copy", "--set", "sise=5"),
            "--set sise=5: write FIELD=VALUE, where task 'copying:Copy' has size, split",
        ),
        (("copying:text",), "--task copying:text makes a str, not a task"),
        (("copying:Problem",), "--task copying:Problem needs 'prompt'; give a function without arguments"),
        (("copying:Absent",), "module 'copying' has no attribute 'Absent'"),
        (("copying:__name__",), "--task='copying:__name__' is neither a function nor a class"),
        (("nowhere:Copy",), "No module named 'nowhere'"),
    ):
        assert message in refusal(capsys, *command, "--task", *options)


@pytest.mark.slow
def test_greedy_samples_differ_in_random_order_alone(model, capsys):
    options = ["--task", "sudoku", "--limit", "2", "--samples", "3", "--diffusion_steps", "16", "--json"]
    assert main(["evaluate", model, *options]) == 2
    assert "samples=3 at temperature=0 would all be equal" in capsys.readouterr().err
    for order in (["--rank", "RandomOrder"], ["--rank", "PlackettLuce", "--rank.temperature", "0.3"]):
        assert main(["evaluate", model, *options, *order]) == 0
        row = json.loads(capsys.readouterr().out)
        assert row["samples"] == 3


@pytest.mark.slow
def test_a_setting_without_a_metric_leaves_its_cell_empty(model, capsys, tmp_path, monkeypatch):
    """The own metric is None for short texts, so that one length has none of it."""
    (tmp_path / "judged.py").write_text("""
from dllm_rl.tasks import task_from_dataset

def length(completions, **columns):
    return [float(len(text)) for text in completions]

def accuracy(completions, **columns):
    return [None if len(text) < 3 else 1.0 for text in completions]

def held():
    return task_from_dataset([{"prompt": f"{i}="} for i in range(1, 5)], reward_funcs=[length, accuracy])
""")
    monkeypatch.syspath_prepend(str(tmp_path))
    for lengths in ("2,8", "8,2"):
        options = ["--task", "judged:held", "--max_new_tokens", lengths]
        for more in ([], ["--diffusion_steps", "1,2"]):
            assert main(["evaluate", model, *options, *more]) == 0
            assert "accuracy" in capsys.readouterr().out
