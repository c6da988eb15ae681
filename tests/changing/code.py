"""Changes to a user's own Python: what a forward reads, and the functions that it calls."""

from __future__ import annotations

import os
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from changing.kinds import Change, attribute, change, put, put_item
from changing.world import World

Owner = Callable[[World], Any]


def own(name: str) -> Owner:
    """The user's object of that name."""
    return lambda world: getattr(world.code, name)


def module(name: str) -> Owner:
    """The user's module of that class."""
    return lambda world: world.reader(name)


def the_code(world: World) -> Any:
    """The user's globals."""
    return world.code


def _tanh(x: Any) -> Any:
    return torch.tanh(x)


def _tanh_of_self(self: Any, x: Any) -> Any:
    return torch.tanh(x)


def _tanh_with_slope(x: Any, slope: float = 0.1) -> Any:
    return torch.tanh(x)


attribute("global constant", "ByGlobal", the_code, "SLOPE", 0.4)
attribute("global constant of a helper", "ByHelper", the_code, "SLOPE", 0.4)
attribute("global constant of a helper's helper", "ByOuterHelper", the_code, "SLOPE", 0.4)
attribute("global list bound anew", "ByGlobalList", the_code, "SLOPES", [0.4])
attribute("global function", "ByGlobalFunction", the_code, "rectify", torch.tanh)
attribute("global helper", "ByHelper", the_code, "helper", _tanh)
attribute("global helper of a helper", "ByOuterHelper", the_code, "helper", _tanh)
attribute("global partial", "ByPartial", the_code, "partial_helper", _tanh)
attribute("global tensor", "ByGlobalTensor", the_code, "SCALE", torch.tensor(2.0).double())
attribute("attribute of a global class", "ByGlobalClass", own("Options"), "slope", 0.4)
attribute("attribute of a function", "ByFunctionAttribute", own("with_attribute"), "slope", 0.4)
attribute("attribute", "ByAttribute", module("ByAttribute"), "own", 0.4)
attribute("attribute that a property reads", "ByProperty", module("ByProperty"), "own", 0.4)
attribute("attribute list bound anew", "ByList", module("ByList"), "listed", [0.4])
attribute("field of an attribute", "BySettings", lambda w: w.reader("BySettings").settings,
          "slope", 0.4)  # fmt: skip
attribute("field of a callable attribute", "ByCalled", lambda w: w.reader("ByCalled").called,
          "slope", 0.4)  # fmt: skip
attribute("function as attribute", "ByFunction", module("ByFunction"), "function", torch.tanh)
attribute("lambda as attribute", "ByLambda", module("ByLambda"), "passed", _tanh)
attribute("global constant of a lambda", "ByLambda", the_code, "SLOPE", 0.4)
attribute("tensor as attribute", "ByTensor", module("ByTensor"), "scale",
          torch.tensor(2.0).double())  # fmt: skip
attribute("training of one reader", "ByTraining", module("ByTraining"), "training", False)
attribute("constant put into a subclass", "ByClass", own("ByClass"), "slope", 0.4)
attribute("constant of a base class", "ByClass", own("Base"), "slope", 0.4)
attribute("constant that a class method reads", "ByClassMethod", own("Base"), "slope", 0.4)
attribute("method", "ByMethod", own("ByMethod"), "middle", _tanh_of_self)
attribute("method of a base class", "BySuper", own("ByMethod"), "middle", _tanh_of_self)
attribute("method that a forward inherited", "ByAttribute", own("Base"), "middle", _tanh_of_self)
attribute("forward of a class", "ByGlobal", own("ByGlobal"), "forward", _tanh_of_self)
attribute("forward of a base class", "ByMethod", own("Base"), "forward", _tanh_of_self)
attribute("class of a module", "ByAttribute", module("ByAttribute"), "__class__", torch.nn.Tanh)
attribute("method put into a subclass", "ByInherited", own("ByInherited"), "middle", _tanh_of_self)
attribute("forward put into a subclass", "ByInherited", own("ByInherited"), "forward",
          _tanh_of_self)  # fmt: skip
attribute("bases of a class", "ByInherited", own("ByInherited"), "__bases__", (torch.nn.Tanh,))
attribute("default", "ByDefault", own("with_default"), "__defaults__", (0.4,))
attribute("default of a helper of a partial", "ByPartial", own("with_default"), "__code__",
          _tanh_with_slope.__code__)  # fmt: skip
attribute("default of a forward", "ByOwnDefault", lambda w: w.code.ByOwnDefault.forward,
          "__defaults__", (0.4,))  # fmt: skip
attribute("flag by default", "ByFlag", lambda w: w.code.ByFlag.forward, "__defaults__", (True,))
attribute("keyword defaults bound anew", "ByKeywordDefault", own("with_keyword_default"),
          "__kwdefaults__", {"slope": 0.4})  # fmt: skip
attribute("cell of a helper", "ByClosedHelper", lambda w: w.code.closed_helper.__closure__[0],
          "cell_contents", 0.4)  # fmt: skip
attribute("cell of a forward", "ByCell", lambda w: w.code.ByCell.forward.__closure__[0],
          "cell_contents", 0.4)  # fmt: skip
attribute("wrapped helper's code", "ByWrapped", own("helper"), "__code__", _tanh.__code__)
attribute("helper's code", "ByHelper", own("helper"), "__code__", _tanh.__code__)
attribute("code of a helper's helper", "ByOuterHelper", own("helper"), "__code__", _tanh.__code__)
attribute("method's code", "ByMethod", lambda w: w.code.ByMethod.middle, "__code__",
          _tanh_of_self.__code__)  # fmt: skip
attribute("code of a method of a base class", "BySuper", lambda w: w.code.ByMethod.middle,
          "__code__", _tanh_of_self.__code__)  # fmt: skip
attribute("forward's code", "ByGlobal", lambda w: w.code.ByGlobal.forward, "__code__",
          _tanh_of_self.__code__)  # fmt: skip
attribute("static method's code", "ByStatic", lambda w: w.code.ByStatic.rectified, "__code__",
          _tanh.__code__)  # fmt: skip
attribute("lambda's code", "ByLambda", lambda w: w.reader("ByLambda").passed, "__code__",
          _tanh.__code__)  # fmt: skip

for _place, _part, _of in (
    ("global list", "ByGlobalList", lambda w: (w.code.SLOPES, 0)),
    ("global dict", "ByGlobalDict", lambda w: (w.code.OPTIONS, "slope")),
    ("attribute list", "ByList", lambda w: (w.reader("ByList").listed, 0)),
    ("keyword defaults", "ByKeywordDefault",
     lambda w: (w.code.with_keyword_default.__kwdefaults__, "slope")),
    ("a partial's keywords", "ByPartial", lambda w: (w.code.partial_helper.keywords, "slope")),
):  # fmt: skip
    change(_part, name=f"{_place} in place")(lambda w, of=_of: put_item(*of(w), 0.4))


@change("ByProperty")
def property_replaced(world: World) -> Change:
    yield from put(world.code.ByProperty, "steepness", property(lambda self: 4 * self.own))


@change("ByProperty")
def code_of_a_property(world: World) -> Change:
    def steeper(self: Any) -> float:
        return 4 * self.own

    yield from put(world.code.ByProperty.steepness.fget, "__code__", steeper.__code__)


@change("ByStatic")
def static_method(world: World) -> Change:
    owner = world.code.ByStatic
    before = vars(owner)["rectified"]
    owner.rectified = staticmethod(torch.tanh)
    yield
    owner.rectified = before


@change("ByClassMethod")
def class_method(world: World) -> Change:
    owner = world.code.ByClassMethod
    before = vars(owner)["rectified"]
    owner.rectified = classmethod(lambda cls, x: torch.tanh(x))
    yield
    owner.rectified = before


@change("ByClassMethod")
def code_of_a_class_method(world: World) -> Change:
    function = vars(world.code.ByClassMethod)["rectified"].__func__
    yield from put(function, "__code__", _tanh_of_self.__code__)


@change("ByMethod")
def method_on_the_instance(world: World) -> Change:
    reader = world.reader("ByMethod")
    reader.middle = types.MethodType(_tanh_of_self, reader)
    yield
    vars(reader).pop("middle", None)


def _put_into(owner: Owner, name: str, value: Any) -> Callable[[World], Change]:
    def make(world: World) -> Change:
        setattr(owner(world), name, value)
        yield
        delattr(owner(world), name)

    return make


for _place, _part, _owner, _name, _value in (
    ("__call__ put into a class", "ByGlobal", own("ByGlobal"), "__call__", _tanh_of_self),
    ("__getattribute__ put into a class", "ByAttribute", own("ByAttribute"), "__getattribute__",
     lambda self, name: 0.4 if name == "own" else object.__getattribute__(self, name)),
    ("property over an attribute", "ByAttribute", own("ByAttribute"), "own",
     property(lambda self: 0.4)),
    ("global over a builtin", "ByBuiltin", the_code, "min", max),
):  # fmt: skip
    change(_part, name=_place)(_put_into(_owner, _name, _value))


@change("ByClass")
def attribute_over_a_constant(world: World) -> Change:
    reader = world.reader("ByClass")
    reader.slope = 0.4
    yield
    vars(reader).pop("slope", None)


@change("ByAttribute", matters=False)
def attribute_that_no_forward_reads(world: World) -> Change:
    yield from put(world.reader("ByAttribute"), "unread", world.random.random())


@change("ByGlobal")
def function_over_torchs(world: World) -> Change:
    another = types.SimpleNamespace(**{**vars(F), "leaky_relu": lambda x, slope: x * slope})
    yield from put(world.code, "F", another)


@change("ByGlobal", matters=False)
def global_of_another_name(world: World) -> Change:
    world.code.leaky_relu = F.relu
    yield
    vars(world.code).pop("leaky_relu", None)


@change("ByBuffer")
def buffer_in_place(world: World) -> Change:
    buffer = world.reader("ByBuffer").scale
    buffer.mul_(2)
    yield
    buffer.div_(2)


@change("ByBuffer")
def buffer_bound_anew(world: World) -> Change:
    reader = world.reader("ByBuffer")
    yield from put(reader, "scale", 2 * reader.scale)


@change("ByTensor")
def tensor_in_place(world: World) -> Change:
    tensor = world.reader("ByTensor").scale
    tensor.mul_(2)
    yield
    tensor.div_(2)


@change("ByGlobalTensor")
def global_tensor_in_place(world: World) -> Change:
    tensor = world.code.SCALE
    tensor.mul_(2)
    yield
    tensor.div_(2)


@change("ByEnvironment")
def environment(world: World) -> Change:
    world.torchs.callback(os.environ.pop, "CHANGING_SLOPE", None)
    os.environ["CHANGING_SLOPE"] = "0.4"
    yield
    os.environ.pop("CHANGING_SLOPE", None)


@change("ByWrapped")
def wrapped_function(world: World) -> Change:
    yield from put(world.code.wrapped_helper.__closure__[0], "cell_contents", _tanh)
