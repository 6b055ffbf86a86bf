"""`vgen quantize` as a whole, with tiny checkpoints of the real classes, and the exports that it writes."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from tests import tiny_lora, tiny_ltx_video
from vgen import backbones, checkpoints, cli, manifest, runtime
from vgen.errors import CheckpointError, UsageError, VgenError
from vgen.pipelines import quantize as pipeline
from vgen.pipelines import quantize_report, text_to_video
from vgen.pipelines.run import Watch
from vgen.plan import plan as plan_video
from vgen.quantization import calibration, export, kernels, layers, page, precision
from vgen.quantization import plan as quantizing
from vgen.quantization.layers import CROSS, FEED_FORWARD, SELF, Layer
from vgen.quantization.linear import QuantizedLinear
from vgen.quantization.plan import QuantizePlan
from vgen.quantization.request import QuantizeRequest
from vgen.request import GenerateRequest
from vgen.toyland.prompts import held_out

SIZE: dict[str, Any] = {"width": 64, "height": 32, "num_frames": 9, "num_inference_steps": 2}  # of every video here


@pytest.fixture(scope="module")
def tiny_ltx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_ltx_video.build(tmp_path_factory.mktemp("checkpoints") / "tiny-ltx")


@pytest.fixture(scope="module", autouse=True)
def small_videos() -> Iterator[None]:
    """Make the family's defaults small: nothing here depends on the size of a video."""
    described = checkpoints._described

    def small(*args: Any, **options: Any) -> checkpoints.Checkpoint:
        found = described(*args, **options)
        return found if found.quantization else replace(found, defaults=replace(found.defaults, **SIZE))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoints, "_described", small)
        yield


def asked(model: Path, scheme: str, output: Path, **options: Any) -> QuantizeRequest:
    given: dict[str, Any] = {"samples": 1, "steps": 2, "compare": 1, "device": "cpu", "dtype": "bfloat16"}
    return QuantizeRequest(model=str(model), scheme=scheme, output=output, **(given | options))


def planned(model: Path, scheme: str, output: Path, **options: Any) -> QuantizePlan:
    return quantizing.plan(asked(model, scheme, output, **options), checkpoints.resolve(str(model)))


def quantized(model: Path, scheme: str, output: Path, **options: Any) -> dict[str, Any]:
    return pipeline.quantize(planned(model, scheme, output, **options), watch=Watch())


def run(*command: object) -> Result:
    return CliRunner().invoke(cli.app, [str(word) for word in command])


def latents(backbone: Any, model: Path) -> torch.Tensor:
    checkpoint = checkpoints.resolve(str(model))
    made = plan_video(GenerateRequest(prompt="a red ball", model=str(model), seed=3, **SIZE), checkpoint)
    return text_to_video.generate(made, backbone).latents


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an export of the tiny checkpoint. Do not write to it."""
    folder = tmp_path_factory.mktemp("exports") / "w4a8"
    command = ["quantize", tiny_checkpoint, "--scheme", "w4a8:group=8", "-o", folder, "--device", "cpu"]
    result = run(*command, "--samples", 1, "--steps", 2, "--compare", 0, "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    return folder


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8:group=8", "w4a8-mp:bits=5,group=0", "w8a16", "w4a16:group=8"])
@pytest.mark.parametrize("family", ["wan", "ltx-video"])
def test_an_export_gives_the_very_video_of_the_model_in_memory(
    family: str, scheme: str, tiny_checkpoint: Path, tiny_ltx: Path, tmp_path: Path
) -> None:
    model = tiny_checkpoint if family == "wan" else tiny_ltx
    plan = planned(model, scheme, tmp_path / "export", compare=0)
    backbone = backbones.load(plan.checkpoint, runtime.choose("cpu", "bfloat16"))
    original = latents(backbone, model)
    statistics = pipeline.calibrate(backbone, plan, Watch())
    formats, _ = pipeline.quantize_layers(backbone, plan, statistics, Watch())
    expected = latents(backbone, model)
    assert not torch.equal(expected, original)
    export.write(tmp_path / "export", backbone, formats, scheme=scheme, plan={}, readme="")

    checkpoint = checkpoints.resolve(str(tmp_path / "export"))
    loaded = backbones.load(checkpoint, runtime.choose("cpu", "bfloat16"))
    assert torch.equal(latents(loaded, model), expected)
    for name, tensor in backbone.transformer.state_dict().items():  # type: ignore[attr-defined]
        found = loaded.transformer.state_dict()[name]  # type: ignore[attr-defined]
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), name
    for name, buffer in backbone.transformer.named_buffers():  # type: ignore[attr-defined]
        assert loaded.transformer.get_buffer(name).dtype == buffer.dtype, name  # type: ignore[attr-defined]


def test_quantizing_writes_a_checkpoint_that_every_command_takes(exported: Path, tmp_path: Path) -> None:
    video = tmp_path / "clip.mp4"
    sizes = ["--width", 64, "--height", 32, "--frames", 9, "--steps", 2, "--seed", 1, "--device", "cpu"]
    made = run("generate", "a red ball", "--model", exported, "-o", video, *sizes)
    assert made.exit_code == 0, made.output
    told = manifest.read(video)
    assert told["quantization"] == {"scheme": "w4a8:group=8", "arithmetic": kernels.name("cpu")}
    described = json.loads(run("info", exported, "--format", "json").stdout)
    assert described["quantization"] == "w4a8:group=8" and described["family"] == "wan"
    assert described["defaults"]["width"] == 64
    assert "whole: sizes and hashes match" in run("models", "verify", exported, "--full").stdout

    card = json.loads((exported / "vgen.json").read_text())
    assert card["format"] == 1 and {"torch", "diffusers"} <= card["versions"].keys()
    assert any(file["path"] == "transformer/config.json" and file["sha256"] for file in card["parent"]["files"])
    assert {file["path"] for file in card["files"]} >= {"quantization.json", f"transformer/{export.WEIGHTS}"}
    told = json.loads((exported / "quantization.json").read_text())
    assert {layer["weight_bits"] for layer in told["layers"]} == {4} and len(told["layers"]) == 20
    assert "condition_embedder.time_proj" in " ".join(told["kept"])
    assert "w4a8:group=8" in (exported / "README.md").read_text()


def test_stock_diffusers_refuses_by_its_method_what_it_has_no_place_for(exported: Path) -> None:
    from diffusers import WanTransformer3DModel

    with pytest.raises(ValueError, match="Unknown quantization type, got vgen"):
        WanTransformer3DModel.from_pretrained(exported / "transformer")
    # It is the same where vgen has loaded the folder before.
    backbones.load(checkpoints.resolve(str(exported)), runtime.choose("cpu", "bfloat16"))
    with pytest.raises(ValueError, match="Unknown quantization type, got vgen"):
        WanTransformer3DModel.from_pretrained(exported / "transformer")


@pytest.fixture(scope="module")
def in_shards(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an export as w8a8, in several files as a large model is. Do not write to it."""
    folder = tmp_path_factory.mktemp("exports") / "w8a8"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(export, "SHARD", 30_000)
        quantized(tiny_checkpoint, "w8a8", folder, compare=0)
    return folder


def test_int8_layers_are_stored_as_torchao_stores_them(in_shards: Path, tiny_checkpoint: Path) -> None:
    files = sorted((in_shards / "transformer").glob("*.safetensors"))
    assert len(files) > 1
    stored: dict[str, torch.Tensor] = {}
    for file in files:
        stored |= load_file(file)
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata()
        layer = json.loads(header["blocks.0.ffn.net.2.weight"])
        assert layer["_type"] == "Int8Tensor" and layer["_data"]["block_size"] == [1, 48]
        assert layer["_data"]["act_quant_kwargs"]["_data"]["mapping_type"]["_data"] == "SYMMETRIC"
        assert json.loads(header["proj_out.weight"]) == {"_type": "Tensor"}
    config = json.loads((in_shards / "transformer" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "torchao"
    assert config["quant_type"]["default"]["_type"] == "Int8DynamicActivationInt8WeightConfig"

    checkpoint = checkpoints.resolve(str(in_shards))
    checkpoints.verify(checkpoint, full=True)
    layer = backbones.load(checkpoint, runtime.choose("cpu", "bfloat16")).blocks()[0].attn1.to_q
    assert isinstance(layer, QuantizedLinear)
    assert torch.equal(stored["blocks.0.attn1.to_q._weight_qdata"], layer.weight)
    assert torch.equal(stored["blocks.0.attn1.to_q._weight_scale"], layer.scale[:, None])
    with pytest.raises(UsageError, match="is quantized already, by vgen as w8a8"):
        planned(in_shards, "w8a8", in_shards.with_name("again"))


def test_stock_diffusers_loads_int8_layers_with_torchao(in_shards: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(in_shards, torch_dtype=torch.bfloat16)
    backbone = backbones.load(checkpoints.resolve(str(in_shards)), runtime.choose("cpu", "bfloat16"))
    ours = backbone.transformer.state_dict()  # type: ignore[attr-defined]
    theirs = pipeline.transformer.state_dict()
    layers_of_8_bits = [name for name, tensor in theirs.items() if isinstance(tensor, quantization.Int8Tensor)]
    assert len(layers_of_8_bits) == 20
    for name, tensor in theirs.items():
        found = tensor.qdata if name in layers_of_8_bits else tensor
        assert found.dtype == ours[name].dtype and torch.equal(found, ours[name]), name
    x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.inference_mode():
        expected, found = (block.attn1.to_q(x) for block in (backbone.blocks()[0], pipeline.transformer.blocks[0]))
    # torchao quantizes and rescales in bfloat16, vgen in float32.
    assert torch.allclose(found, expected, atol=0.02 * float(expected.abs().max()))


def test_what_was_damaged_or_is_newer_is_refused(exported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "export")
    weights = folder / "transformer" / export.WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    result = run("generate", "a red ball", "--model", folder, "-o", tmp_path / "clip.mp4")
    assert result.exit_code == 1 and "is damaged: its sha256 is not" in result.stderr
    assert not (tmp_path / "clip.mp4").exists()

    card = json.loads((folder / "vgen.json").read_text())
    (folder / "vgen.json").write_text(json.dumps({**card, "format": 2, "vgen": "9.0"}))
    with pytest.raises(CheckpointError, match=r"written by a newer vgen \(9.0\): its format is 2") as caught:
        checkpoints.resolve(str(folder))
    assert caught.value.tip == "update vgen."
    del card["rules"]
    (folder / "vgen.json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match=r"vgen.json is damaged: KeyError\('rules'\)"):
        checkpoints.resolve(str(folder))


def test_the_report_tells_what_was_lost_and_is_one_page(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    report = quantized(tiny_checkpoint, "w4a8-mp:bits=5,group=0", folder)
    assert json.loads((folder / "report.json").read_text()) == report
    weights = export.integrity.tensors(folder / "transformer" / export.WEIGHTS, tip="")
    stored = sum(
        tensor.num_bytes
        for name, tensor in weights.items()
        if name.startswith("blocks.") and name.rpartition(".")[2] in ("weight", "scale", "multipliers", "balancing")
        and name.rpartition(".")[0] + ".scale" in weights
    )  # fmt: skip
    assert report["bytes"]["layers_after"] == stored
    bits = {layer["path"]: layer["weight_bits"] for layer in report["layers"]}
    assert set(bits.values()) == {4, 8}
    num_weights = {layer["path"]: layer["inputs"] * layer["outputs"] for layer in report["layers"]}
    assert sum(bits[path] * num_weights[path] for path in bits) / sum(num_weights.values()) == pytest.approx(5, 0.05)
    assert set(report["groups"]) == {SELF, CROSS, FEED_FORWARD}
    assert all(0 < page.worst_error(layer) < 0.1 for layer in report["layers"])  # type: ignore[operator]
    (video,) = report["comparison"]["videos"]
    assert 15 < video["psnr"] < 100 and video["denoise_seconds"]["after"] > 0
    html = (folder / "report.html").read_text()
    assert html.count("<g><title>") == 20 and html.count("data:image/jpeg;base64,") == 2
    assert "http://" not in html and "https://" not in html and "<script" not in html


def test_the_scores_of_both_models_are_reported_and_limited(tiny_expanded: Path, tmp_path: Path) -> None:
    checkpoint = replace(checkpoints.resolve(str(tiny_expanded)), knows="Toyland.")
    plan = quantizing.plan(
        asked(tiny_expanded, "w8a8", tmp_path / "export", compare=2, max_loss="score=0,psnr=99"), checkpoint
    )
    assert [video.prompt for video in plan.comparison] == [prompt.text for prompt in held_out()[:2]]
    with pytest.raises(VgenError, match=r"was not written: its PSNR is .* dB, and 99 was asked for"):
        pipeline.quantize(plan, watch=Watch())
    assert not (tmp_path / "export").exists()
    report = json.loads((tmp_path / "export.report.json").read_text())
    assert report["score"]["prompts"] == 2 and 0 <= report["score"]["after"]["joint"] <= 1
    assert "Toyland&#x27;s score" in (tmp_path / "export.report.html").read_text().replace("'", "&#x27;")
    worse = {"score": {"before": {"joint": 0.9}, "after": {"joint": 0.85}}}
    assert quantize_report.exceeded({"score": 2}, worse) == [
        "it loses 5.0 points of the joint score, and 2 were allowed"
    ]
    assert quantize_report.exceeded({"score": 6}, worse) == []


def test_loras_are_quantized_with_the_weights_that_they_change(tiny_checkpoint: Path, tmp_path: Path) -> None:
    style = tiny_lora.save(tmp_path / "style.safetensors", tiny_lora.wan(tiny_checkpoint))
    command = ["quantize", tiny_checkpoint, "--scheme", "w8a8", "--samples", 1, "--steps", 2, "--compare", 0]
    for name, options in (("plain", []), ("style", ["--lora", f"{style}:0.5"])):
        result = run(*command, "-o", tmp_path / name, "--device", "cpu", "--dtype", "bfloat16", *options)
        assert result.exit_code == 0, result.output

    def weight(checkpoint: checkpoints.Checkpoint) -> torch.Tensor:
        backbone = backbones.load(checkpoint, runtime.choose("cpu", "bfloat16"))
        layer = backbone.transformer.blocks[0].attn1.to_q  # type: ignore[attr-defined]
        quantized = isinstance(layer, QuantizedLinear)
        made: torch.Tensor = layer.products() * layer.scale[:, None] if quantized else layer.weight.detach()
        return made.float()

    asked_for = GenerateRequest(prompt="a red ball", model=str(tiny_checkpoint), lora=(f"{style}:0.5",))
    merged = weight(plan_video(asked_for, checkpoints.resolve(str(tiny_checkpoint))).checkpoint)
    found, plain = (weight(checkpoints.resolve(str(tmp_path / name))) for name in ("style", "plain"))
    assert (found - merged).abs().max() < merged.abs().max() / 250 < (plain - merged).abs().max()
    (told,) = json.loads((tmp_path / "style" / "report.json").read_text())["parent"]["loras"]
    assert told["scale"] == 0.5 and told["sha256"]
    again = run("generate", "a red ball", "--model", tmp_path / "style", "--lora", style, "--dry-run")
    assert again.exit_code == 2 and "--lora" in again.stderr


def test_a_dry_run_says_sizes_and_work_and_writes_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    command = ["quantize", tiny_checkpoint, "--scheme", "w4a8:group=8", "-o", tmp_path / "x", "--dry-run"]
    result = run(*command, "--format", "json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["layers"] == 20 and told["seconds_at_least"] >= 0
    # Eight videos of 10 steps, four compared of 2 before and after, with two branches each.
    assert told["evaluations"] == 2 * (8 * 10 + 2 * 4 * 2)
    assert told["bytes"]["after"] < told["bytes"]["before"]
    assert "20 linear layers" in run(*command).stdout
    assert not (tmp_path / "x").exists()


def whole(folder: Path) -> dict[str, bytes]:
    """Return what an export computes, by file."""
    names = ("transformer/config.json", f"transformer/{export.WEIGHTS}", "quantization.json")
    return {name: (folder / name).read_bytes() for name in names}


def test_weights_on_the_disk_give_the_same_export(tiny_checkpoint: Path, tiny_ltx: Path, tmp_path: Path) -> None:
    for model in (tiny_checkpoint, tiny_ltx):
        exports = [tmp_path / f"{model.name}-{stream}" for stream in (False, True)]
        for folder, stream in zip(exports, (False, True), strict=True):
            quantized(model, "w4a8-mp:bits=6,group=8", folder, stream=stream, compare=0)
        assert whole(exports[0]) == whole(exports[1])
    plan = planned(tiny_checkpoint, "w4a8:group=8", tmp_path / "export", stream=True)
    backbone = backbones.load(plan.checkpoint, runtime.choose("cpu", "bfloat16"))
    held = backbone.transformer.state_dict()  # type: ignore[attr-defined]
    assert "blocks.0.ffn.net.2.bias" in held and not any(f"{layer.name}.weight" in held for layer in plan.layers)
    assert held["blocks.0.norm2.weight"].dtype == torch.float32
    expected = backbones.load(checkpoints.resolve(str(tiny_checkpoint)), runtime.choose("cpu", "bfloat16"))
    assert torch.equal(latents(backbone, tiny_checkpoint), latents(expected, tiny_checkpoint))


def test_weights_stay_on_the_disk_where_they_do_not_fit(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not planned(tiny_checkpoint, "w8a8", tmp_path / "export").checkpoint.streamed
    monkeypatch.setattr(runtime, "memory", lambda device: runtime.Memory(device=device, total=10**6, free=10**4))
    assert planned(tiny_checkpoint, "w8a8", tmp_path / "export").checkpoint.streamed
    assert not planned(tiny_checkpoint, "w8a8", tmp_path / "export", stream=False).checkpoint.streamed
    told = run("quantize", tiny_checkpoint, "--scheme", "w8a8", "-o", tmp_path / "export", "--dry-run")
    assert "weights stay on the disk" in told.stdout


def test_a_run_that_is_stopped_goes_on_wherever_it_was(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"scheme": "w4a8-mp:bits=6,group=8", "samples": 2, "compare": 1}
    quantized(tiny_checkpoint, output=tmp_path / "whole", **options)
    made: list[str] = []

    def stopping(name: str, call: Any, at: int) -> Any:
        def maybe(*args: Any, **given: Any) -> Any:
            if len(made) == at:
                raise KeyboardInterrupt
            made.append(name)
            return call(*args, **given)

        return maybe

    generate, quantize_layer, card = text_to_video.generate, precision.quantize_layer, export.write_card
    # In the second video, after 2 layers of 20 (each is tried with two numbers of bits before, and in its group), in
    # the video after, while the export is written, and then not at all.
    for at, kept in ((1, 0), (0, 0), (3 + 60 + 2, 2), (18, 20), (1, 20), (99, 20)):
        made.clear()
        with monkeypatch.context() as patched:
            patched.setattr(text_to_video, "generate", stopping("video", generate, at))
            patched.setattr(precision, "quantize_layer", stopping("layer", quantize_layer, at))
            patched.setattr(export, "write_card", stopping("card", card, at))
            if at != 99:
                with pytest.raises(KeyboardInterrupt, match="the same command goes on there"):
                    quantized(tiny_checkpoint, output=tmp_path / "export", **options)
                assert {path.name for path in tmp_path.iterdir()} == {"whole", "export.unfinished"}
                assert len(list((tmp_path / "export.unfinished" / "layers").iterdir())) == kept
                with pytest.raises(VgenError, match=r"export.unfinished is what another run has left"):
                    quantized(tiny_checkpoint, output=tmp_path / "export", **(options | {"scheme": "w8a8"}))
            else:
                quantized(tiny_checkpoint, output=tmp_path / "export", **options)
    assert made == ["card"]
    assert whole(tmp_path / "export") == whole(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "export"}


def test_a_run_that_lost_too_much_is_not_done_twice(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched, pytest.raises(TypeError):
        patched.setattr(backbones, "load", None)
        quantized(tiny_checkpoint, "w8a8", tmp_path / "export")
    assert list(tmp_path.iterdir()) == []  # nothing was done, nothing is left
    with pytest.raises(VgenError, match="was not written") as caught:
        quantized(tiny_checkpoint, "w8a8", tmp_path / "export", max_loss="psnr=99")
    assert "for which nothing is done twice" in (caught.value.tip or "")
    monkeypatch.setattr(text_to_video, "generate", None)
    quantized(tiny_checkpoint, "w8a8", tmp_path / "export", max_loss="psnr=5")
    assert (tmp_path / "export" / "vgen.json").exists() and not (tmp_path / "export.unfinished").exists()


def test_a_disk_that_fills_up_is_told_and_loses_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(path.stat().st_size for path in (tiny_checkpoint / "vae").iterdir())
    plan = planned(tiny_checkpoint, "w8a8", tmp_path / "export", compare=0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, limits[1]))
    try:
        with pytest.raises(VgenError, match=r"Could not write .*export"):
            pipeline.quantize(plan, watch=Watch())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["export.unfinished"]
    pipeline.quantize(plan, watch=Watch())
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_wrong_requests_are_refused_before_a_model_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **options: Any) -> Any:
        raise AssertionError("a model was asked for")

    monkeypatch.setattr(checkpoints, "fetch", never)
    for options, said in (
        (("-o", tmp_path), "exists already"),
        (("-o", tmp_path / "q", "--samples", 0), "0 samples are not possible"),
        (("-o", tmp_path / "q", "--max-loss", "nix=3"), 'There is no loss "nix"'),
        (("-o", tmp_path / "q", "--calibration", "none.txt"), "Cannot read the prompts"),
    ):
        result = run("quantize", "wan2.1-1.3b", "--scheme", "w8a8", *options)
        assert result.exit_code in (1, 2) and said in result.stderr
    result = run("quantize", "fastwan2.1-1.3b", "--scheme", "w8a8", "-o", tmp_path / "q")
    assert result.exit_code == 1 and "cannot run it yet" in result.stderr


def test_wrong_requests_are_refused_before_a_model_is_loaded(
    tiny_checkpoint: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **options: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(backbones, "load", never)
    output = tmp_path / "export"

    def refused(said: str, model: Path = tiny_checkpoint, scheme: str = "w8a8", **options: Any) -> None:
        with pytest.raises(VgenError, match=said):
            planned(model, scheme, output, **options)

    refused('There is no scheme "w8a9"', scheme="w8a9")
    refused("Groups of 64 do not divide the 24 inputs of transformer.blocks.0.attn1.to_k", scheme="w4a8")
    refused("is quantized already, by vgen as w4a8:group=8", model=exported)
    refused("0 samples are not possible", samples=0)
    refused("261 videos cannot be compared", compare=261)
    refused('There is no loss "pnsr". Did you mean "psnr"?', max_loss="pnsr=3")
    refused('"much" is no limit for score', max_loss="much")
    refused('"nan" is no limit for psnr', max_loss="psnr=nan")
    refused('"90" is no limit for ssim', max_loss="ssim=90")
    refused('"-1" is no limit for score', max_loss="-1")
    refused("has no score: it does not know Toyland", max_loss="2")
    refused("LoRAs are merged into weights in memory", lora=("x",), stream=True)
    refused("--max-loss needs videos", max_loss="psnr=30", compare=0)
    refused("Cannot read the prompts", calibration=tmp_path / "none.txt")
    refused("Cannot read the prompts", calibration=tmp_path)
    (tmp_path / "binary.txt").write_bytes(bytes(range(128, 256)))
    refused(r"binary.txt, line 1: The line is not UTF-8 text", calibration=tmp_path / "binary.txt")
    (tmp_path / "empty.txt").write_text("\n\n")
    refused("holds no prompts", calibration=tmp_path / "empty.txt")
    with pytest.raises(UsageError, match="use group=8, or group=0") as caught:
        layers.check_divides(planned(tiny_checkpoint, "w8a8", output).layers, planned_format())
    assert caught.value.exit_code == 2

    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**5))
        refused("The export takes .* and .* has 100.0 kB left")
    output.mkdir()
    refused("exists already")
    refused("exists already", force=True)  # It is no export.

    foreign = shutil.copytree(tiny_checkpoint, tmp_path / "foreign")
    config = json.loads((foreign / "transformer" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "torchao"}
    (foreign / "transformer" / "config.json").write_text(json.dumps(config))
    refused("is quantized already, by torchao", model=foreign)


def planned_format() -> layers.LayerFormat:
    return layers.LayerFormat(weight_bits=4, group=64)


def test_calibration_keeps_ranges_and_branches_apart(tiny_checkpoint: Path, tmp_path: Path) -> None:
    plan = planned(tiny_checkpoint, "w4a8:group=8", tmp_path / "export", samples=2, steps=6)
    backbone = backbones.load(plan.checkpoint, runtime.choose("cpu", "float32"))
    statistics = pipeline.calibrate(backbone, plan, Watch())
    assert statistics.num_evaluations == 2 * 6 * 2
    layer = next(layer for layer in plan.layers if layer.name == "blocks.1.attn1.to_q")
    maxima = statistics.maxima[layer.path]
    seen = maxima.amax(-1) > 0
    assert maxima.shape == (calibration.RANGES, 2, 24) and seen[0].all()
    assert not torch.equal(maxima[0, 0], maxima[0, 1])
    kept = [tokens for seen in statistics.tokens.values() for tokens in seen.values()]
    assert all(tokens.untyped_storage().nbytes() == tokens.nbytes for tokens in kept)
    sample = statistics.tokens[layer.path][0, 0]
    num_seen = int(statistics.num_seen[layer.path][0, 0])
    assert len(sample) == min(num_seen, calibration.TOKENS)
    to_check = statistics.tokens_to_check(layer)
    to_round_by = statistics.tokens_to_round_by(layer)
    assert to_round_by is not None
    assert len(to_round_by) + sum(map(len, to_check.values())) == sum(map(len, statistics.tokens[layer.path].values()))
    assert set(statistics.calls) == {(int(where), int(branch)) for where, branch in seen.nonzero()}
    # The maxima are those of plain hooks, over everything that runs.
    plain = torch.zeros(24)

    def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        plain.copy_(torch.maximum(plain, inputs[0].abs().flatten(0, -2).amax(0)))

    handle = layers.linear(backbone, layer).register_forward_pre_hook(hook)
    for video in plan.calibration:
        text_to_video.generate(video, backbone)
    handle.remove()
    assert torch.equal(statistics.act_max(layer), plain)
    assert not any(module._forward_pre_hooks for module in backbone.transformer.modules())  # type: ignore[attr-defined]


def test_every_layer_that_is_named_is_one_of_the_model(tiny_checkpoint: Path, tiny_ltx: Path) -> None:
    for model in (tiny_checkpoint, tiny_ltx):
        checkpoint = checkpoints.resolve(str(model))
        backbone = backbones.load(checkpoint, runtime.choose("cpu", "float32"))
        found = layers.of(checkpoint)
        linears = {
            f"transformer.{name}"
            for name, module in backbone.transformer.named_modules()  # type: ignore[attr-defined]
            if isinstance(module, torch.nn.Linear)
        }
        assert {layer.path for layer in found} >= linears
        blocks = [layer for layer in found if layer.role]
        assert {layer.role for layer in blocks} == {SELF, CROSS, FEED_FORWARD}
        assert {layer.path for layer in blocks} == {path for path in linears if "blocks." in path}
        for layer in blocks:
            assert layers.linear(backbone, layer).in_features == layer.in_features


def test_bits_go_to_the_neediest_of_each_group_within_the_budget() -> None:
    def layer(name: str, role: str, size: int = 10) -> Layer:
        return Layer(component="transformer", name=name, role=role, in_features=size, out_features=10)

    one, two, three, four = (layer(f"{i}", role) for i, role in enumerate((SELF, SELF, CROSS, CROSS)))
    errors = {one: {4: 0.1, 8: 0.0}, two: {4: 0.3, 8: 0.0}, three: {4: 9.0, 8: 0.0}, four: {4: 8.0, 8: 0.0}}
    half = precision.choose_bits([one, two, three, four], 6, {SELF: 0.5, CROSS: 0.5}, errors)
    assert half == {one: 4, two: 8, three: 8, four: 4}
    # A group that serves well gives its share away, whatever the errors of its layers.
    assert precision.choose_bits([one, two, three, four], 6, {SELF: 0.5, CROSS: 0.0}, errors)[one] == 8
    assert set(precision.choose_bits([one, two], 4, {SELF: 1.0}, errors).values()) == {4}
    assert set(precision.choose_bits([one, two], 8, {SELF: 1.0}, errors).values()) == {8}


def test_a_device_without_exact_products_says_that_it_simulates(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = checkpoints.resolve(str(exported))
    backbone = backbones.load(checkpoint, runtime.choose("cpu", "float32"))
    exact = latents(backbone, exported)
    monkeypatch.setattr(kernels, "is_exact", lambda device: False)
    assert kernels.name("cpu") == "simulated"
    assert torch.allclose(latents(backbone, exported), exact, atol=1e-4)
    assert isinstance(backbone.blocks()[0].attn1.to_q, QuantizedLinear)
