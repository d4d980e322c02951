"""Runs a program and its tests in new namespaces (unshare, prlimit of util-linux), with no network, files or processes.

There this file is process 1, which runs the tests. Its child, forked before the tests are read, runs the program. The
tests call the program's function through pipes and get plain data, so that the program sees no test and no token, and
none of its objects is compared. What remains possible: answers to the calls that are seen, without computing them; a
fault of the kernel. Each of the two processes may take the memory.
"""

import ast
import ctypes
import os
import signal
import struct
import subprocess
import sys
from contextlib import suppress
from typing import Any

SECONDS = 5  # of a program and its tests, by the wall and by the processor
OUTPUT = 1 << 16  # bytes
LIMITS = ["--as=536870912", f"--fsize={OUTPUT}", "--nofile=32", "--msgqueue=0"]
SPACES = ["--user", "--map-root-user", "--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
FOLDERS = dict.fromkeys(("/lib", "/lib64", "/usr/lib", "/usr/lib64", f"{sys.base_prefix}/lib"))  # the interpreter's
ROOT = b"/sys"  # where the new root is mounted: a folder of every machine, with nothing of the interpreter in it
# By machine: the kernel's number of the architecture, then refused system calls: execve, execveat, clone, clone3,
# socket (that of a virtual machine to its host knows no namespace), socketpair, ptrace, process_vm_readv and _writev,
# pidfd_getfd, unshare, setns, shmget, semget, msgget, add_key, request_key, keyctl, bpf, perf_event_open, userfaultfd,
# io_uring_setup, memfd_create; on x86-64 fork and vfork.
DENIED = {
    "x86_64": "3221225534 59 322 56 435 41 53 101 310 311 438 272 308 29 64 68 248 249 250 321 298 323 425 319 57 58",
    "aarch64": "3221225655 221 281 220 435 198 199 117 270 271 438 97 268 194 190 186 217 218 219 280 241 282 425 279",
}


def run(prelude: str, code: str, tests: str, entry_point: str, seconds: int = SECONDS) -> tuple[bool, str]:
    """Whether the code defines the function `entry_point` and the tests pass with it, after the prelude; and what was
    written, or why the program was stopped. Errors: OSError without prlimit.
    """
    import resource  # here: Windows lacks it

    token = os.urandom(16).hex()
    request = ascii((prelude, code, tests, entry_point, token)).encode()
    # A core of 1 byte is none, even where the kernel gives cores to a program. A hard limit of 0 cannot be raised to 1.
    core = min(1, resource.getrlimit(resource.RLIMIT_CORE)[1] % 2**64)  # no limit is -1
    command = [
        "prlimit",
        *LIMITS,
        f"--core={core}",
        f"--cpu={seconds}",
        "unshare",
        *SPACES,
        sys.executable,
        "-I",
        "-S",
        __file__,
    ]
    command += [str(seconds), *filter(os.path.isdir, FOLDERS)]
    with os.fdopen(os.memfd_create("output"), "rb") as output:
        try:
            done = subprocess.run(command, input=request, stdout=-1, stderr=output, env={}, timeout=seconds)
        except subprocess.TimeoutExpired:
            return False, f"stopped after {seconds} s"
        said = os.pread(output.fileno(), OUTPUT, 0).decode(errors="replace")
    return (done.returncode, done.stdout) == (0, token.encode()), said


def require() -> None:
    """Errors: ValueError where a right program does not pass."""
    try:
        worked, said = run("", "def f(x):\n    return x", "assert f(1) == 1", "f", 60)
    except (OSError, AttributeError) as error:  # AttributeError: no memfd, so not Linux
        worked, said = False, str(error)
    if not worked:
        reason = said.strip().rpartition("\n")[2]
        raise ValueError(f"the sandbox needs Linux 5.12, unshare and user namespaces ({reason}); take 'static'")


def call(name: str, *arguments: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc[name](*arguments) < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def enter(folders: list[str]) -> None:
    """A root with the folders only, all read-only; the old root is out of reach."""
    call("mount", b"sandbox", ROOT, b"tmpfs", 0, b"size=1m")
    for folder in map(os.fsencode, folders):
        os.makedirs(ROOT + folder, exist_ok=True)
        call("mount", folder, ROOT + folder, None, 0x5000, None)  # with all that is mounted below
    call("syscall", 442, -100, ROOT, 0x8000, struct.pack("4Q", 7, 0, 0, 0), 32)  # mount_setattr: all of it read-only
    os.chdir(ROOT)
    call("pivot_root", b".", b".")
    call("umount2", b".", 2)
    os.chdir("/")


def confine() -> None:
    """No capability, no new privilege, none of DENIED."""
    call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))
    call("prctl", 38, 1, 0, 0, 0)
    architecture, *numbers = map(int, DENIED[os.uname().machine].split())
    refuse = (6, 0, 0, 0x50001)  # EPERM
    # A call of another architecture kills; the numbers from 1 << 30 are those of x32.
    steps = [(32, 0, 0, 4), (21, 1, 0, architecture), (6, 0, 0, 1 << 31), (32, 0, 0, 0), (53, 0, 1, 1 << 30), refuse]
    for number in numbers:
        steps += [(21, 0, 1, number), refuse]
    steps.append((6, 0, 0, 0x7FFF0000))
    lines = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    call("prctl", 22, 2, struct.pack("HP", len(steps), ctypes.addressof(lines)))


class Floats(ast.NodeTransformer):
    """What `ascii` writes of floats that are not finite."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(float(node.id)) if node.id in ("inf", "nan") else node


def plain(text: str) -> Any:
    """The plain data that `ascii` wrote. Errors: ValueError or SyntaxError."""
    return ast.literal_eval(Floats().visit(ast.parse(text.strip(), mode="eval")))


# What `exec` runs below is a stranger's program: only here, behind `enter`, where nothing of the machine is in reach.
def serve(asked: Any, answer: Any) -> None:
    """The child: runs the program, then answers calls of its function, by an error's name if it raises."""
    code, entry_point = plain(asked.readline())
    space: dict[str, Any] = {"__name__": "program"}
    exec(code, space)
    for line in asked:
        try:
            arguments, keywords = plain(line)
            value = space[entry_point](*arguments, **keywords)
            reply = ascii(dict(value) if isinstance(value, dict) else value)  # a Counter is compared as a dict
        except Exception as error:
            reply = type(error).__name__
        print(reply, file=answer, flush=True)


def judge(ask: Any, answers: Any) -> str:
    """Process 1: runs the tests, and returns the token."""
    prelude, code, tests, entry_point, token = plain(sys.stdin.read())
    print(ascii((code, entry_point)), file=ask, flush=True)

    def function(*arguments: Any, **keywords: Any) -> Any:
        with suppress(BrokenPipeError):  # the program has ended: there is no reply to read
            print(ascii((arguments, keywords)), file=ask, flush=True)
        return plain(answers.readline(1 << 20))  # ValueError for an error's name and for what is no plain data

    space: dict[str, Any] = {"__name__": "tests"}
    exec(f"\n{prelude}".partition(f"\ndef {entry_point}(")[0], space)  # a prelude may end before the function's body
    space[entry_point] = function
    exec(tests, space)
    return token


def main() -> None:
    enter(sys.argv[2:])
    os.setsid()  # a signal to the old group would leave the namespace
    signal.signal(signal.SIGALRM, lambda *_: os._exit(1))
    signal.alarm(int(sys.argv[1]) + 1)  # for a caller that was killed
    verdict = os.dup(1)
    os.dup2(2, 1)
    asked, ask = os.pipe()
    answers, answer = os.pipe()
    child = os.fork()
    for number in (asked, answer) if child else (0, verdict, ask, answers):
        os.close(number)
    confine()
    if child:
        os.write(verdict, judge(os.fdopen(ask, "w"), os.fdopen(answers)).encode())
    else:
        serve(os.fdopen(asked), os.fdopen(answer, "w"))
    os._exit(0)


if __name__ == "__main__":
    main()
