"""The whole story on real data: train both forms of a network, count, measure and draw them."""

from .story import Contender, Story, tell

__all__ = ["Contender", "Story", "tell"]
