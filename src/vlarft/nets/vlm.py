"""Vision-language model: camera images and an instruction -> context z for the action head (Eq. 1).

The token sequence is first text token | patches of every camera | other text tokens | action queries | padding, read
causally by the decoder of `transformer.py` with Qwen2's options. The context is the last hidden state at the patches
and at the learned action queries.

Models trained from scratch read text as bytes; models with public weights read Qwen's prompt through the byte-level BPE
of a tokenizer file that is part of the model (`text_file_bytes`).

Shapes: B batch, V cameras, N vision tokens per camera, P = V * N, Q action queries, D width, Dv vision width.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from vlarft.nets.transformer import Decoder, TransformerConfig
from vlarft.nets.vit import DINOV2_LARGE, SIGLIP_SO400M, ConvEncoder, ConvEncoderConfig, ViT, ViTConfig
from vlarft.run.optional import optional

QWEN2_HALF_B = TransformerConfig(
    depth=24,
    width=896,
    num_heads=14,
    num_kv_heads=2,
    ffn_dim=4864,
    rope_theta=1e6,
    qkv_bias=True,
    max_positions=32768,
)


@dataclass(frozen=True)
class VLMConfig:
    """Parts of the vision-language model; the defaults are the paper's, 1,252,553,792 parameters."""

    vision: ViTConfig | ConvEncoderConfig = DINOV2_LARGE
    fused_vision: ViTConfig | None = SIGLIP_SO400M  # a second encoder of the same image, channels concatenated
    num_cameras: int = 1
    projector_dim: int = 8704  # inner width of the projector's first layer
    language: TransformerConfig = QWEN2_HALF_B
    vocabulary: int = 151936
    bytes_per_token: int = 1  # bytes whose embeddings are summed into one token, each place from its own table
    text_file_bytes: int = 0  # size of the tokenizer file inside the model; 0: byte tokens, no file
    max_text_bytes: int = 256  # bytes, or BPE tokens of the whole prompt; longer instructions are refused
    num_queries: int = 64
    query_init_std: float = 0.0  # the paper's queries start at zero; from scratch, small random ones train better
    shift_context: bool = False  # read the hidden states one position early, as the public code and its weights do


class VLMOutput(NamedTuple):
    """Context and vision tokens of a batch of observations."""

    context: torch.Tensor  # (B, P + Q, D)
    vision: torch.Tensor  # (B, P, Dv), the encoders' tokens before the projector


class ByteTokenizer:
    """UTF-8 bytes between a begin and an end token."""

    pad, begin, end = 256, 257, 258
    vocabulary = 259
    unit = "bytes with begin and end"
    description = "bytes, 259 tokens"

    def encode(self, instruction: str) -> list[int]:
        """Encode an instruction, lower-cased and stripped, as token ids.

        Raises:
            ValueError: empty instruction.
        """
        return [self.begin, *clean(instruction).encode(), self.end]


SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PROMPT = (
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nWhat action should the robot take to {}?<|im_end|>\n<|im_start|>assistant\n"
)


class BPETokenizer(nn.Module):
    """Byte-level BPE of Qwen's prompt with the instruction. The tokenizer's file is a buffer, so that it is saved and
    loaded with the weights.

    Args:
        num_bytes: size of the file, a tokenizer.json.
    """

    unit = "tokens with the prompt"

    def __init__(self, num_bytes: int) -> None:
        super().__init__()
        self.register_buffer("file", torch.zeros(num_bytes, dtype=torch.uint8))
        self.parsed: Any = None  # the file as an object, parsed on first use and again after a load
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "parsed", None))

    def parse(self) -> Any:
        """Parse the file, once, as a `tokenizers.Tokenizer`.

        Raises:
            ImportError: the `tokenizers` package is missing.
            ValueError: the file is no tokenizer, or lacks the prompt's special tokens.
        """
        if self.parsed is None:
            tokenizers = import_tokenizers()
            content = bytes(self.file.cpu().numpy())
            try:
                parsed = tokenizers.Tokenizer.from_buffer(content)
            except Exception as error:  # the package raises nothing more specific
                raise ValueError(
                    f"the text tokenizer ({len(content):,} bytes) is no readable tokenizer.json: {error}"
                ) from error
            if missing := [token for token in SPECIAL_TOKENS if parsed.token_to_id(token) is None]:
                raise ValueError(f"the text tokenizer lacks {', '.join(missing)}: it is not that of a Qwen2 model")
            self.parsed = parsed
        return self.parsed

    @property
    def pad(self) -> int:
        """Id of the padding token."""
        return self.parse().token_to_id(SPECIAL_TOKENS[0])

    @property
    def vocabulary(self) -> int:
        """Largest id plus one."""
        return max(self.parse().get_vocab().values()) + 1

    @property
    def description(self) -> str:
        """Kind and size, for messages."""
        return f"byte-level BPE in Qwen's prompt, {len(self.parse().get_vocab()):,} tokens"

    def encode(self, instruction: str) -> list[int]:
        """Encode the prompt with an instruction, lower-cased and stripped, as token ids.

        Raises:
            ValueError: empty instruction.
        """
        return self.parse().encode(PROMPT.format(clean(instruction)), add_special_tokens=False).ids


def clean(instruction: str) -> str:
    """Strip and lower-case an instruction.

    Raises:
        ValueError: it is empty.
    """
    if not (text := instruction.strip().lower()):
        raise ValueError(f"instruction {instruction!r} is empty; the policy needs to be told what to do")
    return text


def import_tokenizers() -> ModuleType:
    """Import `tokenizers`, which only public weights need; an ImportError says what installs it."""
    with optional("public weights read text through `tokenizers`", "public"):
        import tokenizers
    return tokenizers


class Projector(nn.Module):
    """Projection of vision tokens to the language model's width: three layers, GELU between them."""

    def __init__(self, vision_dim: int, hidden: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision_dim, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.fc3 = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, P, Dv) -> (B, P, D)."""
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(x)))))


class InstructionEncoder(nn.Module):
    """Embedding of an instruction for the layers of the vision encoder (FiLM): a sum of learned rows.

    There is one row per word and one for the whole text, looked up by hash. The row of the whole text starts ten times
    larger, so that two instructions are far apart from the first step; the words' rows share what is learned between
    instructions that differ in one word. (An encoder over bytes would start with nearly equal embeddings for long
    sentences that differ in "red" and "blue".) The row of a text never seen in training is untrained: the policy is for
    the instructions that it was trained on.

    Args:
        width: width of the embedding.
        num_rows: rows of each table; two texts share a row with probability 1 / num_rows.
    """

    def __init__(self, width: int, num_rows: int = 4096) -> None:
        super().__init__()
        self.texts, self.words = nn.Embedding(num_rows, width), nn.Embedding(num_rows, width)
        nn.init.normal_(self.words.weight, std=0.1)

    def forward(self, instructions: list[str]) -> torch.Tensor:
        """Embed B instructions, case and spacing ignored: (B, width)."""
        rows = []
        for text in instructions:
            words = text.lower().split() or [""]  # an empty text is refused with the text tokens
            whole, parts = self._row(" ".join(words)), torch.stack([self._row(word) for word in words])
            rows.append(self.texts(whole) + self.words(parts).sum(dim=0))
        return torch.stack(rows)

    def _row(self, text: str) -> torch.Tensor:
        weight = self.texts.weight
        # crc32, because Python's hash of a string differs from process to process
        return torch.tensor(zlib.crc32(text.encode()) % len(weight), device=weight.device)


class VLM(nn.Module):
    """Vision encoder(s), projector, language model and learned action queries.

    Args:
        cfg: sizes.

    Raises:
        ValueError: encoders with different numbers of tokens, a vocabulary too small for byte tokens, or
            `bytes_per_token` below 1 or, with a text tokenizer's file, above 1.
    """

    def __init__(self, cfg: VLMConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.tokenizer = BPETokenizer(cfg.text_file_bytes) if cfg.text_file_bytes else ByteTokenizer()
        if cfg.bytes_per_token < 1 or (cfg.text_file_bytes and cfg.bytes_per_token > 1):
            expected = "1 with a text tokenizer's file" if cfg.text_file_bytes else "at least 1"
            raise ValueError(f"VLMConfig.bytes_per_token: got {cfg.bytes_per_token}, expected {expected}")
        if not cfg.text_file_bytes and cfg.vocabulary < self.tokenizer.vocabulary:
            raise ValueError(f"VLMConfig.vocabulary {cfg.vocabulary} is too small for byte tokens; give at least 259")
        self.vision = ViT(cfg.vision) if isinstance(cfg.vision, ViTConfig) else ConvEncoder(cfg.vision)
        self.fused_vision = ViT(cfg.fused_vision) if cfg.fused_vision else None
        if self.fused_vision and self.fused_vision.num_tokens != self.vision.num_tokens:
            raise ValueError(
                f"VLMConfig: vision gives {self.vision.num_tokens} tokens, fused_vision "
                f"{self.fused_vision.num_tokens}; their channels are concatenated, so choose equal numbers of patches"
            )
        self.vision_dim = cfg.vision.width + (cfg.fused_vision.width if cfg.fused_vision else 0)
        self.num_vision_tokens = cfg.num_cameras * self.vision.num_tokens
        self.image_size = cfg.vision.image_size
        film_dim = getattr(cfg.vision, "film_dim", None)
        self.instruction_encoder = InstructionEncoder(film_dim) if film_dim else None
        self.projector = Projector(self.vision_dim, cfg.projector_dim, cfg.language.width)
        self.embed_tokens = nn.Embedding(cfg.vocabulary * cfg.bytes_per_token, cfg.language.width)
        self.language_model = Decoder(cfg.language)
        self.action_queries = nn.Embedding(cfg.num_queries, cfg.language.width)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        nn.init.normal_(self.action_queries.weight, std=cfg.query_init_std)

    def fill_text(self, content: bytes) -> None:
        """Set the text tokenizer to the content of a tokenizer.json, of the size that the configuration names.

        Raises:
            ValueError: another size, no tokenizer, or more tokens than the embedding has rows.
            ImportError: the `tokenizers` package is missing.
        """
        if len(content) != self.cfg.text_file_bytes:
            raise ValueError(
                f"the text tokenizer has {len(content)} bytes, VLMConfig.text_file_bytes is {self.cfg.text_file_bytes}"
            )
        self.tokenizer.file.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        self.tokenizer.parsed = None
        if self.tokenizer.vocabulary > self.cfg.vocabulary:
            raise ValueError(
                f"the text tokenizer has ids up to {self.tokenizer.vocabulary - 1}, the embedding "
                f"{self.cfg.vocabulary} rows: it is that of another model"
            )

    @property
    def vits(self) -> list[ViT]:
        """The vision transformers among the encoders."""
        return [encoder for encoder in (self.vision, self.fused_vision) if isinstance(encoder, ViT)]

    @property
    def blocks(self) -> list[nn.Module]:
        """All transformer blocks: the units of sharding and of activation recomputation."""
        return [*(block for vit in self.vits for block in vit.blocks), *self.language_model.layers]

    def forward(self, images: torch.Tensor, instructions: list[str]) -> VLMOutput:
        """Compute the context of a batch of observations, Eq. (1).

        Args:
            images: (B, V, 3, H, W), floats in [0, 1], of the encoder's size.
            instructions: B strings.

        Returns:
            Context (B, P + Q, D): vision tokens first, action queries last; and the vision tokens (B, P, Dv).

        Raises:
            ValueError: wrong number of cameras or image size; an empty or too long instruction.
        """
        if images.ndim != 5 or images.shape[:2] != (len(instructions), self.cfg.num_cameras):
            raise ValueError(
                f"images: got shape {tuple(images.shape)} for {len(instructions)} instructions, expected "
                f"({len(instructions)}, {self.cfg.num_cameras} cameras, 3, {self.image_size}, {self.image_size})"
            )
        vision = self.encode_images(images, instructions)
        return VLMOutput(self.contextualize(vision, instructions), vision)

    def contextualize(self, vision: torch.Tensor, instructions: list[str]) -> torch.Tensor:
        """Run the language model's part of `forward`: vision (B, P, Dv), B instructions -> context (B, P + Q, D)."""
        text, lengths = self.embed_text(*self.tokenize(instructions, vision.device))  # (B, n, D), (B,)
        x = self.arrange(text, lengths, self.projector(vision))  # (B, n + P + Q, D)
        # the padding is on the right of a causal sequence, so nothing that is read below attends to it
        hidden = self.language_model(x)
        # patches stand at 1..P, a row's queries after its text, at lengths + P..; shifted, both are read one early
        num_vision, first = self.num_vision_tokens, 0 if self.cfg.shift_context else 1
        at_query = (lengths + num_vision - 1 + first)[:, None] + torch.arange(self.cfg.num_queries, device=x.device)
        queries = hidden.gather(1, at_query[..., None].expand(-1, -1, hidden.shape[-1]))  # (B, Q, D)
        return torch.cat([hidden[:, first : first + num_vision], queries], dim=1)

    def tokenize(self, instructions: list[str], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode instructions as right-padded text tokens (B, n), n the longest of the batch, and their numbers (B,).

        Raises:
            ValueError: an empty or too long instruction.
        """
        encoded = [self.tokenizer.encode(text) for text in instructions]
        for text, ids in zip(instructions, encoded, strict=True):
            if len(ids) > self.cfg.max_text_bytes:
                raise ValueError(
                    f"instruction {text[:40]!r}... has {len(ids)} {self.tokenizer.unit}, the limit "
                    f"(max_text_bytes) is {self.cfg.max_text_bytes}; shorten it"
                )
        longest = max(map(len, encoded))
        padded = [ids + [self.tokenizer.pad] * (longest - len(ids)) for ids in encoded]
        return torch.tensor(padded, device=device), torch.tensor([len(ids) for ids in encoded], device=device)

    def embed_text(self, ids: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed ids (B, m), lengths (B,) as text tokens (B, n, D), lengths (B,), with n = ceil(m / bytes_per_token)."""
        group = self.cfg.bytes_per_token
        ids = F.pad(ids, (0, -ids.shape[1] % group), value=self.tokenizer.pad)  # to a multiple of the group
        ids = rearrange(ids, "b (n g) -> b n g", g=group)
        tables = torch.arange(group, device=ids.device) * self.cfg.vocabulary  # each place in a group has its own rows
        return self.embed_tokens(ids + tables).sum(dim=2), (lengths + group - 1) // group

    def encode_images(self, images: torch.Tensor, instructions: list[str]) -> torch.Tensor:
        """Encode the images of all cameras, (B, V, 3, H, W), as vision tokens (B, P, Dv)."""
        flat = rearrange(images, "b v c h w -> (b v) c h w")
        if self.instruction_encoder is None:
            tokens = self.vision(flat)  # (B * V, N, Dv)
        else:
            # a batch has few distinct instructions: encode each once
            distinct = list(dict.fromkeys(instructions))
            language = self.instruction_encoder(distinct)
            index = torch.tensor([distinct.index(text) for text in instructions], device=images.device)
            tokens = self.vision(flat, language[index].repeat_interleave(images.shape[1], dim=0))
        if self.fused_vision is not None:
            tokens = torch.cat([tokens, self.fused_vision(flat)], dim=-1)  # channels of both encoders, patch by patch
        return rearrange(tokens, "(b v) n d -> b (v n) d", v=images.shape[1])

    def arrange(self, text: torch.Tensor, lengths: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Put text, patches and queries in the order of the sequence.

        Args:
            text: (B, n, D), right-padded.
            lengths: (B,), numbers of text tokens without padding.
            patches: (B, P, D).

        Returns:
            (B, n + P + Q, D); each row's queries follow its last text token directly.
        """
        text = F.pad(text, (0, 0, 0, self.cfg.num_queries))  # (B, n + Q, D)
        query = torch.arange(text.shape[1], device=text.device) - lengths[:, None]  # index of the query at each place
        is_query = (query >= 0) & (query < self.cfg.num_queries)
        queries = self.action_queries(query.clamp(0, self.cfg.num_queries - 1))  # (B, n + Q, D); clamped: unused
        text = torch.where(is_query[..., None], queries, text)
        # the first text token comes before the patches
        return torch.cat([text[:, :1], patches.to(text.dtype), text[:, 1:]], dim=1)
