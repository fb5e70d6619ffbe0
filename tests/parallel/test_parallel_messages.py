"""What processes tell each other: tensors and JSON, nothing pickled; and what is refused when it arrives."""

import ast
import json
import os

import pytest
import torch

from localprop.errors import ParallelError
from localprop.network.carry import Carry
from localprop.parallel.forms import Form, TensorForm, bytes_of_json, json_of_bytes, pack, unpack
from places import ROOT
from ranks import CALM, MODULES


def sent(carry, training=True):
    """The batch that arrives when `carry` is sent."""
    form, tensors = pack(carry, training)
    form = Form.of_bytes(form.to_bytes(), "rank 0")
    buffers = [own.buffer(torch.device("cpu")) for own in form.tensors]
    for buffer, tensor in zip(buffers, tensors, strict=False):
        buffer.copy_(tensor)
    return unpack(form, [*buffers, tensors[-1]])


def test_what_is_handed_along_arrives_as_it_was():
    mask, angles = torch.rand(3, 2).t() > 0.5, torch.randn(5, dtype=torch.float64).bfloat16()
    grid = {"grid": (2, [7, -1.5, None], ()), "size": torch.Size([4, 4]), "type": torch.float16, 3: "three"}
    context = {"mask": mask, "nested": [grid, {"angles": (angles, True)}], "": float("-inf"), "$tuple": "a name"}
    carry = Carry(torch.randn(2, 3), torch.tensor([1, 0]), None, context, [torch.tensor(0.1)], stop=15)
    arrived = sent(carry)
    tensors = [arrived.context.pop("mask"), arrived.context["nested"][1]["angles"][0]]
    for own, other in zip(tensors, (context.pop("mask"), angles), strict=True):
        assert torch.equal(own, other)
        assert (own.dtype, own.stride()) == (other.dtype, other.stride())
    assert repr(arrived.context) == repr(context)  # the types too: tuples are tuples, sizes are sizes
    assert torch.equal(arrived.features, carry.features)
    assert torch.equal(arrived.targets, carry.targets)
    assert (arrived.losses, arrived.stop) == (carry.losses, 15)
    carry.sums = [None, torch.tensor([12345678901, 0.1, float("nan")], dtype=torch.float64)]
    missing, own = sent(carry, training=False).sums
    assert missing is None
    assert torch.equal(own.nan_to_num(-1), carry.sums[1].nan_to_num(-1))
    assert sent(carry).share is None
    carry.share = torch.tensor(0.7)
    assert torch.equal(sent(carry).share, carry.share)


@pytest.mark.parametrize(
    "value", [slice(2), torch.device("cpu"), {1, 2}, object(), 1j], ids=lambda value: type(value).__name__
)
def test_a_value_that_cannot_be_sent_is_told_in_a_line(value):
    carry = Carry(torch.zeros(2), torch.zeros(2), context={"rotary": [value]})
    with pytest.raises(ParallelError, match=rf"hands along a {type(value).__name__} at context/rotary/0,") as caught:
        pack(carry, training=True)
    assert "\n" not in str(caught.value)


def test_a_value_with_a_graph_stays_in_its_process():
    carry = Carry(torch.zeros(2), torch.zeros(2), ahead=torch.ones(2, requires_grad=True) * 2)
    assert carry.clone().ahead is carry.ahead
    with pytest.raises(ParallelError, match="a value with a graph cannot be sent"):
        pack(carry, training=True)


TENSOR = [[2, 3], [3, 1], "float32", 0]


@pytest.mark.parametrize(
    "content",
    [
        [[TENSOR, [[2, 3], [3, 1], "load", 0]], [], {}, 1, True],
        [[TENSOR, [[2, 3], [3, 1], "_C", 0]], [], {}, 1, True],
        [[TENSOR, [[2, -3], [3, 1], "float32", 0]], [], {}, 1, True],
        [[TENSOR, [[2, 3], [-3, 1], "float32", 0]], [], {}, 1, True],
        [[TENSOR, [[2, True], [3, 1], "float32", 0]], [], {}, 1, True],
        [[TENSOR, [[2, 3], [1], "float32", 0]], [], {}, 1, True],
        [[TENSOR, [[2, 3], [3, 1], "float32", 64]], [], {}, 1, True],
        [[TENSOR, TENSOR], ["mask"], {}, 1, True],
        [[TENSOR, TENSOR], [], {}, -1, True],
        [[TENSOR, TENSOR], [], {}, 1, "yes"],
        {"tensors": []},
        7,
    ],
    ids=json.dumps,
)
def test_a_form_that_makes_no_sense_is_refused(content):
    with pytest.raises(ParallelError, match=r"^rank 3 sent something that is not the form of a batch") as caught:
        Form.of_bytes(bytes_of_json(content), "rank 3")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [b"\x80\x04N.", b"[" * 10**5, b"{", b"null"])
def test_bytes_that_are_no_form_are_refused(text):
    with pytest.raises(ParallelError, match="rank 3 sent something that is not the form of a batch"):
        Form.of_bytes(torch.frombuffer(bytearray(text), dtype=torch.uint8), "rank 3")


def test_numbers_arrive_with_every_bit():
    numbers = [0.1, 1e-320, -0.0, float("inf"), 2**70, None, True, "ä", [1.0, 1]]
    assert repr(json_of_bytes(bytes_of_json(numbers))) == repr(numbers)


# Whatever pickles or unpickles ends the process.
UNPICKLED = """
import os, pickle, torch.distributed.distributed_c10d as c10d
from localprop.cli import main
def forbidden(*_, **__):
    os._exit(77)
for module, name in [(pickle, "dumps"), (pickle, "loads"), (c10d, "_object_to_tensor"), (c10d, "_tensor_to_object")]:
    assert callable(getattr(module, name))
    setattr(module, name, forbidden)
code = main(ARGV)
assert code == 0, code
"""


@pytest.mark.processes
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_of_several_processes_pickles_nothing(forker, tmp_path):
    argv = ["train", *CALM, "--cuts", *MODULES[2], "--output", str(tmp_path), "--parallel", "modules", "--trace"]
    ranks = forker.start(tmp_path / "log", 2, code=UNPICKLED.replace("ARGV", repr(argv)))
    assert ranks.wait() == [0, 0], ranks.log.read_text()


def pickles(tree):
    """Lines of a program on which something is pickled, or unpickled."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            if {name.partition(".")[0] for name in names} & {"pickle", "cloudpickle", "dill", "joblib", "shelve"}:
                yield node.lineno
        elif isinstance(node, ast.Attribute) and node.attr.endswith(("_object", "_object_list")):
            yield node.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            safe = any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords)
            called = ast.unparse(node.func)
            if (called == "torch.load" and not safe) or called == "torch.save":
                yield node.lineno


def test_no_program_pickles():
    found = []
    for folder in ("src", "benchmarks", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found += [f"{path.relative_to(ROOT)}:{line}" for line in pickles(ast.parse(path.read_text()))]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import torch, joblib.memory",
        "dist.all_gather_object(a, b)",
        "dist.send_object_list([a], 1)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.save(net, path)",
    ],
)
def test_pickling_is_recognised(line):
    assert list(pickles(ast.parse(line))) == [1]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(4, 3, 5),
        torch.randn(4, 6, 5, 5).to(memory_format=torch.channels_last),
        torch.randn(4, 5, 3).transpose(1, 2),
        torch.randn(4, 6, 8)[:, 1:],
        torch.randn(4, 1, 3).expand(4, 7, 3),
        torch.arange(12)[3:],
        torch.tensor(2.5),
    ],
    ids=lambda tensor: str(tuple(tensor.stride())),
)
def test_a_tensor_arrives_as_it_lay_in_memory(tensor):
    form = TensorForm.of(tensor)
    buffer = form.buffer(torch.device("cpu"))
    buffer.copy_(form.bytes_of(tensor))
    arrived = form.restore(buffer)
    assert torch.equal(arrived, tensor)
    if 0 not in tensor.stride():
        assert arrived.stride() == tensor.stride()
        assert arrived.data_ptr() % 64 == tensor.data_ptr() % 64


BACK = """
from types import SimpleNamespace as Toy
import torch
from localprop.network.carry import Carry
from localprop.parallel.job import join
from localprop.parallel.pipeline import PipelineStage
from localprop.parallel.placement import Placement
from localprop.tasks.classification import Classification

STEPS = 8
job = join("cpu")
module = Toy(local_loss=Toy(uses_inputs=False), reads=set(), shared=0)
stage = PipelineStage(job, Placement((range(1), range(1, 2))), Toy(local_modules=[module, module]))
way = stage.way_back()
images = [torch.full((2, 3), float(step)) for step in range(STEPS)]
loads = lambda *_: ([image.clone(), torch.zeros(2, dtype=torch.int64)] for image in images)
data = Toy(steps_per_epoch=lambda size: STEPS, train_batches=loads, task=Classification())
came = []
for step, carry in enumerate(stage.train_batches(data, 0, 2, 1, job.device, range(STEPS))):
    if job.rank == 0:  # the gradient of a batch is used once the next one is on its way
        weight = carry.features + 1
        stage.send(Carry(weight, carry.targets, losses=[torch.zeros(())]))
        if step:
            came.append(way.receive())
    else:
        features = carry.features.requires_grad_()
        loss = (features ** 2).sum()
        loss.backward()
        way.send(Carry(features.grad, carry.targets, losses=[loss.detach()]))
        assert any(tensor.data_ptr() == features.grad.data_ptr() for tensor in stage.waiting().tensors)
if job.rank == 0:
    came.append(way.receive())
    for image, back in zip(images, came):
        assert back.features.equal(2 * (image + 1)) and back.losses[0] == ((image + 1) ** 2).sum()
job.wait_for_all()
job.leave()
"""


@pytest.mark.processes
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_stage_sends_one_hop_back_while_batches_go_forward(forker, tmp_path):
    ranks = forker.start(tmp_path / "log", 2, code=BACK)
    assert ranks.wait() == [0, 0], ranks.log.read_text()
