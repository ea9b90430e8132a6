"""Measure a model and judge it: tasks, safety, statistics, likelihood, generation, evaluate, gates, report."""
