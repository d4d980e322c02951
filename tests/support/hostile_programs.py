"""Programs that attack, and what each writes in the sandbox, as a regular expression. `f` is there where none fails."""

LIBC = "import ctypes, os\nlibc = ctypes.CDLL(None)\n"
SOCKET = "import socket\nsocket.socket(socket.AF_{}, socket.SOCK_{})"
STOPPED = "^stopped after"
ENDED = "the program ended without a reply"  # what process 1 writes when the program has ended without a reply
DENIED = r"PermissionError: \[Errno 1\]"
READ_ONLY = r"OSError: \[Errno 30\]"
ABSENT = "FileNotFoundError"
REFUSED = "AssertionError"

HOSTILE = {
    # processes
    "fork bomb": ("import os\nwhile True: os.fork()", DENIED),
    "fork bomb of a shell": ("import os\nassert os.system(':(){ :|:& };:') == 0", REFUSED),
    "subprocess": ("import subprocess\nsubprocess.Popen(['sleep', '1000'])", DENIED),
    "multiprocessing": ("import multiprocessing as m\nm.get_context('fork').Process(target=print).start()", DENIED),
    "threads": ("import threading\nwhile True: threading.Thread(target=print).start()", "can't start new thread"),
    "posix_spawn": ("import os, sys\nos.posix_spawn(sys.executable, ['python'], {})", DENIED),
    "daemon by two forks": ("import os\nif os.fork() == 0:\n    os.setsid()\n    os.fork()", DENIED),
    "exec": ("import os, sys\nos.execv(sys.executable, ['python', '-c', ''])", DENIED),
    "vfork": (f"{LIBC}assert libc.vfork() >= 0", REFUSED),
    "clone3": (f"{LIBC}assert libc.syscall(435, bytes(88), 88) >= 0", REFUSED),
    "a session of its own that sleeps": ("import os, time\nos.setsid()\ntime.sleep(1000)", STOPPED),
    # memory and time
    "100 GB": ("bytearray(100 << 30)", "MemoryError"),
    "1 GB": ("x = bytearray(1 << 30)", "MemoryError"),
    "100 GB mapped": ("import mmap\nmmap.mmap(-1, 100 << 30)", r"OSError: \[Errno 12\]"),
    "memory in a loop": ("x = []\nwhile True:\n    x.append(bytearray(1 << 24))", "MemoryError"),
    "memory errors in a loop": (
        "while True:\n    try:\n        x = bytearray(1 << 40)\n    except MemoryError:\n        pass",
        STOPPED,
    ),
    "sleep": ("import time\ntime.sleep(1000)", STOPPED),
    "busy loop": ("while True: pass", STOPPED),
    "a pattern that backtracks": ("import re\nre.match('(a+)+$', 'a' * 64 + 'b')", STOPPED),
    "a number without end": ("9**9**9", STOPPED),
    "a call that sleeps": ("import time\ndef f(): time.sleep(1000)", STOPPED),
    "an infinite generator": ("import itertools\ndef f(): return itertools.count()", "MemoryError"),
    "an infinite list": ("import itertools\nx = [bytearray(1 << 20) for _ in itertools.count()]", "MemoryError"),
    "deep recursion": ("def r(): r()\nr()", "RecursionError"),
    "recursion through the stack": (
        "import sys\nsys.setrecursionlimit(10**9)\nclass A:\n    def __repr__(self): return repr(self)\nrepr(A())",
        ENDED,
    ),
    "a stop": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", STOPPED),
    # output
    "1 GB of output": ("import os\nfor _ in range(1 << 14): os.write(1, bytes(1 << 16))", "^\0{1000}"),
    "1 GB of print": ("for _ in range(1 << 20): print('x' * 1024, flush=True)", r"x{1000}"),
    "1 GB of errors": ("import os\nfor _ in range(1 << 14): os.write(2, bytes(1 << 16))", "^\0{1000}"),
    # crashes
    "segmentation fault": ("import ctypes\nctypes.string_at(0)", ENDED),
    "abort": ("import os\nos.abort()", ENDED),
    "a signal to itself": ("import os\nos.kill(os.getpid(), 9)", ENDED),
    # files
    "/etc/passwd": ("open('/etc/passwd')", ABSENT),
    "home": ("import os\nos.listdir(HOME + '/.ssh')", ABSENT),
    "the repository": ("import os\nos.listdir(REPOSITORY)", ABSENT),
    "a file outside": ("open(OUTSIDE + '/x', 'a')", READ_ONLY),
    "a new file": ("open('/x', 'w')", READ_ONLY),
    "a new folder": ("import os\nos.mkdir('/usr/lib/x')", READ_ONLY),
    "a full disk": ("import tempfile\ntempfile.TemporaryFile()", ABSENT),
    "the interpreter's library, written": ("import os\nopen(os.__file__, 'a')", READ_ONLY),
    "the interpreter's library, touched": ("import os\nos.utime(os.__file__)", READ_ONLY),
    "/proc": ("open('/proc/1/environ')", ABSENT),
    "/dev": ("open('/dev/mem')", ABSENT),
    "up the folders": ("import os\nassert 'etc' in os.listdir('../../../../..')", REFUSED),
    "chroot": ("import os\nos.chroot('/usr')", DENIED),
    "mount": (f"{LIBC}assert libc.mount(b'x', b'/usr', b'tmpfs', 0, None) == 0", REFUSED),
    "a file in memory": ("import os\nos.memfd_create('x')", DENIED),
    "open files of the caller": (
        "import os, stat\n"
        "def kind(n):\n    try: return stat.S_IFMT(os.fstat(n).st_mode)\n    except OSError: return 0\n"
        "assert {kind(n) for n in (0, *range(3, 64))} - {0, stat.S_IFIFO}",
        REFUSED,
    ),
    "the tests": ("import os\nos.read(0, 1 << 16)", r"OSError: \[Errno 9\]"),
    # the network
    "tcp": (SOCKET.format("INET", "STREAM"), DENIED),
    "udp": (SOCKET.format("INET6", "DGRAM"), DENIED),
    "unix": (SOCKET.format("UNIX", "STREAM"), DENIED),
    "raw": (SOCKET.format("INET", "RAW"), DENIED),
    "the virtual machine's host": (SOCKET.format("VSOCK", "STREAM"), DENIED),
    "netlink": (SOCKET.format("NETLINK", "RAW"), DENIED),
    "http": ("import urllib.request\nurllib.request.urlopen('http://127.0.0.1:1')", "urlopen error .Errno 1. "),
    # other processes, the kernel
    "signals to all": ("import os\nfor pid in (1, os.getppid(), -1): os.kill(pid, 9)", "ProcessLookupError"),
    "a signal to its group": ("import os\nos.kill(0, 9)", ENDED),
    "ptrace": (f"{LIBC}assert libc.ptrace(16, 1, None, None) == 0", REFUSED),
    "memory of process 1": (f"{LIBC}assert libc.process_vm_readv(1, bytes(16), 1, bytes(16), 1, 0) >= 0", REFUSED),
    "unshare": (f"{LIBC}assert libc.unshare(0x10000000) == 0", REFUSED),
    "limits raised": ("import resource as r\nr.setrlimit(r.RLIMIT_AS, (-1, -1))", "ValueError"),
    "other users": ("import os\nos.setuid(65534)", r"OSError: \[Errno 22\]|PermissionError"),
    "open files": ("import os\nx = [os.eventfd(0) for _ in range(10**6)]", r"OSError: \[Errno 24\]"),
    "shared memory": (f"{LIBC}assert libc.shmget(0, 1 << 30, 0o1600) >= 0", REFUSED),
    "io_uring": (f"{LIBC}assert libc.syscall(425, 8, bytes(120)) >= 0", REFUSED),
}

# Programs that pretend to be right: f(1) == 2 and f(5) == 6.
CHEATS = {
    "exit": "import sys\nsys.exit(0)",
    "hard exit": "import os\nos._exit(0)",
    "exit in the call": "import os\ndef f(x): os._exit(0)",
    "SystemExit in the call": "def f(x): raise SystemExit(0)",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 0",
    "equal to all": "class A:\n    def __eq__(self, other): return True\ndef f(x): return A()",
    "an int equal to all": "class A(int):\n    def __eq__(self, other): return True\ndef f(x): return A(0)",
    "a repr that is code": (
        "class A:\n    def __repr__(self): return \"type('A', (), {'__eq__': lambda *_: 1})()\"\ndef f(x): return A()"
    ),
    "no assertions": "import builtins as b\nb.AssertionError = None\ndel b.__build_class__\ndef f(x): return 0",
    "trace": "import sys\nsys.settrace(lambda *_: None)\ndef f(x): return 0",
    "frames": (
        "import sys\nframe = sys._getframe()\n"
        "while frame:\n    print([str(v) for v in frame.f_locals.values()])\n    frame = frame.f_back\n"
        "def f(x): return 0"
    ),
    "every text in memory": "import gc\nfor x in gc.get_objects(): print(str(x)[:9])\ndef f(x): return 0",
    "the launcher's functions": "import __main__\n__main__.judge = __main__.serve = print\ndef f(x): return 0",
    "modules": "import sys, ast\nast.literal_eval = eval\nsys.modules['json'] = None\ndef f(x): return 0",
    "stdout closed": "import os\nos.close(1)\nos.close(2)\ndef f(x): return 0",
    "likely tokens": "for n in range(1000): print(f'{n:032x}')\ndef f(x): return 0",
    "replies ahead": (
        "import os\nfor n in range(3, 9):\n    try: os.write(n, b'True\\n' * 9)\n    except OSError: pass\n"
        "def f(x): return 0"
    ),
    "brackets": "class A:\n    def __repr__(self): return '[' * 10**5\ndef f(x): return A()",
    "a long reply": "def f(x): return 'x' * (1 << 21)",
    "nothing": "",
    "no function": "f = 2",
    "not Python": "f(",
}
