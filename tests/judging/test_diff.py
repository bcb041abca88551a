"""What changed between two tables: what is said of the same machine, and of a slower one."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

import lutest
from lutest.builder.build import build
from lutest.cli.main import main
from lutest.judging.diff import Diff
from lutest.reader.figures import Figures, Key, KeyFigures
from lutest.tablefile.sql import connect
from tests.runs_frame import noisy_runs
from tests.synthetic import write_file

KEYS: list[tuple[str, int, int]] = [(tier, top_k, 12) for tier in ("low", "high") for top_k in (2, 4, 8)]
SLOW_KEY = ("low", 4, 12)


def slowed(figures: Figures, factor: float, keys: Collection[Key]) -> Figures:
    """The figures with some configurations slower."""

    def slow(values: Sequence[float]) -> tuple[float, ...]:
        return tuple(factor * value for value in values)

    def changed(key: KeyFigures) -> KeyFigures:
        assert key.decode is not None
        assert key.decode_curve is not None
        prefill, step = (replace(held, quantiles_ms=slow(held.quantiles_ms)) for held in (key.prefill, key.decode))
        curves = [
            replace(curve, values_ms=tuple(map(slow, curve.values_ms)))
            for curve in (key.prefill_curve, key.decode_curve)
        ]
        return replace(key, prefill=prefill, decode=step, prefill_curve=curves[0], decode_curve=curves[1])

    return replace(figures, keys=tuple(changed(key) if key.key in keys else key for key in figures.keys))


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A table, the same machine again, half as fast, and with one configuration half as fast."""
    folder = tmp_path_factory.mktemp("diff")
    names = ("first", "again")
    held = {
        name: build(runs=noisy_runs(KEYS, runs_per_key=60, seed=seed), output=folder / f"{name}.duckdb").output
        for seed, name in enumerate(names)
    }
    again = lutest.load(held["again"]).figures
    low = tuple(key for key in again.keys if key.key[0] == "low")
    columns = tuple(column._replace(name=name) for name, column in zip("abc", again.key_columns, strict=True))
    meta = {**again.meta, "key_columns": json.dumps([column._asdict() for column in columns])}
    figures = {
        "slower": slowed(again, 1.5, KEYS),
        "one": slowed(again, 2.0, [SLOW_KEY]),
        "fewer": replace(again, keys=low),
        "other": replace(again, key_columns=columns, meta=meta),
    }
    return held | {name: write_file(one, folder / f"{name}.duckdb") for name, one in figures.items()}


def verdicts(found: Diff) -> set[str]:
    return {change.verdict for change in found.changes}


def test_another_session_of_the_same_machine_is_no_change(tables: dict[str, Path]) -> None:
    found = lutest.diff(tables["first"], tables["again"])
    assert len(found.changes) == 6 * (len(KEYS) + 1)
    assert verdicts(found) <= {"same", "not sure"}
    assert {change.verdict for change in found.changes if change.key is None and change.q == 0.5} == {"same"}
    assert all(change.lower <= 1.0 <= change.upper for change in found.changes if change.key is not None)


def test_a_table_against_itself_has_no_change_at_all(tables: dict[str, Path]) -> None:
    assert {change.ratio for change in lutest.diff(tables["first"], tables["first"]).changes} == {1.0}


def test_a_slower_machine_is_slower_and_the_other_way_round_faster(tables: dict[str, Path]) -> None:
    slower, faster = (
        lutest.diff(*(tables[name] for name in pair)) for pair in (("first", "slower"), ("slower", "first"))
    )
    assert verdicts(slower) == {"slower"}
    assert verdicts(faster) == {"faster"}
    for change in slower.changes:
        assert change.lower < 1.5 < change.upper
        assert 1.0 < change.lower < change.ratio < change.upper
    assert slower.slower == slower.changes


def test_the_surest_and_largest_change_comes_first(tables: dict[str, Path]) -> None:
    found = lutest.diff(tables["first"], tables["one"])
    assert {change.key for change in found.changes[:6]} == {SLOW_KEY}
    assert {change.key for change in found.slower} <= {SLOW_KEY, None}


def test_both_tables_are_asked_the_same(tables: dict[str, Path]) -> None:
    old, new = lutest.load(tables["first"]), lutest.load(tables["slower"])
    for change in lutest.diff(old, new).changes:
        if change.key is None or change.stage == "decode step":
            continue
        for table, ms, n in ((old, change.old_ms, change.n_old), (new, change.new_ms, change.n_new)):
            entry = table[change.key]
            if change.stage == "prefill":
                assert ms == entry.prefill_ms(change.prompt_tokens, change.q)
                assert n == entry.n
            else:
                assert change.output_tokens is not None
                assert ms == entry.total_ms(change.prompt_tokens, change.output_tokens, change.q)


def test_intervals_are_those_of_the_curves_errors(tables: dict[str, Path]) -> None:
    found = [change for change in lutest.diff(tables["first"], tables["again"]).changes if change.key is not None]
    score = NormalDist().inv_cdf(1.0 - 0.05 / 4 / len(found))
    for change in found:
        if (change.stage, change.q) != ("prefill", 0.5) or change.key is None or change.prompt_tokens is None:
            continue
        relative = []
        for name in ("first", "again"):
            query = "SELECT prompt_tokens, p50_se_ms / p50_ms AS error FROM prefill_curve WHERE (tier, top_k) = (?, ?)"
            with connect(tables[name]) as connection:
                knots = connection.execute(f"{query} ORDER BY prompt_tokens", change.key[:2]).fetchnumpy()
            relative.append(np.interp(change.prompt_tokens, knots["prompt_tokens"], knots["error"]))
        assert math.log(change.upper / change.ratio) == pytest.approx(score * math.hypot(*relative))
        assert math.log(change.ratio / change.lower) == pytest.approx(score * math.hypot(*relative))


def test_tables_in_memory_have_intervals_of_their_runs(tables: dict[str, Path]) -> None:
    old, new = (lutest.LatencyTable(lutest.load(tables[name]).figures) for name in ("first", "slower"))
    found = lutest.diff(old, new)
    assert verdicts(found) == {"slower"}
    assert all(change.lower < 1.5 < change.upper for change in found.changes)


def test_configurations_of_one_table_alone_are_named(tables: dict[str, Path]) -> None:
    found = lutest.diff(tables["first"], tables["fewer"])
    assert {key[0] for key in found.only_old} == {"high"}
    assert found.only_new == ()
    assert lutest.diff(tables["fewer"], tables["first"]).only_new == found.only_old


def test_the_command_line_fails_where_something_got_slower(
    tables: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    first, again, slower = (str(tables[name]) for name in ("first", "again", "slower"))
    assert main(["diff", first, again]) == 0
    assert "0 slower, 0 faster" in capsys.readouterr().out
    assert main(["diff", first, slower]) == 1
    assert "low 4 12" in capsys.readouterr().out
    assert main(["diff", slower, first]) == 0
    capsys.readouterr()
    assert main(["diff", first, slower, "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert content["changes"][0].keys() >= {"stage", "key", "q", "ratio", "lower", "upper", "verdict"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("first", "other"), "the tables have other key columns, tier, top_k, num_blocks and a, b, c"),
        (("first", "first", "--tolerance", "0.5"), "tolerance is 0.5; allowed: 0 or more and below 0.5"),
        (("first", "first", "--tolerance", "nan"), "tolerance is nan"),
    ],
)
def test_what_cannot_be_compared_is_said(
    arguments: tuple[str, ...], said: str, tables: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(tables.get(argument, argument)) for argument in arguments]
    assert main(["diff", *given]) == 2
    assert said in capsys.readouterr().err
