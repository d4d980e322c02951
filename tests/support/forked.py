"""Children of tests, forked from a server that has imported the library: a fresh interpreter takes seconds for that."""

import atexit
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
PATHS = [str(ROOT), *(str(ROOT / "tests" / name) for name in ("support", "training/dry_run"))]
IMPORTED = ["dllm_rl.training.trainer", "dllm_rl.training.fine_tune", "dllm_rl.frontend.grpo", "dllm_rl.models.tiny"]
IMPORTED += [f"transformers.models.{name}.modeling_{name}" for name in ("roberta", "llama")]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(IMPORTED)  # imports alone: a thread, or a product of torch, would not survive a fork


class Child:
    """A program in a process of its own. It has what tests use of `subprocess.Popen`, and takes it as `python -c`."""

    def __init__(self, program: str, *arguments: object, environment: Mapping[str, str] = os.environ) -> None:
        self.outputs = [tempfile.NamedTemporaryFile() for _ in range(2)]  # noqa: SIM115  they last as long as this
        names = [output.name for output in self.outputs]
        values = (program, [*map(str, arguments)], dict(environment), names)
        self.process = SERVER.Process(target=run, args=values)
        self.process.start()

    @property
    def returncode(self) -> int | None:
        """The exit status; negative: the signal that ended the process; None: it runs."""
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()

    def communicate(self) -> tuple[str, str]:
        """Wait for the end of the process; return its standard output and error."""
        self.process.join()
        out, error = (Path(output.name).read_text() for output in self.outputs)
        return out, error


def run(program: str, arguments: list[str], environment: dict[str, str], outputs: list[str]) -> None:
    """Run the program in this process, which has just been forked."""
    for stream, name in enumerate(outputs, start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), stream)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ |= environment
    sys.argv = ["-c", *arguments]
    sys.path[:0] = [*PATHS, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    import torch  # the server has it

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))  # libraries read the variable at their import
    sys.modules["__main__"] = main = ModuleType("__main__")
    try:
        exec(compile(program, "<program>", "exec"), main.__dict__)
    finally:
        atexit._run_exitfuncs()  # which a forked process of multiprocessing does not run
        sys.stdout.flush()
        sys.stderr.flush()
