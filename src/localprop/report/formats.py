"""Numbers as text, the same everywhere."""

import math


def format_bytes(count: float) -> str:
    """Bytes as MiB below 1 GiB, else as GiB."""
    mebibytes = count / 2**20
    if mebibytes < 9.95:
        return f"{mebibytes:.1f} MiB"
    return f"{mebibytes:.0f} MiB" if mebibytes < 1023.5 else f"{mebibytes / 1024:.2f} GiB"


def format_duration(seconds: float) -> str:
    """Seconds as m:ss, h:mm:ss, or days and h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if not hours:
        return f"{minute}:{second:02}"
    clock = f"{hour}:{minute:02}:{second:02}"
    return f"{days}d {clock}" if days else clock


def format_loss(loss: float) -> str:
    """A loss in at most 7 characters; a dash where there is none (NaN)."""
    if math.isnan(loss):
        return "-"
    size = abs(loss)
    if size and not 0.001 <= size < 10_000:
        return f"{loss:.1e}" if loss > 0 else f"{loss:.0e}"
    return f"{loss:.3f}" if size < 100 else f"{loss:.1f}"


def format_percent(percent: float | None) -> str:
    """A number in percent, without the sign; a dash where there is none (None, NaN)."""
    return "-" if percent is None or math.isnan(percent) else f"{percent:.2f}"


def format_speed(per_second: float, unit: str = "image") -> str:
    """A throughput: how many of what `unit` names."""
    return f"{per_second:.{0 if per_second >= 9.95 else 1}f} {unit}s/s"
