"""Makes prompts.jsonl from a folder that holds HH-RLHF's helpful-base.test.jsonl.gz.

python -m deploy.simulation.make_prompts FOLDER
"""

from __future__ import annotations

import gzip
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

_SOURCE_FILE = "helpful-base.test.jsonl.gz"
_NUM_TRAIN, _NUM_HELD_OUT = 700, 200
_MIN_CHARACTERS, _MAX_CHARACTERS = 15, 200
_NEAR_DUPLICATE = 0.5  # share of content words two prompts may have in common (Jaccard) before one is dropped
_SEED = 20220412  # the day HH-RLHF was published

# The prompts are shown in public, so anything that may touch harm, crime, drugs, sex, hate, politics, grave illness or
# a private person is dropped. Beginnings of words; crude on purpose, for there are more than enough prompts.
UNWANTED_WORD = re.compile(
    r"""\b(?:
    abus | accus | alcohol | ammo | amputat | anal | arrest | ass | assault | attack | bastard | beer | biden |
    bipolar | bitch | bleed | blood | bomb | booz | breakdown | breast | burgl | cancer | cannabis | cheat | chok |
    cigar | clinton | cocaine | condom | corpse | covid | crack | crim | cyst | damn | dead | death | democrat |
    depress | diarrhea | die | dies | dirt | divorc | dope | drug | drunk | dying | ecstasy | erot | evict | explos
    | fake | fart | fat | fetish | fight | fire | fleas | fraud | fuck | gambl | gay | gender | genital | gun | hack
    | hate | hell | herpes | hijack | hitler | hiv | holocaust | homeless | hurt | illegal | immigra | infect |
    injur | insult | jail | jealous | jesus | jew | kidnap | kidney | kill | kiss | knife | lawsuit | lesbian |
    lewis | liquor | lithium | loan | marijuana | meth | murder | muslim | naked | nazi | nicotine | nud | obama |
    opioid | overdos | pain | parole | pee | penis | pimp | pirat | pistol | plague | poison | polic | politic |
    poop | porn | pregnan | prison | prostit | pubic | puk | racis | rapist | rash | rectal | religio | republican |
    rob | satan | sedat | sex | shit | shoot | shot | slave | slavery | slut | smok | sober | spank | sperm | spy |
    stab | stalk | steal | steroid | stolen | strangl | stripper | stupid | suck | sue | suicid | swear | sword |
    teen | terror | theft | thief | threat | tobacco | toilet | tonsil | torrent | tortur | trump | ugly | underwear
    | urin | vaccin | vagina | vap | victim | violen | virgin | vodka | vomit | war | weapon | weed | weight | whisk
    | wine | womb | wound
    )\w{0,5}\b""",
    re.IGNORECASE | re.VERBOSE,
)
PRIVATE = re.compile(r"(?i)@|https?:|www\.|\d{5,}|\b(?:my name is|i live (?:in|at|on)|who (?:is|was|are)|who's)\b")
TALKS_TO_MODEL = re.compile(
    r"(?i)\b(?:assistant|chatbot|your (?:name|opinion|favou?rite)|are you|do you (?:like|have))\b"
)
_ENGLISH_WORD = re.compile(r"(?i)\b(?:the|a|an|is|are|do|does|to|of|in|for|how|what|why|i|can|you|my|me)\b")
FUNCTION_WORD = re.compile(
    r"""
    a | about | am | an | and | any | are | as | at | be | been | best | can | could | did | do | does | for | from
    | get | give | good | had | has | have | help | hi | hello | how | i | i'd | i'm | if | in | into | is | it |
    know | like | ll | looking | make | me | more | most | much | my | need | of | on | or | please | should | so |
    some | something | tell | than | that | the | their | them | there | they | thing | things | this | to | up |
    use | want | was | way | ways | we | were | what | what's | when | where | which | who | why | will | with |
    would | you | your
    """,
    re.VERBOSE,
)


def main(folder: Path) -> None:
    """Writes prompts.jsonl beside this module, and prints how many prompts each filter kept."""
    turns = list(_first_turns(folder / _SOURCE_FILE))
    fit = [turn for turn in dict.fromkeys(turns) if is_fit(turn)]
    random.Random(_SEED).shuffle(fit)
    distinct = without_near_duplicates(fit)
    if len(distinct) < _NUM_TRAIN + _NUM_HELD_OUT:
        raise SystemExit(f"{len(distinct)} prompts are left of {len(turns)}: fewer than {_NUM_TRAIN + _NUM_HELD_OUT}")
    splits = ["held_out"] * _NUM_HELD_OUT + ["train"] * _NUM_TRAIN
    records = [{"split": split, "prompt": prompt} for split, prompt in zip(splits, distinct, strict=False)]
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    Path(__file__).with_name("prompts.jsonl").write_text(text, encoding="utf-8")
    sys.stdout.write(f"{len(turns)} first turns, {len(fit)} fit, {len(distinct)} distinct, {len(records)} kept\n")


def _first_turns(path: Path) -> Iterator[str]:
    """Yields the first human turn of each dialogue, with white space collapsed."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            dialogue = json.loads(line)["chosen"]
            yield " ".join(dialogue.split("\n\nAssistant:")[0].removeprefix("\n\nHuman:").split())


def is_fit(prompt: str) -> bool:
    """Whether a prompt is English, neither short nor long, and fit for a public page."""
    return (
        _MIN_CHARACTERS <= len(prompt) <= _MAX_CHARACTERS
        and sum(character.isascii() for character in prompt) >= 0.97 * len(prompt)
        and _ENGLISH_WORD.search(prompt) is not None
        and not any(pattern.search(prompt) for pattern in (UNWANTED_WORD, PRIVATE, TALKS_TO_MODEL))
    )


def without_near_duplicates(prompts: Iterable[str]) -> list[str]:
    """Returns the prompts without those that share too many content words with an earlier one."""
    kept: list[tuple[str, set[str]]] = []
    for prompt in prompts:
        said = re.findall(r"[a-z0-9']+", prompt.lower())
        words = {word.rstrip("s") for word in said if not FUNCTION_WORD.fullmatch(word)}
        if words and all(len(words & other) < _NEAR_DUPLICATE * len(words | other) for _, other in kept):
            kept.append((prompt, words))
    return [prompt for prompt, _ in kept]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
