"""Run TRL's own tests of `GRPOTrainer` with `DiffusionGRPOTrainer` in its place: `python -m benchmarks.trl_suite PATH`.

PATH is your copy of TRL's tests/test_grpo_trainer.py; options after it are pytest's, such as -k loss. Models and rows
like those of TRL's tests are made here, so that nothing is downloaded: wherever a test names a tiny language model of
`trl-internal-testing`, it gets a tiny model in LLaDA's layout, or a mixture of experts where the name has "Moe", and a
tiny classifier as the reward model. Tests of images and of remote code are skipped, and those that call private methods
of TRL (`OF_PRIVATE_METHODS`) are left out.

It prints each test that was refused (this library's own ValueError or RuntimeError, of one line) or failed, why tests
were left out, and the counts, and exits with 1 if a test failed.
"""

import codecs
import os
import sys
import tempfile
import traceback
from collections import Counter
from contextlib import redirect_stdout
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
from dllm_rl.models.tiny import tiny_llama, tiny_moe

OWNER = "trl-internal-testing/"
CHARACTERS = "".join(map(chr, range(32, 127)))
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant: {% if enable_thinking is false %}(at once) {% endif %}{% endif %}"
)
# How many words of a line of the Zen of Python are the prompt, in the order of the lines; of later lines all but one.
NUM_WORDS = (4, 2, 3, 1, 4, 3, 1, 4, 3, 3, 2, 6)
SKIPPED = ("ConditionalGeneration", "Remote")  # in the names of models of images, and of remote code
# Tests, or classes of them, that call private methods of TRL with what no user of the trainer gives, and what they do.
OF_PRIVATE_METHODS = {
    "TestGetHighEntropyMask": "calls TRL's get_high_entropy_mask on a mock of a trainer",
    "TestGRPORolloutDispatch": "calls TRL's _generate on an object without __init__",
    "TestTransformersContinuousBatchingContract": "makes no trainer; it looks at classes of transformers",
    "test_get_off_policy_mask": "calls TRL's function without a trainer",
    "test_get_off_policy_mask_padding": "calls TRL's function without a trainer",
    "test_luspo_loss_ignores_padding": "calls _compute_loss with a batch made by hand, whose rows no sampler wrote",
    "test_sampling_logps_none_yields_neutral_importance_ratio": "sets use_vllm after __init__, and replaces _generate",
}
NEVER_ENDS = "test_train_with_mask_truncated_completions_all_masked"  # needs a model that does not write its end token


def make_models(folder: Path) -> None:
    """Write the language model and the reward model that stand for those of TRL's tests."""
    policy = tiny_llama(
        causal=False, characters=CHARACTERS, hidden_size=16, num_layers=2, max_length=1024, head_std=0.1
    )
    policy.tokenizer.chat_template = TEMPLATE
    policy.save_pretrained(folder / "language")
    many = CHARACTERS + "".join(map(chr, range(0x4E00, 0x9FA6)))  # so many that the end token is hardly drawn
    endless = tiny_llama(causal=False, characters=many, hidden_size=16, num_layers=2, max_length=1024, head_std=0.1)
    endless.save_pretrained(folder / "endless")
    mixture = tiny_moe(characters=CHARACTERS, hidden_size=16, num_layers=2, max_length=1024, head_std=0.1)
    mixture.tokenizer.chat_template = policy.tokenizer.chat_template
    mixture.save_pretrained(folder / "mixture")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    # One token more, because a test names a padding token that the tokenizer does not have.
    config = transformers.Qwen2Config(
        vocab_size=len(policy.tokenizer) + 1, num_key_value_heads=2, num_labels=1, pad_token_id=policy.pad_id, **sizes
    )
    torch.manual_seed(0)
    transformers.Qwen2ForSequenceClassification(config).save_pretrained(folder / "reward")
    policy.tokenizer.save_pretrained(folder / "reward")


def zen() -> list[str]:
    """Return the prompts of TRL's test data set: the beginnings of the lines of the Zen of Python."""
    with redirect_stdout(None):
        import this
    lines = [line.split() for line in codecs.decode(this.s, "rot13").splitlines()[2:]]
    sizes = [*NUM_WORDS, *(len(line) - 1 for line in lines[len(NUM_WORDS) :])]
    return [" ".join(line[:size]).rstrip(".") for line, size in zip(lines, sizes, strict=True)]


def rows_like(
    name: str, config: str = "standard_prompt_only", split: str | None = None, *, streaming: bool = False
) -> Any:
    """Return rows in the layout of TRL's test data set: the last two are the test's."""
    if name != f"{OWNER}zen":
        pytest.skip(f"rows of {name} ({config}) are not made here")
    prompts: list[Any] = zen()
    if config.startswith("conversational"):
        prompts = [[{"role": "user", "content": text}] for text in prompts]
    parts = {"train": prompts[:-2], "test": prompts[-2:]}
    made = {part: datasets.Dataset.from_dict({"prompt": rows}) for part, rows in parts.items()}
    if streaming:
        made = {part: rows.to_iterable_dataset() for part, rows in made.items()}
    return datasets.DatasetDict(made) if split is None else made[split]


class Suite:
    """A plugin of pytest that puts the stand-ins in place before the tests are imported, and counts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.counts: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()  # by the name in OF_PRIVATE_METHODS
        self.test = ""  # the name of the one that runs

    def place(self, name: Any) -> Any:
        """Return the folder that stands for a hub id of TRL's tests."""
        if not isinstance(name, str) or not name.startswith(OWNER):
            return name
        if any(part in name for part in SKIPPED):
            pytest.skip(f"a model like {name} is not made here")
        kind = "mixture" if "Moe" in name else "endless" if self.test == NEVER_ENDS else "language"
        return str(self.folder / ("reward" if "SequenceClassification" in name else kind))

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
        for kind in (
            transformers.AutoTokenizer,
            transformers.AutoModelForSequenceClassification,
            transformers.AutoModelForImageTextToText,
        ):
            kind.from_pretrained = placed(kind.from_pretrained)

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        kept = []
        for item in items:
            names = {item.originalname, getattr(item.cls, "__name__", "")} & OF_PRIVATE_METHODS.keys()
            self.left_out.update(names)
            kept += [] if names else [item]
        items[:] = kept

    def pytest_runtest_setup(self, item: Any) -> None:
        self.test = item.name

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Any:
        report = yield
        error = call.excinfo
        if report.skipped:
            self.counts["skipped"] += 1
        elif report.failed and (refusal := refusal_of(error.value)):
            self.counts["refused"] += 1
            print(f"\nrefused: {item.name}: {refusal}", flush=True)
        elif report.failed:
            self.counts["failed"] += 1
            print(f"\nfailed: {item.name}: {error.exconly()[:300]}", flush=True)
        elif report.when == "call":
            self.counts["passed"] += 1
        return report


def refusal_of(error: BaseException) -> str:
    """Return the first line of this library's refusal that ended a test, or that the test compared with TRL's text."""
    for raised in (error, error.__context__):
        if isinstance(raised, ValueError | RuntimeError):
            file = Path(traceback.extract_tb(raised.__traceback__)[-1].filename)
            if file.is_relative_to(Path(dllm_rl.__file__).parent):
                return str(raised).splitlines()[0]
    return ""


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
    for name, number in suite.left_out.items():
        print(f"left out: {number} of {name}: {OF_PRIVATE_METHODS[name]}")
    suite.counts["left out"] = suite.left_out.total()
    print(", ".join(f"{suite.counts[kind]} {kind}" for kind in ("passed", "refused", "failed", "skipped", "left out")))
    return 1 if suite.counts["failed"] or not suite.counts["passed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
