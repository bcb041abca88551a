"""The reader: a table file becomes entries that answer. Small, and all that a training loop imports of lutest."""

__version__ = "0.1.0"
