"""Cuts one small model of each family in timm, and some of torchvision, and checks the units against the model.

python benchmarks/models.py                                           all models: about 20 minutes on one core
python benchmarks/models.py vit_tiny_patch16_224 torchvision/swin_t   the named models; prints, and writes nothing

For a batch of three, the units, run in order, must give the same as the model, bit for bit: in eval mode the output; in
train mode, with dropout and stochastic depth where the model has them, also the buffers and the gradients. Writes
benchmarks/results/models.json and the table in docs/models.md.
"""

import gc
import sys
import time
import warnings

import timm
import torch
import torchvision
from common import ROOT, write_result

import localprop

TIMM = """
beit_base_patch16_224 eca_botnext26ts_256 mobileone_s1 cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32
convnext_atto cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny deepseek_vit_412m
deit_tiny_patch16_224 deit3_small_patch16_224 densenet121 dla46x_c dpn48b edgenext_xx_small efficientformer_l1
efficientformerv2_s0 efficientnet_b0 efficientvim_m1 efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224 fasternet_t0
fastvit_t8 focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m ghostnet_050 hardcorenas_b hgnetv2_b0 hiera_tiny_224
hieradet_small hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small
levit_128s lowformer_b0 mambaout_femto maxvit_nano_rw_256 coatnet_nano_rw_224 poolformer_s12 mixer_s16_224 gmlp_ti16_224
mobilenetv3_small_050 mobilenetv5_base mobilevit_xxs mvitv2_tiny naflexvit_base_patch16_gap nasnetalarge nest_tiny
nextvit_small nf_regnet_b0 pit_ti_224 pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 repghostnet_050
repvit_m1 res2net50_14w_8s resnest14d resnet18 resnet50 resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18
sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window8_256
swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny
vit_tiny_patch16_224 vit_small_patch14_dinov2 vit_small_patch16_dinov3 vit_tiny_r_s16_p8_224
vit_srelpos_small_patch16_224 samvit_base_patch16_224 vitamin_small_224 volo_d1_224 ese_vovnet19b_slim_dw
legacy_xception xception41p xcit_nano_12_p16_224
"""
TORCHVISION = """
swin_t swin_v2_t vit_b_16 convnext_tiny resnet18 efficientnet_b0 regnet_y_400mf maxvit_t mobilenet_v3_small densenet121
vgg11_bn
"""
# Families without a small member: fewer blocks and pixels, or this would need more than 16 GB of memory.
SMALLER = {
    "deepseek_vit_412m": {"depth": 4, "img_size": 224},
    "gemma4_vit_167m": {"depth": 4, "img_size": 240},
    "qwen3_vit_88m": {"depth": 4, "img_size": 224},
    "samvit_base_patch16_224": {"depth": 4},
    "vit_small_patch14_dinov2": {"img_size": 224},
}
CLASSES = 10


def build(name: str) -> torch.nn.Module:
    if name.startswith("torchvision/"):
        return torchvision.models.get_model(name.removeprefix("torchvision/"), num_classes=CLASSES)
    for rates in ({"drop_rate": 0.1, "drop_path_rate": 0.1}, {"drop_rate": 0.1}):
        try:
            return timm.create_model(name, num_classes=CLASSES, **SMALLER.get(name, {}), **rates)
        except TypeError:  # this family takes no such rate
            continue
    return timm.create_model(name, num_classes=CLASSES, **SMALLER.get(name, {}))


def run(model: torch.nn.Module, function, images: torch.Tensor, before: dict) -> list[torch.Tensor]:
    """Output, buffers and, in train mode, gradients of one pass that starts from the state `before` with one seed."""
    model.load_state_dict(before)
    model.zero_grad()
    torch.manual_seed(1)
    with torch.set_grad_enabled(model.training):
        output = function(images)
    if model.training:
        output.square().mean().backward()
    return [output.detach(), *(b.clone() for b in model.buffers()), *(p.grad for p in model.parameters())]


def equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def check(name: str) -> dict:
    torch.manual_seed(0)
    model = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    start = time.process_time()
    chain = localprop.chain(model)
    seconds = time.process_time() - start
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    images = torch.randn(3, *chain.input_size)

    def units(features: torch.Tensor) -> torch.Tensor:
        context = {}
        for unit in chain:
            features = unit(model, features, context)
        return features

    result = {"units": len(chain), "seconds": round(seconds, 1), "input_size": chain.input_size}
    for training in (False, True):
        model.train(training)
        pairs = zip(run(model, model, images, before), run(model, units, images, before), strict=True)
        result["equal in train" if training else "equal in eval"] = all(equal(a, b) for a, b in pairs)
    names = [n for unit in chain for n in unit.parameters]
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    result["one unit per parameter"] = len(names) == len(set(names)) and trained <= set(names)
    sizes = [sum(model.get_parameter(n).numel() for n in unit.parameters) for unit in chain]
    result["largest unit"] = round(max(sizes) / sum(p.numel() for p in model.parameters()), 2)
    return result


def write_table(results: dict[str, dict]) -> None:
    """Writes the table in docs/models.md: models by their number of units."""
    page = ROOT / "docs" / "models.md"
    head = page.read_text().partition("\n| units |")[0] + "\n"
    rows = ["| units | models (and how many units each) |", "|---|---|"]
    for low, high in ((1, 3), (4, 9), (10, 19), (20, 39), (40, 999)):
        names = [f"{n} {r['units']}" for n, r in results.items() if low <= r.get("units", 0) <= high]
        rows.append(f"| {low} to {high} | {', '.join(names)} |".replace("40 to 999", "40 or more"))
    page.write_text(head + "\n".join(rows) + "\n")


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)
    results = {}
    for name in sys.argv[1:] or [*TIMM.split(), *(f"torchvision/{n}" for n in TORCHVISION.split())]:
        try:
            results[name] = check(name)
        except localprop.LocalpropError as error:
            results[name] = {"error": str(error)}
        print(name, results[name], flush=True)
        gc.collect()
    if len(sys.argv) == 1:
        write_result("models", {"models": results})
        write_table(results)


if __name__ == "__main__":
    main()
