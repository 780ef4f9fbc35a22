"""An episode in a terminal, one step at a time: the map in letters, what is advised and why, what the policy would do.

Keys: space or Enter one step on, f ten, b one back, g to the end, q quits. No window system is needed; where standard
input is no terminal, each of its lines is a key.
"""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from utils.film import Moment, clean

MOVES = {" ": 1, "\n": 1, "\r": 1, "": 1, "f": 10, "b": -1, "g": 10**9}
HELP = "space: on   f: ten on   b: back   g: to the end   q: quit"


def play(console: Console, env: Any, moments: Iterable[Moment]) -> None:
    """Shows the moments of an episode as keys ask for them, until q or the end of standard input."""
    shown, at = list(moments), 0
    with keys() as read:
        while True:
            console.print(picture(shown[at], env, len(shown)))
            key = read()
            if key is None or key in "qQ\x03\x04" and key:
                return
            if at == len(shown) - 1 and MOVES.get(key, 0) > 0:
                return
            at = min(max(at + MOVES.get(key, 0), 0), len(shown) - 1)


@contextlib.contextmanager
def keys() -> Iterator[Any]:
    """Gives a function that waits for a key and returns it, None at the end of standard input."""
    try:
        import termios
        import tty

        before = termios.tcgetattr(sys.stdin)
    except Exception:  # no terminal, or none of this kind: termios.error is an Exception only
        yield _read_line
        return
    try:
        tty.setcbreak(sys.stdin)
        yield lambda: sys.stdin.read(1) or None
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _read_line() -> str | None:
    line = sys.stdin.readline()
    return line.strip()[:1] if line else None


def picture(moment: Moment, env: Any, total: int) -> Group:
    """Draws a moment."""
    rows = env.letters(moment.obs)
    framed = {(len(rows) // 2 + dy, len(rows[0]) // 2 + dx) for _, dy, dx, in_view in moment.pointed if in_view}
    text = Text()
    for y, row in enumerate(rows):
        for x, (letter, colour) in enumerate(row):
            text.append(f"{letter} ", f"{colour} on rgb(90,70,0)" if (y, x) in framed else colour)
        text.append("\n")
    body = Table.grid(padding=(0, 2))
    body.add_row(Panel(text, title=f"step {moment.step} of {total}", expand=False), words(moment))
    last = [Text(moment.end, "bold red")] if moment.end else []
    return Group(body, *last, Text(HELP, "dim"))


def words(moment: Moment) -> Text:
    """Writes what goes with the map. Text of models is text: no markup and no control character in it counts."""
    text = Text()
    text.append(f"return {moment.earned:.1f}   ", "bold")
    text.append("   ".join(f"{name} {value}" for name, value in moment.vitals.items()) + "\n")
    text.append("bag: " + (", ".join(f"{n} {name}" for name, n in moment.bag.items()) or "nothing") + "\n")
    text.append("advice, the most urgent first:\n", "dim")
    for number, (sub_goal, reasons) in enumerate(moment.advice):
        text.append(f"  {sub_goal}", "bold yellow" if number == 0 else "")
        text.append(f"  because {', '.join(reasons)}\n", "dim")
    if not moment.advice:
        text.append("  none\n")
    for kind, dy, dx, in_view in moment.pointed:
        away = [f"{abs(n)} {a if n > 0 else b}" for n, a, b in ((dy, "down", "up"), (dx, "right", "left")) if n]
        text.append(f"points at {kind}: {', '.join(away) or 'here'}{'' if in_view else ' (remembered)'}\n", "yellow")
    if moment.hint:
        text.append(f"hint: {moment.hint}\n", "yellow")
    likely = "   ".join(f"{name} {100 * p:.0f}%" for name, p in moment.choices[:5])
    text.append(f"policy: {likely}\n")
    text.append(f"does: {moment.action}\n", "bold")
    if moment.reached:
        text.append(f"reached: {', '.join(moment.reached)}\n", "bold green")
    if moment.analysis:
        text.append(f"analysis: {clean(moment.analysis)}\n", "dim")
    return text
