"""Every entry of checkpoints.yaml is complete, agrees with its family, and asks for nothing that its rules forbid."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from vgen import checkpoints
from vgen.checkpoints import Checkpoint, names, resolve
from vgen.errors import UsageError
from vgen.request import GenerateRequest, plan

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
    needs_image = checkpoint.can.image_to_video and not checkpoint.can.text_to_video
    defaults = GenerateRequest(prompt="a", model=name, image=image if needs_image else None)
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


def test_pipelines_belong_to_one_family_and_are_diffusers_own() -> None:
    families = checkpoints._catalogue()["families"]
    pipelines = [name for family in families.values() for name in family["pipelines"]]
    assert len(pipelines) == len(set(pipelines))
    exported = (Path(pytest.importorskip("diffusers").__file__).parent / "__init__.py").read_text()
    assert [name for name in pipelines if f'"{name}"' not in exported] == ["WanDMDPipeline"]


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
