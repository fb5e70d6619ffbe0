"""Which process gets which modules, and what it holds of the network."""

import pytest
import torch

from localprop.errors import ParallelError
from localprop.parallel.placement import arrange
from localprop.settings.config import OptimConfig
from localprop.training.state import TrainingState
from tiny import split


@pytest.mark.parametrize("name", ["swin", "vit", "resnet", "cnn"])
def test_shares_are_all_of_the_backbone_and_a_stage_holds_its_own_alone(name):
    whole = split(name)
    shares = whole.shares()
    assert sorted(key for share in shares for key in share) == sorted(whole.backbone.state_dict())
    for k, module in enumerate(whole.local_modules):
        own = {n for n, _ in module.named_parameters() if not n.startswith("auxiliary.")}
        assert own <= set(shares[k])
    for path, module in whole.backbone.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # its statistics go where its weights are trained
            owners = {k for k, share in enumerate(shares) for key in module.state_dict() if f"{path}.{key}" in share}
            assert len(owners) == 1
    state = TrainingState(whole, OptimConfig(model_ema=True), 10, torch.device("cpu"), range(1, 2))
    held = {key for key, value in whole.backbone.named_parameters() if not value.is_meta}
    assert held == {key for key in shares[1] if key in dict(whole.backbone.named_parameters())}
    assert {key for key, value in state.ema.module.named_parameters() if not value.is_meta} == held
    assert all(p.is_meta for k in (0, 2) for p in whole.local_modules[k].auxiliary.parameters())
    assert set(state.parts()) == {"module-1"}


def test_modules_are_shared_out_by_time_and_replicas_come_in_multiples():
    def stages(*arguments):
        layout = arrange("modules", *arguments)
        assert layout.replicas == 1
        return [list(modules) for modules in layout.stages]

    assert stages(4, 4) == [[0], [1], [2], [3]]
    assert stages(4, 2) == [[0, 1], [2, 3]]
    assert stages(4, 2, [5.0, 1.0, 1.0, 1.0]) == [[0], [1, 2, 3]]
    assert arrange("modules", 2, 6).replicas == 3
    assert [arrange("modules", 2, 6).place(rank) for rank in range(4)] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert arrange("data", 4, 3).stages == (range(4),)
    with pytest.raises(ParallelError, match="take at most 2, or a multiple such as 6"):
        arrange("modules", 2, 5)
