"""Context parallelism: the tokens of one video spread over the processes of several GPUs, by diffusers' hooks."""

from __future__ import annotations

import logging
import math
import warnings
from typing import Any

import torch
from diffusers import ContextParallelConfig
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.context_parallel import apply_context_parallel
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput, ParallelConfig
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from vgen import parallel
from vgen.backbones import Backbone

# The attention of diffusers that tells its log-sum-exp, which a ring adds its parts up by; the default one does not.
RING_ATTENTION = "_native_flash"


def attach(backbone: Backbone, method: str) -> ContextParallel:
    """Spread a loaded backbone's tokens over the processes of the running process group, by a method of `parallel`.

    Only self-attention goes over all tokens; the text is whole on every GPU, so that its masks are right whatever
    their length. `enable_parallelism` of diffusers does so with every attention, and on accelerators alone.
    """
    # Of a timestep that is the same for all tokens diffusers says that there is nothing to split.
    logging.getLogger("diffusers.hooks.context_parallel").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
    rank, num_gpus = distributed.get_rank(), distributed.get_world_size()
    ulysses, ring = parallel.degrees(method, num_gpus)
    config = ContextParallelConfig(ulysses_degree=ulysses, ring_degree=ring)
    device = torch.device(backbone.runtime.device)
    mesh = init_device_mesh(device.type, config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
    shared = ParallelConfig(context_parallel_config=config)
    shared.setup(rank, num_gpus, device, mesh=mesh)
    for slot in backbone.attention_slots():
        processor: Any = slot.processor
        processor._parallel_config = shared
        if ring > 1:
            processor._attention_backend = RING_ATTENTION
    attached = ContextParallel(backbone, config)
    for name in ("transformer", "transformer_2"):
        if (transformer := getattr(backbone, name, None)) is not None:
            attached.split_and_gather(transformer)
    return attached


class ContextParallel:
    """The sharing that `attach` has set up; `lengths` are how many tokens of the video each process has."""

    def __init__(self, backbone: Backbone, config: Any) -> None:
        self.lengths: list[int] = []
        self._backbone = backbone
        self._config = config

    def fit(self, num_frames: int, height: int, width: int) -> None:
        """Share the tokens of the videos to come evenly, or, where their number does not allow it, almost evenly.

        The latter costs an exchange of lengths at every attention.
        """
        num_tokens = math.prod(self._backbone.token_grid(num_frames, height, width))
        each, more = divmod(num_tokens, self._config._world_size)
        self.lengths = [each + (rank < more) for rank in range(self._config._world_size)]
        self._config.ulysses_anything = more > 0 and self._config.ring_degree == 1
        self._config.ring_anything = more > 0 and self._config.ulysses_degree == 1

    def split_and_gather(self, transformer: Any) -> None:
        """Split a transformer's tokens where diffusers' plan for it says so, and gather what becomes of them."""
        plan = dict(transformer._cp_plan)
        inputs = {name: split for name, split in plan.get("", {}).items() if not name.startswith("encoder_")}
        # LTX-Video's own plan has no timesteps per token.
        plan[""] = {**inputs, "timestep": ContextParallelInput(split_dim=1, expected_dims=2)}
        outputs = {name: what for name, what in plan.items() if isinstance(what, ContextParallelOutput)}
        apply_context_parallel(
            transformer, self._config, {name: what for name, what in plan.items() if name not in outputs}
        )
        for name, output in outputs.items():
            registry = HookRegistry.check_if_exists_or_initialize(transformer.get_submodule(name))
            registry.register_hook(_Gather(self, output.gather_dim), "vgen_gather")


class _Gather(ModelHook):  # type: ignore[misc]
    """Puts the tokens of all processes together; diffusers' own hook needs parts of equal length where gloo does."""

    def __init__(self, shared: ContextParallel, dim: int) -> None:
        super().__init__()
        self._shared = shared
        self._dim = dim

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        tokens = output.movedim(self._dim, 0)
        lengths = self._shared.lengths
        padded = tokens.new_zeros(max(lengths), *tokens.shape[1:])
        padded[: len(tokens)] = tokens
        parts = [torch.empty_like(padded) for _ in lengths]
        distributed.all_gather(parts, padded)
        whole = torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
        return whole.movedim(0, self._dim).contiguous()
