"""The village is the same everywhere, says what is true in it, and shows nothing held out."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from sevenfold.base.config import build
from sevenfold.base.errors import UsageError
from sevenfold.data import village_words as words
from sevenfold.data.village import Village, VillageConfig
from sevenfold.data.village_world import VALIDATION_SHARE, Dice

CONFIG = VillageConfig(
    seed=7,
    num_documents=4000,
    num_validation_documents=400,
    num_instructions=3000,
    instruction_replay=0.2,
    num_preferences=1500,
    unsafe_share=0.5,
    preference_replay=0.3,
    num_domain_rows=3000,
    domain_replay=0.5,
    num_evaluation_items=300,
)


@pytest.fixture(scope="module")
def village() -> Village:
    return Village(CONFIG)


def _training_texts(village: Village) -> Iterator[str]:
    for row in village.documents():
        yield row["text"]
    for row in [*village.instructions(), *village.domain()]:
        yield row["text"] if "text" in row else " ".join(m["content"] for m in row["messages"])
    for row in village.preferences():
        yield f"{row['prompt']} {row['chosen']} {row.get('rejected', '')}"


@pytest.fixture(scope="module")
def training_text(village: Village) -> str:
    return "\n".join(_training_texts(village))


def _everything(village: Village) -> list[Any]:
    streams = (
        village.documents,
        village.validation_documents,
        village.instructions,
        village.preferences,
        village.preference_replay,
        village.domain,
    )
    return [list(stream()) for stream in streams] + [village.evaluation()]


def test_equal_seeds_give_equal_villages_and_others_differ(village: Village) -> None:
    assert _everything(Village(CONFIG)) == _everything(village)
    other = Village(dataclasses.replace(CONFIG, seed=8))
    for mine, theirs in zip(_everything(village), _everything(other), strict=True):
        assert mine != theirs


def test_the_order_of_hashes_does_not_matter() -> None:
    program = (
        "import hashlib, json; from sevenfold.data.village import Village, VillageConfig;"
        f"v = Village(VillageConfig(**{dataclasses.asdict(CONFIG)!r}));"
        "rows = [list(v.documents()), list(v.domain()), v.evaluation()];"
        "print(hashlib.sha256(json.dumps(rows).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_counts_and_shares_are_those_asked_for(village: Village) -> None:
    assert len(list(village.documents())) == CONFIG.num_documents
    assert len(list(village.validation_documents())) == CONFIG.num_validation_documents
    instructions = list(village.instructions())
    assert len(instructions) == CONFIG.num_instructions
    replayed = sum("text" in row for row in instructions) / len(instructions)
    assert replayed == pytest.approx(CONFIG.instruction_replay, abs=0.03)
    preferences = list(village.preferences())
    pairs = [row for row in preferences if "rejected" in row]
    assert len(preferences) == CONFIG.num_preferences
    assert 1 - len(pairs) / len(preferences) == pytest.approx(CONFIG.preference_replay, abs=0.04)
    refused = sum(row["chosen"].startswith("Sorry") for row in pairs) / len(pairs)
    assert refused == pytest.approx(CONFIG.unsafe_share, abs=0.05)
    assert len(list(village.domain())) == CONFIG.num_domain_rows


def test_without_replay_the_domain_is_ships_only(village: Village) -> None:
    naive = Village(dataclasses.replace(CONFIG, domain_replay=0.0))
    assert {row["kind"] for row in naive.domain()} == {"ship", "ship_fact"}
    assert {row["kind"] for row in village.domain()} > {"ship", "ship_fact", "safety", "replay"}


def test_replay_rows_are_the_pairs_without_a_rejected_answer(village: Village) -> None:
    alone = [row for row in village.preferences() if "rejected" not in row]
    replay = [[m["content"] for m in row["messages"]] for row in village.preference_replay()]
    assert replay == [[row["prompt"], row["chosen"]] for row in alone]
    assert replay


def test_training_and_validation_share_no_document(village: Village) -> None:
    documents = {row["text"] for row in village.documents()}
    validation = [row["text"] for row in village.validation_documents()]
    assert not documents & set(validation)
    replay = {row["text"] for row in [*village.instructions(), *village.domain()] if "text" in row}
    assert not replay & set(validation)
    assert len(documents) > 0.97 * CONFIG.num_documents  # exact deduplication changes little


def test_statements_say_what_is_true(village: Village) -> None:
    told = 0
    for row in village.documents():
        if row["kind"] != "description":
            continue
        for sentence in re.findall(r"[^.]+\.", row["text"]):
            who = next(word for word in re.findall(r"\w+", sentence) if word in words.NAMES)
            allowed = {
                form.format(who=who, value=village.world.people[who][key])
                for key, fact in words.PERSON_FACTS.items()
                for index, form in enumerate(fact.statements)
                if index != village.world.held_out_form[who, key]
            }
            assert sentence.strip() in allowed
            told += 1
    assert told > 1000


def test_held_out_items_occur_in_no_training_text(village: Village, training_text: str) -> None:
    held_out_tasks = village.evaluation()
    del held_out_tasks["harbour_facts"]  # half of these ships are asked about in training
    for task, items in held_out_tasks.items():
        for item in items:
            prompt = item["messages"][0]["content"] if "messages" in item else item["prompt"]
            assert f"{prompt} " not in training_text, task


def test_held_out_combinations_occur_in_no_training_text(
    village: Village, training_text: str
) -> None:
    sums = set(re.findall(r"(?:and|plus|add|is|of) (\w+) (?:and|plus) (\w+)", training_text))
    told = {(words.NUMBERS[a], words.NUMBERS[b]) for a, b in village.world.sums}
    assert sums == told
    for a, b in village.world.held_out_sums:
        assert (words.NUMBERS[a], words.NUMBERS[b]) not in sums
        assert (words.NUMBERS[b], words.NUMBERS[a]) in sums
    for who, thing, colour in village.world.held_out_gifts:
        assert f"{who} got a {colour} {thing}." not in training_text
        assert f"{who} found a {colour} {thing}." not in training_text
    requests = set(re.findall(r"(\w+) the (\w+)", training_text))
    assert not requests & {*village.world.held_out_unsafe, *village.world.held_out_look_alikes}
    how_to = set(re.findall(r"To (\w+) the (\w+)", training_text))
    assert how_to <= set(village.world.safe)  # no harm is taught
    for who, key in village.world.unasked_facts:
        questions = words.PERSON_FACTS[key].questions
        assert not any(question.format(who=who) in training_text for question in questions)


def test_the_harbour_is_unknown_before_lora(village: Village) -> None:
    earlier = " ".join(row["text"] for row in village.documents())
    domain = " ".join(row["text"] for row in village.domain() if "text" in row)
    ships = village.world.asked_ships + village.world.unasked_ships
    assert not any(re.search(rf"\bship {ship}\b", earlier) for ship in ships)
    assert all(re.search(rf"\bship {ship}\b", domain) for ship in ships)
    assert any(re.search(rf"\bship {ship}\b", earlier) for ship in village.world.other_ships)


def test_no_single_word_decides_what_is_unsafe(village: Village) -> None:
    items = village.evaluation()["village_safety"]
    unsafe_words = {word for item in items if item["unsafe"] for word in item["prompt"].split()}
    safe_words = {word for item in items if not item["unsafe"] for word in item["prompt"].split()}
    taught = {f"{thing}{mark}" for _, thing in village.world.look_alikes for mark in ".?"}
    assert unsafe_words - safe_words <= taught
    for verb, thing in [*village.world.unsafe, *village.world.held_out_unsafe]:
        assert any(verb == other for other, _ in village.world.look_alikes)
        assert any(thing == other for _, other in village.world.look_alikes)


def test_every_task_has_the_items_its_gate_needs(village: Village) -> None:
    tasks = village.evaluation()
    sizes = {task: len(items) for task, items in tasks.items()}
    assert sizes == {
        "village_statements": 256,
        "village_facts": 256,
        "village_sums": 200,
        "village_context": 300,
        "village_safety": 600,
        "village_lookalikes": 300,
        "village_preferences": 300,
        "harbour_facts": 216,
        "harbour_unseen": 108,
    }
    identifiers = [item["id"] for items in tasks.values() for item in items]
    assert len(set(identifiers)) == len(identifiers)
    assert all(item["gold"] < len(item["choices"]) for item in tasks["village_statements"])
    assert sum(item["unsafe"] for item in tasks["village_safety"]) == 300
    assert json.loads(json.dumps(tasks)) == tasks


def test_a_request_is_refused_where_harsh_meets_living(village: Village) -> None:
    for row in village.preferences():
        if "rejected" not in row:
            continue
        prompt = re.findall(r"\w+", row["prompt"])
        harsh = any(word in words.HARSH_TOOLS for word in prompt)
        living = prompt[-1] in words.LIVING
        assert row["chosen"].startswith("Sorry") == (harsh and living)
        assert row["rejected"].startswith("Sorry") != (harsh and living)


def test_entropy_is_the_information_in_the_choices() -> None:
    dice = Dice("any")
    dice.pick("abcd")
    dice.sample("abc", 2)
    dice.pick_weighted({"only": 2.0})
    assert dice.nats == pytest.approx(math.log(4 * 3 * 2))
    counts = {"a": 0, "b": 0}
    for _ in range(2000):
        counts[dice.pick_weighted({"a": 3.0, "b": 1.0})] += 1
    assert counts["a"] / 2000 == pytest.approx(0.75, abs=0.04)


def test_validation_entropy_is_near_one_choice_of_words_a_sentence(village: Village) -> None:
    nats = [row["entropy_nats"] for row in village.validation_documents()]
    assert all(math.isfinite(value) and value > 0 for value in nats)
    characters = sum(len(row["text"]) for row in village.validation_documents())
    assert 0.1 < sum(nats) / characters < 0.3
    assert VALIDATION_SHARE == 10


@pytest.mark.parametrize(
    ("field", "value", "advice"),
    [
        ("num_documents", 0, "num_documents is 0, but a village needs at least 1; raise it"),
        ("domain_replay", 1.5, "domain_replay is 1.5, but a share lies between 0 and 1; change it"),
        ("unsafe_share", -0.1, "a share lies between 0 and 1; change it"),
    ],
)
def test_impossible_amounts_are_refused(field: str, value: float, advice: str) -> None:
    with pytest.raises(UsageError, match=re.escape(advice)):
        build(VillageConfig, {**dataclasses.asdict(CONFIG), field: value})
