"""A process that does nothing but read tables: imports no more than such a process would."""

from __future__ import annotations

import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeAlias

import lutest

__all__ = ["Seen", "read_until"]

# (content hash, figures) → how often they were loaded; and the error that ended the loop, if any
Seen: TypeAlias = tuple[Counter[tuple[str, str]], str]


def read_until(stop: Path, path: str, pause_s: float, sender: Connection) -> None:
    """Load a table again and again, every fifth time verified, until a file appears; send a word at once, then all."""
    versions: Counter[tuple[str, str]] = Counter()
    error = ""
    try:
        sender.send("started")
        while not stop.exists():
            if sum(versions.values()) % 5 == 4:
                lutest.verify(path)
            table = lutest.load(path)
            versions[table.meta["content_hash"], repr(table.figures.keys)] += 1
            time.sleep(pause_s)
    except Exception as caught:  # whatever it is, it is a load that failed
        error = repr(caught)
    sender.send((versions, error))
