"""Runs on disk as they come: a journal that a kill cannot hurt, compacted into Parquet shards."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import duckdb
import yaml

from lutest.reader.errors import BuildError, ConfigError, SourceError

try:
    import fcntl
except ImportError:  # Windows: two sessions in one folder are not kept apart
    fcntl = None  # type: ignore[assignment]

__all__ = ["RunKey", "RunStore"]

# (tier, top_k, num_blocks, sample_id)
RunKey = tuple[str, int, int, int]

_COLUMNS = {
    "workload": "VARCHAR",
    "sample_id": "BIGINT",
    "tier": "VARCHAR",
    "top_k": "INTEGER",
    "num_blocks": "INTEGER",
    "prompt_tokens": "INTEGER",
    "vision_tokens": "INTEGER",
    "text_tokens": "INTEGER",
    "output_tokens": "INTEGER",
    "ends_with_eos": "BOOLEAN",
    "vision_ms": "DOUBLE",
    "prefill_ms": "DOUBLE",
    "decode_ms": "DOUBLE",
    "decode_steps_ms": "DOUBLE[]",
    "total_ms": "DOUBLE",
    "device": "VARCHAR",
    "model": "VARCHAR",
    "software": "VARCHAR",
    "synchronization": "VARCHAR",
    "step_overhead_us": "DOUBLE",
    "session": "VARCHAR",
    "started_at": "VARCHAR",
}
_MANIFEST = "profile.yaml"
_LOCK = ".lutest-profile-lock"
_SHARD = re.compile(r"runs-(\d{6})\.(parquet|jsonl)")
_TEMPORARY_ENDING = ".lutest-tmp"


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
    settings : mapping
        What must be the same in all sessions; compared with what the folder holds.
    runs_per_shard : int
        Runs in one Parquet file.

    Raises
    ------
    BuildError
        The folder cannot be written, or another session is at work in it.
    ConfigError
        The folder was begun with other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object], runs_per_shard: int) -> None:
        self.folder = folder
        self.recorded: set[RunKey] = set()
        self._runs_per_shard = runs_per_shard
        self._journal: BinaryIO | None = None
        self._rows: list[dict[str, Any]] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(folder / _LOCK, "ab")  # noqa: SIM115  held until the store is closed
        except OSError as error:
            raise BuildError(f"{folder}: cannot record runs there: {error.strerror or error}") from error
        try:
            self._take_lock()
            self._manifest = _read_manifest(folder / _MANIFEST, settings)
            self._recover()
        except BaseException:
            self._lock.close()
            raise

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
        try:
            if self._journal is None:
                self._journal = open(self._path("jsonl"), "ab", buffering=0)  # noqa: SIM115  open between runs
            self._journal.write(line)
        except OSError as error:
            raise BuildError(f"{self.folder}: cannot write a run: {error.strerror or error}") from error
        self._rows.append(row)
        self.recorded.add(_run_key(row))
        if len(self._rows) >= self._runs_per_shard:
            self._compact()

    def close(self) -> None:
        """Let go of the folder."""
        if self._journal is not None:
            self._journal.close()
        self._lock.close()

    def _take_lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BuildError(f"{self.folder}: another session records runs in this folder") from error
        except OSError:
            return  # a file system without locks

    def _recover(self) -> None:
        """Clear what a killed session left half done, and see which runs there are."""
        numbers: dict[str, set[int]] = {"parquet": set(), "jsonl": set()}
        for path in sorted(self.folder.iterdir()):
            if path.name.endswith(_TEMPORARY_ENDING):
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
        self._number = max(numbers["parquet"], default=0) + 1
        for number in sorted(numbers["parquet"]):
            self.recorded |= _read_keys(self.folder / f"runs-{number:06}.parquet")

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
        temporary = self.folder / f".runs-{self._number:06}.parquet{_TEMPORARY_ENDING}"
        columns = ", ".join(f"{name} {type_}" for name, type_ in _COLUMNS.items())
        try:
            with duckdb.connect(config={"threads": 1}) as connection:
                connection.execute(f"CREATE TABLE runs ({columns})")
                one_row = f"({', '.join('?' * len(_COLUMNS))})"
                connection.execute(  # one statement: a statement a row takes milliseconds each
                    f"INSERT INTO runs VALUES {', '.join([one_row] * len(self._rows))}",
                    [row.get(name) for row in self._rows for name in _COLUMNS],
                )
                name = str(temporary).replace("'", "''")
                connection.execute(f"COPY runs TO '{name}' (FORMAT parquet, COMPRESSION zstd)")
            _put(temporary, self._path("parquet"))
        except (duckdb.Error, OSError) as error:
            raise BuildError(f"{self._path('parquet')}: cannot be written: {str(error).splitlines()[0]}") from error

    def _write_manifest(self) -> None:
        temporary = self.folder / f".{_MANIFEST}{_TEMPORARY_ENDING}"
        try:
            temporary.write_text(
                yaml.safe_dump(self._manifest, sort_keys=False, allow_unicode=True, width=120), encoding="utf-8"
            )
            _put(temporary, self.folder / _MANIFEST)
        except OSError as error:
            raise BuildError(f"{self.folder}: cannot write {_MANIFEST}: {error.strerror or error}") from error


def _put(temporary: Path, target: Path) -> None:
    """Rename a file once it is on the disk."""
    with temporary.open("rb+") as stream:
        os.fsync(stream.fileno())
    os.replace(temporary, target)
    with contextlib.suppress(OSError):  # systems that cannot open folders
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


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
    whole = path.read_bytes().split(b"\n")[:-1]
    return [_parse(line, number, path) for number, line in enumerate(whole, 1)]


def _parse(line: bytes, number: int, path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError) as error:
        raise SourceError(f"{path}: line {number} is not a run: {error}") from error


def _read_keys(path: Path) -> set[RunKey]:
    try:
        with duckdb.connect() as connection:
            rows = connection.execute(
                "SELECT tier, top_k, num_blocks, sample_id FROM read_parquet(?)", [str(path)]
            ).fetchall()
    except duckdb.Error as error:
        raise SourceError(f"{path}: cannot be read as runs: {str(error).splitlines()[0]}") from error
    return {(row[0], row[1], row[2], row[3]) for row in rows}


def _run_key(row: Mapping[str, Any]) -> RunKey:
    return row["tier"], row["top_k"], row["num_blocks"], row["sample_id"]
