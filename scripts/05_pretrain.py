"""Step 05: pretrain the model on the packed rows."""

from sevenfold.model.kernels import setup_kernel_optimizations as setup_kernel_optimizations
from sevenfold.workflow.cli import main

if __name__ == "__main__":
    main("pretrain")
