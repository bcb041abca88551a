"""What goes to the terminal: progress bars while it is one, and JSON."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from lutest.cli.text_tables import one_line, to_json

__all__ = ["print_json", "progress_bar", "run_bar"]


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar of bytes on a terminal; in a pipe, nothing."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, leave=False, file=sys.stderr) as bar:

        def show(what: str, done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
            name = one_line(what)[-40:]
            if bar.desc != f"{name}: ":
                bar.set_description(name)

        yield show


@contextlib.contextmanager
def run_bar(minutes: float | None) -> Iterator[Callable[[int, int], None] | None]:
    """A bar of runs with the time left on a terminal; in a pipe, nothing."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    limit = "" if minutes is None else f"at most {minutes:g} min"
    with tqdm(unit="run", desc=limit, leave=False, dynamic_ncols=True, file=sys.stderr) as bar:

        def show(done: int, total: int) -> None:
            if bar.total is None:  # what earlier sessions did says nothing of the time left
                bar.total = total
                bar.initial = bar.n = done - 1
            bar.update(done - bar.n)

        yield show


def print_json(value: object) -> None:
    """Print a value as JSON, paths and dates as text."""
    print(to_json(value))
