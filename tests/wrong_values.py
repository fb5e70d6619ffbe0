"""Wrong values for each place of a nested value, and what an error about them must be."""

import copy
import hashlib

GONE = object()
WRONG = {
    "gone": GONE,
    "null": None,
    "true": True,
    "negative": -1,
    "huge": 10**30,
    "larger than a float": 10**400,
    "nan": float("nan"),
    "infinite": float("inf"),
    "text": "x",
    "path": "../../../etc/passwd",
    "empty text": "",
    "empty list": [],
    "list": [["x"]],
    "empty mapping": {},
    "mapping": {"x": {"y": 1}},
}
TAGS = {
    "no tensor": {"$tensor": "nothing"},
    "tensor by a list": {"$tensor": []},
    "wrapper": {"$wrapper": ["torch.Tensor", {}, None, [1], [1]]},
    "wrapper of one": {"$wrapper": ["x"]},
    "size": {"$size": ["x"]},
    "dict": {"$dict": [[[], 1]]},
    "tuple": {"$tuple": 3},
    "float": {"$float": "x"},
}


def places(value, place=()):
    """The place of each value in a nested one; of a list only the first element."""
    yield place
    items = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*place, key))


def changed(value, place, wrong):
    """A copy of a nested value with a wrong one in a place."""
    if not place:
        return {} if wrong is GONE else wrong
    result = copy.copy(value)
    if len(place) == 1 and wrong is GONE:
        del result[place[0]]
    else:
        result[place[0]] = changed(value[place[0]], place[1:], wrong)
    return result


def everything_wrong(value, wrongs=WRONG, within=()):
    for place in places(value):
        if place[: len(within)] == within:
            for name, wrong in wrongs.items():
                yield f"{'.'.join(map(str, place))}: {name}", changed(value, place, wrong)


def one_line(error, *names):
    assert "\n" not in str(error)
    assert len(str(error)) < 1000
    assert any(str(name) in str(error) for name in names), error


def sign(folder):
    """Writes the checksums anew, as a stranger can."""
    files = sorted(path for path in folder.iterdir() if path.name != "SHA256SUMS")
    lines = (f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)
    (folder / "SHA256SUMS").write_text("".join(lines))
