"""Run the workers of a service as forks of this process, and replace those that die.

Forks share the imported modules and compiled kernels, so that a new worker serves at once.
"""

import logging
import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

_log = logging.getLogger("bonsai_lora")

_FOR_WORKERS = (signal.SIGTERM, signal.SIGINT)
"""They let a worker finish its requests and end."""
_OTHERS = (signal.SIGHUP, signal.SIGQUIT, signal.SIGALRM, signal.SIGUSR1, signal.SIGUSR2)
_ENDINGS = (*_FOR_WORKERS, *_OTHERS)
_SIGNALS = {*_ENDINGS, signal.SIGCHLD, signal.SIGTSTP}
_YOUNG_SECONDS = 1.0
"""A worker that dies younger is replaced only after this time."""


class Supervisor:
    """Keeps `count` processes running that call `work`; only for a process with a single thread.

    `on_death` is called with the id of each worker that died, before it is replaced.
    """

    def __init__(
        self, work: Callable[[], None], count: int, on_death: Callable[[int], None]
    ) -> None:
        self._work = work
        self._count = count
        self._on_death = on_death
        self._started: dict[int, float] = {}
        """Time of the start by process id."""
        self._is_ending = False
        self._code = 0

    def run(self) -> int:
        """Supervise until a signal of `_ENDINGS`.

        Returns 0, or the exit code of a worker that failed. The first signal lets requests in
        flight finish; a second SIGINT does not.
        """
        signal.signal(signal.SIGCHLD, lambda *_: None)  # ignored signals cannot be waited for
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        for _ in range(self._count):
            self._start()
        while self._started:
            received = signal.sigwait(_SIGNALS)
            if received == signal.SIGCHLD:
                self._collect()
            elif signal.getsignal(received) == signal.SIG_IGN:
                continue  # as nohup(1) asks
            elif received == signal.SIGTSTP:
                self._stop()
            elif self._is_ending:
                self._send(received)
            else:
                self._end(signal.SIGINT if received == signal.SIGINT else signal.SIGTERM)
        return self._code

    def _start(self) -> None:
        pid = os.fork()
        if pid == 0:
            _become_worker(self._work)
        self._started[pid] = time.monotonic()

    def _end(self, number: int = signal.SIGTERM) -> None:
        self._is_ending = True
        self._send(number)

    def _stop(self) -> None:
        """Stop until a shell continues this process: Ctrl-Z reaches no worker, nor does fg(1)."""
        self._send(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._send(signal.SIGCONT)

    def _send(self, number: int) -> None:
        for pid in self._started:
            os.kill(pid, number)  # not collected yet, so the number is not reused

    def _collect(self) -> None:
        """Collect all processes that ended; several signals may have become one."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self._started:  # not an orphan that process 1 of a container inherited
                self._on_exit(pid, os.waitstatus_to_exitcode(status))

    def _on_exit(self, pid: int, code: int) -> None:
        age = time.monotonic() - self._started.pop(pid)
        if self._is_ending:
            return
        if code > 0:  # it would fail again
            _log.error("worker %d failed with exit code %d; the service ends", pid, code)
            self._code = code
            self._end()
            return
        cause = f"was killed by {signal.Signals(-code).name}" if code else "ended"
        _log.error("worker %d %s and is replaced", pid, cause)
        self._on_death(pid)
        time.sleep(max(0.0, _YOUNG_SECONDS - age))
        self._start()


def _become_worker(work: Callable[[], None]) -> NoReturn:
    """Call `work` and exit, without what the parent process does when it exits."""
    code = 1
    try:
        # Ctrl-C is the supervisor's, which passes it on: a worker that got it twice would not let
        # requests finish.
        os.setpgid(0, 0)
        # In a group of its own it would be stopped by a terminal that it logs to (stty tostop).
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for ending in _ENDINGS:
            signal.signal(ending, _exit_at_once if ending in _FOR_WORKERS else signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        work()
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 1
    except Exception:  # noqa: BLE001 - the process ends here
        _log.exception("a worker failed")
    finally:
        os._exit(code)


def end_by_signals() -> None:
    """Make this process exit in an orderly way by the signals that end a service."""
    for ending in _ENDINGS:
        if signal.getsignal(ending) != signal.SIG_IGN:
            signal.signal(ending, _exit)


def _exit(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)


def _exit_at_once(_signal: int, _frame: FrameType | None) -> NoReturn:
    """Exit without an exception, which callbacks and finalizers swallow."""
    os._exit(0)
