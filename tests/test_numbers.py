"""Every measured number of the documents is computed from stored results, and none can slip in that is not.

The numbers are in tests/support/held: each of its generators gives pairs of a page and the text that it must have.
"""

import re
from collections import defaultdict
from importlib import import_module
from inspect import isgeneratorfunction
from pkgutil import iter_modules

import held
import pytest
from held import ROOT

HOLDERS = [
    each
    for name in sorted(module.name for module in iter_modules(held.__path__))
    for each in vars(import_module(f"held.{name}")).values()
    if isgeneratorfunction(each) and each.__module__ == f"held.{name}" and each.__code__.co_argcount == 0
]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for place in ("README.md", "docs/*.md", "recipes/*.md", "recipes/studies/*.md", "benchmarks/README.md")
    for path in ROOT.glob(place)
)
# An interval, or three digits behind the point (no number of a paper); on the pages of results two digits.
MEASURED = re.compile(r"\d[\d.]*±\d+(\.\d+)?|(?<!arXiv )(?<![\d.])\d+\.\d{3,}(?!\d)")
OF_RESULTS = re.compile(r"\d[\d.]*±\d+(\.\d+)?|(?<![\d.])\d+\.\d{2,}(?![\de])")

NOT_MEASURED = {  # settings, bounds, versions, arithmetic, what a screen may show
    "benchmarks/README.md": ("torch 2.11",),
    "docs/method.md": ("(group's sample standard deviation + 0.0001)",),
    "docs/metrics.md": ("contributions above 0.005",),
    "docs/trl.md": ("`adam_beta2` 0.99 (0.999)",),
    "recipes/studies/distillation.md": ("`teacher_coeff` 0.02", "the coefficient (of 0.02 and 0.06)"),
    "recipes/studies/few_clues.md": ("entropy bonus 0.05,",),
    "recipes/studies/fast.md": ("exact p of three seeds is 0.25 at best", "an entropy bonus of 0.05"),
    "recipes/studies/LOG.md": ("torch 2.13",),
    "recipes/studies/low_bits.md": ("less FP8 lies within 0.05 of 0.",),
    "recipes/studies/quantized_rollouts.md": ("(predicted: an interval within 0.05 of 0)",),
    "recipes/studies/league.md": ("Holm's p below 0.05",),
    "recipes/studies/reuse.md": ("a warm-up to 0.08;", "lies within ±0.03.", "within ±0.03, is not shown"),
    "recipes/studies/scaffolds.md": ("(arXiv 2407.00236)", "survival 0.02,"),
    "recipes/studies/values.md": ("| policy, values | 1 | 0.95 | 0.5 | 0 |",),
    "recipes/studies/mismatch.md": ("These steps are above 0.95", "the least Holm's p that they can give is 0.19."),
}
ELSEWHERE = {  # of examples and toys: tests that take longer compute them anew
    "recipes/studies/renoising.md": (  # tests/likelihoods/test_renoise.py
        "moved by -0.290 with `argmax` and every draw accepted, of which the gradient explains -0.062;",
        "by -0.202, of which -0.023. With drawn answers and that bound by 0.043, of which 0.022.",
        "left out is 0.22 of the full gradient's length.",
    ),
}


def in_one_line(text):
    return " ".join(text.split())


def page_in_one_line(page):
    return in_one_line((ROOT / page).read_text())


def prose(page):
    """The page in one line without blocks of code and without the dated findings of the log, which hold themselves."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    text = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)
    if page == "recipes/studies/LOG.md":
        text = re.sub(r"^- 20\d\d-\d\d-\d\d, .*?(?=^- |\n\n|\Z)", "", text, flags=re.MULTILINE | re.DOTALL)
        text = re.sub(r"^20\d\d-\d\d-\d\d, .*?(?=^## |\Z)", "", text, flags=re.MULTILINE | re.DOTALL)  # a section
    return in_one_line(text)


def covered(text, fragments):
    """The places of the text that some fragment covers, inline code and the targets of links among them."""
    places = {i for found in re.finditer(r"`[^`]*`|\]\([^)]*\)", text) for i in range(*found.span())}
    for fragment in map(in_one_line, fragments):
        for found in re.finditer(re.escape(fragment), text):
            places.update(range(*found.span()))
    return places


@pytest.mark.parametrize("holder", HOLDERS, ids=lambda each: f"{each.__module__}.{each.__name__}")
def test_the_documents_have_the_numbers_of_the_stored_results(holder):
    pairs = list(holder())
    assert pairs
    for page, text in pairs:
        assert in_one_line(text) in page_in_one_line(page), f"{page} should have: {text}"


def test_no_number_of_the_documents_is_without_a_stored_result():
    held = defaultdict(list)
    for page, texts in (*NOT_MEASURED.items(), *ELSEWHERE.items()):
        held[page] += texts
    for holder in HOLDERS:
        for page, text in holder():
            held[page].append(text)
    loose = []
    for page in PAGES:
        text, numbers = prose(page), OF_RESULTS if page.startswith(("recipes/", "benchmarks/")) else MEASURED
        places = covered(text, held[page])
        for number in numbers.finditer(text):
            if not places.issuperset(range(*number.span())):
                start, end = number.span()
                loose.append(f"{page}: {text[max(0, start - 50) : start]}>>{number[0]}<<{text[end : end + 30]}")
    assert not loose, (
        "numbers that nothing holds. Store the result as JSON and yield the sentence from tests/support/held; or, if\n"
        "it was seen once and not stored, make it a dated line of recipes/studies/LOG.md and link there; or, if\n"
        "it is no measurement, name it in NOT_MEASURED:\n" + "\n".join(loose)
    )


def test_the_lists_of_other_numbers_are_short_and_true():
    for page, texts in (*NOT_MEASURED.items(), *ELSEWHERE.items()):
        for text in texts:
            assert text in page_in_one_line(page), f"{page} has no {text!r} any more: take it off the list"
