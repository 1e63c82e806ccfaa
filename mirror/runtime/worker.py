"""The draft's thread, and the seat that keeps a failing draft away from the text."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from mirror.errors import DraftError
from mirror.runtime.draft import Draft
from mirror.runtime.proposal import LaunchedProposal, Proposal

T = TypeVar("T")

_CLOSE_WAIT_S = 1.0


class Job(Generic[T]):
    """Work handed to the draft's thread."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._done = threading.Event()
        self._result: list[T] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        """Do the work, on the calling thread."""
        try:
            self._result.append(self._work())
        except BaseException as error:  # noqa: BLE001  (it is raised again to whoever waits)
            self._error = error
        self._done.set()

    @property
    def done(self) -> bool:
        """Whether a result or an error is there."""
        return self._done.is_set()

    def result(self, timeout_s: float) -> T:
        """Wait for the result.

        Raises:
            DraftError: none within the timeout. What the work raised is raised as it is.
        """
        if not self._done.wait(timeout_s):
            raise DraftError(f"no answer within {timeout_s:g} s")
        if self._error is not None:
            raise self._error
        return self._result[0]


class DraftSeat:
    """A draft on its own thread. One that raises or hangs is lost: it is never called again.

    A thread stuck inside a device can't be ended, so it is left alone with everything it may touch.

    Attributes:
        lost: why the draft is gone; None while it is there.
    """

    def __init__(self, draft: Draft, timeout_s: float) -> None:
        self.lost: str | None = None
        self._draft = draft
        self._timeout_s = timeout_s
        self._jobs: queue.SimpleQueue[Job[object] | None] = queue.SimpleQueue()
        # A daemon, so that a hung draft doesn't keep the process from ending.
        self._thread = threading.Thread(target=self._serve, name="mirror-draft", daemon=True)
        self._thread.start()

    def start(self, work: Callable[[Draft], T]) -> Job[T]:
        """Hand work to the draft's thread; jobs run one at a time, in order."""
        job = Job(lambda: work(self._draft))
        self._jobs.put(job)  # type: ignore[arg-type]  # the thread never looks at a result
        return job

    def finish(self, job: Job[T]) -> T:
        """Wait for a job.

        Raises:
            DraftError: the draft raised or hung; it is lost from now on.
        """
        return self._guarded(lambda: job.result(self._timeout_s))

    def read(self, proposal: LaunchedProposal) -> Proposal:
        """Wait for what a proposal's passes give, for as long as it takes, as for any pass on a device like that.

        Raises:
            DraftError: the device failed; the draft is lost from now on.
        """
        return self._guarded(proposal.read)

    def _guarded(self, wait: Callable[[], T]) -> T:
        try:
            return wait()
        except Exception as error:
            self.lost = (
                f"the draft failed ({type(error).__name__}: {error}); generation goes on without it, "
                "in plain mode, until the bundle is loaded again"
            )
            raise DraftError(self.lost) from error

    def close(self) -> None:
        """End the thread; one that hangs is left behind."""
        self._jobs.put(None)
        self._thread.join(_CLOSE_WAIT_S)

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.run()
