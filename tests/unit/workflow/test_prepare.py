"""Steps 01, 02, 03, 06 and 08 in a small run of their own."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.unit.workflow.forked import kill_everywhere

from sevenfold.base import storage
from sevenfold.base.errors import BadDataError, UsageError
from sevenfold.base.records import Run
from sevenfold.data.chat import ChatDataConfig, PreferenceDataConfig
from sevenfold.data.clean import CleanConfig, read_shards
from sevenfold.data.decontamination import DecontaminationConfig
from sevenfold.data.shards import PackConfig, open_shards
from sevenfold.data.sources import SourceConfig, source_from_path
from sevenfold.data.tokenizer import TokenizerConfig, load_tokenizer
from sevenfold.data.village import VillageConfig
from sevenfold.verify import data_card
from sevenfold.verify.config import EvaluateConfig, TaskConfig
from sevenfold.workflow import prepare, prepared

SHARED = Path(__file__).parents[3].parent / "shared" / "data"
VILLAGE = VillageConfig(
    seed=3,
    num_documents=400,
    num_validation_documents=60,
    num_instructions=80,
    instruction_replay=0.2,
    num_preferences=60,
    unsafe_share=0.5,
    preference_replay=0.3,
    num_domain_rows=60,
    domain_replay=0.5,
    num_evaluation_items=10,
)

TASKS = (
    TaskConfig(name="validation", kind="text"),
    TaskConfig(name="village_facts", kind="exact"),
)


def make_recipe(**data: Any) -> Any:
    """Return the parts of a recipe that preparation reads."""
    sources = {"sources": (), "validation_fraction": 0.05, "village": VILLAGE}
    sources |= {"mixture": None, **data}
    rows = {"sources": (), "max_length": 64, "validation_fraction": 0.1}
    return SimpleNamespace(
        data=SimpleNamespace(**sources),
        clean=CleanConfig(
            min_characters=1,
            document_characters=400,
            unicode_form="NFC",
            repair=False,
            languages=None,
            quality=(),
            mask_pii=False,
            deduplicate="exact",
        ),
        model=SimpleNamespace(max_seq_len=64),
        tokenizer=TokenizerConfig(
            vocab_size=512, path=None, max_digits=1, sample_characters=10_000_000
        ),
        decontaminate=DecontaminationConfig(ngram=13),
        evaluate=EvaluateConfig(tasks=TASKS, confidence=0.95, seed=1, max_new_tokens=8),
        pack=PackConfig(row_length=32, dtype="uint16", strategy="concatenate"),
        sft=SimpleNamespace(data=ChatDataConfig(**rows)),
        lora=SimpleNamespace(data=ChatDataConfig(**rows)),
        dpo=SimpleNamespace(data=PreferenceDataConfig(**rows)),
    )


def prepare_all(run: Run, recipe: Any) -> None:
    prepare.download(run, recipe)
    prepare.clean(run, recipe)
    prepare.tokenize_and_pack(run, recipe)
    prepare.prepare_sft(run, recipe)
    prepare.prepare_dpo(run, recipe)


@pytest.fixture(scope="module")
def village(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run in which the whole village is prepared; tests must not change it."""
    run = Run(folder=tmp_path_factory.mktemp("village"), facts={})
    prepare_all(run, make_recipe())
    return run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(folder=tmp_path / "run", facts={})


def download(run: Run, *paths: Path) -> None:
    sources = tuple(source_from_path(path) for path in paths)
    prepare.download(run, make_recipe(sources=sources, village=None))


def own_texts(tmp_path: Path, count: int = 60) -> Path:
    path = tmp_path / "texts.jsonl"
    rows = [{"text": f"Tom number {n} has a red hat and {n + 7} cats."} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def facts(folder: Path) -> dict[str, Any]:
    return storage.verify_folder(folder)


def test_the_village_is_prepared_for_every_stage(village: Run) -> None:
    raw, clean = facts(village.data("raw")), facts(village.data("clean"))
    assert raw["documents"] == clean["documents_read"] == 460
    assert raw["sources"][0]["licence"] == "generated"
    assert clean["documents"]["validation"] <= 60
    assert sum(clean["documents"].values()) + sum(clean["dropped"].values()) == 460
    texts = {d["text"] for d in read_shards(village.data("clean"), "train")}
    assert not texts & {d["text"] for d in read_shards(village.data("clean"), "validation")}
    held_out = next(read_shards(village.data("clean"), "validation"))
    assert held_out["entropy_nats"] > 0
    tasks = sorted(path.stem for path in (village.data("raw") / "evaluation").glob("*.jsonl"))
    assert "village_facts" in tasks
    tokenizer = load_tokenizer(village.tokenizer)
    assert len(tokenizer) == 512
    for stage in ("sft", "lora", "dpo"):
        assert (
            facts(village.data(stage))["inputs"]["tokenizer"]
            == facts(village.tokenizer)["fingerprint"]
        )
        assert facts(village.data(stage))["rows"] > 30


def test_packed_rows_hold_the_clean_documents(village: Run) -> None:
    manifest = facts(village.data("packed"))
    found = open_shards(
        village.data("packed"),
        vocab_size=512,
        min_length=32,
        tokenizer_fingerprint=facts(village.tokenizer)["fingerprint"],
    )
    assert manifest["counts"]["train"]["rows"] == found.train.num_rows
    tokenizer = load_tokenizer(village.tokenizer)
    text = tokenizer.decode(found.train.rows(np.arange(3)).reshape(-1))
    expected = "".join(
        f"<|bos|>{d['text']}<|eos|>" for d in read_shards(village.data("clean"), "train")
    )
    assert expected.startswith(text[:-8])
    assert manifest["bos_id"] == tokenizer.bos_token_id


def test_preparing_again_changes_nothing(village: Run) -> None:
    files = [path for path in village.folder.rglob("*") if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in files}
    prepare_all(village, make_recipe())
    assert {path: path.stat().st_mtime_ns for path in files} == before


def test_preparing_elsewhere_gives_the_same_bytes(village: Run, run: Run) -> None:
    prepare_all(run, make_recipe())
    for name in ("raw", "clean", "packed", "sft", "lora", "dpo"):
        assert facts(run.data(name))["fingerprint"] == facts(village.data(name))["fingerprint"]
    assert facts(run.tokenizer)["fingerprint"] == facts(village.tokenizer)["fingerprint"]


def own_recipe(folder: Path) -> Any:
    """Return a recipe whose sources are three small files written into ``folder``."""
    recipe = make_recipe(sources=(source_from_path(own_texts(folder)),), village=None)
    recipe.tokenizer = dataclasses.replace(recipe.tokenizer, vocab_size=320)
    asked = [{"question": f"Tom {n}?", "answer": "Yes."} for n in range(20)]
    pairs = [{"prompt": f"Tom {n}?", "chosen": "Yes.", "rejected": "No."} for n in range(20)]
    for stage, rows in (("sft", asked), ("dpo", pairs)):
        path = folder / f"{stage}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        section = getattr(recipe, stage)
        section.data = dataclasses.replace(section.data, sources=(source_from_path(path),))
    return recipe


STEPS: dict[str, tuple[str, ...]] = {
    "download": ("data/raw",),
    "clean": ("data/clean",),
    "tokenize_and_pack": ("data/packed",),
    "prepare_sft": ("data/sft",),
}


@pytest.mark.fault("A04")
def test_killed_at_any_file_operation_a_step_ends_with_the_same_bytes(
    run: Run, tmp_path: Path
) -> None:
    """Every step in turn, killed at each of its operations, then started again."""
    recipe = own_recipe(tmp_path)
    for name, made in STEPS.items():
        more = [("sft",)] if name == "prepare_sft" else []
        step = functools.partial(getattr(prepare, name), run, recipe, *more)
        step()
        wanted = {folder: facts(run.folder / folder)["fingerprint"] for folder in made}

        def start(made: tuple[str, ...] = made) -> None:
            for folder in made:
                shutil.rmtree(run.folder / folder)

        def check(step: Any = step, wanted: dict[str, Any] = wanted) -> None:
            step()
            assert {part: facts(run.folder / part)["fingerprint"] for part in wanted} == wanted
            assert not list(run.folder.rglob(".*.partial-*"))

        assert kill_everywhere(start, check) >= 5, name
        step()


def test_each_step_names_the_one_before_it(run: Run) -> None:
    recipe = make_recipe()
    with pytest.raises(UsageError, match=r"run scripts/01_download_data\.py first"):
        prepare.clean(run, recipe)
    with pytest.raises(UsageError, match=r"run scripts/02_clean_data\.py first"):
        prepare.tokenize_and_pack(run, recipe)
    with pytest.raises(UsageError, match=r"run scripts/02_clean_data\.py first"):
        prepare.make_tokenizer(run, recipe)
    for step in (prepare.prepare_sft, prepare.prepare_dpo):
        with pytest.raises(UsageError, match=r"run scripts/03_tokenize_and_pack\.py first"):
            step(run, recipe)


@pytest.mark.fault("L08")
def test_ones_own_texts_replace_the_village(tmp_path: Path, run: Run) -> None:
    recipe = make_recipe(village=None)
    path = own_texts(tmp_path)
    download(run, path)
    (source,) = facts(run.data("raw"))["sources"]
    assert source == {
        "name": "texts",
        "location": str(path),
        "licence": "unknown (given with --source)",
        "documents": 60,
        "characters": source["characters"],
    }
    assert [source.licence for source in data_card.sources(run)] == [""]  # shown as unknown
    prepare.clean(run, recipe)
    prepare.tokenize_and_pack(run, recipe)
    assert facts(run.data("clean"))["documents"]["train"] < 60
    with pytest.raises(UsageError, match=r"sft\.data\.sources: empty; name sources there, or run"):
        prepare.prepare_sft(run, recipe)
    questions = tmp_path / "questions.jsonl"
    questions.write_text(
        "".join(json.dumps({"question": f"Tom {n}?", "answer": "Yes."}) + "\n" for n in range(20))
    )
    recipe.sft.data = dataclasses.replace(
        recipe.sft.data, sources=(SourceConfig(name="q", path=str(questions), licence="mine"),)
    )
    prepare.prepare_sft(run, recipe)
    # LoRA has no sources of its own, so it takes those of SFT.
    assert facts(run.data("lora"))["fingerprint"] == facts(run.data("sft"))["fingerprint"]


@pytest.mark.fault("L08")
def test_no_preparation_takes_a_source_without_a_licence(
    village: Run, run: Run, tmp_path: Path
) -> None:
    shutil.copytree(village.tokenizer, run.tokenizer)
    nobodys = SourceConfig(name="mine", path=str(own_texts(tmp_path)))
    recipe = make_recipe(sources=(nobodys,), village=None)
    with pytest.raises(UsageError, match=r"data\.sources: source 'mine' .*states no licence"):
        prepare.download(run, recipe)
    for stage, step in (("sft", prepare.prepare_sft), ("dpo", prepare.prepare_dpo)):
        section = getattr(recipe, stage)
        section.data = dataclasses.replace(section.data, sources=(nobodys,))
        with pytest.raises(UsageError, match=rf"{stage}\.data\.sources: source 'mine' .*states no"):
            step(run, recipe)
    stated = dataclasses.replace(nobodys, licence="unknown")
    recipe.dpo.data = dataclasses.replace(
        recipe.dpo.data, sources=(stated,), replay=(dataclasses.replace(nobodys, name="again"),)
    )
    with pytest.raises(UsageError, match=r"dpo\.data\.replay: source 'again' .*states no"):
        prepare.prepare_dpo(run, recipe)
    assert not run.folder.joinpath("data").exists()
    prepare.download(run, make_recipe(sources=(stated,), village=None))
    assert facts(run.data("raw"))["sources"][0]["licence"] == "unknown"


def test_a_bad_source_leaves_what_was_there(tmp_path: Path, run: Run) -> None:
    path = own_texts(tmp_path)
    download(run, path)
    before = facts(run.data("raw"))["fingerprint"]
    with path.open("a", encoding="utf-8") as file:
        file.write('{"text": 3}\n')
    with pytest.raises(BadDataError, match=r"texts\.jsonl:61:text: found a number"):
        download(run, path)
    with pytest.raises(UsageError, match=r"gone: no such file or folder"):
        download(run, tmp_path / "gone")
    with pytest.raises(UsageError, match=r"given twice as a source"):
        download(run, path, path)
    (tmp_path / "empty.jsonl").write_bytes(b"")
    with pytest.raises(BadDataError, match=r"empty\.jsonl: not one document; give files that hold"):
        download(run, tmp_path / "empty.jsonl")
    assert facts(run.data("raw"))["fingerprint"] == before
    assert [p.name for p in run.data("raw").parent.iterdir()] == ["raw"]


def test_a_changed_source_makes_the_rest_stale(tmp_path: Path, run: Run) -> None:
    recipe = make_recipe(village=None)
    path = own_texts(tmp_path)
    download(run, path)
    prepare.clean(run, recipe)
    prepare.tokenize_and_pack(run, recipe)
    prepared.require_current(run, recipe, "packed")
    own_texts(tmp_path, 70)
    download(run, path)
    with pytest.raises(
        UsageError,
        match=r"clean: made from an earlier raw than .*; run scripts/02_clean_data\.py again",
    ):
        prepared.require_current(run, recipe, "packed")
    prepare.clean(run, recipe)
    with pytest.raises(UsageError, match=r"run scripts/03_tokenize_and_pack\.py again"):
        prepared.require_current(run, recipe, "packed")
    prepare.tokenize_and_pack(run, recipe)
    prepared.require_current(run, recipe, "packed")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "packed",
            {"pack": PackConfig(row_length=64, dtype="uint16", strategy="concatenate")},
            r"row_length 32, now .*03_",
        ),
        ("packed", {"village": dataclasses.replace(VILLAGE, seed=4)}, r"raw: .*village.*run .*01_"),
        ("packed", {"validation_fraction": 0.5}, r"validation_fraction 0.05, now it is 0.5; .*02_"),
        ("sft", {"max_length": 48}, r"data/sft: made with max_length 64, now it is 48; .*06_prep"),
        ("lora", {"max_length": 48}, r"data/lora: made with max_length 64, now it is 48; .*06_pre"),
        ("dpo", {"max_length": 48}, r"data/dpo: made with max_length 64, now it is 48; .*08_prep"),
    ],
)
def test_settings_that_were_not_prepared_with_are_refused(
    village: Run, name: str, changes: dict[str, Any], message: str
) -> None:
    prepared.require_current(village, make_recipe(), name)
    recipe = make_recipe(**{k: v for k, v in changes.items() if k not in ("pack", "max_length")})
    recipe.pack = changes.get("pack", recipe.pack)
    if "max_length" in changes:
        section = getattr(recipe, name)
        section.data = dataclasses.replace(section.data, max_length=changes["max_length"])
    with pytest.raises(UsageError, match=message):
        prepared.require_current(village, recipe, name)


def test_pairs_longer_than_the_model_reads_are_made_for_its_context(village: Run, run: Run) -> None:
    shutil.copytree(village.folder, run.folder)
    recipe = make_recipe()
    recipe.dpo.data = dataclasses.replace(recipe.dpo.data, max_length=96)
    prepare.prepare_dpo(run, recipe)
    prepared.require_current(run, recipe, "dpo")
    for other, now in ((48, 48), (128, None)):  # at 128 the pair's own bound is all there is
        recipe.model.max_seq_len = other
        said = rf"data/dpo: made with a bound .*max_seq_len. of 64, now it is {now}; .*08_prep"
        with pytest.raises(UsageError, match=said):
            prepared.require_current(run, recipe, "dpo")


def test_a_hub_source_is_known_by_its_revision() -> None:
    first = SourceConfig(name="a", dataset="a/b", revision="v1", split="train")
    assert prepare.source_fingerprint(first) == prepare.source_fingerprint(
        dataclasses.replace(first, licence="mit")
    )
    assert prepare.source_fingerprint(first) != prepare.source_fingerprint(
        dataclasses.replace(first, revision="v2")
    )


def test_changed_bytes_are_noticed(tmp_path: Path, run: Run) -> None:
    recipe = make_recipe(village=None)
    download(run, own_texts(tmp_path))
    (file,) = run.data("raw").glob("*.zst")
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(BadDataError, match=r"documents-00000\.jsonl\.zst: .*the manifest says"):
        prepare.clean(run, recipe)


@pytest.mark.fault("L05")
@pytest.mark.parametrize("name", ["../outside.zst", "/etc/passwd", "link.zst"])
def test_a_manifest_that_leads_out_of_its_folder_is_refused(
    tmp_path: Path, run: Run, name: str
) -> None:
    """With a fingerprint that is right for the listed files, so that only the path is wrong."""
    download(run, own_texts(tmp_path))
    folder = run.data("raw")
    (file,) = folder.glob("*.zst")
    shutil.copy(file, run.data("outside.zst"))
    (folder / "link.zst").symlink_to(run.data("outside.zst"))
    manifest = storage.read_manifest(folder)
    manifest["files"][0]["path"] = name
    lines = "".join(f"{file['sha256']}  {file['path']}\n" for file in manifest["files"])
    manifest["fingerprint"] = hashlib.sha256(lines.encode()).hexdigest()
    storage.write_json(folder / storage.MANIFEST, manifest)
    with pytest.raises(BadDataError, match=rf"manifest\.json: {name} lies outside the folder"):
        prepare.clean(run, make_recipe(village=None))
    assert not run.data("clean").exists()


def test_too_little_text_for_a_row_is_refused(tmp_path: Path, run: Run) -> None:
    recipe = make_recipe(village=None)
    download(run, own_texts(tmp_path, 4))
    prepare.clean(run, recipe)
    recipe.pack = PackConfig(row_length=128, dtype="int64", strategy="concatenate")
    with pytest.raises(BadDataError, match=r"not one row of 128; give more text, raise data\.val"):
        prepare.tokenize_and_pack(run, recipe)
    assert not run.data("packed").exists()


@pytest.mark.skipif(not SHARED.is_dir(), reason="no real tokenizer lies beside the project")
def test_a_tokenizer_is_taken_over_without_any_text(tmp_path: Path, run: Run) -> None:
    recipe = make_recipe(village=None)
    folder = SHARED / "model" / "stories260K_hf"
    recipe.tokenizer = dataclasses.replace(recipe.tokenizer, path=str(folder), vocab_size=520)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(
            json.dumps({"prompt": f"Tom {n}?", "chosen": "Yes.", "rejected": "No."}) + "\n"
            for n in range(20)
        )
    )
    recipe.dpo.data = dataclasses.replace(recipe.dpo.data, sources=(source_from_path(pairs),))
    prepare.prepare_dpo(run, recipe)
    assert len(load_tokenizer(run.tokenizer)) == 520
    assert facts(run.data("dpo"))["rows"] + facts(run.data("dpo"))["validation_rows"] == 20


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets do not lie beside the project")
def test_real_rows_are_prepared(village: Run, run: Run, tmp_path: Path) -> None:
    shutil.copytree(village.tokenizer, run.tokenizer)
    recipe = make_recipe(village=None)
    dolly = source_from_path(SHARED / "sft" / "dolly_hhrlhf_train_small.jsonl")
    harmless = source_from_path(SHARED / "dpo" / "hh_harmless_2000.jsonl.gz")
    recipe.model.max_seq_len = 4096
    recipe.sft.data = dataclasses.replace(recipe.sft.data, sources=(dolly,), max_length=4096)
    recipe.dpo.data = dataclasses.replace(
        recipe.dpo.data, sources=(harmless,), max_length=4096, max_bad_rows=12
    )
    prepare.prepare_sft(run, recipe, ("sft",))
    assert facts(run.data("sft"))["counts"]["rows_read"] == {"dolly_hhrlhf_train_small": 1000}
    prepare.prepare_dpo(run, recipe)
    manifest = facts(run.data("dpo"))
    assert manifest["counts"]["rejected"] == 12
    assert (run.data("dpo") / "rejected.jsonl").is_file()
    assert manifest["rows"] + manifest["validation_rows"] == 1988 - sum(
        manifest["counts"]["dropped"].values()
    )
