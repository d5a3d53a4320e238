"""sidebench: adapt frozen networks from a cache of their activations, and measure what each way costs."""

__version__ = "0.1.0"
