"""Verbs that judge: a table by runs, runs by themselves, a file by its seal."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from ..report import count
from .terminal import print_json, progress_bar

__all__ = ["diagnose", "evaluate", "verify"]


def evaluate(arguments: argparse.Namespace) -> None:
    """Judge a table by runs and print the figures."""
    from ..evaluate import evaluate as evaluate_table
    from ..evaluate.evaluation import render_evaluation
    from ..sql import database_errors

    with database_errors(), progress_bar() as progress:
        evaluation = evaluate_table(arguments.table, arguments.runs, config=arguments.config, progress=progress)
    if arguments.json:
        print_json(evaluation.as_dict())
        return
    print(render_evaluation(evaluation))


def diagnose(arguments: argparse.Namespace) -> None:
    """Print what is wrong with runs."""
    from ..diagnose import diagnose as diagnose_runs
    from ..diagnose.finding import render_findings
    from ..sql import database_errors

    with database_errors(), progress_bar() as progress:
        findings = diagnose_runs(arguments.runs, config=arguments.config, progress=progress)
    if arguments.json:
        print_json({"findings": [finding.as_dict() for finding in findings]})
        return
    print(render_findings(findings))


def verify(arguments: argparse.Namespace) -> None:
    """Check a table as a whole and print what was checked."""
    from ..verify import verify as verify_table

    verified = verify_table(arguments.table)
    if arguments.json:
        print_json(asdict(verified))
        return
    rows = count(sum(verified.rows.values()), "row")
    print(
        f"{verified.path}: whole: {verified.size_bytes / 1024:,.0f} KiB as sealed, "
        f"{rows} in {len(verified.rows)} tables with content hash {verified.content_hash}"
    )
