"""charjax: train a character into a language model, end to end, in JAX."""

__version__ = '0.1.0'
