"""The two products by mma.sync: their instructions, and how what they read lies in shared memory and in registers.

A warp has 16 rows of every 16 * warps, in one block or two. The accumulator of a block is laid out as `fragments.py`
says, and its weights are the A operand of the second product as they lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint8, const_expr
from cutlass._mlir.dialects import cute_nvgpu
from cutlass.cute.atom import Trait, make_atom
from cutlass.cute.core import _pack_shape
from cutlass.cute.nvgpu import warp
from cutlass.cutlass_dsl import T

from lite_attention.cute_kernels.config import DTYPES, KernelConfig
from lite_attention.cute_kernels.ptx import TYPES

_E4M3_ONE = 0x38


@dataclass(frozen=True)
class MmaInt8Op(warp.mma.WarpMmaOp):
    """Product of 16 x 32 and 32 x 8 signed bytes, in int32, which the DSL has no name for."""

    def _make_trait(self, *, loc: Any = None, ip: Any = None, **_: Any) -> Trait:
        shape = _pack_shape((16, 8, 32), loc=loc, ip=ip).type.attribute
        # Of MLIR's types, those that have a sign: without one, bytes would be unsigned.
        return Trait(make_atom(cute_nvgpu.MmaAtomSM80Type.get(shape, T.si8(), T.si8(), T.i32()), loc=loc, ip=ip))

    def _verify_fragment_A(self, input: Any, *, loc: Any = None, ip: Any = None) -> None:
        pass

    def _verify_fragment_B(self, input: Any, *, loc: Any = None, ip: Any = None) -> None:
        pass


class Layouts(NamedTuple):
    """Of Q, and of the rings of K and V, in shared memory."""

    q: Any
    k: Any
    v: Any


class Operand(NamedTuple):
    """What a product loads of a tile in shared memory."""

    copy: Any
    source: Any
    target: Any  # registers as the copy has them
    fragment: Any  # and as the product has them


class Operands(NamedTuple):
    """The two products, and what they load."""

    qk: Any
    pv: Any
    q: Operand
    k: Operand
    v: Operand


class Accumulators(NamedTuple):
    """In registers, blocks of rows one after the other."""

    scores: Any
    weights: Any
    out: Any


class Products:
    """Of queries and keys, and of weights and values."""

    def __init__(self, config: KernelConfig) -> None:
        self.config, self.budget = config, config.budget
        self.tile_m, self.tile_n, self.head_dim = config.tile_m, config.tile_n, config.head_dim
        self.stages, self.blocks = config.budget.stages, config.budget.blocks
        self.dtype, self.qk_dtype = TYPES[DTYPES[config.dtype]], TYPES[config.score_dtype]
        self.v_dtype, self.keys_inside = TYPES[config.value_dtype], config.quantization.values is not None
        self.score_dtype = Int32 if config.quantization.scores is not None else Float32
        self.v_tile = (self.head_dim, self.tile_n) if self.keys_inside else (self.tile_n, self.head_dim)
        self.qk_step, self.pv_step = (32 * 8 // dtype.width for dtype in (self.qk_dtype, self.v_dtype))

    def tiled(self):
        """Both products."""
        warps = self.budget.warps
        ops = (self.op(self.qk_dtype), self.qk_step), (self.op(self.v_dtype), self.pv_step)
        return [cute.make_tiled_mma(op, (warps, 1, 1), permutation_mnk=(16 * warps, 16, step)) for op, step in ops]

    def op(self, dtype):
        """A product of 32 bytes of a row at a time."""
        if dtype is cutlass.Int8:
            return MmaInt8Op()
        if dtype.width == 8:
            return warp.MmaFP8Op(dtype, Float32, (16, 8, 32))
        return warp.MmaF16BF16Op(dtype, Float32, (16, 8, 16))

    def layouts(self):
        """In shared memory."""
        return Layouts(
            layout(self.qk_dtype, self.tile_m, self.head_dim),
            layout(self.qk_dtype, self.tile_n, self.head_dim, self.stages),
            layout(self.v_dtype, *self.v_tile, self.stages),
        )

    def as_tiled(self, q, k, v, out):
        """(B, S, H, D) as torch has it, to (S, D, H, B); values with keys inside to (D, S, H, B)."""
        q, k, out = [cute.make_tensor(x.iterator, cute.select(x.layout, mode=[1, 3, 2, 0])) for x in (q, k, out)]
        v_modes = [2, 3, 1, 0] if self.keys_inside else [1, 3, 2, 0]
        v = cute.make_tensor(cute.recast_ptr(v.iterator, dtype=self.v_dtype), cute.select(v.layout, mode=v_modes))
        return q, k, v, out

    def operands(self, qk_mma, pv_mma, sq, sk, sv, thread) -> Operands:
        """What a thread loads."""
        if const_expr(not self.keys_inside):
            stride = (self.tile_n, 1, self.tile_n * self.head_dim)
            sv = cute.composition(sv, cute.make_layout((self.head_dim, self.tile_n, self.stages), stride=stride))
        load, load_v = (
            cute.make_copy_atom(warp.LdMatrix8x8x16bOp(transpose=transpose, num_matrices=4), dtype)
            for transpose, dtype in ((False, self.qk_dtype), (not self.keys_inside, self.v_dtype))
        )
        qk, pv = qk_mma.get_slice(thread), pv_mma.get_slice(thread)
        q, k, v = (
            qk.make_fragment_A(qk.partition_A(sq)), qk.make_fragment_B(qk.partition_B(sk[None, None, 0])),
            pv.make_fragment_B(pv.partition_B(sv[None, None, 0])),
        )  # fmt: skip
        copies = cute.make_tiled_copy_A(load, qk_mma), cute.make_tiled_copy_B(load, qk_mma)
        copies += (cute.make_tiled_copy_B(load_v, pv_mma),)
        return Operands(
            qk_mma, pv_mma, *[
                Operand(copy, part.partition_S(shared), part.retile(fragment), fragment)
                for copy, part, shared, fragment in zip(
                    copies, [copy.get_slice(thread) for copy in copies], (sq, sk, sv), (q, k, v), strict=True
                )
            ]
        )  # fmt: skip

    def accumulators(self) -> Accumulators:
        """Scores, weights and output of a thread."""
        each = 32 // self.v_dtype.width  # in a register
        shape = ((each, 2, 2), self.blocks, self.tile_n // (8 * each))
        weights = cute.make_layout(shape, stride=((1, each, 2 * each), self.tile_n // 2, 4 * each))
        return Accumulators(
            cute.make_rmem_tensor(_accumulator(self.blocks, self.tile_n), self.score_dtype),
            cute.make_rmem_tensor(weights, self.v_dtype),
            cute.make_rmem_tensor(_accumulator(self.blocks, self.budget.value_columns), Float32),
        )

    def block_of(self, x, block: int):
        """Registers that are of a block of rows, in order."""
        size = cute.size(x.layout) // self.blocks
        return cute.make_tensor(x.iterator + block * size, cute.make_layout(size))

    @cute.jit
    def scores(self, operands: Operands, scores, stage):
        """The product of Q and a tile of K."""
        scores.fill(0)
        q, k = operands.q, operands.k
        for kk in cutlass.range_constexpr(self.head_dim // self.qk_step):
            cute.copy(q.copy, q.source[None, None, kk], q.target[None, None, kk])
            cute.copy(k.copy, k.source[None, None, kk, stage], k.target[None, None, kk])
            cute.gemm(operands.qk, scores, q.fragment[None, None, kk], k.fragment[None, None, kk], scores)

    @cute.jit
    def add_values(self, operands: Operands, acc: Accumulators, stage):
        """Add the product of the weights and a tile of V to the output, and beside it the sums of the weights."""
        v, columns = operands.v, self.budget.value_columns
        out = self.columns_of(acc.out, 0, self.head_dim)
        for kk in cutlass.range_constexpr(self.tile_n // self.pv_step):
            weights = acc.weights[None, None, kk]
            cute.copy(v.copy, v.source[None, None, kk, stage], v.target[None, None, kk])
            cute.gemm(operands.pv, out, weights, v.fragment[None, None, kk], out)
            if const_expr(self.budget.ones):
                sums = self.columns_of(acc.out, self.head_dim, columns)
                cute.gemm(operands.pv, sums, weights, self.fragment_of_ones(), sums)

    def columns_of(self, out, first: int, end: int):
        """Some columns of the output."""
        layout = _accumulator(self.blocks, end - first, self.budget.value_columns)
        return cute.make_tensor(out.iterator + first // 2, layout)

    def fragment_of_ones(self):
        """Eight columns of ones as the second product has them."""
        ones = cute.make_rmem_tensor(cute.make_layout(((4, 2), 1)), self.v_dtype)
        cute.recast_tensor(ones, Uint8).fill(_E4M3_ONE)
        return ones


def row_bytes(dtype, columns: int) -> int:
    """Bytes of a row that lie side by side in shared memory."""
    return 128 if columns * dtype.width % 1024 == 0 else 64


def layout(dtype, *shape: int):
    """Layout in shared memory, (rows, columns) or (rows, columns, stages), free of bank conflicts for ldmatrix."""
    width = row_bytes(dtype, shape[1]) * 8 // dtype.width
    swizzle = cute.make_swizzle(row_bytes(dtype, shape[1]).bit_length() - 5, 3 if dtype.width == 16 else 4, 3)
    atom = cute.make_composed_layout(swizzle, 0, cute.make_layout((8, width), stride=(width, 1)))
    return cute.tile_to_shape(atom, shape, tuple(range(len(shape))))


def _accumulator(blocks: int, columns: int, of_columns: int = 0):
    return cute.make_layout(((2, 2), blocks, columns // 8), stride=((1, 2), (of_columns or columns) // 2, 4))
