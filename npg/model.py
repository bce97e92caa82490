"""A network as a function, and what its forward pass reads and moves beside parameters: buffers and random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from npg.parameters import Memory, apart

__all__ = [
    "Buffers",
    "Model",
    "by_slot",
    "frozen_statistics",
    "is_autocast",
    "layer_by_layer",
    "overwrite",
    "padding_rows",
    "plain_attention",
    "undone_on_error",
    "unwrapped",
    "without_autocast",
]


class FunctionalModel(Protocol):
    """A network as a function of its parameters: ``f(parameters, *inputs) → outputs``."""

    def __call__(self, parameters: Mapping[str, Tensor], /, *inputs: Any) -> Tensor: ...


Model = nn.Module | FunctionalModel
_MODES = ("training", "track_running_stats")
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


class Buffers:
    """The buffers of a model, running statistics among them, as they are now.

    One that lies in a parameter's memory is none of them: it moves with the parameter.
    """

    def __init__(self, model: Model) -> None:
        modules = list(model.named_modules()) if isinstance(model, nn.Module) else []
        self._copies = [
            (module, path, name, buffer, None if buffer is None else buffer.detach().clone())
            for path, module in modules
            for name, buffer in module._buffers.items()
        ]
        if self._copies:
            memory = Memory(cast(nn.Module, model).parameters())
            self._copies = [entry for entry in self._copies if entry[3] is None or not memory.meets(entry[3])]
        self._in_place: list[tuple[str, Tensor, int]] = []  # what `set_apart` left where it is
        self._beside = {
            module: {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float)) and k not in _MODES}
            for module, *_ in self._copies
            if not type(module).__module__.startswith("torch.nn.")
        }

    def __bool__(self) -> bool:
        return bool(self._copies)

    def named(self) -> dict[str, Tensor]:
        """Their values as they were, by name."""
        named = ((f"{path}.{name}" if path else name, copy) for _, path, name, _, copy in self._copies)
        return {name: copy for name, copy in named if copy is not None}

    def set_apart(self) -> None:
        """Put copies in their places until `restore`, so that a recorded forward pass keeps what it has read.

        Not of those that share memory with each other, or that a module of one's own also has as a plain attribute.
        """
        elsewhere = {id(x) for module in self._beside for x in vars(module).values() if isinstance(x, Tensor)}
        distinct = {id(buffer): buffer for *_, buffer, _ in self._copies if buffer is not None}
        alone = apart(distinct) - elsewhere
        copies: dict[int, Tensor] = {}
        for module, path, name, buffer, copy in self._copies:
            if id(buffer) in alone:
                module._buffers[name] = copies.setdefault(id(buffer), cast(Tensor, copy).clone())
            elif buffer is not None and not buffer.is_inference():
                self._in_place.append((f"{path}.{name}" if path else name, buffer, buffer._version))

    def check_apart(self) -> None:
        """Raise ValueError if the pass wrote to a buffer that it might have read, and that `set_apart` left there."""
        if moved := [name for name, buffer, version in self._in_place if buffer._version != version]:
            raise ValueError(
                f"the forward pass writes to the buffers {moved}, which share memory with other tensors of the model, "
                "so that a recorded pass would not keep what it has read: give each buffer memory of its own (clone())"
            )

    @torch.no_grad()
    def restore(self, keep: Tensor | None = None) -> None:
        """Put them back as they were, bit for bit; all but where ``keep``, (), is true.

        With them go the numbers beside them in modules of one's own: the length of a cache may be among them.
        """
        for module, numbers in self._beside.items() if keep is None else ():
            vars(module).update(numbers)
        for module, _, name, buffer, copy in self._copies:
            now = module._buffers[name]
            if buffer is now is None:
                continue
            if keep is not None:
                if (
                    now is not None
                    and copy is not None
                    and now.shape == copy.shape
                    and now.layout is copy.layout is torch.strided
                ):
                    copy = torch.where(keep, now, copy)
                elif keep:  # what is sparse, new, or of another shape has no where(): the host looks
                    continue
                else:
                    vars(module).update(self._beside.get(module, {}))
            module._buffers[name] = buffer
            if buffer is not None:
                overwrite(buffer, cast(Tensor, copy))

    def restored_on_error(self) -> AbstractContextManager[None]:
        """Put them back if an error, or an interrupt, leaves the block."""
        return undone_on_error(self.restore)


@torch.no_grad()
def overwrite(buffer: Tensor, values: Tensor) -> None:
    """Put ``values`` where the buffer is; of an axis that was expanded there is one element."""
    if buffer.layout is torch.strided:
        kept = tuple(slice(None) if stride else slice(1) for stride in buffer.stride())
        buffer, values = buffer[kept], values[kept]
    buffer.data.copy_(values)  # not counted as a change: a recorded forward pass may hold it


@contextmanager
def undone_on_error(undo: Callable[[], None]) -> Iterator[None]:
    """Call ``undo`` if an error, or an interrupt, leaves the block."""
    try:
        yield
    except BaseException:
        undo()
        raise


@contextmanager
def frozen_statistics(model: Model) -> Iterator[None]:
    """Normalise with the batch's own statistics, as in training, without moving the running ones or any other buffer.

    Dropping ``track_running_stats`` is the one switch that BatchNorm looks at in training mode; InstanceNorm looks at
    none, and so has its running statistics taken away meanwhile. A graph that is recorded here keeps the buffers that
    it has read, whatever becomes of the model's.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    buffers = Buffers(model)
    if torch.is_grad_enabled():
        buffers.set_apart()
    moved = [
        m
        for m in modules
        if m.training
        and getattr(m, "track_running_stats", False)
        and hasattr(m, "running_mean")
        and not isinstance(m, torch.jit.ScriptModule)  # whose switches are constants
    ]
    hidden = [(m, m.running_mean, m.running_var) for m in moved if isinstance(m, _INSTANCE_NORMS)]
    try:
        for m in moved:
            m.track_running_stats = False  # type: ignore[assignment]
        for norm, *_ in hidden:
            norm.running_mean = norm.running_var = None
        yield
        buffers.check_apart()
    finally:
        for m in moved:
            m.track_running_stats = True  # type: ignore[assignment]
        for norm, mean, variance in hidden:
            norm.running_mean, norm.running_var = mean, variance
        buffers.restore()


def unwrapped(model: Model, process_group: dist.ProcessGroup | None = None) -> tuple[Model, dist.ProcessGroup | None]:
    """The module behind ``torch.compile``, DataParallel, and DistributedDataParallel, whose group is the default.

    Any may be around another, and no forward mode passes through them. DataParallel's other devices are not used.
    """
    while True:
        if isinstance(model, nn.DataParallel):
            model = model.module
        elif isinstance(model, DistributedDataParallel):
            process_group = model.process_group if process_group is None else process_group
            model = model.module
        elif (behind := getattr(model, "_orig_mod", None)) is not None:
            model = cast(Model, behind)
        else:
            return model, process_group


def is_autocast(device: torch.device) -> bool:
    """Whether autocast is on for ``device``."""
    return torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """For derivatives, which run in the types that the forward pass chose; autocast would choose for them again."""
    return torch.autocast(device.type, enabled=False) if is_autocast(device) else nullcontext()


def by_slot(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``values`` once for every place in the model that holds the tensor so named.

    `functional_call` ties names by itself, but where one module is registered under two names it swaps the same place
    twice, and then puts the stand-in back for good.
    """
    held = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
    return {
        f"{path}.{name}" if path else name: values[held[id(t)]]
        for path, module in model.named_modules()
        for name, t in (*module._parameters.items(), *module._buffers.items())
        if t is not None and held.get(id(t)) in values
    }


def padding_rows(model: nn.Module) -> list[tuple[str, int]]:
    """The weights of embeddings with ``padding_idx``, by place, and that row, to which their backward gives nothing."""
    return [
        (f"{path}.weight" if path else "weight", module.padding_idx)
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None
    ]


@contextmanager
def layer_by_layer() -> Iterator[None]:
    """Attention without the shortcut of `torch.nn.TransformerEncoder` for passes without gradients.

    That returns other numbers where a padding mask hides an event: a pass with gradients would be of another function.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention by its plain formula: the fused kernels have no forward rule, nor a backward to differentiate."""
    with layer_by_layer(), sdpa_kernel(SDPBackend.MATH):
        yield
