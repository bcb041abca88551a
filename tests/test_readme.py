"""Every command and example of the README and of docs/ runs, page by page, from top to bottom."""

from __future__ import annotations

import re
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path

import duckdb
import pytest

from lutest.cli.main import main
from lutest.runs.configuration import BuildConfig, load_config
from lutest.tablefile.sql import connect

PROJECT = Path(__file__).parent.parent
README = "README.md"
PAGES = (README, *sorted(f"docs/{page.name}" for page in (PROJECT / "docs").glob("*.md")))
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TABLE = re.compile(r"\btables/[\w-]+\.duckdb\b")
# what of which page needs torch; `.ci/run` installs it
ON_TORCH = {"docs/rewards.md": "import torch\n", "docs/your-own-runs.md": "lutest profile "}


def _text(page: str) -> str:
    return (PROJECT / page).read_text(encoding="utf-8")


def _start() -> str:
    return _text(README).split("\n## Start\n")[1].split("\n## ")[0]


def _examples(page: str) -> list[tuple[str, str]]:
    """Language and code of each block, without the two commands of the start."""
    return FENCED.findall(_text(page).replace(_start(), ""))


def _needs_torch(page: str, code: str) -> bool:
    return page in ON_TORCH and ON_TORCH[page] in code


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, direct_runs: Path, direct_table: Path) -> Path:
    """The project's folder: shipped runs and a table; runs of one's own, other names and keys, a slower device."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(PROJECT / "tables", folder / "tables", ignore=shutil.ignore_patterns("*.duckdb", ".*"))
    shutil.copy(direct_table, folder / "tables" / "olmoe-cpu-direct.duckdb")
    for name in ("results", "held-out", "new-device", "new-device-later", "elsewhere", "sweep"):
        (folder / name).mkdir()
    shutil.copy(PROJECT / "tests" / "data" / "guidellm-0.8.1.json", folder / "sweep" / "benchmarks.json")
    shutil.copy(PROJECT / "tests" / "data" / "vllm-bench-serve.json", folder / "sweep" / "vllm.json")
    serving = folder / "tables" / "runs" / "llama-13b-serving.parquet"
    few = """
        SELECT * FROM direct WHERE tier = 'low' AND top_k IN (4, 8) AND num_blocks = 16
        QUALIFY row_number() OVER (PARTITION BY top_k ORDER BY sample_id::INTEGER)
    """
    served = """
        SELECT {columns} FROM serving WHERE {which}
        QUALIFY row_number() OVER (PARTITION BY gpu, n_gpus, users ORDER BY started_ms, sample_id) <= 40
    """
    slower = """
        SELECT * EXCLUDE (decode_steps_ms, total_ms)
            REPLACE (1.5 * prefill_ms AS prefill_ms, 1.5 * decode_ms AS decode_ms)
        FROM direct USING SAMPLE reservoir({n} ROWS) REPEATABLE ({seed})
    """
    files = {
        "results/runs.parquet": f"{few} > 20",
        "held-out/runs.parquet": f"{few} <= 20",
        "new-device/runs.csv": slower.format(n=60, seed=0),
        "new-device-later/runs.csv": slower.format(n=200, seed=1),
        "elsewhere/seconds.csv": f"""
            SELECT top_k, num_blocks, prompt_tokens, output_tokens, prefill_ms / 1e3 AS ttft, decode_ms / 1e3 AS decode
            FROM ({few} <= 20)
        """,
        "elsewhere/served.csv": served.format(
            columns="* EXCLUDE (decode_steps_ms), prefill_ms + list_sum(decode_steps_ms) AS total_ms",
            which="gpu = 'A100' AND n_gpus = 2 AND users IN (8, 16) AND output_tokens > 1",
        ),
        "served.parquet": served.format(columns="*", which="gpu = 'H100' AND n_gpus = 2 AND users IN (1, 32, 128)"),
    }
    with duckdb.connect() as connection:
        connection.execute(f"CREATE VIEW direct AS SELECT * FROM read_parquet('{direct_runs}')")
        connection.execute(f"CREATE VIEW serving AS SELECT * FROM read_parquet('{serving}')")
        for target, query in files.items():
            connection.execute(f"COPY ({query}) TO '{folder / target}'")
    shutil.move(folder / "served.parquet", serving)  # a few of the requests, for speed
    return folder


@pytest.fixture
def in_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)


def _run_page(page: str, printed: pytest.CaptureFixture[str], *, on_torch: bool) -> None:
    text, names = _text(page), {"__name__": page}
    examples = [(language, code, _needs_torch(page, code)) for language, code in _examples(page)]
    needed = {language for language, _, torch in examples if torch}
    waiting = ""  # content of the file that the next command reads
    for language, code, needs_torch in examples:
        if needs_torch and not on_torch:
            continue
        if "lutest plot" in code and find_spec("vl_convert") is None:  # `.ci/report` installs it
            continue
        if on_torch and not needs_torch and (language != "python" or language not in needed):
            continue
        if language == "python":
            exec(compile(code, page, "exec"), names)
        elif language == "sql":
            with connect(TABLE.findall(text)[0]) as connection:
                cursor = connection.execute(code)
                assert cursor.description, code
                assert cursor.fetchall() or "rejected_runs" in code, code
        elif language == "yaml":
            waiting = code
        else:
            assert language == "sh"
            for command in map(shlex.split, code.splitlines()):
                assert command[0] == "lutest"
                if waiting:
                    Path(command[command.index("--config") + 1]).write_text(waiting, encoding="utf-8")
                    waiting = ""
                printed.readouterr()
                assert main(command[1:]) == 0, (command, printed.readouterr())
                output = printed.readouterr()
                assert output.out, command
                assert output.err == "", command
    assert not waiting


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.usefixtures("in_project")
def test_examples(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    _run_page(page, capsys, on_torch=False)


@pytest.mark.parametrize("page", ON_TORCH)
@pytest.mark.usefixtures("in_project")
def test_examples_on_torch(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    _run_page(page, capsys, on_torch=True)


def test_what_needs_torch_is_listed() -> None:
    for page in PAGES:
        for language, code in _examples(page):
            wants = re.search(r"\b(torch|trl|transformers|lutest profile)\b", re.sub(r"#.*", "", code))
            assert bool(wants) == _needs_torch(page, code), (page, language, code)


def test_start_holds_exactly_two_commands() -> None:
    blocks = FENCED.findall(_start())
    assert [language for language, _ in blocks] == ["sh", "sh"]
    assert [code.count("\n") for _, code in blocks] == [1, 1]
    build, test = (code.strip() for _, code in blocks)
    assert build.endswith("lutest build")
    assert test.endswith("-m pytest")


def test_the_first_command_builds_the_table_of_the_examples() -> None:
    shipped = load_config(PROJECT / "tables" / "build.yaml")
    assert shipped.sources == ("runs/direct.parquet",)
    assert f"tables/{shipped.output}" == TABLE.findall(_text(README))[0]
    assert shipped == BuildConfig(sources=shipped.sources, output=shipped.output, base=shipped.base)


def test_the_first_page_is_short() -> None:
    assert len(_text(README).split()) <= 1200


def test_links_between_pages_lead_somewhere() -> None:
    for page in (*PAGES, "CONTRIBUTING.md", "CHANGELOG.md", "tables/README.md", "benchmarks/README.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", _text(page)):
            assert target.startswith("https://") or (PROJECT / page).parent.joinpath(target).exists(), (page, target)
