"""Step 06: turn conversations into rows for SFT and LoRA."""

from sevenfold.workflow.cli import main

if __name__ == "__main__":
    main("prepare-sft")
