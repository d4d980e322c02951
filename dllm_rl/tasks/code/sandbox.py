"""Run a program and its tests in new namespaces (unshare, prlimit of util-linux), without network, files or processes.

In the sandbox this file is process 1, which runs the tests. Its child, forked before the tests are read, runs the
program. The tests call the program's function through pipes and receive plain data, so that the program sees no test
and no token, and none of its objects is compared. Two attacks remain possible: answers to the observed calls without
computing them, and a fault of the kernel. Each of the two processes may use the full memory limit.
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

SECONDS = 5  # limit of a program and its tests, in wall time and in processor time
OUTPUT = 1 << 16  # bytes
LIMITS = ["--as=536870912", f"--fsize={OUTPUT}", "--nofile=32", "--msgqueue=0"]
SPACES = ["--user", "--map-root-user", "--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
FOLDERS = dict.fromkeys(("/lib", "/lib64", "/usr/lib", "/usr/lib64", f"{sys.base_prefix}/lib"))  # the interpreter's
ROOT = b"/sys"  # mount point of the new root: exists on every machine, contains nothing of the interpreter
# By machine: the kernel's number of the architecture, then refused system calls: execve, execveat, clone, clone3,
# socket (a virtual machine's socket to its host ignores namespaces), socketpair, ptrace, process_vm_readv, _writev,
# pidfd_getfd, unshare, setns, shmget, semget, msgget, add_key, request_key, keyctl, bpf, perf_event_open, userfaultfd,
# io_uring_setup, memfd_create; on x86-64 fork and vfork.
DENIED = {
    "x86_64": "3221225534 59 322 56 435 41 53 101 310 311 438 272 308 29 64 68 248 249 250 321 298 323 425 319 57 58",
    "aarch64": "3221225655 221 281 220 435 198 199 117 270 271 438 97 268 194 190 186 217 218 219 280 241 282 425 279",
}


def run(prelude: str, code: str, tests: str, entry_point: str, seconds: int = SECONDS) -> tuple[bool, str]:
    """Run the code and its tests, after the prelude.

    Returns:
        Whether the code defines the function `entry_point` and the tests pass with it; and its output, or the reason
        why the program was stopped.

    Raises:
        OSError: prlimit is missing.
    """
    import resource  # local: Windows lacks it

    token = os.urandom(16).hex()
    request = ascii((prelude, code, tests, entry_point, token)).encode()
    # A core limit of 1 byte means no core, even if the kernel pipes cores to a program. 0 cannot be raised to 1.
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
    """Raise ValueError if a correct program does not pass in the sandbox."""
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
    """Change to a root with only the folders, all read-only; the old root is unreachable."""
    call("mount", b"sandbox", ROOT, b"tmpfs", 0, b"size=1m")
    for folder in map(os.fsencode, folders):
        os.makedirs(ROOT + folder, exist_ok=True)
        call("mount", folder, ROOT + folder, None, 0x5000, None)  # including everything mounted below
    call("syscall", 442, -100, ROOT, 0x8000, struct.pack("4Q", 7, 0, 0, 0), 32)  # mount_setattr: all read-only
    os.chdir(ROOT)
    call("pivot_root", b".", b".")
    call("umount2", b".", 2)
    os.chdir("/")


def confine() -> None:
    """Drop all capabilities and new privileges, and refuse the system calls of DENIED."""
    call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))
    call("prctl", 38, 1, 0, 0, 0)
    architecture, *numbers = map(int, DENIED[os.uname().machine].split())
    refuse = (6, 0, 0, 0x50001)  # EPERM
    # A call of another architecture kills the process; the numbers from 1 << 30 belong to x32.
    steps = [(32, 0, 0, 4), (21, 1, 0, architecture), (6, 0, 0, 1 << 31), (32, 0, 0, 0), (53, 0, 1, 1 << 30), refuse]
    for number in numbers:
        steps += [(21, 0, 1, number), refuse]
    steps.append((6, 0, 0, 0x7FFF0000))
    lines = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    call("prctl", 22, 2, struct.pack("HP", len(steps), ctypes.addressof(lines)))


class Floats(ast.NodeTransformer):
    """Replace the names that `ascii` writes for non-finite floats."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(float(node.id)) if node.id in ("inf", "nan") else node


def plain(text: str) -> Any:
    """Parse the plain data that `ascii` wrote. Raises ValueError or SyntaxError."""
    return ast.literal_eval(Floats().visit(ast.parse(text.strip(), mode="eval")))


# `exec` below runs an untrusted program: only after `enter`, where nothing of the machine is reachable.
def serve(asked: Any, answer: Any) -> None:
    """Run the program in the child, then answer calls of its function, with an error's name if it raises."""
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
    """Run the tests in process 1, and return the token."""
    prelude, code, tests, entry_point, token = plain(sys.stdin.read())
    print(ascii((code, entry_point)), file=ask, flush=True)

    def function(*arguments: Any, **keywords: Any) -> Any:
        with suppress(BrokenPipeError):  # the program has ended: there is no reply to read
            print(ascii((arguments, keywords)), file=ask, flush=True)
        return plain(answers.readline(1 << 20))  # ValueError for an error's name and for anything but plain data

    space: dict[str, Any] = {"__name__": "tests"}
    exec(f"\n{prelude}".partition(f"\ndef {entry_point}(")[0], space)  # a prelude may end before the function's body
    space[entry_point] = function
    exec(tests, space)
    return token


def main() -> None:
    enter(sys.argv[2:])
    os.setsid()  # a signal to the old group would leave the namespace
    signal.signal(signal.SIGALRM, lambda *_: os._exit(1))
    signal.alarm(int(sys.argv[1]) + 1)  # in case the caller was killed
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
