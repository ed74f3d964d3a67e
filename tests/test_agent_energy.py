"""Joules per image: each sensor in files like the kernel's, what is refused, and whether the interval holds the true value."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ota.agent import energy
from ota.agent.energy import Found, Reading, Sensor
from ota.errors import DeviceError, OperatorError

IDLE = 3.0  # watts
WORK = 4.0  # watts on top of IDLE
IMAGE = 0.5  # seconds
NET, GROSS = WORK * IMAGE, (IDLE + WORK) * IMAGE  # joules per image
TABLE = {"watts_per_busy_core": 4.0, "idle_watts": 3.0}
FIGURES = ("joules", "low", "high", "gross_joules", "idle_watts", "images", "samples")
POWERCAP, HWMON, SUPPLY = "sys/class/powercap", "sys/class/hwmon", "sys/class/power_supply"


class Machine:
    """A simulated device whose time passes only when it draws or waits; files below `root` show its power."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.now = self.cpu = 0.0
        self.joules = 1000.0  # since it was switched on
        self.watts = IDLE
        self.drawn = 0
        self.noise: Callable[[], float] = lambda: 0.0
        self.shown: dict[str, Callable[[], float | str]] = {}
        self.written: dict[str, str] = {}
        self.due: tuple[float, float, Callable[[], int]] | None = None

    def show(self, name: str, value: float | str | Callable[[], float | str]) -> None:
        """Write a value to a file: a constant, or a value that changes with the device."""
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(f"{self._as_text(value() if callable(value) else value)}\n")
        if callable(value):
            self.shown[name] = value

    @staticmethod
    def _as_text(value: float | str) -> str:
        return value if isinstance(value, str) else str(round(value))

    def _pass(self, until: float, watts: float) -> None:
        self.joules += (until - self.now) * watts
        self.watts, self.now = watts, until
        for name, value in self.shown.items():
            if self.written.get(name) != (text := self._as_text(value())):
                (self.root / name).write_text(text)
                self.written[name] = text

    def run(self, seconds: float, watts: float) -> None:
        stop = self.now + seconds
        while self.due and self.due[0] <= stop:
            due, period, take = self.due
            self._pass(due, watts + self.noise())
            take()
            self.due = due + period, period, take
        self._pass(stop, watts + self.noise())

    def sleep(self, seconds: float) -> None:
        self.run(seconds, IDLE)

    def draw(self) -> None:
        self.drawn += 1
        self.run(IMAGE, IDLE + WORK)
        self.cpu += IMAGE

    @contextmanager
    def watch(self, take: Callable[[], int], period: float) -> Iterator[None]:
        self.due = self.now + period, period, take
        yield
        self.due = None

    def no_pmic(self) -> str:
        raise FileNotFoundError(2, "No such file or directory", "vcgencmd")

    def probe(self, **options: Any) -> Found:
        options = {"vcgencmd": self.no_pmic, "cpu": lambda: self.cpu, "clock": lambda: self.now} | options
        return energy.probe(self.root, **options)

    def measure(self, found: Found, draw: Callable[[], object] | None = None, **options: Any) -> Reading:
        timing: dict[str, Any] = {"clock": lambda: self.now, "sleep": self.sleep, "watch": self.watch}
        return energy.measure(draw or self.draw, found, **(timing | options))

    # What a device may have

    def rapl(self, zone: str, name: str, share: float, limit: int | None = 262_143_328_850, start: int = 0) -> None:
        def counter() -> float:
            return (start + self.joules * share * 1e6) % (limit + 1 if limit else 1e30)

        self.show(f"{POWERCAP}/{zone}/name", name)
        self.show(f"{POWERCAP}/{zone}/energy_uj", counter)
        if limit:
            self.show(f"{POWERCAP}/{zone}/max_energy_range_uj", limit)

    def two_packages(self) -> None:
        """Show two packages of half the power each, and zones that repeat or contain them."""
        self.show(f"{POWERCAP}/intel-rapl/enabled", 1)
        self.rapl("intel-rapl-mmio:0", "package-0", 0.5)
        self.rapl("intel-rapl:0", "package-0", 0.5)
        self.rapl("intel-rapl:0:0", "core", 0.4)
        self.rapl("intel-rapl:0:1", "package-0-part", 0.1)
        self.rapl("intel-rapl:1", "package-1", 0.5)
        self.rapl("intel-rapl:2", "psys", 1.3)

    def chip(self, name: str, number: int = 0, **files: float | str | Callable[[], float | str]) -> None:
        for file, value in ({"name": name} | files).items():
            self.show(f"{HWMON}/hwmon{number}/{file}", value)

    def rail(self, channel: int, share: float, label: str = "") -> dict[str, Any]:
        """Return the files of a chip's channel that shows 5 V and a current."""
        shown = {f"in{channel}_input": 5000, f"curr{channel}_input": lambda: self.watts * share / 5 * 1000}
        return shown | ({f"in{channel}_label": label} if label else {})

    def jetson(self, whole: str = "VDD_IN") -> None:
        rails = self.rail(1, 1, whole) | self.rail(2, 0.5, "VDD_CPU_GPU_CV") | self.rail(3, 0.25, "VDD_SOC")
        shunts = {f"in{n}_input": 4000 for n in (4, 5, 6)} | {"in7_label": "sum of shunt voltages", "curr4_input": 9000}
        self.chip("ina3221", update_interval=500, **rails, **shunts)

    def pmic(self) -> str:
        amperes = self.watts / 2
        return (
            f" 3V7_WL_SW_A current(0)=0.00000000A\n VDD_CORE_A current(7)={amperes:.8f}A\n 1V1_SYS_A current(3)={amperes:.8f}A\n"
            " 3V7_WL_SW_V volt(8)=3.69438000V\n VDD_CORE_V volt(15)=0.80000000V\n 1V1_SYS_V volt(11)=1.20000000V\n"
            " EXT5V_V volt(24)=5.16138000V\n BATT_V volt(25)=0.00488400V\n"
        )

    def battery(self, status: str = "Discharging", **files: float | str | Callable[[], float | str]) -> None:
        for file, value in ({"type": "Battery", "status": status} | files).items():
            self.show(f"{SUPPLY}/BAT0/{file}", value)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def no_figure(reading: Reading) -> str:
    """Check that a reading has no figures, and return the reason."""
    assert reading.quality == "none"
    assert [getattr(reading, name) for name in FIGURES] == [None] * len(FIGURES)
    assert reading.reason
    return reading.reason


# Each sensor gives the joules that were used


@pytest.mark.parametrize(
    ("equip", "source", "scope", "quality"),
    [
        (Machine.two_packages, "RAPL package-0, package-1", "package", "measured"),
        (lambda m: m.jetson(), "hwmon ina3221, VDD_IN", "board", "measured"),
        (
            lambda m: m.chip("ina3221", **m.rail(1, 0.5, "CPU"), **m.rail(3, 0.5, "SOC")),
            "hwmon ina3221, sum of CPU, SOC",
            "rails",
            "partial",
        ),
        (
            lambda m: m.chip("ina226", in0_input=2, power1_input=lambda: m.watts * 1e6, **m.rail(1, 9)),
            "hwmon ina226, sum of hwmon0/power1_input",
            "rails",
            "partial",
        ),
        (
            lambda m: m.chip("ina228", label="VDD_IN", energy1_input=lambda: m.joules * 1e6, power1_input=1),
            "hwmon ina228, VDD_IN",
            "board",
            "measured",
        ),
        (lambda m: m.battery(power_now=lambda: m.watts * 1e6), "power_now of BAT0", "battery", "measured"),
        (
            lambda m: m.battery(current_now=lambda: -m.watts / 12 * 1e6, voltage_now=12_000_000),
            "current_now x voltage_now of BAT0",
            "battery",
            "measured",
        ),
        (
            lambda m: m.battery(energy_now=lambda: 50_000_000 - m.joules / 3600 * 1e6),
            "energy_now of BAT0",
            "battery",
            "measured",
        ),
    ],
    ids=["rapl", "jetson", "ina3221", "ina226", "ina228", "power_now", "current_now", "energy_now"],
)
def test_sensor_gives_what_was_used(machine, equip, source, scope, quality):
    equip(machine)
    reading = machine.measure(machine.probe())
    assert (reading.source, reading.scope, reading.quality) == (source, scope, quality)
    assert reading.joules == pytest.approx(NET, rel=0.01)  # a jump of power is placed up to half a period off
    assert reading.gross_joules == pytest.approx(GROSS, rel=0.01)
    assert reading.idle_watts == pytest.approx(IDLE, rel=0.001)
    assert reading.low <= reading.joules <= reading.high
    assert reading.images == machine.drawn
    assert reading.samples >= 50


def test_raspberry_gives_lower_bound(machine):
    reading = machine.measure(machine.probe(vcgencmd=machine.pmic))
    assert (reading.source, reading.scope, reading.quality) == ("vcgencmd pmic_read_adc, 3 rails", "rails", "partial")
    assert reading.joules == pytest.approx(NET, rel=0.01)
    assert reading.reason.endswith("a lower bound.")


def test_other_forms_of_pmic_text():
    assert energy.parse_pmic("VDD_CORE_V=0.8750V\nVDD_CORE_A=2.0000A\n") == {"VDD_CORE": 1.75}
    with pytest.raises(ValueError, match="no rail with a current"):
        energy.parse_pmic("EXT5V_V volt(24)=5.16138000V\nerror=1 error_msg='Command not registered'\n")


def test_table_gives_a_model(machine):
    reading = machine.measure(machine.probe(table=TABLE))
    assert (reading.source, reading.scope) == ("CPU seconds at 4 W per busy core, 3 W idle", "model")
    assert (reading.quality, reading.reason.endswith("A model computes this figure; it is not measured.")) == ("model", True)
    assert (reading.joules, reading.gross_joules, reading.idle_watts) == pytest.approx((NET, GROSS, IDLE))


@pytest.mark.parametrize(
    "table",
    [
        {}, [], "4 W", 4, {"watts_per_busy_core": 4}, TABLE | {"more": 1}, TABLE | {"idle_watts": -1},
        TABLE | {"idle_watts": "3"},
        TABLE | {"watts_per_busy_core": 0}, TABLE | {"watts_per_busy_core": True}, TABLE | {"watts_per_busy_core": float("nan")},
        TABLE | {"idle_watts": float("inf")}, TABLE | {"idle_watts": None},
    ],
)  # fmt: skip
def test_malformed_table_refused_at_once(machine, table):
    machine.two_packages()  # refused even though the table would not be needed
    with pytest.raises(OperatorError, match=r"give watts_per_busy_core \(above 0\) and idle_watts \(0 or more\)"):
        machine.probe(table=table)


# Which sensor, and why not the others


def test_first_that_works_wins(machine):
    machine.two_packages()
    machine.jetson()
    machine.battery(power_now=5_000_000)
    sources = []
    options = {"table": TABLE, "vcgencmd": machine.pmic}
    for lost in (POWERCAP, HWMON, None, SUPPLY, None):
        found = machine.probe(**options)
        assert len(found.skipped) == len(sources)
        sources.append(found.sensor.source.split(maxsplit=1)[0])
        if lost:
            (machine.root / lost).rename(machine.root / lost.replace("/", "-"))
        else:
            options.popitem()
    assert sources == ["RAPL", "hwmon", "vcgencmd", "power_now", "CPU"]
    assert machine.probe().sensor is None


def test_nothing_there_is_no_number(machine):
    reading = machine.measure(machine.probe())
    reason = no_figure(reading)
    assert (reading.source, reading.scope, machine.drawn) == ("none", None, 0)
    for name in ("RAPL", "hwmon", "The Raspberry Pi's PMIC", "The battery", "The table of watts"):
        assert reason.count(f"{name} was skipped: ") == 1
    assert reason.endswith("this device has no sensor.")


def test_rapl_for_root_only_falls_to_hwmon(machine, monkeypatch):
    machine.two_packages()
    machine.jetson()
    read_text = Path.read_text

    def refusing(path: Path, *arguments: Any) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, *arguments)

    monkeypatch.setattr(Path, "read_text", refusing)
    reading = machine.measure(machine.probe())
    assert (reading.source, reading.quality) == ("hwmon ina3221, VDD_IN", "measured")
    assert reading.reason == (
        f"RAPL was skipped: {machine.root / POWERCAP}/intel-rapl:0/energy_uj is for root only since CVE-2020-8694; run as root, "
        "or give a group access by a udev rule."
    )


def test_counter_standing_at_zero_is_no_sensor(machine):
    machine.rapl("intel-rapl:0", "package-0", 0)
    found = machine.probe()
    assert (found.sensor, found.skipped[0]) == (None, "RAPL was skipped: RAPL package-0 reads 0.")


def test_amd_package_counts_without_range(machine):
    machine.rapl("amd_rapl:0", "package-0", 1, limit=None, start=7)
    assert machine.measure(machine.probe()).joules == pytest.approx(NET)


def test_jetson_without_whole_board_is_summed(machine):
    machine.jetson(whole="VDD_GPU")
    sensor = machine.probe().sensor
    assert (sensor.source, sensor.scope) == ("hwmon ina3221, sum of VDD_GPU, VDD_CPU_GPU_CV, VDD_SOC", "rails")
    assert sensor.read() == pytest.approx((1.75 * IDLE,), rel=0.001)
    assert "may leave out parts of the board" in sensor.note


def test_whole_board_found_on_another_chip(machine):
    machine.chip("ina3221", 0, **machine.rail(1, 0.5, "CPU"))
    machine.chip("ina3221", 1, **machine.rail(2, 1, "VDD_IN"))
    assert machine.probe().sensor.read() == pytest.approx((IDLE,))


def test_power_monitor_goes_before_other_chips(machine):
    machine.chip("macsmc_hwmon", 0, power1_input=1_000_000)
    machine.chip("ina219", 1, power1_input=2_000_000)
    assert machine.probe().sensor.read() == (2.0,)


def test_rail_switched_off_is_left_out(machine):
    machine.jetson(whole="CPU")
    (machine.root / HWMON / "hwmon0/curr2_input").write_text("")
    assert machine.probe().sensor.source == "hwmon ina3221, sum of CPU, VDD_SOC"


def test_sensor_is_sampled_as_it_renews(machine):
    machine.jetson()
    assert machine.probe().sensor.period == 0.5
    machine.show(f"{HWMON}/hwmon0/update_interval", 0)
    assert machine.probe().sensor.period == 0.05


@pytest.mark.parametrize("name", ["BAT0", "ucsi_source_psy_USBC000:001", "amdgpu", "xe"])
def test_charger_and_graphics_are_not_the_board(machine, name):
    machine.battery("Charging", power_now=30_000_000)
    machine.show(f"{SUPPLY}/ucsi-source-psy-USBC000:001/type", "USB")
    machine.chip(name, power1_input=30_000_000)
    assert machine.probe().sensor is None
    machine.chip("macsmc_hwmon", 1, power1_input=5_000_000)
    assert machine.probe().sensor.read() == (5.0,)


@pytest.mark.parametrize("status", ["Charging", "Full", "Not charging", "Unknown"])
def test_battery_counts_only_while_discharging(machine, status):
    machine.battery(status, power_now=5_000_000)
    assert machine.probe().sensor is None


def test_battery_that_rests_beside_another_is_not_counted(machine):
    machine.battery(power_now=5_000_000)
    machine.show(f"{SUPPLY}/BAT1/status", "Not charging")
    machine.show(f"{SUPPLY}/BAT1/power_now", 7_000_000)
    assert machine.probe().sensor.read() == (5.0,)


# Counters that wrap, go back or vanish


def test_rapl_wraps(machine):
    # The counter wraps every 50 J: once or twice in each baseline, four times in the work.
    machine.rapl("intel-rapl:0", "package-0", 1, limit=49_999_999, start=49_000_000)
    found = machine.probe()
    assert found.sensor.ranges == (50.0,)
    reading = machine.measure(found)
    assert (reading.joules, reading.gross_joules, reading.idle_watts) == pytest.approx((NET, GROSS, IDLE), rel=1e-5)


@pytest.mark.parametrize(
    ("before", "after", "limit", "joules"),
    [(1.0, 1.0, None, 0.0), (1.0, 4.5, 10.0, 3.5), (9.0, 0.5, 10.0, 1.5), (262_143.0, 100.0, 262_144.0, 101.0)],
)
def test_counter_advances_over_a_wrap(before, after, limit, joules):
    assert energy.advance(before, after, limit, 1) == pytest.approx(joules)


@pytest.mark.parametrize(("before", "after", "limit"), [(9.0, 0.5, None), (100_000.0, 0.0, 262_144.0), (50.0, 49.0, 262_144.0)])
def test_counter_that_went_back_refused(before, after, limit):
    with pytest.raises(ValueError, match="went back"):
        energy.advance(before, after, limit, 1)


def test_reset_in_the_middle_gives_no_figure(machine):
    machine.rapl("intel-rapl:0", "package-0", 1, start=90_000_000_000)

    def draw() -> None:
        if machine.drawn == 20:
            machine.rapl("intel-rapl:0", "package-0", 1)
        machine.draw()

    reading = machine.measure(machine.probe(), draw)
    assert no_figure(reading).endswith("There is no figure because a counter went back, as after a reset or a sleep.")
    assert (reading.source, reading.scope) == ("RAPL package-0", "package")


def test_sensor_that_vanishes_gives_no_figure_and_ends_the_work(machine):
    machine.jetson()

    def draw() -> None:
        machine.draw()
        if machine.drawn == 20:
            machine.shown.clear()
            (machine.root / HWMON / "hwmon0/curr1_input").unlink()

    reason = no_figure(machine.measure(machine.probe(), draw))
    assert reason.endswith(
        f"lost in the middle: cannot read {machine.root / HWMON}/hwmon0/curr1_input: No such file or directory."
    )
    assert machine.drawn == 21


def test_charger_plugged_in_gives_no_figure(machine):
    machine.battery(power_now=lambda: machine.watts * 1e6)
    machine.show(f"{SUPPLY}/BAT0/status", lambda: "Charging" if machine.drawn > 20 else "Discharging")
    assert "unplug the charger" in no_figure(machine.measure(machine.probe()))


def test_pmic_that_loses_a_rail_gives_no_figure(machine):
    def vcgencmd() -> str:
        return machine.pmic().replace("VDD_CORE_V", "VDD_CORE_X") if machine.drawn > 20 else machine.pmic()

    assert "lists other rails" in no_figure(machine.measure(machine.probe(vcgencmd=vcgencmd)))


# Refusals


def simulated(machine: Machine, noise: float, seed: int, period: float = 0.5) -> Found:
    """Create a power sensor in memory, with normal noise in each sample."""
    rng = random.Random(seed)
    machine.noise = lambda: rng.gauss(0, noise)
    return Found(Sensor("simulated", "board", "measured", period, lambda: (machine.watts,)), ())


def test_work_within_idle_noise_refused(machine):
    found = simulated(machine, noise=0.6 * WORK, seed=1)
    assert "stop other programs and repeat" in no_figure(machine.measure(found))
    assert machine.measure(simulated(machine, noise=0.4 * WORK, seed=1)).quality == "measured"


def test_work_that_draws_nothing_refused(machine):
    machine.jetson()
    assert "The work adds 0 W" in no_figure(machine.measure(machine.probe(), lambda: machine.sleep(IMAGE)))


def test_short_work_refused(machine):
    found = simulated(machine, 0.1, 1, period=0.1)
    assert "The work took 10.0 s and 20 s are needed" in no_figure(machine.measure(found, seconds=10))
    assert machine.measure(found, seconds=20).quality == "measured"


def test_few_samples_refused(machine):
    found = simulated(machine, 0.1, 1)

    @contextmanager
    def starved(take: Callable[[], int], period: float) -> Iterator[None]:
        with machine.watch(take, 1.5 * period):
            yield

    assert "samples and 50 are needed" in no_figure(machine.measure(found, watch=starved))


def test_few_samples_of_the_idle_device_refused(machine):
    def sleep(seconds: float) -> None:
        _, period, take = machine.due
        machine.due = None
        machine.sleep(seconds)
        machine.due = machine.now + period, period, take

    reason = no_figure(machine.measure(simulated(machine, 0.1, 1), sleep=sleep))
    assert "The sensor gave 1 samples of the idle device and 10 are needed" in reason


def test_slow_sensor_gets_more_time(machine):
    reading = machine.measure(simulated(machine, 0.1, 1, period=5))
    assert machine.drawn * IMAGE > 50 * 5
    assert reading.samples >= 50


@pytest.mark.parametrize("repeats", [0, 1, 4])
def test_few_repeats_refused(machine, repeats):
    with pytest.raises(OperatorError, match="ask for 5 or more"):
        machine.measure(machine.probe(), repeats=repeats)


def test_error_of_the_work_is_passed_on(machine):
    machine.jetson()

    def draw() -> None:
        raise DeviceError("the model is gone")

    with pytest.raises(DeviceError, match="the model is gone"):
        machine.measure(machine.probe(), draw)


# The interval


@pytest.mark.parametrize(("freedom", "exact"), [(4, 2.7764), (5, 2.5706), (9, 2.2622), (29, 2.0452), (10**6, 1.96)])
def test_student_as_in_tables(freedom, exact):
    assert energy.student(freedom) == pytest.approx(exact, rel=0.003)


def test_trapezoid_of_a_ramp():
    assert energy.accumulate([0, 1, 3], [(0.0,), (2.0,), (6.0,)], ()) == [0, 1, 9]


def test_interval_holds_the_truth(tmp_path):
    # Images differ by 5 %, samples by 1 W: 95 % of the intervals should hold 2 J and be narrow enough to be useful.
    held, widths = 0, []
    for seed in range(200):
        machine = Machine(tmp_path)
        found, rng = simulated(machine, 1.0, seed), random.Random(-1 - seed)

        def draw(machine: Machine = machine, rng: random.Random = rng) -> None:
            machine.run(IMAGE, IDLE + WORK * rng.gauss(1, 0.05))

        reading = machine.measure(found, draw)
        held += reading.low <= NET <= reading.high
        widths.append(reading.high - reading.low)
    assert held >= 184  # exact 95 % intervals would be below this in 2.4 % of cases
    assert sum(widths) / len(widths) < 0.3 * NET


def test_drift_of_the_baseline_widens_the_interval(machine):
    machine.rapl("intel-rapl:0", "package-0", 1)
    steady = machine.measure(machine.probe())
    assert steady.high - steady.low < 0.001
    warm = 0.4  # watts that it draws beyond its idle power once it has worked
    machine.drawn = 0
    drifted = machine.measure(machine.probe(), sleep=lambda s: machine.run(s, IDLE + (warm if machine.drawn else 0)))
    assert drifted.joules == pytest.approx(NET - warm / 2 * IMAGE, rel=0.001)
    assert drifted.high - drifted.joules == pytest.approx(warm / 2 * IMAGE, rel=0.02)


# The thread, and what is loaded


def test_thread_samples_until_the_block_ends():
    taken, enough = [], threading.Event()

    def take() -> int:
        taken.append(threading.current_thread().name)
        if len(taken) == 3:
            enough.set()
        return 0

    def work() -> None:
        with energy.in_thread(take, 0):
            assert enough.wait(10)
            raise DeviceError

    before = threading.active_count()
    with pytest.raises(DeviceError):
        work()
    assert threading.active_count() == before
    assert set(taken) == {"energy"}


def test_agent_stays_light():
    code = "import sys, ota.agent.energy; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "onnxruntime", "pydantic", "scipy"} & set(loaded)
