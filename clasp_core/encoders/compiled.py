"""Networks compiled for this processor by OpenVINO: what serves on a CPU.

The torch module stays the definition: it trains, runs on GPUs, and is what a compiled network is checked
against when it is made. Measured on Zen 4, on one core: pictures take a seventh of the time, a question a
quarter, Whisper's encoder less than half (docs/benchmarks.md). ONNX Runtime has no bfloat16 on x86, torch's
own compiler needs a C++ compiler where it serves, and 8-bit activations lose what Whisper's largest ones say
(docs/experiments.md).
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import openvino
import torch
from numpy.typing import NDArray
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
from torch import Tensor, nn

from clasp_core.errors import ModelUnavailable

_Values: TypeAlias = NDArray[np.float32]

CLOSE = 0.99
"""Cosine with the torch module's output that a compiled network must reach on its example: rounding costs
less than 0.001, a compiler's mistake all of it."""
SHAPES = 16
"""Kernels are kept for so many shapes of input: speech comes in hundreds of lengths, and each would stay."""
AHEAD = 16
"""So many batches are handed over at once: a batch of questions has about as many lengths."""


class Compiled:
    """A module's forward without gradients: float32 arrays in, float32 array out. From one thread.

    In bfloat16 where the processor multiplies it, weights and activations both; float32 elsewhere. The same
    input gives the same bits whatever else is in its batch, as long as nothing in it is padding.
    """

    def __init__(self, module: nn.Module, example: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> None:
        """`module` takes float32 tensors like the `example`s, of these `shapes`, in which -1 is any length;
        what it does may depend on lengths only by way of tensors' shapes. It is not needed afterwards.
        The batch is best left open even where it is one: OpenVINO 2026.4 in bfloat16 writes over a residual
        stream that begins with a constant.

        Raises ModelUnavailable where this processor's result is not the module's.
        """
        module = module.eval()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what depends on values, and torch.jit's age
            expected: Tensor = module(*example)
            # not as a function, which is quicker: torch keeps those, and their weights, for good
            traced = torch.jit.trace(module, tuple(example), check_trace=False)  # type: ignore[no-untyped-call]
            decoder: Any = TorchScriptPythonDecoder(traced, skip_freeze=True)
        # not openvino.convert_model, which reports its use to its makers
        frontend = FrontEndManager().load_by_framework("pytorch")
        model = frontend.convert(frontend.load(decoder))
        for parameter, shape in zip(model.inputs, shapes, strict=True):
            parameter.get_node().set_element_type(openvino.Type.f32)
            parameter.get_node().set_partial_shape(openvino.PartialShape(list(shape)))
        model.validate_nodes_and_infer_types()
        core = _core()
        exact = "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        compiled = core.compile_model(
            model,
            "CPU",
            {
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "NUM_STREAMS": 1,
                "ENABLE_CPU_PINNING": False,  # workers and the service would be pinned to the same cores
                "INFERENCE_PRECISION_HINT": "f32" if exact else "bf16",
                "CPU_RUNTIME_CACHE_CAPACITY": SHAPES,
            },
        )
        self._network = compiled
        self._requests: list[Any] = []
        got = torch.from_numpy(self(*(tensor.numpy() for tensor in example))).flatten(1)
        close = nn.functional.cosine_similarity(got, expected.flatten(1), dim=1)
        if not bool((close >= CLOSE).all()):
            raise ModelUnavailable(
                f"OpenVINO {openvino.__version__} computes {type(module).__name__} wrongly on this processor"
                f" (cosine {float(close.min()):.3f} with what it should be)."
            )

    def __call__(self, *inputs: _Values) -> _Values:
        return next(self.each([inputs]))

    def each(self, batches: Iterable[Sequence[_Values]]) -> Iterator[_Values]:
        """What each of these inputs gives. The next ones are computed while this thread waits for the
        interpreter, which another that is busy gives back after milliseconds only."""
        left = iter(batches)
        while some := list(islice(left, AHEAD)):
            while len(self._requests) < len(some):
                self._requests.append(self._network.create_infer_request())
            for request, inputs in zip(self._requests, some, strict=False):
                request.start_async([np.ascontiguousarray(values, np.float32) for values in inputs])
            for request in self._requests[: len(some)]:
                request.wait()
                yield np.array(request.get_output_tensor().data, np.float32)


@cache
def _core() -> Any:  # noqa: ANN401 - OpenVINO has no types
    """One for all, and for good: its CPU plugin gives the thread that makes it another stack for signals, and
    takes that stack's memory away when it goes; the next signal would then end the process."""
    return openvino.Core()
