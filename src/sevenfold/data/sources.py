"""Where data comes from: local files and folders, saved data sets, the Hugging Face Hub."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sevenfold.base import storage
from sevenfold.base.config import configuration
from sevenfold.base.errors import BadDataError, UsageError
from sevenfold.data.row_files import COMPRESSIONS, SUFFIXES, kind_of_file, read_file
from sevenfold.data.strict_json import Values, kind_of

# What --source says for people's own files; a report marks whatever begins with "unknown".
UNSTATED_LICENCE = "unknown (given with --source)"


class Row(NamedTuple):
    """One row, where it stands (``file:line``), and the same relative to its source."""

    values: Values
    where: str
    key: str


@configuration
class SourceConfig:
    """One source of rows or documents: a local ``path`` or a Hub ``dataset``.

    ``path`` is a file, a folder (read recursively), a glob, or a ``save_to_disk`` folder.
    ``dataset`` is streamed; it needs ``revision`` (a commit or tag, so that the data cannot change
    between two runs) and ``split``. ``columns`` maps our names to the source's, for example
    ``{text: content}``. ``max_rows`` and ``max_characters`` end the source early. Preparation
    needs ``licence``, which may be ``unknown``.
    """

    name: str
    path: str | None = None
    dataset: str | None = None
    revision: str | None = None
    subset: str | None = None
    split: str | None = None
    columns: dict[str, str] | None = None
    max_rows: int | None = None
    max_characters: int | None = None
    licence: str | None = None

    def __post_init__(self) -> None:
        """Check that exactly one kind of source is named, with what that kind needs."""
        if (self.path is None) == (self.dataset is None):
            raise ValueError("name exactly one of 'path' (local) and 'dataset' (Hugging Face Hub)")
        if self.dataset is not None and (self.revision is None or self.split is None):
            raise ValueError("a 'dataset' needs 'revision' (a commit or tag) and 'split'")
        if self.path is not None and (self.revision or self.subset):
            raise ValueError("'revision' and 'subset' belong to a 'dataset', not to a 'path'")
        for limit in (self.max_rows, self.max_characters):
            if limit is not None and limit < 1:
                raise ValueError("'max_rows' and 'max_characters' are at least 1")

    @property
    def location(self) -> str:
        """What was named: path or data set."""
        return str(self.path or self.dataset)


def source_from_path(path: Path) -> SourceConfig:
    """Return the source that ``--source PATH`` means, named after the file."""
    name = path.name
    for suffix in (*COMPRESSIONS, *SUFFIXES):
        name = name.removesuffix(suffix)
    return SourceConfig(name=name or str(path), path=str(path), licence=UNSTATED_LICENCE)


def sources_from_paths(paths: Sequence[Path]) -> list[SourceConfig]:
    """Return the sources of several ``--source PATH``; of one name the later are numbered."""
    found = [source_from_path(path) for path in paths]
    taken = {source.name for source in found}
    seen: set[str] = set()
    for at, source in enumerate(found):
        if source.name in seen:
            free = (f"{source.name}-{number}" for number in itertools.count(2))
            found[at] = dataclasses.replace(source, name=next(n for n in free if n not in taken))
        seen.add(found[at].name)
        taken |= seen
    return found


def list_files(source: SourceConfig) -> tuple[Path, list[Path]]:
    """Return the root of a local source and its files, sorted; none for a ``save_to_disk`` folder.

    Errors:
        UsageError: nothing is there, or nothing of a kind that is read.
        BadDataError: a link leads out of the folder, or a file is listed twice.
    """
    path = Path(str(source.path)).expanduser()
    if path.is_file():
        kind_of_file(path)
        return path.parent, [path]
    if path.is_dir():
        if is_saved_dataset(path):
            return path, []
        root, found = path, sorted(path.rglob("*"))
    else:
        root, found = _glob(path)
    files = [file for file in found if file.is_file() and _is_wanted(file, root)]
    if not files:
        raise UsageError(
            f"{path}: no {', '.join(SUFFIXES)} file there (each also as {', '.join(COMPRESSIONS)});"
            " name an existing file, folder or glob"
        )
    seen: dict[Path, Path] = {}
    for file in files:
        real = file.resolve()
        if not real.is_relative_to(root.resolve()):
            raise BadDataError(
                f"{file}: a link to {real}, outside {root}; copy the file into the folder"
            )
        if real in seen:
            raise BadDataError(f"{file}: the same file as {seen[real]}; keep one of them")
        seen[real] = file
    return root, files


def _glob(path: Path) -> tuple[Path, list[Path]]:
    parts = path.parts
    wild = next((i for i, part in enumerate(parts) if set(part) & set("*?[")), None)
    if wild is None:
        raise UsageError(f"{path}: no such file or folder; check the path")
    root = Path(*parts[:wild]) if wild else Path()
    return root, sorted(root.glob(str(Path(*parts[wild:]))))


def is_saved_dataset(folder: Path) -> bool:
    """True for a folder that ``save_to_disk`` of ``datasets`` wrote."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _is_wanted(file: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    plain = file.with_suffix("") if file.suffix in COMPRESSIONS else file
    return not hidden and plain.suffix in SUFFIXES and file.name != storage.MANIFEST


@dataclass
class Position:
    """How far a source has been read: it moves on as rows are taken, and reading begins after it.

    ``hub`` is the state of ``stream``, a data set of the Hub, which then skips no rows it must
    fetch first.
    """

    rows: int = 0
    characters: int = 0
    hub: dict[str, Any] | None = None
    stream: Any = None

    def state(self) -> dict[str, Any]:
        """Return what a later process needs to go on from here, fit for JSON."""
        hub = self.hub if self.stream is None else self.stream.state_dict()
        return {"rows": self.rows, "characters": self.characters, "hub": hub}


def read_rows(source: SourceConfig, position: Position | None = None) -> Iterator[Row]:
    """Yield the source's rows in a fixed order after ``position``, columns renamed.

    Errors:
        UsageError: nothing is there.
        BadDataError: a file cannot be read as what it claims to be; with ``file:line``.
    """
    position = position or Position()
    if source.dataset is not None:
        rows = _hub_rows(source, position)
    else:
        rows = itertools.islice(_local_rows(source), position.rows, None)
    while not _is_enough(source, position) and (row := next(rows, None)) is not None:
        values = _rename(row.values, source.columns or {}, row.where)
        position.rows += 1
        position.characters += _count_characters(values)
        yield Row(values, row.where, row.key)


def _is_enough(source: SourceConfig, position: Position) -> bool:
    limits = ((source.max_rows, position.rows), (source.max_characters, position.characters))
    return any(limit is not None and done >= limit for limit, done in limits)


def read_documents(source: SourceConfig, position: Position | None = None) -> Iterator[Values]:
    """Yield pretraining documents after ``position``: ``id``, ``text``, ``source``.

    A ``.txt`` file is one document; of every other kind each row is one, its text in ``text``.

    Errors:
        BadDataError: a row has no ``text``, or it is not a string.
    """
    for row in read_rows(source, position):
        text = row.values.get("text")
        if "text" not in row.values:
            raise BadDataError(
                f"{row.where}:text: missing; the columns are {_columns(row.values)}; "
                "name the right one with columns: {text: ...}"
            )
        if not isinstance(text, str):
            raise BadDataError(
                f"{row.where}:text: found {kind_of(text)}, expected a string; mend the row"
            )
        yield {"id": f"{source.name}/{row.key}", "text": text, "source": source.name}


def _columns(values: Values) -> str:
    return ", ".join(f"'{name}'" for name in values) or "none"


def _rename(values: Values, columns: dict[str, str], where: str) -> Values:
    for ours, theirs in columns.items():
        if theirs not in values:
            raise BadDataError(
                f"{where}:{theirs}: missing; the columns are {_columns(values)}; "
                f"correct columns: {{{ours}: ...}}"
            )
        values = values | {ours: values[theirs]}
    return values


def _count_characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_count_characters, value.values()))
    return sum(map(_count_characters, value)) if isinstance(value, list) else 0


def _local_rows(source: SourceConfig) -> Iterator[Row]:
    root, files = list_files(source)
    if not files:
        yield from _saved_rows(root, source.split)
        return
    if source.split is not None:
        raise UsageError(
            f"{source.path}: 'split' means nothing for plain files; remove it, or name the files"
        )
    for file in files:
        key = file.relative_to(root).as_posix()
        for values, where in read_file(file):
            yield Row(values, where, key + where.removeprefix(str(file)))


def load_saved_dataset(folder: Path, split: str | None) -> Any:
    """Open a ``save_to_disk`` folder as one ``datasets.Dataset``, memory-mapped.

    Errors:
        UsageError: it holds several splits and ``split`` names none of them.
        BadDataError: it is not readable.
    """
    import datasets
    import pyarrow

    _require_inside(folder)
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadDataError(
            f"{folder}: not readable as a saved data set ({reason}); write it again with "
            "save_to_disk"
        ) from None
    if isinstance(loaded, datasets.Dataset):
        return loaded
    name = split or ("train" if "train" in loaded else next(iter(loaded), ""))
    if name not in loaded:
        raise UsageError(f"{folder}: no split '{name}'; it has {', '.join(loaded)}")
    return loaded[name]


def _require_inside(folder: Path) -> None:
    """Refuse a saved data set that is not all in its folder: a link, or a name that leads out."""
    for path in sorted(folder.rglob("*")):
        if not path.resolve().is_relative_to(folder.resolve()):
            raise BadDataError(f"{path}: a link out of {folder}; copy it into the folder")
        if path.name != "state.json":
            continue
        state = storage.read_json(path)
        files = state.get("_data_files") if isinstance(state, dict) else None
        for number, file in enumerate(files if isinstance(files, list) else []):
            name = str(file.get("filename")) if isinstance(file, dict) else str(file)
            if not (path.parent / name).resolve().is_relative_to(folder.resolve()):
                raise BadDataError(
                    f"{path}:_data_files[{number}].filename: '{name}' lies outside {folder}; write "
                    "the data set again with save_to_disk"
                )


def _saved_rows(folder: Path, split: str | None) -> Iterator[Row]:
    for number, values in enumerate(load_saved_dataset(folder, split), start=1):
        yield Row(values, f"{folder}:{number}", str(number))


def _hub_rows(source: SourceConfig, position: Position) -> Iterator[Row]:
    import datasets

    try:
        stream = datasets.load_dataset(
            source.dataset,
            source.subset,
            split=source.split,
            revision=source.revision,
            streaming=True,
        )
        if position.hub is not None:
            stream.load_state_dict(position.hub)
        position.stream = stream
        number, rows = position.rows, iter(stream)
        while (values := next(rows, None)) is not None:
            number += 1
            yield Row(values, f"{source.dataset}:{number}", f"{source.split}:{number}")
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(
            f"{source.dataset}: could not be read from the Hub ({reason}); check dataset, subset, "
            "split, revision and the network, and set HF_TOKEN for gated sets; then run the same "
            "command again, which goes on where this one stopped"
        ) from error


def require_licences(sources: Sequence[SourceConfig], field: str) -> None:
    """Refuse a source of which the recipe does not say under which licence it stands.

    Errors:
        UsageError: naming the source; ``field`` is where the recipe lists it.
    """
    for source in sources:
        if not (source.licence or "").strip():
            raise UsageError(
                f"{field}: source '{source.name}' ({source.location}) states no licence; add "
                "licence: with the name its publisher gives, or licence: unknown, which the "
                "report then shows"
            )


def refuse_repeated(sources: Sequence[SourceConfig]) -> None:
    """Refuse the same path or data set given twice, and two sources of one name.

    Errors:
        UsageError: naming it.
    """
    seen = set()
    for source in sources:
        place = (source.path and Path(source.path).resolve(), source.dataset, source.subset)
        if (*place, source.split) in seen:
            raise UsageError(f"{source.location}: given twice as a source; name it once")
        seen.add((*place, source.split))
    refuse_shared_names(sources)


def refuse_shared_names(sources: Sequence[SourceConfig]) -> None:
    """Refuse two sources of one name, under which what is read of both would be counted.

    Errors:
        UsageError: naming both.
    """
    named: dict[str, SourceConfig] = {}
    for source in sources:
        if source.name in named:
            raise UsageError(
                f"{source.location}: source '{source.name}' has the name of "
                f"{named[source.name].location}; give each a name of its own"
            )
        named[source.name] = source
