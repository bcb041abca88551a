"""Bad input: it builds with every run accounted for, or it ends in one line that names the file and row or key.

Most inputs go through reading, checking and cleaning alone, hundreds of runs a file; fewer, and smaller, through whole
builds, whose tables must answer. All are made from fixed seeds; ``--long`` tries ten times as many and more.
"""

from __future__ import annotations

import codecs
import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

import duckdb
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lutest
from lutest.builder.build import build
from lutest.builder.clean import write_accepted_runs
from lutest.cli.main import main
from lutest.reader.errors import BuildError, ConfigError, LutestError, NoDecodeDataError, SourceError
from lutest.reader.names import quote
from lutest.runs.canonical import raw_fields
from lutest.runs.configuration import BuildConfig, load_config
from lutest.runs.sources import read_sources
from lutest.runs.work import read_runs
from lutest.tablefile.sql import connect
from tests import mutation
from tests.conftest import Tally

FIELDS = raw_fields(BuildConfig().columns)
RUNS_PER_FILE = 200
SOUND_RUN = pd.DataFrame([mutation.good_run(Random(0))])
SETTINGS = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
ACCEPTABLE = """
    prefill_ms BETWEEN 1e-6 AND 1e9 AND total_ms BETWEEN 1e-6 AND 2e9
    AND (decode_ms = 0 OR decode_ms BETWEEN 1e-6 AND 1e9)
    AND prompt_tokens BETWEEN 0 AND 1e9 AND output_tokens BETWEEN 1 AND 1e9
    AND key_id IS NOT NULL
    AND (NOT timed OR list_min(decode_steps_ms) >= 1e-6 AND list_max(decode_steps_ms) <= 1e9)
    AND (NOT timed OR coalesce(len(list_distinct(step_positions)), len(decode_steps_ms)) = output_tokens - 1)
"""


@pytest.fixture(scope="module")
def connection() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as opened:  # in memory: nothing of it outlives a test
        opened.execute("SET preserve_insertion_order = false")
        yield opened


def _one(connection: duckdb.DuckDBPyConnection, query: str) -> tuple[int, ...]:
    row = connection.execute(query).fetchone()
    assert row is not None
    return tuple(map(int, row))


def _stages(connection: duckdb.DuckDBPyConnection, path: Path, config: BuildConfig | None = None) -> tuple[int, int]:
    """Read, check and clean one file; how many runs were read and accepted, all of them accounted for.

    A sound run stands beside it, so that at least one has what every run needs.
    """
    settings = config or BuildConfig()
    read_runs(connection, [path, SOUND_RUN], settings, path.parent)
    write_accepted_runs(connection, settings.cleaning.outliers, settings.cleaning.k)
    connection.execute("CREATE OR REPLACE TEMP TABLE other AS SELECT source_id FROM source_files WHERE path LIKE '<%'")
    for table in ("runs", "accepted_runs", "rejections"):
        connection.execute(f"CREATE OR REPLACE TEMP VIEW its_{table} AS FROM {table} ANTI JOIN other USING (source_id)")
    (read,) = _one(connection, "SELECT rows_read FROM source_files ANTI JOIN other USING (source_id)")
    numbers = _one(connection, 'SELECT count(*), count(DISTINCT "row"), coalesce(max("row"), 0) FROM its_runs')
    assert numbers == (read, read, read)
    (accepted,) = _one(connection, "SELECT count(*) FROM its_accepted_runs")
    rejected, distinct = _one(connection, 'SELECT count(*), count(DISTINCT "row") FROM its_rejections')
    assert rejected == distinct == read - accepted
    unclear = connection.execute(
        r"SELECT * FROM rejections WHERE reason IS NULL OR detail IS NULL OR regexp_matches(detail, '\p{Cc}')"
    ).fetchall()
    assert unclear == []
    keys = " OR ".join(
        f"{quote(name)} IS NULL OR lower({quote(name)}::VARCHAR) IN ('', 'nan')" for name, _ in settings.key
    )
    assert connection.execute(f"SELECT * FROM keys WHERE {keys}").fetchall() == []
    unsound = connection.execute(f"SELECT * FROM accepted_runs WHERE NOT coalesce({ACCEPTABLE}, false)").fetchall()
    assert unsound == []
    return read, accepted


def _refusal(error: LutestError, name: str) -> str:
    """Message of an error: one line that names the file, not too long for a terminal."""
    message = str(error)
    assert message.isprintable()
    assert name in message or repr(name)[1:-1] in message
    assert len(message) < 1000
    return message


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_mutated_runs(
    kind: str, tmp_path: Path, connection: duckdb.DuckDBPyConnection, tally: Tally, long: bool
) -> None:
    counts = tally.setdefault(f"mutated runs ({kind})", Counter())
    path = tmp_path / f"runs.{kind}"
    for seed in range(250 if long else 4):
        random = Random(seed)
        if kind == "jsonl":
            lines = [mutation.json_line(random) for _ in range(RUNS_PER_FILE)]
            path.write_bytes(b"\n".join(lines))
            expected = sum(1 for line in lines if line.strip())
            if lines[0].startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # then all of the file is taken for it
                with pytest.raises(SourceError, match="the file is UTF-16") as caught:
                    _stages(connection, path)
                _refusal(caught.value, path.name)
                counts["refused as a whole"] += 1
                continue
        else:
            expected = RUNS_PER_FILE
            mutation.WRITERS[kind](random, path, RUNS_PER_FILE)
        read, accepted = _stages(connection, path)
        assert read == expected, seed
        counts.update(tried=read, accepted=accepted, rejected=read - accepted, lost=expected - read)
    assert counts["accepted"] > 0
    assert counts["rejected"] > 0


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_damaged_files(
    kind: str, tmp_path: Path, connection: duckdb.DuckDBPyConnection, tally: Tally, long: bool
) -> None:
    counts = tally.setdefault(f"damaged files ({kind})", Counter())
    path = tmp_path / f"runs.{kind}"
    for seed in range(1000 if long else 25):
        random = Random(seed)
        mutation.WRITERS[kind](random, path, random.choice((1, 3, 20)))
        path.write_bytes(mutation.damaged(random, path.read_bytes()) or b" ")
        counts["tried"] += 1
        try:
            read_sources(connection, [path], FIELDS, base=tmp_path)
        except SourceError as error:
            _refusal(error, path.name)
            counts["refused"] += 1
        else:
            assert _one(connection, "SELECT count(*) FROM raw_runs") == _one(
                connection, "SELECT rows_read FROM source_files"
            )
            counts["read"] += 1
    assert counts["read"] > 0
    assert counts["refused"] > 0 or kind == "jsonl"  # where each line stands for itself


def test_mutated_configurations(
    tmp_path: Path, connection: duckdb.DuckDBPyConnection, tally: Tally, long: bool
) -> None:
    counts = tally.setdefault("mutated configurations", Counter())
    path = tmp_path / "build.yaml"
    mutation.WRITERS["jsonl"](Random(0), tmp_path / "runs.jsonl", 20)
    tried = 20_000 if long else 300
    for seed in range(tried):
        path.write_bytes(mutation.yaml_text(Random(seed)))
        counts["tried"] += 1
        try:
            config = load_config(path)
        except ConfigError as error:
            message = _refusal(error, path.name)
            assert message.startswith(f"{path}: ")
            counts["refused"] += 1
            continue
        counts["valid"] += 1
        if counts["valid"] % 10:
            continue
        try:
            _stages(connection, tmp_path / "runs.jsonl", config)  # names of columns and constants reach SQL
        except LutestError as error:
            _refusal(error, "")
            counts["fits no runs"] += 1
    assert counts["valid"] > tried / 10


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (LAUGHS, "unknown option `a0`"),
        (f"{LAUGHS}sources: *a11\n".replace("a0:", "output:", 1), "unknown option `a1`"),
        ("sources: &a [*a]\n", "`sources` must be a path"),
        ("sources: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
        ("time_unit: !!int ''\n", "not valid YAML"),
        ("quantiles: !!timestamp now\n", "not valid YAML"),
        (f"quantiles: 0x{'f' * 5000}\n", "a number of thousands of digits"),
        (f"columns: {{top_k: {{constant: 0x{'f' * 5000}}}}}\n", "a number of thousands of digits|columns.top_k"),
        (f"quantiles: {'9' * 5000}\n", "not valid YAML"),
        ("[" * 700, "not valid YAML"),
        ('"a\\nb": 1\n', "unknown option"),
        ("sources: a\nsources: b\n", "`sources` stands twice"),
        ("columns: {tier: 2024-13-45}\n", "not valid YAML"),
        ("\ud800".encode("utf-16", "surrogatepass"), "not UTF-8"),
        ("a: \0", "not valid YAML"),
        ("'\u202e': 1\n", "unknown option"),
    ],
)
def test_configurations_that_attack(content: str | bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "build.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(path)
    assert _refusal(caught.value, path.name).startswith(f"{path}: ")


RUN = json.dumps(mutation.good_run(Random(1)))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", mutation.NESTED, "nested too deeply"),
        ("a.json", '{"x": ' + mutation.NESTED + "}", "nested too deeply"),
        ("a.json", '{"a":' * 100_000, "nested too deeply"),
        ("a.json", RUN.encode("utf-16"), "not UTF-8 text at byte offset 0"),
        ("a.json", RUN.encode("utf-32"), "not UTF-8 text at byte offset 0"),
        ("a.json", RUN.replace("tier", "t\xefer").encode("latin-1"), "not UTF-8 text at byte offset 3"),
        ("a.json", "", "empty"),
        ("a.json", codecs.BOM_UTF8, "blanks alone"),
        ("a.json", f"{RUN}\n{RUN}", "name a file of one object a line .jsonl"),
        ("a.json", f'{{"per_sample_results": [{RUN}], "per_sample_results": []}}', "given twice"),
        ("a.json", f'[{{"per_sample_results": [{RUN}], "per_sample_results": []}}]', "given twice"),
        ("a.json", '{"top_k": ' + "9" * 5000 + "}", "byte offset 10|no run is left"),
        ("a.json", "[]", "holds no runs"),
        ("a.jsonl", mutation.NESTED, r"a\.jsonl, row 1: line 1 is not valid JSON: values are nested too deeply"),
        ("a.jsonl", RUN.encode("utf-16"), "UTF-16"),
        ("a.jsonl", RUN.encode("utf-16-le"), "row 1: line 1 is not valid JSON"),
        ("a.jsonl", "\n\n\n", "holds no runs"),
        ("a.jsonl", f'{{"per_sample_results": [{RUN}]}}', "one run on a line"),
        ("a.jsonl", '{"tier": "a", "tier": null}', "no run has tier"),
        ("a.csv", "tier,top_k,tier\n1,2,3\n", "two columns are named 'tier'"),
        ("a.csv", "tier,top_k\nlow,4\n".encode("utf-16"), "not UTF-8"),
        ("a.csv", 'tier,top_k\n"low,4\n', "ends within quotes opened in line 2"),
        ("a.csv", "\n\n", "blank"),
        ("a.csv", "tier\r\rlow\r", "not valid CSV|no run"),
        ("a.csv", "\0\0\0\0", "holds no runs|NUL"),
        ("a.parquet", "PAR1", "cannot be read as Parquet"),
        ("a.parquet", "not Parquet, but long enough to be", "cannot be read as Parquet"),
    ],
)
def test_files_that_hold_no_run(name: str, content: str | bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(LutestError, match=words) as caught:
        build(runs=path, output=tmp_path / "t.duckdb")
    _refusal(caught.value, name)
    assert not (tmp_path / "t.duckdb").exists()


def test_a_number_without_a_text_in_a_frame_is_refused(tmp_path: Path) -> None:
    frame = pd.DataFrame({"decode_steps_ms": [10**5000]}, dtype=object)
    with pytest.raises(LutestError, match="<DataFrame 1>"):
        build(runs=frame, output=tmp_path / "t.duckdb")


def test_hostile_names_of_files_and_folders(
    tmp_path: Path, connection: duckdb.DuckDBPyConnection, tally: Tally
) -> None:
    counts = tally.setdefault("hostile file names", Counter())
    for seed, stem in enumerate(mutation.FILE_NAMES):
        folder = tmp_path / stem
        folder.mkdir()
        for kind in ("json", "jsonl", "csv", "parquet"):
            path = folder / f"{stem}.{kind}"
            path.write_bytes(b"\xff\xfe broken")
            with pytest.raises(SourceError) as caught:
                read_sources(connection, [path], FIELDS, base=tmp_path)
            assert str(caught.value).isprintable()
            mutation.WRITERS[kind](Random(seed), tmp_path / f"good.{kind}", 4)
            os.rename(tmp_path / f"good.{kind}", path)
            counts.update(tried=2, read=1, refused=1)
        read_sources(connection, list(folder.iterdir()), FIELDS, base=tmp_path)
        assert _one(connection, "SELECT count(*), sum(rows_read) FROM source_files") == (4, 16)
    summary = build(runs=[tmp_path / "new\nline", tmp_path / "bytes\udcff"], output=tmp_path / "t.duckdb")
    assert len(summary.sources) == 8
    assert all(source.rows_read == source.rows_used + source.rows_rejected == 4 for source in summary.sources)
    assert any(source.path.endswith("new\nline.csv") for source in summary.sources)


TIMES = (0, 1e-9, 5e-324, 1e-6, 1e-3, 0.5, 1, 10.0, 50.25, 50.25, 1e3, 1e6, 1e9)
LENGTHS = (0, 1, 2, 3, 100, 101, 1000, 65_536, 10**6, 10**9)


def _nasty_frame(seed: int) -> pd.DataFrame:
    """A few runs, extreme in some of their columns."""
    random = Random(seed)
    extreme = {name for name in ("prompt_tokens", "output_tokens", "prefill_ms", "steps") if random.random() < 0.4}
    only_totals, has_mixed_types = random.random() < 0.3, random.random() < 0.3
    rows = []
    for _ in range(random.choice((1, 2, 3, 8, 30))):
        run = mutation.good_run(random)
        output_tokens = random.choice((1, 1, 2, 2, 3, 17, 64))
        if "steps" in extreme:
            steps: list[object] = [random.choice(TIMES) for _ in range(output_tokens - 1)]
        else:
            steps = [round(random.uniform(9, 11), 4) for _ in range(output_tokens - 1)]
        run.update(output_tokens=output_tokens, decode_steps_ms=steps, decode_ms=None)
        if only_totals or random.random() < 0.2:
            run.update(decode_ms=math.fsum(float(str(step)) for step in steps), decode_steps_ms=None)
        if "output_tokens" in extreme and random.random() < 0.2:
            run.update(output_tokens=random.choice((1000, 10**6, 10**9)), decode_ms=1e6, decode_steps_ms=None)
        if "prompt_tokens" in extreme:
            run["prompt_tokens"] = random.choice(LENGTHS)
        if "prefill_ms" in extreme:
            run["prefill_ms"] = random.choice(TIMES)
        if random.random() < 0.1:
            run["total_ms"] = random.choice(TIMES)
        if has_mixed_types:
            run = {name: str(value) if random.random() < 0.2 else value for name, value in run.items()}
        rows.append(run)
    return pd.DataFrame(rows, dtype=object)


def _check_answers(path: Path) -> None:
    """Every configuration of a table answers, finite, above 0 and ordered by quantile."""
    table = lutest.load(path)
    for key in table.keys:
        for prompt_tokens in (None, 0, 1, 100, 10**6):
            for output_tokens in (1, 2, 3, 50, 5000):
                with suppress(NoDecodeDataError):
                    totals = [table[key].total_ms(prompt_tokens, output_tokens, q) for q in table.quantiles]
                    assert totals == sorted(totals)
                    assert 0 < totals[0] <= totals[-1] < math.inf


@pytest.mark.parametrize("part", range(4))  # parts that the processes share out
def test_small_nasty_builds(part: int, tmp_path: Path, tally: Tally, long: bool) -> None:
    counts = tally.setdefault("whole builds of extreme runs", Counter())
    for seed in range(part, 600 if long else 12, 4):
        frame = _nasty_frame(seed)
        counts["tried"] += 1
        try:
            cleaning = {"cleaning": {"outliers": ("iqr", "none")[seed % 2]}}
            summary = build(cleaning, runs=frame, output=tmp_path / "t.duckdb", implausible=True)
        except BuildError as error:
            message = _refusal(error, "<DataFrame 1>, row ")
            assert "no run is left" in message, (seed, message)
            row = int(message.split("<DataFrame 1>, row ")[1].split(":")[0])  # the first with the commonest reason
            assert 1 <= row <= len(frame), (seed, message)
            counts["no run left"] += 1
            continue
        (source,) = summary.sources
        assert source.rows_read == len(frame) == source.rows_used + source.rows_rejected
        with duckdb.connect(str(summary.output), read_only=True) as opened:
            assert _one(opened, "SELECT count(*) FROM rejected_runs") == (source.rows_rejected,)
        _check_answers(summary.output)
        counts["built"] += 1
    assert counts["built"] > counts["no run left"]


def test_types_mixed_between_files_and_rows(tmp_path: Path) -> None:
    random = Random(3)
    folder = tmp_path / "mixed"
    folder.mkdir()
    for kind in ("json", "jsonl", "csv", "parquet"):
        for number in range(2):
            mutation.WRITERS[kind](random, folder / f"{number}.{kind}", 20)
    summary = build(runs=folder, output=tmp_path / "t.duckdb")
    assert sum(source.rows_read for source in summary.sources) == sum(
        source.rows_used + source.rows_rejected for source in summary.sources
    )
    assert len(summary.sources) == 8
    assert summary.rejected.keys() >= {"missing_value", "not_a_number", "not_finite", "negative_value"}
    _check_answers(summary.output)


def test_a_hostile_tier_is_a_name_like_any_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = Random(5)
    tiers = (mutation.HOSTILE_TIER, 'a"b', "new\nline", "\x1b[31mred", "-x", "%s {0} $1", "\u6c49")
    frame = pd.DataFrame([{**mutation.good_run(random), "tier": tier} for tier in tiers for _ in range(3)])
    path = build(runs=frame, output=tmp_path / "t.duckdb").output
    table = lutest.load(path)
    assert {key[0] for key in table.keys} == set(tiers)
    for key in table.keys:
        expected = table[key].prefill_ms(100, 0.95)
        with connect(path) as opened:
            found = opened.execute("SELECT prefill_ms(?, ?, ?, 100, 0.95)", list(key)).fetchone()
        assert found is not None
        assert found[0] == pytest.approx(expected, rel=1e-9)
        arguments = [str(path), "--prompt-tokens", "100", "-q", "0.95", "--json", "--", *map(str, key)]
        assert main(["lookup", *arguments]) == 0
        assert json.loads(capsys.readouterr().out)["total"]["value_ms"] == pytest.approx(expected)
    for command in (["info", str(path)], ["feasible", str(path), "1000"], ["sql", str(path), "FROM configs"]):
        assert main(command) == 0
        printed = capsys.readouterr()
        assert "\x1b" not in printed.out
        assert "DROP TABLE prefill" in printed.out
        assert printed.err == ""


CELLS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(0, 10),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(mutation.TEXTS),
    st.lists(st.one_of(st.floats(), st.none(), st.lists(st.floats(), max_size=3)), max_size=5),
    st.dictionaries(st.text(max_size=3), st.none(), max_size=2),
)


@settings(SETTINGS, max_examples=8)
@given(st.lists(st.dictionaries(st.sampled_from(mutation.FIELDS), CELLS), min_size=1, max_size=20), st.booleans())
def test_any_values(
    tmp_path: Path, connection: duckdb.DuckDBPyConnection, runs: list[dict[str, object]], lines: bool
) -> None:
    path = tmp_path / ("any.jsonl" if lines else "any.json")
    path.write_text("\n".join(map(json.dumps, runs)) if lines else json.dumps({"per_sample_results": runs}))
    assert _stages(connection, path)[0] == len(runs)


@settings(SETTINGS, max_examples=80)
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode), st.sampled_from(["json", "jsonl", "csv"]))
def test_any_bytes(tmp_path: Path, connection: duckdb.DuckDBPyConnection, content: bytes, kind: str) -> None:
    path = tmp_path / f"any.{kind}"
    path.write_bytes(content)
    try:
        read_sources(connection, [path], FIELDS, base=tmp_path)
    except SourceError as error:
        _refusal(error, path.name)


@settings(SETTINGS, max_examples=200)
@given(st.binary(max_size=100) | st.text(max_size=100).map(str.encode))
def test_any_configuration(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "any.yaml"
    path.write_bytes(content)
    with suppress(ConfigError):
        load_config(path)
