"""Read the rows of a data set (JSONL, JSON, CSV, Parquet, a folder, or the hub), split them, and check settings."""

import csv
import json
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any, Literal, TypeVar

Row = dict[str, Any]
Given = TypeVar("Given")
Parsed = TypeVar("Parsed")
Split = Literal["train", "validation", "test"]
SPLIT_NAMES: tuple[Split, ...] = ("train", "validation", "test")
_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def hashed_split(key: str) -> Split:
    """Assign a key to a split by a fixed hash: 70 % train, 10 % validation, 20 % test."""
    # Python's hash() differs between processes. JSON text may contain half of a surrogate pair.
    percentile = int.from_bytes(sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big") % 100
    return "test" if percentile < 20 else "validation" if percentile < 30 else "train"


def check_split(split: str, names: tuple[str, ...] = SPLIT_NAMES) -> None:
    """Raise ValueError if the split is not one of `names`."""
    if split not in names:
        raise ValueError(f"split={split!r} must be one of {', '.join(map(repr, names))}")


def check_settings(*conditions: tuple[bool, str]) -> None:
    """Raise ValueError with the message of the first (condition, message) whose condition is true."""
    for is_wrong, message in conditions:
        if is_wrong:
            raise ValueError(message)


def as_range(number: int | tuple[int, int]) -> tuple[int, int]:
    """Return an inclusive range unchanged, and a number n as the range (n, n)."""
    return (number, number) if isinstance(number, int) else number


def draw_number(number: int | tuple[int, int], rng: Random) -> int:
    """Return the number, or draw one from an inclusive range."""
    low, high = as_range(number)
    return low + int(rng.random() * (high - low + 1))


def load_rows(path: str | Path) -> Iterator[tuple[str, Row]]:
    """Yield (location, row) for each row of a file. The location, file and line, is for error messages.

    Raises:
        ValueError: The file does not exist or is malformed. The message names file and line.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"no file {path}: give the path of a {', '.join(_SUFFIXES)} file")
    if path.suffix == ".jsonl":
        yield from _json_lines(path)
    elif path.suffix == ".csv":
        yield from _csv_rows(path)
    else:
        for number, row in enumerate(_rows_of_table(path), 1):
            yield f"{path}, row {number}", row


def _csv_rows(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open(encoding="utf-8-sig", newline="") as file:  # -sig skips a byte order mark
        reader = csv.DictReader(file, strict=True)  # strict: an unclosed quote would swallow the rows below it
        try:
            names = list(reader.fieldnames or ())
            check_names(f"{path}, line 1", names)
            for row in reader:
                location = f"{path}, line {reader.line_num}"  # a quoted cell may span lines
                num_cells = len(names) + len(row.pop(None, ())) - sum(value is None for value in row.values())
                if num_cells != len(names):
                    raise ValueError(
                        f"{location}: {num_cells} cells under {len(names)} names; put a cell that has a comma in quotes"
                    )
                yield location, dict(row)
        except (csv.Error, UnicodeDecodeError) as error:  # a cell of more than 131,072 characters
            raise ValueError(f"{path}, after line {reader.line_num}: not CSV in UTF-8 ({error}); correct it") from None


def check_names(location: str, names: Sequence[str]) -> None:
    """Raise ValueError if a column name is empty or occurs twice: a row would lose one of the values."""
    stripped_names = [name.strip() for name in names]
    for name in names:
        if stripped_names.count(name.strip()) > 1:
            raise ValueError(f"{location}: {name!r} occurs twice; give each column a different name")
        if not name.strip():
            raise ValueError(f"{location}: a column has no name; name it, or remove it")


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object. Raises ValueError if a name occurs twice, where Python would drop the first value."""
    if len(dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} occurs twice in an object")
    return dict(pairs)


def _rows_of_table(path: Path) -> list[Row]:
    if path.suffix == ".json":
        try:
            rows = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_unique_object)
        except (ValueError, RecursionError) as error:  # RecursionError: endless brackets
            raise ValueError(f"{path}: not JSON in UTF-8 ({error}); correct it") from None
        if isinstance(rows, dict):  # an evaluation file of d1
            rows = rows.get("generations")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path} must contain a list of objects")
        return rows
    if path.suffix == ".parquet":
        from pyarrow.parquet import read_table

        try:
            table = read_table(path)
            check_names(str(path), table.column_names)
            return table.to_pylist()
        except (ValueError, OSError) as error:
            raise ValueError(f"{path}: not Parquet ({' '.join(str(error).split())}); correct it") from None
    raise ValueError(f"{path} must end in one of {', '.join(_SUFFIXES)}")


def _json_lines(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open("rb") as file:  # binary: only "\n" ends a line, not Unicode's other line separators
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(BOM_UTF8)
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"), object_pairs_hook=_unique_object)
            except (ValueError, RecursionError) as error:  # RecursionError: a hostile line of brackets
                raise ValueError(f"{path}, line {number}: not JSON in UTF-8 ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: must be a JSON object, not {type(row).__name__}")
            yield f"{path}, line {number}", row


class MissingField(ValueError):
    """A row has no field `name`, but the fields `given`."""

    def __init__(self, name: str, given: Iterable[str]) -> None:
        super().__init__(
            f"no field {name!r}, only {', '.join(map(repr, given))}; rename the one that has it, or add it"
        )
        self.name = name


def require_field(row: Mapping[str, Any], name: str) -> Any:
    """Return a field of the row. Raises MissingField, a ValueError, if it is missing."""
    if name not in row:
        raise MissingField(name, row)
    return row[name]


def text_of(row: Mapping[str, Any], name: str) -> str:
    """Return a text field of the row. Raises ValueError if it is missing or not a text."""
    value = require_field(row, name)
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, not {type(value).__name__}")
    return value


def parse_rows(rows: Iterable[tuple[str, Given]], parse: Callable[[Given], Parsed]) -> tuple[Parsed, ...]:
    """Return `parse(row)` for each (location, row), and put the location before the message of its ValueError."""
    parsed = []
    for location, row in rows:
        try:
            parsed.append(parse(row))
        except ValueError as error:
            raise ValueError(f"{location}: {error}") from None
    return tuple(parsed)


def load_problems(
    path: str | Path | None, split: Split, dataset: tuple[str, str | None], parse: Callable[[Row], tuple]
) -> tuple[tuple, ...]:
    """Return `parse(row)`, a tuple whose first item is the question, for each row of the split.

    The rows come from the file `path`; from the file in the folder `path` whose name contains the split; or, without a
    path, from the hub's data set (name, configuration). Raises ValueError if there are none.
    """
    published_split = "test" if split == "test" else "train"
    if path is not None:
        file = _split_file(Path(path).expanduser(), published_split)
        problems = parse_rows(load_rows(file), parse)
        if not problems:
            raise ValueError(f"{file} has no rows; give a file of problems")
    else:
        problems = parse_rows(_rows_of_hub(*dataset, published_split), parse)
    if split != "test":  # a hash of the question assigns a tenth of the published train rows to validation
        is_validation = split == "validation"
        return tuple(problem for problem in problems if (hashed_split(problem[0]) == "validation") == is_validation)
    return problems


def _split_file(path: Path, split: str) -> Path:
    if not path.is_dir():
        return path
    files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES and split in file.stem.lower())
    if len(files) != 1:
        names = ", ".join(str(file.relative_to(path)) for file in files) or "none"
        raise ValueError(f"{path} must contain exactly one {split} file ({', '.join(_SUFFIXES)}); found: {names}")
    return files[0]


def _rows_of_hub(name: str, configuration: str | None, split: str) -> Iterator[tuple[str, Row]]:
    import datasets  # local: the import takes seconds, and files do not need it

    try:
        loaded = datasets.load_dataset(name, configuration, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"data set {name} (split {split}) is not on this machine and could not be downloaded ({reason}); "
            f"set path to the file or folder that has it"
        ) from None
    for number, row in enumerate(loaded, 1):
        yield f"{name} {split}, row {number}", dict(row)
