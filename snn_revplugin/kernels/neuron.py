"""The neurons with one state in Triton: one kernel for time steps forward, one for a step backward,
one for T steps backward, and two that pack and unpack spikes.

The equations, and how they round, are in :mod:`.equations`. A pointer that is None is neither read
nor written. Backward decides no spike: it reads them from their bits.
"""

import triton.language as tl

from .equations import (
    above,
    charge,
    decay_of,
    fires,
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
    store_total,
    tile_of,
    unpacked,
    unpacked_of_step,
)
from .jit import jit


@jit(do_not_specialize=["T"])
def forward_kernel(
    x_ptr, v_ptr, decay, threshold, factor, inner, size, v_reset, rest,
    spikes_ptr, bits_ptr, charged_ptr, after_ptr, path_ptr,
    T, N, NEURON: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """T time steps: ``x`` [T, N] and ``v`` [N] to spikes, their bits, ``h`` and ``v'`` of each
    step, and the last ``v'``. The bits of each step start at a whole byte.
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
            tl.store(bits_ptr + rows, packed(tl.where(mask, s, 0.0)), mask=row_mask)
            bits_ptr += (N + 7) // 8
        if charged_ptr is not None:
            store(charged_ptr, tile, h, mask)
            charged_ptr += N
        if path_ptr is not None:
            store(path_ptr, tile, v, mask)
            path_ptr += N
    if after_ptr is not None:
        store(after_ptr + first, tile, v, mask)


@jit
def store_totals(
    decay_ptr, threshold_ptr, factor_ptr, of_decay, of_threshold, of_factor,
    first, tile, mask, NEURON: tl.constexpr,
):  # fmt: skip
    """The gradients of decay, threshold and factor, of those that are wanted."""
    if decay_ptr is not None:
        store_total(decay_ptr, first, tile, mask, of_decay, NEURON.decay_held == "each")
    if threshold_ptr is not None:
        store_total(threshold_ptr, first, tile, mask, of_threshold, NEURON.threshold_held == "each")
    if factor_ptr is not None:
        store_total(factor_ptr, first, tile, mask, of_factor, NEURON.factor_held == "each")


@jit
def step_backward_kernel(
    grad_spikes_ptr,
    grad_ptr,
    h_ptr,
    before_ptr,
    x_ptr,
    bits_ptr,
    signal_ptr,
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
    before_out_ptr,
    grad_decay_ptr,
    grad_threshold_ptr,
    grad_factor_ptr,
    N,
    PART: tl.constexpr,
    FROM_AFTER: tl.constexpr,
    NEURON: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One time step backward, whole or one of its graph nodes.

    ``PART`` of "step": from ``grad`` at ``v'`` and ``grad_spikes`` to the gradients at ``x`` and
    ``v``. "fire": from ``grad_spikes`` to that at ``h``, in ``grad_x``. "reset": from ``grad`` at
    ``v'`` to those at ``h`` and at the spikes, in ``grad_x`` and ``grad_before``. "charge": from
    ``grad`` at ``h`` to those at ``x`` and ``v``.

    ``bits`` are the spikes, ``signal`` the bits of what a delayed reset acted on. With
    ``FROM_AFTER`` the step has a soft reset, and ``h`` is ``v'``, which the reset is inverted of.
    With ``before_out`` the charge is inverted too, from ``h``, ``x`` and the signal; otherwise
    ``before`` is ``v``, where a gradient reads it.
    """
    first, rows, tile, mask, row_mask = tile_of(N, ROWS)
    a, theta, f, v_reset, rest = parameters(
        decay, threshold, factor, inner, size, v_reset, rest, first, tile, mask, NEURON, WIDE
    )

    zero = tl.full((2, ROWS, 4), 0.0, tl.float32)
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
    if signal_ptr is not None:
        r = unpacked(signal_ptr + first // 8, rows, row_mask)
    if FROM_AFTER:
        h = h + s * theta
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
        if before_out_ptr is not None:
            v = invert_charge(h, x, r, a, theta, NEURON)
            store(before_out_ptr + first, tile, v, mask)
        grad_x, grad_before = gradient_of_charge(grad_h, r, a, NEURON)
        if grad_x_ptr is not None:
            store(grad_x_ptr + first, tile, grad_x, mask)
        store(grad_before_ptr + first, tile, grad_before, mask)
        of_threshold = -grad_h * r
        of_decay = grad_h * decay_of(v, r, x, rest, NEURON)

    store_totals(
        grad_decay_ptr, grad_threshold_ptr, grad_factor_ptr, of_decay, of_threshold, of_factor,
        first, tile, mask, NEURON,
    )  # fmt: skip


@jit(do_not_specialize=["T"])
def sequence_backward_kernel(
    x_ptr, mean_ptr, scale_ptr, bias_ptr, channel, channels, bits_ptr, h_ptr, start_ptr,
    grad_spikes_ptr, grad_last_ptr, grad_path_ptr,
    decay, threshold, factor, inner, size, v_reset, rest, c0, c1, c2,
    grad_x_ptr, grad_start_ptr, grad_decay_ptr, grad_threshold_ptr, grad_factor_ptr,
    T, N, WHOLE: tl.constexpr, NEURON: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """T time steps backward: forward once more to the charged potentials, written to ``h`` [T, N],
    and back to the gradients.

    ``h`` may be ``x`` itself, unless the gradient of the decay reads the current; ``grad_x`` may be
    ``h``. With ``x`` None, ``h`` holds the charged potentials already.

    With ``mean`` the current is ``(x - mean) scale + bias`` for each of ``channels`` channels;
    ``channel`` neurons in a row belong to one. It may differ from that of forward in rounding, and
    ``bits``, the spikes [T, N], decide. ``WHOLE``: each step's bits start at a whole byte.
    """
    first, rows, tile, mask, row_mask = tile_of(N, ROWS)
    a, theta, f, v_reset, rest = parameters(
        decay, threshold, factor, inner, size, v_reset, rest, first, tile, mask, NEURON, WIDE
    )
    start = load(start_ptr + first, tile, mask)
    first_signal = fires(above(start, theta, NEURON.difference_before, NEURON), NEURON)
    zero = tl.full((2, ROWS, 4), 0.0, tl.float32)

    if x_ptr is not None:
        v, r = start, first_signal
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
            s = unpacked_of_step(bits_ptr, up, rows, tile, row_mask, mask, WHOLE)
            v = reset(h, s, r, theta, f, v_reset, NEURON)
            r = s
            up += N
        tl.debug_barrier()  # a thread may read below what another one of its block wrote

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
        s = unpacked_of_step(bits_ptr, down, rows, tile, row_mask, mask, WHOLE)
        more = down >= N  # there is a step before; if not, this step's row is read for nothing
        below = tl.where(more, down - N, down)
        h_before = load(h_ptr + below, tile, mask)
        s_before = unpacked_of_step(bits_ptr, below, rows, tile, row_mask, mask, WHOLE)
        v = tl.where(more, reset(h_before, s_before, zero, theta, f, v_reset, NEURON), start)
        r = tl.where(more, s_before, first_signal)
        grad_h, grad_z = gradient_of_step(
            grad_spikes, grad, h, z, s, theta, f, v_reset, c0, c1, c2, NEURON
        )
        grad_x, grad = gradient_of_charge(grad_h, r, a, NEURON)
        store(grad_x_ptr + down, tile, grad_x, mask)
        if grad_decay_ptr is not None:
            x = zero
            if NEURON.charge == "decay_input":
                x = load(x_ptr + down, tile, mask)
                if mean_ptr is not None:
                    x = (x - mean) * scale + bias
            of_decay += grad_h * decay_of(v, r, x, rest, NEURON)
        if grad_threshold_ptr is not None:
            of_threshold -= grad_z
            if NEURON.reset == "subtract":
                of_threshold -= grad_h * r
        if grad_factor_ptr is not None:
            of_factor += grad_spikes * s
        h = h_before
        down -= N
    store(grad_start_ptr + first, tile, grad, mask)
    store_totals(
        grad_decay_ptr, grad_threshold_ptr, grad_factor_ptr, of_decay, of_threshold, of_factor,
        first, tile, mask, NEURON,
    )  # fmt: skip


@jit
def pack_kernel(fired_ptr, bits_ptr, N, ROWS: tl.constexpr):
    """Zeros and ones of any dtype [N] to bits."""
    first, rows, tile, mask, row_mask = tile_of(N, ROWS)
    fired = tl.load(fired_ptr + first + tile, mask=mask, other=0) != 0
    tl.store(bits_ptr + first // 8 + rows, packed(fired), mask=row_mask)


@jit
def unpack_kernel(bits_ptr, ones_ptr, N, ROWS: tl.constexpr):
    """Bits to zeros and ones of any dtype [N]."""
    first, rows, tile, mask, row_mask = tile_of(N, ROWS)
    ones = unpacked(bits_ptr + first // 8, rows, row_mask)
    tl.store(ones_ptr + first + tile, ones.to(ones_ptr.dtype.element_ty), mask=mask)
