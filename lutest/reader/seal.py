"""The seal: checksums at the end of a table file over every byte before it, checked before DuckDB parses any of them.

DuckDB checks a checksum per block, which a whole block in the wrong place passes, and then may crash on it. It ignores
what follows its last block, and writes over it if it ever changes the file.
"""

from __future__ import annotations

import hashlib
import os
from typing import BinaryIO

from lutest.reader.errors import TableError
from lutest.reader.names import REBUILD

_HEADER_BYTES = 3 * 4096  # DuckDB's headers, of which it rewrites one whenever it changes a file
_CHUNK_BYTES = 1 << 20
_MAGIC = b"\nlutest seal 1 "
_SEAL_BYTES = len(_MAGIC) + 64 + 1 + 64 + 1


def write_seal(path: str | os.PathLike[str]) -> None:
    """Append the seal to a finished file."""
    with open(path, "r+b") as file:
        seal = _seal(file, os.fstat(file.fileno()).st_size)
        file.seek(0, os.SEEK_END)
        file.write(seal)


def check_seal(path: str | os.PathLike[str], *, required: bool) -> None:
    """Check the seal of a file.

    Parameters
    ----------
    path : str or path-like
        A table file.
    required : bool
        Refuse a file without a seal, and one that DuckDB has changed since it was sealed. Otherwise they pass.

    Raises
    ------
    TableError
        The file cannot be read, or is not what was sealed.
    """
    name = os.fspath(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size - _SEAL_BYTES
            file.seek(max(size, 0))
            found = file.read(_SEAL_BYTES)
            sealed = size >= _HEADER_BYTES and found.startswith(_MAGIC)
            expected = _seal(file, size) if sealed else b""
    except OSError as error:
        raise TableError(f"{name}: cannot be read: {error.strerror}") from error
    if found == expected:
        return
    headers = slice(len(_MAGIC), len(_MAGIC) + 64)
    if not sealed:
        problem = "does not end in the seal of `lutest build`: cut off, or changed by another program"
    elif found[headers] != expected[headers]:
        problem = "changed since `lutest build` sealed it"
    else:
        raise TableError(f"{name}: damaged: its bytes are not those that `lutest build` sealed; {REBUILD}")
    if required:
        raise TableError(f"{name}: {problem}; {REBUILD}")


def _seal(file: BinaryIO, size: int) -> bytes:
    """Seal of the first `size` bytes."""
    file.seek(0)
    everything = hashlib.sha256(headers := file.read(_HEADER_BYTES))
    left = size - len(headers)
    while left > 0 and (chunk := file.read(min(left, _CHUNK_BYTES))):
        everything.update(chunk)
        left -= len(chunk)
    return b"%s%s %s\n" % (_MAGIC, hashlib.sha256(headers).hexdigest().encode(), everything.hexdigest().encode())
