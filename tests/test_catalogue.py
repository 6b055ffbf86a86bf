"""Every entry of checkpoints.yaml is complete, agrees with its family, and asks for nothing that its rules forbid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vgen import backbones
from vgen.checkpoints import Checkpoint, catalogue, names, resolve
from vgen.errors import CheckpointError, UsageError
from vgen.plan import plan
from vgen.request import GenerateRequest

ROOT = Path(__file__).parent.parent
ON_THE_HUB = [name for name in names() if name != "toyland"]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what this machine may have of real checkpoints out of the tests."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", names())
def test_defaults_and_native_sizes_are_legal(name: str, tmp_path: Path) -> None:
    checkpoint = resolve(name)
    image = tmp_path / "first.png"
    Image.new("RGB", (8, 8)).save(image)
    defaults = GenerateRequest(prompt="a", model=name, image=image if checkpoint.can.needs_image else None)
    made = plan(defaults, checkpoint)
    assert (made.width, made.height) in checkpoint.sizes
    for width, height in checkpoint.sizes:
        request = GenerateRequest(prompt="a", model=name, width=width, height=height, image=defaults.image)
        assert plan(request, checkpoint).width == width


@pytest.mark.parametrize("name", names())
def test_every_entry_says_what_it_is(name: str) -> None:
    checkpoint = resolve(name)
    assert checkpoint.licence
    assert checkpoint.permits
    can = checkpoint.can
    assert can.text_to_video or can.image_to_video or can.identity
    assert checkpoint.defaults.num_frames % checkpoint.rules.frame_multiple == 1
    assert checkpoint.follows is None, "a revision that nobody has looked up would be invented"


@pytest.mark.parametrize("name", ON_THE_HUB)
def test_a_name_needs_neither_a_connection_nor_files(name: str) -> None:
    checkpoint = resolve(name)
    assert (checkpoint.source, checkpoint.folder, checkpoint.files) == ("hub", None, ())
    assert checkpoint.repo is not None
    assert checkpoint.repo.count("/") == 1
    if not checkpoint.loras:
        assert resolve(checkpoint.repo).name == name, "a hub id that has a name is known by it"


def test_the_families_and_models_that_people_use_are_there() -> None:
    families = {name: resolve(name).family for name in names()}
    expected = {
        "wan2.1-1.3b": "wan",
        "wan2.1-14b": "wan",
        "wan2.1-i2v-480p": "wan",
        "wan2.1-i2v-720p": "wan",
        "wan2.2-5b": "wan",
        "wan2.2-14b": "wan",
        "wan2.2-i2v": "wan",
        "fastwan2.1-1.3b": "wan",
        "hunyuan-video": "hunyuan-video",
        "hunyuan-video-1.5": "hunyuan-video-1.5",
        "cogvideox-2b": "cogvideox",
        "cogvideox-5b": "cogvideox",
        "consisid": "cogvideox",
        "ltx-video": "ltx-video",
        "ltx-2": "ltx-2",
    }
    assert expected.items() <= families.items()
    assert resolve("ltx-2").can.audio
    assert resolve("wan2.2-5b").can.known_frames
    assert resolve("hunyuan-video").can.embedded_guidance


def test_a_preset_is_its_base_with_what_differs() -> None:
    base, preset = resolve("wan2.1-14b"), resolve("wan2.1-14b-4step")
    assert (preset.repo, preset.licence, preset.sizes) == (base.repo, base.licence, base.sizes)
    assert preset.defaults.negative_prompt == base.defaults.negative_prompt
    assert (preset.defaults.num_inference_steps, preset.defaults.guidance_scale) == (4, 1.0)
    assert [lora.component for lora in resolve("wan2.2-14b-4step").loras] == ["transformer", "transformer_2"]
    assert all(lora.file.endswith(".safetensors") for lora in preset.loras)
    for name in names():
        assert {lora.component for lora in resolve(name).loras} <= {"transformer", "transformer_2"}
        assert resolve(name).can.lora or not resolve(name).loras


@pytest.mark.parametrize("name", [name for name in names() if resolve(name).defaults.timesteps])
def test_a_student_makes_its_steps_and_no_others(name: str, tmp_path: Path) -> None:
    checkpoint = resolve(name)
    image = tmp_path / "first.png"
    Image.new("RGB", (8, 8)).save(image)

    def made(**values: Any) -> Any:
        return plan(
            GenerateRequest(prompt="a", image=image if checkpoint.can.needs_image else None, **values), checkpoint
        )

    steps = len(checkpoint.defaults.timesteps)
    assert (made().num_inference_steps, made().guidance_scale, made().cfg_scale) == (steps, 1.0, 1.0)
    assert made(num_inference_steps=steps, sampler="euler").sampler == "euler"
    with pytest.raises(UsageError, match=f"was distilled for {steps}, at the timesteps 1000, ") as caught:
        made(num_inference_steps=steps + 1)
    assert f"--steps {steps}" in str(caught.value.tip)
    with pytest.raises(UsageError, match='The sampler "native" has other noise levels'):
        made(sampler="native")


def test_pipelines_belong_to_one_family_and_are_diffusers_own() -> None:
    families = catalogue.read()["families"]
    pipelines = [name for family in families.values() for name in family["pipelines"]]
    assert len(pipelines) == len(set(pipelines))
    exported = (Path(pytest.importorskip("diffusers").__file__).parent / "__init__.py").read_text()
    assert [name for name in pipelines if f'"{name}"' not in exported] == ["WanDMDPipeline"]


# What is read of the released configurations, as diffusers' scripts/convert_*_to_diffusers.py write them.
COGVIDEOX_VAE = {"temporal_compression_ratio": 4}
HUNYUAN_VAE = {"spatial_compression_ratio": 8, "temporal_compression_ratio": 4}
HUNYUAN_15_VAE = {"spatial_compression_ratio": 16, "temporal_compression_ratio": 4}
WAN = {"patch_size": [1, 2, 2], "rope_max_seq_len": 1024, "image_dim": None, "pos_embed_seq_len": None}
WAN_IMAGE = {**WAN, "image_dim": 1280}
WAN_VAE = {"scale_factor_spatial": 8, "scale_factor_temporal": 4}
COGVIDEOX = {"patch_size": 2, "patch_size_t": None, "sample_width": 90, "sample_height": 60, "sample_frames": 49}
LEARNED = {**COGVIDEOX, "use_learned_positional_embeddings": True}
HUNYUAN = {"patch_size": 2, "guidance_embeds": True}
CONFIGURATIONS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "wan2.1-1.3b": ({"_class_name": "WanPipeline"}, WAN, WAN_VAE),
    "wan2.1-i2v-480p": ({"_class_name": "WanImageToVideoPipeline"}, WAN_IMAGE, WAN_VAE),
    "wan2.2-5b": (
        {"_class_name": "WanPipeline", "expand_timesteps": True},
        WAN,
        {**WAN_VAE, "scale_factor_spatial": 16},
    ),
    "wan2.2-14b": ({"_class_name": "WanPipeline", "boundary_ratio": 0.875}, WAN, WAN_VAE),
    "wan2.2-i2v": ({"_class_name": "WanImageToVideoPipeline", "boundary_ratio": 0.9}, WAN, WAN_VAE),
    "fastwan2.1-1.3b": ({"_class_name": "WanDMDPipeline"}, WAN, WAN_VAE),
    "hunyuan-video": ({"_class_name": "HunyuanVideoPipeline"}, HUNYUAN, HUNYUAN_VAE),
    "hunyuan-video-1.5": ({"_class_name": "HunyuanVideo15Pipeline"}, {"patch_size": 1}, HUNYUAN_15_VAE),
    "hunyuan-video-1.5-i2v": (
        {"_class_name": "HunyuanVideo15ImageToVideoPipeline"},
        {"patch_size": 1},
        HUNYUAN_15_VAE,
    ),
    "cogvideox-5b": ({"_class_name": "CogVideoXPipeline"}, COGVIDEOX, COGVIDEOX_VAE),
    "cogvideox-5b-i2v": ({"_class_name": "CogVideoXImageToVideoPipeline"}, LEARNED, COGVIDEOX_VAE),
    "consisid": ({"_class_name": "ConsisIDPipeline"}, LEARNED, COGVIDEOX_VAE),
    "ltx-video": ({"_class_name": "LTXPipeline"}, {"patch_size": 1}, {}),
    "ltx-2": ({"_class_name": "LTX2Pipeline"}, {"patch_size": 1}, {"spatial_compression_ratio": 32}),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_folder_tells_by_its_configurations_what_the_catalogue_tells_of_its_name(name: str, tmp_path: Path) -> None:
    index, transformer, vae = CONFIGURATIONS[name]
    for path, config in (("model_index", index), ("transformer/config", transformer), ("vae/config", vae)):
        file = tmp_path / f"{path}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(config))
    folder, named = resolve(str(tmp_path)), resolve(name)
    assert (folder.family, folder.can, folder.rules) == (named.family, named.can, named.rules)
    assert not named.rules.fixed_size or folder.sizes == named.sizes
    for fact in ("sampler", "timesteps", "max_sequence_length"):
        assert getattr(folder.defaults, fact) == getattr(named.defaults, fact)


@pytest.mark.parametrize("name", names())
def test_what_cannot_run_yet_is_what_needs_sparse_attention_or_a_face(name: str) -> None:
    checkpoint = resolve(name)
    lacks = bool(checkpoint.defaults.attention or checkpoint.can.identity)
    assert lacks == (name.startswith("fastwan2.1") or name == "consisid")
    if lacks:
        with pytest.raises(CheckpointError, match="cannot run it yet"):
            backbones.require_runnable(checkpoint)
    else:
        backbones.require_runnable(checkpoint)


def test_the_second_transformer_has_its_own_guidance_unless_one_scale_is_asked_for() -> None:
    checkpoint = resolve("wan2.2-14b")

    def scales(**values: float) -> tuple[float, float | None]:
        made = plan(GenerateRequest(prompt="a", **values), checkpoint)
        return made.guidance_scale, made.guidance_scale_2

    assert scales() == (4.0, 3.0)
    assert scales(guidance_scale=5.0) == (5.0, None)
    assert scales(guidance_scale_2=2.0) == (4.0, 2.0)
    with pytest.raises(UsageError, match="has one transformer"):
        plan(GenerateRequest(prompt="a", guidance_scale_2=2.0), resolve("wan2.1-14b"))


def test_guidance_that_is_an_input_of_the_model_costs_no_second_pass() -> None:
    made = plan(GenerateRequest(prompt="a"), resolve("hunyuan-video"))
    assert (made.embedded_guidance_scale, made.cfg_scale) == (6.0, 1.0)


def test_only_models_with_a_place_for_it_end_with_an_image(tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    Image.new("RGB", (8, 8)).save(image)
    request = GenerateRequest(prompt="a", image=image, last_image=image)
    assert plan(request, resolve("wan2.2-i2v")).last_image == image
    assert plan(request, resolve("wan2.2-5b")).known_frames == "timesteps"
    with pytest.raises(UsageError, match="cannot end with an image"):
        plan(request, resolve("wan2.1-i2v-480p"))


def test_memory_follows_from_the_parameters() -> None:
    checkpoint = resolve("hunyuan-video")
    # The hub stores these components as they are loaded: float32 for the VAE, 16 bits for the rest.
    assert checkpoint.weights_gb() == pytest.approx(checkpoint.download_gb, rel=0.01)
    assert checkpoint.weights_gb(offload=True) == pytest.approx(25.64, rel=0.01)
    assert resolve("fastwan2.1-14b").weights_gb() is None


def test_what_costs_more_memory_offloaded_than_whole_is_a_mistake() -> None:
    for checkpoint in map(resolve, names()):
        peak = checkpoint.peak
        assert peak.whole is None or peak.offload is None or peak.offload < peak.whole, checkpoint.name


def test_a_size_that_a_model_was_not_made_for_is_refused() -> None:
    checkpoint: Checkpoint = resolve("consisid")
    with pytest.raises(UsageError, match="A size of 832x480 is not legal"):
        plan(GenerateRequest(prompt="a", width=832), checkpoint)
