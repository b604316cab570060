"""Energy and CO2 of a run, by codecarbon where it is installed: `pip install "hf_finetune[carbon]"`."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

Emissions = dict[str, Any]
"""`energy_kwh`, `co2_grams`, `country` (None: the world's average electricity was assumed)."""


def start_metering() -> Callable[[], Emissions | None]:
    """Start to measure this machine's energy, and return what ends it and tells; nothing without codecarbon.

    It asks no network: the country is the one of codecarbon's own settings (`CODECARBON_COUNTRY_ISO_CODE`). Whatever
    goes wrong in it is passed over, for a run is worth more than its meter.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from codecarbon import OfflineEmissionsTracker

            logging.getLogger("codecarbon").disabled = True  # it speaks before it reads `log_level`
            tracker = OfflineEmissionsTracker(
                save_to_file=False, save_to_logger=False, log_level="critical", allow_multiple_runs=True
            )
            tracker.start()
    except Exception:
        return lambda: None

    def stop() -> Emissions | None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                kilograms = float(tracker.stop())
                data = tracker.final_emissions_data
                energy = float(data.energy_consumed)
        except Exception:
            return None
        if not (math.isfinite(kilograms) and math.isfinite(energy)):
            return None
        country = getattr(data, "country_name", None) or None
        return {"energy_kwh": energy, "co2_grams": 1000 * kilograms, "country": country}

    return stop


def added(earlier: Mapping[str, Any] | None, now: Emissions | None) -> Emissions | None:
    """Return the emissions of a run that was resumed: unknown where a part of it was not measured."""
    if now is None or earlier is None:
        return None
    return now | {key: earlier[key] + now[key] for key in ("energy_kwh", "co2_grams")}
