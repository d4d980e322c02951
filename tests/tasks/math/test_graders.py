"""Mathematics: rational answers without a tolerance, references, and d1's training reward."""

import json
from fractions import Fraction

import pytest

from dllm_rl.tasks import MATH500
from dllm_rl.tasks.answers import without_delimiters
from dllm_rl.tasks.math.graders import (
    GSM8K_GRADERS,
    MATH500_GRADERS,
    gsm8k_d1_training,
    math500_strict,
    reference_number,
)
from dllm_rl.tasks.protocols import TABLE


@pytest.mark.parametrize(
    ("reference", "answer", "value"),
    [
        (r"\frac{1}{3}", "0.3333333", 0.0),
        (r"\frac{1}{3}", "0.33333333333333333333", 0.0),
        ("0.3333333", "1/3", 0.0),
        (r"\frac{1}{3}", "1/3", 1.0),
        (r"\frac{1}{2}", "0.50", 1.0),
    ],
)
def test_strict_compares_rational_numbers_exactly(reference, answer, value) -> None:
    """A third is no decimal, however many threes: a tolerance would let 0.3333333 through."""
    graded = math500_strict({"answer": reference}, rf"so \boxed{{{answer}}}")
    assert (graded.parsed, graded.value) == (True, value)


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("11", "\n11 \\ "),
        (r"90^\circ", r"90 ^{ \circ }"),
        ("30", r"30^ \circ"),
        ("5", r"5 \mbox {cm}"),
        ("5", r"5\hbox {cm}"),
        (r"\frac{10}{11}", r"\frac {10} {11}"),
        (r"\sqrt{3}", r"\sqrt { 3 }"),
    ],
)
def test_white_space_that_tex_skips_does_not_count(reference: str, answer: str) -> None:
    """It stands between a command and its argument, and at the ends of a formula."""
    text = rf"That would be \boxed{{4}}, but it is \boxed {{{answer}}}."
    assert math500_strict({"answer": reference}, text).value == 1.0
    assert math500_strict({"answer": "4"}, text).value == 0.0


def test_a_reference_is_in_the_last_box_of_its_row(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    solution = r"First $\boxed{12}$, then $\boxed 7$."
    path.write_text(json.dumps({"problem": "How many?", "solution": solution}) + "\n")
    assert MATH500(path=path)[0].fields == {"answer": "7"}


def test_reference_numbers() -> None:
    assert reference_number("so 3\n#### 1,000") == 1000 and reference_number(18.5) == Fraction(37, 2)
    with pytest.raises(ValueError, match="is not a number, and has none after ####"):
        reference_number("#### x")


LAID_OUT = "<reasoning>\nwork\n</reasoning>\n<answer>\n42\n</answer>\n"


@pytest.mark.parametrize(
    ("completion", "correct", "integer", "strict", "soft", "tags"),
    [
        (LAID_OUT, 2.0, 0.5, 0.5, 0.5, 0.5),
        (LAID_OUT + "\n", 2.0, 0.5, 0.5, 0.5, 0.5),
        (LAID_OUT.replace("42", "41"), 0.0, 0.5, 0.5, 0.5, 0.5),
        (LAID_OUT.replace("42", "42.0"), 0.0, 0.0, 0.5, 0.5, 0.5),
        (LAID_OUT + "x", 2.0, 0.5, 0.0, 0.5, 0.5),
        (LAID_OUT[:-1], 2.0, 0.5, 0.0, 0.5, 0.5),
        ("\n" + LAID_OUT, 2.0, 0.5, 0.0, 0.0, 0.5),
        ("<reasoning>work</reasoning> <answer>42</answer>", 2.0, 0.5, 0.0, 0.5, 0.0),
        ("<reasoning>work</reasoning> so <answer>42</answer>", 2.0, 0.5, 0.0, 0.0, 0.0),
        ("<answer>\n42\n</answer>", 2.0, 0.5, 0.0, 0.0, 0.125),
        ("\n<answer>\n42\n</answer>", 2.0, 0.5, 0.0, 0.0, 0.25),
        (LAID_OUT.replace("42", "41") + "<answer>42</answer>", 2.0, 0.5, 0.0, 0.5, 0.5),
        (LAID_OUT * 2, 2.0, 0.5, 0.5, 0.5, 0.0),
        ("42", 2.0, 0.5, 0.0, 0.0, 0.0),
        ("<reasoning>\n</reasoning>\n<answer>\n</answer>\n", 0.0, 0.0, 0.0, 0.5, 0.5),
        ("", 0.0, 0.0, 0.0, 0.0, 0.0),
    ],
)
def test_d1s_gsm8k_training_reward(
    completion: str, correct: float, integer: float, strict: float, soft: float, tags: float
) -> None:
    graded = gsm8k_d1_training({"answer": "#### 42"}, completion)
    terms = {"correct": correct, "integer": integer, "strict": strict, "soft": soft, "tags": tags}
    assert graded.breakdown == {"accuracy": float(correct == 2.0), **terms}
    assert graded.value == sum(terms.values())
    assert graded.parsed == ("<answer>" in completion)


@pytest.mark.parametrize(
    ("graders", "protocol", "groups"),
    [
        (GSM8K_GRADERS, "strict", [["7", "7.0", "$7", "007"], ["0", "-0"], ["8"], ["?", ""]]),
        (GSM8K_GRADERS, "d1", [["7", "7.0", "so 7"], ["0", "-0.0"], ["8"], ["?", ""]]),
        (GSM8K_GRADERS, "espo", [["7", "x 007"], ["8"], ["?", ""]]),
        (MATH500_GRADERS, "strict", [["1/2", "0.50", "\\frac12"], ["x=2\\pi", "2 \\pi"], ["\\pi"], [""]]),
        (MATH500_GRADERS, "d1", [["1/2", "0.5", "\\frac12"], ["0.50"], ["x=2\\pi", "2 \\pi"], ["1/x"], ["1/y"], [""]]),
    ],
)
def test_equal_answers_are_one_vote(graders, protocol, groups) -> None:
    found = []
    for group in groups:
        (spelling,) = {graders[protocol]({"answer": "42"}, f"\\boxed{{{text}}}").answer for text in group}
        found.append(spelling)
    assert len(set(found)) == len(groups)
    assert [spelling == "" for spelling in found] == ["" in group for group in groups]
    assert graders[protocol]({"answer": "42"}, "no answer").answer == ""


def test_math_verify_names_no_equal_answers() -> None:
    assert MATH500_GRADERS["math-verify"]({"answer": "42"}, "").answer is None


@pytest.mark.parametrize(
    ("reference", "wrong", "right"),
    [
        (
            "5",
            "5 \\text{ or } 6|5\\text{or}6|5 \\mbox{ or } 6|5 \\textrm{and} 6|5, 6|5; 6|5 \\quad 6|5 \\lor 6|"
            "\\{5, 6\\}|"
            "5 \\text{ or six}|5 \\text{ or 6}|5 \\text{ /6}|5 \\text{ million}|5 \\text{ minus one}|"
            "5 \\text{ otherwise } 6|"
            "x=5 \\text{ or } x=6|6 \\text{ or } 5|x<=5|<=5|x!=5|x>=5|a:=5|"
            "5\\mathrm{i}|5\\mathrm{e}|5\\mathbf{a}|5\\text{ p.m.}",
            "5%|5 \\%|5 \\text{ cm}|5\\text{cm}|5 \\mbox{ cm}|5\\,\\mathrm{cm}^2|5 \\text{ miles per hour}|"
            "x = 5|\uff15|\ufeff5|\\$5",
        ),
        ("\\text{ Evelyn}", "\\text{ Carla}|\\text{ }|\\text{ Evelyn}\\text{ Carla}", "\\text{Evelyn}|\\text{ Evelyn}"),
        ("(1,2)", "(1,2)\\text{ or }(3,4)|(1,2),(3,4)|(1,2 3)", "(1, 2)|\\left(1,\\,2\\right)|(\uff11,2)"),
        (
            "3, 5",
            "3 \\text{ or } 6|3 \\text{ or }|\\text{or } 3, 5|3 \\text{ nor } 5|3 \\text{ and or } 5|35|3",
            "3 \\text{ and } 5|3\\text{or}5|3, \\text{ and } 5|3 \\mbox{, and } 5|3 \\mathrm{ or }5|3 \\text{ and~} 5",
        ),
        ("(5,8),(8,5)", "(5,8)\\text{ or }(8,6)", "(5,8)\\text{ and }(8,5)|(5, 8), \\text{ or } (8, 5)"),
        ("1 \\text{ or } -2", "1|-2|1 \\text{ or } -3", "1,-2|1 \\textbf{ and } -2|1\\text{ or }-2"),
        ("x<1 \\text{ or } x>3", "x<1 \\text{ and } x>3|x<1, x>3", "x<1\\text{ or }x>3|x < 1 \\text{ or } x > 3"),
        ("12,345", "12 \\text{ or } 345|12 \\text{ and } 345|12, 345", "12345"),
        ("10\\text{ a.m.}", "10\\text{ p.m.}|10\\text{ PM}|10", "10\\text{a.m.}|10 \\text{ a.m.}"),
        ("22/3", "2 2/3|2\\,2/3|2\u20092/3|2~2/3|2\\ 2/3", "22 / 3|\\frac{22}{3}|\uff12\uff12/3"),
        ("34", "3 4|3\u00a04|3\\;4|3\\quad 4|3,4|3{,}4|3\n4|3\\%4|3\\$4|3\u200b4", "34.0|34.|34 \\text{ ways}"),
        (
            "1000",
            "10 00|1 0000|1,00,0|1, 000|1 ,000|1 000 0",
            "1 000|1\\,000|1\\;000|1~000|1\u202f000|1{,}000|1,\\!000|\\$1,000|1 000.0|\uff11\uff0c\uff10\uff10\uff10",
        ),
        ("3.14", "3. 14|3 .14|3.1 4", "3.14|\uff13.14"),
        ("-5", "5|--5|\u2212 -5", "\u22125|- 5|\uff0d5|-\\,5|-5 \\text{ m}"),
        ("2\\sqrt{3}", "2 \\sqrt 4|23", "2 \\sqrt 3|2\\,\\sqrt{3}"),
    ],
)
def test_blanks_texts_and_printed_characters(reference, wrong, right) -> None:
    fields = {"answer": reference}
    grades = {box: math500_strict(fields, f"\\boxed{{{box}}}").value for box in (*wrong.split("|"), *right.split("|"))}
    assert grades == dict.fromkeys(wrong.split("|"), 0.0) | dict.fromkeys(right.split("|"), 1.0)
    hedges = [box for box in wrong.split("|") if "or " in box or "six" in box]
    assert not any(MATH500_GRADERS["math-verify"](fields, f"\\boxed{{{box}}}").value for box in hedges)


@pytest.mark.parametrize(
    ("reference", "right", "wrong"),
    [
        ("\\text{even}", "\\text{ even}", "\\text{odd}"),
        ("2 \\text{ million}", "2\\text{ million}", "3"),
        ("\\text{3 over 4}", "\\mathrm{3 over 4}", "\\text{3 over 5}"),
        ("-1, 4, 7", "7, 4 \\text{ and } -1", "7 \\text{ and } -1"),
        ("2, 3", "x=3 \\text{ or } x=2", "x=3 \\text{ or } x=2 \\text{ or } x=1"),
        ("12, 345", "345 \\text{ and } 12", "12,345"),
    ],
)
def test_math_verify_reads_words_as_the_reference_has_them(reference, right, wrong) -> None:
    """A word that could be a hedge is none where the reference has one, or where it joins the values of a list."""
    graded = [MATH500_GRADERS["math-verify"]({"answer": reference}, f"\\boxed{{{box}}}") for box in (right, wrong)]
    assert [each.value for each in graded] == [1.0, 0.0]


def test_numbers_as_they_are_printed() -> None:
    right = {"-5": "\u22125|- 5|\uff0d5|-\\$5", "1000": "1{,}000|1 000|1\\,000|1\u202f000|\uff11,000|1000."}
    wrong = {"34": "3 4|3,4|3{,}4|3\\,4|34 or 35|34, 35", "1000": "10 00|1, 000|1 0000"}
    for cases, value in ((right, 1.0), (wrong, 0.0)):
        for reference, texts in cases.items():
            for text in texts.split("|"):
                graded = GSM8K_GRADERS["strict"]({"answer": reference}, f"<answer>{text}</answer>")
                assert graded.value == value, (reference, text)


VALUES = {
    "gsm8k": [("18", "19"), ("-3", "3"), ("1,234.5", "1234"), ("$5", "6")],
    "math500": [
        ("\\frac{1}{2}", "\\frac{1}{3}"),
        ("x^2+1", "x^2"),
        ("\\$18", "\\$19"),
        ("(-\\infty, 0]", "(-\\infty, 0)"),
        ("\\left\\{1, 2\\right\\}", "\\left\\{1\\right\\}"),
        ("\\text{Evelyn}", "\\text{Bob}"),
    ],
}
AROUND = ["{}", "${}$", "$${}$$", "\\({}\\)", "\\[{}\\]", " $ {} $ ", "${}$.", "\\boxed{{{}}}", "$\\boxed{{{}}}$"]
AROUND += ["\\[\n{}\n\\]"]
MARKED = ["<answer>{}</answer>", "so \\boxed{{{}}}", "<answer>\\boxed{{{}}}</answer>"]


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("task", VALUES)
def test_delimiters_around_a_reference_or_an_answer_change_no_grade(task, around) -> None:
    for right, wrong in VALUES[task]:
        if "$" in right and "$" in around:
            continue
        fields = TABLE[task].read_fields({"answer": around.format(right)}, "strict")
        assert fields == TABLE[task].read_fields({"answer": right}, "strict") == {"answer": right}
        for marked in MARKED:
            for answer in (around.format(right), right):
                assert TABLE[task].graders["strict"](fields, marked.format(answer)).value == 1.0, (right, answer)
            assert TABLE[task].graders["strict"](fields, marked.format(around.format(wrong))).value == 0.0
        if task == "math500":  # d1 reads the completion by its own rules; the reference is the same
            assert TABLE[task].graders["d1"](fields, f"\\boxed{{{right}}}").value == 1.0


def test_dollars_that_do_not_delimit_stay() -> None:
    for text in ("$5", "5$", "\\$5", "$1$ and $2$", "\\(1\\) or \\(2\\)", "$", "$$", "$ $ $", "\\(1", "\\$5\\$"):
        assert without_delimiters(text) == text
    assert without_delimiters("$\\$5$") == "\\$5" and without_delimiters("$\\(1\\)$") == "1"
    for unit in ("$", "$$", "\\(", "\\)", "\\[", "$\\(", "\\", "\\boxed{", "$1"):
        assert isinstance(without_delimiters(unit * (1_000_000 // len(unit))), str)  # quadratic time would not end


@pytest.mark.parametrize(
    "answer", ["$1$ and $2$", "the answer is $12$", "between \\(1\\) and \\(2\\)", "$$", "\\[1\\] cm", "$ $"]
)
@pytest.mark.parametrize("task", ["gsm8k", "math500"])
def test_a_reference_that_no_answer_equals_is_refused(task, answer) -> None:
    with pytest.raises(ValueError, match="answer="):
        TABLE[task].read_fields({"answer": answer}, "strict")


@pytest.mark.parametrize("answer", ["\\text{$x$ is even}", "\\$5 \\text{ and } \\$6", "1 \\\\[2pt] 2", "$5"])
def test_a_reference_with_other_dollars_and_brackets_is_read(answer) -> None:
    assert TABLE["math500"].read_fields({"answer": answer}, "strict") == {"answer": answer}
