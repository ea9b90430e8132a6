"""Step 08: turn preference pairs into rows for DPO."""

from sevenfold.workflow.cli import main

if __name__ == "__main__":
    main("prepare-dpo")
