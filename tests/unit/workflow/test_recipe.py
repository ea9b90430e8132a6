"""From preset, file, overrides and an existing run to one recipe."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from sevenfold.base import storage
from sevenfold.base.errors import BadDataError, CheckpointError, GateRefusedError, UsageError
from sevenfold.base.records import open_run
from sevenfold.workflow import recipe as recipes


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def own_recipe(place: Path, name: str = "mine.yaml", seed: int | None = None) -> Path:
    text = (recipes.configs_folder() / "demo.yaml").read_text(encoding="utf-8")
    if seed is not None:
        text, count = re.subn(r"^seed: \d+$", f"seed: {seed}", text, count=1, flags=re.MULTILINE)
        assert count == 1
    path = place / name
    path.write_text(text, encoding="utf-8")
    return path


def test_the_default_is_the_demo_in_runs_demo(place: Path) -> None:
    run, recipe = recipes.resolve()
    assert (run.preset, run.folder) == ("demo", Path("runs/demo"))
    assert recipe.model.vocab_size == recipe.tokenizer.vocab_size
    assert list(place.iterdir()) == []


def test_set_outranks_the_file_and_the_last_one_wins(place: Path) -> None:
    _, recipe = recipes.resolve(overrides=["seed=1", "seed=2", "pretrain.schedule.peak_lr=1e-3"])
    assert (recipe.seed, recipe.pretrain.schedule.peak_lr) == (2, 1e-3)


def test_a_size_of_the_architecture_can_be_set(place: Path) -> None:
    _, recipe = recipes.resolve(overrides=["model.num_layers=2"])
    assert recipe.model.num_layers == 2
    _, other = recipes.resolve(overrides=["model=model_small.py", "tokenizer.vocab_size=50304"])
    assert other.model.hidden_size == 768


def test_an_architecture_beside_the_recipe_is_found_first(place: Path) -> None:
    text = (recipes.configs_folder() / "model_demo.py").read_text(encoding="utf-8")
    (place / "model_demo.py").write_text(text.replace("num_layers=3", "num_layers=1"))
    _, recipe = recipes.resolve(config_file=own_recipe(place))
    assert recipe.model.num_layers == 1


@pytest.mark.fault("K02", "K03")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "dmo"}, "--preset dmo: no such preset; did you mean 'demo'"),
        ({"overrides": ["pretrain.micro_bach=3"]}, "unknown key; did you mean 'micro_batch'"),
        ({"overrides": ["model=nowhere.py"]}, r"nowhere\.py: no such file; name a Python file"),
        ({"overrides": ["tokenizer.vocab_size=900"]}, "900 is not the model's vocab_size 1024"),
        (
            {"overrides": ["pack.row_length=64"]},
            "row_length 64 is shorter than the longest context",
        ),
        ({"overrides": ["dpo.data.max_length=999"]}, "dpo: data.max_length 999 is more than a row"),
        ({"overrides": ["sft.data.max_length=999"]}, "sft: data.max_length is 999, but .* is 256"),
        (
            {"overrides": ["model.max_seq_len=64"]},
            "pretrain: contexts reach 256 tokens, but the model's max_seq_len is 64",
        ),
        (
            {"overrides": ["sft.train.tokens_per_batch=300"]},
            "sft.train: found .*; tokens_per_batch 300 is not a multiple of the longest",
        ),
        (
            {"overrides": ["pretrain.schedule.warmup_fraction=0.9"]},
            "pretrain.schedule: found .*; warmup_fraction and decay_fraction together exceed 1",
        ),
        (
            {"overrides": ["pretrain.schedule.warmup_fraction=1.5"]},
            "warmup_fraction: found 1.5; input should be less than or equal to 1",
        ),
        (
            {"overrides": ["pretrain.optimizer.kind=adamw_8bit"]},
            "optimizer kind adamw_8bit goes with weights: bf16",
        ),
        ({"overrides": ["kernels={liger: true, cce: true}"]}, "liger and cce are mutually exclu"),
        ({"overrides": ["data.village=null"]}, "give either sources, or village with sources"),
        (
            {"overrides": ["data.mixture={weights: {web: 1}, characters: 9}"]},
            "mixture.weights names web, the sources are none; give each a weight and a name",
        ),
        ({"config_file": Path("none.yaml")}, r"none\.yaml: no such file"),
    ],
)
def test_what_is_refused_says_what_to_do(
    place: Path, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        recipes.resolve(**arguments)  # type: ignore[arg-type]
    assert list(place.iterdir()) == []


def test_a_file_of_ones_own_is_judged_as_custom(place: Path) -> None:
    run, _ = recipes.resolve(config_file=own_recipe(place))
    assert (run.preset, run.folder) == ("custom", Path("runs/custom"))
    run, _ = recipes.resolve(config_file=own_recipe(place, "demo.yaml"))
    assert run.preset == "demo"
    run, _ = recipes.resolve("demo", config_file=own_recipe(place))
    assert run.preset == "demo"


def test_an_existing_run_supplies_preset_and_recipe(place: Path) -> None:
    run, _ = recipes.resolve(overrides=["seed=41"], run_folder=Path("there"))
    recipes.save(run)
    again, recipe = recipes.resolve(run_folder=Path("there"))
    assert (again.preset, recipe.seed) == ("demo", 41)
    assert again.facts["fingerprint"] == run.facts["fingerprint"]
    with pytest.raises(
        UsageError, match="made with preset 'demo', not 'small'; leave --preset out"
    ):
        recipes.resolve("small", run_folder=Path("there"))
    _, changed = recipes.resolve(config_file=own_recipe(place, seed=9), run_folder=Path("there"))
    assert changed.seed == 9


@pytest.mark.fault("K09")
def test_a_folder_of_other_files_is_no_run(place: Path) -> None:
    theirs = place / "project" / "data" / "raw" / "mine.csv"
    theirs.parent.mkdir(parents=True)
    (place / "project" / ".lock").touch()
    assert recipes.resolve(run_folder=place / "project")[0].preset == "demo"
    theirs.write_text("years of work")
    message = r"project: no run\.json here, but other files \(data/raw/mine\.csv\); name a new or"
    with pytest.raises(UsageError, match=message):
        recipes.resolve(run_folder=place / "project")


def test_a_broken_run_is_named_by_its_file(place: Path) -> None:
    run, _ = recipes.resolve()
    recipes.save(run)
    path = run.folder / "run.json"
    storage.write_json(path, {**storage.read_json(path), "recipe": {"seed": 1}})
    with pytest.raises(UsageError, match=r"run\.json:.*missing; this key has no default"):
        recipes.resolve()


def test_a_run_of_an_earlier_version_says_which_settings_it_lacks(place: Path) -> None:
    run, _ = recipes.resolve()
    recipes.save(run)
    path = run.folder / "run.json"
    found = storage.read_json(path)
    for stage in ("sft", "lora"):
        del found["recipe"][stage]["packing"]
    storage.write_json(path, found)
    flags = "--set sft.packing=VALUE --set lora.packing=VALUE"
    message = rf"run\.json:sft\.packing: missing; .*if an earlier version wrote this, say {flags}$"
    with pytest.raises(UsageError, match=message):
        recipes.resolve()
    flags = flags.replace("VALUE", "drawn").replace("--set ", "")
    assert recipes.resolve(overrides=flags.split())[1].lora.packing == "drawn"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "micro_batch=all",
            r'micro_batch: found "all"; input should be a valid integer or \'auto\'$',
        ),
        ("micro_batch=0", r"micro_batch: found 0; .* greater than or equal to 1 or 'auto'$"),
        ("recompute=chep", r"recompute: found \"chep\"; .* boolean or 'cheap' or 'auto'$"),
    ],
)
def test_a_wrong_value_is_told_all_that_may_stand_there(
    place: Path, setting: str, message: str
) -> None:
    with pytest.raises(UsageError, match=rf":pretrain\.{message}"):
        recipes.resolve(overrides=[f"pretrain.{setting}"])


def test_saving_again_keeps_the_file(place: Path) -> None:
    run, _ = recipes.resolve()
    first = recipes.save(run)
    before = storage.sha256_file(run.folder / "run.json")
    assert recipes.save(run).facts == first.facts
    assert storage.sha256_file(run.folder / "run.json") == before


@pytest.mark.parametrize("kind", [UsageError, BadDataError, CheckpointError, GateRefusedError])
def test_settings_that_a_step_refuses_are_taken_back(place: Path, kind: type[Exception]) -> None:
    def refuse(run: recipes.Run) -> None:
        with recipes.saved(run):
            raise kind("refused")

    run, _ = recipes.resolve()
    with pytest.raises(kind):
        refuse(run)
    assert not (run.folder / "run.json").exists()
    recipes.save(run)
    changed, _ = recipes.resolve(overrides=["seed=5"])
    with pytest.raises(kind):
        refuse(changed)
    assert open_run(run.folder).recipe["seed"] == run.recipe["seed"]


def test_a_run_that_holds_something_keeps_its_settings(place: Path) -> None:
    run, _ = recipes.resolve()

    def refuse_late() -> None:
        with recipes.saved(run):
            storage.write_text(run.folder / "data" / "a", "made")
            raise UsageError("refused")

    with pytest.raises(UsageError):
        refuse_late()
    assert open_run(run.folder).preset == "demo"
    changed, _ = recipes.resolve(overrides=["seed=5"])

    def refuse_after_work() -> None:
        with recipes.saved(changed):
            storage.write_text(run.folder / "data" / "a", "made anew")
            raise BadDataError("refused")

    with pytest.raises(BadDataError):
        refuse_after_work()
    assert open_run(run.folder).recipe["seed"] == 5


def test_an_installed_package_brings_its_presets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site-packages" / "sevenfold"
    shutil.copytree(recipes.configs_folder(), package / "configs")
    monkeypatch.setattr(recipes.sevenfold, "__file__", str(package / "__init__.py"))
    assert recipes.configs_folder() == package / "configs"
    assert "demo" in recipes.presets()
