"""The English article of a caption, by the sound of its first word."""

import re
import unicodedata

_DETERMINER = re.compile(
    r"(an?|the|this|that|these|those|some|my|your|his|her|its|our|their)(?=\s)", re.IGNORECASE
)
_WORD = re.compile(r"\d[\d,]*|[^\W\d_]+")
# Vowels that sound like "you" or "won": a unicorn, a useful thing, a European, a one-way street;
# but an unidentified thing, an umbrella, an usher.
_CONSONANT = re.compile(
    r"uni[bcfloqtv]|unis(ex|on)|us([eu]|a[bg]|[ab]?$)|ut[eio]|ubiq|uk|ur(an|in|ol|u)|ufo|ugand"
    r"|eu|ewe(r|s|$)|one(s|self|sies?|time)?$|once$|oui"
)
_SILENT_H = re.compile(r"hour|honest|hono|heir")
# Letters whose names begin with a vowel: an X-ray, an F, an NFL team.
_LETTERS = "aefhilmnorsx"
_SPELLED = ("FBI", "HIV", "LED", "MBA", "MRI", "NBA", "SOS", "SUV")
# An eight, an eleven thousand, an 1800s dress; but a hundred and ten.
_NUMBER = re.compile(r"8|1[18](,?\d{3})*$|1[18]\d\d$")


def with_article(caption: str) -> str:
    """Return a caption with "a" or "an": `"an apple"` for `"apple"`.

    A caption that begins with an article, or a word in its place, is not changed; nor is an empty
    one.
    """
    caption = caption.strip()
    if not caption or _DETERMINER.match(caption):
        return caption
    letters = (c for c in unicodedata.normalize("NFD", caption) if not unicodedata.combining(c))
    word = _WORD.search("".join(letters))
    return f"{'an' if word and _begins_with_vowel(word[0]) else 'a'} {caption}"


def _begins_with_vowel(word: str) -> bool:
    """Whether a word or a number is spoken with a vowel at its beginning."""
    if word[0].isdigit():
        return bool(_NUMBER.match(word.rstrip(",")))
    lower = word.lower()
    spelled = word.isupper() and not re.search("[AEIOUY]", word)
    if len(word) == 1 or spelled or word in _SPELLED:
        return lower[0] in _LETTERS
    if lower[0] == "h":
        return bool(_SILENT_H.match(lower))
    return lower[0] in "aeiou" and not _CONSONANT.match(lower)
