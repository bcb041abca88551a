"""Latency rewards: the terms, `LatencyReward` that composes them, and its forms for trainers.

`trl.TRLReward`, `verl.VerlReward` (or `verl.compute_score`) and `openrlhf.OpenRLHFReward` wrap a
`latency.LatencyReward`; `terms.tensor_reward` is for hand-written trainers. No trainer is imported, and torch only by
the forms that return tensors, when they are called.
"""
