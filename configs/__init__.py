"""Configurations: numbers, cost and expected result; no logic."""
