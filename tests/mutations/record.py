"""One mutation, and a short way to write many of one file."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """A wrong change of `file`: `old`, which stands there exactly once, becomes `new`.

    tests       files or test ids, from the repository's root, of which one must fail.
    equivalent  why no test can tell the difference; empty where one must.
    """

    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    equivalent: str = ""

    @property
    def name(self) -> str:
        flat = lambda text: " ".join(text.split())  # noqa: E731
        return f"{self.file.removeprefix('dllm_rl/')}: {flat(self.old)}  ->  {flat(self.new) or '(nothing)'}"


def mutations(file: str, tests: str, *changes: tuple[str, ...]) -> list[Mutation]:
    """Mutations of dllm_rl/`file`: (old, new), (old, new, tests) or (old, new, tests, equivalent).

    Tests are separated by spaces and stand below tests/; those of the file where a change names none.
    """
    made = []
    for old, new, *rest in changes:
        wanted = (rest[0] if rest and rest[0] else tests).split()
        made.append(Mutation(f"dllm_rl/{file}", old, new, tuple(f"tests/{test}" for test in wanted), "".join(rest[1:])))
    return made
