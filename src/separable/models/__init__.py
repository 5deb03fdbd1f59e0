"""Standard networks: MobileNetV1 with regular and with separable convolutions."""

from .mobilenet import MobileNetV1, load_timm_state_dict, mobilenet_v1

__all__ = ["MobileNetV1", "load_timm_state_dict", "mobilenet_v1"]
