"""The streaming memory: which past frames a new frame may see, in fixed storage.

Frames cascade through three tiers. Fine keys and values: the *window* (the last frames), then, if they were keyframes,
the *anchors* (whole frames; of two or more, the segment's first frame stays for ever because it pins the gauge). Keyframes that leave
the anchors go on as pooled tokens in the coarse *bank*; a full bank is thinned where keyframes stand closest in time, so
that old views get sparser and coverage stays. A frame is in one tier at a time, so that no key is counted twice.

For Spark3R the bank holds parts of frames instead (`Parts`): all special tokens and, at a stride, fine patches.

`Schedule` is that policy on frame numbers alone; `Memory` adds the tensors; `visibility` unrolls the policy into masks
for the parallel form of the network, so that training sees exactly what deployment sees.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from speed3r_ros.kernels.qkv import Slot


class Schedule:
    """Which frame lives in which slot. Slots never move: a frame changes tier by relabelling its slot."""

    def __init__(self, window: int, anchors: int, bank: int) -> None:
        self.limits = (window, anchors, bank)
        self.clear()

    def clear(self) -> None:
        """Forget everything: the next frame opens a segment."""
        window, anchors, bank = self.limits
        self.window: list[tuple[int, int]] = []  # (frame, slot), oldest first
        self.anchors: list[tuple[int, int]] = []
        self.bank: list[tuple[int, int]] = []  # (frame, bank slot)
        self.free = list(range(window + anchors + 1))
        self.free_bank = list(range(bank))
        self.keyframes: set[int] = set()
        self.frame = -1
        self.current = -1  # slot of the newest frame

    def admit(self) -> tuple[int, list[tuple[int, int]]]:
        """Reserve a slot for the next frame. Returns it, and the (slot, bank slot) pairs to copy before it is reused."""
        window, anchors, bank = self.limits
        moves: list[tuple[int, int]] = []
        if len(self.window) > window:
            frame, slot = self.window.pop(0)
            if frame in self.keyframes:
                self.keyframes.discard(frame)
                self.anchors.append((frame, slot))
                if len(self.anchors) > anchors:
                    retired = self.anchors.pop(1 if anchors > 1 else 0)  # the first frame pins the gauge
                    self.free.append(retired[1])
                    moves += self._bank(*retired)
            else:
                self.free.append(slot)
        self.frame += 1
        self.current = self.free.pop(0)
        self.window.append((self.frame, self.current))
        return self.current, moves

    def _bank(self, frame: int, slot: int) -> list[tuple[int, int]]:
        if not self.free_bank:  # thin: drop the entry whose neighbours in time stand closest together
            times = [f for f, _ in self.bank]
            gaps = [times[i + 1] - times[i - 1] for i in range(1, len(times) - 1)]
            drop = 1 + gaps.index(min(gaps)) if gaps else 0
            self.free_bank.append(self.bank.pop(drop)[1])
        place = self.free_bank.pop(0)
        self.bank.append((frame, place))
        return [(slot, place)]

    def keep(self) -> None:
        """Mark the newest frame as a keyframe: it outlives the window."""
        self.keyframes.add(self.frame)

    @property
    def resident(self) -> list[tuple[int, int]]:
        """(frame, slot) of all frames with fine tokens, the newest included."""
        return self.anchors + self.window


def visibility(keyframes: Sequence[bool], window: int, anchors: int, bank: int) -> tuple[Tensor, Tensor]:
    """Masks of the parallel form: fine and coarse, (T, T) bool; row t holds the frames that frame t sees."""
    count = len(keyframes)
    fine, coarse = torch.zeros(2, count, count, dtype=torch.bool)
    schedule = Schedule(window, anchors, bank)
    for t, keyframe in enumerate(keyframes):
        schedule.admit()
        fine[t, [frame for frame, _ in schedule.resident]] = True
        coarse[t, [frame for frame, _ in schedule.resident + schedule.bank]] = True
        if keyframe:
            schedule.keep()
    return fine, coarse


@dataclass(frozen=True)
class Parts:
    """What the bank keeps of its frames' fine tokens: Spark3R's temporal stride, made to stream.

    Patches of the bank have the room of `room` whole frames, over the layer's stride. While there is room, each frame keeps
    every stride-th patch. Then strides double, frame by frame, the oldest first: the newcomer takes every second patch's
    row from one, for the patches of its own at these positions. So rows never move, and the frames that share a room show
    different patches. A frame that takes a dropped one's place takes all its rows.

    specials: tokens at the start of a frame, which stay. strides: of patches at first, for each layer. share: how many
    frames share a room when the bank is full, a power of two. weighted: whether a patch counts as often as its stride says,
    for itself and those that did not stay.
    """

    specials: int
    strides: tuple[int, ...]
    share: int
    weighted: bool

    def room(self, bank: int) -> int:
        """Frames of a bank whose patches, at the first stride, fit beside one another."""
        return -(-bank // self.share)

    def rooms(self, bank: int, stride: int) -> int:
        """Whole frames' patches for which a layer with this first stride has rows."""
        return -(-self.room(bank) // stride)

    def of(self, place: int, count: int, bank: int, stride: int) -> tuple[int, int, int]:
        """Patches of the frame at a place of a bank that holds `count`, of a layer with this first stride: in which frame's
        rows they lie, the first one, and their stride."""
        room = self.room(bank)
        turn, place_in_turn = divmod(place, room)
        sharing = 1 << (max(place, count - 1 - place) // room).bit_length()
        return place_in_turn // stride, place_in_turn % stride + stride * turn, stride * sharing


class Memory:
    """Keys and values of past frames for every global layer, at fixed addresses.

    fine: (1, 1, slots) bool and coarse: (1, 1, slots + bank) bool say which slots the newest frame sees; first: (1,) bool,
    that it opens the segment; index: (1,) int64, its slot. All state that the network reads lives on the device at fixed
    addresses, so that one CUDA graph replays every step. Bounded: nothing is allocated after construction.

    parts: what the bank keeps of fine tokens, which `rows` then gives beside those of whole frames.
    state: what else a network keeps, by name, float32, in the shapes that it asks for.
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        tokens: int,
        blocks: int,
        width: int,
        window: int,
        anchors: int,
        bank: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        state: Mapping[str, tuple[int, ...]] | None = None,
        parts: Parts | None = None,
    ) -> None:
        slots = window + anchors + 1
        self.schedule = Schedule(window, anchors, bank)
        self.tokens, self.blocks, self.slots, self.bank, self.parts = tokens, blocks, slots, bank, parts
        counts = [slots * tokens] * layers
        if parts is not None:
            patches = tokens - parts.specials
            counts = [n + bank * parts.specials + parts.rooms(bank, s) * patches for n, s in zip(counts, parts.strides)]
        self._rows = [torch.zeros(2, heads, n, width, dtype=dtype, device=device) for n in counts]
        self._bias = {  # by the layer's first stride
            stride: torch.full((n,), -torch.inf, dtype=dtype, device=device)
            for stride, n in zip(() if parts is None else parts.strides, counts)
        }
        self._counted = 0  # frames of the bank that the biases know
        self._pooled = torch.zeros(2, layers, heads, slots + bank, blocks, width, dtype=dtype, device=device)
        self._visible = torch.zeros(slots + bank, dtype=torch.bool)
        self._mask = torch.zeros(slots + bank, dtype=torch.bool, device=device)
        self.index = torch.zeros(1, dtype=torch.long, device=device)
        self.state = {name: torch.zeros(shape, device=device) for name, shape in (state or {}).items()}
        self.first = torch.zeros(1, dtype=torch.bool, device=device)

    @property
    def fine(self) -> Tensor:
        """(1, 1, slots) bool: slots whose fine tokens the newest frame sees."""
        return self._mask[: self.slots].view(1, 1, -1)

    @property
    def coarse(self) -> Tensor:
        """(1, 1, slots + bank) bool: entries whose pooled tokens the newest frame sees."""
        return self._mask.view(1, 1, -1)

    @property
    def bytes(self) -> int:
        """Storage in bytes, constant."""
        tensors = *self._rows, *self._bias.values(), self._pooled, self._mask, *self.state.values()
        return sum(x.numel() * x.element_size() for x in tensors)

    def clear(self) -> None:
        """Open a new segment. All is zero again: what is hidden weighs nothing, but nothing times NaN is NaN."""
        self.schedule.clear()
        for held in (*self._rows, self._pooled, *self.state.values()):
            held.zero_()

    def admit(self) -> None:
        """Make room for a new frame and let it see what the policy grants. Call once before `Network.step`."""
        slot, moves = self.schedule.admit()
        for source, place in moves:
            self._pooled[:, :, :, self.slots + place] = self._pooled[:, :, :, source]
            if self.parts is not None:
                self._keep_part(source, place)
        self._visible.zero_()
        self._visible[[s for _, s in self.schedule.resident] + [self.slots + s for _, s in self.schedule.bank]] = True
        self._mask.copy_(self._visible)
        count, whole = len(self.schedule.bank), self.slots * self.tokens
        for stride, bias in self._bias.items():
            bias[:whole].view(self.slots, -1).zero_().masked_fill_(~self._mask[: self.slots, None], -torch.inf)
            if count != self._counted:
                bias[whole:] = self._bias_of_parts(stride, count)
        self._counted = count
        self.index.fill_(slot)
        self.first.fill_(self.schedule.frame == 0)

    def _keep_part(self, slot: int, place: int) -> None:
        """Copy what stays of a slot's frame to a place of the bank."""
        specials, size = self.parts.specials, self.tokens - self.parts.specials
        start = self.slots * self.tokens
        special = slice(start + place * specials, start + (place + 1) * specials)
        start += self.bank * specials
        for layer, rows in enumerate(self._rows):
            room, first, stride = self.parts.of(place, len(self.schedule.bank), self.bank, self.parts.strides[layer])
            patches = slice(start + room * size + first, start + (room + 1) * size, stride)
            frame = self._whole(layer)[:, :, slot]
            rows[:, :, special] = frame[:, :, :specials]
            rows[:, :, patches] = frame[:, :, specials + first :: stride]

    def _bias_of_parts(self, first_stride: int, count: int) -> Tensor:
        """For the rows after those of whole frames, on the host, where the bank holds `count` frames."""
        special = torch.full((self.bank, self.parts.specials), -torch.inf)
        patches = torch.full((self.parts.rooms(self.bank, first_stride), self.tokens - self.parts.specials), -torch.inf)
        special[:count] = 0
        for place in range(count):
            room, first, stride = self.parts.of(place, count, self.bank, first_stride)
            patches[room, first::stride] = math.log(stride) if self.parts.weighted else 0
        return torch.cat([special.flatten(), patches.flatten()])

    def keep(self) -> None:
        """The newest frame is a keyframe: it will outlive the window."""
        self.schedule.keep()

    def _whole(self, layer: int) -> Tensor:
        """Keys and values of whole frames, (2, H, slots, L, D)."""
        return self._rows[layer][:, :, : self.slots * self.tokens].unflatten(2, (self.slots, self.tokens))

    def slot(self, layer: int) -> Slot:
        """Where a layer's keys and values of the newest frame go, among those of all frames."""
        return Slot(self._whole(layer), self._pooled[:, layer], self.index)  # a tensor: a CUDA graph can replay it

    def rows(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values (1, H, R, D) of whole frames and of parts, and what to add to the scores of each (1, R): -inf
        where the newest frame does not see it, 0 in whole frames, the logarithm of its weight in parts."""
        keys, values = self._rows[layer].split(1)
        return keys, values, self._bias[self.parts.strides[layer]][None]

    def of_first(self, name: str, value: Tensor) -> Tensor:
        """What `value` was at the segment's first frame: the state of that name, which takes it there."""
        kept = self.state[name]
        return kept.copy_(torch.where(self.first, value.detach(), kept))


@dataclass(frozen=True)
class Sight:
    """Which frames the T frames of a call see, where they do not all see all.

    fine, coarse: (1, T, N) and (1, T, M) bool, the frames whose fine and whose pooled tokens a frame sees. memory: it holds
    these N and M frames, and takes the keys and values of the call's one; None: they are the call's own T.
    """

    fine: Tensor
    coarse: Tensor
    memory: Memory | None = None

    @staticmethod
    def into(memory: Memory) -> Sight:
        """Of the newest frame, for which `memory.admit` has made room."""
        return Sight(memory.fine, memory.coarse, memory)

    @staticmethod
    def causal(frames: int, device: torch.device | str = "cpu") -> Sight:
        """Each frame sees itself and all earlier ones."""
        table = torch.ones(1, frames, frames, dtype=torch.bool, device=device).tril()
        return Sight(table, table)

    @property
    def in_parts(self) -> bool:
        """Whether the memory also holds parts of frames, which no table says."""
        return self.memory is not None and self.memory.parts is not None

    @property
    def first(self) -> Tensor:
        """(T,) bool: the frame that opens its sequence."""
        if self.memory is not None:
            return self.memory.first
        return torch.arange(self.fine.shape[1], device=self.fine.device) == 0

    def of_first(self, name: str, value: Tensor) -> Tensor:
        """What `value`, computed from the call's first frame, was at the first frame of all: see `Memory.of_first`."""
        return value if self.memory is None else self.memory.of_first(name, value)
