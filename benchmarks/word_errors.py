"""Word error rates: texts as they are compared, and the errors between them."""

from __future__ import annotations

import re

_ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
         "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_ORDINALS = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth",
             "twelve": "twelfth"}  # fmt: skip
_SIGNS = {"%": " percent ", "&": " and ", "#": " pound ", "+": " plus ", "@": " at ", "*": " star "}
_SHORT = {r"\bwon't": "will not", r"\bcan't": "can not", r"\bcannot": "can not", r"\blet's": "let us", "n't": " not",
          "'re": " are", "'ll": " will", "'ve": " have", "'m": " am", "'s": " is", "'d": " would"}  # fmt: skip
_ALIKE = {"ok": "okay", "mr": "mister", "mrs": "missus", "dr": "doctor", "cancelled": "canceled", "dialled": "dialed"}


def words(text: str) -> list[str]:
    """The words of a text as they are compared: in lower case, numbers as words, without punctuation.

    Signs that are read are words, remarks in brackets are none, contractions are written out ("'s" as "is", also where
    it means a possessor: on both sides alike), hyphens separate. After section 4.4 of Radford et al. 2022
    (arXiv:2212.04356), where numbers become digits instead.

    >>> words("It's 21 calls, the 3rd [beep] OK?")
    ['it', 'is', 'twenty', 'one', 'calls', 'the', 'third', 'okay']
    """
    text = re.sub(r"\[[^]]*\]|\([^)]*\)", " ", text.lower().replace("\u2019", "'"))
    for short, long in _SHORT.items():
        text = re.sub(rf"{short}\b", long, text)
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)  # 1,000
    text = re.sub(r"\$\s?(\d+)(?:\.(\d\d))?", _dollars, text)
    text = re.sub(r"\b(\d+)(st|nd|rd|th)\b", lambda found: f" {ordinal(int(found[1]))} ", text)
    text = re.sub(r"\d+(?:\.\d+)?", lambda found: f" {_spoken(found[0])} ", text)
    for sign, word in _SIGNS.items():
        text = text.replace(sign, word)
    text = re.sub(r"['`]", "", text)
    return [_ALIKE.get(word, word) for word in re.findall(r"[^\W_]+", text)]


def cardinal(n: int) -> str:
    """A whole number below a million as it is said.

    >>> cardinal(8542)
    'eight thousand five hundred forty two'
    """
    if n >= 1000:
        return f"{cardinal(n // 1000)} thousand" + (f" {cardinal(n % 1000)}" if n % 1000 else "")
    if n >= 100:
        return f"{_ONES[n // 100]} hundred" + (f" {cardinal(n % 100)}" if n % 100 else "")
    if n >= 20:
        return _TENS[n // 10 - 2] + (f" {_ONES[n % 10]}" if n % 10 else "")
    return _ONES[n]


def ordinal(n: int) -> str:
    """Its place in an order.

    >>> ordinal(40), ordinal(42)
    ('fortieth', 'forty second')
    """
    *before, last = cardinal(n).split()
    last = _ORDINALS.get(last) or (f"{last[:-1]}ieth" if last.endswith("y") else f"{last}th")
    return " ".join([*before, last])


def _spoken(number: str) -> str:
    """A number; one that begins with 0, or has more than six digits, is read digit by digit."""
    whole, _, part = number.partition(".")
    digits = " ".join(_ONES[int(digit)] for digit in whole)
    said = digits if len(whole) > 6 or (len(whole) > 1 and whole[0] == "0") else cardinal(int(whole))
    return said + (f" point {' '.join(_ONES[int(digit)] for digit in part)}" if part else "")


def _dollars(found: re.Match[str]) -> str:
    dollars, cents = int(found[1]), int(found[2] or 0)
    said = [f"{n} {unit if n != 1 else unit[:-1]}" for n, unit in ((dollars, "dollars"), (cents, "cents")) if n]
    return " and ".join(said) or "0 dollars"


def word_errors(said: str, heard: str) -> tuple[int, int]:
    """Words put in, left out or exchanged at least (Levenshtein 1966), and the words that were said.

    >>> word_errors("press one now", "Press 1, now then")
    (1, 3)
    """
    truth, guess = words(said), words(heard)
    costs = list(range(len(guess) + 1))
    for i, word in enumerate(truth, 1):
        before, costs[0] = costs[0], i
        for k, other in enumerate(guess, 1):
            before, costs[k] = costs[k], min(costs[k] + 1, costs[k - 1] + 1, before + (word != other))
    return costs[-1], len(truth)
