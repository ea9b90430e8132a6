"""What NVIDIA's driver says of this process's GPU: its power limit, its clock, what slows it.

A GPU that is too hot or short of power runs at half of its clock or less (NVML's reference, "HW
slowdown") without an error, so whoever measures or trains looks at its clock meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import platform
import statistics
import subprocess
import threading
from typing import Self

import torch

log = logging.getLogger(__name__)

# Bits of the driver's answer (NVML, "clocks event reasons").
IDLE = 0x1
REASONS = {
    0x2: "clock_setting",
    0x4: "power_cap",
    0x8: "hardware_slowdown",
    0x10: "sync_boost",
    0x20: "temperature",
    0x40: "temperature_alarm",
    0x80: "power_brake",
}
# GPUs at full work usually are at their power limit; from these somebody should free them.
WRONG = 0x8 | 0x20 | 0x40 | 0x80
# The name of the field that holds them, and the one that drivers before 535 know.
FIELDS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
LOOK_EVERY_S = 60.0
# So many failures in a row are no busy machine. A driver that has lost its GPU may never answer, so
# nobody waits for it in the end.
MOST_FAILURES, LEAVE_S = 5, 1.0


def power_limit_w() -> float | None:
    """Return the power limit of this process's GPU in watts, None where nvidia-smi does not say."""
    if not torch.cuda.is_available():
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        return float(_ask(_this_gpu(), "power.limit")[0])
    return None


class ClockWatch(threading.Thread):
    """Looks at the clock while this process's GPU works, and warns while something slows it.

    Without a GPU, or where nvidia-smi does not say, it does nothing.
    """

    def __init__(self, every_s: float = LOOK_EVERY_S):
        """Look every ``every_s`` seconds from entering to leaving."""
        super().__init__(name="gpu-clock", daemon=True)
        self.every_s = every_s
        self._gpu = ""
        self._before = 0
        self._clocks_mhz: list[float] = []
        self._bits: list[int] = []
        self._told = False
        self._done = threading.Event()

    @property
    def sm_clock_mhz(self) -> float | None:
        """The median clock while it worked, in MHz; None where nothing is known."""
        return statistics.median(self._clocks_mhz) if self._clocks_mhz else None

    @property
    def slowed_by(self) -> list[str]:
        """What held the clock down in at least half of the looks."""
        often = {
            name: sum(bool(seen & bit) for seen in self._bits) for bit, name in REASONS.items()
        }
        return [name for name, count in often.items() if count and 2 * count >= len(self._bits)]

    def forget(self) -> None:
        """Answer from what is seen from now on: a program that is being compiled works little."""
        self._clocks_mhz, self._bits = [], []

    def run(self) -> None:
        """Look until it is over, or nobody answers."""
        failures = 0
        while not self._done.wait(self.every_s) and failures < MOST_FAILURES:
            try:
                clock, highest, bits = _clock(self._gpu)
            except (OSError, subprocess.SubprocessError, ValueError):
                failures += 1
                continue
            failures = 0
            if not bits & IDLE:
                self._clocks_mhz.append(clock)
                self._bits.append(bits)
                self._tell(clock, highest, bits & self._before)
            self._before = bits

    def _tell(self, clock: float, highest: float, bits: int) -> None:
        """Say what ``bits``, of two looks in a row, mean; one may be a change of clocks."""
        lasting = [name for bit, name in REASONS.items() if bits & bit & WRONG]
        where = f"{platform.node()}, {self._gpu}"
        if lasting and not self._told:
            log.warning(
                "%s is slowed (%s): its clock is at %.0f MHz of %.0f; look at its cooling and its "
                "power (`nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER`), or use another",
                where,
                ", ".join(lasting),
                clock,
                highest,
            )
        elif self._told and not lasting:
            log.warning("%s is no longer slowed: its clock is at %.0f MHz", where, clock)
        self._told = bool(lasting)

    def __enter__(self) -> Self:
        """Begin to look, where there is a GPU."""
        if torch.cuda.is_available():
            self._gpu = _this_gpu()  # which one it is, another thread would not know
            self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Look no more."""
        self._done.set()
        if self.is_alive():
            self.join(LEAVE_S)


def _this_gpu() -> str:
    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"


def _clock(gpu: str) -> tuple[float, float, int]:
    """Return the clock and the highest one in MHz, and the bits of what holds it down."""
    for field in FIELDS:
        with contextlib.suppress(subprocess.CalledProcessError):
            clock, highest, bits = _ask(gpu, f"clocks.sm,clocks.max.sm,{field}")
            return float(clock), float(highest), int(bits, 16)
    raise ValueError(f"nvidia-smi knows no clocks of {gpu}")


def _ask(gpu: str, fields: str) -> list[str]:
    """Return what nvidia-smi says of a GPU, field by field."""
    query = [f"--query-gpu={fields}", "--format=csv,noheader,nounits", f"--id={gpu}"]
    found = subprocess.run(
        ["nvidia-smi", *query], capture_output=True, text=True, check=True, timeout=20
    )
    return found.stdout.split(",")
