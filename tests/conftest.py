"""What all tests share: scripts on the path, no network, one thread, a quiet console."""

from __future__ import annotations

import os
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY / "scripts"))

# Before any library is imported: most of them read these variables only then.
os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "GOMP_SPINCOUNT": "1000",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
    }
)
os.environ.pop("SEVENFOLD_FAULTS", None)


def pytest_configure() -> None:
    """Keep torch to one thread: tests run side by side, and sums stay the same."""
    import torch

    torch.set_num_threads(1)
