"""The reward form of OpenRLHF, loaded and called as its single-turn executor does it."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lutest.reader.errors import ArgumentError
from lutest.reader.table import LatencyTable
from lutest.reward.latency import LatencyReward
from lutest.reward.openrlhf import OpenRLHFReward
from lutest.reward.terms import Weights
from tests.synthetic import make_figures, write_file

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

TABLE = LatencyTable(make_figures())
ROW: dict[str, object] = {"tier": "low", "top_k": 8, "num_blocks": 16, "prompt_tokens": 90, "budget_ms": 60.0}
PROMPT = "<user> use high 8 12 or another <assistant>"


def score_tensor(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[object], **_: object) -> Any:
    assert len(queries) == len(prompts) == len(labels)
    return torch.tensor([float("42" in query) for query in queries])


def score_dict(queries: Sequence[str], *_: object) -> dict[str, Any]:
    right = torch.tensor([float("42" in query) for query in queries])
    return {"rewards": right, "scores": right, "extra_logs": {"right": right}}


def parse_words(text: str) -> list[str] | None:
    _, found, words = text.partition("use ")
    return words.split()[:3] if found else None


def count_words(text: str) -> int:
    return len(text.split())


def expected(row: dict[str, object], accuracy: float = 1.0, **options: Any) -> float:
    outcome = LatencyReward(TABLE, **options).judge(row, accuracy=accuracy)
    assert outcome is not None
    return outcome.reward


def load_as_openrlhf_does(path: Path) -> Callable[..., dict[str, Any]]:
    """What OpenRLHF 0.11.2 does with the file that stands in the reward model's place."""
    spec = importlib.util.spec_from_file_location("reward_func", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function: Callable[..., dict[str, Any]] = module.reward_func
    return function


async def call_as_openrlhf_does(function: Callable[..., Any], query: str, prompt: str, label: object) -> dict[str, Any]:
    """One rollout a call, by position, in a thread; then every figure becomes a tensor of one element."""
    result = await asyncio.to_thread(function, [query], [prompt], [label])
    rollout = {"reward": torch.tensor([result["rewards"]]), "score": torch.tensor([result["scores"]])}
    for name, value in result["extra_logs"].items():
        rollout[name] = torch.tensor([value.flatten()[0].item()])
    return rollout


def test_a_file_of_ones_own_as_openrlhf_runs_it(tmp_path: Path) -> None:
    table = write_file(make_figures(), tmp_path / "table.duckdb")
    file = tmp_path / "my_rewards.py"
    file.write_text(
        "from lutest.reward.latency import LatencyReward\n"
        "from lutest.reward.openrlhf import OpenRLHFReward\n"
        "from tests.reward.test_openrlhf import score_tensor\n"
        f"reward_func = OpenRLHFReward(LatencyReward({str(table)!r}), score=score_tensor)\n"
    )
    function = load_as_openrlhf_does(file)

    async def run() -> list[dict[str, Any]]:
        labels = [json.dumps({**ROW, "output_tokens": n, "answer": "42"}) for n in range(1, 33)]
        calls = [call_as_openrlhf_does(function, f"<s>{PROMPT} 42 </s>", PROMPT, label) for label in labels]
        return list(await asyncio.gather(*calls))

    for n, rollout in enumerate(asyncio.run(run()), start=1):
        assert rollout["reward"].shape == rollout["score"].shape == (1,)
        assert rollout["score"].item() == 1.0
        assert rollout["latency_ms"].item() == pytest.approx(TABLE["low", 8, 16].total_ms(90, n, 0.95), rel=1e-6)
        assert rollout["reward"].item() == pytest.approx(1.0 + expected({**ROW, "output_tokens": n}), rel=1e-6)


@pytest.mark.parametrize("score", [score_tensor, score_dict])
def test_scores_and_latency_rewards_add_up(score: Any) -> None:
    weights = Weights(bonus=0.5)
    reward = OpenRLHFReward(LatencyReward(TABLE, weights=weights), score=score)
    result = reward([f"{PROMPT} 42", f"{PROMPT} 7"], [PROMPT] * 2, [ROW, ROW])
    latency = [expected(ROW, right, weights=weights) for right in (1.0, 0.0)]
    assert result["scores"].tolist() == [1.0, 0.0]
    assert result["rewards"].dtype == torch.float32
    assert result["rewards"].tolist() == pytest.approx([1.0 + latency[0], latency[1]], rel=1e-6)
    assert result["extra_logs"]["latency_reward"].tolist() == pytest.approx(latency, rel=1e-6)
    assert ("right" in result["extra_logs"]) == (score is score_dict)


def test_columns_come_from_labels_and_keywords() -> None:
    reward = OpenRLHFReward(LatencyReward(TABLE))
    whole = reward(["q"], ["p"], [ROW])["rewards"]
    columns = {name: [value] for name, value in ROW.items()}
    assert torch.equal(reward(["q"], ["p"], ["42"], **columns)["rewards"], whole)
    tensors = {"top_k": torch.tensor([8]), "prompt_tokens": torch.tensor([90]), "budget_ms": torch.tensor([60.0])}
    label = json.dumps({**ROW, "top_k": 4, "prompt_tokens": 1})
    assert torch.equal(reward(["q"], ["p"], [label], **tensors)["rewards"], whole)
    ids = reward(["q"], ["p"], [ROW], completion_ids=torch.zeros((1, 9)))["rewards"]
    assert ids.item() == pytest.approx(expected({**ROW, "output_tokens": 9}), rel=1e-6)
    with pytest.raises(ArgumentError, match="top_k"):
        reward(["q"], ["p"], [ROW], top_k=[8, 8])


def test_the_policy_chooses_after_the_prompt_alone() -> None:
    options: dict[str, Any] = {"parse": parse_words, "count_tokens": count_words}
    reward = OpenRLHFReward(LatencyReward(TABLE, 60.0, **options), without_configuration=-0.5)
    label = '{"prompt_tokens": 90}'
    queries = [f"<s>{PROMPT} I use low 8 16 </s>", f"<s>{PROMPT} I say nothing </s>", "cut off, use low 8 16"]
    result = reward(queries, [PROMPT] * 3, [label] * 3)
    chosen = expected({**ROW, "output_tokens": 6})
    assert result["rewards"].tolist() == pytest.approx([chosen, -0.5, -0.5], rel=1e-6)


def test_rows_without_configuration_and_unknown_ones_have_the_same_keys() -> None:
    reward = OpenRLHFReward(LatencyReward(TABLE, 60.0))
    results = [reward(["q"], ["p"], [label]) for label in (ROW, {**ROW, "tier": "ultra"}, "42", "{not json", None)]
    assert len({tuple(result["extra_logs"]) for result in results}) == 1
    known, unknown, *without = results
    assert known["extra_logs"]["latency_unknown"].item() == 0.0
    assert unknown["extra_logs"]["latency_unknown"].item() == 1.0
    assert math.isnan(unknown["extra_logs"]["latency_ms"].item())
    assert unknown["rewards"].item() < known["rewards"].item()
    for result in without:
        assert result["rewards"].item() == 0.0
        assert all(math.isnan(result["extra_logs"][name].item()) for name in ("latency_ms", "latency_unknown"))


def test_it_pickles() -> None:
    reward = OpenRLHFReward(LatencyReward(TABLE, 60.0, parse=parse_words), score=score_tensor)
    copy = pickle.loads(pickle.dumps(reward, protocol=5))
    assert torch.equal(copy(["42"], [""], [ROW])["rewards"], reward(["42"], [""], [ROW])["rewards"])
