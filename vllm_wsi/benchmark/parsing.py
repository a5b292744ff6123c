"""Which option an answer names, by strict written rules, so that everybody gets the same number.

The rules are tried in this order, and the first that finds a label decides. Where that rule finds two different labels,
the answer names none: it counts as wrong and is reported as unparsed.

1. `label`: the answer is the label alone, in either case, in any brackets, quotes, emphasis or punctuation: `B`, `b.`,
   `(B)`, `**B**`, `\\boxed{B}`, `{"answer": 2}`.
2. `statement`: "answer is", "answer:", "option is", "choose", "select", "pick" (or 答案, or an <answer> tag) and then a
   capital label; a lower-case one only in brackets, in bold or at the end of the answer: "the answer is a biopsy" names
   nothing. A bare "A" before a lower-case word is the article, but not before "because", "is", "or" and their like.
   Also a capital label before "is correct", "is right", "is the best", behind "option" or where a sentence begins.
3. `lead`: a line that begins with a capital label and a delimiter: `B. lobular`, `(B) lobular`, `B: lobular`,
   `B - lobular`. "A biopsy shows", "Based on", "B-cell lymphoma" have none.
4. `bracket`: a capital label in brackets, in bold or in a box anywhere: `It looks like (C)`.
5. `text`: the answer is an option's text, or holds one option's text as whole words, the longest first ("lung
   adenocarcinoma" hides "adenocarcinoma").

A label that is joined to one that was found, by a comma, a slash, "or" or "and", is found too: "the answer is B or C"
names two. What stands behind "not", "no", "cannot", "without", "rather than", "unlike", "exclude" or "rule out", or
before "is not" or "is wrong", is not named.

Never read as labels: the article "A", words that begin with a label, a label inside a term ("hepatitis B"), letters of
other scripts that look alike (Cyrillic А, В, С). Full-width letters are their Latin ones. What stands in
<think>...</think> is not part of the answer, nor what stands before a </think> whose <think> the template wrote.
Emphasis and LaTeX around words and labels make no difference, but that a label alone in bold or in a box is one in
brackets.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

STATED = (
    r"(?:\b(?:answer|option|choice|diagnosis|isup_grade)\b[^\w\n.:=]{0,4}"
    r"(?:\s*(?:is|would be|should be|must be)\b\s*:?|[:=])"
    r"|\b(?:choose|select|pick)\b(?:\s+(?:option|answer|choice))?|答案(?:是|为|：|:|\s)?)"
)
VERDICT = r"\s+(?:is|was|would be)\s+(?:the\s+)?(?:most\s+)?(?:correct|right|true|best|accurate|appropriate|likely)\b"
THOUGHTS = re.compile(r"\A.*</think>|<think>.*\Z", re.DOTALL)
ANNOUNCED = r"(?:(?:either|both)\s+)?(?:(?:the\s+)?(?:options?|choices?)\s+)?"  # between a statement and its label
APART = r"[^\w.,;:!?\n]+"  # between words of one clause
NEGATED = re.compile(
    r"(?:\b(?:not|no|cannot|never|neither|nor|without|than|unlike|excludes?|excluded|excluding|rul(?:e|es|ed|ing) out)"
    rf"|n['’ ]t){APART}(?:(?:an?|the|be|think|believe|say|that|options?|choices?){APART})*$",
    re.IGNORECASE,
)
DENIED = re.compile(
    r"[)\]]?\s+(?:(?:is|was)\s+(?:not|wrong|false|incorrect|excluded|unlikely|ruled out)|(?:isn|wasn)['’ ]t)\b"
)
CLAUSE = 200  # characters before a label that are searched for a negation; models repeat themselves without end
OPEN, CLOSE = r"[\(\[\{<\"'“‘«]", r"[\)\]\}>\"'”’»]"
JOINED = r"(?:[,;&]\s*(?:or|and)?|/(?!\s*\d)|\b(?:and/or|or|and)\b)"  # "3/5" is a grade of five, and no list
WHOLE = r"(?![\w-]|[.,]\d)"  # what follows a label: not the rest of a word, a term or a number
GOES_ON = (
    r"(?:because|since|as|for|due|given (?:the|that|this|these|its)|based|depending|here|in|on|from|with|and|or|are"
    r"|not|but|rather)\b"
)
WORD = rf"(?![ \t]+(?!{GOES_ON})[a-z0-9])"  # not followed by a word that a label would not have behind it
ARTICLE = rf"(?!(?<=[AI])[ \t]+(?!(?:is|was)\b|{GOES_ON})[a-z0-9])"
LATEX = re.compile(r"\\(text|textit|emph|mathrm|mathsf|textbf|mathbf|boxed|fbox)\s*\{([^{}]*)\}")
BOLD_LATEX = ("textbf", "mathbf", "boxed", "fbox")


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
    text = unicodedata.normalize("NFKC", THOUGHTS.sub("", output)).strip()
    text = _without_tags(text)
    if not text:
        return Parsed(None, "none")
    label = "(" + "|".join(map(re.escape, sorted(options, key=len, reverse=True))) + ")"
    any_case = f"(?i:{label})"
    plain = _without_emphasis(text, any_case)
    alone = rf"(?:\{{\s*\"?\w+\"?\s*:\s*)?{OPEN}*\s*{any_case}\s*[.:,;!。]?{CLOSE}*\s*[.:,;!。]?\s*{CLOSE}*"
    found = re.fullmatch(alone, plain)
    if found:
        return Parsed(found[1].upper(), "label")
    clear = rf"{OPEN}+{any_case}{CLOSE}|{any_case}\s*(?:[.。!]\s*|[)]\s*)?$"
    rules = {
        "statement": rf"(?i:{STATED})\s*(?i:{ANNOUNCED})(?:{OPEN}*{label}{WHOLE}{ARTICLE}|{clear})"
        rf"|(?:(?m:^)\s*|[.,;:!?]\s+|\b(?i:option|choice|answer)\s+){OPEN}*{label}{CLOSE}*(?i:{VERDICT})",
        "lead": rf"(?m)^\s*(?:{OPEN}*{label}(?:\s*[.:)](?=\D|$)|\s+[-–—]\s)|[(\[]{label}[)\]]|{label}\s*$)",
        "bracket": rf"(?<!\w)[(\[]{label}[)\]]",
    }
    joined = rf"\s*{JOINED}\s*(?i:{ANNOUNCED})(?:{OPEN}*{label}{WHOLE}{WORD}|{clear})"
    found_by = {rule: set(_named(plain, pattern, joined, options)) for rule, pattern in rules.items()}
    if found_by["lead"]:
        found_by["lead"] |= found_by["bracket"]  # "(A) or (B)"
    for rule, labels in found_by.items():
        if labels:
            return _single(labels, rule)
    return _by_text(text, options)


def _without_tags(text: str) -> str:
    """LaTeX as Markdown, tags of HTML as what they say."""
    text = re.sub(r"\\[()\[\]]", " ", text)
    while (changed := LATEX.sub(_as_markdown, text)) != text:
        text = changed
    text = re.sub(r"(?i)<answer>", " answer: ", re.sub(r"(?i)</answer>|</?(?:b|strong|i|em|p|br)\s*/?>", " ", text))
    return text.strip()


def _as_markdown(found: re.Match[str]) -> str:
    inside = found[2].strip() if found[1] in BOLD_LATEX else found[2]
    return f"**{inside}**" if found[1] in BOLD_LATEX else inside


def _without_emphasis(text: str, label: str) -> str:
    """A label alone in bold as one in brackets; else no marks of emphasis, code, mathematics or headings."""
    text = re.sub(rf"(?:(?<!\*)\*{{2,}}|(?<!\w)__){label}[.:)]*(?:\*{{2,}}|__(?!\w))", r"(\1)", text)
    return re.sub(r"[*`$]+|(?<!\w)_+|_+(?!\w)|(?m:^\s*#+)", "", text).strip()


def _named(plain: str, pattern: str, joined: str, options: Mapping[str, str]) -> Iterator[str]:
    """The labels that a rule finds, and those that are joined to them."""
    labels = "|".join(map(re.escape, options))
    reached = 0  # by the labels that are joined to an earlier one
    for match in re.finditer(pattern, plain):
        if match.start() < reached:
            continue
        before = plain[max(0, match.start() - CLAUSE) : match.start()]
        if NEGATED.search(re.sub(rf"(?:{OPEN}*\b(?:{labels})\b{CLOSE}*\s*{JOINED}\s*)+$", "", before)):
            continue  # "not (A)", and the B of "not (A) or (B)"
        more: re.Match[str] | None = match
        while more:
            label, reached = more[more.lastindex or 0].upper(), more.end(more.lastindex or 0)
            if not DENIED.match(plain, reached):
                yield label
            own_text = rf"(?:{CLOSE}|[.:])*(?:[\s–—-]*(?i:{re.escape(options[label])}))?{CLOSE}*"
            more = re.compile(own_text + joined).match(plain, reached)


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
        found = re.finditer(pattern, plain)
        if any(not (NEGATED.search(plain[: one.start()]) or DENIED.match(plain, one.end())) for one in found):
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
