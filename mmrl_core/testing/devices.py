"""`DeviceConformance`: what the core relies on in a device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from mmrl_core.contracts import DeviceOps
from mmrl_core.errors import DeviceError
from mmrl_core.launch.distributed import connect, disconnect
from mmrl_core.testing.components import ComponentConformance


class DeviceConformance(ComponentConformance):
    """Subclass it as `Test...` and name the `component`. Skipped on a machine without such a device."""

    kind = "device"
    refuses_determinism: ClassVar[bool] = False
    """Whether `set_deterministic(True)` raises DeviceError, because the device cannot promise it."""

    @classmethod
    def create(cls) -> DeviceOps:
        """A new object, not activated."""
        ops: DeviceOps = cls.found().load()()
        return ops

    @pytest.fixture(scope="class")
    @classmethod
    def ops(cls) -> DeviceOps:
        """The device, activated for local rank 0."""
        cls.require_available()
        ops = cls.create()
        ops.activate(0)
        return ops

    def _work(self, ops: DeviceOps, size: int = 256) -> torch.Tensor:
        draw = torch.randn(size, size, device=ops.torch_device)
        return draw @ draw

    def test_name_is_the_word_of_the_recipe(self) -> None:
        """Logs, fingerprints and reward workers say `name`; it must mean the same as in a recipe."""
        self.require_available()
        assert self.found().load().name == self.found().name

    def test_activate_returns_the_device(self, ops: DeviceOps) -> None:
        """Everything of this rank lands on `torch_device`; activating again is harmless."""
        assert ops.activate(0) == ops.torch_device
        assert self._work(ops).device.type == ops.torch_device.type

    def test_activating_too_many_is_an_error_that_says_so(self, ops: DeviceOps) -> None:
        """More ranks than devices: DeviceError at start, not an obscure one later. (CPU ranks share cores.)"""
        if ops.torch_device.type == "cpu":
            pytest.skip("any number of ranks may share a CPU")
        with pytest.raises(DeviceError):
            self.create().activate(ops.device_count())

    def test_there_is_at_least_one(self, ops: DeviceOps) -> None:
        """The launcher starts as many ranks as this says."""
        assert ops.device_count() >= 1

    def test_process_group_serves_host_and_device(self, ops: DeviceOps) -> None:
        """The core's collectives use CPU tensors, the backend's use the device's."""
        world = connect(self.create())
        try:
            for place in ("cpu", ops.torch_device.type):
                tensor = torch.ones(3, device=place)
                torch.distributed.all_reduce(tensor)
                assert tensor.tolist() == [1.0] * 3
            assert world.gather({"a": 1}) == [{"a": 1}]
        finally:
            disconnect()

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_supported_dtypes_train(self, ops: DeviceOps, dtype: str) -> None:
        """`supports` is about forward and backward; fp32 is always there, for master weights."""
        kind: torch.dtype = getattr(torch, dtype)
        if not ops.supports(kind):
            assert dtype != "float32", "fp32 master weights are not optional"
            pytest.skip(f"the device says that it does not train in {dtype}")
        layer = torch.nn.Linear(8, 8).to(ops.torch_device, kind)
        layer(torch.ones(4, 8, device=ops.torch_device, dtype=kind)).float().square().sum().backward()
        assert layer.weight.grad is not None
        assert bool(layer.weight.grad.isfinite().all())

    def test_tied_weights_stay_tied(self, ops: DeviceOps) -> None:
        """An embedding whose weight is the output layer's too: moved to the device and back it is still one parameter,
        with one gradient of both uses. PyTorch makes new parameters where a device does not let it replace data."""
        torch.manual_seed(0)
        embedding, head = torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8, bias=False)
        head.weight = embedding.weight
        network = torch.nn.ModuleDict({"embedding": embedding, "head": head})
        words, aim = torch.tensor([1, 5, 1]), torch.linspace(-1, 1, 24).reshape(3, 8)

        def gradient(place: torch.device) -> torch.Tensor:
            network.zero_grad()
            ((head(embedding(words.to(place))) - aim.to(place)) ** 2).sum().backward()
            assert embedding.weight.grad is not None
            return embedding.weight.grad.detach().cpu()

        expected = gradient(torch.device("cpu"))
        for place in (ops.torch_device, torch.device("cpu")):
            network.to(place)
            assert embedding.weight.device.type == place.type
            assert head.weight is embedding.weight, f"moving a module to {place} separates tied weights"
            torch.testing.assert_close(gradient(place), expected, rtol=1e-3, atol=1e-4)

    def test_seed_makes_random_numbers_repeat(self, ops: DeviceOps) -> None:
        """Both the device's generator and the CPU's."""

        def draw() -> list[torch.Tensor]:
            return [torch.rand(64, device=ops.torch_device).cpu(), torch.rand(64)]

        with torch.random.fork_rng(devices=[]):
            ops.seed(5)
            first = draw()
            second = draw()
            ops.seed(5)
            again = draw()
            ops.seed(6)
            other = draw()
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))

    def test_rng_state_restores(self, ops: DeviceOps) -> None:
        """A resumed run continues the device's random numbers; the state is saved as a uint8 CPU tensor."""
        state = ops.rng_state()
        assert state.dtype == torch.uint8
        assert state.device.type == "cpu"
        first = torch.rand(64, device=ops.torch_device)
        ops.set_rng_state(state.clone())
        assert torch.equal(torch.rand(64, device=ops.torch_device), first)

    def test_memory_is_counted(self, ops: DeviceOps) -> None:
        """Bytes, or None for what the device cannot say; never a made-up number."""
        ops.reset_peak_memory()
        held = torch.ones(32 << 20, dtype=torch.uint8, device=ops.torch_device)
        held.add_(1)
        ops.synchronize()
        memory = ops.memory()
        for value in (memory.allocated, memory.peak, memory.total):
            assert value is None or value > 0
        if memory.peak is not None:
            assert memory.peak >= held.numel()
            assert memory.allocated is None or memory.peak >= memory.allocated * 0.9
        if memory.allocated is not None and memory.total is not None:
            assert memory.allocated <= memory.total
        del held
        ops.empty_cache()

    def test_elapsed_measures_the_work(self, ops: DeviceOps) -> None:
        """Step timings wait for the device: asynchronous work inside the block counts."""
        started = time.perf_counter()
        with ops.elapsed() as seconds:
            time.sleep(0.02)
            self._work(ops)
            ops.synchronize()
        total = time.perf_counter() - started
        assert 0.0 < seconds() <= total * 1.1
        assert seconds() == seconds()

    def test_determinism_can_be_switched(self, ops: DeviceOps) -> None:
        """`deterministic: true` in the recipe: bit-equal results, or a DeviceError that says it cannot."""
        if self.refuses_determinism:
            with pytest.raises(DeviceError):
                ops.set_deterministic(True)
            return
        before = torch.are_deterministic_algorithms_enabled()
        try:
            ops.set_deterministic(True)
            a = torch.randn(64, 64, device=ops.torch_device)
            assert torch.equal(a @ a, a @ a)
        finally:
            ops.set_deterministic(before)

    def test_profiler_activities_profile(self, ops: DeviceOps) -> None:
        """They go to `torch.profiler.profile`."""
        activities: Sequence[Any] = ops.profiler_activities()
        with torch.profiler.profile(activities=activities) as profile:
            self._work(ops, 16)
        assert profile.key_averages()

    def test_profile_is_written(self, ops: DeviceOps, tmp_path: Path) -> None:
        """A profile of a step is there after it, under its own name; the block does what it always does."""
        for name in ("step_00000001_rank0", "step_00000002_rank0"):
            with ops.profile(tmp_path / "profile", name):
                assert bool(self._work(ops, 16).isfinite().all())
            written = [path for path in (tmp_path / "profile").iterdir() if path.name.startswith(name)]
            assert written, f"no profile {name}"
            assert all(any(path.iterdir()) if path.is_dir() else path.stat().st_size for path in written)

    def test_peaks_are_plausible_or_unknown(self, ops: DeviceOps) -> None:
        """Utilisation is a fraction of these: from a data sheet, or None."""
        for dtype in (torch.float32, torch.bfloat16):
            flops = ops.peak_flops(dtype)
            assert flops is None or 1e9 < flops < 1e17, f"{flops} FLOP/s in {dtype}"
        bandwidth = ops.peak_bandwidth()
        assert bandwidth is None or 1e9 < bandwidth < 1e15, f"{bandwidth} bytes/s"

    def test_fused_adamw_works_where_offered(self, ops: DeviceOps) -> None:
        """`adamw` in `fused_ops`: torch's fused AdamW gives the plain one's result."""
        if "adamw" not in ops.fused_ops():
            pytest.skip("the device offers no fused AdamW")
        results = []
        for fused in (False, True):
            weight = torch.linspace(-1, 1, 64, device=ops.torch_device).requires_grad_()
            optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
            weight.square().sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            results.append(weight.detach())
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
