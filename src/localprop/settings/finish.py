"""The finish of a run of local modules: its last epochs, in which the same modules are trained exactly."""

from localprop.errors import ConfigError


def finish_epochs(part: float, epochs: int) -> int:
    """How many epochs a part of all epochs is."""
    return round(part * epochs)


def require_finish(part: float, epochs: int, peak: float | None, parallel: str | None) -> None:
    """Checks the settings of a finish against those of its run.

    Args:
        part: of the epochs; 0 is no finish.
        epochs: of the run.
        peak: learning rate that is given for the finish.
        parallel: what is trained in several processes.

    Raises:
        ConfigError: they do not go together.
    """
    if not part:
        if peak is not None:
            raise ConfigError(f"--finish-lr is {peak:g}, but there is no finish; add --finish 0.1")
        return
    if (own := finish_epochs(part, epochs)) in (0, epochs):
        what = "all" if own else "none"
        raise ConfigError(
            f"--finish is {part:g}, which of --epochs {epochs} is {what}; choose another --finish, or more --epochs"
        )
    if parallel == "modules":
        raise ConfigError(
            "--parallel modules trains local modules, and those of --finish wait for each other; choose --parallel data"
        )
