"""Rewards by the code of verifiers, OpenEnv and SkyRL where it is installed, of ms-swift and slime as documented."""

from __future__ import annotations

import asyncio
import importlib
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import lutest
from lutest.reader.errors import ArgumentError, TableError
from lutest.reader.table import LatencyTable
from tests.synthetic import make_figures, write_file

TABLE = LatencyTable(make_figures())
REWARD = lutest.LatencyReward(TABLE)
CHOICE: dict[str, Any] = {"tier": "low", "top_k": 8, "num_blocks": 16, "budget_ms": 60.0}
FORMS = (
    lutest.VerifiersReward,
    lutest.OpenEnvReward,
    lutest.SkyRLReward,
    lutest.SwiftReward,
    lutest.SlimeReward,
)


def expected(prompt_tokens: int, output_tokens: int) -> float:
    outcome = REWARD.judge({**CHOICE, "prompt_tokens": prompt_tokens, "output_tokens": output_tokens})
    assert outcome is not None
    assert not outcome.unknown
    return outcome.reward


@pytest.mark.parametrize("form", FORMS)
def test_each_form_takes_a_latency_reward(form: Any) -> None:
    with pytest.raises(ArgumentError, match="allowed: a LatencyReward"):
        form(TABLE)


def trace_of(prompt: int, output: int) -> Any:
    return SimpleNamespace(num_input_tokens=prompt, num_output_tokens=output, last_reply="an answer")


def test_verifiers_counts_where_the_server_does() -> None:
    price = lutest.VerifiersReward(REWARD)
    assert asyncio.run(price(SimpleNamespace(**CHOICE), trace_of(90, 9))) == expected(90, 9)
    longer = SimpleNamespace(**CHOICE, prompt_tokens=300)  # with the image, which the server did not count
    assert asyncio.run(price(longer, trace_of(90, 9))) == expected(300, 9)
    prefill = REWARD.judge(CHOICE)
    assert prefill is not None
    assert asyncio.run(price(SimpleNamespace(**CHOICE), trace_of(0, 0))) == prefill.reward
    assert asyncio.run(price(SimpleNamespace(tier=None), trace_of(90, 9))) == 0.0


def test_verifiers_itself_scores_by_configuration_and_by_decorator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vf: Any = pytest.importorskip("verifiers.v1", reason="verifiers is not installed")
    configs: Any = importlib.import_module("verifiers.v1.configs.task")
    monkeypatch.setattr("lutest.reader.loading._current", None)
    monkeypatch.setenv("LUTEST_TABLE", str(write_file(make_figures(), tmp_path / "table.duckdb")))
    price = lutest.VerifiersReward(REWARD)
    data_type = type(
        "Data", (vf.TaskData,), {"__annotations__": {"tier": str, "top_k": int, "num_blocks": int, "budget_ms": float}}
    )

    async def own(_: Any, task: Any, trace: Any) -> float:
        return await price(task, trace)

    priced: Any = types.new_class("Priced", (vf.Task[data_type, configs.TaskConfig],))
    priced.own = vf.reward(own, weight=0.5)
    plugged = configs.RewardFunctionConfig(fn="lutest.reward.verifiers:latency", weight=2.0)
    task = priced(data_type(prompt="why?", **CHOICE), configs.TaskConfig(rewards={"latency": plugged}))
    trace = trace_of(90, 9)
    recorded: dict[str, tuple[float, float]] = {}
    trace.rewards, trace.metrics = {}, {}
    trace.record_reward = lambda name, value, weight: recorded.update({name: (value, weight)})
    asyncio.run(task.score(trace))
    assert recorded == {"own": (expected(90, 9), 0.5), "latency": (expected(90, 9), 2.0)}


def test_verifiers_by_configuration_needs_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lutest.reader.loading._current", None)
    monkeypatch.delenv("LUTEST_TABLE", raising=False)
    latency = importlib.import_module("lutest.reward.verifiers").latency
    with pytest.raises(TableError, match="LUTEST_TABLE"):
        asyncio.run(latency(SimpleNamespace(**CHOICE), trace_of(90, 9)))


def test_openenv_reads_action_and_observation() -> None:
    forward = lutest.OpenEnvReward(REWARD)
    action = SimpleNamespace(**CHOICE, message="an answer", metadata={"output_tokens": 9})
    observation = SimpleNamespace(output_tokens=50, metadata={"prompt_tokens": 90})
    assert forward(action, observation) == expected(90, 9)  # the action's comes first
    assert forward(SimpleNamespace(tier=None), observation) == 0.0


def test_openenv_itself_calls_the_rubric() -> None:
    rubrics = pytest.importorskip("openenv.core.rubrics", reason="openenv is not installed")
    server = importlib.import_module("openenv.core.env_server.types")
    latency = type("Latency", (rubrics.Rubric,), {"forward": lutest.OpenEnvReward(REWARD)})()
    action = server.Action(metadata=CHOICE)
    observation = server.Observation(metadata={"prompt_tokens": 90, "output_tokens": 9})
    assert latency(action, observation) == expected(90, 9) == latency.last_score
    weighted = rubrics.WeightedSum([latency, latency], [0.75, 0.25])
    assert weighted(action, observation) == pytest.approx(expected(90, 9))


def test_skyrl_adds_to_what_the_step_returns() -> None:
    output = {"observations": [], "reward": 1.0, "done": True, "metadata": {"right": True}}
    row = {**CHOICE, "prompt_tokens": 90, "output_tokens": 9}
    priced = lutest.SkyRLReward(REWARD)(output, "an answer", row)
    assert priced["reward"] == 1.0 + expected(90, 9)
    assert priced["metadata"]["latency_reward"] == expected(90, 9)
    assert priced["metadata"]["right"]
    assert (priced["observations"], priced["done"]) == ([], True)
    assert lutest.SkyRLReward(REWARD)(output, "an answer", {"tier": None})["reward"] == 1.0


def test_skyrl_itself_makes_and_steps_the_environment() -> None:
    gym = pytest.importorskip("skyrl_gym", reason="skyrl-gym is not installed")
    text_env = importlib.import_module("skyrl_gym.envs.base_text_env")
    price = lutest.SkyRLReward(lutest.LatencyReward(TABLE, count_tokens=len))

    def step(self: Any, action: str) -> Any:
        output = text_env.BaseTextEnvStepOutput(observations=[], reward=1.0, done=True, metadata={})
        return price(output, action, self.extras)

    def begin(self: Any, extras: dict[str, Any], **_: object) -> None:
        text_env.BaseTextEnv.__init__(self)
        self.extras = extras

    gym.register(id="priced", entry_point=type("Priced", (text_env.BaseTextEnv,), {"__init__": begin, "step": step}))
    env = gym.make("priced", env_config={}, extras={**CHOICE, "prompt_tokens": 90})
    assert env.step("a" * 9)["reward"] == 1.0 + expected(90, 9)


def test_swift_calls_it_as_a_method_of_its_class() -> None:
    columns = {name: [value, None] for name, value in CHOICE.items()}
    columns |= {"prompt_tokens": [90, 90], "response_token_ids": [[1] * 9, [1]], "messages": [[], []]}
    latency = type("Latency", (), {"__call__": lutest.SwiftReward(REWARD)})()  # as a class below ORM
    assert latency(completions=["an answer", "b"], trainer_state=None, **columns) == [expected(90, 9), None]
    in_turns = {**columns, "response_token_ids": [[[1] * 4, [1] * 5], [[1]]]}
    assert latency(completions=["an answer", "b"], **in_turns)[0] == expected(90, 9)


def test_slime_awaits_it_with_a_sample_or_several() -> None:
    sample = SimpleNamespace(metadata=CHOICE, tokens=[1] * 99, response_length=9, response="an answer")
    longer = SimpleNamespace(**{**vars(sample), "metadata": {**CHOICE, "prompt_tokens": 300}})
    without = SimpleNamespace(**{**vars(sample), "metadata": None})
    latency = lutest.SlimeReward(REWARD)
    assert asyncio.run(latency(SimpleNamespace(), sample)) == expected(90, 9)
    several = asyncio.run(latency(SimpleNamespace(), [sample, longer, without], evaluation=False))
    assert several == [expected(90, 9), expected(300, 9), 0.0]
