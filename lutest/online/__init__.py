"""Correcting a table by what is observed while it is used."""

from __future__ import annotations

from .calibrator import Factors, OnlineCalibrator

__all__ = ["Factors", "OnlineCalibrator"]
