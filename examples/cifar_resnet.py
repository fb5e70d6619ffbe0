"""Adds ResNet-32 and ResNet-110 for CIFAR to timm. InfoPro, DGL and AugLocal report their results with them.

localprop train --plugin examples/cifar_resnet.py --model cifar_resnet32 --data cifar10 --modules 8 --method infopro
python examples/cifar_resnet.py     prints their parameters and where they can be cut

Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2: a 3 x 3 convolution and three
stages of n basic blocks with 16, 32 and 64 channels, 6n + 2 layers. Shortcuts that change the shape are 1 x 1
convolutions, as in InfoPro's code. timm's own ResNet has four stages and a stem that divides the side by 4.
"""

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, downsample_conv
from torch import Tensor, nn


class CifarResNet(nn.Module):
    """A ResNet for 32 x 32 pixels.

    Args:
        blocks: number n of basic blocks in each of the three stages.
        num_classes: number of labels.
        in_chans: channels of the image.
    """

    def __init__(self, blocks: int, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.bn1, self.act1 = nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        self.stages, width = nn.ModuleList(), 16
        for channels, stride in ((16, 1), (32, 2), (64, 2)):
            shortcut = None if stride == 1 else downsample_conv(width, channels, kernel_size=1, stride=stride)
            first = BasicBlock(width, channels, stride=stride, downsample=shortcut)
            self.stages.append(nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(blocks - 1))))
            width = channels
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (B, in_chans, 32, 32) to logits (B, num_classes)."""
        x = self.act1(self.bn1(self.conv1(images)))
        for stage in self.stages:
            x = stage(x)
        return self.fc(x.mean((2, 3)))


SETTINGS = {"input_size": (3, 32, 32), "num_classes": 10, "first_conv": "conv1", "classifier": "fc"}
default_cfgs = generate_default_cfgs({"cifar_resnet32.untrained": SETTINGS, "cifar_resnet110.untrained": SETTINGS})


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs) -> nn.Module:
    """ResNet-32, 0.5 million parameters."""
    return build_model_with_cfg(CifarResNet, "cifar_resnet32", pretrained, blocks=5, **kwargs)


@register_model
def cifar_resnet110(pretrained: bool = False, **kwargs) -> nn.Module:
    """ResNet-110, 1.7 million parameters."""
    return build_model_with_cfg(CifarResNet, "cifar_resnet110", pretrained, blocks=18, **kwargs)


if __name__ == "__main__":
    import localprop

    for create in (cifar_resnet32, cifar_resnet110):
        model = create()
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
        print(f"{create.__name__}: {sum(p.numel() for p in model.parameters()):,} parameters")
        print(localprop.chain(model, (3, 32, 32)), "\n")
