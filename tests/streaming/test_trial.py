"""Whether, and how far, to read ahead: what follows from precision and from tokens' times."""

import pytest

from flashmoe.streaming import prefetcher
from flashmoe.streaming.prefetcher import Trial, Width


def test_width_follows_precision() -> None:
    width = Width(4)
    assert width.next(0, 0) == 4
    prefetched = right = 0
    found = []
    for precision in (0.9, 0.3, 0.3, 0.5, 0.9, 0.1, 0.1, 0.1):
        prefetched += 20
        right += round(20 * precision)
        found.append(width.next(prefetched, right))
    assert found == [4, 3, 2, 2, 3, 2, 1, 0]
    rested = [width.next(prefetched, right) for _ in range(prefetcher.REST)]
    assert rested == [0] * (prefetcher.REST - 1) + [1]


@pytest.mark.parametrize("better", [True, False])
def test_a_trial_keeps_the_faster_way(better: bool) -> None:
    now = 0.0
    trial = Trial(lambda: now)
    ways = []
    for _ in range(2 * (prefetcher.HOLD + 2 * prefetcher.WINDOW + 2)):
        trial.next_token()
        ways.append(trial.on)
        # Everything becomes faster, as with a bank that fills up.
        now += (1.0 if trial.on == better else 1.5) * (1 + 20 / len(ways))
    first = prefetcher.WINDOW
    assert ways[: 2 * first] == [True, False, False, True] * (first // 2)
    held = ways[2 * first : 2 * first + prefetcher.HOLD]
    assert held == [better] * prefetcher.HOLD
    # And then it is tried again.
    again = ways[2 * first + prefetcher.HOLD + 1 :]
    assert set(again[: 2 * first]) == {True, False}


@pytest.mark.parametrize("better", [True, False])
def test_a_trial_without_doubt_is_short(better: bool) -> None:
    now = 0.0
    trial = Trial(lambda: now)
    ways = []
    for _ in range(prefetcher.WINDOW + prefetcher.HOLD):
        trial.next_token()
        ways.append(trial.on)
        now += 1.0 if trial.on == better else 1.1
    assert ways[prefetcher.WINDOW :] == [better] * prefetcher.HOLD


def test_a_trial_waits_until_nothing_disturbs() -> None:
    """Slow tokens that say nothing do not count."""
    now, disturbed = 0.0, True
    trial = Trial(lambda: now, lambda: disturbed)
    for _ in range(prefetcher.WINDOW):
        trial.next_token()
        assert trial.on
        now += 100.0
    disturbed = False
    ways = []
    for _ in range(3 * prefetcher.WINDOW):
        trial.next_token()
        ways.append(trial.on)
        now += 1.0 if trial.on else 1.5
    # The first token has none before it to be measured by.
    assert ways[-4:] == [True] * 4
    assert trial._times == {
        True: [1.0] * (prefetcher.WINDOW // 2),
        False: [1.5] * (prefetcher.WINDOW // 2),
    }
