"""`python -m benchmarks.full_size_models`: its files load as those of a model hub. Here with small parts."""

from pathlib import Path

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks import full_size_models

WIDTH = 64


def test_a_part_is_loaded_from_its_shards_with_weights_that_keep_the_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(full_size_models, "SHARD_BYTES", 50_000)
    with torch.device("meta"):
        part = Flux2Transformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, num_attention_heads=2, joint_attention_dim=WIDTH
        )
    full_size_models.save_part(part, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = Flux2Transformer2DModel.from_pretrained(tmp_path)
    assert dict(loaded.config)["joint_attention_dim"] == WIDTH
    weight = loaded.context_embedder.weight
    assert float(weight.detach().float().std()) == pytest.approx(WIDTH**-0.5, rel=0.05)
    assert len(torch.unique(weight, dim=0)) == len(weight)


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    with torch.device("meta"):
        part = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=300,
                hidden_size=WIDTH,
                intermediate_size=WIDTH,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=32,
                tie_word_embeddings=True,
                dtype=torch.bfloat16,
            )
        )
    full_size_models.save_part(part, tmp_path)
    loaded = Qwen3ForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    hidden = loaded(torch.tensor([[1, 2, 3]]), output_hidden_states=True).hidden_states[-1]
    assert torch.isfinite(hidden).all()
    assert 0.3 < float(hidden.detach().float().std()) < 3
