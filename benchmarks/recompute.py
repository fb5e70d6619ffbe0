"""Measures the Python overhead of recomputation, in a network so small that its numbers take no time to compute.

python benchmarks/recompute.py                 prints microseconds for each step, and writes results/recompute.json
python benchmarks/recompute.py --name NAME     writes results/NAME.json, such as of another commit on PYTHONPATH
"""

import argparse
import statistics
import time

import timm
import torch
from common import write_result

import localprop

SIZE = (3, 8, 8)
SIZES = {"img_size": 8, "patch_size": 2, "window_size": 2, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 2)}


def network(recompute: bool) -> localprop.LocalNetwork:
    torch.manual_seed(0)
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=10, **SIZES)
    return localprop.localize(model, 1, "end-to-end", input_size=SIZE, recompute=recompute).train()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", default="recompute")
    parser.add_argument("--rounds", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    networks = {"kept": network(recompute=False), "recomputed": network(recompute=True)}
    images, labels = torch.randn(2, *SIZE), torch.tensor([0, 1])
    times: dict[str, list[float]] = {name: [] for name in networks}
    for round_ in range(options.rounds + 20):
        for name, net in networks.items():
            started = time.process_time()
            net.backward(images, labels)
            if round_ >= 20:
                times[name].append(time.process_time() - started)
    rows = {name: round(1e6 * statistics.median(values), 1) for name, values in times.items()}
    for name, value in rows.items():
        print(f"{name:12s} {value:8.1f} us")
    write_result(options.name, {"rounds": options.rounds, "blocks": sum(SIZES["depths"]), "microseconds": rows})


if __name__ == "__main__":
    main()
