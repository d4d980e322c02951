"""A CUDA device without one: the numbers are computed on the CPU, the rules about devices are CUDA's.

    with SimulatedCuda() as cuda, cuda.phase("sampling"):
        rollout = Unmask(...)(policy.to("cuda"), ...)
    assert cuda.waits("sampling") == 1
    print(cuda.report())

A tensor "on the device" is a SimulatedTensor: it shares its data with a CPU tensor and says that it is on cuda:0. What
makes or moves tensors is caught as a torch function; every kernel is seen in __torch_dispatch__, which raises what CUDA
would raise (operands on two devices, a generator of the host, an index on the device into a tensor of the host,
products of integers, cuBLAS under deterministic algorithms where CUBLAS_WORKSPACE_CONFIG was set too late) and counts
what would make the host wait for the device. A copy to the device waits unless it is non-blocking and from pinned
memory, as CUDA stages pageable memory itself.

Not simulated: limits of single kernels, memory, streams, several devices, rounding that differs from the CPU's. The
backward of autograd runs in the CPU's one thread. torchao is to be imported before the simulation begins.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from accelerate.state import AcceleratorState, PartialState
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import dllm_rl

PACKAGE = dllm_rl.__path__[0] + os.sep  # and not by name: a clone's own folder is called dllm_rl too
DEVICE = torch.device("cuda", 0)
INDEXING = {"aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"}
TWO_DEVICES = {"aten::_to_copy", "aten::set_"}  # kernels that may see both sides, as copy_ may
JOINING = {"aten::cat", "aten::stack"}  # refuse even a number of the host among tensors of the device
PRODUCTS = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::_int_mm", "aten::dot"}
WAITING = {
    "aten::_local_scalar_dense": "a number read",
    "aten::is_nonzero": "a number read",
    "aten::nonzero": "nonzero",
    "aten::masked_select": "masked_select",
    "aten::equal": "torch.equal",
    "aten::_unique2": "unique",
}
NOTHING = ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats", "_lazy_init")
ANSWERS = {
    **{f"cuda.{name}": None for name in NOTHING},
    "cuda.is_available": True,
    "cuda.is_bf16_supported": True,
    "cuda.is_current_stream_capturing": False,
    "cuda.device_count": 1,
    "cuda.current_device": 0,
    "cuda.memory_allocated": 0,
    "cuda.max_memory_allocated": 0,
    "cuda.get_rng_state_all": [],
    "cuda.get_device_capability": (9, 0),
    "cuda.get_device_name": "simulated",
    "accelerator.is_available": True,
    "accelerator.device_count": 1,
    "accelerator.current_accelerator": torch.device("cuda"),
    "accelerator.current_device_index": 0,
    "accelerator.current_stream": mock.Mock(is_capturing=lambda: False),
}
running: "SimulatedCuda | None" = None
move_to = torch.Tensor.to


def is_cuda(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def on_host(x):
    """The CPU tensor behind a simulated one, outside of autograd."""
    with torch._C._DisableTorchDispatch(), torch.no_grad():
        return torch.Tensor._make_subclass(torch.Tensor, x) if isinstance(x, SimulatedTensor) else x


class SimulatedTensor(torch.Tensor):
    """A tensor on cuda:0 whose data lie in the host's memory."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __new__(cls, real, requires_grad=False):
        return torch.Tensor._make_subclass(cls, real, requires_grad)

    @property
    def device(self):
        return DEVICE

    @property
    def is_cuda(self):
        return True

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            memo[id(self)] = copy = SimulatedTensor(on_host(self).clone(), self.requires_grad)
            copy.__dict__.update(self.__dict__)  # that it is a parameter
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        return on_host(self).__reduce_ex__(protocol)

    def __repr__(self):
        running.count("a tensor printed")
        return f"tensor(..., size={tuple(self.shape)}, dtype={self.dtype}, device='cuda:0')"

    def __format__(self, spec):
        return repr(self) if self.dim() else format(self.item(), spec)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        check(func._schema.name, args, kwargs, tensors)
        if func is torch.ops.aten.histc.default:  # of integers it is CUDA's alone
            args = (args[0].float(), *args[1:])
        if func is torch.ops.aten.mm.dtype:  # CUDA's alone
            func, args = torch.ops.aten.mm.default, tuple(x.float() for x in args[:2])
        with torch._C._DisableTorchDispatch():
            out = func(*args, **kwargs)
        given = {id(x) for x in tensors}
        fresh = lambda x: type(x) is torch.Tensor and id(x) not in given  # noqa: E731
        return tree_map(lambda x: SimulatedTensor(x) if fresh(x) else x, out)


def check(name, args, kwargs, tensors) -> None:
    """Raise what CUDA would raise for a kernel, and count what would wait for the device."""
    hosts = [x for x in tensors if not isinstance(x, SimulatedTensor) and x.device.type == "cpu"]
    if name in INDEXING:
        check_index(name, args)
    elif name == "aten::copy_":
        if hosts and (args[0] is hosts[0] or hosts[0].dim()):  # a number of the host is a fill
            running.count("copy to the host" if args[0] is hosts[0] else "copy to the device")
    elif name not in TWO_DEVICES and not name.startswith("aten::_foreach"):
        check_devices(name, hosts, tensors)
    if any(isinstance(x, torch.Generator) for x in (*args, *kwargs.values())):
        raise RuntimeError(f"{name}: Expected a 'cuda' device type for generator but found 'cpu'")
    if name in PRODUCTS:
        check_product(name, tensors[-1])
    if name in WAITING:
        running.count(WAITING[name])


def check_devices(name, hosts, tensors) -> None:
    """A number of the host may stand among tensors of the device; nothing else of it."""
    if any(x.dim() or name in JOINING for x in hosts):
        shapes = [f"{'cuda:0' if isinstance(x, SimulatedTensor) else 'cpu'}{list(x.shape)}" for x in tensors]
        found = ", ".join(shapes)
        raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found {found}")


def check_index(name, args) -> None:
    indices, value = [x for x in args[1] if x is not None], args[2] if len(args) > 2 else None
    if not isinstance(args[0], SimulatedTensor):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    if value is not None and not isinstance(value, SimulatedTensor) and value.dim():
        raise RuntimeError(f"{name}: expected the value on cuda:0, but found cpu{list(value.shape)}")
    number = value is not None and not isinstance(value, SimulatedTensor)  # it is copied to the device,
    fill = number and len(indices) == 1 and indices[0].dtype == torch.bool  # but for x[mask] = 0
    if number and not fill:
        running.count("copy to the device")
    for index in indices:
        if index.dtype == torch.bool and not fill:
            running.count("a mask as an index")
        if not isinstance(index, SimulatedTensor):
            running.count("copy to the device")


def check_product(name, factor) -> None:
    """torch asks the environment once, at the first product of the process, what workspace cuBLAS is to have."""
    if not factor.is_floating_point() and name != "aten::_int_mm":
        raise NotImplementedError(f"\"{name}_cuda\" not implemented for '{factor.dtype}'")
    if running.workspace is None:
        running.workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG", "")
    if torch.are_deterministic_algorithms_enabled() and running.workspace not in (":4096:8", ":16:8"):
        raise RuntimeError("deterministic, but CUBLAS_WORKSPACE_CONFIG was not set before the first product")


class Move(torch.autograd.Function):
    """A copy on the other side; its gradient comes back to where the tensor was."""

    @staticmethod
    def forward(ctx, x, cuda):
        ctx.was_cuda = isinstance(x, SimulatedTensor)
        copy = on_host(x).detach().clone()
        return SimulatedTensor(copy) if cuda else copy

    @staticmethod
    def backward(ctx, gradient):
        return Move.apply(gradient, ctx.was_cuda), None


class SimulatedCuda(TorchFunctionMode):
    """The simulation. `counts` maps (phase, kind, place) to how often the host waited for the device there."""

    def __init__(self):
        super().__init__()
        self.counts, self.current = Counter(), ""
        self.workspace = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, first, method = dict(kwargs or {}), args[0] if args else None, torch.Tensor
        simulated = isinstance(first, SimulatedTensor)
        if simulated and func in (method.numpy, method.__array__):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        if simulated and func in (method.__deepcopy__, method.__reduce_ex__, method.__repr__, method.__format__):
            return getattr(SimulatedTensor, func.__name__)(*args)
        if simulated and func is method.tolist:
            self.count("tolist")
            return on_host(first).tolist()
        if func is method.pin_memory:
            return pinned(first)
        if func is move_to:
            return self.to(first, *args[1:], **kwargs)
        if func in (method.cpu, method.cuda):
            return self.move(first, func is method.cuda, kwargs.get("non_blocking", False))
        for kind in types:  # torchao's tensors bring functions of their own
            if func in getattr(kind, "_TORCH_FN_TABLE", {}).get(kind, ()):
                return self.inside(kind.__torch_function__, func, types, args, kwargs)
        if isinstance(kwargs.get("device"), str | torch.device | int):
            return self.make(func, args, kwargs)
        if kwargs.pop("pin_memory", False):
            return pinned(func(*args, **kwargs))
        return func(*args, **kwargs)

    def inside(self, func, *args, **kwargs):
        """A call that runs Python of its own, with this mode on: torch leaves it while its __torch_function__ runs."""
        torch.overrides._push_mode(self)
        try:
            return func(*args, **kwargs)
        finally:
            torch.overrides._pop_mode()

    def make(self, func, args, kwargs):
        """What a factory makes, on the device that it was asked for."""
        cuda = is_cuda(kwargs["device"])
        if cuda:
            kwargs["device"] = "cpu"
            if kwargs.get("generator") is not None:
                raise RuntimeError(f"{func.__name__}: Expected a 'cuda' device type for generator but found 'cpu'")
            if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], SimulatedTensor) and args[0] != []:
                self.count("copy to the device")
        out = func(*args, **kwargs)
        made = isinstance(out, torch.Tensor) and out.device.type in ("cpu", "cuda")
        if not made or isinstance(out, SimulatedTensor) == cuda:
            return out
        return SimulatedTensor(out, out.requires_grad) if cuda else on_host(out)

    def to(self, x, *args, **kwargs):
        """Tensor.to in all its forms: the device is decided here, the rest is torch's."""
        args, device, like = list(args), kwargs.pop("device", None), kwargs.pop("other", None)
        if args and isinstance(args[0], torch.Tensor):
            like = args.pop(0)
        elif args and (args[0] is None or isinstance(args[0], torch.device | str | int)):
            device = args.pop(0)
        dtype = kwargs.pop("dtype", None) or (args.pop(0) if args and isinstance(args[0], torch.dtype) else None)
        cuda = isinstance(x, SimulatedTensor) if device is None else is_cuda(device)
        if like is not None:
            cuda, dtype = isinstance(like, SimulatedTensor), like.dtype
        if device is not None and torch.device(device).type == "meta":
            return move_to(x, device=device, dtype=dtype)
        out = self.move(x, cuda, kwargs.pop("non_blocking", False) or bool(args and args[0]))
        return out if dtype is None and not kwargs else move_to(out, dtype=dtype, **kwargs)

    def move(self, x, cuda: bool, non_blocking: bool):
        """A copy on the other side; x itself where it is there already."""
        if isinstance(x, SimulatedTensor) == cuda or x.device.type == "meta":
            return x
        if not (non_blocking and cuda and getattr(x, "pinned", False)):
            self.count("copy to the device" if cuda else "copy to the host")
        return Move.apply(x, cuda)

    def count(self, kind: str) -> None:
        """Note a wait, at the innermost line of the library, and where below it that line waits, outside of torch."""
        frame, below = sys._getframe(1), ""
        while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
            file = frame.f_code.co_filename
            if not below and "/torch/" not in file and file != __file__:
                below = f" <- {'/'.join(file.split('/')[-2:])}:{frame.f_lineno}"
            frame = frame.f_back
        file = "" if frame is None else frame.f_code.co_filename.removeprefix(PACKAGE)
        place = "outside" if frame is None else f"{file}:{frame.f_lineno} {frame.f_code.co_name}"
        self.counts[self.current, kind, place + below] += 1

    def waits(self, phase: str | None = None, *, place: str = "") -> int:
        """How often the host waited: in a phase (None: in all), at places that contain a text."""
        return sum(n for (p, _, at), n in self.counts.items() if phase in (None, p) and place in at)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before, self.current = self.current, name
        try:
            yield
        finally:
            self.current = before

    def report(self) -> str:
        """A line for each place at which the host waited, the most frequent first in each phase."""
        lines = sorted((phase, -n, kind, place) for (phase, kind, place), n in self.counts.items())
        return "\n".join(f"{phase:12} {-n:5}  {kind:20} {place}" for phase, n, kind, place in lines)

    def __enter__(self):
        global running
        assert running is None, "one simulation at a time"
        running = self
        forget_processes()
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # Module.to makes simulated parameters
        self.patches = [patch for patch in patches(self) if patch.start() or True]
        return super().__enter__()

    def __exit__(self, *exc):
        global running
        super().__exit__(*exc)
        for patch in reversed(self.patches):
            patch.stop()
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        forget_processes()
        running = None


def pinned(x):
    copy = x.clone()
    copy.pinned = True
    return copy


def forget_processes() -> None:
    """Accelerate keeps the device that a process first got."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def patches(simulation: SimulatedCuda) -> Iterator:
    """What torch says of its devices, autocast, and what a torch function mode is not told of."""
    host = lambda x: "cpu" if x == "cuda" else x  # noqa: E731
    on_cpu = lambda f: lambda *a, **k: f(*map(host, a), **{n: host(v) for n, v in k.items()})  # noqa: E731
    for name, answer in ANSWERS.items():
        yield mock.patch(f"torch.{name}", lambda *a, _answer=answer, **k: _answer)
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        yield mock.patch(f"torch.{name}", on_cpu(getattr(torch, name)))
    yield mock.patch("torch.version.cuda", "13.0")
    backward = torch.autograd._engine_run_backward  # runs autograd functions that are written in Python
    yield mock.patch("torch.autograd._engine_run_backward", lambda *a, **k: simulation.inside(backward, *a, **k))
    autocast = torch.amp.autocast_mode.autocast
    yield mock.patch.object(autocast, "__init__", on_cpu(autocast.__init__))

    def to(x, *args, **kwargs):  # also inside the Python kernels of torchao's own operators
        return (move_to if hasattr(x, "tensor_data_names") else simulation.to)(x, *args, **kwargs)

    yield mock.patch.object(torch.Tensor, "to", to)
    make = torch.Tensor._make_wrapper_subclass

    def wrapper(cls, *args, **kwargs):  # torchao's tensors are made for a device that this build has not
        return make(cls, *args, **(kwargs | ({"device": "cpu"} if is_cuda(kwargs.get("device")) else {})))

    yield mock.patch.object(torch.Tensor, "_make_wrapper_subclass", staticmethod(wrapper))
    groups = torch.nn.utils.clip_grad._group_tensors_by_device_and_dtype  # asks in C++ for devices

    def grouped(tensors, *args, **kwargs):
        found = groups(tensors, *args, **kwargs)
        there = any(isinstance(x, SimulatedTensor) for x in tensors[0])
        return {(DEVICE if there else device, dtype): group for (device, dtype), group in found.items()}

    yield mock.patch("torch.nn.utils.clip_grad._group_tensors_by_device_and_dtype", grouped)
    if "torchao" in sys.modules:
        from torchao.utils import TorchAOBaseTensor

        device = property(lambda x: x.qdata.device)
        yield mock.patch.object(TorchAOBaseTensor, "device", device, create=True)
