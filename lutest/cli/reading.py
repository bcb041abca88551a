"""Verbs that answer from a table."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping

from lutest.cli.key_records import (
    KEY_HEADERS,
    KEY_NAMES,
    count_runs,
    format_key_table,
    open_table,
    read_key_records,
    read_records,
)
from lutest.cli.terminal import print_json
from lutest.cli.text_tables import format_table, one_line, unique_names
from lutest.judging.finding import count
from lutest.reader.errors import ArgumentError

__all__ = ["feasible", "info", "lookup", "sql"]

_LEAST_RUNS_FOR_BOUND = 59  # fewer runs have no distribution-free 95 % upper bound of a P95


def info(arguments: argparse.Namespace) -> None:
    """Print what a table is and holds."""
    import lutest

    table = lutest.load(arguments.table)  # says what is wrong with a file that is no table
    with open_table(table.path) as connection:
        meta = dict(connection.execute('SELECT "key", "value" FROM meta ORDER BY "key"').fetchall())
        sources = read_records(
            connection, "SELECT path, rows_read, rows_used, rows_rejected FROM sources ORDER BY path"
        )
        rejected = connection.execute(
            "SELECT reason, count(*) AS n FROM rejected_runs GROUP BY reason ORDER BY n DESC, reason"
        ).fetchall()
    keys = read_key_records(table)
    for key in keys:
        key["runs_wanted"] = max(0, _LEAST_RUNS_FOR_BOUND - key["n"])
    if arguments.json:
        content = {"path": arguments.table, "meta": meta, "tiers": list(table.tiers), "keys": keys}
        print_json({**content, "sources": sources, "rejected": dict(rejected)})
        return
    facts = [
        ("table", arguments.table),
        ("model", _names(meta.get("model"))),
        ("device", _names(meta.get("device"))),
        (
            "built",
            f"{meta.get('built_at')} by lutest {meta.get('lutest_version')}, DuckDB {meta.get('duckdb_version')}",
        ),
        ("schema version", meta.get("schema_version")),
        ("content hash", meta.get("content_hash")),
        *_parent_facts(meta),
        ("quantiles", ", ".join(map(str, json.loads(meta.get("quantiles", "[]"))))),
        ("tiers", ", ".join(table.tiers)),
        ("sources", f"{count(len(sources), 'file')}: {count_runs(sources)}"),
        ("rejected", ", ".join(f"{n:,} {reason}" for reason, n in rejected) or "none"),
    ]
    for name, value in facts:
        print(f"{name:<16}{one_line(value)}")
    print()
    print(format_key_table(keys, upper=True))
    thin = [key for key in keys if key["runs_wanted"]]
    if thin:
        print(f"\nthin: no upper bound of P95 below {_LEAST_RUNS_FOR_BOUND} runs")
        for key in thin:
            name = " ".join(str(key[part]) for part in KEY_NAMES)
            print(f"  {one_line(name)}: {count(key['n'], 'run')}, {key['runs_wanted']} more wanted")


def _parent_facts(meta: Mapping[str, str]) -> list[tuple[str, str]]:
    """What a calibrated table came from: its sources are those of the parent."""
    if "parent_content_hash" not in meta:
        return []
    n_runs = json.loads(meta.get("calibration", "{}")).get("n_runs")
    return [("calibrated", f"with {count(n_runs or 0, 'run')} from the table {meta['parent_content_hash']}")]


def lookup(arguments: argparse.Namespace) -> None:
    """Print the estimate for one configuration, part by part."""
    import lutest

    table = lutest.load(arguments.table, missing=arguments.missing)
    entry = table.lookup(arguments.tier, arguments.top_k, arguments.num_blocks)
    explanation = entry.explain(arguments.prompt_tokens, arguments.output_tokens, arguments.q)
    fitting = None
    if arguments.budget_ms is not None:
        fitting = entry.max_output_tokens(arguments.budget_ms, arguments.prompt_tokens, arguments.q)
    if arguments.json:
        content = explanation.as_dict()
        if fitting is not None:
            content.update(budget_ms=arguments.budget_ms, max_output_tokens=fitting)
        print_json(content)
        return
    print("\n".join(map(one_line, str(explanation).split("\n"))))
    if fitting is not None:
        print(f"  {arguments.budget_ms:g} ms fit {count(fitting, 'output token')}")


def feasible(arguments: argparse.Namespace) -> None:
    """Print the configurations that fit a budget."""
    import lutest

    table = lutest.load(arguments.table)
    prompt_tokens, output_tokens, q = arguments.prompt_tokens, arguments.output_tokens, arguments.q
    keys = table.feasible(
        arguments.budget_ms,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        prefill_share=arguments.prefill_share,
        q=q,
        margin=arguments.margin,
    )
    found = []
    for key in keys:
        entry = table.lookup(*key)
        record = {**key._asdict(), "n": entry.n, "prefill_ms": entry.prefill_ms(prompt_tokens, q)}
        if output_tokens is not None:
            record["total_ms"] = entry.total_ms(prompt_tokens, output_tokens, q)
        found.append(record)
    if arguments.json:
        print_json({"budget_ms": arguments.budget_ms, "q": q, "feasible": found})
        return
    if output_tokens is None:
        condition = f"prefill within {arguments.prefill_share:g} of {arguments.budget_ms:g} ms"
    else:
        condition = f"the total of {count(output_tokens, 'output token')} within {arguments.budget_ms:g} ms"
    condition += f" at q = {q:g}" + (f", margin {arguments.margin:g}" if arguments.margin else "")
    if not found:
        print(f"none of the {count(len(table.keys), 'configuration')} has {condition}")
        return
    print(f"{len(found)} of {count(len(table.keys), 'configuration')} have {condition}")
    headers = (*KEY_HEADERS, "n", "prefill ms", *(("total ms",) if output_tokens is not None else ()))
    print(format_table(headers, [list(record.values()) for record in found]))


def sql(arguments: argparse.Namespace) -> None:
    """Run a query and print its rows."""
    import csv

    from lutest.tablefile.sql import run_query

    try:
        query = sys.stdin.read() if arguments.query == "-" else arguments.query
    except UnicodeDecodeError as error:
        raise ArgumentError(f"the query on standard input is not {error.encoding} at byte {error.start}") from error
    names, rows = run_query(
        arguments.table,
        query,
        unsafe=arguments.unsafe,
        memory_limit=arguments.memory_limit,
        threads=arguments.threads,
        timeout_s=arguments.timeout,
    )
    if arguments.json:
        unique = unique_names(names)
        print_json([dict(zip(unique, row, strict=True)) for row in rows])
    elif arguments.csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(rows)
    elif names:
        print(format_table(names, rows))


def _names(value: str | None) -> str:
    names = json.loads(value) if value else []
    return "; ".join(map(str, names)) or "not said by the runs"
