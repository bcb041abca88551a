"""Runs out of JSON files of any size: a sliding window of text, one value decoded at a time."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from lutest.reader.errors import SourceError

RESULTS = "per_sample_results"
CHUNK_BYTES = 1 << 20
WHOLE_ELEMENT_LIMIT = 16 << 20  # characters; a longer configuration within an array is read field by field

_BLANK = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()
_PAIRS_DECODER = json.JSONDecoder(object_pairs_hook=list)
_LONGEST_LITERAL = len("-Infinity")
_LONGEST_ESCAPE = len(r"\ud800\udc00")


@dataclass
class Configuration:
    """The header that runs share.

    While a `streamed` one is read, `header` and `names` still grow: fields may stand after the runs.
    """

    header: dict[str, object] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    streamed: bool = False


class _LongerThanLimitError(Exception):
    """A value does not end within the number of characters allowed."""


class JsonText:
    """A window that slides over UTF-8 encoded JSON.

    Parameters
    ----------
    stream : BinaryIO
        Where the bytes come from.
    name : str
        The file, for messages.
    chunk_bytes : int
        Bytes to read at a time; more where a single value is longer.
    """

    def __init__(self, stream: BinaryIO, name: str, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._stream = stream
        self._name = name
        self._chunk_bytes = chunk_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self._position = 0
        self._value_start = 0  # of the value that was decoded last
        self._bytes_dropped = 0  # before the window
        self._bytes_read = 0
        self._ended = False

    def peek(self) -> str:
        """Skip blanks; the next character, or ``""`` at the end of the file."""
        while True:
            blank = _BLANK.match(self._text, self._position)
            if blank is not None:
                self._position = blank.end()
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._fill():
                return ""

    def value(self, limit: int | None = None) -> object:
        """Decode the next value as a whole.

        Raises
        ------
        SourceError
            The value is malformed, cut off or nested too deeply.
        _LongerThanLimitError
            The value takes more than `limit` characters; nothing of it is consumed.
        """
        if not self.peek():
            raise self.fault("the file ends where a value is due")
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                if self._may_be_cut(error):
                    if limit is not None and len(self._text) - self._position > limit:
                        raise _LongerThanLimitError from None
                    if self._fill():
                        continue
                raise self.fault(_cause(error, len(self._text)), error.pos) from None
            except RecursionError:
                raise self.fault("values are nested too deeply") from None
            except ValueError as error:  # an integer of thousands of digits
                raise self.fault(str(error).split(";")[0]) from None
            # "1." and "1e-" decode as 1: a number is sure only when something stands well behind it
            if end + 3 > len(self._text) and self._text[self._position] in "-0123456789" and self._fill():
                continue
            self._value_start, self._position = self._position, end
            return value

    def gives_twice(self, name: str) -> bool:
        """Whether the object just decoded has a field twice: of the two, it holds the last."""
        if self._text.count(name, self._value_start, self._position) < 2:
            return False
        pairs, _ = _PAIRS_DECODER.raw_decode(self._text, self._value_start)
        return [key for key, _ in pairs].count(name) > 1

    def elements(self) -> Iterator[None]:
        """Step through an array; the caller takes one value at each step."""
        self._take("[")
        if self.peek() == "]":
            self._take("]")
            return
        while True:
            yield
            if self.peek() == "]":
                self._take("]")
                return
            self._take(",", "',' or ']'")

    def members(self) -> Iterator[str]:
        """Step through an object; the caller takes one value at each key."""
        self._take("{")
        if self.peek() == "}":
            self._take("}")
            return
        while True:
            if self.peek() != '"':
                raise self.fault(f"expected a field name in double quotes, not {self._found()}")
            key = self.value()
            self._take(":")
            yield str(key)
            if self.peek() == "}":
                self._take("}")
                return
            self._take(",", "',' or '}'")

    def skip(self) -> None:
        """Pass over the next value; an array is not held as a whole."""
        if self.peek() == "[":
            for _ in self.elements():
                self.value()
        else:
            self.value()

    def fault(self, cause: str, position: int | None = None) -> SourceError:
        """Error that names the file and the byte offset of `position`, by default of the next character."""
        before = self._text[: self._position if position is None else position]
        offset = self._bytes_dropped + _utf8_length(before)
        return SourceError(f"{self._name}: not valid JSON at byte offset {offset}: {cause}")

    def _take(self, mark: str, expected: str | None = None) -> None:
        if self.peek() != mark:
            raise self.fault(f"expected {expected or repr(mark)}, not {self._found()}")
        self._position += 1

    def _found(self) -> str:
        mark = self.peek()
        return repr(mark) if mark else "the end of the file"

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        near_end = error.pos >= len(self._text) - max(_LONGEST_LITERAL, _LONGEST_ESCAPE)
        return near_end or error.msg.startswith("Unterminated string")

    def _fill(self) -> bool:
        """Read more, as much again as is held: long values are re-read seldom. Drop what is consumed.

        False at the end of the file; then the window stays where it is.
        """
        if self._ended:
            return False
        data = self._stream.read(max(self._chunk_bytes, len(self._text) - self._position))
        self._ended = not data
        if self._bytes_read == 0:
            data += self._stream.read(len(codecs.BOM_UTF8))
            if data.startswith(codecs.BOM_UTF8):
                data = data[len(codecs.BOM_UTF8) :]
                self._bytes_dropped = self._bytes_read = len(codecs.BOM_UTF8)
        pending = len(self._decoder.getstate()[0])
        try:
            more = self._decoder.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            offset = self._bytes_read - pending + error.start
            raise SourceError(f"{self._name}: not UTF-8 text at byte offset {offset}: {error.reason}") from None
        if self._ended:
            return False
        self._bytes_read += len(data)
        self._bytes_dropped += _utf8_length(self._text[: self._position])
        self._text = self._text[self._position :] + more
        self._position = 0
        return True


def read_runs(text: JsonText, wanted: Collection[str]) -> Iterator[tuple[Configuration, object]]:
    """Step through the runs of a JSON file.

    A file holds an object with ``per_sample_results``, an array of those, an array of runs, or a single run.

    Parameters
    ----------
    text : JsonText
        The file.
    wanted : collection of str
        Header fields to keep.

    Yields
    ------
    configuration : Configuration
        The header that the run belongs to.
    run : object
        The run: an object, unless the file is at fault there.

    Raises
    ------
    SourceError
        The file is malformed as a whole.
    """
    mark = text.peek()
    if mark == "{":
        yield from _stream_configuration(text, wanted)
    elif mark == "[":
        loose = Configuration()
        for _ in text.elements():
            try:
                element = text.value(WHOLE_ELEMENT_LIMIT if text.peek() == "{" else None)
            except _LongerThanLimitError:
                yield from _stream_configuration(text, wanted)
                continue
            if not isinstance(element, dict) or RESULTS not in element:
                yield loose, element
                continue
            runs = element[RESULTS]
            if not isinstance(runs, list):
                raise text.fault(f"{RESULTS} is not a list of runs")
            if text.gives_twice(RESULTS):
                raise text.fault(f"{RESULTS} is given twice in one object")
            header = {key: element[key] for key in wanted if key in element}
            configuration = Configuration(header, [key for key in element if key != RESULTS])
            for run in runs:
                yield configuration, run
    else:
        raise text.fault(f"expected an object or an array of runs, not {repr(mark) if mark else 'blanks alone'}")
    if text.peek():
        raise text.fault("more follows after the end of the value; name a file of one object a line .jsonl")


def _stream_configuration(text: JsonText, wanted: Collection[str]) -> Iterator[tuple[Configuration, object]]:
    configuration = Configuration(streamed=True)
    header = configuration.header
    found = False
    for key in text.members():
        if key == RESULTS:
            if found:
                raise text.fault(f"{RESULTS} is given twice in one object")
            found = True
            if text.peek() != "[":
                raise text.fault(f"{RESULTS} is not a list of runs")
            for _ in text.elements():
                yield configuration, text.value()
            continue
        configuration.names.append(key)
        if key not in wanted:
            text.skip()
        elif found and key in header:
            raise text.fault(f"the field {key!r} is given twice, before and after {RESULTS}")
        else:
            header[key] = text.value()
    if not found:
        yield Configuration(), header


def _cause(error: json.JSONDecodeError, length: int) -> str:
    cause = error.msg[:1].lower() + error.msg[1:]
    if error.pos >= length or error.msg.startswith("Unterminated string"):
        return f"the file ends within a value ({cause})"
    return cause


def _utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
