"""Record the allocations and frees of any callable, in order, on fake tensors or on real ones.

A dispatch mode sees every operation below autograd. A storage that an operation returns and that
was not among its arguments is an allocation; its end, told by a weak reference, is a free. So views
and in-place operations allocate nothing, a storage that is resized is a new one, and empty storages
are left out. The same code runs on fake tensors (shapes only; no GPU, no weights) and on real ones.

Every event says whose memory it is:

- `phase`: what the caller named with `with phase("update"):`, or "".
- `module`: the dotted name, in `modules`, of the module in whose forward it was allocated. In
  backward: of the module in whose forward the running autograd node was made, by the node's
  sequence number, so the graph is left as it is; and of the recomputing module under checkpointing.
- `component`: what it is for, see `memory/components.py`. What outlives the forward pass that made
  it (a cache, what autograd saves) is named only when that pass has ended, gradients and weights
  when they are found in the modules. A free carries its allocation's tags.

What an operation allocates inside its CUDA kernel is not seen here; `rules` add it (see
`memory/rules.py`), or nothing does when a real run is traced. Left out: memory that operations do
not make (numpy, pinned buffers, `torch.UntypedStorage(n)`), what an operation frees that it was not
given, and device moves of a trace on fake CPU tensors, where the host is the device.

No tensor is kept alive and none is made: weak references, numbers and names only.
"""

from __future__ import annotations

import contextlib
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from itertools import count

import torch
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem_grpo.memory.allocator import Event
from lowmem_grpo.memory.backward import ACCUMULATING, OF_NO_ORDER, is_accumulation, running_node
from lowmem_grpo.memory.components import component, kept_component, of_weights
from lowmem_grpo.policy.integrity import named_tensors

__all__ = ["OUTSIDE", "Recorder", "layer_number", "phase", "trace"]

OUTSIDE = -1
"""The layer of what happens outside of all layers."""


class _Live:
    """An allocation: its bytes, its place in the events, the watch over it, whether it ended.
    `heir`: what autograd made of it only because it is being watched.
    """

    __slots__ = ("ended", "heir", "place", "size", "watch")

    def __init__(self, size: int, place: int, watch: weakref.ref):
        self.size, self.place, self.watch = size, place, watch
        self.ended, self.heir = False, None


class Recorder:
    """A context manager that fills `events` with what happens on the device inside it.

    `layers` says for each event which numbered layer of the model was at work, `OUTSIDE` for none
    and while `of_no_layer` is set. `workspaces` has the id of each library's workspace by (rule,
    whether of backward's thread).

    `modules`: the model whose module names the events carry. `device_type`: record tensors of that
    kind of device ("cpu", "cuda") only; None: all but meta tensors. `rules`: what a CUDA card
    allocates out of sight (`memory.rules.CudaRules`); leave it out to trace a real run.

    After the block the recorder watches nothing any more: what was alive then has no `free`.
    """

    def __init__(self, *, modules: torch.nn.Module | None = None, device_type=None, rules=None):
        self.events: list[Event] = []
        self.layers: list[int] = []
        self.of_no_layer = False
        self.workspaces: dict[tuple[str, bool], int] = {}
        self._device_type, self._rules = device_type, rules
        self._phase = ""
        self._ids = count(1)
        self._live: dict[int, _Live] = {}  # by address of the storage
        self._model: weakref.ref | None = None
        self._names: dict[int, str] = {}  # of modules and parameters, by identity
        self._inside: set[str] = set()  # modules within a layer,
        self._adapted: set[str] = set()  # and of them those with adapters
        self._added: dict[int, int] = {}  # places of what `add` counted
        self._at = OUTSIDE
        # Modules whose forward is running: (name, whether it began within backward).
        self._running: list[tuple[str, bool]] = []
        # From this sequence number on, autograd nodes were made in the module of that name.
        self._since, self._maker = [0], [""]
        # Made since the outermost module began, and what the one before it left. By identity: an
        # address is soon used again.
        self._young: list[_Live] = []
        self._kept: list[_Live] = []
        if modules is not None:
            self.name(modules)

    def name(self, modules: torch.nn.Module) -> None:
        """Use this model's module names from here on (it may not have existed at the start)."""
        self._model = weakref.ref(modules)
        root = type(modules).__name__  # "" is outside of all modules
        self._names = {id(m): name or root for name, m in modules.named_modules()}
        parents = {name.rpartition(".")[0] for name in self._names.values() if "." in name}
        starts = tuple(f"{name}." for name in parents if name.rpartition(".")[2].isdigit())
        self._inside = {name for name in self._names.values() if name.startswith(starts)}
        adapted = {name for name in self._inside if f"{name}.base_layer" in self._inside}
        self._adapted = {n for n in self._inside if {n, n.rpartition(".")[0]} & adapted}
        for name, parameter in modules.named_parameters():
            self._names[id(parameter)] = name.rpartition(".")[0]

    def __enter__(self) -> Recorder:
        self._stack = contextlib.ExitStack()
        if self._rules is not None:
            self._stack.enter_context(self._rules.replacements())
        before = nn_module.register_module_forward_pre_hook(self._begin_module)
        after = nn_module.register_module_forward_hook(self._end_module, always_call=True)
        self._stack.callback(before.remove)
        self._stack.callback(after.remove)
        self._stack.enter_context(_Watch(self))
        _recorders.append(self)
        self._stack.callback(_recorders.remove, self)
        return self

    def __exit__(self, *error) -> None:
        self._claim()
        self._stack.close()
        self._live.clear()  # and with it the weak references: nothing is told of later frees

    @contextlib.contextmanager
    def phase(self, name: str):
        """Events inside are of this phase."""
        before, self._phase = self._phase, name
        try:
            yield self
        finally:
            self._claim()
            self._phase = before

    def adopt(self, tensors: Iterable[tuple[str, torch.Tensor]], phase: str = "load") -> None:
        """Count (name, tensor) pairs that exist already, as if they were allocated now."""
        for name, tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._live and storage.nbytes() and self._counts(tensor):
                module = name.rpartition(".")[0]
                self._allocate(storage, phase, module, component(phase, name))

    def add(self, size: int, *, module: str = "", component: str = "other") -> int:
        """Count memory that no tensor shows; returns what `remove` takes."""
        number = next(self._ids)
        self._added[number] = len(self.events)
        self._note(Event("alloc", number, size, 0, self._phase, module, component))
        return number

    def remove(self, number: int) -> None:
        """The end of what `add` counted."""
        event = self.events[self._added.pop(number)]
        self._note(event._replace(action="free", phase=self._phase))

    # --- What operations allocate

    def _operation(self, operation, before: dict[int, int], args, kwargs, out) -> None:
        """Record what `operation` returned; `before`: bytes of its arguments' storages."""
        module = self._module()
        self._at = layer_number(module)
        rules = self._rules
        scratch = rules.scratch(operation, args, kwargs) if rules is not None else None
        held = self._hidden(scratch.rule, scratch.held, module) if scratch else []
        # Of torch.tensor, whose own allocation is not shown.
        fresh = operation is torch.ops.aten.lift_fresh.default
        for tensor in _tensors(out):
            if not self._counts(tensor):
                continue
            storage = tensor.untyped_storage()
            address, size = storage._cdata, storage.nbytes()
            live = self._live.get(address)
            if live is not None:
                if live.size == size:
                    continue
            elif size == 0 or (before.get(address) == size and not fresh):
                continue
            if size:
                self._allocate(storage, self._phase, module, component(self._phase, module))
                if operation in ACCUMULATING and not self._running and is_accumulation(operation):
                    source = self._live.get(args[0].untyped_storage()._cdata)
                    if source and source.size == size:
                        source.heir = self._live[address]
            if live is not None:  # it was resized: copied, then the old one freed
                self._free(live)
                if not size:
                    del self._live[address]
        if rules is not None:
            self._workspace(*rules.workspace(operation, args, kwargs), module)
        for step in scratch.steps if scratch else ():
            if step > 0:
                held += self._hidden(scratch.rule, [step], module)
            else:
                self._free_hidden([held.pop([e.size for e in held].index(-step))])
        self._free_hidden(held)

    def _allocate(self, storage, phase: str, module: str, what: str) -> None:
        address, size = storage._cdata, storage.nbytes()
        watch = weakref.ref(storage, partial(self._ended, address))
        number = next(self._ids)
        self._live[address] = live = _Live(size, len(self.events), watch)
        self._note(Event("alloc", number, size, 0, phase, module, what))
        if self._running:
            self._young.append(live)

    def _ended(self, address: int, watch: weakref.ref) -> None:
        live = self._live.get(address)
        if live is None or live.watch is not watch:
            return
        del self._live[address]
        heir = live.heir
        since = self.events[heir.place + 1 :] if heir else ()
        if heir and not heir.ended and all(event.action == "free" for event in since):
            del self.events[heir.place], self.layers[heir.place]
            heir.place = live.place
        else:
            self._free(live)

    def _free(self, live: _Live) -> None:
        live.ended = True
        self._note(self.events[live.place]._replace(action="free", phase=self._phase))

    def _note(self, event: Event) -> None:
        self.events.append(event)
        self.layers.append(OUTSIDE if self.of_no_layer else self._at)

    def _hidden(self, rule: str, sizes: Iterable[int], module: str) -> list[Event]:
        """Record what a rule adds."""
        what = component(self._phase, module, rule)
        made = [
            Event("alloc", next(self._ids), size, 0, self._phase, module, what) for size in sizes
        ]
        for event in made:
            self._note(event)
        return made

    def _free_hidden(self, made: Iterable[Event]) -> None:
        for event in made:
            self._note(event._replace(action="free"))

    def _workspace(self, rule: str, size: int, module: str) -> None:
        """A library's workspace: made at its first use on a thread, and kept for good."""
        key = rule, running_node() is not None  # on CUDA, backward runs on a thread of its own
        if size and key not in self.workspaces:
            self.workspaces[key] = self._hidden(rule, [size], module)[0].id

    def _counts(self, tensor: torch.Tensor) -> bool:
        kind = tensor.device.type
        return kind == self._device_type if self._device_type else kind != "meta"

    # --- Which module is at work

    def _module(self) -> str:
        node = running_node()
        if self._running and (node is None or self._running[-1][1]):
            return self._running[-1][0]
        if node is None:
            return ""
        number = node._sequence_nr()
        if number == OF_NO_ORDER:
            return self._names.get(id(getattr(node, "variable", None)), "")
        return self._maker[bisect_right(self._since, number) - 1]

    def _begin_module(self, module, args) -> None:
        inherited = self._running[-1][0] if self._running else ""
        in_backward = running_node() is not None
        if not self._running:
            self._young.clear()
            if in_backward:
                self._name_kept(recomputed=True)
        self._running.append((self._names.get(id(module), inherited), in_backward))
        self._at = layer_number(self._running[-1][0])
        self._mark()

    def _end_module(self, module, args, output) -> None:
        _, in_backward = self._running.pop()
        self._at = layer_number(self._running[-1][0]) if self._running else OUTSIDE
        self._mark()
        if not self._running:
            if not in_backward:
                self._kept = self._young
                self._name_kept(recomputed=False)
            self._young = []

    def _mark(self) -> None:
        # Nodes made while backward recomputes are never run, and may count on another thread.
        if not torch.is_grad_enabled() or running_node() is not None:
            return
        self._since.append(torch._C._autograd._get_sequence_nr())
        self._maker.append(self._running[-1][0] if self._running else "")

    # --- What memory turned out to be

    def _name_kept(self, *, recomputed: bool) -> None:
        """The outermost forward has ended, or backward begins to compute it again."""
        for live in self._kept:
            if not live.ended:
                event = self.events[live.place]
                what = kept_component(
                    *(event.phase, event.component),
                    inside=event.module in self._inside,
                    adapted=event.module in self._adapted,
                    recomputed=recomputed,
                )
                self.events[live.place] = event._replace(component=what)
        self._kept = [] if recomputed else [live for live in self._kept if not live.ended]

    def _claim(self) -> None:
        """Weights and gradients are known by where they are found."""
        model = self._model() if self._model is not None else None
        if model is None:
            return
        for name, tensor in named_tensors(model):
            self._rename(tensor, name, of_weights(name))
            if tensor.grad is not None:
                self._rename(tensor.grad, name, "adapters")

    def _rename(self, tensor: torch.Tensor, name: str, what: str) -> None:
        if live := self._live.get(tensor.untyped_storage()._cdata):
            tags = {"module": name.rpartition(".")[0], "component": what}
            self.events[live.place] = self.events[live.place]._replace(**tags)


class _Watch(TorchDispatchMode):
    """Tells a recorder of every operation."""

    def __init__(self, recorder: Recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operation.namespace == "prim":  # a fake tensor is asked for its device
            return operation(*args, **kwargs)
        before = {}
        for tensor in _tensors((args, kwargs)):
            storage = tensor.untyped_storage()
            before[storage._cdata] = storage.nbytes()
        out = operation(*args, **kwargs)
        # Modes of torch functions would be asked about every storage that is looked at.
        with torch._C.DisableTorchFunction():
            self.recorder._operation(operation, before, args, kwargs, out)
        return out


_recorders: list[Recorder] = []  # at work, the innermost last


@contextlib.contextmanager
def phase(name: str):
    """Name the phase for whoever is recording; without a recorder, do nothing."""
    with contextlib.ExitStack() as stack:
        for recorder in _recorders:
            stack.enter_context(recorder.phase(name))
        yield


def trace(
    step: Callable[[], object],
    iterations: int = 2,
    *,
    modules: torch.nn.Module | None = None,
    device_type: str | None = None,
    rules=None,
) -> list[Event]:
    """The allocations and frees of `iterations` calls of `step`, on fake or real tensors.

    Two calls show the steady state: the first may make what the second finds (optimizer moments,
    gradients). See `Recorder` for the other arguments. Raises ValueError for less than one call.
    """
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}: give 1 or more")
    with Recorder(modules=modules, device_type=device_type, rules=rules) as recorder:
        for _ in range(iterations):
            step()
    return recorder.events


@cache
def layer_number(module: str) -> int:
    """The number of the layer that a module's dotted name lies in; OUTSIDE for none."""
    return next((int(part) for part in module.split(".") if part.isdigit()), OUTSIDE)


def _tensors(values) -> Iterator[torch.Tensor]:
    """The tensors in an operation's arguments or results."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(tuple(values.values()))
