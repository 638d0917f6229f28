"""Numbers for people: the same wording on the page, in the plots and on the screen."""

from __future__ import annotations

import math

DASH = "–"


def human_bytes(size: int | None) -> str:
    """1_234_567 -> "1.23 MB": powers of 1000, three significant digits."""
    if size is None:
        return DASH
    if abs(size) < 1000:
        return f"{size} B"
    units = ("B", "kB", "MB", "GB", "TB")
    power = 1
    while abs(size) >= 999.5 * 1000**power and power < len(units) - 1:
        power += 1
    value, unit = size / 1000**power, units[power]
    return f"{value:.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f} {unit}"


def human_flops(count: float) -> str:
    """2.88e15 -> "2.88 PFLOP": three significant digits."""
    units = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP")
    power = 0
    while count >= 999.5 * 1000**power and power < len(units) - 1:
        power += 1
    value = count / 1000**power
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {units[power]}"


def human_count(count: int | None) -> str:
    """1_640_000 -> "1,640,000"."""
    return DASH if count is None else f"{count:,}"


def human_seconds(seconds: float) -> str:
    """75.2 -> "1 min 15 s", 0.0042 -> "4.2 ms"."""
    if 0 < seconds < 0.1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def percent(fraction: float | None) -> str:
    """0.5 -> "50.00 %"."""
    return DASH if fraction is None else f"{100 * fraction:.2f} %"


def number(value: float | None) -> str:
    """Four significant digits, without an exponent where a person does not need one."""
    if value is None:
        return DASH
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        digits = 4 if value == 0 else max(0, 3 - math.floor(math.log10(abs(value))))
        return f"{value:,.{min(digits, 6)}f}"
    return f"{value:.3e}"
