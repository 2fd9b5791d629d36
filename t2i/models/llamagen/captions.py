"""Caption cleaning before the text encoder, with the same results as LlamaGen's `language/t5.py`.

LlamaGen's text-to-image models were trained on captions cleaned by the rules of DeepFloyd IF (via
PixArt-alpha), so prompts must be cleaned by the same rules in training and sampling. The rules were
made for web captions and are not harmless: everything becomes lower case, Chinese characters
disappear (a Chinese caption ends up empty), and so do words that look like article numbers
("bmw320") or file types ("png").

The rules are the table `_PASS`. Their order matters, and the whole table is applied twice.
"""

import html
import re
import warnings
from collections.abc import Callable
from functools import partial
from urllib.parse import unquote_plus

import ftfy
from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning, XMLParsedAsHTMLWarning
from bs4.exceptions import ParserRejectedMarkup

from t2i.errors import UserError

# Part of every cache key that depends on cleaned captions: change it whenever a rule changes.
CAPTION_CLEANING_VERSION = "llamagen-1"

UNKNOWN = "caption holds words or characters that the encoder does not know"
CHINESE = "caption loses its Chinese characters in cleaning"
WORDS = "caption loses words in cleaning, such as r2d2, #7 and @name do"
_READABLE = re.compile("[a-z0-9]")

# With this many hyphens and underscores or more, they stand for spaces: this-is-my-cute-cat.
_MANY_JOINERS = 4

_WORD = re.compile(r"\S+")
_TOP_LEVEL = re.compile(r"\.(?:com|co|ru|net|org|edu|gov|it)")
_HOST = rf"[a-z0-9.\-]+{_TOP_LEVEL.pattern}[\w/-]*\b/?(?!@)"
_DASHES = (
    r"[\u002D\u058A\u05BE\u1400\u1806\u2010-\u2015\u2E17\u2E1A\u2E3A\u2E3B\u2E40"
    r"\u301C\u3030\u30A0\uFE31\uFE32\uFE58\uFE63\uFF0D]+"
)
_CHINESE = re.compile(r"[\u31C0-\u9FFF]+")  # from CJK strokes to the end of the unified ideographs
_BAD_PUNCTUATION = (
    r"[#&@~()\[\]{}|\\/*"
    r"\u00AE\u2022\u00A9\u2122\u00B7\u00BA\u00BD-\u00BF\u00A1\u00A7]+"
)
_FILE_TYPE = r"(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"


def clean_caption(text: str) -> str:
    """Clean one caption as LlamaGen does: two passes over the table of rules.

    The result is a lower-case line without surrounding white space, and may be empty. Markup that
    the HTML parser rejects (e.g. "<![x") makes the official code raise; here it stays in the
    caption as plain text.

    Raises:
        UserError: `text` is not a string.
    """
    if not isinstance(text, str):
        raise UserError(f"a caption must be a string, got {text!r}; drop samples without a caption")
    for _ in range(2):
        for step in _PASS:
            text = step(text)
    return text


def caption_losses(caption: str, cleaned: str, known: bool = True) -> list[str] | None:
    """Fixed phrases for what cleaning removes from a caption; None if nothing readable is left.

    Args:
        known: whether the encoder knows any of its words. Ignored if Latin letters or digits are
            left: words missing from a small vocabulary are not the same as an unknown script.
    """
    if not caption.strip():
        return []  # nothing to lose: the unconditional form
    if not cleaned.strip() or not (known or _READABLE.search(cleaned)):
        return None
    lost = [CHINESE] if _CHINESE.search(caption) else []
    kept = set(_words(cleaned))
    if any(word not in kept for word in _words(_before_rules(caption))):
        lost.append(WORDS)
    return lost


def _before_rules(caption: str) -> str:
    """A caption without the parts that do not count as lost words: addresses, markup, Chinese."""
    text = _repair_characters(unquote_plus(caption))
    for step in (str.lower, _ADDRESS, _markup_to_text, partial(_CHINESE.sub, " ")):
        text = step(text)
    return text


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text)


def _replace(pattern: str, replacement: str = "") -> Callable[[str], str]:
    return partial(re.compile(pattern).sub, replacement)


def _addresses(scheme: str, rest: str = "") -> Callable[[str], str]:
    """Remove what begins with a scheme, and host names, each with what `rest` matches after it."""
    schemes = _replace(rf"\b(?:{scheme}){rest}")
    both = _replace(rf"\b(?:{scheme}|{_HOST}){rest}")

    def remove(text: str) -> str:
        # Words without a top-level domain hold no host: trying each letter of one for the start of
        # a host took a minute for 100,000.
        if not _TOP_LEVEL.search(text):
            return schemes(text)
        return _WORD.sub(
            lambda word: (both if _TOP_LEVEL.search(word[0]) else schemes)(word[0]), text
        )

    return remove


def _markup_to_text(text: str) -> str:
    if "<" not in text and "&" not in text:
        return text  # skips the parser, by far the slowest step
    try:
        with warnings.catch_warnings():
            # Captions that look like a file name or XML are still captions.
            warnings.simplefilter("ignore", MarkupResemblesLocatorWarning)
            warnings.simplefilter("ignore", XMLParsedAsHTMLWarning)
            return BeautifulSoup(text, features="html.parser").text
    except ParserRejectedMarkup:
        return text


def _split_joined_words(text: str) -> str:
    many = text.count("-") + text.count("_") >= _MANY_JOINERS
    return text.replace("-", " ").replace("_", " ") if many else text


def _repair_characters(text: str) -> str:
    # Captions are often escaped twice ("&amp;lt;").
    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


_ADDRESS = _addresses(r"https?:\S+", r"\S*")

_PASS: tuple[Callable[[str], str], ...] = (
    unquote_plus,
    str.strip,
    str.lower,
    _replace("<person>", "person"),
    # Addresses and markup. From here on entities can bring back capital letters.
    _addresses(r"https?:(?:/{1,3}|[a-z0-9%])"),
    _addresses(r"www:(?:/{1,3}|[a-z0-9%])"),
    _markup_to_text,
    _replace(r"@\w+\b"),  # @nickname
    # Character sets.
    partial(_CHINESE.sub, ""),
    _replace(_DASHES, "-"),
    _replace(r"[`\u00B4\u00AB\u00BB\u201C\u201D\u00A8]", '"'),
    _replace(r"[\u2018\u2019]", "'"),
    # Remaining entities, numbers and files.
    _replace("&quot;?"),
    _replace("&amp"),
    _replace(r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # IP address
    _replace(r"\d:\d\d\s+$"),  # article id
    _replace(r"\\n", " "),  # a backslash and an n
    _replace(r"#(?:\d{1,3}|\d{5,})\b"),  # "#123" and "#12345", but "#1234" stays
    _replace(r"\b\d{6,}\b"),
    # It matches first at the start of a word: trying each letter took a minute for 100,000.
    _replace(rf"(?<!\S)\S+\.{_FILE_TYPE}"),
    # Punctuation.
    _replace("[\"']{2,}", '"'),
    _replace(r"\.{2,}", " "),
    _replace(_BAD_PUNCTUATION, " "),
    _replace(r"(?<!\s)\s+\.\s+", " "),
    _split_joined_words,
    _repair_characters,
    # Article numbers: jc6640, jc6640vc, 6640vc231.
    _replace(r"\b[a-zA-Z]{1,3}\d{3,15}\b"),
    _replace(r"\b[a-zA-Z]+\d+[a-zA-Z]+\b"),
    _replace(r"\b\d+[a-zA-Z]+\d+\b"),
    # Phrases of web shops.
    _replace(r"(?:worldwide\s+)?(?:free\s+)?shipping"),
    _replace(r"(?:free\s)?download(?:\sfree)?"),
    _replace(r"\bclick\b\s(?:for|on)\s\w+"),
    _replace(rf"\b{_FILE_TYPE}(?:\simages?)?"),
    _replace(r"\bpage\s+\d+\b"),
    _replace(r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # j2d1a2a
    _replace(r"\b\d+\.?\d*[x\u0445\u00D7]\d+\.?\d*\b"),  # sizes; the second x is Cyrillic
    # Spacing.
    _replace(r"\b\s+:\s+", ": "),
    _replace(r"(\D[,./])\b", r"\1 "),
    _replace(r"\s+", " "),
    # Both ends of the caption.
    _replace(r"^[\"']([\w\W]+)[\"']$", r"\1"),
    _replace("^['_,:;-]"),
    _replace("['_,:+-]$"),
    _replace(r"^\.\S+$"),
    str.strip,
)
