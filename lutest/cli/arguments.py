"""What verbs share: how they are listed, arguments for runs and keys, and how these are read."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lutest.judging.finding import count
from lutest.reader.errors import ArgumentError

if TYPE_CHECKING:
    from lutest.reader.figures import Key, KeyColumn
    from lutest.reader.table import LatencyTable
    from lutest.runs.configuration import BuildConfig

AddArguments = Callable[[argparse.ArgumentParser], object]


class Answer(NamedTuple):
    """What a command found: plain values for JSON, lines for people, and the exit code."""

    content: object
    lines: Sequence[str]
    status: int = 0


Run = Callable[[argparse.Namespace], "Answer | None"]


class Verb(NamedTuple):
    """A command; `run` returns None where it has printed its answer itself."""

    name: str
    summary: str
    example: str
    add_arguments: tuple[AddArguments, ...]
    run: Run


def verb(example: str, *add_arguments: AddArguments) -> Callable[[Run], Verb]:
    """Make a function the command of its name, which does what the docstring says."""

    def made(run: Run) -> Verb:
        return Verb(run.__name__, (run.__doc__ or "").rstrip("."), example, add_arguments, run)

    return made


# Adds one argument, as `argparse.ArgumentParser.add_argument` takes it.
argument = partial(methodcaller, "add_argument")


def add_runs(parser: argparse.ArgumentParser) -> None:
    """Adds runs, and how they are read."""
    runs = "files, folders and globs of runs (default: those of the configuration)"
    parser.add_argument("runs", nargs="*", metavar="RUNS", help=runs)
    add_reading(parser)


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Adds how runs are read."""
    option = "one option of it, such as columns.tier.constant=low"
    parser.add_argument("--config", metavar="FILE", help="build configuration, such as tables/build.yaml")
    parser.add_argument("--set", dest="options", action="append", default=[], metavar="NAME=VALUE", help=option)


TABLE = argument("table", metavar="TABLE", help="table file")
TEXT_TOKENS = argument(
    "--text-tokens", type=int, metavar="T", help="text alone: each configuration adds the vision tokens of its runs"
)
JSON = argument("--json", action="store_true", help="print JSON")


def given_runs(arguments: argparse.Namespace) -> tuple[list[str | Path], BuildConfig | None]:
    """Sources of runs, and how to read them where something is said of it.

    Plain arguments win over the configuration. Where there is neither, it is ``tables/build.yaml``, but for verbs that
    hold runs against a table: they read them as the table was built.
    """
    from lutest.runs.configuration import DEFAULT_CONFIG, with_options

    runs, config = list(arguments.runs), arguments.config
    files = [run for run in runs if run.lower().endswith((".yaml", ".yml"))]
    if files and (len(runs) > 1 or config is not None):
        raise ArgumentError(f"{files[0]}: a build configuration, not runs; write --config {files[0]}")
    if files:
        runs, config = [], files[0]
    has_table = hasattr(arguments, "table")
    if not runs and config is None:
        if has_table or not DEFAULT_CONFIG.exists():
            missing = "no runs" if has_table else f"no runs, and no {DEFAULT_CONFIG} here"
            raise ArgumentError(f"{missing}: name files or folders of runs, or a configuration with --config FILE")
        config = DEFAULT_CONFIG
    settings = None
    if config is not None or arguments.options:
        base = _own_options(arguments.table) if config is None and has_table else config
        settings = with_options(base, arguments.options)
        runs = runs or [settings.base / source for source in settings.sources]
    if not runs:
        raise ArgumentError(f"{config}: has no `sources`; name files or folders of runs beside it")
    return runs, settings


def _own_options(path: str) -> Mapping[str, object]:
    """Key, columns and time unit that a table was built with, as options of a configuration."""
    import lutest
    from lutest.runs.configuration import config_of_meta

    own = config_of_meta(lutest.load(path).meta)
    columns = {
        name: list(rule.alternatives[0]) if rule.constant is None else {"constant": rule.constant}
        for name, rule in own.columns.items()
        if rule.constant is not None or len(rule.alternatives) == 1
    }
    return {"key": dict(own.key), "columns": columns, "time_unit": own.time_unit}


def given_key(table: LatencyTable, values: Sequence[str]) -> Key:
    """The configuration that is written as plain arguments, one for each key column of the table."""
    columns = table.figures.key_columns
    if len(values) != len(columns):
        raise ArgumentError(
            f"{count(len(values), 'value')} of a configuration of {count(len(columns), 'column')}: give "
            f"{' '.join(column.name.upper() for column in columns)}, such as {' '.join(map(str, table.keys[0]))}"
        )
    return tuple(map(_typed, columns, values, table.keys[0]))


def given_prompt_tokens(table: LatencyTable, text: str | None) -> Any:
    """Prompt lengths: a number, or one for each value of a key column: ``low=150,high=510``, ``users:1=99,64=200``."""
    if text is None or "=" not in text:
        return text and _whole(text)
    column, _, rest = text.partition(":")
    if column not in table.key_columns:
        column, rest = "", text
    held = {str(value): value for key in table.keys for value in key}
    tokens = {
        held.get(value, value): _whole(number) for value, _, number in (p.rpartition("=") for p in rest.split(","))
    }
    fitting = [name for i, name in enumerate(table.key_columns) if tokens.keys() & {key[i] for key in table.keys}]
    if not column and len(fitting) > 1:
        raise ArgumentError(
            f"--prompt-tokens {text} fits {' and '.join(fitting)}: name the column, as {fitting[0]}:{text}"
        )
    return {column or fitting[0]: tokens} if column or fitting else tokens


def _typed(column: KeyColumn, text: str, example: object) -> str | float:
    try:
        return text if column.kind == "category" else float(text)
    except ValueError:
        raise ArgumentError(f"{column.name} is {text!r}; it is a number in this table, such as {example}") from None


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ArgumentError(
            f"--prompt-tokens has {text!r} for a number of tokens; write 150, or one for each value of a key column, "
            "such as low=150,high=510"
        ) from None
