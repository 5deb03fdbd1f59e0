"""Standard networks: MobileNetV1 with regular and with separable convolutions."""
