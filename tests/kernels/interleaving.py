"""Warpgroups as threads of which one runs at a time, and copies that land later: a seed decides who goes on."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable
from typing import Any


class Fault(Exception):
    """The kernel broke its own protocol."""


class _Ended(BaseException):
    """Ends the threads of a launch that failed."""


class Actor:
    """A warpgroup: a thread that runs only while ``schedule`` lets it."""

    def __init__(self, schedule: Schedule, cta: Cta, warpgroup: int, run: Callable[[], None]) -> None:
        self.cta, self.warpgroup = cta, warpgroup
        self.until, self.done, self.error = None, False, None
        self.go, self.back = threading.Semaphore(0), threading.Semaphore(0)

        def body() -> None:
            self.go.acquire()
            try:
                if not schedule.ended:
                    run()
            except _Ended:
                pass
            except BaseException as error:  # handed to the thread that runs the schedule
                self.error = error
            self.done = True
            self.back.release()

        self.thread = threading.Thread(target=body, daemon=True)
        self.thread.start()

    def ready(self) -> bool:
        return not self.done and (self.until is None or self.until())

    def step(self) -> None:
        self.go.release()
        self.back.acquire()


class CopyEngine:
    """Copies of some threads of a producer. Those before an arrival land before it, but each arrival vouches only for
    what began since the one before it: less than the hardware promises, so that each barrier must guard its stage."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.groups: list[deque[Callable[[], None]]] = [deque()]  # the last still takes copies
        self.committed: list[deque[Callable[[], None]]] = []

    def add(self, act: Callable[[], None], is_last: bool) -> None:
        self.groups[-1].append(act)
        if is_last:
            self.groups.append(deque())

    def commit(self) -> None:
        """What began since the commit before, or the arrival, is a group that can be waited for."""
        self.committed.append(self.groups[-1])
        self.groups.append(deque())

    def landed(self, but: int) -> bool:
        """Whether all committed groups but the last so many have landed."""
        return not any(self.committed[: max(0, len(self.committed) - but)])

    def ready(self) -> bool:
        return any(self.groups)

    def step(self) -> None:
        group = self.rng.choice([group for group in self.groups if group])
        group.popleft()()
        self.groups[:-1] = [group for group in self.groups[:-1] if group]


class Cta:
    def __init__(self, program_id: int, programs: int, rng: random.Random) -> None:
        self.program_id, self.programs = program_id, programs
        self.engines = CopyEngine(rng), CopyEngine(rng)  # of threads 0 to 126, of thread 127


class Schedule:
    """Who goes on. Some are much slower than others, in each run different ones."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.speed: dict[Any, float] = {}
        self.actors: list[Any] = []
        self.current: Actor | None = None
        self.ended = False

    def add(self, actor: Any) -> None:
        self.actors.append(actor)
        self.speed[actor] = 10 ** self.rng.uniform(-2, 2)

    def run(self) -> None:
        try:
            while any(isinstance(actor, Actor) and not actor.done for actor in self.actors):
                ready = [actor for actor in self.actors if actor.ready()]
                if not ready:
                    raise Fault("deadlock")
                actor = self.rng.choices(ready, [self.speed[actor] for actor in ready])[0]
                self.current = actor if isinstance(actor, Actor) else None
                actor.step()
                if isinstance(actor, Actor) and actor.error is not None:
                    raise actor.error
            if any(actor.ready() for actor in self.actors):
                raise Fault("copies are in flight at the end")
        finally:
            self.ended = True
            for actor in self.actors:
                if isinstance(actor, Actor) and not actor.done:
                    actor.step()

    def pause(self, until: Callable[[], bool] | None = None) -> None:
        """Called by a warpgroup: let others run, and go on once ``until`` holds."""
        me = self.current
        assert me is not None
        me.until = until
        me.back.release()
        me.go.acquire()
        if self.ended:
            raise _Ended
        me.until = None
