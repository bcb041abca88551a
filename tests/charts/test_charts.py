"""Charts for notebooks and files, and how tables and entries show themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lutest
from lutest.cli.main import main
from tests.charts.strange import STRANGE
from tests.synthetic import NO_DECODE, make_figures

pytest.importorskip("altair")

TABLE = lutest.LatencyTable(make_figures())


def rows_of(chart: Any) -> list[dict[str, Any]]:
    """All rows that a chart is drawn from."""
    held = chart.to_dict()
    found: list[dict[str, Any]] = []

    def collect(part: dict[str, Any]) -> None:
        found.extend(part.get("data", {}).get("values", []))
        for inner in [*part.get("layer", []), *([part["spec"]] if "spec" in part else [])]:
            collect(inner)

    collect(held)
    return found


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_curves_are_those_of_entries(stage: str) -> None:
    keys = [("low", 4, 12), ("medium", 8, 16)]
    rows = rows_of(getattr(lutest.charts, stage)(TABLE, keys))
    assert {row["configuration"] for row in rows} == {"low · 4 · 12", "medium · 8 · 16"}
    for row in rows:
        tier, top_k, num_blocks = row["configuration"].split(" · ")
        entry = TABLE[tier, int(top_k), int(num_blocks)]
        ask = entry.prefill_ms if stage == "prefill" else entry.decode_step_ms
        for q, name in ((0.5, "p50_ms"), (0.95, "p95_ms")):
            assert row[name] == pytest.approx(ask(row["tokens"], q), rel=1e-12)
        assert row["knot"] or row["n"] == 0


def test_of_many_configurations_the_ends_and_the_middle_are_drawn() -> None:
    assert len({row["configuration"] for row in rows_of(lutest.charts.prefill(TABLE))}) == 3


def test_the_budget_marks_what_the_table_finds() -> None:
    for asked in ({}, {"output_tokens": 16}, {"output_tokens": 4, "prompt_tokens": 160, "q": 0.5}):
        rows = rows_of(lutest.charts.budget(TABLE, 60.0, **asked))
        fitting = [row["configuration"] for row in rows if row["fits"]]
        right = TABLE.feasible(60.0, **asked)
        assert fitting == [" · ".join(map(str, key)) for key in right]
        assert all(row["shown"].startswith("✓") == row["fits"] for row in rows)


def test_the_frontier_is_the_tables() -> None:
    rows = rows_of(lutest.charts.frontier(TABLE, output_tokens=4))
    right = TABLE.frontier(output_tokens=4)
    on_it = {row["configuration"]: (row["ms"], row["quality"]) for row in rows if row["frontier"]}
    assert on_it == {" · ".join(map(str, option.key)): (option.latency_ms, option.quality) for option in right}


def test_coverage_is_that_of_evaluate(direct_table: Path, direct_runs: Path) -> None:
    rows = rows_of(lutest.charts.coverage(direct_table, direct_runs, stage="prefill"))
    right = [score for score in lutest.evaluate(direct_table, direct_runs).by_key if score.stage == "prefill"]
    held = {row["configuration"]: row for row in rows if "configuration" in row}
    assert len(held) == len(right) == 27
    for score in right:
        row = held[" · ".join(map(str, score.key or ()))]
        assert (row["share"], row["n"]) == (score.coverage[0.95], score.n)
        assert row["from"] <= row["share"] <= row["to"]


@pytest.mark.parametrize(
    ("draw", "said"),
    [
        (lambda: lutest.charts.decode(TABLE, [NO_DECODE]), "had a decode step"),
        (lambda: lutest.charts.prefill(TABLE, list(TABLE.keys)), "keys has 12; allowed: 1 to 6"),
        (lambda: lutest.charts.prefill(TABLE, [("low", 5, 12)]), "was not measured"),
        (lambda: lutest.charts.save(lutest.charts.prefill(TABLE), "prefill.pdf"), "must end in .svg or .png"),
    ],
)
def test_what_cannot_be_drawn_is_said(draw: Any, said: str) -> None:
    with pytest.raises(lutest.LutestError, match=said):
        draw()


def test_plot_writes_pictures_and_replaces_no_others(direct_table: Path, direct_runs: Path, tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    runs = ["--runs", str(direct_runs)]
    lengths = ["--output-tokens", "8"]
    for name, more in (("decode.svg", []), ("decode.svg", []), ("budget.png", lengths), ("coverage.svg", runs)):
        given = ["plot", str(direct_table), name.partition(".")[0], "-o", str(tmp_path / name), *more]
        assert main(given) == 0
        content = (tmp_path / name).read_bytes()
        assert content.startswith(b"\x89PNG" if name.endswith("png") else b"<svg")
        assert len(content) > 3_000
    (tmp_path / "mine.svg").write_text("<svg/>", encoding="utf-8")
    assert main(["plot", str(direct_table), "decode", "-o", str(tmp_path / "mine.svg")]) == 2
    assert (tmp_path / "mine.svg").read_text(encoding="utf-8") == "<svg/>"


def test_without_the_extra_one_line_says_what_to_install(direct_table: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['altair'] = None\n"
        "from lutest.cli.main import main\n"
        f"status = main(['report', {str(direct_table)!r}, '-o', {str(tmp_path / 'report.html')!r}])\n"
        f"sys.exit(10 * status + main(['plot', {str(direct_table)!r}, 'decode', '-o', 'decode.svg']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "lutest: error: charts are drawn with Altair and vl-convert-python: pip install 'lutest[report]'"
    ]


def test_a_frame_has_the_numbers_of_entries() -> None:
    frame = TABLE.to_pandas()
    assert list(frame.columns[:4]) == ["tier", "top_k", "num_blocks", "n"]
    for key, row in zip(TABLE.keys, frame.to_dict("records"), strict=True):
        entry = TABLE[key]
        assert (row["tier"], row["top_k"], row["num_blocks"], row["n"]) == (*key, entry.n)
        assert row["prefill_p95_ms"] == entry.prefill_p95_ms
        if entry.decode_step_p50_ms is None:
            assert row["decode_step_p50_ms"] != row["decode_step_p50_ms"]
        else:
            assert row["decode_step_p50_ms"] == entry.decode_step_p50_ms


def test_knots_are_exact() -> None:
    entry = TABLE["low", 8, 12]
    for row in entry.curve():
        ask = entry.prefill_ms if row["stage"] == "prefill" else entry.decode_step_ms
        assert row["p95_ms"] == pytest.approx(ask(row["tokens"], 0.95), rel=1e-12)
    assert {row["stage"] for row in entry.curve()} == {"prefill", "decode_step"}


def test_notebooks_show_names_as_text(strange_table: Path) -> None:
    table = lutest.load(strange_table)
    for shown in (table._repr_html_(), table[table.keys[0]]._repr_html_()):
        assert "<script" not in shown
        assert "<img" not in shown
        assert "<table" in shown
    assert "&lt;script&gt;" in table._repr_html_()
    drawn = {row["configuration"].split(" · ")[0] for row in rows_of(lutest.charts.budget(table))}
    assert drawn == set(STRANGE)
