"""Settings of a running model that take turns: which one is chosen, and in which time."""

import pytest

from flashmoe.base.errors import FlashMoEError, MemoryBudgetError
from flashmoe.bench import arms, tune_model
from flashmoe.bench.arms import ROUNDS, try_arms
from flashmoe.bench.tune_model import Decoder, tuned_by
from flashmoe.engine.api import FlashMoEModel
from flashmoe.io.files import uncached_problem
from flashmoe.probe.tuning import BankChoice, Choice

BANK = 5 * 10**6


class Scripted:
    """A model whose tokens per second a function of the choice gives, in a time of its own."""

    most_bank_bytes = 10**7
    least_bank_bytes = 10**6

    def __init__(self, speed, page_cache=False, bank_bytes=BANK):
        self.speed, self.default, self.whole = speed, page_cache, bank_bytes
        self.now = 0.0
        self.choices = []
        self.bytes_read = 0
        self.accesses = (0, 0)
        self.load(Choice())

    def load(self, choice):
        bank = choice.bank
        self.page_cache = self.default if bank is None else bank.page_cache
        self.share = 1.0 if bank is None else bank.bank_share
        self.prefetch = bank is None or bank.prefetch
        self.bank_bytes = int(self.whole * self.share)

    def retune(self, choice):
        self.choices.append(choice)
        self.load(choice)

    def decode(self, count, most_seconds):
        rate = self.speed(self)
        taken = [1 / rate]
        while len(taken) < count and sum(taken) < most_seconds:
            taken.append(1 / rate)
        self.now += sum(taken)
        self.bytes_read += 10**6 * len(taken)
        self.accesses = tuple(n + len(taken) for n in self.accesses)
        return taken


def was_halved(model):
    return any(choice.bank and choice.bank.bank_share < 1 for choice in model.choices)


def tried(model, seconds=100.0, uncached=True):
    outcome = try_arms(model, Choice(), seconds, uncached=uncached, clock=lambda: model.now)
    assert model.now <= seconds + 2
    return outcome


def names(outcome):
    return [arm.name for arm in outcome.arms]


WHOLE = ["as by default", "page cache", "no prefetch"]
HALF = "half the bank, page cache"


class TestChoice:
    def test_nothing_is_better(self):
        found = tried(Scripted(lambda model: 10.0))
        assert names(found) == [*WHOLE, HALF]
        assert found.best.choice.bank is None
        assert [len(arm.rates) for arm in found.arms] == [ROUNDS] * 4
        assert [arm.page_cache for arm in found.arms] == [False, True, False, True]
        assert [arm.prefetch for arm in found.arms] == [True, True, False, True]
        assert [arm.bank_bytes for arm in found.arms] == [BANK] * 3 + [BANK // 2]
        rows = tuned_by(found).rows
        assert [row.is_chosen for row in rows] == [True, False, False, False]
        assert all(row.tokens_per_second == pytest.approx(10) for row in rows)
        assert {row.hit_rate for row in rows} == {0.5}

    def test_half_the_bank_is_better(self):
        found = tried(Scripted(lambda model: 12.0 if model.share < 1 else 10.0))
        assert found.best.choice.bank == BankChoice(BANK, 0.5, page_cache=True, prefetch=True)
        assert names(found) == [*WHOLE, HALF, "as by default, again"]

    def test_a_machine_that_became_faster(self):
        found = tried(Scripted(lambda model: 15.0 if was_halved(model) else 10.0))
        assert names(found)[-1] == "as by default, again"
        assert found.best.choice.bank is None

    def test_a_machine_that_becomes_faster_all_the_time(self):
        found = tried(Scripted(lambda model: 10.0 + model.now / 5))
        assert found.best.choice.bank is None

    @pytest.mark.parametrize(("speed", "bank"), [
        (lambda model: 10.0 if model.prefetch else 11.0, {"page_cache": False, "prefetch": False}),
        (lambda model: 12.0 if model.page_cache else 10.0, {"page_cache": True, "prefetch": True}),
    ])  # fmt: skip
    def test_another_way_with_all_of_it(self, speed, bank):
        found = tried(Scripted(speed))
        assert found.best.choice.bank == BankChoice(BANK, 1.0, **bank)

    def test_the_second_best_where_the_best_is_luck(self):
        """Half the bank was fastest, but so was everything by then."""

        def speed(model):
            return (12.0 if model.page_cache else 10.0) * (1.5 if was_halved(model) else 1.0)

        found = tried(Scripted(speed))
        assert names(found)[-1] == "page cache, again"
        assert found.best.choice.bank == BankChoice(BANK, 1.0, page_cache=True, prefetch=True)

    def test_a_little_faster_is_not_enough(self):
        found = tried(Scripted(lambda model: 10.0 if model.prefetch else 10.4))
        assert found.best.choice.bank is None


class TestTime:
    def test_losers_leave(self):
        model = Scripted(lambda model: 10.0 if model.prefetch else 8.0)
        found = tried(model)
        assert [len(arm.rates) for arm in found.arms] == [6, 6, 3, 6]

    def test_what_is_much_slower_leaves_at_once(self):
        found = tried(Scripted(lambda model: 1.0 if model.page_cache else 10.0))
        assert [len(arm.rates) for arm in found.arms] == [6, 1, 6, 1]

    def test_a_model_of_two_seconds_per_token(self):
        """Every setting has had its turn all the same."""
        found = tried(Scripted(lambda model: 0.5), seconds=40)
        assert names(found)[0] == "as by default"
        assert found.best.choice.bank is None
        assert found.notes == (f"no time was left for: {HALF}",) or HALF in names(found)

    def test_no_time_at_all(self):
        model = Scripted(lambda model: 0.1)
        outcome = try_arms(model, Choice(), 1.0, uncached=True, clock=lambda: model.now)
        assert names(outcome) == ["as by default"]
        assert outcome.best.median == pytest.approx(0.1)
        assert "no time for more than its first tokens" in outcome.notes[0]
        assert len(outcome.notes) == 4

    def test_a_bank_of_everything(self):
        found = tried(Scripted(lambda model: 10.0, bank_bytes=10**7))
        assert names(found) == ["as by default"]
        assert any("holds every expert" in note for note in found.notes)

    def test_a_bank_that_cannot_be_halved_and_a_needed_page_cache(self):
        found = tried(Scripted(lambda model: 10.0, bank_bytes=10**6), uncached=False)
        assert names(found) == ["as by default", "no prefetch"]


@pytest.fixture(scope="module")
def small(demo_store):
    """The demo model with a part of its experts in memory."""
    options = {"context": 512, "kernel": "reference"}
    with pytest.raises(MemoryBudgetError) as refused:
        FlashMoEModel.from_pretrained(demo_store, memory="1MB", **options)
    memory = refused.value.least_bytes + 6 * 10**6
    for _ in range(5):
        with FlashMoEModel.from_pretrained(demo_store, memory=memory, **options) as model:
            plan = model.memory_plan
            if 3 * plan.least_bank_bytes < plan.bank_bytes < plan.most_bank_bytes:
                yield model
                return
        # The process itself may have become smaller.
        memory += 6 * plan.least_bank_bytes - plan.bank_bytes
    raise AssertionError("no memory gives a part of the experts")


class TestModel:
    def test_every_setting_of_a_real_model(self, small, demo_store, monkeypatch):
        monkeypatch.setattr(arms, "MOST_TURN", 3)
        seen = []

        def moved():
            small.check_integrity()
            seen.append((small.page_cache, small.bank_bytes))

        uncached = uncached_problem(next((demo_store / "experts").iterdir())) is None
        whole = small.memory_plan.bank_bytes
        decoder = Decoder(small)
        found = try_arms(decoder, small.choice, 30.0, uncached=uncached, moved=moved)
        assert names(found)[0] == "as by default"
        assert HALF in names(found)
        half = next(arm for arm in found.arms if arm.name == HALF)
        assert 0.4 * whole < half.bank_bytes <= 0.5 * whole
        assert {page_cache for page_cache, _ in seen} == {True, not uncached}
        assert decoder.bytes_read > 0
        small.retune(Choice())
        assert small.memory_plan.bank_bytes == whole

    def test_a_model_that_says_nothing(self, small, monkeypatch):
        def silent(self, *args, **options):
            yield tune_model.Piece("", None, "stop")

        monkeypatch.setattr("flashmoe.generation.session.Session.stream", silent)
        with pytest.raises(FlashMoEError, match="ends its answers at once"):
            Decoder(small).decode(5, 1.0)
