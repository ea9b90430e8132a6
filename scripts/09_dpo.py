"""Step 09: move the model towards the preferred answers."""

from sevenfold.workflow.cli import main

if __name__ == "__main__":
    main("dpo")
