"""Files of runs, found from paths, folders and glob patterns."""

from __future__ import annotations

import glob
import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from lutest.reader.errors import LutestWarning, SourceError

ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".parquet")
PACKED = ".gz"
_MOST_SHOWN = 10
_OTHERWISE_PACKED = (".bz2", ".xz", ".zst", ".lz4", ".zip")


def list_sources(sources: Sequence[str | os.PathLike[str]], base: Path) -> list[Path]:
    """Find the files that a list of sources stands for.

    Parameters
    ----------
    sources : sequence of path
        Files, folders (searched through and through for the known endings) and glob patterns. What exists
        literally is taken literally.
    base : Path
        Folder that relative sources are relative to.

    Returns
    -------
    list of Path
        Absolute paths in order; a file that is reached in several ways stands there once.

    Raises
    ------
    SourceError
        A source does not exist, matches no file that can be read, or cannot be searched.
    """
    root = Path(os.path.abspath(base))
    unique: dict[tuple[int, int], Path] = {}
    for source in sources:
        for path in _find(source, root):
            try:
                status = path.stat()
            except OSError as error:
                raise unreadable(printable(str(path)), error) from None
            if not stat.S_ISREG(status.st_mode):
                raise SourceError(f"{printable(str(path))}: not a regular file")
            identity = (status.st_dev, status.st_ino)
            unique[identity] = min(unique.get(identity, path), path)
    return sorted(unique.values())


def _find(source: object, root: Path) -> Iterator[Path]:
    if not isinstance(source, (str, os.PathLike)):
        raise SourceError(f"a source of runs is a path or a DataFrame, not {source!r:.80}")
    given = os.fsdecode(source)
    shown = printable(given)
    if not given or "\0" in given:
        raise SourceError(f"{given!r} is not a path of a source of runs")
    path = Path(os.path.abspath(os.path.join(root, given)))
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        if not glob.has_magic(given):
            raise SourceError(f"{shown}: no such file or folder in {printable(str(root))}") from None
        yield from _expand(given, root)
        return
    except OSError as error:
        raise unreadable(shown, error) from None
    if path.is_dir():
        files = _walk(path)
        if not files:
            raise SourceError(f"{shown}: no runs in this folder, which has no file ending in {_endings()}")
        yield from files
        return
    if not _is_read(path.name):
        raise SourceError(f"{shown}: unknown ending {path.suffix!r}; files of runs end in {_endings()}")
    yield path


def _expand(pattern: str, root: Path) -> Iterator[Path]:
    # joining keeps an absolute pattern as it is
    matches = glob.glob(os.path.join(glob.escape(str(root)), pattern), recursive=True)
    files: list[Path] = []
    for match in matches:
        path = Path(os.path.abspath(match))
        if path.is_dir():
            files += _walk(path)
        elif _is_wanted(path.name):
            files.append(path)
    if not files:
        raise SourceError(f"{printable(pattern)}: matches no file that ends in {_endings()}")
    yield from files


def _walk(folder: Path) -> list[Path]:
    """Files of runs in a folder and below; links are followed, each folder is entered once."""

    def refuse(error: OSError) -> None:
        raise unreadable(printable(str(error.filename or folder)), error) from None

    files: list[Path] = []
    entered: set[str] = set()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(parent, name) for name in names if _is_wanted(name)]
        packed = sorted(name for name in names if _is_unread(name))
        if packed:
            named = ", ".join(map(printable, packed[:_MOST_SHOWN])) + (", …" if len(packed) > _MOST_SHOWN else "")
            warnings.warn(
                f"{printable(parent)}: not read, for they are packed: {named}; unpack them, or pack them with gzip",
                LutestWarning,
                stacklevel=2,
            )
    return files


def _is_wanted(name: str) -> bool:
    temporary = name.startswith((".", "~", "#")) or {".tmp", ".temp", ".part"} & set(Path(name.lower()).suffixes)
    return not temporary and _is_read(name)


def plain_name(path: Path) -> Path:
    """The name without the ending of what packed it."""
    return path.with_suffix("") if path.suffix.lower() == PACKED else path


def _is_read(name: str) -> bool:
    ending = plain_name(Path(name)).suffix.lower()
    return ending in ENDINGS and not (ending == ".parquet" and name.lower().endswith(PACKED))


def _is_unread(name: str) -> bool:
    """Whether a name is that of runs, but packed in a way that is not read."""
    path = Path(name.lower())
    return path.with_suffix("").suffix in ENDINGS and path.suffix in (*_OTHERWISE_PACKED, PACKED) and not _is_read(name)


def _endings() -> str:
    return ", ".join(ENDINGS[:-1]) + " or " + ENDINGS[-1] + f" (all but the last also with {PACKED})"


def show_path(path: Path, root: Path) -> str:
    """Path as it is shown to people and stored: relative to the base folder where it lies inside."""
    return storable((path.relative_to(root) if path.is_relative_to(root) else path).as_posix())


def storable(text: str) -> str:
    """Text of a file name, in which bytes that are not UTF-8 stand as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def printable(text: str) -> str:
    """Text on one line."""
    return text if text.isprintable() else repr(text)


def unreadable(shown: str, error: OSError) -> SourceError:
    """Error for a file that the system refuses to read."""
    return SourceError(f"{shown}: cannot be read: {error.strerror or error}")
