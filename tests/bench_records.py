"""Records of suites that tests make up, and Markdown tables read back."""

from localprop.bench.record import Record, write_record
from localprop.settings.config import TrainConfig
from localprop.settings.flat import to_flat

MIB = 2**20


def make_record(method="end-to-end", modules=1, seed=1, accuracy=80.0, peak=1000, predicted=1000, step=0.1, **config):
    """A record; heads inside lose 10 points, and none of infopro's has an accuracy."""
    # The decoder is version 0.1's default: labels have to be the same whatever the default is by now.
    own = {"data": "cifar10", "method": method, "decoder": "conv", "seed": seed}
    config = to_flat(TrainConfig()) | own | config
    config["modules"] = modules if modules > 1 else None
    config = {k: v for k, v in config.items() if k not in ("output", "experiment", "resume", "data_dir", "device")}
    inside = None if method == "infopro" or accuracy is None else accuracy - 10
    losses = 1 if method == "end-to-end" else modules
    name = "-".join(str(config[k]) for k in ("data", "method", "modules", "decoder", "lr", "epochs", "seed"))
    return Record(
        suite="small",
        run=f"{name}-{config['grad_checkpointing']}",
        axes={},
        result={
            "evaluated_on": "test",
            "accuracy": accuracy,
            "module_accuracies": [inside] * (losses - 1) + [accuracy],
            "top5": None,
            "loss": 1.0,
            "epochs": config["epochs"],
            "steps": 20,
            "curve": {"step": [10, 20], "loss": [[2.0] * losses, [1.0 + seed] * losses]},
        },
        cost={
            "predicted_memory": predicted and predicted * MIB,
            "peak_memory": peak and peak * MIB,
            "seconds_per_step": step,
            "images_per_second": 320.0,
            "seconds": 60.0,
            "jobs": 2,
        },
        network={"modules": [[f"unit{k}"] for k in range(modules)], "parameters": 1, "auxiliary_parameters": []},
        data={
            "name": config["data"],
            "train_images": 50000,
            "evaluated_images": 10000,
            "img_size": config["img_size"] or 32,
            "classes": 10,
        },
        config=config,
        provenance={
            "commit": "0123456789abcdef",
            "dirty": seed == 2,
            "date": f"2025-01-0{seed}",
            "versions": {"torch": "2.8.0"},
            "cpu": "a CPU",
            "gpu": None,
        },
    )


def suite(data="cifar10", seeds=(1, 2, 3), **config):
    """End-to-end, the local methods at K=2 and 4, and another decoder; seeds shift everything alike, and some more."""
    records = []
    for seed in seeds:
        shift = {"data": data, "seed": seed, **config}
        records.append(make_record(accuracy=80 + seed, **shift))
        for k, peak in ((4, 400), (2, 600)):
            records.append(make_record("greedy", k, accuracy=76 + 1.5 * seed, peak=peak - 50, step=0.11, **shift))
            records.append(make_record("infopro", k, accuracy=75 + seed, peak=peak + 50, **shift))
            records.append(
                make_record("feature-reconstruction", k, accuracy=79 - k / 2 + seed, peak=peak, step=0.12, **shift)
            )
        records.append(
            make_record("feature-reconstruction", 4, accuracy=77.5 + seed, peak=410, decoder="deconv", **shift)
        )
    return records


def write_folder(folder, records):
    folder.mkdir(parents=True, exist_ok=True)
    for record in records:
        write_record(folder / f"{record.run}.json", record)
    return folder


def cells(text):
    """A Markdown table as rows of cells, without the line under its head."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [rows[0], *rows[2:]]


def column(text, name):
    head, *rows = cells(text)
    return {row[0]: row[head.index(name)] for row in rows}
