"""The command line: flags with large numbers, errors in one line, exit codes."""

import re
import sys
from collections.abc import Callable
from typing import Annotated, Any

import tyro

EXIT_BAD_INPUT = 2
MAX_ERROR_LINE = 1000  # characters


def read_big_int(word: str) -> int:
    """Reads an int, also in the form 1e6. Raises ValueError for anything else."""
    if re.fullmatch(r"[+-]?\d+", word):
        return int(word)
    value = float(word)
    if not value.is_integer():
        raise ValueError(f"{word} is not a whole number")
    return int(value)


# 1e6 is how people write a budget; tyro's int refuses it
BigInt = Annotated[
    int,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda words: read_big_int(words[0]),
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    ),
]


def check_ranges(args: Any, limits: dict[str, tuple[float, float]]) -> None:
    """Raises ValueError, one line that names the flag, for a number out of its limits. None is no number."""
    for name, (low, high) in limits.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:  # NaN is not, either
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag}: {value} is out of range; choose {low} to {high}")


def first_line(error: BaseException) -> str:
    """Returns what an exception says, in one line that is never empty and that any terminal can print.

    Files may have put anything into it: halves of characters, escapes.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = " ".join(lines[: 1 + lines[0].endswith(":")])[:MAX_ERROR_LINE]  # behind a colon the reason comes
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def exit_code(command: Callable[[], int | None]) -> int:
    """Runs a command and returns its exit code, 0 for None. Bad input (ValueError, OSError) is one line and 2."""
    try:
        return command() or 0
    except (ValueError, OSError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return EXIT_BAD_INPUT
