"""Convolutional networks by Triton's kernels, in its interpreter, against the float64 oracle."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
import triton_on_host
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

import fastmeta
from fastmeta.arguments import plan_step
from fastmeta.executors.layers.lowering import lower
from fastmeta.executors.layers.on_triton import on_triton
from fastmeta.network.layers.triton_conv2d import TritonConv2d
from fastmeta.options import Options
from fastmeta.plan import verification
from fastmeta.plan.snapshot import snapshot

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    pytest.mark.usefixtures("triton_plays"),
]

CLASSES = 3
NAME = triton_on_host.LayersTritonOnHost.name


@pytest.fixture
def no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial beside the loop would take as long again."""
    monkeypatch.setattr(verification, "failure", lambda *_: None)


class Network(nn.Module):
    """Two blocks, a convolution alone, and a sum whose side is a block without activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 3, stride=2)
        self.norms = nn.ModuleList(
            [
                nn.BatchNorm2d(3, 1e-2),
                nn.BatchNorm2d(4, 1e-2, affine=False),
                nn.BatchNorm2d(4, 1e-2),
            ]
        )
        self.side = nn.Conv2d(4, 4, 1, bias=False)
        self.alone = nn.Conv2d(4, 4, (1, 2), groups=2)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(F.relu(self.norms[0](self.first(x))), (2, 1))
        h = F.leaky_relu(self.norms[1](self.second(h)), 0.2)
        h = torch.tanh(self.alone(h + self.norms[2](self.side(h))))
        return self.head(h.mean((2, 3)))


def drawn() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    data = [(torch.randn(2, n, 2, 7, 6).double(), torch.randint(CLASSES, (2, n))) for n in (3, 2)]
    return Network().double(), data


def agrees(
    model: nn.Module, data: list[tuple[Tensor, Tensor]], names: list[str] | None = None,
    steps: int = 2, memory: str = "auto", **options: Any,
) -> None:  # fmt: skip
    leaves = list(model.parameters())
    reference = oracle.maml(
        model, oracle.split(*data), leaves, rate=lambda *_: 0.1, steps=steps, adapted=names,
        **options,
    )  # fmt: skip
    out = fastmeta.maml_step(
        model, *data, inner_lr=0.1, inner_steps=steps, adapt=names, executor="layered",
        memory=memory, **options,
    )  # fmt: skip
    assert out.executor == NAME
    close = {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(out.task_losses, reference.task_losses, **close)
    gradients = torch.autograd.grad(out.loss, leaves)
    for got, expected in zip(gradients, reference.gradients, strict=True):
        torch.testing.assert_close(got, expected, **close)


def kinds(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> list[str]:
    """Of the layers that compute a step, in their order."""
    with torch.no_grad():
        step = plan_step(model, snapshot(model), *data, Options(executor="layered"), False)
    lowered = on_triton(lower(step.groups[0][1].selected.reading))
    return [type(node.layer).__name__ for node in lowered.nodes]


def test_two_steps_of_second_order(no_trial) -> None:
    agrees(*drawn())


@pytest.mark.parametrize(
    "names",
    [["head.weight", "head.bias"], ["norms.0.weight", "norms.0.bias"], ["second.weight"]],
    ids=["head", "norm-alone", "inside"],
)
def test_what_does_not_adapt_still_learns(names: list[str], no_trial) -> None:
    agrees(*drawn(), names, steps=1)


@pytest.mark.parametrize(
    "options", [{"first_order": True}, {"memory": "low"}, {"prox": 0.3}],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_options(options: dict[str, Any], no_trial) -> None:
    agrees(*drawn(), steps=1, **options)


def test_a_model_of_bfloat16_is_declined_by_name() -> None:
    model, data = drawn()
    halves = [(x.bfloat16(), y) for x, y in data]
    with pytest.raises(ValueError, match=r"parameters are torch\.bfloat16, not float32 or float64"):
        fastmeta.maml_step(model.bfloat16(), *halves, executor="layered")


class Recorded(TorchDispatchMode):
    """Refuses what a stream that is being recorded refuses: to wait for it, or for the host."""

    WAITING = ("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.WAITING, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss_fn", [F.cross_entropy, F.mse_loss])
def test_a_step_can_be_recorded(loss_fn: Any, no_trial, monkeypatch) -> None:
    monkeypatch.setattr(interpreter.InterpretedFunction, "run", lambda *_, **__: None)
    model, data = drawn()
    if loss_fn is F.mse_loss:
        data = [(x, torch.randn(*y.shape, CLASSES).double()) for x, y in data]
    options = {"inner_steps": 2, "loss_fn": loss_fn, "learn_inner_lr": "layer-step"}
    maml = fastmeta.MAML(model, executor="layered", **options)
    compute = maml._compute

    def recorded(planned: Any) -> Any:
        compute(planned)  # what is kept is made at a first call
        with Recorded():
            return compute(planned)

    monkeypatch.setattr(maml, "_compute", recorded)
    assert maml(*data).executor == NAME


def test_the_trial_finds_a_wrong_kernel_and_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TritonConv2d.all_to_input
    monkeypatch.setattr(
        TritonConv2d, "all_to_input", lambda self, pairs, x: 1.1 * right(self, pairs, x)
    )
    model, data = drawn()
    out = fastmeta.maml_step(model, *data, inner_lr=0.1, inner_steps=1, executor="layered")
    assert out.executor == "layered-torch"


def test_a_plan_in_words() -> None:
    model, data = drawn()
    words = fastmeta.explain(model, *data, inner_steps=1, executor="layered")
    assert "kernel: Triton and torch's operators" in words
    found = kinds(model, data)
    assert found.count("TritonBlock") == 3
    assert found.count("TritonConv2d") == 1


@pytest.mark.parametrize(
    ("pool", "joined"),
    [
        (nn.MaxPool2d(2), True), (nn.MaxPool2d((1, 2)), True), (nn.MaxPool2d(3, 2), False),
        (nn.MaxPool2d(2, padding=1), False), (nn.MaxPool2d(2, ceil_mode=True), False),
        (nn.MaxPool2d(2, dilation=2), False), (nn.AvgPool2d(2), False),
    ],
    ids=str,
)  # fmt: skip
def test_a_block_takes_windows_that_do_not_overlap(pool: nn.Module, joined: bool) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), pool, nn.Flatten())
    data = (torch.randn(1, 2, 1, 8, 8), torch.randint(2, (1, 2)))
    found = kinds(model, [data, data])
    assert found.count("TritonBlock") == 1
    assert ("Pool2d" in found) != joined


class ReadTwice(nn.Module):
    """Whose convolution is read by a norm and by a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        return self.head((h + self.norm(h)).mean((2, 3)))


def test_what_others_read_is_no_blocks_own(no_trial) -> None:
    data = [(torch.randn(1, 2, 2, 2, 3).double(), torch.randint(3, (1, 2))) for _ in "sq"]
    agrees(ReadTwice().double(), data, steps=1)


def test_running_statistics_are_no_blocks(no_trial) -> None:
    model, data = drawn()
    for norm in model.norms:
        norm.num_batches_tracked += 1
    found = kinds(model.eval(), data)
    assert "TritonBlock" not in found
    assert found.count("TritonConv2d") == 4


def test_tasks_that_share_a_weight_have_one_gradient() -> None:
    conv = TritonConv2d("w", None, (1, 1), (0, 0), (1, 1), 1)
    x, dy, weight = (
        torch.randn(2, 3, 2, 4, 4),
        torch.randn(2, 3, 5, 3, 3),
        torch.randn(1, 5, 2, 2, 2),
    )
    each = conv.all_to_weight([(dy, x)], weight, 2)
    torch.testing.assert_close(conv.all_to_weight([(dy, x)], weight, 1), each.sum(0, keepdim=True))


def test_without_a_convolution_torch_serves() -> None:
    data = [(torch.randn(2, 3, 4), torch.randint(2, (2, 3)))] * 2
    out = fastmeta.maml_step(nn.Linear(4, 2), *data, inner_lr=0.1, executor="layered")
    assert out.executor == "layered-torch"


def test_backends_tell_what_is_missing(monkeypatch) -> None:
    if torch.version.cuda is None:
        assert fastmeta.backends()["layered-triton"].detail == "this torch has no CUDA"
    monkeypatch.setitem(sys.modules, "triton", None)
    missing = fastmeta.backends()["layered-triton"]
    assert missing.detail == "Triton is not installed"
    assert not missing.live
    assert missing.remedy


def test_without_triton_the_package_is_whole(tmp_path) -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fastmeta\n"
        "data = [(torch.randn(2, 4, 3), torch.randint(2, (2, 4))) for _ in 'sq']\n"
        "assert fastmeta.maml_step(torch.nn.Linear(3, 2), *data).executor\n"
        "assert not fastmeta.backends()['layered-triton'].live"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
