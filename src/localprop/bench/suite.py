"""Suites: grids of training runs under one protocol, read from YAML.

    description: What it is for, in a sentence.
    settings:                       # of every run; a list makes one run for each of its values
      data: digits
      seed: [1, 2]
    runs:                           # in this order; a list makes one run for each of its values
      - method: end-to-end
      - method: [greedy, infopro]
        modules: [2, 4]

Keys are the flags of `localprop train`. The grid of `settings` goes outermost, so that here the first seed of every
run comes before the second of any. A value that is a list itself, such as of `cuts`, is written in another list.
`base: smoke` puts the settings and runs of that suite before a suite's own. `defaults` are settings where neither
`settings` nor a run has a value; they name no run, so a suite keeps its names and results when a default changes.
"""

import fnmatch
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from localprop.errors import BenchError, ConfigError, listing, shown, suggestion
from localprop.registry import DECODERS, HEADS
from localprop.settings.config import TrainConfig
from localprop.settings.flat import from_flat, plain_keys, to_flat
from localprop.settings.rates import with_usual_rates
from localprop.settings.trust import require_typed
from localprop.settings.values import read_yaml

_FOLDER = Path(__file__).parent / "suites"
# Where and how far a run goes is the bench's own affair.
_OWN = ("output", "experiment", "resume")
_KEYS = ("description", "base", "defaults", "settings", "runs")
_MOST_RUNS = 10_000
_LONGEST_NAME = 200  # a file's has at most 255, and gets a suffix
# What a run is named after wherever it differs, in this order.
_NAMING = ("data", "model", "method", "modules", "partition", "decoder", "head")
# What a run is named after only if nothing else tells it from another.
_QUIET = (
    "model_kwargs",
    "img_size",
    "epochs",
    "steps",
    "val_interval",
    "batch_size",
    "lr",
    "plugin",
    "split_blocks",
    "min_depth",
)


@dataclass(frozen=True)
class SuiteRun:
    """One run of a suite.

    Attributes:
        name: unique in the suite, such as "infopro-k4-s1".
        axes: the settings by which the suite's runs differ.
        config: all settings.
    """

    name: str
    axes: dict[str, Any]
    config: TrainConfig


@dataclass(frozen=True)
class Suite:
    """A grid of runs.

    Attributes:
        name: of the suite; of its file, without the suffix.
        description: what it is for, in a sentence.
        runs: in the order in which they are to be run.
    """

    name: str
    description: str
    runs: tuple[SuiteRun, ...]

    def only(self, patterns: Sequence[str]) -> "Suite":
        """The suite with those runs alone whose names match one of the patterns.

        Raises:
            BenchError: a pattern matches none.
        """
        names = [run.name for run in self.runs]
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                hint = suggestion(pattern, names) if len(names) < 10 else f"see localprop bench {self.name} --list"
                raise BenchError(f"no run of {self.name} matches {pattern!r}; {hint}")
        kept = (run for run in self.runs if any(fnmatch.fnmatchcase(run.name, pattern) for pattern in patterns))
        return replace(self, runs=tuple(kept))


def shipped_suites() -> list[Suite]:
    """The suites that come with localprop, those with the fewest runs first."""
    return sorted((load_suite(path.stem) for path in _FOLDER.glob("*.yaml")), key=lambda suite: len(suite.runs))


def load_suite(name: str, changes: dict[str, Any] | None = None, words: Sequence[str] = ()) -> Suite:
    """Reads a suite. Which plugins it may use, a `Runner` is told.

    Args:
        name: of a shipped suite, or the path of a YAML file.
        changes: settings that take the place of the suite's in all runs.
        words: the command line, from the command's name on, which decides what a suite may not.

    Raises:
        BenchError: there is no such suite, or it is not one.
        ConfigError: a setting does not exist, has an impossible value, or is not for a file to decide.
    """
    path = find_suite(name)
    description, defaults, settings, blocks = _read(path, ())
    if changes:
        from_flat(changes, "--set")  # else the suite's file would be blamed
    flats = [flat | (changes or {}) for flat in itertools.islice(_expand(settings, blocks), _MOST_RUNS + 1)]
    if len(flats) > _MOST_RUNS:
        raise BenchError(f"{path} comes to more than {_MOST_RUNS} runs; divide it into several suites")
    if not flats:
        raise BenchError(f"{path} has no runs: a setting has an empty list of values; give it one or more")
    if own := set(_OWN) & {key for flat in (defaults, *flats) for key in flat}:
        raise BenchError(f"{path}: {min(own)} is not for a suite to set; leave it out")
    configs = [with_usual_rates(from_flat(defaults | flat, str(path)), defaults | flat) for flat in flats]
    for flat in flats:
        require_typed({**defaults, **flat, "plugin": None}, str(path), words or ("bench", name), list(changes or {}))
    for config in configs:
        _check(config, str(path))
    keys = _axes(settings, blocks, configs)
    axes = [{key: to_flat(config)[key] for key in keys} for config in configs]
    runs = [SuiteRun(*parts) for parts in zip(_names(keys, flats), axes, configs, strict=True)]
    for name, count in Counter(run.name for run in runs).items():
        check_run_name(name, str(path))
        if count > 1:
            raise BenchError(f"{path}: {count} runs are called {name}; runs must differ in a setting")
    return Suite(path.stem, description, tuple(runs))


def find_suite(name: str, *others: str, beside: Path = Path()) -> Path:
    """The file of a suite: a shipped one's name, or a path, relative to the folder `beside`.

    Raises:
        BenchError: no suite has that name; `others` are more words that may have been meant.
    """
    shipped, path = _FOLDER / f"{name}.yaml", beside / name
    if not shipped.is_file() and path.suffix not in (".yaml", ".yml"):
        known = [*(suite.stem for suite in _FOLDER.glob("*.yaml")), *others]
        raise BenchError(f"no suite is called {name!r}; {suggestion(name, known)}")
    return shipped if shipped.is_file() else path


def _read(path: Path, above: tuple[Path, ...]) -> tuple[str, dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """Description, defaults, settings and runs of a suite, with those of its base; it is itself a base of `above`."""
    if path in above:
        raise BenchError(f"{path} is its own base; leave that out")
    content = read_yaml(path)
    if unknown := {str(key) for key in content} - set(_KEYS):
        raise BenchError(f"{path}: unknown key {min(unknown)!r}; a suite has {listing(_KEYS)}")
    based: tuple[str, dict[str, Any], dict[str, Any], list[dict[str, Any]]] = ("", {}, {}, [])
    if "base" in content:
        based = _read(find_suite(str(content["base"]), beside=path.parent), (*above, path))
        content = {"settings": {}, "runs": [], **content}
    defaults, settings, runs = content.get("defaults", {}), content.get("settings"), content.get("runs")
    if not isinstance(defaults, dict) or any(isinstance(value, list) for value in defaults.values()):
        raise BenchError(f"{path}: 'defaults' must be a mapping with one value for each setting")
    if not isinstance(settings, dict) or not isinstance(runs, list) or not all(isinstance(r, dict) for r in runs):
        raise BenchError(f"{path} is no suite; it needs 'settings', a mapping, and 'runs', a list of mappings")
    if not based[3] + runs:
        raise BenchError(f"{path} has no runs; write one under 'runs'")
    source = str(path)
    defaults, settings = based[1] | plain_keys(defaults, source), based[2] | plain_keys(settings, source)
    runs = [*based[3], *(plain_keys(run, source) for run in runs)]
    return str(content.get("description") or ""), defaults, settings, runs


def check_run_name(name: str, source: str) -> None:
    """Checks that a run's name is that of a file and a folder right under the results.

    Raises:
        BenchError: it would lead to another folder, is hidden, or too long; the line names `source`.
    """
    if not re.fullmatch(r"[\w=,+-][\w.=,+-]*", name) or len(name.encode()) > _LONGEST_NAME:
        raise BenchError(
            f"{source}: a run would be called {shown(name)}, and so would its folder; a name begins with a letter or "
            f"digit and has at most {_LONGEST_NAME} bytes: change the setting that it is made of"
        )


def _check(config: TrainConfig, source: str) -> None:
    """Finds a misspelt name before hours of runs; what a plugin adds is known only to the runs."""
    from localprop.methods import check_method  # imports torch, which a misspelt suite or flag does not need

    local = config.local
    if config.backbone.plugin is None:
        check_method(local.method, local.modules, dict(local.method_kwargs or {}))
        try:
            if local.head is not None:
                HEADS.lookup(local.head)
            DECODERS.lookup(local.decoder)
        except ConfigError as error:
            raise BenchError(f"{source}: {error}") from None


def _expand(settings: dict[str, Any], blocks: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for outer in _grid(settings):
        for block in blocks:
            for inner in _grid(block):
                yield outer | inner


def _grid(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One flat dict per combination of the values of those settings that are lists."""
    values = [value if isinstance(value, list) else [value] for value in settings.values()]
    for combination in itertools.product(*values):
        yield dict(zip(settings, combination, strict=True))


def _axes(settings: dict[str, Any], blocks: list[dict[str, Any]], configs: list[TrainConfig]) -> list[str]:
    """The settings in which runs differ: those that name a run first, the seed last."""
    flats = [to_flat(config) for config in configs]
    named = [*_NAMING, *(key for part in (*blocks, settings) for key in part)]
    # The seed counts where a suite names it, so that runs keep their names, and results, when there are more seeds.
    differing = [k for k in dict.fromkeys(named) if k == "seed" or any(flat[k] != flats[0][k] for flat in flats)]
    return sorted(differing, key=lambda key: key == "seed")


def _names(keys: list[str], flats: list[dict[str, Any]]) -> list[str]:
    """What runs are called: settings that differ, without those that would tell apart nothing more."""
    for key in reversed([key for key in keys if key in _QUIET]):
        fewer = [other for other in keys if other != key]
        # Where they are unique neither way, the caller says so.
        if len({_name(fewer, flat) for flat in flats}) == len({_name(keys, flat) for flat in flats}):
            keys = fewer
    return [_name(keys, flat) for flat in flats]


def _name(keys: list[str], flat: dict[str, Any]) -> str:
    """A run's name made of those of its settings that its part of the suite names."""
    words = []
    for key in keys:
        value = flat.get(key)
        if value is None or value is False:
            continue
        match key:
            case "modules" | "seed":
                words.append(f"{'s' if key == 'seed' else 'k'}{value}")
            case _ if value is True:
                words.append(key)
            case _ if isinstance(value, dict):
                words += [f"{name}={item}" for name, item in value.items()]
            case _:
                words.append(str(value) if key in _NAMING else f"{key}={value}")
    text = re.sub(r"[\s\[\](){}'\"]", "", "-".join(words).replace("_", "-"))
    return re.sub(r"[^\w.=,+-]+", "_", text) or "run"
