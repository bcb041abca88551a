"""The command line: arguments, exit codes, and errors in one line."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from lutest.cli import building, calibrating, judging, reading
from lutest.cli.text_tables import one_line
from lutest.reader.errors import LutestError

__all__ = ["main"]

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
        Exit code: 0 for success, 1 for a table that `check` finds not to hold, 2 for bad input, 130 for an interrupt.

    Raises
    ------
    SystemExit
        The arguments do not parse (code 2), or help was asked for (code 0).
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names and signs that the terminal cannot show
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int | None] = arguments.command
    try:
        status = command(arguments)
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
    return status or 0


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
    parser = _Parser(
        prog="lutest",
        description="Latency tables from profiled runs.",
        epilog="example:\n  lutest build && lutest info tables/olmoe-cpu-direct.duckdb",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, command: Callable[[argparse.Namespace], int | None], summary: str, example: str) -> _Parser:
        added: _Parser = verbs.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(command=command)
        return added

    build = add(
        "build", building.build, "build a table from runs", "lutest build --runs results/ -o tables/mine.duckdb"
    )
    build.add_argument("config", nargs="?", metavar="CONFIG", help="build configuration (tables/build.yaml)")
    build.add_argument("--runs", nargs="+", metavar="PATH", help="files, folders and globs instead of its sources")
    build.add_argument("-o", "--output", metavar="OUT", help="table file instead of its output")
    _add_json(build)

    convert = add(
        "convert", building.convert, "write runs as one Parquet file", "lutest convert results/ -o runs.parquet"
    )
    convert.add_argument("sources", nargs="+", metavar="SOURCE", help="files, folders and globs of runs")
    convert.add_argument("-o", "--output", required=True, metavar="OUT.parquet", help="file to write")
    convert.add_argument("--config", metavar="CONFIG", help="build configuration with their columns and time unit")
    _add_json(convert)

    profile = add(
        "profile",
        building.profile,
        "profile a model with random weights on this machine; the same command goes on where it was interrupted",
        "lutest profile -o results/cpu && lutest build --runs results/cpu -o tables/cpu.duckdb",
    )
    _add_sweep(profile)
    _add_json(profile)

    export = add(
        "export",
        building.export,
        "write a table as plain data: JSON, which can be loaded, or Parquet",
        "lutest export tables/olmoe-cpu-direct.duckdb -o table.json",
    )
    _add_table(export)
    export.add_argument("-o", "--output", required=True, metavar="OUT", help="JSON file, or folder, to write")
    export.add_argument("--parquet", action="store_true", help="write a folder with one Parquet file per table")
    _add_json(export)

    info = add("info", reading.info, "say what a table is and holds", "lutest info tables/olmoe-cpu-direct.duckdb")
    _add_table(info)
    _add_json(info)

    verify = add(
        "verify",
        judging.verify,
        "check every byte and every row of a table",
        "lutest verify tables/olmoe-cpu-direct.duckdb",
    )
    _add_table(verify)
    _add_json(verify)

    evaluate = add(
        "evaluate",
        judging.evaluate,
        "judge a table by runs, best by runs that it was not built from",
        "lutest evaluate tables/mine.duckdb held-out/",
    )
    _add_table(evaluate)
    _add_runs(evaluate)
    _add_json(evaluate)

    diagnose = add(
        "diagnose", judging.diagnose, "say what is wrong with runs before building on them", "lutest diagnose results/"
    )
    _add_runs(diagnose)
    _add_json(diagnose)

    calibrate = add(
        "calibrate",
        calibrating.calibrate,
        "carry a table to another device with few runs",
        "lutest calibrate tables/mine.duckdb new-device/ -o tables/new-device.duckdb",
    )
    _add_table(calibrate)
    _add_runs(calibrate)
    calibrate.add_argument("-o", "--output", required=True, metavar="NEW", help="table file to write")
    _add_json(calibrate)

    plan = add(
        "plan",
        calibrating.plan,
        "propose the runs that make a calibration the least uncertain",
        "lutest plan tables/mine.duckdb -n 25",
    )
    _add_table(plan)
    plan.add_argument("-n", type=int, default=25, metavar="N", help="how many runs (default: 25)")
    _add_json(plan)

    check = add(
        "check",
        calibrating.check,
        "test whether a table still holds for runs; exit code 1 if it does not",
        "lutest check tables/mine.duckdb results-of-today/ || echo profile again",
    )
    _add_table(check)
    _add_runs(check)
    check.add_argument(
        "--false-alarm-rate",
        type=float,
        default=0.01,
        metavar="A",
        help="probability of an alarm though nothing has changed (default: 0.01)",
    )
    check.add_argument(
        "--tolerance",
        type=float,
        default=0.02,
        metavar="T",
        help="how much slower or faster still counts as the same (default: 0.02)",
    )
    _add_json(check)

    lookup = add(
        "lookup",
        reading.lookup,
        "estimate one configuration, part by part",
        "lutest lookup tables/olmoe-cpu-direct.duckdb low 8 16 --prompt-tokens 150 --output-tokens 32 -q 0.95",
    )
    _add_table(lookup)
    lookup.add_argument("tier", metavar="TIER", help="vision-token tier, such as low")
    lookup.add_argument("top_k", type=int, metavar="TOP_K", help="experts per token")
    lookup.add_argument("num_blocks", type=int, metavar="NUM_BLOCKS", help="active transformer blocks")
    _add_prompt_tokens(lookup)
    lookup.add_argument(
        "--output-tokens", type=int, default=1, metavar="N", help="output tokens (default: 1, no decode)"
    )
    lookup.add_argument("--budget-ms", type=float, metavar="B", help="also: how many output tokens fit")
    lookup.add_argument("-q", type=float, default=0.5, metavar="Q", help="quantile of the table (default: 0.5)")
    lookup.add_argument("--missing", choices=("error", "interpolate"), default="error", help="fill in what is not held")
    _add_json(lookup)

    feasible = add(
        "feasible",
        reading.feasible,
        "list configurations that fit a budget",
        "lutest feasible tables/mine.duckdb 500 -q 0.95",
    )
    _add_table(feasible)
    feasible.add_argument("budget_ms", type=float, metavar="BUDGET_MS", help="latency budget of a run, ms")
    _add_prompt_tokens(feasible)
    feasible.add_argument("--output-tokens", type=int, metavar="N", help="known output tokens: totals must fit")
    feasible.add_argument("--prefill-share", type=float, default=0.8, metavar="S", help="of the budget (default: 0.8)")
    feasible.add_argument("-q", type=float, default=0.95, metavar="Q", help="quantile of the table (default: 0.95)")
    feasible.add_argument("--margin", type=float, default=0.0, metavar="M", help="0.1: estimate × 1.1 must fit")
    _add_json(feasible)

    sql = add(
        "sql",
        reading.sql,
        "query a table with SQL, read-only and without access to anything else",
        'lutest sql tables/mine.duckdb "SELECT tier, prefill_ms(tier, top_k, num_blocks, 200, 0.95) FROM configs"',
    )
    _add_table(sql)
    sql.add_argument("query", nargs="?", default="-", metavar="QUERY", help="SQL; from standard input if - or left out")
    form = sql.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--csv", action="store_true", help="print CSV")
    sql.add_argument("--unsafe", action="store_true", help="let the query read and write files, and load extensions")
    sql.add_argument("--memory-limit", metavar="SIZE", help="the most memory to use, such as 500MB")
    sql.add_argument("--threads", type=int, metavar="N", help="the most threads to use")
    sql.add_argument("--timeout", type=float, metavar="SECONDS", help="stop the query after this time")
    return parser


def _add_table(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", metavar="TABLE", help="table file")


def _add_runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="files, folders and globs of runs")
    parser.add_argument("--config", metavar="CONFIG", help="build configuration with their columns and time unit")


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="folder of the runs")
    parser.add_argument("--preset", default="cpu", metavar="NAME", help="tiny, cpu (default), cpu-wide or molmoe-1b")
    parser.add_argument("--tiers", type=_texts, metavar="LIST", help="such as low,medium (default: the preset's)")
    parser.add_argument("--top-k", type=_integers, metavar="LIST", help="such as 4,8 (default: the preset's)")
    parser.add_argument("--blocks", type=_integers, metavar="LIST", help="such as 12,16 (default: the preset's)")
    parser.add_argument(
        "--output-lengths",
        metavar="LENGTHS",
        help="tokens with weights, such as 1:8,2:30,16, or a table file to take them from (default: the preset's)",
    )
    parser.add_argument("--runs", type=int, default=150, metavar="N", help="runs of a configuration (default: 150)")
    parser.add_argument("--minutes", type=float, metavar="M", help="stop after this time, the rest still to do")
    parser.add_argument("--warmup", type=int, default=1, metavar="N", help="warm-ups of a configuration (default: 1)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of order, requests and weights (default: 0)")
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu (default), cuda, cuda:1 …")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch (default: 1 on the CPU)")
    parser.add_argument(
        "--synchronization",
        choices=("none", "synchronize", "events"),
        help="how stages are timed (default: none on the CPU, CUDA events on CUDA)",
    )


def _texts(given: str) -> list[str]:
    return [part.strip() for part in given.split(",")]


def _integers(given: str) -> list[int]:
    try:
        return [int(part) for part in given.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{given!r} is no list of whole numbers, such as 4,8") from None


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_prompt_tokens(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt-tokens", type=int, metavar="P", help="vision + text tokens (default: as measured)")
