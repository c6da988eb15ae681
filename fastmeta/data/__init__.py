"""Tasks to learn from: sinusoids, N-way K-shot episodes, and readers of three small data sets."""

from fastmeta.data.ag_news import ag_news
from fastmeta.data.episodes import Episodes, rotated_classes
from fastmeta.data.mnist import mnist
from fastmeta.data.omniglot import Omniglot, omniglot
from fastmeta.data.sinusoid import Sinusoid, SinusoidTasks

__all__ = [
    "Episodes",
    "Omniglot",
    "Sinusoid",
    "SinusoidTasks",
    "ag_news",
    "mnist",
    "omniglot",
    "rotated_classes",
]
