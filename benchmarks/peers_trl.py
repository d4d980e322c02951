"""A training step by TRL's GRPOTrainer and by ours: one stock Qwen2, the same prompts, rewards and lengths.

    python -m benchmarks.peers_trl --json benchmarks/results/peers-trl-cpu.json

The model is autoregressive, because TRL trains no diffusion model: ours is `Autoregress` with `Causal`. It has 4 layers
of width 128 and random weights. Both train in fp32, with one update per rollout, AdamW, without a KL term, and never
write the end of a sequence, so that all completions have the full length. Before they are timed, both must write the
same tokens at temperature 0. A step is everything from prompts to new weights. `generation` is its part that samples
and grades. Processor seconds, one thread, a step of each in turn, the fastest of `--repeats`. The memory is the peak of
a step at the largest vocabulary, above what was held before it, in a process of its own in which freed tensors go back
to the system at once.
"""

import argparse
import contextlib
import io
import os
import random
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.measure import machine, peak_above, peak_in_fresh_process, peer_arguments, ratios_of, write_json
from dllm_rl import Autoregress, Causal
from dllm_rl.frontend.grpo import grpo_recipe
from dllm_rl.groups import Log
from dllm_rl.models.policy import make_policy
from dllm_rl.training import trainer as training
from dllm_rl.training.start import start
from dllm_rl.types.rollouts import Prompts

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
SPECIAL = ["<unk>", "<pad>", "<eos>"]
GROUP = 4  # completions of a prompt
WARM_UP = 2  # steps of each before the first that counts


@dataclass(frozen=True)
class Size:
    vocabulary: int = 2048
    prompts: int = 4
    prompt: int = 32
    new: int = 32


SIZES = [Size(), Size(prompts=8), Size(new=64), Size(vocabulary=32768)]
SMOKE = [Size(vocabulary=512, prompts=1, prompt=8, new=8)]


def tokenizer_of(size: int) -> PreTrainedTokenizerFast:
    """A token per character."""
    names = [*SPECIAL, *LETTERS]
    names += [chr(0x20000 + i) for i in range(size - len(names))]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **special)


def model_of(vocabulary: int) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, bos_token_id=None, eos_token_id=2, pad_token_id=1,
        tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


def rows_of(size: Size) -> list[dict[str, str]]:
    rng = random.Random(0)
    return [{"prompt": "".join(rng.choices(LETTERS, k=size.prompt))} for _ in range(64)]


def reward(completions: list[str], **columns: Any) -> list[float]:
    """Numbers that differ within a group."""
    return [zlib.crc32(text.encode()) % 997 / 997 for text in completions]


class Measured:
    """Processor seconds and peaks of memory of both, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.peaks: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def work(self, name: str, *, memory: bool = False) -> Iterator[None]:
        above = peak_above() if memory else None
        begin = time.process_time()
        yield
        self.seconds.setdefault(name, []).append(time.process_time() - begin)
        if above is not None:
            self.peaks.setdefault(name, []).append(above())

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            with self.work(name):
                return function(*arguments, **keywords)

        return call

    def least(self, name: str) -> float:
        return min(self.seconds[name][WARM_UP:])


def our_steps(size: Size, policy: Any, sampler: Autoregress, folder: str) -> Callable[[], object]:
    """A function that takes the next step."""
    recipe = grpo_recipe(
        policy, rows_of(size), reward, sampler=sampler, likelihood=Causal(), train_batch_size=size.prompts,
        num_generations=GROUP, num_steps=10**6, learning_rate=1e-6, weight_decay=0.0, eval_steps=0, save_steps=10**6,
        report_to=None, log=Log(completions_steps=0), eval_split=1, output_dir=folder,
    )  # fmt: skip
    run = start(recipe, None, ())
    numbers = count()

    def step() -> None:
        number = next(numbers)
        run.log.write(number, training.take_step(run, number))

    return step


class Turns(TrainerCallback):
    """Measures each step of TRL, with its log as ours has, and takes one of ours after it."""

    def __init__(self, measured: Measured, our_step: Callable[[], object]) -> None:
        self.measured, self.our_step = measured, our_step

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.work = self.measured.work("TRL's step", memory=True)
        self.work.__enter__()

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "train_runtime" in logs:  # the summary after the last step
            return
        self.work.__exit__(None, None, None)
        with self.measured.work("step", memory=True):
            self.our_step()
        self.on_train_begin()


def trl_trainer(size: Size, model: Qwen2ForCausalLM, folder: str, steps: int, turns: Turns) -> GRPOTrainer:
    config = GRPOConfig(
        output_dir=folder, per_device_train_batch_size=size.prompts * GROUP, num_generations=GROUP,
        max_completion_length=size.new, temperature=1.0, learning_rate=1e-6, beta=0.0, num_iterations=1,
        max_steps=steps, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, bf16=False,
        gradient_checkpointing=False, disable_tqdm=True, generation_kwargs={"suppress_tokens": [2]},
        lr_scheduler_type="constant", seed=0,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model, reward, args=config, train_dataset=Dataset.from_list(rows_of(size)),
        processing_class=tokenizer_of(size.vocabulary), callbacks=[turns],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def check_greedy(size: Size, model: Qwen2ForCausalLM, policy: Any, sampler: Autoregress) -> None:
    """Raise ValueError unless both write the same tokens at temperature 0."""
    ids = torch.tensor([policy.tokenizer.encode(row["prompt"]) for row in rows_of(size)[: size.prompts]])
    options = {"max_new_tokens": size.new, "do_sample": False, "suppress_tokens": [2]}
    with torch.no_grad():
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    prompts = Prompts.from_ids(ids.tolist(), pad_id=policy.pad_id)
    ours = sampler.replace(temperature=0.0)(policy, prompts, torch.Generator()).tokens
    if not torch.equal(theirs, ours):
        raise ValueError("the completions differ at temperature 0")


def compared(*, sizes: Size, repeats: int) -> dict[str, Any]:
    """Processor seconds, and the ratios TRL / ours; `peak_mib` has the largest peaks of both."""
    torch.set_num_threads(1)
    measured = Measured()
    sampler = Autoregress(max_new_tokens=sizes.new, temperature=1.0, suppress=("<eos>",))
    policy = make_policy(model_of(sizes.vocabulary), tokenizer_of(sizes.vocabulary))
    check_greedy(sizes, model_of(sizes.vocabulary), policy, sampler)
    collect = measured.around("generation", training.collect)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        ours = our_steps(sizes, policy, sampler, f"{folder}/ours")
        turns = Turns(measured, ours)
        trainer = trl_trainer(sizes, model_of(sizes.vocabulary), f"{folder}/trl", WARM_UP + repeats, turns)
        trainer._generate_and_score_completions = measured.around(
            "TRL's generation", trainer._generate_and_score_completions
        )
        with patch.object(training, "collect", collect):
            trainer.train()
    seconds = {name: measured.least(name) for name in measured.seconds}
    found: dict[str, Any] = {
        f"TRL / ours, {name}": round(seconds[f"TRL's {name}"] / seconds[name], 2) for name in ("step", "generation")
    }
    found |= {f"{name}, s": round(each, 4) for name, each in seconds.items()}
    peaks = {name: round(max(each[WARM_UP:])) for name, each in measured.peaks.items()}
    return {**asdict(sizes), **found, "peak_mib": {"TRL": peaks["TRL's step"], "ours": peaks["step"]}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments = peer_arguments(parser)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    rows = []
    for sizes in SMOKE if arguments.smoke else SIZES:
        rows.append(compared(sizes=sizes, repeats=arguments.repeats))
        del rows[-1]["peak_mib"]  # of the heap
        print(rows[-1], flush=True)
    peaks = peak_in_fresh_process(compared, sizes=sizes)
    print(ratios_of(rows), peaks)
    about = {"machine": machine("cpu"), "repeats": arguments.repeats}
    write_json(arguments.json, about | {"rows": rows, "peak_mib": asdict(sizes) | peaks})


if __name__ == "__main__":
    main()
