"""MediaWiki markup to plain text: what a reader of the article sees, without tables, boxes and notes."""

from __future__ import annotations

import html
import re

__all__ = ["strip_wikitext"]

MAX_NESTING = 40
_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
# Elements whose content is no prose; their tags are matched case-insensitively, an unclosed one only loses its tag.
_ELEMENT = re.compile(r"<(ref|math|gallery|timeline|imagemap|nowiki|pre|source|syntaxhighlight|score|table)\b[^<>]*?(?:/>|>.*?</\1\s*>)", re.S | re.I)
_TAG = re.compile(r"</?[a-zA-Z][^<>]{0,500}>")
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_TABLE = re.compile(r"\{\|[^{}]*?\|\}", re.DOTALL)
_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_EXTERNAL = re.compile(r"\[(?:https?:|ftp:|mailto:|//)[^\s\[\]]*\s*([^\[\]\n]*)\]")
_SWITCH = re.compile(r"__[A-Z]{3,30}__")
_QUOTES = re.compile(r"'{2,5}")
_HEADING = re.compile(r"^(={1,6})[ \t]*(.{1,300}?)[ \t]*=+[ \t]*$", re.MULTILINE)
_LIST = re.compile(r"^[*#:;]+[ \t]*", re.MULTILINE)
_BLANK = re.compile(r"\n\s*\n\s*")
_NO_PROSE = ("references", "external links", "see also", "further reading", "notes", "bibliography", "sources", "footnotes", "notes and references")


def strip_wikitext(text: str) -> str:
    """The prose of an article in wikitext.

    Templates, tables, references, files, categories and the sections after the article (see also, references, ...) go;
    links keep their label; headings stand on their own line.

    Example:
        >>> strip_wikitext("'''Rome''' is in [[Italy|the ''boot'']].<ref>x</ref> {{cn|{{a}}}}\\n[[File:a.png|thumb|A [[map]]]]")
        'Rome is in the boot.'
    """
    text = _ELEMENT.sub("", _COMMENT.sub("", text))
    text = _repeat(_TEMPLATE, "", text)
    text = _repeat(_TABLE, "", text)
    text = _repeat(_LINK, _label, text)
    text = _SWITCH.sub("", _EXTERNAL.sub(r"\1", text))
    text = _QUOTES.sub("", _TAG.sub("", text))
    text = _LIST.sub("", _without_appendix(text))
    text = html.unescape(_HEADING.sub(r"\2\n", text)).replace("\xa0", " ")
    lines = (" ".join(line.split()) for line in _BLANK.sub("\n\n", text).split("\n"))
    return "\n".join(line for line in lines if line not in ("()", ".", ",")).strip()


def _repeat(pattern: re.Pattern[str], replacement: object, text: str) -> str:
    """Innermost first, since regular expressions do not nest; deeper nesting than any article's is left alone."""
    for _ in range(MAX_NESTING):
        text, count = pattern.subn(replacement, text)  # type: ignore[call-overload]
        if not count:
            break
    return text


def _label(match: re.Match[str]) -> str:
    target, _, rest = match.group(1).partition("|")
    space, colon, _ = target.strip().partition(":")
    if colon and (space.lower() in ("file", "image", "category", "media", "wikipedia", "template") or (space.islower() and len(space) <= 12)):
        return ""  # a picture, a category, or the same article in another language
    return rest.rpartition("|")[2] if rest else target


def _without_appendix(text: str) -> str:
    """The text up to the first section that holds no prose, but for those that come before the article's middle."""
    for match in _HEADING.finditer(text):
        if match.group(2).strip().lower() in _NO_PROSE and match.start() > len(text) // 3:
            return text[: match.start()]
    return text
