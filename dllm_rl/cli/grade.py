"""`dllm-rl grade`: grade stored completions from any source by one protocol, or by all of the task."""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dllm_rl.evaluation.grading import compare_files, grade_by_every_protocol, grade_file
from dllm_rl.evaluation.results import with_bounds
from dllm_rl.files import read_json
from dllm_rl.screen import NARROW, literal


def grade_command(arguments: argparse.Namespace) -> None:
    """Print the grades, with --against also the differences from that file; or with --protocol all a table of all
    protocols. With --json, print one JSON object in place of a table.
    """
    file, against = arguments.file, arguments.against
    recorded = recorded_row(Path(file))
    task, protocol = arguments.task or recorded.get("task"), arguments.protocol or recorded.get("protocol", "strict")
    if protocol == "sandbox" != arguments.protocol:
        raise ValueError(f"the results.json beside {file!r} asks to run its programs; give --protocol sandbox to do so")
    if task is None:
        raise ValueError(f"task=None, and no results.json beside {file!r} names it; give --task")
    if against is not None:
        if protocol == "all":
            raise ValueError("--against compares under one protocol: give it in place of --protocol all")
        graded = compare_files(file, against, task=task, protocol=protocol)
    elif protocol != "all":
        graded = grade_file(file, task=task, protocol=protocol)
    else:
        graded = grade_by_every_protocol(file, task=task)
    console = Console()
    if arguments.json:
        print(json.dumps(graded))
    elif protocol != "all":
        console.print(grades_table(graded, file))
    else:
        console.print(protocols_table(graded, file))
        for name, why in graded["not_graded"].items():
            console.print(literal(f"not graded under {name}: {why}"), soft_wrap=True)


def recorded_row(file: Path) -> dict[str, Any]:
    """Return the newest row of these completions in the results.json that `dllm-rl evaluate --output_dir` left beside
    them; an empty one if there is none.
    """
    results = file.parent / "results.json"
    rows = read_json(results) if results.is_file() else []
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return next((row for row in reversed(rows) if row.get("completions") == file.name), {})


def heading(graded: dict[str, Any], file: str) -> Any:
    """Return the title of a table of the grades of a file."""
    protocol = f", protocol {graded['protocol']}" if "protocol" in graded else ""
    rows = f"{graded['n']} completions of {graded['problems']} problems in {file}"
    return literal(f"{graded['task']} (version {graded['version']}){protocol}, {rows}", style="table.title")


def grades_table(graded: dict[str, Any], file: str) -> Table:
    """Return a table with a line per rate: its mean, and its difference from the other file, with 95 % intervals."""
    captions = [graded["why_null"]] if "why_null" in graded else []
    if "no_answer" in graded:
        captions.append(f"graded wrong, because their reference answer is null: {graded['no_answer']}")
    if "against" in graded:
        captions.append(
            f"difference: minus {graded['against']}, over the {graded['problems_compared']} problems of both"
        )
    table = Table(title=heading(graded, file), caption=literal(". ".join(captions), style="table.caption"), **NARROW)
    for name in ("", "rate", *["difference"] * ("against" in graded)):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name in (name for name in graded if f"{name}_interval" in graded):
        cells = [with_bounds(graded[name], graded[f"{name}_interval"])]
        if (difference := graded.get("difference", {}).get(name)) is not None:
            cells.append(with_bounds(difference[0], difference[1:], sign="+"))
        table.add_row(*map(literal, (name, *cells)))
    return table


def protocols_table(graded: dict[str, Any], file: str) -> Table:
    """Return a table with a line per protocol: how many rows have the full reward, and rates with 95 % intervals."""
    rows = graded["protocols"]
    rates = [name for name in ("accuracy", "solve_rate", "cell_accuracy") if any(name in row for row in rows.values())]
    table = Table(title=heading(graded, file), caption="right: rows with the full reward", **NARROW)
    table.add_column("graded by", overflow="fold")
    for name in ("right", *rates, "parsed"):
        table.add_column(name, justify="right", no_wrap=True)
    for protocol, row in rows.items():
        cells = [literal(with_bounds(row[name], row[f"{name}_interval"]) if name in row else "") for name in rates]
        table.add_row(literal(protocol), str(row["right"]), *cells, f"{row['parsed']:.3f}")
    return table
