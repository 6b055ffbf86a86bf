"""Training: small, real runs that learn, stop at their budget, and go on after a kill as if nothing had happened."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile
from typer.testing import CliRunner

import vgen.toyland
from vgen.checkpoints import resolve
from vgen.cli import app
from vgen.errors import VgenError
from vgen.toyland import text
from vgen.toyland.renderer import render
from vgen.toyland.scene import sample_clips
from vgen.training import base, codec
from vgen.training.base import load_run
from vgen.training.export import export_checkpoint
from vgen.training.latents import LatentSet, encode_clips, latent_set, latent_statistics, require_made_by
from vgen.training.loop import Budget, Progress, learning_rate_factor, train
from vgen.training.muon import Muon, orthogonalise
from vgen.training.text import TRAITS, traits_of
from vgen.training.vae import Crops, train_vae, untrained_vae


def regression(folder: Path, steps: int, stop_at: int | None = None) -> dict[str, Tensor]:
    """Return the averaged weights of a small regression, killed (by an exception) at a step if asked."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def loss_of(model: nn.Module, step: int) -> dict[str, Tensor]:
        if step == stop_at:
            raise KeyboardInterrupt
        inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        return {"loss": (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()}

    folder.mkdir(exist_ok=True)
    accelerator = Accelerator(mixed_precision="bf16")  # as the real runs: accelerate keeps one state per process
    budget = Budget(steps=steps, save_minutes=1e-9, log_steps=5, warmup_steps=5)
    optimizers = [
        Muon([model[0].weight, model[2].weight], 0.02),
        torch.optim.Adam([model[0].bias, model[2].bias], 0.01),
    ]
    average = train(model, optimizers, loss_of, folder=folder, budget=budget, accelerator=accelerator, ema_decay=0.9)
    return average.state_dict()


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    straight = regression(tmp_path / "straight", 30)
    with pytest.raises(KeyboardInterrupt):
        regression(tmp_path / "stopped", 30, stop_at=17)
    resumed = regression(tmp_path / "stopped", 30)
    for name, value in straight.items():
        assert torch.equal(value, resumed[name]), name
    steps = [json.loads(line)["step"] for line in (tmp_path / "stopped" / "log.jsonl").read_text().splitlines()]
    assert steps == [5, 10, 15, 20, 25, 30]


def test_a_kill_between_the_renames_of_a_save_loses_one_save_at_most(tmp_path: Path) -> None:
    straight = regression(tmp_path / "straight", 30)
    with pytest.raises(KeyboardInterrupt):
        regression(tmp_path / "killed", 30, stop_at=17)
    (tmp_path / "killed" / "state").replace(tmp_path / "killed" / "state.new")
    assert (tmp_path / "killed" / "state.old").exists()
    resumed = regression(tmp_path / "killed", 30)
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    assert steps == [5, 10, 15, 20, 25, 30], "it went on, and did not begin again"


def test_training_learns(tmp_path: Path) -> None:
    regression(tmp_path, 300)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.05 * losses[0]


def test_the_learning_rate_warms_up_stays_and_falls() -> None:
    budget = Budget(steps=1000, warmup_steps=100, decay_share=0.5)
    factor = {step: learning_rate_factor(step, step / 1000, budget) for step in (0, 49, 100, 499, 750, 1000)}
    assert factor == pytest.approx({0: 0.01, 49: 0.5, 100: 1, 499: 1, 750: 0.5, 1000: 0})


def test_a_budget_in_minutes_counts_what_earlier_runs_used() -> None:
    assert Progress(step=5, seconds=90).share(Budget(minutes=3)) == pytest.approx(0.5)
    assert Progress(step=5, seconds=900).share(Budget(minutes=3)) == 1


def test_orthogonalise_brings_singular_values_near_one() -> None:
    matrices = torch.randn(3, 12, 40, generator=torch.Generator().manual_seed(1))
    singular = torch.linalg.svdvals(orthogonalise(matrices).float())
    assert singular.min() > 0.6 and singular.max() < 1.3


def test_muon_takes_kernels_and_tall_matrices_and_agrees_with_torch_on_matrices() -> None:
    start = torch.randn(24, 8, generator=torch.Generator().manual_seed(2))
    gradient = torch.randn(24, 8, generator=torch.Generator().manual_seed(3))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours.grad, theirs.grad = gradient.clone(), gradient.clone()
    Muon([ours], 0.1).step()
    torch.optim.Muon([theirs], 0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    assert torch.allclose(ours, theirs, atol=4e-3), "updates of 0.02, in bfloat16"
    kernel = nn.Parameter(torch.randn(8, 4, 3, 3, 3))
    kernel.grad = torch.randn_like(kernel)
    before = kernel.detach().clone()
    Muon([kernel], 0.1).step()
    assert (kernel.detach() - before).square().mean().sqrt() == pytest.approx(0.1 * 0.2, rel=0.25)


def test_crops_depend_on_the_step_alone() -> None:
    first, second = Crops(3, 4), Crops(3, 4)
    second.batch(1, 2, 5, 64)
    assert torch.equal(first.batch(7, 2, 5, 64), second.batch(7, 2, 5, 64))
    assert not torch.equal(first.batch(8, 2, 5, 64), second.batch(9, 2, 5, 64))


def test_a_frozen_encoder_stays(tmp_path: Path) -> None:
    untrained_vae().save_pretrained(tmp_path / "start")
    kwargs = {"batch_size": 2, "pool_clips": 2, "start": tmp_path / "start"}
    trained = train_vae(tmp_path / "run", budget=Budget(steps=2, warmup_steps=1), freeze_encoder=True, **kwargs)  # type: ignore[arg-type]
    start = type(trained).from_pretrained(tmp_path / "start")
    for name, value in start.state_dict().items():
        same = torch.equal(value, trained.state_dict()[name])
        assert same == (name.startswith(("encoder.", "quant_conv."))) or value.abs().max() == 0, name


def test_a_text_encoder_learns_to_tell_what_captions_say(tmp_path: Path) -> None:
    command = ["train", "text", "--steps", "60", "--batch-size", "64", "-o", str(tmp_path)]
    assert CliRunner().invoke(app, command).exit_code == 0
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    encoder = type(text.text_encoder()).from_pretrained(tmp_path / "text_encoder")
    assert encoder.config.d_model == text.TEXT_WIDTH


def test_an_absent_subject_is_a_trait_of_its_own() -> None:
    one, two = (next(c for c in sample_clips(0) if len(c.subjects) == count) for count in (1, 2))
    assert traits_of(one)["second shape"] == "none" != traits_of(two)["second shape"]
    assert traits_of(two)["second colour"] == two.subjects[1].colour
    assert all(value in TRAITS[name] for clip in (one, two) for name, value in traits_of(clip).items())


def small_set(frames: int = 3) -> LatentSet:
    clips = list(islice(sample_clips(2), 6))
    latents = torch.randn(6, base.CONFIG["in_channels"], frames, 4, 4, generator=torch.Generator().manual_seed(0))  # type: ignore[call-overload]
    return LatentSet(clips=clips, latents=latents.bfloat16(), coverage=torch.rand(6, frames, 4, 4).bfloat16())


def test_batches_depend_on_the_step_alone_and_cover_the_known_frame_tasks() -> None:
    make = base.batch_maker([small_set()], text.tokenizer(), mean=torch.zeros(1), std=torch.ones(1), seed=0)
    one, same, other = make(4, 8), make(4, 8), make(5, 8)
    assert torch.equal(one.noise, same.noise) and torch.equal(one.tokens, same.tokens)
    assert not torch.equal(one.noise, other.noise)
    rng = random.Random(0)
    masks = {tuple(base.known_frames(rng, 5)) for _ in range(2000)}
    assert (True, False, False, False, False) in masks
    assert (True, False, False, False, True) in masks and (False, False, False, False, True) in masks
    assert (True,) * 5 not in masks, "there is always something to learn"
    regions = [base.known_tokens(rng, (3, 4, 4)) for _ in range(500)]
    assert not any(region.all() for region in regions), "there is always something to learn"
    assert any((region == region[:1]).all() and region[0].any() for region in regions), "some are in all frames"
    some = [bool(make(step, 2).known.any()) for step in range(200)]
    assert sum(some) / len(some) == pytest.approx(base.KNOWN_SHARE, abs=0.1)


def test_batches_of_other_shapes_have_about_as_many_tokens() -> None:
    sets = [small_set(frames=5), small_set(frames=1)]
    make = base.batch_maker(sets, text.tokenizer(), mean=torch.zeros(1), std=torch.ones(1), seed=0)
    sizes = {(len(batch.latents), batch.latents.shape[2]) for batch in (make(step, 2) for step in range(40))}
    assert sizes == {(2, 5), (10, 1)}


def test_known_frames_stay_clean_at_time_zero_and_have_no_loss() -> None:
    make = base.batch_maker([small_set()], text.tokenizer(), mean=torch.zeros(1), std=torch.ones(1), seed=0)
    batch = make(1, 6)
    known = torch.tensor([True, False, False]).view(1, 3, 1, 1).expand(6, 3, 2, 2)
    batch = base.Batch(**{**vars(batch), "known": known})
    seen: dict[str, Tensor] = {}

    def perfect(latents: Tensor, timesteps: Tensor, tokens: Tensor, padding: int) -> Tensor:
        seen.update(latents=latents, timesteps=timesteps)
        velocity = batch.noise - batch.latents
        velocity[:, :, 0] = 1e6
        return velocity

    assert base.flow_matching_loss(perfect, batch) == 0  # type: ignore[arg-type]
    assert torch.equal(seen["latents"][:, :, 0], batch.latents[:, :, 0])
    assert (seen["timesteps"][:, :4] == 0).all() and (seen["timesteps"][:, 4:] > 0).all()


def test_subjects_weigh_more_the_less_noise_there_is() -> None:
    make = base.batch_maker([small_set()], text.tokenizer(), mean=torch.zeros(1), std=torch.ones(1), seed=0)
    batch = make(1, 2)
    half = torch.zeros(2, 3, 4, 4)
    half[..., :2] = 1

    def loss(sigma: float) -> float:
        seen = base.Batch(
            **{**vars(batch), "sigma": torch.full((2,), sigma), "coverage": half, "known": batch.known & False}
        )

        def wrong_on_the_subject(latents: Tensor, timesteps: Tensor, tokens: Tensor, padding: int) -> Tensor:
            return batch.noise - batch.latents + half[:, None]

        return float(base.flow_matching_loss(wrong_on_the_subject, seen))  # type: ignore[arg-type]

    assert loss(1.0) == pytest.approx(0.5)
    assert loss(0.0) == pytest.approx((1 + base.SUBJECT_WEIGHT) / (2 + base.SUBJECT_WEIGHT))


def test_coverage_lies_where_the_subject_is() -> None:
    clips = list(islice(sample_clips(2), 2))
    encoded = encode_clips(untrained_vae(), clips, 5, 32, 48)
    masks = render(clips, num_frames=5, height=32, width=48).masks.sum(1).clamp(max=255) / 255
    assert encoded["latents"].shape[2:] == encoded["coverage"].shape[1:] == (2, 4, 6)
    first = masks[:, 0].unflatten(2, (6, 8)).unflatten(1, (4, 8)).mean((2, 4))
    assert torch.allclose(encoded["coverage"][:, 0].float(), first, atol=0.01)


def test_what_training_encodes_and_decodes_is_what_the_vae_does_but_for_bfloat16() -> None:
    folder = resolve("toyland").folder
    assert folder is not None
    frames = render(list(islice(sample_clips(3), 1)), num_frames=5, height=64, width=96).frames
    fast, exact = codec.load_codec(folder / "vae"), AutoencoderKLWan.from_pretrained(folder / "vae")
    latents, true = codec.encode(fast, frames), codec.encode(exact, frames)
    assert latents.is_contiguous() and latents.dtype == torch.bfloat16
    assert (latents - true).float().std() < 0.02 * true.float().std()
    difference = codec.decode(fast, true).int() - codec.decode(exact, true).int()
    assert difference.abs().max() <= 6 and difference.float().abs().mean() < 0.5


@torch.no_grad()
def test_training_attends_by_products_that_are_torchs_attention_but_for_bfloat16() -> None:
    q, k, v = torch.randn(3, 2, 4, 40, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    usual = scaled_dot_product_attention(q, k, v)
    with base.attention_by_products(), profile(activities=[ProfilerActivity.CPU]) as profiled:
        ours = scaled_dot_product_attention(q, k, v)
    names = {event.key for event in profiled.key_averages()}
    assert "aten::_scaled_dot_product_attention_math" in names
    assert (ours - usual).abs().max() < 0.02
    assert not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # type: ignore[no-untyped-call]


def test_latents_are_divided_by_the_root_of_their_deviation() -> None:
    latents = torch.randn(50, 3, 2, 4, 4) * torch.tensor([0.25, 1.0, 4.0]).view(1, 3, 1, 1, 1) + 5
    mean, std = latent_statistics(latents).values()
    assert mean == pytest.approx([5, 5, 5], abs=0.5)
    normalised = (latents - 5) / torch.tensor(std).view(1, 3, 1, 1, 1)
    assert normalised.square().mean() == pytest.approx(1, abs=0.05)
    deviations = normalised.transpose(0, 1).flatten(1).std(1)
    assert deviations[2] / deviations[0] == pytest.approx(4, rel=0.1), "a ratio of 16 became its root"


def test_base_training_survives_kill_9_and_exports_a_checkpoint_that_generates(tmp_path: Path) -> None:
    untrained_vae().save_pretrained(tmp_path / "vae")
    text.text_encoder().save_pretrained(tmp_path / "text" / "text_encoder")
    command = [
        *("train", "base", "--vae", str(tmp_path / "vae"), "--text", str(tmp_path / "text")),
        *("--clips", "5x32x32=8", "--steps", "40", "--batch-size", "4", "--no-compile", "--save-minutes", "0.05"),
        *("--keep", "-o", str(tmp_path / "base")),
    ]  # fmt: skip
    process = subprocess.Popen([sys.executable, "-m", "vgen", *command], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (tmp_path / "base" / "state").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run([sys.executable, "-m", "vgen", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "resumed at step" in done.stderr, done.stderr[-2000:]

    export = ["train", "export", "--vae", str(tmp_path / "vae"), "--base", str(tmp_path / "base")]
    assert CliRunner().invoke(app, [*export, "-o", str(tmp_path / "checkpoint")]).exit_code == 0
    own, embedded = resolve(str(tmp_path / "checkpoint")), resolve("toyland")
    assert (own.defaults, own.rules, own.sizes, own.can) == (
        embedded.defaults,
        embedded.rules,
        embedded.sizes,
        embedded.can,
    )
    generate = ["generate", "a red ball on grass", "--model", str(tmp_path / "checkpoint"), "--steps", "2"]
    size = ["--width", "32", "--height", "32", "--frames", "5", "-o", str(tmp_path / "clip.mp4")]
    result = CliRunner().invoke(app, [*generate, *size])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "clip.mp4").stat().st_size > 0

    kept = load_run(tmp_path / "base" / "history" / "000040")
    with torch.no_grad():
        kept.transformer.proj_out.bias.fill_(3)
    kept.transformer.save_pretrained(tmp_path / "other" / "transformer")
    kept.text_encoder.save_pretrained(tmp_path / "other" / "text_encoder")
    export_checkpoint(tmp_path / "vae", tmp_path / "base", tmp_path / "third", weights=tmp_path / "other")
    exported = WanTransformer3DModel.from_pretrained(tmp_path / "third" / "transformer")
    assert (exported.proj_out.bias == 3).all()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["vae", "-o", "run"], "--minutes or --steps"),
        (["vae", "-o", "run", "--minutes", "1", "--steps", "1"], "--minutes or --steps"),
        (["base", "--vae", "v", "--clips", "17x128=5", "--steps", "1", "-o", "run"], "FRAMESxHEIGHTxWIDTH=COUNT"),
        (["base", "--vae", "v", "--clips", "16x128x128=5", "--steps", "1", "-o", "run"], "4k+1"),
        (["base", "--vae", "v", "--clips", "17x128x128=5", "--steps", "1", "-o", "run"], "not a VAE's folder"),
        (["base", "--vae", "{vae}", "--clips", "17x128x128=5", "--steps", "1", "-o", "run"], "--text or --start"),
        (
            ["base", "--vae", "{vae}", "--text", "t", "--clips", "17x128x128=5", "--steps", "1", "-o", "run"],
            "not a text run's folder",
        ),
        (["vae", "--start", "v", "--steps", "1", "-o", "run"], "not a VAE's folder"),
        (["export", "--vae", "v", "--base", "b", "-o", "run"], "not a VAE's folder"),
    ],
)
def test_wrong_usage_is_told_before_anything_heavy_is_loaded(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = Path(vgen.toyland.__file__).parent / "checkpoint" / "vae"
    result = CliRunner().invoke(app, ["train", *(argument.format(vae=shipped) for argument in arguments)])
    assert result.exit_code == 2 and says in result.output
    assert not list(tmp_path.iterdir())


def test_a_set_that_grows_encodes_what_its_last_shard_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vgen.training.latents.SHARD_CLIPS", 2)
    vae = untrained_vae()
    few, more = (latent_set(tmp_path, vae, count=count, num_frames=1, height=16, width=16) for count in (3, 4))
    assert len(few.latents) == 3 and len(more.latents) == len(more.clips) == 4
    assert torch.equal(few.latents, more.latents[:3])


def test_latents_of_another_vae_are_refused(tmp_path: Path) -> None:
    for name, weights in (("one", b"1"), ("other", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "diffusion_pytorch_model.safetensors").write_bytes(weights)
    for _ in range(2):
        require_made_by(tmp_path / "one", tmp_path / "run")
    with pytest.raises(VgenError, match="another VAE"):
        require_made_by(tmp_path / "other", tmp_path / "run")
