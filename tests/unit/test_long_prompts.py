"""Prompts beyond the 77 tokens of a CLIP text encoder: read in parts where that is possible, otherwise reported.

The small tokenizers have one token per letter, so a word of 40 letters fills more than half of a part.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from shared.contracts.generation import Mode
from shared.settings import WatchdogSettings
from tests.unit.test_diffusion_batches import DIFFERENT, REQUEST, ROUNDING, distance, generate_images, reference
from tests.unit.test_diffusion_references import generated_by_diffusers
from worker_service.execution.batcher import Batcher
from worker_service.execution.watchdog import Watchdog
from worker_service.models.generate_batch import generate_batch
from worker_service.models.generation.diffusion import Diffusion
from worker_service.models.generation.long_prompts import MAX_PARTS

Loaded = Callable[[str], Diffusion]
CLIP_PIPELINES = ["sd15", "sdxl", "sdxl_turbo"]
A, B, C = (letter * 40 for letter in "abc")
LONG = replace(REQUEST, prompt=f"{A} {B} {C}")


@pytest.mark.parametrize("pipeline", CLIP_PIPELINES)
def test_every_part_of_a_long_prompt_changes_the_image(loaded: Loaded, pipeline: str) -> None:
    model = loaded(pipeline)
    image = generate_images(model, LONG)[0]
    for prompt in (f"{A} {B} {'d' * 40}", f"{A} {'d' * 40} {C}", f"{'d' * 40} {B} {C}", f"{A} {B}"):
        assert distance(generate_images(model, replace(LONG, prompt=prompt))[0], image) > DIFFERENT
    assert model.text_parts(LONG) == 3
    assert model.unread_texts(LONG).prompt == ""


@pytest.mark.parametrize("pipeline", CLIP_PIPELINES)
def test_a_long_prompt_is_read_to_its_end_from_an_initial_image_too(loaded: Loaded, pipeline: str) -> None:
    model = loaded(pipeline)
    request = replace(LONG, mode=Mode.IMG2IMG, references=(reference(1),), strength=1.0)
    other = replace(request, prompt=f"{A} {B} {'d' * 40}")
    assert distance(generate_images(model, request)[0], generate_images(model, other)[0]) > DIFFERENT


@pytest.mark.parametrize("pipeline", CLIP_PIPELINES)
def test_every_part_of_a_long_negative_prompt_changes_the_image(loaded: Loaded, pipeline: str) -> None:
    model = loaded(pipeline)
    one, other = (replace(REQUEST, negative_prompt=f"{A} {end}") for end in (B, C))
    assert distance(generate_images(model, one)[0], generate_images(model, other)[0]) > DIFFERENT
    assert model.text_parts(one) == 2
    assert model.text_parts(replace(one, guidance_scale=1.0)) == 1, "without guidance it is not read"


def test_the_parts_are_encoded_one_by_one_and_joined(loaded: Loaded) -> None:
    model = loaded("sd15_plain")
    pipeline = model.text_to_image

    @torch.no_grad()
    def encoded(*parts: str) -> torch.Tensor:
        tokens = pipeline.tokenizer(list(parts), padding="max_length", max_length=77, return_tensors="pt").input_ids
        assert (tokens[:, 0] == pipeline.tokenizer.bos_token_id).all()
        embeddings: torch.Tensor = pipeline.text_encoder(tokens)[0]
        return embeddings.reshape(1, 77 * len(parts), -1)

    request = replace(LONG, negative_prompt="blurry")
    by_diffusers = generated_by_diffusers(
        model,
        replace(request, prompt=None),  # type: ignore[arg-type]
        prompt_embeds=encoded(A, B, C),
        negative_prompt_embeds=encoded("blurry", "", ""),
    )
    assert distance(generate_images(model, request)[0], by_diffusers) <= ROUNDING


def test_the_pooled_embedding_is_that_of_the_first_part(loaded: Loaded) -> None:
    model = loaded("sdxl")
    first, long = (
        model._prompt_embeds(model.text_to_image, [request], negated=False)
        for request in (replace(REQUEST, prompt=A), LONG)
    )
    for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds"):
        assert torch.equal(long[name], first[name])
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        assert long[name].shape[1] == 3 * 77
        assert torch.equal(long[name][:, :77], first[name])


@pytest.mark.parametrize("pipeline", CLIP_PIPELINES)
def test_prompts_of_any_length_give_the_images_that_they_give_alone(loaded: Loaded, pipeline: str) -> None:
    model = loaded(pipeline)
    prompts = ["short", f"{A} {B}", f"{A} {C}", f"{A} {B} {C}", f"{C} {B} {A}", "x"]
    requests = [replace(REQUEST, prompt=prompt) for prompt in prompts]
    requests += [replace(REQUEST, prompt=prompt, negative_prompt=f"{B} {C}") for prompt in prompts[:4]]
    single = [generate_images(model, request)[0] for request in requests]
    with Watchdog(WatchdogSettings()) as watchdog:
        batcher = Batcher(
            lambda items, on_step: generate_batch(model, items, on_step),
            key=model.batch_key,
            max_batch_size=8,
            name="test",
            watchdog=watchdog,
        )
        batched = batcher.submit(requests)
        batcher.close(10)
    assert [distance(a.pixels, b) <= ROUNDING for a, b in zip(batched, single, strict=True)] == [True] * len(requests)
    with pytest.raises(ValueError, match="equal batch keys"):
        generate_images(model, requests[0], requests[1])


def test_a_part_has_whole_words_and_at_most_75_tokens(loaded: Loaded) -> None:
    reader = loaded("sd15").text_reader
    tokenizer = loaded("sd15").text_to_image.tokenizer
    assert reader.parts(f"{A},  {B}\n{C[:30]}") == (f"{A},", f"{B} {C[:30]}")
    for text in ("x" * 2000, "word " * 400, "\N{BLACK CHESS KING}" * 2000, "a" * 75, "b" * 76, "", "  "):
        parts = reader.parts(text)
        assert max(len(tokenizer(part).input_ids) for part in parts) <= 77
        assert "".join([*parts, reader.unread(text)]).replace(" ", "") == text.replace(" ", "")


def test_a_prompt_of_more_parts_than_are_read_is_cut_and_its_end_is_named(loaded: Loaded) -> None:
    model = loaded("sd15")
    read = " ".join([A] * MAX_PARTS)
    request = replace(REQUEST, prompt=f"{read}  {B}\n{C} ", negative_prompt=f"{read} {C}")
    assert model.text_parts(request) == MAX_PARTS
    assert model.unread_texts(request).prompt == f"{B}\n{C}"
    assert model.unread_texts(request).negative_prompt == C
    assert model.unread_texts(replace(request, prompt=read)).prompt == ""
    emoji = replace(REQUEST, prompt="\N{BLACK CHESS KING}" * 2000)
    assert model.text_parts(emoji) == MAX_PARTS
    assert set(model.unread_texts(emoji).prompt) == {"\N{BLACK CHESS KING}"}


def test_captions_beyond_the_parts_that_are_read_are_left_out(loaded: Loaded) -> None:
    model = loaded("sd15")
    request = replace(
        REQUEST, prompt=" ".join([A] * MAX_PARTS), mode=Mode.CAPTION, references=(replace(reference(1), caption=B),)
    )
    assert list(model.unread_texts(request).captions) == [B]
    assert model.text_parts(request) == MAX_PARTS


def test_many_threads_may_ask_for_parts_while_the_model_runs(loaded: Loaded) -> None:
    model = loaded("sdxl")
    with ThreadPoolExecutor(4) as pool:
        counts = [pool.submit(model.text_parts, replace(LONG, prompt=f"{A} {number}")) for number in range(200)]
        generate_images(model, LONG)
        assert {each.result() for each in counts} == {1}


def test_the_text_beyond_the_limit_of_another_encoder_is_named(loaded: Loaded) -> None:
    model = loaded("flux")
    read, unread = "a " * 255, "b " * 100  # two tokens a word; 511 fit
    request = replace(REQUEST, prompt=read + unread)
    assert model.unread_texts(request).prompt == unread.strip()
    assert model.unread_texts(replace(REQUEST, prompt=read)).prompt == ""
    assert model.unread_texts(replace(REQUEST, negative_prompt=read + unread)).negative_prompt == unread.strip()
    assert model.text_parts(request) == 1
    same = generate_images(model, request, replace(request, prompt=read + "c " * 100))
    assert distance(*same) == 0
