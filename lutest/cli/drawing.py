"""Verbs that draw: a table as a page."""

from __future__ import annotations

import argparse
from dataclasses import asdict

import lutest
from lutest.cli.arguments import JSON, TABLE, Answer, argument, verb


@verb(
    "lutest report tables/mine.duckdb -o report.html",
    TABLE,
    argument("-o", "--output", default="report.html", metavar="OUT", help="HTML file to write (default: report.html)"),
    JSON,
)
def report(arguments: argparse.Namespace) -> Answer:
    """Show a table as one HTML page, which needs no network."""
    written = lutest.report(arguments.table, arguments.output)
    size = f"{written.size_bytes / 1024:,.0f} KiB in {written.seconds:.1f} s"
    return Answer(asdict(written), [f"written to {written.output}, {size}"])
