"""Kernels that make queries and keys ready for INT8, and values for FP8; `ops/quantize.py` says what they compute.

All are bound by memory. A thread holds 16 bytes of a row, and has several rows on their way. Thread blocks side by side
have neighboring heads, whose rows are neighbors in [B, S, H, D]. A row past the end is the last one once more: what
is computed and written for it is what is written anyway.
"""

from __future__ import annotations

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.memory
from cutlass import Boolean, Float32, Int8, Int32, Uint8, const_expr

from lite_attention.cute_kernels.config import REDUCE_DEPTH, QuantizeConfig
from lite_attention.cute_kernels.ptx import add_squares, max_nan, pack_e4m3, round_to_int8
from lite_attention.ops.quantize import LARGEST_FP8, LARGEST_INT8
from lite_attention.ops.units import LOG2_E

_THREADS = 128
_VECTOR = 8  # elements of 16 bytes
_KEYS = 16  # that change places among themselves
_LARGEST, _LARGEST_FP8 = float(LARGEST_INT8), float(LARGEST_FP8)


class _Rows:
    """Rows of one head in a team of threads, 16 bytes a thread: `lanes` threads have a row, a team `step` rows."""

    def __init__(self, config: QuantizeConfig, team: int) -> None:
        self.rows, self.head_dim, self.team = config.rows, config.head_dim, team
        self.lanes = config.head_dim // _VECTOR
        self.step = team // self.lanes

    def part(self, row, lane):
        """A thread's part of a row, or of anything as wide."""
        return cute.local_tile(row, (_VECTOR,), (lane,))

    @cute.jit
    def allowed(self, key_mask, batch: Int32, row: Int32) -> Boolean:
        """Whether a key takes part."""
        allowed = Boolean(True)
        if const_expr(key_mask is not None):
            allowed = key_mask[batch % key_mask.shape[0], row] != 0
        return allowed


class ChannelReduce(_Rows):
    """Sums of the allowed keys or largest magnitudes of their values, by channel; a block has a chunk of a head's."""

    def __init__(self, config: QuantizeConfig) -> None:
        super().__init__(config, _THREADS)
        self.max = config.op == "value_max"

    @cute.jit
    def __call__(self, k: cute.Tensor, key_mask, parts: cute.Tensor, stream: cuda.CUstream):
        """k (or v) [B, Sk, Hkv, D], key_mask uint8 [B or 1, Sk] or None, parts [B, Hkv, chunks, D]."""
        self.kernel(k, key_mask, parts).launch(
            grid=[k.shape[2] * parts.shape[2], k.shape[0], 1], block=[_THREADS, 1, 1], stream=stream
        )

    def with_next(self, total, x):
        """The sum of two, or the larger magnitude, that a NaN survives."""
        return max_nan(total, cute.math.absf(x)) if self.max else total + x

    @cute.kernel
    def kernel(self, k: cute.Tensor, key_mask, parts: cute.Tensor):
        """Each thread reduces its part of every `step`-th row, then one a channel what they have, always in order."""
        thread, _, _ = cute.arch.thread_idx()
        block, batch, _ = cute.arch.block_idx()
        head, chunk = block % k.shape[2], block // k.shape[2]
        lane, place = thread % self.lanes, thread // self.lanes
        layout = cute.make_layout((self.step, self.head_dim), stride=(self.head_dim, 1))
        shared = cutlass.memory.SmemAllocator().allocate_tensor(Float32, layout, 16)
        keys = cute.make_rmem_tensor(cute.make_layout((REDUCE_DEPTH, _VECTOR), stride=(_VECTOR, 1)), k.element_type)
        total = cute.make_rmem_tensor(_VECTOR, Float32)
        total.fill(0.0)
        for at in cutlass.range(0, self.rows, REDUCE_DEPTH * self.step, unroll=1):
            first = chunk * self.rows + at + place
            for i in cutlass.range_constexpr(REDUCE_DEPTH):
                row = cutlass.min(first + i * self.step, k.shape[1] - 1)
                cute.autovec_copy(self.part(k[batch, row, head, None], lane), keys[i, None])
            for i in cutlass.range_constexpr(REDUCE_DEPTH):
                row = cutlass.min(first + i * self.step, k.shape[1] - 1)
                if (first + i * self.step < k.shape[1]) & self.allowed(key_mask, batch, row):
                    for e in cutlass.range_constexpr(_VECTOR):
                        total[e] = self.with_next(total[e], Float32(keys[i, e]))
        cute.autovec_copy(total, self.part(shared[place, None], lane))
        cute.arch.sync_threads()
        if thread < self.head_dim:
            value = shared[0, thread]
            for i in cutlass.range_constexpr(1, self.step):
                value = self.with_next(value, shared[i, thread])
            parts[batch, head, chunk, thread] = value


class Quantize(_Rows):
    """INT8 values and their scales: one for the queries that a warp has, or for a tile of keys, which a block has."""

    def __init__(self, config: QuantizeConfig) -> None:
        self.query = config.op == "quantize_query"
        super().__init__(config, 32 if self.query else _THREADS)
        self.teams = _THREADS // self.team  # of a thread block
        self.loads = self.rows // self.step

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        mean: cute.Tensor,
        key_mask,
        values: cute.Tensor,
        scales: cute.Tensor,
        norms: cute.Tensor,
        lse_shift,
        scale: Float32,
        stream: cuda.CUstream,
    ):
        """x, values [B, S, H, D], mean [B, Hkv, D], scales, norms [B, H, groups]; scale, lse_shift [B, H, S]: of q."""
        self.kernel(x, mean, key_mask, values, scales, norms, lse_shift, scale).launch(
            grid=[x.shape[2] * cute.ceil_div(scales.shape[2], self.teams), x.shape[0], 1],
            block=[_THREADS, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self, x: cute.Tensor, mean: cute.Tensor, key_mask, values: cute.Tensor, scales: cute.Tensor,
        norms: cute.Tensor, lse_shift, scale: Float32,
    ):  # fmt: skip
        """Load the rows that share a scale, find their largest magnitude, and write them in steps of 1/127 of it."""
        thread, _, _ = cute.arch.thread_idx()
        block, batch, _ = cute.arch.block_idx()
        head, part = block % x.shape[2], block // x.shape[2]
        group = cutlass.min(part * self.teams + thread // self.team, scales.shape[2] - 1)
        lane, place = thread % self.lanes, thread % self.team // self.lanes
        first = group * self.rows + place
        kept = cute.make_rmem_tensor(cute.make_layout((self.loads, _VECTOR), stride=(_VECTOR, 1)), x.element_type)
        for i in cutlass.range_constexpr(self.loads):
            row = cutlass.min(first + i * self.step, x.shape[1] - 1)
            cute.autovec_copy(self.part(x[batch, row, head, None], lane), kept[i, None])
        shift = cute.make_rmem_tensor(_VECTOR, Float32)
        cute.autovec_copy(self.part(mean[batch, head // (x.shape[2] // mean.shape[1]), None], lane), shift)

        largest = Float32(0.0)
        for i in cutlass.range_constexpr(self.loads):
            row = cutlass.min(first + i * self.step, x.shape[1] - 1)
            if self.allowed(key_mask, batch, row):
                for e in cutlass.range_constexpr(_VECTOR):
                    largest = max_nan(largest, cute.math.absf(self.moved(kept[i, e], shift[e])))
            if const_expr(self.query):
                product = Float32(0.0)
                for e in cutlass.range_constexpr(_VECTOR):
                    product += Float32(kept[i, e]) * shift[e]
                product = self.sum_of_row(product)
                if lane == 0:
                    lse_shift[batch, head, row] = product * scale
        largest = self.max_of_team(largest, 0)
        inverse = _LARGEST / largest if largest > 0.0 else Float32(0.0)  # NaN is not above 0 either

        packed, longest = cute.make_rmem_tensor(_VECTOR // 4, Int32), Int32(0)
        for i in cutlass.range_constexpr(self.loads):
            row = cutlass.min(first + i * self.step, x.shape[1] - 1)
            for word in cutlass.range_constexpr(_VECTOR // 4):
                four = range(4 * word, 4 * word + 4)
                packed[word] = round_to_int8(*[self.moved(kept[i, e], shift[e]) * inverse for e in four])
            cute.autovec_copy(cute.recast_tensor(packed, Int8), self.part(values[batch, row, head, None], lane))
            squares = Int32(0)
            for word in cutlass.range_constexpr(_VECTOR // 4):
                squares = add_squares(packed[word], squares)
            longest = cutlass.max(longest, self.sum_of_row(squares))
        longest = self.max_of_team(Float32(longest), 1)
        if thread % self.team == 0:
            factor = scale * LOG2_E if const_expr(self.query) else Float32(1.0)
            step = largest / _LARGEST * factor
            scales[batch, head, group] = step
            norms[batch, head, group] = cute.math.sqrt(longest) * step

    def moved(self, x, shift):
        """An element in float32; the mean is taken off keys."""
        return Float32(x) if self.query else Float32(x) - shift

    @cute.jit
    def sum_of_row(self, x):
        """Sum over the threads of a row."""
        for bit in cutlass.range_constexpr(self.lanes.bit_length() - 1):
            x += cute.arch.shuffle_sync_bfly(x, offset=1 << bit)
        return x

    @cute.jit
    def max_of_team(self, x: Float32, turn: cutlass.Constexpr) -> Float32:
        """Maximum over the threads of a team, that a NaN survives. Turns have memory of their own."""
        for bit in cutlass.range_constexpr(5):
            x = max_nan(x, cute.arch.shuffle_sync_bfly(x, offset=1 << bit))
        if const_expr(self.team > 32):
            warps = self.team // 32
            layout = cute.make_layout((2, warps), stride=(warps, 1))
            shared = cutlass.memory.SmemAllocator().allocate_tensor(Float32, layout, 16)[turn, None]
            shared[cute.arch.warp_idx()] = x  # of all lanes the same
            cute.arch.sync_threads()
            for warp in cutlass.range_constexpr(warps):
                x = max_nan(x, shared[warp])
        return x


class QuantizeValue(_Rows):
    """FP8 values, transposed, from the largest magnitudes of their channels; a thread block has some keys of a head.

    A thread has 8 channels of 16 keys, so keys change places in its registers; a warp has 32 channels of 128 keys, so
    that what it reads of a row and writes of a channel are whole sectors of memory.
    """

    def __init__(self, config: QuantizeConfig) -> None:
        super().__init__(config, config.head_dim)

    @cute.jit
    def __call__(self, v: cute.Tensor, largest: cute.Tensor, key_mask, values: cute.Tensor, stream: cuda.CUstream):
        """v [B, Sk, Hkv, D], largest [B, Hkv, D], values: e4m3 as bytes [B, Hkv, D, Sk rounded up to 32]."""
        chunks = cute.ceil_div(values.shape[3], self.rows)
        self.kernel(v, largest, key_mask, values).launch(
            grid=[v.shape[2] * chunks, v.shape[0], 1], block=[self.team, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(self, v: cute.Tensor, largest: cute.Tensor, key_mask, values: cute.Tensor):
        """Position 4t + j of 16 keys is that of key 8 (j // 2) + 2t + j % 2. Past the end is the last 16 again."""
        thread, _, _ = cute.arch.thread_idx()
        block, batch, _ = cute.arch.block_idx()
        head, chunk = block % v.shape[2], block // v.shape[2]
        lane, sixteen = thread // 32 * 4 + thread % 4, chunk * (self.rows // _KEYS) + thread % 32 // 4
        sixteen = cutlass.min(sixteen, values.shape[3] // _KEYS - 1)
        kept = cute.make_rmem_tensor(cute.make_layout((_KEYS, _VECTOR), stride=(_VECTOR, 1)), v.element_type)
        for i in cutlass.range_constexpr(_KEYS):
            row = cutlass.min(sixteen * _KEYS + i, v.shape[1] - 1)
            cute.autovec_copy(self.part(v[batch, row, head, None], lane), kept[i, None])
        for i in cutlass.range_constexpr(_KEYS):
            row = cutlass.min(sixteen * _KEYS + i, v.shape[1] - 1)
            if (sixteen * _KEYS + i >= v.shape[1]) | ~self.allowed(key_mask, batch, row):
                cute.recast_tensor(kept[i, None], Int32).fill(0)
        most = cute.make_rmem_tensor(_VECTOR, Float32)
        cute.autovec_copy(self.part(largest[batch, head, None], lane), most)

        packed = cute.make_rmem_tensor(_KEYS // 4, Int32)
        for e in cutlass.range_constexpr(_VECTOR):
            inverse = _LARGEST_FP8 / most[e] if most[e] > 0.0 else Float32(0.0)  # NaN is not above 0 either
            usable = (inverse > 0.0) & (inverse < Float32.inf)
            for t in cutlass.range_constexpr(_KEYS // 4):
                four = [Float32(kept[2 * t + i, e]) * inverse for i in (0, 1, 8, 9)]
                packed[t] = pack_e4m3(*four) if usable else Int32(0)
            channel = values[batch, head, lane * _VECTOR + e, None]
            cute.autovec_copy(cute.recast_tensor(packed, Uint8), cute.local_tile(channel, (_KEYS,), (sixteen,)))
