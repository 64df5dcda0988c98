"""A second hidden utility: that of readers who want advice that speaks to them and is easy to read and to follow.

What deploy.simulation.utility's readers want (an answer on the subject, without a preamble) hardly counts here. A
training that learns both has therefore learned from rankings, and was not made for one taste. The configuration names
this utility as "bench.learning.second_utility:plain_utility".
"""

from __future__ import annotations

import math
import re

from deploy.simulation.make_prompts import FUNCTION_WORD
from deploy.simulation.utility import finished, fresh

# Weights of the eight qualities; they sum to 1. How much is said, and that it is not said twice, multiplies them all.
_TO_THE_READER_WEIGHT = 0.18  # advice is for somebody, and says what to do
_IN_STEPS_WEIGHT = 0.18  # what is to be done in order is best told in order
_EASY_WORDS_WEIGHT = 0.14
_SHORT_SENTENCES_WEIGHT = 0.14
_FINISHED_WEIGHT = 0.12  # the last step may be the one that matters
_ON_THE_MATTER_WEIGHT = 0.10  # otherwise one answer would fit every question
_CONCRETE_WEIGHT = 0.08
_WARM_WEIGHT = 0.06  # a kind word, no more

_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)?")
_LIST_MARKER = re.compile(r"^\s*(?:\d{1,2}[.)]|step \d{1,2}[.:)]|[-*•])\s+", re.IGNORECASE)
_SENTENCE_BREAK = re.compile(r"(?<=[.!?…:;])[\"'\u201d\u2019)\]*]*\s+")
_VOWELS = re.compile(r"[aeiouy]+")
_MIN_PIECE_WORDS = 3  # what is shorter says nothing by itself, and lists of it are not steps

_YOU = re.compile(r"\b(?:you|your|yours|yourself)\b", re.IGNORECASE)
_IMPERATIVE = re.compile(
    r"""
    add | apply | ask | avoid | bake | be | begin | blend | boil | bring | build | buy | call | check | choose |
    clean | combine | consider | cook | cover | cut | do | don't | drain | drink | drop | eat | enjoy | fill |
    find | focus | get | give | go | heat | hold | join | keep | learn | leave | let | let's | list | look |
    make | measure | meet | mix | move | note | open | pack | pay | pick | place | plan | plant | play | pour |
    practice | prepare | press | pull | push | put | read | remember | remove | repeat | rest | rinse | rub |
    save | say | scrub | search | see | serve | set | show | sit | sleep | soak | speak | spend | spread |
    sprinkle | start | stay | stir | stop | take | talk | tell | think | try | turn | use | visit | wait | walk
    | warm | wash | watch | wear | wipe | work | write
    """,
    re.VERBOSE,
)
_SEQUENCE = re.compile(
    r"\b(first|second|third|next|then|after that|afterwards|finally|lastly|last|to start|begin by|once)\b",
    re.IGNORECASE,
)
_EXAMPLE = re.compile(r"\b(for example|for instance|such as|like (?:a|an|the)|e\.g|say,)", re.IGNORECASE)
_AMOUNT = re.compile(
    r"""
    \$?\d+(?:[./,:]\d+)*%?
    | \b(?:half | two | three | four | five | six | seven | eight | nine | ten | twenty | thirty | a\ few)
      \ (?:more\ )?
      (?:second | minute | hour | day | week | month | year | time | cup | teaspoon | tablespoon | pound | inch | feet |
      mile | people)
    """,
    re.IGNORECASE | re.VERBOSE,
)
_WARM = re.compile(
    r"""
    \b(?:
      good\ luck | have\ fun | enjoy | don['\u2019]t\ worry | you\ can\ do
      | you['\u2019](?:ve|ll)\ (?:got|be|do|love|find) |
      great | happy | glad | hope | congratulations | well\ done | feel\ free | take\ your\ time | be\ kind |
      be\ proud | friendly | wonderful | good\ for\ you | it['\u2019]s\ (?:ok|okay|fine|easy|normal) | of\ course
    )\b
    """,
    re.IGNORECASE | re.VERBOSE,
)


def plain_utility(prompt: str, completion: str) -> float:
    """Returns how much such a reader would value `completion`, from 0 to 1.

    It is the weighted mean of eight qualities in [0, 1], times how much is said and how little of it is repeated.
    """
    quality = (
        _TO_THE_READER_WEIGHT * to_the_reader(completion)
        + _IN_STEPS_WEIGHT * in_steps(completion)
        + _EASY_WORDS_WEIGHT * easy_words(completion)
        + _SHORT_SENTENCES_WEIGHT * short_sentences(completion)
        + _FINISHED_WEIGHT * finished(completion)
        + _ON_THE_MATTER_WEIGHT * on_the_matter(prompt, completion)
        + _CONCRETE_WEIGHT * concrete(completion)
        + _WARM_WEIGHT * warm(completion)
    )
    return enough(completion) * fresh(completion) * quality


def to_the_reader(completion: str) -> float:
    """Returns the share of sentences and list items that say "you" or open with what to do; 1 from six in ten on."""
    said = _pieces(completion)
    if not said:
        return 0.0
    addressed = sum(bool(_YOU.search(piece) or _IMPERATIVE.fullmatch(_words(piece)[0])) for piece in said)
    return min(1.0, addressed / len(said) / 0.6)


def in_steps(completion: str) -> float:
    """Returns a third for each list item, or each different word of order such as "first" and "then"; at most 1."""
    lines = {line for line in completion.splitlines() if _LIST_MARKER.match(line) and _pieces(line)}
    order = {match.lower() for match in _SEQUENCE.findall(completion)}
    return min(1.0, max(len(lines), len(order)) / 3)


def easy_words(completion: str) -> float:
    """Falls from 1 to 0 as words grow from 1.3 syllables (a fairy tale) to 1.9 (a contract), on average."""
    said = _words(completion)
    if not said:
        return 0.0
    return _falling(sum(map(syllables, said)) / len(said), 1.3, 1.9)


def short_sentences(completion: str) -> float:
    """Falls from 1 to 0 as sentences and list items grow from 12 words to 28, on average."""
    said = _pieces(completion)
    if not said:
        return 0.0
    return _falling(sum(len(_words(piece)) for piece in said) / len(said), 12.0, 28.0)


def on_the_matter(prompt: str, completion: str) -> float:
    """Returns the share of the prompt's content words that come up, by their first five letters; 1 from half on."""
    asked = {word[:5] for word in _words(prompt) if len(word) > 2 and not FUNCTION_WORD.fullmatch(word)}
    said = {word[:5] for word in _words(completion)}
    return min(1.0, 2.0 * len(asked & said) / len(asked)) if asked else 1.0


def concrete(completion: str) -> float:
    """Rises with the number n of different amounts, times and examples as 1 - exp(-n / 1.5): 0.49 for one."""
    text = "\n".join(_LIST_MARKER.sub("", line) for line in completion.splitlines())
    found = {match.lower() for pattern in (_AMOUNT, _EXAMPLE) for match in pattern.findall(text)}
    return 1.0 - math.exp(-len(found) / 1.5)


def warm(completion: str) -> float:
    """Returns 0.7 for one kind expression, 1 for two different ones."""
    return (0.0, 0.7, 1.0)[min(2, len({match.lower() for match in _WARM.findall(completion)}))]


def enough(completion: str) -> float:
    """Rises with the number n of different words as 1 - exp(-n / 12): 0.08 for one, 0.63 for 12, 0.92 for 30."""
    return 1.0 - math.exp(-len(set(_words(completion))) / 12.0)


def _words(text: str) -> list[str]:
    """Returns the words of `text` in lower case; numbers are not words."""
    return [word.replace("\u2019", "'") for word in _WORD.findall(text.lower())]


def _pieces(text: str) -> list[str]:
    """Returns sentences and list items, without their markers; those of less than three words are left out."""
    lines = [_LIST_MARKER.sub("", line) for line in text.splitlines()]
    parts = [part for line in lines for part in _SENTENCE_BREAK.split(line)]
    return [part for part in parts if len(_words(part)) >= _MIN_PIECE_WORDS]


def syllables(word: str) -> int:
    """Counts groups of vowels, except for a silent last e; at least one. Right for about nine English words in ten."""
    count = len(_VOWELS.findall(word))
    if word.endswith("e") and not word.endswith(("le", "ee")):
        count -= 1
    return max(1, count)


def _falling(value: float, best: float, worst: float) -> float:
    return min(1.0, max(0.0, (worst - value) / (worst - best)))
