"""All matrices of a step: first those that are given, then what the kernel makes of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastmeta.executors.fused.lowering import Recipe
from fastmeta.executors.fused.operations.views import Space, View


@dataclass(frozen=True)
class Sizes:
    """What a table of operations depends on beside the recipe; the parameters that adapt by name.

    `sweeps`: whether anything goes backward through the inner steps.
    """

    tasks: int
    support: int
    query: int
    steps: int
    adapted: tuple[str, ...]
    evaluates: tuple[bool, ...]
    differentiate: bool
    first_order: bool
    elementwise: bool
    learned_rates: bool
    keep_adapted: bool
    prox: float

    @property
    def sweeps(self) -> bool:
        return self.differentiate and (not self.first_order or self.learned_rates)


@dataclass(frozen=True)
class Trace:
    """What a layer keeps of a pass over a set: value before and after the activation, and the
    loss's derivative by both; `product` and `product_delta` are those before a norm.
    """

    product: View
    z: View
    value: View
    derivative: View
    delta: View
    product_delta: View
    mean: View
    inverse: View
    """Of the norm [1, H], as are the sums of `delta`, plain and along the normalised product."""
    plain: View
    along: View


@dataclass(frozen=True)
class Tangent:
    """Scratch of the Hessian-vector product, by layer; the last four of a norm."""

    z: View
    value: View
    delta: View
    normalised: View
    stretch: View
    plain: View
    along: View


@dataclass(frozen=True)
class Examples:
    """A set: what is given of it, and of each pass that is kept the traces by layer."""

    x: View
    targets: View
    weights: View
    factors: View
    missing: View
    """Added to the loss: 0, or no number where no label counts [1, 1]."""
    traces: list[list[Trace]] = field(default_factory=list[list[Trace]])
    softmax: list[View] = field(default_factory=list[View])
    """Of the predictions, under cross-entropy."""


class Layout:
    """The buffer of a step.

    `given` lists, in the order in which they begin the buffer, the data that a call fills in.
    """

    def __init__(self, recipe: Recipe, sizes: Sizes) -> None:
        self.recipe, self.sizes = recipe, sizes
        self.space = Space(sizes.tasks)
        self.given: list[str] = []
        shapes = [
            ((layer.outputs, layer.inputs), *[(1, layer.outputs)] * 3) for layer in recipe.layers
        ]
        constants = self._given("constants", 1, 2)
        self.zero, self.one = constants.at(0, 0), constants.at(0, 1)
        self.initial = [
            [
                self._given(name, *shape) if name else None
                for name, shape in zip(layer.tensors(), each, strict=True)
            ]
            for layer, each in zip(recipe.layers, shapes, strict=True)
        ]
        self.statistics = [
            self._given(f"statistics {i}", 2, layer.outputs)
            if layer.norm and not layer.norm.batch_statistics
            else None
            for i, layer in enumerate(recipe.layers)
        ]
        self.parameters = sum(v.rows * v.cols for row in self.initial for v in row if v)
        width = self.parameters if sizes.elementwise else 4 * len(recipe.layers)
        self.rates = self._given("rates", sizes.steps, width)
        self.worth = self._given("step weights", sizes.steps + 1, 1)
        inputs = self._set("support", sizes.support), self._set("query", sizes.query)
        self.data_size = self.space.size
        self.support = self._passes(inputs[0], max(1, sizes.steps) if sizes.sweeps else 1)
        self._make_results()
        self.query = self._passes(inputs[1], 1)
        self._make_weights()
        self._make_cotangents(sizes.steps * width)

    def _given(self, name: str, rows: int, cols: int, *, each: bool = False) -> View:
        self.given.append(name)
        return self.space.of_tasks(rows, cols) if each else self.space.shared(rows, cols)

    def _set(self, name: str, count: int) -> Examples:
        first, last = self.recipe.layers[0], self.recipe.layers[-1]
        weighted = not self.recipe.loss.of_classes and self.recipe.loss.weighted
        factors = self.one.throughout(count, last.outputs)
        return Examples(
            x=self._given(f"{name} x", count, first.inputs, each=True),
            targets=self._given(f"{name} targets", count, last.outputs, each=True),
            weights=self._given(f"{name} weights", count, 1, each=True),
            missing=self._given(f"{name} missing", min(1, count), 1, each=True),
            factors=self._given(f"{name} factors", count, last.outputs, each=True)
            if weighted
            else factors,
        )

    def _make_results(self) -> None:
        """What a call copies out: losses [K, T] and [K + 1, T], outputs, adapted parameters."""
        sizes, take = self.sizes, self.space.shared
        self.results_start = self.space.size
        self.support_losses = take(sizes.steps, sizes.tasks)
        self.step_losses = take(sizes.steps + 1, sizes.tasks)
        self.outputs = self.space.of_tasks(sizes.query, self.recipe.layers[-1].outputs)
        self.adapted = {
            name: self.space.of_tasks(view.rows, view.cols)
            for name, view in self._named()
            if sizes.keep_adapted and name in sizes.adapted
        }
        self.results_end = self.space.size

    def _named(self) -> list[tuple[str, View]]:
        pairs = [
            (name, view)
            for layer, views in zip(self.recipe.layers, self.initial, strict=True)
            for name, view in zip(layer.tensors(), views, strict=True)
        ]
        return [(name, view) for name, view in pairs if name and view]

    def _passes(self, given: Examples, kept: int) -> Examples:
        count, width = given.x.rows, self.recipe.layers[-1].outputs
        for _ in range(kept):
            given.traces.append([self._trace(i, count) for i in range(len(self.recipe.layers))])
            of_softmax = self.recipe.loss.of_classes
            given.softmax.append(self.space.of_tasks(count, width) if of_softmax else self.zero)
        return given

    def _trace(self, i: int, count: int) -> Trace:
        layer = self.recipe.layers[i]
        take, width = self.space.of_tasks, layer.outputs
        value, derivative = take(count, width), take(count, width)
        z = delta = None
        if layer.activation:
            z, delta = take(count, width), take(count, width)
        z, delta = z or value, delta or derivative
        product, product_delta = z, delta
        mean = inverse = plain = along = self.zero
        if layer.norm:
            product, product_delta = take(count, width), take(count, width)
            given = self.statistics[i]
            mean = given.below(0, 1) if given else self.zero
            inverse = given.below(1, 1) if given else take(1, width)
            plain, along = take(1, width), take(1, width)
        return Trace(
            product, z, value, derivative, delta, product_delta, mean, inverse, plain, along
        )

    def _make_weights(self) -> None:
        """Those that adapt, after each step; one block that all steps share, where none sweeps."""
        kept = self.sizes.steps if self.sizes.sweeps else 1
        self.moved = [
            {
                name: self.adapted.get(name) or self.space.of_tasks(view.rows, view.cols)
                for name, view in self._named()
                if name in self.sizes.adapted
            }
            for _ in range(kept)
        ]

    def _make_cotangents(self, rates: int) -> None:
        """lambda [1, P] and, right behind it, the learned rates' gradients: a task's share."""
        sizes, take = self.sizes, self.space.of_tasks
        self.gradients = 0
        if not sizes.differentiate:
            return
        self.gradients = self.parameters + (rates if sizes.learned_rates else 0)
        self.share = take(1, self.gradients)
        self.anchor = take(1, self.parameters)
        self.tangents: list[Tangent] = []
        for layer in self.recipe.layers if not sizes.first_order else ():
            z, delta = take(sizes.support, layer.outputs), take(sizes.support, layer.outputs)
            value = take(sizes.support, layer.outputs) if layer.activation else z
            normalised = stretch = plain = along = self.zero
            if layer.norm:
                normalised = take(sizes.support, layer.outputs)
                stretch, plain, along = (take(1, layer.outputs) for _ in range(3))
            self.tangents.append(Tangent(z, value, delta, normalised, stretch, plain, along))
