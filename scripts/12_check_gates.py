"""Step 12: judge one stage's measurements; only a pass promotes."""

from sevenfold.workflow.cli import main

if __name__ == "__main__":
    main("check")
