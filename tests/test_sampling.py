from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vgen.sampling import SAMPLERS
from vgen.sampling.euler import euler
from vgen.sampling.flow import Velocity
from vgen.sampling.flowedit import flowedit
from vgen.sampling.guidance import classifier_free
from vgen.sampling.inversion import SOLVERS, evaluations, invert, last_steps
from vgen.sampling.lcm import lcm
from vgen.sampling.schedule import at_timesteps

# Data N(MEAN, SPREAD^2) has a flow with a closed form:
# x(sigma) = (1 - sigma) MEAN + z sqrt((1 - sigma)^2 SPREAD^2 + sigma^2).
MEAN, SPREAD = 2.0, 0.5
# Those that need nothing but a velocity; tests/test_native.py has one of the others.
PURE = [name for name in SAMPLERS if name not in ("lcm", "native")]
NOISE = torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 1, 1, 1, 9)


def gaussian_velocity(latents: Tensor, sigma: Tensor) -> Tensor:
    variance = (1 - sigma) ** 2 * SPREAD**2 + sigma**2
    return -MEAN + (sigma - (1 - sigma) * SPREAD**2) / variance * (latents - (1 - sigma) * MEAN)


def error(name: str, num_steps: int, start: float = 1.0, end: float = 0.0) -> float:
    def exact(sigma: float) -> Tensor:
        return (1 - sigma) * MEAN + NOISE * math.hypot((1 - sigma) * SPREAD, sigma)

    sigmas = torch.linspace(start, end, num_steps + 1, dtype=torch.float64)
    return (SAMPLERS[name](gaussian_velocity, exact(start), sigmas) - exact(end)).abs().max().item()


@pytest.mark.parametrize(
    ("start", "end", "name", "order"),
    [
        (0.9, 0.1, "euler", 1.0),
        (0.9, 0.1, "heun", 2.0),
        (0.9, 0.1, "dpm++", 2.0),
        # The midpoint rule's error of second order is zero on this very flow; see the next test for another.
        (0.9, 0.1, "rf-solver", 3.0),
        (0.9, 0.1, "fireflow", 2.0),
        (1.0, 0.0, "euler", 1.0),
        (1.0, 0.0, "heun", 2.0),
        (1.0, 0.0, "rf-solver", 3.0),
        (1.0, 0.0, "fireflow", 2.0),
        # h^2 log(1 / h), as log((1 - sigma) / sigma) has no end at 0 and 1; with twice the steps it is 1.71.
        (1.0, 0.0, "dpm++", 1.63),
    ],
)
def test_the_error_falls_with_the_order(start: float, end: float, name: str, order: float) -> None:
    coarse, fine = error(name, 400, start, end), error(name, 800, start, end)
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)
    assert 1e-12 < fine < 1e-2


def turning_velocity(latents: Tensor, sigma: Tensor) -> Tensor:
    """Of x(sigma) = z exp(sin(4 sigma) / 4)."""
    return latents * torch.cos(4 * sigma)


@pytest.mark.parametrize(("name", "order"), [("euler", 1.0), ("heun", 2.0), ("rf-solver", 2.0), ("fireflow", 2.0)])
def test_the_error_falls_with_the_order_on_a_flow_that_turns(name: str, order: float) -> None:
    def off(num_steps: int) -> float:
        sigmas = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        solved = SAMPLERS[name](turning_velocity, NOISE * math.exp(math.sin(4) / 4), sigmas)
        return (solved - NOISE).abs().max().item()

    assert math.log2(off(200) / off(400)) == pytest.approx(order, abs=0.1)


def test_second_order_beats_first_at_the_same_number_of_velocities() -> None:
    assert error("heun", 25) < error("euler", 50) / 4
    assert error("dpm++", 50) < error("euler", 50) / 4
    assert error("rf-solver", 25) < error("euler", 50) / 4
    assert error("fireflow", 49) < error("euler", 50) / 4


@pytest.mark.parametrize("num_steps", [10, 25, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", ["heun", "dpm++"])
def test_second_order_beats_first_on_the_schedules_of_checkpoints(name: str, shift: float, num_steps: int) -> None:
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    errors = {
        which: (SAMPLERS[which](gaussian_velocity, NOISE, scheduler.sigmas.double()) - (MEAN + NOISE * SPREAD))
        .abs()
        .max()
        for which in ("euler", name)
    }
    assert errors[name] < errors["euler"] / 2


@pytest.mark.parametrize("name", PURE)
def test_one_step_from_noise_to_data_is_exact_on_a_straight_flow(name: str) -> None:
    sigmas = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert torch.allclose(SAMPLERS[name](lambda latents, sigma: NOISE - 3, NOISE, sigmas), torch.full_like(NOISE, 3))


@pytest.mark.parametrize("name", PURE)
def test_steps_are_reported_and_the_noise_is_left_alone(name: str) -> None:
    steps: list[tuple[int, int]] = []
    before = NOISE.clone()
    sigmas = torch.linspace(1, 0, 4, dtype=torch.float64)
    SAMPLERS[name](gaussian_velocity, NOISE, sigmas, on_step=lambda i, n: steps.append((i, n)))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert torch.equal(NOISE, before)


@pytest.mark.parametrize(("name", "calls"), [("euler", 10), ("heun", 19), ("dpm++", 10)])
def test_the_number_of_velocities_is_what_the_method_costs(name: str, calls: int) -> None:
    counted = 0

    def counting(latents: Tensor, sigma: Tensor) -> Tensor:
        nonlocal counted
        counted += 1
        return gaussian_velocity(latents, sigma)

    SAMPLERS[name](counting, NOISE, torch.linspace(1, 0, 11, dtype=torch.float64))
    assert counted == calls


def test_euler_equals_the_scheduler_of_diffusers_to_the_bit() -> None:
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(12)
    expected = noise = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    sigmas = scheduler.sigmas.clone()
    for i, timestep in enumerate(scheduler.timesteps):
        expected = scheduler.step(gaussian_velocity(expected, sigmas[i]), timestep, expected).prev_sample
    assert torch.equal(euler(gaussian_velocity, noise, sigmas), expected)


def test_reversed_sigmas_invert() -> None:
    sigmas = torch.linspace(1, 0, 2001, dtype=torch.float64)
    data = euler(gaussian_velocity, NOISE, sigmas)
    assert (euler(gaussian_velocity, data, sigmas.flip(0)) - NOISE).abs().max() < 2e-2


class Text:
    """A velocity that depends on the text, and notes the batch sizes that it is called with."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, latents: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        self.batches.append(latents.shape[0])
        return latents * sigma + text.mean((1, 2)).view(-1, 1, 1, 1, 1)


def guided(scale: float | Callable[[Tensor], float], negative: bool = True) -> tuple[Tensor, list[int]]:
    text, model = Text(), Text()
    latents, sigma = torch.ones(2, 3, 1, 2, 2), torch.tensor(0.5)
    prompt, other = torch.full((2, 4, 5), 3.0), torch.full((1, 4, 5), 1.0)
    velocity: Velocity = classifier_free(model, prompt, other if negative else None, scale)
    assert text.batches == []
    return velocity(latents, sigma), model.batches


def test_guidance_leads_away_from_the_negative_text() -> None:
    velocity, batches = guided(4.0)
    assert torch.allclose(velocity, torch.full_like(velocity, 0.5 + 1 + 4 * (3 - 1)))
    assert batches == [2, 2]


@pytest.mark.parametrize(("scale", "negative"), [(1.0, True), (0.5, True), (4.0, False)])
def test_without_guidance_the_model_runs_with_the_prompt_alone(scale: float, negative: bool) -> None:
    velocity, batches = guided(scale, negative)
    assert torch.allclose(velocity, torch.full_like(velocity, 0.5 + 3))
    assert batches == [2]


def test_a_scale_may_end_with_the_noise() -> None:
    above, below = (lambda sigma, least=least: 4.0 if sigma > least else 1.0 for least in (0.4, 0.6))  # sigma is 0.5
    assert guided(above)[1] == [2, 2] and guided(below)[1] == [2]
    assert torch.equal(guided(above)[0], guided(4.0)[0]) and torch.equal(guided(below)[0], guided(1.0)[0])


def test_lcm_predicts_the_data_and_noises_it_anew_as_diffusers_scheduler_does() -> None:
    from diffusers.schedulers.scheduling_flow_match_lcm import FlowMatchLCMScheduler

    scheduler = FlowMatchLCMScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    expected, generator = NOISE.float(), torch.Generator().manual_seed(3)
    for i, timestep in enumerate(scheduler.timesteps):
        velocity = gaussian_velocity(expected, scheduler.sigmas[i])
        expected = scheduler.step(velocity, timestep, expected, generator=generator, return_dict=False)[0]
    latents = lcm(gaussian_velocity, NOISE.float(), scheduler.sigmas, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(latents, expected, atol=1e-6)
    other = lcm(gaussian_velocity, NOISE.float(), scheduler.sigmas, generator=torch.Generator().manual_seed(4))
    assert (latents - other).abs().max() > 0.01


def test_a_students_noise_is_as_strong_as_at_the_nearest_level_of_its_grid() -> None:
    """As in FastVideo, which looks the levels up in the schedule of 1000 timesteps that the student learned at."""
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=8.0)
    timesteps = (1000, 757, 522)
    levels = [scheduler.sigmas[(scheduler.timesteps - timestep).abs().argmin()] for timestep in timesteps]
    assert [round(level.item(), 6) for level in levels] == [1.0, 0.756757, 0.521739]
    seen: list[float] = []

    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        seen.append(sigma.item())
        return latents * 0.3 - 1

    expected, generator = NOISE.float(), torch.Generator().manual_seed(3)
    for i, level in enumerate(levels):
        expected = expected - level * (expected * 0.3 - 1)
        if i < 2:
            noise = torch.randn(expected.shape, generator=generator)
            expected = (1 - levels[i + 1]) * expected + levels[i + 1] * noise
    sigmas = at_timesteps(timesteps, None)
    latents = lcm(velocity, NOISE.float(), sigmas, grid_shift=8.0, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(latents, expected, atol=1e-6)
    # The model is told the timesteps that it knows.
    assert [1000 * sigma for sigma in seen] == pytest.approx(timesteps, abs=1e-3)
    plain = lcm(velocity, NOISE.float(), sigmas, generator=torch.Generator().manual_seed(3))
    assert (latents - plain).abs().max() > 1e-5


def test_listed_timesteps_are_shifted_and_end_at_0() -> None:
    sigmas = at_timesteps((1000, 750, 500, 250), 5.0)
    assert sigmas.tolist() == pytest.approx([1, 0.9375, 5 / 6, 0.625, 0])


FALLING = torch.tensor([1.0, 0.93, 0.8, 0.55, 0.2, 0.0], dtype=torch.float64)


def test_rf_solver_is_the_second_order_taylor_step_and_so_the_midpoint_rule() -> None:
    x = NOISE
    for sigma, after in itertools.pairwise(FALLING):
        dt = after - sigma
        d = gaussian_velocity(x, sigma)
        in_the_middle = gaussian_velocity(x + dt / 2 * d, sigma + dt / 2)
        x = x + dt * d + dt**2 / 2 * (in_the_middle - d) / (dt / 2)
    solved = SAMPLERS["rf-solver"](gaussian_velocity, NOISE, FALLING)
    assert (solved - x).abs().max() < 1e-12
    assert (solved - NOISE).abs().max() > 1


def round_trip_error(name: str, num_steps: int) -> float:
    data = MEAN + NOISE * SPREAD
    sigmas = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    inverted = invert(SOLVERS[name], gaussian_velocity, data, sigmas)
    return (SOLVERS[name](gaussian_velocity, inverted, sigmas) - data).abs().max().item()


@pytest.mark.parametrize(("name", "order"), [("euler", 1.0), ("rf-solver", 2.0), ("fireflow", 2.0)])
def test_the_error_of_a_round_trip_falls_with_the_order(name: str, order: float) -> None:
    # Back on the same grid by the same method, part of the error cancels out: never less than the order.
    assert math.log2(round_trip_error(name, 100) / round_trip_error(name, 200)) > order - 0.1


@pytest.mark.parametrize("name", ["rf-solver", "fireflow"])
def test_second_order_inverts_better_at_the_same_number_of_velocities(name: str) -> None:
    velocities = sum(map(len, evaluations(SOLVERS[name], torch.linspace(1, 0, 26))))
    assert round_trip_error(name, 25) < round_trip_error("euler", velocities) / 4


def test_evaluations_are_what_a_solver_asks_for() -> None:
    sigmas = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    assert evaluations(SOLVERS["euler"], sigmas) == [[1.0], [0.5]]
    assert evaluations(SOLVERS["rf-solver"], sigmas) == [[1.0, 0.75], [0.5, 0.25]]
    assert evaluations(SOLVERS["fireflow"], sigmas) == [[1.0, 0.75], [0.25]]
    assert evaluations(SOLVERS["fireflow"], sigmas.flip(0)) == [[0.0, 0.25], [0.75]]


@pytest.mark.parametrize(("strength", "left"), [(1.0, 5), (0.8, 4), (0.5, 2), (0.01, 1)])
def test_strength_leaves_the_last_steps(strength: float, left: int) -> None:
    assert torch.equal(last_steps(FALLING, strength), FALLING[-left - 1 :])


def shifted(mean: float) -> Velocity:
    """Return the velocity of the same data moved to `mean`."""
    return lambda latents, sigma: gaussian_velocity(latents - (1 - sigma) * (mean - MEAN), sigma) - (mean - MEAN)


def drawn() -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda: torch.randn(NOISE.shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("averages", [1, 3])
def test_flowedit_moves_data_by_what_the_flows_differ_in(averages: int) -> None:
    data, steps = MEAN + NOISE * SPREAD, []
    edited = flowedit(
        shifted(MEAN),
        shifted(MEAN + 3),
        data,
        FALLING,
        noise=drawn(),
        averages=averages,
        on_step=lambda i, n: steps.append((i, n)),
    )
    # For two Gaussians that differ in the mean alone, Euler's steps are exact whatever the noise.
    assert (edited - (data + 3)).abs().max() < 1e-12
    assert steps[0] == (1, 5)
    assert len(steps) == 5


def test_flowedit_leaves_alone_what_is_masked_and_what_does_not_differ() -> None:
    data, mask = MEAN + NOISE * SPREAD, (NOISE > 0).double()
    edited = flowedit(shifted(MEAN), shifted(7), data, FALLING, noise=drawn(), mask=mask)
    assert torch.equal(edited[mask == 0], data[mask == 0])
    assert (edited - data)[mask == 1].min() > 4.9
    assert (flowedit(shifted(3), shifted(3), data, FALLING, noise=drawn()) - data).abs().max() < 1e-12
