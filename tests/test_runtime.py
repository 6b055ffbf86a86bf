from __future__ import annotations

import pytest
import torch

from vgen import runtime
from vgen.errors import UsageError


def test_names_become_devices_and_dtypes() -> None:
    assert runtime.choose("cpu", "bf16") == runtime.Runtime(device="cpu", dtype="bfloat16")
    assert runtime.choose("cpu", "float32").torch_dtype == torch.float32


def test_auto_takes_bfloat16_only_where_the_hardware_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for capable, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda capable=capable: {"avx512_bf16": capable})
        assert runtime.choose("cpu").dtype == dtype


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match=r'There is no device "cuda:\d+"'):
        runtime.choose(f"cuda:{torch.cuda.device_count()}")


def test_noise_depends_on_the_seed_alone() -> None:
    first, again, other = (torch.randn(4, generator=runtime.noise_generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_peak_memory_counts_what_is_held() -> None:
    before = runtime.peak_ram_mb()
    held = torch.ones(64 * 2**20 // 4)
    assert held.sum() > 0
    assert runtime.peak_ram_mb() >= before > 50
    assert runtime.peak_vram_mb(runtime.choose("cpu")) == 0
