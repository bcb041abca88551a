"""The command line: verbs, exit codes, and errors in one line."""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NoReturn

from lutest.cli import building, calibrating, drawing, judging, reading
from lutest.cli.arguments import Verb
from lutest.cli.printing import one_line, print_json
from lutest.reader import __version__
from lutest.reader.errors import LutestError, LutestWarning

VERBS = {
    held.name: held
    for group in (building, reading, drawing, judging, calibrating)
    for held in vars(group).values()
    if isinstance(held, Verb)
}
_ERROR = 2
_INTERRUPTED = 130  # as shells report a program ended by Ctrl-C
_PIPE_CLOSED = 141  # as shells report a program whose reader went away


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; those of the process if left out.

    Returns
    -------
    int
        Exit code: 0 for success, 1 for a table that `check` finds not to hold or in
        which `diff` finds something slower, 2 for bad input, 130 for an interrupt.

    Raises
    ------
    SystemExit
        The arguments do not parse (code 2), or help was asked for (code 0).
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names and signs that the terminal cannot show
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["--version"]:
        print(f"lutest {__version__}")
        return 0
    if given and given[0] not in VERBS and not given[0].startswith("-"):
        near = get_close_matches(given[0], VERBS, n=1, cutoff=0.5)
        meant = f"did you mean `lutest {near[0]}`?" if near else f"there are {', '.join(VERBS)}"
        return _report_error(f"no command {given[0]!r}; {meant} (see `lutest --help`)")
    verb = VERBS[_parser().parse_args(given[:1]).command]
    arguments = _parser_of(verb).parse_intermixed_args(given[1:])  # options may stand between runs
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", LutestWarning)
            answer = verb.run(arguments)
        for warning in said:
            print(f"lutest: warning: {one_line(warning.message)}", file=sys.stderr)
        if answer is not None and arguments.json:
            print_json(answer.content)
        elif answer is not None:
            print("\n".join(answer.lines))
        sys.stdout.flush()  # a closed pipe shows here, not at exit
    except LutestError as error:
        return _report_error(error)
    except BrokenPipeError:
        _drop_unwritten_output()
        return _PIPE_CLOSED
    except OSError as error:
        _drop_unwritten_output()
        return _report_error(f"{error.filename}: {error.strerror}" if error.filename else error.strerror or error)
    except KeyboardInterrupt:
        return _INTERRUPTED
    return answer.status if answer is not None else 0


def _report_error(message: object) -> int:
    print(f"lutest: error: {one_line(message)}", file=sys.stderr)
    return _ERROR


def _drop_unwritten_output() -> None:
    """Forget output that cannot be written: it would raise again when the interpreter ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Parser(argparse.ArgumentParser):
    """A parser whose errors take one line, as all others do."""

    def error(self, message: str) -> NoReturn:
        _report_error(f"{message} (see `{self.prog} --help`)")
        raise SystemExit(_ERROR)


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {verb.name:<10} {verb.summary}" for verb in VERBS.values())
    parser = _Parser(
        prog="lutest",
        usage="lutest COMMAND …",
        description="Latency tables from profiled runs.",
        epilog=f"commands, each with a --help of its own:\n{listed}\n\nexample:\n  {building.build.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", metavar="COMMAND", choices=VERBS, help=argparse.SUPPRESS)
    return parser


def _parser_of(verb: Verb) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"lutest {verb.name}",
        description=f"{verb.summary}.",
        epilog=f"example:\n  {verb.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for add in verb.add_arguments:
        add(parser)
    return parser
