"""Step 10: train a LoRA adapter on a new domain and merge it."""

from sevenfold.workflow.cli import main

if __name__ == "__main__":
    main("lora")
