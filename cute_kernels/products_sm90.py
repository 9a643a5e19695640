"""The two products of a Hopper kernel: their instructions, and how what they read lies in shared memory."""

from __future__ import annotations

import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hopper
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.tensor_utils import LayoutEnum

from lite_attention.cute_kernels.config import DTYPES, KernelConfig
from lite_attention.cute_kernels.ptx import TYPES

_K, _MN = OperandMajorMode.K, OperandMajorMode.MN


class Products:
    """Of queries and keys, and of weights and values."""

    def __init__(self, config: KernelConfig) -> None:
        self.config, self.stages = config, config.budget.stages
        self.tile_m, self.tile_n, self.head_dim = config.tile_m, config.tile_n, config.head_dim
        self.dtype, self.qk_dtype = TYPES[DTYPES[config.dtype]], TYPES[config.score_dtype]
        self.score_dtype = Int32 if config.quantization.scores is not None else Float32
        # A tile of V, and where tiles are in the whole. Products of 8 bits want keys innermost.
        self.v_dtype, self.keys_inside = TYPES[config.value_dtype], config.quantization.values is not None
        self.v_tile, self.v_tiles = (self.tile_n, self.head_dim), (None, 0)
        if self.keys_inside:
            self.v_tile, self.v_tiles = (self.head_dim, self.tile_n), (0, None)

    def tiled(self):
        """Both products, each consumer warpgroup with 64 rows."""
        groups = (self.config.budget.groups, 1, 1)
        return [cute.make_tiled_mma(cute.make_mma_atom(op), groups) for op in (self.qk_op(), self.pv_op())]

    def qk_op(self):
        """One product of queries and keys, 32 bytes of a row at a time."""
        source = warpgroup.OperandSource.SMEM
        shape = (64, self.tile_n, 32 * 8 // self.qk_dtype.width)
        if self.score_dtype is Int32:
            return warpgroup.MmaI8Op(self.qk_dtype, self.qk_dtype, Int32, shape, source, _K, _K)
        return warpgroup.MmaF16BF16Op(self.dtype, Float32, shape, source, _K, _K)

    def pv_op(self):
        """One product of weights and values."""
        source = warpgroup.OperandSource.RMEM
        shape = (64, self.config.budget.value_columns, self.config.quantization.key_multiple)
        if self.keys_inside:
            return warpgroup.MmaF8Op(self.v_dtype, self.v_dtype, Float32, shape, source, _K, _K)
        return warpgroup.MmaF16BF16Op(self.dtype, Float32, shape, source, _K, _MN)

    def layouts(self):
        """Of Q, and of the rings of K and V."""
        v_rows = self.v_tile[0] + self.config.budget.ones
        return (
            self.layout(self.qk_dtype, self.tile_m, self.head_dim),
            self.layout(self.qk_dtype, self.tile_n, self.head_dim, self.stages),
            self.layout(self.v_dtype, v_rows, self.v_tile[1], self.stages),
        )

    def layout(self, dtype, *shape: int):
        """Layout in shared memory, (rows, width) or (rows, width, stages), swizzled."""
        kind = hopper.get_smem_layout_atom(LayoutEnum.ROW_MAJOR, dtype, shape[1])
        return cute.tile_to_shape(warpgroup.make_smem_layout_atom(kind, dtype), shape, tuple(range(len(shape))))

    def as_tiled(self, q, k, v, out):
        """(B, S, H, D) as torch has it, to (S, D, H, B) as TMA tiles it; values with keys inside to (D, S, H, B)."""
        q, k, out = [cute.make_tensor(x.iterator, cute.select(x.layout, mode=[1, 3, 2, 0])) for x in (q, k, out)]
        v_modes = [2, 3, 1, 0] if self.keys_inside else [1, 3, 2, 0]
        v = cute.make_tensor(cute.recast_ptr(v.iterator, dtype=self.v_dtype), cute.select(v.layout, mode=v_modes))
        return q, k, v, out

    def loaded(self, v, *stages: int):
        """The part of V in shared memory, or of its layout, that TMA writes: less the ones beside it."""
        if const_expr(self.config.budget.ones):
            return cute.composition(v, (*self.v_tile, *stages))
        return v

    def operand_b(self, v):
        """V in shared memory as the second product reads it."""
        if const_expr(self.keys_inside):
            return v
        return cute.make_tensor(v.iterator, cute.select(v.layout, mode=[1, 0, 2]))

    def weights(self):
        """A register tensor of the weights of a warpgroup's tile, where the A operand has them."""
        each = 32 // self.v_dtype.width  # in a register
        layout = cute.make_layout(
            ((each, 2, 2), 1, self.tile_n // (8 * each)), stride=((1, each, 2 * each), 0, 4 * each)
        )
        return cute.make_rmem_tensor(layout, self.v_dtype)
