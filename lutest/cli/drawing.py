"""Verbs that draw: a table as a page."""

from __future__ import annotations

import argparse
from dataclasses import asdict

import lutest
from lutest.cli.arguments import JSON, TABLE, Answer, add_reading, argument, given_runs, verb
from lutest.cli.printing import working


@verb(
    "lutest report tables/mine.duckdb -o report.html",
    TABLE,
    argument("--runs", nargs="+", default=[], metavar="RUNS", help="runs to judge the table by: files, folders, globs"),
    add_reading,
    argument("--against", metavar="OTHER", help="older table, to show what changed since"),
    argument("-o", "--output", default="report.html", metavar="OUT", help="HTML file to write (default: report.html)"),
    JSON,
)
def report(arguments: argparse.Namespace) -> Answer:
    """Show a table as one HTML page, which needs no network."""
    runs, config = given_runs(arguments) if arguments.runs or arguments.config else (None, None)
    with working() as progress:
        written = lutest.report(
            arguments.table, arguments.output, runs=runs, against=arguments.against, config=config, progress=progress
        )
    size = f"{written.size_bytes / 1024:,.0f} KiB in {written.seconds:.1f} s"
    return Answer(asdict(written), [f"written to {written.output}, {size}"])
