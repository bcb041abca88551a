"""Work in child processes, which may be killed, hang or crash: forked from a clean server, so that each is cheap."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import duckdb
import pandas as pd

import lutest
from lutest.builder.build import build
from lutest.reader.errors import LutestError
from lutest.reader.file import read_figures
from lutest.tablefile.verify import verify

__all__ = [
    "Outcome",
    "build_to_step",
    "build_whole",
    "count_steps",
    "loaded",
    "numbers",
    "run_child",
    "verified",
    "write_runs",
]

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["pytest", "lutest.tablefile.verify", "tests.children"])


@dataclass(frozen=True)
class Outcome:
    """How a child ended: with a value, with a LutestError, by a signal, or not within its time."""

    value: Any = None
    error: str | None = None
    exit_code: int | None = None
    hung: bool = False

    @property
    def killed(self) -> bool:
        return self.exit_code == -signal.SIGKILL and not self.hung

    @property
    def ended(self) -> bool:
        """Whether it ended by itself, with a value or a LutestError."""
        return self.exit_code == 0 and not self.hung


def run_child(
    function: Callable[..., Any], *arguments: Any, limit_s: float = 120, kill_after_s: float | None = None
) -> Outcome:
    """Call a function in a child of its own; kill it after some time, if it is told to."""
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_call, args=(sender, function, arguments))
    process.start()
    sender.close()
    value, error, hung = None, None, False
    try:
        assert receiver.recv() == "ready"
        if not receiver.poll(limit_s if kill_after_s is None else kill_after_s):
            hung = kill_after_s is None
            process.kill()
        value, error = receiver.recv()
    except EOFError:
        pass  # it died before it could answer
    receiver.close()
    process.join()
    return Outcome(value, error, process.exitcode, hung)


def _call(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    sender.send("ready")
    try:
        sender.send((function(*arguments), None))
    except LutestError as error:
        sender.send((None, str(error)))


def build_whole(runs: str, output: str) -> str:
    """Build a table; its content hash."""
    return build({}, runs=runs, output=output).content_hash


def numbers(path: str | os.PathLike[str]) -> str:
    """Digest of all that a load reads."""
    return hashlib.sha256(repr(read_figures(path)).encode()).hexdigest()


def loaded(path: str) -> str:
    """Digest of what a plain load reads."""
    return _digest(lutest.load(path))


def verified(path: str) -> str:
    """Digest of what a load reads of a file that was verified."""
    verify(path)
    return loaded(path)


def _digest(table: lutest.LatencyTable) -> str:
    return hashlib.sha256(repr(table.figures).encode()).hexdigest()


class _Steps:
    """Counts the steps of a build, and kills the process just before one of them."""

    def __init__(self, fatal: int | None) -> None:
        self.names: list[str] = []
        self.fatal = fatal

    def take(self, name: str) -> None:
        if len(self.names) == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        self.names.append(name)

    def counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.take(name)
            return function(*arguments, **options)

        return call


class _CountedConnection:
    """A connection whose statements are steps."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, steps: _Steps) -> None:
        self._connection = connection
        self._steps = steps

    def execute(self, query: str, *parameters: Any) -> Any:
        self._steps.take(query.split(maxsplit=1)[0])
        return self._connection.execute(query, *parameters)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def __enter__(self) -> _CountedConnection:
        return self

    def __exit__(self, *_: object) -> None:
        self._steps.take("close")
        self._connection.close()


def _build_stepwise(runs: str, output: str, fatal: int | None) -> list[str]:
    steps = _Steps(fatal)
    connect = duckdb.connect

    def counted_connect(*arguments: Any, **options: Any) -> Any:
        return _CountedConnection(connect(*arguments, **options), steps)

    # never stopped: this process is a child that ends after the build
    mock.patch.object(duckdb, "connect", counted_connect).start()
    for name in ("fsync", "replace", "mkdir", "unlink", "rmdir"):
        mock.patch.object(os, name, steps.counted(name, getattr(os, name))).start()
    build({}, runs=runs, output=output)
    return steps.names


def count_steps(runs: str, output: str) -> list[str]:
    """Build a table; the names of the steps that it took: statements, and changes to the file system."""
    return _build_stepwise(runs, output, None)


def build_to_step(runs: str, output: str, fatal: int) -> None:
    """Begin to build a table, to be killed just before one step."""
    _build_stepwise(runs, output, fatal)


def write_runs(path: Path, frame: pd.DataFrame) -> str:
    """Write runs of a DataFrame as a source; its path."""
    frame.to_json(path, orient="records", lines=True)
    return str(path)
