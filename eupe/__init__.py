"""Cache the features of vision foundation models once; distil small encoders from the cache."""

__version__ = "0.1.0"
