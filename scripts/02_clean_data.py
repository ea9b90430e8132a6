"""Step 02: clean, deduplicate and split the texts."""

from sevenfold.workflow.cli import main

if __name__ == "__main__":
    main("clean")
