"""The neurons of :mod:`snn_revplugin.dynamics` in Triton: one kernel for steps forward, two
backward, and spikes to bits.

The equations, and how they round, are in :mod:`.equations`. A pointer that is None is not read or
written.
"""

import triton
import triton.language as tl

from .equations import (
    above,
    charge,
    decay_of,
    fires,
    give_total,
    gradient_of_charge,
    gradient_of_fire,
    gradient_of_step,
    index_of_parameter,
    invert_charge,
    load,
    packed,
    parameters,
    reset,
    still_due,
    store,
    tile_of,
    unpacked,
)


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    x_ptr, v_ptr, decay, threshold, factor, inner, size, v_reset, rest,
    spikes_ptr, bits_ptr, charged_ptr, after_ptr, path_ptr,
    T, N, NEURON: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """T time steps: ``x`` [T, N] and ``v`` [N] to spikes, their bits, ``h`` and ``v'`` of every
    step, and the last ``v'``.

    ``bits`` asks for whole bytes a step: N divisible by 8, or T of 1.
    """
    first, rows, tile, mask, row_mask = tile_of(N, ROWS)
    a, theta, f, v_reset, rest = parameters(
        decay, threshold, factor, inner, size, v_reset, rest, first, tile, mask, NEURON, WIDE
    )

    v = load(v_ptr + first, tile, mask)
    x_ptr += first
    if spikes_ptr is not None:
        spikes_ptr += first
    if bits_ptr is not None:
        bits_ptr += first // 8
    if charged_ptr is not None:
        charged_ptr += first
    if path_ptr is not None:
        path_ptr += first
    for _ in range(T):
        x = load(x_ptr, tile, mask)
        r = fires(above(v, theta, NEURON.difference_before, NEURON), NEURON)
        h = charge(x, v, r, a, theta, rest, NEURON)
        s = fires(above(h, theta, NEURON.difference, NEURON), NEURON)
        v = reset(h, s, r, theta, f, v_reset, NEURON)
        x_ptr += N
        if spikes_ptr is not None:
            given = s
            if NEURON.graded:
                given = s * f
            store(spikes_ptr, tile, given, mask)
            spikes_ptr += N
        if bits_ptr is not None:
            tl.store(bits_ptr + rows, packed(tl.where(mask, s, 0.0), ROWS), mask=row_mask)
            bits_ptr += N // 8
        if charged_ptr is not None:
            store(charged_ptr, tile, h, mask)
            charged_ptr += N
        if path_ptr is not None:
            store(path_ptr, tile, v, mask)
            path_ptr += N
    if after_ptr is not None:
        store(after_ptr + first, tile, v, mask)


@triton.jit
def step_backward_kernel(
    grad_spikes_ptr,
    grad_ptr,
    h_ptr,
    before_ptr,
    x_ptr,
    bits_ptr,
    bits_before_ptr,
    decay,
    threshold,
    factor,
    inner,
    size,
    v_reset,
    rest,
    c0,
    c1,
    c2,
    grad_x_ptr,
    grad_before_ptr,
    charged_before_ptr,
    grad_decay_ptr,
    grad_threshold_ptr,
    grad_factor_ptr,
    N,
    PART: tl.constexpr,
    NEURON: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One time step backward, whole or one of its graph nodes.

    ``PART`` of "step": ``grad`` is that at ``v'``, to those at ``x`` and ``v``. "fire":
    ``grad_spikes`` to that at ``h``, in ``grad_x``. "reset": ``grad`` at ``v'`` to those at ``h``
    and at the spikes, in ``grad_x`` and ``grad_before``. "charge": ``grad`` at ``h`` to those at
    ``x`` and ``v``.

    ``charged_before`` asks for the reversal: the charged potential of the step before, from ``h``,
    ``x`` and the bits. The reset signal of a delayed reset is ``bits_before``, or else decided from
    ``before``.
    """
    first, rows, tile, mask, row_mask = tile_of(N, ROWS)
    a, theta, f, v_reset, rest = parameters(
        decay, threshold, factor, inner, size, v_reset, rest, first, tile, mask, NEURON, WIDE
    )

    zero = tl.full((ROWS, 8), 0.0, tl.float32)
    grad_spikes, grad, h, x, s, r, v = zero, zero, zero, zero, zero, zero, zero
    if grad_spikes_ptr is not None:
        grad_spikes = load(grad_spikes_ptr + first, tile, mask)
    if grad_ptr is not None:
        grad = load(grad_ptr + first, tile, mask)
    if h_ptr is not None:
        h = load(h_ptr + first, tile, mask)
    if x_ptr is not None:
        x = load(x_ptr + first, tile, mask)
    if before_ptr is not None:
        v = load(before_ptr + first, tile, mask)
    if bits_ptr is not None:
        s = unpacked(bits_ptr + first // 8, rows, row_mask)
    if bits_before_ptr is not None:
        r = unpacked(bits_before_ptr + first // 8, rows, row_mask)
    elif before_ptr is not None:
        r = fires(above(v, theta, NEURON.difference_before, NEURON), NEURON)
    z = above(h, theta, NEURON.difference, NEURON)

    of_decay, of_threshold, of_factor = zero, zero, zero
    if PART == "fire":
        grad_h = gradient_of_fire(grad_spikes, z, f, c0, c1, c2, NEURON)
        of_threshold = -grad_h
        of_factor = grad_spikes * s
        store(grad_x_ptr + first, tile, grad_h, mask)
    elif PART == "reset":
        due = still_due(s, r, f, NEURON)
        if NEURON.reset == "subtract":
            grad_h, grad_due = grad, -grad * theta
            of_threshold = -grad * due
        else:
            grad_h, grad_due = grad - grad * due, -grad * h
        of_factor = -grad_due * (s * f / f / f)
        store(grad_x_ptr + first, tile, grad_h, mask)
        store(grad_before_ptr + first, tile, grad_due / f, mask)
    else:
        if PART == "step":
            grad_h, _ = gradient_of_step(
                grad_spikes, grad, h, z, s, theta, f, v_reset, c0, c1, c2, NEURON
            )
        else:
            grad_h = grad
        if charged_before_ptr is not None:
            v = invert_charge(h, x, r, a, theta, NEURON)
            charged = v
            if NEURON.reset == "soft":
                charged = v + unpacked(bits_before_ptr + first // 8, rows, row_mask) * theta
            store(charged_before_ptr + first, tile, charged, mask)
        grad_x, grad_before = gradient_of_charge(grad_h, r, a, NEURON)
        if grad_x_ptr is not None:
            store(grad_x_ptr + first, tile, grad_x, mask)
        store(grad_before_ptr + first, tile, grad_before, mask)
        of_threshold = -grad_h * r
        of_decay = grad_h * decay_of(h, v, r, x, rest, x_ptr is not None, NEURON)

    if grad_decay_ptr is not None:
        give_total(grad_decay_ptr, first, tile, mask, of_decay, NEURON.decay_held == "each")
    if grad_threshold_ptr is not None:
        give_total(
            grad_threshold_ptr, first, tile, mask, of_threshold, NEURON.threshold_held == "each"
        )
    if grad_factor_ptr is not None:
        give_total(grad_factor_ptr, first, tile, mask, of_factor, NEURON.factor_held == "each")


@triton.jit
def fired_at(h, threshold, bits_ptr, at, rows, row_mask, NEURON: tl.constexpr):
    """The spikes of a step of a sequence: kept, or else decided from ``h``."""
    if bits_ptr is not None:
        return unpacked(bits_ptr + at // 8, rows, row_mask)
    else:
        return fires(above(h, threshold, NEURON.difference, NEURON), NEURON)


@triton.jit
def fired_before(v, s, threshold, bits_ptr, NEURON: tl.constexpr):
    """What the reset of the next charge acts on: the spikes of the step before, kept or decided
    from ``v``."""
    if bits_ptr is not None:
        return s
    else:
        return fires(above(v, threshold, NEURON.difference_before, NEURON), NEURON)


@triton.jit(do_not_specialize=["T"])
def sequence_backward_kernel(
    x_ptr, mean_ptr, scale_ptr, bias_ptr, channel, channels, bits_ptr, h_ptr, start_ptr,
    grad_spikes_ptr, grad_last_ptr, grad_path_ptr,
    decay, threshold, factor, inner, size, v_reset, rest, c0, c1, c2,
    grad_x_ptr, grad_start_ptr, grad_decay_ptr, grad_threshold_ptr, grad_factor_ptr,
    T, N, NEURON: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """T time steps backward: up to the charged potentials, written to ``h`` [T, N], and down again
    to the gradients.

    ``h`` may be ``x`` itself, and ``grad_x`` may be ``h``. With ``x`` None the charged potentials
    are there already.

    With ``mean`` the current is ``(x - mean) scale + bias``, of each of ``channels`` channels,
    ``channel`` neurons in a row each. Rounding may differ from that of the first time, so no spike
    is decided again: they are ``bits``, whole bytes a step.
    """
    first, rows, tile, mask, row_mask = tile_of(N, ROWS)
    a, theta, f, v_reset, rest = parameters(
        decay, threshold, factor, inner, size, v_reset, rest, first, tile, mask, NEURON, WIDE
    )
    start = load(start_ptr + first, tile, mask)
    zero = tl.full((ROWS, 8), 0.0, tl.float32)

    if x_ptr is not None:
        v, r = start, fires(above(start, theta, NEURON.difference_before, NEURON), NEURON)
        up = first
        if mean_ptr is not None:
            index = index_of_parameter(first, tile, channel, channels, WIDE)
            mean, scale = load(mean_ptr, index, mask), load(scale_ptr, index, mask)
            bias = load(bias_ptr, index, mask)
        for _ in range(T):
            x = load(x_ptr + up, tile, mask)
            if mean_ptr is not None:
                x = (x - mean) * scale + bias
            h = charge(x, v, r, a, theta, rest, NEURON)
            store(h_ptr + up, tile, h, mask)
            s = fired_at(h, theta, bits_ptr, up, rows, row_mask, NEURON)
            v = reset(h, s, r, theta, f, v_reset, NEURON)
            r = fired_before(v, s, theta, bits_ptr, NEURON)
            up += N
        tl.debug_barrier()  # a block's threads may meet again what others of them wrote

    grad = zero
    if grad_last_ptr is not None:
        grad = load(grad_last_ptr + first, tile, mask)
    of_decay, of_threshold, of_factor = zero, zero, zero
    down = first + (tl.cast(T, tl.int64) - 1) * N
    h = load(h_ptr + down, tile, mask)
    for _ in range(T):
        if grad_path_ptr is not None:
            grad += load(grad_path_ptr + down, tile, mask)
        grad_spikes = zero
        if grad_spikes_ptr is not None:
            grad_spikes = load(grad_spikes_ptr + down, tile, mask)
        z = above(h, theta, NEURON.difference, NEURON)
        s = fired_at(h, theta, bits_ptr, down, rows, row_mask, NEURON)
        more = (
            down >= N
        )  # there is a step before; at the first one, its own row is read once more for nothing
        below = tl.where(more, down - N, down)
        h_before = load(h_ptr + below, tile, mask)
        s_before = fired_at(h_before, theta, bits_ptr, below, rows, row_mask, NEURON)
        v = tl.where(more, reset(h_before, s_before, zero, theta, f, v_reset, NEURON), start)
        r = fired_before(v, s_before, theta, bits_ptr, NEURON)
        if bits_ptr is not None:
            r = tl.where(
                more, r, fires(above(start, theta, NEURON.difference_before, NEURON), NEURON)
            )
        grad_h, grad_z = gradient_of_step(
            grad_spikes, grad, h, z, s, theta, f, v_reset, c0, c1, c2, NEURON
        )
        grad_x, grad = gradient_of_charge(grad_h, r, a, NEURON)
        store(grad_x_ptr + down, tile, grad_x, mask)
        if grad_decay_ptr is not None:
            of_decay += grad_h * decay_of(h, v, r, zero, rest, False, NEURON)
        if grad_threshold_ptr is not None:
            of_threshold -= grad_z
            if NEURON.reset == "subtract":
                of_threshold -= grad_h * r
        if grad_factor_ptr is not None:
            of_factor += grad_spikes * s
        h = h_before
        down -= N
    store(grad_start_ptr + first, tile, grad, mask)
    if grad_decay_ptr is not None:
        give_total(grad_decay_ptr, first, tile, mask, of_decay, NEURON.decay_held == "each")
    if grad_threshold_ptr is not None:
        give_total(
            grad_threshold_ptr, first, tile, mask, of_threshold, NEURON.threshold_held == "each"
        )
    if grad_factor_ptr is not None:
        give_total(grad_factor_ptr, first, tile, mask, of_factor, NEURON.factor_held == "each")


@triton.jit
def pack_kernel(fired_ptr, bits_ptr, N, ROWS: tl.constexpr):
    """Zeros and ones of any dtype [N] to bits."""
    first, rows, tile, mask, row_mask = tile_of(N, ROWS)
    fired = tl.load(fired_ptr + first + tile, mask=mask, other=0) != 0
    tl.store(bits_ptr + first // 8 + rows, packed(fired, ROWS), mask=row_mask)


@triton.jit
def unpack_kernel(bits_ptr, ones_ptr, N, ROWS: tl.constexpr):
    """Bits to zeros and ones of any dtype [N]."""
    first, rows, tile, mask, row_mask = tile_of(N, ROWS)
    ones = unpacked(bits_ptr + first // 8, rows, row_mask)
    tl.store(ones_ptr + first + tile, ones.to(ones_ptr.dtype.element_ty), mask=mask)
