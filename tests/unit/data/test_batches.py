"""Batches are a function of seed and step, and packed rows lose nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sevenfold.base.errors import UsageError
from sevenfold.data.batches import NO_TARGET, Batches, PackedText
from sevenfold.data.best_fit import Packing, best_fit, packs_of, tight_fit
from sevenfold.data.packing import (
    PackedConversations,
    PackedPreferences,
    Piece,
    Preference,
)
from sevenfold.train.config import ContextPhase, Duration
from sevenfold.workflow import recipe as recipes

WHOLE = (ContextPhase(length=8, until=1.0),)


class Table:
    """Rows whose ids are all different, except for document starts (id 0)."""

    num_rows, row_length = 7, 8

    def rows(self, indices: Any) -> Any:
        ids = np.arange(1, 57).reshape(7, 8)
        ids[2, 3] = 0
        return ids[indices].astype(np.int64)


def batches(**changes: Any) -> Batches:
    settings = {"tokens_per_batch": 24, "contexts": WHOLE, "num_steps": 10, "seed": 1}
    return Batches(PackedText(Table(), bos_id=0), **{**settings, **changes})


@pytest.mark.fault("C02", "C04")
def test_every_row_comes_once_an_epoch_and_epochs_differ() -> None:
    made = batches()
    order = np.concatenate([made.indices(step) for step in range(7)])
    epochs = order[:21].reshape(3, 7)
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs.tolist())
    assert epochs[0].tolist() != epochs[1].tolist()


@pytest.mark.fault("C02")
def test_a_step_does_not_depend_on_what_was_asked_before() -> None:
    forward, backward = batches(), batches()
    ahead = [forward.batch(step).inputs_bt for step in range(10)]
    back = [backward.batch(step).inputs_bt for step in reversed(range(10))]
    assert all(torch.equal(a, b) for a, b in zip(ahead, reversed(back), strict=True))


def test_prefetching_changes_nothing() -> None:
    made = batches()
    for step, batch in enumerate(made.prefetch(4), start=4):
        assert torch.equal(batch.inputs_bt, made.batch(step).inputs_bt)
    assert step == 9


@pytest.mark.fault("F03")
def test_processes_share_each_batch_exactly() -> None:
    alone = batches(tokens_per_batch=32).batch(3).inputs_bt
    shares = [batches(tokens_per_batch=32, rank=r, world=2).batch(3).inputs_bt for r in (0, 1)]
    assert sorted(torch.cat(shares).tolist()) == sorted(alone.tolist())


def test_a_shorter_context_cuts_the_same_rows() -> None:
    phases = (ContextPhase(length=4, until=0.5), ContextPhase(length=8, until=1.0))
    short, long = batches(contexts=phases), batches()
    assert short.length(4) == 4
    assert short.length(5) == 8
    assert torch.equal(short.batch(2).inputs_bt.flatten(), long.batch(2).inputs_bt.flatten())


@pytest.mark.fault("H09")
def test_documents_restart_positions_and_end_targets() -> None:
    row = PackedText(Table(), bos_id=0).batch(np.array([2]), 8)
    assert row.documents_bt is not None
    assert row.documents_bt[0].tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert row.positions_bt[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert row.targets_bt[0].tolist() == [18, 19, NO_TARGET, 21, 22, 23, 24, NO_TARGET]


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"tokens_per_batch": 20}, "not a multiple of the rows' 8 tokens; take 16"),
        ({"contexts": (ContextPhase(length=3, until=1.0),)}, "length 3 does not divide"),
        ({"contexts": (ContextPhase(length=8, until=0.5),)}, "must have until: 1.0"),
        ({"world": 2}, "cannot be shared evenly by 2 processes; take a multiple of 16"),
        (
            {"contexts": (*WHOLE, *WHOLE)},
            "'until' must rise",
        ),
    ],
)
def test_what_does_not_divide_is_refused(changes: dict[str, Any], advice: str) -> None:
    with pytest.raises(UsageError, match=advice):
        batches(**changes)


def test_no_rows_are_refused() -> None:
    with pytest.raises(UsageError, match="not one row to train on; prepare more data"):
        Batches(
            PackedConversations([], 8, pad_id=0, seed=1),
            tokens_per_batch=8,
            contexts=WHOLE,
            num_steps=1,
            seed=1,
        )


@pytest.mark.fault("H12")
def test_fewer_rows_than_a_batch_are_taken_again() -> None:
    made = batches(tokens_per_batch=80)
    assert sorted(made.indices(0).tolist()[:7]) == list(range(7))
    assert len(set(made.indices(0).tolist()[7:])) == 3
    assert made.batch(0).num_rows == 10


@pytest.mark.fault("H12")
def test_a_duration_of_no_step_is_refused() -> None:
    config = recipes.resolve()[1].sft.train
    config = dataclasses.replace(config, duration=Duration(epochs=1.0), tokens_per_batch=4096)
    assert config.num_steps(64, 64) == 1
    with pytest.raises(UsageError, match=r"less than one batch of 4096; add data, epochs, or take"):
        config.num_steps(63, 64)


def test_padding_is_never_predicted() -> None:
    class Padded:
        num_rows, row_length = 1, 8

        def rows(self, indices: Any) -> Any:
            return np.array([[0, 5, 6, 1, 0, 7, 2, 2]])

    for bos_id in (0, None):
        plain = PackedText(Padded(), bos_id=bos_id).batch(np.array([0]), 8)
        padded = PackedText(Padded(), bos_id=bos_id, pad_id=2).batch(np.array([0]), 8)
        fourth = 0 if bos_id is None else -100
        assert padded.targets_bt.tolist() == [[5, 6, 1, fourth, 7, -100, -100, -100]]
        assert plain.targets_bt.tolist() == [[5, 6, 1, fourth, 7, 2, 2, -100]]
        assert padded.inputs_bt.tolist() == plain.inputs_bt.tolist()


def test_best_fit_without_a_seed_takes_the_longest_first() -> None:
    assert best_fit([3, 8, 5, 3, 2], 8, seed=None) == [[1], [2, 0], [3, 4]]


def test_best_fit_places_every_item_once_and_tightly() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 2000).tolist()
    packs = best_fit(lengths, 128, seed=3)
    assert sorted(item for pack in packs for item in pack) == list(range(2000))
    assert all(sum(lengths[item] for item in pack) <= 128 for pack in packs)
    assert len(packs) <= sum(lengths) / 128 * 1.01
    assert packs == best_fit(lengths, 128, seed=3)
    assert packs != best_fit(lengths, 128, seed=4)


def test_an_item_longer_than_a_row_is_refused() -> None:
    with pytest.raises(UsageError, match="item 0 has 9 tokens; a row holds 8"):
        best_fit([9], 8, seed=0)
    with pytest.raises(UsageError, match="item 1 has 9 tokens; a row holds 8"):
        tight_fit([1, 9], 8, seed=0)


@given(
    st.lists(st.integers(1, 40), max_size=60),
    st.integers(0, 9),
    st.sampled_from(["drawn", "tight"]),
)
@settings(max_examples=60, deadline=None)
def test_every_item_is_in_one_row_and_none_is_too_full(
    lengths: list[int], seed: int, packing: Packing
) -> None:
    packs = packs_of(lengths, 40, packing=packing, seed=seed)
    assert sorted(item for pack in packs for item in pack) == list(range(len(lengths)))
    assert all(0 < sum(lengths[item] for item in pack) <= 40 for pack in packs)


@pytest.mark.parametrize("seed", [1, 2])
def test_tight_rows_are_full_and_still_mixed(seed: int) -> None:
    """Lengths as in instruction data; longest first would put alike beside alike."""
    drawn = np.random.default_rng(seed).lognormal(5.0, 0.7, 8000)
    lengths = np.clip(drawn, 2, 2048).astype(int).tolist()
    packs = tight_fit(lengths, 2048, seed=seed)
    assert sum(lengths) / (2048 * len(packs)) > 0.997
    assert packs == tight_fit(lengths, 2048, seed=seed)
    assert packs != tight_fit(lengths, 2048, seed=seed + 1)
    # The mean length in a row varies little more than where items are put together by chance.
    means = [np.mean([lengths[item] for item in pack]) for pack in packs]
    by_chance = best_fit(lengths, 2048, seed=seed)
    usual = [np.mean([lengths[item] for item in pack]) for pack in by_chance]
    alike = best_fit(lengths, 2048, seed=None)
    apart = [np.mean([lengths[item] for item in pack]) for pack in alike]
    assert np.std(means) < 1.2 * np.std(usual) < 0.7 * np.std(apart)


@pytest.mark.fault("H09")
def test_conversations_carry_loss_only_where_the_mask_says() -> None:
    pieces = [Piece([5, 6, 7, 8], [0, 0, 1, 1]), Piece([9, 10, 11], [0, 1, 1])]
    rows = PackedConversations(pieces, 8, pad_id=0, seed=1)
    batch = rows.batch(np.array([0]), 8)
    assert batch.inputs_bt[0].tolist() == [5, 6, 7, 8, 9, 10, 11, 0]
    assert batch.targets_bt[0].tolist() == [-100, 7, 8, -100, 10, 11, -100, -100]
    assert batch.documents_bt is not None
    assert batch.documents_bt[0].tolist() == [0, 0, 0, 0, 1, 1, 1, -1]
    assert rows.fill == 7 / 8


def test_packed_rows_take_one_context_length() -> None:
    rows = PackedConversations([Piece([1, 2], [0, 1])], 8, pad_id=0, seed=1)
    with pytest.raises(UsageError, match="this stage takes one context length"):
        rows.batch(np.array([0]), 4)


def test_preferences_number_their_answers() -> None:
    preferences = [Preference([1, 2], [3, 4], [5]), Preference([6], [7], [])]
    reference = np.array([[-1.0, -2.0], [-3.0, 0.0]], dtype=np.float32)
    rows = PackedPreferences(preferences, 12, pad_id=0, seed=1, reference_n2=reference)
    batch = rows.batch(np.array([0]), 12)
    assert batch.inputs_bt[0].tolist() == [1, 2, 3, 4, 1, 2, 5, 6, 7, 0, 0, 0]
    assert batch.answers_bt is not None
    assert batch.examples_bs is not None
    assert batch.answers_bt[0].tolist() == [-1, 0, 0, -1, -1, 1, -1, 2, -1, -1, -1, -1]
    assert batch.examples_bs[0].tolist() == [1, 2]
    assert batch.reference_bs2 is not None
    assert batch.reference_bs2[0].tolist() == [[-1.0, -2.0], [-3.0, 0.0]]
