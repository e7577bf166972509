"""All that ``check_engine.py`` can check. An area has SCENARIOS, CHECKS and, if it asks in a way of its own, ROUNDS."""

from __future__ import annotations

from check import attention, cache, families, parallel, rounds, speculation, vision

AREAS = (attention, speculation, families, parallel, cache, vision)
SCENARIOS = {name: scenario for area in AREAS for name, scenario in area.SCENARIOS.items()}
CHECKS = {name: check for area in AREAS for name, check in area.CHECKS.items()}
ROUNDS = rounds.ROUNDS | {name: ask for area in AREAS for name, ask in getattr(area, "ROUNDS", {}).items()}
