"""Fused, batched inner loops for meta-learning, behind one call."""

from fastmeta import data, inner
from fastmeta.adaptation import AdaptedTasks, adapt
from fastmeta.algorithms.imaml import IMAML, ImplicitStep, imaml_step
from fastmeta.algorithms.maml import MAML, maml_step
from fastmeta.algorithms.prototypical import Prototypical, prototypical_step
from fastmeta.algorithms.reptile import Reptile, reptile_step
from fastmeta.backends import backends
from fastmeta.evaluation import Evaluation, evaluate
from fastmeta.explanation import explain
from fastmeta.linearize import Linearization, linearize
from fastmeta.plan.cliff import set_cliff_warnings
from fastmeta.plan.snapshot import clear_cache
from fastmeta.result import MetaStep
from fastmeta.version import __version__

__all__ = [
    "IMAML",
    "MAML",
    "AdaptedTasks",
    "Evaluation",
    "ImplicitStep",
    "Linearization",
    "MetaStep",
    "Prototypical",
    "Reptile",
    "__version__",
    "adapt",
    "backends",
    "clear_cache",
    "data",
    "evaluate",
    "explain",
    "imaml_step",
    "inner",
    "linearize",
    "maml_step",
    "prototypical_step",
    "reptile_step",
    "set_cliff_warnings",
]
