"""Your own chat data: SFT of LLaDA-8B-Instruct, then RL from its checkpoint. Start this file twice.

The first start fine-tunes on chats.jsonl; the second finds the checkpoint and continues with problems.jsonl. Two
starts, because the first model would otherwise still be in the GPU's memory.
"""

import re
from pathlib import Path

from datasets import load_dataset

from dllm_rl import Lora, grpo, sft
from dllm_rl.groups import Evaluation

START = "GSAI-ML/LLaDA-8B-Instruct"  # has a chat template; a Base model needs prompt and completion as text
TUNED = "runs/mine-sft-seed0/checkpoints/step-000500"
LENGTH = 256  # tokens of an answer, in both stages

if not Path(TUNED).is_dir():  # 1. SFT. A row of chats.jsonl: {"messages": [{"role": "user", "content": "..."}, ...]}
    sft(
        START,
        "chats.jsonl",
        name="mine-sft",
        max_length=768,  # tokens of a row; longer ones are left out and counted
        completion_length=LENGTH,
        lora=Lora(r=128, alpha=256.0),
        dtype="bfloat16",
        learning_rate=1e-5,
        weight_decay=0.1,
        train_batch_size=16,
        micro_batch_size=2,
        gradient_checkpointing=True,
        evaluation=Evaluation(batch_size=4),
        num_steps=500,
        save_steps=100,
        resume_from_checkpoint="latest",  # from the start, if there is no checkpoint yet
    )
else:  # 2. RL. A row of problems.jsonl: {"prompt": [{"role": "user", "content": "..."}], "answer": "..."}
    rows = load_dataset("json", data_files="problems.jsonl", split="train")

    def right(completions, answer, **columns):
        texts = [chat[0]["content"].replace(",", "") for chat in completions]  # the last number counts
        last = [re.findall(r"-?\d+(?:\.\d+)?", text)[-1:] for text in texts]
        return [float(number == [label]) for number, label in zip(last, answer, strict=True)]

    grpo(
        TUNED,
        rows,
        right,
        name="mine-rl",
        max_new_tokens=LENGTH,
        num_steps=1000,
        save_steps=10,
        eval_steps=100,
        resume_from_checkpoint="latest",
    )
