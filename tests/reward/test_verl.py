"""The reward form of verl, loaded as verl loads it: through verl itself where it is installed, else as it does it."""

from __future__ import annotations

import asyncio
import functools
import importlib
import importlib.util
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lutest.reader.errors import ArgumentError, UnknownKeyError
from lutest.reader.table import LatencyTable
from lutest.reward.latency import LatencyReward
from lutest.reward.terms import Weights
from lutest.reward.verl import VerlReward, compute_score
from tests.synthetic import make_figures, write_file

TABLE = LatencyTable(make_figures())
INFO: dict[str, object] = {"tier": "low", "top_k": 8, "num_blocks": 16, "prompt_tokens": 90, "budget_ms": 60.0}
Load = Callable[[str, str, dict[str, Any]], Any]


def accuracy(data_source: str, solution_str: str, ground_truth: str, **_: object) -> float:
    assert data_source == "vqa"
    return float(ground_truth in solution_str)


def detailed(solution_str: str, ground_truth: str, **kwargs: Any) -> dict[str, Any]:
    right = ground_truth in solution_str
    return {"score": 1.0 if right else -1.0, "acc": float(right), "pred": solution_str, **kwargs["marks"]}


def parse_last_words(text: str) -> list[str]:
    return text.split()[-3:]


def count_words(text: str) -> int:
    return len(text.split())


def load_as_verl_does(path: str, name: str, reward_kwargs: dict[str, Any]) -> Any:
    """What verl 0.9.1 does: the module by path or package, the object by name, reward_kwargs over what is passed."""
    if path.startswith("pkg://"):
        module = importlib.import_module(path[len("pkg://") :])
    else:
        spec = importlib.util.spec_from_file_location(f"custom_module_{hash(path)}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)  # not entered into sys.modules
        spec.loader.exec_module(module)
    return functools.partial(_call, getattr(module, name), reward_kwargs)


def _call(function: Callable[..., Any], reward_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **{**kwargs, **reward_kwargs})


def load_through_verl(path: str, name: str, reward_kwargs: dict[str, Any]) -> Any:
    reward = pytest.importorskip("verl.trainer.ppo.reward", reason="verl is not installed")
    config = pytest.importorskip("omegaconf").OmegaConf.create(
        {"reward": {"custom_reward_function": {"path": path, "name": name, "reward_kwargs": reward_kwargs}}}
    )
    return reward.get_custom_reward_fn(config)


@pytest.fixture(params=[load_as_verl_does, load_through_verl])
def load(request: pytest.FixtureRequest) -> Load:
    loader: Load = request.param
    return loader


@pytest.fixture(scope="module")
def table_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_file(make_figures(), tmp_path_factory.mktemp("verl") / "table.duckdb")


def call(function: Callable[..., Any], text: str, info: dict[str, object] | None, **kwargs: Any) -> dict[str, Any]:
    """A call with the keywords that verl's reward managers pass."""
    passed = None if info is None else {**info, "num_turns": None, "rollout_reward_scores": {}}
    result = function(data_source="vqa", solution_str=text, ground_truth="42", extra_info=passed, **kwargs)
    assert isinstance(result, dict)
    return result


def test_a_file_of_ones_own(tmp_path: Path, table_path: Path, load: Load) -> None:
    file = tmp_path / "my_rewards.py"
    file.write_text(
        "from lutest.reward.latency import LatencyReward\n"
        "from lutest.reward.verl import VerlReward\n"
        "from tests.reward.test_verl import accuracy\n"
        f"compute_score = VerlReward(LatencyReward({str(table_path)!r}), score=accuracy)\n"
    )
    result = call(load(str(file), "compute_score", {}), "it is 42", {**INFO, "output_tokens": 9})
    outcome = LatencyReward(TABLE).judge({**INFO, "output_tokens": 9})
    assert outcome is not None
    assert result["acc"] == 1.0
    assert result["latency_reward"] == pytest.approx(outcome.reward, rel=1e-12)
    assert result["score"] == pytest.approx(1.0 + outcome.reward, rel=1e-12)
    assert result["latency_ms"] == pytest.approx(outcome.latency_ms, rel=1e-12)
    assert result["latency_limit_ms"] == 60.0
    assert (result["latency_over_limit"], result["latency_unknown"]) == (float(bool(outcome.over_limit)), 0.0)


def test_by_verls_configuration_alone(table_path: Path, load: Load) -> None:
    reward_kwargs = {
        "table": str(table_path),
        "budget_ms": 60.0,
        "q": 0.99,
        "weights": {"smooth": 0.5, "bonus": 0.1},
        "columns": {"prompt_tokens": "length", "key": {"tier": "level"}},
        "parse": "tests.reward.test_verl:parse_last_words",
        "count_tokens": "tests.reward.test_verl:count_words",
        "score": "tests.reward.test_verl:accuracy",
    }
    result = call(load("pkg://lutest.reward.verl", "compute_score", reward_kwargs), "42 with low 8 16", {"length": 90})
    reward = LatencyReward(TABLE, q=0.99, weights=Weights(smooth=0.5, bonus=0.1))
    row = {**INFO, "output_tokens": 5}
    outcome = reward.judge(row)
    assert outcome is not None
    assert result["score"] == pytest.approx(1.0 + outcome.reward, rel=1e-12)
    wrong = call(load("pkg://lutest.reward.verl", "compute_score", reward_kwargs), "7 with low 8 16", {"length": 90})
    without_bonus = reward.judge(row, accuracy=0.0)
    assert without_bonus is not None
    assert wrong["score"] == pytest.approx(without_bonus.reward, rel=1e-12)


def test_the_keys_are_always_the_same() -> None:
    reward = VerlReward(LatencyReward(TABLE, 60.0), score=accuracy, without_configuration=-0.25)
    known = call(reward, "42", INFO)
    without, unknown, nothing = (call(reward, "42", info) for info in ({}, {**INFO, "tier": "ultra"}, None))
    assert list(known) == list(without) == list(unknown) == list(nothing)
    assert without == nothing
    assert (without["score"], without["latency_reward"], without["latency_ms"]) == (0.75, -0.25, None)
    assert without["latency_unknown"] is None
    assert (unknown["latency_unknown"], unknown["latency_ms"], unknown["latency_over_limit"]) == (1.0, None, None)
    assert unknown["score"] < known["score"]


def test_latency_alone_is_the_score_where_there_is_no_other() -> None:
    result = call(VerlReward(LatencyReward(TABLE)), "42", INFO)
    assert result["score"] == result["latency_reward"]
    assert "acc" not in result


def test_what_a_score_says_of_itself_is_kept_and_what_verl_passes_reaches_it() -> None:
    result = call(VerlReward(LatencyReward(TABLE), score=detailed), "7", INFO, marks={"format": 0.5})
    assert (result["acc"], result["pred"], result["format"]) == (0.0, "7", 0.5)
    assert result["score"] == pytest.approx(-1.0 + result["latency_reward"])


def test_what_verl_adds_for_its_reward_model_is_taken() -> None:
    plain = call(functools.partial(compute_score, table=TABLE), "42", INFO)
    added = {"reward_router_address": "localhost:1", "reward_model_tokenizer": object()}
    assert call(functools.partial(compute_score, table=TABLE), "42", INFO, **added) == plain
    scored = call(functools.partial(compute_score, table=TABLE, score=accuracy), "42", INFO, **added)
    assert scored["acc"] == 1.0


def test_a_reward_is_made_once_for_the_same_configuration(table_path: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(table_path, tmp_path))
    scores = [call(compute_score, "42", INFO, table=str(copy), budget_ms=5.0) for _ in range(2)]
    copy.unlink()
    assert call(compute_score, "42", INFO, table=str(copy), budget_ms=5.0) == scores[0] == scores[1]


@pytest.mark.parametrize(
    ("reward_kwargs", "named"),
    [({"tables": "x"}, "tables"), ({"weights": {"smoth": 1}}, "smoth"), ({"parse": "parse"}, "parse"), ({}, "table")],
)
def test_configuration_that_cannot_be_is_named(reward_kwargs: dict[str, Any], named: str) -> None:
    held = reward_kwargs if not reward_kwargs or "tables" in reward_kwargs else {"table": TABLE, **reward_kwargs}
    with pytest.raises(ArgumentError, match=named):
        call(compute_score, "42", INFO, **held)


def test_unknown_configurations_may_be_errors() -> None:
    with pytest.raises(UnknownKeyError, match="nearest"):
        call(VerlReward(LatencyReward(TABLE, on_unknown="error")), "42", {**INFO, "top_k": 7})


def test_it_pickles_and_runs_in_threads(table_path: Path) -> None:
    rewards: list[Callable[..., Any]] = [
        VerlReward(LatencyReward(TABLE), score=accuracy),
        functools.partial(compute_score, table=str(table_path), score="tests.reward.test_verl:accuracy"),
    ]
    for reward in rewards:
        copy = pickle.loads(pickle.dumps(reward, protocol=5))
        alone = [call(reward, "42", {**INFO, "prompt_tokens": n}) for n in range(200)]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda n, copy=copy: call(copy, "42", {**INFO, "prompt_tokens": n}), range(200)))
        assert together == alone


def test_verls_own_reward_manager_runs_it(table_path: Path) -> None:
    manager = pytest.importorskip("verl.experimental.reward_loop.reward_manager.naive", reason="verl is not installed")
    import numpy as np
    import torch
    from omegaconf import OmegaConf
    from verl import DataProto

    reward_kwargs = {"table": str(table_path), "score": "tests.reward.test_verl:accuracy"}
    function = load_through_verl("pkg://lutest.reward.verl", "compute_score", reward_kwargs)
    data = DataProto.from_dict(
        tensors={"responses": torch.tensor([[4, 2, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 1, 0]])},
        non_tensors={
            "data_source": np.array(["vqa"], dtype=object),
            "reward_model": np.array([{"ground_truth": "42"}], dtype=object),
            "extra_info": np.array([dict(INFO)], dtype=object),
        },
    )
    tokenizer = SimpleNamespace(decode=lambda ids, **_: "".join(str(int(i)) for i in ids))

    async def run() -> dict[str, Any]:
        made = manager.NaiveRewardManager(OmegaConf.create({"reward": {}}), tokenizer, function)
        result: dict[str, Any] = await made.run_single(data)
        return result

    result = asyncio.run(run())
    assert result["reward_extra_info"]["acc"] == 1.0
    assert result["reward_score"] == pytest.approx(call(function, "42", INFO)["score"])
    assert result["reward_extra_info"]["latency_ms"] == pytest.approx(TABLE["low", 8, 16].prefill_ms(90, 0.95))
