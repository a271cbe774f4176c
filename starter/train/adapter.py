"""The IP-Adapter of the starter generator: add untrained weights to a UNet, and extract trained ones.

Published layout (https://huggingface.co/h94/IP-Adapter, as diffusers reads it): `image_proj.{proj,norm}.*` and
`ip_adapter.{1,3,5,...}.to_{k,v}_ip.weight`, odd numbers in the order of the UNet's cross-attention layers.
"""

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from torch import Tensor
from torch.nn import functional as F

TOKENS_PER_IMAGE = 4
"""diffusers assumes four tokens for every adapter that has a `proj.weight`."""


def cross_attention_names(unet: UNet2DConditionModel) -> list[str]:
    return [name for name in unet.attn_processors if name.endswith("attn2.processor")]


def add_fresh_adapter(unet: UNet2DConditionModel, embed_dim: int) -> None:
    """Install an untrained adapter for image vectors of `embed_dim` numbers; its weights join `unet.parameters()`."""
    width: int = unet.config.cross_attention_dim
    projection = torch.nn.Linear(embed_dim, TOKENS_PER_IMAGE * width)
    layers: dict[str, Tensor] = {}
    for number, name in enumerate(cross_attention_names(unet)):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        for part in ("k", "v"):
            trained_size = getattr(attention, f"to_{part}")
            fresh = torch.nn.Linear(width, trained_size.out_features, bias=False)
            layers[f"{2 * number + 1}.to_{part}_ip.weight"] = fresh.weight.detach()
    image_proj = {
        "proj.weight": projection.weight.detach(),
        "proj.bias": projection.bias.detach(),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    unet._load_ip_adapter_weights([{"image_proj": image_proj, "ip_adapter": layers}], low_cpu_mem_usage=False)
    unet.requires_grad_(True)


class OneProductAttention(IPAdapterAttnProcessor2_0):  # type: ignore[misc]
    """IPAdapterAttnProcessor2_0 for constant masks and scale 1, with one matrix product for all references.

    Training is 12 % faster. Parameters and their names are the same.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        ip_adapter_masks: Any = None,
        **_: Any,
    ) -> Tensor:
        text, (images,) = encoder_hidden_states
        weights = ip_adapter_masks[0][:, None, None, :, 0, 0, None]  # (B, 1, 1, K, 1)
        batch, queries, _width = hidden_states.shape
        references = images.shape[1]

        def heads(states: Tensor) -> Tensor:
            return states.view(batch, -1, attn.heads, states.shape[-1] // attn.heads).transpose(1, 2)

        query = heads(attn.to_q(hidden_states))
        found = F.scaled_dot_product_attention(query, heads(attn.to_k(text)), heads(attn.to_v(text)))
        tokens = images.flatten(1, 2)
        scores = query @ heads(self.to_k_ip[0](tokens)).transpose(-1, -2) * query.shape[-1] ** -0.5
        shares = scores.view(batch, attn.heads, queries, references, -1).softmax(dim=-1) * weights.to(scores.dtype)
        value = heads(self.to_v_ip[0](tokens))
        found = found + shares.flatten(3).to(value.dtype) @ value
        states: Tensor = attn.to_out[0](found.transpose(1, 2).reshape(batch, queries, -1))
        return states / float(attn.rescale_output_factor)


def attend_in_one_product(unet: UNet2DConditionModel) -> None:
    for name in cross_attention_names(unet):
        unet.attn_processors[name].__class__ = OneProductAttention


def split_adapter(state: dict[str, Tensor], unet: UNet2DConditionModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split one state dict into the weights of the plain UNet and those of the adapter in the published layout."""
    adapter: dict[str, Tensor] = {}
    projection = "encoder_hid_proj.image_projection_layers.0."
    renamed = {"image_embeds.weight": "proj.weight", "image_embeds.bias": "proj.bias"}
    plain = {}
    numbers = {name: 2 * index + 1 for index, name in enumerate(cross_attention_names(unet))}
    for key, value in state.items():
        if key.startswith(projection):
            rest = key.removeprefix(projection)
            adapter[f"image_proj.{renamed.get(rest, rest)}"] = value
        elif ".processor." in key:
            name, part = key.split(".processor.")
            adapter[f"ip_adapter.{numbers[name + '.processor']}.{part.split('.')[0]}.weight"] = value
        else:
            plain[key] = value
    return plain, adapter


def join_adapter(plain: dict[str, Tensor], adapter: dict[str, Tensor], unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """Undo `split_adapter`: return the joint state dict."""
    names = cross_attention_names(unet)
    state = dict(plain)
    for key, value in adapter.items():
        kind, rest = key.split(".", maxsplit=1)
        if kind == "image_proj":
            own = {"proj.weight": "image_embeds.weight", "proj.bias": "image_embeds.bias"}.get(rest, rest)
            state[f"encoder_hid_proj.image_projection_layers.0.{own}"] = value
        else:
            number, part, _weight = rest.split(".")
            state[f"{names[(int(number) - 1) // 2]}.{part}.0.weight"] = value
    return state


def conditioning(vectors: Tensor, weights: Tensor, size: int) -> dict[str, Any]:
    """Return the arguments for `unet(...)`.

    A reference's weight is the constant value of its attention mask. Each row of a batch then gives the same result as
    alone, with any weights and up to K references.

    Args:
        vectors: shape (B, K, E).
        weights: share of each reference, shape (B, K); 0 for padding.
        size: side of the masks.
    """
    masks = weights[:, :, None, None].expand(-1, -1, size, size)
    return {
        "added_cond_kwargs": {"image_embeds": [vectors]},
        "cross_attention_kwargs": {"ip_adapter_masks": [masks]},
    }
