"""What a run of `vgen quantize` has done so far, in a folder beside its output, where the same command goes on.

Statistics after each calibration video, compared videos, the bits that were chosen, and each quantized layer; an
`Unfinished` knows nothing of how they are made.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgen import files
from vgen.errors import VgenError
from vgen.quantization.layers import Layer

if TYPE_CHECKING:
    from torch import nn

    from vgen.quantization.calibration import Statistics
    from vgen.quantization.linear import QuantizedLinear
    from vgen.quantization.scheme import LayerFormat
    from vgen.video import Frames

ASKED, STATISTICS, BITS = "asked.json", "statistics.safetensors", "bits.json"


class Unfinished:
    """The folder of one run, by its output's name; `asked` is all that what is in there depends on.

    Raises `VgenError` for a folder that another run has left, unless `force` is given, which begins anew.
    """

    def __init__(self, output: Path, asked: Mapping[str, Any], *, force: bool = False) -> None:
        self.folder = output.with_name(f"{output.name}.unfinished")
        text = json.dumps(asked, indent=1, sort_keys=True)
        self.goes_on = (self.folder / ASKED).is_file()
        if self.goes_on and (self.folder / ASKED).read_text(encoding="utf-8") != text:
            if not force:
                raise VgenError(
                    f"{self.folder} is what another run has left: of another model, scheme, calibration or vgen.",
                    tip="delete it, choose another --output, or pass --force to begin anew.",
                )
            self.remove()
            self.goes_on = False
        if not self.goes_on:
            (self.folder / "layers").mkdir(parents=True, exist_ok=True)
            files.write_text(self.folder / ASKED, text)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was done that took time."""
        found = {path.name for path in self.folder.rglob("*") if path.is_file()}
        return found <= {ASKED}

    def statistics(self) -> tuple[Statistics, int]:
        """Return what the layers have seen, and in how many videos."""
        from vgen.quantization.calibration import Statistics

        path = self.folder / STATISTICS
        return Statistics.load(path) if path.is_file() else (Statistics(), 0)

    def keep_statistics(self, statistics: Statistics, num_videos: int) -> None:
        """Write what the layers have seen in so many videos."""
        with files.atomic(self.folder / STATISTICS) as part:
            statistics.save(part, num_videos)

    def video(self, name: str) -> tuple[Frames, float] | None:
        """Return the frames of a compared video and the seconds of its denoising, where it was made."""
        import numpy as np

        path = self.folder / f"{name}.npz"
        if not path.is_file():
            return None
        with np.load(path) as stored:
            return stored["frames"], float(stored["seconds"])

    def keep_video(self, name: str, frames: Frames, seconds: float) -> None:
        """Write a compared video."""
        import numpy as np

        with files.atomic(self.folder / f"{name}.npz") as part, part.open("wb") as file:
            np.savez_compressed(file, frames=frames, seconds=seconds)

    def bits(self) -> dict[str, Any] | None:
        """Return what was chosen for a scheme of mixed precision."""
        path = self.folder / BITS
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def keep_bits(self, chosen: Mapping[str, Any]) -> None:
        """Write what was chosen."""
        files.write_text(self.folder / BITS, json.dumps(chosen))

    def layer(
        self, layer: Layer, linear: nn.Linear, format: LayerFormat
    ) -> tuple[QuantizedLinear, list[float]] | None:
        """Return a quantized layer and its error per range of noise levels, where it was written.

        On a CPU its integers stay in their file, and the system reads them as they are used.
        """
        from safetensors import safe_open

        from vgen.quantization.linear import QuantizedLinear

        path = self._path(layer)
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            errors: list[float] = json.loads(stored.metadata()["errors"])
        return QuantizedLinear.stored(linear, format, tensors), errors

    def keep_layer(self, layer: Layer, made: QuantizedLinear, errors: Sequence[float]) -> None:
        """Write a quantized layer and its errors."""
        tensors = {name: buffer.cpu().contiguous() for name, buffer in made.named_buffers()}
        files.write_tensors(self._path(layer), tensors, {"errors": json.dumps(errors)})

    def remove(self) -> None:
        """Delete the folder: the run is done."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, layer: Layer) -> Path:
        return self.folder / "layers" / f"{layer.path}.safetensors"
