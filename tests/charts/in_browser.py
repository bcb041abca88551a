"""Pages in a real browser: what is counted, chosen and said there. `.ci/report` runs it; $PAGES keeps what it saw."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import lutest
from tests.charts.browser import Browser, browsing, find_chromium
from tests.charts.strange import STRANGE
from tests.conftest import RUNS

TABLES = Path(__file__).parents[2] / "tables"
WIDTHS = (1400, 400)
RIGHT, PAGE_DOWN = ("ArrowRight", 39), ("PageDown", 34)
MOST_BYTES, MOST_SECONDS_TO_OPEN = 3_000_000, 2.0


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium here: $CHROMIUM names one")
    with browsing(chromium) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(os.environ.get("PAGES") or tmp_path_factory.mktemp("pages"))


@pytest.fixture(scope="module")
def cpu_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("cpu") / "olmoe-cpu-preset.duckdb"
    return lutest.build(TABLES / "cpu-preset.yaml", output=output).output


@pytest.fixture(scope="module")
def serving_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("serving") / "llama-13b-serving.duckdb"
    return lutest.build(TABLES / "llama-13b-serving.yaml", output=output).output


@pytest.fixture(scope="module")
def cpu_page(cpu_table: Path, pages: Path) -> Path:
    later = RUNS / "cpu-preset-later.parquet"
    return lutest.report(cpu_table, pages / "cpu.html", runs=later, against=cpu_table).output


@pytest.fixture(scope="module")
def serving_page(serving_table: Path, pages: Path) -> Path:
    runs = RUNS / "llama-13b-serving.parquet"
    written = lutest.report(serving_table, pages / "serving.html", runs=runs)
    print(f"\n{written.output.name}: {written.size_bytes:,} bytes in {written.seconds:.1f} s")
    assert written.size_bytes < MOST_BYTES
    return written.output


@pytest.mark.parametrize("name", ["cpu", "serving"])
def test_the_slider_counts_what_the_table_finds(name: str, browser: Browser, request: pytest.FixtureRequest) -> None:
    table = lutest.load(request.getfixturevalue(f"{name}_table"))
    browser.open(request.getfixturevalue(f"{name}_page"), WIDTHS[0])
    browser.run("document.getElementById('slider').focus()")
    counts, budgets = set(), set()
    for step in range(24):
        if step < 12:
            browser.press(*(RIGHT if step % 2 else PAGE_DOWN))
        else:
            browser.click("#slider", across=(step - 11) / 13)
        budget, fitting, said = browser.run(
            "[+document.getElementById('budget-ms').value, +document.getElementById('count').dataset.fitting,"
            " document.getElementById('count').textContent]"
        )
        output = int(browser.run("document.getElementById('output').value"))
        assert fitting == len(table.feasible(budget, output_tokens=output)), budget
        assert said.startswith(f"{fitting} of {len(table)} configurations fit")
        cells = "[...document.querySelectorAll('.grid .cell')]"
        marked = browser.run(f"{cells}.filter((cell) => cell.textContent.includes('✓')).length")
        assert marked == fitting
        counts.add(fitting)
        budgets.add(budget)
    assert len(budgets) >= 20
    assert len(counts) > 3
    assert browser.console == []


@pytest.mark.filterwarnings("ignore::lutest.LutestWarning")
def test_lengths_and_quantile_are_asked_of_the_table(cpu_table: Path, cpu_page: Path, browser: Browser) -> None:
    table = lutest.load(cpu_table)
    browser.open(cpu_page, WIDTHS[0])
    data = browser.run("JSON.parse(document.getElementById('data').textContent).common")
    budget = browser.run("+document.getElementById('budget-ms').value")
    prompts, outputs = data["prompts"], data["outputs"]
    for prompt, counts, output, level in (
        ("", "", "", 1),
        (prompts[1], "", outputs[3], 0),
        (prompts[2], "", "", 1),
        (40, "text", outputs[2], 1),
    ):
        browser.run(
            f"for (const [id, value] of [['prompt', '{prompt}'], ['counts', '{counts}'], ['output', '{output}'],"
            f" ['quantile', '{level}']]) {{ const e = document.getElementById(id); e.value = value;"
            " e.dispatchEvent(new Event(e.tagName === 'SELECT' ? 'change' : 'input')); }"
        )
        right = table.feasible(
            budget,
            prompt_tokens=int(prompt) if prompt and not counts else None,
            text_tokens=int(prompt) if prompt and counts else None,
            output_tokens=int(output) if output else None,
            q=table.quantiles[level],
        )
        assert browser.run("+document.getElementById('count').dataset.fitting") == len(right)
    assert browser.console == []


def test_a_click_chooses_a_configuration(cpu_page: Path, browser: Browser) -> None:
    browser.open(cpu_page, WIDTHS[0])
    chosen = "[...document.querySelectorAll('.grid .cell[aria-pressed=true]')].map((c) => +c.dataset.key)"
    before = browser.run(chosen)
    key = next(key for key in range(27) if key not in before)
    browser.click(f".grid .cell[data-key='{key}']")
    assert sorted(browser.run(chosen)) == sorted([*before, key])
    assert browser.run("document.querySelectorAll('#curves .chosen button').length") == len(before) + 1
    assert browser.run("document.querySelectorAll('#curves figure path.band').length") == 2 * (len(before) + 1)
    browser.run("document.querySelector('#curves .chosen button').focus()")
    browser.press("Enter", 13, "\r")
    assert len(browser.run(chosen)) == len(before)
    assert browser.run("document.activeElement.tagName") == "SELECT"
    assert browser.console == []


def test_every_picture_has_a_name_and_a_table_behind_it(cpu_page: Path, browser: Browser) -> None:
    browser.open(cpu_page, WIDTHS[0])
    pictures = "[...document.querySelectorAll('figure > svg')]"
    assert browser.run(f"{pictures}.every((picture) => picture.getAttribute('aria-label').length > 20)")
    assert browser.run("document.querySelectorAll('figure').length") == 9
    browser.run("for (const e of document.querySelectorAll('figure details')) e.open = true")
    rows = browser.run(
        "new Promise((done) => setTimeout(() => done([...document.querySelectorAll('figure')]"
        ".map((e) => e.querySelectorAll('details table tbody tr').length)), 200))"
    )
    assert min(rows) > 1
    assert browser.run("[...document.querySelectorAll('input, select')].every((e) => e.labels.length || e.ariaLabel)")


def test_names_stay_text(strange_table: Path, tmp_path: Path, browser: Browser) -> None:
    page = lutest.report(strange_table, tmp_path / "page.html", against=strange_table).output
    browser.open(page, WIDTHS[0])
    assert browser.run("document.querySelectorAll('main i, main img, main b > i').length") == 0
    text = browser.run("document.body.textContent")
    assert all(name in text for name in STRANGE)
    assert browser.console == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_pages_open_soon_and_fit_the_window(
    width: int, dark: bool, cpu_page: Path, serving_page: Path, browser: Browser, pages: Path
) -> None:
    for page in (cpu_page, serving_page):
        started = time.monotonic()
        browser.open(page, width, dark=dark)
        assert time.monotonic() - started < MOST_SECONDS_TO_OPEN
        assert browser.run("document.documentElement.scrollWidth") == width
        browser.screenshot(pages / f"{page.stem}-{width}-{'dark' if dark else 'light'}.png")
    assert browser.console == []
    if width == WIDTHS[0] and not dark:
        browser.print(pages / "serving.pdf")
        assert (pages / "serving.pdf").stat().st_size > 10_000
