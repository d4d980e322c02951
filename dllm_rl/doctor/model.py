"""Run the sections one after the other, print each as soon as it is known, and write the report."""

import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dllm_rl.device import device_name
from dllm_rl.doctor.learning import GB, resume_section, step_section, sync_section
from dllm_rl.doctor.rollouts import batch_section, quantized_section, sampler_section
from dllm_rl.doctor.subject import Finding, Subject, Verdict, is_stock
from dllm_rl.doctor.text import text_section
from dllm_rl.files import write_text
from dllm_rl.models.base import Policy
from dllm_rl.models.lora import moe_layers
from dllm_rl.screen import escape_controls, line_of
from dllm_rl.testing.policy_contract import check_forward
from dllm_rl.training.dry_run.memory import num_weights
from dllm_rl.versions import versions

SECTIONS: dict[str, Callable[[Subject], Finding]] = {
    "text": text_section,
    "sampler": sampler_section,
    "quantized": quantized_section,
    "batch": batch_section,
    "step": step_section,
    "sync": sync_section,
    "resume": resume_section,
}
# What a model, a device or a disk may raise. Other errors are faults of the library and end the command.
ERRORS = (ValueError, RuntimeError, OSError, ArithmeticError, ImportError, IndexError)


@dataclass(frozen=True)
class Result:
    """The finding of a section, and the seconds that it took."""

    name: str
    finding: Finding
    seconds: float


def check_model(
    open_model: Callable[[], Policy],
    sections: Sequence[str] = tuple(SECTIONS),
    *,
    schemes: list[Any] | None = None,
    seed: int = 0,
    output: Path | None = None,
    say: Callable[[str], None] = print,
) -> list[Result]:
    """Check whether the library works with a model, and what its quantized rollouts are worth.

    The model is always loaded first. A section that fails does not hide the others. After each section the report is
    rewritten, so that an interrupted check keeps what is known.

    Args:
        open_model: Function that loads the model.
        sections: Names of SECTIONS to run. Default: all.
        schemes: Quantization schemes to measure. None (default): those that the device runs.
        seed: Seed of all random numbers. Default: 0.
        output: File of the report, which has no text and no path of the user. None (default): no report.
        say: Function that prints a line.

    Returns:
        The results, beginning with "load".
    """
    results: list[Result] = []
    subject: Subject | None = None

    def load() -> Finding:
        nonlocal subject
        policy, finding = loaded(open_model)
        subject = Subject(policy, schemes, seed)
        return finding

    for name in ("load", *sections):
        if name != "load" and subject is None:
            say("the other sections need a model that loads")
            break
        start = time.perf_counter()
        try:
            finding = load() if subject is None else SECTIONS[name](subject)
        except ERRORS as error:
            finding = failed(error)
        except KeyboardInterrupt:
            say(f"interrupted in {name}{f'; {output} has the sections above' if output and results else ''}")
            raise
        results.append(Result(name, finding, time.perf_counter() - start))
        for line in lines_of(results[-1]):
            say(line)
        if output is not None:
            write_text(output, json.dumps(report(results, subject), indent=1) + "\n")
    return results


def loaded(open_model: Callable[[], Policy]) -> tuple[Policy, Finding]:
    """Load the model, and check its forward."""
    start = time.perf_counter()
    policy = open_model()
    seconds = time.perf_counter() - start
    spec, tokenizer = policy.spec, policy.tokenizer
    weight = next(policy.module.parameters())
    dtype = str(weight.dtype).removeprefix("torch.")
    size = num_weights(policy.module)
    num_ids = len(tokenizer) if hasattr(tokenizer, "__len__") else None
    has_template = bool(getattr(tokenizer, "chat_template", None))
    numbers = {
        "seconds": seconds,
        "weights": size,
        "dtype": dtype,
        "vocab_size": policy.vocab_size,
        "tokenizer_size": num_ids,
        "attention": spec.attention,
        "shift": spec.shift,
        "block_size": spec.block_size,
        "max_length": spec.max_length,
        "mask_id": spec.mask_id,
        "eos_ids": list(spec.eos_ids),
        "chat_template": has_template,
        "experts": bool(moe_layers(policy.module)),
    }
    quoted = lambda token: f"{token} {tokenizer.decode([token], skip_special_tokens=False)!r}"  # noqa: E731
    blocks = f" in blocks of {spec.block_size}" if spec.block_size else ""
    parts = [
        f"{spec.name} ({type(policy.module).__name__}), {size:,} weights in {dtype} on {policy.device}",
        f"{spec.attention} attention{blocks}{', shifted logits' if spec.shift else ''}",
        "no mask token" if spec.mask_id is None else f"mask token {quoted(spec.mask_id)}",
        f"end tokens {', '.join(map(quoted, spec.eos_ids))}",
        "a chat template" if has_template else "no chat template",
    ]
    line = "; ".join(parts)
    if spec.attention != "encoder_decoder":  # its rows have a canvas
        try:
            check_forward(policy)
        except AssertionError as error:
            advice = "the forward does not do what the library needs: correct the module, its spec or its config.json"
            if moe_layers(policy.module):  # rounding may send a token to another expert
                advice = "with experts, rounding can do this: read the section on batches; in fp32 it should be gone"
            verdict: Verdict = "look" if moe_layers(policy.module) else "wrong"
            return policy, Finding(verdict, f"{line}; {error}", advice, "forward", numbers)
    if num_ids is not None and num_ids > policy.vocab_size:
        line += f"; the tokenizer has {num_ids} tokens, and the model {policy.vocab_size}"
        advice = "is it this model's tokenizer? Tokens without an embedding are refused where a text has them"
        return policy, Finding("look", line, advice, "tokenizer size", numbers)
    return policy, Finding("ok", line, numbers=numbers)


def failed(error: BaseException) -> Finding:
    """Return the finding of a section that raised an error. The report has its class and place, not its text."""
    advice = ""
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        advice = "free the GPU of other processes, or take a larger one; --quick leaves the training step out"
    elif isinstance(error, IndexError):
        advice = (
            "a token or a position is outside a table of the module: compare vocab_size and max_length of its spec "
            "with its embeddings"
        )
    numbers = {"error": type(error).__name__, "place": place_of(error)}
    return Finding("wrong", line_of(error), advice, "error", numbers)


def place_of(error: BaseException) -> str | None:
    """Return the innermost function of the library that an error came through, as MODULE:FUNCTION."""
    place, frame = None, error.__traceback__
    while frame is not None:
        module = frame.tb_frame.f_globals.get("__name__", "")
        if module.startswith("dllm_rl."):
            place = f"{module}:{frame.tb_frame.f_code.co_name}"
        frame = frame.tb_next
    return place


def lines_of(result: Result) -> list[str]:
    """Return the lines that show a result."""
    finding = result.finding
    lines = [f"{finding.verdict:6} {result.name:10} {escape_controls(finding.line)} ({result.seconds:.1f} s)"]
    lines += [f"{'':17} {escape_controls(line)}" for line in finding.shown]
    if finding.advice:
        lines.append(f"{'':17} to do: {escape_controls(finding.advice)}")
    return lines


def report(results: Sequence[Result], subject: Subject | None) -> dict[str, Any]:
    """Return the report: versions, device, shapes, and the numbers of the sections.

    It has none of the model's texts, no paths, and no names of the user's own code.
    """
    found: dict[str, Any] = {"versions": versions() | {"python": platform.python_version()}}
    if subject is not None:
        policy = subject.policy
        found["device"] = device_facts(policy.device)
        found["model"] = model_facts(policy)
    found["sections"] = [
        {
            "name": each.name,
            "verdict": each.finding.verdict,
            "reason": each.finding.reason,
            "seconds": round(each.seconds, 2),
            "numbers": finite(each.finding.numbers),
        }
        for each in results
    ]
    return found


def finite(value: Any) -> Any:
    """Return a JSON value with None in place of each number that JSON does not have: NaN and infinity."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return list(map(finite, value))
    return None if isinstance(value, float) and not math.isfinite(value) else value


def device_facts(device: torch.device) -> dict[str, Any]:
    """Return the kind of a device, and a GPU's memory and capability."""
    facts: dict[str, Any] = {"type": device.type, "name": device_name(device), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"memory_gb": properties.total_memory / GB, "capability": f"{properties.major}.{properties.minor}"}
        facts |= {"cuda": torch.version.cuda, "hip": torch.version.hip}
    return facts


def model_facts(policy: Policy) -> dict[str, Any]:
    """Return the family, the class and the shapes of a model; of a class of the user's own, only that it is one."""
    if not is_stock(policy):
        return {"class": "own"}
    config = policy.module.config.get_text_config()
    names = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
    names += ["head_dim", "num_experts", "num_experts_per_tok", "tie_word_embeddings"]
    facts = {name: value for name in names if isinstance(value := getattr(config, name, None), int | float)}
    family = policy.spec.name if getattr(policy, "library_spec", None) is policy.spec else "own"
    return {"class": type(policy.module).__name__, "family": family, **facts}
