"""The meta-step as a table of operations: what csrc/maml.h says, equations in docs/design.md."""

from __future__ import annotations

from fastmeta.executors.fused.operations.layers import Layer, Tensors
from fastmeta.executors.fused.operations.layout import Examples, Layout
from fastmeta.executors.fused.operations.table import Table
from fastmeta.executors.fused.operations.views import View


def table(layout: Layout) -> Table:
    """All operations of one task's step, in order."""
    return _Sweep(layout).run()


class _Sweep:
    def __init__(self, layout: Layout) -> None:
        self.layout, self.recipe, self.sizes = layout, layout.recipe, layout.sizes
        self.table = Table(layout.one)
        self.layers = [
            Layer(self.table, dense, layout.zero, layout.one) for dense in self.recipe.layers
        ]
        self.names = [dense.tensors() for dense in self.recipe.layers]

    def run(self) -> Table:
        sizes, layout = self.sizes, self.layout
        if sizes.differentiate:
            self.table.product("SET", layout.share)
            self.table.product("SET", layout.anchor)
        for k in range(sizes.steps):
            if not sizes.sweeps:
                self.add_query(k)
            self.inner_step(k)
        self.add_query(sizes.steps)  # (2)
        for k in reversed(range(sizes.steps if sizes.sweeps else 0)):
            self.through_step(k)  # (3), (4)
            self.add_query(k)
        if sizes.differentiate and sizes.prox and not sizes.first_order:  # (5)
            anchor = layout.share.part(0, 1, layout.parameters)
            self.table.product("ADD", anchor, (layout.one, layout.anchor))
        if not sizes.steps:
            self.copy_adapted()
        return self.table

    def theta(self, k: int) -> list[Tensors]:
        """The parameters after k steps; what does not adapt stays where it was given."""
        if k == 0:
            return self.layout.initial
        moved = self.layout.moved[k - 1 if self.sizes.sweeps else 0]
        return [
            [moved.get(name, view) if name else None for name, view in zip(of, views, strict=True)]
            for of, views in zip(self.names, self.layout.initial, strict=True)
        ]

    def of_adapted(self, block: View, n: int) -> Tensors:
        """A layer's tensors that adapt, in a block [1, P] of all parameters."""
        return [
            view if name in self.sizes.adapted else None
            for name, view in zip(self.names[n], self.of_block(block, n), strict=True)
        ]

    def of_block(self, block: View, n: int) -> Tensors:
        """A layer's tensors in a block [1, P] of all parameters."""
        start, found = 0, list[View | None]()
        for layer, views in enumerate(self.layout.initial):
            for view in views:
                if layer == n:
                    found.append(view and block.part(start, view.rows, view.cols))
                start += view.rows * view.cols if view else 0
        return found

    def rates(self, k: int, n: int) -> Tensors:
        """The learning rates of a layer's tensors, each as large as the tensor; None: none."""
        rates = self.layout.rates.below(k, 1)
        if self.sizes.elementwise:
            return self.of_adapted(rates, n)
        return [
            rates.at(0, 4 * n + i).like(view) if view and name in self.sizes.adapted else None
            for i, (name, view) in enumerate(
                zip(self.names[n], self.layout.initial[n], strict=True)
            )
        ]

    def step_of(self, examples: Examples, k: int) -> int:
        """Which of the kept passes over a set is that of step k."""
        return k if len(examples.traces) > 1 else 0

    def input(self, examples: Examples, k: int, n: int) -> View:
        return examples.traces[self.step_of(examples, k)][n - 1].value if n else examples.x

    def forward(self, examples: Examples, k: int, value: View, worth: View) -> None:
        """Up to the loss, which goes to `value`; its derivative is weighed by `worth`."""
        step = self.step_of(examples, k)
        trace, theta = examples.traces[step], self.theta(k)
        for n, layer in enumerate(self.layers):
            layer.forward(self.input(examples, k, n), trace[n], theta[n])
        last = trace[-1]
        self.table.loss(
            "LOSS_FORWARD", self.recipe.loss.kind, self.recipe.loss.option, last.value,
            PREDICTION=last.value, TARGET=examples.targets, WEIGHT=examples.weights,
            FACTOR=examples.factors, MISSING=examples.missing, WORTH=worth,
            SOFTMAX=examples.softmax[step], VALUE=value, OUT=last.derivative,
        )  # fmt: skip

    def backward(self, examples: Examples, k: int) -> None:
        trace, theta = examples.traces[self.step_of(examples, k)], self.theta(k)
        self.layers[-1].backward_through_activation(trace[-1])
        for n in reversed(range(len(self.layers))):
            layer = self.layers[n]
            layer.backward_through_norm(trace[n], theta[n])
            if n > 0:
                layer.backward_input(trace[n], theta[n], self.layers[n - 1], trace[n - 1])

    def inner_step(self, k: int) -> None:  # (1)
        support = self.layout.support
        self.forward(
            support, k, self._of_task(self.layout.support_losses.below(k, 1)), self.layout.one
        )
        self.backward(support, k)
        trace = support.traces[self.step_of(support, k)]
        here, there, start = self.theta(k), self.theta(k + 1), self.theta(0)
        for n, layer in enumerate(self.layers):
            gradients = layer.gradients(self.input(support, k, n), trace[n])
            for i, rate in enumerate(self.rates(k, n)):
                p, anchor, out = here[n][i], start[n][i], there[n][i]
                if rate is None or p is None or anchor is None or out is None:
                    continue
                self.table.product(
                    "DESCEND", out, gradients[i], ending=(p, anchor, rate), prox=self.sizes.prox
                )

    def add_query(self, k: int) -> None:
        """`lambda += w_k grad L_q(theta_k)`."""
        value = self._of_task(self.layout.step_losses.below(k, 1))
        if not self.sizes.evaluates[k]:
            self.table.product("SET", value)
            return
        query = self.layout.query
        self.forward(query, k, value, self.layout.worth.at(k))
        if k == self.sizes.steps:
            self.copy(self.layout.outputs, query.traces[0][-1].value)
        if not self.sizes.differentiate:
            return
        self.backward(query, k)
        for n, layer in enumerate(self.layers):
            gradients = layer.gradients(self.input(query, k, n), query.traces[0][n])
            for out, factors in zip(self.of_block(self.layout.share, n), gradients, strict=True):
                if out:
                    self.table.product("ADD", out, factors)

    def through_step(self, k: int) -> None:
        if self.sizes.learned_rates:
            self.add_rate_gradients(k)
        if not self.sizes.first_order:
            self.subtract_hessian_product(k)

    def add_rate_gradients(self, k: int) -> None:  # (3)
        support, sizes = self.layout.support, self.sizes
        trace = support.traces[self.step_of(support, k)]
        here, start = self.theta(k), self.theta(0)
        width = self.layout.rates.cols
        block = self.layout.share.part(self.layout.parameters + k * width, 1, width)
        for n, layer in enumerate(self.layers):
            gradients = layer.gradients(self.input(support, k, n), trace[n])
            along = self.of_adapted(self.layout.share, n)
            for i, (p, anchor, cotangent) in enumerate(zip(here[n], start[n], along, strict=True)):
                if p is None or anchor is None or cotangent is None:
                    continue
                each = self.of_block(block, n)[i] if sizes.elementwise else None
                kind = "RATE_EACH" if each else "RATE_SUM"
                out = each or block.at(0, 4 * n + i).like(p)
                ending = (p, anchor, cotangent)
                self.table.product(kind, out, gradients[i], ending=ending, prox=sizes.prox)

    def subtract_hessian_product(self, k: int) -> None:
        """`lambda -= (H_k + prox I) (a_k * lambda)`, forward over reverse."""
        support, theta = self.layout.support, self.theta(k)
        step = self.step_of(support, k)
        trace, tangents = support.traces[step], self.layout.tangents
        depth = len(self.layers)
        along = [self.of_adapted(self.layout.share, n) for n in range(depth)]
        rates = [self.rates(k, n) for n in range(depth)]
        rx: list[View | None] = [None]
        for n, layer in enumerate(self.layers):
            moved = layer.tangent_forward(
                self.input(support, k, n), rx[n], trace[n], tangents[n], theta[n], along[n],
                rates[n],
            )  # fmt: skip
            rx.append(tangents[n].value if moved else None)
        self._tangent_of_loss(step)
        for n in reversed(range(depth)):
            layer, t, r = self.layers[n], trace[n], tangents[n]
            layer.tangent_backward_through_norm(
                t, r, theta[n], along[n], rates[n], rx[n + 1] is not None
            )
            if n > 0:
                layer.tangent_backward_input(
                    t, r, theta[n], along[n], rates[n],
                    self.layers[n - 1], trace[n - 1], tangents[n - 1], rx[n] is not None,
                )  # fmt: skip
            self._subtract(n, layer.hessians(self.input(support, k, n), rx[n], t, r), rates[n])

    def _tangent_of_loss(self, step: int) -> None:
        examples = self.layout.support
        last, r = examples.traces[step][-1], self.layout.tangents[-1]
        self.table.loss(
            "LOSS_TANGENT", self.recipe.loss.kind, self.recipe.loss.option, last.value,
            PREDICTION=last.value, TARGET=examples.targets, WEIGHT=examples.weights,
            FACTOR=examples.factors, SOFTMAX=examples.softmax[step], TANGENT=r.value,
            OUT=r.delta,
        )  # fmt: skip
        self.layers[-1].tangent_backward_through_activation(last, r)

    def _subtract(
        self, n: int, hessians: list[tuple[tuple[View, View], tuple[View, View] | None]],
        rates: Tensors,
    ) -> None:  # fmt: skip
        blocks = self.layout.share, self.layout.anchor
        outs = zip(*(self.of_block(block, n) for block in blocks), strict=True)
        for (out, anchor), (first, second), rate in zip(outs, hessians, rates, strict=True):
            if out and anchor:
                self.table.product(
                    "SUBTRACT", out, first, second, ending=(None, None, rate), out2=anchor,
                    prox=self.sizes.prox,
                )  # fmt: skip

    def copy_adapted(self) -> None:
        """Without a step they are what they were."""
        for of, views in zip(self.names, self.layout.initial, strict=True):
            for name, view in zip(of, views, strict=True):
                if name in self.layout.adapted and view:
                    self.copy(self.layout.adapted[name], view)

    def copy(self, out: View, view: View) -> None:
        self.table.product("SET", out.flat, (self.layout.one, view.flat))

    def _of_task(self, losses: View) -> View:
        """A task's number in a row [1, T]."""
        return View(losses.offset, 1, 1, 1, 0, 0)
