"""Runs on disk as they come: a journal that a kill cannot hurt, compacted into Parquet shards."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import duckdb
import yaml

from lutest.reader.errors import ArgumentError, BuildError, ConfigError, SourceError
from lutest.reader.figures import Key
from lutest.reader.names import TEMPORARY_ENDING, literal, quote
from lutest.tablefile.schema import refuse_key_names
from lutest.tablefile.store import held_lock, synced

# Beside the key columns
_COLUMNS = {
    "sample_id": "BIGINT",
    **dict.fromkeys(("prompt_tokens", "vision_tokens", "text_tokens", "output_tokens"), "INTEGER"),
    "ends_with_eos": "BOOLEAN",
    "decode_steps_ms": "DOUBLE[]",
    **dict.fromkeys(("vision_ms", "prefill_ms", "decode_ms", "total_ms", "step_overhead_us"), "DOUBLE"),
    **dict.fromkeys(("workload", "device", "model", "software", "synchronization", "session", "started_at"), "VARCHAR"),
}
_MANIFEST = "profile.yaml"
_LOCK = ".lutest-profile-lock"
_SHARD = re.compile(r"runs-(\d{6})\.(parquet|jsonl)")


class RunStore:
    """A folder of runs that one session at a time adds to.

    Each run is appended to a journal, ``runs-000007.jsonl``, as soon as it is over, so that killing the process loses
    none of them. Every `runs_per_shard` runs, and at the end, the journal becomes ``runs-000007.parquet``: written
    under a temporary name, flushed to the disk, renamed; only then does the journal go. After a power failure the runs
    of the last journal may be missing. Both kinds of file are sources of a build as they stand.

    ``profile.yaml`` holds the settings, which all sessions share, and one record per session.

    Parameters
    ----------
    folder : Path
        Made if it is not there.
    key_columns : sequence of str
        What a configuration is made of.
    settings : mapping
        What must be the same in all sessions; compared with what the folder holds.
    runs_per_shard : int
        Runs in one Parquet file.

    Attributes
    ----------
    recorded : set of tuple
        The runs that there are: the configuration's values, then `sample_id`.

    Raises
    ------
    BuildError
        The folder cannot be written, or another session is at work in it.
    ConfigError
        The folder was begun with other settings, or a key column's name cannot be one.
    """

    def __init__(
        self, folder: Path, key_columns: Sequence[str], settings: Mapping[str, object], runs_per_shard: int
    ) -> None:
        self.folder = folder
        self.key_columns = tuple(key_columns)
        refuse_key_names(self.key_columns)
        for name in self.key_columns:
            if name.lower() in _COLUMNS:
                raise ConfigError(f"{name!r} cannot be a key column of a recorder: every run has a field of that name")
        self.recorded: set[Key] = set()
        self._runs_per_shard = runs_per_shard
        self._journal: BinaryIO | None = None
        self._rows: list[dict[str, Any]] = []
        with _writing(f"{folder}: cannot record runs there"):
            folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as held:
            held.enter_context(held_lock(folder / _LOCK, folder, "another session records runs in this folder"))
            self._manifest = _read_manifest(folder / _MANIFEST, {"key_columns": list(self.key_columns), **settings})
            self._recover()
            self._held = held.pop_all()

    def checked_key(self, key: Key) -> Key:
        """The configuration in plain values.

        Raises
        ------
        ArgumentError
            It is none, cannot be stored, or is a text where the runs before it have a number.
        """
        plain = tuple(map(_plain, key)) if isinstance(key, tuple) else ()
        if len(plain) != len(self.key_columns) or not all(map(_is_value, plain)):
            raise ArgumentError(
                f"{key!r} is no configuration: it is a tuple of {', '.join(self.key_columns)}, each a text or a number"
            )
        for name, value, held in zip(self.key_columns, plain, next(iter(self.recorded), plain), strict=False):
            if isinstance(value, str) is not isinstance(held, str):
                raise ArgumentError(f"{name} is {value!r}, and {held!r} in another run: give texts only, or numbers")
        return plain

    def begin_session(self, session: Mapping[str, object]) -> None:
        """Add the record of a session to the manifest."""
        self._manifest["sessions"].append(dict(session))
        self._write_manifest()

    def end_session(self, outcome: Mapping[str, object]) -> None:
        """Add to the record of the session that was begun last, and write the shard that is left."""
        self._manifest["sessions"][-1].update(outcome)
        self._write_manifest()
        self._compact()

    def append(self, row: dict[str, Any]) -> None:
        """Keep one run, for good once this returns."""
        line = json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        with _writing(f"{self.folder}: cannot write a run"):
            if self._journal is None:
                self._journal = open(self._path("jsonl"), "ab", buffering=0)  # noqa: SIM115  open between runs
            self._journal.write(line)
        self._rows.append(row)
        self.recorded.add((*(row[name] for name in self.key_columns), row["sample_id"]))
        if len(self._rows) >= self._runs_per_shard:
            self._compact()

    def close(self) -> None:
        """Let go of the folder."""
        if self._journal is not None:
            self._journal.close()
        self._held.close()

    def _recover(self) -> None:
        """Clear what a killed session left half done, and see which runs there are."""
        numbers: dict[str, set[int]] = {"parquet": set(), "jsonl": set()}
        for path in self.folder.iterdir():
            if path.name.endswith(TEMPORARY_ENDING):
                path.unlink()
            elif found := _SHARD.fullmatch(path.name):
                numbers[found[2]].add(int(found[1]))
        for self._number in sorted(numbers["jsonl"]):
            if self._number not in numbers["parquet"]:  # else it was killed between the rename and this
                self._rows = _read_journal(self._path("jsonl"))
                if self._rows:
                    self._write_shard()
                    numbers["parquet"].add(self._number)
            self._path("jsonl").unlink()
        self._rows = []
        columns = ", ".join(map(quote, (*self.key_columns, "sample_id")))
        query = f"SELECT {columns} FROM read_parquet(?)"
        try:
            with duckdb.connect() as connection:
                for self._number in sorted(numbers["parquet"]):
                    self.recorded.update(connection.execute(query, [str(self._path("parquet"))]).fetchall())
        except duckdb.Error as error:
            reason = str(error).splitlines()[0]
            raise SourceError(f"{self._path('parquet')}: cannot be read as runs: {reason}") from error
        self._number = max(numbers["parquet"], default=0) + 1

    def _path(self, ending: str) -> Path:
        return self.folder / f"runs-{self._number:06}.{ending}"

    def _compact(self) -> None:
        if not self._rows or self._journal is None:
            return
        self._write_shard()
        self._journal.close()
        self._journal = None
        self._path("jsonl").unlink()
        self._rows = []
        self._number += 1

    def _write_shard(self) -> None:
        types = {name: _stored_type([row[name] for row in self._rows]) for name in self.key_columns} | _COLUMNS
        columns = ", ".join(f"{quote(name)} {type_}" for name, type_ in types.items())
        with _replacing(self._path("parquet")) as temporary, duckdb.connect(config={"threads": 1}) as connection:
            connection.execute(f"CREATE TABLE runs ({columns})")
            one_row = f"({', '.join('?' * len(types))})"
            connection.execute(  # one statement: a statement a row takes milliseconds each
                f"INSERT INTO runs VALUES {', '.join([one_row] * len(self._rows))}",
                [row.get(name) for row in self._rows for name in types],
            )
            connection.execute(f"COPY runs TO {literal(temporary)} (FORMAT parquet, COMPRESSION zstd)")

    def _write_manifest(self) -> None:
        text = yaml.safe_dump(self._manifest, sort_keys=False, allow_unicode=True, width=120)
        with _replacing(self.folder / _MANIFEST) as temporary:
            temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _writing(failure: str) -> Iterator[None]:
    try:
        yield
    except (duckdb.Error, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise BuildError(f"{failure}: {reason}") from error


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A temporary file that takes the place of the target once it is on the disk."""
    temporary = target.with_name(f".{target.name}{TEMPORARY_ENDING}")
    with _writing(f"{target}: cannot be written"):
        yield temporary
        synced(temporary)
        os.replace(temporary, target)
        synced(target.parent)


def _read_manifest(path: Path, settings: Mapping[str, object]) -> dict[str, Any]:
    given = yaml.safe_load(yaml.safe_dump(dict(settings)))
    if not path.exists():
        return {"settings": given, "sessions": []}
    try:
        manifest = yaml.safe_load(path.read_text(encoding="utf-8"))
        held = dict(manifest["settings"])
        sessions = list(manifest["sessions"])
    except (yaml.YAMLError, OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path}: not the record of a profile: {str(error).splitlines()[0]}") from error
    for name in {**held, **given}:
        if held.get(name) != given.get(name):
            raise ConfigError(
                f"{path.parent}: was begun with {name} = {held.get(name)}, not {given.get(name)}; "
                "give the same to go on, or another folder to begin anew"
            )
    return {"settings": held, "sessions": sessions}


def _read_journal(path: Path) -> list[dict[str, Any]]:
    """Runs of a journal; its last line counts only if it was written to its end."""
    runs: list[dict[str, Any]] = []
    try:
        for line in path.read_bytes().split(b"\n")[:-1]:
            run = dict(json.loads(line))
            runs.append(run)
    except (ValueError, TypeError) as error:
        raise SourceError(f"{path}: line {len(runs) + 1} is not a run: {error}") from error
    return runs


def _plain(value: Any) -> Any:
    """A number of NumPy as one of Python's."""
    return value if isinstance(value, (str, bytes)) or not hasattr(value, "item") else value.item()


def _is_value(value: object) -> bool:
    if isinstance(value, str):
        return value.isprintable() and bool(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 2**63


def _stored_type(values: Sequence[object]) -> str:
    if any(isinstance(value, str) for value in values):
        return "VARCHAR"
    return "DOUBLE" if any(isinstance(value, float) for value in values) else "BIGINT"
