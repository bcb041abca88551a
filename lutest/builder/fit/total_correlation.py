"""How the deviations of prefill and decode go together in the totals of runs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lutest.builder.fit.calibration_runs import CalibrationKey, place_of_median
from lutest.builder.fit.local_quantiles import weighted_quantiles

__all__ = ["total_correlations"]

TELLING_RUNS = 15  # runs beyond a level that tell as much about its correlation as the plain one does

Array = npt.NDArray[np.float64]


def total_correlations(
    keys: list[CalibrationKey], ratios: Array, knots: Array, inflation: Array, levels: Array
) -> Array:
    """Correlation of each level for keys timed alike."""
    middle = place_of_median(levels)
    decode = [
        key.decode_ms[:, None]
        * np.stack([np.interp(key.steps, knots, own[:, level]) for level in range(len(levels))], axis=1)
        for key, own in zip(keys, ratios, strict=True)
    ]
    of_prefill = [(key.seen_ms[0] - key.prefill_ms[:, middle]) for key in keys]
    of_decode = [(key.seen_ms[1] - own[:, middle]) for key, own in zip(keys, decode, strict=True)]
    of_total = [
        (key.seen_ms[2] - key.prefill_ms[:, middle] - own[:, middle]) for key, own in zip(keys, decode, strict=True)
    ]
    x, y, z = (np.concatenate(parts) for parts in (of_prefill, of_decode, of_total))
    a = np.concatenate([np.abs(key.prefill_ms - key.prefill_ms[:, [middle]]) for key in keys])
    d = np.concatenate([np.abs(own - own[:, [middle]]) for own in decode])
    found = np.ones(len(levels))
    for level, q in enumerate(levels):
        squares, product = a[:, level] ** 2 + d[:, level] ** 2, 2 * a[:, level] * d[:, level]
        # Where one part dwarfs the other no c tells.
        telling = product > 1e-6 * squares
        if q == 0.5 or not telling.any():
            continue
        squares, product = squares[telling], product[telling]
        say = product / squares
        deviation, share = (z, q) if q > 0.5 else (-z, 1 - q)
        deviation = (deviation * inflation)[telling]
        needed = ((np.sign(deviation) * deviation**2 - squares) / product).clip(-1.0, 2.0)
        order = np.argsort(needed, kind="stable")
        covering = weighted_quantiles(needed[order], say[order], np.array([share]))[0]
        u = np.clip(x[telling] / a[telling, level], -2, 2)
        v = np.clip(y[telling] / d[telling, level], -2, 2)
        scale = np.sqrt(np.sum(say * u**2) * np.sum(say * v**2))
        plain = np.sum(say * u * v) / scale if scale > 0 else 1.0
        beyond = np.sum(say) ** 2 / np.sum(say**2) * (1 - share)
        trust = beyond / (beyond + TELLING_RUNS)
        found[level] = np.clip(trust * np.clip(covering, 0, 1) + (1 - trust) * plain, 0.0, 1.0)
    return found
