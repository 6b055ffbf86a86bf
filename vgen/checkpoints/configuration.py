"""What a checkpoint's own configuration files say of it: its family, and where its models differ from the family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vgen.checkpoints import catalogue
from vgen.checkpoints.checkpoint import Capabilities, Checkpoint, Rules, Source, defaults
from vgen.checkpoints.layout import COPY_AGAIN, components, read_json
from vgen.errors import CheckpointError


def from_configuration(
    name: str, folder: Path, *, source: Source, repo: str | None, revision: str | None
) -> Checkpoint:
    """Return the checkpoint that a folder's configuration files describe.

    Raises `CheckpointError` for a folder that is no checkpoint or one of a family that vgen does not know.
    """
    index = read_json(folder / "model_index.json")
    pipeline = str(index.get("_class_name"))
    families: dict[str, Any] = catalogue.read()["families"]
    family = next((key for key, value in families.items() if pipeline in value["pipelines"]), None)
    if family is None:
        known = [name for value in families.values() for name in value["pipelines"]]
        raise CheckpointError(
            f'"{name}" is a {pipeline}, a family that vgen cannot run.', tip=f"it runs: {', '.join(known)}."
        )
    kind = families[family]["pipelines"][pipeline]
    transformer = read_json(folder / "transformer" / "config.json")
    try:
        rules = _rules(folder, transformer, families[family])
        return Checkpoint(
            name=name,
            family=family,
            source=source,
            folder=folder,
            repo=repo,
            revision=revision,
            licence="",
            files=(),
            defaults=defaults(
                {**families[family]["defaults"], **kind.get("defaults", {}), **_guidance(folder, transformer)}
            ),
            knows="",
            rules=rules,
            can=_what_it_can(index, transformer, catalogue.capabilities([*families[family]["can"], *kind["can"]])),
            sizes=_fixed_sizes(transformer, rules),
            components=components(folder),
        )
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f'A config.json of "{name}" is damaged: {error!r}.', tip=COPY_AGAIN) from error


def _guidance(folder: Path, transformer: Mapping[str, Any]) -> dict[str, float]:
    """Return the checkpoint's own guidance scale: its guider's, or none where a distilled one has no place for it."""
    guider = folder / "guider" / "guider_config.json"
    if guider.is_file():
        return {"guidance_scale": float(read_json(guider).get("guidance_scale", 1.0))}
    return {} if transformer.get("guidance_embeds", True) else {"guidance_scale": 1.0}


def _what_it_can(index: Mapping[str, Any], transformer: Mapping[str, Any], can: Capabilities) -> Capabilities:
    """Add what model_index.json switches on to the capabilities of a pipeline, and leave out what a model lacks."""
    if index.get("expand_timesteps"):
        can = replace(can, text_to_video=True, image_to_video=True, known_frames=True, last_image=False)
    # An image encoder sees two images only where its transformer has places for both.
    sees_two = transformer.get("image_dim") is None or transformer.get("pos_embed_seq_len") is not None
    return replace(
        can,
        last_image=can.last_image and sees_two,
        two_transformers=index.get("boundary_ratio") is not None,
        embedded_guidance=can.embedded_guidance and bool(transformer.get("guidance_embeds", True)),
    )


def _rules(folder: Path, transformer: Mapping[str, Any], family: Mapping[str, Any]) -> Rules:
    """Return the family's rules with those replaced that the configurations of VAE and transformer tell.

    The VAE says how many pixels and frames one latent stands for, under one of two names, and the transformer how many
    latents a token does and how many tokens or frames it has positions for.
    """
    rules = Rules(**family["rules"])
    vae = read_json(folder / "vae" / "config.json")
    spatial = vae.get("scale_factor_spatial") or vae.get("spatial_compression_ratio")
    temporal = vae.get("scale_factor_temporal") or vae.get("temporal_compression_ratio")
    size_multiple = spatial * _patch(transformer) if spatial else rules.size_multiple
    frame_multiple = temporal * family.get("latent_frames_at_once", 1) if temporal else rules.frame_multiple
    max_size, max_frames = rules.max_size // size_multiple * size_multiple, rules.max_frames
    if positions := transformer.get("rope_max_seq_len"):
        max_size, max_frames = size_multiple * positions, frame_multiple * (positions - 1) + 1
    elif "sample_frames" in transformer and not transformer.get("patch_size_t"):
        # CogVideoX 1.0; of 1.5, whose tokens span two latent frames, this is the smaller of two lengths.
        max_frames = transformer["sample_frames"]
    return Rules(
        size_multiple=size_multiple,
        frame_multiple=frame_multiple,
        max_size=max_size,
        max_frames=max_frames,
        fixed_size=bool(transformer.get("use_learned_positional_embeddings")),
    )


def _fixed_sizes(transformer: Mapping[str, Any], rules: Rules) -> tuple[tuple[int, int], ...]:
    """Return the one size of a model whose positions are learned; of others the configurations tell none."""
    if not rules.fixed_size:
        return ()
    pixels = rules.size_multiple // _patch(transformer)
    return ((transformer["sample_width"] * pixels, transformer["sample_height"] * pixels),)


def _patch(transformer: Mapping[str, Any]) -> int:
    """Return how many latents a token spans along a side."""
    patch = transformer.get("patch_size", (1, 2, 2))
    return patch if isinstance(patch, int) else max(patch[1:])
