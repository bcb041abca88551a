"""A damaged table file is refused, or its numbers are those that were written: never others, no hang, no crash."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import duckdb
import pytest

import lutest
from lutest.builder.build import build
from lutest.cli.main import main
from lutest.reader.errors import TableError
from lutest.reader.names import SCHEMA_VERSION
from lutest.reader.seal import write_seal
from lutest.tablefile.verify import content_hash, verify
from tests.children import Outcome, loaded, run_child, verified
from tests.conftest import Tally
from tests.runs_frame import noisy_runs

PROJECT = Path(__file__).parents[2]
BLOCK_BYTES = 16_384
HEADER_BYTES = 3 * 4096


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build({}, runs=noisy_runs(), output=tmp_path_factory.mktemp("whole") / "table.duckdb").output


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(whole, tmp_path / "table.duckdb"))


def _flip_a_bit(content: bytearray, generator: random.Random) -> None:
    bit = generator.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8


def _cut_off(content: bytearray, generator: random.Random) -> None:
    del content[generator.randrange(len(content)) :]


def _misplace_a_block(content: bytearray, generator: random.Random) -> None:
    """Put one block, checksum and all, in the place of another."""
    n_blocks = (len(content) - HEADER_BYTES) // BLOCK_BYTES
    source, target = (HEADER_BYTES + BLOCK_BYTES * place for place in generator.sample(range(n_blocks), 2))
    content[target : target + BLOCK_BYTES] = content[source : source + BLOCK_BYTES]


def _overwrite(content: bytearray, generator: random.Random) -> None:
    place = generator.randrange(len(content))
    content[place : place + 512] = generator.randbytes(len(content[place : place + 512]))


@pytest.mark.parametrize(
    ("damage", "tries", "long_tries"),
    [(_flip_a_bit, 40, 800), (_cut_off, 20, 200), (_misplace_a_block, 8, 100), (_overwrite, 8, 100)],
)
def test_damage_is_detected_or_harmless(
    damage: Callable[[bytearray, random.Random], None],
    tries: int,
    long_tries: int,
    whole: Path,
    tmp_path: Path,
    long: bool,
    tally: Tally,
) -> None:
    generator = random.Random(damage.__name__)
    numbers = run_child(verified, str(whole)).value
    assert numbers is not None
    assert run_child(loaded, str(whole)).value == numbers
    path = tmp_path / "table.duckdb"
    verifying = Counter(tries=0, detected=0, harmless=0, lost=0)
    loading = Counter(verifying)
    name = damage.__name__.strip("_").replace("_", " ")
    tally[f"{name}: verify()"] = verifying
    tally[f"{name}: load()"] = loading
    for _ in range(long_tries if long else tries):
        content = bytearray(whole.read_bytes())
        damage(content, generator)
        if content == whole.read_bytes():
            continue
        path.write_bytes(content)
        for load, counts in ((verified, verifying), (loaded, loading)):
            fate = _fate(run_child(load, str(path), limit_s=60), numbers)
            counts.update({"tries": 1, fate: 1})
    assert verifying["lost"] == 0
    assert verifying["harmless"] == 0  # the seal covers every byte
    assert loading["lost"] == 0
    assert verifying["tries"] > 0.8 * (long_tries if long else tries)


def _fate(outcome: Outcome, numbers: str) -> str:
    if not outcome.ended:
        return "lost"
    if outcome.error is not None:
        return "detected" if "\n" not in outcome.error else "lost"
    return "harmless" if outcome.value == numbers else "lost"


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE decode SET p50_ms = p50_ms * 0.99 WHERE top_k = 8",
        "DELETE FROM output_length WHERE output_tokens = 1",
        "INSERT INTO quality SELECT tier, top_k, num_blocks, 'w', 1, 0.5, NULL, NULL FROM prefill LIMIT 1",
        "UPDATE meta SET value = repeat('0', 64) WHERE key = 'content_hash'",
        "DELETE FROM meta WHERE key = 'content_hash'",
        "UPDATE sources SET path = 'elsewhere.json'",
    ],
)
def test_changes_by_sql_are_detected(change: str, copy: Path) -> None:
    with duckdb.connect(str(copy)) as connection:
        connection.execute(change)
    lutest.load(copy)
    with pytest.raises(TableError, match="seal"):
        verify(copy)
    write_seal(copy)
    if "path" in change:  # where the runs lay is not part of the content
        verify(copy)
        return
    with pytest.raises(TableError, match="content hash"):
        verify(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("UPDATE sources SET rows_read = rows_read + 1", "do not add up"),
        ("UPDATE sources SET rows_read = rows_read + 1, rows_rejected = 1", "do not add up"),
        (
            "INSERT INTO rejected_runs (source_id, row, reason) VALUES (7, 1, 'made up')",
            "source_id 7 is not in sources",
        ),
        (
            "UPDATE output_length SET n = n + 1 WHERE output_tokens = 1",
            "table output_length: n adds up to 12[0-9] runs",
        ),
        ("UPDATE prefill SET n = n + 1 WHERE top_k = 8", "table prefill: n adds up to 121 runs, not 120"),
    ],
)
def test_counts_that_do_not_agree(change: str, message: str, copy: Path) -> None:
    with duckdb.connect(str(copy)) as connection:
        connection.execute(change)
        connection.execute("UPDATE meta SET value = ? WHERE key = 'content_hash'", [content_hash(connection)])
    write_seal(copy)
    with pytest.raises(TableError, match=message):
        verify(copy)


@pytest.mark.parametrize("version", [str(SCHEMA_VERSION - 1), str(SCHEMA_VERSION + 1), "1.5", None])
def test_other_schema_versions_are_refused(version: str | None, copy: Path) -> None:
    with duckdb.connect(str(copy)) as connection:
        if version is None:
            connection.execute("DELETE FROM meta WHERE key = 'schema_version'")
        else:
            connection.execute("UPDATE meta SET value = ? WHERE key = 'schema_version'", [version])
    write_seal(copy)
    found = "no schema version" if version is None else f"schema version {version}"
    for load in (lutest.load, verify):
        with pytest.raises(
            TableError, match=f"has {found}, this lutest reads version {SCHEMA_VERSION}; build it again"
        ):
            load(copy)


def test_what_is_no_table(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.duckdb"
    os.mkfifo(pipe)  # whoever opens it waits for a writer
    empty = tmp_path / "empty.duckdb"
    empty.touch()
    text = tmp_path / "text.duckdb"
    text.write_text("no table\n" * 5000)
    with duckdb.connect(str(tmp_path / "other.duckdb")) as connection:
        connection.execute("CREATE TABLE prefill (a INTEGER)")
    for path in (tmp_path, tmp_path / "missing.duckdb", pipe, empty, text, tmp_path / "other.duckdb"):
        for load in (loaded, verified):
            outcome = run_child(load, str(path), limit_s=60)
            assert outcome.ended
            assert outcome.error is not None
            assert outcome.error.startswith(f"{path}: ")
            assert "\n" not in outcome.error


def test_the_seal_leaves_the_file_to_duckdb(copy: Path) -> None:
    before = copy.read_bytes()
    with duckdb.connect(str(copy), read_only=True) as connection:
        assert connection.execute("SELECT count(*) FROM configs").fetchone() == (3,)
    assert copy.read_bytes() == before
    verify(copy)
    with duckdb.connect(str(copy)) as connection:
        connection.execute("CREATE TABLE note AS SELECT * FROM range(100000)")
    with duckdb.connect(str(copy)) as connection:
        connection.execute("DROP TABLE note")
    assert lutest.load(copy).keys == lutest.load(copy).keys != ()
    with pytest.raises(TableError, match="seal"):
        verify(copy)


def test_verify_says_what_it_checked(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verification = verify(whole)
    table = lutest.load(whole)
    assert verification.content_hash == table.meta["content_hash"]
    assert verification.rows["prefill"] == len(table.keys) == 3
    assert verification.size_bytes == whole.stat().st_size
    assert main(["verify", str(whole)]) == 0
    printed = capsys.readouterr().out
    assert verification.content_hash in printed
    assert main(["verify", str(whole), "--json"]) == 0
    assert f'"content_hash": "{verification.content_hash}"' in capsys.readouterr().out


def test_verify_refuses_exports(whole: Path, tmp_path: Path) -> None:
    exported = lutest.export(whole, tmp_path / "table.json").output
    lutest.load(exported)
    for check in (verify, verified):
        with pytest.raises(TableError, match=r"table\.json: verify checks table files, not exports"):
            check(str(exported))


def test_verify_of_a_damaged_table_is_one_line(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytearray(copy.read_bytes())
    content[100_000] ^= 4
    copy.write_bytes(content)
    assert main(["verify", str(copy)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"lutest: error: {copy}: damaged")
    assert printed.err.count("\n") == 1


def test_verify_needs_neither_pandas_nor_scipy(whole: Path) -> None:
    code = (
        "import sys, lutest; lutest.verify(sys.argv[1]); "
        "print([name for name in ('pandas', 'scipy') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(whole)]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert ended.stdout == "[]\n"
