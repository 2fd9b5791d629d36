"""Runs a program on a simulated GPU: PyTorch takes its tensors for a GPU's, and the CPU computes.

    python tests/simulated_gpu.py LIBRARY launch/generate.py --ckpt shapes --prompt "..."

LIBRARY is compiled first if it does not exist (15 s). What this can find without a GPU: operations
that mix devices, waits for the device and copies from it while a CUDA graph is recorded, Python
numbers that a graph freezes, branches for GPUs that compute other numbers. It says nothing about
time, memory, kernels or compilers.

A `GPUTensor` holds a tensor of the CPU; its own device is "cuda:0", also in C++, so that PyTorch
chooses what it would choose on a GPU (autocast, say). `Simulation` sees every operation below
autograd and computes it on the held tensors. It uses much of PyTorch that is not documented, and is
written for the version that requirements.lock names.
"""

import atexit
import contextlib
import ctypes
import os
import runpy
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":  # before PyTorch is imported, which looks for a driver
    path = Path(sys.argv[1])
    if not path.exists():
        home = Path(find_spec("torch").origin).parent
        flags = ["-O0", "-std=c++20", "-fPIC", "-shared", "-w"]
        places = [f"-I{home}/include", f"-L{home}/lib", f"-Wl,-rpath,{home}/lib"]
        source, new = Path(__file__).with_suffix(".cpp"), f"{path}.{os.getpid()}"
        compiler = [os.environ.get("CXX", "c++"), *flags, *places]
        subprocess.run([*compiler, source, "-ltorch_cpu", "-lc10", "-o", new], check=True)
        os.replace(new, path)
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2"}
MOVES = {"_to_copy", "to"}
TAKES_INDICES = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
SHAPES_ITSELF = {"resize_", "unsqueeze_", "squeeze_", "t_", "transpose_", "set_", "as_strided_"}
NAME, MEMORY = "simulated GPU", 24 << 30

recording: list[list] = []  # operations of the graph that is being recorded
overwritten: dict[int, tuple] = {}  # what recording overwrote: storage and former content
counts: Counter[str] = Counter()


class GPUTensor(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        geometry = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(
            cls, held.size(), **geometry, dtype=held.dtype, device=GPU
        )

    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"GPUTensor({self.held})"

    def data_ptr(self):
        return self.held.data_ptr()

    def untyped_storage(self):
        return self.held.untyped_storage()

    def record_stream(self, stream):
        pass

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copy = self.detach().clone()
            parameter = isinstance(self, nn.Parameter)
            memo[id(self)] = nn.Parameter(copy, self.requires_grad) if parameter else copy
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        raise AssertionError("a GPU's tensor is pickled: only a machine with a GPU could read it")

    def tolist(self):
        return self.cpu().tolist()

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        torch.Tensor.data.__set__(self, value)
        self.held = value.held.detach()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


class Simulation(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def compute(function, args, kwargs):
    """What an operation returns, whose tensors may be the GPU's."""
    name, leaves = function.overloadpacket.__name__, tree_leaves((args, kwargs))
    asked = kwargs.get("device")
    asked = None if asked is None else torch.device(asked).type
    ours = [x for x in leaves if isinstance(x, GPUTensor)]
    others = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, GPUTensor)]
    if name == "is_pinned":
        return False
    if name == "_pin_memory":
        return args[0].clone()
    if not ours and asked != "cuda":
        kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
        return function(*args, **kwargs)
    if name == "_fused_sdp_choice":
        return 0  # attention by plain operations
    assert name not in SHAPES_ITSELF, f"not simulated: {function}"
    check_devices(function, name, args, ours, others)
    to_host = asked == "cpu" or (name == "copy_" and not isinstance(args[0], GPUTensor))
    from_host = not ours if name in MOVES else name == "copy_" and bool(others)
    waits_to_send = from_host and not kwargs.get("non_blocking")
    counts["waits"] += name in WAITS or to_host or waits_to_send
    counts["operations"] += 1
    if recording:
        assert name not in WAITS and not to_host and not from_host, f"while recording: {function}"
    known = {id(x.held): x for x in ours}
    given, known_kwargs = tree_map(held_by, (args, kwargs))
    if recording:
        keep_overwritten(function, given, known_kwargs)
    result = compute_held(function, given, known_kwargs)
    if recording:
        recording[-1].append((function, given, known_kwargs, result))

    def returned(x):
        if to_host or not isinstance(x, torch.Tensor):
            return x
        return known[id(x)] if id(x) in known else GPUTensor(x)

    flat, spec = tree_flatten(result)
    return tree_unflatten([returned(x) for x in flat], spec)


def check_devices(function, name, args, ours, others):
    """As on a GPU: numbers of the CPU, and its indices into a GPU's tensor, may take part."""
    if name in (*MOVES, "copy_", "_foreach_copy_") or function.namespace == "c10d" or not ours:
        return
    allowed = args[1] if name in TAKES_INDICES and isinstance(args[0], GPUTensor) else []
    wrong = [x for x in others if x.dim() and not any(x is index for index in allowed)]
    if wrong:
        raise RuntimeError(f"{function} got tensors of cuda:0, and of the cpu: {wrong[0].shape}")


def held_by(x):
    if isinstance(x, GPUTensor):
        return x.held
    return CPU if isinstance(x, torch.device) else x


def compute_held(function, args, kwargs):
    """An operation on tensors of the CPU, also if the CPU has none like it."""
    packet, aten = function.overloadpacket, torch.ops.aten
    if packet is aten._conj:  # a wrapper does not know that a view is still to be conjugated
        return torch.conj_physical(*args)
    if packet is aten._fused_rms_norm_backward:
        return rms_norm_backward(*args)
    try:
        return function(*args, **kwargs)
    except NotImplementedError:
        result = function.decompose(*args, **kwargs)
        if result is NotImplemented:
            raise
        return result


def rms_norm_backward(grad, x, shape, scale, weight, wanted):
    normed = x.float() * scale.float()
    grad_normed = grad.float() * (1 if weight is None else weight.float())
    inner = (grad_normed * normed).mean(-1, keepdim=True)
    grad_x = (scale.float() * (grad_normed - normed * inner)).to(x.dtype)
    if weight is None or not wanted[1]:
        return grad_x, None
    return grad_x, (grad.float() * normed).flatten(0, -2).sum(0).to(weight.dtype)


# -- graphs ----------------------------------------------------------------------------------------
def keep_overwritten(function, args, kwargs):
    """Nothing runs while a GPU records; here it does, and is undone at the end."""
    for i, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            for x in tree_leaves(args[i] if i < len(args) else kwargs.get(argument.name)):
                if isinstance(x, torch.Tensor):
                    storage = x.untyped_storage()
                    overwritten.setdefault(storage.data_ptr(), (storage, storage.clone()))


class Graph:
    def __init__(self, *_):
        self.operations: list[tuple] = []

    def replay(self):
        counts["replays"] += 1
        anew: dict[int, torch.Tensor] = {}
        for function, args, kwargs, before in self.operations:
            given = tree_map(lambda x: anew.get(id(x), x), (args, kwargs))
            now = compute_held(function, *given)
            anew.update(zip(map(id, tree_leaves(before)), tree_leaves(now), strict=True))


@contextlib.contextmanager
def record(graph, **_):
    recording.append(graph.operations)
    try:
        yield
    finally:
        recording.pop()
        for storage, content in overwritten.values():
            storage.copy_(content)
        overwritten.clear()


# -- torch.cuda ------------------------------------------------------------------------------------
class Stream:
    device = GPU

    def __init__(self, *_, **__):
        self.time = time.perf_counter()

    def _nothing(self, *_):
        pass

    wait_stream = wait_event = synchronize = wait = _nothing

    def record(self, *_):
        self.time = time.perf_counter()

    def is_capturing(self):
        return bool(recording)

    def query(self):
        return True

    def elapsed_time(self, later):
        return 1000 * (later.time - self.time)


class Event(Stream):
    pass


ANSWERS = {
    "_lazy_init": None,
    "is_available": True,
    "is_initialized": True,
    "is_bf16_supported": True,
    "is_current_stream_capturing": False,
    "device_count": 1,
    "current_device": 0,
    "set_device": None,
    "synchronize": None,
    "empty_cache": None,
    "ipc_collect": None,
    "get_device_name": NAME,
    "get_device_capability": (9, 0),
    "get_device_properties": SimpleNamespace(
        name=NAME, total_memory=MEMORY, major=9, minor=0, multi_processor_count=100
    ),
    "mem_get_info": (MEMORY, MEMORY),
    "memory_stats": defaultdict(int),
    "memory_allocated": 1 << 20,
    "max_memory_allocated": 1 << 20,
    "memory_reserved": 1 << 20,
    "max_memory_reserved": 1 << 20,
    "reset_peak_memory_stats": None,
    "reset_max_memory_allocated": None,
    "reset_max_memory_cached": None,
    "graph_pool_handle": (0, 1),
    "current_stream": Stream(),
    "default_stream": Stream(),
}


def answer_for_cuda() -> None:
    cuda, generator = torch.cuda, torch.Generator()
    for name, value in ANSWERS.items():
        setattr(cuda, name, lambda *_, value=value, **__: value)
    cuda.default_generators = (generator,)
    cuda.manual_seed = cuda.manual_seed_all = generator.manual_seed
    cuda.get_rng_state = lambda *_: generator.get_state()
    cuda.set_rng_state = lambda state, *_: generator.set_state(state)
    cuda.Stream, cuda.Event, cuda.CUDAGraph, cuda.graph = Stream, Event, Graph, record
    cuda.stream = cuda.device = cuda.device_of = lambda *_: contextlib.nullcontext()
    torch.accelerator.current_stream = cuda.current_stream
    torch.accelerator.synchronize = cuda.synchronize
    torch.accelerator.is_available = cuda.is_available


def answer_for_nccl() -> None:
    start = torch.distributed.init_process_group

    def init_process_group(backend=None, **kwargs):
        return start("gloo" if backend == "nccl" else backend, **kwargs)

    torch.distributed.init_process_group = init_process_group


def keep_parameters() -> None:
    """`Module.to` replaces parameters by wrappers, but only once, as a GPU would keep them."""
    move = nn.Module.to
    torch.__future__.set_overwrite_module_params_on_conversion(True)

    def to(self, *args, **kwargs):
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        held = [*self.parameters(), *self.buffers()]
        there = device is not None and device.type == "cuda"
        there = there and bool(held) and all(isinstance(x, GPUTensor) for x in held)
        same = all(dtype in (None, x.dtype) or not x.is_floating_point() for x in held)
        return self if there and same else move(self, *args, **kwargs)

    nn.Module.to = to
    nn.Module.cuda = lambda self, device=None: self.to("cuda")


def enter() -> None:
    """Simulate in this thread from now on."""
    torch._C._set_only_lift_cpu_tensors(True)
    Simulation().__enter__()


def start() -> None:
    """Simulate in all threads."""
    library.guard_devices()
    answer_for_cuda()
    answer_for_nccl()
    keep_parameters()
    # Views of inference mode's tensors cannot be wrapped.
    torch.inference_mode = lambda on=True: torch.no_grad() if on else torch.enable_grad()
    run = threading.Thread.run

    def run_thread(self):
        enter()
        run(self)

    threading.Thread.run = run_thread
    enter()


if __name__ == "__main__":
    start()
    atexit.register(lambda: print(f"simulated: {dict(counts)}", file=sys.stderr))
    program = Path(sys.argv[2]).resolve()
    sys.argv = [str(program), *sys.argv[3:]]
    sys.path[0] = str(program.parent)
    runpy.run_path(str(program), run_name="__main__")
