"""The house keeps its order: imports go one way, and what the documents say of the code is so."""

import ast
import importlib
import re
from pathlib import Path

import pytest

import localprop
from places import ROOT

PACKAGE = ROOT / "src" / "localprop"
DESIGN = (ROOT / "docs" / "design.md").read_text()
FILES = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
USERS = [path for folder in ("examples", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
# What may be imported beside the names in `__all__`: the tables that methods, heads and decoders are added to; and what
# a suite's results become here, of which benchmarks/publish.py only knows the places. Of training in several processes:
# what `train_module` takes, how far stages run ahead, and how long schedules take. Of plans: a step of one's own,
# what local learning is known to cost in accuracy, and what the command says of a plan.
PUBLIC_MODULES = {
    "localprop.methods": {"METHODS"},
    "localprop.heads": {"HEADS"},
    "localprop.decoders": {"DECODERS"},
    "localprop.bench.reports.placing": {"label_points"},
    "localprop.bench.reports.report": {"write_report"},
    "localprop.network.carry": {"Carry"},
    "localprop.parallel.placement": {"IN_FLIGHT"},
    "localprop.memory.speed": {"MACHINES", "product"},
    "localprop.memory.tracker": {"work"},
    "localprop.planning.simulation": {"simulate_own_step"},
    "localprop.planning.known": {"known_gaps"},
    "localprop.planning.reporting": {"plan_lines"},
    "localprop.settings.flags": {"parse"},
    "localprop.settings.plan": {"PlanConfig"},
    "localprop.planning.schedules": {
        *("Link", "StageTime", "Timing"),
        *("data_parallel", "local_modules", "one_f_one_b", "one_f_one_b_order", "zero_bubble"),
    },
}


FOLDERS = sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file())


def room_of(path, folder=PACKAGE):
    """What holds a file, directly below `folder`: a module or another folder."""
    return path.relative_to(folder).parts[0].removesuffix(".py")


def rooms(folder):
    return {room_of(path, folder) for path in FILES if path.is_relative_to(folder)} - {"__init__", "__main__"}


def imported(tree):
    """Every module of localprop that a file imports, wherever in the file; names in it only where they are modules."""
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names if alias.name.split(".")[0] == "localprop"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module and node.module.split(".")[0] == "localprop":
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                modules |= {name if file_of(name) else node.module for name in names}
    return modules


def file_of(module):
    """The file of a module of localprop; None if there is none."""
    place = ROOT / "src" / Path(*module.split("."))
    return next((p for p in (place.with_suffix(".py"), place / "__init__.py") if p.is_file()), None)


def drawing(name):
    return re.search(rf"```{name}\n(.*?)```", DESIGN, re.DOTALL)[1].splitlines()


def levels(lines):
    """Room -> its level; rooms of one level are set apart by commas."""
    names = [(name, level) for level, line in enumerate(lines) for name in re.findall(r"[^\s,]+", line)]
    assert len(dict(names)) == len(names), "a room is drawn twice"
    return dict(names)


def floors():
    return levels(drawing("imports"))


def modules_of(folder):
    """Module -> its level within a folder."""
    (line,) = (line for line in drawing("modules") if line.startswith(f"{folder}:"))
    return levels(line.partition(":")[2].split("<"))


def test_the_drawing_has_every_folder_once():
    assert set(floors()) == rooms(PACKAGE)


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_drawing_has_every_module_once(folder):
    assert set(modules_of(folder)) == rooms(PACKAGE / folder)


def test_a_folder_is_small_enough_to_keep_in_mind():
    for folder in {path.parent for path in FILES}:
        assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= 13, folder


LONGEST = {"file": 300, "function": 75, "class": 260}  # lines; most are much shorter


def test_files_functions_and_classes_stay_short_enough_to_read():
    found = {kind: [] for kind in LONGEST}
    for path, tree in FILES.items():
        place = path.relative_to(PACKAGE)
        found["file"].append((len(path.read_text().splitlines()), str(place)))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                kind = "class" if isinstance(node, ast.ClassDef) else "function"
                found[kind].append((node.end_lineno - node.lineno + 1, f"{node.name} in {place}"))
    for kind, sizes in found.items():
        lines, name = max(sizes)
        assert lines <= LONGEST[kind], f"the {kind} {name} has {lines} lines; the most is {LONGEST[kind]}"


def test_no_folder_has_the_name_of_a_public_function():
    assert not {path.parent.name for path in FILES} - {"localprop"} & set(localprop.__all__)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    room, floor = room_of(path), floors()
    if room in ("__init__", "__main__"):
        return
    for module in imported(FILES[path]):
        target = file_of(module)
        assert target, f"{path} imports {module}, which is no file"
        other = room_of(target)
        if other == "__init__":  # the index lies above the folders whose names it collects
            assert room == "cli", f"{path} imports the index"
        elif other != room:
            assert floor[other] < floor[room], f"{path} imports {module}, which is not below it"


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_within_a_folder_go_one_way(folder):
    inside, level = PACKAGE / folder, modules_of(folder)
    for path in FILES:
        if not path.is_relative_to(inside) or path == inside / "__init__.py":
            continue
        targets = {file_of(module) for module in imported(FILES[path])}
        for target in targets:
            if target and target.is_relative_to(inside) and target != inside / "__init__.py":
                own, other = room_of(path, inside), room_of(target, inside)
                assert own == other or level[other] < level[own], f"{path} imports {target}, which is not below it"


def test_no_file_needs_itself():
    graph = {path: {file_of(module) for module in imported(tree)} for path, tree in FILES.items()}
    done = set()

    def visit(path, trail):
        assert path not in trail, " -> ".join(str(p.relative_to(PACKAGE)) for p in [*trail, path])
        if path not in done:
            for target in graph[path]:
                visit(target, [*trail, path])
            done.add(path)

    for path in graph:
        visit(path, [])


@pytest.mark.parametrize("room", ["methods", "heads", "decoders"])
def test_files_of_a_kind_do_not_know_each_other(room):
    for path in (PACKAGE / room).glob("*.py"):
        siblings = {file_of(m) for m in imported(FILES[path]) if m.startswith(f"localprop.{room}")}
        if path.name != "__init__.py":
            assert siblings <= {PACKAGE / room / "common.py"}, path


def test_the_trainer_knows_no_method():
    for path in (PACKAGE / "training").glob("*.py"):
        below = {room_of(file_of(module)) for module in imported(FILES[path])}
        assert not below & {"methods", "heads", "decoders", "division"}


def test_the_index_is_what_it_says():
    index = FILES[PACKAGE / "__init__.py"]
    (typed,) = (node for node in index.body if isinstance(node, ast.If))  # what type checkers see
    places = {alias.name: node.module for node in typed.body for alias in node.names}
    assert places == localprop._MODULES
    assert set(localprop.__all__) == set(places)
    for name, module in places.items():
        assert getattr(localprop, name) is getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("path", USERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_and_benchmarks_use_public_names_only(path):
    tree = ast.parse(path.read_text())
    aliases = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert all(a.name == "localprop" or not a.name.startswith("localprop.") for a in node.names)
            aliases |= {a.asname or a.name for a in node.names if a.name == "localprop"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "localprop":
            allowed = {"localprop": set(localprop.__all__), **PUBLIC_MODULES}
            assert {alias.name for alias in node.names} <= allowed.get(node.module, set()), node.module
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            assert node.attr in localprop.__all__, node.attr


PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]


def anchors(page):
    """The names by which headings of a page are linked to, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES)
def test_links_lead_somewhere(path):
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", (ROOT / path).read_text()):
        if "://" not in target:
            page = (ROOT / path).parent / target if target else ROOT / path
            assert page.exists(), target
            assert not anchor or anchor in anchors(page), f"{target}#{anchor}"


def test_the_two_commands_of_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert "\npip install -e . && localprop train\n" in readme
    assert '\npip install -e ".[test]" && pytest\n' in readme
