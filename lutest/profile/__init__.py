"""Runs of one's own: timed in one pass, kept in shards that a build reads."""
