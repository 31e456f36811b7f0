"""jaxchat: the whole life of a small ChatGPT, on JAX and Flax NNX.

Nouns live here, verbs in `scripts/`. A module imports only from floors below its own
(README.md draws the house); importing this package imports nothing heavy.
"""

__version__ = "0.1.0"
