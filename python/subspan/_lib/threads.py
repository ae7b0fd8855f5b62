"""Calls of libraries that hear no Ctrl-C."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np


def stoppable(f: Any, *args: Any, **options: Any) -> Any:
    """``f`` of LAPACK, which hears no Ctrl-C: a large call runs in a thread of its own, to its end, while this one
    listens. After Ctrl-C it goes on there, unheard, and the process may end before it does.
    """
    if max((np.size(x) * min(np.shape(x)[-2:]) for x in args if np.ndim(x) >= 2), default=0) < 2e7:
        return f(*args, **options)
    return in_a_thread(f, args, options, outlived=True)


def in_a_thread(f: Any, args: tuple[Any, ...], options: dict[str, Any], *, outlived: bool) -> Any:
    """``f`` in a thread of its own while this one listens for Ctrl-C.

    ``outlived``: the process may end while ``f`` still runs. Not so where ``f`` takes memory of the interpreter's, as
    SuperLU does: the process then waits for it at its end.
    """
    found: list[Any] = []
    done = threading.Event()

    def job() -> None:
        try:
            found.extend([True, f(*args, **options)])
        except BaseException as e:  # handed over, whatever it is
            found.extend([False, e])
        finally:
            done.set()

    threading.Thread(target=job, daemon=outlived).start()
    while not done.wait(0.05):  # a join that is interrupted counts as one that has ended
        pass
    if not found[0]:
        raise found[1]
    return found[1]
