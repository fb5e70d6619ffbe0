"""The data of an old run: whether they are still the same, and how its images are evaluated."""

from pathlib import Path
from typing import Any

from localprop.data.base import Data
from localprop.data.identity import require_same
from localprop.data.view import evaluation_record, read_evaluation
from localprop.errors import CheckpointError
from localprop.runs.description import RUN, read_description


def data_of_run(folder: Path, data: Data) -> tuple[Data, list[str]]:
    """The data of a run that is resumed, evaluated as before.

    Args:
        folder: the run folder.
        data: the data that are there.

    Returns:
        `data`, with the evaluation that the run recorded; and lines for the user, where it recorded less.

    Raises:
        DataError: they are not those that the run began with.
        CheckpointError: run.json is damaged.
    """
    description = read_description(folder)
    notes = _compare(folder, description, data)
    evaluation, _ = evaluation_of(folder, description)
    if description.get("evaluated_on") == "test" and data.final_store:
        # As version 0.1 did it where test/ and val/ were both there; the curve would mean two things otherwise.
        data = data.testing_early()
    return evaluated_as(folder, data, evaluation), notes


def evaluation_of(folder: Path, description: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """How a run's images are evaluated, as `Data.evaluation` has it; and a line for the user where 0.1 recorded less.

    Raises:
        CheckpointError: run.json is damaged.
    """
    if "evaluation" in description:
        return _checked(folder, description["evaluation"]), []
    try:
        keys = ("input_size", "mean", "std", "interpolation", "crop_pct")
        evaluation = {key: description[key] for key in keys}
    except (KeyError, TypeError):
        raise CheckpointError(f"{folder / RUN} is damaged: it does not say how images are evaluated") from None
    # Version 0.1 changed the aspect ratio of small images, and cut out the middle of large ones.
    mode, words = ("squash", "squeezed") if evaluation["crop_pct"] == 1 else ("center", "cropped")
    note = f"{folder} was made by version 0.1: its images are {words} in evaluation, as they were then"
    return _checked(folder, {**evaluation, "crop_mode": mode}), [note]


def evaluated_as(folder: Path, data: Data, evaluation: dict[str, Any]) -> Data:
    """The data, evaluated as a run recorded.

    Raises:
        CheckpointError: what it recorded is damaged.
    """
    try:
        return data.evaluated_as(evaluation)
    except ValueError as error:
        raise CheckpointError(f"{folder / RUN} is damaged in what it says of evaluation: {error}") from None


def _checked(folder: Path, evaluation: Any) -> dict[str, Any]:
    """The recorded evaluation, with unknown keys removed: an export hands all of it to timm."""
    try:
        return evaluation_record(*read_evaluation(evaluation))
    except ValueError as error:
        raise CheckpointError(f"{folder / RUN} is damaged in what it says of evaluation: {error}") from None


def _compare(folder: Path, description: dict[str, Any], data: Data) -> list[str]:
    if "data_identity" in description:
        require_same(description["data_identity"], data.identity, str(folder))
        return []
    known = {"classes": description.get("classes"), "train_images": description.get("train_images")}
    require_same(known, {**data.identity, "train_images": data.train_size}, str(folder))
    return [f"{folder} was made by version 0.1: whether its images are still the same cannot be told, only how many"]
