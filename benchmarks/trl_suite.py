"""Run TRL's own tests of `GRPOTrainer` with `DiffusionGRPOTrainer` in its place: `python -m benchmarks.trl_suite PATH`.

PATH is your copy of TRL's tests/test_grpo_trainer.py; options after it are pytest's, such as -k loss. Models and rows
like those of TRL's tests are made here, so that nothing is downloaded: wherever a test names a tiny language model of
`trl-internal-testing`, it gets a tiny model in LLaDA's layout, and a tiny classifier as the reward model.

It prints each test that was refused (this library's own ValueError or RuntimeError, of one line) or failed, and the
counts, and exits with 1 if a test failed.
"""

import os
import sys
import tempfile
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}

import datasets
import pytest
import torch
import transformers
import trl

import dllm_rl
from dllm_rl.integrations.trl import DiffusionGRPOTrainer
from dllm_rl.models.tiny import tiny_llama

OWNER = "trl-internal-testing/"
CHARACTERS = "".join(map(chr, range(32, 127)))
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }} {% endfor %}"
LINES = ["Warm is kinder than", "Short reads better than", "A list is safer than", "Now is sooner than"]


def make_models(folder: Path) -> None:
    """Write the language model and the reward model that stand for those of TRL's tests."""
    policy = tiny_llama(
        causal=False, characters=CHARACTERS, hidden_size=16, num_layers=2, max_length=1024, head_std=0.1
    )
    policy.tokenizer.chat_template = TEMPLATE + "{% if add_generation_prompt %}assistant: {% endif %}"
    policy.save_pretrained(folder / "language")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Qwen2Config(
        vocab_size=len(policy.tokenizer), num_key_value_heads=2, num_labels=1, pad_token_id=policy.pad_id, **sizes
    )
    torch.manual_seed(0)
    transformers.Qwen2ForSequenceClassification(config).save_pretrained(folder / "reward")
    policy.tokenizer.save_pretrained(folder / "reward")


def rows_like(name: str, config: str = "standard_prompt_only", split: str | None = None, **_: Any) -> Any:
    """Return rows in the layout of TRL's test data set, 16 for training and 4 for the test."""
    if name != f"{OWNER}zen":
        pytest.skip(f"rows of {name} ({config}) are not made here")
    prompts: list[Any] = [f"{line} {number}" for number in range(4) for line in LINES]
    if config.startswith("conversational"):
        prompts = [[{"role": "user", "content": text}] for text in prompts]
    parts = {"train": prompts, "test": prompts[:4]}
    made = {part: datasets.Dataset.from_dict({"prompt": rows}) for part, rows in parts.items()}
    return datasets.DatasetDict(made) if split is None else made[split]


class Suite:
    """A plugin of pytest that puts the stand-ins in place before the tests are imported, and counts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results: dict[str, list[str]] = defaultdict(list)

    def place(self, name: Any) -> Any:
        """Return the folder that stands for a hub id of TRL's tests."""
        if not isinstance(name, str) or not name.startswith(OWNER):
            return name
        return str(self.folder / ("reward" if "SequenceClassification" in name else "language"))

    def pytest_configure(self) -> None:
        place, suite_folder = self.place, self.folder

        class Trainer(DiffusionGRPOTrainer):
            def __init__(self, model: Any = None, reward_funcs: Any = None, args: Any = None, **more: Any) -> None:
                is_list = isinstance(reward_funcs, list)
                rewards = [place(each) for each in reward_funcs] if is_list else place(reward_funcs)
                if args is None:
                    args = trl.GRPOConfig(str(suite_folder / "out"), report_to="none")
                super().__init__(place(model), rewards, args, **more)

        def language_model(name: Any, *args: Any, **more: Any) -> Any:
            policy = dllm_rl.load_policy(place(name))
            policy.module.name_or_path = place(name)
            return policy.module

        def placed(function: Any) -> Any:
            return lambda name, *args, **more: function(place(name), *args, **more)

        Trainer.__name__ = "GRPOTrainer"
        trl.GRPOTrainer = Trainer
        if not torch.cuda.is_available():
            trl.GRPOConfig = partial(trl.GRPOConfig, use_cpu=True, bf16=False)
        datasets.load_dataset = rows_like
        transformers.AutoModelForCausalLM.from_pretrained = language_model
        for kind in (transformers.AutoTokenizer, transformers.AutoModelForSequenceClassification):
            kind.from_pretrained = placed(kind.from_pretrained)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Any:
        report = yield
        error = call.excinfo
        if report.skipped:
            self.results["skipped"].append(item.name)
        elif report.failed and error.errisinstance((ValueError, RuntimeError)) and is_own(error):
            self.results["refused"].append(f"{item.name}: {str(error.value).splitlines()[0]}")
        elif report.failed:
            self.results["failed"].append(f"{item.name}: {error.exconly()[:300]}")
        elif report.when == "call":
            self.results["passed"].append(item.name)
        return report


def is_own(error: Any) -> bool:
    """Return whether this library raised the error."""
    return Path(error.traceback[-1].path).is_relative_to(Path(dllm_rl.__file__).parent)


def main(arguments: list[str]) -> int:
    if not arguments or not Path(arguments[0]).is_file():
        raise SystemExit("usage: python -m benchmarks.trl_suite PATH_OF_test_grpo_trainer.py [options of pytest]")
    path = Path(arguments[0]).resolve()
    if not (path.parent / "testing_utils.py").is_file():
        raise SystemExit(f"{path}: the tests import testing_utils.py of the same folder of TRL; copy it, too")
    with tempfile.TemporaryDirectory() as folder:
        make_models(Path(folder))
        suite = Suite(Path(folder))
        pytest.main([str(path), "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider", *arguments[1:]], [suite])
    for kind in ("refused", "failed"):
        print(*(f"{kind}: {line}" for line in suite.results[kind]), sep="\n")
    print(", ".join(f"{len(suite.results[kind])} {kind}" for kind in ("passed", "refused", "failed", "skipped")))
    return 1 if suite.results["failed"] or not suite.results["passed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
