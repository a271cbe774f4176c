"""The optimisers: AdamW, and Muon for matrices and kernels with AdamW for the other parameters."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

MUON_RATE = 5.0
"""The rate of MuonWithAdamW relative to that of `adamw`. Muon's updates have AdamW's size ("match_rms_adamw"), but
permit a higher rate. With a fifth of it for embeddings and gains, the picture generator hardly used its references
after 22,000 pictures."""
SMALLEST_WIDTH = 8
"""AdamW trains layers with fewer input or output channels, which are the first and the last layer."""


class Optimizer(Protocol):
    """The interface of an optimiser in the training loop."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...
    def zero_grad(self) -> None: ...
    def step(self) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def has_bfloat16() -> bool:
    """Whether the default device multiplies matrices in bfloat16. Some CPUs emulate it, slower than float32."""
    if torch.get_default_device().type != "cpu":
        return True
    has = torch.cpu.get_capabilities()
    return bool(has.get("amx_bf16", False) or has.get("avx512_bf16", False))


def adamw(
    module: nn.Module, *, learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """Return AdamW with weight decay for matrices and kernels, but not for biases, gains and the logit scale."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=1e-8, fused=True)


class MuonWithAdamW:
    """Muon (https://kellerjordan.github.io/posts/muon/) for matrices and convolution kernels, AdamW for the rest.

    AdamW also trains embeddings: most of their rows have no gradient, so Muon would take steps too long for the others.

    A kernel is the linear map (out, in x height x width). torch.optim.Muon only takes matrices, so it gets a matrix
    view of the kernel's memory. Such a view exists only in the `channels_last` layout.

    Raises:
        ValueError: a kernel is not channels_last.
    """

    def __init__(self, module: nn.Module, *, learning_rate: float, weight_decay: float, betas: tuple[float, float]):
        self._kernels: list[tuple[nn.Parameter, nn.Parameter]] = []
        matrices, rest = [], []
        embeddings = {id(each.weight) for each in module.modules() if isinstance(each, nn.Embedding)}
        for parameter in module.parameters():
            if parameter.ndim == 2 and id(parameter) not in embeddings:
                matrices.append(parameter)
            elif parameter.ndim == 4 and min(parameter.shape[:2]) >= SMALLEST_WIDTH:
                matrix = nn.Parameter(as_matrix(parameter.detach()))
                if matrix.data_ptr() != parameter.data_ptr():  # Muon would train a copy instead of the kernel
                    raise ValueError("the module's kernels must be channels_last")
                self._kernels.append((parameter, matrix))
                matrices.append(matrix)
            else:
                rest.append(parameter)
        self._muon = torch.optim.Muon(
            matrices, lr=MUON_RATE * learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        self._adamw = torch.optim.AdamW(rest, lr=MUON_RATE * learning_rate, weight_decay=0.0, betas=betas, fused=True)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [*self._muon.param_groups, *self._adamw.param_groups]

    def zero_grad(self) -> None:
        self._muon.zero_grad()
        self._adamw.zero_grad()
        for kernel, _ in self._kernels:
            kernel.grad = None

    def step(self) -> None:
        for kernel, matrix in self._kernels:
            matrix.grad = None if kernel.grad is None else as_matrix(kernel.grad)
        self._muon.step()  # type: ignore[no-untyped-call]
        self._adamw.step()

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self._muon.state_dict(), "adamw": self._adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._muon.load_state_dict(state_dict["muon"])
        self._adamw.load_state_dict(state_dict["adamw"])


def as_matrix(kernel: Tensor) -> Tensor:
    """View (out, in, h, w) as (out, h * w * in); a channels-last kernel is not copied."""
    return kernel.permute(0, 2, 3, 1).flatten(1)
