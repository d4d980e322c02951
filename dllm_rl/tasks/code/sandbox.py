"""Run a program and its tests in new namespaces (unshare, prlimit of util-linux), without network, files or processes.

In the sandbox, this file runs as process 1, which runs the tests. Its child, forked before the tests are read, runs the
program. The tests call the program's function through pipes and receive plain data, or an exception of the built-in
class that the function's exception has or is derived from. So the program sees neither the tests nor the token that
proves that they passed, and no object of the program is compared. Two attacks remain possible: recognizing calls and
replying without computing, and a bug of the kernel. Each of the two processes may use the full memory limit.
"""

import ast
import builtins
import ctypes
import os
import signal
import struct
import subprocess
import sys
from contextlib import suppress
from typing import Any

SECONDS = 5  # limit of a program and its tests, in wall time and in processor time
OUTPUT = 1 << 16  # bytes that `run` returns
LIMITS = ["--as=536870912", f"--fsize={OUTPUT << 8}", "--nofile=32", "--msgqueue=0"]
SPACES = ["--user", "--map-root-user", "--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
FOLDERS = dict.fromkeys(("/lib", "/lib64", "/usr/lib", "/usr/lib64", f"{sys.base_prefix}/lib"))  # of the interpreter
ROOT = b"/sys"  # mount point of the new root: exists on every machine, contains nothing of the interpreter
# By machine: the kernel's number of the architecture, then the numbers of the refused system calls. They are execve,
# execveat, clone, clone3, socket (a virtual machine's socket to its host ignores namespaces), socketpair, ptrace,
# process_vm_readv, process_vm_writev, pidfd_getfd, unshare, setns, shmget, semget, msgget, add_key, request_key,
# keyctl, bpf, perf_event_open, userfaultfd, io_uring_setup, memfd_create; on x86-64 also fork and vfork.
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
    # A core dump limit of 1 byte prevents dumps, even if the kernel pipes them to a program. A hard limit of 0 stays 0.
    core = min(1, resource.getrlimit(resource.RLIMIT_CORE)[1] % 2**64)  # -1 means no limit
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
            process = subprocess.run(command, input=request, stdout=-1, stderr=output, env={}, timeout=seconds)
        except subprocess.TimeoutExpired:
            return False, f"stopped after {seconds} s"
        output_text = os.pread(output.fileno(), OUTPUT, 0).decode(errors="replace")
    return (process.returncode, process.stdout) == (0, token.encode()), output_text


def require() -> None:
    """Raise ValueError if a correct program does not pass in the sandbox."""
    try:
        passed, output_text = run("", "def f(x):\n    return x", "assert f(1) == 1", "f", 60)
    except (OSError, AttributeError) as error:  # AttributeError: no memfd, so not Linux
        passed, output_text = False, str(error)
    if not passed:
        reason = output_text.strip().rpartition("\n")[2]
        raise ValueError(f"the sandbox needs Linux 5.12, unshare and user namespaces ({reason}); use 'static'")


def call(name: str, *arguments: Any) -> None:
    """Call a function of the C library. Raises OSError if it fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc[name](*arguments) < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def enter(folders: list[str]) -> None:
    """Change to a root with only the folders, all read-only; the old root is unreachable."""
    call("mount", b"sandbox", ROOT, b"tmpfs", 0, b"size=1m")
    for folder in map(os.fsencode, folders):
        os.makedirs(ROOT + folder, exist_ok=True)
        call("mount", folder, ROOT + folder, None, 0x5000, None)  # MS_BIND | MS_REC: a bind mount of everything below
    call("syscall", 442, -100, ROOT, 0x8000, struct.pack("4Q", 7, 0, 0, 0), 32)  # mount_setattr: all read-only
    os.chdir(ROOT)
    call("pivot_root", b".", b".")
    call("umount2", b".", 2)
    os.chdir("/")


def confine() -> None:
    """Drop all capabilities, forbid new privileges, and refuse the system calls of DENIED by a seccomp filter."""
    call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))
    call("prctl", 38, 1, 0, 0, 0)
    architecture, *numbers = map(int, DENIED[os.uname().machine].split())
    # Instructions of the kernel's filter language (BPF): (code, jump if true, jump if false, value).
    refuse = (6, 0, 0, 0x50001)  # fail with EPERM
    # A call of another architecture kills the process; call numbers from 1 << 30 belong to x32 and are refused.
    instructions = [
        (32, 0, 0, 4),
        (21, 1, 0, architecture),
        (6, 0, 0, 1 << 31),
        (32, 0, 0, 0),
        (53, 0, 1, 1 << 30),
        refuse,
    ]
    for number in numbers:
        instructions += [(21, 0, 1, number), refuse]
    instructions.append((6, 0, 0, 0x7FFF0000))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in instructions))
    call("prctl", 22, 2, struct.pack("HP", len(instructions), ctypes.addressof(code)))


class Floats(ast.NodeTransformer):
    """Replace the names that `ascii` writes for non-finite floats."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(float(node.id)) if node.id in ("inf", "nan") else node


def plain(text: str) -> Any:
    """Parse the plain data that `ascii` wrote. Raises ValueError or SyntaxError."""
    return ast.literal_eval(Floats().visit(ast.parse(text.strip(), mode="eval")))


# `exec` below runs an untrusted program. It must run only after `enter`, where nothing of the machine is reachable.
def serve(requests: Any, replies: Any) -> None:
    """In the child, run the program, then reply to calls of its function with (name of an exception or "", data).

    The data is what the function returned, or the exception's arguments.
    """
    code, entry_point = plain(requests.readline())
    namespace: dict[str, Any] = {"__name__": "program"}
    exec(code, namespace)
    for line in requests:
        arguments, keywords = plain(line)
        try:
            value = namespace[entry_point](*arguments, **keywords)
            reply = "", dict(value) if isinstance(value, dict) else value  # also a Counter or another subclass
        except BaseException as error:
            name = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")
            reply = name, [part if isinstance(part, int | float | str) else str(part) for part in error.args]
        print(ascii(reply), file=replies, flush=True)


def judge(requests: Any, replies: Any) -> str:
    """In process 1, run the tests, which raise if one fails, and return the token."""
    prelude, code, tests, entry_point, token = plain(sys.stdin.read())
    print(ascii((code, entry_point)), file=requests, flush=True)

    def function(*arguments: Any, **keywords: Any) -> Any:
        with suppress(BrokenPipeError):  # the program has ended: there is no reply to read
            print(ascii((arguments, keywords)), file=requests, flush=True)
        line = replies.readline(1 << 20)
        try:
            name, value = plain(line)
            kind = vars(builtins)[name] if name else None
            # Not `__init__`, which of some classes needs other arguments.
            error = kind.__new__(kind, *value) if kind else None
        except Exception as problem:  # of any kind: a program may write any reply
            reason = f"a reply is not plain data: {problem!r}" if line else "the program ended without a reply"
            print(reason, file=sys.stderr, flush=True)
            os._exit(1)  # an exception could be one that the tests expect
        if error is not None:
            raise error
        return value

    namespace: dict[str, Any] = {"__name__": "tests"}
    # Run only the part of the prelude before the function, whose body may be missing.
    exec(f"\n{prelude}".partition(f"\ndef {entry_point}(")[0], namespace)
    namespace[entry_point] = function
    exec(tests, namespace)
    return token


def main() -> None:
    enter(sys.argv[2:])
    os.setsid()  # a signal to the old group would leave the namespace
    signal.signal(signal.SIGALRM, lambda *_: os._exit(1))
    signal.alarm(int(sys.argv[1]) + 1)  # in case the caller was killed
    verdict_fd = os.dup(1)
    os.dup2(2, 1)
    request_in, request_out = os.pipe()
    reply_in, reply_out = os.pipe()
    child = os.fork()
    for fd in (request_in, reply_out) if child else (0, verdict_fd, request_out, reply_in):
        os.close(fd)
    confine()
    if child:
        os.write(verdict_fd, judge(os.fdopen(request_out, "w"), os.fdopen(reply_in)).encode())
    else:
        serve(os.fdopen(request_in), os.fdopen(reply_out, "w"))
    os._exit(0)


if __name__ == "__main__":
    main()
