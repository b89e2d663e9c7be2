"""Attacks through words: names of classes, recipes, data and models on the report's page, on cards and in tables."""

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree  # of pictures that limbeck itself drew

import pytest
import torch
import yaml
from PIL import Image

from limbeck import recipe as schema
from limbeck.cli import main
from limbeck.errors import visible
from limbeck.evaluation.comparison import Comparison
from limbeck.report.card import model_card
from limbeck.report.page import Report, Section, render_report, write_comparison_report
from limbeck.report.tables import plain_markdown, run_markdown, run_table

WORDS = [
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "javascript:alert(1)",
    "<a href=javascript:alert(1)>x</a>",
    "</style><style>*{background:url(http://evil.example)}</style>",
    "<svg/onload=alert(1)>",
    "<!--",
    "-->",
    "]]>",
    "</pre><iframe src=//evil.example></iframe>",
    "&lt;b&gt;&#60;script&#62;",
    "{{ 7 * 7 }}{% raw %}",
    "<meta http-equiv=refresh content='0;url=http://evil.example'>",
    "<base href=//evil.example>",
    "\x00\x1b[31m\u202e\udcff",
    "$\\frac{1}{$",
]
EVIL = " ".join(WORDS)
TAGS = {
    "html": {"lang"},
    "head": set(),
    "meta": {"charset", "http-equiv", "content", "name"},
    "title": set(),
    "style": set(),
    "body": set(),
    "main": set(),
    "header": set(),
    "h1": set(),
    "p": {"class"},
    "section": {"id"},
    "h2": set(),
    "div": {"class"},
    "table": set(),
    "thead": set(),
    "tbody": set(),
    "tr": {"class"},
    "th": {"scope"},
    "td": {"class"},
    "ul": {"class"},
    "li": set(),
    "figure": {"class"},
    "img": {"src", "alt"},
    "figcaption": set(),
    "pre": set(),
    "footer": set(),
}
"""Every element of a page, with its attributes: the template's, and nobody else's."""


SHAPES = {"svg", "defs", "style", "g", "path", "use", "rect", "clipPath", "image"}


class Page(HTMLParser):
    """What a browser makes of a page: elements, attributes, texts."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.elements, self.texts, self.css, self.other = [], [], [], []
        self.inside = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        (self.css if self.inside == "style" else self.texts).append(data)

    def handle_comment(self, data):
        self.other.append(data)

    def handle_decl(self, decl):
        if decl != "doctype html":
            self.other.append(decl)

    def handle_pi(self, data):
        self.other.append(data)

    unknown_decl = handle_pi


def still(picture):
    """A PNG, or an SVG file of paths alone: no script, no link, nothing from elsewhere."""
    if picture.startswith(b"\x89PNG"):
        return
    for element in ElementTree.fromstring(picture).iter():
        assert element.tag.removeprefix("{http://www.w3.org/2000/svg}") in SHAPES, element.tag
        for name, value in element.attrib.items():
            assert not name.rpartition("}")[2].startswith("on"), name
            assert not name.endswith("href") or re.match(r"#|data:image/png;base64,", value), value
        assert not element.text or element.tag.endswith("style") or not element.text.strip()


def harmless(html):
    """No element, attribute, comment or address on the page came from a word, and the browser is told to allow nothing."""
    page = Page(html)
    for tag, attributes in page.elements:
        assert tag in TAGS and set(attributes) <= TAGS[tag], (tag, attributes)
        if "src" in attributes:
            assert re.fullmatch(r"data:image/(svg\+xml|png);base64,[A-Za-z0-9+/=]+", attributes["src"])
            still(base64.b64decode(attributes["src"].partition(",")[2]))
        if "id" in attributes:
            assert re.fullmatch(r"[\w-]+", attributes["id"])
        if "class" in attributes:
            assert re.fullmatch(r"[\w -]*", attributes["class"])
    assert not page.other
    [policy] = [a["content"] for tag, a in page.elements if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    digest = base64.b64encode(hashlib.sha256("".join(page.css).encode()).digest()).decode()
    assert rules == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": f"'sha256-{digest}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    first = html.index("Content-Security-Policy")
    assert first < html.index("<style") and first < html.index("<title"), "the policy must come before what it forbids"
    return page


def summary_of(word):
    table = {"head": ["model", word], "rows": [{"key": "student", "name": word, "cells": [word]}], "text": word}
    return {
        "name": word,
        "method": word,
        "wing": word,
        "seed": 0,
        "primary": "accuracy",
        "seconds": 1.0,
        "headline": word,
        "table": table,
        "metrics": {"student": {"accuracy": 0.5, word: 1.0}, "baseline": {"accuracy": 0.4}, "teacher": {"accuracy": 0.6}},
        "cost": {"student": {"params": 10, "flops": 20, "latency_ms": 1.0, "bytes": 40}},
        "notes": {"ceiling": word, word: word},
        "data": {"name": word, "train": 1, "labelled": 1, "test": 1, "classes": [word]},
        "versions": {word: word},
        "command": word,
        "phases": {word: {"steps": word}},
        "device": word,
        "alarms": [word],
        "warnings": [word],
    }


def report_of(word):
    draw = torch.Generator().manual_seed(0)
    logits = {name: torch.randn(12, 3, generator=draw) for name in ("teacher", "student", "baseline")}
    log = [
        {"phase": "student", "step": n, "terms": {word: {"value": 1.0 + n, "share": 0.5, "norm": 1.0}}, "metrics": {"accuracy": 0.1 * n}}
        for n in range(3)
    ]
    log.append({"phase": word, "step": word, "alarm": word})
    more = [Section("more", word, word, [word], [{"key": "", "name": word, "cells": [word]}], [word], [], [(word, word)], word, [word])]
    labels = torch.arange(12) % 3
    return Report(
        word, summary_of(word), log, logits, labels, torch.rand(12, 1, 4, 4, generator=draw), (word, word + "2", "c"), word, more=more
    )


@pytest.mark.parametrize("word", WORDS)
def test_a_page_shows_words_as_words(word):
    page = harmless(render_report(replace(report_of(word), logits={}, log=[], summary={**summary_of(word), "cost": {}})))
    assert "".join(page.texts).count(visible(word)) >= 10, "the word itself is shown"


@pytest.mark.parametrize("word", [EVIL, WORDS[-2]])
def test_words_in_figures(word):
    harmless(render_report(report_of(word)))


def test_a_comparison_page(tmp_path):
    found = Comparison(reference=WORDS[0])
    for word in WORDS[:4]:
        for seed in range(2):
            found.add(word, seed, {"accuracy": 0.5, WORDS[1]: 1.0}, label=word, seconds=1.0)
    found.notes[WORDS[1]] = EVIL
    write_comparison_report(tmp_path / "report.html", found, EVIL, EVIL, EVIL)
    page = harmless((tmp_path / "report.html").read_text())
    assert all(word in "".join(page.texts) for word in WORDS[:4])


def rendered(text):
    """A crude reader of Markdown that errs to the side of the attacker: what is active once escaped characters are taken away."""
    return re.sub(r"\\.", "", text)


MARKDOWN = [
    *WORDS,
    "---\nlicense: x\n---",
    "x\n\n# heading",
    "[x](javascript:alert(1))",
    "![x](http://evil.example/x.png)",
    "`x` | y",
    "<http://evil.example>",
    "x\n\n```\ncode",
    "| a | b |\n|---|---|",
    "&#60;script&#62;",
    "\\[x](y)",
    "\\\\[x](y)",
    "x\r\n---\r\n",
]


@pytest.mark.parametrize("word", MARKDOWN)
def test_cards_mean_what_they_say(word):
    plain = model_card(summary_of("word"), "word").splitlines()
    card = model_card(summary_of(word), word)
    assert len(card.splitlines()) == len(plain), "a word made a line"
    active = rendered(card)
    assert not re.search(r"<|!?\[[^\]]*\]\(|\]\[|&#", active), active
    assert not card.startswith("---")
    table = run_markdown(plain_markdown(summary_of(word))).splitlines()
    assert len(table) == 3 and all(rendered(line).count("|") == 3 for line in table[::2])


@pytest.mark.parametrize("word", [EVIL, "[red]x[/red]", "[/nothing]", "\x1b[31mred\x1b]0;x\x07"])
def test_tables_of_the_terminal(word):
    from rich.console import Console

    console = Console(width=4000, record=True, force_terminal=False)
    with console.capture() as captured:
        console.print(run_table(summary_of(word)))
    assert all(line.isprintable() for line in captured.get().split("\n"))


CLASSES = ["</script><script>", '"><img src=x onerror=y>', "\x1b[31mred", "javascript:x", "`a`|b[c](d)", "new\nline"]


def test_a_run_on_folders_with_evil_names(tmp_path, capsys):
    """Class names, file names, the recipe's name and the data's name at once, through the command line."""
    data = tmp_path / "<b>[x](y)|`pictures`"
    for number, name in enumerate(CLASSES):
        (data / name.replace("/", "\u2215")).mkdir(parents=True)
        for n in range(6):
            Image.new("L", (6, 6), 40 * number + n).save(data / name.replace("/", "\u2215") / f"{n}<i>\x1b.png")
    recipe = {
        "name": '</title><script>"x',
        "about": EVIL[:40].replace("\x00", ""),
        "method": "kd",
        "data": {"source": f"folder:{data}", "test": 0.4},
        "teacher": {"model": "mlp", "args": {"widths": [8]}, "train": {"steps": 3, "batch": 8}},
        "student": {"model": "mlp", "args": {"widths": [4]}},
        "training": {"steps": 4, "batch": 8},
        "trackers": [],
        "threads": 1,
        "device": "cpu",
    }
    (tmp_path / "r.yaml").write_text(schema.resolve(recipe).to_yaml())
    assert main(["run", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "run")]) == 0, capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert main(["inspect", str(tmp_path / "run" / "student"), "--data", f"folder:{data}"]) == 0
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    harmless((tmp_path / "run" / "report.html").read_text())
    card = (tmp_path / "run" / "student" / "README.md").read_text()
    assert not re.search(r"<|\]\(", rendered(card)), card
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["name"] == recipe["name"]


def test_names_that_are_no_text(tmp_path, capsys):
    """Folders whose names are bytes of an old encoding: a clear line, or a run that ends well."""
    import os

    for name in (b"caf\xe9", b"th\xe9"):
        folder = os.fsencode(tmp_path / "data") + b"/" + name
        os.makedirs(folder)
        for n in range(6):
            Image.new("L", (6, 6), n).save(os.fsdecode(folder + b"/%d.png" % n))
    recipe = {
        "method": "alone",
        "data": {"source": f"folder:{tmp_path / 'data'}", "test": 0.4},
        "student": {"model": "mlp", "args": {"widths": [4]}},
        "training": {"steps": 2, "batch": 4},
        "trackers": [],
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    code = main(["run", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "run"), "--quiet"])
    assert code in (0, 2), capsys.readouterr().err
