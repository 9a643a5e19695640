"""Instructions that the DSL has no name for, and small functions of a warp."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64, Uint32
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

TYPES = {
    torch.bfloat16: cutlass.BFloat16,
    torch.float16: cutlass.Float16,
    torch.int8: cutlass.Int8,
    torch.float8_e4m3fn: cutlass.Float8E4M3FN,
}
_PTX_NAMES = {torch.bfloat16: "bf16", torch.float16: "f16"}
_PAIR_OF_ONES = {torch.bfloat16: 0x3F803F80, torch.float16: 0x3C003C00}


def _assembly(result, operands, text, constraints, *, side_effects=False):
    return llvm.inline_asm(
        result, operands, text, constraints, has_side_effects=side_effects, is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )  # fmt: skip


@dsl_user_op
def pack_bf16(low, high, *, loc=None, ip=None):
    """Two float32 as bf16 in one register."""
    operands = [Float32(x).ir_value(loc=loc, ip=ip) for x in (low, high)]
    return Int32(_assembly(T.i32(), operands, "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f"))


@dsl_user_op
def pack_fp16(low, high, *, loc=None, ip=None):
    """Two float32 as fp16 in one register."""
    operands = [Float32(x).ir_value(loc=loc, ip=ip) for x in (low, high)]
    return Int32(_assembly(T.i32(), operands, "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f"))


@dsl_user_op
def pack_e4m3(a, b, c, d, *, loc=None, ip=None):
    """Four float32 as e4m3 in one register, the first lowest; beyond 448 it is 448, NaN stays."""
    operands = [Float32(x).ir_value(loc=loc, ip=ip) for x in (a, b, c, d)]
    rounds = "".join(f"cvt.rn.satfinite.e4m3x2.f32 h{i}, ${2 * i + 2}, ${2 * i + 1}; " for i in range(2))
    text = f"{{ .reg .b16 h0, h1; {rounds}mov.b32 $0, {{h0, h1}}; }}"
    return Int32(_assembly(T.i32(), operands, text, "=r,f,f,f,f"))


# float32 to a register, in the order of the arguments, the first lowest.
PACKS = {torch.bfloat16: pack_bf16, torch.float16: pack_fp16, torch.float8_e4m3fn: pack_e4m3}


@dsl_user_op
def multiply_add(a, b, c, *, loc=None, ip=None):
    """a * b + c, the low 32 bits, in one instruction: the compiler would take a factor out of a sum of products."""
    operands = [Int32(x).ir_value(loc=loc, ip=ip) for x in (a, b, c)]
    return Int32(_assembly(T.i32(), operands, "mad.lo.s32 $0, $1, $2, $3;", "=r,r,r,r"))


@dsl_user_op
def add_pairs(a, b, dtype, *, loc=None, ip=None):
    """Sums of two pairs of bf16 or fp16, in one rounding: before Hopper there is an addition only with a product."""
    kind = f"{_PTX_NAMES[dtype]}x2"
    operands = [Int32(x).ir_value(loc=loc, ip=ip) for x in (a, _PAIR_OF_ONES[dtype], b)]
    return Int32(_assembly(T.i32(), operands, f"fma.rn.{kind} $0, $1, $2, $3;", "=r,r,r,r"))


@dsl_user_op
def sum_of_pair(pair, dtype, *, loc=None, ip=None):
    """Sum of two bf16 or fp16, in float32."""
    kind = _PTX_NAMES[dtype]
    text = f"{{ .reg .b16 l, h; .reg .f32 a, b; mov.b32 {{l, h}}, $1; cvt.f32.{kind} a, l; cvt.f32.{kind} b, h; "
    operand = Int32(pair).ir_value(loc=loc, ip=ip)
    return Float32(_assembly(T.f32(), [operand], text + "add.f32 $0, a, b; }", "=f,r"))


def sum_of_pairs(pairs, dtype):
    """Sum of pairs of bf16 or fp16: of the pairs as they are, by twos, so that few roundings meet; then in float32."""
    while len(pairs) > 1:
        odd = pairs[-1:] if len(pairs) % 2 else []
        pairs = [add_pairs(a, b, dtype) for a, b in zip(pairs[::2], pairs[1::2], strict=False)] + odd
    return sum_of_pair(pairs[0], dtype)


@dsl_user_op
def to_int(x, *, loc=None, ip=None):
    """The nearest integer; beyond int32 the last one there, 0 for NaN."""
    return Int32(_assembly(T.i32(), [Float32(x).ir_value(loc=loc, ip=ip)], "cvt.rni.s32.f32 $0, $1;", "=r,f"))


@dsl_user_op
def to_int_below(x, *, loc=None, ip=None):
    """The largest integer that is not larger; beyond int32 the last one there, 0 for NaN."""
    return Int32(_assembly(T.i32(), [Float32(x).ir_value(loc=loc, ip=ip)], "cvt.rmi.s32.f32 $0, $1;", "=r,f"))


@dsl_user_op
def to_clamped_uint(x, most: float, *, loc=None, ip=None):
    """The nearest integer, from 0 to `most`, which NaN becomes too."""
    operands = [Float32(x).ir_value(loc=loc, ip=ip) for x in (x, most)]
    text = "{ .reg .f32 a; min.f32 a, $1, $2; cvt.rni.u32.f32 $0, a; }"
    return Int32(_assembly(T.i32(), operands, text, "=r,f,f"))


@dsl_user_op
def add_to_global(address, value, *, loc=None, ip=None):
    """Add to an integer in global memory, unless it is 0 that is added."""
    operands = [Int64(address).ir_value(loc=loc, ip=ip), Int32(value).ir_value(loc=loc, ip=ip)]
    text = "{ .reg .pred p; setp.ne.s32 p, $1, 0; @p red.relaxed.gpu.global.add.u32 [$0], $1; }"
    llvm.inline_asm(
        None, operands, text, "l,r", has_side_effects=True, is_align_stack=False, asm_dialect=llvm.AsmDialect.AD_ATT
    )


@dsl_user_op
def prefetch_to_l2(address, *, loc=None, ip=None):
    """Bring 32 bytes of global memory to the L2 cache."""
    operand = Int64(address).ir_value(loc=loc, ip=ip)
    llvm.inline_asm(
        None, [operand], "prefetch.global.L2 [$0];", "l", has_side_effects=True, is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )  # fmt: skip


@dsl_user_op
def unpack_bf16(pair, *, loc=None, ip=None):
    """The two bf16 of a register in float32, the lower first."""
    bits = Int32(pair)
    return as_float(bits << 16), as_float(bits & Int32(-65536))


@dsl_user_op
def unpack_fp16(pair, *, loc=None, ip=None):
    """The two fp16 of a register in float32, the lower first."""
    operand = Int32(pair).ir_value(loc=loc, ip=ip)
    texts = (f"{{ .reg .b16 l, h; mov.b32 {{l, h}}, $1; cvt.f32.f16 $0, {half}; }}" for half in "lh")
    return tuple(Float32(_assembly(T.f32(), [operand], text, "=f,r")) for text in texts)


@dsl_user_op
def unpack_e4m3(four, *, loc=None, ip=None):
    """The four e4m3 of a register in float32, the lowest first."""
    operand = Int32(four).ir_value(loc=loc, ip=ip)
    text = "{{ .reg .b16 l, h; mov.b32 {{l, h}}, $1; cvt.rn.f16x2.e4m3x2 $0, {half}; }}"
    pairs = [_assembly(T.i32(), [operand], text.format(half=half), "=r,r") for half in "lh"]
    return (*unpack_fp16(Int32(pairs[0])), *unpack_fp16(Int32(pairs[1])))


# A register to float32, the lowest first.
UNPACKS = {torch.bfloat16: unpack_bf16, torch.float16: unpack_fp16, torch.float8_e4m3fn: unpack_e4m3}


@dsl_user_op
def pack_e4m3_by_integers(a, b, c, d, *, loc=None, ip=None):
    """As `pack_e4m3`, where there is no instruction for it: at 2^-120 of a value, its bits in float32 are those in
    e4m3 and 20 more, denormal ones too."""
    operands = [Float32(x).ir_value(loc=loc, ip=ip) for x in (a, b, c, d)]
    rounds = "".join(
        f"abs.f32 x, ${i + 1}; min.NaN.f32 x, x, 0f43E00000; mul.rn.f32 x, x, 0f03800000; mov.b32 n, x; "
        "bfe.u32 s, n, 20, 1; add.u32 n, n, s; add.u32 n, n, 0x7FFFF; shr.u32 n, n, 20; min.u32 n, n, 127; "
        f"mov.b32 s, ${i + 1}; shr.u32 s, s, 24; and.b32 s, s, 128; or.b32 n, n, s; "
        f"shl.b32 n, n, {8 * i}; or.b32 r, r, n; "
        for i in range(4)
    )
    text = f"{{ .reg .f32 x; .reg .b32 n, s, r; mov.b32 r, 0; {rounds} mov.b32 $0, r; }}"
    return Int32(_assembly(T.i32(), operands, text, "=r,f,f,f,f"))


@dsl_user_op
def unpack_e4m3_by_integers(four, *, loc=None, ip=None):
    """As `unpack_e4m3`, the same way back."""
    text = (
        "{ .reg .pred p; .reg .f32 x; .reg .b32 n, s; and.b32 n, $1, 127; setp.eq.u32 p, n, 127; shl.b32 n, n, 20; "
        "shl.b32 s, $1, 24; and.b32 s, s, 0x80000000; or.b32 n, n, s; mov.b32 x, n; mul.rn.f32 x, x, 0f7B800000; "
        "selp.f32 $0, 0f7FFFFFFF, x, p; }"
    )
    bytes_first = [Uint32(four) >> Uint32(8 * i) for i in range(4)]
    return tuple(Float32(_assembly(T.f32(), [x.ir_value(loc=loc, ip=ip)], text, "=f,r")) for x in bytes_first)


PACKS_BEFORE_ADA = PACKS | {torch.float8_e4m3fn: pack_e4m3_by_integers}
UNPACKS_BEFORE_ADA = UNPACKS | {torch.float8_e4m3fn: unpack_e4m3_by_integers}


@dsl_user_op
def max_nan(a, b, *, loc=None, ip=None):
    """Maximum that a NaN survives."""
    operands = [Float32(x).ir_value(loc=loc, ip=ip) for x in (a, b)]
    return Float32(_assembly(T.f32(), operands, "max.NaN.f32 $0, $1, $2;", "=f,f,f"))


@dsl_user_op
def round_to_int8(a, b, c, d, *, loc=None, ip=None):
    """Four float32, to the nearest integers from -127 to 127, in one register, the first lowest; NaN is 0."""
    operands = [Float32(x).ir_value(loc=loc, ip=ip) for x in (a, b, c, d)]
    rounds = "".join(f"cvt.rni.s32.f32 r{i}, ${i + 1}; max.s32 r{i}, r{i}, -127; " for i in range(4))
    packs = "cvt.pack.sat.s8.s32.b32 r2, r3, r2, 0; cvt.pack.sat.s8.s32.b32 $0, r1, r0, r2;"
    return Int32(_assembly(T.i32(), operands, f"{{ .reg .s32 r0, r1, r2, r3; {rounds}{packs} }}", "=r,f,f,f,f"))


@dsl_user_op
def add_squares(four, total, *, loc=None, ip=None):
    """The total, and the squares of the four int8 of a register."""
    operands = [Int32(x).ir_value(loc=loc, ip=ip) for x in (four, total)]
    return Int32(_assembly(T.i32(), operands, "dp4a.s32.s32 $0, $1, $1, $2;", "=r,r,r"))


@dsl_user_op
def as_float(bits, *, loc=None, ip=None):
    """The float32 whose bits these are."""
    return Float32(llvm.bitcast(T.f32(), Int32(bits).ir_value(loc=loc, ip=ip), loc=loc, ip=ip))


@dsl_user_op
def as_int(x, *, loc=None, ip=None):
    """The bits of a float32."""
    return Int32(llvm.bitcast(T.i32(), Float32(x).ir_value(loc=loc, ip=ip), loc=loc, ip=ip))


@cute.jit
def uniform_float(x: Float32) -> Float32:
    """A float32 that all threads of a warp have, said so."""
    return as_float(cute.arch.make_warp_uniform(as_int(x)))


@cute.jit
def has_bit(word: Uint32, bit: Int32) -> Int32:
    """1 if a bit is set."""
    return Int32((word >> Uint32(bit)) & Uint32(1))


@cute.jit
def quad_max(x: Float32) -> Float32:
    """Maximum over the four threads that hold a row."""
    x = max_nan(x, cute.arch.shuffle_sync_bfly(x, offset=1))
    return max_nan(x, cute.arch.shuffle_sync_bfly(x, offset=2))


@cute.jit
def quad_sum(x: Float32) -> Float32:
    """Sum over the four threads that hold a row."""
    x += cute.arch.shuffle_sync_bfly(x, offset=1)
    return x + cute.arch.shuffle_sync_bfly(x, offset=2)


@dsl_user_op
def held(x, *, loc=None, ip=None):
    """A number that the compiler keeps, rather than compute it again in each turn of a loop to spare a register."""
    kind, result, text, constraints = Int32, T.i32(), "mov.b32 $0, $1;", "=r,r"
    if isinstance(x, Int64):
        kind, result, text, constraints = Int64, T.i64(), "mov.b64 $0, $1;", "=l,l"
    if isinstance(x, Float32):
        kind, result, text, constraints = Float32, T.f32(), "mov.b32 $0, $1;", "=f,f"
    operands = [kind(x).ir_value(loc=loc, ip=ip)]
    return kind(_assembly(result, operands, text, constraints, side_effects=True))
