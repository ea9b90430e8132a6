"""Every file in configs/ is valid, complete and agrees with the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from sevenfold.base.config import build, read_yaml, to_plain
from sevenfold.base.errors import UsageError
from sevenfold.model.config import read_model_file
from sevenfold.train.config import TrainConfig
from sevenfold.verify.gates import read_gates
from sevenfold.workflow import recipe as recipes
from sevenfold.workflow.thresholds import require_known_gates

CONFIGS = recipes.configs_folder()
PRESETS = recipes.presets()
STAGES = ("pretrain", "sft", "dpo", "lora")


def recipe_of(preset: str, *overrides: str) -> recipes.Recipe:
    return recipes.resolve(preset, overrides=overrides, run_folder=Path("/nonexistent"))[1]


def training_of(recipe: recipes.Recipe) -> dict[str, TrainConfig]:
    stages = {"sft": recipe.sft.train, "dpo": recipe.dpo.train, "lora": recipe.lora.train}
    return {"pretrain": recipe.pretrain, **stages}


def test_the_promised_presets_are_there() -> None:
    assert {"demo", "small", "7b"} <= set(PRESETS)
    assert (CONFIGS / "promotion_gates.yaml").is_file()
    assert all((CONFIGS / f"model_{name}.py").is_file() for name in ("demo", "small", "7b"))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_recipe_is_complete(preset: str) -> None:
    recipe = recipe_of(preset)
    plain = to_plain(recipe)
    assert build(recipes.Recipe, plain) == recipe


def test_the_7b_is_the_7b() -> None:
    model = read_model_file(CONFIGS / "model_7b.py")
    assert (model.num_layers, model.hidden_size, model.vocab_size) == (32, 4096, 50_304)
    assert (model.num_heads, model.num_kv_heads, model.intermediate_size) == (32, 8, 14_336)
    assert not model.tie_embeddings
    assert model.num_parameters == pytest.approx(7.39e9, rel=1e-3)


def test_small_is_about_124_m() -> None:
    model = read_model_file(CONFIGS / "model_small.py")
    assert (model.num_layers, model.hidden_size, model.vocab_size) == (12, 768, 50_304)
    assert model.num_parameters == pytest.approx(124e6, rel=0.02)


@pytest.mark.parametrize("preset", ["small", "7b"])
def test_the_curriculum_is_512_1024_2048(preset: str) -> None:
    assert [phase.length for phase in recipe_of(preset).pretrain.contexts] == [512, 1024, 2048]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_curriculum_rises(preset: str) -> None:
    contexts = recipe_of(preset).pretrain.contexts
    lengths = [phase.length for phase in contexts]
    assert len(lengths) > 1
    assert lengths == sorted(set(lengths))


def test_the_demo_takes_three_checkpoints_in_every_stage() -> None:
    for stage, train in training_of(recipe_of("demo")).items():
        assert train.duration.steps is not None
        assert train.duration.steps // train.checkpoint_every >= 3, stage
        assert train.keep_checkpoints >= 3, stage
        assert (train.precision, train.weights) == ("fp32", "fp32"), stage
        assert train.deterministic, stage


@pytest.mark.parametrize("preset", PRESETS)
def test_answers_and_pairs_fit_into_the_context(preset: str) -> None:
    recipe = recipe_of(preset)
    for data, train in (
        (recipe.sft.data, recipe.sft.train),
        (recipe.dpo.data, recipe.dpo.train),
        (recipe.lora.data, recipe.lora.train),
    ):
        assert data.max_length <= train.longest_context
    for data in (recipe.sft.data, recipe.lora.data):  # of a pair, each answer is bounded so
        assert data.max_length <= recipe.model.max_seq_len


@pytest.mark.parametrize("preset", PRESETS)
def test_the_gates_name_only_what_the_preset_measures(preset: str) -> None:
    run, recipe = recipes.resolve(preset, run_folder=Path("/nonexistent"))
    require_known_gates(run, recipe, recipes.gates_file())


def test_every_preset_has_a_gate_after_every_stage() -> None:
    gates = read_gates(recipes.gates_file())
    assert set(PRESETS) | {recipes.CUSTOM_PRESET} <= set(gates.sections)
    for preset, section in gates.sections.items():
        assert set(section) == set(STAGES), preset


@pytest.mark.fault("K04")
def test_a_misspelt_metric_is_refused_in_any_section(tmp_path: Path) -> None:
    text = recipes.gates_file().read_text(encoding="utf-8")
    wrong = tmp_path / "gates.yaml"
    wrong.write_text(text.replace("metric: arc_easy", "metric: arc_esay"), encoding="utf-8")
    run, recipe = recipes.resolve("demo", run_folder=Path("/nonexistent"))
    with pytest.raises(UsageError, match="'arc_esay' is not measured.*did you mean 'arc_easy'"):
        require_known_gates(run, recipe, wrong)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_hub_data_set_is_pinned_to_a_commit(preset: str) -> None:
    recipe = recipe_of(preset)
    sources = [*recipe.data.sources, *recipe.sft.data.sources, *recipe.dpo.data.sources]
    for source in [*sources, *recipe.lora.data.sources]:
        if source.dataset is not None:
            assert source.revision is not None
            assert len(source.revision) == 40, source.name
            assert source.licence, source.name


def test_comments_are_the_only_thing_a_recipe_does_not_check() -> None:
    values = read_yaml(CONFIGS / "demo.yaml")
    assert set(values) <= set(to_plain(recipe_of("demo")))
