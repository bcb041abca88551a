"""Exceptions: one tree, each message saying what was wrong, where, and what would be right."""

from __future__ import annotations


class LutestError(Exception):
    """Base of every error that lutest raises on purpose."""


class ConfigError(LutestError):
    """A build configuration is not valid."""


class SourceError(LutestError):
    """A source of runs cannot be read as a whole."""


class BuildError(LutestError):
    """A table cannot be built or written."""


class TableError(LutestError):
    """A file is not a latency table that this version reads, or it is damaged."""


class ArgumentError(LutestError, ValueError):
    """An argument lies outside of what is allowed."""


class UnknownKeyError(LutestError, KeyError):
    """A configuration was not measured, and the table was not told to fill it in."""

    __str__ = Exception.__str__  # KeyError would print the repr of the message


class LutestWarning(UserWarning):
    """What an answer leaves out, or takes for something else than it was called."""


class NoDecodeDataError(LutestError, ValueError):
    """All runs of a configuration have one token, so nothing is known of its decode steps."""
