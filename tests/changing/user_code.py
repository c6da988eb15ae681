"""A user's module: activations, each of which reads something in a way of its own.

Loaded afresh for every program of changes, so that what a program does to it ends with it.
"""

import functools
import os
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

SLOPE = 0.1
SLOPES = [0.1]
OPTIONS = {"slope": 0.1}
SCALE = torch.tensor(0.5, dtype=torch.float64)
rectify = F.relu


class Options:
    slope = 0.1


def helper(x):
    return F.leaky_relu(x, SLOPE)


def outer_helper(x):
    return helper(x) + 0.1 * x


def with_default(x, slope=0.1):
    return F.leaky_relu(x, slope)


def with_keyword_default(x, *, slope=0.1):
    return F.leaky_relu(x, slope)


def with_attribute(x):
    return F.leaky_relu(x, with_attribute.slope)


with_attribute.slope = 0.1


def closing_over(slope):
    def closed(x):
        return F.leaky_relu(x, slope)

    return closed


closed_helper = closing_over(0.1)
partial_helper = functools.partial(with_default, slope=0.1)


def wrapped(function):
    @functools.wraps(function)
    def wrapper(x):
        return function(x)

    return wrapper


wrapped_helper = wrapped(helper)


class Slope:
    """A callable object."""

    def __init__(self):
        self.slope = 0.1

    def __call__(self, x):
        return F.leaky_relu(x, self.slope)


class ByGlobal(nn.Module):
    def forward(self, x):
        return F.leaky_relu(x, SLOPE)


class ByGlobalList(nn.Module):
    def forward(self, x):
        return F.leaky_relu(x, SLOPES[0])


class ByGlobalDict(nn.Module):
    def forward(self, x):
        return F.leaky_relu(x, OPTIONS["slope"])


class ByGlobalClass(nn.Module):
    def forward(self, x):
        return F.leaky_relu(x, Options.slope)


class ByGlobalTensor(nn.Module):
    def forward(self, x):
        return F.relu(x) * SCALE.to(x.dtype)


class ByGlobalFunction(nn.Module):
    def forward(self, x):
        return rectify(x)


class ByEnvironment(nn.Module):
    def forward(self, x):
        return F.leaky_relu(x, float(os.environ.get("CHANGING_SLOPE", "0.1")))


class ByHelper(nn.Module):
    def forward(self, x):
        return helper(x)


class ByOuterHelper(nn.Module):
    def forward(self, x):
        return outer_helper(x)


class ByDefault(nn.Module):
    def forward(self, x):
        return with_default(x)


class ByKeywordDefault(nn.Module):
    def forward(self, x):
        return with_keyword_default(x)


class ByFunctionAttribute(nn.Module):
    def forward(self, x):
        return with_attribute(x)


class ByClosedHelper(nn.Module):
    def forward(self, x):
        return closed_helper(x)


class ByPartial(nn.Module):
    def forward(self, x):
        return partial_helper(x)


class ByWrapped(nn.Module):
    def forward(self, x):
        return wrapped_helper(x)


class ByTorchsDefault(nn.Module):
    def forward(self, x):
        return F.leaky_relu(x)


class ByBuiltin(nn.Module):
    def forward(self, x):
        return F.leaky_relu(x, min(0.1, 0.4))


class ByOwnDefault(nn.Module):
    def forward(self, x, slope=0.1):
        return F.leaky_relu(x, slope)


class ByFlag(nn.Module):
    def forward(self, x, smooth=False):
        if smooth:
            return torch.tanh(x)
        return F.relu(x)


def _by_cell(slope):
    class ByCell(nn.Module):
        def forward(self, x):
            return F.leaky_relu(x, slope)

    return ByCell


ByCell = _by_cell(0.1)


class Base(nn.Module):
    slope = 0.1

    def __init__(self):
        super().__init__()
        self.own, self.listed = 0.1, [0.1]
        self.settings, self.called = SimpleNamespace(slope=0.1), Slope()
        self.function = F.relu
        self.passed = lambda x: F.leaky_relu(x, SLOPE)
        self.scale = torch.tensor(0.5, dtype=torch.float64)
        self.unread = 0

    def middle(self, x):
        return F.leaky_relu(x, self.own)

    def forward(self, x):
        return self.middle(x)


class ByAttribute(Base):
    pass


class ByMethod(Base):
    def middle(self, x):
        return F.relu(x)


class BySuper(ByMethod):
    def middle(self, x):
        return super().middle(x) + 0.1 * x


class Inheriting(ByMethod):
    pass


class ByInherited(Inheriting):
    pass


class ByClass(Base):
    def middle(self, x):
        return F.leaky_relu(x, self.slope)


class ByList(Base):
    def middle(self, x):
        return F.leaky_relu(x, self.listed[0])


class BySettings(Base):
    def middle(self, x):
        return F.leaky_relu(x, self.settings.slope)


class ByCalled(Base):
    def middle(self, x):
        return self.called(x)


class ByFunction(Base):
    def middle(self, x):
        return self.function(x)


class ByLambda(Base):
    def middle(self, x):
        return self.passed(x)


class ByTensor(Base):
    def middle(self, x):
        return F.relu(x) * self.scale.to(x.dtype)


class ByProperty(Base):
    @property
    def steepness(self):
        return 2 * self.own

    def middle(self, x):
        return F.leaky_relu(x, self.steepness)


class ByStatic(Base):
    @staticmethod
    def rectified(x):
        return F.relu(x)

    def middle(self, x):
        return self.rectified(x)


class ByClassMethod(Base):
    @classmethod
    def rectified(cls, x):
        return F.leaky_relu(x, cls.slope)

    def middle(self, x):
        return self.rectified(x)


class ByTraining(Base):
    def middle(self, x):
        return F.relu(x) if self.training else torch.tanh(x)


class ByBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(0.5, dtype=torch.float64))

    def forward(self, x):
        return F.relu(x) * self.scale


class ByDeterminism(nn.Module):
    def forward(self, x):
        return F.relu(x) if torch.are_deterministic_algorithms_enabled() else torch.tanh(x)


class ByDefaultDtype(nn.Module):
    def forward(self, x):
        return F.relu(x) if torch.get_default_dtype() == torch.float32 else torch.tanh(x)


class ByThreads(nn.Module):
    def forward(self, x):
        return F.relu(x) if torch.get_num_threads() == 1 else torch.tanh(x)


class ByBackend(nn.Module):
    def forward(self, x):
        return F.relu(x) if torch.backends.mkldnn.enabled else torch.tanh(x)


class ByGradMode(nn.Module):
    def forward(self, x):
        return F.relu(x) if torch.is_grad_enabled() else torch.tanh(x)


class ByCount(nn.Module):
    def forward(self, x):
        return F.relu(x) if x.shape[0] < 6 else torch.tanh(x)


class ByDtype(nn.Module):
    def forward(self, x):
        return F.relu(x) if x.dtype == torch.float64 else torch.tanh(x)


class ByTorch(nn.Module):
    def forward(self, x):
        return torch.relu(x)


class ByFunctional(nn.Module):
    def forward(self, x):
        return F.relu(x)


class ByTensorMethod(nn.Module):
    def forward(self, x):
        return x.relu()


class Residual(nn.Module):
    """Two layers with a sum."""

    def __init__(self, first, middle, second, last):
        super().__init__()
        self.first, self.middle, self.second, self.last = first, middle, second, last

    def forward(self, x):
        h = self.middle(self.first(x))
        return self.last(self.second(h) + h)
