"""LatencyTable: keys, lookup, unknown keys, budgets, and its life in workers."""

from __future__ import annotations

import multiprocessing
import pickle
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import lutest
import lutest.reader.loading
from lutest import ArgumentError, LatencyTable, LutestError, TableError, UnknownKeyError
from tests.synthetic import NO_DECODE, QUANTILES, make_figures, write_file


@pytest.fixture
def table() -> LatencyTable:
    return LatencyTable(make_figures())


@pytest.fixture
def filling() -> LatencyTable:
    return LatencyTable(make_figures(), missing="interpolate")


@pytest.fixture
def nothing_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lutest.reader.loading, "_current", None)
    monkeypatch.setattr(lutest.reader.loading, "_current_entries", {})
    monkeypatch.delenv("LUTEST_TABLE", raising=False)


def test_a_table_is_a_collection_of_keys(table: LatencyTable) -> None:
    assert len(table) == 12
    assert list(table) == list(table.keys)
    assert table.keys[0] == ("high", 4, 12)
    assert table.key_columns == ("tier", "top_k", "num_blocks")
    assert ("low", 4, 12) in table
    assert ("low", 4, 13) not in table
    assert "low" not in table
    assert table.quantiles == QUANTILES
    assert table.meta["device"] == "a test"
    assert table.output_lengths["web"] == ((7, 1),)
    assert "12 configurations" in repr(table)
    assert "a test" in repr(table)


def test_one_key_in_every_way_to_say_it(table: LatencyTable) -> None:
    entry = table.lookup("high", 8, 12)
    assert entry.key == ("high", 8, 12)
    assert table["high", 8, 12] is entry
    assert table[("high", 8, 12)] is entry
    assert table.lookup(tier="high", num_blocks=12, top_k=8) is entry
    assert table.lookup("high", 8, num_blocks=12) is entry
    numbers: Any = np.array([8, 12], dtype=np.uint8)
    assert table.lookup("high", *numbers) is entry
    assert table["high", 8.0, 12.0] is entry
    assert table.lookup(np.str_("high"), 8, 12) is entry


def test_an_unknown_key_names_the_nearest(table: LatencyTable) -> None:
    with pytest.raises(UnknownKeyError) as caught:
        _ = table["medium", 7, 16]
    message = str(caught.value)
    assert isinstance(caught.value, KeyError)
    assert "tier='medium', top_k=7, num_blocks=16 was not measured" in message
    near = message.split("num_blocks): ")[1].split("; load(")[0].split("; ")
    assert near == ["'medium', 8, 16", "'medium', 4, 16", "'medium', 8, 12"]
    assert "\n" not in message


@pytest.mark.parametrize("tier", ["huge", 2, -1, None, 1.5])
def test_an_unknown_category_is_an_error_even_when_filling_in(filling: LatencyTable, tier: Any) -> None:
    with pytest.raises(UnknownKeyError, match=r"tier .* is not in the table, which holds 'high', 'low', 'medium'$"):
        filling.lookup(tier, 4, 12)


@pytest.mark.parametrize("wrong", [None, "8", [8], float("nan")])
def test_a_key_of_a_wrong_type(table: LatencyTable, wrong: Any) -> None:
    with pytest.raises(UnknownKeyError, match=r"top_k is .*allowed: a number"):
        table.lookup("low", wrong, 12)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (("low", 8), {}),
        (("low", 8, 16, 1), {}),
        ((), {"tier": "low", "top_k": 8}),
        (("low",), {"tier": "low", "top_k": 8, "num_blocks": 16}),
        (("low", 8), {"blocks": 16}),
    ],
)
def test_too_few_or_too_many_values_are_answered_with_the_columns(
    table: LatencyTable, values: tuple[Any, ...], named: dict[str, Any]
) -> None:
    allowed = r"a value for each of tier, top_k, num_blocks, such as 'high', 4, 12$"
    with pytest.raises(ArgumentError, match=rf"^the key is \(.*\); allowed: {allowed}"):
        table.lookup(*values, **named)


def test_filled_in_keys_say_so(filling: LatencyTable) -> None:
    inside = filling.lookup("medium", 6, 14)
    assert (inside.source, inside.n, inside.key) == ("interpolated", 0, ("medium", 6, 14))
    assert inside.explain(250, 5, 0.95).total.source == "interpolated"
    assert filling.lookup("medium", 10, 14).source == "extrapolated"
    assert filling.lookup("medium", 10, 14).explain(250, 5).prefill.source == "extrapolated"
    assert filling["medium", 6, 14] is inside
    assert len(filling) == 12
    assert ("medium", 6, 14) not in filling
    assert filling.lookup("medium", 8, 16).source == "measured"


def test_filled_in_figures_lie_between_those_of_their_neighbours(filling: LatencyTable) -> None:
    for tier in ("low", "medium", "high"):
        corners = [filling[key] for key in filling if key[0] == tier]
        middle = filling.lookup(tier, 6, 14)
        for q in QUANTILES:
            around = [corner.prefill_ms(q=q) for corner in corners]
            assert min(around) < middle.prefill_ms(q=q) < max(around)


@pytest.mark.parametrize("key", [(6, 14), (1, 1), (16, 24), (5, 12), (8, 13)])
@pytest.mark.parametrize("tier", ["low", "medium", "high"])
def test_filled_in_quantiles_keep_their_order_and_totals_grow(
    filling: LatencyTable, tier: str, key: tuple[int, int]
) -> None:
    entry = filling.lookup(tier, *key)
    for prompt in (0, 41, 300, 900):
        for lower, upper in pairwise(QUANTILES):
            assert 0 < entry.prefill_ms(prompt, lower) <= entry.prefill_ms(prompt, upper)
            assert 0 < entry.total_ms(prompt, 9, lower) <= entry.total_ms(prompt, 9, upper)
        for q in (0.5, 0.95, 0.99):
            totals = [entry.total_ms(prompt, n, q) for n in range(1, 100)]
            assert totals == sorted(totals)


def test_what_is_too_far_is_not_filled_in(filling: LatencyTable) -> None:
    with pytest.raises(UnknownKeyError, match="too far from anything"):
        filling.lookup("low", 1e300, 14)
    with pytest.raises(UnknownKeyError, match="the numbers that were measured are above 0"):
        filling.lookup("low", 0, 14)


def test_missing_takes_two_values() -> None:
    with pytest.raises(ArgumentError, match="missing is 'nan'; allowed: 'error', 'interpolate'"):
        LatencyTable(make_figures(), "", cast(Any, "nan"))


def test_feasible_by_prefill_and_by_total(table: LatencyTable) -> None:
    for budget in (30.0, 60.0, 150.0, 400.0):
        by_prefill = [key for key in table if table[key].prefill_ms(q=0.95) <= 0.8 * budget]
        assert table.feasible(budget) == by_prefill
        with_margin = [key for key in table if table[key].prefill_ms(200, 0.5) * 1.1 <= 0.5 * budget]
        assert table.feasible(budget, prompt_tokens=200, prefill_share=0.5, q=0.5, margin=0.1) == with_margin
        by_total = [key for key in table if key != NO_DECODE and table[key].total_ms(None, 9, 0.95) * 1.1 <= budget]
        assert table.feasible(budget, output_tokens=9, margin=0.1) == by_total
    assert len(table.feasible(1e6)) == 12
    assert NO_DECODE in table.feasible(1e6, output_tokens=1)
    assert NO_DECODE not in table.feasible(1e6, output_tokens=2)
    assert table.feasible(1e-6) == []


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"budget_ms": float("nan")}, "budget_ms"),
        ({"budget_ms": 0}, "budget_ms"),
        ({"budget_ms": 50, "prompt_tokens": -1}, "prompt_tokens"),
        ({"budget_ms": 50, "output_tokens": 0}, "output_tokens"),
        ({"budget_ms": 50, "prefill_share": 0.0}, "prefill_share"),
        ({"budget_ms": 50, "prefill_share": 1.1}, "prefill_share"),
        ({"budget_ms": 50, "margin": -0.1}, "margin"),
        ({"budget_ms": 50, "margin": float("nan")}, "margin"),
        ({"budget_ms": 50, "q": 0.9}, "q"),
    ],
)
def test_feasible_checks_its_arguments(table: LatencyTable, arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{name} is .*; allowed: "):
        table.feasible(**arguments)


def test_a_table_cannot_be_changed(table: LatencyTable) -> None:
    with pytest.raises(AttributeError, match="cannot be changed"):
        table.path = "x"
    with pytest.raises(TypeError):
        cast(Any, table.meta)["device"] = "x"
    with pytest.raises(AttributeError, match="cannot be changed"):
        del table.keys


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_table_survives_pickling(filling: LatencyTable, protocol: int) -> None:
    filled = filling.lookup("low", 6, 14)
    other = pickle.loads(pickle.dumps(filling, protocol))
    assert other.figures == filling.figures
    assert repr(other.lookup("low", 6, 14)) == repr(filled)
    assert other.lookup("low", 6, 15).source == "interpolated"
    assert other["low", 4, 16].total_ms(77, 30, 0.95) == filling["low", 4, 16].total_ms(77, 30, 0.95)


def _total_in_child(table: LatencyTable, answers: multiprocessing.Queue[float]) -> None:
    answers.put(table["low", 4, 16].total_ms(77, 30, 0.95))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_table_goes_into_other_processes(table: LatencyTable, method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    answers = context.Queue()
    child = context.Process(target=_total_in_child, args=(table, answers))
    child.start()
    assert answers.get(timeout=60) == table["low", 4, 16].total_ms(77, 30, 0.95)
    child.join(60)
    assert child.exitcode == 0


def test_threads_that_fill_in_the_same_keys_get_the_same_entries(filling: LatencyTable) -> None:
    wanted = [(tier, k, b) for tier in ("low", "high") for k in (5, 6, 7) for b in (13, 14, 15)]
    found: list[list[int]] = []
    barrier = threading.Barrier(8)

    def work() -> None:
        barrier.wait()
        found.append([id(filling.lookup(*key)) for key in wanted])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(ids == found[0] for ids in found)


@pytest.mark.usefixtures("nothing_in_use")
def test_load_and_the_table_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_file(make_figures(), tmp_path / "table.duckdb")
    with pytest.raises(TableError, match=r"lutest\.use\(path\) or set \$LUTEST_TABLE"):
        lutest.lookup("low", 4, 12)
    monkeypatch.setenv("LUTEST_TABLE", str(path))
    assert lutest.lookup("low", 4, 12).n == 70
    table = lutest.use(lutest.load(path, missing="interpolate"))
    assert table.path == str(path)
    assert lutest.lookup("low", 4, 12) is table["low", 4, 12]
    assert lutest.lookup("low", 5, 12) is table["low", 5, 12]
    assert lutest.use(path)["low", 4, 12].n == 70
    with pytest.raises(UnknownKeyError, match="nearest"):
        lutest.lookup("low", 5, 12)


@pytest.mark.usefixtures("nothing_in_use")
def test_a_wrong_path_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTEST_TABLE", "/nowhere/table.duckdb")
    with pytest.raises(LutestError, match="no such table file"):
        lutest.lookup("low", 4, 12)


def test_a_filled_in_configuration_says_how_far_off_it_may_be(direct_table: Path) -> None:
    table = lutest.load(direct_table, missing="interpolate")
    filled = table["low", 5, 13].explain(100, 9)
    assert filled.fill_error is not None
    assert filled.fill_error.prefill is not None
    assert 0 < filled.fill_error.prefill < 0.1
    assert "by leaving keys out" in str(filled)
    assert filled.as_dict()["fill_error"]["prefill"] == filled.fill_error.prefill
    assert table["low", 4, 12].explain(100, 9).fill_error is None
