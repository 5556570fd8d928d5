"""Hostile files, planted duplicates, planted evaluation items: each is found, named and counted."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import random
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import InputError, MissingPieceError, Problem
from planner.files import DATA_DIR
from reftrain.text import clean as cleaning
from reftrain.text.clean import RULES, CleanOptions, Features, clean, detect_language, judge, repair
from reftrain.text.collect import collect, list_files
from reftrain.text.contamination import EvaluationItems
from reftrain.text.dedupe import NearDuplicates, deduplicate, minhash, shingles
from reftrain.text.documents import Document, Ledger
from reftrain.text.markup import html_text
from reftrain.text.wikitext import strip_wikitext


def corpus(name: str, limit: int = 10_000) -> list[Document]:
    with gzip.open(DATA_DIR / "corpus" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [Document(row["id"], row["text"]) for row in rows[:limit]]


CHAPTERS = corpus("books.valid")
PROSE = CHAPTERS[0].text


def read(path: Path) -> tuple[list[Document], list[Problem]]:
    problems: list[Problem] = []
    return list(collect(list_files([path]), problems)), problems


def zipped(**members: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return buffer.getvalue()


# --- collect ---------------------------------------------------------------------------------------------------------

WIKI = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">
<page><title>Rome</title><ns>0</ns><revision><text>'''Rome''' is a [[city]].{{box|{{x}}}}</text></revision></page>
<page><title>Roma</title><ns>0</ns><redirect title="Rome"/><revision><text>#REDIRECT [[Rome]]</text></revision></page>
<page><title>Talk:Rome</title><ns>1</ns><revision><text>chatter</text></revision></page></mediawiki>"""


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.txt", "hé".encode(), {"a.txt": "hé"}),
        ("a.txt", b"\xef\xbb\xbfbom", {"a.txt": "bom"}),
        ("a.txt", "naïve €".encode("utf-16"), {"a.txt": "naïve €"}),
        ("a.txt", "“café”".encode("cp1252"), {"a.txt": "“café”"}),
        ("a.md", b"# T", {"a.md": "# T"}),
        ("a.txt.gz", gzip.compress(b"packed"), {"a.txt.gz": "packed"}),
        ("a.txt.bz2", bz2.compress(b"packed"), {"a.txt.bz2": "packed"}),
        ("a.jsonl", b'{"id": 7, "text": "x"}\n\n{"content": "y"}\n', {"a.jsonl:7": "x", "a.jsonl:2": "y"}),
        ("a.jsonl.gz", gzip.compress(b'{"body": "z"}'), {"a.jsonl.gz:1": "z"}),
        ("a.html", b"<nav>Home</nav><p>One<br>two</p>", {"a.html": "One\ntwo"}),
        ("a.xml", WIKI.encode(), {"a.xml:Rome": "Rome\n\nRome is a city."}),
        ("a.xml.bz2", bz2.compress(WIKI.encode()), {"a.xml.bz2:Rome": "Rome\n\nRome is a city."}),
        ("a.zip", zipped(**{"b/x.txt": "in", "b/.h.txt": "no", "y.exe": "no", "z.html": "<p>out"}), {"a.zip/b/x.txt": "in", "a.zip/z.html": "out"}),
    ],
)  # fmt: skip
def test_every_kind_of_file(tmp_path: Path, name: str, data: bytes, expected: dict[str, str]) -> None:
    (tmp_path / name).write_bytes(data)
    documents, problems = read(tmp_path / name)
    assert {d.id: d.text for d in documents} == expected
    assert not problems


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("cut.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 5000)[:60]),
        ("flipped.txt.gz", gzip.compress(PROSE.encode())[:-8] + b"\0" * 8),
        ("no.gz.txt.gz", b"plain"),
        ("cut.txt.bz2", bz2.compress(PROSE.encode())[:100]),
        ("no.zip", b"PK but not really"),
        ("cut.zip", zipped(**{"a.txt": PROSE})[:-30]),
        ("list.jsonl", b"[1, 2]\n"),
        ("half.jsonl", b'{"text": "x"\n'),
        ("deep.jsonl", b'{"a":' * 100_000),
        ("latin.jsonl", b'{"text": "\xe9"}'),
        ("nokey.jsonl", b'{"txt": "x"}'),
        ("number.jsonl", b'{"text": 5}'),
        ("binary.txt", b"\x7fELF\0\0\0"),
        ("bad.xml", b"<mediawiki><page>"),
        ("other.xml", b"<html/>"),
        ("empty.xml", b""),
        ("laughs.xml", b'<!DOCTYPE m [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><mediawiki><page><title>&b;</title></page></mediawiki>'),
        ("outside.xml", b'<!DOCTYPE m [<!ENTITY a SYSTEM "file:///etc/passwd">]><mediawiki><page><title>&a;</title></page></mediawiki>'),
    ],
)  # fmt: skip
def test_damaged_file_is_named_and_the_next_one_still_read(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    (tmp_path / "zz.txt").write_text("good")
    documents, problems = read(tmp_path)
    assert documents[-1].text == "good"
    assert len(problems) == 1
    assert name.rsplit(".", 2)[0] in f"{problems[0].value} {problems[0].where}"


def test_encrypted_zip_is_named(tmp_path: Path) -> None:
    data = bytearray(zipped(**{"a.txt": "secret"}))
    data[6] |= 1  # the flag "encrypted", in the local header and in the directory
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "locked.zip").write_bytes(data)
    documents, problems = read(tmp_path)
    assert not documents
    assert "locked.zip" in str(problems[0])


def test_bad_paths_are_all_reported_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.exe").write_bytes(b"")
    with pytest.raises(InputError) as error:
        list_files([tmp_path / "absent", tmp_path / "empty", tmp_path / "a.exe"])
    assert len(error.value.problems) == 3


def test_a_file_named_twice_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    assert list_files([tmp_path, tmp_path / "a.txt"]) == [tmp_path / "a.txt"]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 not a table")
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        with pytest.raises(MissingPieceError, match="pip install pyarrow"):
            read(path)
        return
    assert read(path)[1]
    pq.write_table(pa.table({"text": ["a", None, "b"]}), path)
    assert [d.text for d in read(path)[0]] == ["a", "b"]


def test_html_deeply_nested_hostile_and_empty() -> None:
    assert html_text(b"<div>" * 50_000 + b"deep" + b"</div>" * 50_000) in ("deep", "")
    assert html_text(b"") == html_text(b"<!-- only -->") == ""
    page = (
        b"<html><header>Site</header><main><ul><li><a href=x>A</a><li><a href=y>B</a></ul><p>Tea &amp; milk<sup>2</sup></p></main><footer>Me</footer>"
    )
    assert html_text(page) == "Tea & milk2"
    assert html_text('<p>caf\xe9</p><meta charset="latin-1">'.encode("latin-1")) == "café"


def test_wikitext() -> None:
    assert (
        strip_wikitext("{| class=x\n| a {{b}}\n|}\n== Life ==\nHe [[be|was]] ''born''<ref name=a/> [http://x.org here].\n* one")
        == "Life\n\nHe was born here.\none"
    )
    assert strip_wikitext("Long enough text before the end.\n== References ==\n<references/>\n[[Category:X]]") == "Long enough text before the end."
    assert "{{" in strip_wikitext("{{" * 1000 + "x")  # unbalanced: left as it is, in linear time


# --- clean -----------------------------------------------------------------------------------------------------------


def test_repairs() -> None:
    assert cleaning.repair_encoding("â€œItâ€™s naÃ¯veâ€\x9d &amp; more") == "“It’s naïve” & more"
    assert cleaning.repair_encoding("“typographic” stays — as it is") == "“typographic” stays — as it is"
    assert cleaning.remove_control_characters("a\x00\x07b\r\nc\rd\u200be\ufefff\ud800g\fh") == "ab\nc\ndefg\n\nh"
    assert (
        cleaning.remove_boilerplate(
            "Head\n*** START OF THE PROJECT GUTENBERG EBOOK X ***\nBody\n*** END OF THE PROJECT GUTENBERG EBOOK X ***\nLicence"
        ).strip()
        == "Body"
    )
    assert cleaning.remove_boilerplate("We use cookies to serve you.\nText.\nAll rights reserved.\nSkip to content") == "Text."
    kept = "She ate the cookies.\nRead more slowly, he said, and mind the rights of man."
    assert cleaning.remove_boilerplate(kept) == kept


def test_rewrapping_gives_the_paragraphs_back_and_leaves_verse() -> None:
    paragraphs = [p for p in PROSE.split("\n\n") if len(p) > 200]
    wrapped = "\n\n".join(textwrap.fill(p, 72, break_on_hyphens=False) for p in paragraphs)
    assert cleaning.unwrap_lines(wrapped) == "\n\n".join(paragraphs)
    verse = "The Owl and the Pussy-cat went to sea\nIn a beautiful pea-green boat,\nThey took some honey, and plenty of money,\nWrapped up in a note."
    assert cleaning.unwrap_lines(verse) == verse


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(), max_size=300))
def test_repair_of_any_text_is_encodable_and_done_at_once(text: str) -> None:
    once, _ = repair(text)
    once.encode()
    assert not set(once) & set(map(chr, [*range(9), *range(14, 32), *range(0x7F, 0xA0)]))
    assert once == once.strip()
    for options in (CleanOptions(), CleanOptions(min_words=0)):
        judge(Features(once, detect_language(once)), options)


WORDS = PROSE.split()
ENGLISH = " ".join(WORDS[:60])
BAD: dict[str, tuple[str, str]] = {
    "wrong_length": ("Too short.", "fewer than"),
    "odd_word_length": ("pneumonoultramicroscopicsilicovolcanoconiosis the of and " * 20, "mean word length"),
    "many_symbols": (ENGLISH + " #tag" * 20, "hash signs"),
    "few_letters": (ENGLISH + " 123.4" * 40, "letter"),
    "many_list_lines": ("\n".join(f"- {a} {b} the of" for a, b in zip(WORDS[:40], WORDS[40:80], strict=True)), "bullets"),
    "no_stop_words": (
        "Buy cheap watches online now. Great prices, fast shipping, best quality guaranteed! " + "Order today via website. " * 2,
        "stop words",
    ),
    "repeated_lines": ("\n".join([ENGLISH, *["The same line of the page again"] * 5]), "lines are repeated"),
    "repeated_phrase": (ENGLISH + " to be or not" * 10, "phrase"),
    "placeholder_text": (ENGLISH + " Lorem ipsum dolor", "placeholder"),
    "much_code": (ENGLISH + " the if {x} and {y} or {z}" * 3, "curly"),
}


@pytest.mark.parametrize("rule", [rule for rule, _ in RULES if rule.__name__ != "wrong_language"], ids=lambda r: r.__name__)
def test_each_rule_drops_its_case_and_no_chapter_of_a_book(rule: Callable[[Features, CleanOptions], str | None]) -> None:
    text, reason = BAD[rule.__name__]
    assert reason in (rule(Features(text, "en"), CleanOptions()) or "")
    assert [rule(Features(chapter.text, "en"), CleanOptions()) for chapter in CHAPTERS] == [None] * len(CHAPTERS)


def test_language() -> None:
    french = (
        "Il était une fois une petite fille de village, la plus jolie qu’on eût su voir ; sa mère en était folle, et sa mère-grand plus folle encore."
    )
    assert detect_language(PROSE) == "en"
    ledger = Ledger()
    kept = list(clean([Document("fr", french), Document("en", ENGLISH)], CleanOptions(language="en"), ledger))
    assert [d.id for d in kept] == ["en"]
    assert ledger.to_dict()["clean"]["dropped"]["language is not en"]["examples"][0]["id"] == "fr"
    assert len(list(clean([Document("fr", french)], CleanOptions(), Ledger()))) == 1


def test_lower_case() -> None:
    (document,) = clean([Document("a", ENGLISH)], CleanOptions(lower_case=True), Ledger())
    assert document.text == ENGLISH.lower()


# --- dedupe ----------------------------------------------------------------------------------------------------------


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    return len(np.intersect1d(a, b)) / len(np.union1d(a, b))


def edited(text: str, share: float, seed: int) -> str:
    """`share` of the words replaced, emphasis added, wrapped at 76 columns: another edition of the text."""
    draw = random.Random(seed)
    words = ["edited" if draw.random() < share else f"_{w}_" if draw.random() < 0.02 else w for w in text.split()]
    return textwrap.fill(" ".join(words), 76)


def test_minhash_estimates_jaccard() -> None:
    """Against exact set arithmetic on 40 pairs: mean error near zero, spread as the binomial law says."""
    errors = []
    for i, chapter in enumerate(CHAPTERS[:10]):
        for share in (0.01, 0.03, 0.08, 0.2):
            a, b = shingles(chapter.text), shingles(edited(chapter.text, share, i))
            exact = jaccard(a, b)
            errors.append((float((minhash(a) == minhash(b)).mean()) - exact) / np.sqrt(exact * (1 - exact) / 128))
    assert abs(np.mean(errors)) < 3 / np.sqrt(len(errors))
    assert 0.6 < np.std(errors) < 1.4


def test_planted_near_duplicates_are_found_and_different_chapters_are_not() -> None:
    """Every other chapter of two books comes again, rewrapped and with 1 % of its words changed, in another order."""
    copies = [Document(f"copy/{c.id}", edited(c.text, 0.01, i)) for i, c in enumerate(CHAPTERS) if i % 2]
    random.Random(0).shuffle(copies)
    ledger = Ledger()
    kept = list(deduplicate([*CHAPTERS, *copies, CHAPTERS[3]], ledger, threshold=0.7))
    assert [d.id for d in kept] == [c.id for c in CHAPTERS]
    dropped = ledger.to_dict()["dedupe"]["dropped"]
    assert dropped["near duplicate"]["documents"] == len(copies)
    assert dropped["exact duplicate"]["documents"] == 1
    assert all(e["id"].removeprefix("copy/") in e["detail"] for e in dropped["near duplicate"]["examples"])
    assert len(list(deduplicate([*CHAPTERS, *copies], Ledger(), threshold=None))) == len(CHAPTERS) + len(copies)


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9])
def test_banding_compares_pairs_at_the_threshold(threshold: float) -> None:
    """Signatures that agree at exactly the threshold's share of places: at least 97 % are found (99 % are meant to be)."""
    draw = np.random.default_rng(1)
    same = int(np.ceil(threshold * 128))
    found = 0
    for _ in range(400):
        first = draw.integers(0, 2**32, 128, dtype=np.uint32)
        second = draw.integers(0, 2**32, 128, dtype=np.uint32)
        places = draw.permutation(128)[:same]
        second[places] = first[places]
        index = NearDuplicates(threshold)
        index.add(first)
        found += index.find(second) is not None
        second[places[0]] ^= 1
        assert index.find(second) is None, "one place below the threshold"
    assert found >= 388


def test_short_and_empty_texts_have_shingles() -> None:
    assert len(shingles("one two")) == 1
    assert not np.array_equal(shingles("one two"), shingles("two one"))
    assert len(list(deduplicate([Document("a", ""), Document("b", "!"), Document("c", "")], Ledger()))) <= 2


# --- contamination ---------------------------------------------------------------------------------------------------


def test_planted_items_are_flagged_and_others_are_not(tmp_path: Path) -> None:
    words = PROSE.replace("\n", " ").split()
    absent = "a hedge fund quietly leveraged collateralised debt while regulators slept through every single warning sign"
    items = [
        {"id": "long", "question": "Complete: " + " ".join(words[100:115]) + " purple monkey"},
        {"id": "twelve of thirteen", "question": "zebra quagga okapi " + " ".join(words[200:212]) + " zebra"},
        {"id": "short", "choices": ["no", " ".join(words[300:308]).upper()], "gold": 1},
        {"id": "absent", "question": absent},
        {"id": "tiny", "question": " ".join(words[400:404])},
        {"id": "label", "title": " ".join(words[500:520]), "question": absent},
    ]
    path = tmp_path / "eval" / "items.jsonl"
    path.parent.mkdir()
    path.write_text("\n".join(map(json.dumps, items)))
    found = EvaluationItems([tmp_path / "eval"])
    for document in CHAPTERS[:3]:
        found.look_in(document)
    (report,) = found.report()
    assert [items[i]["id"] for i in report["flagged_items"]] == ["long", "short"]
    assert (report["items"], report["too_short"], report["flagged"], report["flagged_fraction"]) == (6, 1, 2, 2 / 5)
    assert report["examples"][0].startswith("long: “")
    assert report["examples"][0].endswith(CHAPTERS[0].id)


def test_held_out_books_are_clean_of_their_own_training_text(tmp_path: Path) -> None:
    """Ten-sentence items from the test books: none in the first books of train, all in the book itself."""
    test = corpus("books.test")
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(json.dumps({"text": " ".join(d.text.split()[50:120])}) for d in test))
    elsewhere, itself = EvaluationItems([path]), EvaluationItems([path])
    for document in corpus("books.train", 100):
        elsewhere.look_in(document)
    for document in test:
        itself.look_in(document)
    assert elsewhere.report()[0]["flagged"] == 0
    assert itself.report()[0]["flagged"] == len(test)


@pytest.mark.parametrize("data", [b"[]\n", b"{", b"\x1f\x8bgarbage"])
def test_bad_evaluation_files(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / ("a.jsonl.gz" if data.startswith(b"\x1f") else "a.jsonl")
    path.write_bytes(data)
    for given_path in (path, tmp_path / "absent.jsonl"):
        with pytest.raises(InputError):
            EvaluationItems([given_path])
