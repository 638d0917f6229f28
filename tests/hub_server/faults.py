"""What can go wrong between a client and a Hub, made to happen where a test asks for it."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class Fault:
    """Break some requests whose "METHOD path" matches a pattern.

    Args:
        pattern: searched in "POST /api/models/alice/model/commit/main".
        times: how many of them; the ones after these go through.
        after: how many are let through first.
        status: answer with this status instead of doing anything.
        headers: of that answer, such as Retry-After.
        message: of that answer.
        cut_after: read so many bytes of the request's body, then close the connection without an answer.
        lose_answer: do what is asked, then close the connection without an answer.
    """

    pattern: str
    times: int = 1
    after: int = 0
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    message: str = "injected"
    cut_after: int | None = None
    lose_answer: bool = False
    hits: int = 0


class Faults:
    """The faults of a server, of which the first that matches takes place."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, fault: Fault) -> Fault:
        """Let it happen from now on."""
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """Nothing goes wrong from now on."""
        with self._lock:
            self._faults.clear()

    def of(self, request: str) -> Fault | None:
        """The fault that a request meets, counted."""
        with self._lock:
            for fault in self._faults:
                if re.search(fault.pattern, request) is None:
                    continue
                if fault.after > 0:
                    fault.after -= 1
                elif fault.hits < fault.times:
                    fault.hits += 1
                    return fault
        return None
