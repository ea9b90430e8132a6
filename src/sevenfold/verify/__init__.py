"""Measure a model and judge it: tasks and safety, statistics, evaluate, gates, report."""
