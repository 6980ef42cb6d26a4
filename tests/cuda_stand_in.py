"""A CUDA device that computes nothing, so that PyTorch traces and compiles for CUDA where there is none.

    python tests/cuda_stand_in.py 9 0 bf16

compiles a training step for compute capability 9.0 with PyTorch's CPU build and Triton, to machine code, and prints as
JSON what was made: `graphs` (1: no graph break), `kernels` that forward and backward launch, `compiled` (for each of
Triton's kernels 1 if it became machine code), `buffers` (shape, type) that they allocate, `peaks` (the most bytes of
them at once), `attention` (its operators); `muon` holds the first three for the optimizer.
"""

import ctypes
import functools
import json
import math
import re
import subprocess
import sys
import sysconfig
import tempfile
import types
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

DEVICE = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
struct NoDevice final : impl::DeviceGuardImplInterface {
  static constexpr DeviceType static_type = DeviceType::CUDA;
  DeviceType type() const override { return static_type; }
  Device exchangeDevice(Device) const override { return getDevice(); }
  Device getDevice() const override { return Device(static_type, 0); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device d) const noexcept override { return Stream(Stream::DEFAULT, d); }
  Stream exchangeStream(Stream s) const noexcept override { return s; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
};
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, NoDevice) }
namespace at {
struct CUDAHooks : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
namespace native {
static int64_t fused_attention(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
                               std::optional<double>, bool) { return ATTENTION; }
static bool registered = (_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&fused_attention), true);
}
}
"""


def load_device(attention: int) -> None:
    """Compiles and loads the C++ part; before the first import of torch, which looks for devices once."""
    folder = Path(tempfile.mkdtemp())
    source = folder / "device.cpp"
    source.write_text(DEVICE)
    torch = Path(sysconfig.get_path("purelib")) / "torch"
    command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{torch}/include", f"-DATTENTION={attention}", str(source)]
    command += [f"-L{torch}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch}/lib", "-o", str(folder / "device.so")]
    subprocess.run(command, check=True)
    ctypes.CDLL(str(folder / "device.so"))


def install(capability: tuple[int, int]) -> None:
    """Makes PyTorch, Inductor and Triton believe in a GPU of this compute capability."""
    load_device(1 if capability >= (8, 0) else 2)  # flash attention needs Ampere, memory-efficient attention does not
    import torch
    import torch._dynamo.device_interface
    import torch._inductor.fx_passes.joint_graph
    import triton.backends
    from triton.backends.compiler import GPUTarget

    gpu = types.SimpleNamespace(name="stand-in", major=capability[0], minor=capability[1], total_memory=80 << 30)
    gpu.multi_processor_count, gpu.warp_size, gpu.L2_cache_size = 132, 32, 50 << 20
    gpu.max_threads_per_block, gpu.max_threads_per_multi_processor, gpu.regs_per_multiprocessor = 1024, 2048, 65536
    gpu.shared_memory_per_block, gpu.shared_memory_per_block_optin = 49152, 232448 if capability >= (9, 0) else 65536
    nothing = {"_lazy_init": None, "synchronize": None, "set_rng_state": None}
    answers = {"is_available": True, "device_count": 1, "current_device": 0, "_exchange_device": 0}
    answers |= {"_maybe_exchange_device": 0, "get_device_capability": capability, "get_device_properties": gpu}
    answers |= {"is_bf16_supported": capability >= (8, 0), "get_rng_state": torch.zeros(16, dtype=torch.uint8)}
    for name, answer in (nothing | answers).items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.version.cuda, torch._C._cuda_getCurrentRawStream = "13.0", lambda device: 0
    interface, number = torch._dynamo.device_interface.CudaInterface, capability[0] * 10 + capability[1]
    answers = {"is_available": True, "get_compute_capability": number, "current_device": 0, "device_count": 1}
    answers |= {"get_device_properties": gpu, "set_device": None, "synchronize": None}
    answers |= {"exchange_device": 0, "maybe_exchange_device": 0}
    for place in (interface, interface.Worker):
        for name, answer in answers.items():
            setattr(place, name, staticmethod(lambda *_, answer=answer, **__: answer))

    class Driver:
        is_active = staticmethod(lambda: True)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", number, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device=0: 0)
        get_active_torch_device = staticmethod(lambda: torch.device("cuda", 0))

    compiler = triton.backends.backends["nvidia"].compiler
    triton.backends.backends.clear()
    triton.backends.backends["nvidia"] = types.SimpleNamespace(compiler=compiler, driver=Driver)
    torch._inductor.fx_passes.joint_graph.lazy_init = lambda *_: None  # its patterns are traced with real tensors


def recorder() -> tuple[Callable, types.SimpleNamespace]:
    """A backend for torch.compile that runs nothing, and what it has made so far."""
    import torch._functorch.config
    import torch._inductor.config
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.graph import GraphLowering
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    made = types.SimpleNamespace(codes=[], graphs=[], compiled=[])

    def inner(graph, inputs, **options):
        compile_fx_inner(graph, inputs, **options)
        return make_boxed_func(graph.forward)  # runs on fake tensors

    def backend(graph, inputs, options=None):
        made.graphs.append(graph)
        return compile_fx(graph, inputs, inner_compile=inner, config_patches=options)

    def to_machine_code(kernel, *_, **__):
        kernel.configs = kernel.configs[:1]
        kernel._precompile_worker()
        made.compiled.append(len(kernel.compile_results))

    GraphLowering.save_output_code = staticmethod(made.codes.append)
    CachingAutotuner.precompile = to_machine_code
    torch._inductor.config.compile_threads = 1
    torch._inductor.config.joint_graph_constant_folding = False  # it computes on the device
    torch._inductor.config.force_disable_caches = True
    torch._functorch.config.force_non_lazy_backward_lowering = True
    return backend, made


def stand_in_run(precision: str, **shape: int) -> tuple[types.SimpleNamespace, types.SimpleNamespace]:
    """What a step needs of a `TrainingRun`, compiled, with fake weights on the device; what its compiler has made."""
    import torch
    from torch._subclasses import FakeTensorMode

    import pico_helpers as pico

    backend, made = recorder()
    pico.compile_function = functools.partial(torch.compile, backend=backend, dynamic=False)
    model, device = pico.PicoLLM(pico.ModelConfig(**shape)).train(), torch.device("cuda:0")
    run = types.SimpleNamespace(model=model, model_config=model.config, device=device, compiled=True)
    run.mode, run.dtype = FakeTensorMode(), pico.choose_precision(precision, device)
    with run.mode:
        for part in model.modules():
            for values, kind in ((part._parameters, torch.nn.Parameter), (part._buffers, lambda tensor: tensor)):
                for name, value in values.items():
                    values[name] = value if value is None else kind(torch.empty(value.shape, device=device))
        run.optimizer = pico.make_optimizer(model, pico.TrainConfig(optimizer="muon"), run.dtype)
    pico.TrainingRun.make_forward(run)
    return run, made


def compile_step(precision: str, batch: int = 64) -> dict:
    """Compiles forward, loss and backward of a small model with the full vocabulary, as training does."""
    import torch

    run, made = stand_in_run(precision, d_model=64, n_layer=2, n_head=1, d_ff=64)
    with run.mode, torch.autocast("cuda", run.dtype, enabled=run.dtype != torch.float32):
        idx = torch.zeros(batch, 385, dtype=torch.int64, device=run.device)
        run.forward(idx[:, :-1], idx[:, 1:])
    buffers = re.findall(r"empty_strided_cuda\(\(([\d, ]*)\), .*?, torch\.(\w+)\)", "\n".join(made.codes))
    attention = re.findall(r"aten\.(_scaled_dot_product_\w+)\.default\(", "".join(map(_calls, made.codes)))
    found = _counts(made) | {"peaks": [_peak(code) for code in made.codes], "attention": attention}
    return found | {"buffers": [[[int(n) for n in size.split(",") if n.strip()], kind] for size, kind in buffers]}


def compile_muon(precision: str) -> dict:
    """Compiles Muon's update of the full model's matrices, as training does."""
    import torch

    run, made = stand_in_run(precision)
    torch.optim.AdamW.step = lambda *_: None  # PyTorch's own kernels
    with run.mode:
        for parameter in run.model.parameters():
            parameter.grad = torch.empty_like(parameter)
        run.optimizer.step()
    return _counts(made)


def _counts(made: types.SimpleNamespace) -> dict:
    """`kernels`: those that each generated module launches, its own and those of libraries."""
    launch = r"\.run\(|extern_kernels\.\w+\(|torch\.ops\.aten\S+\("
    kernels = [len(re.findall(launch, _calls(code))) for code in made.codes]
    return {"graphs": len(made.graphs), "kernels": kernels, "compiled": made.compiled}


def _peak(code: str) -> int:
    """The most bytes of buffers that a generated module holds at once, inputs and attention's outputs aside."""
    sizes, peak = {}, 0
    for line in _calls(code).splitlines():
        if made := re.search(r"(buf\d+) = empty_strided_cuda\(\(([\d, ]*)\), .*?, torch\.(\w+)\)", line):
            bits = int(re.search(r"\d+$", made[3])[0]) if made[3] != "bool" else 8
            sizes[made[1]] = math.prod(int(n) for n in made[2].split(",") if n.strip()) * bits // 8
            peak = max(peak, sum(sizes.values()))
        elif reused := re.search(r"(buf\d+) = .*; del (buf\d+)  # reuse", line):
            sizes[reused[1]] = sizes.pop(reused[2], 0)
        elif freed := re.match(r"\s*del (buf\d+)", line):
            sizes.pop(freed[1], None)
    return peak


def _calls(code: str) -> str:
    """What the generated module does when it is called, without the kernels' sources."""
    return code[code.index("def call(") :]


if __name__ == "__main__":
    install((int(sys.argv[1]), int(sys.argv[2])))
    print(json.dumps(compile_step(sys.argv[3]) | {"muon": compile_muon(sys.argv[3])}))
