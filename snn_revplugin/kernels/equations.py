"""What the kernels are made of: tiles of neurons in memory, rounding, and the equations of
:mod:`..neurons` on them, forward and backward.

A kernel processes a flat stretch of N neurons in tiles of [HALVES * ROWS, COLUMNS]. Triton gives a
thread one row of each half, and loads its four neurons (COLUMNS) as a vector of 16 bytes. With two
``HALVES`` row ``i`` of either half is the first or the last four neurons of byte ``i`` of packed
spikes: packing exchanges nothing between threads, through no shared memory and no barrier. With
one, the rows follow each other: for kernels that pack nothing, with half the registers. Two COLUMNS
take a quarter: for kernels that hold many time steps. ``NEURON``, a
:class:`..neurons.kernel_spec.KernelSpec`, says which equations a neuron has: branches on it are
decided when the kernel is compiled.

Arithmetic is in float32, in the host's order of operations; after every operation that torch would
round to a shorter dtype, :func:`rounded` rounds to it. A scalar that meets a shorter dtype is
rounded first, or is not: torch does it if the scalar is added or is the first factor, and on CUDA
if it is a tensor; that is what ``NEURON.on_cuda`` is for. Multiplications and additions must not be
contracted (launch with ``enable_fp_fusion=False``), or a potential next to its threshold would fire
here and not there.

Offsets of a tile are 32 bits from a 64-bit base, so a tensor may have more than 2**31 elements.
Only Triton's builtins are used, no function of its library: the interpreter runs builtins whatever
the environment was when Triton was imported.
"""

import triton.language as tl

from .jit import jit


@jit
def tile_of(N, ROWS: tl.constexpr, HALVES: tl.constexpr, COLUMNS: tl.constexpr = 4):
    """This program's part of N neurons: the first of them, where the rows of its tile start, the
    tile, and the masks of the tile and of its rows."""
    first = tl.program_id(0).to(tl.int64) * (ROWS * HALVES * COLUMNS)
    row = tl.arange(0, HALVES * ROWS)
    rows = row % ROWS * (HALVES * COLUMNS) + row // ROWS * COLUMNS
    tile = rows[:, None] + tl.arange(0, COLUMNS)[None, :]
    return first, rows, tile, tile < N - first, rows < N - first


@jit
def rounded(value, DTYPE: tl.constexpr):
    """A float32 as ``DTYPE`` would hold it, to nearest even."""
    if tl.bfloat16 == DTYPE:  # by hand: Triton's interpreter cuts off where the hardware rounds
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(DTYPE).to(tl.float32)


@jit
def load(pointer, tile, mask):
    return tl.load(pointer + tile, mask=mask, other=0.0).to(tl.float32)


@jit
def store(pointer, tile, value, mask):
    DTYPE: tl.constexpr = pointer.dtype.element_ty
    tl.store(pointer + tile, rounded(value, DTYPE).to(DTYPE), mask=mask)


@jit
def number(given):
    """A Python number as a float32: the interpreter would compute with all of its 64 bits."""
    return tl.full((), given, tl.float32)


@jit
def parameter(given, index, mask, IS_NUMBER: tl.constexpr, IS_SCALAR: tl.constexpr):
    """A decay, threshold or factor: a number, one value in memory, or one for each neuron."""
    if IS_NUMBER:
        return number(given)
    elif IS_SCALAR:
        return tl.load(given).to(tl.float32)
    else:
        return tl.load(given + index, mask=mask, other=1.0).to(tl.float32)


@jit
def index_of_parameter(first, tile, inner, size, WIDE: tl.constexpr):
    """The indices of the parameters of a tile's neurons. There are ``size`` parameters; each holds
    for ``inner`` neurons in a row, and after the last comes the first again."""
    neuron = first + tile
    if not WIDE:
        neuron = neuron.to(tl.int32)
    return (neuron // inner) % size


@jit
def parameters(
    decay,
    threshold,
    factor,
    inner,
    size,
    v_reset,
    rest,
    first,
    tile,
    mask,
    NEURON: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Decay, threshold, factor, ``v_reset`` and ``rest`` of a tile's neurons."""
    index = index_of_parameter(first, tile, inner, size, WIDE)
    a = parameter(decay, index, mask, NEURON.decay_held == "number", NEURON.decay_held == "scalar")
    theta = parameter(
        threshold, index, mask, NEURON.threshold_held == "number", NEURON.threshold_held == "scalar"
    )
    f = parameter(
        factor, index, mask, NEURON.factor_held == "number", NEURON.factor_held == "scalar"
    )
    return a, theta, f, number(v_reset), number(rest)


@jit
def packed(fired, rows, ROWS: tl.constexpr):
    """A tile of ones and zeros, of two halves, to bytes, lowest bit first."""
    shifted = fired.to(tl.int32) << (rows % 8)[:, None] + tl.arange(0, 4)[None, :]
    halves = tl.reshape(tl.reduce(shifted, 1, tl.standard._sum_combine), (2, ROWS))
    return tl.reduce(halves, 0, tl.standard._sum_combine).to(tl.uint8)


@jit
def unpacked(pointer, rows, mask):
    """A tile of ones and zeros from bits that start at a whole byte."""
    return spikes_in(octets_of(pointer, 0, rows, rows, mask, mask, True), True)


@jit
def octets_of(pointer, at, rows, tile, row_mask, mask, WHOLE: tl.constexpr):
    """The spikes of the tile that starts at bit ``at``, in as few registers as may be: for each row
    where ``WHOLE`` (``at`` is a multiple of 8), else for each neuron."""
    if WHOLE:
        octets = tl.load(pointer + at // 8 + rows // 8, mask=row_mask, other=0)
        return octets.to(tl.int32) >> (rows % 8).to(tl.int32)
    else:
        bit = at + tile
        octets = tl.load(pointer + bit // 8, mask=mask, other=0).to(tl.int32)
        return (octets >> (bit % 8).to(tl.int32)) & 1


@jit
def spikes_in(octets, WHOLE: tl.constexpr, COLUMNS: tl.constexpr = 4):
    """A tile of ones and zeros, from :func:`octets_of`."""
    if WHOLE:
        octets = (octets[:, None] >> tl.arange(0, COLUMNS)[None, :]) & 1
    return octets.to(tl.float32)


@jit
def with_step(kept, octets, i: tl.constexpr, WHOLE: tl.constexpr, COLUMNS: tl.constexpr):
    """The spikes of steps before ``i`` and, from :func:`octets_of`, of step ``i``, in one register
    of a row where ``WHOLE``, else of a neuron: of as many steps as 32 bits hold."""
    if WHOLE:
        return kept | (octets & ((1 << COLUMNS) - 1)) << (i * COLUMNS)
    else:
        return kept | octets << i


@jit
def spikes_of_step(kept, i: tl.constexpr, WHOLE: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of ones and zeros, from :func:`with_step`."""
    if WHOLE:
        return spikes_in(kept >> (i * COLUMNS), True, COLUMNS)
    else:
        return ((kept >> i) & 1).to(tl.float32)


@jit
def store_total(pointer, first, tile, mask, value, EACH: tl.constexpr):
    """A parameter's gradient: of each neuron, or summed over the block."""
    if EACH:
        tl.store(pointer + first + tile, value, mask=mask)
    else:
        rows = tl.reduce(tl.where(mask, value, 0.0), 1, tl.standard._sum_combine)
        tl.store(pointer + tl.program_id(0), tl.reduce(rows, 0, tl.standard._sum_combine))


# ------------------------------------------------------------ equations


@jit
def above(h, threshold, DTYPE: tl.constexpr, NEURON: tl.constexpr):
    """``h - threshold`` in ``DTYPE``; it rounds to zero only if the two are equal."""
    if NEURON.threshold_held != "number" or not NEURON.on_cuda:
        threshold = rounded(threshold, DTYPE)
    return rounded(h - threshold, DTYPE)


@jit
def fires(z, NEURON: tl.constexpr):
    if NEURON.strict:
        return (z > 0).to(tl.float32)
    else:
        return (z >= 0).to(tl.float32)


@jit
def leak(difference, rate, NEURON: tl.constexpr):
    if NEURON.divides:  # rate is tau, and the host divides by it
        return rounded(tl.div_rn(difference, rate), NEURON.charged)
    else:
        return rounded(difference * rate, NEURON.charged)


@jit
def clamped(beta):
    beta = tl.where(beta < 0, 0.0, beta)
    return tl.where(beta > 1, 1.0, beta)


@jit
def charge(x, v, r, decay, threshold, rest, NEURON: tl.constexpr):
    if NEURON.charge == "leaky":
        beta = rounded(clamped(decay), NEURON.decayed)
        if NEURON.reset == "zero":
            v = rounded((1 - r) * v, NEURON.left)
        h = rounded(rounded(beta * v, NEURON.decayed) + x, NEURON.summed)
        if NEURON.reset == "subtract":
            h = rounded(h - rounded(r * threshold, NEURON.due), NEURON.charged)
    elif NEURON.charge == "integrate":
        h = rounded(v + x, NEURON.charged)
    else:
        over = v
        if NEURON.rests:
            if not NEURON.on_cuda:
                rest = rounded(rest, NEURON.charged)
            over = rounded(v - rest, NEURON.charged)
        if NEURON.charge == "decay_input":
            h = rounded(v + leak(rounded(x - over, NEURON.charged), decay, NEURON), NEURON.charged)
        else:
            h = rounded(rounded(v - leak(over, decay, NEURON), NEURON.charged) + x, NEURON.charged)
    return h


@jit
def still_due(s, r, factor, NEURON: tl.constexpr):
    """What snnTorch's immediate reset has left to do: the spikes, less those that the charge has
    reset already."""
    if NEURON.graded:
        if NEURON.on_cuda:
            factor = rounded(factor, NEURON.spikes)
        given = rounded(s * factor, NEURON.spikes)
        s = rounded(tl.div_rn(given, factor), NEURON.spikes)
    return s - r


@jit
def reset(h, s, r, threshold, factor, v_reset, NEURON: tl.constexpr):
    if NEURON.delayed or NEURON.reset == "none":
        return h
    elif NEURON.reset == "soft":
        return rounded(h - rounded(s * threshold, NEURON.charged), NEURON.charged)
    elif NEURON.reset == "hard":
        if NEURON.charge == "coupled":
            kept = h - h * s  # an infinite potential becomes NaN, as by torch's addcmul
        else:
            kept = rounded((1 - s) * h, NEURON.charged)
        if not NEURON.to_zero:
            kept = rounded(kept + rounded(s * v_reset, NEURON.charged), NEURON.charged)
        return kept
    elif NEURON.reset == "subtract":
        return rounded(
            h - rounded(still_due(s, r, factor, NEURON) * threshold, NEURON.product), NEURON.after
        )
    else:
        return rounded(
            h - rounded(still_due(s, r, factor, NEURON) * h, NEURON.product), NEURON.after
        )


@jit
def invert_charge(h, x, r, decay, threshold, NEURON: tl.constexpr):
    """The potential before the charge, of the neurons whose reset can be inverted."""
    if NEURON.charge == "leaky":
        v = h - x
        if NEURON.reset == "subtract":
            v = v + r * threshold
        return tl.div_rn(v, clamped(decay))
    elif NEURON.charge == "integrate":
        return h - x
    else:
        if NEURON.divides:
            kept = 1 - tl.div_rn(1.0, decay)
        else:
            kept = 1 - decay
        if NEURON.charge == "decay_input":
            return tl.div_rn(h - leak(x, decay, NEURON), kept)
        else:
            return tl.div_rn(h - x, kept)


@jit
def surrogate_gradient(grad, z, c0, c1, c2, NEURON: tl.constexpr):
    """The derivatives of :data:`..neurons.surrogate.GRADIENTS`, with the constants of
    :data:`.surrogate_constants.SURROGATES`."""
    # A constant of this function: Triton 3.6 passes no string from kernel to kernel.
    NAME: tl.constexpr = NEURON.surrogate
    if NAME == "atan":
        y = z * c0
        return grad / (y * y + c1)
    elif NAME == "straight_through":
        return grad
    elif NAME == "fast_sigmoid":
        y = tl.abs(z) * c0 + 1
        return grad / (y * y)
    elif NAME == "triangular":
        return grad * tl.where(z >= 0, -c0, c0)
    elif NAME == "heaviside":
        return grad * (z > 0).to(tl.float32)
    elif NAME == "sigmoid_of_exp":
        e = tl.exp(-c0 * z)
        return grad * c0 * e / ((e + 1) * (e + 1))
    elif NAME == "spike_rate_escape":
        return grad * c1 * tl.exp(-c0 * tl.abs(z - 1))
    elif NAME == "sparse_fast_sigmoid":
        y = tl.abs(z) * c0 + 1
        return grad * (z > c1).to(tl.float32) / (y * y)
    elif NAME == "piecewise_quadratic":
        return tl.where(tl.abs(z) > c2, 0.0, (c0 - c1 * tl.abs(z)) * grad)
    elif NAME == "piecewise_exp":
        return tl.exp(-c0 * tl.abs(z)) * c1 * grad
    elif NAME == "sigmoid":
        s = 1 / (1 + tl.exp(-c0 * z))
        return (1 - s) * s * c0 * grad
    elif NAME == "soft_sign":
        y = tl.abs(z) + c0
        return grad / (y * y * c1)
    elif NAME == "super_spike":
        y = tl.abs(z) + 1
        return c0 * grad / (y * y)
    elif NAME == "nonzero_sign_log_abs":
        return grad / (tl.abs(z) + c0)
    elif NAME == "erf":
        y = z * c0
        return tl.exp(-(y * y)) * c1 * grad
    elif NAME == "piecewise_leaky_relu":
        return grad * tl.where(tl.abs(z) < c0, c1, c2)
    elif NAME == "s2nn":
        s = 1 / (1 + tl.exp(-c0 * z))
        return grad * tl.where(z < 0, c0 * s * (1 - s), c1 / (z + 1))
    elif NAME == "q_pseudo_spike":
        return grad * tl.exp(-c1 * tl.log(tl.abs(z) * c0 + 1))
    elif NAME == "leaky_k_relu":
        return grad * tl.where(z >= 0, c1, c0)
    elif NAME == "fake_numerical_gradient":
        slope = tl.where(z >= 0, 1.0, -1.0) / z
        return grad * tl.where(slope > c0, c0, slope)
    elif NAME == "log_tailed_relu":
        return grad * tl.where(z > 1, 1 / z, tl.where(z <= 0, c0, 1.0))
    elif NAME == "rect":
        return grad * (tl.abs(z) < c1).to(tl.float32) * c0
    else:
        tl.static_assert(False, "the surrogate has no kernel")


@jit
def gradient_of_fire(grad_spikes, z, factor, c0, c1, c2, NEURON: tl.constexpr):
    if NEURON.graded:
        grad_spikes = grad_spikes * factor
    return surrogate_gradient(grad_spikes, z, c0, c1, c2, NEURON)


@jit
def gradient_of_step(
    grad_spikes, grad_v, h, z, s, threshold, factor, v_reset, c0, c1, c2, NEURON: tl.constexpr
):
    """Fire, and a reset that reads no signal of the step before: the gradient at ``h``, and the
    part of it that comes through the spikes."""
    grad_h = grad_v
    if NEURON.reset == "soft":
        if not NEURON.detached:
            grad_spikes = grad_spikes - grad_v * threshold
    elif NEURON.reset == "hard":
        if not NEURON.detached:
            grad_spikes = grad_spikes + grad_v * (v_reset - h)
        grad_h = (1 - s) * grad_v
    grad_z = gradient_of_fire(grad_spikes, z, factor, c0, c1, c2, NEURON)
    return grad_z + grad_h, grad_z


@jit
def gradient_of_charge(grad_h, r, decay, NEURON: tl.constexpr):
    """The gradients at the current and at the potential before."""
    if NEURON.charge == "leaky":
        grad_before = grad_h * clamped(decay)
        if NEURON.reset == "zero":
            grad_before = grad_before * (1 - r)
        return grad_h, grad_before
    elif NEURON.charge == "integrate":
        return grad_h, grad_h
    else:
        rate = decay
        if NEURON.divides:
            rate = 1 / decay  # once: a product is as good as a quotient, but for its last bit
        leaked = grad_h * rate
        if NEURON.charge == "decay_input":
            return leaked, grad_h - leaked
        else:
            return grad_h, grad_h - leaked


@jit
def decay_of(v, r, x, rest, NEURON: tl.constexpr):
    """The derivative of ``h`` by the decay; of a leak, by its rate."""
    if NEURON.charge == "leaky":
        if NEURON.reset == "zero":
            v = (1 - r) * v
        return v
    elif NEURON.charge == "decay":
        return rest - v
    else:
        return x - (v - rest)
