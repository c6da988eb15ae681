"""The argument `inner_optimizer`, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta.inner.optimizer import InnerOptimizer
from fastmeta.inner.rule import UpdateRule
from fastmeta.inner.sgd import SGD
from fastmeta.wording import a_kind

_TASKS = 2
"""The number of tasks in the step that checks a user's own rule."""


def inner_optimizer(value: Any) -> InnerOptimizer:
    """The update rule that an argument stands for; None is plain gradient descent.

    **Raises** `TypeError` for anything that is no instance of `InnerOptimizer`.
    """
    if value is None:
        return SGD()
    if isinstance(value, InnerOptimizer):
        return value
    if isinstance(value, type):
        instead = f"; write {value.__name__}()" if issubclass(value, InnerOptimizer) else ""
        raise TypeError(
            f"inner_optimizer: the class {value.__name__}; it must be an instance of "
            f"fastmeta.inner.InnerOptimizer{instead}"
        )
    instead = ""
    if isinstance(value, torch.optim.Optimizer):
        instead = "; those of torch.optim change parameters in place, so that nothing flows back"
    raise TypeError(
        f"inner_optimizer: {a_kind(value)}; it must be None, one of fastmeta.inner's, or an "
        f"instance of your own fastmeta.inner.InnerOptimizer{instead}"
    )


def check_own_rule(
    rule: InnerOptimizer, parameters: Mapping[str, Tensor], rates: Mapping[str, Any]
) -> None:
    """Take a first step by a user's own rule, and look at what it returns and what it read.

    A rule that fails does so again where it is run.

    **Raises** `ValueError` where a parameter is left out or changes its shape, and for a tensor
    that would get no gradient because `leaves()` does not name it.
    """
    if isinstance(rule, UpdateRule):
        return
    with torch.enable_grad():
        theta = {
            name: p.detach().expand(_TASKS, *p.shape).clone().requires_grad_()
            for name, p in parameters.items()
        }
        gradients = {name: torch.zeros_like(p).requires_grad_() for name, p in theta.items()}
        try:
            moved, state = rule.update(gradients, rule.init(theta), theta, rates, 0)
            shapes = {name: p.shape for name, p in moved.items()}
        except Exception:
            return
    results, wanted = (moved, state), {name: p.shape for name, p in theta.items()}
    if shapes != wanted:
        name = next(n for n in (*wanted, *shapes) if shapes.get(n) != wanted.get(n))
        found = "is left out" if name not in shapes else f"has shape {_of_tasks(shapes[name])}"
        needed = f"must be {_of_tasks(wanted[name])}" if name in wanted else "does not adapt"
        raise ValueError(
            f"inner_optimizer: in what {type(rule).__name__}.update returns, {name!r} {found}, but "
            f"{needed}; return all parameters that were given, an unchanged one as it is"
        )
    known = [*theta.values(), *gradients.values(), *rule.leaves().values()]
    hidden = _leaf_outside(results, known)
    if hidden is not None:
        own = type(rule).__name__
        raise ValueError(
            f"inner_optimizer: {own} reads a tensor {list(hidden.shape)} that requires grad and is "
            "none of its leaves(), so that it would get no gradient; make it an attribute of the "
            f"rule, or a parameter of class {own}(InnerOptimizer, nn.Module), or detach it"
        )


def _of_tasks(shape: torch.Size) -> str:
    sizes = ["T", *map(str, shape[1:])] if shape[:1] == (_TASKS,) else map(str, shape)
    return f"[{', '.join(sizes)}]"


def _leaf_outside(results: Any, known: list[Tensor]) -> Tensor | None:
    """A leaf of autograd's that results depend on, other than through the known tensors."""
    tensors = [each for each in pytree.tree_leaves(results) if isinstance(each, Tensor)]
    waiting = [each.grad_fn for each in tensors]
    seen: set[Any] = {None, *(each.grad_fn for each in known)}
    while waiting:
        node: Any = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor) and all(variable is not each for each in known):
            return variable
        waiting += [following for following, _ in node.next_functions]
    return None
