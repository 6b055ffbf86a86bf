"""The built-in prompts of calibration: what a video model is asked for, with slow and fast movement."""

from __future__ import annotations

PROMPTS = (
    "a red ball bounces on the grass",
    "a blue cube moves left, the camera pans right",
    "a large yellow cone stands in the desert",
    "a green cylinder turns at night",
    "a pink ring falls on the beach",
    "an orange ball moves right in the snow",
    "a white pyramid jumps, the camera moves forward",
    "a purple cube circles on the grass",
)
