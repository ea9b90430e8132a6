"""Step 07: teach the pretrained model to answer."""

from sevenfold.workflow.cli import main

if __name__ == "__main__":
    main("sft")
