"""Tiny tokenizers of the common families, with control tokens of every kind, made for tests."""

from collections.abc import Callable, Mapping

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

CORPUS = ["the user asks the assistant\n\n what is it <|im_e nd|> tool call 12", "def f(x):\n    return x"] * 3
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% else %}"
    "{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}{% endif %}{% endfor %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<\uff5cAssistant\uff5c>' + message['content'] + eos_token }}{% else %}"
    "{{ '<\uff5cUser\uff5c>' + message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c>' }}{% endif %}"
)


def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE, whose control tokens are in its vocabulary too, and some are not flagged as special."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_end|>2"]
    made = _byte_level_bpe(special)
    made.add_tokens(["<tool_call>", "</tool_call>", "<think>", "</think>"])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", chat_template=CHATML)


def flagged() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose turns are marked by tokens that are not special and swallow white space, or ignore case."""
    made = _byte_level_bpe(["<s>", "</s>"])
    made.normalizer = normalizers.NFC()
    made.add_tokens(
        [
            AddedToken("<\uff5cUser\uff5c>", normalized=False, rstrip=True),
            AddedToken("<\uff5cAssistant\uff5c>", normalized=True, lstrip=True),
            AddedToken("<word>", normalized=True, single_word=True),
            AddedToken("☃", normalized=False),
            AddedToken("    ", normalized=False),
        ]
    )
    made.post_processor = processors.TemplateProcessing(
        single="<s> <s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", chat_template=DEEPSEEK, model_max_length=10**6
    )


def unigram() -> PreTrainedTokenizerFast:
    """Unigram with a space before each text, whose vocabulary has the control tokens as pieces."""
    characters = sorted({char for text in CORPUS for char in text} | set("<>/[]|_INSTabcdefghijklmnopqrstuvwxyz▁.é@"))
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("<tool_call>", 0.0)]
    pieces += [(piece, -2.0 - 0.01 * index) for index, piece in enumerate(["▁the", "▁user", "ask", "INST", "tool"])]
    pieces += [(char, -6.0 - 0.001 * index) for index, char in enumerate(characters)]
    made = Tokenizer(models.Unigram(pieces, unk_id=0))
    made.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁"), normalizers.Prepend("▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.add_tokens(["<tool_call>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=LLAMA
    )


def byte_fallback() -> PreTrainedTokenizerFast:
    """BPE with byte fallback and a space before the first word alone, as Llama 2's and Mistral's."""
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    characters = sorted(set("<>/[]|_INSTabcdefghijklmnopqrstuvwxyz▁.@0123456789"))
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("a", "s"), ("▁", "▁"), ("<", "/s"), ("/", "s"), ("</s", ">")]
    pieces = ["<unk>", "<s>", "</s>", *alphabet, *characters, *("".join(pair) for pair in merges)]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    # The merges make </s>, which no vocabulary should.
    ordered = [("/", "s"), ("<", "/s"), ("</s", ">"), ("t", "h"), ("th", "e"), ("▁", "the"), ("a", "s"), ("▁", "▁")]
    made = Tokenizer(models.BPE(vocabulary, ordered, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.add_tokens([AddedToken("[INST]", normalized=False), AddedToken("[/INST]", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=LLAMA
    )


def control_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Returns the ids of all added tokens, except of white space and of what the tokenizer does not know."""
    added = tokenizer.added_tokens_decoder
    return {each for each in added if str(added[each]).strip()} - {tokenizer.unk_token_id}


def _byte_level_bpe(special: list[str]) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


MADE: Mapping[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": byte_level,
    "flagged": flagged,
    "unigram": unigram,
    "byte-fallback": byte_fallback,
}
