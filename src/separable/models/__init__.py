"""Standard networks: MobileNetV1 in its separable and regular form, and others by name."""

from .mobilenet import MobileNetV1, load_timm_state_dict, mobilenet_v1
from .registry import create_model
from .weights import load_weights

__all__ = [
    "MobileNetV1",
    "create_model",
    "load_timm_state_dict",
    "load_weights",
    "mobilenet_v1",
]
