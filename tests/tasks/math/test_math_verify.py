"""math-verify behind its wall: 191 pairs in different notation, bounds, ended processes, forks, and grades at once."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
from answer_pairs import EQUAL, UNEQUAL

from dllm_rl.cli import main as cli
from dllm_rl.tasks import MATH500, Problem
from dllm_rl.tasks.base import grade
from dllm_rl.tasks.math import math_verify as math_check
from dllm_rl.tasks.math.graders import math500_math_verify
from dllm_rl.tasks.protocols import under_protocol

ENDLESS = "9^{9^{9^{9}}}"
needs_proc = pytest.mark.skipif(not Path(f"/proc/self/task/{os.getpid()}/children").exists(), reason="needs /proc")


@pytest.fixture(scope="module")
def started() -> Iterator[math_check._Server]:
    """A process that compares, of all tests that need no other: it takes two seconds to start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(math_check, "SECONDS", 0.4)
        server = math_check._Server()
        server.process = server.start()
    yield server
    server.stop()


def use(server: math_check._Server, monkeypatch) -> math_check._Server:
    math_check._VERDICTS.clear()
    monkeypatch.setattr(math_check, "_SERVER", server)
    return server


@pytest.fixture
def server(started, monkeypatch) -> Iterator[math_check._Server]:
    """The process that compares, with no verdict remembered."""
    yield use(started, monkeypatch)
    math_check._VERDICTS.clear()


@pytest.fixture
def own_server(monkeypatch) -> Iterator[math_check._Server]:
    """A process of this test's own: it is started with the test's settings."""
    server = use(math_check._Server(), monkeypatch)
    yield server
    server.stop()
    math_check._VERDICTS.clear()


ADDS = """import json, sys
float(sys.argv[1])
for line in sys.stdin:
    verdicts = [int(result) == sum(map(int, terms.split("+"))) for result, terms in json.loads(line)]
    print(json.dumps(verdicts), flush=True)
"""


@pytest.fixture
def adder(own_server: math_check._Server, monkeypatch, tmp_path) -> math_check._Server:
    """A process that compares sums of digits, and starts in no time: what is tested is what happens around it."""
    (tmp_path / "math_verify_worker.py").write_text(ADDS)
    monkeypatch.setattr(math_check, "__file__", str(tmp_path / "math_verify.py"))
    return own_server


@pytest.fixture
def load() -> Iterator[None]:
    """Two processes a core that do nothing but compute, as long as the test runs."""
    busy = "print(flush=True)\nwhile True: pass"
    command = [sys.executable, "-c", busy]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2 * math_check.cores())]
    for process in processes:
        process.stdout.readline()  # it runs
    yield
    for process in processes:
        process.kill()
        process.communicate()


def processor_seconds(pid: int) -> float:
    """Of a process and the children that it has waited for [proc(5): utime, stime, cutime, cstime]."""
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


@pytest.mark.nightly
def test_every_pair_is_decided_and_right_under_load(load, own_server) -> None:
    assert len(set(EQUAL)) == 191
    assert [pair for pair, equal in zip(EQUAL, math_check.equal_all(EQUAL), strict=True) if equal is not True] == []
    assert math_check.equal_all(UNEQUAL) == [False] * len(UNEQUAL)


def test_answers_belong_to_their_questions(server) -> None:
    """Whatever is asked beside them, and in any order: an endless one, text that is none, the same twice."""
    hostile = [("2", text) for text in (ENDLESS, "{" * 9, "}{", "\ud800", "\x00", "\\input{/etc/passwd}")]
    pairs = [pair for each in zip(EQUAL[:12:2], UNEQUAL[::2], strict=True) for pair in each]
    found = math_check.equal_all([*pairs[:8], *hostile, *pairs[8:], *pairs[:2]])
    assert found[:8] + found[14:] == [True, False] * 7
    assert found[8] is None and not any(found[9:14])
    assert server.process is not None and math_check.equal_all([]) == []


def test_what_is_too_long_is_not_asked(monkeypatch, server) -> None:
    monkeypatch.setattr(server, "compare", lambda pairs: pytest.fail(f"asked {pairs}"))
    assert math_check.equal("2", "x" * 301) is None and math_check.equal("2", "1\n2") is None
    for text in ("x" * 301, "1\n2"):  # undecided, and not right
        graded = math500_math_verify({"answer": "2"}, f"\\boxed{{{text}}}")
        assert (graded.value, graded.breakdown["accuracy"], graded.breakdown["undecided"]) == (0.0, 0.0, 1.0)
    assert math_check.equal("x+" * 2000 + "x", "2001x") is None
    assert math_check.equal("x" * 301, "x" * 301) is True  # the same text needs no algebra


@needs_proc
@pytest.mark.slow
def test_a_comparison_ends_by_its_processor_time_after_two_tries(monkeypatch, own_server) -> None:
    """The kernel's account of all workers: a comparison without an end takes twice SECONDS, and is not asked again."""
    monkeypatch.setattr(math_check, "SECONDS", 0.3)
    math_check.equal("2", "3")
    before = processor_seconds(own_server.process.pid)
    assert math_check.equal("2", ENDLESS) is None
    spent = processor_seconds(own_server.process.pid) - before
    assert 1.5 * 0.3 < spent < 4 * 0.3
    assert math_check.equal("2", ENDLESS) is None  # known
    assert processor_seconds(own_server.process.pid) - before == spent


def test_a_process_that_is_gone_is_started_again(adder) -> None:
    assert math_check.equal("2", "1+1")
    gone = adder.process
    gone.kill()
    gone.wait()
    assert math_check.equal_all([("3", "2+1"), ("2", "2+1")]) == [True, False] and adder.process is not gone


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), ""])
def test_a_reply_that_nobody_read_answers_no_later_question(raised, monkeypatch, adder) -> None:
    """The wait is interrupted, or the process ends meanwhile."""
    started = adder.process = adder.start()
    reader = Mock(readline=Mock(side_effect=[raised]))
    monkeypatch.setattr(started, "stdout", reader)
    if raised:
        with pytest.raises(KeyboardInterrupt):
            adder.compare([("2", "1+1")])
        assert adder.process is None
    else:  # another process is asked once more
        assert adder.compare([("2", "1+1")]) == [True] and adder.process is not started
    assert started.returncode == -signal.SIGKILL
    assert adder.compare([("2", "1+2")]) == [False]


def test_a_process_that_cannot_start_is_an_error(monkeypatch, adder) -> None:
    monkeypatch.setattr(math_check, "SECONDS", "none")
    with pytest.raises(RuntimeError, match="has ended; try: python -c 'import math_verify'"):
        adder.compare([("2", "1+1")] * 9999)
    assert adder.process is None


@pytest.mark.slow
def test_a_forked_process_has_workers_of_its_own() -> None:
    """Even if another thread of its parent is comparing."""
    program = (
        "import os, sys\n"
        "from dllm_rl.tasks.math import math_verify as verify\n"
        "assert verify.equal('2x', 'x+x')\n"
        "server = verify._SERVER.process\n"
        "with verify._SERVER.lock: child = os.fork()\n"
        "if child == 0: assert verify._SERVER.process is None\n"
        "pairs = [('3x', 'x+x+x'), ('3x', 'x+x')] + [(f'{n}x', f'{n - 1}x+x') for n in range(4, 9)]\n"
        "assert verify.equal_all(pairs) == [True, False] + 5 * [True]\n"
        "if child == 0: os._exit(0)\n"
        "assert verify._SERVER.process is server and os.waitpid(child, 0)[1] == 0\n"
        "assert verify.equal('4y', 'y+3y') and verify._SERVER.process is server\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_cores_are_shared_by_the_processes_of_a_launcher(monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert math_check.cores() == 8
    for processes, cores in (("2", 4), ("3", 2), ("16", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert math_check.cores() == cores


@pytest.mark.slow
def test_an_undecided_answer_is_wrong_and_says_so(monkeypatch, own_server) -> None:
    monkeypatch.setattr(math_check, "SECONDS", 0.2)
    graded = math500_math_verify({"answer": "2"}, f"\\boxed{{{ENDLESS}}}")
    assert graded.parsed and graded.value == 0 and graded.breakdown == {"accuracy": 0.0, "undecided": 1.0}
    graded = math500_math_verify({"answer": "2"}, "\\boxed{1 + 1}")
    assert graded.value == 1 and graded.breakdown == {"accuracy": 1.0, "undecided": 0.0}


@pytest.mark.parametrize("protocol", ["espo", "math-verify", None])
def test_many_completions_are_compared_at_once(monkeypatch, server, tmp_path, protocol: str | None) -> None:
    """One call for all of them; and the grades are those of each alone."""
    (tmp_path / "a.jsonl").write_text('{"problem": "p", "answer": "1"}\n')
    task = MATH500(path=tmp_path / "a.jsonl", reward_rule="espo" if protocol is None else "own")
    task = task if protocol is None else under_protocol(task, protocol)
    batches, plain = [], math_check._SERVER.compare
    monkeypatch.setattr(math_check._SERVER, "compare", lambda pairs: batches.append(list(pairs)) or plain(pairs))
    problems = [Problem("", {"answer": answer}) for answer in ("2x", "x^2-1", "3") for _ in range(2)]
    texts = ["\\boxed{x+x}", "none", "\\boxed{(x+1)(x-1)}", "\\boxed{(x+1)^2}", "\\boxed{4-1}", "\\boxed{4-1}"]
    graded = grade(task, problems, texts)
    assert [reward.value for reward in graded] == [1.0, 0.0, 1.0, 0.0, 1.0, 1.0]
    assert [len(batch) for batch in batches] == [4]  # two texts are alike, and one has no answer
    assert graded == [task.reward(problem, text) for problem, text in zip(problems, texts, strict=True)]


def test_without_math_verify_the_protocol_says_what_to_install(monkeypatch, tmp_path, capsys) -> None:
    """Before any work: when the task is made, and when a protocol is named."""
    monkeypatch.setattr(math_check, "find_spec", lambda name: None)
    (tmp_path / "rows.jsonl").write_text('{"completion": "\\\\boxed{x+x}", "answer": "2x"}\n')
    with pytest.raises(ImportError, match=r"pip install -e '.\[math\]'"):
        MATH500(path="unused.jsonl", reward_rule="espo")
    for protocol in ("math-verify", "espo"):
        with pytest.raises(ImportError, match="math-verify"):
            under_protocol(MATH500(path="unused.jsonl"), protocol)
    command = ["grade", "--json", "--task", "math500", "--protocol", "math-verify", str(tmp_path / "rows.jsonl")]
    assert cli.main(command) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: grading by math-verify needs") and err.count("\n") == 1
