"""Sevenfold takes raw text to an aligned Llama-style model, with a gate between all stages.

Rooms, in dependency order: base, data, model, objective, train, verify, workflow.
"""

__version__ = "0.1.0"
