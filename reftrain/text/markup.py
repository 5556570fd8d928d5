"""Text out of HTML pages and MediaWiki XML dumps, by lxml, with entities and network off."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import IO, Any

from lxml import etree  # type: ignore[import-untyped, unused-ignore]
from lxml import html as lxml_html

from planner.errors import InputError
from reftrain.text.wikitext import strip_wikitext

__all__ = ["html_text", "mediawiki_pages"]

_SKIPPED = frozenset(
    ("script", "style", "noscript", "template", "nav", "header", "footer", "aside", "form", "button", "select", "textarea", "svg", "math", "iframe",
     "object", "head", "figure", "audio", "video", "canvas", "dialog", "menu")
)  # fmt: skip
_BLOCKS = frozenset(
    ("p", "div", "section", "article", "main", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "dl", "table", "blockquote", "pre", "hr", "body",
     "address", "details", "fieldset", "center")
)  # fmt: skip
_LINES = frozenset(("li", "tr", "dt", "dd", "br", "caption", "summary"))
_NAVIGATION = re.compile(r"\b(nav(bar|igation)?|menu|breadcrumbs?|sidebar|footer|toc|cookie\w*|pagination|skip-?link)\b", re.IGNORECASE)
_SPACES = re.compile(r"[ \t\r\n\f]+")
_MAX_LINK_SHARE = 0.7


def html_text(page: bytes) -> str:
    """The visible prose of a page: paragraphs parted by a blank line, without scripts, navigation and blocks that are mostly links.

    Where the page marks its content with <main> or a single <article>, only that is read.

    Example:
        >>> html_text(b"<html><nav><a href='/'>Home</a></nav><h1>Cats</h1><p>They <b>purr</b>.<script>x()</script></html>")
        'Cats\\n\\nThey purr.'
    """
    if not page.strip():
        return ""
    try:
        parser = lxml_html.HTMLParser(encoding=_declared_encoding(page), no_network=True, remove_comments=True, remove_pis=True)
        root = lxml_html.document_fromstring(page, parser=parser)
    except (etree.ParserError, etree.XMLSyntaxError, LookupError, ValueError):
        return ""
    articles = root.findall(".//main") or root.findall(".//article")
    pieces: list[str] = []
    _walk(articles[0] if len(articles) == 1 else root, pieces)
    blocks = ("\n".join(_SPACES.sub(" ", line).strip() for line in block.split("\x01")).strip() for block in "".join(pieces).split("\x00"))
    return "\n\n".join(block for block in blocks if block)


def _declared_encoding(page: bytes) -> str | None:
    """UTF-8 when the page is valid UTF-8, whatever it declares; else None, and lxml reads the declaration."""
    try:
        page.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return "utf-8"


def _walk(root: Any, pieces: list[str]) -> None:
    """Appends the text below `root`, a zero byte between blocks and a one byte between lines; no recursion, pages may nest deep."""
    skipped = 0
    for event, element in etree.iterwalk(root, events=("start", "end")):
        tag = element.tag
        leave_out = not isinstance(tag, str) or tag in _SKIPPED or _is_navigation(element)
        if event == "start":
            skipped += leave_out
            if not skipped:
                pieces.append("\x00" if tag in _BLOCKS else "\x01" if tag in _LINES else " " if tag in ("td", "th") else "")
                pieces.append(_plain(element.text))
            continue
        if not skipped and tag in _BLOCKS:
            pieces.append("\x00")
        skipped -= leave_out
        if not skipped and element is not root:
            pieces.append(_plain(element.tail))


def _plain(text: str | None) -> str:
    return text.replace("\x00", "").replace("\x01", "") if text else ""


def _is_navigation(element: Any) -> bool:
    if element.tag in ("html", "body", "main", "article"):
        return False
    if (
        element.get("hidden") is not None
        or element.get("role") in ("navigation", "banner", "contentinfo", "search")
        or element.get("aria-hidden") == "true"
    ):
        return True
    if element.tag in ("div", "section", "ul", "ol", "table") and _NAVIGATION.search(f"{element.get('class', '')} {element.get('id', '')}"):
        return True
    return element.tag in ("ul", "ol") and _link_share(element) > _MAX_LINK_SHARE


def _link_share(element: Any) -> float:
    total = sum(len(text) for text in element.itertext())
    linked = sum(len(text) for link in element.iter("a") for text in link.itertext())
    return linked / total if total else 0.0


def mediawiki_pages(file: IO[bytes], name: str) -> Iterator[tuple[str, str]]:
    """(title, prose) of each article of a `pages-articles` dump; redirects and other namespaces are left out.

    Raises:
        InputError: not well-formed, with a document type (which could define entities), or no MediaWiki dump.
    """
    fix = "give a pages-articles dump of MediaWiki"
    try:
        events = etree.iterparse(file, events=("start", "end"), resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False)
        for number, (event, element) in enumerate(events):
            tag = etree.QName(element).localname if isinstance(element.tag, str) else ""
            if number == 0 and (tag != "mediawiki" or element.getroottree().docinfo.doctype):
                raise InputError.single("file", name, f"must be a MediaWiki dump without a document type; its root is <{tag}>", fix, name)
            if event == "end" and tag == "page":
                fields = {etree.QName(e).localname: e.text or "" for e in element.iter() if isinstance(e.tag, str)}
                element.clear()
                while element.getprevious() is not None:  # pages read are kept by their parent otherwise
                    del element.getparent()[0]
                if (
                    fields.get("ns", "0") == "0"
                    and "redirect" not in fields
                    and not fields.get("text", "").lstrip()[:9].upper().startswith("#REDIRECT")
                ):
                    yield fields.get("title", ""), f"{fields.get('title', '')}\n\n{strip_wikitext(fields.get('text', ''))}"
    except etree.XMLSyntaxError as error:
        raise InputError.single("file", name, f"must be well-formed XML ({str(error)[:100]})", fix, name) from None
