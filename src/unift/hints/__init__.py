"""Hints: how much of a row's solution is shown in a step, as pure functions of (seed, step, row id)."""
