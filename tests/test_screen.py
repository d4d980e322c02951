"""Foreign text reaches a screen as it is: control characters as signs, brackets as brackets, wherever it is shown."""

import codecs
import io
import sys
from dataclasses import replace

import pytest
from _pytest.capture import CaptureIO
from rich.console import Console
from tiny_recipe import SIZES, tiny_recipe

from dllm_rl.cli import evaluate_run as evaluate_cli
from dllm_rl.cli import main as cli
from dllm_rl.config import from_command_line
from dllm_rl.doctor.mismatch import Cause, Report, write_doctor
from dllm_rl.frontend.grpo import grpo
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.monitoring.log import RunLog
from dllm_rl.screen import escape_controls, line_of, literal, printing_anything
from dllm_rl.tasks.sudoku import Sudoku
from dllm_rl.training.trainer import train

pytestmark = pytest.mark.usefixtures("no_rehearsal")

HOSTILE = "[/INST][red]x[/red]\x1b]0;title\x07\u202e{a}"
SHOWN = "[/INST][red]x[/red]\u241b]0;title\u2407\ufffd{a}"


@pytest.fixture
def terminal(monkeypatch, capsys):
    """What a terminal gets so far on standard output and error."""
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(CaptureIO, "isatty", lambda self: True)
    said = []

    def seen() -> str:
        said.append("".join(capsys.readouterr()))
        return "".join(said)

    return seen


# Of an untrained model: with this seed some completion holds an escape.
OPTIONS = ("--temperature", "1", "--max_new_tokens", "8", "--num_generations", "8")


def test_an_error_of_a_file_is_its_path_and_what_is_wrong(tmp_path):
    path = tmp_path / "\x1bx"
    with pytest.raises(FileNotFoundError) as caught:
        path.open()
    assert line_of(caught.value) == f"{tmp_path}/␛x: No such file or directory"
    assert line_of(OSError("a text")) == line_of(ValueError("a text")) == "a text"


class Bracketed:
    """Sudoku whose prompts hold what rich would take for the end of a style."""

    name, version = "bracketed", "1"

    def __init__(self):
        self.task = Sudoku(split="test", size=4)

    def __len__(self):
        return len(self.task)

    def __getitem__(self, index):
        problem = self.task[index]
        return replace(problem, prompt="[/r]" + problem.prompt)

    def reward(self, problem, completion):
        return self.task.reward(problem, completion)


def test_controls_are_shown_as_signs():
    assert escape_controls("a\x1b[2J\x07\nb\r\u202e\x9b") == "a\u241b[2J\u2407↵b\u240d\ufffd\ufffd"
    assert escape_controls("a\n\tb\r", keep="\n\t") == "a\n\tb\u240d"
    assert escape_controls("naïve 数独 ✓") == "naïve 数独 ✓"


def test_a_literal_is_no_markup():
    console = Console(file=io.StringIO(), width=200)
    console.print(literal(HOSTILE))
    assert console.file.getvalue() == SHOWN + "\n"


def test_the_log_shows_lines_and_bars_as_they_are(terminal, tmp_path):
    log = RunLog(tmp_path, start=0, main=True)
    progress = log.view(HOSTILE, 2)
    log.say(f"{HOSTILE}\nsecond line")
    progress("reward 1", show=True, close=True)
    log.close()
    assert f"{SHOWN}\nsecond line" in terminal() and f"{SHOWN} 0/2  reward 1" in terminal()
    assert "title\x07" not in terminal()


def test_a_run_whose_prompts_look_like_markup_ends_well(tmp_path, capsys):
    train(
        tiny_recipe(
            tmp_path / "[/red]",
            model=lambda: tiny_masked_lm(**{**SIZES, "characters": "1234.=[/r]"}),
            task=Bracketed(),
            eval_task=Bracketed(),
            num_steps=1,
        )
    )
    out = capsys.readouterr().out
    assert "'[/r]" in out and f"{tmp_path}/[/red]/summary.json" in out


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model that answers with escape sequences."""
    directory = tmp_path_factory.mktemp("[red]checkpoint")
    tiny_masked_lm(**SIZES | {"characters": "\x1b1["}).save_pretrained(directory)
    return str(directory)


def test_sampling_to_a_terminal_shows_escape_sequences(terminal, checkpoint):
    assert cli.main(["sample", checkpoint, "\x1b[1", "--no_live", *OPTIONS]) == 0
    assert "\u241b" in terminal() and "\x1b" not in terminal()


def test_sampling_to_a_pipe_keeps_them(capsys, checkpoint):
    assert cli.main(["sample", checkpoint, "1", *OPTIONS]) == 0
    assert "\x1b" in capsys.readouterr().out


def test_errors_are_one_line_without_controls(terminal):
    assert cli.main(["evaluate", "x", "--task", "sudoku", "--set", "\x1b[2J\nwhere"]) == 2
    assert "--set \u241b[2J↵where" in terminal() and "\x1b" not in terminal()
    with pytest.raises(SystemExit):
        from_command_line(tiny_recipe("x"), ["--\x1b[2J", "1"])
    assert "\x1b" not in terminal()


def test_evaluation_tables_and_bars(terminal):
    found = {"task": HOSTILE, "version": "1", "protocol": "own", "split": None, "seed": 0, "n": 1, "samples": 1}
    found |= {"model": HOSTILE, "max_new_tokens": 1, "tokens": 1, "forwards": 1, "seconds": 0.0}
    found |= {"forwards_per_answer": 1.0, "tokens_per_forward": 1.0}
    found |= {HOSTILE: 0.5, f"{HOSTILE}_interval": [0.25, 0.75]}
    Console().print(evaluate_cli.results_table([found]))
    assert terminal().count(SHOWN) == 3 and "0.500  [0.250, 0.750]" in terminal()
    with evaluate_cli.progress_bar(HOSTILE, 1, main=True) as progress:
        progress(1)
    assert terminal().count(SHOWN) > 3


def test_the_doctor_shows_names_as_they_are(terminal):
    cause = Cause("weights", 1.0, 1.0, 1.0, 1.0)
    write_doctor(Report(HOSTILE, 1, cause, (cause,), ((HOSTILE, 1.0),)))
    assert terminal().count(SHOWN) == 2 and "title\x07" not in terminal()


class Tee:
    """What scripts put in place of a stream to keep a copy; it has neither an encoding nor `errors`."""

    def __init__(self, *streams):
        self.streams = streams

    def write(self, text):
        for stream in self.streams:
            stream.write(text)

    def flush(self):
        for stream in self.streams:
            stream.flush()


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize(
    "wrap",
    [
        codecs.getwriter("ascii"),
        codecs.getwriter("cp1252"),
        lambda written: Tee(io.StringIO(), io.TextIOWrapper(written, "ascii", write_through=True)),
    ],
    ids=["StreamWriter", "charmap", "Tee"],
)
def test_what_an_object_in_place_of_a_terminal_cannot_encode_is_escaped(monkeypatch, stream, wrap):
    written = io.BytesIO()
    terminal = wrap(written)
    monkeypatch.setattr(sys, stream, terminal)
    with printing_anything(), printing_anything():
        print("数 = 5", file=getattr(sys, stream), flush=True)
        getattr(sys, stream).writelines(["→", "plain"])
        Console(file=getattr(sys, stream)).print("学")
        later = getattr(sys, stream)
    print("plain", file=later)  # a handler of logging keeps the stream
    assert getattr(sys, stream) is terminal
    assert rb"\u6570 = 5" in written.getvalue() and rb"\u2192plain" in written.getvalue()
    assert rb"\u5b66" in written.getvalue()
    with pytest.raises(UnicodeEncodeError):
        print("数", file=terminal, flush=True)


@pytest.mark.parametrize(
    ("stream", "encoding", "errors"),
    [("stdout", "ascii", "strict"), ("stdout", "latin-1", "surrogateescape"), ("stderr", "ascii", "strict")],
)
@pytest.mark.repeated(first_only=True)
def test_what_a_terminal_cannot_show_is_escaped(tmp_path, monkeypatch, capfd, stream, encoding, errors):
    """Of commands and runs, also what a grader prints; afterwards the stream is as before."""
    written = io.BytesIO()
    terminal = io.TextIOWrapper(written, encoding, errors)
    monkeypatch.setattr(sys, stream, terminal)
    symbols = "数学→é"
    policy = tiny_masked_lm(**SIZES | {"characters": f"12={symbols}"})
    policy.save_pretrained(tmp_path / f"{symbols}-0")

    def score(completions, **columns):
        print(symbols, file=getattr(sys, stream))
        return [float(index) for index in range(len(completions))]

    folder = str(tmp_path / f"{symbols}-0")
    rows = [{"prompt": f"{symbols}{a}="} for a in "1212"]
    sizes = {"max_new_tokens": 2, "num_steps": 1, "train_batch_size": 2, "num_generations": 2, "report_to": "none"}
    grpo(folder, rows, score, output_dir=str(tmp_path / symbols), **sizes)
    assert cli.main(["sample", folder, symbols, "--max_new_tokens", "2"]) == 0
    assert cli.main(["verify", str(tmp_path / symbols)]) == 0
    assert cli.main(["verify", f"{symbols}-1"]) == 2
    terminal.flush()
    assert rb"\u6570" in written.getvalue()
    with pytest.raises(UnicodeEncodeError):
        print(symbols, file=terminal, flush=True)
    assert terminal.errors == errors


@pytest.mark.parametrize(
    "error",
    [
        ValueError("field=" + "x" * 5000 + " is too long; give a short one"),
        OSError(36, "File name too long; give a short one", "field=" + "x" * 5000),
    ],
)
def test_a_long_error_keeps_its_field_and_its_remedy(error):
    line = line_of(error)
    assert len(line) <= 390 and line.startswith("field=xxx") and line.endswith("; give a short one")
    assert line_of(ValueError("x" * 380)) == "x" * 380
