"""Pieces of work as tasks of Ray: each takes its processors and accelerators, and is begun again when its process or machine is lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from limbeck.scaling.cluster import Fleet, require
from limbeck.scaling.site import Site
from limbeck.scaling.sizing import RETRIES
from limbeck.scaling.work import Ended, carry_out

GRACE = 60.0
"""Seconds that tasks get to save their state after Ctrl-C."""


def _task(site: Site, work: str, item: Any) -> Ended:
    from limbeck.errors import UserError

    try:
        site.enter()
    except UserError as error:
        return {"status": "user", "message": error.message, "hint": error.hint}
    return carry_out(work, item)


def on_cluster(work: str, items: Sequence[Any], fleet: Fleet, site: Site) -> Iterator[tuple[int, Ended]]:
    """Do pieces of work as tasks of the cluster that this process is in, `fleet.workers` at a time.

    Args:
        work: see `limbeck.scaling.work.carry_out`.
        items: one a piece; plain data.
        fleet: how many at a time, and what each takes.
        site: what each must find on its machine.

    Yields:
        place in `items` and how it ended, as they end.
    """
    ray = require()
    task = ray.remote(_task).options(num_cpus=fleet.cpus, num_gpus=fleet.gpus, max_retries=RETRIES)
    waiting, running = list(enumerate(items))[::-1], {}
    try:
        while waiting or running:
            while waiting and len(running) < fleet.workers:
                place, item = waiting.pop()
                running[task.remote(site, work, item)] = place
            ready, _ = ray.wait(list(running), num_returns=1)
            for found in ready:
                place = running.pop(found)
                yield place, _ended(ray, found)
    finally:
        if running:  # this was left early: let each save its state
            for left in running:
                ray.cancel(left, force=False, recursive=False)
            ray.wait(list(running), num_returns=len(running), timeout=GRACE)


def _ended(ray: Any, found: Any) -> Ended:
    try:
        return ray.get(found)
    except ray.exceptions.RayError as error:
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return {"status": "killed", "message": f"its process or machine was lost {RETRIES + 1} times: {text[:200]}"}
