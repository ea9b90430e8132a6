"""The tensors of a checkpoint as safetensors: a file a part, or several where it is large.

A file is written, read and checked by one core: a 7B's 30 GB in two files kept two cores busy and
the disk waiting. Called model.safetensors, or model-00001-of-00008.safetensors and so on.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from sevenfold.base.errors import CheckpointError

LARGEST_FILE_BYTES = 2 * 2**30
# Beside training, which wants cores, too.
WRITERS = 4


def write(folder: Path, parts: dict[str, dict[str, Tensor]]) -> None:
    """Write every part to its file, or files, in ``folder``."""
    files = {
        name: piece
        for part, tensors in parts.items()
        for name, piece in _cut(part, _separate(tensors)).items()
    }
    with ThreadPoolExecutor(WRITERS) as pool:
        for _ in pool.map(lambda name: save_file(files[name], folder / name), files):
            pass


def read(folder: Path, part: str, names: list[str]) -> dict[str, Tensor]:
    """Return the tensors of a part from its files among ``names``, those that were checked.

    Errors:
        CheckpointError: not all of its files are among them.
        SafetensorError, OSError: one cannot be read.
    """
    own = [n for n in names if re.fullmatch(rf"{part}(-\d{{5}}-of-\d{{5}})?\.safetensors", n)]
    if sorted(own) != _file_names(part, max(1, len(own))):
        raise CheckpointError(
            f"{folder}: of the files of {part} the manifest lists {own}, which are not all, or not "
            "of one checkpoint; put the folder back as it was, or remove it"
        )
    tensors: dict[str, Tensor] = {}
    for name in own:
        tensors |= load_file(folder / name)
    return tensors


def _cut(part: str, tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Share tensors out over files, by their names; none is large, but for a large tensor."""
    pieces: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if pieces[-1] and size + tensor.nbytes > LARGEST_FILE_BYTES:
            pieces.append({})
            size = 0
        pieces[-1][name] = tensor
        size += tensor.nbytes
    return dict(zip(_file_names(part, len(pieces)), pieces, strict=True))


def _file_names(part: str, num: int) -> list[str]:
    if num == 1:
        return [f"{part}.safetensors"]
    return [f"{part}-{number:05d}-of-{num:05d}.safetensors" for number in range(1, num + 1)]


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors none of which shares memory with another."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        whole = tensor.contiguous()
        if whole.numel() and whole.data_ptr() in seen:
            whole = whole.clone()
        seen.add(whole.data_ptr())
        separate[name] = whole
    return separate
