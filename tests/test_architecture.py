"""docs/ARCHITECTURE.md says which files go when a feature is removed; here it is held against the code."""

import re
from pathlib import Path

import pytest

import dllm_rl

PACKAGE = Path(dllm_rl.__file__).parent
TEXT = (PACKAGE.parent / "docs" / "ARCHITECTURE.md").read_text()
# What names a feature in the code, by the feature's words in the table.
NAMED_BY = {
    "infilling": r"samplers\.infilling|(prompts|canvas|self)\.open\b|open: Bool|open_positions",
    "rules that rewrite": r"samplers(\.| import )revise|likelihoods(\.| import )events|\.events\b|Events\b|reopen",
    "probability of the order": r"(likelihoods|models)(\.| import )order\b|\bOrder\b|has_order_logprob",
    "a commit rule of coins": r"soft_threshold|softness\b|\.soft\b",
    "sampling_support": r"models\.support|sampling_support|\bKept\b|Support\b",
    "router replay": r"likelihoods\.replay|router_replay|records_experts|experts: Int|self\.given|"
    r"\"experts\"|noted\.items|among is None|states\.parts|plan\.live|live: Int",
    "which experts the two sides take": r"diagnostics\.routing|forward\.routing",
    "packed scoring": r"likelihoods\.packed|\bPacked\(ViewPart\)",
    "load balancing": r"training\.balance|batch_row",
    "aligned forward": r"align_forward|aligned_forward|\baligns\(",
    "zero mismatch": r"zero_mismatch|diagnostics\.batch_invariance",
    "engine of its own": r"RolloutEngine|engine_of|rollout_engine|models\.engine",
    "noise of random tokens": r"(samplers|likelihoods)(\.| import )renoise|models\.denoiser|renoised\b|Renoised\b|"
    r"encoder_decoder",
    "late rollouts": r"late_rollouts|LateRollouts|rollout_workers|max_staleness|\blate\.(collect|publish|files)|"
    r"samples\.rollout_logprobs|rollout_logprobs: tuple",
    "a teacher": r"distillation|teacher|keeps_reference|REFERENCE",
    "one compiled graph": r"compile_step|whole_step|WholeSteps",
}


def rows() -> dict[str, tuple[set[str], set[str]]]:
    """By feature, its own files and the others that the table lists, relative to the package."""
    table = TEXT[TEXT.index("| feature |") :].split("\n\n")[0].splitlines()[2:]
    found = {}
    for line in table:
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        found[name] = tuple(set(re.findall(r"`([\w/]+\.py)`", cell)) for cell in (cells[0], cells[2]))
    return found


def naming(pattern: str) -> set[str]:
    files = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in PACKAGE.rglob("*.py")}
    return {path for path, text in files.items() if re.search(pattern, text)}


@pytest.mark.parametrize("feature", NAMED_BY)
def test_the_table_lists_every_file_that_names_a_feature(feature):
    ((own, others),) = (files for name, files in rows().items() if feature in name)
    assert own and all((PACKAGE / path).is_file() for path in own)
    assert others == naming(NAMED_BY[feature]) - own, f"the row of {feature!r} in docs/ARCHITECTURE.md"
