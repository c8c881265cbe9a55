"""Who uses the model when: the queue of the jobs of all sessions.

Jobs begin in the order in which they came. One that has computed for `TURN_SECONDS` is *long*: if it can be suspended
between two U-Net calls, it gives way to those that are waiting for their first turn, so that a short job waits for
other short ones, not for long ones. Long ones are finished in the order in which they came, and get as much time as
those that passed them took: neither kind starves.
"""

import threading
import time
from contextvars import ContextVar
from dataclasses import dataclass

from core.ui.backend.errors import JobError
from core.ui.look.viewer import seconds_left

MAX_WAITING = 32
"""Jobs that may wait for the model."""
MAX_WAITING_PER_SESSION = 6
"""Of one session: an open page may have its words, its concepts, an edit and some further questions waiting."""
TURN_SECONDS = 3.0
"""How long a job computes before it gives way to new ones."""

asker: ContextVar[str] = ContextVar("asker", default="")
"""The session whose request is being answered; empty outside of requests, where nobody is limited."""


@dataclass(eq=False)
class Turn:
    """A job's place in the queue."""

    session: str
    """Who asked for it."""
    used: float = 0.0
    """Seconds that it has had the model."""

    @property
    def is_long(self) -> bool:
        """Whether it has had its first turn."""
        return self.used >= TURN_SECONDS


class ModelQueue:
    """Jobs that wait for the model, and the one that has it. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._jobs: list[Turn] = []  # in the order in which they came, with the one that has the model
        self._holder: Turn | None = None
        self._since = 0.0
        self._owed = 0.0
        self._usual: float | None = None

    def join(self) -> Turn:
        """Line up.

        Raises:
            JobError: Too many jobs are waiting.
        """
        with self._changed:
            waiting = [job for job in self._jobs if job is not self._holder]
            session = asker.get()
            if session and sum(job.session == session for job in waiting) >= MAX_WAITING_PER_SESSION:
                raise JobError(f"{MAX_WAITING_PER_SESSION} of your jobs are waiting already. Let one of them finish.")
            if len(waiting) >= MAX_WAITING:
                raise JobError(f"{len(waiting)} jobs are waiting for the model. Try again in a minute.")
            turn = Turn(session)
            self._jobs.append(turn)
            return turn

    def wait(self, turn: Turn, seconds: float) -> bool:
        """Wait for the job's turn, but not longer than this; whether it has the model now."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._holder is None and self._next() is turn, seconds):
                return False
            self._holder, self._since = turn, time.monotonic()
            return True

    def gives_way(self, turn: Turn) -> bool:
        """Whether the job that has the model has to let others have it now; it then waits for another turn."""
        with self._changed:
            self._count(turn)
            if not turn.is_long or self._next() is turn:
                return False
            self._free()
            return True

    def leave(self, turn: Turn) -> None:
        """The job is over, or no longer wanted."""
        with self._changed:
            if self._holder is turn:
                self._count(turn)
                self._free()
            self._jobs.remove(turn)
            self._changed.notify_all()

    def standing(self, turn: Turn) -> str:
        """The place of a waiting job and how long it will probably wait, in words."""
        with self._changed:
            n_before = sum(self._is_before(job, turn) for job in self._jobs)
            usual, since = self._usual, self._since
            share = 2 if self._has_long() and not turn.is_long else 1  # every other turn is a long one's
        before = f"{n_before} job{'s are' if n_before > 1 else ' is'} before yours" if n_before else "yours is next"
        if usual is None or not n_before:
            return f"Waiting for the model: {before}"
        left = share * n_before * usual - min(time.monotonic() - since, usual)
        return f"Waiting for the model: {before}{seconds_left(left)}".removesuffix(" left")

    def _is_before(self, job: Turn, turn: Turn) -> bool:
        if job is turn:
            return False
        if job is self._holder or job.is_long != turn.is_long:
            return job is self._holder or turn.is_long
        return self._jobs.index(job) < self._jobs.index(turn)

    def _next(self) -> Turn | None:
        """The job whose turn it is, among all of them."""
        fresh = next((job for job in self._jobs if not job.is_long), None)
        long = next((job for job in self._jobs if job.is_long), None)
        return long if long is not None and (fresh is None or self._owed > 0) else fresh

    def _has_long(self) -> bool:
        return any(job.is_long for job in self._jobs)

    def _count(self, turn: Turn) -> None:
        """Note how long the holder has had the model since the last call."""
        now = time.monotonic()
        passed, self._since = now - self._since, now
        if turn.is_long:
            self._owed = max(self._owed - passed, 0.0)
        elif self._has_long():
            self._owed += passed
        turn.used += passed

    def _free(self) -> None:
        assert self._holder is not None
        took = min(self._holder.used, TURN_SECONDS)
        self._usual = took if self._usual is None else 0.8 * self._usual + 0.2 * took
        self._holder = None
        self._changed.notify_all()
