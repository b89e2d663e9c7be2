"""The page: complete, self-contained, safe, and never blank."""

import base64
import io
import re

import pytest
import torch

from limbeck.evaluation.comparison import Comparison
from limbeck.report import figures, tables
from limbeck.report.page import Report, render_report, write_comparison_report, write_report

torch.set_num_threads(1)
EVIL = "<script>alert(1)</script>\"'$x"
SECTIONS = ["table", "ceiling", "curves", "disagreement", "reliability", "cost", "terms", "versions", "recipe", "repeat"]


def summary():
    metrics = {"teacher": 0.98, "baseline": 0.80, "student": 0.91, "ceiling": 0.95}
    return {
        "method": "kd",
        "seed": 0,
        "metrics": {key: {"accuracy": value, "ece": 0.03, "nll": 0.2} for key, value in metrics.items()},
        "cost": {
            "teacher": {"params": 113_000, "flops": 1_200_000, "latency_ms": 1.25, "bytes": 452_000},
            "student": {"params": 3_700, "flops": 98_000, "latency_ms": 0.12, "bytes": 15_200},
        },
        "seconds": 48.0,
        "versions": {"torch": "2"},
        "command": "limbeck run digits --set seed=0",
    }


def report():
    torch.manual_seed(0)
    term = {"value": 1.0, "norm": 2.0, "share": 0.5}
    log = [{"phase": "student", "step": s, "loss": 1.0, "terms": {"kl": term, EVIL: term}} for s in range(0, 50, 10)]
    log += [{"phase": p, "step": s, "metrics": {"accuracy": 0.5 + s / 100}} for p in tables.NAMES for s in (0, 20, 40)]
    log += [{"phase": "student", "step": 30, "alarm": f"collapse {EVIL}"}]
    logits = {key: torch.randn(40, 3) * 3 for key in tables.NAMES}
    labels = torch.randint(-1, 3, (40,))
    return Report(f"digits {EVIL}", summary(), log, logits, labels, torch.rand(40, 1, 8, 8), ("a", EVIL, "c"), f"name: {EVIL}\n")


@pytest.fixture(scope="module")
def page():
    return render_report(report())


def test_all_sections_are_there_with_their_pictures(page):
    assert re.findall(r'<section id="([^"]+)">', page) == SECTIONS
    assert page.count("<img ") == 8 and 'class="absent"' not in page


def test_the_page_reaches_nothing_outside_and_runs_nothing(page):
    text = re.sub(r"data:image/[a-z+]+;base64,[A-Za-z0-9+/=]+", "", page)
    assert not re.search(r"(?i)https?:|//[a-z0-9-]+\.|@import|url\(|<link|<iframe|<script|\bon\w+=", text)
    assert "default-src 'none'; img-src data:; style-src 'sha256-" in text
    assert set(re.findall(r'src="([^"]{5})', page)) == {"data:"}
    for picture in re.findall(r"svg\+xml;base64,([A-Za-z0-9+/=]+)", page):
        drawing = base64.b64decode(picture).decode()
        assert "<script" not in drawing and "DOCTYPE" not in drawing and not re.search(r'href="(?!#|data:)', drawing)


def test_hostile_text_is_escaped(page):
    assert "<script" not in page and "&lt;script&gt;" in page


def test_the_same_report_gives_the_same_bytes(page):
    assert render_report(report()) == page


@pytest.mark.parametrize("missing", ["summary", "log", "logits", "labels", "inputs", "classes", "recipe_yaml"])
def test_a_missing_part_says_why(missing, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "_draw", lambda *_: "data:,")  # painting is what takes the time; other tests do it
    made = report()
    setattr(made, missing, getattr(Report("empty"), missing))
    write_report(tmp_path / "report.html", made)
    page = (tmp_path / "report.html").read_text()
    assert re.findall(r'<section id="([^"]+)">', page) == SECTIONS
    if missing != "classes":
        assert 'class="absent"' in page


def test_an_empty_report_opens():
    page = render_report(Report("empty"))
    assert re.findall(r'<section id="([^"]+)">', page) == SECTIONS
    parts = page.split("<section ")[1:]
    assert all('class="absent"' in part for part in parts)


def test_odd_values_do_not_break_the_page():
    made = report()
    made.summary["metrics"]["baseline"]["accuracy"] = float("nan")
    made.log.append({"phase": "student", "step": 60, "terms": {"kl": {"value": float("inf"), "norm": None}}, "metrics": {"accuracy": None}})
    made.logits["student"] = made.logits["teacher"].clone()
    made.inputs = torch.full((40, 3, 8, 8), float("nan"))
    assert "agree on every test sample" in render_report(made)


def test_human_units():
    assert [tables.human(v) for v in (None, 5, 999, 3_700, 113_000, 1_200_000)] == ["–", "5", "999", "3.7k", "113k", "1.2M"]
    assert tables.human(1_200_000, "FLOP") == "1.2 MFLOP" and tables.human(15_200, "B") == "15.2 kB"
    assert tables.human(999_600) == "1.0M"
    assert tables.milliseconds(0.12) == "120 µs" and tables.duration(125) == "2 min 05 s"


def test_terminal_table_fits_80_columns():
    from rich.console import Console

    console = Console(width=80, file=io.StringIO(), color_system=None)
    console.print(tables.run_table(summary()))
    text = console.file.getvalue()
    for cell in ("distilled student", "91.0 %", "113k", "98.0 kFLOP", "120 µs", "15.2 kB", "parameters", "accuracy"):
        assert cell in text
    assert "…" not in text
    assert "| distilled student | 91.0 % |" in tables.run_markdown(summary())


def test_headline_tells_the_truth():
    assert "11.0 points more" in tables.headline(summary())
    worse = summary()
    worse["metrics"]["student"]["accuracy"] = 0.7
    assert "10.0 points less" in tables.headline(worse) and "did not help" in tables.headline(worse)


def test_comparison_page(tmp_path):
    made = Comparison(notes={"budget": EVIL})
    for seed in range(3):
        made.add("base", seed, {"accuracy": 0.8 + 0.01 * seed}, seconds=1.0)
        made.add("kd", seed, {"accuracy": 0.9 + 0.02 * seed}, label=EVIL)
    made.add("nd", 0, {}, status="failed")
    write_comparison_report(tmp_path / "c.html", made, "three methods", "a: 1", "limbeck compare digits")
    page = (tmp_path / "c.html").read_text()
    assert "<script" not in page and "no finished run" in page and "failed" in page and "<img " in page
    write_comparison_report(tmp_path / "empty.html", Comparison())
    assert "nothing to compare" in (tmp_path / "empty.html").read_text()
