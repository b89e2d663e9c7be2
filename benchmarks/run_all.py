"""Runs every benchmark and writes `benchmarks/results.json` and `docs/benchmarks.md`.

    python benchmarks/run_all.py [--quick] [--peer PATH] [--language-peer PATH] [--only SCRIPT]

`--quick` runs the checks on tiny sizes and writes nothing. `--peer` goes to `step_overhead.py`, `--language-peer` (a Python with trl and
liger-kernel) to `vocabulary.py` and `language.py`;
`--only` runs one script and keeps the figures of the others.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SCRIPTS = ("step_overhead", "epochs", "cached_teacher", "startup", "condensation", "mining", "sampling", "vocabulary", "language")
LANGUAGE = ("vocabulary", "language")
Row = tuple[str, str, float, float, bool]


def run(name: str, *options: str) -> dict[str, Any]:
    """What a script printed."""
    done = subprocess.run([sys.executable, str(HERE / f"{name}.py"), *options], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def rows(results: dict[str, Any]) -> list[Row]:
    """Script, what is measured, target, figure, and whether the target is met."""
    found: list[Row] = []
    step, epochs, cached, start, condensed, mined, sampled, vocabulary, language = (results.get(name) for name in SCRIPTS)
    if step:
        for case in ("mlp", "resnet", "taps"):
            for arm in ("limbeck", "limbeck_loss") if case in step else ():
                got, target = step[case][arm]["ratio"], step[case]["target"]
                found.append(("step_overhead", f"{case}: {arm} over the hand-written loop", target, got, got <= target))
        if step["torchdistill"]:
            got, target = step["torchdistill"]["ratio"], step["mlp"]["target"]
            found.append(("step_overhead --peer", "mlp: torchdistill over the hand-written loop (peer)", target, got, got <= target))
    for pair in ("two_layers", "resnet8") if epochs else ():
        for peer in ("meters", "topk"):
            got, target = epochs[pair]["speedup_over_" + peer], epochs["target"]
            found.append(("epochs", f"{pair}: images a second, limbeck over the {peer} loop", target, got, got >= target))
    if cached:
        got = cached["share_of_bound"]
        what = f"speed-up {cached['speedup']['store']} from the store, as a share of the measured bound {cached['bound_measured']}"
        found.append(("cached_teacher", what, 0.95, got, got >= 0.95))
    for name, target in start["targets"].items() if start else ():
        found.append(("startup", name.replace("_", " "), target, start[name], start[name] <= target))
    return found + condensation_rows(condensed, mined) + sampling_rows(sampled) + vocabulary_rows(vocabulary) + language_rows(language)


def condensation_rows(condensed: dict[str, Any] | None, mined: dict[str, Any] | None) -> list[Row]:
    """The same of the condensation wing."""
    found: list[Row] = []
    if condensed:
        targets = condensed["targets"]
        names = {
            "distribution": "outer step of distribution matching over the papers' loop",
            "trajectory": "outer step of trajectory matching (10 inner steps) over the papers' loop",
            "characteristic_over_mean": "a round of characteristic functions over a step of means",
        }
        for name, text in names.items():
            got = condensed[name]["ratio"]
            found.append(("condensation", text, targets[name], got, got <= targets[name]))
        got, target = condensed["memory_constant"]["ratio"], targets["memory_40_over_5"]
        full = condensed["memory_full"]["ratio"]
        text = f"memory of trajectory matching (constant) at 40 inner steps over 5; full unrolling: {full}"
        found.append(("condensation", text, target, got, got <= target))
    if mined:
        got, target = mined["slope"], mined["targets"]["slope"]
        found.append(("mining", "slope of log time over log number of graphs (1: linear)", target, got, got <= target))
    return found


def sampling_rows(sampled: dict[str, Any] | None) -> list[Row]:
    """The same of the sampling wing."""
    found: list[Row] = []
    if not sampled:
        return found
    targets, quick = sampled["targets"], sampled["latency"]
    bound = targets["share_of_bound"]
    for name in ("student@1", "student@2", "student@4"):
        got = quick[name]["share_of_bound"]
        text = f"latency of the {name}, {quick[name]['ms']} ms a batch of 16: share of the bound that {quick[name]['calls']} calls set"
        found.append(("sampling", text, bound, got, got >= bound))
    names = {
        "consistency": "step of consistency distillation over a hand-written loop",
        "matching": "step of DMD2 without critic over a hand-written loop",
        "adversarial": "step of DMD2 with its diffusion GAN over a hand-written loop",
        "unavoidable": "step of DMD2 over the sum of its unavoidable passes",
    }
    for name, text in names.items():
        got = sampled[name]["ratio"]
        found.append(("sampling", text, targets[name], got, got <= targets[name]))
    return found


def vocabulary_rows(measured: dict[str, Any] | None) -> list[Row]:
    """The same of losses over a large vocabulary."""
    found: list[Row] = []
    for name, arms in measured["cases"].items() if measured else ():
        targets, own = measured["targets"], arms["limbeck"]
        times = targets["time_masked" if name.endswith("masked") else "time"]
        for what, target in (("memory", targets["memory"]), ("time", times)):
            text = f"{name.replace('_', ' ')}: {what} of a divergence over the plain one"
            found.append(("vocabulary", text, target, own[what], own[what] <= target))
    return found


def language_rows(measured: dict[str, Any] | None) -> list[Row]:
    """The same of training and decoding language models."""
    found: list[Row] = []
    if not measured:
        return found
    targets, kept, own, spoken = (measured.get(name) for name in ("targets", "stored", "on_policy", "speculative"))
    if kept:
        got, target = kept["share_of_bound"], targets["share_of_bound"]
        text = f"stored top-{kept['top']}: speed-up {kept['speedup']} of a step, as a share of the measured bound {kept['bound_measured']}"
        found.append(("language", text, target, got, got >= target))
        got, target = kept["bytes_a_token"], targets["bytes_a_token"]
        found.append(("language", f"stored top-{kept['top']}: bytes a token on disk", target, got, got <= target))
    if own and "limbeck_over" in own.get("trl", {}):
        got, target = own["trl"]["limbeck_over"], targets["over_trl"]
        text = f"on-policy step, {own['limbeck']['tokens_a_second']} tokens a second, over the step of TRL's GKD"
        found.append(("language --peer", text, target, got, got >= target))
    if spoken:
        for got, name, text in (
            (spoken["distilled"]["over_plain"], "over_plain_decoding", "plain decoding of the target"),
            (spoken["over_undistilled"], "over_undistilled", "the same draft trained alone"),
        ):
            found.append(("language", f"speculative decoding with a distilled draft over {text}", targets[name], got, got >= targets[name]))
    return found


def page(results: dict[str, Any]) -> str:
    """The document."""
    lines = ["# Benchmarks", "", "Written by `python benchmarks/run_all.py`; all figures are in `benchmarks/results.json`."]
    lines += ["Process CPU time (start-up: wall time), one thread,"]
    lines += ["medians of arms run in turn, on a shared two-core machine: small differences are noise. Misses are stated as such.", ""]
    lines += ["| command | measured | target | figure | |", "| --- | --- | --- | --- | --- |"]
    for script, what, target, got, met in rows(results):
        name, *more = script.split()
        command = " ".join([f"python benchmarks/{name}.py", *(f"{option} PATH" for option in more)])
        lines.append(f"| `{command}` | {what} | {target} | {got} | {'met' if met else '**missed**'} |")
    if "sampling" in results:
        quick = results["sampling"]["latency"]
        many = next(name for name in quick if name.startswith("teacher@"))
        said = f"one call instead of {quick[many]['calls']}: {quick['student@1_over_teacher']} times as fast"
        lines += ["", f"Few-step sampling of a U-Net of {quick['parameters']:,} parameters: {said}; quality is in the evidence files."]
    lines += [""] + [f"Not measured: `{name}`." for name in SCRIPTS if name not in results]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Run, write after each script, print one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peer")
    parser.add_argument("--language-peer")
    parser.add_argument("--only", choices=SCRIPTS)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    if options.only and (HERE / "results.json").is_file():
        results = json.loads((HERE / "results.json").read_text())
    for name in [options.only] if options.only else SCRIPTS[::-1]:
        more = ["--quick"] if options.quick else []
        if name == "step_overhead" and options.peer:
            more += ["--peer", options.peer]
        if name in LANGUAGE and options.language_peer:
            more += ["--peer", options.language_peer]
        results[name] = run(name, *more)
        if not options.quick:
            (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
            (HERE.parent / "docs" / "benchmarks.md").write_text(page(results))
    print(json.dumps({"benchmark": "run_all", "quick": options.quick, "missed": [row[1] for row in rows(results) if not row[4]]}))


if __name__ == "__main__":
    main()
