"""Replies of a guide on disk, so that no question is paid for twice."""

import json
import os
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path


class NoCache:
    """Remembers nothing."""

    def read(self, key: str) -> str | None: ...

    def keep(self, key: str, text: str) -> str:
        return text

    def close(self) -> None: ...


class Cache:
    """Keeps replies in a file, by a hash of the whole request.

    Several processes may share the file, and a kill costs nothing that was written (SQLite, WAL). A damaged file is set
    aside and a new one begun. Nothing in here stops a training.

    Args:
        path: the file
        usable: says whether a text can be used as a reply; what can't, as of another version, counts as absent

    Raises ValueError, one line, if there can be no file at this path.
    """

    def __init__(self, path: Path, usable: Callable[[str], bool]) -> None:
        self.path, self._usable, self._warned = path, usable, False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._open()
            except sqlite3.DatabaseError as error:
                if not is_damage(error):
                    raise
                self._start_anew()
        except (OSError, sqlite3.Error) as error:
            reason = f"can't use {path} ({error})"
            raise ValueError(f"--llm-cache: {reason}; choose another file, or none") from None

    def read(self, key: str) -> str | None:
        """Returns a reply that can be used, None if there is none."""
        for (text,) in self._run("SELECT text FROM replies WHERE key = ?", (key,)):
            try:
                text = json.loads(text)
            except (ValueError, TypeError, RecursionError):  # another program wrote it
                return None
            return text if isinstance(text, str) and self._usable(text) else None
        return None

    def keep(self, key: str, text: str) -> str:
        """Writes a reply. Returns the one that is kept: the first, which another process may have used already."""
        # As JSON, because SQLite takes no lone surrogates.
        self._run("INSERT OR IGNORE INTO replies VALUES (?, ?)", (key, json.dumps(text)))
        return self.read(key) or text

    def close(self) -> None:
        self._db.close()

    def _open(self) -> None:
        # One pause asks at a time, but with --llm-async it does so in a thread of its own.
        self._db = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
        if self._db.execute("PRAGMA quick_check").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("damaged")
        for attempt in range(100):
            try:
                self._db.execute("PRAGMA journal_mode=WAL")
                break
            except sqlite3.OperationalError:  # another process is at it, for which SQLite does not wait here
                if attempt == 99:
                    raise
                time.sleep(0.05)
        self._db.execute("PRAGMA synchronous=NORMAL")  # a power cut may cost the newest replies, a kill none
        self._db.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, text TEXT NOT NULL)")

    def _start_anew(self) -> None:
        self._db.close()
        aside = self.path.with_name(f"{self.path.name}.damaged-{time.time_ns()}")
        print(f"warning: --llm-cache: {self.path} is damaged; set aside as {aside.name}", file=sys.stderr)
        for suffix in ("", "-wal", "-shm"):
            try:
                os.replace(f"{self.path}{suffix}", f"{aside}{suffix}")
            except FileNotFoundError:
                continue  # there is none, or another process was faster
        self._open()

    def _run(self, statement: str, values: tuple[str, ...]) -> list[tuple[str]]:
        """Returns what a statement finds; nothing, after one warning, where the file can't be used."""
        try:
            try:
                return self._db.execute(statement, values).fetchall()
            except sqlite3.DatabaseError as error:
                if not is_damage(error):
                    raise
                self._start_anew()
        except (OSError, sqlite3.Error) as error:
            if not self._warned:
                print(f"warning: --llm-cache: {self.path} can't be used now ({error})", file=sys.stderr)
            self._warned = True
        return []


def is_damage(error: sqlite3.Error) -> bool:
    """Is this what SQLite says about a file that is no database any more? It has no class of its own."""
    return type(error) is sqlite3.DatabaseError


def open_cache(path: str | Path, usable: Callable[[str], bool]) -> Cache | NoCache:
    """Opens the cache at a path; "none" is no cache."""
    return NoCache() if str(path) == "none" else Cache(Path(path).expanduser(), usable)
