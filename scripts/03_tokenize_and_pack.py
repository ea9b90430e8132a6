"""Step 03: train the tokenizer and pack the texts into rows of token ids."""

from sevenfold.workflow.cli import main

if __name__ == "__main__":
    main("tokenize")
