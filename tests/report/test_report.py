import base64
import io
import os
import re
from dataclasses import fields, replace
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gradstore.errors import NoSpaceError, UsageError
from gradstore.report import page as page_module
from gradstore.report import pictures, views, wording

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Document(HTMLParser):
    """The tags, attributes and text of a page; fails on tags that do not nest."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.words, self._open = [], [], []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" not in self._open:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def pixels(seed, shape=(8, 8)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def topk_page(shown=pixels, label="7"):
    neighbours = tuple(
        views.Neighbour(views.Example("train", 10 + i, label, label, i == 1, shown(i)), 0.9 - i / 4, 0.004)
        for i in range(3)
    )
    query = views.Example("test", 42, label, "3", False, shown(9))
    return views.TopKPage(
        "proj-trntk", "train", 1347, "test", 450, (views.Explanation(query, neighbours),), (("seed", "0"),)
    )


def forensics_page():
    item = topk_page().explanations[0]
    verdict = views.Verdict(
        kernel="proj-pntk",
        k=3,
        threshold=2,
        queries=90,
        flagged=31,
        histogram=(
            views.VoteCount(0, 50, 4),
            views.VoteCount(1, 3, 2),
            views.VoteCount(2, 1, 0),
            views.VoteCount(3, 0, 30),
        ),
        confusion=views.Confusion(
            30, 1, 6, 53, views.Interval(0.968, 0.838, 0.994), views.Interval(0.833, 0.681, 0.921)
        ),
        cases=(replace(item, votes=2),),
        culprits=(views.Culprit(item.neighbours[1].example, 17),),
    )
    return views.ForensicsPage("train", 1347, 135, ("test", "stamped"), (verdict,))


def demo_page():
    return views.DemoPage(
        "What was done.",
        (views.Fact("98.9 %", "clean accuracy", "445 of 450"),),
        forensics_page(),
        topk_page(),
        (("date", "today"),),
    )


PAGES = [
    ("topk.html", topk_page, page_module.write_topk),
    ("forensics.html", forensics_page, page_module.write_forensics),
    ("demo.html", demo_page, page_module.write_demo),
]


@pytest.mark.parametrize(("template", "make", "write"), PAGES)
def test_a_page_is_one_file_that_needs_nothing_else(template, make, write, tmp_path):
    path = write(make(), tmp_path / "new folder" / "report.html")
    html = path.read_text(encoding="utf-8")
    document = Document(html)
    assert not document.all("script")
    assert not document.all("link")
    assert all(image["src"].startswith("data:image/png;base64,") and image["alt"] for image in document.all("img"))
    assert not re.search(r"https?:|url\(|@import", html)
    assert any("default-src 'none'" in meta.get("content", "") for meta in document.all("meta"))
    assert len(document.all("h1")) == 1
    assert os.listdir(path.parent) == ["report.html"]


def test_a_topk_page_says_what_was_asked_and_found():
    text = Document(page_module.render("topk.html", topk_page())).text
    for words in (
        "the 3 of 1,347 train examples",
        "measured by proj-trntk",
        "1 of 450 are shown",
        "predicted 3 label 7 test 42",
        "label 7 0.900 ± 0.004 train 10",
        "label 7 0.650 ± 0.004 poisoned train 11",
        "0.400 ± 0.004 train 12",
        "seed 0",
    ):
        assert words in text


def test_a_forensics_page_says_what_was_flagged_and_how_sure_that_is():
    text = Document(page_module.render("forensics.html", forensics_page())).text
    for words in (
        "135 of 1,347 train examples are known to be poisoned",
        "A query from test or stamped is flagged",
        "31 of 90 queries flagged: at least 2 of their 3",
        "poisoned 30 6 clean 1 53",
        "2 of 3 votes",
        "precision 0.968 95 % interval 0.838 to 0.994",
        "recall 0.833 95 % interval 0.681 to 0.921",
        "votes queries 0 54 1 5 2 1 3 30",
        "(1 of 31)",
        "17 queries label 7 poisoned train 11",
    ):
        assert words in text


def test_bars_are_as_long_as_their_numbers():
    widths = [
        i["style"] for i in Document(page_module.render("forensics.html", forensics_page())).all("i") if "style" in i
    ]
    bars = [f"width:{100 * part / 54:.2f}%" for bin_ in ((50, 4), (3, 2), (1, 0), (0, 30)) for part in bin_]
    assert widths == [*bars, "width:90.00%", "width:65.00%", "width:40.00%"]


def test_without_known_truth_there_is_no_confusion():
    page = forensics_page()
    unknown = replace(page.verdicts[0], confusion=None)
    text = Document(page_module.render("forensics.html", replace(page, verdicts=(unknown,)))).text
    assert "precision" not in text
    assert "known clean" not in text
    assert "31 of 90 queries flagged" in text


def test_an_undefined_score_reads_not_available():
    page = forensics_page()
    nothing = views.Confusion(0, 0, 0, 90, None, None)
    text = Document(
        page_module.render("forensics.html", replace(page, verdicts=(replace(page.verdicts[0], confusion=nothing),)))
    ).text
    assert "precision n/a recall n/a" in text


def test_pictures_survive_the_page_to_the_pixel():
    for shape in ((8, 8), (5, 9, 3), (64, 64)):
        shown = pixels(1, shape)
        png = base64.b64decode(pictures.data_uri(shown).split(",")[1])
        assert (np.asarray(Image.open(io.BytesIO(png))) == shown).all()


def test_a_large_picture_is_reduced_and_smoothed():
    shown = pixels(0, (300, 1200, 3))
    png = base64.b64decode(pictures.data_uri(shown).split(",")[1])
    assert Image.open(io.BytesIO(png)).size == (256, 64)
    assert 'class="pixelated"' not in page_module.render("topk.html", topk_page(lambda i: shown))
    assert 'class="pixelated"' in page_module.render("topk.html", topk_page())


def test_examples_without_previews_are_named_by_row():
    document = Document(page_module.render("topk.html", topk_page(lambda i: None)))
    assert not document.all("img")
    assert "42 predicted 3" in document.text


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='x",
    "</style><h1>",
    "{{ 7*7 }}",
    "{% raw %}",
    "\x1b[31mred\x1b[0m",
    "abc\u202egnp.exe",
    "\x00\x07\x9b",
    "=HYPERLINK(1)",
    "\ud800",
    "a\u2028b",
]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_foreign_text_stays_text(hostile, tmp_path):
    harmless = Document(page_module.render("topk.html", topk_page(lambda i: "x", "x")))
    page = replace(
        topk_page(lambda i: hostile, hostile), title=hostile, train=hostile, provenance=((hostile, hostile),)
    )
    html = page_module.write_topk(page, tmp_path / "r.html").read_text(encoding="utf-8")
    document = Document(html)
    assert [tag for tag, _ in document.tags] == [tag for tag, _ in harmless.tags]
    assert [sorted(attributes) for _, attributes in document.tags] == [
        sorted(attributes) for _, attributes in harmless.tags
    ]
    assert " ".join(wording.visible(hostile).split()) in document.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u202a-\u202e\u2066-\u2069]", html)


@given(st.text())
def test_visible_text_can_be_encoded_and_holds_no_control_characters(text):
    shown = wording.visible(text)
    shown.encode("utf-8")
    assert len(shown) == len(text)
    assert not re.search(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]", shown
    )
    assert wording.visible(shown) == shown


def test_ordinary_text_in_any_script_is_untouched():
    for text in ("Grüße, 数字 ٣", "line\n\tnext", "👩\u200d👧", "", "a b"):
        assert wording.visible(text) == text


def test_long_texts_are_cut_with_an_ellipsis():
    html = page_module.render("topk.html", topk_page(lambda i: "word " * 1000))
    assert "…" in html
    assert max(map(len, Document(html).words)) <= wording.LONGEST


@pytest.mark.parametrize(
    ("value", "words"),
    [(0.98765, "0.988"), (-0.5, "-0.500"), (12345.678, "1.235e+04"), (float("nan"), "nan"), (1.0, "1.000")],
)
def test_similarities_are_readable_whatever_the_kernel(value, words):
    assert wording.similarity(value) == words
    item = topk_page().explanations[0]
    changed = replace(item, neighbours=(replace(item.neighbours[0], similarity=value),))
    html = page_module.render("topk.html", replace(topk_page(), explanations=(changed,)))
    widths = [float(width) for width in re.findall(r"width:([\d.]+)%\"", html)]
    assert all(0 <= width <= 100 for width in widths)
    assert words in html


def test_a_page_replaces_the_old_one_or_leaves_it(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    page_module.write_topk(topk_page(), path)
    before = path.read_text(encoding="utf-8")

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(NoSpaceError, match=r"report\.html: the disk is full .*No space left on device"):
        page_module.write_demo(demo_page(), path)
    assert path.read_text(encoding="utf-8") == before
    assert os.listdir(tmp_path) == ["report.html"]


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"file/report\.html.: the output cannot be used \(got Not a directory\)"):
        page_module.write_topk(topk_page(), tmp_path / "file" / "report.html")


def test_no_queries_is_said(tmp_path):
    assert "No queries." in Document(page_module.render("topk.html", replace(topk_page(), explanations=()))).text


def test_views_are_plain_values():
    assert topk_page() == topk_page()
    assert "array" not in repr(topk_page())
    assert [field.name for field in fields(views.Fact)] == ["value", "name", "note"]
