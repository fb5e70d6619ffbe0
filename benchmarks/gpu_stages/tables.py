"""The tables of a file of results, in Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any

MIB = 2**20
Row = dict[str, Any]


def report(content: dict[str, Any]) -> str:
    """All tables of a file that benchmarks/gpu.py wrote."""
    parts = [machine(content)]
    titles = {
        "correctness": "Tests marked gpu",
        "large": "Steps at 224 px",
        "small": "`localprop train` at 32 px",
        "resume": "Resumed and uninterrupted",
        "streams": "Two modules on two streams",
    }
    tables = {
        "correctness": correctness,
        "large": large,
        "small": small,
        "resume": resume,
        "streams": streams,
    }
    for name, title in titles.items():
        if text := tables[name](content):
            parts += [f"### {title}", text]
    if text := problems(content):
        parts += ["### Not measured", text]
    return "\n\n".join(parts)


def machine(content: dict[str, Any]) -> str:
    """A sentence that says what the results were measured with."""
    versions = content["versions"]
    if content["dry_run"]:
        return "**A dry run on a CPU with tiny sizes: these numbers mean nothing.**"
    return (
        f"{content['gpu']}, driver {content['driver']}, CUDA {content['cuda']}, torch {versions['torch']}, "
        f"timm {content['timm']}, commit {str(content['commit'])[:7]}, {content['date'][:10]}."
    )


def rows_of(content: dict[str, Any], *stages: str) -> list[Row]:
    """The rows of all stages whose names begin so."""
    return [row for name, stage in content["stages"].items() if name.startswith(stages) for row in stage["rows"]]


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]], words: int = 1) -> str:
    """A table; its first columns, as many as `words`, are text and the others numbers. None is an empty cell."""
    lines = [heads, ["---"] * words + ["---:"] * (len(heads) - words)]
    lines += [["" if cell is None else str(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def correctness(content: dict[str, Any]) -> str | None:
    """How many tests passed, and a table of those that did not."""
    rows = rows_of(content, "correctness")
    if not rows:
        return None
    counts = {word: sum(row.get("outcome") == word for row in rows) for word in ("passed", "failed", "skipped")}
    text = ", ".join(f"{count} {word}" for word, count in counts.items()) + "."
    others = [row for row in rows if row.get("outcome") != "passed"]
    if not others:
        return text
    cells = [(f"`{row['name']}`", row.get("outcome"), row.get("why", "").replace("|", "\\|")) for row in others]
    return f"{text}\n\n{table(['test', '', 'why'], cells, words=3)}"


def large(content: dict[str, Any]) -> str | None:
    """For each model a table: memory predicted and measured, and the time of each mode, against end-to-end."""
    rows = [row for row in rows_of(content, "large", "compiled") if "way" in row]
    predicted = {row["name"]: row.get("predicted") for row in rows_of(content, "prediction")}
    found: dict[str, dict[str, dict[str, Row]]] = {}
    for row in rows:
        modes = found.setdefault(row["case"], {}).setdefault(row["way"], {})
        modes.setdefault(row["mode"], row)  # the stage `compiled` measures eager steps once more
    texts = []
    for case, ways in found.items():
        example = next(row for modes in ways.values() for row in modes.values())
        texts.append(f"{case}, batch {example['batch']}, decoder {example['decoder']} where no other is named:")
        base = next(iter(ways.values()))
        texts.append(table(_LARGE, [_large_row(case, way, modes, base, predicted) for way, modes in ways.items()]))
    return "\n\n".join(texts) or None


_LARGE = (
    *("", "eager: MiB", "ratio", "predicted", "reserved", "ms", "ratio"),
    *("graphs: MiB", "ratio", "reserved", "ms", "ratio", "compiled: ms"),
)


def _large_row(
    case: str, way: str, modes: dict[str, Row], base: dict[str, Row], predicted: dict[str, int | None]
) -> list[Any]:
    cells: list[Any] = [way]
    for mode in ("eager", "graphs"):
        row, first = modes.get(mode, {}), base.get(mode, {})
        cells += [_mib(row.get("allocated")), _ratio(row.get("allocated"), first.get("allocated"))]
        if mode == "eager":
            error = _ratio(predicted.get(f"{case}: {way}"), row.get("allocated"), digits=4)
            cells.append(None if error is None else f"{100 * (float(error) - 1):+.1f}%")
        cells += [_mib(row.get("reserved")), _number(_ms(row), 1), _ratio(_ms(row), _ms(first))]
    return [*cells, _number(_ms(modes.get("compiled", {})), 1)]


def _ms(row: Row) -> float | None:
    """The time of a step: in turns with others, else alone."""
    return row.get("ms", row.get("ms_alone"))


def small(content: dict[str, Any]) -> str | None:
    """Images per second of training and of the bare graph, and the memory of training as graphs."""
    rows = rows_of(content, "small")
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        kind = row["name"].removeprefix(f"{row['method']}, ")
        found.setdefault(row["method"], {})[kind] = row
    kinds = ("localprop train, eager", "localprop train, graphs", "bare graph")
    cells = []
    for method, own in found.items():
        rates = [own.get(kind, {}).get("images_per_second") for kind in kinds]
        graphs = own.get(kinds[1], {})
        memory = [_mib(graphs.get(name)) for name in ("predicted_memory", "peak_memory")]
        cells.append([method, *(_number(rate, 0) for rate in rates), _ratio(rates[1], rates[2]), *memory])
    heads = ["images per second", "`--cuda-graphs off`", "`--cuda-graphs on`", "bare graph", "on / bare"]
    return table([*heads, "on: MiB predicted", "on: MiB measured"], cells) if cells else None


def resume(content: dict[str, Any]) -> str | None:
    """For each decoder whether weights are equal bit for bit."""
    rows = rows_of(content, "resume")
    words = {True: "yes", False: "**no**", None: None}
    keys = ("resumed_equals_uninterrupted", "graphs_equal_eager")
    cells = [[row["decoder"], *(words[row.get(key)] for key in keys)] for row in rows]
    heads = ["decoder", "resumed = uninterrupted", "graphs = eager"]
    return table(heads, cells, words=3) if cells else None


def streams(content: dict[str, Any]) -> str | None:
    """Images per second of two modules one after another, and at once."""
    rows = rows_of(content, "streams")
    cells = [(row["name"], _number(row.get("images_per_second"), 0)) for row in rows]
    return table(["K=2", "images per second"], cells) if cells else None


def problems(content: dict[str, Any]) -> str | None:
    """A line for each stage and row that failed, or was not captured as CUDA graphs."""
    lines = []
    for name, stage in content["stages"].items():
        if stage["error"] or not stage["finished"]:
            lines.append(f"- {name}: {stage['error'] or 'not finished'}")
        for row in stage["rows"]:
            lines += [f"- {row['name']}: {row[key]}" for key in ("error", "not_captured") if row.get(key)]
    return "\n".join(lines) or None


def _mib(count: int | None) -> str | None:
    return None if count is None else f"{count / MIB:.0f}"


def _number(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{value:.{digits}f}"


def _ratio(value: float | None, base: float | None, digits: int = 3) -> str | None:
    return None if value is None or not base else f"{value / base:.{digits}f}"
