"""Intervals against published figures, coverage by simulation, and how many samples decide."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sevenfold.verify.statistics import (
    Estimate,
    estimate,
    paired_loss,
    samples_needed,
    tango_interval,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(10, 10, 0.722, 1.0), (0, 10, 0.0, 0.278), (88, 100, 0.802, 0.930), (418, 500, 0.801, 0.866)],
)
def test_wilson_against_known_values(successes: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(successes, n, 0.95) == pytest.approx((low, high), abs=6e-4)


def test_wilson_leaves_no_rounding_behind_where_nothing_or_all_was_right() -> None:
    assert all(wilson_interval(0, n, 0.95)[0] == 0.0 for n in range(1, 500))
    assert all(wilson_interval(n, n, 0.95)[1] == 1.0 for n in range(1, 500))


def test_wilson_refuses_what_is_no_proportion() -> None:
    for successes, n in ((1, 0), (5, 4), (-1, 4), (math.nan, 4)):
        with pytest.raises(ValueError, match="is not a proportion"):
            wilson_interval(successes, n, 0.95)


def test_proportion_is_judged_by_wilson() -> None:
    found = estimate("proportion", [[1.0]] * 88 + [[0.0]] * 12, confidence=0.95)
    assert (found.value, found.n) == (0.88, 100)
    assert (found.low, found.high) == wilson_interval(88, 100, 0.95)


def test_perplexity_is_of_all_tokens_and_its_interval_is_over_documents() -> None:
    scores = [[2.0 * n, float(n)] for n in (10, 20, 30)] + [[400.0, 100.0]]
    found = estimate("exp_ratio", scores, confidence=0.95)
    assert found.value == pytest.approx(math.exp((120 + 400) / 160))
    assert found.n == 4
    assert found.low is not None
    assert found.high is not None
    # Every resample is at least as good as the good documents and no worse than the bad one.
    assert math.exp(2) - 1e-9 <= found.low < found.value < found.high <= math.exp(4) + 1e-9


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["proportion", "mean"])
def test_one_sample_that_is_not_finite_leaves_no_value(kind: str, bad: float) -> None:
    found = estimate(kind, [[1.0]] * 50 + [[bad]], confidence=0.95)  # type: ignore[arg-type]
    assert found == Estimate(value=None, low=None, high=None, n=51)


def test_nothing_and_one_document_have_no_interval() -> None:
    assert estimate("mean", [], confidence=0.95).value is None
    one = estimate("exp_ratio", [[2.0, 1.0]], confidence=0.95)
    assert one == Estimate(value=pytest.approx(math.exp(2)), low=None, high=None, n=1)
    assert estimate("ratio", [[1.0, 0.0], [1.0, 0.0]], confidence=0.95).value is None


def test_the_same_numbers_give_the_same_interval() -> None:
    scores = [[float(x), 1.0] for x in np.random.default_rng(0).normal(size=60)]
    assert estimate("ratio", scores, confidence=0.9, seed=3) == estimate(
        "ratio", scores, confidence=0.9, seed=3
    )
    assert estimate("ratio", scores, confidence=0.9, seed=3) != estimate(
        "ratio", scores, confidence=0.9, seed=4
    )


def test_bootstrap_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(5)
    hits = 0
    for _ in range(200):
        sample = generator.exponential(size=(30, 1))
        found = estimate("mean", sample.tolist(), confidence=0.9)
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 1.0 <= found.high
    # 0.9 of 200 is 180; skewed samples of 30 lose a little.
    assert 165 <= hits <= 195


def test_paired_loss_sees_what_unpaired_intervals_hide() -> None:
    generator = np.random.default_rng(1)
    before = [[float(x)] for x in generator.random(400) < 0.6]
    now = [list(score) for score in before]
    for index in [i for i, score in enumerate(before) if score == [1.0]][:10]:
        now[index] = [0.0]
    found = paired_loss("proportion", now, before, higher_is_better=True, confidence=0.95)
    assert found.value == pytest.approx(10 / 400)
    assert found.low is not None
    assert found.high is not None
    assert 0.005 < found.low < 0.025 < found.high < 0.05
    assert (found.low, found.high) == tango_interval(10, 0, 400, 0.95)
    better = paired_loss("proportion", before, now, higher_is_better=True, confidence=0.95)
    assert better.value == pytest.approx(-10 / 400)
    lower = paired_loss("proportion", now, before, higher_is_better=False, confidence=0.95)
    assert lower.value == pytest.approx(-10 / 400)


def most_likely_statistic(lost: int, gained: int, n: int, loss: float) -> float:
    """Tango's statistic from its definition: the likeliest shares are looked for, not solved."""
    shares = np.linspace(max(0.0, -loss), (1 - loss) / 2, 200_001)[1:-1]
    rest = 1 - 2 * shares - loss
    likelihood = (
        lost * np.log(shares + loss) + gained * np.log(shares) + (n - lost - gained) * np.log(rest)
    )
    share = shares[likelihood.argmax()]
    return float((lost - gained - n * loss) / math.sqrt(n * (2 * share + loss - loss * loss)))


@pytest.mark.parametrize(
    ("lost", "gained", "n"), [(12, 2, 50), (9, 3, 44), (2, 12, 50), (30, 25, 80), (17, 1, 256)]
)
def test_the_score_interval_ends_where_its_statistic_is_the_quantile(
    lost: int, gained: int, n: int
) -> None:
    low, high = tango_interval(lost, gained, n, 0.95)
    assert low < (lost - gained) / n < high
    assert most_likely_statistic(lost, gained, n, low) == pytest.approx(1.959964, abs=1e-3)
    assert most_likely_statistic(lost, gained, n, high) == pytest.approx(-1.959964, abs=1e-3)
    mirrored = tango_interval(gained, lost, n, 0.95)
    assert mirrored == pytest.approx((-high, -low), abs=1e-12)


def test_the_score_interval_against_a_known_one() -> None:
    """Fagerland, Lydersen and Laake 2014: 1 and 7 discordant pairs of 21, -0.517 to -0.026."""
    assert tango_interval(1, 7, 21, 0.95) == pytest.approx((-0.517, -0.026), abs=5e-4)


def test_the_score_interval_at_its_ends() -> None:
    # Nothing lost, nothing gained: z**2 / (n + z**2) to both sides.
    assert tango_interval(0, 0, 10, 0.95) == pytest.approx((-0.27753, 0.27753), abs=1e-5)
    assert tango_interval(10, 0, 10, 0.95)[1] == 1
    assert tango_interval(0, 10, 10, 0.95)[0] == -1
    with pytest.raises(ValueError, match="3 lost and 9 gained of 10 is not possible"):
        tango_interval(3, 9, 10, 0.95)


@pytest.mark.parametrize("n", [100, 256, 500])
@pytest.mark.parametrize("margin", [0.05, 0.1, 0.15])
def test_a_loss_of_the_margin_passes_in_one_of_forty_at_most(n: int, margin: float) -> None:
    """Counted out, not drawn: the model only loses, which is where a bootstrap errs too often."""
    passing = [k for k in range(n + 1) if tango_interval(k, 0, n, 0.95)[1] <= margin]
    chance = sum(math.comb(n, k) * margin**k * (1 - margin) ** (n - k) for k in passing)
    assert passing
    assert chance < 0.028


def test_scores_between_right_and_wrong_get_a_bootstrap() -> None:
    before, now = [[0.5], [1.0]] * 20, [[0.25], [1.0]] * 20
    found = paired_loss("proportion", now, before, higher_is_better=True, confidence=0.95)
    assert found.value == pytest.approx(0.125)
    assert found.low is not None
    assert 0.05 < found.low < 0.125


def test_equal_answers_on_few_items_are_no_certainty() -> None:
    same = [[1.0]] * 20
    found = paired_loss("proportion", same, same, higher_is_better=True, confidence=0.95)
    assert found.value == 0
    assert found.high is not None
    assert found.high > 0.05
    many = paired_loss("proportion", same * 50, same * 50, higher_is_better=True, confidence=0.95)
    assert many.high is not None
    assert many.high < 0.005


def test_paired_loss_of_perplexity_is_the_difference_of_perplexities() -> None:
    before, now = [[2.0, 1.0], [4.0, 2.0], [6.0, 3.0]], [[2.2, 1.0], [4.4, 2.0], [6.6, 3.0]]
    found = paired_loss("exp_ratio", now, before, higher_is_better=False, confidence=0.95)
    assert found.value == pytest.approx(math.exp(2.2) - math.exp(2.0))


def test_paired_loss_needs_the_same_items() -> None:
    with pytest.raises(ValueError, match="paired samples differ in shape"):
        paired_loss("mean", [[1.0]], [[1.0], [2.0]], higher_is_better=True, confidence=0.95)
    found = paired_loss("mean", [[math.nan]], [[1.0]], higher_is_better=True, confidence=0.95)
    assert found.value is None


def test_samples_needed_is_the_least_that_decides() -> None:
    found = estimate("proportion", [[1.0]] * 9 + [[0.0]], confidence=0.95)
    needed = samples_needed("proportion", found, 0.8, confidence=0.95)
    assert needed is not None
    assert wilson_interval(0.9 * needed, needed, 0.95)[0] >= 0.8
    assert wilson_interval(0.9 * (needed - 1), needed - 1, 0.95)[0] < 0.8
    below = estimate("proportion", [[1.0]] * 7 + [[0.0]] * 3, confidence=0.95)
    fails_at = samples_needed("proportion", below, 0.8, confidence=0.95)
    assert fails_at is not None
    assert wilson_interval(0.7 * fails_at, fails_at, 0.95)[1] <= 0.8
    exact = estimate("proportion", [[1.0]] * 8 + [[0.0]] * 2, confidence=0.95)
    assert samples_needed("proportion", exact, 0.8, confidence=0.95) is None


def test_samples_needed_for_a_mean_grows_with_the_square() -> None:
    measured = Estimate(value=1.0, low=0.6, high=1.4, n=100)
    assert samples_needed("mean", measured, 0.8, confidence=0.95) == 400
    assert samples_needed("mean", measured, 1.1, confidence=0.95) == 1600
    unknown = Estimate(value=None, low=None, high=None, n=3)
    assert samples_needed("mean", unknown, 0.8, confidence=0.95) is None
