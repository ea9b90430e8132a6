"""Step 02: documents cleaned, deduplicated and split, by as many processes as are asked for."""

from __future__ import annotations

import functools
import shutil

from sevenfold.base import storage
from sevenfold.base.config import fingerprint
from sevenfold.base.errors import BadDataError
from sevenfold.base.records import Run, package_versions
from sevenfold.data import cleaning
from sevenfold.data.clean import CleanConfig
from sevenfold.data.quality import language_filter
from sevenfold.workflow.contamination import INPUT, EvaluationItems
from sevenfold.workflow.prepared import is_current, say, settings, verified
from sevenfold.workflow.recipe import Recipe
from sevenfold.workflow.workers import Workers, do_tasks, require_package


def clean(run: Run, recipe: Recipe, workers: Workers | None = None) -> None:
    """Write ``data/clean``: documents to train on and held out, no text in both.

    Errors:
        UsageError: there is no ``data/raw``; a package that a setting asks for is not installed.
        BadDataError: too little is left.
    """
    raw = verified(run, "raw")
    target = run.data("clean")
    items = EvaluationItems(run, recipe)
    inputs = {"raw": raw["fingerprint"], INPUT: items.fingerprint}
    generated = [] if recipe.data.village is None else ["village"]
    config = settings(recipe, "clean")
    work = target.parent / f".cleaning-{fingerprint([inputs, config, package_versions()])[:16]}"
    current = is_current(target, inputs, config)
    for left in target.parent.glob(".cleaning-*"):
        if current or left != work:
            storage.remove_folder(left)
    if current:
        return
    require_packages(recipe.clean)
    job = cleaning.Cleaning(
        raw=run.data("raw").absolute(),  # a worker of Ray's stands in another folder
        work=work.absolute(),
        config=recipe.clean,
        validation_fraction=recipe.data.validation_fraction,
        items=None if generated else items.index,
    )
    try:
        _do_cleaning(job, workers or Workers())
    except BadDataError:
        storage.remove_folder(work)
        raise
    counts = cleaning.total(job)
    total = counts.total()
    with storage.new_folder(target, kind="clean", inputs=inputs, config=config) as folder:
        for path, name in cleaning.written_files(job):
            shutil.copyfile(path, folder / name)
        storage.manifest_facts(
            folder,
            sources=raw["sources"],
            decontaminated=items.facts(total.dropped, generated=generated),
            **counts.facts(),
        )
    storage.remove_folder(work)
    dropped = ", ".join(f"{n:,} {reason}" for reason, n in sorted(total.dropped.items()))
    kept_counts = f"{total.documents['train']:,} documents and {total.documents['validation']:,}"
    say(target, f"{kept_counts} held out; dropped: {dropped or 'none'}")


def require_packages(config: CleanConfig) -> None:
    """Refuse settings that need what is not there, before any work begins.

    Errors:
        UsageError: a package is not installed, or a language does not exist.
    """
    wanted = {
        "repair": ("ftfy", config.repair),
        "languages": ("py3langid", config.languages is not None),
        "quality": ("datatrove", bool(config.quality)),
        "mask_pii": ("datatrove", config.mask_pii),
        "deduplicate": ("rensa", config.deduplicate == "minhash"),
    }
    for setting, (package, is_wanted) in wanted.items():
        if is_wanted:
            require_package(package, f"clean.{setting}")
    if config.languages is not None:
        language_filter(config.languages)


def _do_cleaning(job: cleaning.Cleaning, workers: Workers) -> None:
    """Examine all shards, settle what stays, write it; what is done already is not done again."""
    for name, perform in (("examined", cleaning.examine), ("written", cleaning.write)):
        if name == "written":
            cleaning.decide(job)
        do_tasks(
            functools.partial(perform, job),
            name=name,
            folders=[job.part(task, name) for task in range(job.num_tasks)],
            workers=workers,
            logs=job.work / f"logs-{name}",
        )
