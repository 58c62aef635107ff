"""What a run of the tests on a GPU leaves behind, also if it is cut short or a kernel crashes.

A crash, such as a misaligned address, breaks the GPU for the rest of its process. No test behind it
in this process could pass, whatever it tests: so the process ends, and a new one of xdist's takes
over. Without xdist they are skipped. Either says which test it was.
"""

import functools
import os
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import record
from pallas_flash.tuning.table import device_name

BREAKER = "broke_the_gpu"


def register(config: pytest.Config, folder: str | None) -> None:
    """folder: where the summary goes, or None for none."""
    is_worker = hasattr(config, "workerinput")
    if folder and not is_worker:
        config.pluginmanager.register(Summary(pathlib.Path(folder)))
    config.pluginmanager.register(Process(is_worker))
    config.pluginmanager.register(Successors())


class Summary:
    """Writes outcomes and recorded errors to `folder`/<device>/correctness.json, test by test."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.rows = folder, []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.outcome == "rerun" or (report.when in ("setup", "teardown") and report.passed):
            return
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration)}
        if not report.passed:
            row["reason"] = report.longreprtext[-1000:]
        self.rows.append(row | dict(report.user_properties))
        self.write()

    def pytest_sessionfinish(self) -> None:
        self.write()

    @functools.cached_property
    def header(self) -> dict[str, Any]:
        return {
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "commit": record.commit(),
            "date": record.today(),
        }

    def write(self) -> None:
        """Tests that were not run keep what the file says of them."""
        path = self.folder / device_name(self.header["device"]) / "correctness.json"
        commit = {"commit": self.header["commit"]}
        record.write(path, self.header, [commit | row for row in self.rows], key=("test",))


def works() -> bool:
    """Whether the GPU of this process still does what it is told."""
    try:
        np.asarray(jax.device_put(np.zeros(1)))
    except jax.errors.JaxRuntimeError:
        return False
    return True


class Process:
    """One process that runs tests."""

    def __init__(self, is_worker: bool):
        self.is_worker = is_worker
        self.broken_by: str | None = None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: Any) -> Any:
        report = yield
        if report.failed and "gpu" in item.keywords and self.broken_by is None and not works():
            self.broken_by = item.nodeid
            report.user_properties.append((BREAKER, True))
        return report

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self.broken_by is None or "gpu" not in item.keywords:
            return
        if self.is_worker:
            os._exit(1)
        pytest.skip(f"an earlier test in this process broke the GPU: {self.broken_by}")


class Successors:
    """In the process that controls xdist's: has a test that came too late run by another one."""

    def __init__(self) -> None:
        self.broken: set[Any] = set()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if BREAKER in dict(report.user_properties):
            self.broken.add(getattr(report, "node", None))

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem: str, report: Any, sched: Any) -> None:
        if report.node in self.broken:
            sched.mark_test_pending(crashitem)
            report.outcome = "rerun"
