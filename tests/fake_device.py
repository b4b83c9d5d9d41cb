"""A stand-in for a GPU: it computes on the CPU, keeps a GPU's time, notes waits and collectives.

Its tensors are of the device `fake`. Each operation takes OPERATION on the stream of the moment, a
copy to or from the host COPY; memory and views take nothing. The host takes no time itself, unless
`launch_time` is set: its clock moves when it waits. What would make the host wait for a GPU's work
is noted with the place that asked for it: a value that is read, a copy of or to memory that is not
pinned, a shape that depends on values, a synchronization. Bytes that cross are counted by dtype.

Installing it cannot be undone, so it belongs in a process of its own.
"""

from __future__ import annotations

import math
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

OPERATION = 1.0
COPY = 10.0
HOLD_UP = 1e5
NAME = "fake"

aten = torch.ops.aten
READS_VALUES = {
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
}


class Stream:
    """Does one thing after another."""

    def __init__(self, device: object = None) -> None:
        self.free_at = self.worked = 0.0

    def spend(self, time: float) -> None:
        """Be busy for so long, once free and told to."""
        DEVICE.now += DEVICE.launch_time
        self.free_at = max(self.free_at, DEVICE.now) + time
        self.worked += time

    def wait_event(self, event: Event) -> None:
        self.free_at = max(self.free_at, event.at)

    def wait_stream(self, other: Stream) -> None:
        self.free_at = max(self.free_at, other.free_at)

    def synchronize(self) -> None:
        DEVICE.wait("synchronize a stream", self.free_at)


class Event:
    """A moment of a stream."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = math.inf

    def record(self, stream: Stream | None = None) -> None:
        self.at = max((stream or DEVICE.current).free_at, DEVICE.now)

    def query(self) -> bool:
        return self.at <= DEVICE.now

    def synchronize(self) -> None:
        DEVICE.wait("synchronize an event", self.at)

    def elapsed_time(self, later: Event) -> float:
        return 1e3 * (later.at - self.at)


class Device:
    """What torch.cuda is to a GPU."""

    Stream, Event = Stream, Event

    def __init__(self) -> None:
        self.compute = self.current = Stream()
        self.now = 0.0
        """The host's clock."""
        self.launch_time = 0.0
        """Of the host, for an operation."""
        self.waits: list[str] = []
        self.collectives: list[str] = []
        """Operations of torch.distributed, by name."""
        self.up: Counter[str] = Counter()
        """Bytes copied from the host, by dtype."""
        self.down: Counter[str] = Counter()
        self.pinned_bytes = 0
        """Bytes that the host itself has copied into pinned memory."""

    def take_waits(self) -> list[str]:
        """Waits since the last call."""
        waits, self.waits = self.waits, []
        return waits

    def take_collectives(self) -> list[str]:
        """Collectives since the last call."""
        collectives, self.collectives = self.collectives, []
        return collectives

    def take_bytes(self) -> dict[str, Any]:
        """Bytes since the last call."""
        taken = {"up": dict(self.up), "down": dict(self.down), "pinned": self.pinned_bytes}
        self.up, self.down, self.pinned_bytes = Counter(), Counter(), 0
        return taken

    def wait(self, why: str, until: float | None = None) -> None:
        """The host waits, by default for the current stream."""
        places = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
        outside = [frame for frame in places if frame.filename != __file__]
        self.waits.append(f"{why} at {' < '.join(f'{f.filename}:{f.lineno}' for f in reversed(outside[-4:]))}")
        self.now = max(self.now, self.current.free_at if until is None else until)

    def synchronize(self, device: object = None) -> None:
        self.wait("synchronize the device")

    def current_stream(self, device: object = None) -> Stream:
        return self.current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def _sleep(self, cycles: int) -> None:
        self.current.spend(HOLD_UP)
        self.current.worked -= HOLD_UP

    def mem_get_info(self, device: object = None) -> tuple[int, int]:
        return 1 << 34, 1 << 34

    # -- what torch asks of a device's module ------------------------------------------------------

    def is_initialized(self) -> bool:
        return True

    is_available = is_initialized

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """The values are the CPU's, and so are random numbers."""

    manual_seed = manual_seed_all


DEVICE = Device()


class DeviceTensor(Tensor):
    """A tensor of the device; `values` are on the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> DeviceTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=torch.device(NAME, 0),
        )
        made.values = values
        return made

    @property
    def data(self) -> Any:
        return self.detach()

    @data.setter
    def data(self, other: DeviceTensor) -> None:
        Tensor.data.__set__(self, other)
        self.values = other.values

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.values.untyped_storage()

    def record_stream(self, stream: Stream) -> None:
        """Nothing is freed here."""

    def tolist(self) -> Any:
        DEVICE.wait("tolist")
        return self.values.tolist()

    def __format__(self, spec: str) -> str:
        DEVICE.wait("format")
        return format(self.values, spec)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(operation, args, kwargs or {})


def run(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation that touches the device."""
    if operation.namespace == "c10d":
        DEVICE.collectives.append(operation.name())
    if operation is aten._to_copy.default:
        return _to_copy(args[0], **kwargs)
    if operation is aten.copy_.default and is_there(args[0]) != is_there(args[1]):
        return _copy_across(*args, **kwargs)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    known = {id(tensor.values): tensor for tensor in tensors if is_there(tensor)}
    if any(tensor.dim() and not is_there(tensor) for tensor in tensors):
        raise RuntimeError(f"{operation}: tensors on two devices")
    if operation in READS_VALUES or _has_mask(operation, args) or _has_unknown_size(operation, kwargs):
        DEVICE.wait(str(operation))
    if "device" in kwargs:
        kwargs = kwargs | {"device": "cpu"}
    DEVICE.current.spend(0.0 if operation.is_view else OPERATION)
    results = operation(*tree_map(_values, args), **tree_map(_values, kwargs))

    def result(value: Any) -> Any:
        # What an operation changes in place is the same tensor afterwards.
        return known[id(value)] if id(value) in known else DeviceTensor(value)

    return tree_map(lambda value: result(value) if isinstance(value, Tensor) else value, results)


def is_there(tensor: Any) -> bool:
    """Whether it is a tensor of the device."""
    return isinstance(tensor, DeviceTensor)


def _values(tensor: Any) -> Any:
    return tensor.values if is_there(tensor) else tensor


def _has_mask(operation: Any, args: tuple[Any, ...]) -> bool:
    """Indexed by booleans: the shape of the result depends on values."""
    if operation is not aten.index.Tensor:
        return False
    return any(index is not None and index.dtype is torch.bool for index in args[1])


def _has_unknown_size(operation: Any, kwargs: dict[str, Any]) -> bool:
    return operation is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None


def _to_copy(source: Tensor, *, device: Any = None, non_blocking: bool = False, **kwargs: Any) -> Tensor:
    goes_there = is_there(source) if device is None else torch.device(device).type == NAME
    kwargs.pop("pin_memory", None)
    values = aten._to_copy.default(_values(source), **kwargs)
    if goes_there == is_there(source):
        DEVICE.current.spend(OPERATION)
    else:
        # What comes down by `to` lands in memory that is not pinned.
        _cross(source, non_blocking and goes_there and is_pinned(source))
    return DeviceTensor(values) if goes_there else values


def _copy_across(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    _cross(source, non_blocking and is_pinned(source if is_there(target) else target))
    _values(target).copy_(_values(source))
    return target


def _cross(source: Tensor, is_queued: bool) -> None:
    DEVICE.current.spend(COPY)
    (DEVICE.down if is_there(source) else DEVICE.up)[str(source.dtype)] += source.nbytes
    if not is_queued:
        DEVICE.wait("a copy from the device" if is_there(source) else "a copy to the device")


# -- pinned memory, which a machine without a GPU cannot have --------------------------------------


PINNED: dict[int, Any] = {}
"""Memory said to be pinned, by address; it is kept, so that no other gets the address."""


def is_pinned(tensor: Tensor) -> bool:
    """Whether its memory is said to be pinned."""
    return not tensor.numel() or tensor.untyped_storage().data_ptr() in PINNED


def _pin(tensor: Tensor, device: object = None) -> Tensor:
    if is_pinned(tensor):
        return tensor
    DEVICE.pinned_bytes += tensor.nbytes
    return _said_to_be_pinned(tensor.clone())


def _said_to_be_pinned(tensor: Tensor) -> Tensor:
    storage = tensor.untyped_storage()
    PINNED[storage.data_ptr()] = storage
    return tensor


def _pins(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        tensor = make(*args, **kwargs)
        return _said_to_be_pinned(tensor) if pin_memory else tensor

    return made


# -- the same device for DeepSpeed -----------------------------------------------------------------


class Accelerator(CPU_Accelerator):  # type: ignore[misc]
    """DeepSpeed's view of the device."""

    Stream, Event = Stream, Event

    def is_synchronized_device(self) -> bool:
        return False

    def device_name(self, device_index: int | None = None) -> str:
        return NAME if device_index is None else f"{NAME}:{device_index}"

    def current_device(self) -> int:
        return 0

    def current_device_name(self) -> str:
        return f"{NAME}:0"

    def device_count(self) -> int:
        return 1

    def synchronize(self, device_index: int | None = None) -> None:
        DEVICE.synchronize()

    def stream(self, stream: Stream) -> Any:
        return DEVICE.stream(stream)

    def current_stream(self, device_index: int | None = None) -> Stream:
        return DEVICE.current

    def default_stream(self, device_index: int | None = None) -> Stream:
        return DEVICE.compute

    def on_accelerator(self, tensor: Tensor) -> bool:
        return is_there(tensor)


def install() -> Any:
    """Make `fake` a device of torch and DeepSpeed's accelerator. Keep what it returns."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, DEVICE)
    library = torch.library.Library("aten", "IMPL")
    for name in ("empty.memory_format", "empty_strided", "arange", "arange.start", "arange.start_step"):
        library.impl(name, _factory(name), "PrivateUse1")
    library.impl("_to_copy", _to_copy, "PrivateUse1")
    set_accelerator(Accelerator())
    Tensor.pin_memory = _pin  # type: ignore[method-assign, assignment]
    for name in ("empty", "tensor"):
        setattr(torch, name, _pins(getattr(torch, name)))
    return library


def _factory(name: str) -> Callable[..., Tensor]:
    operation = getattr(aten, name.partition(".")[0])
    overload = getattr(operation, name.partition(".")[2] or "default")

    def make(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        DEVICE.current.spend(0.0 if name.startswith("empty") else OPERATION)
        return DeviceTensor(overload(*args, **(kwargs | {"device": "cpu"})))

    return make
