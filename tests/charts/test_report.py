"""The page of a table: its numbers are the library's, and nothing in it comes from or goes anywhere."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

import lutest
from lutest.cli.main import main
from lutest.tablefile.description import describe
from tests.charts.strange import STRANGE

EXACT = 1e-8  # the page has nine digits


class Page(HTMLParser):
    """Elements, text and data of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._inside = "", ""
        self.path, self.source = path, path.read_text(encoding="utf-8")
        self.feed(self.source)
        (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', self.source, re.DOTALL)
        self.data: dict[str, Any] = json.loads(found)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text += data

    def configurations(self) -> list[tuple[Any, ...]]:
        return [tuple(key) for key in self.data["keys"]]

    def total_ms(self, place: int, prompt: int | None, output: int, level: int) -> float:
        """As the page's script interpolates."""
        held = self.data["totals"][place]

        def along(row: list[float]) -> float:
            return float(np.interp(output, held["outputs"], row))

        if prompt is None:
            return along(held["own_ms"][level])
        return float(np.interp(prompt, held["prompts"], [along(row) for row in held["ms"][level]]))


def page_of(table: Path | lutest.LatencyTable, folder: Path) -> Page:
    return Page(lutest.report(table, folder / "report.html").output)


@pytest.fixture(scope="module")
def direct_page(direct_table: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page_of(direct_table, tmp_path_factory.mktemp("report"))


def test_totals_are_exact_at_the_common_lengths_and_close_between_them(direct_table: Path, direct_page: Page) -> None:
    table, data = lutest.load(direct_table), direct_page.data
    assert direct_page.configurations() == list(table.keys)
    prompts, outputs = data["common"]["prompts"], data["common"]["outputs"]
    random = np.random.default_rng(0)
    for place, key in enumerate(table.keys):
        entry = table[key]
        for level, q in enumerate(table.quantiles):
            for prompt in (None, *prompts):
                for output in outputs:
                    found = direct_page.total_ms(place, prompt, output, level)
                    assert found == pytest.approx(entry.total_ms(prompt, output, q), rel=EXACT)
            for prompt, output in zip(
                random.integers(prompts[0], prompts[-1], 20).tolist(),
                random.integers(outputs[0], outputs[-1], 20).tolist(),
                strict=True,
            ):
                found = direct_page.total_ms(place, prompt, output, level)
                assert found == pytest.approx(entry.total_ms(prompt, output, q), rel=0.01)
    assert 0.0 < data["error"] <= 0.01


@pytest.mark.filterwarnings("ignore::lutest.LutestWarning")
def test_what_fits_is_what_the_table_finds(direct_table: Path, direct_page: Page) -> None:
    table, tail = lutest.load(direct_table), direct_page.data["quantiles"].index(0.95)
    low, high = direct_page.data["start"]["budgets"]
    for budget in np.geomspace(low, high, 20).tolist():
        for prompt in (None, direct_page.data["common"]["prompts"][1]):
            for output, share in ((16, 1.0), (None, direct_page.data["prefill_share"])):
                fitting = [
                    key
                    for place, key in enumerate(direct_page.configurations())
                    for least, most in [direct_page.data["totals"][place]["reach"]]
                    if prompt is None or least <= prompt <= most
                    if direct_page.total_ms(place, prompt, output or 1, tail) <= budget * share
                ]
                assert fitting == table.feasible(budget, prompt_tokens=prompt, output_tokens=output)


def test_curves_and_shares_are_those_of_entries(direct_table: Path, direct_page: Page) -> None:
    table = lutest.load(direct_table)
    for key, curves, shares in zip(table.keys, direct_page.data["curves"], direct_page.data["shares"], strict=True):
        entry = table[key]
        for stage, ask in (("prefill", entry.prefill_ms), ("decode_step", entry.decode_step_ms)):
            held = curves[stage]
            for q, name in ((0.5, "p50_ms"), (0.95, "p95_ms")):
                assert held[name] == pytest.approx([ask(at, q) for at in held["tokens"]], rel=EXACT)
            knots = [row for row in entry.curve() if row["stage"] == stage]
            assert held["source"][:-1] == [row["source"] for row in knots]
            assert held["n"] == [*(row["n"] for row in knots), 0]
            assert held["source"][-1] == "extrapolated"
        assert shares["share"] == pytest.approx([entry.p_within(b) for b in shares["budget_ms"]], abs=EXACT)
        assert shares["share"] == sorted(shares["share"])


@pytest.fixture(scope="module")
def judged_page(direct_table: Path, direct_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    output = tmp_path_factory.mktemp("judged") / "report.html"
    assert main(["report", str(direct_table), "--runs", str(direct_runs), "-o", str(output)]) == 0
    return Page(output)


def test_runs_are_judged_as_evaluate_and_diagnose_do(direct_table: Path, direct_runs: Path, judged_page: Page) -> None:
    held, right = judged_page.data["judged"], lutest.evaluate(direct_table, direct_runs)
    assert (held["n_runs"], held["left_out"]) == (right.n_runs, right.left_out)
    assert held["warnings"] == list(right.warnings)
    for group in ("overall", "by_output_tokens", "by_key"):
        for found, score in zip(held[group], getattr(right, group), strict=True):
            key = None if found["place"] is None else judged_page.configurations()[found["place"]]
            assert (key, found["stage"], found["output_tokens"], found["n"]) == (
                score.key, score.stage, score.output_tokens, score.n,
            )  # fmt: skip
            for name in ("mae_ms", "median_ape", "bias"):
                assert found[name] == pytest.approx(getattr(score, name), rel=EXACT)
            for (share, low, high), covered in zip(found["coverage"].values(), score.coverage.values(), strict=True):
                assert share == pytest.approx(covered, rel=EXACT)
                if score.stage == "decode step":
                    assert (low, high) == (None, None)
                else:
                    interval = binomtest(round(covered * score.n), score.n).proportion_ci()
                    assert (low, high) == pytest.approx((interval.low, interval.high), rel=EXACT)
    findings = [(finding.name, finding.sentence) for finding in lutest.diagnose(direct_runs)]
    assert [(finding["name"], finding["sentence"]) for finding in held["findings"]] == findings


def test_dots_are_runs(direct_table: Path, direct_frame: pd.DataFrame, judged_page: Page) -> None:
    table, held = lutest.load(direct_table), judged_page.data["judged"]
    assert len(held["runs"]) > 1900
    seen = {tuple(np.round(pair, 4)) for pair in direct_frame[["prompt_tokens", "prefill_ms"]].to_numpy()}
    for place, dots in held["dots"]["prefill"].items():
        assert {tuple(np.round(dot, 4)) for dot in dots} <= seen
        assert len(dots) == sum(place == str(run[0]) for run in held["runs"])
    totals = set(np.round(direct_frame["total_ms"], 4))
    assert {round(observed, 4) for _, observed, *_ in held["runs"]} <= totals
    above = np.mean([observed > p95 for _, observed, _, p95 in held["runs"]])
    (score,) = (score for score in lutest.evaluate(table, direct_frame).overall if score.stage == "total")
    assert above == pytest.approx(1.0 - score.coverage[0.95], abs=0.01)


def test_changes_are_those_of_diff(direct_table: Path, subtraction_table: Path, tmp_path: Path) -> None:
    page = Page(lutest.report(direct_table, tmp_path / "page.html", against=subtraction_table).output)
    right = lutest.diff(subtraction_table, direct_table)
    places = {key: place for place, key in enumerate(page.configurations())}
    for found, change in zip(page.data["changes"]["rows"], right.changes, strict=True):
        assert found["place"] == (None if change.key is None else places[change.key])
        assert (found["stage"], found["q"], found["verdict"]) == (change.stage, change.q, change.verdict)
        names = ("ratio", "lower", "upper", *(("old_ms", "new_ms") if change.key else ()))
        assert [found[name] for name in names] == pytest.approx([getattr(change, name) for name in names], rel=EXACT)
    assert page.data["changes"]["only_new"] == [list(key) for key in right.only_new]


def test_the_page_says_what_the_table_is(direct_table: Path, direct_page: Page) -> None:
    held = describe(lutest.load(direct_table))
    text = direct_page.text.replace("\u2068", "").replace("\u2069", "")
    (source,) = held["sources"]
    for said in (
        "27 configurations",
        f"{source['rows_used']:,}",
        f"{source['rows_read']:,} read",
        "direct.parquet",
        held["meta"]["content_hash"],
        *(f"{n} {reason}" for reason, n in held["rejected"].items()),
        *(f"({key['n']}, {key['runs_wanted']} more wanted)" for key in held["keys"] if key["runs_wanted"]),
    ):
        assert said in text, said


def test_the_page_needs_nothing_outside_of_itself(direct_page: Page) -> None:
    for tag, attributes in direct_page.elements:
        assert tag not in ("img", "iframe", "object", "embed")
        for name in ("src", "href", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    (policy,) = (held["content"] for tag, held in direct_page.elements if held.get("http-equiv"))
    assert policy is not None
    assert "default-src 'none'" in policy
    assert not re.findall(r"https?://(?!www\.w3\.org/)", direct_page.source)


def test_names_are_shown_as_text_whatever_they_hold(strange_table: Path, tmp_path: Path) -> None:
    page = page_of(strange_table, tmp_path)
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert not {tag for tag, _ in page.elements} & {"i", "img"}
    assert {key[0] for key in page.configurations()} == set(STRANGE)
    assert page.data["columns"][0]["name"] == "<i>way</i>"
    for name in (*STRANGE, "<i>way</i>", strange_table.name):
        assert name in page.text


def test_the_frontier_is_that_of_the_table(strange_table: Path, tmp_path: Path) -> None:
    table, page = lutest.load(strange_table), page_of(strange_table, tmp_path)
    (rows,) = page.data["quality"].values()
    level = page.data["quantiles"].index(0.95)
    options = [(page.total_ms(row["key"], None, 1, level), -row["quality"], row["key"]) for row in rows]
    front: list[tuple[float, float, int]] = []
    for option in sorted(options):
        if not front or option[1] < front[-1][1]:
            front.append(option)
    right = table.frontier()
    assert [page.configurations()[place] for *_, place in front] == [option.key for option in right]
    assert [-quality for _, quality, _ in front] == pytest.approx([option.quality for option in right], rel=EXACT)


def test_only_a_report_is_replaced(direct_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "report.html"
    for _ in range(2):
        assert main(["report", str(direct_table), "-o", str(output)]) == 0
        assert "KiB" in capsys.readouterr().out
    output.write_text("<p>mine</p>", encoding="utf-8")
    assert main(["report", str(direct_table), "-o", str(output)]) == 2
    assert "not a report of lutest" in capsys.readouterr().err
    assert output.read_text(encoding="utf-8") == "<p>mine</p>"
