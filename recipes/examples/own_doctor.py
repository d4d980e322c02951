"""Where the mismatch of your rows comes from: the report of `dllm-rl doctor`, with a sampler and a reward of yours."""

from dllm_rl import MaxProb, Unmask, tiny_masked_lm
from dllm_rl.decoding.prompts import encode
from dllm_rl.doctor.mismatch import diagnose, write_doctor
from dllm_rl.quantization.schemes import Float8WeightOnly
from dllm_rl.tasks import task_from_dataset

rows = [{"prompt": f"{a}{b}=", "answer": f"{b}{a}"} for a in "1234" for b in "1234"]  # prompts may be chats


def accuracy(completions, answer, **columns):
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


policy = tiny_masked_lm(
    characters="1234="
)  # of a run: load_policy("RUN/checkpoints/step-000100", dtype="bfloat16", device="cuda")
task = task_from_dataset(rows, reward_funcs=accuracy)
prompts = encode(policy, [task[i] for i in range(16)], num_generations=2)  # two completions of each
sampler = Unmask(max_new_tokens=2, diffusion_steps=2, rank=MaxProb(), temperature=1.0)
report = diagnose(policy, Float8WeightOnly(), prompts=prompts, sampler=sampler, micro_batch_size=8)
write_doctor(report)  # the tables; report.total.ess is the ESS
