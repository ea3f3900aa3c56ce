"""Byte-pair encoders from text to token ids, for GLIDE's text encoder and for its noised CLIP.

GLIDE (arXiv 2112.10741) uses the encoder of GPT-2 (Radford et al. 2019), its noised CLIP (arXiv
2103.00020) that of CLIP. Both work on the bytes of UTF-8, so no text is out of vocabulary. A
vocabulary follows from its list of merges, so only the merges are shipped.

Text is lower-cased, and cleaned for CLIP, in Python: the normalizers of the Rust library differ
from `str.lower` at a Greek final sigma, and lack ftfy. Ids, padding and truncation are those of
OpenAI's models.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import re
import unicodedata
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np

from glide_jax.errors import GlideError, UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

_ASSETS = Path(__file__).parents[1] / "assets"
_START, _END = "<|startoftext|>", "<|endoftext|>"


class Tokens(NamedTuple):
    """The input of GLIDE's text transformer: `ids` int32 (B, L), `mask` bool (B, L)."""

    ids: np.ndarray
    mask: np.ndarray


class CLIPTokens(NamedTuple):
    """The input of CLIP: `ids` int32 (B, L) and `lengths` int32 (B,), start and end included."""

    ids: np.ndarray
    lengths: np.ndarray


class _BytePair(ABC):
    """The common part of both encoders; each adds `backend` and `clean`.

    The Rust object is cached outside the instance. A tokenizer is therefore a small value that can
    be compared, pickled and sent to data workers.
    """

    vocab_size: ClassVar[int]
    pad_id: ClassVar[int]
    _extra: ClassVar[int]  # The number of ids in every sequence that are not text.
    context: int

    @property
    @abstractmethod
    def backend(self) -> Tokenizer:
        """The `tokenizers.Tokenizer` that all instances share; it must not be changed."""

    @abstractmethod
    def clean(self, text: str) -> str:
        """Return the text that is encoded in place of `text`."""

    def __post_init__(self):
        if not isinstance(self.context, int) or self.context <= self._extra:
            raise UsageError(f"context must be an integer > {self._extra}, not {self.context!r}")

    def encode(self, text: str) -> list[int]:
        """Return the ids of the whole text: not truncated or padded, without start and end.

        Raises:
            UsageError: `text` is not a string, or has no UTF-8 form (a lone surrogate).
        """
        if not isinstance(text, str):
            raise UsageError(f"a prompt must be a string, not {type(text).__name__}: {text!r:.60}")
        text = self.clean(text)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(f"the prompt is not valid Unicode text: {error}") from None
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of a sequence of ids (L,), padding included; invalid bytes as U+FFFD.

        Raises:
            UsageError: `ids` is not a flat sequence of integers in [0, vocab_size).
        """
        array = np.asarray(ids)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise UsageError(f"expected a flat sequence of ids, got {array.dtype} {array.shape}")
        if array.size and not 0 <= array.min() <= array.max() < self.vocab_size:
            raise UsageError(f"ids must be in [0, {self.vocab_size})")
        return self.backend.decode(array.tolist(), skip_special_tokens=False)

    def overflow(self, text: str) -> int:
        """Return the number of ids at the end of `text` that do not fit into the context."""
        return max(0, len(self.encode(text)) + self._extra - self.context)

    def too_long(self, texts: Iterable[str]) -> str:
        """Return one line on the texts that do not fit into the context; "" if all do."""
        cut = [(text, n) for text in dict.fromkeys(texts) if (n := self.overflow(text))]
        if not cut:
            return ""
        text, count = cut[0]
        more = f", nor the ends of {len(cut) - 1:,} more" if cut[1:] else ""
        return f"note: the model does not read the last {count} tokens of {text[:40]!r}...{more}"

    def _encode_batch(self, texts: str | Iterable[str]) -> list[list[int]]:
        texts = [texts] if isinstance(texts, str) else texts
        if isinstance(texts, (bytes, bytearray, dict)) or not isinstance(texts, Iterable):
            raise UsageError(f"prompts must be a string or strings, not {type(texts).__name__}")
        # Not Rust's encode_batch: its threads do not survive the fork of a data worker.
        return [self.encode(text) for text in texts]

    def _pad(self, rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        ids = np.full((len(rows), self.context), self.pad_id, np.int32)
        for out, row in zip(ids, rows, strict=True):
            out[: len(row)] = row
        return ids, np.array([len(row) for row in rows], np.int32)

    def _wrap(self, **options: str | bool | int) -> PreTrainedTokenizerFast:
        from transformers import PreTrainedTokenizerFast as Wrapper  # It copies the backend.

        options |= {"model_max_length": self.context, "clean_up_tokenization_spaces": False}
        return Wrapper(tokenizer_object=self.backend, **options)


@dataclass(frozen=True)
class GPT2Tokenizer(_BytePair):
    """The tokenizer of GLIDE: lower-cased GPT-2 byte-pair encoding, 50,257 ids (arXiv 2112.10741).

    `tok(texts) -> Tokens(ids int32 (B, context), mask bool (B, context))`. Long text is cut off
    and gets no end token. Short text is padded with 50256, where the mask is False. The empty
    prompt is all padding: the unconditional branch of classifier-free guidance. A literal
    "<|endoftext|>" is ordinary text.
    """

    vocab_size: ClassVar[int] = 50257
    pad_id: ClassVar[int] = 50256
    _extra: ClassVar[int] = 0
    context: int = 128

    @property
    def backend(self) -> Tokenizer:
        """The `tokenizers.Tokenizer` that all instances share; it must not be changed."""
        return _gpt2()

    def clean(self, text: str) -> str:
        """Return the text in lower case, otherwise unchanged."""
        return text.lower()

    def __call__(self, texts: str | Iterable[str]) -> Tokens:
        """Encode a string, or B strings.

        Raises:
            UsageError: see `encode`.
        """
        ids, lengths = self._pad([row[: self.context] for row in self._encode_batch(texts)])
        return Tokens(ids, np.arange(self.context) < lengths[:, None])

    def ids_and_mask(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Encode one caption as ids (L,) int32 and mask (L,) bool.

        Raises:
            UsageError: see `encode`.
        """
        tokens = self(text)
        return tokens.ids[0], tokens.mask[0]

    def to_transformers(self) -> PreTrainedTokenizerFast:
        """Return this encoder with the interface of transformers; `attention_mask` is the mask.

        It does not lower-case: call it as `hf(tok.clean(text))`.
        """
        return self._wrap(pad_token=_END, eos_token=_END, split_special_tokens=True)


@dataclass(frozen=True)
class CLIPTokenizer(_BytePair):
    """The tokenizer of CLIP: cleaned, lower-cased byte-pair encoding, 49,408 ids (2103.00020).

    `tok(texts) -> CLIPTokens(ids int32 (B, context), lengths int32 (B,))`: start (49406), the
    first context - 2 ids of the text, end (49407), then zeros. A literal "<|startoftext|>" or
    "<|endoftext|>" in the text is that special token, unless punctuation runs into it.
    """

    vocab_size: ClassVar[int] = 49408
    pad_id: ClassVar[int] = 0
    start_id: ClassVar[int] = 49406
    end_id: ClassVar[int] = 49407
    _extra: ClassVar[int] = 2
    context: int = 77

    @property
    def backend(self) -> Tokenizer:
        """The `tokenizers.Tokenizer` that all instances share; it must not be changed."""
        return _clip()

    def clean(self, text: str) -> str:
        """Repair mojibake and quotes (ftfy), undo HTML escapes twice, join spaces, lower-case."""
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
        # CLIP's word pattern does not match a combining iota: it separates words, like a space.
        text = text.replace("\u0345", " ")
        return _hide_specials(" ".join(text.split()).lower())

    def __call__(self, texts: str | Iterable[str]) -> CLIPTokens:
        """Encode a string, or B strings.

        Raises:
            UsageError: see `encode`.
        """
        rows = (row[: self.context - 2] for row in self._encode_batch(texts))
        return CLIPTokens(*self._pad([[self.start_id, *row, self.end_id] for row in rows]))

    def ids_and_mask(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Encode one caption as ids (L,) int32 and mask (L,) bool, True up to the end token.

        Raises:
            UsageError: see `encode`.
        """
        tokens = self(text)
        return tokens.ids[0], np.arange(self.context) < tokens.lengths[0]

    def to_transformers(self) -> PreTrainedTokenizerFast:
        """Return this encoder with the interface of transformers; it adds start and end itself.

        It does not clean: call it as `hf(tok.clean(text))`. It pads with the end token, as CLIP
        checkpoints in transformers do: if id 0 ("!") were a special token, exclamation marks would
        be encoded differently. CLIP's attention is causal, so the padding has no effect.
        """
        return self._wrap(bos_token=_START, eos_token=_END, pad_token=_END)


def _hide_specials(text: str) -> str:
    """Insert a space into special strings that CLIP's left-to-right scan does not find.

    To CLIP a run of punctuation is one word. In "!<|endoftext|>" the first word is "!<|", so the
    scan does not find the special string; the Rust library would find it first. CLIP ignores
    spaces between words, so "!<| endoftext|>" has the ids that CLIP gives "!<|endoftext|>".
    """
    pieces, done, reached = [], 0, 0
    for match in re.finditer(r"<\|(?:start|end)oftext\|>", text):
        start = match.start()
        if start == reached or unicodedata.category(text[start - 1])[0] in "LNZ":
            reached = match.end()
        else:
            pieces += text[done : start + 2], " "
            done = start + 2
    return "".join(pieces) + text[done:]


def _read_merges(name: str, sha256: str) -> list[tuple[str, str]]:
    path = _ASSETS / name
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise GlideError(
            f"cannot read the vocabulary {path} ({error}); reinstall glide-jax"
        ) from None
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise GlideError(
            f"the vocabulary {path} is not the one that was shipped; reinstall glide-jax"
        )
    lines = raw.decode("utf-8").split("\n")[1:-1]
    return [(left, right) for left, right in (line.split(" ") for line in lines)]


@cache
def _gpt2() -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    sha256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    merges = _read_merges("gpt2_merges.txt.gz", sha256)
    # Printable bytes come first and are themselves; the others are characters from 256 on.
    byte = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate([*byte, *map("".join, merges), _END])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@cache
def _clip() -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    sha256 = "685491abbdad36159d094ecdc23bebc0dd53f8d1df35c4d74ef6036db2ba7572"
    merges = _read_merges("clip_merges.txt.gz", sha256)
    byte = sorted(pre_tokenizers.ByteLevel.alphabet())
    last = "</w>"  # It marks a symbol at the end of a word.
    symbols = [*byte, *(b + last for b in byte), *map("".join, merges), _START, _END]
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, end_of_word_suffix=last))
    tokenizer.add_special_tokens([_START, _END])
    # CLIP's pattern ignores case, so a long s (ſ) counts as the s of "'s".
    words = Regex(r"'(?:[sſtmd]|re|ve|ll)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    split = pre_tokenizers.Split(words, behavior="removed", invert=True)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    ends = [(name, vocab[name]) for name in (_START, _END)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_START} $A {_END}", special_tokens=ends
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(last, " ")])
    return tokenizer
