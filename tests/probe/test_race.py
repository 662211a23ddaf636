"""Races between settings: who wins, when nobody does, and how much is measured."""

import random

import pytest

from flashmoe.probe.race import (
    FINAL_PAIRS,
    LEAST_PAIRS,
    MARGIN,
    affordable,
    is_faster,
    measurements,
    race,
)


class Track:
    """Settings are names; each has a rate, and each measurement is noted and takes a second."""

    def __init__(self, rates, noise=0.0, drift=0.0, seed=0):
        self.rates, self.noise, self.drift = rates, noise, drift
        self.draw = random.Random(seed)
        self.measured = []

    def measure(self, name):
        self.measured.append(name)
        rate = self.rates[name] * (1 + self.noise * self.draw.uniform(-1, 1))
        return rate * (1 + self.drift) ** len(self.measured)

    def race(self, limit=10**9):
        used = lambda: len(self.measured) / limit  # noqa: E731
        return race(list(self.rates), self.measure, used, self.draw)


def names(outcome):
    return [runner.setting for runner in outcome.runners]


RATES = {"default": 100.0, "a": 80.0, "b": 130.0, "c": 110.0, "d": 60.0, "e": 90.0}


def test_the_fastest_wins():
    track = Track(RATES)
    outcome = track.race()
    assert outcome.winner.setting == "b"
    assert outcome.default.setting == "default"
    assert names(outcome)[1:] == ["b", "c", "e", "a", "d"]
    assert len(track.measured) <= measurements(len(RATES)) < len(track.measured) + 4
    assert track.measured[-2 * FINAL_PAIRS :].count("default") == FINAL_PAIRS


@pytest.mark.parametrize("drift", [0.01, -0.01])
def test_a_machine_that_changes_speed(drift):
    assert Track(RATES, drift=drift).race().winner.setting == "b"


@pytest.mark.parametrize("seed", range(20))
def test_noise_does_not_win(seed):
    track = Track(dict.fromkeys(RATES, 100.0), noise=0.2, seed=seed)
    assert track.race().winner.setting == "default"


@pytest.mark.parametrize("seed", range(5))
def test_what_is_better_wins_in_noise(seed):
    assert Track(RATES, noise=0.04, seed=seed).race().winner.setting == "b"


def test_what_is_hardly_better_does_not_win():
    assert Track({"default": 100.0, "a": 99.9 * (1 + MARGIN)}).race().winner.setting == "default"
    assert Track({"default": 100.0, "a": 104.0}).race().winner.setting == "a"


@pytest.mark.parametrize("limit", range(1, 30))
def test_when_time_is_over(limit):
    track = Track(RATES)
    outcome = track.race(limit)
    assert len(track.measured) <= limit
    assert set(names(outcome)) == set(track.measured)
    assert outcome.winner.setting in ("default", "b", "c")
    if outcome.winner is not outcome.default:
        assert len(outcome.winner.final) >= LEAST_PAIRS
    # Long before a race is over there is somebody to hold against the default.
    if limit >= 20:
        assert outcome.winner.setting == "b"


def test_the_default_alone():
    track = Track({"default": 100.0})
    assert track.race().winner.setting == "default"
    assert track.measured == ["default"]


def test_how_many_can_race():
    assert affordable(0) == affordable(2 * FINAL_PAIRS) == 0
    for count in range(20, 60):
        assert measurements(affordable(count)) <= count < measurements(affordable(count) + 1)


@pytest.mark.parametrize(
    ("rates", "than", "faster"),
    [
        ([110, 110, 110], [100, 100, 100], True),
        # Pairs are what counts: both became slower.
        ([110, 90, 55], [100, 80, 50], True),
        ([110, 110], [100, 100], False),
        ([], [], False),
        ([110, 110, 99], [100, 100, 100], False),
        # 10 % faster, half of 40 % apart.
        ([110, 101, 141], [100, 100, 100], False),
    ],
)
def test_is_faster(rates, than, faster):
    assert is_faster(rates, than) is faster
