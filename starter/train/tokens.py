"""A small CLIP tokenizer: byte pairs learned from the corpus texts, padding id 0, end-of-text with the highest id."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex as Pattern
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

PAD, START, END = "<|pad|>", "<|startoftext|>", "<|endoftext|>"
CONTEXT_LENGTH = 24
CLIP_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def learn_tokenizer(texts: Iterable[str], *, vocab_size: int) -> CLIPTokenizer:
    """Learn a CLIPTokenizer with at most `vocab_size` entries, including 512 byte symbols and 3 special tokens.

    End-of-text has the highest id, because open_clip pools the text at `argmax` of the ids.
    """
    bpe = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Pattern(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 3 - len(alphabet),
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        min_frequency=1,
    )
    bpe.train_from_iterator(texts, trainer)
    learned: dict[str, int] = bpe.get_vocab()
    symbols = [*alphabet, *(f"{symbol}</w>" for symbol in alphabet)]
    merged = sorted(learned.keys() - set(symbols), key=learned.__getitem__)
    tokens = [PAD, *symbols, *merged, START, END]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=_merges(bpe),
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=PAD,
        model_max_length=CONTEXT_LENGTH,
    )


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(str(folder))


def _merges(bpe: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
