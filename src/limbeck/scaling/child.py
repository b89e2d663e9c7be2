"""A process that does pieces of work: `python -m limbeck.scaling.child`, started by `limbeck.scaling.pool`.

Lines of JSON come on standard input, `{"work", "item"}`; for each one goes out, an `Ended`. When standard input ends in the middle of a
piece, the parent was killed, and this process stops as if by SIGTERM: a run saves its state.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading


def main() -> None:
    """Do the work that standard input names, until it ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not mix with the answers
    lines: queue.Queue[str | None] = queue.Queue()
    busy = threading.Event()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        lines.put(None)
        if busy.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=read, daemon=True).start()
    from limbeck.scaling.work import carry_out

    while (line := lines.get()) is not None:
        given = json.loads(line)
        busy.set()
        ended = carry_out(given["work"], given["item"])
        busy.clear()
        print(json.dumps(ended), file=out, flush=True)


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, BrokenPipeError):
        os._exit(130)
