"""Counters of others, each asked in the same way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn


class Counter(NamedTuple):
    """A counter, and how it is asked.

    Attributes:
        package: the package that has it.
        convention: what it counts, and how its figure becomes MACs.
        ask: returns the MACs of a module for one input tensor, the whole batch.
    """

    package: str
    convention: str
    ask: Callable[[nn.Module, Tensor], int]


def _thop(model: nn.Module, x: Tensor) -> int:
    import thop

    return int(thop.profile(model, inputs=(x,), verbose=False)[0])


def _fvcore(model: nn.Module, x: Tensor) -> int:
    from fvcore.nn import FlopCountAnalysis

    analysis = FlopCountAnalysis(model, (x,))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return int(analysis.total())


def _ptflops(model: nn.Module, x: Tensor) -> int:
    from ptflops import get_model_complexity_info

    def figure(functional: bool) -> int:
        macs, _ = get_model_complexity_info(
            copy.deepcopy(model),
            tuple(x.shape),
            input_constructor=lambda size: x,
            as_strings=False,
            print_per_layer_stat=False,
            backend="pytorch",
            backend_specific_config={"count_functional": functional},
        )
        if macs is None:
            raise RuntimeError("ptflops gave up")
        return int(macs)

    # modules are divided by the batch, functions are not
    batch = len(x) if x.dim() else 1
    return figure(True) + (batch - 1) * figure(False) if batch > 1 else figure(True)


def _torchinfo(model: nn.Module, x: Tensor) -> int:
    import torchinfo

    return int(torchinfo.summary(model, input_data=(x,), verbose=0).total_mult_adds)


def _flop_counter_mode(model: nn.Module, x: Tensor) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(x)
    return int(counter.get_total_flops()) // 2


COUNTERS: dict[str, Counter] = {
    "thop": Counter("thop", "MACs of modules of known types, with norms and pools", _thop),
    "fvcore": Counter("fvcore", "MACs of a traced graph, with norms and means", _fvcore),
    "ptflops": Counter(
        "ptflops", "MACs of modules (× batch) and functions, with biases and activations", _ptflops
    ),
    "torchinfo": Counter("torchinfo", "parameters × output positions, with biases", _torchinfo),
    "FlopCounterMode": Counter(
        "torch", "FLOPs / 2 of convolutions and matrix products", _flop_counter_mode
    ),
}
