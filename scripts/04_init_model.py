"""Step 04: write the untrained model."""

from sevenfold.workflow.cli import main

if __name__ == "__main__":
    main("init")
