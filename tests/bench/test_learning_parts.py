"""The parts of the learning benchmark: data read as it is, rivals that really learn, scores equal to naive ones."""

import bz2
import gzip
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from bench.learning import baselines, prompts, second_utility, tax
from bench.learning.data import DataMissingError, data_file
from bench.learning.hh_rlhf import Comparison, Message, is_held_out, read_comparisons, split
from bench.learning.second_utility import plain_utility
from deploy.models import make_tiny_llama
from deploy.simulation.prompts import load_prompts
from deploy.simulation.utility import load_utility, measure
from training.policy_model import load_model

torch.set_num_threads(1)

ASKED = "\n\nHuman: Is honey sweet?\n\nAssistant:"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder where data is looked for."""
    monkeypatch.setenv("ALIGND_TEST_DATA", str(tmp_path))
    return tmp_path


def write_hh(data: Path, source: str, records: list[tuple[str, str]]) -> None:
    path = data / "hh-rlhf" / f"{source}.test.jsonl.gz"
    path.parent.mkdir(exist_ok=True)
    lines = [json.dumps({"chosen": chosen, "rejected": rejected}) + "\n" for chosen, rejected in records]
    path.write_bytes(gzip.compress("".join(lines).encode()))


def write_self_instruct(data: Path, name: str, tasks: list[dict[str, object]]) -> None:
    path = data / "self-instruct" / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(task) + "\n" for task in tasks))


def task(instruction: str, output: str, given: str = "", *, is_classification: bool = False) -> dict[str, object]:
    instances = [{"input": given, "output": output}]
    return {"instruction": instruction, "instances": instances, "is_classification": is_classification}


def comparison(chosen: str, rejected: str, prompt: str = "Say something.") -> Comparison:
    return Comparison((Message("user", prompt),), chosen, rejected, "test")


# Data


def test_missing_data_is_named_with_the_variable_that_says_where_it_is(data: Path) -> None:
    with pytest.raises(DataMissingError, match=r"no hh-rlhf/x\.gz in .*set ALIGND_TEST_DATA"):
        data_file("hh-rlhf/x.gz")
    with pytest.raises(DataMissingError, match="helpful-base"):
        read_comparisons()


def test_a_comparison_is_the_shared_turns_and_two_last_answers(data: Path) -> None:
    talk = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Is honey\n\nsweet?\n\nAssistant: "
    write_hh(data, "helpful-base", [(talk + "It is.", talk + "No. ")])
    (found,) = read_comparisons(["helpful-base"]).comparisons
    turns = (Message("user", "Hi"), Message("assistant", "Hello!"), Message("user", "Is honey\n\nsweet?"))
    assert found == Comparison(turns, "It is.", "No.", "helpful-base")


def test_malformed_records_are_dropped_and_counted(data: Path) -> None:
    other = "\n\nHuman: Is salt sweet?\n\nAssistant: No."
    twice = "\n\nHuman: Is honey sweet?\n\nHuman: Well?\n\nAssistant: Yes."
    records = [
        (ASKED + " Yes.", ASKED + " No."),
        (ASKED + " Yes.", other),
        (ASKED + " Yes.", ASKED + " "),
        (ASKED + " Yes.", ASKED + "  Yes."),
        (twice, twice),
        ("Honey is sweet.", ASKED + " No."),
    ]
    write_hh(data, "harmless-base", records)
    found = read_comparisons(["harmless-base"])
    assert len(found.comparisons) == 1
    assert found.dropped == {
        "no shared prompt": 1,
        "empty completion": 1,
        "equal completions": 1,
        "turns do not alternate, or one is empty": 2,
    }


def test_split_is_by_first_turn_the_same_in_every_run_and_of_the_share_asked_for() -> None:
    comparisons = [comparison("a", "b", f"Prompt {i // 2}") for i in range(4000)]
    train, held_out = split(comparisons, share=0.25)
    assert (train, held_out) == split(comparisons, share=0.25)
    assert len(train) + len(held_out) == len(comparisons)
    assert {c.prompt for c in train}.isdisjoint(c.prompt for c in held_out)
    # 2000 prompts: three standard errors of a share of a quarter.
    assert abs(len(held_out) / 4000 - 0.25) < 3 * math.sqrt(0.25 * 0.75 / 2000)
    assert is_held_out(" Is  HONEY sweet? ") == is_held_out("is honey sweet?")
    again, _ = split(train, share=0.25, salt="validation")
    assert 0 < len(again) < len(train)


# Baselines


def test_length_learns_its_sign_from_the_training_data_alone() -> None:
    short_wins = [comparison("no", "no, not at all")] * 3 + [comparison("yes, a lot", "yes")]
    held_out = [comparison("longer one", "short"), comparison("same", "size"), comparison("s", "long"), *short_wins[3:]]
    found = baselines.length_baseline(short_wins, held_out)
    assert found.sign == -1
    assert (found.longer.value, found.longer.ties) == (2.5 / 4, 1)
    assert found.learnt.value == 1.5 / 4
    assert found.longer.low < found.longer.value < found.longer.high


def test_bag_of_words_learns_words_and_pairs_that_length_does_not_tell() -> None:
    """A word wins, unless "not" stands before it: only pairs of words tell."""
    train = [comparison(f"it is good {i}", f"good it is not {i}", f"Prompt {i}") for i in range(40)]
    held_out = [comparison("it is good now", "good it is not"), comparison("is good", "is not")]
    found = baselines.bag_of_words_baseline(train, held_out)
    assert found.accuracy.value == 1.0
    assert found.accuracy.low < 1.0
    assert set(found.validation) == set(baselines.L2_WEIGHTS)
    # All do equally well here, so the weights are kept as small as can be.
    assert found.l2_weight == max(baselines.L2_WEIGHTS)
    assert baselines.length_baseline(train, held_out).learnt.value < 1.0


def test_words_never_seen_are_a_tie() -> None:
    model = baselines.fit([comparison("good", "bad")] * 3, [0.1])[0.1]
    found = baselines.accuracy(model, [comparison("unheard", "of"), comparison("good", "bad")])
    assert (found.wins, found.ties, found.value) == (1, 1, 0.75)
    with pytest.raises(ValueError, match="at least one comparison"):
        baselines.accuracy(model, [])


def test_logistic_weights_are_where_the_gradient_of_the_loss_vanishes() -> None:
    torch.manual_seed(0)
    difference_NV, l2_weight = torch.randn(30, 5), 0.03
    weights_V = baselines.logistic_weights(difference_NV.to_sparse(), l2_weight).double()
    margin_N = difference_NV.double() @ weights_V
    gradient_V = -(torch.sigmoid(-margin_N)[:, None] * difference_NV).mean(0) + l2_weight * weights_V
    assert weights_V.abs().max() > 0.01
    torch.testing.assert_close(gradient_V, torch.zeros(5).double(), atol=1e-4, rtol=0)


def test_a_term_counts_by_the_log_of_one_more() -> None:
    model = baselines.BagOfWords({"so": 0, "so so": 1}, torch.tensor([1.0, -2.0]))
    assert baselines.terms("So, so: SO?") == {"so": 3, "?": 1, "so so": 2, "so ?": 1}
    difference_NV = baselines.differences([comparison("So so so", "so")], model.vocabulary).to_dense()
    torch.testing.assert_close(difference_NV, torch.tensor([[math.log(4) - math.log(2), math.log(3)]]))


# Alignment tax


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def model(folder: Path) -> PreTrainedModel:
    return load_model(folder)


@pytest.fixture
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


ITEMS = [
    tax.HellaSwagItem("Cooking: A man cuts a tomato. He", ("eats it.", "puts it in the soil again.", "is blue"), 0),
    tax.HellaSwagItem("Sleep: The room is dark and cool. She", ("sleeps", "goes to bed at the same time", "red"), 1),
    tax.HellaSwagItem("Why", ("is the sky blue?", "not?", ", then, do you garden so often"), 2),
]


def naive_logprob(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: str, ending: str) -> float:
    whole = tokenizer.encode(f"{context} {ending}", add_special_tokens=False)
    first = len(tokenizer.encode(context, add_special_tokens=False))
    logits_TV = model(torch.tensor([whole], device=model.device)).logits[0]
    logprobs_TV = torch.log_softmax(logits_TV.double(), -1)
    return sum(logprobs_TV[place - 1, whole[place]].item() for place in range(first, len(whole)))


def test_endings_scored_in_one_row_equal_a_loop_over_each(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.float()
    expected = [[naive_logprob(model, tokenizer, i.context, e) for e in i.endings] for i in ITEMS]
    found_NE = tax.ending_logprobs(model, tokenizer, ITEMS)
    torch.testing.assert_close(found_NE.double(), torch.tensor(expected).double(), atol=1e-3, rtol=0)
    # The same where every item is a batch of its own.
    monkeypatch.setattr(tax, "BATCH_TOKENS", 1)
    torch.testing.assert_close(tax.ending_logprobs(model, tokenizer, ITEMS), found_NE, atol=1e-3, rtol=0)


def test_accuracy_is_of_the_best_log_likelihood_per_character(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    model.float()
    best = []
    for item in ITEMS:
        scores = [naive_logprob(model, tokenizer, item.context, e) / len(e) for e in item.endings]
        best.append(scores.index(max(scores)))
    right = [tax.HellaSwagItem(i.context, i.endings, label) for i, label in zip(ITEMS, best, strict=True)]
    wrong = tax.HellaSwagItem(ITEMS[0].context, ITEMS[0].endings, (best[0] + 1) % 3)
    found = tax.hellaswag_accuracy(model, tokenizer, [*right, wrong])
    assert found.values == (1.0, 1.0, 1.0, 0.0)
    assert found.mean == 0.75
    assert found.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 3))


def test_loss_is_the_mean_over_each_window_alone(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    model.float()
    text = (
        "What is the best way to learn to cook at home? Start with a few simple meals <|im_end|> and make them often."
    )
    token_ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    found = tax.wikitext_loss(model, tokenizer, text, num_tokens=22, window=7)
    assert len(token_ids) > 22
    assert len(found.values) == 3
    for index, value in enumerate(found.values):
        window = token_ids[7 * index : 7 * index + 7]
        logits_TV = model(torch.tensor([window], device=model.device)).logits[0]
        logprobs_TV = torch.log_softmax(logits_TV.double(), -1)
        expected = -sum(logprobs_TV[i, token].item() for i, token in enumerate(window[1:])) / 6
        assert value == pytest.approx(expected, abs=1e-4)


def test_text_too_short_for_a_standard_error_is_refused(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ValueError, match="two values at least, not 1"):
        tax.wikitext_loss(model, tokenizer, "The sky is blue because the air scatters light.", num_tokens=10, window=8)


def test_change_is_paired() -> None:
    found = tax.change(tax.Measure((1.0, 5.0, 9.0)), tax.Measure((1.5, 5.5, 9.5)))
    assert (found.mean, found.standard_error) == (0.5, 0.0)
    with pytest.raises(ValueError, match="shorter"):
        tax.change(tax.Measure((1.0, 2.0, 3.0)), tax.Measure((1.0, 2.0)))


def test_wikitext_is_read_as_people_wrote_it(data: Path) -> None:
    raw = ' \n = Home = \n \n The co @-@ op sold 2 @,@ 500 loaves ( at $ 1 @.@ 50 ) ; she didn \'t say " no " , he said'
    (data / "wikitext-2").mkdir()
    (data / "wikitext-2" / "valid.txt.gz").write_bytes(gzip.compress(raw.encode()))
    text = '= Home =\n\nThe co-op sold 2,500 loaves (at $ 1.50); she didn\'t say "no", he said'
    assert tax.read_wikitext("valid") == text


def test_hellaswag_is_read_and_preprocessed_as_the_harness_does(data: Path) -> None:
    lines = ["Roof: A man sits [up]  here. he", "3", "a.", "b [substeps] c.", "d.", "e. "]
    lines += ["Home: How to rest [title] Lie down", "0", "w", "x\u2028y", "y", "z"]
    (data / "hellaswag").mkdir()
    path = data / "hellaswag" / "hellaswag_val_full.txt.bz2"
    path.write_bytes(bz2.compress("\n".join([*lines, ""]).encode()))
    assert sorted(tax.read_hellaswag(), key=lambda item: item.label) == [
        tax.HellaSwagItem("Home: How to rest. Lie down", ("w", "x\u2028y", "y", "z"), 0),
        tax.HellaSwagItem("Roof: A man sits  here. He", ("a.", "b c.", "d.", "e."), 3),
    ]
    path.write_bytes(bz2.compress("\n".join(lines[:-1]).encode()))
    with pytest.raises(ValueError, match="has 11 lines"):
        tax.read_hellaswag()
    with pytest.raises(ValueError, match="'4' is no label"):
        tax.parse_item(["Roof: x", "4", "a", "b", "c", "d"])


# Second utility

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


# Prompts

LONG = "This is what a person wrote, and it goes on for more than twenty words so that it is long enough to be shown."


def dialogue(prompt: str, answer: str) -> tuple[str, str]:
    return f"\n\nHuman: {prompt}\n\nAssistant: {answer}", f"\n\nHuman: {prompt}\n\nAssistant: No."


@pytest.fixture
def small_data(data: Path) -> Path:
    """Some of each: what should be taken, and what should not."""
    held_out = load_prompts("held_out")[0]
    hashed = next(p for p in (f"How do I polish trumpet {name}?" for name in "abcdefgh") if is_held_out(p))
    fact, snack, paris = prompts.FEW_SHOT_PROMPTS
    seeds = [
        task("Describe a violin to a child.", LONG),
        task("Explain this word to a beginner.", LONG, "origami"),
        task("Is this a fish or a bird?", "Fish", "trout", is_classification=True),
        task("Write a python program that prints a drum.", LONG),
        task("Name a planet.", "Mars"),
        task(held_out, LONG),
        task("Give me some names for a canoe club.", LONG),
        task(paris.split("\n\n")[0], LONG, paris.split("\n\n")[1]),
    ]
    write_self_instruct(data, "seed_tasks", seeds)
    write_self_instruct(data, "user_oriented_instructions", [task("Please suggest names for a canoe club.", LONG)])
    talks = [
        dialogue("How do I tune a banjo at home?", LONG + "\n\nHuman: And a lute?\n\nAssistant: Alike."),
        dialogue("Which tea is best for a picnic?", LONG + " Not that I know."),
        dialogue("How can I fold a paper crane?", LONG + " Which size?"),
        dialogue("Where do otters sleep?", "In kelp."),
        dialogue("How do I carve a spoon?", LONG.removesuffix(".")),
        dialogue(held_out, LONG),
        dialogue(hashed, LONG),
    ]
    write_hh(data, "helpful-base", talks)
    write_hh(data, "helpful-online", [dialogue(fact, LONG), dialogue(snack, LONG)])
    return data


def test_prompts_are_the_simulated_users_and_what_asks_for_prose(small_data: Path) -> None:
    train, held_out = prompts.train_prompts(703), prompts.held_out_prompts(201)
    extra = {
        "Describe a violin to a child.",
        "Explain this word to a beginner.\n\norigami",
        prompts.FEW_SHOT_PROMPTS[2],
    }
    assert set(train) == {*load_prompts("train"), *extra}
    assert set(held_out) == {*load_prompts("held_out"), "Please suggest names for a canoe club."}
    assert prompts.train_prompts(50) == train[:50]
    with pytest.raises(ValueError, match="there are 703 training prompts, not 704"):
        prompts.train_prompts(704)
    with pytest.raises(ValueError, match="there are 201 held-out prompts, not 202"):
        prompts.held_out_prompts(202)


def test_demonstrations_are_good_answers_to_prompts_that_are_not_held_out(small_data: Path) -> None:
    found = {each.prompt: each.source for each in prompts.demonstrations(6)}
    fact, snack, paris = prompts.FEW_SHOT_PROMPTS
    assert found == {
        "Describe a violin to a child.": "self-instruct",
        "Explain this word to a beginner.\n\norigami": "self-instruct",
        paris: "self-instruct",
        "How do I tune a banjo at home?": "hh-rlhf helpful-base",
        fact: "hh-rlhf helpful-online",
        snack: "hh-rlhf helpful-online",
    }
    assert {each.answer for each in prompts.demonstrations(6)} == {LONG}
    with pytest.raises(ValueError, match="there are 6 demonstrations, not 7"):
        prompts.demonstrations(7)


def test_few_shot_prefix_is_three_demonstrations_as_turns(small_data: Path) -> None:
    turns = prompts.few_shot_prefix()
    assert [turn.role for turn in turns] == ["user", "assistant"] * 3
    shown = {each.prompt: each.answer for each in prompts.demonstrations(6)}
    for asked, answered in zip(turns[::2], turns[1::2], strict=True):
        assert shown[asked.text] == answered.text
