"""What runs on the device, in Triton: planes in the compute layout, decoded in registers.

The layout (:mod:`plyweight.kernels.triton_layout`) gives a lane of a warp, with one load of 16
bytes from each plane, exactly the weights that the matrix unit wants from that lane. So nothing is
exchanged between lanes on the way from the planes to the product:

* *words*, one of each plane, hold the bits of 32 weights: :func:`_fields` transposes them, with
  shifts and masks, into words that hold the whole codes of 32 / FIELD weights each;
* a code is OR-ed into the mantissa of a half-precision number, two at a time, one in each half of
  the word (:func:`_pair`): ``1024 + code * 2**place`` without a conversion. A subtraction leaves
  the level, exact in float16 and bfloat16, and its scale is applied to the sum;
* :func:`_tile` names the 256 inputs of 16 outputs that a warp now holds as a matrix.

Planes hold *ones' complement* here: a magnitude bit is inverted where the weight is negative, and
the first plane where it is not. A code is then a plain integer ``u``, its level is symmetric about
the middle, and the half cell needs no bit of its own: in units of the narrowest cell,

    level = (u - 2**(b - 1) + 1/2) * 2**(8 - b)     b < 8
    level = u - 128 + (1 where the weight is negative)     b = 8, which has no half cell

Widths of 3 and of 5 to 7 bits are computed as 4 and 8 with planes of zeros, which the compiler
folds away. ``tests/kernels/test_triton.py`` runs all of this in Triton's interpreter.
"""

import triton
import triton.language as tl

INPUTS = tl.constexpr(256)  # of a block
OUTPUTS = tl.constexpr(16)  # of a block
WORDS = tl.constexpr(128)  # of a block in each plane

# "Fields" are the bits of one weight in a word.


@triton.jit
def _weave(high, low, size: tl.constexpr, mask: tl.constexpr):
    """Fields of ``size`` bits of two words, side by side: the even ones, the odd ones."""
    even = (low & mask) | ((high << size) & ~mask)
    odd = ((low >> size) & mask) | (high & ~mask)
    return even, odd


@triton.jit
def _four(a, b, c, d):
    """Bits of four words, the most significant first, to fields of 4; field f of word i is
    weight 4 f + i.
    """
    ab0, ab1 = _weave(a, b, 1, 0x55555555)
    cd0, cd1 = _weave(c, d, 1, 0x55555555)
    f0, f2 = _weave(ab0, cd0, 2, 0x33333333)
    f1, f3 = _weave(ab1, cd1, 2, 0x33333333)
    return f0, f1, f2, f3


@triton.jit
def _fields(planes, BITS: tl.constexpr):
    """Words of BITS planes to as many words as a field has bits, field f of word i being that of
    weight ``len * f + i``; a field is 1, 2, 4 or 8 bits, the code at its top.
    """
    if BITS == 1:
        fields = planes
    elif BITS == 2:
        fields = _weave(planes[0], planes[1], 1, 0x55555555)
    elif BITS == 3:
        fields = _four(planes[0], planes[1], planes[2], tl.zeros_like(planes[0]))
    elif BITS == 4:
        fields = _four(planes[0], planes[1], planes[2], planes[3])
    else:
        zero = tl.zeros_like(planes[0])
        h0, h1, h2, h3 = _four(planes[0], planes[1], planes[2], planes[3])
        l0, l1, l2, l3 = _four(
            planes[4],
            planes[5] if BITS > 5 else zero,
            planes[6] if BITS > 6 else zero,
            planes[7] if BITS > 7 else zero,
        )
        f0, f4 = _weave(h0, l0, 4, 0x0F0F0F0F)
        f1, f5 = _weave(h1, l1, 4, 0x0F0F0F0F)
        f2, f6 = _weave(h2, l2, 4, 0x0F0F0F0F)
        f3, f7 = _weave(h3, l3, 4, 0x0F0F0F0F)
        fields = (f0, f1, f2, f3, f4, f5, f6, f7)
    return fields


@triton.jit
def _negative_up(word):
    """8-bit fields plus one where the weight is negative; no field overflows, for it is < 128."""
    return word + ((~word >> 7) & 0x01010101)


@triton.jit
def _halves(word, exponent, PLACE: tl.constexpr, FIELD: tl.constexpr, BITS: tl.constexpr,
            BFLOAT: tl.constexpr, EMULATED: tl.constexpr):  # fmt: skip
    """The levels, in units of the field's lowest bit, of the two fields that stand ``PLACE`` bits
    above the bottom of either half of ``word``.
    """
    mask: tl.constexpr = (((1 << FIELD) - 1) << PLACE) * 0x10001
    bits = (word & mask) | exponent
    if not BFLOAT:
        low = bits.to(tl.int16).to(tl.float16, bitcast=True)
        high = (bits >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    elif EMULATED:  # the interpreter has no bfloat16; it is the upper half of a float32
        low = (bits << 16).to(tl.float32, bitcast=True)
        high = ((bits >> 16) << 16).to(tl.float32, bitcast=True)
    else:
        low = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
        high = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    one: tl.constexpr = 128.0 if BFLOAT else 1024.0  # what the exponent says
    half_cell: tl.constexpr = 0.0 if BITS == 8 else 2.0 ** (FIELD - BITS - 1)
    middle: tl.constexpr = one * 2.0**-PLACE + 2.0 ** (FIELD - 1) - half_cell
    if PLACE == 0:
        return low - middle, high - middle
    return low * 2.0**-PLACE - middle, high * 2.0**-PLACE - middle


@triton.jit
def _pair(word, exponent, INDEX: tl.constexpr, FIELD: tl.constexpr, BITS: tl.constexpr,
          BFLOAT: tl.constexpr, EMULATED: tl.constexpr):  # fmt: skip
    """The levels of field INDEX in either half of ``word``, as ``(…, 2)``."""
    # Where a code fills its field, the half cell is half a unit: the field stands one bit higher,
    # or the constant that is subtracted would need a bit that a half-precision number lacks.
    up: tl.constexpr = 1 if BITS == FIELD and BITS < 8 else 0
    # Fields that fit the mantissa need no shift of their own: 10 bits in float16, 7 in bfloat16.
    step: tl.constexpr = 4 if BFLOAT else 8
    shift: tl.constexpr = INDEX * FIELD // step * step - up
    place: tl.constexpr = INDEX * FIELD % step + up
    if shift < 0:
        low, high = _halves(word << 1, exponent, place, FIELD, BITS, BFLOAT, EMULATED)
    else:
        low, high = _halves(word >> shift, exponent, place, FIELD, BITS, BFLOAT, EMULATED)
    return tl.join(low, high)


@triton.jit
def _tile(planes, exponent, FIRST: tl.constexpr, COUNT: tl.constexpr, PARTS: tl.constexpr,
          OUT: tl.constexpr, BITS: tl.constexpr, WIDE: tl.constexpr, BFLOAT: tl.constexpr,
          EMULATED: tl.constexpr):  # fmt: skip
    """The levels of blocks of weights, in units of a field's lowest bit.

    Args:
        planes: BITS tuples' words, int32 ``(blocks, 64 * PARTS)``.
        exponent: of :func:`_halves`.
        FIRST, COUNT: of every 16 pairs of weights in a word, those that are wanted.
        PARTS: 2 where a block's words are all there, 1 where it is one half of its inputs.
        OUT: blocks are ``(…, OUT / 16)``.
        WIDE: which of two orders of a lane's weights the compiler's matrix unit takes.

    Returns:
        float16, or bfloat16, ``(blocks * 16 / OUT, OUT, inputs)``.
    """
    FIELD: tl.constexpr = BITS if BITS < 3 else (4 if BITS < 5 else 8)
    # Beyond 7 bits of mantissa a bfloat16 is made from a float16.
    SHORT: tl.constexpr = BFLOAT and FIELD < 8
    words = _fields(planes, BITS)
    if BITS == 8:
        w0, w1, w2, w3, w4, w5, w6, w7 = words
        words = (_negative_up(w0), _negative_up(w1), _negative_up(w2), _negative_up(w3))
        words += (_negative_up(w4), _negative_up(w5), _negative_up(w6), _negative_up(w7))
    one = ()
    for i in tl.static_range(COUNT):
        one = one + (
            _pair(words[(FIRST + i) % FIELD], exponent, (FIRST + i) // FIELD, FIELD, BITS, SHORT,
                  EMULATED),
        )  # fmt: skip
    two = ()
    for i in tl.static_range(COUNT // 2):
        two = two + (tl.join(one[2 * i], one[2 * i + 1]),)
    four = ()
    for i in tl.static_range(COUNT // 4):
        four = four + (tl.join(two[2 * i], two[2 * i + 1]),)
    blocks: tl.constexpr = planes[0].shape[0]
    # Axes: blocks, 8 outputs, 4 lanes, 2 outputs, parts, half of a word, and then, one by one and
    # the lowest first, the bits that number the pairs of a word.
    if COUNT == 4:
        v = tl.reshape(four[0], (blocks, 8, 4, 2, PARTS, 2, 2, 2))
        if WIDE:
            v = tl.permute(v, (0, 3, 1, 4, 7, 2, 6, 5))
        else:
            v = tl.permute(v, (0, 3, 1, 4, 7, 6, 2, 5))
    elif COUNT == 8:
        v = tl.join(four[0], four[1])
        v = tl.reshape(v, (blocks, 8, 4, 2, PARTS, 2, 2, 2, 2))
        if WIDE:
            v = tl.permute(v, (0, 3, 1, 4, 8, 7, 2, 6, 5))
        else:
            v = tl.permute(v, (0, 3, 1, 4, 8, 7, 6, 2, 5))
    else:
        v = tl.join(tl.join(four[0], four[1]), tl.join(four[2], four[3]))
        v = tl.reshape(v, (blocks, 8, 4, 2, PARTS, 2, 2, 2, 2, 2))
        if WIDE:
            v = tl.permute(v, (0, 3, 1, 4, 9, 8, 7, 2, 6, 5))
        else:
            v = tl.permute(v, (0, 3, 1, 4, 9, 8, 7, 6, 2, 5))
    return tl.reshape(v, (blocks * OUTPUTS // OUT, OUT, PARTS * COUNT * 8))


@triton.jit
def _words(p0, p1, p2, p3, p4, p5, p6, p7, at, mask, BITS: tl.constexpr):
    """The words of BITS planes at the offsets ``at``."""
    words = (tl.load(p0 + at, mask, other=0),)
    if BITS > 1:
        words = words + (tl.load(p1 + at, mask, other=0),)
    if BITS > 2:
        words = words + (tl.load(p2 + at, mask, other=0),)
    if BITS > 3:
        words = words + (tl.load(p3 + at, mask, other=0),)
    if BITS > 4:
        words = words + (tl.load(p4 + at, mask, other=0),)
    if BITS > 5:
        words = words + (tl.load(p5 + at, mask, other=0),)
    if BITS > 6:
        words = words + (tl.load(p6 + at, mask, other=0),)
    if BITS > 7:
        words = words + (tl.load(p7 + at, mask, other=0),)
    return words


@triton.jit
def _parts(words, BITS: tl.constexpr):
    """Words of whole blocks to those of the first and of the second half of their inputs."""
    first = ()
    second = ()
    for i in tl.static_range(BITS):
        a, b = tl.split(tl.reshape(words[i], (words[i].shape[0], WORDS // 2, 2)))
        first = first + (a,)
        second = second + (b,)
    return first, second


@triton.jit
def _add_product(sums, levels, x, EMULATED: tl.constexpr):
    """``sums + levels @ x``, with sums in float32 of products that are exact."""
    if x.dtype == tl.float32:  # is the sum of three bfloat16, so it takes three products
        high = x.to(tl.bfloat16)
        rest = x - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        sums = _add_short_product(sums, levels, low, EMULATED)
        sums = _add_short_product(sums, levels, middle, EMULATED)
        sums = _add_short_product(sums, levels, high, EMULATED)
    else:
        sums = _add_short_product(sums, levels, x, EMULATED)
    return sums


@triton.jit
def _add_short_product(sums, levels, x, EMULATED: tl.constexpr):
    if EMULATED:  # the interpreter would multiply the bits of a bfloat16
        return tl.dot(levels.to(tl.float32), x.to(tl.float32), sums)
    # By way of float32: the direct conversion of a float16 to a bfloat16 is a slow instruction.
    exact = levels if levels.dtype == x.dtype else levels.to(tl.float32).to(x.dtype)
    return tl.dot(exact, x, sums)


@triton.jit
def product_of_few(
    x, y, scale, p0, p1, p2, p3, p4, p5, p6, p7,
    rows, num_outputs, num_inputs, num_groups, row_blocks, blocks, exponent, unit,
    BITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr,
    WIDE: tl.constexpr, BFLOAT: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """``y = x @ weight.T`` for a few rows of activations: a program computes 16 outputs, and each
    of its warps the share of every WARPS-th block of inputs.

    Args:
        x: ``(rows, num_inputs)``.
        y: ``(rows, num_outputs)``, of x's dtype.
        scale: float32 ``(num_outputs, num_groups)``.
        p0, …, p7: int32 ``(row_blocks, blocks, WORDS)``; the first BITS are read.
        exponent: of :func:`_halves`. It is an argument and not a constant because the compiler
            has one instruction for ``word & constant | register``, and two for two constants.
        unit: the level of a field's lowest bit, ``2**(8 - field)``.
        GROUP: inputs that share a scale, 32, 64 or 128; INPUTS where all do.
        ROWS: of activations that fit, a power of two.
    """
    row_block = tl.program_id(0)
    warp = tl.arange(0, WARPS)
    word = tl.arange(0, WORDS)
    row = tl.arange(0, ROWS)
    output = row_block * OUTPUTS + tl.arange(0, OUTPUTS)
    k = tl.arange(0, GROUP)
    x += row[None, None, :] * num_inputs + k[None, :, None]
    is_row = (row < rows)[None, None, :]
    sums = tl.zeros((WARPS, OUTPUTS, ROWS), tl.float32)
    for first in range(0, blocks, WARPS):
        block = first + warp
        at = (row_block * blocks + block)[:, None] * WORDS + word[None, :]
        words = _words(p0, p1, p2, p3, p4, p5, p6, p7, at, (block < blocks)[:, None], BITS)
        start = block[:, None, None] * INPUTS
        if GROUP == INPUTS:
            is_input = start + k[None, :, None] < num_inputs
            levels = _tile(words, exponent, 0, 16, 2, OUTPUTS, BITS, WIDE, BFLOAT, EMULATED)
            part = tl.load(x + start, is_input & is_row, other=0.0)
            sums = _add_product(sums, levels, part, EMULATED)
        else:
            halves = _parts(words, BITS)
            for half in tl.static_range(2):
                for i in tl.static_range(128 // GROUP):
                    offset = half * 128 + i * GROUP
                    is_input = start + offset + k[None, :, None] < num_inputs
                    part = tl.load(x + (start + offset), is_input & is_row, other=0.0)
                    levels = _tile(halves[half], exponent, i * GROUP // 8, GROUP // 8, 1, OUTPUTS,
                                   BITS, WIDE, BFLOAT, EMULATED)  # fmt: skip
                    of_group = tl.zeros((WARPS, OUTPUTS, ROWS), tl.float32)
                    of_group = _add_product(of_group, levels, part, EMULATED)
                    group = block * (INPUTS // GROUP) + offset // GROUP
                    factor = tl.load(
                        scale + output[None, :] * num_groups + group[:, None],
                        (output < num_outputs)[None, :] & (group < num_groups)[:, None],
                        other=0.0,
                    )
                    sums += of_group * factor[:, :, None]
    total = tl.sum(sums, axis=0) * unit
    if GROUP == INPUTS:
        total *= tl.load(scale + output, output < num_outputs, other=0.0)[:, None]
    tl.store(
        y + row[None, :] * num_outputs + output[:, None],
        total.to(y.dtype.element_ty),
        (row < rows)[None, :] & (output < num_outputs)[:, None],
    )


@triton.jit
def product_of_many(
    x, y, scale, p0, p1, p2, p3, p4, p5, p6, p7,
    rows, num_outputs, num_inputs, num_groups, row_blocks, blocks, exponent, unit,
    BITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr,
    WIDE: tl.constexpr, TILE_WIDE: tl.constexpr, BFLOAT: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """The same for more rows: each of a program's WARPS computes 16 outputs of its own, so that
    activations are read once for all of them; ``num_programs(1)`` programs share the inputs.

    Args:
        y: ``(num_programs(1), rows, num_outputs)``: x's dtype if that is one, else float32 sums
            that :func:`sum_of_parts` adds.
        TILE_WIDE: the order that the matrix unit takes, where it is not the layout's.
    """
    OUT: tl.constexpr = OUTPUTS * WARPS
    row_block = tl.program_id(0) * WARPS + tl.arange(0, WARPS)
    word = tl.arange(0, WORDS)
    row = tl.arange(0, ROWS)
    output = tl.program_id(0) * OUT + tl.arange(0, OUT)
    k = tl.arange(0, GROUP)
    if WIDE and not TILE_WIDE:  # levels come as they are, and activations follow
        k = (k & ~15) | (k << 1 & 12) | (k >> 2 & 2) | (k & 1)
    elif TILE_WIDE and not WIDE:
        k = (k & ~15) | (k << 2 & 8) | (k >> 1 & 6) | (k & 1)
    if WIDE != TILE_WIDE:
        k = tl.max_contiguous(tl.multiple_of(k, 2), 2)  # which the compiler does not see
    x += row[None, :] * num_inputs + k[:, None]
    is_row = (row < rows)[None, :]
    is_block = (row_block < row_blocks)[:, None]
    share = tl.cdiv(blocks, tl.num_programs(1))
    begin = tl.program_id(1) * share
    sums = tl.zeros((OUT, ROWS), tl.float32)
    for block in range(begin, tl.minimum(begin + share, blocks)):
        at = (row_block * blocks + block)[:, None] * WORDS + word[None, :]
        words = _words(p0, p1, p2, p3, p4, p5, p6, p7, at, is_block, BITS)
        start = block * INPUTS
        if GROUP == INPUTS:
            is_input = (start + k < num_inputs)[:, None]
            levels = _tile(words, exponent, 0, 16, 2, OUT, BITS, TILE_WIDE, BFLOAT, EMULATED)
            part = tl.load(x + start, is_input & is_row, other=0.0)
            sums = _add_product(sums, tl.reshape(levels, (OUT, INPUTS)), part, EMULATED)
        else:
            halves = _parts(words, BITS)
            for half in tl.static_range(2):
                for i in tl.static_range(128 // GROUP):
                    offset = half * 128 + i * GROUP
                    is_input = (start + offset + k < num_inputs)[:, None]
                    part = tl.load(x + (start + offset), is_input & is_row, other=0.0)
                    levels = _tile(halves[half], exponent, i * GROUP // 8, GROUP // 8, 1, OUT,
                                   BITS, TILE_WIDE, BFLOAT, EMULATED)  # fmt: skip
                    of_group = tl.zeros((OUT, ROWS), tl.float32)
                    levels = tl.reshape(levels, (OUT, GROUP))
                    of_group = _add_product(of_group, levels, part, EMULATED)
                    # A tensor, for the interpreter's comparison of two integers is no mask.
                    group = tl.full((OUT,), offset // GROUP, tl.int32) + block * (INPUTS // GROUP)
                    is_scale = (output < num_outputs) & (group < num_groups)
                    factor = tl.load(scale + output * num_groups + group, is_scale, other=0.0)
                    sums += of_group * factor[:, None]
    total = sums * unit
    if GROUP == INPUTS:
        total *= tl.load(scale + output, output < num_outputs, other=0.0)[:, None]
    y += tl.program_id(1) * rows * num_outputs
    tl.store(
        y + row[None, :] * num_outputs + output[:, None],
        total.to(y.dtype.element_ty),
        (row < rows)[None, :] & (output < num_outputs)[:, None],
    )


@triton.jit
def sum_of_parts(parts, y, size, num_parts, BLOCK: tl.constexpr):
    """``y = parts.sum(0)``, in ascending order: the result does not depend on who was first."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(num_parts):
        total += tl.load(parts + part * size + i, i < size, other=0.0)
    tl.store(y + i, total.to(y.dtype.element_ty), i < size)


@triton.jit
def values_of_blocks(
    y, scale, p0, p1, p2, p3, p4, p5, p6, p7,
    num_outputs, num_inputs, num_groups, blocks, exponent, unit,
    BITS: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """``y = level * scale``, rounded once, for one block of weights: what a packed module decodes.

    Args:
        y: ``(num_outputs, num_inputs)``.
    """
    row_block, block = tl.program_id(0), tl.program_id(1)
    # Offsets into planes fit 32 bits long after offsets into the weight do not.
    at = (row_block * blocks + block) * WORDS + tl.arange(0, WORDS)[None, :]
    words = _words(p0, p1, p2, p3, p4, p5, p6, p7, at, at >= 0, BITS)
    levels = _tile(words, exponent, 0, 16, 2, OUTPUTS, BITS, WIDE, False, EMULATED)
    output = row_block * OUTPUTS + tl.arange(0, OUTPUTS)[:, None]
    k = block * INPUTS + tl.arange(0, INPUTS)[None, :]
    is_weight = (output < num_outputs) & (k < num_inputs)
    if GROUP == INPUTS:
        factor = tl.load(scale + output, output < num_outputs, other=0.0)
    else:
        factor = tl.load(scale + output * num_groups + k // GROUP, is_weight, other=0.0)
    values = tl.reshape(levels, (OUTPUTS, INPUTS)).to(tl.float32) * unit * factor
    to = output.to(tl.int64) * num_inputs + k
    tl.store(y + to, values.to(y.dtype.element_ty), is_weight)
