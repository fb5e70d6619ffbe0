"""Trains on a folder of images, and loads the result into timm without localprop.

python examples/own_folder.py                          trains on small pictures of shapes that it draws itself
python examples/own_folder.py PATH --epochs 100 ...    trains on PATH/train/<class>/* and PATH/test/<class>/*, with any
                                                       flags of `localprop train`
"""

import random
import subprocess
import sys
import tempfile
from pathlib import Path

import timm
import torch
from PIL import Image, ImageDraw
from timm.data import create_transform, resolve_model_data_config
from torchvision.datasets import ImageFolder

SIDE = 16  # of the pictures of shapes, in pixels


def draw_shapes(folder: Path) -> Path:
    """Draws discs, rings and crosses of random size, place and colour: 64 of each to train on, 16 to test."""
    randomness = random.Random(0)
    for split, count in [("train", 64), ("test", 16)]:
        for shape in ["cross", "disc", "ring"]:
            (folder / split / shape).mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", (SIDE, SIDE), tuple(randomness.choices(range(80), k=3)))
                color = tuple(randomness.choices(range(150, 256), k=3))
                left, top, size = randomness.randint(0, 5), randomness.randint(0, 5), randomness.randint(8, 10)
                draw, box = ImageDraw.Draw(image), (left, top, left + size, top + size)
                if shape == "cross":
                    draw.line(box, color, width=2)
                    draw.line((left, top + size, left + size, top), color, width=2)
                else:
                    draw.ellipse(box, fill=color if shape == "disc" else None, outline=color, width=2)
                image.save(folder / split / shape / f"{i}.png")
    return folder


def localprop(*words: str) -> None:
    """Runs a localprop command, as in a terminal."""
    print("\n$ localprop", *words, flush=True)
    subprocess.run([sys.executable, "-m", "localprop", *words], check=True)


work = Path(tempfile.mkdtemp(prefix="localprop-"))
own, flags = sys.argv[1:2], sys.argv[2:]
folder = Path(own[0]) if own else draw_shapes(work / "shapes")
if not own:
    flags = ["--img-size", str(SIDE), "--epochs", "4", "--batch-size", "16"]
localprop("train", "--data", f"folder:{folder}", "--output", str(work), "--experiment", "run", *flags)
localprop("export", str(work / "run"), "--output", str(work / "exported"))

model = timm.create_model(f"local-dir:{work / 'exported'}", pretrained=True).eval()
transform = create_transform(**resolve_model_data_config(model))
test = ImageFolder(next(folder / name for name in ("test", "val") if (folder / name).is_dir()), transform)
with torch.no_grad():
    right = sum(int(model(image[None]).argmax()) == label for image, label in test)
print(f"\ntimm, with the weights in {work / 'exported'}: {right / len(test):.1%} of {len(test)} test images right")
