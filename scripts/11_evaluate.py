"""Step 11: measure one stage's model."""

from sevenfold.workflow.cli import main

if __name__ == "__main__":
    main("evaluate")
