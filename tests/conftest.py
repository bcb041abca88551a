"""The shipped runs and the tables built from them once for all tests, the option --long, and figures to report."""

from __future__ import annotations

import os

# The matrices are small: threads of the linear algebra library would only wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from collections import Counter
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pytest

from lutest.builder.build import build

# what a suite tried → how often, and what became of it
Tally = dict[str, Counter[str]]
TALLY = pytest.StashKey[Tally]()

RUNS = Path(__file__).parent.parent / "tables" / "runs"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long",
        action="store_true",
        help="300 kills, 1,000 damaged files, 100 rebuilds under 16 readers: many minutes",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TALLY] = {}


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)  # of one of the processes that share the tests out
    if output is not None:
        output["tally"] = {suite: dict(counts) for suite, counts in session.config.stash[TALLY].items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for suite, counts in getattr(node, "workeroutput", {}).get("tally", {}).items():
        node.config.stash[TALLY].setdefault(suite, Counter()).update(counts)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    tally = config.stash[TALLY]
    if tally:
        terminalreporter.section("tried, survived, lost")
    for suite, counts in tally.items():
        terminalreporter.line(f"{suite}: {', '.join(f'{n:,} {what}' for what, n in counts.items())}")


@pytest.fixture(scope="session")
def long(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--long"))


@pytest.fixture(scope="session")
def tally(request: pytest.FixtureRequest) -> Tally:
    return request.config.stash[TALLY]


@pytest.fixture(scope="session")
def direct_runs() -> Path:
    return RUNS / "direct.parquet"


@pytest.fixture(scope="session")
def subtraction_runs() -> Path:
    return RUNS / "subtraction.parquet"


@pytest.fixture(scope="session")
def direct_frame(direct_runs: Path) -> pd.DataFrame:
    with duckdb.connect() as connection:
        return connection.execute("SELECT * FROM read_parquet(?)", [str(direct_runs)]).df()


@pytest.fixture(scope="session")
def direct_table(tmp_path_factory: pytest.TempPathFactory, direct_runs: Path) -> Path:
    return build(runs=direct_runs, output=tmp_path_factory.mktemp("direct") / "direct.duckdb").output


@pytest.fixture(scope="session")
def subtraction_table(tmp_path_factory: pytest.TempPathFactory, subtraction_runs: Path) -> Path:
    return build(runs=subtraction_runs, output=tmp_path_factory.mktemp("subtraction") / "s.duckdb").output


@pytest.fixture(scope="session")
def serving_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty requests each of 24 configurations of the shipped serving runs, keyed by gpu, n_gpus and users."""
    path = tmp_path_factory.mktemp("serving") / "runs.parquet"
    duckdb.execute(
        f"""
        COPY (
            SELECT * FROM read_parquet('{RUNS / "llama-13b-serving.parquet"}')
            WHERE gpu IN ('A100', 'H100') AND users IN (1, 4, 16, 64)
            QUALIFY row_number() OVER (PARTITION BY gpu, n_gpus, users ORDER BY started_ms, sample_id) <= 60
            ORDER BY gpu, n_gpus, users, started_ms, sample_id
        ) TO '{path}' (FORMAT parquet)
        """
    )
    return path


@pytest.fixture(scope="session")
def serving_table(tmp_path_factory: pytest.TempPathFactory, serving_runs: Path) -> Path:
    output = tmp_path_factory.mktemp("serving") / "serving.duckdb"
    return build({"key": ["gpu", "n_gpus", "users"]}, runs=serving_runs, output=output).output
