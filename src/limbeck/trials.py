"""Many runs of one recipe: methods side by side over seeds, and the evidence of a method against its baseline.

Both are made of ordinary runs (`limbeck.run.execute`), so that what a comparison shows is what a user gets.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from limbeck import recipe as schema
from limbeck import storage
from limbeck.errors import Fault, UserError
from limbeck.evaluation.comparison import Comparison
from limbeck.scaling.sizing import Sizing
from limbeck.trial_runs import Trial, finished, outcomes

Say = Callable[[str], None]
"""Told about progress, a line at a time."""


# ---- comparison ----


def parse_arm(text: str) -> tuple[str, dict[str, Any]]:
    """`kd` or `kd@temperature=1;alpha=0.5` as a method's id and settings.

    Raises:
        UserError: a setting without `=`.
    """
    id, _, rest = text.strip().partition("@")
    settings: dict[str, Any] = {}
    for item in filter(None, rest.split(";")):
        name, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"{text!r}: {item!r} is no setting", "write METHOD@name=value;name=value")
        settings[name.strip()] = schema.parse_yaml(value, text)
    return id, settings


def compare(
    recipe: str | Path | Mapping[str, Any] | schema.Recipe,
    methods: Sequence[str],
    seeds: int | Sequence[int] = 3,
    *,
    changes: Iterable[str] = (),
    out: str | Path | None = None,
    given: Mapping[str, Any] | None = None,
    sizing: Sizing = Sizing(),  # noqa: B008 (frozen)
    say: Say = lambda line: None,
) -> Comparison:
    """Run several methods on one recipe, each with every seed, and set them side by side.

    The first method is the reference of the paired differences. Finished runs in `out` are not repeated, unfinished ones go on, so
    an interrupted comparison is continued by the same call. A run that fails is a row with a status of its own; the others go on.

    Args:
        recipe: an embedded recipe's name, a file, a mapping or a `Recipe`.
        methods: ids, or `id@setting=value;setting=value`.
        seeds: how many (0, 1, ...), or which.
        changes: `a.b=c` overrides for all.
        out: folder of the runs and results; None for the next free `runs/<name>-compare-<number>`.
        given: objects for "teacher", "student", "data".
        sizing: who computes: this process, processes of this machine (`Sizing(workers=2)`), or Ray (`Sizing("ray")`); the figures are
            the same.
        say: told about progress.

    Raises:
        UserError: anything that the user can mend; what the first run complains of, when no run could be finished.
    """
    from limbeck.run import new_folder

    seeds = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not methods or not seeds:
        raise UserError("there is nothing to compare", "name at least one method and one seed")
    if len(set(methods)) < len(methods):
        raise UserError("a method stands twice in the comparison", "name each once, or give one other settings (kd@temperature=1)")
    base = (
        recipe
        if isinstance(recipe, schema.Recipe)
        else schema.resolve(recipe, changes=changes)
        if isinstance(recipe, Mapping)
        else schema.load(recipe, changes)
    )
    arms: dict[str, schema.Recipe] = {}
    for text in methods:
        id, settings = parse_arm(text)
        kept = base.method.settings if base.method.id == id and not settings else settings
        arms[text] = changed(base, {"method": {"id": id, "settings": kept}, "baseline": False, "ceiling": False})
        check_settings(arms[text])
    folder = Path(out) if out is not None else new_folder(base.model_copy(update={"method": schema.Method(id="compare")}))
    trials = [
        Trial(text, changed(arm, {"seed": seed}), folder / "runs" / f"{_plain(text)}-seed{seed}")
        for seed in seeds
        for text, arm in arms.items()
    ]
    ends: dict[int, dict[str, Any]] = {}
    for place, end in outcomes(trials, sizing, given, folder, say):
        ends[place] = end
        say(f"[{len(ends)}/{len(trials)}] {trials[place]}: {_line(end)}")
    result = Comparison(reference=methods[0])
    for place, one in enumerate(trials):
        _add(result, one, ends[place])
    if not result.metric:
        raise failure(result) or UserError("no run was finished")
    write_comparison(folder, result, base)
    return result


def _line(end: Mapping[str, Any]) -> str:
    if "metrics" not in end:
        return f"failed: {end['message']}"
    return f"{end['primary']} {end['metrics']['student'][end['primary']]:.4f} ({end['seconds']:.1f} s)"


def _add(result: Comparison, one: Trial, end: Mapping[str, Any]) -> None:
    if "metrics" not in end:
        result.add(one.label, one.recipe.seed, {}, status=f"failed: {end['message']}")
        result.failed.append({"run": str(one), **end})
        return
    result.add(one.label, one.recipe.seed, end["metrics"]["student"], seconds=end["seconds"])
    result.metric = result.metric or end["primary"]


def failure(result: Comparison) -> Exception | None:
    """What is to be said of the runs of a comparison that failed; None where all were finished.

    Returns:
        a `UserError` where the user can mend them, else `limbeck.errors.Fault`.
    """
    failed = result.failed
    if not failed:
        return None
    worst = next((end for end in failed if end["status"] == "fault"), failed[0])
    share = f"{len(failed)} of {len(result.rows)} runs failed; {worst['run']}: {worst['message']}"
    if worst["status"] == "fault":
        return Fault(share, worst["trace"])
    hint = worst.get("hint") or "give each run more memory or fewer workers"
    if len(failed) == len(result.rows):
        return UserError(worst["message"], hint)
    return UserError(share, f"{hint}; the same command with --out tries them again, finished runs are kept")


def write_comparison(folder: Path, result: Comparison, base: schema.Recipe) -> None:
    """comparison.json, .csv, .md, report.html, and .parquet where pyarrow is installed."""
    import importlib.util

    from filelock import FileLock

    from limbeck.report.page import write_comparison_report

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        storage.sweep(folder, below=False)
        result.to_json(folder / "comparison.json")
        result.to_csv(folder / "comparison.csv")
        storage.write_text(folder / "comparison.md", result.to_markdown() + "\n")
        if importlib.util.find_spec("pyarrow"):
            result.to_parquet(folder / "comparison.parquet")
        write_comparison_report(folder / "report.html", result, f"{base.name}: methods side by side", base.to_yaml())


def _plain(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-._" else "-" for c in text)


def check_settings(recipe: schema.Recipe) -> None:
    """Make the method once, so that a wrong setting is found before the first run and not in the middle of the last."""
    from limbeck.method import make

    make(recipe.method.id, recipe.method.settings)


def changed(recipe: schema.Recipe, changes: Mapping[str, Any]) -> schema.Recipe:
    """A recipe with some keys changed: nested mappings are merged, a key with dots goes straight to its place."""
    raw = recipe.data_as_written()
    for key, value in changes.items():
        _merge(raw, key.split("."), value)
    return schema.resolve(raw)


def _merge(raw: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    for key in keys[:-1]:
        raw = raw.setdefault(key, {})
    last = keys[-1]
    if isinstance(value, Mapping) and isinstance(raw.get(last), dict) and last not in ("method", "teacher", "student"):
        for inner, item in value.items():
            _merge(raw[last], [inner], item)
    else:
        raw[last] = value


# ---- evidence ----


def case_folder() -> Path:
    """Where the cases of evidence are: `evidence/` of a checkout, or what was installed with the package."""
    from limbeck.evaluation.evidence import folders

    places = folders()
    if not places:
        raise UserError("there are no cases of evidence here", "they come with limbeck's source checkout")
    return places[-1]


def cases() -> dict[str, Path]:
    """Every case by the method's id."""
    return {file.stem: file for file in sorted(case_folder().rglob("*.yaml"))}


def load_case(id: str) -> dict[str, Any]:
    """A case as plain data; see docs/evidence.md for its form.

    Raises:
        UserError: there is none for this method, or it lacks a part.
    """
    from limbeck.errors import unknown

    found = cases()
    if id not in found:
        raise unknown("case of evidence", id, found)
    case = schema.parse_yaml(found[id].read_text("utf-8"), str(found[id].name))
    for part in ("id", "claim_tested", "metric", "recipe", "method", "baseline", "seeds"):
        if part not in case:
            raise UserError(f"the case {found[id].name} has no `{part}`", "docs/evidence.md shows the form of a case")
    return case


def trials_of(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of a grid `{key: [values]}`, as changes of a recipe."""
    names = list(grid)
    return [dict(zip(names, values)) for values in itertools.product(*(grid[name] for name in names))]


def tune(
    arm: schema.Recipe, spec: Mapping[str, Any], trials: Sequence[Mapping[str, Any]], metric: str, higher: bool, work: Path, say: Say
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Choose settings by the mean of the metric on a validation split; the test split is not looked at.

    Returns:
        the chosen changes, and every trial with its mean.
    """
    if len(trials) == 1:
        return dict(trials[0]), []
    rows = []
    for number, trial in enumerate(trials):
        values = []
        for seed in spec["seeds"]:
            own = changed(arm, {**trial, "seed": seed, "data.valid": arm.data.valid or spec["valid"], "evaluation.final": "valid"})
            values.append(finished(work / f"trial{number}-seed{seed}", own)["metrics"]["student"][metric])
        rows.append({"settings": dict(trial), "mean": sum(values) / len(values)})
        say(f"  tried {dict(trial)}: {metric} {rows[-1]['mean']:.4f} on validation")
    best = max(rows, key=lambda row: row["mean"] if higher else -row["mean"])
    return best["settings"], rows


def make_evidence(id: str, *, work: Path | None = None, say: Say = lambda line: None) -> Any:
    """Run a method's case and write its evidence file beside it.

    Args:
        id: the method.
        work: folder of the single runs; a temporary one when left out. Given again, finished runs are not repeated.
        say: told about progress.

    Returns:
        the evidence, see `limbeck.evaluation.evidence.Evidence`.
    """
    import inspect

    from limbeck.evaluation import evidence
    from limbeck.evaluation.statistics import higher_is_better
    from limbeck.method import find

    if work is None:
        with tempfile.TemporaryDirectory(prefix="limbeck-evidence-") as temporary:
            return make_evidence(id, work=Path(temporary), say=say)
    started = time.perf_counter()
    case = load_case(id)
    metric, higher = case["metric"], higher_is_better(case["metric"])
    shared = schema.resolve({"baseline": False, "trackers": [], **case["recipe"]}, f"case {id}")
    work = work / evidence.case_digest(case)[:12]
    arms = {side: changed(shared, case[side].get("set", {})) for side in ("method", "baseline")}
    for arm in arms.values():
        check_settings(arm)
    tuned: dict[str, Any] = {}
    if "tune" in case:
        grids = {side: trials_of(case["tune"].get(side, {})) for side in arms}
        if len(grids["method"]) != len(grids["baseline"]):
            raise UserError(
                f"the case {id} tries {len(grids['method'])} settings for the method and {len(grids['baseline'])} for the baseline",
                "give both the same number",
            )
        tuned = {"trials_each": len(grids["method"]), "on": "validation split", "seeds": case["tune"]["seeds"]}
        for side in arms:
            say(f"{id}: choosing settings for {case[side]['name']}")
            chosen, rows = tune(arms[side], case["tune"], grids[side], metric, higher, work / f"tune-{side}", say)
            arms[side] = changed(arms[side], chosen)
            tuned[side] = {"chosen": chosen, "tried": rows}
    names = [metric, *case.get("mechanism", [])]
    values: dict[str, dict[str, list[float]]] = {side: {name: [] for name in names} for side in arms}
    for seed in case["seeds"]:
        for side, arm in arms.items():
            found = finished(work / side / f"seed{seed}", changed(arm, {"seed": seed}))["metrics"]["student"]
            for name in names:
                if name not in found and side == "baseline" and name != metric:
                    continue  # a figure of the mechanism, which the baseline lacks
                if name not in found:
                    raise UserError(f"case {id}: the run gives no figure {name!r}", f"it gives {', '.join(found)}")
                values[side][name].append(found[name])
        say(
            f"{id} seed {seed}: {case['method']['name']} {values['method'][metric][-1]:.4f}, "
            f"{case['baseline']['name']} {values['baseline'][metric][-1]:.4f}"
        )
    mechanism = {
        name: {side: sum(values[side][name]) / len(case["seeds"]) for side in arms if values[side][name]}
        | {"per_seed": {side: values[side][name] for side in arms if values[side][name]}}
        for name in names[1:]
    }
    source = inspect.getsourcefile(find(id))
    assert source is not None
    result = evidence.build(
        id,
        metric=metric,
        baseline_name=case["baseline"]["name"],
        seeds=case["seeds"],
        method_values=values["method"][metric],
        baseline_values=values["baseline"][metric],
        claim_tested=case["claim_tested"],
        case=case,
        source=source,
        higher_is_better=higher,
        mechanism_only=bool(case.get("mechanism_only", False)),
        tuned=tuned,
        mechanism=mechanism,
        seconds=round(time.perf_counter() - started, 1),
    )
    evidence.save(result, cases()[id].with_suffix(".json"))
    return result


def check_evidence(ids: Iterable[str]) -> dict[str, list[str]]:
    """What is wrong with the evidence of each method: missing, malformed, or older than its method or case."""
    import inspect

    from limbeck.evaluation import evidence
    from limbeck.method import find

    problems: dict[str, list[str]] = {}
    for id in ids:
        found = evidence.find(id)
        if found is None:
            problems[id] = ["there is a case, but no evidence was made from it"]
            continue
        source = inspect.getsourcefile(find(id))
        assert source is not None
        problems[id] = evidence.check(
            found, method_source_sha256=evidence.source_digest(source), case_sha256=evidence.case_digest(load_case(id))
        )
    return {id: lines for id, lines in problems.items() if lines}
