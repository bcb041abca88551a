"""The work database of a build or a check, and runs read into it."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import duckdb

from lutest.reader.errors import ArgumentError, BuildError, ConfigError
from lutest.reader.figures import KeyColumn
from lutest.reader.names import literal
from lutest.runs.canonical import column_text, raw_fields, write_runs
from lutest.runs.configuration import BuildConfig
from lutest.runs.parts import PartOf
from lutest.runs.sources import Source, read_sources
from lutest.runs.sources.discovery import printable
from lutest.runs.sources.served import MEASURED

Progress = Callable[[str, int, int], None]

_DECODE = "total_ms"  # or decode_ms, or decode_steps_ms: any of the three will do
_REQUIRED = {"prompt_tokens": "", "output_tokens": "", "prefill_ms": ", the time to the first token"}
_TOLD = {**_REQUIRED, _DECODE: " (or decode_ms, or decode_steps_ms)"}
# parts of the names that others give these columns
_WORDS = {
    "prompt_tokens": ("n_in", "isl", "input_len", "input_tok", "prompt"),
    "output_tokens": ("n_out", "osl", "output_len", "output_tok", "generated", "new_tok", "completion_tok"),
    "prefill_ms": ("ttft", "prefill", "first_token", "prompt_time"),
    _DECODE: ("decode", "e2e", "total_ms", "total_time", "latency"),
}
_ELAPSED = re.compile(r"elapsed|latency|duration|total", re.IGNORECASE)
_MOST_FIELDS_SHOWN = 30
_MEMORY = re.compile(r"\d+(\.\d+)?\s*[KMGT]i?B", re.IGNORECASE)


def read_runs(
    connection: duckdb.DuckDBPyConnection,
    given: Sequence[Source],
    settings: BuildConfig,
    base: Path,
    progress: Progress | None = None,
    extra_fields: Sequence[str] = (),
    skip_broken: bool = False,
    parts: Path | None = None,
    earlier: Sequence[PartOf] = (),
) -> tuple[KeyColumn, ...]:
    """Read sources into ``runs``, canonical and structurally checked, and their configurations into ``keys``.

    Parameters
    ----------
    connection : duckdb connection
        A work database.
    given : sequence of path or DataFrame
        Files, folders, glob patterns, frames.
    settings : BuildConfig
        What the key is, where columns come from, and the unit of the sources' times.
    base : Path
        Folder that relative paths are relative to.
    progress : callable, optional
        Called with (what, done, total) now and then.
    extra_fields : sequence of str
        Fields to keep in ``raw_runs`` beside those that the configuration needs.
    skip_broken : bool
        Go on without files that cannot be read; they stand in ``broken_sources``.
    parts : Path, optional
        Folder where each source becomes a part, from which its steps are read again: ``runs`` has none then.
    earlier : sequence of PartOf
        Sources that became parts before.

    Returns
    -------
    tuple of KeyColumn
        The key columns.

    Raises
    ------
    LutestError
        A source cannot be read as a whole, or no run has a column that every run needs.
    """
    fields = raw_fields(settings.columns, extra_fields)
    read_sources(
        connection, given, fields, base=base, progress=progress, skip_broken=skip_broken, parts=parts, earlier=earlier
    )
    _check_tools(connection, settings)
    missing = _missing(connection, settings, (*dict(settings.key), *_REQUIRED))
    if missing:
        ((n_timed,),) = connection.execute("SELECT count(steps) FROM raw_runs").fetchall()
        if not n_timed and len(_missing(connection, settings, ("decode_ms", "total_ms"))) == 2:
            missing.append(_DECODE)
        paths = [path for (path,) in connection.execute("SELECT path FROM source_files ORDER BY path").fetchall()]
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        raise ConfigError(_without(connection, f"{printable(paths[0])}{more}: no run", missing))
    return write_runs(connection, settings, with_steps=parts is None)


def _check_tools(connection: duckdb.DuckDBPyConnection, settings: BuildConfig) -> None:
    """Check the configuration against files of load generators.

    They carry their own units and are read into canonical fields, so the configuration has no say in either; and what
    they do not know of the key, it has to give.
    """
    sources = connection.execute(
        "SELECT source_id, path, tool FROM source_files WHERE tool IS NOT NULL ORDER BY source_id"
    ).fetchall()
    first = "sources that need it need a `lutest convert` with a configuration of theirs first"
    for source_id, path, tool in sources:
        whose = f"{printable(path)}: a file of {tool}"
        if settings.time_unit != "ms":
            raise ConfigError(f"{whose} has a unit of its own: leave out `time_unit: {settings.time_unit}`; {first}")
        for name in MEASURED:
            rule = settings.columns[name]
            if rule.constant is None and (name,) not in rule.alternatives:
                fields = " + ".join(rule.alternatives[0])
                raise ConfigError(f"{whose} has no field {fields}: leave out `columns.{name}`; {first}")
        missing = _missing(connection, settings, dict(settings.key), source_id)
        if missing:
            raise ConfigError(_without(connection, f"{whose}: no request", missing, source_id))


def _missing(
    connection: duckdb.DuckDBPyConnection, settings: BuildConfig, names: Iterable[str], source_id: int | None = None
) -> list[str]:
    """Columns without a value in any run of a source, or of all; none where no run could be read at all."""
    named = list(names)
    counts = ", ".join(f"count(nullif({column_text(settings.columns[name])}, ''))" for name in named)
    counted = connection.execute(
        f"SELECT count(*), {counts} FROM raw_runs WHERE problem IS NULL AND source_id = coalesce(?, source_id)",
        [source_id],
    ).fetchone()
    assert counted is not None
    n_runs, *n_given = counted
    return [name for name, n in zip(named, n_given, strict=True) if n_runs and not n]


def _without(
    connection: duckdb.DuckDBPyConnection, who: str, missing: Sequence[str], source_id: int | None = None
) -> str:
    held = connection.execute(
        "SELECT unnest(fields) FROM source_files WHERE source_id = coalesce(?, source_id) ORDER BY source_id",
        [source_id],
    ).fetchall()
    fields = list(dict.fromkeys(printable(name) for (name,) in held))
    elapsed = [field for field in fields if _ELAPSED.search(field)]
    if "prefill_ms" in missing and elapsed and any("token" in field.lower() for field in fields):
        return (
            f"{who} has a time to first token, only tokens and a time of its own ({elapsed[0]}), and that alone does "
            "not tell prefill from decode: record both, or name the field, `--set columns.prefill_ms=FIELD`"
        )
    shown = ", ".join(fields[:_MOST_FIELDS_SHOWN]) + (", …" if len(fields) > _MOST_FIELDS_SHOWN else "")
    told = ", ".join(f"{name}{_TOLD.get(name, '')}" for name in missing)
    mapped = ", ".join(f"{name}: {_likely(name, fields)}" for name in missing)
    name = missing[0]
    other = "" if set(missing) <= set(_TOLD) else ", or make the key of other fields, `--set 'key=[FIELD, …]'`"
    return (
        f"{who} has {told}: the fields are {shown}; say which they are, `--set 'columns={{{mapped}}}'` or the same "
        f"in `columns:` of a configuration, or what one is for all runs, `--set columns.{name}.constant=VALUE`{other}"
    )


def _likely(name: str, fields: Sequence[str]) -> str:
    """The field that a column may be, by its words or its spelling."""
    words = _WORDS.get(name, ())
    found = [field for field in fields if any(word in field.lower() for word in words)]
    found = found or difflib.get_close_matches(name, fields, n=1, cutoff=0.7)
    return found[0] if found else "FIELD"


class Limits(NamedTuple):
    """What a work database may take.

    Attributes
    ----------
    memory : str, optional
        Such as ``8GB``; half of what the machine, or its container, has if not given.
    threads : int, optional
        All processors if not given.
    folder : path, optional
        Where it lies; if not given, beside the file that is written, or where temporary files do.
    """

    memory: str | None = None
    threads: int | None = None
    folder: str | os.PathLike[str] | None = None


NO_LIMITS = Limits()


@contextlib.contextmanager
def work_database(folder: Path | None = None, limits: Limits = NO_LIMITS) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection to a database on disk, so that large inputs spill.

    Its folder is made for it and gone afterwards; not given, it lies where temporary files do.

    Raises
    ------
    LutestError
        The folder cannot be made, or a limit is not valid.
    """
    try:
        if folder is None or limits.folder is not None:
            folder = Path(tempfile.mkdtemp(prefix="lutest-", dir=limits.folder))
        else:
            folder.mkdir()
    except OSError as error:
        where = limits.folder or folder or tempfile.gettempdir()
        raise BuildError(f"{where}: cannot make a work folder: {error.strerror}") from error
    try:
        try:
            connection = duckdb.connect(str(folder / "work.duckdb"))
        except duckdb.Error as error:
            raise BuildError(f"{folder}: cannot make a work database: {str(error).splitlines()[0]}") from error
        with connection:
            _limit(connection, limits)
            connection.execute("SET preserve_insertion_order = false")
            yield connection
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def work_folder(connection: duckdb.DuckDBPyConnection) -> Path:
    """The folder of a work database."""
    ((path,),) = connection.execute(
        "SELECT path FROM duckdb_databases() WHERE database_name = current_database()"
    ).fetchall()
    return Path(path).parent


def _limit(connection: duckdb.DuckDBPyConnection, limits: Limits) -> None:
    memory = limits.memory
    if memory is None:  # DuckDB's own limit is four fifths of what there is
        ((whole,),) = connection.execute("SELECT current_setting('memory_limit')").fetchall()
        size, unit = whole.split()
        memory = f"{float(size) * 5 / 8} {unit}"
    elif not _MEMORY.fullmatch(memory):
        raise ArgumentError(f"memory_limit is {memory!r}; it must be a size such as 8GB")
    connection.execute(f"SET memory_limit = {literal(memory)}")
    if limits.threads is not None:
        if isinstance(limits.threads, bool) or not isinstance(limits.threads, int) or limits.threads < 1:
            raise ArgumentError(f"threads is {limits.threads!r}; it must be a whole number of at least 1")
        connection.execute(f"SET threads = {limits.threads}")
