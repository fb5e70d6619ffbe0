"""Names that version 0.1 had: each still works, and says what it is called now where it has a new name."""

import importlib
import inspect
import sys
import warnings

import pytest
import torch
from torch import nn

import localprop
from localprop import localize, plan
from tiny import SIZE, batch, build

NAMES = {
    "Chain": "input_size names output_format position prefix_tokens units",
    "Unit": "buffers code depth name parameters shape switches",
    "LocalLoss": "classify forward uses_images",
    "LocalModule": "auxiliary buffers_used forward grad_checkpointing named_parameters no_weight_decay output reads "
    "recompute run_on units",
    "LocalNetwork": "backbone backward forward input_size keep local_modules module_logits shares train_module",
    "LocalOutput": "logits losses module_logits",
    "ModuleSpec": "count criterion decoder head image index input last mean num_classes output std",
    "Plan": "against_pipeline baseline budget choice flops_ratio memory_ratio pipeline pipeline_speedup rows speedup "
    "time_ratio typical",
    "PlanRow": "batch_size micro_batches module_units parallel setting trace",
    "Setting": "grad_checkpointing largest method modules name split_blocks",
    "StepTrace": "entry flops module module_ends module_seconds parts peak seconds timeline",
    "Layout": "channels grid height kind pooled prefix tokens width",
    "Carry": "clone context features hits images labels losses micro_batches of stop",
}
RENAMED = {
    "LocalLoss": {"uses_images"},
    "LocalOutput": {"module_logits"},
    "ModuleSpec": {"criterion", "image", "num_classes"},
    "PlanRow": {"trace"},
    "Carry": {"hits", "images", "labels"},
}
SIGNATURES = {
    "chain": "model input_size split_blocks",
    "localize": "model modules method decoder head costs input_size num_classes batch_size micro_batches amp_dtype "
    "device criterion mean std",
    "plan": "model batch_size modules method input_size opt micro_batches amp_dtype budget device nproc bandwidth "
    "on_setting",
    "provenance": "",
}


class Kept(localprop.LocalLoss):
    """A local loss that keeps what it was built for."""

    def __init__(self, spec):
        super().__init__()
        self.spec = spec
        self.head = spec.build_head()

    def forward(self, output, features, inputs, targets):
        prediction = self.head(output)
        return self.spec.task.loss(prediction, targets), prediction

    def predict(self, output):
        return self.head(output)


@pytest.fixture(autouse=True)
def warns_anew(monkeypatch):
    """A name warns once in a process; here once in a test."""
    monkeypatch.setattr("localprop.errors._WARNED", set())


@pytest.fixture(scope="module")
def objects():
    """One of each kind, by the name that it had in version 0.1."""
    localprop.METHODS["kept"] = Kept
    net = localize(build("mlp"), 2, "kept", input_size=SIZE)
    del localprop.METHODS["kept"]
    images, labels = batch()
    result = plan(build("mlp"), 8, modules=[2], method="greedy", input_size=SIZE)
    units = localprop.chain(build("mlp"), SIZE)
    module = net.local_modules[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sys.modules.pop("localprop.carry", None)
        carry = importlib.import_module("localprop.carry").Carry(images, labels, images)
    return {
        "Chain": units,
        "Unit": units[0],
        "LocalLoss": module.auxiliary,
        "LocalModule": module,
        "LocalNetwork": net,
        "LocalOutput": net.backward(images, labels),
        "ModuleSpec": module.auxiliary.spec,
        "Plan": result,
        "PlanRow": result.rows[0],
        "Setting": result.rows[0].setting,
        "StepTrace": result.rows[0].step,
        "Layout": module.output,
        "Carry": carry,
    }


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in NAMES for name in NAMES[kind].split()])
def test_an_attribute_is_there_and_warns_where_it_has_a_new_name(objects, kind, name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        getattr(objects[kind], name)
    found = [str(w.message) for w in caught if w.category is DeprecationWarning]
    assert len(found) == (name in RENAMED.get(kind, ()))
    assert all(name in message and w.filename == __file__ for message, w in zip(found, caught, strict=True))


def test_renamed_attributes_have_the_same_values(objects):
    images, labels = batch()
    net, spec, carry = objects["LocalNetwork"].eval(), objects["ModuleSpec"], objects["Carry"]
    with pytest.warns(DeprecationWarning, match="module_predictions"):
        assert [logits.shape for logits in net.module_logits(images)] == [(len(labels), 5)] * 2
    with pytest.warns(DeprecationWarning, match="prediction"):
        assert (spec.num_classes, spec.image, carry.labels is carry.targets) == (5, spec.source, True)
    head, features = objects["LocalLoss"], torch.randn(4, *net.local_modules[0].output_shape)
    with pytest.warns(DeprecationWarning, match="predict"):
        assert torch.equal(head.classify(features), head.predict(features))
    logits = torch.randn(4, 5)
    with pytest.warns(DeprecationWarning, match="task"):
        assert torch.equal(spec.criterion(logits, labels[:4]), nn.functional.cross_entropy(logits, labels[:4]))


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_function_takes_the_same_arguments(name):
    parameters = inspect.signature(getattr(localprop, name)).parameters
    assert [own for own in SIGNATURES[name].split() if own not in parameters] == []


def test_every_setting_of_a_network_is_an_argument_of_localize():
    known = {"partition", "cuts", "min_depth", "split_blocks", "recompute", "grad_checkpointing", "method_kwargs"}
    assert known <= set(localprop.Recipe.__dataclass_fields__)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("carry", "Carry"),
        ("layout", "IN_FLIGHT"),
        ("schedules", "Link StageTime Timing data_parallel local_modules one_f_one_b one_f_one_b_order zero_bubble"),
    ],
)
def test_a_module_that_has_moved_warns(module, names):
    sys.modules.pop(f"localprop.{module}", None)
    with pytest.warns(DeprecationWarning, match="has moved"):
        moved = importlib.import_module(f"localprop.{module}")
    assert all(hasattr(moved, name) for name in names.split())


def test_a_method_written_for_version_0_1_trains():
    with pytest.warns(DeprecationWarning, match="Old.classify is called Old.predict"):

        class Old(localprop.LocalLoss):
            uses_images = False

            def __init__(self, spec, strength=1.0):
                super().__init__()
                self.criterion, self.strength = spec.criterion, strength
                self.head = nn.Linear(spec.output.channels, spec.num_classes)
                self.layout = spec.output

            def forward(self, output, inputs, images, labels):
                assert images is None
                logits = self.classify(output)
                return self.strength * self.criterion(logits, labels), logits

            def classify(self, output):
                return self.head(self.layout.pooled(output))

    assert Old.uses_inputs is False
    localprop.METHODS["old"] = Old
    try:
        net = localize(build("mlp"), 2, "old", input_size=SIZE, method_kwargs={"strength": 0.5})
    finally:
        del localprop.METHODS["old"]
    images, labels = batch()
    output = net.backward(images, labels)
    assert output.losses.isfinite().all()
    assert all(p.grad is not None for p in net.parameters())
    assert net.eval().module_predictions(images)[0].shape == (4, 5)


def test_an_old_name_warns_once_whatever_libraries_do_to_the_filters(objects):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            objects["Carry"].labels  # noqa: B018
            with warnings.catch_warnings():  # as torch does in training: Python forgets what it has warned of
                warnings.simplefilter("ignore")
    assert [str(w.message) for w in caught] == ["Carry.labels is called Carry.targets now"]


@pytest.mark.parametrize("method", ["greedy", "infopro", "feature-reconstruction"])
def test_a_state_dict_of_version_0_1_is_loaded_with_the_tensors_of_its_criterion(method):
    net = localize(build("mlp"), 2, method, input_size=SIZE, criterion=nn.CrossEntropyLoss(torch.ones(5)))
    state = net.state_dict()
    assert {name.split(".")[0] for name in state} == {"backbone", "local_modules"}
    weights = [name for name in state if name.endswith("task.criterion.weight")]
    assert len(weights) == 2
    old = {name.replace(".task.criterion.", ".criterion."): tensor for name, tensor in state.items()}
    old |= {name.replace(".task.criterion.", ".criterion."): torch.full((5,), 3.0) for name in weights}
    net.load_state_dict(old)
    assert torch.equal(net.task.criterion.weight, torch.full((5,), 3.0))


def test_a_local_loss_may_have_a_criterion_of_its_own():
    class Own(Kept):
        def __init__(self, spec):
            super().__init__(spec)
            self.criterion = nn.CrossEntropyLoss(torch.full((5,), 2.0))

    localprop.METHODS["own"] = Own
    try:
        net = localize(build("mlp"), 2, "own", input_size=SIZE, criterion=nn.CrossEntropyLoss(torch.ones(5)))
    finally:
        del localprop.METHODS["own"]
    assert net.load_state_dict(net.state_dict())
