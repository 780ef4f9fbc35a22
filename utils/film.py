"""Films of episodes: the picture of the game, and beside it what the player is told, does and reaches.

    compose(moment, picture, ...)   one frame
    write(stem, frames)             frames -> <stem>.mp4 and <stem>.gif, its end

Text comes from models: it is drawn, never interpreted.
"""

import functools
import subprocess
import sys
import textwrap
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FPS = 8
HOLD = 3  # seconds that the last frame stays
PANEL = 512  # pixels, the width of the text
GIF_WIDTH, GIF_COLOURS = 640, 64
GIF_STEPS = 240  # GIFs show the end of an episode: they are for pages, and large
PAPER, INK, FAINT, RULE = "#14171c", "#eceff4", "#8b95a5", "#2b313b"
ACCENT, GOOD, BAD = "#f2b84b", "#7bd389", "#ff7b72"  # what is advised, what is reached, what kills


@dataclass(frozen=True)
class Moment:
    """One step of an episode, in words and numbers."""

    step: int
    earned: float  # return without bonus, this step included
    obs: np.ndarray
    scene: Any  # what the env draws
    action: str
    choices: list[tuple[str, float]]  # what the policy would do, with probabilities, the likeliest first
    vitals: dict[str, int]  # of 9
    bag: dict[str, int]
    advice: list[tuple[str, list[str]]] = field(default_factory=list)  # sub-goals, the most urgent first, and reasons
    score: float | None = None  # comprehension of the most urgent one
    analysis: str = ""  # what the adapter wrote, the last time that the most urgent one was asked for
    pointed: list[tuple[str, int, int, bool]] = field(default_factory=list)  # kind, rows down, columns right, in view
    hint: str = ""
    reached: tuple[str, ...] = ()  # sub-goals, with this step
    unlocked: tuple[str, ...] = ()  # achievements, this step included
    end: str = ""  # what ended the episode, with this step


# --------------------------------------------------------------------------------------------------
# One frame
# --------------------------------------------------------------------------------------------------


@functools.cache
def font(size: int) -> Any:
    return ImageFont.load_default(size)


class Pen:
    """Writes lines from top to bottom."""

    def __init__(self, draw: ImageDraw.ImageDraw, x: int, y: int, width: int):
        self.draw, self.x, self.y, self.width = draw, x, y, width

    def line(self, text: str, size: int = 17, colour: str = INK, lines: int = 1, indent: int = 0) -> None:
        """Writes text, in so many lines at most."""
        per_line = max(8, int((self.width - indent) / (size * 0.5)))
        rows = textwrap.wrap(clean(text), per_line) or [""]
        if len(rows) > lines:
            rows = [*rows[: lines - 1], textwrap.shorten(" ".join(rows[lines - 1 :]), per_line, placeholder=" ...")]
        for row in rows:
            self.draw.text((self.x + indent, self.y), row, INK if not colour else colour, font(size))
            self.y += int(size * 1.3)

    def head(self, text: str) -> None:
        self.y += 6
        self.draw.text((self.x, self.y), text.upper(), FAINT, font(12))
        self.y += 17


def clean(text: str) -> str:
    """Leaves letters that a font has: no control characters, nothing that a terminal obeys."""
    return "".join(c if c.isprintable() and ord(c) < 0x250 else " " if c.isspace() else "?" for c in text)


def compose(moment: Moment, picture: np.ndarray, title: str, achievements: Sequence[str], view: tuple[int, int]) -> Any:
    """Draws a frame.

    Args:
        picture: (H, W, 3) uint8 of the game, whose top is the map
        achievements: all that an episode can unlock
        view: rows and columns of the map
    Returns:
        an image, both of its sides even, as video needs them
    """
    game = Image.fromarray(picture)
    tile = game.width // view[1]
    frame = Image.new("RGB", ((game.width + PANEL) // 2 * 2, (game.height + 40) // 2 * 2), PAPER)
    frame.paste(game, (0, 0))
    draw = ImageDraw.Draw(frame)
    point(draw, moment, tile, view)
    unlocked(draw, moment, achievements, game.height, frame.width)
    pen = Pen(draw, game.width + 18, 12, PANEL - 36)
    pen.line(title, 15, FAINT)
    pen.line(f"step {moment.step}     return {moment.earned:.1f}     does: {moment.action}", 19)
    vitals(pen, moment.vitals)
    advice(pen, moment)
    if moment.reached:
        banner(draw, "reached: " + ", ".join(moment.reached), game.width, GOOD, 10)
    if moment.end:
        banner(draw, moment.end, game.width, BAD, 56 if moment.reached else 10)
    return frame


def point(draw: ImageDraw.ImageDraw, moment: Moment, tile: int, view: tuple[int, int]) -> None:
    """Frames the cells that advice points at; for what is only remembered, an arrow at the edge."""
    for number, (kind, dy, dx, in_view) in enumerate(moment.pointed):
        width = 5 if number == 0 else 2
        row, col = view[0] // 2 + dy, view[1] // 2 + dx
        if in_view:
            draw.rectangle([col * tile, row * tile, (col + 1) * tile - 1, (row + 1) * tile - 1], None, ACCENT, width)
            continue
        y, x = (np.clip(i, 0, n - 1) * tile + tile / 2 for i, n in ((row, view[0]), (col, view[1])))
        length = float(np.hypot(dy, dx)) or 1.0
        up, right = dy / length, dx / length
        tip = (x + right * tile / 2, y + up * tile / 2)
        wings = [(x - right * 12 - up * 14 * side, y - up * 12 + right * 14 * side) for side in (1, -1)]
        draw.polygon([tip, *wings], ACCENT if number == 0 else None, ACCENT, 2)
        place = np.clip(x - 24, 2, view[1] * tile - 80), np.clip(y + 14, 0, view[0] * tile - 20)
        draw.text(place, kind, ACCENT, font(15))


def vitals(pen: Pen, values: dict[str, int]) -> None:
    """Draws a bar for each vital."""
    pen.y += 4
    wide = (pen.width - 12 * (len(values) - 1)) // max(len(values), 1)
    for i, (name, value) in enumerate(values.items()):
        x = pen.x + i * (wide + 12)
        pen.draw.text((x, pen.y), f"{name} {value}", BAD if value <= 2 else INK, font(15))
        pen.draw.rectangle([x, pen.y + 21, x + wide, pen.y + 27], RULE)
        pen.draw.rectangle([x, pen.y + 21, x + wide * min(value, 9) // 9, pen.y + 27], BAD if value <= 2 else GOOD)
    pen.y += 34


def advice(pen: Pen, moment: Moment) -> None:
    """Writes what is advised and why, the most urgent first, and the analysis behind it."""
    pen.head("advice, the most urgent first")
    for number, (sub_goal, reasons) in enumerate(moment.advice[:4]):
        mark = "  (hint)" if moment.hint and sub_goal == moment.hint else ""
        pen.line(sub_goal + mark, 20 if number == 0 else 17, ACCENT if number == 0 else INK)
        pen.line("because " + ", ".join(reasons), 14, FAINT, 2 if number == 0 else 1, indent=14)
    if not moment.advice:
        pen.line("none", 17, FAINT)
    if moment.score is not None:
        pen.line(f"comprehension of it: {moment.score:.2f}", 14, FAINT)
    pen.head("the policy")
    pen.line("   ".join(f"{name} {100 * p:.0f}%" for name, p in moment.choices[:4]), 15)
    if moment.analysis:
        pen.head("the adapter's analysis, when that was asked for")
        pen.line(moment.analysis, 15, INK, 6)


def unlocked(draw: ImageDraw.ImageDraw, moment: Moment, achievements: Sequence[str], y: int, width: int) -> None:
    """Draws a box for each achievement, filled where it is unlocked."""
    wide = (width - 170) / len(achievements)
    draw.text((12, y + 10), f"achievements {len(moment.unlocked)} of {len(achievements)}", INK, font(14))
    for i, name in enumerate(achievements):
        x = 165 + i * wide
        draw.rectangle([x, y + 10, x + wide - 5, y + 28], GOOD if name in moment.unlocked else RULE)


def banner(draw: ImageDraw.ImageDraw, text: str, width: int, colour: str, y: int) -> None:
    draw.rectangle([10, y, width - 10, y + 38], PAPER, colour, 2)
    draw.text((22, y + 8), clean(text)[:60], colour, font(18))


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


def write(stem: Path, frames: Iterable[Any]) -> list[Path]:
    """Writes frames, images of one size, as MP4 and GIF, each whole or not at all. Without ffmpeg as GIF only.

    Raises ValueError, one line, if the folder can't be written to.
    """
    try:
        import imageio_ffmpeg  # late: a machine may lack it

        program = imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        print("warning: no ffmpeg (pip install imageio-ffmpeg); writing a GIF only", file=sys.stderr)
        return [_write_gif(stem.with_suffix(".gif"), frames)]
    mp4, gif, part = (stem.with_suffix(end) for end in (".mp4", ".gif", ".part.gif"))
    try:
        count = _write_mp4(imageio_ffmpeg, mp4, frames)
        palette = f"palettegen=stats_mode=full:max_colors={GIF_COLOURS}"
        palette += "[p];[b][p]paletteuse=dither=none:diff_mode=rectangle"
        filters = f"fps={FPS},scale={GIF_WIDTH}:-2:flags=area,split[a][b];[a]{palette}"
        late = ["-ss", str(max(0, count - GIF_STEPS - HOLD * FPS) / FPS)]
        command = [program, "-y", "-loglevel", "error", *late, "-i", str(mp4), "-vf", filters, str(part)]
        subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL)
        part.replace(gif)
        return [mp4, gif]
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or b""
        reason = said.decode(errors="replace").strip()[-200:] or getattr(error, "strerror", "") or "ffmpeg failed"
        raise ValueError(f"--video: can't write {mp4} and {gif} ({reason})") from None
    finally:
        part.unlink(missing_ok=True)


def _write_mp4(library: Any, path: Path, frames: Iterable[Any]) -> int:
    """Writes all frames. Returns their number."""
    part, writer, count = path.with_suffix(".part.mp4"), None, 0
    look = ["-crf", "26", "-preset", "medium", "-tune", "animation"]
    try:
        for frame in held(frames):
            count += 1
            if writer is None:
                writer = library.write_frames(
                    str(part), frame.size, fps=FPS, quality=None, macro_block_size=2, output_params=look
                )
                writer.send(None)
            writer.send(np.ascontiguousarray(frame))
        writer.close()
        part.replace(path)
    finally:
        if writer is not None:
            writer.close()
        part.unlink(missing_ok=True)
    return count


def _write_gif(path: Path, frames: Iterable[Any]) -> Path:
    """Writes the last frames with Pillow alone."""
    part = path.with_suffix(".part.gif")
    last = deque(held(frames), GIF_STEPS + HOLD * FPS)
    small = [frame.resize((GIF_WIDTH, GIF_WIDTH * frame.height // frame.width)).quantize(GIF_COLOURS) for frame in last]
    try:
        small[0].save(part, save_all=True, append_images=small[1:], duration=1000 // FPS, loop=0)
        part.replace(path)
    except OSError as error:
        raise ValueError(f"--video: can't write {path} ({error.strerror})") from None
    finally:
        part.unlink(missing_ok=True)
    return path


def held(frames: Iterable[Any]) -> Iterable[Any]:
    """Repeats the last frame for some seconds."""
    frame = None
    for frame in frames:
        yield frame
    if frame is not None:
        yield from [frame] * (HOLD * FPS)
