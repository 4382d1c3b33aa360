"""Processes that score rows for one leaf. One that does not answer in time, or dies, is replaced.

Rows go out pickled. Answers come back as JSON, so nothing that a reward does over there runs code in the training.
"""

import json
import multiprocessing
import multiprocessing.connection
import os
import pickle
import queue
import signal
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from .errors import NOT_OF_THE_ROW, CallError, RowError, is_missing_package, remedy_for, said
from .scoring import only_value

_TAKEN = {"taken": True}  # a process says so before it scores: if it dies from here on, the row is to blame
_PROCESS = os.getpid()  # the process that imported this module
_START_TIMEOUT = 600.0  # seconds for the imports of a new process, on a machine that may be busy
# A reward that uses torch or accelerate must not take itself for a rank of the training.
_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class StartError(RuntimeError):
    """The process of a reward could not start: a mistake in the script, not in a row."""


class Workers:
    """The processes of one leaf, which start when they are needed. A pickled or deep copy has none."""

    def __init__(self) -> None:
        self._idle: queue.LifoQueue[Worker] = queue.LifoQueue()
        self._owner = os.getpid()

    def __reduce__(self) -> tuple[type["Workers"], tuple[()]]:
        return Workers, ()

    @staticmethod
    def check(leaf: Any) -> None:
        """Raise `TypeError` for a leaf that cannot be sent to a process."""
        try:
            _payload(leaf)
        except Exception as error:  # pickle raises many kinds
            raise TypeError(
                f"reward {leaf.name!r} cannot be sent to a process ({type(error).__name__}: {error}): define its "
                "function at the top of a module, and pass models by id or folder"
            ) from error

    def map(self, count: int, score_row: Callable[[int], Any], num_rows: int) -> list[Any]:
        """`score_row` of each row, in at most `count` threads at once. Each thread uses one process."""
        if self._owner != os.getpid():  # in a fork: the parent keeps the old ones
            self._idle, self._owner = queue.LifoQueue(), os.getpid()
        executor = ThreadPoolExecutor(min(count, num_rows), thread_name_prefix="reward")
        try:
            return list(executor.map(score_row, range(num_rows)))
        finally:  # at once when interrupted: rows that are under way end with their time limit
            executor.shutdown(wait=False, cancel_futures=True)

    def ask(self, leaf: Any, call: dict[str, Any], timeout: float) -> Any:
        """The value of one row, or the [`RowError`] that says why there is none."""
        call = {name: value for name, value in call.items() if name not in NOT_OF_THE_ROW}
        while True:
            try:
                worker, was_kept = self._idle.get_nowait(), True
            except queue.Empty:
                worker, was_kept = Worker(leaf.name, _payload(leaf)), False
            answer = worker.ask(call, timeout)
            if worker.is_alive:
                self._idle.put(worker)
            elif was_kept and not worker.took_row:  # killed while it was idle: the row is not to blame
                continue
            return answer


def _payload(leaf: Any) -> bytes:
    return pickle.dumps(replace(leaf, guard=None, cache_size=None))


class Worker:
    """One process, which scores a row at a time."""

    def __init__(self, name: str, payload: bytes):
        # Not fork: the training has threads, and a lock that one of them holds would stay locked in the child. In a
        # fork of the training not forkserver either, whose server is a child of the training.
        has_server = "forkserver" in multiprocessing.get_all_start_methods() and os.getpid() == _PROCESS
        context: Any = multiprocessing.get_context("forkserver" if has_server else "spawn")
        if has_server:  # so that later processes need not import it again
            context.set_forkserver_preload(["__main__", __name__])
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, payload), daemon=True)
        self.process.start()
        theirs.close()
        self.is_alive, self.took_row = True, False
        self._kill = weakref.finalize(self, _kill, self.process, self.connection, os.getpid())
        started = self._receive(_START_TIMEOUT)
        if not isinstance(started, dict) or "ready" not in started:
            self.stop()
            why = started["broken"] if isinstance(started, dict) else "it ended while starting, as shown above"
            raise StartError(
                f"no process for reward {name!r}: {why}. A script that uses in_processes needs "
                '`if __name__ == "__main__":` around what it runs'
            )

    def ask(self, call: dict[str, Any], timeout: float) -> Any:
        try:
            payload = pickle.dumps(call)
        except Exception as error:
            return RowError(f"its row cannot be sent to a process: {said(error)}")
        self.took_row = False
        end = time.monotonic() + timeout
        try:
            self.connection.send_bytes(payload)
            answer = self._receive(timeout)
            self.took_row = answer is TimeoutError or answer == _TAKEN
            if answer == _TAKEN:
                answer = self._receive(max(end - time.monotonic(), 0.0))
        except (OSError, EOFError, ValueError):  # it is gone, or wrote something else into the connection
            answer = None
        if answer is TimeoutError:
            self.stop()
            return RowError(f"no answer within {timeout:g} s", "timeouts")
        if not isinstance(answer, dict):
            self.process.join(1.0)
            code = self.process.exitcode
            self.stop()
            return RowError(f"its process died{'' if code is None else f' ({_exit(code)})'}")
        if "missing" in answer:
            raise ImportError(answer["missing"])
        if "mistake" in answer:
            raise CallError(answer["mistake"])
        return RowError(answer["error"], answer["kind"], answer["remedy"]) if "error" in answer else answer["value"]

    def _receive(self, timeout: float) -> Any:
        try:
            return json.loads(self.connection.recv_bytes()) if self.connection.poll(timeout) else TimeoutError
        except (OSError, EOFError, ValueError):
            return None

    def stop(self) -> None:
        self.is_alive = False
        self._kill()


def _kill(process: Any, connection: Any, owner: int) -> None:
    if os.getpid() != owner:  # a fork of the training ends, not the training
        return
    try:
        os.killpg(process.pid, signal.SIGKILL)  # its own group: with what it started
    except (OSError, AttributeError):
        process.kill()
    process.join(5.0)
    connection.close()


def _exit(code: int) -> str:
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"exit code {code}"


def serve(connection: multiprocessing.connection.Connection, payload: bytes) -> None:
    """The life of a process: score what comes until the training ends."""
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C is for the training to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for name in _RANK:
        os.environ.pop(name, None)
    try:
        leaf = pickle.loads(payload)  # it comes from the training, as all rows do
    except BaseException as error:
        connection.send_bytes(json.dumps({"broken": said(error)}).encode())
        return
    connection.send_bytes(json.dumps({"ready": True}).encode())
    while True:
        try:
            call = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(json.dumps(_TAKEN).encode())
        connection.send_bytes(json.dumps(_scored(leaf, pickle.loads(call))).encode())


def _scored(leaf: Any, call: dict[str, Any]) -> dict[str, Any]:
    """The value of a row, or what went wrong, as JSON can say it."""
    try:
        return {"value": only_value(leaf.score(**call))}
    except RowError as error:
        return {"error": str(error), "kind": error.kind, "remedy": error.remedy}
    except CallError as error:
        return {"mistake": str(error)}
    except BaseException as error:  # SystemExit too: the row is to blame
        if is_missing_package(error):
            return {"missing": str(error)}
        return {"error": said(error), "kind": "failures", "remedy": remedy_for(error, call["completions"])}


def _end_with_parent() -> None:
    """End, with all that the reward started, when the training ends without a word."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        if hasattr(os, "killpg"):
            os.killpg(0, signal.SIGKILL)
        os._exit(1)
