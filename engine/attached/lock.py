"""Who may use the weights: many forwards at once, or one switch of experts, alone."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from freemerge.errors import InputError


class WeightsLock:
    """A readers-writer lock; readers are forwards, a writer changes weights.

    A thread that reads may read again, inside itself. A writer waits for readers of other threads; readers who come
    meanwhile wait for the writer, and are next when it is done.

    A forward that ended without saying so (KeyboardInterrupt passes a module's hooks by) is found by its frame, which
    is no longer on its thread's stack when that thread comes again.
    """

    def __init__(self):
        self._changed = threading.Condition()
        self._readers: dict[int, list] = {}  # thread -> frames of its forwards, None for a hold that ends by itself
        self._writers_waiting = self._readers_waiting = 0
        self._readers_first = False  # those who waited for a writer that is done
        self._writing: int | None = None

    def begin_forward(self, frame) -> None:
        """`frame` stays on this thread's stack for as long as the forward runs."""
        self._begin(frame)

    @property
    def in_forward(self) -> bool:
        """Whether this thread is in a forward."""
        with self._changed:
            self._forget_interrupted(threading.get_ident())
            return any(frame is not None for frame in self._readers.get(threading.get_ident(), ()))

    def end_forward(self) -> None:
        """Of the forward this thread began last; nothing where there is none."""
        with self._changed:
            held = self._readers.get(threading.get_ident(), [])
            if held and held[-1] is not None:
                self._end(threading.get_ident())

    @contextmanager
    def reading(self) -> Iterator[None]:
        thread = self._begin(None)
        try:
            yield
        finally:
            with self._changed:
                self._readers[thread] = [frame for frame in self._readers[thread] if frame is None]
                self._end(thread)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Raises InputError inside a forward or a hold of this thread, which would wait for itself."""
        thread = threading.get_ident()
        with self._changed:
            self._forget_interrupted(thread)
            if thread in self._readers:
                raise InputError("an expert cannot be switched inside a forward, or inside `with model.routed(...)`")
            self._writers_waiting += 1
            try:
                self._changed.wait_for(lambda: not (self._readers or self._readers_first) and self._writing is None)
            finally:
                self._writers_waiting -= 1
                self._changed.notify_all()
            self._writing = thread
        try:
            yield
        finally:
            with self._changed:
                self._writing = None
                self._readers_first = self._readers_waiting > 0
                self._changed.notify_all()

    def _begin(self, frame) -> int:
        thread = threading.get_ident()
        with self._changed:
            self._forget_interrupted(thread)
            if thread not in self._readers:
                self._wait_to_read()
            self._readers.setdefault(thread, []).append(frame)
        return thread

    def _wait_to_read(self) -> None:
        self._readers_waiting += 1
        try:
            self._changed.wait_for(lambda: self._writing is None and (self._readers_first or not self._writers_waiting))
        finally:
            self._readers_waiting -= 1
            self._readers_first = self._readers_first and self._readers_waiting > 0
            self._changed.notify_all()

    def _end(self, thread: int) -> None:
        self._readers[thread].pop()
        if not self._readers[thread]:
            del self._readers[thread]
            self._changed.notify_all()

    def _forget_interrupted(self, thread: int) -> None:
        held = self._readers.get(thread)
        if not held:
            return
        running, frame = set(), sys._getframe()
        while frame is not None:
            running.add(id(frame))
            frame = frame.f_back
        held[:] = [frame for frame in held if frame is None or id(frame) in running]
        if not held:
            del self._readers[thread]
            self._changed.notify_all()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the block is done: between an op and the note of it, it would leave weights half changed."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    came: list = []
    before = signal.signal(signal.SIGINT, lambda *args: came.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came and callable(before):
        before(*came[0])
