"""How old the NPU's user-mode driver is, as it says itself, and whether that is too old. Pure."""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Final

#: Drivers built before this day carry the old library, libze_intel_vpu: 1.16.0, packed on
#: 2025-03-28, was the first with the new name, and 1.13.0, packed on 2025-01-31, the last before it
#: (names of the packages; the renaming: linux-npu-driver issue 107).
OLDEST: Final = date(2025, 3, 1)
#: A smaller number is no time of a build; the plugin of Windows counts otherwise.
LEAST_EPOCH_S: Final = 1_500_000_000


def build_day(version: str) -> date | None:
    """Read the day of a build from `NPU_DRIVER_VERSION`; None if it does not tell.

    On Linux it is seconds since 1970: 1759485217 is 1.24.0, whose packages say 20251003.
    """
    if not version.isdecimal() or not LEAST_EPOCH_S <= int(version) < 2**32:
        return None
    return datetime.fromtimestamp(int(version), UTC).date()


def is_too_old(version: str) -> bool:
    """Tell whether a driver is older than any that this OpenVINO is known to work with."""
    day = build_day(version)
    return day is not None and day < OLDEST
