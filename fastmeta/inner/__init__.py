"""Inner optimizers: the update rules by which a task's parameters move."""

from fastmeta.inner.adam import Adam, AdamW
from fastmeta.inner.optimizer import InnerOptimizer
from fastmeta.inner.rmsprop import RMSprop
from fastmeta.inner.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "InnerOptimizer", "RMSprop"]
