"""Step 01: fetch the preset's texts, or take your own with --source."""

from sevenfold.workflow.cli import main

if __name__ == "__main__":
    main("download")
