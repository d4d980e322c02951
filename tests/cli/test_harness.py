"""`dllm-rl lm-eval --model dllm_rl`: a custom task gives the numbers of `dllm-rl evaluate`."""

import json
import re
import sys

import pytest

from dllm_rl.cli.main import main
from dllm_rl.likelihoods.estimators import ELBO, Causal
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.samplers import Autoregress, Unmask
from dllm_rl.samplers.rules import Entropy, Threshold
from dllm_rl.tasks import Sudoku

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an optional extra")
get_model = pytest.importorskip("lm_eval.api.registry").get_model
harness = pytest.importorskip("dllm_rl.cli.harness")

SMALL = {"characters": "1234.=", "hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
COUNT = 12
GRADES = """
from dllm_rl.tasks.protocols import grade_all

def process_results(doc, results):
    (reward,) = grade_all("sudoku", "strict", [doc], results, [doc["text"]])
    return {"cell_accuracy": reward.breakdown["cell_accuracy"], "givens_kept": reward.breakdown["givens_kept"]}
"""
ROWS = """
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rows.jsonl}}
test_split: test
doc_to_text: "{{text}}"
"""
YAML = """
task: my_sudoku
output_type: generate_until
doc_to_target: "{{solution}}"
process_results: !function grades.process_results
generation_kwargs: {max_gen_toks: 16}
metric_list: [{metric: cell_accuracy, aggregation: mean}, {metric: givens_kept, aggregation: mean}]
"""
CHOICE = """
task: my_choice
output_type: multiple_choice
doc_to_choice: ["1", "2", "3", "4"]
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc}]
"""


def saved(folder, policy):
    policy.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model"), tiny_masked_lm(**SMALL, head_std=1.0))


@pytest.fixture(scope="module")
def causal_model(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("causal"), tiny_llama(causal=True, **SMALL, head_std=1.0))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two custom tasks in YAML, over the puzzles of `evaluate --task sudoku`."""
    task = Sudoku(split="test", clues=9)
    rows = [json.dumps(task[i].fields | {"text": task[i].prompt}) for i in range(COUNT)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "grades.py").write_text(GRADES)
    (tmp_path / "sudoku.yaml").write_text((ROWS + YAML).replace("FOLDER", str(tmp_path)))
    (tmp_path / "choice.yaml").write_text((ROWS + CHOICE).replace("FOLDER", str(tmp_path)))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    return tmp_path


def asked(monkeypatch, folder, arguments, *more):
    """What the harness writes: results and the samples of my_sudoku, if it ran."""
    monkeypatch.setattr(sys, "argv", ["dllm-rl"])
    out = folder / f"out{len(list(folder.glob('out*')))}"
    model = ("lm-eval", "--model", "dllm_rl", "--model_args", arguments, "--device", "cpu")
    kept = ("--output_path", str(out), "--log_samples", "--include_path", str(folder))
    status = main([*model, *kept, *more])
    if status:
        return status
    (results,) = out.rglob("results_*.json")
    samples = [json.loads(line) for file in out.rglob("samples_my_sudoku*") for line in file.open()]
    return json.loads(results.read_text())["results"], samples


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_numbers_are_those_of_evaluate(model, folder, monkeypatch, capsys, temperature):
    """Completion by completion, in other batches; drawn ones too."""
    same = ["--diffusion_steps", "4", "--block_size", "8", "--rank", "MaxProb", "--temperature", str(temperature)]
    mine = ["evaluate", model, "--task", "sudoku", "--set", "clues=9", "--limit", str(COUNT), "--seed", "5", "--json"]
    assert main([*mine, *same, "--output_dir", str(folder / "mine")]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    stored = [json.loads(line) for line in (folder / "mine" / found["completions"]).open()]
    arguments = f"pretrained={model},diffusion_steps=4,block_size=8,rank=MaxProb,temperature={temperature},seed=5"
    results, samples = asked(monkeypatch, folder, arguments, "--tasks", "my_sudoku", "--batch_size", "5")
    written = {sample["doc"]["text"]: sample["resps"][0][0] for sample in samples}
    assert written == {row["prompt"]: row["completion"] for row in stored}
    assert len(written) == COUNT and (not temperature or len(set(written.values())) > COUNT / 2)
    for name in ("cell_accuracy", "givens_kept"):
        assert found[name] == pytest.approx(results["my_sudoku"][f"{name},none"])


@pytest.mark.slow
def test_a_cache_answers_what_it_holds(model, folder, monkeypatch):
    command = ("--tasks", "my_sudoku", "--use_cache", str(folder / "answers"))
    first = asked(monkeypatch, folder, f"pretrained={model}", *command)
    monkeypatch.setattr(
        harness.CommandLineModel, "sampler", property(lambda self: 1 / 0, lambda self, value: None), raising=False
    )
    again = asked(monkeypatch, folder, f"pretrained={model}", *command)
    assert first[0]["my_sudoku"] == again[0]["my_sudoku"]


@pytest.mark.slow
def test_choices_are_scored_by_the_estimator_that_is_named(model, causal_model, folder, monkeypatch):
    """One token is masked whatever the estimator: all choose alike. A causal model's own is `Causal`."""
    command = ("--tasks", "my_choice", "--batch_size", "4")
    named = f"pretrained={model},likelihood=Coupled,likelihood.num_samples=2,greedy=False"
    elbo, _ = asked(monkeypatch, folder, f"pretrained={model}", *command)
    coupled, _ = asked(monkeypatch, folder, named, *command)
    assert elbo["my_choice"]["acc,none"] == coupled["my_choice"]["acc,none"]
    assert 0 <= asked(monkeypatch, folder, f"pretrained={causal_model}", *command)[0]["my_choice"]["acc,none"] <= 1


def test_the_names_of_model_args(model, causal_model):
    made = harness.CommandLineModel(
        model,
        batch_size="3",
        diffusion_steps=2,
        commit="Threshold",
        **{"commit.tau": 0.5, "likelihood.num_samples": 6},
    )
    assert made.batch_size == 3 and made.likelihood == ELBO(num_samples=6) and made.is_task_length
    assert made.sampler == Unmask(max_new_tokens=256, diffusion_steps=2, commit=Threshold(tau=0.5))
    fixed = harness.CommandLineModel(model, max_new_tokens=8)
    assert fixed.sampler == Unmask(max_new_tokens=8) and not fixed.is_task_length
    causal = harness.CommandLineModel(causal_model)
    assert causal.likelihood == Causal() and causal.sampler == Autoregress(max_new_tokens=256, temperature=0.0)
    bounded = harness.CommandLineModel(model, commit="EntropyBound", **{"commit.gamma": 0.5})
    assert bounded.sampler.rank == Entropy(), "its own rank"
    assert get_model("dllm_rl") is harness.CommandLineModel
    assert get_model("dummy").__name__ == "DummyLM", "the harness's own are still there"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_step": 2}, "num_step=2 is not a setting of Unmask, the sampler of"),
        ({"likelihood": "exact"}, "likelihood='exact' is not known; the nearest is"),
        ({"likelihood": "none"}, "likelihood=none scores nothing; name an estimator, such as ELBO"),
        ({"likelihood": "recipes.examples.bounds.BlockELBO"}, "BlockELBO needs likelihood.block_size"),
        ({"likelihood.nodes": 2}, "likelihood.nodes is not a setting of ELBO; leave it out"),
        ({"likelihood": "Trajectory"}, "replays a recorded unmasking"),
        ({"commit": "Threshold"}, "commit Threshold needs commit.tau"),
        ({"commit": "Threshold", "commit.tau": "x"}, "commit Threshold: tau='x' is of type str; give float"),
        ({"commit.tau": 0.5}, "commit.tau needs commit, the class with this setting"),
        ({"batch_size": "auto"}, "batch_size='auto' must be a whole number"),
        ({"commit": "some"}, "commit='some' is not known; the nearest is"),
    ],
)
def test_refusals(model, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        harness.CommandLineModel(model, **settings)


def test_a_refusal_is_one_line(folder, monkeypatch, capsys):
    assert asked(monkeypatch, folder, "pretrained=nowhere,diffusion_steps=2", "--tasks", "my_sudoku") == 2
    assert "error: " in capsys.readouterr().err
