"""Evidence files: what was measured for a method against its baseline, bound to the code and the case that made it.

A file is JSON, one per method, named `<id>.json`. It is stale when the method's source or the case has changed since.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from limbeck import storage
from limbeck.errors import UserError
from limbeck.evaluation import statistics

Status = Literal["reproduced", "not reproduced at this scale", "mechanism only"]


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


Finite = Annotated[float, AfterValidator(_finite)]


class Evidence(BaseModel):
    """One method against the baseline its paper argues against, same budget, same tuning, paired over seeds.

    Attributes:
        id: the method's id.
        status: what the figures say; "mechanism only" claims no gain.
        metric: the figure compared; `higher_is_better` says which way.
        baseline_name: what it was compared with.
        baseline, method: mean values over the seeds.
        difference, interval: mean of method - baseline over seeds and its 95 % t interval (None for a single seed).
        seeds, method_values, baseline_values: the values per seed, in one order.
        claim_tested: one sentence.
        case: the recipe, as data.
        tuned: what was tuned, over which grid, on which split; the same for both sides.
        mechanism: further measured figures that show the mechanism at work.
        limbeck, torch: versions. machine: facts such as the CPU count; no host name, no path.
        seconds: wall time of all runs.
        method_source_sha256, case_sha256: what the figures are bound to.
    """

    model_config = ConfigDict(extra="forbid")

    id: str = Field(min_length=1)
    status: Status
    metric: str = Field(min_length=1)
    higher_is_better: bool = True
    baseline_name: str = Field(min_length=1)
    baseline: Finite
    method: Finite
    difference: Finite
    interval: tuple[Finite, Finite] | None
    p: Finite | None = None
    wins: int | None = None
    seeds: list[int] = Field(min_length=1)
    method_values: list[Finite]
    baseline_values: list[Finite]
    claim_tested: str = Field(min_length=1)
    case: dict[str, Any]
    tuned: dict[str, Any] = Field(default_factory=dict)
    mechanism: dict[str, Any] = Field(default_factory=dict)
    limbeck: str = ""
    torch: str = ""
    machine: dict[str, Any] = Field(default_factory=dict)
    seconds: Finite = 0.0
    method_source_sha256: str
    case_sha256: str


def case_digest(case: Mapping[str, Any]) -> str:
    """SHA-256 of a recipe as canonical JSON (sorted keys), so that the order of its keys does not matter."""
    return storage.sha256(json.dumps(case, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


def source_digest(path: str | Path) -> str:
    """SHA-256 of what a method's source file computes: its syntax tree without docstrings and comments.

    A better sentence does not make evidence stale; a changed number or line of code does.
    """
    import ast

    tree = ast.parse(Path(path).read_text("utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            body[0].value = ast.Constant("")
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("Card", "setting"):
            keep_words = getattr(node.func, "id", "") == "setting"
            node.keywords = [k for k in node.keywords if keep_words]
            node.args = node.args[:1]
    return storage.sha256(ast.dump(tree).encode())


def machine() -> dict[str, Any]:
    """What may be told about this machine: system, architecture and number of CPUs; never a name or a path."""
    import os
    import platform

    return {"system": platform.system(), "architecture": platform.machine(), "cpus": os.cpu_count(), "python": platform.python_version()}


def build(
    id: str,
    *,
    metric: str,
    baseline_name: str,
    seeds: list[int],
    method_values: list[float],
    baseline_values: list[float],
    claim_tested: str,
    case: dict[str, Any],
    source: str | Path,
    higher_is_better: bool | None = None,
    mechanism_only: bool = False,
    **rest: Any,
) -> Evidence:
    """The evidence that follows from values per seed: means, paired difference, interval, status and digests are worked out here.

    Args:
        source: the method's file. mechanism_only: the status claims no gain. rest: further fields of `Evidence`.
    """
    up = statistics.higher_is_better(metric) if higher_is_better is None else higher_is_better
    pair = statistics.paired(method_values, baseline_values)
    verdict = statistics.verdict(pair["difference"], pair["interval"], up)
    return Evidence(
        id=id,
        status=statistics.MECHANISM_ONLY if mechanism_only else verdict,
        metric=metric,
        higher_is_better=up,
        baseline_name=baseline_name,
        baseline=statistics.summary(baseline_values)["mean"],
        method=statistics.summary(method_values)["mean"],
        difference=pair["difference"],
        interval=pair["interval"],
        p=pair["p"],
        wins=pair["wins"] if up else pair["losses"],
        seeds=seeds,
        method_values=method_values,
        baseline_values=baseline_values,
        claim_tested=claim_tested,
        case=case,
        method_source_sha256=source_digest(source),
        case_sha256=case_digest(case),
        **{"machine": machine(), **rest},
    )


def load(path: str | Path) -> Evidence:
    """Read an evidence file.

    Raises:
        UserError: it is missing, no JSON, or lacks or misnames a field.
    """
    path = Path(path)
    remake = "remake it with `limbeck evidence " + path.stem + "`"
    if not path.is_file():
        raise UserError(f"no evidence file at {path}", remake)
    try:
        return Evidence.model_validate(json.loads(path.read_text("utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path} is not an evidence file: {'.'.join(map(str, first['loc']))}: {first['msg']}", remake) from None
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable JSON: {error}", remake) from None


def save(evidence: Evidence, path: str | Path) -> None:
    """Write an evidence file, atomically."""
    storage.write_json(path, evidence.model_dump(mode="json"))
    _search.cache_clear()


def check(evidence: Evidence, *, method_source_sha256: str | None = None, case_sha256: str | None = None) -> list[str]:
    """What is wrong with an evidence file; an empty list when nothing is.

    Args:
        evidence: the file's content.
        method_source_sha256: digest of the method's source as it is now; None leaves this out.
        case_sha256: digest of the case as it is now; None leaves this out (the file's own case is always checked).
    """
    e, problems = evidence, []
    if method_source_sha256 is not None and e.method_source_sha256 != method_source_sha256:
        problems.append(f"stale: the source of {e.id} has changed since the runs")
    if case_sha256 is not None and e.case_sha256 != case_sha256:
        problems.append(f"stale: the case of {e.id} has changed since the runs")
    if case_digest(e.case) != e.case_sha256:
        problems.append("altered: the recorded case does not have the recorded digest")
    if not len(e.seeds) == len(e.method_values) == len(e.baseline_values):
        return [*problems, f"malformed: {len(e.seeds)} seeds, {len(e.method_values)} method and {len(e.baseline_values)} baseline values"]
    if len(set(e.seeds)) != len(e.seeds):
        problems.append("malformed: a seed is listed twice")
    pair = statistics.paired(e.method_values, e.baseline_values)

    def differ(a: float, b: float) -> bool:
        return not math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)

    expected = {
        "method": statistics.summary(e.method_values)["mean"],
        "baseline": statistics.summary(e.baseline_values)["mean"],
        "difference": pair["difference"],
    }
    problems += [f"altered: {name} does not follow from the values per seed" for name, v in expected.items() if differ(getattr(e, name), v)]
    if (e.interval is None) != (pair["interval"] is None) or (e.interval and any(map(differ, e.interval, pair["interval"]))):
        problems.append("altered: interval does not follow from the values per seed")
    if e.status != statistics.MECHANISM_ONLY and e.status != statistics.verdict(pair["difference"], pair["interval"], e.higher_is_better):
        problems.append(f"altered: status {e.status!r} does not follow from the interval")
    text = json.dumps([e.machine, e.case, e.tuned, e.mechanism])
    if "hostname" in e.machine or re.search(r'"(/home/|/root/|/Users/|/mnt/|/tmp/|[A-Z]:\\\\)', text):
        problems.append("private: a host name or a path of the machine is recorded")
    return problems


def folders() -> list[Path]:
    """Where evidence is looked for: beside the installed package, then in the checkout of an editable installation."""
    package = Path(__file__).resolve().parents[1]
    places = [package / "_evidence"]
    if package.parent.name == "src":
        places.append(package.parent.parent / "evidence")
    return [place for place in places if place.is_dir()]


@cache
def _search(places: tuple[Path, ...]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for place in places:
        for path in sorted(place.rglob("*.json")):
            found.setdefault(path.stem, path)
    return found


def path_of(id: str) -> Path | None:
    """The evidence file of a method, or None."""
    path = _search(tuple(folders())).get(id)
    return path if path is not None and path.is_file() else None


def find(id: str) -> Evidence | None:
    """The evidence of a method, or None when there is none."""
    path = path_of(id)
    return None if path is None else load(path)


def brief(evidence: Evidence | None) -> dict[str, Any] | None:
    """The few fields that `limbeck methods --json` prints; None stays None."""
    if evidence is None:
        return None
    return {
        "status": evidence.status,
        "metric": evidence.metric,
        "higher_is_better": evidence.higher_is_better,
        "baseline_name": evidence.baseline_name,
        "baseline": evidence.baseline,
        "method": evidence.method,
        "difference": evidence.difference,
        "interval": None if evidence.interval is None else list(evidence.interval),
        "seeds": list(evidence.seeds),
    }
