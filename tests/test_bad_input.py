"""Every wrong argument is refused with its name, before anything is computed or changed."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastmeta


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.AlphaDropout(0.5), nn.Linear(4, 2))


def examples(tasks: int = 3, count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(tasks, count, 3), torch.randint(2, (tasks, count))


def refused(message: str, error: type[Exception] = ValueError, **options: Any) -> None:
    """`maml_step` raises with this text; model, gradients and generator stay as they were."""
    model = options.pop("model", None) or network()
    support = options.pop("support", None)
    query = options.pop("query", None)
    support = examples() if support is None else support
    query = examples(count=5) if query is None else query
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    for p in parameters:
        p.grad = torch.ones_like(p)
    before = copy.deepcopy(parameters)
    random = torch.get_rng_state()
    with pytest.raises(error, match=re.escape(message)):
        fastmeta.maml_step(model, support, query, **options)
    assert torch.equal(random, torch.get_rng_state())
    for p, old in zip(parameters, before, strict=True):
        assert torch.equal(p, old)
        assert p.grad is not None
        assert torch.equal(p.grad, torch.ones_like(p))


@pytest.mark.parametrize(
    ("message", "error", "make"),
    [
        (
            "query_x: 2 tasks, but support_x has 3; both need the same leading dimension",
            ValueError,
            lambda: {"query": examples(tasks=2)},
        ),
        (
            "support_y: 5 examples, but support_x has 4",
            ValueError,
            lambda: {"support": (examples()[0], examples(count=5)[1])},
        ),
        (
            "query_y: 2 tasks, but query_x has 3",
            ValueError,
            lambda: {"query": (examples()[0], examples(tasks=2)[1])},
        ),
        (
            "support_x: shape [4]; it must have tasks and examples in front",
            ValueError,
            lambda: {"support": (torch.randn(4), torch.randint(2, (4,)))},
        ),
        (
            "support: a tensor of shape [3, 4, 3]; it must be a pair (x, y)",
            TypeError,
            lambda: {"support": torch.randn(3, 4, 3)},
        ),
        ("support: a tuple of 3", TypeError, lambda: {"support": (1, 2, 3)}),
        (
            "support_x[0]: a float; it must be a tensor",
            TypeError,
            lambda: {"support": ([1.0, 2.0], examples()[1])},
        ),
        (
            "support_x: no examples (shape [3, 0, 3]); at least one is needed",
            ValueError,
            lambda: {"support": examples(count=0)},
        ),
        ("query_x: no examples", ValueError, lambda: {"query": examples(count=0)}),
        (
            "support_x: no tasks",
            ValueError,
            lambda: {"support": examples(tasks=0), "query": examples(tasks=0)},
        ),
        (
            "support_x: float64, but the model's parameters are float32",
            TypeError,
            lambda: {
                "support": (examples()[0].double(), examples()[1]),
                "query": (examples()[0].double(), examples()[1]),
            },
        ),
        (
            "query_x: float64, but support_x is float32; both need the same dtype",
            TypeError,
            lambda: {"query": (examples()[0].double(), examples()[1])},
        ),
        (
            "support_x: on meta, but the model's parameters are on cpu",
            ValueError,
            lambda: {
                "support": tuple(t.to("meta") for t in examples()),
                "query": tuple(t.to("meta") for t in examples()),
            },
        ),
        (
            "query_y: on meta, but support_y is on cpu",
            ValueError,
            lambda: {"query": (examples()[0], examples()[1].to("meta"))},
        ),
        (
            "query_y: label 2 at [0, 0]; the model gives 2 classes, so labels must be in 0 .. 1",
            ValueError,
            lambda: {"query": (examples()[0], torch.full((3, 4), 2))},
        ),
        (
            "support_y: label -1 at [2, 3]",
            ValueError,
            lambda: {
                "support": (
                    examples()[0],
                    torch.zeros(3, 4).long().index_put_((torch.tensor(2), torch.tensor(3)),
                                                        torch.tensor(-1)),
                )
            },
        ),
        (
            "support_y: torch.int32; class labels must be torch.int64",
            TypeError,
            lambda: {"support": (examples()[0], examples()[1].int()),
                     "query": (examples()[0], examples()[1].int())},
        ),
        (
            "support_y: shape [3, 4, 1], but class labels",
            ValueError,
            lambda: {"support": (examples()[0], examples()[1].unsqueeze(-1)),
                     "query": (examples()[0], examples()[1].unsqueeze(-1))},
        ),
        (
            "support_y: shape [3, 4], but mse_loss compares it with predictions of [T, N, ...] = "
            "[3, 4, 2]",
            ValueError,
            lambda: {"loss_fn": F.mse_loss, "support": (examples()[0], torch.randn(3, 4)),
                     "query": (examples()[0], torch.randn(3, 4))},
        ),
        ("inner_steps: -1; it must not be negative", ValueError, lambda: {"inner_steps": -1}),
        ("inner_steps: 1.5; it must be an integer", TypeError, lambda: {"inner_steps": 1.5}),
        ("inner_steps: True; it must be an integer", TypeError, lambda: {"inner_steps": True}),
        ("number or a tensor, or a dict of such", TypeError, lambda: {"inner_lr": "0.1"}),
        (
            "inner_lr: shape [3]; a tensor must be 0-d or [inner_steps] = [2]",
            ValueError,
            lambda: {"inner_lr": torch.ones(3), "inner_steps": 2},
        ),
        (
            "inner_lr: 'nowhere' is not a parameter that adapts; those are '0.weight'",
            ValueError,
            lambda: {"inner_lr": {"nowhere": 0.1}},
        ),
        (
            "inner_lr: no entry for '0.bias', which adapts",
            ValueError,
            lambda: {"inner_lr": {"0.weight": 0.1, "3.weight": 0.1, "3.bias": 0.1}},
        ),
        (
            "inner_lr['3.bias']: shape [3] does not broadcast to the parameter's [2]",
            ValueError,
            lambda: {"inner_lr": {"3.bias": torch.ones(3)}, "adapt": "3.bias"},
        ),
        (
            "inner_lr['3.bias']: shape [5, 1]; its first dimension must be inner_steps = 1",
            ValueError,
            lambda: {"inner_lr": {"3.bias": torch.ones(5, 1)}, "adapt": "3.bias"},
        ),
        (
            "inner_lr['3.bias']: torch.float64 on cpu, but the parameter is torch.float32",
            ValueError,
            lambda: {"inner_lr": {"3.bias": torch.ones(2).double()}, "adapt": "3.bias"},
        ),
        (
            "adapt: 'head' matches no parameter; the model has '0.weight'",
            ValueError,
            lambda: {"adapt": "head"},
        ),
        ("adapt: empty", ValueError, lambda: {"adapt": []}),
        ("adapt: holds an int", TypeError, lambda: {"adapt": [3]}),
        (
            "adapt: the predicate is true of no trainable parameter",
            ValueError,
            lambda: {"adapt": lambda name, p: False},
        ),
        (
            "adapt: '0' matches only frozen parameters",
            ValueError,
            lambda: {"adapt": "0", "model": _frozen_body()},
        ),
        (
            "model: no parameter requires grad",
            ValueError,
            lambda: {"model": network().requires_grad_(False)},
        ),
        ("model: a function; it must be an nn.Module", TypeError, lambda: {"model": F.relu}),
        (
            "step_weights: 2 values; one is needed before the first step and one after each",
            ValueError,
            lambda: {"step_weights": [0.5, 0.5], "inner_steps": 2},
        ),
        (
            "step_weights: shape [2, 1]; it must be [inner_steps + 1] = [2]",
            ValueError,
            lambda: {"step_weights": torch.ones(2, 1)},
        ),
        (
            "task_weights: shape [2]; it must be [T] = [3]",
            ValueError,
            lambda: {"task_weights": torch.ones(2)},
        ),
        (
            "task_weights: torch.int64; it must be floating point",
            TypeError,
            lambda: {"task_weights": torch.ones(3).long()},
        ),
        ("prox: -0.1; it must not be negative", ValueError, lambda: {"prox": -0.1}),
        ("prox: a str; it must be a number", TypeError, lambda: {"prox": "much"}),
        ("loss_fn: a float; it must be callable", TypeError, lambda: {"loss_fn": 1.0}),
        (
            "loss_fn: gave shape [4]; it must give a 0-d mean over the examples",
            ValueError,
            lambda: {"loss_fn": lambda p, t: F.cross_entropy(p, t, reduction="none")},
        ),
        (
            "loss_fn: gave a float; it must give a tensor",
            TypeError,
            lambda: {"loss_fn": lambda p, t: 0.0},
        ),
        ("memory: 'little'; it must be one of", ValueError, lambda: {"memory": "little"}),
        ("executor: 'best'; it must be one of", ValueError, lambda: {"executor": "best"}),
        ("executor: 'fused' can't serve", ValueError, lambda: {"executor": "fused"}),
        (
            "executor: 'layered' can't serve: the model could not be read into layers",
            ValueError,
            lambda: {"executor": "layered"},
        ),
        (
            "support and query: one is a list with a pair per task",
            TypeError,
            lambda: {"support": [examples(), examples()]},
        ),
    ],
)  # fmt: skip
def test_refused(message: str, error: type[Exception], make: Any) -> None:
    refused(message, error, **make())


def _frozen_body() -> nn.Module:
    model = network()
    model[0].requires_grad_(False)
    return model


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=False))


def test_a_checkpointed_model_would_be_silently_wrong() -> None:
    refused("its forward uses torch.utils.checkpoint", model=Checkpointed())


def test_saved_tensor_hooks_around_the_whole_step_are_the_callers_own() -> None:
    model, tasks = nn.Linear(3, 2), (examples(), examples())
    expected = fastmeta.maml_step(model, *tasks).loss
    with torch.autograd.graph.save_on_cpu():
        out = fastmeta.maml_step(model, *tasks)
        out.loss.backward()
    assert torch.equal(out.loss, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit itself
@pytest.mark.parametrize(("within", "named"), [(False, "model: scripted"), (True, "model: 0: ")])
def test_a_module_of_torchscript(within: bool, named: str) -> None:
    model = torch.jit.trace(nn.Linear(3, 2), torch.randn(4, 3))
    model = nn.Sequential(model, nn.ReLU()) if within else model
    with pytest.raises(TypeError, match=named):
        fastmeta.maml_step(model, examples(), examples())


def test_a_lazy_module_not_run_yet() -> None:
    refused(
        "model: 0.weight is not initialised yet (a lazy module)",
        model=_Ungraded(nn.LazyLinear(4), nn.Linear(4, 2)),
    )


class _Ungraded(nn.Sequential):
    """`refused` compares parameters, which a lazy module has not got yet."""

    def parameters(self, recurse: bool = True):
        return iter(())


def test_ragged_tasks_that_differ_in_more_than_their_number() -> None:
    pairs = [
        (torch.randn(4, 3), torch.randint(2, (4,))),
        (torch.randn(2, 5), torch.zeros(2).long()),
    ]
    refused("support[1]", support=pairs, query=pairs)


def test_ragged_lists_of_different_lengths() -> None:
    pair = (torch.randn(4, 3), torch.randint(2, (4,)))
    refused("query: 1 tasks, but support has 2", support=[pair, pair], query=[pair])


def test_an_error_of_the_model_is_the_models_own() -> None:
    x = torch.randn(3, 4, 7)
    refused(
        "mat1 and mat2 shapes cannot be multiplied",
        RuntimeError,
        support=(x, examples()[1]),
        query=(x, examples()[1]),
    )


@pytest.mark.parametrize("memory", ["auto", "low"])
def test_nan_in_data_is_nan_in_the_loss(memory: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    support, query = examples(), examples()
    support[0][1, 2, 0] = torch.nan
    out = fastmeta.maml_step(model, support, query, inner_steps=2, memory=memory)
    out.loss.backward()
    assert out.loss.isnan()
    assert out.task_losses.isnan().tolist() == [False, True, False]


def test_batch_norm_by_statistics_never_written_warns() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()

    maml = fastmeta.MAML(model())
    for call in (
        lambda: fastmeta.maml_step(model(), examples(), examples()),
        lambda: fastmeta.adapt(model(), examples()),
        lambda: maml(examples(), examples()),
    ):
        with pytest.warns(UserWarning, match="running statistics that were never written") as seen:
            call()
        assert seen[0].filename == __file__  # the caller's line, not one of ours


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            [nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.MaxPool2d(4)],
            r"model: 2 = MaxPool2d\(.* too small",
        ),
        ([nn.Conv2d(1, 2, 3), nn.Conv2d(3, 2, 3)], r"model: 1 = Conv2d\(.* 3 channels, but got 2"),
        ([nn.Conv2d(1, 2, 7)], r"model: 0 = Conv2d\(.*Kernel size can't be greater"),
        ([nn.Flatten(), nn.Linear(24, 2)], r"model: 1 = Linear\(.*cannot be multiplied"),
    ],
    ids=["pools-to-nothing", "channels", "kernel", "rows"],
)
@pytest.mark.parametrize("executor", ["auto", "layered"])
def test_a_layer_that_can_not_take_its_input_is_named(
    layers: list[nn.Module], message: str, executor: str
) -> None:
    sets = [(torch.randn(2, 3, 1, 5, 5), torch.randint(2, (2, 3))) for _ in "sq"]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(1, 2))
    with pytest.raises(RuntimeError, match=message):
        fastmeta.maml_step(model, *sets, executor=executor)


def test_what_the_models_own_code_raises_stays_as_it_is() -> None:
    class Refuses(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            raise RuntimeError("not today")

    sets = [(torch.randn(2, 3, 4), torch.randint(2, (2, 3))) for _ in "sq"]
    with pytest.raises(RuntimeError, match=r"^not today$"):
        fastmeta.maml_step(Refuses(4, 2), *sets)
