"""Features kept: the layers in front of the parameters that adapt run once a task and set.

A pass is a function of its tensors. While one runs, two kinds of calls are looked at: of modules
that hold no adapted parameter, the outermost of them, and of torch functions outside such modules.
Called with the very tensors of an earlier pass over the same set (its data, parameters that do not
adapt, results of such calls), they give what they gave then. Everything else runs as it stands.

The results are cut from the tape where other code reads them, so that the inner loop never walks
the body's graph; one backward through that graph ends the task (docs/design.md, "Features kept").
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from fastmeta.executors.generic.calls import Call, Opaque, key_of, mapped, reads_parameters
from fastmeta.executors.problem import Problem
from fastmeta.network.hooks import GLOBAL_HOOKS, has_hooks
from fastmeta.network.random_state import generators, have_moved, set_generators
from fastmeta.network.stateless import StatelessModel, private, swapping
from fastmeta.tasks import Tree


class NotKept(RuntimeError):
    """The features can't be kept; the message says why, and the step runs the body every time."""


def worth_keeping(problem: Problem, differentiates_again: bool) -> bool:
    """Return whether some parameter does not adapt, and that a set is seen more than once."""
    inner = problem.inner
    if len(inner.adapted) == len(problem.model.all_parameters()) or problem.tasks.per_step:
        return False
    if differentiates_again and problem.differentiate and inner.steps:
        return True
    queries = sum(problem.evaluates(step) for step in range(inner.steps + 1))
    return inner.steps > 1 or queries > 1


def body(module: nn.Module, adapted: Collection[int]) -> list[nn.Module]:
    """The outermost modules without an adapted parameter; `adapted` holds their identities.

    **Raises** `NotKept` where one of them has a hook, which is to run at every pass.
    """
    if any(id(p) in adapted for p in module.parameters()):
        parts = [part for child in module.children() for part in body(child, adapted)]
        return [*{id(part): part for part in parts}.values()]
    for part in module.modules():
        if has_hooks(part) or any(GLOBAL_HOOKS):
            raise NotKept(f"{type(part).__name__} has hooks")
    return [module]


class Body:
    """The modules whose calls are kept, and the buffers that they and others may read."""

    def __init__(self, problem: Problem) -> None:
        self.model = model = problem.model
        originals = model.parameters()
        self.device = problem.task_weights.device
        self.differentiate = problem.differentiate
        self.draws = problem.draws_random
        adapted = {id(originals[name]) for name in problem.inner.adapted}
        self.modules = [(part, part.forward) for part in body(model.module, adapted)]
        self._norms = {
            name
            for name, part in model.module.named_modules()
            if isinstance(part, nn.modules.batchnorm._NormBase)
        }

    @contextmanager
    def led_to(self, called: Callable[..., Any]) -> Generator[None, None, None]:
        """Lead calls of the modules to `called(module, forward, ...)`, for a time."""
        before = [module.__dict__.get("forward") for module, _ in self.modules]

        def put_back() -> None:
            for (module, _), own in zip(self.modules, before, strict=True):
                if own is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.__dict__["forward"] = own

        try:
            try:
                for module, forward in self.modules:
                    module.__dict__["forward"] = partial(called, module, forward)
                yield
            finally:
                put_back()
        except BaseException:
            put_back()  # once more, because an interrupt may have come while it was
            raise

    def buffers(self) -> dict[str, Tensor]:
        """A copy of every buffer, but of those written behind the version counter's back."""
        model = self.model
        return {
            name: private(model.module.get_buffer(name))
            for name in model.may_write
            if name.rpartition(".")[0] not in self._norms
        }


class Kept(TorchFunctionMode):
    """The model over one set of one task: what the first pass found is used by the others.

    Takes the place of `StatelessModel`. `leaves` are the tensors that require grad and stay the
    same from pass to pass. With `cut`, the results of kept calls are given out as leaves of their
    own, `features`; `roots` are the same on the tape.
    """

    def __init__(self, body: Body, leaves: Iterable[Tensor], cut: bool) -> None:
        super().__init__()
        self._body, self._cut = body, cut
        self._given = frozenset(id(leaf) for leaf in leaves)
        self._leaves = set(self._given)
        self._calls: dict[Any, Call] = {}
        self._root_of: dict[int, Tensor] = {}  # by identity of the feature
        self._feature_of: dict[int, Tensor] = {}  # by identity of the root
        self._buffers: dict[str, Tensor] = {}
        self._grad_mode: bool | None = None
        self._recording = self._inside = self._walked = self._found_parameters = False

    @property
    def features(self) -> list[Tensor]:
        """The leaves given out in place of results that require grad."""
        return [*self._feature_of.values()]

    @property
    def roots(self) -> list[Tensor]:
        """The results on the tape, in the order of `features`."""
        return [*self._root_of.values()]

    def __call__(
        self, tensors: Mapping[str, Tensor], inputs: Tree, scratch: Mapping[str, Tensor]
    ) -> Any:
        """The prediction, as `StatelessModel` gives it."""
        model = self._body.model
        if self._grad_mode is None:
            self._grad_mode, self._recording = torch.is_grad_enabled(), True
            self._buffers = self._body.buffers()
        elif self._grad_mode != torch.is_grad_enabled():
            return model(tensors, inputs, scratch)
        elif any(buffer._version for buffer in self._buffers.values()):
            self._buffers = self._body.buffers()
        # Under vmap, which has no access to them, what was planned has to do.
        drawn = generators(self._body.device) if self._recording and self._cut else []
        with swapping, self._body.led_to(self._module_called):
            try:
                with self:
                    prediction = model({**tensors, **self._buffers}, inputs, scratch)
            finally:
                first, self._recording = self._recording, False
        if first and not self._found_parameters:
            raise NotKept("no parameter is read in front of those that adapt")
        if drawn and not self._body.draws and have_moved(drawn, self._body.device):
            raise NotKept("a forward pass draws random numbers, as it did not when it was planned")
        return prediction

    def tape(self) -> list[Tensor]:
        """The roots, at the first call; nothing later."""
        found = [] if self._walked else self.roots
        self._walked = True
        return found

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # Within this call the mode is off.
        if not self._inside:
            if func in _UNKEPT:
                raise NotKept(f"the forward calls {func.__name__}")
            known = self._known(func, func, args, kwargs or {})
            if known is not None:
                return known[0]
        return func(*args, **(kwargs or {}))

    def _module_called(
        self, module: nn.Module, forward: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        if self._inside:
            return forward(*args, **kwargs)
        # Looking at every function of a module that runs as a whole would be waste.
        off = _get_current_function_mode() is self
        if off:
            self.__exit__(None, None, None)
        self._inside = True
        try:
            known = self._known(module, forward, args, kwargs)
        finally:
            self._inside = False
            if off:
                self.__enter__()
        return forward(*args, **kwargs) if known is None else known[0]

    def _known(self, called: Any, function: Any, args: Any, kwargs: Any) -> tuple[Any] | None:
        """A call's result, recorded at the first pass; None where it has to run as it stands."""
        # Most that runs at every pass is identified by its first few arguments.
        for given in args:
            if isinstance(given, Tensor) and not self._stays(given):
                return None
        tensors: list[Tensor] = []
        try:
            key = called, key_of(args, tensors), key_of(kwargs, tensors) if kwargs else ()
        except Opaque:
            return None
        for tensor in tensors:
            if not self._stays(tensor):
                return None
        found = self._calls.get(key)
        if found is not None and found.holds():
            return (found.output,)
        return self._record(key, function, args, kwargs, tensors) if self._recording else None

    def _stays(self, tensor: Tensor) -> bool:
        """Tell a tensor that no adapted parameter reaches, by way of autograd."""
        return not tensor.requires_grad or id(tensor) in self._leaves

    def _record(
        self, key: Any, function: Any, args: Any, kwargs: Any, tensors: list[Tensor]
    ) -> tuple[Any] | None:
        name = getattr(function, "__qualname__", None) or type(key[0]).__name__
        versions = [tensor._version for tensor in tensors]
        drawn = generators(self._body.device) if self._body.draws else []
        output = function(*mapped(self._root, args), **mapped(self._root, kwargs))
        if any(t._version != v for t, v in zip(tensors, versions, strict=True)):
            if any(id(tensor) in self._root_of for tensor in tensors):
                raise NotKept(f"{name} writes to its input in place")
            return (output,)
        if drawn and have_moved(drawn, self._body.device):
            set_generators(drawn, self._body.device)
            return None
        results: list[Tensor] = []
        try:
            key_of(output, results)
        except Opaque as reason:
            raise NotKept(f"{name} returns a {reason}") from None
        if not results:
            return (output,)
        if not self._body.differentiate and any(r.requires_grad for r in results):
            raise NotKept(f"{name} reads a parameter that adapts")
        if not self._found_parameters:
            self._found_parameters = reads_parameters(key[0], tensors, self._given)
        kept = [*map(self._feature, results)]
        position = iter(kept)
        output = mapped(lambda _: next(position), output)
        self._calls[key] = call = Call(output, [*tensors, *kept])
        return (call.output,)

    def _root(self, leaf: Tensor) -> Tensor:
        return self._root_of.get(id(leaf), leaf)

    def _feature(self, leaf: Tensor) -> Tensor:
        """The tensor that other code is given in place of a result."""
        if not leaf.requires_grad or id(leaf) in self._leaves:
            return leaf
        if not self._cut:
            self._leaves.add(id(leaf))
            return leaf
        feature = self._feature_of.get(id(leaf))
        if feature is None:
            feature = self._feature_of[id(leaf)] = leaf.detach().requires_grad_()
            self._root_of[id(feature)] = leaf
            self._leaves.add(id(feature))
        return feature


Model = StatelessModel | Kept


def features_of(models: Iterable[Model]) -> list[Tensor]:
    """The features that one task's models have given out."""
    return [f for model in models if isinstance(model, Kept) for f in model.features]


def through_body(
    models: Iterable[Model],
    cotangents: Mapping[int, Tensor | None],
    leaves: Sequence[Tensor],
    adapted: Iterable[Tensor],
    retain_graph: bool,
) -> list[Tensor | None]:
    """The gradients by `leaves` that the features' cotangents, by identity, give on the tape.

    **Raises** `NotKept` where one of the parameters that adapt is among what they flow back to.
    """
    roots: list[Tensor] = []
    given: list[Tensor] = []
    for model in models:
        if isinstance(model, Kept):
            for feature, root in zip(model.features, model.roots, strict=True):
                cotangent = cotangents.get(id(feature))
                if cotangent is not None:
                    roots.append(root)
                    given.append(cotangent)
    if not roots:
        return [None] * len(leaves)
    moving = {id(parameter) for parameter in adapted}
    gradients = torch.autograd.grad(
        roots, leaves, given, allow_unused=True, retain_graph=retain_graph
    )
    for leaf, gradient in zip(leaves, gradients, strict=True):
        if id(leaf) in moving and gradient is not None:  # pyright: ignore[reportUnnecessaryComparison]
            raise NotKept("a module in front of the parameters that adapt reads one of them")
    return [*gradients]


_UNKEPT = frozenset(
    (Tensor.backward, Tensor.register_hook, Tensor.requires_grad_, Tensor.retain_grad,
     torch.autograd.backward, torch.autograd.grad)
)  # fmt: skip
"""Functions for whose sake a tensor's own place on the tape matters."""
