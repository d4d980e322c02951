"""The processes of a run must train alike: what differs between them is refused in each, before the first step."""

from types import SimpleNamespace

from ranks import run_ranks
from tiny_recipe import tiny_recipe

from dllm_rl.groups import Teacher
from dllm_rl.training import start

PROGRAM = """
import itertools, os, random, re, sys
from pathlib import Path
import torch
from dllm_rl import Callback, Lora, grpo, sft, tiny_masked_lm

rank = int(os.environ["RANK"])
folders = map(str, (Path(sys.argv[1]) / f"run{i}" for i in itertools.count()))
rows = [{"prompt": f"{a}=", "completion": a} for a in "12345678"]
shuffled = random.Random(rank).sample(rows, len(rows))
small = {"max_new_tokens": 1, "train_batch_size": 2, "num_generations": 2, "eval_split": 2}
common = {"num_steps": 1, "report_to": "none"}
device = torch.device("cuda", rank)  # of a reward model: what rewards refer to may differ


def model(seed=0):
    return tiny_masked_lm(characters="12345678=", hidden_size=16, num_layers=1, seed=seed)


def reward(completions, **columns):
    return [float(text == "1") + 0 * device.index for text in completions]


class Noting(Callback):
    pass


def drawn_model():
    policy = model()
    for weight in policy.module.parameters():
        weight.data += torch.rand(1, generator=torch.Generator().manual_seed(rank))
    return policy


def refused(name, train, *arguments, **settings):
    try:
        train(*arguments, output_dir=next(folders), **common | settings)
    except ValueError as error:
        assert re.match(f"{name} differs between the processes of the run", str(error)), error
        assert re.search("in process 0, and .* in process 1; give all of them the same", str(error)), error
        print(str(error))
    else:
        raise AssertionError(f"{name} of process {rank} alone: trained")


refused("task", grpo, model(), shuffled, reward, **small)
refused("callbacks", grpo, model(), rows, reward, callbacks=[Noting()][rank:], **small)
refused("seed", grpo, model(), rows, reward, seed=rank, **small)
refused("num_generations", grpo, model(), rows, reward, **small | {"num_generations": 2 + rank})
refused("model", grpo, drawn_model, rows, reward, **small)
refused("model", grpo, drawn_model(), rows, reward, lora=Lora(), **small)
refused("dataset", sft, model(), shuffled, train_batch_size=2)
refused("learning_rate", sft, model(), rows, train_batch_size=2, learning_rate=1e-3 + rank)
refused("model", sft, drawn_model(), rows, train_batch_size=2)
settings = {"logging_steps": 1 + rank, "save_steps": 1}
summary = grpo(model(), rows, reward, output_dir=next(folders), **small | common | settings)
print(*(weight.double().sum().item() for weight in summary.policy.module.parameters()))
"""


def test_what_differs_between_the_processes_is_refused_in_each(tmp_path):
    """Rows, settings and weights, of RL and of SFT. What the main process or rewards read, may."""
    first, second = run_ranks(PROGRAM, 2, tmp_path)
    told = [[line for line in out.splitlines() if "differs between" in line] for out in (first, second)]
    assert told[0] == told[1] and len(told[0]) == 9
    assert first.splitlines()[-1] == second.splitlines()[-1], "equal weights"
    assert not [*tmp_path.glob("run[0-8]/metrics.jsonl")], "refused before a file is written"


def test_what_a_teacher_weighs_is_compared_and_where_it_lies_is_not(monkeypatch):
    compared = []
    monkeypatch.setattr(start, "check_same", lambda values, processes: compared.append(values))
    for settings in ({"model": "a"}, {"model": "b"}, {"model": "a", "coeff": 0.5}, {"model": "a", "substeps": 2}):
        start.check_same_recipe(tiny_recipe("x", teacher=Teacher(**settings)), SimpleNamespace(num_processes=2))
    here, elsewhere, *others = compared
    assert here == elsewhere and here not in others
