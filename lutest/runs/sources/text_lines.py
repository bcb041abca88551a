"""Lines of text files, as bytes and as text."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from lutest.reader.errors import SourceError

__all__ = ["decoded", "without_bom"]


def without_bom(stream: BinaryIO) -> Iterator[bytes]:
    """Lines of a file, less a byte order mark of UTF-8."""
    for number, line in enumerate(stream):
        yield line.removeprefix(codecs.BOM_UTF8) if number == 0 else line


def decoded(lines: Iterable[bytes], shown: str) -> Iterator[str]:
    """Lines as text; SourceError with the byte offset where they are not UTF-8."""
    offset = 0
    try:
        for line in lines:
            yield line.decode()
            offset += len(line)
    except UnicodeDecodeError as error:
        where = f"byte offset {offset + error.start}"
        raise SourceError(f"{shown}: not UTF-8 text at {where}: {error.reason}") from None
