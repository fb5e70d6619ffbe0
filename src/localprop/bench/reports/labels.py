"""What a setting is called beside others: names for what differs, and nothing else."""

import json
from collections.abc import Collection, Sequence
from typing import Any

from localprop.bench.series import BASELINE
from localprop.errors import shortened
from localprop.settings.config import TrainConfig
from localprop.settings.flat import to_flat

DEFAULTS = to_flat(TrainConfig())
_KINDS = ("decoder", "head", "partition")  # their values are words that need a noun: "conv decoder"
_NAMES = {"grad_checkpointing": "checkpointing"}
_OFF = {"reach": 0, "kinetic": 0.0, "finish": 0.0}  # recorded by runs without a part


def usual_values(configs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The defaults of all settings; for a decoder, head or partition the value that most methods have here.

    Records may be older than a default: where all methods have the decoder `conv`, it needs no mention.
    """
    usual = dict(DEFAULTS)
    for key in _KINDS:
        methods: dict[Any, set[Any]] = {DEFAULTS[key]: set()}  # first, so that it wins where as many have another
        for config in configs:
            if key in config:
                methods.setdefault(config[key], set()).add((config["method"], config["modules"]))
        usual[key] = max(methods, key=lambda value: len(methods[value]))
    return usual


def setting_labels(configs: Sequence[dict[str, Any]], shared: Collection[str]) -> list[tuple[str, str]]:
    """A long and a short name for each of some settings; the short one has no method, unless it is end-to-end.

    End-to-end training in K modules is "exact K=4": its gradients are those of end-to-end training with one.

    Named is what varies and is not usual. (Were defaults named, a method without a decoder would be given one.)

    Args:
        configs: flat settings, with "method" and "modules" (their number).
        shared: keys in which none of them differ.
    """
    usual = usual_values(configs)
    counts = {config["modules"] for config in configs if config["method"] != BASELINE}
    keys = dict.fromkeys([*DEFAULTS, *(key for config in configs for key in config)])
    varied = [key for key in keys if key not in shared and key not in ("method", "modules")]
    varied = [key for key in varied if _differ(key, configs)]
    bare = sum(key in varied for key in _KINDS) == 1  # then the noun goes without saying
    labels = []
    for config in configs:
        method, count = config["method"], f"K={config['modules']}"
        within = [k for k in varied if _differ(k, [other for other in configs if other["method"] == method])]
        # What is usual is named only where it is one choice beside others: "conv decoder" beside "deconv decoder".
        named = [k for k in varied if config.get(k) != usual.get(k) or within == [k]]
        if method == BASELINE:
            named = [k for k in named if k in config]  # of the rest it has none
        words = [word for key in named if (word := _word(key, config.get(key)))]
        short = [word.rpartition(" ")[0] if bare and word.endswith(_KINDS) else word for word in words]
        if method == BASELINE:
            name = method if config["modules"] == 1 else f"exact {count}"
            labels.append(_cut([name, *words], [name, *short]))
            continue
        long = [method, *([count] if len(counts) > 1 else []), *words]
        labels.append(_cut(long, [count, *short]))
    return labels


def _cut(long: Sequence[str], short: Sequence[str]) -> tuple[str, str]:
    return shortened(", ".join(long), 120), shortened(", ".join(short))


def _differ(key: str, configs: Sequence[dict[str, Any]]) -> bool:
    return len({json.dumps(c[key], sort_keys=True, default=str) for c in configs if key in c}) > 1


def _word(key: str, value: Any) -> str:
    """One setting in words; empty where it is off or left to its default."""
    name = _NAMES.get(key, key.replace("_", " "))
    off = (value is False and DEFAULTS.get(key) is False) or (key in _OFF and value == _OFF[key])
    if value is None or value == {} or off:
        return ""
    if isinstance(value, bool):
        return name if value else f"no {name}"
    if isinstance(value, dict):
        return " ".join(f"{option}={item}" for option, item in value.items())
    if isinstance(value, (list, tuple)):
        return f"{name} {'+'.join(map(str, value))}"
    return f"{value} {key}" if key in _KINDS else f"{name} {value}"
