"""Verbs that draw: a table as a page, or one picture of it."""

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


@verb(
    "lutest plot tables/mine.duckdb decode -o decode.svg",
    TABLE,
    argument("chart", choices=("prefill", "decode", "budget", "frontier", "coverage"), help="what to draw"),
    argument("-o", "--output", required=True, metavar="OUT", help="SVG or PNG file to write"),
    argument("--budget-ms", type=float, metavar="B", help="of `budget` (default: half of the configurations fit)"),
    argument("--prompt-tokens", type=int, metavar="P", help="of `budget` and `frontier` (default: as measured)"),
    argument("--output-tokens", type=int, metavar="N", help="of the same: totals decide (default: prefill does)"),
    argument("-q", type=float, default=0.95, metavar="Q", help="quantile that decides (default: 0.95)"),
    argument("--runs", nargs="+", default=[], metavar="RUNS", help="of `coverage`: files, folders, globs of runs"),
    add_reading,
    JSON,
)
def plot(arguments: argparse.Namespace) -> Answer:
    """Draw one picture of a table."""
    charts, table, chart, q = lutest.charts, arguments.table, arguments.chart, arguments.q
    lengths = {"prompt_tokens": arguments.prompt_tokens, "output_tokens": arguments.output_tokens}
    if chart == "coverage":
        runs, config = given_runs(arguments)
        drawn = charts.coverage(table, runs, q=q, config=config)
    elif chart == "budget":
        drawn = charts.budget(table, arguments.budget_ms, q=q, **lengths)
    elif chart == "frontier":
        drawn = charts.frontier(table, q=q, **lengths)
    else:
        drawn = charts.prefill(table) if chart == "prefill" else charts.decode(table)
    charts.save(drawn, arguments.output)
    return Answer({"output": arguments.output, "chart": chart}, [f"written to {arguments.output}"])
