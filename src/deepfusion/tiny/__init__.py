"""Tiny public checkpoints for offline use: one per on-device model type and one dense base per target family."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
