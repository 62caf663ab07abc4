"""What is asked of CUDA to record a function, and what is left of it when it fails."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fake_cuda import FakeCuda

from lit_rlvr.engines.capture import CaptureError, CudaRecorder

DEVICE = torch.device("cuda")


def recorder(required: bool = False) -> CudaRecorder:
    return CudaRecorder(DEVICE, required, "decoding steps")


def test_what_is_asked_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first run beside the main stream, and then the capture on the same stream; the main stream waits for both."""
    cuda, modes = FakeCuda(monkeypatch), []

    def run() -> None:
        modes.append(cuda.mode)
        cuda.log.append("run")

    one = recorder()
    replay = one.record(run)
    before, after = ["side waits for main", "on side", "run"], ["begin", "run", "end", "on main", "main waits for side"]
    assert cuda.log == [*before, "synchronize", "empty", *after]
    assert modes == ["error", 1]
    replay()
    assert cuda.log.pop() == "replay"
    cuda.log.clear()
    one.record(run)  # what is cached is given back once for all graphs that share memory
    assert cuda.log == [*before, *after]
    assert cuda.untouched()


def during(cuda: FakeCuda, error: BaseException) -> Callable[[], None]:
    """A function that raises only when it is captured."""

    def run() -> None:
        if cuda.capturing:
            raise error

    return run


WAYS: dict[str, tuple[Callable[[FakeCuda], Callable[[], None]], str, int]] = {
    "it waits": (lambda cuda: cuda.wait, "called a synchronizing CUDA operation", 0),
    "it is refused": (
        lambda cuda: lambda: cuda.refuse(RuntimeError("operation not permitted when stream is capturing\nMore")),
        "operation not permitted when stream is capturing",
        1,
    ),
    "Python fails": (lambda cuda: during(cuda, ValueError("no such mask")), "no such mask", 0),
    "nothing is said": (lambda cuda: during(cuda, NotImplementedError()), "NotImplementedError", 0),
}
"""How a capture can fail: what is run, the reason that is given, and how often the allocator has to be told."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("required", [False, True])
def test_a_capture_that_fails(monkeypatch: pytest.MonkeyPatch, way: str, required: bool) -> None:
    """Its first cause is named, and nothing of it is left."""
    cuda = FakeCuda(monkeypatch)
    make, reason, told = WAYS[way]
    with pytest.raises(RuntimeError) as found:
        recorder(required).record(make(cuda))
    assert isinstance(found.value, CaptureError) is not required
    text = str(found.value)
    assert "\n" not in text
    if required:
        assert text == (
            f"engine.graphs: true is not possible: decoding steps cannot be captured ({reason}); leave it null"
        )
    else:
        assert text == f"decoding steps cannot be captured as CUDA graphs ({reason})"
    assert (str(found.value.__cause__).partition("\n")[0] or "NotImplementedError") == reason
    assert cuda.untouched()
    assert cuda.log[-1] == "main waits for side"
    assert cuda.log.count("begin") == cuda.log.count("end") == (way != "it waits")
    assert cuda.log.count("allocator: end") == told


@pytest.mark.parametrize("at_once", [False, True])
def test_a_capture_that_does_not_begin_or_end(monkeypatch: pytest.MonkeyPatch, at_once: bool) -> None:
    """As when a graph is too large to be made executable."""
    cuda = FakeCuda(monkeypatch, RuntimeError("CUDA error: out of memory"), at_once)
    with pytest.raises(CaptureError, match=r"\(CUDA error: out of memory\)"):
        recorder().record(lambda: None)
    assert cuda.untouched()
    assert cuda.log.count("allocator: end") == 1


@pytest.mark.parametrize("required", [False, True])
@pytest.mark.parametrize("kind", [torch.cuda.OutOfMemoryError, KeyboardInterrupt])
def test_what_is_no_fault_of_the_capture(
    monkeypatch: pytest.MonkeyPatch, required: bool, kind: type[BaseException]
) -> None:
    """Memory that is not enough, and a wish to stop, are what they are, whether or not the capture's end fails too."""
    for ends in (None, RuntimeError("operation failed due to a previous error during capture")):
        cuda, error = FakeCuda(monkeypatch, ends), kind("the same")

        def at_once(error: BaseException = error) -> None:
            raise error

        for run in (during(cuda, error), at_once):
            with pytest.raises(kind) as found:
                recorder(required).record(run)
            assert found.value is error
            assert cuda.untouched()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_after_a_failure_on_a_cuda_device() -> None:
    """Whatever the cause, the device computes, gives memory back and captures again."""
    device = torch.device("cuda", torch.cuda.current_device())
    x, out, main = torch.ones(64, 64, device=device), torch.zeros(64, 64, device=device), torch.cuda.current_stream()

    def waits() -> None:
        out.fill_((x @ x).sum().item())

    def is_refused() -> None:
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()

    def multiplies() -> None:
        out.copy_(x @ x)

    for run in (waits, is_refused):
        with pytest.raises(CaptureError):
            CudaRecorder(device, False, "failures").record(run)
        assert torch.cuda.current_stream() == main
        x.sum().item()
        torch.cuda.empty_cache()
    CudaRecorder(device, False, "failures").record(multiplies)()
    torch.testing.assert_close(out, torch.full_like(out, 64.0))
