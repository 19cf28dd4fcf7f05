"""Read text tokenizers of downloaded repositories as the one file that is stored with a policy."""

import json
from pathlib import Path

from vlarft.nets.vlm import SPECIAL_TOKENS, import_tokenizers
from vlarft.run.lfs import refuse_pointer

# Qwen2 splits text before the byte-pair merges: contractions, words, single digits, punctuation, line breaks, spaces.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_text_tokenizer(path: str | Path) -> bytes:
    """Return the content of a tokenizer.json, which is read, or made from vocab.json and merges.txt.

    Args:
        path: tokenizer.json, or a folder with it or with vocab.json and merges.txt.

    Raises:
        FileNotFoundError: none of these files.
        ValueError: vocab.json and merges.txt are not a byte-pair vocabulary.
        ImportError: the `tokenizers` package is missing.
    """
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.is_file():
        refuse_pointer(file)
        return file.read_bytes()
    vocabulary, merges = path / "vocab.json", path / "merges.txt"
    if not (vocabulary.is_file() and merges.is_file()):
        raise FileNotFoundError(
            f"no text tokenizer at {path}: expected tokenizer.json, or vocab.json and merges.txt; download them from "
            "the language model's repository and name the folder with --text"
        )
    return from_vocabulary(vocabulary, merges)


def from_vocabulary(vocabulary: Path, merges: Path) -> bytes:
    """Make a tokenizer.json like Qwen2's: byte-level BPE, and the three special tokens after the vocabulary."""
    tokenizers = import_tokenizers()
    refuse_pointer(vocabulary)
    refuse_pointer(merges)
    try:
        ids = json.loads(vocabulary.read_text(encoding="utf-8"))
        lines = merges.read_text(encoding="utf-8").splitlines()
        pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ids, pairs))
    except Exception as error:
        raise ValueError(f"{vocabulary} and {merges.name} make no byte-pair vocabulary: {error}") from error
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    words = tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated")
    pieces = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([words, pieces])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer.to_str().encode()
