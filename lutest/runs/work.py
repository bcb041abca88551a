"""The work database of a build or a check, and runs read into it."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import duckdb

from lutest.reader.errors import BuildError
from lutest.runs.canonical import raw_fields, write_runs
from lutest.runs.configuration import BuildConfig
from lutest.runs.sources import Source, SourceFields, check_served_columns, read_sources

__all__ = ["read_runs", "work_database"]

Progress = Callable[[str, int, int], None]


def read_runs(
    connection: duckdb.DuckDBPyConnection,
    given: Sequence[Source],
    settings: BuildConfig,
    base: Path,
    progress: Progress | None = None,
) -> None:
    """Read sources into ``runs``, canonical and structurally checked."""
    scalars, steps = raw_fields(settings.columns)
    served = read_sources(connection, given, SourceFields(scalars, steps), base=base, progress=progress)
    check_served_columns(connection, served, settings.columns, settings.time_unit)
    write_runs(connection, settings.columns, settings.milliseconds)


@contextlib.contextmanager
def work_database(folder: Path | None = None) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection to a database on disk, so that large inputs spill.

    Its folder is made for it and gone afterwards; not given, it lies where temporary files do.
    """
    try:
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="lutest-"))
        else:
            folder.mkdir()
    except OSError as error:
        raise BuildError(f"{folder or tempfile.gettempdir()}: cannot make a work folder: {error.strerror}") from error
    try:
        try:
            connection = duckdb.connect(str(folder / "work.duckdb"))
        except duckdb.Error as error:
            raise BuildError(f"{folder}: cannot make a work database: {str(error).splitlines()[0]}") from error
        with connection:
            connection.execute("SET preserve_insertion_order = false")
            yield connection
    finally:
        shutil.rmtree(folder, ignore_errors=True)
