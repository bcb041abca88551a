"""Runs from anywhere, canonical and checked."""
