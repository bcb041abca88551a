"""Verbs that write files: runs, tables, and tables as plain data."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from lutest.cli.key_records import count_runs, format_key_table, read_key_records
from lutest.cli.terminal import print_json, progress_bar, run_bar
from lutest.cli.text_tables import format_table
from lutest.judging.finding import count

__all__ = ["build", "convert", "export", "profile"]

_MOST_SOURCES_SHOWN = 20


def build(arguments: argparse.Namespace) -> None:
    """Build a table and print its summary."""
    import lutest
    from lutest.builder.build import build as build_table
    from lutest.runs.configuration import DEFAULT_CONFIG
    from lutest.tablefile.sql import database_errors

    with database_errors(), progress_bar() as progress:
        summary = build_table(
            arguments.config or DEFAULT_CONFIG, runs=arguments.runs, output=arguments.output, progress=progress
        )
    keys = read_key_records(lutest.load(summary.output))
    if arguments.json:
        print_json({**asdict(summary), "keys": keys})
        return
    sources = [
        (source.path, source.rows_read, source.rows_used, source.rows_rejected)
        for source in summary.sources[:_MOST_SOURCES_SHOWN]
    ]
    print(format_table(("source", "read", "used", "rejected"), sources))
    if len(summary.sources) > len(sources):
        print(f"… {count(len(summary.sources), 'source')} in all: {count_runs(asdict(summary)['sources'])}")
    for reason, n in summary.rejected.items():
        print(f"  {count(n, 'run')} rejected: {reason}")
    if summary.n_clamped:
        print(f"  {count(summary.n_clamped, 'run')} clamped at zero decode: kept as censored from below")
    if summary.n_kept_beyond_fences:
        kept = count(summary.n_kept_beyond_fences, "run")
        print(f"  {kept} beyond the outlier fences: kept, for over 5 % of all runs are a tail, not outliers")
    print()
    print(format_key_table(keys, upper=False))
    print(f"\nwritten to {summary.output} in {summary.seconds:.1f} s, content hash {summary.content_hash}")


def convert(arguments: argparse.Namespace) -> None:
    """Write runs as one Parquet file and print what was written."""
    from lutest.runs.convert import convert as convert_runs
    from lutest.tablefile.sql import database_errors

    with database_errors(), progress_bar() as progress:
        summary = convert_runs(arguments.sources, arguments.output, config=arguments.config, progress=progress)
    if arguments.json:
        print_json(asdict(summary))
        return
    for reason, n in summary.problems.items():
        print(f"  {count(n, 'run')} that a build will reject: {reason}")
    print(
        f"{count(summary.rows, 'run')} written to {summary.output} in {summary.seconds:.1f} s, "
        f"{summary.size_bytes / 1024:,.0f} KiB, columns {', '.join(summary.columns)}"
    )


def export(arguments: argparse.Namespace) -> None:
    """Write a table as plain data and print what was written."""
    from lutest.tablefile.export import export as export_table

    summary = export_table(arguments.table, arguments.output, parquet=arguments.parquet)
    if arguments.json:
        print_json(asdict(summary))
        return
    print(f"{count(sum(summary.rows.values()), 'row')} of {len(summary.rows)} tables written to {summary.output}")


def profile(arguments: argparse.Namespace) -> None:
    """Profile a model with random weights and print what was recorded."""
    from lutest.profile.output_lengths import parse_output_lengths
    from lutest.profile.sweep import run_sweep

    lengths = None if arguments.output_lengths is None else parse_output_lengths(arguments.output_lengths)
    with run_bar(arguments.minutes) as progress:
        summary = run_sweep(
            arguments.output,
            arguments.preset,
            tiers=arguments.tiers,
            top_k=arguments.top_k,
            num_blocks=arguments.blocks,
            output_lengths=lengths,
            runs_per_key=arguments.runs,
            minutes=arguments.minutes,
            warmup_rounds=arguments.warmup,
            seed=arguments.seed,
            device=arguments.device,
            threads=arguments.threads,
            synchronization=arguments.synchronization,
            progress=progress,
        )
    if arguments.json:
        print_json(asdict(summary))
        return
    print(f"{summary.model}, on {summary.device}")
    print(
        f"{count(summary.n_recorded, 'run')} of {count(summary.n_keys, 'configuration')} recorded in {summary.output} "
        f"in {summary.seconds:.0f} s, {summary.n_missing:,} still to do; "
        f"{count(summary.n_warmup, 'warm-up run')} left out"
    )
    share = (
        f", {summary.step_overhead_us / 10 / summary.step_p50_ms:.2g} % of its median" if summary.step_p50_ms else ""
    )
    print(f"recording adds {summary.step_overhead_us:.2g} µs to a decode step{share}")
