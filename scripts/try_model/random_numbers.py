"""Watches which generators the random numbers of a model call come from."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class RandomNumberWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is active, it notes each random operation of torch that does not use a generator on the CPU.

    Such numbers depend on the device, or on what the process drew before. A seed would then mean another image.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seeded = 0
        """Random operations with a generator on the CPU."""
        self.others: set[str] = set()
        """Names of the other ones."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            given = {each.name: each.default_value for each in func._schema.arguments}
            given |= dict(zip(given, args, strict=False)) | kwargs
            generator = given.get("generator")
            if generator is not None and generator.device.type == "cpu":
                self.seeded += 1
            elif given.get("dropout_p") != 0:  # attention draws random numbers for its dropout only
                self.others.add(str(func))
        return func(*args, **kwargs)
