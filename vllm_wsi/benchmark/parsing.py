"""Which option an answer names, by strict written rules, so that everybody gets the same number.

The rules are tried in this order, and the first that finds a label decides. Where that rule finds two different labels,
the answer names none: it counts as wrong and is reported as unparsed.

1. `label`: the answer is the label alone, in either case, in any brackets, quotes, emphasis or punctuation: `B`, `b.`,
   `(B)`, `**B**`, `\\boxed{B}`, `{"answer": 2}`.
2. `statement`: "answer is", "answer:", "option is", "choose", "select", "pick" (or 答案) and then a capital label; a
   lower-case one only in brackets or at the end of the answer: "the answer is a biopsy" names nothing.
3. `lead`: a line that begins with a capital label and a delimiter: `B. lobular`, `(B) lobular`, `B: lobular`,
   `B - lobular`. "A biopsy shows", "Based on", "B-cell lymphoma" have none.
4. `bracket`: a capital label in brackets or emphasis anywhere: `It looks like (C)`.
5. `text`: the answer is an option's text, or holds one option's text as whole words, the longest first ("lung
   adenocarcinoma" hides "adenocarcinoma"); not behind "not", "no", "without", "rather than" or "unlike".

Never read as labels: the article "A", words that begin with a label, a label inside a term ("hepatitis B"), letters of
other scripts that look alike (Cyrillic А, В, С). Full-width letters are their Latin ones. What stands in
<think>...</think> is not part of the answer.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import NamedTuple

STATED = (
    r"(?:\b(?:answer|option|choice|diagnosis|isup_grade)\b[^\w\n.:=]{0,4}"
    r"(?:\s*(?:is|would be|should be|must be)\b\s*:?|[:=])"
    r"|\b(?:choose|select|pick)\b(?:\s+(?:option|answer|choice))?|答案(?:是|为|：|:|\s)?)"
)
NEGATED = re.compile(r"\b(?:not|no|without|than|unlike|excludes?|excluded|excluding)\W+(?:an?\W+)?$", re.IGNORECASE)
OPEN, CLOSE = r"[\(\[\{<\"'“‘«*_`$]", r"[\)\]\}>\"'”’»*_`$]"


class Parsed(NamedTuple):
    """What an answer names."""

    label: str | None  # None: nothing, or more than one
    rule: str  # of the module's list; "none", or "ambiguous"


def parse_label(output: str, options: Mapping[str, str]) -> Parsed:
    """The label of the option that an answer names, by the rules of this module.

    Args:
        output: the whole answer.
        options: label -> text; labels are capital letters or whole numbers.
    """
    text = unicodedata.normalize("NFKC", re.sub(r"<think>.*?(?:</think>|\Z)", "", output, flags=re.DOTALL)).strip()
    if not text:
        return Parsed(None, "none")
    by_length = sorted(options, key=len, reverse=True)
    label = "(" + "|".join(map(re.escape, by_length)) + ")"
    any_case = f"(?i:{label})"
    alone = rf"\$?(?:\\boxed|\{{\s*\"?\w+\"?\s*:\s*)?{OPEN}*\s*{any_case}\s*[.:,;!。]?{CLOSE}*\s*[.:,;!。]?\s*{CLOSE}*"
    found = re.fullmatch(alone, text)
    if found:
        return Parsed(found[1].upper(), "label")
    rules = {
        "statement": [
            rf"(?i:{STATED})\s*(?i:option\s+)?{OPEN}*{label}(?![\w-])",
            rf"(?i:{STATED})\s*(?i:option\s+)?(?:{OPEN}+{any_case}{CLOSE}|{any_case}\s*(?:[.。!]\s*|[)]\s*)?$)",
        ],
        "lead": [
            rf"(?m)^\s*(?:{OPEN}*{label}(?:\s*[.:)](?=\D|$)|\s+[-–—]\s))",
            rf"(?m)^\s*(?:[(\[]{label}[)\]]|\*\*{label}[.:)]*\*\*)(?!\s*(?:or|and)\b)",
            rf"(?m)^\s*{label}\s*$",
        ],
        "bracket": [rf"(?<!\w)[(\[]{label}[)\]]", rf"\*\*{label}[.)]?\*\*"],
    }
    found_by = {
        rule: {
            next(group for group in match.groups() if group).upper()
            for pattern in patterns
            for match in re.finditer(pattern, text)
        }
        for rule, patterns in rules.items()
    }
    if found_by["lead"]:
        found_by["lead"] |= found_by["bracket"]  # "(A) or (B)"
    for rule, labels in found_by.items():
        if labels:
            return _single(labels, rule)
    return _by_text(text, options)


def _by_text(text: str, options: Mapping[str, str]) -> Parsed:
    plain, texts = normalise(text), {label: normalise(option) for label, option in options.items()}
    same = {label for label, option in texts.items() if option and option == plain}
    if same:
        return _single(same, "text")
    labels = set()
    for label in sorted(texts, key=lambda key: len(texts[key]), reverse=True):
        option = texts[label]
        if not option:
            continue
        pattern = rf"(?<!\S){re.escape(option)}(?!\S)"
        if any(not NEGATED.search(plain[: match.start()]) for match in re.finditer(pattern, plain)):
            labels.add(label)
        plain = re.sub(pattern, "\N{REPLACEMENT CHARACTER}", plain)  # a shorter option must not be found inside it
    return _single(labels, "text") if labels else Parsed(None, "none")


def _single(labels: Iterable[str], rule: str) -> Parsed:
    first, *others = sorted(labels)
    return Parsed(None, "ambiguous") if others else Parsed(first, rule)


def normalise(text: str) -> str:
    """Lower case, full-width as Latin, words parted by single spaces, no punctuation but what stands inside numbers."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\d+(?:[.,]\d+)+|[\w+%<>=/]+", folded))
