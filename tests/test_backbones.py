from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parity import Lengths, reinstall
from vgen import backbones
from vgen.backbones.wan import Wan
from vgen.checkpoints import resolve
from vgen.conditioning.frames import first_frame
from vgen.errors import CheckpointError
from vgen.pipelines.text_to_video import generate
from vgen.plan import plan
from vgen.request import GenerateRequest
from vgen.runtime import choose, noise_generator

SIGMA = torch.tensor(0.5)


def loaded(folder: Path, dtype: str = "float32", *, decode_only: bool = False) -> Wan:
    backbone = backbones.load(resolve(str(folder)), choose("cpu", dtype), decode_only=decode_only)
    assert isinstance(backbone, Wan)
    return backbone


@pytest.fixture(scope="module")
def wan(tiny_checkpoint: Path) -> Wan:
    return loaded(tiny_checkpoint)


@pytest.fixture(scope="module")
def expanded(tiny_expanded: Path) -> Wan:
    return loaded(tiny_expanded)


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def latents_of(backbone: Wan) -> torch.Tensor:
    shape = backbone.latent_shape(9, 32, 48)
    assert shape == (16, 3, 4, 6)
    return torch.randn(1, *shape, generator=noise_generator(0))


def test_text_is_that_of_stock_diffusers(wan: Wan, tiny_checkpoint: Path) -> None:
    prompts = ["a red  ball &amp; the cube", "", "grass " * 1000]
    pipeline = WanPipeline.from_pretrained(tiny_checkpoint)
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=512)
        text = torch.cat(wan.encode_prompt(prompts))
    assert torch.equal(text, expected)
    assert text.shape == (3, 512, 32)
    assert text[0, 7:].abs().max() == 0 < text[0, :7].abs().min()


@settings(max_examples=30)
@given(prompt=st.text(st.characters(), max_size=200))
def test_any_prompt_is_encoded(prompt: str, wan: Wan) -> None:
    with torch.no_grad():
        assert wan.encode_prompt([prompt])[0].isfinite().all()
    assert wan.num_tokens(prompt) >= 1
    assert len(set(wan.unknown_words(prompt))) == len(wan.unknown_words(prompt))


def test_words_that_no_token_stands_for_are_unknown(wan: Wan) -> None:
    assert wan.unknown_words("A RED ball, zebra/zebra\ttower! 🎈") == ["zebra", "tower"]
    assert wan.unknown_words("the blue cube moves left.") == []


@pytest.mark.parametrize("num_inference_steps", [1, 2, 25, 50])
def test_sigmas_are_the_schedulers_own(num_inference_steps: int, wan: Wan) -> None:
    sigmas = wan.sigmas(num_inference_steps)
    wan.scheduler.set_timesteps(num_inference_steps)
    assert torch.equal(sigmas, wan.scheduler.sigmas)
    assert sigmas.dtype == torch.float32
    assert len(sigmas) == num_inference_steps + 1
    assert sigmas[-1] == 0
    assert torch.equal(sigmas[:-1] * wan.scheduler.config.num_train_timesteps, wan.scheduler.timesteps)


def test_whole_timesteps_are_those_of_the_scheduler(folder: Path) -> None:
    shutil.rmtree(folder / "scheduler")
    UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0).save_pretrained(
        folder / "scheduler"
    )
    edit(folder / "model_index.json", scheduler=["diffusers", "UniPCMultistepScheduler"])
    backbone = loaded(folder)
    seen: list[torch.Tensor] = []
    backbone.transformer.register_forward_pre_hook(
        lambda module, arguments, values: seen.append(values["timestep"]), with_kwargs=True
    )
    text = backbone.encode_prompt(["a"])[0][:, :4].detach()
    for num_inference_steps in (3, 7, 20):
        seen.clear()
        sigmas = backbone.sigmas(num_inference_steps)
        assert sigmas[-1] == 0
        with torch.no_grad():
            for sigma in sigmas[:-1]:
                backbone.velocity(torch.zeros(1, 16, 1, 2, 2), sigma, text)
        assert torch.equal(torch.cat(seen), backbone.scheduler.timesteps)


def test_known_frames_are_held_at_timestep_zero(expanded: Wan) -> None:
    seen: list[torch.Tensor] = []
    handle = expanded.transformer.register_forward_pre_hook(
        lambda module, arguments, values: seen.append(values["timestep"]), with_kwargs=True
    )
    latents, text = latents_of(expanded), expanded.encode_prompt(["a red ball"])[0].detach()
    known = first_frame(torch.ones(1, 16, 1, 4, 6), 3)
    with torch.no_grad():
        expanded.velocity(latents, SIGMA, text, known.mask)
    handle.remove()
    (timestep,) = seen
    assert timestep.shape == (1, 3 * 2 * 3)
    assert (timestep[0, :6] == 0).all()
    assert (timestep[0, 6:] == 500).all()
    held = known.hold(latents)
    assert (held[:, :, 0] == 1).all()
    assert torch.equal(held[:, :, 1:], latents[:, :, 1:])


def test_any_subset_of_latent_frames_may_be_known(expanded: Wan) -> None:
    latents, text = latents_of(expanded), expanded.encode_prompt(["a red ball"])[0].detach()
    mask = torch.tensor([False, True, True]).view(1, 1, 3, 1, 1)
    with torch.no_grad():
        some = expanded.velocity(latents, SIGMA, text, mask)
        none = expanded.velocity(latents, SIGMA, text, torch.zeros_like(mask))
        plain = expanded.velocity(latents, SIGMA, text)
    assert (some - plain).abs().max() > 1e-4
    # One timestep for all tokens, or the same for each: only rounding tells them apart.
    assert torch.allclose(none, plain, atol=1e-5)


def test_the_grid_and_the_slots_are_what_the_model_sees(wan: Wan) -> None:
    latents, text = latents_of(wan), wan.encode_prompt(["a red ball"])[0].detach()
    frames, rows, columns = wan.token_grid(9, 32, 48)
    assert (frames, rows, columns) == (3, 2, 3)
    assert len(wan.blocks()) == len(wan.attention_slots()) == wan.transformer.config.num_layers
    lengths = [Lengths(slot) for slot in wan.attention_slots()]
    with torch.no_grad():
        before = wan.velocity(latents, SIGMA, text)
        assert [look.seen for look in lengths] == [[(frames * rows * columns, wan.num_text_tokens())]] * len(lengths)
        for look in lengths:
            look.handle.remove()
        reinstall(wan.attention_slots())
        assert torch.equal(wan.velocity(latents, SIGMA, text), before)


def test_frames_go_to_normalised_latents_and_back(wan: Wan) -> None:
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 5, 32, 48, 3), dtype=np.uint8))
    with torch.no_grad():
        latents = wan.encode_frames(frames)
        raw = wan.vae.encode(frames.permute(0, 4, 1, 2, 3) / 127.5 - 1).latent_dist.mode()
        decoded = wan.decode(latents)
        pixels = wan.vae.decode(raw).sample
    mean, std = torch.tensor(wan.vae.config.latents_mean), torch.tensor(wan.vae.config.latents_std)
    assert torch.allclose(latents, ((raw.movedim(1, -1) - mean) / std).movedim(-1, 1), atol=1e-5)
    assert decoded.shape == frames.shape
    assert decoded.dtype == torch.uint8
    assert (decoded - (pixels.permute(0, 2, 3, 4, 1) + 1) * 127.5).abs().max() <= 0.51


def test_decoding_goes_on_in_tiles_where_memory_does_not_suffice(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backbone = loaded(tiny_checkpoint, decode_only=True)
    latents = latents_of(backbone)
    with torch.no_grad():
        expected = backbone.decode(latents)
    decode = backbone.vae.decode

    def scarce(*args: object, **kwargs: object) -> object:
        if not backbone.vae.use_tiling:
            raise torch.OutOfMemoryError("no memory")
        return decode(*args, **kwargs)

    monkeypatch.setattr(backbone.vae, "decode", scarce)
    with torch.no_grad():
        assert torch.equal(backbone.decode(latents), expected)
    assert "decoding in tiles" in caplog.text


def test_a_backbone_for_decoding_holds_the_vae_alone(tiny_checkpoint: Path) -> None:
    backbone = loaded(tiny_checkpoint, decode_only=True)
    assert not hasattr(backbone, "transformer")
    with torch.no_grad():
        assert backbone.decode(latents_of(backbone)).shape == (1, 9, 32, 48, 3)


def test_bfloat16_spares_what_the_model_keeps_in_float32(tiny_checkpoint: Path) -> None:
    backbone = loaded(tiny_checkpoint, "bfloat16")
    kept = tuple(WanTransformer3DModel._keep_in_fp32_modules)
    for name, parameter in backbone.transformer.named_parameters():
        expected = torch.float32 if any(part in name.split(".") for part in kept) else torch.bfloat16
        assert parameter.dtype == expected, name
    assert backbone.text_encoder.dtype == torch.bfloat16
    assert backbone.vae.dtype == torch.float32


def test_two_transformers_share_the_noise_levels_as_in_stock_diffusers(folder: Path) -> None:
    second = WanTransformer3DModel.from_pretrained(folder / "transformer")
    torch.manual_seed(1)
    with torch.no_grad():
        second.proj_out.weight.normal_(std=0.2)
    second.save_pretrained(folder / "transformer_2")
    edit(folder / "model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"], boundary_ratio=0.8)
    size = {"width": 32, "height": 32, "num_frames": 5, "num_inference_steps": 6, "guidance_scale": 3.0}
    request = GenerateRequest(prompt="a red ball", model=str(folder), seed=3, **size)  # type: ignore[arg-type]
    latents = generate(plan(request, resolve(str(folder))), loaded(folder)).latents
    pipeline = WanPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(prompt="a red ball", generator=noise_generator(3), output_type="latent", **size).frames
    assert (latents - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("transformer", {"num_layers": 3}),
        ("transformer", {"num_attention_heads": "two"}),
        ("vae", {"z_dim": 8}),
        ("scheduler", {"shift": "much"}),
    ],
)
def test_a_component_that_does_not_fit_its_configuration_is_named(
    part: str, changes: dict[str, object], folder: Path
) -> None:
    (config,) = [path for path in (folder / part).glob("*config.json") if "generation" not in path.name]
    edit(config, **changes)
    with pytest.raises(CheckpointError, match=f"Cannot load the {part} of"):
        loaded(folder)


def test_a_component_of_an_unknown_class_is_named(folder: Path) -> None:
    edit(folder / "model_index.json", vae=["diffusers", "AutoencoderOfTomorrow"])
    with pytest.raises(CheckpointError, match=r"Cannot load the vae of .*AutoencoderOfTomorrow"):
        loaded(folder)
