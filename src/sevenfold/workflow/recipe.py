"""The recipe of a run: every setting of every step, composed from the rooms' configurations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

import sevenfold
from sevenfold.base import storage
from sevenfold.base.config import (
    Document,
    build,
    configuration,
    fingerprint,
    override,
    read_yaml,
    to_plain,
)
from sevenfold.base.errors import SevenfoldError, UsageError, nearest
from sevenfold.base.records import Run, open_run, write_run
from sevenfold.data.best_fit import Packing
from sevenfold.data.chat import ChatDataConfig, PreferenceDataConfig
from sevenfold.data.clean import CleanConfig
from sevenfold.data.decontamination import DecontaminationConfig
from sevenfold.data.mixture import MixtureConfig
from sevenfold.data.shards import PackConfig
from sevenfold.data.sources import SourceConfig
from sevenfold.data.tokenizer import TokenizerConfig
from sevenfold.data.village import VillageConfig
from sevenfold.model.config import (
    InitConfig,
    KernelConfig,
    LoRAAdapterConfig,
    ModelConfig,
    read_model_file,
)
from sevenfold.train.config import TrainConfig
from sevenfold.verify.config import EvaluateConfig

DEFAULT_PRESET = "demo"
CUSTOM_PRESET = "custom"
GATES_FILE = "promotion_gates.yaml"


@configuration
class DataConfig:
    """Where the texts come from: ``sources``, or the embedded village.

    ``mixture`` says how much of each source; null takes all of all of them, in their order.
    ``validation_fraction`` of the documents is held out, unless a source says which.
    """

    sources: tuple[SourceConfig, ...]
    mixture: MixtureConfig | None
    validation_fraction: Annotated[float, Field(ge=0, lt=1)]
    village: VillageConfig | None = None

    def __post_init__(self) -> None:
        """Check that there is one kind of source."""
        if bool(self.sources) == (self.village is not None):
            raise ValueError("give either sources, or village with sources: []")
        names = sorted(source.name for source in self.sources)
        if self.mixture is not None and sorted(self.mixture.weights) != names:
            raise ValueError(
                f"mixture.weights names {', '.join(sorted(self.mixture.weights)) or 'nothing'}, "
                f"the sources are {', '.join(names) or 'none'}; give each a weight and a name of "
                "its own"
            )


@configuration
class SFTConfig:
    """Supervised fine-tuning: its conversations and its training.

    ``packing`` ``drawn`` puts each conversation, in an order drawn from the seed, into the fullest
    row with room for it; ``tight`` closes rows with the longest of all that still fits (97 to 99 %
    and more than 99.7 % of a row are no padding then).
    ``neftune_noise_alpha`` above 0 adds noise to the embeddings while training; 5 is usual.
    """

    data: ChatDataConfig
    packing: Packing
    neftune_noise_alpha: Annotated[float, Field(ge=0)]
    train: TrainConfig


@configuration
class DPOConfig:
    """Preference optimisation.

    ``nll_weight`` keeps the chosen answers likely in themselves; ``label_smoothing`` is the share
    of pairs believed to be labelled the wrong way round; ``length_normalized`` compares answers by
    their gain per token; ``share_prompts`` passes over the prompt of a pair once instead of twice;
    ``packing`` as for SFT.
    """

    data: PreferenceDataConfig
    packing: Packing
    beta: Annotated[float, Field(gt=0)]
    loss: Literal["sigmoid", "robust", "ipo", "hinge"]
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)]
    length_normalized: bool
    nll_weight: Annotated[float, Field(ge=0)]
    share_prompts: bool
    train: TrainConfig

    def __post_init__(self) -> None:
        """Refuse settings that would have no effect on the loss."""
        if self.loss in ("ipo", "hinge") and self.label_smoothing:
            raise ValueError(
                f"label_smoothing {self.label_smoothing} has no effect on loss {self.loss}; set "
                "it to 0, or loss to sigmoid or robust"
            )
        if self.loss == "robust" and not self.label_smoothing:
            raise ValueError(
                "loss robust with label_smoothing 0 is loss sigmoid; set label_smoothing to the "
                "share of wrong labels, or loss to sigmoid"
            )
        if self.loss == "ipo" and self.length_normalized:
            raise ValueError(
                "length_normalized has no effect on loss ipo, which compares gains per token "
                "anyway; set it to false"
            )


@configuration
class LoRAConfig:
    """An adapter: its rows, its shape and its training.

    ``base`` is how the frozen weights are kept meanwhile: ``full``, or ``nf4`` in four bits, for
    small GPUs. Merged is always into the weights as they were. ``packing`` is as for SFT.
    """

    data: ChatDataConfig
    packing: Packing
    base: Literal["full", "nf4"]
    adapter: LoRAAdapterConfig
    train: TrainConfig

    def __post_init__(self) -> None:
        """Refuse four bits where another type of weights would be computed in."""
        if self.base == "nf4" and self.train.precision not in ("bf16", "fp32"):
            raise ValueError(
                f"base nf4 computes in bf16 or fp32, not in precision {self.train.precision}; set "
                "train.precision to bf16, or base to full"
            )


@configuration
class Recipe:
    """Everything that decides what comes out of a run.

    ``tracking`` is ``wandb``, ``tensorboard`` or ``none``; ``gpu_hour_price`` is what an hour of
    one GPU costs, in any currency, for the cost in the records.
    """

    seed: int
    model: ModelConfig
    data: DataConfig
    clean: CleanConfig
    decontaminate: DecontaminationConfig
    tokenizer: TokenizerConfig
    pack: PackConfig
    init: InitConfig
    kernels: KernelConfig
    pretrain: TrainConfig
    sft: SFTConfig
    dpo: DPOConfig
    lora: LoRAConfig
    evaluate: EvaluateConfig
    tracking: Literal["wandb", "tensorboard", "none"]
    gpu_hour_price: Annotated[float, Field(gt=0)] | None = None

    def __post_init__(self) -> None:
        """Check what several sections must agree on."""
        if self.tokenizer.vocab_size != self.model.vocab_size:
            raise ValueError(
                f"tokenizer.vocab_size {self.tokenizer.vocab_size} is not the model's vocab_size "
                f"{self.model.vocab_size}; every row of the model needs a token"
            )
        if self.pretrain.longest_context > self.model.max_seq_len:
            raise ValueError(
                f"pretrain: contexts reach {self.pretrain.longest_context} tokens, but the model's "
                f"max_seq_len is {self.model.max_seq_len}"
            )
        for stage in ("sft", "dpo", "lora"):
            section: Any = getattr(self, stage)
            # Positions begin anew with each document, so a row may be longer than the context.
            length, row_length = section.data.max_length, section.train.longest_context
            if length > self.model.max_seq_len and stage != "dpo":  # there it bounds two documents
                raise ValueError(
                    f"{stage}: data.max_length is {length}, but the model's max_seq_len is "
                    f"{self.model.max_seq_len}; lower it to that"
                )
            if length > row_length:
                raise ValueError(
                    f"{stage}: data.max_length {length} is more than a row holds, "
                    f"{row_length}; lower it, or train with longer contexts"
                )
        if self.pack.row_length < self.pretrain.longest_context:
            raise ValueError(
                f"pack.row_length {self.pack.row_length} is shorter than the longest context of "
                f"pretrain, {self.pretrain.longest_context}"
            )


def configs_folder() -> Path:
    """Return the folder of the presets: the repository's, or the copy in an installed package."""
    package = Path(sevenfold.__file__).parent
    repository = package.parent.parent
    if (repository / "pyproject.toml").is_file() and (repository / "configs").is_dir():
        return repository / "configs"
    return package / "configs"


def presets() -> list[str]:
    """Return the names of the presets that have a recipe."""
    return sorted(path.stem for path in configs_folder().glob("*.yaml") if path.name != GATES_FILE)


def gates_file() -> Path:
    """Return the file of the gates' thresholds."""
    return configs_folder() / GATES_FILE


def resolve(
    preset: str | None = None,
    config_file: Path | None = None,
    overrides: Sequence[str] = (),
    run_folder: Path | None = None,
) -> tuple[Run, Recipe]:
    """Return the run and its recipe, without writing anything.

    The recipe is the preset's file, or ``config_file``, or what an existing run was made with;
    then ``overrides`` (``section.key=value``) are applied. ``save`` writes the run down.

    Errors:
        UsageError: an unknown preset or key, a wrong value, another preset than the run's, or a
            folder that holds other things than a run.
    """
    folder = run_folder or Path("runs") / _preset_name(preset, config_file)
    if (folder / "run.json").is_file():
        run = open_run(folder)
        if preset not in (None, run.preset):
            raise UsageError(
                f"{folder}: this run was made with preset '{run.preset}', not '{preset}'; leave "
                "--preset out, or name another folder with --run"
            )
        preset = run.preset
        found = Document(run.recipe, str(folder / "run.json"), {})
        values = found if config_file is None else read_yaml(config_file)
    else:
        _require_unused(folder)
        preset = _preset_name(preset, config_file)
        values = read_yaml(config_file or preset_file(preset))
    is_runs_own = Path(values.path).name == "run.json"
    recipe = build(Recipe, _assemble(values, overrides), of_earlier_version=is_runs_own)
    plain = to_plain(recipe)
    facts = {"preset": preset, "recipe": plain, "fingerprint": fingerprint(plain)}
    return Run(folder=folder, facts=facts), recipe


def _require_unused(folder: Path) -> None:
    """Refuse a folder of somebody's files: a step would put its own in the place of data/raw."""
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden:
            raise UsageError(
                f"{folder}: no run.json here, but other files ({path.relative_to(folder)}); name "
                "a new or empty folder, or an existing run, with --run"
            )


def _preset_name(preset: str | None, config_file: Path | None) -> str:
    """Name the preset: as asked; else after the file if that is a preset's; else custom."""
    if preset is None and config_file is not None:
        return config_file.stem if config_file.stem in presets() else CUSTOM_PRESET
    preset = preset or DEFAULT_PRESET
    if config_file is None or preset != CUSTOM_PRESET:
        preset_file(preset)
    return preset


def preset_file(preset: str) -> Path:
    """Return the recipe file of ``preset``.

    Errors:
        UsageError: there is none.
    """
    if preset not in presets():
        raise UsageError(f"--preset {preset}: no such preset{nearest(preset, presets())}")
    return configs_folder() / f"{preset}.yaml"


def _assemble(values: Document, overrides: Sequence[str]) -> Document:
    """Put the architecture's sizes in place of its file's name, then apply ``overrides``."""
    merged = override(_with_architecture(values), overrides)
    return _with_architecture(Document(merged, values.path, getattr(merged, "lines", {})))


def _with_architecture(values: Document) -> Document:
    name = values.get("model")
    if not isinstance(name, str):
        return values
    beside = Path(values.path).parent / name
    path = next((p for p in (beside, Path(name), configs_folder() / name) if p.is_file()), beside)
    sizes = to_plain(read_model_file(path))
    lines = {where: line for where, line in values.lines.items() if where[:1] != ("model",)}
    return Document({**values, "model": sizes}, values.path, lines)


def save(run: Run) -> Run:
    """Write ``run.json`` if it is new or its settings have changed, and return the run."""
    path = run.folder / "run.json"
    if path.is_file() and storage.read_json(path).get("fingerprint") == run.facts["fingerprint"]:
        return open_run(run.folder)
    return write_run(run.folder, preset=run.preset, recipe=run.recipe)


def made_files(run: Run) -> dict[Path, int]:
    """Return the files that steps of a run made, with the time each was written."""
    about = [run.folder / name for name in ("run.json", "report.html", "data_card.json")]
    return {
        path: path.stat().st_mtime_ns
        for path in run.folder.rglob("*")
        if path.is_file() and path.name[0] != "." and path not in about
    }


@contextlib.contextmanager
def saved(run: Run) -> Iterator[Run]:
    """Save ``run`` for a command; take its settings back if that fails before it made anything.

    What has been made was made with these settings, so then they stay.
    """
    path = run.folder / "run.json"
    before: Mapping[str, Any] | None = storage.read_json(path) if path.is_file() else None
    made = made_files(run)
    try:
        yield save(run)
    except SevenfoldError:
        if made_files(run) == made:
            if before is None:
                storage.remove_file(path)
            elif before != storage.read_json(path):
                storage.write_json(path, before)
        raise
