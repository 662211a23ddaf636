"""Slow, readable twins of the eviction policies: plain lists, everything searched for."""

from collections.abc import Collection

from flashmoe.bank.policy.lfu import HALF_LIFE
from flashmoe.bank.policy.s3fifo import MOST_USES, SMALL_SHARE, USES_TO_STAY
from flashmoe.bank.policy.slru import PROTECTED_SHARE


class Twin:
    """The history of all uses, and who is resident."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.history: list[int] = []
        # The capacity at each use.
        self.capacities: list[int] = []
        self.resident: list[int] = []

    def use(self, expert: int) -> None:
        self.history.append(expert)
        self.capacities.append(self.capacity)
        if expert in self.resident:
            self.hit(expert)
        else:
            self.resident.append(expert)
            self.admit(expert)

    def victim(self, pinned: Collection[int]) -> int:
        expert = self.choose(pinned)
        assert expert not in pinned
        self.resident.remove(expert)
        return expert

    def resize(self, capacity: int) -> None:
        self.capacity = capacity

    def hit(self, expert: int) -> None: ...

    def admit(self, expert: int) -> None: ...

    def choose(self, pinned: Collection[int]) -> int:
        raise NotImplementedError


class LRUTwin(Twin):
    def choose(self, pinned: Collection[int]) -> int:
        def last_use(expert: int) -> int:
            return max(when for when, used in enumerate(self.history) if used == expert)

        return min((e for e in self.resident if e not in pinned), key=last_use)


class ClockTwin(Twin):
    """`resident` is the ring as the hand sees it, the next one first."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.marked: set[int] = set()

    def hit(self, expert: int) -> None:
        self.marked.add(expert)

    def choose(self, pinned: Collection[int]) -> int:
        while True:
            expert = self.resident[0]
            if expert not in pinned and expert not in self.marked:
                return expert
            if expert not in pinned:
                self.marked.remove(expert)
            self.resident.append(self.resident.pop(0))


class SLRUTwin(Twin):
    """Both lists have the least recent expert first."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.probation: list[int] = []
        self.protected: list[int] = []

    def admit(self, expert: int) -> None:
        self.probation.append(expert)

    def hit(self, expert: int) -> None:
        if expert in self.probation:
            self.probation.remove(expert)
        else:
            self.protected.remove(expert)
        self.protected.append(expert)
        self.let_fall()

    def resize(self, capacity: int) -> None:
        self.capacity = capacity
        self.let_fall()

    def let_fall(self) -> None:
        while len(self.protected) > int(PROTECTED_SHARE * self.capacity):
            self.probation.append(self.protected.pop(0))

    def choose(self, pinned: Collection[int]) -> int:
        candidates = [e for e in self.probation + self.protected if e not in pinned]
        (self.probation if candidates[0] in self.probation else self.protected).remove(
            candidates[0]
        )
        return candidates[0]


class S3FIFOTwin(Twin):
    """Queues of [expert, uses], the oldest first; one step of a queue at a time."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.small: list[list[int]] = []
        self.main: list[list[int]] = []
        self.ghosts: list[int] = []

    @property
    def small_size(self) -> int:
        return max(1, int(SMALL_SHARE * self.capacity))

    def resize(self, capacity: int) -> None:
        self.capacity = capacity
        self.trim_ghosts()

    def trim_ghosts(self) -> None:
        most = max(1, self.capacity - self.small_size)
        self.ghosts = self.ghosts[-most:]

    def admit(self, expert: int) -> None:
        returned = expert in self.ghosts
        if returned:
            self.ghosts.remove(expert)
        (self.main if returned else self.small).append([expert, 0])

    def hit(self, expert: int) -> None:
        for entry in self.small + self.main:
            if entry[0] == expert and entry[1] < MOST_USES:
                entry[1] += 1

    def choose(self, pinned: Collection[int]) -> int:
        turn = "small" if len(self.small) >= self.small_size else "main"
        # A queue's turn ends once it has nothing to give: all left in it is pinned.
        passed = 0
        while True:
            queue = self.small if turn == "small" else self.main
            if passed >= len(queue):
                turn, passed = ("main" if turn == "small" else "small"), 0
                continue
            expert, uses = queue.pop(0)
            if expert in pinned:
                queue.append([expert, uses])
                passed += 1
            elif turn == "small" and uses >= USES_TO_STAY:
                self.main.append([expert, 0])
            elif turn == "small":
                self.ghosts.append(expert)
                self.trim_ghosts()
                return expert
            elif uses == 0:
                return expert
            else:
                queue.append([expert, uses - 1])
                passed = 0


class LFUTwin(Twin):
    """Scores summed up anew over the whole history."""

    def score(self, expert: int) -> float:
        used = [when for when, e in enumerate(self.history) if e == expert]
        # A use ages all uses up to it by a share of the half-life at that time.
        ages = [sum(1 / (HALF_LIFE * c) for c in self.capacities[when:]) for when in used]
        return sum(2.0**-age for age in ages)

    def choose(self, pinned: Collection[int]) -> int:
        return min((e for e in self.resident if e not in pinned), key=lambda e: (self.score(e), e))


TWINS = {
    "lru": LRUTwin,
    "clock": ClockTwin,
    "slru": SLRUTwin,
    "s3fifo": S3FIFOTwin,
    "lfu": LFUTwin,
}
