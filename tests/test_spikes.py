"""PackedSpikes: what is packed comes back equal in value, dtype, shape and strides, at one bit a
spike."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from snn_revplugin.packed.codec import BITS, CHUNK, TorchCodec
from snn_revplugin.packed.spikes import Block, PackedSpikes
from snn_revplugin.report.memory import LiveBytes

SHAPES = [
    (),
    (0,),
    (1,),
    (7,),
    (8,),
    (9,),
    (3, 0, 2),
    (1, 1, 1),
    (5, 3),
    (2, 3, 5),
    (2, 4, 6, 6),
    (1, 3, 1, 5),
    (2, 3, 2, 4, 3),
]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def random_bits(shape: tuple[int, ...]) -> Tensor:
    torch.manual_seed(math.prod(shape))
    return torch.rand(shape) < 0.4


def assert_round_trip(fired: Tensor, dtype: torch.dtype = torch.float32) -> None:
    packed = PackedSpikes(fired, dtype)
    assert packed.nbytes == math.ceil(fired.numel() / BITS)
    assert torch.equal(packed.fired(), fired)
    binary = packed.binary()
    assert binary.dtype is dtype
    assert torch.equal(binary, fired.to(dtype))
    assert torch.equal(packed.spikes(), binary)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_dtypes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    fired = random_bits(shape)
    assert_round_trip(fired, dtype)
    assert_round_trip(torch.zeros_like(fired), dtype)
    assert_round_trip(torch.ones_like(fired), dtype)


@pytest.mark.parametrize("order", list(permutations(range(4))), ids=str)
def test_dense_layouts_keep_their_strides(order: tuple[int, ...]) -> None:
    fired = random_bits((2, 3, 4, 5)).permute(order)
    assert_round_trip(fired)
    packed = PackedSpikes(fired)
    assert packed.fired().stride() == packed.binary().stride() == fired.stride()


@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((2, 3, 4, 5), torch.channels_last),
        ((2, 1, 4, 4), torch.channels_last),
        ((2, 3, 2, 4, 3), torch.channels_last_3d),
    ],
    ids=str,
)
def test_channels_last(shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    fired = random_bits(shape).contiguous(memory_format=memory_format)
    assert_round_trip(fired)
    assert PackedSpikes(fired).binary().is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    "gappy",
    [
        random_bits((5, 6))[:, ::2],
        random_bits((5, 6))[1:4, 1:5],
        random_bits((5, 6))[3],
        random_bits((5, 6))[:, 2],
        random_bits((6, 6)).diagonal(),
        random_bits((5, 1)).expand(5, 7),
        random_bits((1,)).expand(4, 3),
        random_bits(()).expand(9),
        random_bits((5, 6)).t()[1:],
        random_bits((3, 8)).unfold(1, 4, 2),
    ],
    ids=lambda each: f"{tuple(each.shape)} by {each.stride()}",
)
def test_layouts_with_gaps_or_overlaps(gappy: Tensor) -> None:
    """These cannot come back in their strides, which no operation gives its output either."""
    assert_round_trip(gappy)
    assert PackedSpikes(gappy).binary().is_contiguous()


@st.composite
def layouts(draw: st.DrawFn) -> Tensor:
    """A bool tensor: some bits, permuted, sliced with steps, with a dimension put in or
    expanded."""
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    bits = draw(st.lists(st.booleans(), min_size=math.prod(shape), max_size=math.prod(shape)))
    fired = torch.tensor(bits, dtype=torch.bool).view(shape)
    fired = fired.permute(draw(st.permutations(range(fired.dim()))))
    for dim in range(fired.dim()):
        if draw(st.booleans()):
            start, step = draw(st.integers(0, 3)), draw(st.integers(1, 3))
            fired = fired.narrow(
                dim, min(start, fired.shape[dim]), max(fired.shape[dim] - start, 0)
            )
            fired = fired[(slice(None),) * dim + (slice(None, None, step),)]
    if draw(st.booleans()):
        fired = fired.unsqueeze(draw(st.integers(0, fired.dim()))).expand(*[-1] * (fired.dim() + 1))
    if draw(st.booleans()):
        fired = fired.expand(draw(st.integers(0, 3)), *fired.shape)
    return fired


@settings(max_examples=300, deadline=None, derandomize=True)
@given(layouts(), st.sampled_from(DTYPES))
def test_any_layout(fired: Tensor, dtype: torch.dtype) -> None:
    assert_round_trip(fired, dtype)
    if fired.is_contiguous():
        assert PackedSpikes(fired).binary().is_contiguous()


@pytest.mark.parametrize("more", [-1, 0, 1, 3 * CHUNK + 5])
def test_larger_than_a_chunk(more: int) -> None:
    """Spikes are unpacked a chunk of bytes at a time: a count beside and across the seams."""
    assert_round_trip(random_bits((BITS * CHUNK + more,)))


def test_one_bit_a_spike() -> None:
    fired = random_bits((100, 128, 16))
    packed = PackedSpikes(fired)
    assert packed.nbytes == packed.bits.untyped_storage().nbytes() == fired.numel() // BITS
    assert "25600" in repr(packed)


def test_the_bits_are_a_copy() -> None:
    fired = random_bits((40,))
    expected, packed = fired.clone(), PackedSpikes(fired)
    fired.logical_not_()
    assert torch.equal(packed.fired(), expected)


def test_every_unpacking_is_a_new_tensor() -> None:
    packed = PackedSpikes(random_bits((40,)), factor=torch.tensor(2.0))
    for unpack in (packed.fired, packed.binary, packed.spikes):
        first, second = unpack(), unpack()
        expected = second.clone()
        first.zero_()
        assert torch.equal(second, expected) and torch.equal(unpack(), expected)


@pytest.mark.parametrize(
    "factor",
    [
        torch.tensor(0.3),
        torch.tensor(-2.0),
        torch.tensor(0.0),
        torch.linspace(0.5, 2, 5),
        torch.rand(3, 1),
    ],
    ids=lambda each: str(tuple(each.shape)),
)
def test_graded_spikes(factor: Tensor) -> None:
    """The factor is kept beside the bits, and the product is the one that the neuron gave out."""
    fired = random_bits((4, 3, 5))
    packed = PackedSpikes(fired, factor=factor)
    assert torch.equal(packed.spikes(), fired.float() * factor)
    assert torch.equal(packed.binary(), fired.float())
    assert packed.nbytes == math.ceil(fired.numel() / BITS)


def test_graded_spikes_of_another_dtype() -> None:
    """Types promote as they do in the neuron's own product."""
    fired = random_bits((4, 5))
    factor = torch.linspace(0.5, 2, 5, dtype=torch.float64)
    spikes = PackedSpikes(fired, torch.float32, factor).spikes()
    assert spikes.dtype is torch.float64
    assert torch.equal(spikes, fired.float() * factor)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8], ids=str
)
@pytest.mark.parametrize("strides", ["contiguous", "transposed", "sliced"])
def test_zeros_and_ones_are_packed_as_bools_are(dtype: torch.dtype, strides: str) -> None:
    fired = random_bits((6, 10))
    fired = {"contiguous": fired, "transposed": fired.t(), "sliced": fired[:, 1::2]}[strides]
    packed = PackedSpikes(fired.to(dtype), dtype)
    assert torch.equal(packed.bits, PackedSpikes(fired).bits)
    assert torch.equal(packed.fired(), fired)
    assert torch.equal(packed.binary(), fired.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bool, *DTYPES], ids=str)
@pytest.mark.parametrize("count", [1, 63 * BITS, 64 * BITS, 64 * BITS + 1, 1000])
def test_torch_packs_and_unpacks_in_chunks(
    count: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """... with bits that fill no chunk, and no byte."""
    monkeypatch.setattr(TorchCodec, "CHUNK", 64)
    fired, codec = random_bits((count,)), TorchCodec()
    bits = torch.full((-(-count // BITS),), 0xA5, dtype=torch.uint8)
    codec.pack(fired, bits)
    assert torch.equal(bits, PackedSpikes(fired).bits)
    ones = codec.unpack(bits, count, dtype)
    assert ones.dtype is dtype and torch.equal(ones, fired.to(dtype))


def test_torch_needs_little_memory_beside_spikes_and_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchCodec, "CHUNK", 1 << 10)
    fired, codec = random_bits((1 << 20,)), TorchCodec()
    bits = torch.empty(fired.numel() // BITS, dtype=torch.uint8)
    in_chunk = TorchCodec.CHUNK * BITS
    with LiveBytes() as live:
        codec.pack(fired, bits)
        assert live.peak() <= 3 * in_chunk
        ones = codec.unpack(bits, fired.numel(), torch.float32)
    assert live.peak() <= ones.nbytes + 3 * in_chunk


@pytest.mark.parametrize("count", [64, 1 << 20])
def test_one_large_time_step_is_unpacked_at_a_time(count: int) -> None:
    fired = random_bits((3, count)).float()
    steps = PackedSpikes(fired).steps()
    with LiveBytes() as live:
        for t in (2, 1, 0):
            assert torch.equal(steps.binary(t), fired[t])
            assert torch.equal(steps.silent(t), 1 - fired[t])
            assert torch.equal(steps.binary(t), fired[t])
    if count > steps.TOGETHER:
        # What torch.equal is compared with is a step, too, and a bool for each element.
        assert live.peak() <= 2.5 * fired[0].nbytes


def test_small_rows_fill_what_the_allocator_of_a_device_gives() -> None:
    """... which is 512 bytes on CUDA. (No memory is allocated here.)"""
    device, block = torch.device("meta"), None
    for row in range(300):
        before, block = block, Block.after(block, 4, device)
        assert (block is before) == (row % 128 != 0)
        block.take()
    assert Block.after(None, 5000, device).rows == 1
    assert Block.after(None, 4, torch.device("cpu")).rows == 1
