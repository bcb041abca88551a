"""Verbs that answer from a table."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lutest
from lutest.cli.arguments import JSON, TABLE, TEXT_TOKENS, Answer, argument, given_key, given_prompt_tokens, verb
from lutest.cli.printing import fitted_table, format_table, one_line, print_json, unique_names
from lutest.judging.finding import count
from lutest.reader.errors import ArgumentError
from lutest.tablefile.description import LEAST_RUNS_FOR_BOUND, describe

if TYPE_CHECKING:
    from lutest.reader.table import LatencyTable

_MOST_VALUES_SHOWN = 12
_BUDGET_Q = 0.95


@verb("lutest info tables/mine.duckdb", TABLE, JSON)
def info(arguments: argparse.Namespace) -> Answer:
    """Say what a table is and holds."""
    table = lutest.load(arguments.table)  # says what is wrong with a file that is no table
    meta = table.meta
    held = describe(table)
    keys, sources, rejected = held["keys"], held["sources"], held["rejected"]
    mixed = [f"{len(names)} {what}s" for what, names in json.loads(meta.get("mixed", "{}")).items() if names]
    parent, n_runs = meta.get("parent_content_hash"), json.loads(meta.get("calibration", "{}")).get("n_runs", 0)
    facts = {
        "table": arguments.table,
        "model": _names(meta.get("model")),
        "device": _names(meta.get("device")),
        "mixed": mixed and f"runs of {' and '.join(mixed)} share figures: built with --mixed",
        "built": f"{meta.get('built_at')} by lutest {meta.get('lutest_version')}, DuckDB {meta.get('duckdb_version')}",
        "schema version": meta.get("schema_version"),
        "content hash": meta.get("content_hash"),
        "calibrated": parent and f"with {count(n_runs, 'run')} from the table {parent}",
        "quantiles": ", ".join(map(str, table.quantiles)),
        "sessions": _sessions(json.loads(meta.get("sessions", "{}"))),
        **{f"key: {name}": _values(table, place) for place, name in enumerate(table.key_columns)},
        "sources": f"{count(len(sources), 'file')}: {count_runs(sources)}",
        "rejected": ", ".join(f"{n:,} {reason}" for reason, n in rejected.items()) or "none",
        "parts": held["parts"] and f"{held['parts']['n']:,} for `lutest append`, {held['parts']['size_bytes']:,} bytes",
    }
    lines = [f"{one_line(title):<15} {one_line(value)}" for title, value in facts.items() if value]
    lines += ["", format_key_table(table.key_columns, keys, upper=True)]
    thin = [key for key in keys if key["runs_wanted"]]
    if thin:
        lines += ["", f"thin: no upper bound of P95 below {LEAST_RUNS_FOR_BOUND} runs"]
    for key in thin:
        name = " ".join(str(key[part]) for part in table.key_columns)
        lines.append(f"  {one_line(name)}: {count(key['n'], 'run')}, {key['runs_wanted']} more wanted")
    return Answer(held, lines)


def _sessions(told: Mapping[str, Any]) -> str:
    """What a profiling session more would add to a P95."""
    if "n" not in told:
        return ""
    if not told["n"]:
        return "not known, for runs do not say when they started: what a later one adds to a P95 neither"
    stages = {name.replace("_", " "): held for name, held in told.items() if isinstance(held, Mapping)}
    if not stages:
        return f"{told['n']}, none with enough runs of what others have: what one more adds to a P95 is not known"
    factors = ", ".join(f"{name} x {held['p95_factor']:.2f}" for name, held in stages.items())
    return f"{told['n']}; beside these figures, P95 of a later one may be up to: {factors}"


def _values(table: LatencyTable, place: int) -> str:
    values = list(map(str, sorted({key[place] for key in table.keys})))
    more = f" … {values[-1]} ({len(values)} values)" if len(values) > _MOST_VALUES_SHOWN else ""
    return ", ".join(values[:_MOST_VALUES_SHOWN]) + more


def _names(value: str | None) -> str:
    return "; ".join(map(str, json.loads(value or "[]"))) or "not said by the runs"


def format_key_table(key_columns: Sequence[str], keys: Sequence[Mapping[str, Any]], *, upper: bool) -> str:
    """Lay out configurations, with their upper bounds and measured ranges if asked for."""
    shown = {**{name: name for name in key_columns}, "n": "n", "prefill P50": "prefill_p50_ms", "P95": "prefill_p95_ms"}
    if any("own_runs" in key for key in keys):
        shown = {**dict(list(shown.items())[: len(key_columns) + 1]), "own runs": "own_runs", **shown}
    if upper:
        shown["P95 at most"] = "prefill_p95_upper_ms"
    shown |= {"step P50": "decode_step_p50_ms", "step P95": "decode_step_p95_ms"}
    headers, rows = list(shown), [[key[name] for name in shown.values()] for key in keys]
    if upper:
        headers += ["prompt tokens", "KV length"]
        for row, key in zip(rows, keys, strict=True):
            row.append(f"{key['prompt_tokens_min']}–{key['prompt_tokens_max']}")
            row.append(None if key["kv_len_min"] is None else f"{key['kv_len_min']}–{key['kv_len_max']}")
    own = "; n: runs of the profile that was carried over, own runs: of this device" if "own runs" in shown else ""
    return f"{format_table(headers, rows)}\nlatencies in ms; step: one decode step{own}"


def count_runs(sources: Sequence[Mapping[str, Any]]) -> str:
    """Runs read, used and rejected, over all sources."""
    names = ("rows_read", "rows_used", "rows_rejected")
    read, used, rejected = (sum(source[name] for source in sources) for name in names)
    return f"{count(read, 'run')} read, {used:,} used, {rejected:,} rejected"


@verb(
    "lutest lookup tables/mine.duckdb low 8 16 --prompt-tokens 150 --output-tokens 32 -q 0.95",
    TABLE,
    argument("key", nargs="*", metavar="VALUE", help="the configuration: a value for each key column, in their order"),
    argument("--prompt-tokens", type=int, metavar="P", help="vision + text tokens (default: as measured)"),
    TEXT_TOKENS,
    argument("--output-tokens", type=int, default=1, metavar="N", help="output tokens (default: 1, no decode)"),
    argument("--budget-ms", type=float, metavar="B", help="also: how many output tokens fit"),
    argument("-q", type=float, metavar="Q", help="quantile (default: 0.5, and 0.95 for what fits a budget)"),
    argument("--missing", choices=("error", "interpolate"), default="error", help="fill in what is not held"),
    JSON,
)
def lookup(arguments: argparse.Namespace) -> Answer:
    """Estimate one configuration, part by part."""
    table = lutest.load(arguments.table, missing=arguments.missing)
    entry = table.lookup(*given_key(table, arguments.key))
    prompt = arguments.prompt_tokens
    if arguments.text_tokens is not None:
        if prompt is not None:
            raise ArgumentError("--prompt-tokens and --text-tokens: allowed is one of the two")
        prompt = entry.prompt_tokens(arguments.text_tokens)
    q = {} if arguments.q is None else {"q": arguments.q}
    explanation = entry.explain(prompt, arguments.output_tokens, **q)
    content, lines = explanation.as_dict(), list(map(one_line, str(explanation).split("\n")))
    if arguments.budget_ms is not None:
        fitting = entry.max_output_tokens(arguments.budget_ms, prompt, **q)
        content.update(budget_ms=arguments.budget_ms, max_output_tokens=fitting)
        at = f"at q = {q.get('q', _BUDGET_Q):g}"
        lines.append(f"  {arguments.budget_ms:g} ms fit {count(fitting, 'output token')} {at}")
    return Answer(content, lines)


@verb(
    "lutest feasible tables/mine.duckdb 500 --prompt-tokens low=150,medium=300,high=510",
    TABLE,
    argument("budget_ms", type=float, metavar="BUDGET_MS", help="latency budget of a run, ms"),
    argument(
        "--prompt-tokens",
        metavar="P",
        help="vision + text tokens, or those of each value of a key column: low=150,high=510 or users:1=99,64=200 "
        "(default: as measured)",
    ),
    TEXT_TOKENS,
    argument("--output-tokens", type=int, metavar="N", help="known output tokens: totals must fit"),
    argument("--prefill-share", type=float, default=0.8, metavar="S", help="of the budget (default: 0.8)"),
    argument("-q", type=float, metavar="Q", help="quantile of the table (default: 0.95)"),
    argument("--margin", type=float, default=0.0, metavar="M", help="0.1: estimate × 1.1 must fit"),
    argument("--p-at-least", type=float, metavar="P", help="totals must fit with that probability"),
    argument("--by", choices=("expected",), help="the mean total over output lengths must fit"),
    argument("--workload", metavar="NAME", help="whose output lengths (default: all of the table)"),
    JSON,
)
def feasible(arguments: argparse.Namespace) -> Answer:
    """List configurations that fit a budget."""
    table = lutest.load(arguments.table)
    prompt_tokens = given_prompt_tokens(table, arguments.prompt_tokens)
    names = (
        "budget_ms",
        "text_tokens",
        "output_tokens",
        "prefill_share",
        "q",
        "margin",
        "p_at_least",
        "by",
        "workload",
    )
    options = {name: getattr(arguments, name) for name in names}
    keys = table.feasible(prompt_tokens=prompt_tokens, **options)
    budget_ms, workload = arguments.budget_ms, arguments.workload
    q = _BUDGET_Q if arguments.q is None else arguments.q
    found = []
    for key in keys:
        entry, prompt = table.lookup(*key), prompt_tokens
        if isinstance(prompt, dict):
            ((column, lengths),) = prompt.items()
            prompt = lengths[key[table.key_columns.index(column)]]
        if arguments.text_tokens is not None:
            prompt = entry.prompt_tokens(arguments.text_tokens)
        record = {**dict(zip(table.key_columns, key, strict=True)), "n": entry.n}
        record["prefill_ms"] = entry.prefill_ms(prompt, q)
        if arguments.output_tokens is not None:
            record["total_ms"] = entry.total_ms(prompt, arguments.output_tokens, q)
        if arguments.p_at_least is not None:
            record["p_within"] = entry.p_within(budget_ms, prompt, workload)
        if arguments.by is not None:
            record["expected_total_ms"] = entry.expected_total_ms(prompt, workload)
        record["source"] = entry.source_at(prompt, arguments.output_tokens or 1)
        found.append(record)
    content = {"budget_ms": budget_ms, "q": q, "feasible": found}
    condition, n = _condition(arguments, q), count(len(table.keys), "configuration")
    if not found:
        return Answer(content, [f"none of the {n} has {condition}"])
    headers = [name.replace("_ms", " ms") if name not in table.key_columns else name for name in found[0]]
    rows = [list(record.values()) for record in found]
    return Answer(content, [f"{len(found)} of {n} have {condition}", format_table(headers, rows)])


def _condition(arguments: argparse.Namespace, q: float) -> str:
    budget, margin = f"{arguments.budget_ms:g} ms", f", margin {arguments.margin:g}" if arguments.margin else ""
    if arguments.p_at_least is not None:
        return f"a total within {budget} with a probability of {arguments.p_at_least:g} or more{margin}"
    if arguments.by is not None:
        return f"an expected total within {budget}{margin}"
    if arguments.output_tokens is None:
        return f"prefill within {arguments.prefill_share:g} of {budget} at q = {q:g}{margin}"
    return f"the total of {count(arguments.output_tokens, 'output token')} within {budget} at q = {q:g}{margin}"


def _add_form(parser: argparse.ArgumentParser) -> None:
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--csv", action="store_true", help="print CSV")


@verb(
    'lutest sql tables/mine.duckdb "SELECT tier, prefill_ms(tier, top_k, num_blocks, 200, 0.95) FROM configs"',
    TABLE,
    argument("query", nargs="?", default="-", metavar="QUERY", help="SQL; from standard input if - or left out"),
    _add_form,
    argument("--unsafe", action="store_true", help="let the query read and write files, and load extensions"),
    argument("--memory-limit", metavar="SIZE", help="the most memory to use, such as 500MB"),
    argument("--threads", type=int, metavar="N", help="the most threads to use"),
    argument("--timeout", type=float, metavar="SECONDS", help="stop the query after this time"),
)
def sql(arguments: argparse.Namespace) -> None:
    """Query a table with SQL, read-only and without access to anything else."""
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
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        text, is_cut = fitted_table(names, rows, width)
        print(text)
        if is_cut:
            print(f"… text cut to the {width} columns of the terminal; whole in a pipe, or with --csv or --json")
