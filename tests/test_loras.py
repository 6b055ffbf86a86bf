"""LoRAs on tiny random models of the real classes: what they change, against stock diffusers and by hand."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline, LTX2Pipeline, WanPipeline
from safetensors.torch import load_file, save_file

from tests import tiny_cogvideox, tiny_lora, tiny_ltx_2, tiny_wan_image
from tests.hub_server import Hub, Repository
from tests.parity import TOLERANCE, difference, planned
from vgen import backbones, checkpoints, hub, loras
from vgen.backbones import lora as on_model
from vgen.errors import CheckpointError, UsageError, VgenError
from vgen.pipelines.text_to_video import generate
from vgen.plan import Plan, plan
from vgen.request import GenerateRequest
from vgen.runtime import choose, noise_generator

SIZE: dict[str, Any] = {"width": 48, "height": 32, "num_frames": 5, "num_inference_steps": 3}
PROMPT = "a red ball"


def loaded(made: Plan, dtype: str = "float32") -> Any:
    return backbones.load(made.checkpoint, choose("cpu", dtype))


def latents_of(folder: Path, *lora: str, **settings: Any) -> torch.Tensor:
    made = planned(folder, PROMPT, seed=7, lora=lora or None, **{**SIZE, **settings})
    return generate(made, loaded(made)).latents


def asked(*texts: str, two_transformers: bool = False) -> tuple[loras.Lora, ...]:
    return loras.asked(texts, two_transformers=two_transformers)


@pytest.fixture(scope="module")
def matrices(tiny_checkpoint: Path) -> Any:
    return cache(lambda seed, rank=4: tiny_lora.wan(tiny_checkpoint, seed=seed, rank=rank))


@pytest.fixture
def style(tmp_path: Path, matrices: Any) -> Path:
    return tiny_lora.save(tmp_path / "style.safetensors", matrices(1))


@pytest.mark.parametrize("layout", tiny_lora.LAYOUTS)
def test_every_layout_that_people_have_changes_the_weights_as_by_hand(
    layout: str, tiny_checkpoint: Path, tmp_path: Path, matrices: Any
) -> None:
    path = tiny_lora.save(tmp_path / "lora.safetensors", matrices(1), layout)
    made = planned(tiny_checkpoint, PROMPT, lora=(f"{path}:0.5",), **SIZE)
    backbone = loaded(made)
    weights = load_file(tiny_checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")
    found = backbone.transformer.state_dict()
    assert found.keys() == weights.keys()
    for layer in tiny_lora.layers_of(matrices(1)):
        weights[f"{layer}.weight"] += 0.5 * tiny_lora.change(matrices(1), layer, layout)
    if layout == "lightx2v":
        weights["blocks.0.attn1.to_q.bias"] += 0.5 * 0.25
    assert max(difference(found[key], weights[key]) for key in weights) <= 1e-6
    (told,) = backbone.checkpoint.loras
    num_layers = len(tiny_lora.layers_of(matrices(1)))
    left_out = ("diffusion_model.blocks.0.self_attn.norm_q.diff",) if layout == "lightx2v" else ()
    assert (told.matched, told.num_layers, told.unmatched) == (num_layers, num_layers + len(left_out), left_out)


@pytest.mark.parametrize("layout", ["diffusers", "comfyui", "lightx2v", "musubi"])
def test_latents_are_those_of_stock_diffusers_with_two_loras(
    layout: str, tiny_checkpoint: Path, tmp_path: Path, matrices: Any
) -> None:
    one = tiny_lora.save(tmp_path / "one.safetensors", matrices(1), layout)
    other = tiny_lora.save(tmp_path / "other.safetensors", matrices(2, 2), layout)
    latents = latents_of(tiny_checkpoint, f"{one}:0.75", f"{other}:-0.5", guidance_scale=4.0)
    pipeline = WanPipeline.from_pretrained(tiny_checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    for path in (one, other):
        options = {"weight_name": path.name, "adapter_name": path.stem, "low_cpu_mem_usage": False}
        pipeline.load_lora_weights(str(path.parent), **options)
    pipeline.set_adapters(["one", "other"], [0.75, -0.5])
    expected = pipeline(PROMPT, generator=noise_generator(7), output_type="latent", guidance_scale=4.0, **SIZE).frames
    assert difference(latents, expected) <= TOLERANCE
    assert difference(latents, latents_of(tiny_checkpoint, guidance_scale=4.0)) > 100 * TOLERANCE


def test_several_are_their_sum_and_none_of_a_scale_of_0_is_left(
    tiny_checkpoint: Path, tmp_path: Path, style: Path, matrices: Any
) -> None:
    other = tiny_lora.save(tmp_path / "other.safetensors", matrices(2, 2))
    made = planned(tiny_checkpoint, PROMPT, lora=(f"{style}:0.7", f"{other}:-0.3", f"{style}"), **SIZE)
    found = loaded(made).transformer.state_dict()
    weights = load_file(tiny_checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")
    for layer in tiny_lora.layers_of(matrices(1)):
        by_hand = 1.7 * tiny_lora.change(matrices(1), layer) - 0.3 * tiny_lora.change(matrices(2, 2), layer)
        assert difference(found[f"{layer}.weight"], weights[f"{layer}.weight"] + by_hand) <= 1e-6
    assert torch.equal(latents_of(tiny_checkpoint, f"{style}:0"), latents_of(tiny_checkpoint))


def test_weights_are_rounded_once_for_all_loras(
    tiny_checkpoint: Path, tmp_path: Path, style: Path, matrices: Any
) -> None:
    other = tiny_lora.save(tmp_path / "other.safetensors", matrices(2))
    made = planned(tiny_checkpoint, PROMPT, lora=(str(style), str(other)), **SIZE)
    weight = loaded(made, "bfloat16").transformer.blocks[0].attn1.to_q.weight
    before = loaded(planned(tiny_checkpoint, PROMPT, **SIZE), "bfloat16").transformer.blocks[0].attn1.to_q.weight
    layer = "blocks.0.attn1.to_q"
    exact = before.float() + sum(tiny_lora.change(matrices(seed), layer) for seed in (1, 2))
    # One unit in the last place, for the order of summation.
    assert ((weight.float() - exact).abs() <= exact.abs() * 2**-8 + 1e-7).all()
    assert (weight == exact.bfloat16()).float().mean() > 0.99
    assert weight.dtype == torch.bfloat16
    assert not torch.equal(weight, before)


def test_what_a_lora_was_saved_with_counts(tiny_checkpoint: Path, tmp_path: Path, matrices: Any) -> None:
    settings = {"transformer": {"r": 4, "lora_alpha": 12, "target_modules": ["to_q"]}}
    flat = {f"transformer.{key}": value for key, value in settings["transformer"].items()}
    tensors = {f"transformer.{key}": tensor for key, tensor in matrices(1).items() if "to_q" in key}
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path, {"format": "pt", "lora_adapter_metadata": json.dumps(flat)})
    found = loaded(planned(tiny_checkpoint, PROMPT, lora=(str(path),), **SIZE)).transformer.state_dict()
    weights = load_file(tiny_checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")
    layer = "blocks.1.attn2.to_q"
    expected = weights[f"{layer}.weight"] + 3 * tiny_lora.change(matrices(1), layer)
    assert difference(found[f"{layer}.weight"], expected) <= 1e-6


def test_each_of_two_transformers_has_its_own(tmp_path: Path, matrices: Any) -> None:
    folder = tiny_wan_image.build(tmp_path / "model", encoder=False, boundary=0.6)
    high = tiny_lora.save(tmp_path / "high.safetensors", matrices(1))
    low = tiny_lora.save(tmp_path / "low.safetensors", matrices(2))
    checkpoint = checkpoints.resolve(str(folder))
    plain = backbones.load(checkpoint, choose("cpu", "float32"))
    layer = "blocks.1.ffn.net.2"

    def changes(*texts: str) -> list[float]:
        with_loras = checkpoints.replace(checkpoint, loras=asked(*texts, two_transformers=True))
        backbone: Any = backbones.load(with_loras, choose("cpu", "float32"))
        found = []
        for part, seed in (("transformer", 1), ("transformer_2", 2)):
            weight = getattr(backbone, part).state_dict()[f"{layer}.weight"]
            before = getattr(plain, part).state_dict()[f"{layer}.weight"]
            found.append(difference(weight - before, tiny_lora.change(matrices(seed), layer)))
        return found

    assert max(changes(f"high={high}", f"low={low}")) <= 1e-6
    one, other = changes(f"both={high}")
    assert one <= 1e-6 < other
    with pytest.raises(UsageError, match="does not say which it is for") as caught:
        asked(str(high), two_transformers=True)
    assert f"--lora high={high}" in str(caught.value.tip)
    with pytest.raises(UsageError, match='"high=" says which of two transformers'):
        asked(f"high={high}")


def test_other_families_give_the_latents_of_stock_diffusers(tmp_path: Path) -> None:
    folder = tiny_cogvideox.build(tmp_path / "cogvideox")
    settings = {**SIZE, "num_frames": 9, "guidance_scale": 1.0}
    pipeline = CogVideoXPipeline.from_pretrained(folder)
    tensors = tiny_lora.matrices(pipeline.transformer, ("to_q", "to_v", "ff.net.2"))
    path = tiny_lora.save(tmp_path / "lora.safetensors", tensors)
    pipeline = CogVideoXPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="one")
    pipeline.set_adapters(["one"], [0.5])
    expected = pipeline(
        PROMPT,
        generator=noise_generator(7),
        output_type="latent",
        max_sequence_length=tiny_cogvideox.TEXT_LENGTH,
        **settings,
    ).frames.movedim(1, 2)
    latents = latents_of(folder, f"{path}:0.5", **settings)
    assert difference(latents, expected) <= TOLERANCE
    assert difference(latents, latents_of(folder, **settings)) > 100 * TOLERANCE


def test_connectors_are_changed_as_stock_diffusers_changes_them(tmp_path: Path) -> None:
    folder = tiny_ltx_2.build(tmp_path / "ltx-2")
    pipeline = LTX2Pipeline.from_pretrained(folder)
    transformer = tiny_lora.matrices(pipeline.transformer, ("attn1.to_q", "ff.net.2"))
    connectors = tiny_lora.matrices(pipeline.connectors, ("to_k",), rank=2)
    path = tmp_path / "lora.safetensors"
    tensors = {f"transformer.{key}": tensor for key, tensor in transformer.items()}
    save_file(tensors | {f"connectors.{key}": tensor for key, tensor in connectors.items()}, path)
    pipeline = LTX2Pipeline.from_pretrained(folder)
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="one")
    pipeline.fuse_lora(components=["transformer", "connectors"], adapter_names=["one"])
    pipeline.unload_lora_weights()
    made = planned(folder, "a red ball", lora=(str(path),), width=64, height=64, num_frames=9)
    backbone = loaded(made)
    for part in ("transformer", "connectors"):
        found, expected = getattr(backbone, part).state_dict(), getattr(pipeline, part).state_dict()
        assert found.keys() == expected.keys()
        assert max(difference(found[key], expected[key]) for key in found) <= 1e-6
    (told,) = backbone.checkpoint.loras
    assert told.matched == told.num_layers == len(tiny_lora.layers_of(transformer) + tiny_lora.layers_of(connectors))


def test_a_lora_of_another_model_is_refused_before_weights_are_loaded(
    tiny_checkpoint: Path, tmp_path: Path, matrices: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("vgen.backbones.wan.load_component", load)

    def refused(tensors: dict[str, torch.Tensor]) -> VgenError:
        path = tmp_path / "lora.safetensors"
        save_file(tensors, path)
        with pytest.raises(VgenError) as caught:
            loaded(planned(tiny_checkpoint, PROMPT, lora=(str(path),), **SIZE))
        return caught.value

    other = {f"transformer.{key.replace('blocks', 'layers')}": tensor for key, tensor in matrices(1).items()}
    error = refused(other)
    assert f'is for another model: of its 20 layers "{tiny_checkpoint}" has none' in error.message
    assert "The LoRA's are called like layers.0.attn1.to_k, the model's like blocks.0." in error.message
    wide = {key: torch.zeros(4, 40) if "lora_A" in key else torch.zeros(40, 4) for key in other}
    error = refused({key.replace("layers", "blocks"): tensor for key, tensor in wide.items()})
    assert "to_k changes 40 to 40, but that of" in error.message
    assert "has 24 to 24" in error.message
    half = {f"transformer.{key}": tensor for key, tensor in matrices(1).items()}
    del half["transformer.blocks.0.attn1.to_q.lora_B.weight"]
    assert "is incomplete: blocks.0.attn1.to_q has one of two matrices" in refused(half).message
    alone = {"diffusion_model.blocks.0.self_attn.q.lora_down.weight": torch.zeros(4, 24), "something": torch.zeros(1)}
    assert "diffusers cannot read the LoRA" in refused(alone).message


def test_layers_that_the_model_lacks_are_told(tiny_checkpoint: Path, tmp_path: Path, matrices: Any) -> None:
    tensors = {f"transformer.{key}": tensor for key, tensor in matrices(1).items()}
    for i in range(4):
        tensors |= {
            f"transformer.blocks.{i + 2}.attn1.to_q.lora_A.weight": torch.zeros(4, 24),
            f"transformer.blocks.{i + 2}.attn1.to_q.lora_B.weight": torch.zeros(24, 4),
        }
    path = tmp_path / "deep.safetensors"
    save_file(tensors, path)
    made = planned(tiny_checkpoint, PROMPT, lora=(str(path),), **SIZE)
    (told,) = loaded(made).checkpoint.loras
    lacking = "blocks.2.attn1.to_q, blocks.3.attn1.to_q, blocks.4.attn1.to_q"
    assert told.report() == f"LoRA deep.safetensors: 20 of 24 layers matched; unmatched: {lacking} and 1 more."
    # The others are there all the same.
    assert torch.equal(
        latents_of(tiny_checkpoint, str(path)),
        latents_of(tiny_checkpoint, str(tiny_lora.save(tmp_path / "style.safetensors", matrices(1)))),
    )


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{file}", ("", 1.0)),
        ("{file}:0.8", ("", 0.8)),
        ("{file}:-1", ("", -1.0)),
        ("{folder}:2e-1", ("", 0.2)),
        ("{folder}", ("", 1.0)),
    ],
)
def test_a_file_or_a_folder_and_its_scale(text: str, parts: tuple[str, float], style: Path) -> None:
    (lora,) = asked(text.format(file=style, folder=style.parent))
    assert (lora.local, lora.scale, lora.component, lora.repo) == (style, parts[1], "transformer", None)
    anchored = loras.anchored(text.format(file=style, folder=style.parent))
    (again,) = asked(anchored)
    assert (again.local, again.scale) == (style, parts[1])


def test_hub_ids_are_read_and_not_asked_for() -> None:
    high, low = asked("high=someone/loras/a/b.safetensors@v1:0.5", "low=someone/loras", two_transformers=True)
    assert (high.repo, high.file, high.revision, high.scale) == ("someone/loras", "a/b.safetensors", "v1", 0.5)
    assert (low.repo, low.file, low.revision, low.component) == ("someone/loras", "", None, "transformer_2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{file}:strong", 'The scale "strong" of the LoRA'),
        ("{file}:", 'The scale "" of the LoRA'),
        ("{file}:nan", 'The scale "nan" of the LoRA'),
        ("", "names no LoRA"),
        (":0.5", "names no LoRA"),
        ("nowhere.safetensors", 'There is no LoRA "nowhere.safetensors"'),
        ("nowhere/style.safetensors", 'There is no LoRA "nowhere/style.safetensors"'),
        ("/nowhere/at/all.safetensors", "There is no LoRA"),
        ("~nobody-of-this-name/style.safetensors", "There is no LoRA"),
        ("someone/loras/style.zip", "is no safetensors file"),
        ("a\0b", "There is no LoRA"),
        ("x" * 5000, "There is no LoRA"),
    ],
)
def test_what_names_no_lora_is_a_usage_error(text: str, message: str, style: Path) -> None:
    with pytest.raises(UsageError) as caught:
        asked(text.format(file=style))
    assert message in caught.value.message
    assert caught.value.tip


def test_what_is_no_lora_in_safetensors_is_refused(tiny_checkpoint: Path, style: Path, tmp_path: Path) -> None:
    def refused(path: Path | str) -> str:
        with pytest.raises(VgenError) as caught:
            asked(str(path))
        return str(caught.value)

    weights = tiny_checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    assert "is no LoRA: its tensors have names like" in refused(weights)
    (tmp_path / "lora.bin").write_bytes(b"pickle")
    assert "can run whatever code" in refused(tmp_path / "lora.bin")
    assert "can run whatever code" in refused("someone/loras/lora.pt")
    (tmp_path / "only").mkdir()
    assert "has no LoRA: no file ends in .safetensors" in refused(tmp_path / "only")
    (tmp_path / "only" / "lora.ckpt").write_bytes(b"pickle")
    assert "can run whatever code" in refused(tmp_path / "only")
    half = tmp_path / "half.safetensors"
    half.write_bytes(style.read_bytes()[:-10])
    assert "are expected" in refused(half)
    assert "has 2 files in safetensors" in refused(tmp_path)
    save_file({"transformer.blocks.0.lora_A.weight": torch.zeros(1), "a.dora_scale": torch.zeros(1)}, half)
    assert "is a DoRA" in refused(half)
    shutil.copy(style, tmp_path / "pytorch_lora_weights.safetensors")
    (lora,) = asked(str(tmp_path))
    assert lora.local == tmp_path / "pytorch_lora_weights.safetensors"


def test_a_family_that_diffusers_reads_no_loras_for_takes_none(style: Path) -> None:
    with pytest.raises(UsageError, match=r'The model "hunyuan-video-1\.5" takes no LoRAs'):
        plan(GenerateRequest(prompt="a", lora=(str(style),)), checkpoints.resolve("hunyuan-video-1.5"))
    families = {name for name in backbones.FAMILIES if name != "hunyuan-video-1.5"}
    assert on_model.LOADERS.keys() == families


def test_a_lora_of_the_hub_is_locked_and_anchored(
    online: Hub, tiny_checkpoint: Path, style: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {"loras/style.safetensors": style.read_bytes(), "README.md": b"a card"}
    online.repositories["someone/loras"] = Repository({"main": content})
    commit = online.repositories["someone/loras"].commit("main")
    made = planned(tiny_checkpoint, PROMPT, seed=7, lora=("someone/loras:0.5",), **SIZE)
    assert online.paths() == []
    backbone = loaded(made)
    (told,) = backbone.checkpoint.loras
    assert (told.file, told.revision, told.sha256) == ("loras/style.safetensors", commit, loras.identify(told).sha256)
    assert torch.equal(generate(made, backbone).latents, latents_of(tiny_checkpoint, f"{style}:0.5"))
    online.asked.clear()
    named = f"someone/loras/{told.file}"
    assert loras.anchored(f"{named}:0.5") == f"{named}@{commit}:0.5"
    for text in (f"{named}:0.5", f"{named}@{commit}:0.5"):
        loaded(planned(tiny_checkpoint, PROMPT, lora=(text,), **SIZE))
    assert online.asked == []
    # What was pulled once is what the name means, whatever there is later.
    online.repositories["someone/loras"].revisions |= {"old": content, "main": {**content, "none.safetensors": b""}}
    with pytest.raises(CheckpointError, match=r'"someone/loras" has no file none\.safetensors'):
        loaded(planned(tiny_checkpoint, PROMPT, lora=("someone/loras/none.safetensors",), **SIZE))
    assert told.path is not None
    told.path.resolve().write_bytes(style.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"style\.safetensors has \d+ bytes, but \d+ are expected"):
        loaded(planned(tiny_checkpoint, PROMPT, lora=(named,), **SIZE))
    assert hub.lock("someone/loras") is not None


def test_several_files_of_the_hub_have_to_be_told_apart(online: Hub, tiny_checkpoint: Path, style: Path) -> None:
    content = {"a.safetensors": style.read_bytes(), "b.safetensors": style.read_bytes()}
    online.repositories["someone/loras"] = Repository({"main": content})
    with pytest.raises(UsageError, match="has 2 files in safetensors") as caught:
        loaded(planned(tiny_checkpoint, PROMPT, lora=("someone/loras",), **SIZE))
    assert "someone/loras/a.safetensors" in str(caught.value.tip)
