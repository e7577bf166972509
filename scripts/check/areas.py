"""All that ``check_engine.py`` can check. An area has SCENARIOS, CHECKS and, if it asks in a way of its own, ROUNDS."""

from __future__ import annotations

from check import (
    asking,
    attention,
    cache,
    copies,
    determinism,
    families,
    hybrids,
    parallel,
    rounds,
    scheduling,
    speculation,
    vision,
)

AREAS = (attention, scheduling, determinism, asking, copies, cache, speculation, families, hybrids, vision, parallel)
SCENARIOS = {name: scenario for area in AREAS for name, scenario in area.SCENARIOS.items()}
CHECKS = {name: check for area in AREAS for name, check in area.CHECKS.items()}
ROUNDS = rounds.ROUNDS | {name: ask for area in AREAS for name, ask in getattr(area, "ROUNDS", {}).items()}
