"""The split-coupled neuron of :mod:`..neurons.coupled` in Triton: one kernel for time steps forward
and for their repetition, one for the inverse, one backward.

A program takes pairs of neurons, one of each half: ``half`` elements of the first half of the
split dimension lie in a row of memory, then as many of the second. ``N`` neurons are ``N / 2``
pairs. Spikes are bits where ``half`` fills whole bytes (``BITS``), and bytes otherwise. The
equations have the names that they have there, and :mod:`.equations` says how they round;
``leak``, ``weight1``, ``weight2``, ``alpha``, ``beta``, ``threshold`` and ``v_reset`` are numbers.
"""

import triton.language as tl

from .equations import (
    above,
    fires,
    gradient_of_step,
    load,
    number,
    packed,
    reset,
    rounded,
    store,
    tile_of,
    unpacked,
)
from .jit import jit


@jit
def place_of(pair, half, WIDE: tl.constexpr):
    """The offset of the first neuron of a pair."""
    if not WIDE:
        pair = pair.to(tl.int32)
    return pair + pair // half * half


@jit
def pairs_of(N, half, ROWS: tl.constexpr, BITS: tl.constexpr, WIDE: tl.constexpr):
    """This program's pairs of neurons: the offsets of the first of each pair and of their rows, and
    the masks of both."""
    first, rows, tile, mask, row_mask = tile_of(N // 2, ROWS, 2)
    if BITS:  # the eight of a byte stand in a row of memory
        pair = first + rows
        if not WIDE:
            pair = pair.to(tl.int32)
        # On the sum itself: on what a function returns, the hint would be lost.
        start = tl.multiple_of(pair + pair // half * half, 4)
        return start[:, None] + tl.arange(0, 4)[None, :], start, mask, row_mask
    else:
        place = place_of(first + tile, half, WIDE)
        return place, place, mask, mask


@jit
def load_fired(pointer, rows, mask, BITS: tl.constexpr):
    if BITS:
        return unpacked(pointer, rows, mask)
    else:
        return tl.load(pointer + rows, mask=mask, other=0).to(tl.float32)


@jit
def store_fired(
    pointer, rows, s, there, N, half, ROWS: tl.constexpr, BITS: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    if BITS:
        first = tl.program_id(0).to(tl.int64) * (ROWS * 8) + tl.arange(0, ROWS) * 8
        octets = place_of(first, half, WIDE) // 8
        bits = packed(tl.where(there, s, 0.0), rows, ROWS)
        tl.store(pointer + octets, bits, mask=first < N // 2)
    else:
        tl.store(pointer + rows, s.to(tl.uint8), mask=there)


@jit
def plus_weighted(a, b, weight, NEURON: tl.constexpr):
    """``a + weight b``"""
    return rounded(a + rounded(b * weight, NEURON.charged), NEURON.charged)


@jit
def passed_on(x, beta, NEURON: tl.constexpr):
    """``beta x``, rounded so that it comes back from a sum with a spike."""
    return rounded(plus_weighted(1.0, x, beta, NEURON) - 1.0, NEURON.charged)


@jit
def charge(v, x, leak, weight, NEURON: tl.constexpr):
    """``leak v + weight x``"""
    return plus_weighted(rounded(v * leak, NEURON.charged), x, weight, NEURON)


@jit
def after(m, s, other, alpha, threshold, v_reset, NEURON: tl.constexpr):
    """``R(m, s) + alpha other``"""
    return plus_weighted(reset(m, s, 0.0, threshold, 1.0, v_reset, NEURON), other, alpha, NEURON)


@jit
def gradient_of_pair(
    grad_y1, grad_y2, grad_v1, grad_v2, m1, m2, s1, s2,
    leak, per_tau, alpha, beta, threshold, v_reset, c0, c1, c2, NEURON: tl.constexpr,
):  # fmt: skip
    """The gradients at ``x1``, ``x2``, ``v1`` and ``v2`` from those at ``y1``, ``y2``, ``v1'`` and
    ``v2'``."""
    z1, z2 = (
        above(m1, threshold, NEURON.charged, NEURON),
        above(m2, threshold, NEURON.charged, NEURON),
    )
    grad_m2, _ = gradient_of_step(
        grad_y2, grad_v2, m2, z2, s2, threshold, 1.0, v_reset, c0, c1, c2, NEURON
    )
    all_v1 = grad_v1 + leak * grad_m2
    all_y1 = grad_y1 + per_tau * grad_m2
    grad_m1, _ = gradient_of_step(
        all_y1, all_v1, m1, z1, s1, threshold, 1.0, v_reset, c0, c1, c2, NEURON
    )
    return (
        per_tau * grad_m1 + beta * grad_y2,
        beta * all_y1,
        leak * grad_m1 + alpha * grad_v2,
        alpha * all_v1,
    )


@jit(do_not_specialize_on_alignment=["T"])
def forward_kernel(
    given_ptr,
    v_ptr,
    leak,
    weight1,
    weight2,
    alpha,
    beta,
    threshold,
    v_reset,
    y_ptr,
    fired_ptr,
    after_ptr,
    T,
    N,
    half,
    AGAIN: tl.constexpr,
    NEURON: tl.constexpr,
    BITS: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """T time steps: ``x`` [T, N] and ``v`` [N] to ``y``, spikes, and the last ``v'``.

    With ``AGAIN`` the steps are repeated: ``y`` and the spikes are given, and only ``v'`` is
    written.
    """
    place, rows, mask, row_mask = pairs_of(N, half, ROWS, BITS, WIDE)
    leak, weight1, weight2, alpha, beta = (
        number(leak),
        number(weight1),
        number(weight2),
        number(alpha),
        number(beta),
    )
    threshold, v_reset = number(threshold), number(v_reset)
    half_rows = half // 8 if BITS else half
    v1, v2 = load(v_ptr, place, mask), load(v_ptr + half, place, mask)
    for _ in range(T):
        given1, given2 = load(given_ptr, place, mask), load(given_ptr + half, place, mask)
        if AGAIN:
            s1 = load_fired(fired_ptr, rows, row_mask, BITS)
            s2 = load_fired(fired_ptr + half_rows, rows, row_mask, BITS)
            passed = given2 - s2
        else:
            passed = passed_on(given1, beta, NEURON)
        m1 = charge(v1, passed, leak, weight1, NEURON)
        if AGAIN:
            y1 = given1
        else:
            s1 = fires(above(m1, threshold, NEURON.charged, NEURON), NEURON)
            y1 = plus_weighted(s1, given2, beta, NEURON)
        v1_before = v1
        v1 = after(m1, s1, v2, alpha, threshold, v_reset, NEURON)
        m2 = charge(v1, y1, leak, weight2, NEURON)
        if not AGAIN:
            s2 = fires(above(m2, threshold, NEURON.charged, NEURON), NEURON)
            store(y_ptr, place, y1, mask)
            store(y_ptr + half, place, s2 + passed, mask)
            store_fired(fired_ptr, rows, s1, mask, N, half, ROWS, BITS, WIDE)
            store_fired(fired_ptr + half_rows, rows, s2, mask, N, half, ROWS, BITS, WIDE)
            y_ptr += N
        v2 = after(m2, s2, v1_before, alpha, threshold, v_reset, NEURON)
        given_ptr += N
        fired_ptr += N // 8 if BITS else N
    store(after_ptr, place, v1, mask)
    store(after_ptr + half, place, v2, mask)


@jit(do_not_specialize_on_alignment=["T"])
def inverse_kernel(
    y_ptr,
    fired_ptr,
    after_ptr,
    leak,
    weight1,
    weight2,
    alpha,
    beta,
    threshold,
    v_reset,
    x_ptr,
    v_ptr,
    T,
    N,
    half,
    NEURON: tl.constexpr,
    BITS: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The inputs of T time steps from ``y`` [T, N] and spikes; of one step, from ``v'`` too, the
    potential before it."""
    place, rows, mask, row_mask = pairs_of(N, half, ROWS, BITS, WIDE)
    leak, weight1, weight2, alpha, beta = (
        number(leak),
        number(weight1),
        number(weight2),
        number(alpha),
        number(beta),
    )
    threshold, v_reset = number(threshold), number(v_reset)
    half_rows = half // 8 if BITS else half
    for _ in range(T):
        y1, y2 = load(y_ptr, place, mask), load(y_ptr + half, place, mask)
        s1 = load_fired(fired_ptr, rows, row_mask, BITS)
        s2 = load_fired(fired_ptr + half_rows, rows, row_mask, BITS)
        store(x_ptr, place, tl.div_rn(y2 - s2, beta), mask)
        store(x_ptr + half, place, tl.div_rn(y1 - s1, beta), mask)
        if v_ptr is not None:
            after1, after2 = load(after_ptr, place, mask), load(after_ptr + half, place, mask)
            m2 = charge(after1, y1, leak, weight2, NEURON)
            v1 = tl.div_rn(after2 - reset(m2, s2, 0.0, threshold, 1.0, v_reset, NEURON), alpha)
            m1 = charge(v1, y2 - s2, leak, weight1, NEURON)
            v2 = tl.div_rn(after1 - reset(m1, s1, 0.0, threshold, 1.0, v_reset, NEURON), alpha)
            store(v_ptr, place, v1, mask)
            store(v_ptr + half, place, v2, mask)
        y_ptr += N
        x_ptr += N
        fired_ptr += N // 8 if BITS else N


@jit(do_not_specialize_on_alignment=["T"])
def backward_kernel(
    y_ptr, fired_ptr, start_ptr, grad_y_ptr, grad_last_ptr,
    leak, weight1, weight2, alpha, beta, threshold, v_reset, c0, c1, c2, grad_x_ptr, grad_start_ptr,
    T, N, half, NEURON: tl.constexpr, BITS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """T time steps backward: forward once more, from ``y`` and the spikes, to the charged
    potentials, which are written to ``grad_x``, and back to the gradients, which overwrite them.
    The charged potentials of the last step stay in registers."""
    place, rows, mask, row_mask = pairs_of(N, half, ROWS, BITS, WIDE)
    leak, weight1, weight2, alpha, beta = (
        number(leak),
        number(weight1),
        number(weight2),
        number(alpha),
        number(beta),
    )
    threshold, v_reset = number(threshold), number(v_reset)
    half_rows = half // 8 if BITS else half
    bytes_per_step = N // 8 if BITS else N
    v1, v2 = load(start_ptr, place, mask), load(start_ptr + half, place, mask)
    m1, m2 = v1, v2
    for t in range(T):
        y1, y2 = load(y_ptr, place, mask), load(y_ptr + half, place, mask)
        s1 = load_fired(fired_ptr, rows, row_mask, BITS)
        s2 = load_fired(fired_ptr + half_rows, rows, row_mask, BITS)
        m1 = charge(v1, y2 - s2, leak, weight1, NEURON)
        v1_before = v1
        v1 = after(m1, s1, v2, alpha, threshold, v_reset, NEURON)
        m2 = charge(v1, y1, leak, weight2, NEURON)
        v2 = after(m2, s2, v1_before, alpha, threshold, v_reset, NEURON)
        if t < T - 1:
            store(grad_x_ptr, place, m1, mask)
            store(grad_x_ptr + half, place, m2, mask)
            grad_x_ptr += N
            fired_ptr += bytes_per_step
        y_ptr += N
    tl.debug_barrier()  # a thread may read below what another one of its block wrote

    zero = tl.full((2 * ROWS, 4), 0.0, tl.float32)
    grad_v1, grad_v2 = zero, zero
    if grad_last_ptr is not None:
        grad_v1, grad_v2 = load(grad_last_ptr, place, mask), load(grad_last_ptr + half, place, mask)
    if grad_y_ptr is not None:
        grad_y_ptr += (tl.cast(T, tl.int64) - 1) * N
    for t in range(T):
        s1 = load_fired(fired_ptr, rows, row_mask, BITS)
        s2 = load_fired(fired_ptr + half_rows, rows, row_mask, BITS)
        grad_y1, grad_y2 = zero, zero
        if grad_y_ptr is not None:
            grad_y1, grad_y2 = load(grad_y_ptr, place, mask), load(grad_y_ptr + half, place, mask)
            grad_y_ptr -= N
        grad_x1, grad_x2, grad_v1, grad_v2 = gradient_of_pair(
            grad_y1, grad_y2, grad_v1, grad_v2, m1, m2, s1, s2,
            leak, weight2, alpha, beta, threshold, v_reset, c0, c1, c2, NEURON,
        )  # fmt: skip
        store(grad_x_ptr, place, grad_x1, mask)
        store(grad_x_ptr + half, place, grad_x2, mask)
        if t < T - 1:
            grad_x_ptr -= N
            fired_ptr -= bytes_per_step
            m1, m2 = load(grad_x_ptr, place, mask), load(grad_x_ptr + half, place, mask)
    store(grad_start_ptr, place, grad_v1, mask)
    store(grad_start_ptr + half, place, grad_v2, mask)
