"""Verbs that write files: runs, tables, and tables as plain data."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import lutest
from lutest.cli.arguments import JSON, TABLE, Answer, add_runs, argument, given_runs, verb
from lutest.cli.printing import format_table, run_bar, working
from lutest.cli.reading import count_runs, format_key_table
from lutest.judging.finding import count
from lutest.tablefile.description import describe

if TYPE_CHECKING:
    from lutest.builder.build import BuildSummary

_MOST_SOURCES_SHOWN = 20


_LIMITS = (
    argument("--memory-limit", metavar="SIZE", help="such as 8GB (default: half of the machine's)"),
    argument("--threads", type=int, metavar="N", help="of the work database (default: all processors)"),
    argument("--temp-dir", metavar="FOLDER", help="where the work database lies (default: beside the table)"),
)


def _limits(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("memory_limit", "threads", "temp_dir")}


@verb(
    "lutest build results/ -o tables/mine.duckdb && lutest info tables/mine.duckdb",
    add_runs,
    argument("-o", "--output", metavar="TABLE", help="table file to write"),
    argument("--mixed", action="store_true", help="mix runs of several models or devices on purpose"),
    argument("--skip-broken", action="store_true", help="build without files that cannot be read"),
    argument("--implausible", action="store_true", help="build though times look wrongly mapped, or in another unit"),
    argument("--keep-parts", action="store_true", help="leave what was read in TABLE.parts, for `lutest append`"),
    *_LIMITS,
    JSON,
)
def build(arguments: argparse.Namespace) -> Answer:
    """Build a table from runs."""
    runs, config = given_runs(arguments)
    with working() as progress:
        summary = lutest.build(
            config,
            runs=runs,
            output=arguments.output,
            mixed=arguments.mixed,
            implausible=arguments.implausible,
            skip_broken=arguments.skip_broken,
            keep_parts=arguments.keep_parts,
            **_limits(arguments),
            progress=progress,
        )
    return _built(summary)


@verb(
    "lutest append tables/mine.duckdb results/today",
    TABLE,
    argument("runs", nargs="+", metavar="RUNS", help="files, folders and globs of further runs"),
    *_LIMITS,
    JSON,
)
def append(arguments: argparse.Namespace) -> Answer:
    """Add runs to a table that was built with --keep-parts."""
    with working() as progress:
        return _built(lutest.append(arguments.table, arguments.runs, **_limits(arguments), progress=progress))


def _built(summary: BuildSummary) -> Answer:
    table = lutest.load(summary.output)
    keys = describe(table)["keys"]
    content = {**asdict(summary), "keys": keys}
    shown = [tuple(source.values())[:4] for source in content["sources"][:_MOST_SOURCES_SHOWN]]
    lines = [format_table(("source", "read", "used", "rejected"), shown)]
    if len(summary.sources) > len(shown):
        lines.append(f"… {count(len(summary.sources), 'source')} in all: {count_runs(content['sources'])}")
    lines += [f"  not read: {source['problem']}" for source in content["sources"] if source["problem"]]
    lines += [f"  {count(n, 'run')} rejected: {reason}" for reason, n in summary.rejected.items()]
    if summary.n_clamped:
        lines.append(f"  {count(summary.n_clamped, 'run')} clamped at zero decode: kept as censored from below")
    if summary.n_kept_beyond_fences:
        kept = count(summary.n_kept_beyond_fences, "run")
        lines.append(f"  {kept} beyond the outlier fences: kept, for several of a kind are a tail")
    written = f"written to {summary.output} in {summary.seconds:.1f} s, content hash {summary.content_hash}"
    return Answer(content, [*lines, "", format_key_table(table.key_columns, keys, upper=False), "", written])


@verb(
    "lutest convert results/ -o runs.parquet",
    add_runs,
    argument("-o", "--output", required=True, metavar="OUT.parquet", help="file to write"),
    JSON,
)
def convert(arguments: argparse.Namespace) -> Answer:
    """Write runs as one Parquet file."""
    runs, config = given_runs(arguments)
    with working() as progress:
        summary = lutest.convert(runs, arguments.output, config=config, progress=progress)
    written = (
        f"{count(summary.rows, 'run')} written to {summary.output} in {summary.seconds:.1f} s, "
        f"{summary.size_bytes / 1024:,.0f} KiB, columns {', '.join(summary.columns)}"
    )
    problems = [f"  {count(n, 'run')} that a build will reject: {reason}" for reason, n in summary.problems.items()]
    return Answer(asdict(summary), [*problems, written])


@verb(
    "lutest export tables/mine.duckdb -o table.json",
    TABLE,
    argument("-o", "--output", required=True, metavar="OUT", help="JSON file, or folder, to write"),
    argument("--parquet", action="store_true", help="write a folder with one Parquet file per table"),
    JSON,
)
def export(arguments: argparse.Namespace) -> Answer:
    """Write a table as plain data: JSON, which can be loaded, or Parquet."""
    summary = lutest.export(arguments.table, arguments.output, parquet=arguments.parquet)
    written = f"{count(sum(summary.rows.values()), 'row')} of {len(summary.rows)} tables written to {summary.output}"
    return Answer(asdict(summary), [written])


def _texts(given: str) -> list[str]:
    return [part.strip() for part in given.split(",")]


def _integers(given: str) -> list[int]:
    try:
        return [int(part) for part in given.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{given!r} is no list of whole numbers, such as 4,8") from None


@verb(
    "lutest profile -o results/cpu && lutest build results/cpu -o tables/cpu.duckdb",
    argument("-o", "--output", required=True, metavar="FOLDER", help="folder of the runs"),
    argument("--preset", default="cpu", metavar="NAME", help="tiny, cpu (default), cpu-wide or molmoe-1b"),
    argument("--tiers", type=_texts, metavar="LIST", help="such as low,medium (default: the preset's)"),
    argument("--top-k", type=_integers, metavar="LIST", help="such as 4,8 (default: the preset's)"),
    argument("--blocks", dest="num_blocks", type=_integers, metavar="LIST", help="like 12,16 (default: the preset's)"),
    argument("--output-lengths", metavar="LENGTHS", help="with weights, such as 1:8,2:30,16, or those of a table file"),
    argument("--runs", dest="runs_per_key", type=int, default=150, metavar="N", help="of each (default: 150)"),
    argument("--minutes", type=float, metavar="M", help="stop after this time, the rest still to do"),
    argument("--warmup", dest="warmup_rounds", type=int, default=1, metavar="N", help="of each, first (default: 1)"),
    argument("--seed", type=int, default=0, metavar="S", help="of order, requests and weights (default: 0)"),
    argument("--device", default="cpu", metavar="DEVICE", help="cpu (default), cuda, cuda:1 …"),
    argument("--threads", type=int, metavar="N", help="threads of torch (default: 1 on the CPU)"),
    argument(
        "--synchronization",
        choices=("none", "synchronize", "events"),
        help="how stages are timed (default: none on the CPU, CUDA events on CUDA)",
    ),
    JSON,
)
def profile(arguments: argparse.Namespace) -> Answer:
    """Profile a model with random weights on this machine; the same command goes on where it was interrupted."""
    from lutest.profile.presets import parse_output_lengths
    from lutest.profile.sweep import run_sweep

    options = {name: value for name, value in vars(arguments).items() if name != "json"}
    if arguments.output_lengths is not None:
        options["output_lengths"] = parse_output_lengths(arguments.output_lengths)
    with run_bar(arguments.minutes) as progress:
        summary = run_sweep(**options, progress=progress)
    overhead = f"recording adds {summary.step_overhead_us:.2g} µs to a decode step"
    if summary.step_p50_ms:
        overhead += f", {summary.step_overhead_us / 10 / summary.step_p50_ms:.2g} % of its median"
    recorded = (
        f"{count(summary.n_recorded, 'run')} of {count(summary.n_keys, 'configuration')} recorded in {summary.output} "
        f"in {summary.seconds:.0f} s, {summary.n_missing:,} still to do; "
        f"{count(summary.n_warmup, 'warm-up run')} left out"
    )
    return Answer(asdict(summary), [f"{summary.model}, on {summary.device}", recorded, overhead])
