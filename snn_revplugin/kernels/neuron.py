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
    octets_of,
    packed,
    parameters,
    reset,
    spikes_in,
    spikes_of_step,
    still_due,
    store,
    store_total,
    tile_of,
    unpacked,
    with_step,
)
from .jit import jit


@jit(do_not_specialize_on_alignment=["T"])
def forward_kernel(
    x_ptr, v_ptr, decay, threshold, factor, inner, size, v_reset, rest,
    spikes_ptr, bits_ptr, charged_ptr, after_ptr, path_ptr,
    T, N, NEURON: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """T time steps: ``x`` [T, N] and ``v`` [N] to spikes, their bits, ``h`` and ``v'`` of each
    step, and the last ``v'``. The bits of each step start at a whole byte.
    """
    first, rows, tile, mask, _ = tile_of(N, ROWS, 2)
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
    octets = tl.arange(0, ROWS)
    octet_mask = octets * 8 < N - first
    x = load(x_ptr, tile, mask)
    for t in range(T):
        x_ptr += N
        ahead = load(x_ptr, tile, mask & (t + 1 < T))  # under way while this step is computed
        r = fires(above(v, theta, NEURON.difference_before, NEURON), NEURON)
        h = charge(x, v, r, a, theta, rest, NEURON)
        s = fires(above(h, theta, NEURON.difference, NEURON), NEURON)
        v = reset(h, s, r, theta, f, v_reset, NEURON)
        x = ahead
        if spikes_ptr is not None:
            given = s
            if NEURON.graded:
                given = s * f
            store(spikes_ptr, tile, given, mask)
            spikes_ptr += N
        if bits_ptr is not None:
            bits = packed(tl.where(mask, s, 0.0), rows, ROWS)
            tl.store(bits_ptr + octets, bits, mask=octet_mask)
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
    first, rows, tile, mask, row_mask = tile_of(N, ROWS, 1)
    a, theta, f, v_reset, rest = parameters(
        decay, threshold, factor, inner, size, v_reset, rest, first, tile, mask, NEURON, WIDE
    )

    zero = tl.full((ROWS, 4), 0.0, tl.float32)
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
            grad_h, grad_z = gradient_of_step(
                grad_spikes, grad, h, z, s, theta, f, v_reset, c0, c1, c2, NEURON
            )
            of_factor = grad_spikes * s
        else:
            grad_h, grad_z = grad, zero
        if before_out_ptr is not None:
            v = invert_charge(h, x, r, a, theta, NEURON)
            store(before_out_ptr + first, tile, v, mask)
        grad_x, grad_before = gradient_of_charge(grad_h, r, a, NEURON)
        if grad_x_ptr is not None:
            store(grad_x_ptr + first, tile, grad_x, mask)
        store(grad_before_ptr + first, tile, grad_before, mask)
        of_threshold = -grad_z
        if NEURON.reset == "subtract":
            of_threshold -= grad_h * r
        of_decay = grad_h * decay_of(v, r, x, rest, NEURON)

    store_totals(
        grad_decay_ptr, grad_threshold_ptr, grad_factor_ptr, of_decay, of_threshold, of_factor,
        first, tile, mask, NEURON,
    )  # fmt: skip


@jit
def current(x_ptr, at, tile, mask, mean, scale, bias, NORMED: tl.constexpr):
    """The current of a step, itself or from the input of a batch norm."""
    x = load(x_ptr + at, tile, mask)
    if NORMED:
        x = (x - mean) * scale + bias
    return x


@jit
def gradient_at(pointer, at, tile, mask, zero):
    """A gradient of a step, zero where there is none."""
    if pointer is not None:
        return load(pointer + at, tile, mask)
    else:
        return zero


@jit(do_not_specialize=["T"])
def sequence_backward_kernel(
    x_ptr, mean_ptr, scale_ptr, bias_ptr, channel, channels, bits_ptr, h_ptr, states_ptr, start_ptr,
    grad_spikes_ptr, grad_last_ptr, grad_path_ptr,
    decay, threshold, factor, inner, size, v_reset, rest, c0, c1, c2,
    grad_x_ptr, grad_start_ptr, grad_decay_ptr, grad_threshold_ptr, grad_factor_ptr,
    T, N, DOWN, STRETCH: tl.constexpr, SEVERAL: tl.constexpr, ROWWISE: tl.constexpr,
    OVERWRITES: tl.constexpr, WHOLE: tl.constexpr, NEURON: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """T time steps backward, a stretch of ``STRETCH`` steps at a time: forward once more to its
    charged potentials, which stay in registers, and back to the gradients.

    T is one stretch, or ``SEVERAL``, of which the last may be shorter. Then the potentials after
    each but the last go to ``states`` [stretches - 1, N] first. With ``x`` None, ``h`` [T, N] holds
    the charged potentials, and nothing is computed again. ``OVERWRITES``: ``grad_x`` is ``x``.

    With ``mean`` the current is ``(x - mean) scale + bias`` for each of ``channels`` channels;
    ``channel`` neurons in a row belong to one, which fill whole rows where ``ROWWISE``. It may
    differ from that of forward in rounding, and ``bits``, the spikes [T, N], decide. ``WHOLE``:
    each step's bits start at a whole byte. ``DOWN`` is N: by two names, because a compiler that
    knows that the way down goes over the addresses of the way up keeps all of them in registers.
    """
    first, rows, tile, mask, row_mask = tile_of(N, ROWS, 1, COLUMNS)
    a, theta, f, v_reset, rest = parameters(
        decay, threshold, factor, inner, size, v_reset, rest, first, tile, mask, NEURON, WIDE
    )
    start = load(start_ptr + first, tile, mask)
    first_signal = fires(above(start, theta, NEURON.difference_before, NEURON), NEURON)
    zero = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    mean, scale, bias = zero, zero, zero
    NORMED: tl.constexpr = mean_ptr is not None
    if NORMED:
        if ROWWISE:
            index = index_of_parameter(first, rows, channel, channels, WIDE)
            mean = load(mean_ptr, index, row_mask)[:, None]
            scale = load(scale_ptr, index, row_mask)[:, None]
            bias = load(bias_ptr, index, row_mask)[:, None]
        else:
            index = index_of_parameter(first, tile, channel, channels, WIDE)
            mean, scale = load(mean_ptr, index, mask), load(scale_ptr, index, mask)
            bias = load(bias_ptr, index, mask)

    stretches = 1
    if SEVERAL:
        stretches = (T + STRETCH - 1) // STRETCH
    if SEVERAL and x_ptr is not None:
        v, r, up, kept = start, first_signal, first, first
        for _ in range(stretches - 1):
            for _i in tl.static_range(STRETCH):
                x = current(x_ptr, up, tile, mask, mean, scale, bias, NORMED)
                h = charge(x, v, r, a, theta, rest, NEURON)
                octets = octets_of(bits_ptr, up, rows, tile, row_mask, mask, WHOLE)
                r = spikes_in(octets, WHOLE, COLUMNS)
                v = reset(h, r, zero, theta, f, v_reset, NEURON)
                up += N
            store(states_ptr + kept, tile, v, mask)
            kept += N
        tl.debug_barrier()  # a thread may read below what another one of its block wrote

    grad = zero
    if grad_last_ptr is not None:
        grad = load(grad_last_ptr + first, tile, mask)
    of_decay, of_threshold, of_factor = zero, zero, zero
    for done in range(stretches):
        stretch = stretches - 1 - done
        begin = stretch * STRETCH
        bottom = first + tl.cast(begin, tl.int64) * N
        v_bottom, r_bottom = start, first_signal
        if SEVERAL:
            above_start = stretch > 0  # if not, the rows of this stretch are read for nothing
            below = tl.where(above_start, bottom - N, bottom)
            octets = octets_of(bits_ptr, below, rows, tile, row_mask, mask, WHOLE)
            r = spikes_in(octets, WHOLE, COLUMNS)
            if x_ptr is not None:
                kept = first + tl.cast(tl.where(above_start, stretch - 1, 0), tl.int64) * N
                v = load(states_ptr + kept, tile, mask)
            else:
                v = reset(load(h_ptr + below, tile, mask), r, zero, theta, f, v_reset, NEURON)
            v_bottom = tl.where(above_start, v, start)
            r_bottom = tl.where(above_start, r, first_signal)

        potentials, fired = (), 0
        v, r, at = v_bottom, r_bottom, bottom
        for i in tl.static_range(STRETCH):
            there, row_there = mask, row_mask
            if SEVERAL:  # the last stretch may be shorter
                there, row_there = mask & (begin + i < T), row_mask & (begin + i < T)
            octets = octets_of(bits_ptr, at, rows, tile, row_there, there, WHOLE)
            if x_ptr is not None:
                x = current(x_ptr, at, tile, there, mean, scale, bias, NORMED)
                h = charge(x, v, r, a, theta, rest, NEURON)
                r = spikes_in(octets, WHOLE, COLUMNS)
                v = reset(h, r, zero, theta, f, v_reset, NEURON)
            else:
                h = load(h_ptr + at, tile, there)
            potentials = potentials + (h,)  # noqa: RUF005, kernels unpack no tuple
            fired = with_step(fired, octets, i, WHOLE, COLUMNS)
            at += N
        if OVERWRITES:
            tl.debug_barrier()  # before a thread writes over what another one may read

        at -= DOWN
        there = mask
        if SEVERAL:
            there = mask & (begin + STRETCH - 1 < T)
        of_spikes = gradient_at(grad_spikes_ptr, at, tile, there, zero)
        of_path = gradient_at(grad_path_ptr, at, tile, there, zero)
        for i in tl.static_range(STRETCH - 1, -1, -1):
            here, there = there, mask
            if SEVERAL:
                there = mask & (begin + i - 1 < T)
            grad_spikes, grad = of_spikes, grad + of_path
            if i > 0:  # under way while this step is computed
                of_spikes = gradient_at(grad_spikes_ptr, at - DOWN, tile, there, zero)
                of_path = gradient_at(grad_path_ptr, at - DOWN, tile, there, zero)
            h, s = potentials[i], spikes_of_step(fired, i, WHOLE, COLUMNS)
            if i == 0:
                v, r = v_bottom, r_bottom
            else:
                r = spikes_of_step(fired, i - 1, WHOLE, COLUMNS)
                v = reset(potentials[i - 1], r, zero, theta, f, v_reset, NEURON)
            z = above(h, theta, NEURON.difference, NEURON)
            grad_h, grad_z = gradient_of_step(
                grad_spikes, grad, h, z, s, theta, f, v_reset, c0, c1, c2, NEURON
            )
            if SEVERAL:
                grad_h, grad_z = tl.where(here, grad_h, 0.0), tl.where(here, grad_z, 0.0)
            grad_x, grad_before = gradient_of_charge(grad_h, r, a, NEURON)
            if SEVERAL:
                grad_before = tl.where(here, grad_before, grad)
            if grad_decay_ptr is not None:
                x = zero
                if NEURON.charge == "decay_input":
                    x = current(x_ptr, at, tile, here, mean, scale, bias, NORMED)
                of_decay += grad_h * decay_of(v, r, x, rest, NEURON)
            if grad_threshold_ptr is not None:
                of_threshold -= grad_z
                if NEURON.reset == "subtract":
                    of_threshold -= grad_h * r
            if grad_factor_ptr is not None:
                of_factor += grad_spikes * s
            store(grad_x_ptr + at, tile, grad_x, here)
            grad = grad_before
            at -= DOWN
    store(grad_start_ptr + first, tile, grad, mask)
    store_totals(
        grad_decay_ptr, grad_threshold_ptr, grad_factor_ptr, of_decay, of_threshold, of_factor,
        first, tile, mask, NEURON,
    )  # fmt: skip


@jit
def pack_kernel(fired_ptr, bits_ptr, N, ROWS: tl.constexpr):
    """Zeros and ones of any dtype [N] to bits."""
    first, rows, tile, mask, _ = tile_of(N, ROWS, 2)
    fired = tl.load(fired_ptr + first + tile, mask=mask, other=0) != 0
    octets = tl.arange(0, ROWS)
    bits = packed(fired, rows, ROWS)
    tl.store(bits_ptr + first // 8 + octets, bits, mask=octets * 8 < N - first)


@jit
def unpack_kernel(bits_ptr, ones_ptr, N, ROWS: tl.constexpr):
    """Bits to zeros and ones of any dtype [N]."""
    first, rows, tile, mask, row_mask = tile_of(N, ROWS, 2)
    ones = unpacked(bits_ptr + first // 8, rows, row_mask)
    tl.store(ones_ptr + first + tile, ones.to(ones_ptr.dtype.element_ty), mask=mask)
