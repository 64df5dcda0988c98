"""The second hidden utility prefers what its reader would."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.learning import second_utility
from bench.learning.second_utility import plain_utility
from deploy.simulation.utility import load_utility, measure

QUESTION = "How do I get a wine stain out of my carpet?"
STEPS = (
    "Don't worry, you can save your carpet.\n"
    "1. Blot the stain with a dry cloth for two minutes.\n"
    "2. Mix one cup of cold water with a little dish soap.\n"
    "3. Dab it on the stain, then rinse and let it dry."
)
PLAIN = "You can blot the stain with a cloth. Then pour cold water on the carpet and dab it dry."
STIFF = (
    "The remediation of tannin-based discolorations within textile floor coverings necessitates the immediate "
    "application of absorbent materials, subsequent to which commercially available enzymatic preparations are "
    "customarily administered in accordance with manufacturer recommendations regarding the stain and the carpet."
)


@pytest.mark.parametrize(
    ("fault", "worse", "better"),
    [
        ("prose, not steps", PLAIN, STEPS),
        ("stiff words and one long sentence", STIFF, PLAIN),
        ("empty", "", STIFF),
        ("one word", "Vinegar.", PLAIN),
        ("cut off", STEPS[: STEPS.rindex("stain")], STEPS),
        ("about something else", STEPS.replace("stain", "lawn").replace("carpet", "garden"), STEPS),
        ("said three times", "\n".join([STEPS] * 3), STEPS),
        ("about nobody", PLAIN.replace("You can blot", "People blot").replace("Then pour", "Some pour"), PLAIN),
        ("nothing but list marks", "1. 2. 3. 4. 5.\n- \n- \n- ", PLAIN),
        ("nothing but the reader", "You. Your. You. Yourself. You! You? Your. You.", PLAIN),
        ("the prompt said again", QUESTION, PLAIN),
        ("the same letters in another order", " ".join(sorted(STEPS.split())), STEPS),
        ("vague", PLAIN.replace("cold", "some"), PLAIN + " Wait ten minutes."),
        ("cold", STEPS.replace("Don't worry, you", "You"), STEPS),
    ],
)
def test_second_utility_ranks_the_worse_below_the_better(fault: str, worse: str, better: str) -> None:
    assert plain_utility(QUESTION, worse) < plain_utility(QUESTION, better) - 0.01, fault


@given(st.text(), st.text())
def test_second_utility_and_its_qualities_lie_between_0_and_1(prompt: str, completion: str) -> None:
    assert 0.0 <= plain_utility(prompt, completion) <= 1.0
    assert 0.0 <= second_utility.on_the_matter(prompt, completion) <= 1.0
    for quality in (
        second_utility.to_the_reader,
        second_utility.in_steps,
        second_utility.easy_words,
        second_utility.short_sentences,
        second_utility.concrete,
        second_utility.warm,
        second_utility.enough,
    ):
        assert 0.0 <= quality(completion) <= 1.0


def test_weights_sum_to_one_and_config_finds_the_utility() -> None:
    weights = [value for name, value in vars(second_utility).items() if name.endswith("_WEIGHT")]
    assert len(weights) == 8
    assert sum(weights) == pytest.approx(1.0)
    assert load_utility("bench.learning.second_utility:plain_utility") is plain_utility
    assert measure(plain_utility, QUESTION, [STEPS]) == [plain_utility(QUESTION, STEPS)]


def test_length_alone_does_not_please() -> None:
    longer = STIFF + " " + STIFF.replace("The remediation", "Furthermore, the elimination").replace("carpet", "fabric")
    assert plain_utility(QUESTION, longer) < plain_utility(QUESTION, PLAIN)


@pytest.mark.parametrize(
    ("word", "count"), [("the", 1), ("take", 1), ("water", 2), ("little", 2), ("carpet", 2), ("coffee", 2), ("hmm", 1)]
)
def test_syllables(word: str, count: int) -> None:
    assert second_utility.syllables(word) == count
