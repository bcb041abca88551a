"""Parts that stand beside a table, so that runs can be added to it without the sources of the old ones."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import duckdb

from lutest.reader.errors import BuildError, TableError
from lutest.reader.file import read_figures
from lutest.reader.names import TEMPORARY_ENDING
from lutest.runs.canonical import raw_fields
from lutest.runs.configuration import BuildConfig
from lutest.runs.parts import ENDING, PartOf, part_name
from lutest.tablefile.store import parts_folder, synced

_META = "parts"


@contextlib.contextmanager
def parts_beside(table: Path) -> Iterator[Path]:
    """Folder of a table's parts; what the table at that path does not need is gone before and after."""
    _drop_unneeded(table)
    try:
        yield parts_folder(table)
    finally:
        _drop_unneeded(table)


def _drop_unneeded(table: Path) -> None:
    folder = parts_folder(table)
    if not folder.is_dir():
        return
    try:
        needed = {part.part.name for part in _listed(table, read_figures(table).meta)} if table.exists() else set()
    except TableError:  # of another version, or damaged: who knows what it needs
        return
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.name not in needed and path.name.endswith((ENDING, TEMPORARY_ENDING)):
                path.unlink()
        if not needed:
            folder.rmdir()


def described_parts(connection: duckdb.DuckDBPyConnection, folder: Path) -> dict[str, str]:
    """What ``meta`` says of the parts of a build in their folder, once they are on the disk."""
    rows = connection.execute(
        "SELECT sha256, path, folder, part FROM source_files JOIN source_parts USING (source_id) ORDER BY source_id"
    ).fetchall()
    for *_, part in rows:
        synced(Path(part))
    synced(folder)
    return {_META: json.dumps([[sha256, path, of, Path(part).name] for sha256, path, of, part in rows])}


def _listed(table: Path, meta: Mapping[str, str]) -> list[PartOf]:
    folder = parts_folder(table)
    return [PartOf(sha256, path, of, folder / name) for sha256, path, of, name in json.loads(meta.get(_META, "[]"))]


def earlier_parts(table: Path, meta: Mapping[str, str], settings: BuildConfig) -> list[PartOf]:
    """The parts that a table was built from.

    Raises
    ------
    BuildError
        It was built without keeping them, they are gone, or this version of lutest reads sources otherwise.
    """
    again = f"build it from all runs, `lutest build RUNS -o {table} --keep-parts`"
    parts = _listed(table, meta)
    if not parts:
        raise BuildError(f"{table}: was built without --keep-parts, so nothing can be appended to it; {again}")
    fields = raw_fields(settings.columns)
    for held in parts:
        if held.part.name != part_name(held.sha256, held.folder, fields):
            raise BuildError(f"{table}: its parts were read by another version of lutest; {again}")
        if not held.part.is_file():
            raise BuildError(f"{table}: the part of {held.shown} is gone from {held.part.parent}; {again}")
    return parts
