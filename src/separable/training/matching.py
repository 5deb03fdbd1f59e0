"""Feature matching: modules of the same name in student and teacher are to return the same."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion import SeparatedConv


def block_ends(student: nn.Module, teacher: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the modules whose outputs are to match.

    Args:
        student: the network in training.
        teacher: its original.
        patterns: names, or patterns as in `layer1.*`; where there are none, the modules that
            hold a converted convolution, or the convolution itself where that is the network.

    Raises:
        ValueError: a pattern names no module that both have, or nothing is found.
    """
    own = [name for name, _ in student.named_modules() if name]
    both = {name for name, _ in teacher.named_modules() if name}.intersection(own)
    if patterns:
        for pattern in patterns:
            if not fnmatch.filter(both, pattern):
                raise ValueError(
                    f"`blocks` (={pattern!r}) names no module that student and teacher both have"
                )
        return [n for n in own if n in both and any(fnmatch.fnmatch(n, p) for p in patterns)]
    converted = [n for n, module in student.named_modules() if isinstance(module, SeparatedConv)]
    lists = nn.ModuleList, nn.ModuleDict  # return nothing themselves
    holders = []
    for name in converted:
        holder = name.rpartition(".")[0]
        is_list = isinstance(student.get_submodule(holder), lists)
        holders.append(name if is_list or not holder else holder)
    found = [name for name in dict.fromkeys(holders) if name in both]
    if not found:
        raise ValueError(
            "`features` needs modules to match, and `student` has no converted layers: name "
            "modules that student and teacher both have, as in blocks=('layer1.*',), or use "
            "features=0"
        )
    return found


class Matching:
    """Records what the matched modules return while it is entered; a context manager.

    Args:
        student: the network in training.
        teacher: its original.
        patterns: as in `block_ends`.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, patterns: Sequence[str]) -> None:
        self.names = block_ends(student, teacher, patterns)
        self.networks = (student, teacher)

    def __deepcopy__(self, _: Any) -> Matching:
        return self

    def __enter__(self) -> Matching:
        self.seen: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        self.handles = [
            network.get_submodule(name).register_forward_hook(self._recorder(seen, name))
            for network, seen in zip(self.networks, self.seen, strict=True)
            for name in self.names
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    @staticmethod
    def _recorder(seen: dict[str, Tensor], name: str) -> Any:
        def record(_: nn.Module, __: Any, output: Any) -> Any:
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"`blocks`: {name!r} returns a {type(output).__name__}; name modules that "
                    "return a tensor, or use features=0"
                )
            seen[name] = output
            return output.clone()  # what follows may write in place

        return record

    def loss(self) -> Tensor:
        """Mean over the modules of the squared error, relative to the teacher's variance."""
        of_student, of_teacher = self.seen
        errors = []
        if not of_student or of_student.keys() - of_teacher.keys():
            called = ", ".join(of_student) or "none"
            raise ValueError(
                f"`blocks`: of {', '.join(self.names)} the student calls {called}, the teacher "
                f"{', '.join(of_teacher) or 'none'}; name modules that both call, or use features=0"
            )
        for name, output in of_student.items():
            goal = of_teacher[name].float()
            if output.shape != goal.shape:
                raise ValueError(
                    f"`blocks`: {name!r} returns {tuple(output.shape)} in the student and "
                    f"{tuple(goal.shape)} in the teacher"
                )
            spread = goal.var(unbiased=False).clamp(min=torch.finfo(goal.dtype).tiny)
            errors.append((output.float() - goal).square().mean() / spread)
        return torch.stack(errors).mean()
