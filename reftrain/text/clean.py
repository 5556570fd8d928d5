"""Mending and judging documents: small pure functions, each a repair (text -> text) or a rule (document -> why it goes).

Rules follow Gopher (J. Rae et al., Scaling Language Models, 2021, table A1) and C4 (C. Raffel et al., 2020, section 2.2),
with thresholds where those were made for web pages relaxed for books: no upper limit on length, and lines that look like
boilerplate go by themselves, not with their page.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import ftfy
import py3langid  # type: ignore[import-untyped, unused-ignore]

from reftrain.text.documents import Document, Ledger

__all__ = ["REPAIRS", "RULES", "CleanOptions", "Features", "clean", "detect_language", "judge", "repair"]

_FTFY = ftfy.TextFixerConfig(uncurl_quotes=False, fix_character_width=False, unescape_html="auto", explain=False)
# What ftfy leaves: other control characters, zero-width and direction marks, lone surrogates, private use, no-characters.
_INVISIBLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ufff0-\ufffb\ufffe\uffff\ud800-\udfff\ue000-\uf8ff]"
)
_BOILERPLATE = re.compile(
    r"cookies?\b.{0,40}\b(policy|accept|use|settings)|\b(use|accept|uses)\b.{0,20}\bcookies?\b|enable javascript|javascript is (disabled|required)"
    r"|\b(terms of (use|service)|privacy policy)\b|all rights reserved|^ ?(copyright )?© ?\d{4}"
    r"|^ *(click here|read more|share this|sign up|log ?in|subscribe|back to top|(skip|jump) to (main )?(content|navigation|search))[ .!>»…]*$",
    re.IGNORECASE | re.MULTILINE,
)
_LONGEST_BOILERPLATE_WORDS = 20
_GUTENBERG_START = re.compile(r"^\*\*\* ?START OF (THE|THIS) PROJECT GUTENBERG.*$", re.MULTILINE)
_GUTENBERG_END = re.compile(r"^\*\*\* ?END OF (THE|THIS) PROJECT GUTENBERG.*", re.MULTILINE | re.DOTALL)
_BLANK_LINES = re.compile(r"\n[ \t]*(?:\n[ \t]*)+")
_SPACES = re.compile(r"[ \t\u00a0\u2002-\u200a\u202f]{2,}|[\t\u00a0]")
_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
_LANGUAGE_SAMPLE_CHARACTERS = 2000


def repair_encoding(text: str) -> str:
    """Mojibake, HTML entities and ligatures mended by ftfy; typographic quotes stay.

    Example:
        >>> repair_encoding("the cafÃ© â€œNoirâ€\\x9d")
        'the café “Noir”'
    """
    return text if text.isascii() and "&" not in text else ftfy.fix_text(text, _FTFY)


def remove_control_characters(text: str) -> str:
    r"""Line ends become \n; what cannot be seen goes.

    Example:
        >>> remove_control_characters("a\x00b\r\nc\u200bd")
        'ab\ncd'
    """
    return _INVISIBLE.sub("", text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n\n"))


def remove_boilerplate(text: str) -> str:
    """Without a distributor's header and footer, and without short lines about cookies, rights and navigation."""
    start, end = _GUTENBERG_START.search(text), _GUTENBERG_END.search(text)
    text = text[start.end() if start else 0 : end.start() if end and (not start or end.start() > start.end()) else None]
    if not _BOILERPLATE.search(text):
        return text
    return "\n".join(line for line in text.split("\n") if not (_BOILERPLATE.search(line.strip()) and len(line.split()) <= _LONGEST_BOILERPLATE_WORDS))


def unwrap_lines(text: str) -> str:
    """Paragraphs broken at a fixed column become one line; verse and lists, whose lines vary, stay as they are.

    A paragraph counts as wrapped when no line is longer than 90 characters and each but the last would pass 60 with the next word.
    """
    return "\n\n".join(_unwrap(paragraph) for paragraph in text.split("\n\n"))


def _unwrap(paragraph: str) -> str:
    lines = paragraph.split("\n")
    if len(lines) < 2:
        return paragraph
    full = all(len(line) + 1 + len(after.split(" ", 1)[0]) > 60 for line, after in pairwise(lines))
    return " ".join(line.strip() for line in lines) if full and max(map(len, lines)) <= 90 else paragraph


def tidy_spaces(text: str) -> str:
    """One space between words, none at the ends of lines, one blank line between paragraphs."""
    text = _SPACES.sub(" ", text)
    return _BLANK_LINES.sub("\n\n", "\n".join(line.rstrip() for line in text.split("\n"))).strip()


def lower_case(text: str) -> str:
    """Lower case by Unicode's rules."""
    return text.lower()


REPAIRS: dict[str, Callable[[str], str]] = {
    "encoding repaired": repair_encoding,
    "control characters removed": remove_control_characters,
    "boilerplate removed": remove_boilerplate,
    "spaces tidied": tidy_spaces,
    "hard line breaks removed": unwrap_lines,
}
"""What is done to every document, in this order, by the name that the report gives it."""


@dataclass(frozen=True)
class CleanOptions:
    """What to keep."""

    min_words: int = 20
    max_words: int | None = None
    language: str | None = None
    """ISO 639-1 code; None keeps every language."""
    lower_case: bool = False
    quality: bool = True
    """Apply the rules on symbols, words, lines and repetition; length and language apply regardless."""


@dataclass(frozen=True)
class Features:
    """What the rules look at, computed once per document."""

    text: str
    language: str

    @cached_property
    def words(self) -> list[str]:
        """Split at white space."""
        return self.text.split()

    @cached_property
    def lines(self) -> list[str]:
        """Lines with something on them."""
        return [line.strip() for line in self.text.split("\n") if line.strip()]


Rule = Callable[[Features, CleanOptions], str | None]


def wrong_length(document: Features, options: CleanOptions) -> str | None:
    """Too few words to learn from, or more than asked for."""
    count = len(document.words)
    if count < options.min_words:
        return f"fewer than {options.min_words} words"
    return f"more than {options.max_words} words" if options.max_words is not None and count > options.max_words else None


def wrong_language(document: Features, options: CleanOptions) -> str | None:
    """Another language than the one asked for."""
    return f"language is not {options.language}" if options.language is not None and document.language != options.language else None


def odd_word_length(document: Features, _: CleanOptions) -> str | None:
    """Gopher: mean word length of 3 to 10 characters; scripts without spaces are let through by their language."""
    if document.language in ("zh", "ja", "th", "lo", "km", "my", "bo", "dz"):
        return None
    mean = sum(map(len, document.words)) / max(len(document.words), 1)
    return None if 3 <= mean <= 10 else "mean word length not within 3 to 10"


def many_symbols(document: Features, _: CleanOptions) -> str | None:
    """Gopher: hash signs and ellipses, each at most one for ten words."""
    text, limit = document.text, 0.1 * len(document.words)
    return "more than 10 % hash signs or ellipses" if text.count("#") > limit or text.count("...") + text.count("…") > limit else None


def few_letters(document: Features, _: CleanOptions) -> str | None:
    """Gopher: 80 % of the words must have a letter."""
    with_letter = sum(word.isalpha() or any(map(str.isalpha, word)) for word in document.words)
    return "fewer than 80 % of words have a letter" if with_letter < 0.8 * len(document.words) else None


def many_list_lines(document: Features, _: CleanOptions) -> str | None:
    """Gopher: at most 90 % of lines begin with a bullet, at most 30 % end with an ellipsis."""
    lines = document.lines
    if sum(line.startswith(("•", "-", "*", "‣", "◦")) for line in lines) > 0.9 * len(lines):
        return "more than 90 % of lines are bullets"
    return "more than 30 % of lines end with an ellipsis" if sum(line.endswith(("…", "...")) for line in lines) > 0.3 * len(lines) else None


def no_stop_words(document: Features, _: CleanOptions) -> str | None:
    """Gopher: English has at least two of: the, be, to, of, and, that, have, with."""
    if document.language != "en":
        return None
    return None if len(_STOP_WORDS.intersection(word.lower() for word in document.words)) >= 2 else "English without stop words"


def repeated_lines(document: Features, _: CleanOptions) -> str | None:
    """Gopher: at most 30 % of lines are copies of an earlier line of the document."""
    lines = document.lines
    return "more than 30 % of lines are repeated" if len(lines) > 3 and len(lines) - len(set(lines)) > 0.3 * len(lines) else None


def repeated_phrase(document: Features, _: CleanOptions) -> str | None:
    """Gopher: the most frequent run of four words makes up at most 16 % of the text."""
    words = document.words
    counts = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
    if not counts:
        return None
    phrase, count = counts.most_common(1)[0]
    share = count * sum(map(len, phrase)) / sum(map(len, words))
    return "one phrase makes up more than 16 % of the text" if count > 2 and share > 0.16 else None


def placeholder_text(document: Features, _: CleanOptions) -> str | None:
    """C4: lorem ipsum."""
    return "placeholder text" if "lorem ipsum" in document.text.lower() else None


def much_code(document: Features, _: CleanOptions) -> str | None:
    """C4 drops any page with a curly bracket; here one for twenty words is too many."""
    return "more than 5 % curly brackets" if document.text.count("{") + document.text.count("}") > 0.05 * len(document.words) else None


RULES: tuple[tuple[Rule, bool], ...] = (
    (wrong_length, False), (wrong_language, False), (odd_word_length, True), (many_symbols, True), (few_letters, True), (many_list_lines, True),
    (no_stop_words, True), (repeated_lines, True), (repeated_phrase, True), (placeholder_text, True), (much_code, True),
)  # fmt: skip
"""Every rule, and whether `CleanOptions.quality` turns it off; the first that objects is the reason."""


def detect_language(text: str) -> str:
    """ISO 639-1 code of the language of a sample from the middle of the text."""
    start = max(len(text) - _LANGUAGE_SAMPLE_CHARACTERS, 0) // 2
    return str(py3langid.classify(text[start : start + _LANGUAGE_SAMPLE_CHARACTERS])[0])


def repair(text: str) -> tuple[str, list[str]]:
    """The text after all repairs, and the names of those that changed it."""
    changed = []
    for name, mend in REPAIRS.items():
        mended = mend(text)
        if mended != text:
            changed.append(name)
        text = mended
    return text, changed


def judge(document: Features, options: CleanOptions) -> str | None:
    """Why the document goes, or None when it stays."""
    return next((reason for rule, is_quality in RULES if (options.quality or not is_quality) and (reason := rule(document, options))), None)


def clean(documents: Iterable[Document], options: CleanOptions, ledger: Ledger) -> Iterator[Document]:
    """Documents repaired, and only those that no rule objects to."""
    for document in documents:
        text, changed = repair(document.text)
        for name in changed:
            ledger.change("clean", name)
        language = detect_language(text)
        reason = judge(Features(text, language), options)
        if reason is not None:
            ledger.drop("clean", reason, document)
            continue
        ledger.change("clean", f"language {language}")
        yield replace(document, text=lower_case(text) if options.lower_case else text)
