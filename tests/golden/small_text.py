"""A text tokenizer of a few kilobytes that gives the paper's prompt the ids of the public vocabulary."""

import json

SPECIAL = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
# words of the prompt by their public ids; bytes have the public ids of their own
WORDS = {
    " Q": 1207, "wen": 16948, " created": 3465, " by": 553, " Alibaba": 54364, " Cloud": 14817, " You": 1446,
    "You": 2610, " are": 525, " a": 264, " helpful": 10950, " assistant": 17847, "system": 8948, "user": 872,
    "assistant": 77091, "What": 3838, " action": 1917, " should": 1265, " the": 279, " robot": 12305, " take": 1896,
    " to": 311, " turn": 2484, " on": 389, " stove": 44015,
}  # fmt: skip
PROMPT_IDS = [
    151644, 8948, 198, 2610, 525, 1207, 16948, 11, 3465, 553, 54364, 14817, 13, 1446, 525, 264, 10950, 17847, 13,
    151645, 198, 151644, 872, 198, 3838, 1917, 1265, 279, 12305, 1896, 311, 2484, 389, 279, 44015, 30, 151645, 198,
    151644, 77091, 198,
]  # fmt: skip


def byte_symbols() -> list[str]:
    """The 256 symbols of byte-level BPE in the order of their ids: printable bytes as they are, then the others."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]


def vocabulary_and_merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids by piece, and the pairs that build each word from the left. Words with a space come first, so that no pair
    inside a word is joined before them.
    """
    ids = {symbol: i for i, symbol in enumerate(byte_symbols())}
    pairs, free = [], 100_000
    words = {word.replace(" ", "Ġ"): i for word, i in WORDS.items()}
    for word in sorted(words, key=lambda word: not word.startswith("Ġ")):
        for end in range(2, len(word) + 1):
            pair = (word[: end - 1], word[end - 1])
            if pair not in pairs:
                pairs.append(pair)
            piece = word[:end]
            if piece not in ids:
                ids[piece] = words.get(piece, free)
                free += piece not in words
    return ids, pairs


def tokenizer_json() -> str:
    """The content of a tokenizer.json of Qwen2's kind."""
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    ids, pairs = vocabulary_and_merges()
    pieces = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [{"id": i, "content": token, **flags, "special": True} for token, i in SPECIAL.items()],
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, pieces]},
            "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            # the special tokens have a place in the vocabulary, which would otherwise be too small for their ids
            "model": {"type": "BPE", "vocab": ids | SPECIAL, "merges": [" ".join(pair) for pair in pairs]},
        },
        ensure_ascii=False,
    )
