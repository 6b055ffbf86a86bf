"""The ways in which a clip becomes its edit, by name, with their options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vgen.errors import UsageError
from vgen.sampling.flow import Sampler
from vgen.sampling.inversion import SOLVERS

SHARES = ("interval", "time")
STORES = ("ram", "half", "disk")


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to edit; `strength` is the share of the schedule that it takes where the user says nothing."""

    strength: ClassVar[float] = 1.0
    inverts: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class Inversion(Method):
    """To the noise by `solver` with the source prompt, and back with the target's, with V carried over.

    Where a mask is of a place, a share `fresh` of the noise may be drawn anew, so that less of the subject that was
    there stands in the way of another; with 1 nothing of it is left. V is matched by the `interval` of the grid, as
    RF-Edit was released, or by `time`; in the blocks from depth `begin` to `end`, of 1: by default those that were
    released, 41 to 59 of HunyuanVideo's 60. It is kept in ram, in ram in half precision, or on disk.
    """

    solver: ClassVar[str]
    inverts: ClassVar[bool] = True
    inject: ClassVar[int] = 0
    fresh: float = 0.0
    share: str = "interval"
    begin: float = 0.68
    end: float = 1.0
    store: str = "ram"

    def __post_init__(self) -> None:
        for name, value, known in (("share", self.share, SHARES), ("store", self.store, STORES)):
            if value not in known:
                raise UsageError(f'There is no {name} "{value}".', tip=f"choose {' or '.join(known)}.")
        if not 0 <= self.fresh <= 1:
            raise UsageError(f"A share of {self.fresh:g} fresh noise is not legal.", tip="choose from 0 to 1.")
        if not 0 <= self.begin < self.end <= 1:
            raise UsageError(
                f"Blocks from depth {self.begin:g} to {self.end:g} are none.", tip="choose 0 <= begin < end <= 1."
            )

    @property
    def solve(self) -> Sampler:
        """The sampler that goes both ways."""
        return SOLVERS[self.solver]


@dataclass(frozen=True, kw_only=True)
class Euler(Inversion):
    """Inversion by Euler's method: one evaluation a step."""

    solver: ClassVar[str] = "euler"


@dataclass(frozen=True, kw_only=True)
class RFSolver(Inversion):
    """Inversion by RF-Solver: two evaluations a step."""

    solver: ClassVar[str] = "rf-solver"


@dataclass(frozen=True, kw_only=True)
class FireFlow(Inversion):
    """Inversion by FireFlow: second order, one evaluation a step."""

    solver: ClassVar[str] = "fireflow"


@dataclass(frozen=True, kw_only=True)
class FlowEdit(Method):
    """No inversion: the clip moves by what the velocities of the two prompts differ in, for `averages` noises a step.

    `source_guidance_scale` is the source prompt's.
    """

    strength: ClassVar[float] = 1.0  # all of the way: what moves how is decided nearest the noise
    averages: int = 1
    source_guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.averages <= 100:
            raise UsageError(f"{self.averages} averages are not possible.", tip="choose from 1 to 100.")
        if not 0 <= self.source_guidance_scale < float("inf"):
            raise UsageError(
                f"A guidance scale of {self.source_guidance_scale:g} is not legal.", tip="choose 1 or more."
            )


@dataclass(frozen=True, kw_only=True)
class SDEdit(Method):
    """The clip's latents noised up to `strength` and denoised, as diffusers' video-to-video: to compare with.

    Meng et al. 2021 (arXiv:2108.01073).
    """

    strength: ClassVar[float] = 0.8


METHODS: dict[str, type[Method]] = {
    "euler": Euler,
    "rf-solver": RFSolver,
    "fireflow": FireFlow,
    "flowedit": FlowEdit,
    "sdedit": SDEdit,
}
