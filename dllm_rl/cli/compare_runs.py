"""`dllm-rl compare`: which of several runs is better on their held-out problems, and how sure that is."""

import argparse
import json
from pathlib import Path

from rich.console import Console

from dllm_rl.evaluation.compare import Comparison, compare
from dllm_rl.screen import escape_controls


def compare_command(arguments: argparse.Namespace) -> None:
    """Print the table of a comparison, or one JSON object, and the sentences; draw the picture.

    Raises:
        ValueError: The runs cannot be compared.
    """
    comparison = compare(read_arms(arguments.runs), metric=arguments.metric)
    plot = Path(arguments.plot)
    comparison.plot(plot)
    if arguments.json:
        print(json.dumps(comparison.as_json() | {"picture": str(plot)}))
        return
    show(comparison, plot)


def show(comparison: Comparison, plot: Path) -> None:
    """Print the table of a comparison, where its picture is, and its sentences."""
    Console().print(comparison.table())
    print(escape_controls("\n\n".join([f"\nPicture: {plot}", *comparison.sentences()]), keep="\n"))


def read_arms(words: list[str]) -> list[str] | dict[str, list[str]]:
    """Return the runs, or of words such as tis=runs/tis-seed0,runs/tis-seed1 those of each arm by its name.

    Raises:
        ValueError: Some words have a name and others have none, or a name has no run.
    """
    named = [word for word in words if "=" in word and not Path(word).expanduser().exists()]
    if not named:
        return words
    if others := [word for word in words if word not in named]:
        raise ValueError(f"{others[0]} has no name, and {named[0]} has one; name each arm, as in A=RUN,RUN B=RUN")
    arms: dict[str, list[str]] = {}
    for word in named:
        name, _, runs = word.partition("=")
        if not name or not all(runs.split(",")):
            raise ValueError(f"{word!r} must be a name and its runs, as in A=RUN,RUN")
        arms.setdefault(name, []).extend(runs.split(","))
    return arms
