"""Tickets: which jobs are still wanted, so that one waiting in the queue can be cancelled like a running one."""

import secrets
import threading


class Tickets:
    """Numbers for jobs, which cannot be guessed; each session has at most one live ticket."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._live: dict[str, int] = {}
        self._claimed: dict[int, set[str]] = {}

    def issue(self, session: str) -> int:
        """A new ticket; it cancels the session's earlier one."""
        with self._lock:
            old = self._live.pop(session, None)
            self._claimed.pop(old or 0, None)
            ticket = 1 + secrets.randbits(53 - 1)  # a page holds it as a double
            self._live[session] = ticket
            self._claimed[ticket] = set()
            return ticket

    def cancel(self, session: str) -> None:
        """Cancel whatever the session has asked for."""
        with self._lock:
            self._claimed.pop(self._live.pop(session, 0), None)

    def drop(self, ticket: int) -> None:
        """Forget a job that failed, and with it the steps that were to follow."""
        with self._lock:
            self._claimed.pop(ticket, None)

    def newest(self, session: str) -> int:
        """The session's current ticket, or 0."""
        with self._lock:
            return self._live.get(session, 0)

    def is_replaced(self, ticket: int, session: str) -> bool:
        """Whether the session has a newer ticket, whose job reports what there is to say."""
        return self.newest(session) not in (0, ticket)

    def live(self, ticket: int) -> bool:
        """Whether the job is still wanted. A running job asks this after every U-Net call."""
        with self._lock:
            return ticket in self._claimed

    def claim(self, ticket: int, work: str) -> bool:
        """Take on one piece of the ticket's work; False if it is cancelled or has been claimed already."""
        with self._lock:
            if work in self._claimed.get(ticket, {work}):
                return False
            self._claimed[ticket].add(work)
            return True
