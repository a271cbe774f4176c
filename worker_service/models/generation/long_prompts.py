"""Prompts that are longer than a text encoder reads at once.

A CLIP text encoder reads 77 tokens, and two of them mark the start and the end. A pipeline whose cross-attention takes
any number of tokens reads a longer text in parts of at most 75 tokens. Each part is encoded on its own, and the
embeddings are joined, as the web UI of AUTOMATIC1111 and the library compel do. Other pipelines read the beginning of
the text only. The rest of a text has to be reported.
"""

import copy
import inspect
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from diffusers import DiffusionPipeline
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedTokenizerBase

from worker_service.models.pipelines.placement import device_of

MAX_PARTS = 16
"""A longer text is cut. 2,000 characters of English have about 7 parts, and of emoji more than 100. Each part makes the
cross-attention of every step longer, for all images of the batch."""
CACHED_TEXTS = 1024
"""A text is divided at submit, at the start of its batch, and while it is encoded."""


class TextReader:
    """How much of a text the encoders of one pipeline read. Any thread may use it."""

    def __init__(self, pipeline: DiffusionPipeline, *, max_sequence_length: int | None = None) -> None:
        """max_sequence_length: that of the settings; None: the default of the pipeline's call."""
        limits = _token_limits(pipeline, max_sequence_length)
        # Copies, because the model's thread uses the pipeline's own tokenizers, and a tokenizer is not thread-safe.
        self._limits = [(copy.deepcopy(tokenizer), limit) for tokenizer, limit in limits]
        self._lock = threading.Lock()
        self.reads_parts = _reads_parts(pipeline)
        """Whether the pipeline reads a long text in parts. Otherwise it reads only the beginning."""
        self.parts: Callable[[str], Sequence[str]] = lru_cache(CACHED_TEXTS)(self._parts)
        """The parts of a text that are encoded one by one, 1 to `MAX_PARTS`. Where the pipeline reads the beginning
        only, there is one part, the whole text."""
        self.unread: Callable[[str], str] = lru_cache(CACHED_TEXTS)(self._unread)
        """The end of a text that no encoder reads; empty when all of it is read."""

    def _parts(self, text: str) -> Sequence[str]:
        if not self.reads_parts:
            return (text,)
        parts: list[str] = []
        size = limit = min(limit for _, limit in self._limits)
        with self._lock:
            for word in text.split():
                for piece, tokens in self._pieces(word, limit):
                    if size + tokens > limit:
                        parts.append(piece)
                        size = tokens
                    else:
                        parts[-1] += f" {piece}"
                        size += tokens
        return tuple(parts[:MAX_PARTS]) or (text,)

    def _pieces(self, word: str, limit: int) -> list[tuple[str, int]]:
        """Pieces of a word that fit in one part, with their number of tokens: the word itself, or its halves."""
        tokens = max(len(tokenizer(word, add_special_tokens=False).input_ids) for tokenizer, _ in self._limits)
        if tokens <= limit or len(word) == 1:
            return [(word, min(tokens, limit))]
        middle = len(word) // 2
        return [*self._pieces(word[:middle], limit), *self._pieces(word[middle:], limit)]

    def _unread(self, text: str) -> str:
        if self.reads_parts:
            return _after(text, "".join(self.parts(text)))
        if not self._limits:
            return ""
        with self._lock:
            read = max(_characters_read(tokenizer, limit, text) for tokenizer, limit in self._limits)
        return text[read:].strip()


def encode_in_parts(
    pipeline: DiffusionPipeline,
    prompts: Sequence[Sequence[str]],
    negative_prompts: Sequence[Sequence[str]] | None,
    *,
    guided: bool,
) -> dict[str, torch.Tensor]:
    """Arguments of the pipeline's call: the embeddings of prompts that are given as parts.

    A text with fewer parts than the longest is filled up with empty texts, as the negative prompt of a long prompt is.
    The pooled embedding of a pipeline that needs one is that of the first part.

    prompts, negative_prompts: the parts of the texts, by row. guided: whether negative prompts are encoded at all.
    """
    count = max(len(parts) for parts in [*prompts, *(negative_prompts or [])])
    with torch.no_grad():
        encoded = [
            pipeline.encode_prompt(
                prompt=_column(prompts, number),
                negative_prompt=None if negative_prompts is None else _column(negative_prompts, number),
                device=device_of(pipeline),
                num_images_per_prompt=1,
                do_classifier_free_guidance=guided,
            )
            for number in range(count)
        ]
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    columns = dict(zip(names, zip(*encoded, strict=True), strict=False))
    return {
        name: column[0] if "pooled" in name else torch.cat(column, dim=1)
        for name, column in columns.items()
        if column[0] is not None
    }


def _column(rows: Sequence[Sequence[str]], number: int) -> list[str]:
    return [parts[number] if number < len(parts) else "" for parts in rows]


def _token_limits(pipeline: DiffusionPipeline, max_sequence_length: int | None) -> list[tuple[Any, int]]:
    """The tokenizers of the text encoders, each with the number of tokens of a text that its encoder reads."""
    parameter = inspect.signature(type(pipeline).__call__).parameters.get("max_sequence_length")
    length = max_sequence_length or (None if parameter is None else parameter.default)
    limits = []
    for tokenizer, _ in _text_encoders(pipeline):
        maximum = tokenizer.model_max_length
        if not isinstance(tokenizer, CLIPTokenizer) and isinstance(length, int):
            maximum = length
        taken = tokenizer.num_special_tokens_to_add() + _template_tokens(pipeline, tokenizer)
        limits.append((tokenizer, maximum - taken))
    return limits


def _text_encoders(pipeline: DiffusionPipeline) -> list[tuple[Any, Any]]:
    """Each tokenizer of the pipeline with its encoder. A pipeline may have a processor of texts and images instead."""
    parts, found = pipeline.components, []
    for name, part in parts.items():
        encoder = parts.get("text_encoder" if name == "processor" else name.replace("tokenizer", "text_encoder"))
        if name == "processor" and parts.get("tokenizer") is not None:
            continue
        tokenizer = getattr(part, "tokenizer", part)
        if isinstance(tokenizer, PreTrainedTokenizerBase) and encoder is not None:
            found.append((tokenizer, encoder))
    return found


def _template_tokens(pipeline: DiffusionPipeline, tokenizer: Any) -> int:
    """Tokens of the chat around a prompt, which count as part of the text. For some pipelines it is too many."""
    words = getattr(pipeline, "system_message", None) or getattr(pipeline, "system_prompt", None) or ""
    tokens = len(tokenizer(words, add_special_tokens=False).input_ids)
    if getattr(tokenizer, "chat_template", None) is None:
        return tokens
    chat = [{"role": "user", "content": ""}]
    template = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokens + len(tokenizer(template, add_special_tokens=False).input_ids)


def _reads_parts(pipeline: DiffusionPipeline) -> bool:
    """Whether the pipeline is one of Stable Diffusion's: CLIP's hidden states, in the cross-attention of a UNet."""
    encoders = _text_encoders(pipeline)
    needed = {"prompt_embeds"} if len(encoders) == 1 else {"prompt_embeds", "pooled_prompt_embeds"}
    return (
        bool(encoders)
        and hasattr(pipeline, "unet")
        and hasattr(pipeline, "encode_prompt")
        and needed <= inspect.signature(type(pipeline).__call__).parameters.keys()
        and all(isinstance(encoder, CLIPTextModel | CLIPTextModelWithProjection) for _, encoder in encoders)
    )


def _after(text: str, read: str) -> str:
    """The end of the text behind the characters in `read`, which may have other white space."""
    places = [place for place, character in enumerate(text) if not character.isspace()]
    count = len("".join(read.split()))
    return text[places[count] :].strip() if count < len(places) else ""


def _characters_read(tokenizer: Any, limit: int, text: str) -> int:
    """How many characters of the text its first `limit` tokens cover."""
    if not tokenizer.is_fast:  # others do not know which characters a token covers
        return len(text)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return len(text) if len(offsets) <= limit else int(offsets[limit][0])
