"""Deprecated: the old name of scripts/05_pretrain.py, which it warns about and calls."""

from sevenfold.workflow.cli import main

if __name__ == "__main__":
    main("pretrain", deprecated="scripts/production_pretrain.py")
